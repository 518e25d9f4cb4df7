/* SPDX-License-Identifier: MIT */
/*
 * A guest with no system: tries each case of arm64_cases.h on the CPU it runs
 * on and writes what happened to standard output, a line a case:
 *
 *     number esr far descriptor good par
 *
 * in hexadecimal. `esr` and `far` are those of the exception that ended it
 * (SVC for an access that went through), `descriptor` is that of the leaf
 * afterwards, `good` says that the bytes moved or executed were the right
 * ones, `par` is PAR_EL1 where the case is an AT instruction. The first line
 * is "cpu" and the ID registers, the last is "end".
 */
#include "arm64_cases.h"

#define UPPER UINT64_C(0xffffff8000000000)
#define SCTLR_M A64(0)
#define SCTLR_WXN A64(19)
#define SCTLR_SPAN A64(23)
#define SCTLR_EPAN A64(57)
#define ESR_SVC 0x15

struct case_frame { /* arm64_boot.S has the offsets */
	uint64_t offset, sctlr, tcr, ttbr0, ttbr1, spsr, elr, x0, x1;
	uint64_t home_sctlr, home_tcr, home_ttbr;
	uint64_t sp, esr, far, elr_after, value;
};

extern char stub_read[], stub_write[], stub_fetch[], stub_at_read[], stub_at_read_el0[];
extern uint64_t l1_table[];
void mmu_on(uint64_t sctlr, uint64_t tcr, uint64_t table);
void case_enter(struct case_frame *frame);
void guest_main(void);
void guest_unexpected(uint64_t esr, uint64_t elr, uint64_t far);

static struct case_frame frame;

/* The compiler calls these two. */
void *memcpy(void *to, const void *from, uint64_t n);
void *memset(void *to, int value, uint64_t n);

void *memcpy(void *to, const void *from, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		((volatile uint8_t *)to)[i] = ((const uint8_t *)from)[i];
	return to;
}

void *memset(void *to, int value, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		((volatile uint8_t *)to)[i] = (uint8_t)value;
	return to;
}

/* -- out of here, by Arm semihosting (version 2.0) ------------------------ */

enum { SYS_OPEN = 1, SYS_WRITE = 5, SYS_EXIT = 0x18 };

static char buffer[65536];
static uint64_t buffered, standard_output;

static uint64_t semihost(uint64_t call, const uint64_t *arguments)
{
	register uint64_t x0 __asm__("x0") = call;
	register const uint64_t *x1 __asm__("x1") = arguments;

	__asm__ volatile("hlt #0xf000" : "+r"(x0) : "r"(x1) : "memory");
	return x0;
}

static void open_output(void)
{
	standard_output = semihost(SYS_OPEN, (uint64_t[]){ (uint64_t)":tt", 4, 3 });
}

static void flush(void)
{
	semihost(SYS_WRITE, (uint64_t[]){ standard_output, (uint64_t)buffer, buffered });
	buffered = 0;
}

static void leave(uint64_t code)
{
	flush();
	semihost(SYS_EXIT, (uint64_t[]){ 0x20026, code }); /* ADP_Stopped_ApplicationExit */
}

static void put_char(char c)
{
	if (buffered == sizeof(buffer))
		flush();
	buffer[buffered++] = c;
}

static void put(const char *s)
{
	for (; *s; s++)
		put_char(*s);
}

static void put_hex(uint64_t v, char after)
{
	int shift = 60;

	while (shift && !(v >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put_char("0123456789abcdef"[v >> shift & 15]);
	put_char(after);
}

void guest_unexpected(uint64_t esr, uint64_t elr, uint64_t far)
{
	put("unexpected exception ");
	put_hex(esr, ' ');
	put_hex(elr, ' ');
	put_hex(far, '\n');
	leave(2);
}

static char *stub_of(const struct arm64_case *c)
{
	if (c->access == A64_AT)
		return c->el ? stub_at_read : stub_at_read_el0;
	return c->access == A64_READ ? stub_read : c->access == A64_WRITE ? stub_write : stub_fetch;
}

static void run_case(const struct arm64_case *c)
{
	frame.offset = c->upper ? 0 : UPPER;
	frame.tcr = arm64_tcr(c);
	frame.sctlr = frame.home_sctlr | (c->wxn ? SCTLR_WXN : 0) | (c->epan ? SCTLR_EPAN : 0);
	frame.ttbr0 = c->upper ? frame.home_ttbr : c->ttbr;
	frame.ttbr1 = c->upper ? c->ttbr : frame.home_ttbr;
	frame.spsr = 0x3c0 | (c->pan ? A64(22) : 0) | (c->el || c->access == A64_AT ? 5 : 0);
	frame.elr = (uint64_t)stub_of(c) + frame.offset;
	frame.x0 = c->va;
	frame.x1 = c->marker;
	case_enter(&frame);
}

static bool went_right(const struct arm64_case *c, const volatile uint64_t *data)
{
	if (c->access == A64_AT)
		return true;
	if (frame.esr >> 26 != ESR_SVC)
		return c->access != A64_WRITE || *data != c->marker;
	if (c->access == A64_READ)
		return frame.value == c->marker;
	if (c->access == A64_WRITE)
		return *data == c->marker;
	return frame.elr_after == c->va + 4;
}

static void try_case(unsigned number, const struct arm64_case *c)
{
	volatile uint64_t *data = (volatile uint64_t *)(uintptr_t)(ARM64_PAGE + ARM64_DATA);

	*data = c->access == A64_WRITE ? ~c->marker : c->marker;
	for (int level = c->start; level <= c->leaf; level++)
		*(volatile uint64_t *)arm64_entry(c, ARM64_TABLE(level), level) = c->desc[level + 1];
	__asm__ volatile("dsb sy" : : : "memory");
	run_case(c);
	put_hex(number, ' ');
	put_hex(frame.esr, ' ');
	put_hex(frame.far, ' ');
	put_hex(*(volatile uint64_t *)arm64_entry(c, ARM64_TABLE(c->leaf), c->leaf), ' ');
	put_hex(went_right(c, data), ' ');
	put_hex(c->access == A64_AT ? frame.value : 0, '\n');
	for (int level = c->start; level <= c->leaf; level++)
		*(volatile uint64_t *)arm64_entry(c, ARM64_TABLE(level), level) = 0;
}

static void set_home(void)
{
	uint64_t sctlr;

	__asm__ volatile("mrs %0, sctlr_el1" : "=r"(sctlr));
	frame.home_sctlr = (sctlr & ~SCTLR_WXN) | SCTLR_M | SCTLR_SPAN;
	frame.home_tcr = 25 | 25u << 16 | UINT64_C(2) << 30 | UINT64_C(1) << 32;
	frame.home_ttbr = (uint64_t)l1_table;
	mmu_on(frame.home_sctlr, frame.home_tcr, frame.home_ttbr);
}

void guest_main(void)
{
	uint64_t mmfr0, mmfr1, mmfr2;
	struct arm64_id id;

	set_home();
	open_output();
	__asm__ volatile("mrs %0, id_aa64mmfr0_el1" : "=r"(mmfr0));
	__asm__ volatile("mrs %0, id_aa64mmfr1_el1" : "=r"(mmfr1));
	__asm__ volatile("mrs %0, s3_0_c0_c7_2" : "=r"(mmfr2));
	id = arm64_identify(mmfr0, mmfr1, mmfr2);
	put("cpu ");
	put_hex(mmfr0, ' ');
	put_hex(mmfr1, ' ');
	put_hex(mmfr2, '\n');
	*(volatile uint32_t *)(uintptr_t)ARM64_PAGE = 0xd4000001; /* svc #0 */
	__asm__ volatile("dc cvau, %0; dsb sy; ic iallu; dsb sy; isb" : : "r"(ARM64_PAGE) : "memory");
	for (unsigned i = 0; i < ARM64_CASES; i++) {
		struct arm64_case c = arm64_case_make(i, &id);

		try_case(i, &c);
	}
	put("end\n");
	leave(0);
}
