/* SPDX-License-Identifier: MIT */
/*
 * A soft vCPU against the reference, through the public API alone: every
 * combination of the permission space, with its outcome, error code, the bytes
 * moved, and the accessed and dirty flags in the guest's tables.
 *
 * The 4096 combinations of what four levels grant stand in one set of tables:
 * eight entries a table, one for each permission of that level, so a combo is
 * an address. `guest` mirrors the tables for the reference, which sets its
 * flags there; after each access the four entries are compared, so a flag too
 * many or too few shows at the access that made it. Flags add up within a
 * phase (a mode and a reserved level); each phase starts at another combo and
 * with another kind of access, so that each comes first somewhere.
 */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include <kage/kage.h>

#include "perm_space.h"

#define TABLES_GPA ((uint64_t)0x100000)
#define TABLES (1 + 8 + 64 + 512)
#define PAGES_GPA ((uint64_t)0x1000000)
#define MEMORY ((uint64_t)0x2000000)
#define CASE_OFFSET 0x128 /* where in its page a case reads and writes */

static const unsigned spread[4] = { 17, 33, 9, 5 }; /* index of perm p at level n: 64 p + spread[n] */

static struct {
	struct kage_engine *engine;
	struct kage_vm *vm;
	struct kage_vcpu *vcpu;
	uint64_t table[TABLES][512]; /* as the reference sees the guest's tables */
	uint64_t content[PERM_COMBOS];
	unsigned long cases, granted;
} guest;

static uint64_t seed;

static uint64_t random64(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed * 0x2545f4914f6cdd1d;
}

static void require(bool holds, const char *what, unsigned combo)
{
	if (!holds)
		ck_abort_msg("%s (combo %03x)", what, combo);
}

static uint64_t *word_at(uint64_t gpa)
{
	if (gpa < TABLES_GPA || gpa - TABLES_GPA >= sizeof(guest.table))
		return NULL;
	return &guest.table[(gpa - TABLES_GPA) >> 12][(gpa & 0xfff) / 8];
}

static bool reference_read(void *arg, uint64_t gpa, uint64_t *value)
{
	const uint64_t *p = word_at(gpa);

	if (p)
		*value = *p;
	return p;
}

static bool reference_write(void *arg, uint64_t gpa, uint64_t value)
{
	uint64_t *p = word_at(gpa);

	if (p)
		*p = value;
	return p;
}

static const struct ref_memory reference_memory = { .read = reference_read, .write = reference_write };

static uint64_t combo_address(unsigned combo)
{
	uint64_t a = 0;

	for (unsigned level = 0; level < 4; level++)
		a |= (uint64_t)(64 * perm_of_level(combo, level) + spread[level]) << (12 + 9 * level);
	return (uint64_t)((int64_t)(a << 16) >> 16) + CASE_OFFSET;
}

/* Number of the table of a level on a combo's path: root 0, then 8, 64 and 512. */
static unsigned table_number(unsigned combo, unsigned level)
{
	static const unsigned first[4] = { 73, 9, 1, 0 };

	return first[level] + (combo >> (3 * (level + 1)));
}

static uint64_t entry_gpa(unsigned combo, unsigned level)
{
	return TABLES_GPA + 4096ull * table_number(combo, level) +
	       8 * (64 * perm_of_level(combo, level) + spread[level]);
}

static uint64_t page_gpa(unsigned combo)
{
	return PAGES_GPA + 4096ull * combo;
}

static uint64_t fresh_entry(unsigned combo, unsigned level, unsigned reserved_level)
{
	uint64_t to = level ? TABLES_GPA + 4096ull * table_number(combo, level - 1) : page_gpa(combo);

	return to | perm_entry_bits(perm_of_level(combo, level)) |
	       (level == reserved_level ? perm_reserved_bit(combo) : 0);
}

static void flush(uint32_t kind, uint64_t gva)
{
	ck_assert_int_eq(kage_vcpu_flush(guest.vcpu, KAGE_CFG(kage_flush, .kind = kind, .gva = gva)),
			 KAGE_OK);
}

/* Accessed and dirty flags clear everywhere, a reserved bit at one level. */
static void build_tables(unsigned reserved_level)
{
	for (unsigned combo = 0; combo < PERM_COMBOS; combo++)
		for (unsigned level = 0; level < 4; level++)
			*word_at(entry_gpa(combo, level)) = fresh_entry(combo, level, reserved_level);
	ck_assert_int_eq(kage_vm_write(guest.vm, TABLES_GPA, guest.table, sizeof(guest.table)), KAGE_OK);
	flush(KAGE_FLUSH_ALL, 0);
}

static void set_mode(const struct ref_cpu *c)
{
	struct kage_x86_regs r = { .cr0 = c->cr0, .cr3 = c->cr3, .cr4 = c->cr4, .efer = c->efer,
				   .rflags = c->rflags, .cpl = c->cpl, .pkru = c->pkru };

	require(kage_vcpu_set_regs(guest.vcpu, &r, sizeof(r)) == KAGE_OK, "set_regs", 0);
}

/* Does one access; *value is what is written or was read. */
static int do_access(uint64_t gva, enum ref_access access, uint64_t *value, struct kage_fault *f)
{
	if (access == REF_READ)
		return kage_vcpu_load(guest.vcpu, gva, value, sizeof(*value), f);
	if (access == REF_WRITE)
		return kage_vcpu_store(guest.vcpu, gva, value, sizeof(*value), f);
	return kage_vcpu_fetch(guest.vcpu, gva, value, sizeof(*value), f);
}

static void check_bytes(unsigned combo, enum ref_access access, uint64_t value)
{
	uint64_t there;

	if (access == REF_WRITE) {
		guest.content[combo] = value;
		require(kage_vm_read(guest.vm, page_gpa(combo) + CASE_OFFSET, &there, 8) == KAGE_OK, "read",
			combo);
		require(there == value, "the store went elsewhere", combo);
	} else {
		require(value == guest.content[combo], "the load saw other bytes", combo);
	}
}

static void check_flags(unsigned combo)
{
	for (unsigned level = 0; level < 4; level++) {
		uint64_t there, gpa = entry_gpa(combo, level);

		require(kage_vm_read(guest.vm, gpa, &there, 8) == KAGE_OK, "read of an entry", combo);
		if (there != *word_at(gpa))
			ck_abort_msg("combo %03x level %u: entry %llx, reference %llx", combo, level,
				     (unsigned long long)there, (unsigned long long)*word_at(gpa));
	}
}

static void check_fault(const struct kage_fault *f, const struct ref_result *r, uint64_t gva, unsigned combo)
{
	require(f->vector == 14, "vector", combo);
	require(f->gva == gva, "faulting address", combo);
	if (f->error != r->error)
		ck_abort_msg("combo %03x: error code %x, reference %x", combo, f->error, r->error);
	/* for missing or malformed entries the manual leaves no choice of level */
	require((r->error & 9) == 1 || f->level == r->level, "level", combo);
}

static void one_case(const struct ref_cpu *c, unsigned combo, enum ref_access access)
{
	uint64_t gva = combo_address(combo), value = access == REF_WRITE ? random64() : 0;
	struct ref_result r = ref_translate(c, &reference_memory, gva, access);
	struct kage_fault f = { 0 };
	int outcome = do_access(gva, access, &value, &f);

	if (outcome != (r.outcome == REF_OK ? KAGE_OK : KAGE_GUEST_FAULT))
		ck_abort_msg("combo %03x access %d cpl %u cr0 %llx cr4 %llx rflags %llx: outcome %d "
			     "error %x, reference %d %x",
			     combo, access, c->cpl, (unsigned long long)c->cr0, (unsigned long long)c->cr4,
			     (unsigned long long)c->rflags, outcome, f.error, r.outcome, r.error);
	if (outcome == KAGE_OK)
		check_bytes(combo, access, value);
	else
		check_fault(&f, &r, gva, combo);
	check_flags(combo);
	guest.cases++;
	guest.granted += outcome == KAGE_OK;
}

static void setup(void)
{
	static const struct kage_region ram = { .size = sizeof(ram), .len = MEMORY };
	const struct kage_engine_config *engine = KAGE_CFG(kage_engine_config, .address_space = 1ull << 36);
	const struct kage_vcpu_config *vcpu =
		KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .phys_bits = PERM_PHYS_BITS);

	memset(&guest, 0, sizeof(guest));
	seed = 0x736861646f77;
	ck_assert_int_eq(kage_engine_create(engine, &guest.engine), KAGE_OK);
	ck_assert_int_eq(kage_vm_create(guest.engine, NULL, &guest.vm), KAGE_OK);
	ck_assert_int_eq(kage_vm_map(guest.vm, &ram), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_create(guest.vm, vcpu, &guest.vcpu), KAGE_OK);
	for (unsigned combo = 0; combo < PERM_COMBOS; combo++) {
		guest.content[combo] = random64();
		require(kage_vm_write(guest.vm, page_gpa(combo) + CASE_OFFSET, &guest.content[combo], 8) == 0,
			"write", combo);
	}
}

static void teardown(void)
{
	kage_vcpu_destroy(guest.vcpu);
	ck_assert_int_eq(kage_vm_destroy(guest.vm), KAGE_OK);
	ck_assert_int_eq(kage_engine_destroy(guest.engine), KAGE_OK);
}

static void audit(void)
{
	struct kage_audit a = { .size = sizeof(a) };

	ck_assert_int_eq(kage_engine_audit(guest.engine, &a), KAGE_OK);
}

static void one_phase(unsigned mode, unsigned reserved_level)
{
	struct ref_cpu c = perm_cpu(mode, TABLES_GPA);
	unsigned phase = mode * 5 + reserved_level;

	build_tables(reserved_level);
	set_mode(&c);
	for (unsigned i = 0; i < PERM_COMBOS; i++) {
		unsigned combo = (i * (2 * phase + 1) + 29 * phase) % PERM_COMBOS;

		for (unsigned k = 0; k < 3; k++)
			one_case(&c, combo, (k + phase) % 3);
	}
}

START_TEST(every_combination)
{
	one_phase(_i % PERM_MODES, _i / PERM_MODES);
	ck_assert_uint_eq(guest.cases, 4096 * 3);
	if (_i / PERM_MODES == PERM_NO_RESERVED)
		ck_assert_uint_gt(guest.granted, 0);
	else
		ck_assert_uint_eq(guest.granted, 0);
}
END_TEST

/*
 * What the TLB learnt in one mode must not answer in another: the mode changes
 * at each access, nothing is flushed.
 */
START_TEST(modes_interleaved)
{
	build_tables(PERM_NO_RESERVED);
	for (unsigned i = 0; i < 200000; i++) {
		bool rare = random64() % 64 == 0;
		unsigned combo = (rare ? random64() : 7 * (random64() % 512)) % PERM_COMBOS;
		struct ref_cpu c = perm_cpu(random64() % PERM_MODES, TABLES_GPA);

		set_mode(&c);
		one_case(&c, combo, random64() % 3);
	}
	ck_assert_uint_gt(guest.granted, 20000);
	audit();
}
END_TEST

/* Flags of the whole path start clear for each case, so each case shows all that it sets. */
START_TEST(flags_from_clear)
{
	build_tables(PERM_NO_RESERVED);
	for (unsigned i = 0; i < 40000; i++) {
		struct ref_cpu c = perm_cpu(random64() % PERM_MODES, TABLES_GPA);
		/* bits 0 and 1 of each level are likely, XD is not */
		unsigned combo = (random64() | random64()) & 03333, xd = random64() & random64() & 04444;

		combo |= xd;
		for (unsigned level = 0; level < 4; level++) {
			uint64_t fresh = fresh_entry(combo, level, PERM_NO_RESERVED),
				 gpa = entry_gpa(combo, level);

			*word_at(gpa) = fresh;
			require(kage_vm_write(guest.vm, gpa, &fresh, 8) == KAGE_OK, "write", combo);
		}
		flush(i & 1 ? KAGE_FLUSH_PAGE : KAGE_FLUSH_ALL, combo_address(combo));
		set_mode(&c);
		one_case(&c, combo, random64() % 3);
	}
	ck_assert_uint_gt(guest.granted, 4000);
	audit();
}
END_TEST

/* Translate answers the same and sets nothing. */
START_TEST(translate_sets_nothing)
{
	build_tables(PERM_NO_RESERVED);
	for (unsigned mode = 0; mode < PERM_MODES; mode++) {
		struct ref_memory quiet = { .read = reference_read };
		struct ref_cpu c = perm_cpu(mode, TABLES_GPA);

		set_mode(&c);
		for (unsigned combo = 0; combo < PERM_COMBOS; combo++)
			for (unsigned access = REF_READ; access <= REF_FETCH; access++) {
				uint64_t gva = combo_address(combo);
				struct ref_result r = ref_translate(&c, &quiet, gva, access);
				struct kage_fault f = { 0 };
				int outcome = kage_vcpu_translate(guest.vcpu, gva, 1u << access, &f);

				require(outcome == (r.outcome == REF_OK ? KAGE_OK : KAGE_GUEST_FAULT),
					"outcome", combo);
				if (outcome == KAGE_OK)
					require(f.gpa == r.gpa, "gpa", combo);
				else
					check_fault(&f, &r, gva, combo);
			}
	}
	for (unsigned combo = 0; combo < PERM_COMBOS; combo++)
		check_flags(combo);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("permissions-api");
	TCase *t = tcase_create("vcpu");
	SRunner *r;
	int failed;

	tcase_add_checked_fixture(t, setup, teardown);
	/* The short form leaves reserved bits to the long one. */
	tcase_add_loop_test(t, every_combination, 0, PERM_MODES * (getenv("KAGE_SHORT") ? 1 : 5));
	tcase_add_test(t, modes_interleaved);
	tcase_add_test(t, flags_from_clear);
	tcase_add_test(t, translate_sets_nothing);
	suite_add_tcase(s, t);
	r = srunner_create(s);
	srunner_set_fork_status(r, CK_NOFORK);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
