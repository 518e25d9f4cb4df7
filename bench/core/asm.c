/* SPDX-License-Identifier: MIT */
/* Encoding of the few instructions that loops need: REX.W, opcode, ModRM, SIB (Intel SDM vol. 2, 2.1
 * and 2.2). */
#include <string.h>

#include "unicorn.h"

static void put(struct asm_code *c, unsigned byte)
{
	must(c->n < ASM_ROOM ? 0 : -ENOSPC, "guest code");
	c->byte[c->n++] = (uint8_t)byte;
}

static void put32(struct asm_code *c, uint32_t v)
{
	for (unsigned i = 0; i < 4; i++)
		put(c, v >> 8 * i & 255);
}

static void rex(struct asm_code *c, unsigned reg, unsigned index, unsigned base)
{
	put(c, 0x48 | reg >> 3 << 2 | index >> 3 << 1 | base >> 3);
}

static void modrm(struct asm_code *c, unsigned mod, unsigned reg, unsigned rm)
{
	put(c, mod << 6 | (reg & 7) << 3 | (rm & 7));
}

static void sib(struct asm_code *c, unsigned scale, unsigned index, unsigned base)
{
	put(c, (unsigned)__builtin_ctz(scale) << 6 | (index & 7) << 3 | (base & 7));
}

void asm_mem(struct asm_code *c, enum asm_mem op, unsigned reg, unsigned base, int32_t disp)
{
	rex(c, reg, 0, base);
	put(c, op);
	modrm(c, 2, reg, base);
	put32(c, (uint32_t)disp);
}

void asm_sib(struct asm_code *c, enum asm_mem op, unsigned reg, unsigned base, unsigned index, unsigned scale)
{
	rex(c, reg, index, base);
	put(c, op);
	modrm(c, 0, reg, 4);
	sib(c, scale, index, base);
}

void asm_rr(struct asm_code *c, enum asm_rr op, unsigned to, unsigned from)
{
	rex(c, from, 0, to);
	put(c, op);
	modrm(c, 3, from, to);
}

void asm_imm(struct asm_code *c, enum asm_imm op, unsigned reg, uint32_t imm)
{
	rex(c, 0, 0, reg);
	put(c, 0x81);
	modrm(c, 3, op, reg);
	put32(c, imm);
}

void asm_imul(struct asm_code *c, unsigned to, unsigned from, uint32_t imm)
{
	rex(c, to, 0, from);
	put(c, 0x69);
	modrm(c, 3, to, from);
	put32(c, imm);
}

void asm_shl(struct asm_code *c, unsigned reg, unsigned n)
{
	rex(c, 0, 0, reg);
	put(c, 0xc1);
	modrm(c, 3, 4, reg);
	put(c, n);
}

void asm_inc(struct asm_code *c, unsigned reg)
{
	rex(c, 0, 0, reg);
	put(c, 0xff);
	modrm(c, 3, 0, reg);
}

void asm_dec(struct asm_code *c, unsigned reg)
{
	rex(c, 0, 0, reg);
	put(c, 0xff);
	modrm(c, 3, 1, reg);
}

void asm_jnz(struct asm_code *c, uint32_t to)
{
	put(c, 0x0f);
	put(c, 0x85);
	put32(c, to - (c->n + 4));
}

void asm_cr3(struct asm_code *c, unsigned reg)
{
	if (reg >> 3)
		put(c, 0x41);
	put(c, 0x0f);
	put(c, 0x22);
	modrm(c, 3, 3, reg);
}

void asm_invlpg(struct asm_code *c, unsigned base, unsigned index)
{
	rex(c, 0, index, base);
	put(c, 0x0f);
	put(c, 0x01);
	modrm(c, 0, 7, 4);
	sib(c, 1, index, base);
}
