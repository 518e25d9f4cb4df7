/* SPDX-License-Identifier: MIT */
/*
 * The live clone of a running guest, as that guest sees it.
 *
 * clone-pause: a vCPU reads the time stamp counter without end (payload.h,
 * TICKS) while the VMM clones it; the longest gap between two readings is the
 * pause, and what else kept the vCPU from running is in it: parking, saving
 * its state, the clone of its memory, faults after that, the child's VM being made
 * on another core, and whoever else uses the machine. `noise` is the longest gap of as long a
 * time without a clone.
 *
 * clone-recover: the parent reads at random from all resident memory and writes
 * to some; its own log of times tells when it was as fast as before.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kvm.h"

#define RESIDENT   (32 * MIB)
#define PAGES	   (RESIDENT / PAGE)
#define WRITES	   1000
#define CHILDREN   4
#define TIMEOUT_MS 60000

/* us of: the first clone, after nothing was written, after 2 and 16 runs of 2 MiB. */
enum { FIRST, AGAIN_0, AGAIN_2, AGAIN_16, GAPS };

struct pause {
	uint64_t bytes;
	bool ok, alone;	      /* alone: had real-time priority */
	struct subject *peer; /* a MAP_PRIVATE window */
	struct series gap[GAPS], cpu[GAPS], parked[GAPS], state, later, noise, writes, slowest, bare, copy;
};

static double us(double tsc)
{
	return tsc / tsc_per_ns() / 1e3;
}

/* This thread and the vCPU's: ahead of everybody else, or as usual. False: the process may not. */
static bool hurry(struct vmm *vmm, bool on)
{
	const struct sched_param param = {.sched_priority = on ? 1 : 0};
	int policy = on ? SCHED_FIFO : SCHED_OTHER, r = pthread_setschedparam(pthread_self(), policy, &param);

	return pthread_setschedparam(vmm->vcpu[0]->thread, policy, &param) == 0 && r == 0;
}

/* -- a guest that spins ---------------------------------------------------------------------------- */

/* Writes to n pages; waits until the guest has. */
static bool burst(struct vmm *vmm, uint64_t n)
{
	double begin = wall_ns();
	bool done = false;

	must(payload_poke(vmm, 0, iterations, n), "mailbox");
	hurry(vmm, n <= WRITES);
	must(payload_go(vmm, 0), "mailbox");
	while (!done && wall_ns() - begin < TIMEOUT_MS * 1e6) {
		usleep(200);
		done = payload_peek(vmm, 0, done) == payload_peek(vmm, 0, go);
	}
	hurry(vmm, false);
	return done;
}

/* What its vCPU does when it is started. */
static void spin(struct subject *s)
{
	struct vmm_entry entry = payload_entry(0);
	const struct payload_mailbox mailbox = {.program = PAYLOAD_TICKS, .base = s->base, .pages = PAGES};

	must(vmm_vcpu_enter(s->vmm->vcpu[0], &entry), "entry");
	must(payload_put(s->vmm, 0, &mailbox), "mailbox");
}

/* After some time in which the guest did run. */
static double longest_since(struct vmm *vmm, useconds_t wait)
{
	uint64_t count = payload_peek(vmm, 0, count);
	double begin = wall_ns();

	do
		usleep(wait);
	while (payload_peek(vmm, 0, count) - count < 1000 && wall_ns() - begin < TIMEOUT_MS * 1e6);
	return us((double)payload_peek(vmm, 0, longest));
}

/* The words that a burst writes: its times, so never the same twice. */
static void words(struct kage_vm *vm, uint64_t base, uint64_t word[PAGES])
{
	for (uint64_t i = 0; i < PAGES; i++)
		must(kage_vm_read(vm, base + i * PAGE, &word[i], 8), "read");
}

/* -- clone-pause --------------------------------------------------------------------------------------- */

struct gap {
	struct subject *s;
	double us;
};

/* The parent runs again, the child's memory is about to be attached. */
static void gap_taken(void *arg)
{
	struct gap *gap = arg;

	gap->us = longest_since(gap->s->vmm, 2000);
	hurry(gap->s->vmm, false);
	must(payload_poke(gap->s->vmm, 0, longest, 0), "mailbox");
}

/* One clone; the child stays, not started. */
static struct vmm *clone_once(struct pause *p, struct subject *s, unsigned which, bool counts)
{
	struct vmm_clone_times times;
	const struct vmm_clone_config config = {.paused = true, .times = &times};
	struct gap taken = {.s = s};
	struct vmm *child;
	double gap, later;

	memset(&s->cost, 0, sizeof(s->cost));
	s->attaching = gap_taken;
	s->arg = &taken;
	hurry(s->vmm, true);
	must(payload_poke(s->vmm, 0, longest, 0), "mailbox");
	must(vmm_clone(s->vmm, &config, &child), "clone");
	later = longest_since(s->vmm, 2000);
	s->attaching = NULL;
	gap = taken.us;
	p->ok &= gap > 0 && gap * 1e3 >= (double)times.memory_ns * 0.5;
	if (!counts)
		return child;
	series_add(&p->gap[which], gap);
	series_add(&p->later, later);
	series_add(&p->cpu[which], s->cost.clone / 1e3);
	series_add(&p->parked[which], (double)times.parked_ns / 1e3);
	if (which == FIRST)
		series_add(&p->state, (double)(times.state_ns + times.park_ns) / 1e3);
	return child;
}

/* The child has what the parent had, and keeps it while the parent writes. Nobody has read the parent's pages
 * before that: a break of a page that is mapped for reading costs twice as much (cow-native).
 */
static void first_writes(struct pause *p, struct subject *s, struct vmm *child, bool counts)
{
	static uint64_t before[PAGES], now[PAGES], of_child[PAGES];
	struct kage_vm *vm = vmm_ram_kage_vm(child->ram);
	uint64_t wrong = 0;

	words(vm, s->base, before);
	p->ok &= burst(s->vmm, WRITES);
	words(subject_vm(s), s->base, now);
	words(vm, s->base, of_child);
	for (uint64_t i = 0; i < PAGES; i++)
		wrong += of_child[i] != before[i] || !before[i] || (now[i] == before[i]) != (i >= WRITES);
	p->ok &= wrong == 0;
	if (!counts)
		return;
	series_add(&p->writes,
		   us((double)(payload_peek(s->vmm, 0, tsc_end) - payload_peek(s->vmm, 0, tsc_begin))));
	series_add(&p->slowest, us((double)payload_peek(s->vmm, 0, slowest)));
}

/* The same writes to a plain private window, and a copy of what is resident. */
static void peers(struct pause *p, bool counts)
{
	struct vmm *vmm = p->peer->vmm;
	struct host_memory from = host_anon(RESIDENT), to = host_anon(RESIDENT);
	double copy = wall_ns();

	memcpy(to.p, from.p, RESIDENT);
	copy = wall_ns() - copy;
	ram_settle(vmm->ram);
	must(vmm_vcpu_start(vmm->vcpu[0]), "start");
	p->ok &= !memcmp(to.p, from.p, RESIDENT) && burst(vmm, WRITES);
	vmm_stop(vmm);
	host_release(&from);
	host_release(&to);
	if (!counts)
		return;
	series_add(&p->copy, copy / 1e3);
	series_add(&p->bare, us((double)(payload_peek(vmm, 0, tsc_end) - payload_peek(vmm, 0, tsc_begin))));
}

static void sample_pause(struct pause *p, bool counts)
{
	struct subject *s = subject_kage(p->bytes);
	struct vmm *child[CHILDREN];
	double noise;

	spin(s);
	must(vmm_vcpu_start(s->vmm->vcpu[0]), "start");
	p->ok &= burst(s->vmm, PAGES);
	subject_settle(s);
	p->alone = hurry(s->vmm, true);
	must(payload_poke(s->vmm, 0, longest, 0), "mailbox");
	noise = longest_since(s->vmm, 10000);
	hurry(s->vmm, false);
	if (counts)
		series_add(&p->noise, noise);
	child[FIRST] = clone_once(p, s, FIRST, counts);
	first_writes(p, s, child[FIRST], counts);
	peers(p,
	      counts); /* now: each break is told to all VMs of the process, and there are as many for it */
	child[AGAIN_2] = clone_once(p, s, AGAIN_2, counts);
	child[AGAIN_0] = clone_once(p, s, AGAIN_0, counts);
	p->ok &= burst(s->vmm, PAGES);
	child[AGAIN_16] = clone_once(p, s, AGAIN_16, counts);
	vmm_stop(s->vmm);
	p->ok &= subject_sound(s);
	for (unsigned i = 0; i < CHILDREN; i++)
		vmm_destroy(child[i]);
	subject_destroy(s);
}

static struct row row_of(const struct pause *p, const char *name, const struct series *s)
{
	return (struct row){.suite = "kvm",
			    .name = name,
			    .unit = "us",
			    .value = series_median(s),
			    .spread = series_spread(s),
			    .isvoid = !p->ok};
}

static void again_row(const struct pause *p, const char *size, unsigned which, unsigned runs)
{
	char name[40];
	struct row row = row_of(p, name, &p->gap[which]);
	double more = series_median(&p->gap[which]) - series_median(&p->gap[AGAIN_0]);

	snprintf(name, sizeof(name), "clone-pause%s-again-%u", size, runs);
	if (!runs) {
		row.goal = GOAL_MOST;
		row.limit = 1000 + 500 * (double)RESIDENT / (double)GIB;
	}
	row_note(&row,
		 "the same after %u runs of 2 MiB were written, %.0f a run; parked %.0f; kage_vm_clone() "
		 "takes %.0f CPU; "
		 "best %.0f",
		 runs, runs ? more / runs : 0, series_median(&p->parked[which]),
		 series_median(&p->cpu[which]), series_quantile(&p->gap[which], 0));
	report_row(&row);
}

static void pause_rows(const struct bench *b, struct subject *peer, uint64_t bytes, const char *size)
{
	struct pause p = {.bytes = bytes, .ok = true, .peer = peer};
	struct row row;
	char name[40];

	for (unsigned i = 0; i <= b->reps; i++)
		sample_pause(&p, i > 0);
	row = row_of(&p, name, &p.gap[FIRST]);
	snprintf(name, sizeof(name), "clone-pause%s", size);
	row.peer = "memcpy() of the resident 32 MiB";
	row.peer_value = series_median(&p.copy);
	row.goal = GOAL_MOST;
	row.limit = 1000 + 0.3 * PAGES;
	row_note(&row,
		 "longest gap of a spinning vCPU, %lu MiB RAM, 32 MiB resident, first clone; parked %.0f, of "
		 "it parking and "
		 "state %.0f; kage_vm_clone() takes %.0f CPU; best %.0f; later %.0f; noise %.0f%s",
		 (unsigned long)(bytes / MIB), series_median(&p.parked[FIRST]), series_median(&p.state),
		 series_median(&p.cpu[FIRST]), series_quantile(&p.gap[FIRST], 0), series_median(&p.later),
		 series_median(&p.noise), p.alone ? "" : " (no real-time priority)");
	report_row(&row);
	row = row_of(&p, name, &p.writes);
	snprintf(name, sizeof(name), "clone-pause%s-writes", size);
	row.peer = "the same on a plain MAP_PRIVATE memfd";
	row.peer_value = series_median(&p.bare);
	row_note(&row,
		 "the guest's first write to each of 1,000 pages after it, in guest time; the slowest took "
		 "%.0f us",
		 series_median(&p.slowest));
	report_row(&row);
	again_row(&p, size, AGAIN_0, 0);
	again_row(&p, size, AGAIN_2, 2);
	again_row(&p, size, AGAIN_16, 16);
}

/* -- clone-recover --------------------------------------------------------------------------------------- */

#define LOG_LEN	  ((uint64_t)1 << 17)
#define WINDOW_MS 2.0
#define BEFORE_MS 60
#define AFTER_MS  250

struct recover {
	uint64_t write_pages;
	unsigned unrecovered;
};

/* ms from `from` until a window of WINDOW_MS is at least at 0.9 of the speed before; < 0: never. */
static double recovered(const uint64_t *log, uint64_t first, uint64_t end, uint64_t from)
{
	struct series before = {0};
	double window = WINDOW_MS * 1e6 * tsc_per_ns(), speed;
	uint64_t cut = first, j;

	while (cut < end && log[cut % LOG_LEN] < from)
		cut++;
	for (unsigned k = 1; k <= 15; k++) { /* entries in a window, of 30 ms that end 4 ms before */
		double at = (double)from - (4e6 + k * WINDOW_MS * 1e6) * tsc_per_ns();
		unsigned n = 0;

		for (j = first; j < cut; j++)
			n += (double)log[j % LOG_LEN] >= at && (double)log[j % LOG_LEN] < at + window;
		series_add(&before, n);
	}
	speed = series_median(&before);
	for (uint64_t i = j = cut; i < end; i++) {
		while (j < end && (double)(log[j % LOG_LEN] - log[i % LOG_LEN]) < window)
			j++;
		if (j == end)
			break;
		if ((double)(j - i) >= 0.9 * speed)
			return (double)(log[i % LOG_LEN] - from) / tsc_per_ns() / 1e6;
	}
	return -1;
}

static double sample_recover(void *arg)
{
	struct recover *r = arg;
	static uint64_t log[LOG_LEN];
	struct subject *s = subject_kage(512 * MIB);
	struct guest_args args = {.program = GUEST_MIXED,
				  .base = s->base,
				  .pages = PAGES,
				  .iterations = UINT64_MAX,
				  .write_pages = r->write_pages,
				  .log = s->base + RESIDENT,
				  .log_len = LOG_LEN};
	struct guest_args all = {.program = GUEST_TOUCH,
				 .base = s->base,
				 .pages = PAGES + LOG_LEN * 8 / PAGE,
				 .stride = 1,
				 .mode = GUEST_WRITE};
	const uint64_t stop = 1;
	struct vmm *child;
	uint64_t end;
	double ms;
	bool ok = subject_round(s, &all) > 0;

	subject_settle(s);
	subject_start(s, &args);
	usleep(BEFORE_MS * 1000);
	must(vmm_clone(s->vmm, &(struct vmm_clone_config){.paused = true}, &child), "clone");
	usleep(AFTER_MS * 1000);
	subject_write(s, GUEST_ARGS + offsetof(struct guest_args, stop), &stop, 8);
	ok &= subject_wait(s, &args, TIMEOUT_MS) == 0;
	must(kage_vm_read(subject_vm(s), args.log, log, sizeof(log)), "log");
	end = args.count / GUEST_LOG_STEP;
	ms = recovered(log, end > LOG_LEN ? end - LOG_LEN + 1 : 0, end, s->cost.cloned_tsc);
	r->unrecovered += ms < 0;
	vmm_destroy(child);
	subject_destroy(s);
	return ok ? (ms < 0 ? AFTER_MS : ms) : -1;
}

static void recover_row(const struct bench *b, const char *name, uint64_t write_pages, const char *what)
{
	struct recover r = {.write_pages = write_pages};
	struct row row = {.suite = "kvm", .name = name, .unit = "ms", .goal = GOAL_MOST, .limit = 50};
	struct turns t = take_turns(b, sample_recover, &r, NULL, NULL);

	row_note(&row,
		 "after the pause, until 2 ms were at 0.9 of the speed before; 32 MiB read at random, every "
		 "8th access also "
		 "writes to %s; the child's VM is made meanwhile; %u of %u did not within %d ms",
		 what, r.unrecovered, b->reps + 1, AFTER_MS);
	report_turns(&row, &t);
}

void bench_pause(const struct bench *b)
{
	struct subject *peer = subject_plain(RAM_PRIVATE, RESIDENT + 16 * MIB);

	spin(peer);
	pause_rows(b, peer, 512 * MIB, "");
	pause_rows(b, peer, 4 * GIB, "-4g");
	if (!b->quick)
		pause_rows(b, peer, 16 * GIB, "-16g");
	subject_destroy(peer);
	recover_row(b, "clone-recover", 512, "2 MiB of it");
	recover_row(b, "clone-recover-writes", PAGES, "any of it");
}
