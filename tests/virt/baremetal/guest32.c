/* SPDX-License-Identifier: MIT */
/*
 * As guest.c, for the cases of cases32.h: a CPU outside of long mode, with
 * 32-bit and PAE paging. A line a case to port 0xe9, in hexadecimal:
 *
 *     number vector error cr2 flags good
 */
#include "cases32.h"
#include "say.h"

#define EFER_NXE (1u << 11)
#define USER_ALIAS 0x40000000u

struct case_frame { /* boot32.S has the offsets */
	uint32_t cr0, cr3, cr4, efer, user, eip, eflags, address, value;
};

struct gate {
	uint16_t offset_low, selector;
	uint8_t zero, type;
	uint16_t offset_high;
};

extern uint64_t gdt[];
extern volatile uint32_t trap_vector, trap_error, trap_cr2, trap_eax, trap_eip;
extern char stub_read[], stub_write[], stub_fetch[], trap_stack_end[];
extern char trap_page_fault[], trap_done[], trap_other[];
void case_enter(const struct case_frame *frame);
void guest_main(void);

/* What both formats have of their own: the first 4 MiB, for the supervisor and for user mode; the case's tables. */
static uint32_t pd32[1024] __attribute__((aligned(4096))), pt32[3][1024] __attribute__((aligned(4096)));
static uint64_t pdpt[4] __attribute__((aligned(4096)));
static uint64_t pd64[3][512] __attribute__((aligned(4096))), pt64[5][512] __attribute__((aligned(4096)));
static struct gate idt[256] __attribute__((aligned(16)));
static uint32_t tss[26] __attribute__((aligned(16)));

static void build_tables(void)
{
	for (unsigned i = 0; i < 1024; i++) {
		pt32[0][i] = i << 12 | 3;
		pt32[1][i] = i << 12 | 7;
		pt64[i >> 9][i & 511] = i << 12 | 3;
		pt64[2 + (i >> 9)][i & 511] = i << 12 | 7;
	}
	pd32[0] = (uint32_t)pt32[0] | 3;
	pd32[USER_ALIAS >> 22] = (uint32_t)pt32[1] | 7;
	for (unsigned i = 0; i < 2; i++) {
		pd64[0][i] = (uint32_t)pt64[i] | 3;
		pd64[1][i] = (uint32_t)pt64[2 + i] | 7;
	}
	for (unsigned i = 0; i < 3; i++)
		pdpt[i] = (uint32_t)pd64[i] | 1;
}

static uint64_t get_entry(const struct pf_case32 *c, unsigned level)
{
	unsigned i = CASE32_ADDR >> case32_shift(c, level);

	if (c->pae)
		return level ? pd64[2][i & 511] : pt64[4][i & 511];
	return level ? pd32[i & 1023] : pt32[2][i & 1023];
}

static void set_entry(const struct pf_case32 *c, unsigned level, uint64_t e)
{
	unsigned i = CASE32_ADDR >> case32_shift(c, level);

	if (c->pae)
		*(level ? &pd64[2][i & 511] : &pt64[4][i & 511]) = e;
	else
		*(level ? &pd32[i & 1023] : &pt32[2][i & 1023]) = (uint32_t)e;
}

static void fill_tables(const struct pf_case32 *c)
{
	for (unsigned level = 0; level < 2; level++) {
		uint64_t to = level == c->leaf ? CASE_PAGE : c->pae ? (uint32_t)pt64[4] : (uint32_t)pt32[2];

		set_entry(c, level, level < c->leaf ? 0 : to | c->bits[level]);
	}
	pdpt[2] = (uint32_t)pd64[2] | !c->no_pdpte;
	__asm__ volatile("" : : : "memory");
}

static void run_case(const struct pf_case32 *c)
{
	char *stub = c->access == CASE_READ ? stub_read : c->access == CASE_WRITE ? stub_write : stub_fetch;
	struct case_frame f = {
		.cr0 = 0x80000011 | (c->wp ? 1u << 16 : 0),
		.cr3 = c->pae ? (uint32_t)pdpt : (uint32_t)pd32,
		.cr4 = (c->pse ? 1u << 4 : 0) | (c->pae ? 1u << 5 : 0) | (c->smep ? 1u << 20 : 0) |
		       (c->smap ? 1u << 21 : 0),
		.efer = c->nxe ? EFER_NXE : 0,
		.user = c->user,
		.eip = (uint32_t)stub + (c->user ? USER_ALIAS : 0),
		.eflags = 2 | (c->ac ? 1u << 18 : 0),
		.address = CASE32_ADDR + (c->access == CASE_FETCH ? 0 : CASE_DATA),
		.value = c->marker,
	};

	trap_error = trap_cr2 = trap_eax = trap_eip = 0;
	case_enter(&f);
}

static bool went_right(const struct pf_case32 *c, const volatile uint32_t *data)
{
	if (trap_vector != 0x80)
		return c->access != CASE_WRITE || *data != c->marker;
	if (c->access == CASE_READ)
		return trap_eax == c->marker;
	if (c->access == CASE_WRITE)
		return *data == c->marker;
	return trap_eip == CASE32_ADDR + 2;
}

static void try_case(unsigned number, const struct pf_case32 *c)
{
	volatile uint32_t *page = (volatile uint32_t *)CASE_PAGE, *data = page + CASE_DATA / 4;
	uint32_t flags = 0;

	*page = 0x80cd; /* int $0x80 */
	*data = c->access == CASE_WRITE ? ~c->marker : c->marker;
	fill_tables(c);
	run_case(c);
	for (unsigned level = 0; level < 2; level++)
		flags |= (uint32_t)(get_entry(c, level) >> 5 & 3) << (2 * level);
	put_hex(number, ' ');
	put_hex(trap_vector, ' ');
	put_hex(trap_error, ' ');
	put_hex(trap_cr2, ' ');
	put_hex(flags, ' ');
	put_hex(went_right(c, data), '\n');
}

static void set_gate(unsigned vector, const char *entry_point, uint8_t type)
{
	uint32_t a = (uint32_t)entry_point;

	idt[vector] = (struct gate){ .offset_low = (uint16_t)a, .selector = 0x08, .type = type,
				     .offset_high = (uint16_t)(a >> 16) };
}

static void set_up_traps(void)
{
	uint32_t base = (uint32_t)tss;
	struct __attribute__((packed)) {
		uint16_t limit;
		uint32_t base;
	} pointer = { sizeof(idt) - 1, (uint32_t)idt };

	for (unsigned i = 0; i < 256; i++)
		set_gate(i, trap_other, 0x8e);
	set_gate(14, trap_page_fault, 0x8e);
	set_gate(0x80, trap_done, 0xee);
	tss[1] = (uint32_t)trap_stack_end; /* ESP0 */
	tss[2] = 0x10;                     /* SS0 */
	tss[25] = sizeof(tss) << 16;       /* no I/O bitmap */
	gdt[5] = (sizeof(tss) - 1) | (uint64_t)(base & 0xffffff) << 16 | UINT64_C(0x89) << 40 |
		 (uint64_t)(base >> 24) << 56;
	__asm__ volatile("lidt %0" : : "m"(pointer));
	__asm__ volatile("ltr %w0" : : "r"(0x28));
}

void guest_main(void)
{
	uint32_t r[4];
	unsigned phys_bits;

	set_up_traps();
	build_tables();
	cpuid(7, r);
	if (!(r[1] & 1u << 7) || !(r[1] & 1u << 20)) {
		put("no smep or smap\n");
		leave(1);
	}
	cpuid(0x80000008, r);
	phys_bits = r[0] & 0xff;
	put("cpu ");
	put_hex(phys_bits, ' ');
	put_hex(0, '\n');
	for (unsigned i = 0; i < CASES; i++) {
		struct pf_case32 c = case32_make(i, phys_bits);

		try_case(i, &c);
	}
	put("end\n");
	leave(0);
}
