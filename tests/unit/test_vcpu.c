/* SPDX-License-Identifier: MIT */
/*
 * The soft vCPU through the public API: paging off, 4- and 5-level tables,
 * rights and faults, accessed and dirty bits, watched and unsynced tables,
 * flushes, odd accesses, pointers, code, devices, registers.
 */
#include "guest_tables.h"

#include <errno.h>
#include <pthread.h>
#include <sys/uio.h>

#include <kage/notifier.h>

static struct guest g;

static void setup(void)
{
	guest_start(&g, 64 * MIB);
}

static void teardown(void)
{
	guest_stop(&g);
}

static uint64_t misses(void)
{
	struct kage_stats s = {.size = sizeof(s)};

	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &s), KAGE_OK);
	return s.tlb_misses;
}

START_TEST(test_paging_off)
{
	uint64_t before;

	cpu_store(g.cpu, 0x2000000, 0x1122334455667788);
	before = misses();
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 0x1122334455667788);
	ck_assert_uint_eq(misses(), before);
	ck_assert_uint_eq(guest_r64(&g, 0x2000000), 0x1122334455667788);
	/* pages 1,024 apart do not evict each other */
	cpu_store(g.cpu, 0x2000000 + 1024 * 4096, 2);
	before = misses();
	for (int i = 0; i < 10; i++) {
		ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 0x1122334455667788);
		ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000 + 1024 * 4096), 2);
	}
	ck_assert_uint_eq(misses(), before);
	/* what the engine changes is seen at once */
	guest_w64(&g, 0x2000000, 9);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 9);
	ck_assert_int_eq(kage_vm_advise(g.vm, 0x2000000, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 0);
}
END_TEST

/* A block that protect splits: what lies around the page asked for has other rights. */
START_TEST(test_protect_inside_a_block)
{
	uint64_t v = 1, root;

	for (unsigned paging = 0; paging < 2; paging++) {
		if (paging) {
			root = guest_long_mode(&g, 4);
			guest_map(&g, root, 0x2000000, 0x2000000, PTE_W | PTE_PS, 1);
		}
		cpu_store(g.cpu, 0x2001000, 1);
		ck_assert_int_eq(kage_vm_protect(g.vm, 0x2010000, 0x10000, KAGE_READ), KAGE_OK);
		cpu_store(g.cpu, 0x2002000, 2);
		cpu_store(g.cpu, 0x2020000, 3);
		ck_assert_int_eq(kage_vcpu_store(g.cpu, 0x2010000, &v, 8, NULL), KAGE_MMIO);
		ck_assert_int_eq(kage_vcpu_store(g.cpu, 0x201fff8, &v, 8, NULL), KAGE_MMIO);
		ck_assert_uint_eq(cpu_load(g.cpu, 0x2010000), 0);
		guest_audit(&g);
		ck_assert_int_eq(kage_vm_protect(g.vm, 0x2010000, 0x10000, KAGE_RWX), KAGE_OK);
		ck_assert_int_eq(kage_vcpu_store(g.cpu, 0x2010000, &v, 8, NULL), KAGE_OK);
		ck_assert_int_eq(kage_vm_advise(g.vm, 0x2000000, 0x200000, KAGE_ADVICE_DISCARD), KAGE_OK);
	}
}
END_TEST

static void *use_neighbour(void *arg)
{
	cpu_store(g.cpu, 0x2000000, 7);
	kage_vcpu_leave(g.cpu);
	return arg;
}

/* Registered after the shadow's own listener: that one has taken away what the change is about. */
static int start_late(struct kage_notifier *n, const struct kage_range *range)
{
	pthread_t t;

	ck_assert_int_eq(pthread_create(&t, NULL, use_neighbour, NULL), 0);
	ck_assert_int_eq(pthread_join(t, NULL), 0);
	return 0;
}

/* While one page of a block changes, a miss on another one must not bring back a translation of the whole. */
START_TEST(test_neighbour_of_a_change)
{
	static const struct kage_notifier_ops ops = {.invalidate_range_start = start_late};
	struct kage_notifier late = {0};
	uint64_t v = 1;

	if (_i & 1)
		guest_map(&g, guest_long_mode(&g, 4), 0x2000000, 0x2000000, PTE_W | PTE_PS, 1);
	cpu_store(g.cpu, 0x2000000, 1);
	cpu_store(g.cpu, 0x2040000, 5);
	kage_vcpu_leave(g.cpu);
	ck_assert_int_eq(kage_notifier_register(g.vm, &late, &ops), KAGE_OK);
	if (_i & 2)
		ck_assert_int_eq(kage_vm_advise(g.vm, 0x2040000, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
	else
		ck_assert_int_eq(kage_vm_protect(g.vm, 0x2040000, 4096, KAGE_READ), KAGE_OK);
	ck_assert_int_eq(kage_notifier_unregister(&late), KAGE_OK);
	guest_audit(&g);
	if (_i & 2)
		ck_assert_uint_eq(cpu_load(g.cpu, 0x2040000), 0);
	else
		ck_assert_int_eq(kage_vcpu_store(g.cpu, 0x2040000, &v, 8, NULL), KAGE_MMIO);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 7);
	guest_audit(&g);
}
END_TEST

/* After leave nobody waits for this vCPU's windows: its next access must say first that it is back. */
START_TEST(test_access_after_leave)
{
	const struct kage_vcpu_head *head = (const struct kage_vcpu_head *)g.cpu;

	cpu_store(g.cpu, 0x2000000, 1);
	kage_vcpu_leave(g.cpu);
	ck_assert_uint_eq(head->ctx[0], 0xfff);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 1);
	ck_assert_uint_ne(head->ctx[0], 0xfff);
	kage_vcpu_leave(g.cpu);
	cpu_store(g.cpu, 0x2000000, 2);
	ck_assert_uint_ne(head->ctx[1], 0xfff);
}
END_TEST

START_TEST(test_device_memory)
{
	struct kage_fault f = {0};
	uint64_t v = 0x5555;

	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x8000008, &v, 8, &f), KAGE_MMIO);
	ck_assert_uint_eq(f.gpa, 0x8000008);
	ck_assert_uint_eq(f.gva, 0x8000008);
	ck_assert_uint_eq(f.access, KAGE_READ);
	ck_assert_uint_eq(v, 0x5555);
	ck_assert_int_eq(kage_vcpu_store(g.cpu, 1ull << 60, &v, 8, &f), KAGE_MMIO);
	ck_assert_int_eq(kage_vm_protect(g.vm, 0x3000000, 4096, KAGE_READ), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x3000000, &v, 8, &f), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_store(g.cpu, 0x3000010, &v, 8, &f), KAGE_MMIO);
	ck_assert_uint_eq(f.gpa, 0x3000010);
	ck_assert_int_eq(kage_vcpu_fetch(g.cpu, 0x3000000, &v, 8, &f), KAGE_MMIO);
	/* a crossing store does all or nothing */
	v = ~0ull;
	ck_assert_int_eq(kage_vcpu_store(g.cpu, 0x2fffffc, &v, 8, &f), KAGE_MMIO);
	ck_assert_uint_eq(f.gva, 0x3000000);
	ck_assert_uint_eq(guest_r64(&g, 0x2fffff8), 0);
}
END_TEST

START_TEST(test_four_levels)
{
	uint64_t root = guest_long_mode(&g, 4), at;

	at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	guest_w64(&g, 0x2000000, 0x1234);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 0x1234);
	ck_assert_uint_eq(guest_r64(&g, at) & (PTE_A | PTE_D), PTE_A);
	for (unsigned l = 1; l < 4; l++)
		ck_assert_uint_eq(guest_r64(&g, guest_entry_gpa(&g, root, 0x400000, l)) & (PTE_A | PTE_D),
				  PTE_A);
	guest_audit(&g);
	cpu_store(g.cpu, 0x400008, 0x77);
	ck_assert_uint_eq(guest_r64(&g, at) & (PTE_A | PTE_D), PTE_A | PTE_D);
	ck_assert_uint_eq(guest_r64(&g, 0x2000008), 0x77);
	/* the upper half */
	guest_map(&g, root, 0xffff888000400000, 0x2000000, PTE_W, 0);
	ck_assert_uint_eq(cpu_load(g.cpu, 0xffff888000400008), 0x77);
	cpu_faults(g.cpu, 0x401000, KIND_LOAD, 0);
	cpu_faults(g.cpu, 0x401000, KIND_STORE, 2);
	cpu_faults(g.cpu, 0x401000, KIND_FETCH, 16);
}
END_TEST

START_TEST(test_not_canonical)
{
	struct kage_fault f = {0};
	uint64_t v;

	guest_long_mode(&g, 4);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 1ull << 47, &v, 8, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.vector, 13);
	ck_assert_uint_eq(f.error, 0);
	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 1ull << 47, KAGE_READ, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.vector, 13);
}
END_TEST

START_TEST(test_five_levels)
{
	uint64_t root = guest_long_mode(&g, 5);
	struct kage_fault f;
	uint64_t v;

	guest_map(&g, root, 0x00ab123456789000, 0x2000000, PTE_W, 0);
	guest_map(&g, root, 0xff55123456789000, 0x2001000, PTE_W, 0);
	cpu_store(g.cpu, 0x00ab123456789010, 5);
	cpu_store(g.cpu, 0xff55123456789010, 6);
	ck_assert_uint_eq(guest_r64(&g, 0x2000010), 5);
	ck_assert_uint_eq(guest_r64(&g, 0x2001010), 6);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 1ull << 56, &v, 8, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.vector, 13);
}
END_TEST

START_TEST(test_large_pages)
{
	uint64_t root = guest_long_mode(&g, 4), at2, at1;

	for (uint64_t gpa = 0; gpa < 64 * MIB; gpa += 4096)
		if (gpa >= 32 * MIB)
			guest_w64(&g, gpa, gpa);
	at2 = guest_map(&g, root, 0x40000000, 32 * MIB, PTE_W, 1);
	at1 = guest_map(&g, root, 0x80000000, 0, PTE_W, 2);
	for (uint64_t off = 0; off < 2 * MIB; off += 4096)
		ck_assert_uint_eq(cpu_load(g.cpu, 0x40000000 + off), 32 * MIB + off);
	ck_assert_uint_eq(guest_r64(&g, at2) & (PTE_A | PTE_D), PTE_A);
	cpu_store(g.cpu, 0x40000000 + 0x7008, 3);
	ck_assert_uint_eq(guest_r64(&g, at2) & (PTE_A | PTE_D), PTE_A | PTE_D);
	ck_assert_uint_eq(guest_r64(&g, 32 * MIB + 0x7008), 3);
	for (uint64_t off = 32 * MIB; off < 64 * MIB; off += 4096)
		ck_assert_uint_eq(cpu_load(g.cpu, 0x80000000 + off), off);
	ck_assert_uint_eq(guest_r64(&g, at1) & (PTE_A | PTE_D), PTE_A);
	guest_audit(&g);
	/* a piece of a large page goes */
	ck_assert_int_eq(kage_vm_advise(g.vm, 32 * MIB + 0x5000, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x40000000 + 0x5000), 0);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x80000000 + 32 * MIB + 0x5000), 0);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x40000000 + 0x6000), 32 * MIB + 0x6000);
	/* another large page at the place */
	guest_w64(&g, at2, (34 * MIB) | PTE_P | PTE_PS | PTE_W);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x40000000), 34 * MIB);
}
END_TEST

START_TEST(test_rights)
{
	uint64_t root = guest_long_mode(&g, 4);

	guest_map(&g, root, 0x400000, 0x2000000, 0, 0);		     /* supervisor, read only */
	guest_map(&g, root, 0x401000, 0x2001000, PTE_U | PTE_W, 0);  /* user */
	guest_map(&g, root, 0x402000, 0x2002000, PTE_U | PTE_NX, 0); /* user, read only, no execution */
	cpu_faults(g.cpu, 0x400000, KIND_STORE, 3);
	g.regs.cpl = 3;
	guest_set_regs(&g);
	cpu_faults(g.cpu, 0x400000, KIND_LOAD, 5);
	cpu_store(g.cpu, 0x401000, 1);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x402000), 0);
	cpu_faults(g.cpu, 0x402000, KIND_STORE, 7);
	cpu_faults(g.cpu, 0x402000, KIND_FETCH, 0x15);
	/* SMEP, SMAP, AC */
	g.regs.cpl = 0;
	g.regs.cr4 |= 3 << 20;
	guest_set_regs(&g);
	cpu_faults(g.cpu, 0x401000, KIND_LOAD, 1);
	cpu_faults(g.cpu, 0x401000, KIND_STORE, 3);
	cpu_faults(g.cpu, 0x401000, KIND_FETCH, 0x11);
	g.regs.rflags = 1 << 18;
	guest_set_regs(&g);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x401000), 1);
	cpu_faults(g.cpu, 0x402000, KIND_STORE, 3);
	/* without WP the supervisor writes where it likes, and dirties it */
	g.regs.cr0 &= ~(1ull << 16);
	guest_set_regs(&g);
	cpu_store(g.cpu, 0x402000, 8);
	cpu_store(g.cpu, 0x400000, 9);
	ck_assert_uint_eq(guest_r64(&g, 0x2002000), 8);
	ck_assert_uint_eq(guest_r64(&g, guest_entry_gpa(&g, root, 0x402000, 0)) & PTE_D, PTE_D);
	/* and with it again, not */
	g.regs.cr0 |= 1 << 16;
	guest_set_regs(&g);
	cpu_faults(g.cpu, 0x402000, KIND_STORE, 3);
}
END_TEST

START_TEST(test_user_bit_added)
{
	uint64_t root = guest_long_mode(&g, 4), at, v;

	at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	g.regs.cr4 |= 3 << 20;
	guest_set_regs(&g);
	cpu_store(g.cpu, 0x400000, 1);
	ck_assert_int_eq(kage_vcpu_fetch(g.cpu, 0x400000, &v, 8, NULL), KAGE_OK);
	/* what is granted to the user is taken from the supervisor */
	guest_w64(&g, at, guest_r64(&g, at) | PTE_U);
	cpu_faults(g.cpu, 0x400000, KIND_FETCH, 0x11);
	cpu_faults(g.cpu, 0x400000, KIND_LOAD, 1);
	/* and a key that is forbidden */
	g.regs.cr4 = 0x20 | 1 << 22;
	g.regs.pkru = 1u << 6;
	guest_set_regs(&g);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 1);
	guest_w64(&g, at, guest_r64(&g, at) | PTE_KEY(3));
	cpu_faults(g.cpu, 0x400000, KIND_LOAD, 0x21);
}
END_TEST

START_TEST(test_protection_keys)
{
	uint64_t root = guest_long_mode(&g, 4);

	guest_map(&g, root, 0x400000, 0x2000000, PTE_U | PTE_W | PTE_KEY(5), 0);
	g.regs.cpl = 3;
	g.regs.cr4 |= 1 << 22;
	guest_set_regs(&g);
	cpu_store(g.cpu, 0x400000, 1);
	g.regs.pkru = 2u << 10; /* key 5: write disable */
	guest_set_regs(&g);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 1);
	cpu_faults(g.cpu, 0x400000, KIND_STORE, 0x27);
	g.regs.pkru = 1u << 10;
	guest_set_regs(&g);
	cpu_faults(g.cpu, 0x400000, KIND_LOAD, 0x25);
	g.regs.pkru = 0;
	guest_set_regs(&g);
	cpu_store(g.cpu, 0x400000, 2);
}
END_TEST

START_TEST(test_reserved_bits_and_bad_tables)
{
	uint64_t root = guest_long_mode(&g, 4);
	uint64_t at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	struct kage_fault f = {0};
	uint64_t v;

	guest_w64(&g, at, 0x2000000 | PTE_P | PTE_W | 1ull << 50);
	cpu_faults(g.cpu, 0x400000, KIND_LOAD, 9);
	at = guest_entry_gpa(&g, root, 0x400000, 1);
	guest_w64(&g, at, 0x3f00000000 | PTE_P | PTE_W); /* a table where no memory is */
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x400000, &v, 8, &f), KAGE_MMIO);
	ck_assert_uint_eq(f.gpa, 0x3f00000000);
	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 0x400000, KAGE_READ, &f), KAGE_MMIO);
	ck_assert_uint_eq(f.gpa, 0x3f00000000);
	g.regs.cr3 = 0x3f00000000;
	ck_assert_int_eq(guest_set_regs(&g), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x400000, &v, 8, &f), KAGE_MMIO);
}
END_TEST

START_TEST(test_watched_tables_follow_at_once)
{
	uint64_t root = guest_long_mode(&g, 4);
	uint64_t at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	uint64_t pd = guest_entry_gpa(&g, root, 0x400000, 1);
	uint64_t table = at & ~0xfffull;
	uint64_t other;

	guest_map(&g, root, 0x500000, table, PTE_W, 0); /* the guest sees its own table */
	cpu_store(g.cpu, 0x400000, 1);
	/* by the VMM, and by the vCPU itself through its mapping of the table */
	guest_w64(&g, at, 0x2001000 | PTE_P | PTE_W);
	cpu_store(g.cpu, 0x400000, 2);
	ck_assert_uint_eq(guest_r64(&g, 0x2001000), 2);
	cpu_store(g.cpu, 0x500000 + (at & 0xfff), 0x2002000 | PTE_P | PTE_W);
	cpu_store(g.cpu, 0x400000, 3);
	ck_assert_uint_eq(guest_r64(&g, 0x2002000), 3);
	ck_assert_uint_eq(guest_r64(&g, at), 0x2002000 | PTE_P | PTE_W | PTE_A | PTE_D);
	/* taking write permission away, accessed and dirty bits too */
	cpu_store(g.cpu, 0x500000 + (at & 0xfff), 0x2002000 | PTE_P);
	cpu_faults(g.cpu, 0x400000, KIND_STORE, 3);
	ck_assert_uint_eq(guest_r64(&g, at) & PTE_A, 0);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 3);
	ck_assert_uint_eq(guest_r64(&g, at) & (PTE_A | PTE_D), PTE_A);
	guest_audit(&g);
	/* another leaf table */
	other = guest_table(&g);
	guest_w64(&g, other + (at & 0xfff), 0x2003000 | PTE_P | PTE_W);
	guest_w64(&g, pd, other | PTE_P | PTE_W);
	cpu_store(g.cpu, 0x400000, 4);
	ck_assert_uint_eq(guest_r64(&g, 0x2003000), 4);
	cpu_faults(g.cpu, 0x500000, KIND_LOAD, 0);
	/* read only above */
	guest_w64(&g, pd, other | PTE_P);
	cpu_faults(g.cpu, 0x400000, KIND_STORE, 3);
}
END_TEST

/* Hammers a leaf table through the vCPU until it is out of sync. */
static uint64_t make_unsync(uint64_t root, uint64_t *at)
{
	struct kage_stats s = {.size = sizeof(s)};

	*at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	guest_map(&g, root, 0x500000, *at & ~0xfffull, PTE_W, 0);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 0);
	for (unsigned i = 0; i < 8; i++)
		cpu_store(g.cpu, 0x500000 + 8 * (0x180 + i), 0x2100000 | PTE_P | PTE_W);
	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &s), KAGE_OK);
	ck_assert_uint_eq(s.shadow_unsync, 1);
	return 0x500000 + (*at & 0xfff);
}

START_TEST(test_unsync_tables)
{
	uint64_t root = guest_long_mode(&g, 4), at, pte = make_unsync(root, &at), before;
	struct kage_stats s = {.size = sizeof(s)};

	cpu_store(g.cpu, 0x400000, 1);
	before = misses();
	for (unsigned i = 0; i < 100; i++)
		cpu_store(g.cpu, pte, 0x2001000 | PTE_P | PTE_W);
	ck_assert_uint_eq(misses(), before); /* no trap any more */
	ck_assert_int_eq(
	    kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_PAGE, .gva = 0x400000)), KAGE_OK);
	cpu_store(g.cpu, 0x400000, 2);
	ck_assert_uint_eq(guest_r64(&g, 0x2001000), 2);
	cpu_store(g.cpu, pte, 0x2002000 | PTE_P | PTE_W);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_CR3, .value = root)),
			 KAGE_OK);
	cpu_store(g.cpu, 0x400000, 3);
	ck_assert_uint_eq(guest_r64(&g, 0x2002000), 3);
	/* a permission that was added needs no flush */
	cpu_store(g.cpu, pte, 0x2002000 | PTE_P);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ALL)), KAGE_OK);
	cpu_faults(g.cpu, 0x400000, KIND_STORE, 3);
	cpu_store(g.cpu, pte, 0x2002000 | PTE_P | PTE_W);
	cpu_store(g.cpu, 0x400000, 4);
	guest_audit(&g);
	/* quiet flushes bring it back under watch */
	for (unsigned i = 0; i < 4; i++)
		ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ALL)),
				 KAGE_OK);
	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &s), KAGE_OK);
	ck_assert_uint_eq(s.shadow_unsync, 0);
	cpu_store(g.cpu, pte, 0x2003000 | PTE_P | PTE_W);
	cpu_store(g.cpu, 0x400000, 5);
	ck_assert_uint_eq(guest_r64(&g, 0x2003000), 5);
}
END_TEST

START_TEST(test_context_switch)
{
	uint64_t root1 = guest_long_mode(&g, 4), root2 = guest_table(&g), before;

	guest_map(&g, root1, 0x400000, 0x2000000, PTE_W, 0);
	guest_map(&g, root2, 0x400000, 0x2001000, PTE_W, 0);
	cpu_store(g.cpu, 0x400000, 1);
	g.regs.cr3 = root2;
	guest_set_regs(&g);
	cpu_store(g.cpu, 0x400000, 2);
	ck_assert_uint_eq(guest_r64(&g, 0x2000000), 1);
	ck_assert_uint_eq(guest_r64(&g, 0x2001000), 2);
	/* roots are kept: back and forth is a shadow hit, no new entry */
	before = misses();
	for (unsigned i = 0; i < 10; i++) {
		g.regs.cr3 = i & 1 ? root2 : root1;
		guest_set_regs(&g);
		ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), i & 1 ? 2 : 1);
	}
	ck_assert_uint_le(misses() - before, 10);
	guest_audit(&g);
}
END_TEST

START_TEST(test_pcid)
{
	uint64_t root = guest_long_mode(&g, 4), root2 = guest_table(&g), at, pte;

	g.regs.cr4 |= 1 << 17;
	ck_assert_int_eq(guest_set_regs(&g), KAGE_OK);
	pte = make_unsync(root, &at);
	guest_map(&g, root2, 0x500000, at & ~0xfffull, PTE_W, 0);
	cpu_store(g.cpu, 0x400000, 1);
	/* with bit 63 a switch keeps what the TLB has; the page of another space is flushed on return without
	 * it */
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_CR3,
							 .value = root2 | 1 | 1ull << 63)),
			 KAGE_OK);
	cpu_store(g.cpu, pte, 0x2001000 | PTE_P | PTE_W);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_CR3, .value = root)),
			 KAGE_OK);
	cpu_store(g.cpu, 0x400000, 2);
	ck_assert_uint_eq(guest_r64(&g, 0x2001000), 2);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ASID, .asid = 1)),
			 KAGE_OK);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ASID, .asid = 4096)),
			 -EINVAL);
	ck_assert_int_eq(
	    kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_PAGE_ASID, .asid = 4096)), -EINVAL);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_PAGE_ASID,
							 .gva = 0x400000, .asid = 1)),
			 KAGE_OK);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = 9)), -EINVAL);
	g.regs.cr4 &= ~(1ull << 17);
	ck_assert_int_eq(guest_set_regs(&g), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ASID, .asid = 1)),
			 -EINVAL);
	ck_assert_int_eq(
	    kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_CR3, .value = 1ull << 63)),
	    -EINVAL);
}
END_TEST

/* A PTE changes; a PCID that was never used cannot have the old one, bit 63 or not. */
START_TEST(test_new_pcid)
{
	uint64_t root = guest_long_mode(&g, 4), at, pte;

	g.regs.cr4 |= 1 << 17;
	ck_assert_int_eq(guest_set_regs(&g), KAGE_OK);
	pte = make_unsync(root, &at);
	cpu_store(g.cpu, 0x400000, 1);
	cpu_store(g.cpu, pte, 0x2001000 | PTE_P | PTE_W);
	g.regs.cr3 = root | 6 | 1ull << 63;
	ck_assert_int_eq(guest_set_regs(&g), KAGE_OK);
	cpu_store(g.cpu, 0x400000, 2);
	ck_assert_uint_eq(guest_r64(&g, 0x2001000), 2);
}
END_TEST

/* Unmapped as Linux does: entries, their table, the flush by address. Then the table serves elsewhere. */
START_TEST(test_unsync_table_reused)
{
	uint64_t root = guest_long_mode(&g, 4), at, pte = 0x600000, table, upper;

	make_unsync(root, &at);
	table = at & ~0xfffull;
	upper = guest_entry_gpa(&g, root, 0x400000, 1);
	guest_map(&g, root, pte, table, PTE_W, 0);
	guest_map(&g, root, 0x601000, upper & ~0xfffull, PTE_W, 0);
	cpu_store(g.cpu, 0x400000, 0xaa);
	cpu_store(g.cpu, pte, 0);
	cpu_store(g.cpu, 0x601000 + (upper & 0xfff), 0);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_PAGE, .gva = 0x400000)),
			 KAGE_OK);
	cpu_store(g.cpu, pte + 8, 0x2001000 | PTE_P | PTE_W);
	cpu_store(g.cpu, 0x601000 + 7 * 8, table | PTE_P | PTE_W | PTE_U | PTE_A | PTE_D);
	cpu_faults(g.cpu, 7ull << 21, KIND_LOAD, 0);
	cpu_faults(g.cpu, 7ull << 21, KIND_STORE, 2);
	cpu_store(g.cpu, 7ull << 21 | 0x1000, 0xbb);
	ck_assert_uint_eq(guest_r64(&g, 0x2001000), 0xbb);
}
END_TEST

START_TEST(test_table_is_data_again)
{
	uint64_t root = guest_long_mode(&g, 4);
	uint64_t at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0), table = at & ~0xfffull;
	uint64_t pd = guest_entry_gpa(&g, root, 0x400000, 1);

	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 0);
	guest_w64(&g, pd, 0);
	guest_map(&g, root, 0x800000, table, PTE_W, 0);
	for (unsigned i = 0; i < 100; i++)
		cpu_store(g.cpu, 0x800000 + 8 * i, i);
	ck_assert_uint_eq(guest_r64(&g, table + 8 * 99), 99);
}
END_TEST

START_TEST(test_discard_and_clone_under_tables)
{
	uint64_t root = guest_long_mode(&g, 4);
	uint64_t at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	struct kage_vm *clone;

	cpu_store(g.cpu, 0x400000, 1);
	ck_assert_int_eq(kage_vm_clone(g.vm, NULL, &clone), KAGE_OK);
	guest_audit(&g);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 1);
	cpu_store(g.cpu, 0x400000, 2);
	ck_assert_uint_eq(guest_r64(&g, 0x2000000), 2);
	{
		uint64_t v = 0;

		ck_assert_int_eq(kage_vm_read(clone, 0x2000000, &v, 8), KAGE_OK);
		ck_assert_uint_eq(v, 1);
	}
	/* the table itself is shared with the clone now: an accessed bit breaks it */
	guest_map(&g, root, 0x401000, 0x2001000, PTE_W, 0);
	cpu_store(g.cpu, 0x401000, 3);
	guest_audit(&g);
	ck_assert_int_eq(kage_vm_advise(g.vm, at & ~0xfffull, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
	cpu_faults(g.cpu, 0x400000, KIND_LOAD, 0);
	ck_assert_int_eq(kage_vm_destroy(clone), KAGE_OK);
	ck_assert_int_eq(kage_vm_unmap(g.vm, 0, 64 * MIB), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x400000, &at, 8, NULL), KAGE_MMIO);
}
END_TEST

START_TEST(test_odd_accesses)
{
	uint64_t root = guest_long_mode(&g, 4);
	unsigned char buf[20000], back[20000];
	struct kage_fault f = {0};

	for (unsigned i = 0; i < sizeof(buf); i++)
		buf[i] = (unsigned char)(i * 7 + i / 251);
	for (unsigned i = 0; i < 4; i++) /* scattered frames */
		guest_map(&g, root, 0x400000 + i * 4096, 0x2000000 + (7 - i) * 0x10000, PTE_W, 0);
	ck_assert_int_eq(kage_vcpu_store(g.cpu, 0x400ffd, buf, 8, &f), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x400ffd, back, 8, &f), KAGE_OK);
	ck_assert_mem_eq(buf, back, 8);
	ck_assert_int_eq(kage_vcpu_store(g.cpu, 0x400123, buf, 12345, &f), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x400123, back, 12345, &f), KAGE_OK);
	ck_assert_mem_eq(buf, back, 12345);
	ck_assert_int_eq(kage_vcpu_fetch(g.cpu, 0x400123, back, 4096, &f), KAGE_OK);
	ck_assert_mem_eq(buf, back, 4096);
	/* beyond the last page: long ones say how far they came, short ones do nothing */
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x402010, back, 16000, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.gva, 0x404000);
	ck_assert_uint_eq(f.done, 0x404000 - 0x402010);
	ck_assert_int_eq(kage_vcpu_store(g.cpu, 0x403ffe, "\x11\x22\x33\x44", 4, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.done, 0);
	ck_assert_uint_eq(f.gva, 0x404000);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x403ffe, back, 2, &f), KAGE_OK);
	ck_assert_int_ne(memcmp(back, "\x11\x22", 2), 0);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x400000, NULL, 9, &f), -EINVAL);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x400000, back, 0, &f), -EINVAL);
}
END_TEST

START_TEST(test_store_across_into_a_table)
{
	uint64_t root = guest_long_mode(&g, 4), at, table, v;

	at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	table = at & ~0xfffull;
	guest_map(&g, root, 0x500000, 0x2001000, PTE_W, 0);
	guest_map(&g, root, 0x501000, table, PTE_W, 0);
	guest_w64(&g, table, 0x2002000 | PTE_P | PTE_W);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 0);
	v = 0x3fff000000000000; /* its upper half goes over the first entry's lower one */
	cpu_store(g.cpu, 0x500ffc, v);
	ck_assert_uint_eq(guest_r64(&g, table) & 0xffffffff, 0x3fff0000);
	/* and across into the root, through which the store itself goes */
	guest_map(&g, root, 0x502000, 0x2003000, PTE_W, 0);
	guest_map(&g, root, 0x503000, root, PTE_W, 0);
	v = guest_r64(&g, root);
	v <<= 32;
	cpu_store(g.cpu, 0x502ffc, v);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x503000), guest_r64(&g, root));
}
END_TEST

START_TEST(test_pointers)
{
	uint64_t root = guest_long_mode(&g, 4), at, win;
	struct kage_fault f = {0};
	uint64_t *p;

	at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	guest_map(&g, root, 0x500000, at & ~0xfffull, PTE_W, 0);
	ck_assert_int_eq(kage_vcpu_ptr(g.cpu, 0x400000, 8, KAGE_WRITE, (void **)&p, &f), -EINVAL);
	kage_vcpu_enter(g.cpu);
	ck_assert_int_eq(kage_vcpu_ptr(g.cpu, 0x400ffc, 8, KAGE_WRITE, (void **)&p, &f), -EINVAL);
	ck_assert_int_eq(kage_vcpu_ptr(g.cpu, 0x400000, 8, KAGE_READ | KAGE_WRITE, (void **)&p, &f), KAGE_OK);
	win = kage_vcpu_window(g.cpu);
	__atomic_fetch_add(p, 5, __ATOMIC_SEQ_CST);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 5);
	ck_assert_uint_eq(kage_vcpu_window(g.cpu), win);
	/* a pointer to a table: the guest's compare and exchange on an entry */
	ck_assert_int_eq(
	    kage_vcpu_ptr(g.cpu, 0x500000 + (at & 0xfff), 8, KAGE_READ | KAGE_WRITE, (void **)&p, &f),
	    KAGE_OK);
	ck_assert_uint_ne(kage_vcpu_window(g.cpu), win);
	ck_assert_uint_eq(*p & ~(PTE_A | PTE_D), 0x2000000 | PTE_P | PTE_W);
	__atomic_store_n(p, 0x2001000 | PTE_P | PTE_W, __ATOMIC_SEQ_CST);
	ck_assert_int_eq(kage_vcpu_ptr(g.cpu, 0x600000, 8, KAGE_READ, (void **)&p, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.vector, 14);
	kage_vcpu_leave(g.cpu);
	ck_assert_int_eq(
	    kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_PAGE, .gva = 0x400000)), KAGE_OK);
	cpu_store(g.cpu, 0x400000, 7);
	ck_assert_uint_eq(guest_r64(&g, 0x2001000), 7);
	ck_assert_uint_eq(guest_r64(&g, 0x2000000), 5);
	/* to the root itself */
	guest_map(&g, root, 0x501000, root, PTE_W, 0);
	kage_vcpu_enter(g.cpu);
	ck_assert_int_eq(kage_vcpu_ptr(g.cpu, 0x501000, 8, KAGE_WRITE, (void **)&p, &f), KAGE_OK);
	__atomic_store_n(p, 0, __ATOMIC_SEQ_CST);
	kage_vcpu_leave(g.cpu);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ALL)), KAGE_OK);
	cpu_faults(g.cpu, 0x400000, KIND_LOAD, 0);
}
END_TEST

START_TEST(test_inside_a_window)
{
	cpu_store(g.cpu, 0x2000000, 1);
	kage_vcpu_enter(g.cpu);
	ck_assert(!kage_vcpu_wanted(g.cpu));
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 1);
	ck_assert_int_eq(kage_vm_advise(g.vm, 0x2000000, 4096, KAGE_ADVICE_DISCARD), -EDEADLK);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 1);
	kage_vcpu_leave(g.cpu);
	ck_assert_int_eq(kage_vm_advise(g.vm, 0x2000000, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 0);
}
END_TEST

static unsigned written_calls;
static uint64_t written_gpa;
static const uint64_t *watched; /* guest memory that the callback looks at */
static uint64_t seen_by_callback;

static void code_written(void *opaque, struct kage_vcpu *cpu, uint64_t gpa, uint64_t len)
{
	ck_assert_ptr_eq(opaque, &g);
	ck_assert_ptr_nonnull(cpu);
	ck_assert_uint_eq(len, 4096);
	written_calls++;
	written_gpa = gpa;
	if (watched && gpa == 0x2000000)
		seen_by_callback = *(const volatile uint64_t *)watched;
}

static void code_round(struct kage_vcpu *cpu, uint64_t gva)
{
	struct iovec iov;
	unsigned n = 1;
	uint64_t v, old;

	written_calls = 0;
	ck_assert_int_eq(kage_vcpu_fetch(cpu, gva, &v, 8, NULL), KAGE_OK);
	cpu_store(cpu, gva + 4096, 1);
	ck_assert_uint_eq(written_calls, 0);
	cpu_store(cpu, gva + 8, 1);
	ck_assert_uint_eq(written_calls, 1);
	ck_assert_uint_eq(written_gpa, 0x2000000);
	cpu_store(cpu, gva + 16, 1);
	ck_assert_uint_eq(written_calls, 1);
	ck_assert_int_eq(kage_vcpu_fetch(cpu, gva, &v, 8, NULL), KAGE_OK);
	guest_audit(&g);
	ck_assert_int_eq(kage_vm_pin(g.vm, 0x2000000, 4096, 0, &iov, &n), KAGE_OK);
	watched = iov.iov_base;
	old = *watched;
	ck_assert_uint_ne(old, 5);
	guest_w64(&g, 0x2000000, 5);
	ck_assert_uint_eq(written_calls, 2);
	ck_assert_uint_eq(seen_by_callback, old); /* it came before the bytes did */
	watched = NULL;
	ck_assert_int_eq(kage_vm_unpin(g.vm, 0x2000000, 4096), KAGE_OK);
	guest_w64(&g, 0x2000000, 6);
	ck_assert_uint_eq(written_calls, 2);
	ck_assert_int_eq(kage_vcpu_fetch(cpu, gva, &v, 8, NULL), KAGE_OK);
	ck_assert_uint_eq(v, 6);
	cpu_store(g.cpu, gva, 7); /* by another vCPU */
	ck_assert_uint_eq(written_calls, 3);
	ck_assert_int_eq(kage_vcpu_fetch(cpu, gva, &v, 8, NULL), KAGE_OK);
	ck_assert_uint_eq(v, 7);
	ck_assert_int_eq(kage_vm_advise(g.vm, 0x2000000, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
	ck_assert_uint_eq(written_calls, 4);
	ck_assert_int_eq(kage_vcpu_fetch(cpu, gva, &v, 8, NULL), KAGE_OK);
	ck_assert_int_eq(kage_vm_mark_dirty(g.vm, 0, 1ull << 52), KAGE_OK);
	ck_assert_uint_eq(written_calls, 5);
	ck_assert_int_eq(kage_vcpu_fetch(cpu, gva, &v, 8, NULL), KAGE_OK);
	ck_assert_int_eq(kage_vm_mark_dirty(g.vm, 0x1f00000, 4 * MIB), KAGE_OK);
	ck_assert_uint_eq(written_calls, 6);
}

START_TEST(test_code)
{
	struct kage_vcpu *cpu;
	uint64_t root, v = 0;

	ck_assert_int_eq(kage_vcpu_fetch(g.cpu, 0x2000000, &v, 8, NULL), KAGE_OK);
	cpu_store(g.cpu, 0x2000000, 1);
	ck_assert_int_eq(kage_vcpu_create(g.vm,
					  KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI,
						   .code_written = code_written, .opaque = &g),
					  &cpu),
			 KAGE_OK);
	code_round(cpu, 0x2000000);
	root = guest_long_mode(&g, 4);
	ck_assert_int_eq(kage_vcpu_set_regs(cpu, &g.regs, sizeof(g.regs)), KAGE_OK);
	guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	guest_map(&g, root, 0x401000, 0x2001000, PTE_W, 0);
	code_round(cpu, 0x400000);
	kage_vcpu_destroy(cpu);
}
END_TEST

START_TEST(test_translate)
{
	uint64_t root, at;
	struct kage_fault f = {0};

	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 0x12345, KAGE_READ, &f), KAGE_OK);
	ck_assert_uint_eq(f.gpa, 0x12345);
	root = guest_long_mode(&g, 4);
	at = guest_map(&g, root, 0x400000, 0x2000000, PTE_U, 0);
	guest_map(&g, root, 0x40000000, 32 * MIB, 0, 1);
	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 0x400123, KAGE_READ, &f), KAGE_OK);
	ck_assert_uint_eq(f.gpa, 0x2000123);
	ck_assert_uint_eq(f.level, 0);
	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 0x40012345, KAGE_READ, &f), KAGE_OK);
	ck_assert_uint_eq(f.gpa, 32 * MIB + 0x12345);
	ck_assert_uint_eq(f.level, 1);
	ck_assert_uint_eq(guest_r64(&g, at) & PTE_A, 0);
	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 0x400123, KAGE_WRITE, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.error, 3);
	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 0x400123, 0, &f), KAGE_OK);
	g.regs.cr4 |= 1 << 21;
	g.regs.rflags = 1 << 18;
	guest_set_regs(&g);
	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 0x400123, KAGE_READ, &f), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 0x400123, KAGE_READ | KAGE_IMPLICIT, &f),
			 KAGE_GUEST_FAULT);
	ck_assert_int_eq(kage_vcpu_translate(g.cpu, 0x400123, KAGE_RWX, &f), -EINVAL);
}
END_TEST

START_TEST(test_readonly_and_foreign_free_tables)
{
	uint64_t root = guest_long_mode(&g, 4), at;

	at = guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	ck_assert_int_eq(kage_vm_protect(g.vm, at & ~0xfffull, 4096, KAGE_READ), KAGE_OK);
	/* bits cannot be set: the walk goes on without them */
	cpu_store(g.cpu, 0x400000, 1);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 1);
	ck_assert_uint_eq(guest_r64(&g, at) & (PTE_A | PTE_D), 0);
	guest_audit(&g);
	ck_assert_int_eq(kage_vm_protect(g.vm, at & ~0xfffull, 4096, KAGE_RWX), KAGE_OK);
}
END_TEST

START_TEST(test_many_roots_stay_within_the_limit)
{
	uint64_t root = guest_long_mode(&g, 4);
	struct kage_stats s = {.size = sizeof(s)};

	(void)root;
	for (unsigned i = 0; i < 600; i++) {
		g.regs.cr3 = guest_table(&g);
		guest_map(&g, g.regs.cr3, 0x400000, 0x3f00000 + (i & 7) * 4096, PTE_W, 0);
		guest_set_regs(&g);
		cpu_store(g.cpu, 0x400000, i);
		ck_assert_uint_eq(guest_r64(&g, 0x3f00000 + (i & 7) * 4096), i);
	}
	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &s), KAGE_OK);
	ck_assert_uint_le(s.shadow_pages, 1024);
	ck_assert_uint_ge(s.shadow_pages, 512);
	guest_audit(&g);
}
END_TEST

/* -- memory of the shadow tables: by the page, by the run, or by the page since there is no run to be had -- */

static struct {
	size_t bytes, most; /* in use; of one allocation, 0: any */
	unsigned refused;
} heap;

static void *heap_alloc(void *opaque, size_t bytes)
{
	void *p;

	heap.refused += heap.most && bytes > heap.most;
	if ((heap.most && bytes > heap.most) || posix_memalign(&p, 64, bytes))
		return NULL;
	heap.bytes += bytes;
	return memset(p, 0, bytes);
}

static void heap_free(void *opaque, void *p, size_t bytes)
{
	heap.bytes -= bytes;
	free(p);
}

#define MANY_TABLES 1500

/* A load through each of many tables of level 0; the tables are anew. */
static void walk_many_tables(struct guest *m)
{
	uint64_t root;

	m->next_table = TABLES;
	root = guest_long_mode(m, 4);
	for (uint64_t i = 0; i < MANY_TABLES; i++) {
		guest_map(m, root, i * 2 * MIB, 32 * MIB + i * 4096, PTE_W, 0);
		guest_w64(m, 32 * MIB + i * 4096, i + 1);
	}
	for (uint64_t i = 0; i < MANY_TABLES; i++)
		ck_assert_uint_eq(cpu_load(m->cpu, i * 2 * MIB), i + 1);
}

START_TEST(test_many_tables_come_and_go)
{
	struct guest m = {0};
	struct kage_stats s = {.size = sizeof(s)};
	const struct kage_alloc alloc = {.alloc = heap_alloc, .free = heap_free};
	size_t before;

	heap.most = _i ? MIB : 0;
	heap.refused = 0;
	ck_assert_int_eq(kage_engine_create(KAGE_CFG(kage_engine_config, .address_space = 64 * GIB, .alloc = alloc),
					    &m.engine), KAGE_OK);
	ck_assert_int_eq(kage_vm_create(m.engine, NULL, &m.vm), KAGE_OK);
	ck_assert_int_eq(kage_vm_map(m.vm, KAGE_CFG(kage_region, .len = 512 * MIB)), KAGE_OK);
	m.cpu = guest_cpu(&m);
	before = heap.bytes;
	for (unsigned round = 0; round < 3; round++) {
		walk_many_tables(&m);
		ck_assert_int_eq(kage_stats_get(m.engine, m.vm, &s), KAGE_OK);
		ck_assert_uint_ge(s.shadow_pages, MANY_TABLES);
		ck_assert_uint_ge(heap.bytes - before, MANY_TABLES * 12288);
		ck_assert_uint_le(heap.bytes - before, 2 * MANY_TABLES * 12288);
		guest_audit(&m);
		ck_assert_int_eq(kage_vm_advise(m.vm, TABLES, 16 * MIB, KAGE_ADVICE_DISCARD), KAGE_OK);
		cpu_faults(m.cpu, 0, KIND_LOAD, 0);
		ck_assert_uint_le(heap.bytes - before, 6 * MIB);
	}
	ck_assert_int_eq(heap.refused != 0, _i);
	guest_stop(&m);
	ck_assert_uint_eq(heap.bytes, 0);
}
END_TEST

START_TEST(test_context_ids_run_out)
{
	uint64_t root = guest_long_mode(&g, 4);
	uint64_t at = guest_map(&g, root, 0x400000, 0x2000000, PTE_U | PTE_W, 0);
	struct kage_vm *clone;

	(void)at;
	g.regs.cpl = 3;
	g.regs.cr4 |= 1 << 22;
	for (unsigned i = 0; i < 5000; i++) {
		g.regs.pkru = i << 2;
		guest_set_regs(&g);
		cpu_store(g.cpu, 0x400000, i);
		ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), i);
		if (i % 1000 == 0) { /* whole-guest write protection */
			ck_assert_int_eq(kage_vm_clone(g.vm, NULL, &clone), KAGE_OK);
			cpu_store(g.cpu, 0x400000, i + 1);
			ck_assert_int_eq(kage_vm_destroy(clone), KAGE_OK);
		}
	}
}
END_TEST

START_TEST(test_dirty_logs)
{
	uint64_t root = guest_long_mode(&g, 4), bits[64 * MIB / 4096 / 64];
	struct kage_dirty *coarse, *fine;

	for (uint64_t off = 0; off < 2 * MIB; off += 4096)
		guest_w64(&g, 32 * MIB + off, off);
	guest_map(&g, root, 0x400000, 0x2400000, PTE_W, 0);
	guest_map(&g, root, 0x40000000, 32 * MIB, PTE_W, 1);
	cpu_store(g.cpu, 0x400000, 1);
	cpu_store(g.cpu, 0x40003000, 1);
	ck_assert_int_eq(kage_dirty_open(g.vm, KAGE_CFG(kage_dirty_config, .flags = 0), &coarse), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x400000), 1);
	ck_assert_int_eq(kage_dirty_collect(coarse, 0, 64 * MIB, bits, sizeof(bits)), 0);
	cpu_store(g.cpu, 0x400000, 2);
	ck_assert_int_ge(kage_dirty_collect(coarse, 0x2400000, 4096, bits, sizeof(bits)), 1);
	ck_assert_int_eq(kage_dirty_collect(coarse, 0x2400000, 4096, bits, sizeof(bits)), 0);
	cpu_store(g.cpu, 0x400000, 3);
	ck_assert_int_eq(kage_dirty_collect(coarse, 0x2400000, 4096, bits, sizeof(bits)), 1);
	cpu_store(g.cpu, 0x40005000, 2);
	ck_assert_int_ge(kage_dirty_collect(coarse, 32 * MIB, 2 * MIB, bits, sizeof(bits)), 1);
	ck_assert(bits[0] & 1 << 5);
	ck_assert_int_eq(kage_dirty_open(g.vm, KAGE_CFG(kage_dirty_config, .flags = KAGE_DIRTY_FINE), &fine),
			 KAGE_OK);
	cpu_store(g.cpu, 0x40007000, 3);
	cpu_store(g.cpu, 0x40008000, 3);
	cpu_store(g.cpu, 0x40007008, 3);
	guest_audit(&g);
	ck_assert_int_eq(kage_dirty_collect(fine, 32 * MIB, 2 * MIB, bits, sizeof(bits)), 2);
	ck_assert_uint_eq(bits[0], 1 << 7 | 1 << 8);
	kage_dirty_close(fine);
	kage_dirty_close(coarse);
}
END_TEST

static void bad_regs(uint64_t cr0, uint64_t cr3, uint64_t cr4, uint64_t efer, int want)
{
	struct kage_x86_regs r = {.cr0 = cr0, .cr3 = cr3, .cr4 = cr4, .efer = efer};

	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), want);
}

START_TEST(test_registers)
{
	struct kage_x86_regs r = {.cpl = 4};

	bad_regs(0x80000000, 0, 0x20, 0x500, -EINVAL);	 /* PG without PE */
	bad_regs(0x20000001, 0, 0, 0, -EINVAL);		 /* NW without CD */
	bad_regs(0x80000001, 0, 0x20, 0x100, -EINVAL);	 /* LME and PG, but not LMA */
	bad_regs(0x1, 0, 0x20, 0x400, -EINVAL);		 /* LMA without PG */
	bad_regs(0x80000001, 0, 0x0, 0x500, -EINVAL);	 /* LME without PAE */
	bad_regs(0x80000001, 0, 0x0, 0x0, KAGE_OK);	 /* 32-bit */
	bad_regs(0x80000001, 0, 0x20, 0x0, KAGE_OK);	 /* PAE */
	bad_regs(0x80000001, 0, 0x20 | 1 << 23, 0x500, -EOPNOTSUPP);
	bad_regs(0x80000001, 0, 0x20 | 1ull << 40, 0x500, -EINVAL);
	bad_regs(0x80000001, 1ull << 50, 0x20, 0x500, -EINVAL); /* above phys_bits */
	bad_regs(0x80000001, 1ull << 63, 0x20, 0x500, -EINVAL); /* no PCIDE */
	bad_regs(0x1, 0, 1 << 17, 0, -EINVAL);			/* PCIDE outside long mode */
	bad_regs(1ull << 32, 0, 0, 0, -EINVAL);
	bad_regs(0x1, 0, 0, 1 << 9, -EINVAL);
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), -EINVAL);
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, 47), -EINVAL);
	bad_regs(0xe0010011, 0x1000, 0x20 | 1 << 17 | 1 << 20, 0xd01, KAGE_OK);
	bad_regs(0x1, 0, 0, 0, KAGE_OK);
}
END_TEST

/* The struct as programs have it that were built before or after this library. */
START_TEST(test_register_sizes)
{
	struct {
		struct kage_x86_regs known;
		char more[16];
	} r = {.known = {.cr0 = 1, .rflags = 1 << 18 | 1, .pdpte = {1, 2, 3, 4}}}, got;

	r.known.flags = 2;
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, 48), KAGE_OK); /* the rest is not there */
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), -EINVAL);
	r.known.flags = 0;
	r.known.reserved = 1;
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), -EINVAL);
	r.known.reserved = 0;
	r.more[3] = 1;
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), -E2BIG);
	r.more[3] = 0;
	r.known.cr0 = 0x11;
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), KAGE_OK);
	memset(&got, 0x5a, sizeof(got));
	ck_assert_int_eq(kage_vcpu_get_regs(g.cpu, &got, sizeof(got)), KAGE_OK);
	ck_assert_uint_eq(got.known.cr0, 0x11);
	ck_assert_uint_eq(got.known.rflags, 1 << 18);
	ck_assert_uint_eq(got.known.flags, 0);
	ck_assert_uint_eq(got.known.pdpte[3], 0); /* no PAE paging: there are none */
	ck_assert_int_eq(got.more[0] | got.more[15], 0);
	memset(&got, 0x5a, sizeof(got));
	ck_assert_int_eq(kage_vcpu_get_regs(g.cpu, &got, 48), KAGE_OK);
	ck_assert_uint_eq(got.known.flags, 0x5a5a5a5a);
	ck_assert_int_eq(kage_vcpu_get_regs(g.cpu, &got, 47), -EINVAL);
	ck_assert_int_eq(kage_vcpu_get_regs(g.cpu, NULL, 48), -EINVAL);
	ck_assert_int_eq(kage_vcpu_get_regs(NULL, &got, 48), -EINVAL);
}
END_TEST

START_TEST(test_create_and_layout)
{
	struct kage_tlb_layout l = {.size = sizeof(l)};
	struct kage_vcpu *cpu = (void *)1;

#define bad(want, ...)                                                                                       \
	ck_assert_int_eq(kage_vcpu_create(g.vm, KAGE_CFG(kage_vcpu_config, __VA_ARGS__), &cpu), want)
	bad(-ENOEXEC, .abi = 1);
	bad(-EOPNOTSUPP, .arch = 7);
	bad(-EINVAL, .phys_bits = 20);
	bad(-EINVAL, .tlb_bits = 4);
	bad(-EINVAL, .features = 1u << 30);
	ck_assert_ptr_eq(cpu, (void *)1);
	ck_assert_int_eq(kage_vm_destroy(g.vm), -EBUSY);
	kage_vcpu_destroy(NULL);
	ck_assert_int_eq(kage_vcpu_layout(&l), KAGE_OK);
	ck_assert_uint_eq(l.abi, KAGE_VCPU_ABI);
	ck_assert_uint_eq(l.tlb_offset, 32);
	ck_assert_uint_eq(l.entry_size, 32);
	l.size = 4;
	ck_assert_int_eq(kage_vcpu_layout(&l), -EINVAL);
}
END_TEST

static int put_away(const char *path, enum kage_dump_what what, enum kage_dump_format format)
{
	FILE *f = fopen(path, "w");
	int r;

	ck_assert_ptr_nonnull(f);
	r = kage_dump(g.vm, what, format, fileno(f));
	fclose(f);
	return r;
}

START_TEST(test_dumps)
{
	char path[] = "/tmp/kage-dump-XXXXXX", text[4096];
	uint64_t root = guest_long_mode(&g, 4);
	int fd = mkstemp(path);
	FILE *f = fdopen(fd, "r");

	guest_map(&g, root, 0x400000, 0x2000000, PTE_W, 0);
	cpu_store(g.cpu, 0x400000, 1);
	ck_assert_int_eq(put_away(path, KAGE_DUMP_SHADOW, KAGE_DUMP_TEXT), KAGE_OK);
	text[fread(text, 1, sizeof(text) - 1, f)] = 0;
	ck_assert_ptr_nonnull(strstr(text, "leaf  gfn 0x2000"));
	ck_assert_int_eq(put_away(path, KAGE_DUMP_GUEST, KAGE_DUMP_TEXT), KAGE_OK);
	rewind(f);
	text[fread(text, 1, sizeof(text) - 1, f)] = 0;
	ck_assert_ptr_nonnull(strstr(text, "400000"));
	ck_assert_int_eq(put_away(path, KAGE_DUMP_SHADOW, KAGE_DUMP_JSON), KAGE_OK);
	rewind(f);
	text[fread(text, 1, sizeof(text) - 1, f)] = 0;
	ck_assert_int_eq(text[0], '[');
	fclose(f);
	remove(path);
}
END_TEST

static Suite *suite(void)
{
	Suite *s = suite_create("vcpu");
	TCase *t = tcase_create("vcpu");

	tcase_set_timeout(t, 120);
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_test(t, test_paging_off);
	tcase_add_test(t, test_protect_inside_a_block);
	tcase_add_loop_test(t, test_neighbour_of_a_change, 0, 4);
	tcase_add_test(t, test_access_after_leave);
	tcase_add_test(t, test_device_memory);
	tcase_add_test(t, test_four_levels);
	tcase_add_test(t, test_not_canonical);
	tcase_add_test(t, test_five_levels);
	tcase_add_test(t, test_large_pages);
	tcase_add_test(t, test_rights);
	tcase_add_test(t, test_user_bit_added);
	tcase_add_test(t, test_protection_keys);
	tcase_add_test(t, test_reserved_bits_and_bad_tables);
	tcase_add_test(t, test_watched_tables_follow_at_once);
	tcase_add_test(t, test_unsync_tables);
	tcase_add_test(t, test_context_switch);
	tcase_add_test(t, test_pcid);
	tcase_add_test(t, test_new_pcid);
	tcase_add_test(t, test_unsync_table_reused);
	tcase_add_test(t, test_table_is_data_again);
	tcase_add_test(t, test_discard_and_clone_under_tables);
	tcase_add_test(t, test_odd_accesses);
	tcase_add_test(t, test_store_across_into_a_table);
	tcase_add_test(t, test_pointers);
	tcase_add_test(t, test_inside_a_window);
	tcase_add_test(t, test_code);
	tcase_add_test(t, test_translate);
	tcase_add_test(t, test_readonly_and_foreign_free_tables);
	tcase_add_test(t, test_many_roots_stay_within_the_limit);
	tcase_add_loop_test(t, test_many_tables_come_and_go, 0, 2);
	tcase_add_test(t, test_context_ids_run_out);
	tcase_add_test(t, test_dirty_logs);
	tcase_add_test(t, test_registers);
	tcase_add_test(t, test_register_sizes);
	tcase_add_test(t, test_create_and_layout);
	tcase_add_test(t, test_dumps);
	suite_add_tcase(s, t);
	return s;
}

int main(void)
{
	SRunner *r = srunner_create(suite());
	int failed;

	srunner_set_fork_status(r, CK_NOFORK);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed != 0;
}
