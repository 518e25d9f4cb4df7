/* SPDX-License-Identifier: MIT */
/*
 * A guest with no system: tries each case of cases.h on the CPU it runs on and
 * writes what happened to port 0xe9, a line a case:
 *
 *     number vector error cr2 flags good
 *
 * in hexadecimal. `vector` is 80 for an access that went through, e for a page
 * fault; `flags` has two bits a level, level 0 lowest: accessed, dirty; `good`
 * says that the bytes moved or executed were the right ones. The first line
 * names the CPU's physical address bits and features, the last is "end".
 */
#include "cases.h"
#include "say.h"

#define CR0_WP (1u << 16)
#define CR4_SMEP (1u << 20)
#define CR4_SMAP (1u << 21)
#define CR4_PKE (1u << 22)
#define EFER 0xc0000080u
#define EFER_NXE (1u << 11)
#define USER_ALIAS (UINT64_C(2) << 39)

struct case_frame {
	uint64_t rip, cs, rflags, rsp, ss;
};

struct gate {
	uint16_t offset_low, selector;
	uint8_t ist, type;
	uint16_t offset_middle;
	uint32_t offset_high, reserved;
};

extern uint64_t pml4[512], gdt[];
extern volatile uint64_t trap_vector, trap_error, trap_cr2, trap_rax, trap_rip;
extern char stub_read[], stub_write[], stub_fetch[];
extern char trap_page_fault[], trap_done[], trap_other[];
void case_enter(const struct case_frame *frame, uint64_t rdi, uint64_t rsi);
void guest_main(void);

/* tables[n] is the table of level n; level 3 is the PML4 itself */
static uint64_t tables[3][512] __attribute__((aligned(4096)));
static struct gate idt[256] __attribute__((aligned(16)));
static uint32_t tss[26] __attribute__((aligned(16)));
static uint8_t trap_stack[4096] __attribute__((aligned(16)));

static uint64_t read_cr4(void)
{
	uint64_t v;

	__asm__ volatile("mov %%cr4, %0" : "=r"(v));
	return v;
}

static void set_mode(const struct pf_case *c)
{
	uint64_t cr0, cr4 = read_cr4();
	uint32_t low, high;

	__asm__ volatile("mov %%cr0, %0" : "=r"(cr0));
	cr0 = c->wp ? cr0 | CR0_WP : cr0 & ~(uint64_t)CR0_WP;
	__asm__ volatile("mov %0, %%cr0" : : "r"(cr0) : "memory");
	cr4 &= ~(uint64_t)(CR4_SMEP | CR4_SMAP | CR4_PKE);
	cr4 |= (c->smep ? CR4_SMEP : 0) | (c->smap ? CR4_SMAP : 0) | (c->pke ? CR4_PKE : 0);
	__asm__ volatile("mov %0, %%cr4" : : "r"(cr4) : "memory");
	if (c->pke)
		__asm__ volatile("wrpkru" : : "a"(c->pkru), "c"(0), "d"(0) : "memory");
	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(EFER));
	low = c->nxe ? low | EFER_NXE : low & ~EFER_NXE;
	__asm__ volatile("wrmsr" : : "a"(low), "d"(high), "c"(EFER) : "memory");
	__asm__ volatile("mov %0, %%cr3" : : "r"(pml4) : "memory");
}

static volatile uint64_t *entry(unsigned level)
{
	uint64_t *t = level == 3 ? pml4 : tables[level];

	return &t[(CASE_ADDR >> (12 + 9 * level)) & 511];
}

static void fill_tables(const struct pf_case *c)
{
	for (unsigned level = 0; level < 4; level++) {
		uint64_t to = level ? (uint64_t)tables[level - 1] : CASE_PAGE;

		if (level == c->leaf)
			to = CASE_PAGE & ~((UINT64_C(1) << (12 + 9 * level)) - 1);
		*entry(level) = level < c->leaf ? 0 : to | c->bits[level];
	}
}

static void run_case(const struct pf_case *c)
{
	static char *const stubs[] = { stub_read, stub_write, stub_fetch };
	struct case_frame f = {
		.rip = (uint64_t)stubs[c->access] + (c->user ? USER_ALIAS : 0),
		.cs = c->user ? 0x23 : 0x08,
		.rflags = 2 | (c->ac ? 1u << 18 : 0),
		.rsp = (uint64_t)(trap_stack + sizeof(trap_stack)),
		.ss = c->user ? 0x1b : 0x10,
	};

	trap_error = trap_cr2 = trap_rax = trap_rip = 0;
	case_enter(&f, CASE_ADDR + (c->access == CASE_FETCH ? 0 : CASE_DATA), c->marker);
}

static bool went_right(const struct pf_case *c, const volatile uint64_t *data)
{
	if (trap_vector != 0x80)
		return c->access != CASE_WRITE || *data != c->marker;
	if (c->access == CASE_READ)
		return trap_rax == c->marker;
	if (c->access == CASE_WRITE)
		return *data == c->marker;
	return trap_rip == CASE_ADDR + 2;
}

static void try_case(unsigned number, const struct pf_case *c)
{
	volatile uint64_t *page = (volatile uint64_t *)(uintptr_t)CASE_PAGE;
	volatile uint64_t *data = page + CASE_DATA / 8;
	uint64_t flags = 0;

	*page = 0x80cd; /* int $0x80 */
	*data = c->access == CASE_WRITE ? ~c->marker : c->marker;
	fill_tables(c);
	set_mode(c);
	run_case(c);
	for (unsigned level = 0; level < 4; level++)
		flags |= (*entry(level) >> 5 & 3) << (2 * level);
	put_hex(number, ' ');
	put_hex(trap_vector, ' ');
	put_hex(trap_error, ' ');
	put_hex(trap_cr2, ' ');
	put_hex(flags, ' ');
	put_hex(went_right(c, data), '\n');
}

static void set_gate(unsigned vector, const char *entry_point, uint8_t type)
{
	uint64_t a = (uint64_t)entry_point;

	idt[vector] = (struct gate){
		.offset_low = (uint16_t)a,
		.selector = 0x08,
		.type = type,
		.offset_middle = (uint16_t)(a >> 16),
		.offset_high = (uint32_t)(a >> 32),
	};
}

static void set_up_traps(void)
{
	uint64_t base = (uint64_t)tss, stack = (uint64_t)(trap_stack + sizeof(trap_stack));
	struct __attribute__((packed)) {
		uint16_t limit;
		uint64_t base;
	} pointer = { sizeof(idt) - 1, (uint64_t)idt };

	for (unsigned i = 0; i < 256; i++)
		set_gate(i, trap_other, 0x8e);
	set_gate(14, trap_page_fault, 0x8e);
	set_gate(0x80, trap_done, 0xee);
	tss[1] = (uint32_t)stack; /* RSP0 */
	tss[2] = (uint32_t)(stack >> 32);
	tss[25] = sizeof(tss) << 16; /* no I/O bitmap */
	gdt[5] = (sizeof(tss) - 1) | (base & 0xffffff) << 16 | UINT64_C(0x89) << 40 |
		 (base >> 24 & 0xff) << 56;
	gdt[6] = base >> 32;
	__asm__ volatile("lidt %0" : : "m"(pointer));
	__asm__ volatile("ltr %w0" : : "r"(0x28));
}

void guest_main(void)
{
	uint32_t r[4];
	unsigned phys_bits, cpu = 0;

	set_up_traps();
	cpuid(7, r);
	if (!(r[1] & 1u << 7) || !(r[1] & 1u << 20)) {
		put("no smep or smap\n");
		leave(1);
	}
	cpu |= r[2] & 1u << 3 ? CPU_PKU : 0;
	cpuid(0x80000001, r);
	cpu |= r[3] & 1u << 26 ? CPU_PAGE1GB : 0;
	cpuid(0x80000008, r);
	phys_bits = r[0] & 0xff;
	put("cpu ");
	put_hex(phys_bits, ' ');
	put_hex(cpu, '\n');
	for (unsigned i = 0; i < CASES; i++) {
		struct pf_case c = case_make(i, phys_bits, cpu);

		try_case(i, &c);
	}
	put("end\n");
	leave(0);
}
