/* SPDX-License-Identifier: MIT */
/*
 * Unicorn as a peer: small loops of x86-64 guest code, written here byte by byte,
 * which run on the memory of a guest of ours, with its page tables.
 *
 * A loop counts in rcx. Loads add to rax, stores store rdx, so that what came
 * out can be checked. Throughput loops have two (PAGES: seven) instructions an
 * access for the address, some ns of its time; dependent ones have none.
 *
 * It is a library of its own licence (GPL-2.0): only this program, which is not
 * installed, links it, and without it the rows that need it are skipped.
 */
#include <stdlib.h>
#include <string.h>

#include "unicorn.h"

#ifndef BENCH_UNICORN

const char *unicorn_missing(void)
{
	return "built without Unicorn: libunicorn-dev (-Dunicorn=enabled says what is missing)";
}

#define ABSENT(declaration)                                                                                  \
	declaration                                                                                          \
	{                                                                                                    \
		abort(); /* whoever calls has asked unicorn_missing() */                                     \
	}

ABSENT(struct uni *uni_create(char *raw, uint64_t bytes, uint64_t gva, uint64_t tables, uint64_t code))
ABSENT(void uni_destroy(struct uni *u))
ABSENT(double uni_sample(void *arg))
ABSENT(void uni_code(struct uni *u, const struct asm_code *c))
ABSENT(void uni_known(struct uni *u, uint64_t gva, uint64_t bytes))
ABSENT(bool uni_run(struct uni *u, uint64_t reg[UNI_REGS]))
ABSENT(void uni_map(struct uni *u, uint64_t gpa, uint64_t bytes))
ABSENT(void uni_unmap(struct uni *u, uint64_t gpa, uint64_t bytes))
ABSENT(bool uni_write(struct uni *u, uint64_t gpa, uint64_t v))
ABSENT(bool uni_read(struct uni *u, uint64_t gpa, uint64_t *v))

#else

#include <unicorn/unicorn.h>

struct uni {
	uc_engine *uc;
	char *raw;
	uint64_t gva, code;
	uint64_t end; /* of the code that was put, an offset */
};

static void uc_must(uc_err e, const char *what)
{
	if (e == UC_ERR_OK)
		return;
	fprintf(stderr, "Unicorn: %s: %s\n", what, uc_strerror(e));
	must(-EIO, "Unicorn");
}

const char *unicorn_missing(void)
{
	return NULL;
}

static void paging_on(struct uni *u, uint64_t tables)
{
	uint64_t cr4 = 0x20, cr0 = 0x80010001;		       /* PAE; PG, WP, PE */
	uc_x86_msr efer = {.rid = 0xc0000080, .value = 0xd00}; /* NXE, LMA, LME */

	uc_must(uc_reg_write(u->uc, UC_X86_REG_CR4, &cr4), "CR4");
	uc_must(uc_reg_write(u->uc, UC_X86_REG_CR3, &tables), "CR3");
	uc_must(uc_reg_write(u->uc, UC_X86_REG_MSR, &efer), "EFER");
	uc_must(uc_reg_write(u->uc, UC_X86_REG_CR0, &cr0), "CR0");
}

/* Version 2.0 looks for a region at an address before it translates it, and leaves it alone after. */
void uni_known(struct uni *u, uint64_t gva, uint64_t bytes)
{
	uc_must(uc_mem_map_ptr(u->uc, gva, bytes, UC_PROT_ALL, u->raw), "map");
}

struct uni *uni_create(char *raw, uint64_t bytes, uint64_t gva, uint64_t tables, uint64_t code)
{
	struct uni *u = must_map(calloc(1, sizeof(*u)), "calloc");

	*u = (struct uni){.raw = raw, .gva = gva, .code = code};
	uc_must(uc_open(UC_ARCH_X86, UC_MODE_64, &u->uc), "open");
	if (raw)
		uc_must(uc_mem_map_ptr(u->uc, 0, bytes, UC_PROT_ALL, raw), "map");
	if (tables) {
		paging_on(u, tables);
		uni_known(u, gva, bytes);
	}
	return u;
}

void uni_destroy(struct uni *u)
{
	uc_must(uc_close(u->uc), "close");
	free(u);
}

void uni_code(struct uni *u, const struct asm_code *c)
{
	memcpy(u->raw + u->code, c->byte, c->n);
	u->end = u->code + c->n;
}

/* Registers by number: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15. */
static const int reg_ids[UNI_REGS] = {
    UC_X86_REG_RAX, UC_X86_REG_RCX, UC_X86_REG_RDX, UC_X86_REG_RBX, UC_X86_REG_RSP, UC_X86_REG_RBP,
    UC_X86_REG_RSI, UC_X86_REG_RDI, UC_X86_REG_R8,  UC_X86_REG_R9,  UC_X86_REG_R10, UC_X86_REG_R11,
    UC_X86_REG_R12, UC_X86_REG_R13, UC_X86_REG_R14, UC_X86_REG_R15,
};

bool uni_run(struct uni *u, uint64_t reg[UNI_REGS])
{
	uc_err e;

	for (unsigned i = 0; i < UNI_REGS; i++)
		uc_must(uc_reg_write(u->uc, reg_ids[i], &reg[i]), "register");
	e = uc_emu_start(u->uc, u->gva + u->code, u->gva + u->end, 0, 0);
	for (unsigned i = 0; i < UNI_REGS; i++)
		uc_must(uc_reg_read(u->uc, reg_ids[i], &reg[i]), "register");
	if (e != UC_ERR_OK)
		fprintf(stderr, "Unicorn: %s\n", uc_strerror(e));
	return e == UC_ERR_OK && reg[RCX] == 0;
}

void uni_map(struct uni *u, uint64_t gpa, uint64_t bytes)
{
	uc_must(uc_mem_map(u->uc, gpa, bytes, UC_PROT_ALL), "map");
}

void uni_unmap(struct uni *u, uint64_t gpa, uint64_t bytes)
{
	uc_must(uc_mem_unmap(u->uc, gpa, bytes), "unmap");
}

bool uni_write(struct uni *u, uint64_t gpa, uint64_t v)
{
	return uc_mem_write(u->uc, gpa, &v, 8) == UC_ERR_OK;
}

bool uni_read(struct uni *u, uint64_t gpa, uint64_t *v)
{
	return uc_mem_read(u->uc, gpa, v, 8) == UC_ERR_OK;
}

/* -- loops of accesses ------------------------------------------------------------------ */

#define UNROLL	8
#define LCG_ADD 12345 /* odd, as 5 = 1 mod 4: visits every page */

static uint64_t lcg(uint64_t x, uint64_t pages)
{
	return (x * 5 + LCG_ADD) & (pages - 1);
}

/* One access; r8 is the place, rsi the gva of offset 0. */
static void emit_access(struct asm_code *c, const struct work *w)
{
	if (w->dependent) {
		asm_sib(c, ASM_LOAD, RAX, RSI, RAX, 1);
		if (w->op == STORE) {
			asm_rr(c, ASM_MOV, RDI, RAX);
			asm_rr(c, ASM_ADD, RDI, RSI);
			asm_mem(c, ASM_STORE, RDX, RDI, 8);
		}
		return;
	}
	if (w->shape == STRIDE) {
		asm_imm(c, ASM_ADD_IMM, R8, ACCESS_STEP);
		asm_imm(c, ASM_AND_IMM, R8, (uint32_t)w->lane->bytes - 1);
		asm_sib(c, w->op == STORE ? ASM_STORE : ASM_ADD_MEM, w->op == STORE ? RDX : RAX, RSI, R8, 1);
		return;
	}
	asm_imul(c, R8, R8, 5);
	asm_imm(c, ASM_ADD_IMM, R8, LCG_ADD);
	asm_imm(c, ASM_AND_IMM, R8, (uint32_t)w->pages - 1);
	asm_imul(c, R9, R8, 7);
	asm_imm(c, ASM_AND_IMM, R9, 63);
	asm_shl(c, R9, 6);
	asm_rr(c, ASM_MOV, R10, R8);
	asm_shl(c, R10, 12);
	asm_rr(c, ASM_ADD, R10, R9);
	asm_sib(c, w->op == STORE ? ASM_STORE : ASM_ADD_MEM, w->op == STORE ? RDX : RAX, RSI, R10, 1);
}

static void emit_loop(struct asm_code *c, const struct work *w)
{
	c->n = 0;
	for (unsigned i = 0; i < UNROLL; i++)
		emit_access(c, w);
	asm_dec(c, RCX);
	asm_jnz(c, 0);
}

/* What rax must be in the end, or whether the stores have arrived. */
static bool right(const struct work *w, uint64_t from, uint64_t key, const uint64_t reg[UNI_REGS])
{
	const struct lane *l = w->lane;
	uint64_t sum = 0, wrong = 0;

	for (uint64_t i = 0; i < w->n; i++) {
		uint64_t offset;

		if (w->dependent) {
			from = *(const uint64_t *)(l->raw + from);
			wrong += w->op == STORE && *(const uint64_t *)(l->raw + from + 8) != key;
			continue;
		}
		from = w->shape == STRIDE ? (from + ACCESS_STEP) & (l->bytes - 1) : lcg(from, w->pages);
		offset = w->shape == STRIDE ? from : access_line(from);
		wrong += w->op == STORE && *(const uint64_t *)(l->raw + offset) != key;
		sum += access_content(offset);
	}
	if (w->op == STORE)
		return wrong == 0;
	return reg[RAX] == (w->dependent ? from : sum);
}

double uni_sample(void *arg)
{
	static struct asm_code c;
	struct work *w = arg;
	struct lane *l = w->lane;
	uint64_t from = l->at, key = mix(++l->key);
	uint64_t reg[UNI_REGS] = {[RCX] = w->n / UNROLL, [RDX] = key, [RSI] = l->gva};
	double ns;
	bool ok;

	if (!w->n || !w->uni)
		return -1;
	reg[w->dependent ? RAX : R8] = from;
	if (!w->emitted) {
		uint64_t warm[UNI_REGS];

		emit_loop(&c, w);
		uni_code(w->uni, &c);
		w->emitted = true;
		memcpy(warm, reg, sizeof(warm)); /* translates it */
		warm[RCX] = 1;
		uni_run(w->uni, warm);
	}
	ns = cpu_ns();
	ok = uni_run(w->uni, reg);
	ns = cpu_ns() - ns;
	ok &= right(w, from, key, reg);
	l->at = reg[w->dependent ? RAX : R8];
	return ok ? ns / (double)w->n : -1;
}

#endif
