/* SPDX-License-Identifier: MIT */
/*
 * arm64 guests through the public API, rule by rule: syndromes and their order,
 * rights, access flag and dirty state, table attributes, sizes of addresses, both
 * roots, tags, flushes, switches. Expected values are the Arm ARM's (D8, D17.2).
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include "guest_tables.h"

#define VALID	  1ull
#define TABLE	  2ull
#define EL0	  0x40ull
#define RO	  0x80ull
#define AF	  0x400ull
#define NG	  0x800ull
#define DBM	  (1ull << 51)
#define CONT	  (1ull << 52)
#define PXN	  (1ull << 53)
#define UXN	  (1ull << 54)
#define T_PXN	  (1ull << 59)
#define T_UXN	  (1ull << 60)
#define T_EL0	  (1ull << 61)
#define T_RO	  (1ull << 62)
#define PAGE	  (VALID | TABLE | AF)
#define BLOCK	  (VALID | AF)
#define NEXT	  (VALID | TABLE)

#define TCR_TG0(n) ((uint64_t)(n) << 14)
#define TCR_TG1_4K (2ull << 30)
#define TCR_IPS(n) ((uint64_t)(n) << 32)
#define TCR_HA	   (1ull << 39)
#define TCR_HD	   (1ull << 40)
#define TCR_HPD0   (1ull << 41)
#define TCR_TBI0   (1ull << 37)
#define TCR_TBI1   (1ull << 38)
#define TCR_EPD1   (1ull << 23)
#define TCR_DS	   (1ull << 59)
#define TCR_48	   (16 | 16ull << 16 | TCR_TG1_4K | TCR_IPS(5))
#define WXN	   (1ull << 19)
#define EPAN	   (1ull << 57)
#define PAN	   (1ull << 22)
#define EL1	   4ull

#define TRANSLATION(level)  (0x04u + (level)) /* FSC, by Arm's level */
#define ACCESS_FLAG(level)  (0x08u + (level))
#define PERMISSION(level)   (0x0cu + (level))
#define ADDRESS_SIZE(level) (0x00u + (level))
#define WNR		    0x40u

#define RAM  (64 * MIB)
#define HIGH 0xffff000000000000ull

static struct guest g;
static struct kage_arm64_regs arm;
static uint64_t root;

static void regs(void)
{
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &arm, sizeof(arm)), KAGE_OK);
}

static struct kage_vcpu *cpu_with(uint32_t features, uint32_t phys_bits)
{
	struct kage_vcpu *cpu;

	ck_assert_int_eq(kage_vcpu_create(g.vm,
					  KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .arch = KAGE_ARCH_ARM64,
						   .features = features, .phys_bits = phys_bits),
					  &cpu),
			 KAGE_OK);
	return cpu;
}

/* 4K, 48 bits, TTBR0 only used; tables for gva 0x400000 (level 3 of Arm's at `last`) are there. */
static uint64_t last, at1, at2;
#define GVA 0x400000ull

static void start(void)
{
	guest_start(&g, RAM);
	kage_vcpu_destroy(g.cpu);
	g.cpu = cpu_with(0xfff, 52);
	root = guest_table(&g);
	at1 = guest_table(&g);
	at2 = guest_table(&g);
	last = guest_table(&g);
	guest_w64(&g, root, at1 | NEXT);
	guest_w64(&g, at1, at2 | NEXT);
	guest_w64(&g, at2 + 2 * 8, last | NEXT);
	arm = (struct kage_arm64_regs){.sctlr = 1, .tcr = TCR_48, .ttbr0 = root, .ttbr1 = root, .pstate = EL1};
	regs();
}

static void stop(void)
{
	guest_stop(&g);
}

static void leaf(uint64_t e)
{
	guest_w64(&g, last, e);
}

static int try(uint64_t gva, int kind, struct kage_fault *f)
{
	uint64_t v = 1;

	*f = (struct kage_fault){0};
	return kind == KIND_LOAD    ? kage_vcpu_load(g.cpu, gva, &v, 8, f)
	       : kind == KIND_STORE ? kage_vcpu_store(g.cpu, gva, &v, 8, f)
				    : kage_vcpu_fetch(g.cpu, gva, &v, 8, f);
}

static void aborts(uint64_t gva, int kind, uint32_t fsc, unsigned level)
{
	bool el0 = !(arm.pstate & EL1);
	struct kage_fault f;

	ck_assert_int_eq(try(gva, kind, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.vector, (kind == KIND_FETCH ? 0x20 : 0x24) + !el0);
	ck_assert_uint_eq(f.error, fsc | (kind == KIND_STORE ? WNR : 0));
	ck_assert_uint_eq(f.level, level);
	ck_assert_uint_eq(f.gva, gva);
}

static void goes(uint64_t gva, int kind)
{
	struct kage_fault f;
	int r = try(gva, kind, &f);

	ck_assert_msg(r == KAGE_OK, "gva %#lx kind %d: %d %#x %#x", (unsigned long)gva, kind, r, f.vector, f.error);
}

/* "rwx" for EL1, then for EL0: what goes; all else is a permission fault of Arm's level 3. */
static void allows(const char *el1, const char *el0)
{
	for (int el = 0; el < 2; el++) {
		const char *want = el ? el1 : el0;

		arm.pstate = (arm.pstate & ~EL1) | (el ? EL1 : 0);
		regs();
		for (int kind = 0; kind < 3; kind++) {
			if (strchr(want, "rwx"[kind]))
				goes(GVA, kind);
			else
				aborts(GVA, kind, PERMISSION(3), 0);
		}
	}
	guest_audit(&g);
}

START_TEST(test_rights)
{
	start();
	leaf(0x2000000 | PAGE);
	allows("rwx", "x");
	leaf(0x2000000 | PAGE | EL0);
	allows("rw", "rwx"); /* what EL0 may write EL1 does not execute */
	leaf(0x2000000 | PAGE | RO);
	allows("rx", "x");
	leaf(0x2000000 | PAGE | RO | EL0);
	allows("rx", "rx");
	leaf(0x2000000 | PAGE | RO | EL0 | PXN);
	allows("r", "rx");
	leaf(0x2000000 | PAGE | RO | EL0 | UXN);
	allows("rx", "r");
	leaf(0x2000000 | PAGE | UXN | PXN);
	allows("rw", "");
	arm.sctlr |= WXN;
	leaf(0x2000000 | PAGE | UXN);
	allows("rw", "");
	leaf(0x2000000 | PAGE | EL0);
	allows("rw", "rw");
	leaf(0x2000000 | PAGE | EL0 | RO);
	allows("rx", "rx");
	stop();
}
END_TEST

START_TEST(test_pan)
{
	start();
	arm.pstate |= PAN;
	leaf(0x2000000 | PAGE | EL0 | RO);
	allows("x", "rx");
	leaf(0x2000000 | PAGE);
	allows("rwx", "x"); /* EL0 may execute it: PAN does not mind, EPAN does */
	arm.sctlr |= EPAN;
	allows("x", "x");
	leaf(0x2000000 | PAGE | UXN);
	allows("rwx", "");
	kage_vcpu_destroy(g.cpu); /* a CPU without either */
	g.cpu = cpu_with(KAGE_ARM64_HAF, 48);
	leaf(0x2000000 | PAGE | EL0 | RO);
	allows("rx", "rx");
	stop();
}
END_TEST

START_TEST(test_table_attributes)
{
	start();
	leaf(0x2000000 | PAGE | EL0 | RO);
	guest_w64(&g, at1, at2 | NEXT | T_EL0);
	allows("rx", "x");
	guest_w64(&g, at1, at2 | NEXT | T_UXN);
	guest_w64(&g, at2 + 16, last | NEXT | T_PXN);
	allows("r", "r");
	guest_w64(&g, at1, at2 | NEXT | T_RO);
	guest_w64(&g, at2 + 16, last | NEXT);
	leaf(0x2000000 | PAGE | PXN);
	allows("r", "x");
	arm.tcr |= TCR_HPD0;
	regs();
	allows("rw", "x");
	guest_w64(&g, at1, at2 | NEXT | T_RO | T_EL0 | T_UXN | T_PXN);
	allows("rw", "x");
	arm.tcr &= ~TCR_HPD0;
	allows("r", "");
	stop();
}
END_TEST

/* Every level's faults; which comes first where an entry deserves several. */
START_TEST(test_syndromes)
{
	start();
	leaf(0);
	aborts(GVA, KIND_LOAD, TRANSLATION(3), 0);
	leaf(0x2000000 | VALID | AF); /* no page at the last level */
	aborts(GVA, KIND_STORE, TRANSLATION(3), 0);
	leaf(0x2000000 | VALID | TABLE | RO);
	aborts(GVA, KIND_STORE, ACCESS_FLAG(3), 0);
	leaf(0x2000000 | PAGE | RO);
	aborts(GVA, KIND_STORE, PERMISSION(3), 0);
	arm.tcr = (arm.tcr & ~TCR_IPS(7)) | TCR_IPS(0); /* 32 bits of address */
	regs();
	leaf(1ull << 32 | VALID | TABLE);
	aborts(GVA, KIND_FETCH, ADDRESS_SIZE(3), 0);
	guest_w64(&g, at2 + 16, 1ull << 40 | NEXT);
	aborts(GVA, KIND_LOAD, ADDRESS_SIZE(2), 1);
	guest_w64(&g, at2 + 16, 0x2000000 | VALID); /* a block, AF clear */
	aborts(GVA, KIND_LOAD, ACCESS_FLAG(2), 1);
	guest_w64(&g, at2 + 16, 0x2000000 | BLOCK | RO);
	aborts(GVA, KIND_STORE, PERMISSION(2), 1);
	guest_w64(&g, at1, BLOCK); /* 1 GiB */
	goes(GVA, KIND_LOAD);
	guest_w64(&g, at1, 0);
	aborts(GVA, KIND_LOAD, TRANSLATION(1), 2);
	guest_w64(&g, root, BLOCK); /* none of 512 GiB */
	aborts(GVA, KIND_LOAD, TRANSLATION(0), 3);
	arm.ttbr0 = 1ull << 33;
	regs();
	aborts(GVA, KIND_LOAD, ADDRESS_SIZE(0), 3);
	arm.tcr |= TCR_EPD1;
	regs();
	aborts(HIGH | GVA, KIND_LOAD, TRANSLATION(0), 3);
	aborts(1ull << 48, KIND_LOAD, TRANSLATION(0), 3);
	arm.tcr = (arm.tcr & ~63ull) | 11; /* out of range */
	regs();
	aborts(GVA, KIND_LOAD, TRANSLATION(0), 3);
	stop();
}
END_TEST

/* Software's access flag, then hardware's; dirty state. */
START_TEST(test_access_and_dirty)
{
	uint64_t clean = 0x2000000 | VALID | TABLE | RO | DBM;

	start();
	leaf(clean);
	aborts(GVA, KIND_LOAD, ACCESS_FLAG(3), 0);
	arm.tcr |= TCR_HD; /* counts with HA only */
	regs();
	leaf(clean | AF);
	aborts(GVA, KIND_STORE, PERMISSION(3), 0);
	arm.tcr |= TCR_HA;
	regs();
	leaf(clean);
	goes(GVA, KIND_LOAD);
	ck_assert_uint_eq(guest_r64(&g, last), clean | AF);
	goes(GVA, KIND_STORE);
	ck_assert_uint_eq(guest_r64(&g, last), (clean | AF) & ~RO);
	leaf(clean); /* both at once */
	goes(GVA, KIND_STORE);
	ck_assert_uint_eq(guest_r64(&g, last), (clean | AF) & ~RO);
	leaf((clean & ~DBM) | AF); /* read-only for good */
	aborts(GVA, KIND_STORE, PERMISSION(3), 0);
	leaf(clean | AF | UXN | PXN);
	guest_w64(&g, at1, at2 | NEXT | T_RO); /* nor does DBM help against a table */
	aborts(GVA, KIND_STORE, PERMISSION(3), 0);
	ck_assert_uint_eq(guest_r64(&g, last), clean | AF | UXN | PXN);
	guest_w64(&g, at1, at2 | NEXT);
	leaf(clean | AF); /* writable as it stands, says WXN */
	arm.sctlr |= WXN;
	regs();
	aborts(GVA, KIND_FETCH, PERMISSION(3), 0);
	arm.sctlr &= ~WXN;
	arm.tcr &= ~TCR_HD;
	regs();
	aborts(GVA, KIND_STORE, PERMISSION(3), 0);
	goes(GVA, KIND_FETCH);
	arm.tcr |= TCR_HD;
	regs();
	goes(GVA, KIND_STORE);
	guest_audit(&g);
	guest_w64(&g, at2 + 16, 0x2000000 | VALID | DBM | RO | CONT | NG); /* a block of a contiguous run */
	goes(GVA + 0x123000, KIND_STORE);
	ck_assert_uint_eq(guest_r64(&g, at2 + 16), 0x2000000 | BLOCK | DBM | CONT | NG);
	stop();
}
END_TEST

/* Both halves, smaller ones, tables that are small, and switches that find what was made before. */
START_TEST(test_roots)
{
	struct kage_stats before, after;
	uint64_t other, small;

	start();
	leaf(0x2000000 | PAGE);
	other = guest_table(&g);
	guest_w64(&g, other, at1 | NEXT);
	arm.ttbr1 = other | 7ull << 48 | 1; /* ASID, CnP */
	regs();
	cpu_store(g.cpu, GVA, 11);
	ck_assert_uint_eq(cpu_load(g.cpu, HIGH | GVA), 11); /* by the same tables */
	guest_audit(&g);
	leaf(0x2001000 | PAGE);
	cpu_store(g.cpu, HIGH | GVA, 12);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 12);
	before = (struct kage_stats){.size = sizeof(before)};
	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &before), KAGE_OK);
	arm.ttbr0 = other | 9ull << 48;
	regs();
	cpu_load(g.cpu, GVA);
	arm.ttbr0 = root | 10ull << 48;
	regs();
	cpu_load(g.cpu, GVA);
	after = (struct kage_stats){.size = sizeof(after)};
	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &after), KAGE_OK);
	ck_assert_uint_eq(after.shadow_pages, before.shadow_pages);
	ck_assert_uint_eq(after.shadow_faults, before.shadow_faults);
	small = guest_table(&g) + 0x400; /* 31 bits: two entries of 1 GiB, aligned to 16 bytes */
	guest_w64(&g, small, at2 | NEXT);
	guest_w64(&g, small + 8, BLOCK);
	arm.tcr = (arm.tcr & ~63ull) | 33;
	arm.ttbr0 = small;
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 12);
	ck_assert_uint_eq(cpu_load(g.cpu, GIB + 0x2001000), 12);
	aborts(2 * GIB, KIND_LOAD, TRANSLATION(0), 3);
	cpu_store(g.cpu, GIB + (small & ~0xfffull) + 0x408, 0); /* the guest writes its root */
	kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ALL));
	aborts(GIB, KIND_LOAD, TRANSLATION(1), 2);
	stop();
}
END_TEST

START_TEST(test_tags)
{
	uint64_t tag = 0x5aull << 56;
	void *p;

	start();
	leaf(0x2000000 | PAGE | EL0);
	aborts(tag | GVA, KIND_LOAD, TRANSLATION(0), 3);
	arm.tcr |= TCR_TBI0;
	regs();
	cpu_store(g.cpu, tag | GVA, 5);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 5);
	ck_assert_uint_eq(cpu_load(g.cpu, (0xffull << 56 | GVA)), 5);
	aborts(tag | (GVA + 0x1000), KIND_LOAD, TRANSLATION(3), 0); /* the address keeps its tag */
	kage_vcpu_enter(g.cpu);
	ck_assert_int_eq(kage_vcpu_ptr(g.cpu, tag | (GVA + 8), 8, KAGE_READ, &p, NULL), KAGE_OK);
	kage_vcpu_leave(g.cpu);
	aborts((HIGH & ~(0xffull << 56)) | tag | GVA, KIND_LOAD, TRANSLATION(0), 3);
	arm.tcr |= TCR_TBI1;
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, (HIGH & ~(0xffull << 56)) | tag | GVA), 5);
	leaf(0x2001000 | PAGE);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_PAGE, .gva = tag | GVA)), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, tag | GVA), 0);
	stop();
}
END_TEST

/* Translation off: addresses are physical, and too large ones say so. */
START_TEST(test_off)
{
	start();
	kage_vcpu_destroy(g.cpu);
	g.cpu = cpu_with(KAGE_ARM64_HAF, 36);
	guest_w64(&g, 0x2000000, 77);
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 77);
	arm.sctlr = 0;
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, 0x2000000), 77);
	aborts(1ull << 36, KIND_STORE, ADDRESS_SIZE(0), 3);
	aborts(HIGH, KIND_FETCH, ADDRESS_SIZE(0), 3);
	arm.tcr |= TCR_TBI0;
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, 0x33ull << 56 | 0x2000000), 77);
	stop();
}
END_TEST

/* 52 bits: where the upper bits of addresses are, in entries and in TTBR0. */
START_TEST(test_large_addresses)
{
	uint64_t far = 1ull << 51 | 3ull << 48, table = far, block = 5ull << 48 | 0x40000000;
	struct kage_fault f;

	start();
	ck_assert_int_eq(kage_vm_map(g.vm, KAGE_CFG(kage_region, .gpa = far, .len = MIB)), KAGE_OK);
	ck_assert_int_eq(kage_vm_map(g.vm, KAGE_CFG(kage_region, .gpa = block, .len = 2 * MIB)), KAGE_OK);
	guest_w64(&g, block + 0x5008, 52);
	arm.tcr = 12 | 16ull << 16 | TCR_TG1_4K | TCR_IPS(6) | TCR_DS; /* 4K, from Arm's level -1 */
	arm.ttbr0 = table | 11ull << 2;
	guest_w64(&g, table, at1 | NEXT);
	guest_w64(&g, at1, (table & 0x3000000000000) | 0x1000 | 2ull << 8 | NEXT);
	guest_w64(&g, table + 0x1000, at2 | NEXT);
	guest_w64(&g, at2 + 16, (block & 0x3ffffffffffff) | 1ull << 8 | BLOCK);
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, GVA + 0x5008), 52);
	aborts(1ull << 48, KIND_LOAD, 0x2b, 4); /* translation, level -1 */
	guest_w64(&g, table + 8, BLOCK);
	aborts(1ull << 48, KIND_LOAD, 0x2b, 4);
	arm.tcr = (arm.tcr & ~TCR_IPS(7)) | TCR_IPS(5);
	arm.ttbr0 = root;
	guest_w64(&g, root, at1 | 3ull << 48 | NEXT);
	regs();
	aborts(GVA, KIND_LOAD, 0x29, 4);
	arm.tcr = 22 | TCR_TG0(1) | TCR_IPS(6) | TCR_EPD1; /* 64K, 42 bits: address bits 51:48 are 15:12 */
	arm.ttbr0 = 0x1000000;
	guest_w64(&g, 0x1000000, (block & 0xffffffffffffull) | 5ull << 12 | BLOCK);
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, 0x5008), 52);
	guest_w64(&g, 0x1000000, (5ull << 12) | 0x2000000 | NEXT);
	ck_assert_int_eq(try(0, KIND_LOAD, &f), KAGE_MMIO); /* the table is in no memory */
	ck_assert_uint_eq(f.gpa, 5ull << 48 | 0x2000000);
	stop();
}
END_TEST

/* LPA on a CPU with 48 bits of address: bits 15:12 of an entry of 64K, or of TTBR0 5:2, are no address. */
START_TEST(test_lpa_needs_52_bits)
{
	struct kage_fault f;

	start();
	guest_w64(&g, 0x2005008, 77);
	guest_w64(&g, 0x1000000, 0x1010000 | 3ull << 12 | NEXT);
	guest_w64(&g, 0x1010000, 0x2000000 | 5ull << 12 | PAGE);
	arm.tcr = 22 | TCR_TG0(1) | TCR_IPS(6) | TCR_EPD1;
	arm.ttbr0 = 0x1000000;
	regs();
	ck_assert_int_eq(try(0x5008, KIND_LOAD, &f), KAGE_MMIO); /* with 52 they are: the table is in no memory */
	ck_assert_uint_eq(f.gpa, 3ull << 48 | 0x1010000);
	kage_vcpu_destroy(g.cpu);
	g.cpu = cpu_with(0xfff, 48);
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, 0x5008), 77);
	arm.ttbr0 |= 1ull << 2;
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, 0x5008), 77);
	stop();
}
END_TEST

START_TEST(test_config)
{
	struct kage_vcpu *cpu = NULL;
	uint64_t x = 0;

	start();
#define no(want, ...)                                                                                                 \
	ck_assert_int_eq(                                                                                             \
	    kage_vcpu_create(g.vm, KAGE_CFG(kage_vcpu_config, .arch = KAGE_ARCH_ARM64, __VA_ARGS__), &cpu), want)
	no(-EINVAL, .phys_bits = 46);
	no(-EINVAL, .phys_bits = 52, .features = KAGE_ARM64_HAF);
	no(-EINVAL, .features = 1u << 12);
	no(KAGE_OK, .phys_bits = 32);
	kage_vcpu_destroy(cpu);
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &arm, sizeof(arm) - 8), -EINVAL);
	arm.pstate = 8;
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &arm, sizeof(arm)), -EINVAL);
	arm.pstate = EL1;
	arm.sctlr |= 1 << 25;
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &arm, sizeof(arm)), -EOPNOTSUPP);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_CR3, .value = root)), -EINVAL);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ASID, .asid = 0xffff)), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ASID, .asid = 0x10000)), -EINVAL);
	arm.sctlr = 1;
	arm.tcr = TCR_48 | TCR_TG0(3); /* a reserved granule: 4K */
	regs();
	leaf(0x2000000 | PAGE);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, GVA, &x, 8, NULL), KAGE_OK);
	stop();
}
END_TEST

/* A table of 64K is 16 frames: all of them are watched, and the last one's entries work. */
START_TEST(test_table_of_frames)
{
	uint64_t table = 0x1000000, entry = table + 8191 * 8, window = 0x40000;

	start();
	arm.tcr = 35 | TCR_TG0(1) | TCR_IPS(5) | TCR_EPD1; /* 29 bits: one table */
	arm.ttbr0 = table;
	guest_w64(&g, table + (window >> 16) * 8, table | PAGE);
	guest_w64(&g, entry, 0x2000000 | PAGE);
	guest_w64(&g, 0x2003000, 3);
	guest_w64(&g, 0x2013000, 4);
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, 8191ull << 16 | 0x3000), 3);
	cpu_store(g.cpu, window + 8191 * 8, 0x2010000 | PAGE); /* synced: no flush is needed to see it */
	ck_assert_uint_eq(cpu_load(g.cpu, 8191ull << 16 | 0x3000), 4);
	guest_audit(&g);
	cpu_store(g.cpu, window + 8191 * 8, 0);
	aborts(8191ull << 16 | 0x3000, KIND_LOAD, TRANSLATION(3), 0);
	stop();
}
END_TEST

/* A flush is for all vCPUs, whichever makes it: here one whose translation is off. */
START_TEST(test_broadcast)
{
	struct kage_stats st = {.size = sizeof(st)};
	uint64_t window = GVA + 0x1000;
	struct kage_vcpu *other;

	start();
	other = cpu_with(0xfff, 52);
	leaf(0x2000000 | PAGE);
	guest_w64(&g, last + 8, last | PAGE);
	guest_w64(&g, 0x2009000, 9);
	for (unsigned i = 0; i < 8; i++)
		cpu_store(g.cpu, window, (0x2000000 + i * 0x1000) | PAGE);
	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &st), KAGE_OK);
	ck_assert_uint_gt(st.shadow_unsync, 0);
	cpu_load(g.cpu, GVA);
	cpu_store(g.cpu, window, 0x2009000 | PAGE);
	ck_assert_int_eq(kage_vcpu_flush(other, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_PAGE_ASID, .gva = GVA, .asid = 3)),
			 KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 9);
	kage_vcpu_destroy(other);
	stop();
}
END_TEST

/* -- tables out of sync ----------------------------------------------------- */

#define WINDOW HIGH /* page 0: `last`; page 1: at2. By tables of its own */
#define PAGE_A (0x2001000 | PAGE)
#define PAGE_B (0x2002000 | PAGE)

static void flush(uint32_t kind, uint64_t gva)
{
	ck_assert_int_eq(kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = kind, .gva = gva)), KAGE_OK);
}

/* `last` maps page A at GVA, is in use, and out of sync. */
static void start_unsync(void)
{
	struct kage_stats st = {.size = sizeof(st)};
	uint64_t table[4];

	start();
	for (unsigned i = 0; i < 4; i++) {
		table[i] = guest_table(&g);
		if (i)
			guest_w64(&g, table[i - 1], table[i] | NEXT);
	}
	guest_w64(&g, table[3], last | PAGE);
	guest_w64(&g, table[3] + 8, at2 | PAGE);
	guest_w64(&g, 0x2001000, 0xaa);
	guest_w64(&g, 0x2002000, 0xbb);
	arm.ttbr0 = root | 5ull << 48;
	arm.ttbr1 = table[0];
	regs();
	leaf(PAGE_A | NG);
	cpu_load(g.cpu, GVA);
	for (unsigned i = 0; i < 8; i++)
		cpu_store(g.cpu, WINDOW + 16 * 8, (0x2010000 + i * 0x1000) | PAGE);
	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &st), KAGE_OK);
	ck_assert_uint_gt(st.shadow_unsync, 0);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 0xaa);
}

/* It leaves the tree, changes, and comes back, with every flush that is owed. */
START_TEST(test_relinked)
{
	start_unsync();
	guest_w64(&g, at2 + 16, 0);
	flush(KAGE_FLUSH_PAGE, GVA);
	cpu_store(g.cpu, WINDOW, PAGE_B);
	flush(KAGE_FLUSH_PAGE, GVA);
	guest_w64(&g, at2 + 16, last | NEXT);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 0xbb);
	stop();
}
END_TEST

/* Entries go, then their table, as when an address space is unmapped; then the table serves elsewhere. */
START_TEST(test_table_reused)
{
	start_unsync();
	cpu_store(g.cpu, WINDOW, 0);
	cpu_store(g.cpu, WINDOW + 16 * 8, 0);
	cpu_store(g.cpu, WINDOW + 0x1000 + 2 * 8, 0);
	flush(KAGE_FLUSH_PAGE, GVA);
	flush(KAGE_FLUSH_PAGE, GVA + 16 * 0x1000);
	cpu_store(g.cpu, WINDOW + 8, PAGE_B);
	cpu_store(g.cpu, WINDOW + 0x1000 + 7 * 8, last | NEXT);
	aborts(7ull << 21, KIND_LOAD, TRANSLATION(3), 0);
	aborts(7ull << 21 | 0x10000, KIND_STORE, TRANSLATION(3), 0);
	ck_assert_uint_eq(cpu_load(g.cpu, 7ull << 21 | 0x1000), 0xbb);
	stop();
}
END_TEST

/* Addresses that had no translation get one: no flush is owed. The table, then the ones above it, then as a root. */
START_TEST(test_new_ways)
{
	for (unsigned way = 0; way < 3; way++) {
		static const uint64_t gva[] = {5ull << 21, GIB + GVA, 3ull << 39 | GVA};

		start_unsync();
		cpu_store(g.cpu, WINDOW, PAGE_B | NG);
		guest_w64(&g, way == 0 ? at2 + 5 * 8 : way == 1 ? at1 + 8 : root + 3 * 8,
			  (way == 0 ? last : way == 1 ? at2 : at1) | NEXT);
		ck_assert_uint_eq(cpu_load(g.cpu, gva[way]), 0xbb);
		stop();
	}
	start_unsync();
	cpu_store(g.cpu, WINDOW, PAGE_B | NG);
	arm.tcr = (arm.tcr & ~63ull) | 25; /* 39 bits */
	arm.ttbr0 = at1 | 6ull << 48;
	regs();
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 0xbb);
	stop();
}
END_TEST

/* A PTE changes; an ASID that nobody has used since cannot have the old one, whichever register names it. */
START_TEST(test_new_asid)
{
	for (unsigned way = 0; way < 3; way++) {
		start_unsync();
		cpu_store(g.cpu, WINDOW, PAGE_B | NG);
		if (way == 0)
			arm.ttbr0 = root | 6ull << 48;
		else if (way == 1)
			arm.ttbr1 |= 6ull << 48;
		else
			arm.tcr |= 1 << 22; /* A1: TTBR1's */
		regs();
		ck_assert_uint_eq(cpu_load(g.cpu, GVA), 0xbb);
		stop();
	}
}
END_TEST

/* -- a flush is for all ---------------------------------------------------- */

static struct kage_vcpu *peer;
static atomic_bool holding, flushed; /* the peer has a pointer; the flush has returned */
static bool asked;

/* Keeps a pointer until somebody waits for the window, or the flush has come back without. */
static void *keep_pointer(void *arg)
{
	uint64_t *to = arg;
	void *p;

	kage_vcpu_enter(peer);
	ck_assert_int_eq(kage_vcpu_ptr(peer, GVA, 8, KAGE_WRITE, &p, NULL), KAGE_OK);
	atomic_store(&holding, true);
	while (!(asked = kage_vcpu_wanted(peer)) && !atomic_load(&flushed))
		sched_yield();
	__atomic_store_n((uint64_t *)p, *to, __ATOMIC_RELAXED);
	kage_vcpu_leave(peer);
	return NULL;
}

static int flush_result(struct kage_vcpu *cpu, uint32_t kind)
{
	return kage_vcpu_flush(cpu, KAGE_CFG(kage_flush, .kind = kind, .gva = GVA, .asid = 5));
}

/* Who has flushed may give the page away: nobody stores by the old translation after it. */
START_TEST(test_flush_waits_for_all)
{
	static const uint32_t kinds[] = {KAGE_FLUSH_ALL, KAGE_FLUSH_PAGE, KAGE_FLUSH_ASID, KAGE_FLUSH_PAGE_ASID};

	for (unsigned i = 0; i < 4; i++) {
		uint64_t value = 0xdead;
		pthread_t thread;
		int r;

		start_unsync();
		peer = cpu_with(0xfff, 52);
		ck_assert_int_eq(kage_vcpu_set_regs(peer, &arm, sizeof(arm)), KAGE_OK);
		atomic_store(&holding, false);
		atomic_store(&flushed, false);
		ck_assert_int_eq(pthread_create(&thread, NULL, keep_pointer, &value), 0);
		while (!atomic_load(&holding))
			sched_yield();
		cpu_store(g.cpu, WINDOW, 0);
		do
			r = flush_result(g.cpu, kinds[i]);
		while (r == -ETIMEDOUT);
		ck_assert_int_eq(r, KAGE_OK);
		guest_w64(&g, 0x2001000, 0x1111);
		atomic_store(&flushed, true);
		ck_assert_int_eq(pthread_join(thread, NULL), 0);
		ck_assert(asked);
		ck_assert_uint_eq(guest_r64(&g, 0x2001000), 0x1111);
		kage_vcpu_destroy(peer);
		stop();
	}
}
END_TEST

/* Another vCPU remaps a page and flushes, once, in the middle of a store by the old translation. */
struct remapper {
	struct kage_notifier n;
	uint64_t pte, to, gva;
	unsigned times;
};

static void *remap(void *arg)
{
	struct remapper *m = arg;

	guest_w64(&g, m->pte, m->to);
	ck_assert_int_eq(kage_vcpu_flush(peer, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_PAGE, .gva = m->gva)), KAGE_OK);
	return NULL;
}

static int remap_start(struct kage_notifier *n, const struct kage_range *range)
{
	struct remapper *m = (struct remapper *)n;
	pthread_t thread;

	if (range->start > at2 || range->end <= at2 || m->times++)
		return 0;
	ck_assert_int_eq(pthread_create(&thread, NULL, remap, m), 0);
	return pthread_join(thread, NULL);
}

/*
 * Stores to watched tables are done outside of windows. This one breaks COW on its way, after the address has been
 * looked up: there the flush comes, and the store has to go where the page is now.
 */
START_TEST(test_flush_ends_watched_stores)
{
	static const struct kage_notifier_ops ops = {.invalidate_range_start = remap_start};
	struct remapper m = {.to = PAGE_B, .gva = WINDOW + 0x1000};
	struct kage_vm *clone;

	start_unsync();
	peer = cpu_with(0xfff, 52);
	ck_assert_int_eq(kage_vcpu_set_regs(peer, &arm, sizeof(arm)), KAGE_OK);
	m.pte = guest_r64(&g, arm.ttbr1) & PTE_ADDR; /* down to the last table */
	m.pte = guest_r64(&g, m.pte) & PTE_ADDR;
	m.pte = (guest_r64(&g, m.pte) & PTE_ADDR) + 8;
	ck_assert_uint_eq(cpu_load(g.cpu, m.gva + 0x800), 0);
	ck_assert_int_eq(kage_vm_clone(g.vm, NULL, &clone), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, m.gva + 0x800), 0); /* read-only, and known */
	ck_assert_int_eq(kage_notifier_register(g.vm, &m.n, &ops), KAGE_OK);
	cpu_store(g.cpu, m.gva + 0x800, 0x1234);
	ck_assert_uint_eq(m.times, 1);
	ck_assert_uint_eq(guest_r64(&g, at2 + 0x800), 0);
	ck_assert_uint_eq(guest_r64(&g, 0x2002800), 0x1234);
	ck_assert_int_eq(kage_notifier_unregister(&m.n), KAGE_OK);
	kage_vcpu_destroy(peer);
	ck_assert_int_eq(kage_vm_destroy(clone), KAGE_OK);
	stop();
}
END_TEST

/* Waiting for a window of the thread's own would be for ever. */
START_TEST(test_flush_within_a_window)
{
	void *p;

	start_unsync();
	peer = cpu_with(0xfff, 52);
	ck_assert_int_eq(kage_vcpu_set_regs(peer, &arm, sizeof(arm)), KAGE_OK);
	kage_vcpu_enter(peer);
	ck_assert_int_eq(kage_vcpu_ptr(peer, GVA, 8, KAGE_READ, &p, NULL), KAGE_OK);
	cpu_store(g.cpu, WINDOW, 0);
	ck_assert_int_eq(flush_result(g.cpu, KAGE_FLUSH_PAGE), -EDEADLK);
	kage_vcpu_leave(peer);
	ck_assert_int_eq(flush_result(g.cpu, KAGE_FLUSH_PAGE), KAGE_OK);
	aborts(GVA, KIND_LOAD, TRANSLATION(3), 0);
	kage_vcpu_destroy(peer);
	stop();
}
END_TEST

int main(void)
{
	Suite *s = suite_create("arm64");
	TCase *all = tcase_create("all");
	SRunner *r;
	int failed;

	tcase_set_timeout(all, 60);
	tcase_add_test(all, test_rights);
	tcase_add_test(all, test_pan);
	tcase_add_test(all, test_table_attributes);
	tcase_add_test(all, test_syndromes);
	tcase_add_test(all, test_access_and_dirty);
	tcase_add_test(all, test_roots);
	tcase_add_test(all, test_tags);
	tcase_add_test(all, test_off);
	tcase_add_test(all, test_large_addresses);
	tcase_add_test(all, test_lpa_needs_52_bits);
	tcase_add_test(all, test_config);
	tcase_add_test(all, test_table_of_frames);
	tcase_add_test(all, test_broadcast);
	tcase_add_test(all, test_relinked);
	tcase_add_test(all, test_table_reused);
	tcase_add_test(all, test_new_ways);
	tcase_add_test(all, test_new_asid);
	tcase_add_test(all, test_flush_waits_for_all);
	tcase_add_test(all, test_flush_ends_watched_stores);
	tcase_add_test(all, test_flush_within_a_window);
	suite_add_tcase(s, all);
	r = srunner_create(s);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed != 0;
}
