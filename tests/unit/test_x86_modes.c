/* SPDX-License-Identifier: MIT */
/*
 * x86 guests with 32-bit and PAE paging through the public API, rule by rule:
 * which registers make them, when PDPTEs are read, rights and error codes, 4 MiB
 * pages, accessed and dirty bits. Expected values are the Intel SDM's (vol. 3A,
 * 4.3, 4.4, 4.6, 4.7).
 */
#include <errno.h>
#include "guest_tables.h"

#define CR0_PG_WP 0x80010001ull
#define CR4_PSE	  0x10ull
#define CR4_PAE	  0x20ull
#define CR4_PGE	  0x80ull
#define CR4_SMEP  (1ull << 20)
#define EFER_NXE  (1ull << 11)
#define RAM	  (64 * MIB)
#define GVA	  0x80403000u /* PDPTE 2 of PAE */

#define PF_P 1u
#define PF_W 2u
#define PF_U 4u
#define PF_R 8u
#define PF_I 16u

static struct guest g;
static uint64_t pdpt, dir, table;

static void w32(uint64_t gpa, uint32_t v)
{
	ck_assert_int_eq(kage_vm_write(g.vm, gpa, &v, 4), KAGE_OK);
}

static uint32_t r32(uint64_t gpa)
{
	uint32_t v;

	ck_assert_int_eq(kage_vm_read(g.vm, gpa, &v, 4), KAGE_OK);
	return v;
}

static int regs(void)
{
	return guest_set_regs(&g);
}

static void user(bool on)
{
	g.regs.cpl = on ? 3 : 0;
	ck_assert_int_eq(regs(), KAGE_OK);
}

static int flush(uint32_t kind, uint64_t value)
{
	return kage_vcpu_flush(g.cpu, KAGE_CFG(kage_flush, .kind = kind, .value = value, .gva = GVA));
}

static uint32_t load32(uint64_t gva)
{
	uint32_t v = 0;

	ck_assert_int_eq(kage_vcpu_load(g.cpu, gva, &v, 4, NULL), KAGE_OK);
	return v;
}

static void store32(uint64_t gva, uint32_t v)
{
	ck_assert_int_eq(kage_vcpu_store(g.cpu, gva, &v, 4, NULL), KAGE_OK);
}

/* 32-bit: dir has the PDE of GVA at 0x201, table the PTE at 3. */
static void start_32(void)
{
	guest_start(&g, RAM);
	dir = guest_table(&g);
	table = guest_table(&g);
	w32(dir + 0x201 * 4, (uint32_t)table | 7);
	g.regs = (struct kage_x86_regs){.cr0 = CR0_PG_WP, .cr3 = dir, .cr4 = CR4_PSE};
	ck_assert_int_eq(regs(), KAGE_OK);
}

/* PAE: PDPTE 2, then dir at 2, table at 3. */
static void start_pae(void)
{
	guest_start(&g, RAM);
	pdpt = guest_table(&g) + 0x20; /* aligned to 32 bytes */
	dir = guest_table(&g);
	table = guest_table(&g);
	guest_w64(&g, pdpt + 16, dir | 1);
	guest_w64(&g, dir + 2 * 8, table | 7);
	g.regs = (struct kage_x86_regs){.cr0 = CR0_PG_WP, .cr3 = pdpt, .cr4 = CR4_PAE, .efer = EFER_NXE};
	ck_assert_int_eq(regs(), KAGE_OK);
}

static void stop(void)
{
	guest_stop(&g);
}

START_TEST(test_32_rights)
{
	start_32();
	w32(table + 12, 0x2000000 | 1);
	cpu_faults(g.cpu, GVA, KIND_STORE, PF_P | PF_W);
	cpu_load(g.cpu, GVA);
	ck_assert_uint_eq(r32(table + 12), 0x2000000 | 1 | PTE_A);
	ck_assert_uint_eq(r32(dir + 0x201 * 4), table | 7 | PTE_A);
	ck_assert_uint_eq(r32(dir + 0x202 * 4), 0); /* its neighbour in the same 8 bytes */
	w32(table + 12, 0x2000000 | 3);
	cpu_store(g.cpu, GVA, 9);
	ck_assert_uint_eq(r32(table + 12), 0x2000000 | 3 | PTE_A | PTE_D);
	user(true);
	cpu_faults(g.cpu, GVA, KIND_LOAD, PF_P | PF_U);
	cpu_faults(g.cpu, GVA, KIND_FETCH, PF_P | PF_U); /* no I without SMEP and PAE's NXE */
	cpu_faults(g.cpu, GVA + 4096, KIND_STORE, PF_U | PF_W);
	user(false);
	g.regs.efer = EFER_NXE;
	g.regs.cr4 |= CR4_SMEP;
	w32(table + 12, 0x2000000 | 7);
	ck_assert_int_eq(regs(), KAGE_OK);
	cpu_faults(g.cpu, GVA, KIND_FETCH, PF_P | PF_I);
	g.regs.cr4 &= ~CR4_SMEP;
	ck_assert_int_eq(regs(), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_fetch(g.cpu, GVA, &(uint64_t){0}, 8, NULL), KAGE_OK);
	stop();
}
END_TEST

START_TEST(test_32_large)
{
	uint64_t far = 5ull << 32 | 0xc00000;
	struct kage_fault f;

	start_32();
	ck_assert_int_eq(kage_vm_map(g.vm, KAGE_CFG(kage_region, .gpa = far, .len = 4 * MIB)), KAGE_OK);
	w32(dir + 8, 0x1000000 | PTE_PS | 3);
	for (uint64_t at = 0; at < 4 * MIB; at += MIB / 2) {
		store32(8 * MIB + at, (uint32_t)at + 1);
		ck_assert_uint_eq(r32(0x1000000 + at), at + 1);
	}
	ck_assert_uint_eq(r32(dir + 8), 0x1000000 | PTE_PS | 3 | PTE_A | PTE_D);
	w32(dir + 8, 0xc00000 | 5 << 13 | PTE_PS | 3); /* bits 39:32 in 20:13 */
	store32(8 * MIB + 0x345678, 7);
	ck_assert_uint_eq(r32(far + 0x345678), 7);
	w32(dir + 8, 0xc00000 | 1 << 21 | PTE_PS | 3);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 8 * MIB, &(uint32_t){0}, 4, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.error, PF_P | PF_R);
	ck_assert_uint_eq(f.level, 1);
	guest_audit(&g);
	w32(dir + 8, (uint32_t)table | PTE_PS | 3);
	w32(table + 12, 0x2000000 | 3);
	g.regs.cr4 &= ~CR4_PSE; /* the bit means nothing now: a table */
	ck_assert_int_eq(regs(), KAGE_OK);
	store32(8 * MIB + 0x3004, 8);
	ck_assert_uint_eq(r32(0x2000004), 8);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 1ull << 32, &(uint32_t){0}, 4, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.vector, 13);
	stop();
}
END_TEST

/* A table of 1,024 entries is two shadow pages, a directory four: each is followed. */
START_TEST(test_32_quadrants)
{
	uint64_t window = 0x00100000;

	start_32();
	w32(dir, (uint32_t)table | 7);
	w32(table + (window >> 12) * 4, (uint32_t)table | 3); /* the table maps itself and its directory */
	w32(table + ((window >> 12) + 1) * 4, (uint32_t)dir | 3);
	for (unsigned i = 512; i < 1024; i += 37) {
		store32(window + i * 4, (0x2000000 + i * 4096) | 3);
		w32(0x2000000 + i * 4096, i);
		ck_assert_uint_eq(load32(i * 4096), i);
		store32(window + i * 4, (0x2000000 + (i - 1) * 4096) | 3);
		flush(KAGE_FLUSH_ALL, 0);
		ck_assert_uint_eq(load32(i * 4096), r32(0x2000000 + (i - 1) * 4096));
	}
	for (unsigned i = 1; i < 1024; i += 93) {
		store32(window + 4096 + i * 4, 0x2000000 | PTE_PS | 3);
		w32(0x2200000, i);
		ck_assert_uint_eq(load32(i * 4 * MIB + 0x200000), i);
		guest_audit(&g);
	}
	stop();
}
END_TEST

START_TEST(test_pae_pdptes)
{
	start_pae();
	guest_w64(&g, table + 24, 0x2000000 | 3);
	guest_w64(&g, 0x2000000, 5);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 5);
	guest_w64(&g, pdpt + 16, 0); /* a register: memory does not matter */
	flush(KAGE_FLUSH_ALL, 0);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 5);
	ck_assert_int_eq(regs(), KAGE_OK); /* the same CR3: no MOV */
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 5);
	ck_assert_int_eq(flush(KAGE_FLUSH_CR3, pdpt), KAGE_OK);
	cpu_faults(g.cpu, GVA, KIND_LOAD, 0);
	guest_w64(&g, pdpt + 16, dir | 3); /* bit 1 is reserved */
	ck_assert_int_eq(flush(KAGE_FLUSH_CR3, pdpt), -EINVAL);
	guest_w64(&g, pdpt + 16, dir | 1ull << 63 | 1);
	g.regs.cr4 |= CR4_PGE;
	ck_assert_int_eq(regs(), -EINVAL);
	guest_w64(&g, pdpt + 16, dir | 1ull << 46 | 1); /* above phys_bits */
	ck_assert_int_eq(regs(), -EINVAL);
	cpu_faults(g.cpu, GVA, KIND_LOAD, 0); /* nothing was loaded */
	guest_w64(&g, pdpt + 16, dir | 1ull << 63 | 2); /* not present: the rest does not count */
	ck_assert_int_eq(regs(), KAGE_OK);
	cpu_faults(g.cpu, GVA, KIND_LOAD, 0);
	guest_w64(&g, pdpt + 16, dir | 0xe19); /* ignored bits, PWT, PCD */
	g.regs.cr4 &= ~CR4_PGE;
	ck_assert_int_eq(regs(), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 5);
	g.regs.cr3 = RAM + 0x1000; /* no memory reads as ones */
	ck_assert_int_eq(regs(), -EINVAL);
	g.regs.cr3 = pdpt | 0x1f;
	ck_assert_int_eq(regs(), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 5);
	stop();
}
END_TEST

/* A saved vCPU goes on with what it had loaded (4.4.1), whatever has become of the memory it came from. */
START_TEST(test_pae_restored)
{
	struct kage_x86_regs saved;
	struct kage_vcpu *other;
	uint64_t other_dir;

	start_pae();
	other = guest_cpu(&g);
	other_dir = guest_table(&g);
	guest_w64(&g, table + 24, 0x2000000 | 3);
	guest_w64(&g, 0x2000000, 5);
	guest_w64(&g, pdpt + 16, other_dir | 1);
	ck_assert_int_eq(kage_vcpu_get_regs(g.cpu, &saved, sizeof(saved)), KAGE_OK);
	ck_assert_uint_eq(saved.flags, KAGE_X86_PDPTES);
	ck_assert_uint_eq(saved.pdpte[0] | saved.pdpte[1] | saved.pdpte[3], 0);
	ck_assert_uint_eq(saved.pdpte[2], dir | 1);
	ck_assert_int_eq(kage_vcpu_set_regs(other, &saved, sizeof(saved)), KAGE_OK);
	ck_assert_uint_eq(cpu_load(other, GVA), 5);
	ck_assert_int_eq(kage_vcpu_set_regs(other, &g.regs, sizeof(g.regs)), KAGE_OK); /* no change: no load */
	ck_assert_uint_eq(cpu_load(other, GVA), 5);
	ck_assert_int_eq(kage_vcpu_set_regs(other, &saved, 48), KAGE_OK);
	ck_assert_uint_eq(cpu_load(other, GVA), 5);
	saved.cr3 = RAM + 0x1000; /* no memory there, which does not matter either */
	ck_assert_int_eq(kage_vcpu_set_regs(other, &saved, sizeof(saved)), KAGE_OK);
	ck_assert_uint_eq(cpu_load(other, GVA), 5);
	saved.cr3 = pdpt;
	ck_assert_int_eq(kage_vcpu_set_regs(other, &saved, 48), KAGE_OK); /* MOV to CR3: as without the flag */
	cpu_faults(other, GVA, KIND_LOAD, 0);
	ck_assert_int_eq(kage_vcpu_set_regs(other, &saved, sizeof(saved)), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_flush(other, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_CR3, .value = pdpt)), KAGE_OK);
	cpu_faults(other, GVA, KIND_LOAD, 0);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 5); /* each vCPU has its own */
	kage_vcpu_destroy(other);
	stop();
}
END_TEST

/* Each reserved bit of each PDPTE is refused as MOV to CR3 refuses it, and leaves all registers as they were. */
START_TEST(test_pae_given_reserved)
{
	struct kage_x86_regs r, got;

	start_pae();
	r = g.regs;
	guest_w64(&g, table + 24, 0x2000000 | 3);
	guest_w64(&g, 0x2000000, 5);
	r.flags = KAGE_X86_PDPTES;
	for (unsigned i = 0; i < 4; i++)
		for (unsigned bit = 1; bit < 64; bit++) {
			bool reserved = bit <= 2 || (bit >= 5 && bit <= 8) || bit >= 46;

			memset(r.pdpte, 0, sizeof(r.pdpte));
			r.pdpte[2] = dir | 1;
			r.pdpte[i] = (i == 2 ? dir : 0) | 1ull << bit;
			ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), KAGE_OK); /* not present */
			r.pdpte[2] = dir | 1;
			ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), KAGE_OK);
			r.pdpte[i] |= 1 | 1ull << bit;
			ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), reserved ? -EINVAL : KAGE_OK);
			if (!reserved)
				continue;
			ck_assert_uint_eq(cpu_load(g.cpu, GVA), 5);
			ck_assert_int_eq(kage_vcpu_get_regs(g.cpu, &got, sizeof(got)), KAGE_OK);
			ck_assert_uint_eq(got.pdpte[2], dir | 1);
		}
	r.cr0 = 1; /* no paging: what is given counts no more than what memory holds */
	ck_assert_int_eq(kage_vcpu_set_regs(g.cpu, &r, sizeof(r)), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_get_regs(g.cpu, &got, sizeof(got)), KAGE_OK);
	ck_assert_uint_eq(got.flags, 0);
	stop();
}
END_TEST

START_TEST(test_pae_rights)
{
	struct kage_fault f;

	start_pae();
	guest_w64(&g, table + 24, 0x2000000 | PTE_NX | 7);
	cpu_store(g.cpu, GVA, 1);
	ck_assert_uint_eq(guest_r64(&g, table + 24), 0x2000000 | PTE_NX | 7 | PTE_A | PTE_D);
	ck_assert_uint_eq(guest_r64(&g, dir + 16), table | 7 | PTE_A);
	ck_assert_uint_eq(guest_r64(&g, pdpt + 16), dir | 1); /* it has no accessed bit */
	cpu_faults(g.cpu, GVA, KIND_FETCH, PF_P | PF_I);
	g.regs.efer = 0;
	ck_assert_int_eq(regs(), KAGE_OK);
	cpu_faults(g.cpu, GVA, KIND_FETCH, PF_P | PF_R); /* bit 63 is reserved then */
	g.regs.efer = EFER_NXE;
	guest_w64(&g, table + 24, 0x2000000 | 1ull << 52 | 7); /* as is bit 52, unlike in long mode */
	ck_assert_int_eq(regs(), KAGE_OK);
	cpu_faults(g.cpu, GVA, KIND_LOAD, PF_P | PF_R);
	guest_w64(&g, dir + 16, 0x1000000 | PTE_PS | 7); /* 2 MiB, whatever CR4.PSE says */
	user(true);
	cpu_store(g.cpu, GVA, 8);
	ck_assert_uint_eq(guest_r64(&g, 0x1003000), 8);
	guest_w64(&g, dir + 16, 0x1002000 | PTE_PS | 7);
	cpu_faults(g.cpu, GVA, KIND_STORE, PF_P | PF_W | PF_U | PF_R);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 0x3000, &(uint32_t){0}, 4, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.level, 2);
	ck_assert_int_eq(kage_vcpu_load(g.cpu, 1ull << 32, &(uint32_t){0}, 4, &f), KAGE_GUEST_FAULT);
	ck_assert_uint_eq(f.vector, 13);
	stop();
}
END_TEST

/* One directory in two PDPTEs, and from PAE to long mode by the same tables and back. */
START_TEST(test_pae_switches)
{
	uint64_t pml4;

	start_pae();
	guest_w64(&g, table + 24, 0x2000000 | 7);
	guest_w64(&g, pdpt, dir | 1);
	ck_assert_int_eq(flush(KAGE_FLUSH_CR3, pdpt), KAGE_OK);
	cpu_store(g.cpu, GVA, 1);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA & 0x3fffffff), 1);
	guest_w64(&g, table + 24, 0x2001000 | 7);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA & 0x3fffffff), 0);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 0);
	guest_audit(&g);
	pml4 = guest_table(&g);
	guest_w64(&g, pml4, (pdpt & ~0xfffull) | 7);
	guest_w64(&g, (pdpt & ~0xfffull), dir | 7);
	g.regs.cr0 &= ~(1ull << 31);
	ck_assert_int_eq(regs(), KAGE_OK);
	cpu_store(g.cpu, 0x2001000, 3); /* paging is off */
	g.regs.efer |= 0x500;
	g.regs.cr0 |= 1ull << 31;
	g.regs.cr3 = pml4;
	ck_assert_int_eq(regs(), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA & 0x3fffffff), 3);
	g.regs.efer = EFER_NXE;
	g.regs.cr3 = pdpt;
	ck_assert_int_eq(regs(), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, GVA), 3);
	stop();
}
END_TEST

int main(void)
{
	Suite *s = suite_create("x86-modes");
	TCase *all = tcase_create("all");
	SRunner *r;
	int failed;

	tcase_set_timeout(all, 60);
	tcase_add_test(all, test_32_rights);
	tcase_add_test(all, test_32_large);
	tcase_add_test(all, test_32_quadrants);
	tcase_add_test(all, test_pae_pdptes);
	tcase_add_test(all, test_pae_restored);
	tcase_add_test(all, test_pae_given_reserved);
	tcase_add_test(all, test_pae_rights);
	tcase_add_test(all, test_pae_switches);
	suite_add_tcase(s, all);
	r = srunner_create(s);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed != 0;
}
