/* SPDX-License-Identifier: MIT */
/*
 * The full product of what tables and modes can say (format_space.h), for every
 * format: the engine's walk, its rights, its faults and what it writes back,
 * against the reference walkers. Registers go through a vCPU; from what it makes
 * of them the walk is called as the shadow MMU calls it, over the few entries of
 * a combination, which is what makes the whole product a matter of minutes. That
 * vCPUs do with the answer what they should, caches included, is for
 * test_format_permissions.c (a sample of the same space) and test_random_tables.c.
 *
 * Without more, KAGE_CASES of each space are done: every so many combinations, with a
 * stride that has no divisor in common with the size, so that any number of them is spread over
 * all dimensions and none comes twice. Each day goes on behind the last one's, and so comes to others: KAGE_SEED
 * (the number of the day) times KAGE_CASES strides are left out. It is printed: with it, a failure comes again.
 * KAGE_CASES=0: the whole product, in order. KAGE_FORMAT: one space by name.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../backends/soft/vcpu.h"
#include "format_space.h"
#include "rng.h"

#define CASES 250000
#define NOBODY UINT64_MAX

struct product {
	const struct space *space;
	struct space_case c;
	uint64_t number, seed, cases;
	uint64_t after[SPACE_ENTRIES]; /* by the reference */
	struct pt_guest mode[SPACE_MODES_MAX];
	struct ref_cpu x86[SPACE_MODES_MAX];
	struct arm64_ref_cpu arm64[SPACE_MODES_MAX];
	uint64_t granted, faults, updated, kinds;
};

struct verdict {
	bool granted;
	uint64_t gpa;
	uint32_t vector, error, level; /* granted: level alone */
	bool level_open;
};

__attribute__((noreturn)) static void differs(const struct product *p, const char *what, const struct verdict *got,
					       const struct verdict *want)
{
	fprintf(stderr, "%s: combination %llu: %s; again: KAGE_SEED=%llu KAGE_CASES=%llu KAGE_FORMAT=%s\n",
		p->space->name, (unsigned long long)p->number, what, (unsigned long long)p->seed,
		(unsigned long long)p->cases, p->space->name);
	fprintf(stderr, "  mode %x, access %u at %llx\n", p->c.mode, p->c.access, (unsigned long long)p->c.va);
	for (unsigned i = 0; i < p->c.n; i++)
		fprintf(stderr, "  entry at %llx: %llx, by the reference then %llx\n",
			(unsigned long long)p->c.entry[i].gpa, (unsigned long long)p->c.entry[i].value,
			(unsigned long long)p->after[i]);
	fprintf(stderr, "  engine:    %s gpa %llx vector %x error %x level %u\n", got->granted ? "granted" : "fault",
		(unsigned long long)got->gpa, got->vector, got->error, got->level);
	fprintf(stderr, "  reference: %s gpa %llx vector %x error %x level %u\n", want->granted ? "granted" : "fault",
		(unsigned long long)want->gpa, want->vector, want->error, want->level);
	exit(EXIT_FAILURE);
}

/* -- the reference -------------------------------------------------------- */

/* Of the entry in the eight bytes at gpa; tables lie 64 KiB apart, one a level. */
static uint64_t *entry_at(struct product *p, uint64_t gpa, unsigned *bit)
{
	unsigned level = (unsigned)(gpa >> 16 & 7), n = p->space->top - level;

	if (level > p->space->top || n >= p->c.n || (p->c.entry[n].gpa & ~UINT64_C(7)) != gpa)
		return NULL;
	*bit = (unsigned)(p->c.entry[n].gpa & 7) * 8;
	return &p->after[n];
}

static bool reference_read(void *arg, uint64_t gpa, uint64_t *value)
{
	unsigned bit;
	const uint64_t *e = entry_at(arg, gpa, &bit);

	if (e)
		*value = *e << bit;
	return e;
}

static bool reference_write(void *arg, uint64_t gpa, uint64_t value)
{
	struct product *p = arg;
	unsigned bit;
	uint64_t *e = entry_at(p, gpa, &bit);

	if (e)
		*e = p->space->entry_bytes == 4 ? (value >> bit & UINT32_MAX) : value;
	return e;
}

static struct verdict ask_arm64(struct product *p, const struct ref_memory *m)
{
	static const enum arm64_ref_access kinds[] = { ARM64_REF_READ, ARM64_REF_WRITE, ARM64_REF_FETCH };
	struct arm64_ref_result r = arm64_ref_translate(&p->arm64[p->c.mode], m, p->c.va, kinds[p->c.access]);

	return (struct verdict){ .granted = r.outcome == ARM64_REF_OK,
				 .gpa = r.outcome == ARM64_REF_ABORT ? 0 : r.gpa,
				 .vector = r.ec,
				 .error = r.iss,
				 .level = (uint32_t)(3 - r.level) };
}

static struct verdict ask_x86(struct product *p, const struct ref_memory *m)
{
	static const enum ref_access kinds[] = { REF_READ, REF_WRITE, REF_FETCH, REF_READ, REF_WRITE };
	struct ref_cpu *c = &p->x86[p->c.mode];
	struct ref_result r;

	c->implicit = p->c.access == FG_IMPLICIT_READ || p->c.access == FG_IMPLICIT_WRITE;
	r = ref_translate(c, m, p->c.va, kinds[p->c.access]);
	if (r.outcome == REF_OK)
		return (struct verdict){ .granted = true, .gpa = r.gpa,
					 .level = r.size == 12 ? 0 : r.size == 30 ? 2 : 1 };
	/* as in format_guest.c: of rights that several levels deny together no level is known */
	return (struct verdict){ .vector = 14, .error = r.error, .level = r.level, .level_open = (r.error & 9) == 1 };
}

/* -- the engine ----------------------------------------------------------- */

static int engine_read(void *arg, uint64_t gpa, unsigned bytes, uint64_t *entry)
{
	const struct product *p = arg;

	for (unsigned i = 0; i < p->c.n; i++)
		if (p->c.entry[i].gpa == gpa) {
			*entry = p->c.entry[i].value;
			return 0;
		}
	return -EFAULT;
}

static struct verdict walk(struct product *p, uint32_t access, int *root, struct pt_guest_path *path)
{
	const struct pt_guest *g = &p->mode[p->c.mode];
	struct pt_rights rights;
	struct pt_fault f;

	*root = g->arch->root_of(g, p->c.va);
	if (*root < 0 || pt_root_walk(&g->root[*root], p->c.va, engine_read, p, path))
		return (struct verdict){ .gpa = NOBODY };
	rights = pt_path_rights(path);
	if (path->state == PT_LEAF && g->arch->allows(g, rights, access))
		return (struct verdict){ .granted = true, .gpa = path->gpa, .level = path->level };
	f = g->arch->fault(g, path->state, path->level, rights, access);
	return (struct verdict){ .vector = f.vector, .error = f.error, .level = f.level };
}

/* What the entries are after the use, of a use that was granted. */
static void check_updates(struct product *p, int root, const struct pt_guest_path *path, const struct verdict *got)
{
	const struct pt_guest *g = &p->mode[p->c.mode];
	bool write = p->c.access == FG_WRITE || p->c.access == FG_IMPLICIT_WRITE;

	for (unsigned i = 0; i < p->c.n; i++) {
		uint64_t e = p->c.entry[i].value;

		if (got->granted)
			e = g->arch->used(&g->root[root], e, p->space->top - i == path->level, write);
		if (e != p->after[i])
			differs(p, "entries after the use", got, got);
		p->updated += e != p->c.entry[i].value;
	}
}

static void one_case(struct product *p)
{
	static const uint32_t kinds[] = { KAGE_READ, KAGE_WRITE, KAGE_EXEC, KAGE_READ | KAGE_IMPLICIT,
					  KAGE_WRITE | KAGE_IMPLICIT };
	const struct ref_memory m = { reference_read, reference_write, p };
	const struct pt_guest *g;
	struct pt_guest_path path;
	struct verdict want, got;
	int root;

	space_case_of(p->space, p->number, &p->c);
	for (unsigned i = 0; i < p->c.n; i++)
		p->after[i] = p->c.entry[i].value;
	want = p->space->arm64 ? ask_arm64(p, &m) : ask_x86(p, &m);
	got = walk(p, kinds[p->c.access], &root, &path);
	if (got.granted != want.granted || got.gpa != want.gpa || got.vector != want.vector ||
	    got.error != want.error || (!want.level_open && got.level != want.level))
		differs(p, "the answer", &got, &want);
	check_updates(p, root, &path, &got);
	g = &p->mode[p->c.mode];
	if (path.state == PT_LEAF && p->c.access <= FG_FETCH &&
	    !(g->arch->allowed(g, pt_path_rights(&path)) & kinds[p->c.access]) != !got.granted)
		differs(p, "what is allowed in all", &got, &want);
	p->granted += got.granted;
	p->faults += !got.granted;
	p->kinds |= got.granted ? 0 : (uint64_t)1 << (got.error & 63);
}

/* -- spaces --------------------------------------------------------------- */

/* What a vCPU makes of the registers of every mode. */
static void make_modes(struct product *p)
{
	struct fg_config config = space_config(p->space);
	struct format_guest g;

	fg_create(&g, &config);
	snprintf(g.about, sizeof(g.about), "%s: registers", p->space->name);
	if (space_is_pae(p->space))
		fg_write(&g, SPACE_PDPT + 16, SPACE_PDPTE, 8);
	for (unsigned mode = 0; mode < space_modes(p->space); mode++) {
		space_registers(p->space, mode, &g.x86, &g.arm64);
		fg_require(&g, fg_set_regs(&g) == KAGE_OK, "kage_vcpu_set_regs");
		p->mode[mode] = g.vcpu->cpu.mode;
		p->x86[mode] = g.x86;
		p->arm64[mode] = g.arm64;
	}
	fg_destroy(&g);
}

/* seed * done strides on from 0. */
static uint64_t first_number(uint64_t seed, uint64_t done, uint64_t stride, uint64_t size)
{
	return (uint64_t)((unsigned __int128)seed * done % size * stride % size);
}

static void run_space(const struct fg_case *c)
{
	static struct product p;
	uint64_t size, done, stride;

	p = (struct product){ .space = &spaces[c->arg], .seed = seed_of_today() };
	size = space_size(p.space);
	done = env_number("KAGE_CASES", env_number("KAGE_SHORT", 0) ? CASES / 10 : CASES);
	stride = space_stride(p.space);
	p.cases = done;
	make_modes(&p);
	if (done == 0 || done >= size)
		done = size, stride = 1;
	else
		p.number = first_number(p.seed, done, stride, size);
	for (uint64_t i = 0; i < done; i++) {
		one_case(&p);
		p.number += stride;
		if (p.number >= size)
			p.number -= size;
	}
	printf("%s: %llu of %llu combinations, seed %llu: %llu granted, %llu faults of %d kinds, %llu entries updated\n",
	       c->name, (unsigned long long)done, (unsigned long long)size, (unsigned long long)p.seed, (unsigned long long)p.granted,
	       (unsigned long long)p.faults, __builtin_popcountll(p.kinds), (unsigned long long)p.updated);
	if (!p.granted || !p.faults || !p.updated) {
		fprintf(stderr, "%s: one-sided\n", c->name);
		exit(EXIT_FAILURE);
	}
}

int main(void)
{
	struct fg_case cases[64];

	for (unsigned i = 0; i < nspaces; i++)
		cases[i] = (struct fg_case){ spaces[i].name, run_space, i };
	return fg_run_cases("format product", cases, nspaces);
}
