/* SPDX-License-Identifier: MIT */
/*
 * The engine's guest walk and permission rules (pt/) against the reference:
 * every combination of the permission space, then random tables, modes and
 * addresses that the space does not hold (5 levels, large pages, keys, NXE
 * off, ignored bits, implicit accesses, absent entries).
 */
#include <check.h>
#include <stdlib.h>

#include "perm_space.h"
#include "pt/pt.h"

/* A page of entries for each level, and nothing else, is all the guest's memory. */
#define TABLES_BASE ((uint64_t)0x100000)

static uint64_t tables[5][512];
static uint64_t seed;

static uint64_t random64(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed * 0x2545f4914f6cdd1d;
}

static uint64_t *table_word(uint64_t gpa)
{
	if (gpa < TABLES_BASE || gpa >= TABLES_BASE + sizeof(tables))
		return NULL;
	return &tables[(gpa - TABLES_BASE) >> 12][(gpa & 0xfff) / 8];
}

static bool reference_read(void *arg, uint64_t gpa, uint64_t *value)
{
	const uint64_t *p = table_word(gpa);

	if (p)
		*value = *p;
	return p;
}

static int engine_read(void *arg, uint64_t gpa, unsigned bytes, uint64_t *entry)
{
	const uint64_t *p = table_word(gpa);

	if (!p || bytes != 8)
		return -EFAULT;
	*entry = *p;
	return 0;
}

static const struct ref_memory memory = { .read = reference_read };

struct answer {
	enum ref_outcome outcome;
	uint64_t gpa;
	uint32_t error;
	unsigned level;
};

/* ck_assert() writes to a file each time, which millions of cases cannot afford. */
static void require(bool holds)
{
	if (!holds)
		ck_abort();
}

static struct x86_mode mode_of(const struct ref_cpu *c)
{
	return (struct x86_mode){
		.wp = c->cr0 >> 16 & 1, .smep = c->cr4 >> 20 & 1, .smap = c->cr4 >> 21 & 1,
		.pke = c->cr4 >> 22 & 1, .nxe = c->efer >> 11 & 1, .user = c->cpl == 3,
		.ac = c->rflags >> 18 & 1, .pkru = c->pkru,
	};
}

static struct answer ask_engine(const struct ref_cpu *c, uint64_t addr, enum ref_access access)
{
	struct x86_mode m = mode_of(c);
	struct pt_params p = { .phys_bits = c->phys_bits, .nx = m.nxe, .page1g = c->page1gb };
	uint32_t kind = (1u << access) | (c->implicit ? KAGE_IMPLICIT : 0);
	struct pt_guest_path path;
	struct answer a = { 0 };

	require(pt_guest_walk(c->cr4 & 0x1000 ? &pt_x86_5 : &pt_x86_4, &p, c->cr3 & ~0xfffull, addr,
			      engine_read, NULL, &path) == 0);
	a.level = path.level;
	if (path.state == PT_POISON) {
		a.outcome = REF_NO_MEMORY;
		a.gpa = path.step[path.level].gpa;
		return a;
	}
	a.error = path.state == PT_LEAF ? x86_check(&m, path.perm, path.user, path.pkey, kind) :
					  x86_walk_error(&m, kind, path.state == PT_RESERVED);
	a.outcome = path.state != PT_LEAF || a.error ? REF_PAGE_FAULT : REF_OK;
	if (a.outcome == REF_OK) {
		a.gpa = path.gpa;
		/* x86_allowed() is the same rule, asked for all kinds at once */
		require(c->implicit || (x86_allowed(&m, path.perm, path.user, path.pkey) & kind));
	}
	return a;
}

static bool same(const struct answer *a, const struct ref_result *r)
{
	return a->outcome == r->outcome && a->gpa == r->gpa && a->error == r->error && a->level == r->level;
}

static void compare(const struct ref_cpu *c, uint64_t addr, enum ref_access access)
{
	struct ref_result r = ref_translate(c, &memory, addr, access);
	struct answer a = ask_engine(c, addr, access);

	if (same(&a, &r))
		return;
	ck_abort_msg(
		"cr0 %llx cr4 %llx efer %llx cpl %u rflags %llx pkru %x implicit %d access %d addr %llx: "
		"engine outcome %d gpa %llx error %x level %u, reference %d %llx %x %u",
		(unsigned long long)c->cr0, (unsigned long long)c->cr4, (unsigned long long)c->efer, c->cpl,
		(unsigned long long)c->rflags, c->pkru, c->implicit, access, (unsigned long long)addr,
		a.outcome, (unsigned long long)a.gpa, a.error, a.level, r.outcome, (unsigned long long)r.gpa,
		r.error, r.level);
}

static unsigned index_of(uint64_t addr, unsigned level)
{
	return (addr >> (12 + 9 * level)) & 511;
}

/* tables[n] is the table of level n. */
static void build_combo(unsigned combo, unsigned reserved_level, uint64_t addr)
{
	for (unsigned level = 0; level < 4; level++) {
		uint64_t to = level ? TABLES_BASE + 4096ull * (level - 1) : 0x77777000;

		tables[level][index_of(addr, level)] =
			to | perm_entry_bits(perm_of_level(combo, level)) |
			(level == reserved_level ? perm_reserved_bit(combo) : 0);
	}
}

START_TEST(every_combination)
{
	const uint64_t addr = 0xffffa5a5a5a5a123;
	unsigned long cases = 0;

	memset(tables, 0, sizeof(tables));
	for (unsigned combo = 0; combo < PERM_COMBOS; combo++)
		for (unsigned reserved = 0; reserved <= PERM_NO_RESERVED; reserved++) {
			build_combo(combo, reserved, addr);
			for (unsigned mode = 0; mode < PERM_MODES; mode++) {
				struct ref_cpu c = perm_cpu(mode, TABLES_BASE + 3 * 4096);

				for (unsigned access = REF_READ; access <= REF_FETCH; access++, cases++)
					compare(&c, addr, access);
			}
		}
	ck_assert_uint_eq(cases, 4096ul * 5 * 32 * 3);
}
END_TEST

/* The same with NXE off: XD is a reserved bit then, and fetches set no I bit unless SMEP. */
START_TEST(every_combination_without_nx)
{
	const uint64_t addr = 0x00005a5a5a5a5fff;

	memset(tables, 0, sizeof(tables));
	for (unsigned combo = 0; combo < PERM_COMBOS; combo++) {
		build_combo(combo, PERM_NO_RESERVED, addr);
		for (unsigned mode = 0; mode < PERM_MODES; mode++) {
			struct ref_cpu c = perm_cpu(mode, TABLES_BASE + 3 * 4096);

			c.efer &= ~0x800ull;
			for (unsigned access = REF_READ; access <= REF_FETCH; access++)
				compare(&c, addr, access);
		}
	}
}
END_TEST

/* Mostly sane entries, each oddity now and then. */
static uint64_t random_entry(unsigned level, unsigned leaf, unsigned phys_bits)
{
	uint64_t to = level ? TABLES_BASE + 4096ull * (level - 1) : random64() & 0xfffff000;
	uint64_t r = random64(), e;

	if (level == leaf && level)
		to = (random64() & ((1ull << phys_bits) - 1) & ~((1ull << (12 + 9 * level)) - 1)) | 0x80;
	e = to | 1 | (r & 0x66) | (random64() & 0x7ff0000000000e00 & -(uint64_t)(r >> 20 & 1));
	if ((r >> 8 & 7) != 0)
		e |= 6;
	if ((r >> 11 & 7) == 0)
		e |= 1ull << 63;
	if ((r >> 14 & 31) == 0)
		e |= 1ull << (r >> 24 & 63); /* any bit at all */
	if ((r >> 30 & 31) == 0)
		e &= ~1ull;
	return e;
}

static struct ref_cpu random_cpu(void)
{
	uint64_t r = random64();
	struct ref_cpu c = perm_cpu(r & 31, 0);

	c.phys_bits = 36 + (r >> 5 & 15) % 17;
	c.cr4 |= (r >> 9 & 1) << 22;
	if ((r >> 10 & 7) == 0)
		c.efer &= ~0x800ull;
	c.cr4 |= (r >> 13 & 1) << 12;
	c.cr3 = TABLES_BASE + (c.cr4 & 0x1000 ? 4 : 3) * 4096ull;
	c.pkru = random64();
	c.page1gb = r >> 14 & 1;
	c.implicit = (r >> 15 & 7) == 0;
	c.cpl = c.cpl ? 3 : r >> 18 & 1 ? 0 : 1 + (r >> 19 & 1);
	return c;
}

START_TEST(random_tables)
{
	unsigned long count[4] = { 0 }, keyed = 0;

	seed = 0x6b616765;
	memset(tables, 0, sizeof(tables));
	for (unsigned i = 0; i < 600000; i++) {
		struct ref_cpu c = random_cpu();
		uint64_t addr = (int64_t)random64() >> (c.cr4 & 0x1000 ? 7 : 16);
		unsigned leaf = random64() % 4 < 2 ? 0 : 1 + random64() % 2;

		for (unsigned level = 0; level < 5; level++)
			tables[level][index_of(addr, level)] = random_entry(level, leaf, c.phys_bits);
		for (unsigned access = REF_READ; access <= REF_FETCH; access++) {
			struct ref_result r = ref_translate(&c, &memory, addr, access);

			compare(&c, addr, access);
			count[r.outcome]++;
			keyed += r.outcome == REF_PAGE_FAULT && (r.error & 32);
		}
	}
	/* the sample means something only if it holds enough of each */
	ck_assert_uint_gt(count[REF_OK], 200000);
	ck_assert_uint_gt(count[REF_PAGE_FAULT], 200000);
	ck_assert_uint_gt(count[REF_NO_MEMORY], 1000);
	ck_assert_uint_gt(keyed, 10000);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("permissions");
	TCase *t = tcase_create("pt");
	SRunner *r;
	int failed;

	tcase_add_test(t, every_combination);
	tcase_add_test(t, every_combination_without_nx);
	tcase_add_test(t, random_tables);
	suite_add_tcase(s, t);
	r = srunner_create(s);
	srunner_set_fork_status(r, CK_NOFORK);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
