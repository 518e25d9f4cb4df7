/* SPDX-License-Identifier: MIT */
/*
 * Guests of KVM in one engine and one process: what another guest costs with few
 * and with many beside it. The kernel tells each VM of the process of every
 * change of a mapping, whichever VM it concerns (mmu notifiers belong to the
 * process), so the price of a change grows with the number of VMs; this says how much.
 *
 * Each guest writes 4 MiB, every second page as all others do; steps merge; each is
 * cloned (memory alone: no VM is made for a clone); all end. CPU of all threads that work on it.
 */
#include <stdlib.h>

#include "kvm.h"

#define MANY  100
#define FEW   8
#define PAGES 512
#define BYTES (16 * MIB)

enum part {
	CREATE,
	FAULT,
	MERGE,
	CLONE,
	DESTROY,
	PARTS,
};

struct herd {
	unsigned guests;
	struct series part[PARTS];
	double ns[PARTS];
	struct subject *s[MANY];
	struct kage_vm *clone[MANY];
	bool ok, counts;
};

static void create(struct herd *h)
{
	for (unsigned g = 0; g < h->guests; g++)
		h->s[g] = g ? subject_kage_beside(h->s[0], BYTES) : subject_kage(BYTES);
}

/* Pages that all guests have, then pages of its own. The time is the guest's. */
static double fault(struct herd *h)
{
	double ns = 0;

	for (unsigned g = 0; g < h->guests; g++) {
		for (unsigned half = 0; half < 2; half++) {
			struct subject *s = h->s[g];
			struct guest_args args = {.program = GUEST_TOUCH,
						  .base = s->base + half * PAGES * PAGE,
						  .pages = PAGES,
						  .stride = 1,
						  .mode = GUEST_WRITE,
						  .seed = half ? g + 2 : 1};

			ns += subject_round(s, &args);
			h->ok &= args.count == PAGES;
		}
	}
	return ns;
}

static void merge(struct herd *h)
{
	subject_merge(h->s[0]);
}

static void clone_all(struct herd *h)
{
	for (unsigned g = 0; g < h->guests; g++)
		must(kage_vm_clone(subject_vm(h->s[g]), NULL, &h->clone[g]), "clone");
}

static void destroy_all(struct herd *h)
{
	for (unsigned g = h->guests; g--;) {
		must(kage_vm_destroy(h->clone[g]), "destroy clone");
		subject_destroy(h->s[g]);
	}
}

static void check_all(struct herd *h)
{
	struct kage_stats s = {.size = sizeof(s)};
	uint64_t word;

	must(kage_counters_get(h->s[0]->engine, NULL, &s), "counters");
	h->ok &= s.ksm_merges >= (uint64_t)PAGES * (h->guests - 1);
	for (uint64_t k = 0; k < 1000; k++) {
		unsigned g = (unsigned)(mix(k) % h->guests), half = k & 1;
		uint64_t i = mix(k + 1000) % PAGES, at = h->s[g]->base + (half * PAGES + i) * PAGE;

		must(kage_vm_read(h->clone[g], at, &word, 8), "read");
		h->ok &= word == guest_word(guest_key(i, 0), half ? g + 2 : 1) &&
			 subject_word(h->s[g], at) == word;
	}
}

static void timed(struct herd *h, enum part part, void (*work)(struct herd *h))
{
	double ns = cpu_ns();

	work(h);
	h->ns[part] = (cpu_ns() - ns) / h->guests / 1000;
}

static double sample_herd(void *arg)
{
	struct herd *h = arg;
	double sum = 0;

	h->ok = true;
	timed(h, CREATE, create);
	h->ns[FAULT] = fault(h) / h->guests / 1000;
	timed(h, MERGE, merge);
	timed(h, CLONE, clone_all);
	check_all(h);
	timed(h, DESTROY, destroy_all);
	for (unsigned i = 0; i < PARTS; i++) {
		sum += h->ns[i];
		if (h->counts)
			series_add(&h->part[i], h->ns[i]);
	}
	h->counts = true; /* not the first round */
	return h->ok ? sum : -1;
}

static void slope_note(struct row *row, const struct herd *many, const struct herd *few, const char *what)
{
	double slope = (row->value - row->peer_value) / (many->guests - few->guests);

	row_note(row, "us a guest of %u, %s; %.2f us more with each further guest", many->guests, what,
		 slope);
	row->peer = "a guest of few";
}

static void part_rows(const struct herd *many, const struct herd *few, bool ok)
{
	static const char *const name[PARTS] = {"scale-create", "scale-fault", "scale-merge", "scale-clone",
						"scale-destroy"};
	static const char *const what[PARTS] = {"VM, vCPU and memory", "its first writes to 1,024 pages",
						"steps until nothing more merges; 512 pages of each do",
						"cloning its memory", "ending it and the clone"};

	for (unsigned i = 0; i < PARTS; i++) {
		struct row row = {.suite = "kvm",
				  .name = name[i],
				  .unit = "us",
				  .isvoid = !ok,
				  .value = series_median(&many->part[i]),
				  .spread = series_spread(&many->part[i]),
				  .peer_value = series_median(&few->part[i])};

		slope_note(&row, many, few, what[i]);
		report_row(&row);
	}
}

void bench_scale(const struct bench *b)
{
	struct bench fewer = {.quick = b->quick, .smoke = b->smoke, .reps = b->quick ? 1 : 5};
	struct herd *many = must_map(calloc(1, sizeof(*many)), "memory"),
		    *few = must_map(calloc(1, sizeof(*few)), "memory");
	struct row row = {.suite = "kvm", .name = "scale-guests", .unit = "us"};
	struct turns t;

	many->guests = b->quick ? 40 : MANY;
	few->guests = b->quick ? 4 : FEW;
	t = take_turns(&fewer, sample_herd, many, sample_herd, few);
	row.value = series_median(&t.ours);
	row.peer_value = series_median(&t.peer);
	slope_note(&row, many, few, "all parts");
	report_turns(&row, &t);
	part_rows(many, few, t.ok);
	free(many);
	free(few);
}
