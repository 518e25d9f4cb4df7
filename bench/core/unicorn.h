/* SPDX-License-Identifier: MIT */
/* Guest code of x86-64 for Unicorn, instruction by instruction (Intel SDM vol. 2), and what runs it. */
#ifndef KAGE_BENCH_UNICORN_H
#define KAGE_BENCH_UNICORN_H

#include <errno.h>
#include <stdio.h>

#include "access.h"

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, UNI_REGS };

#define ASM_ROOM 4096

struct asm_code {
	uint32_t n;
	uint8_t byte[ASM_ROOM];
};

/* -- asm.c: 64-bit operands; rsp, rbp, r12 and r13 are no base registers -------------- */

enum asm_mem { ASM_LOAD = 0x8b, ASM_STORE = 0x89, ASM_ADD_MEM = 0x03 };
enum asm_rr { ASM_MOV = 0x89, ASM_ADD = 0x01, ASM_OR = 0x09 };
enum asm_imm { ASM_ADD_IMM = 0, ASM_OR_IMM = 1, ASM_AND_IMM = 4, ASM_CMP_IMM = 7 };

/* op reg, [base + disp] */
void asm_mem(struct asm_code *c, enum asm_mem op, unsigned reg, unsigned base, int32_t disp);
/* op reg, [base + index * scale] */
void asm_sib(struct asm_code *c, enum asm_mem op, unsigned reg, unsigned base, unsigned index,
	     unsigned scale);
/* op to, from */
void asm_rr(struct asm_code *c, enum asm_rr op, unsigned to, unsigned from);
/* op reg, imm; sign-extended */
void asm_imm(struct asm_code *c, enum asm_imm op, unsigned reg, uint32_t imm);
void asm_imul(struct asm_code *c, unsigned to, unsigned from, uint32_t imm);
void asm_shl(struct asm_code *c, unsigned reg, unsigned n);
void asm_inc(struct asm_code *c, unsigned reg);
void asm_dec(struct asm_code *c, unsigned reg);
/* To a place in the code, as c->n was there. */
void asm_jnz(struct asm_code *c, uint32_t to);
void asm_cr3(struct asm_code *c, unsigned reg);
/* invlpg [base + index] */
void asm_invlpg(struct asm_code *c, unsigned base, unsigned index);

/* -- unicorn.c ------------------------------------------------------------------------- */

void uni_code(struct uni *u, const struct asm_code *c);
/* Runs the code from its begin to its end. False: it did not get there, or rcx is not 0 then. */
bool uni_run(struct uni *u, uint64_t reg[UNI_REGS]);
/* With paging: guest code uses these addresses too, beside those from the gva that uni_create() was told. */
void uni_known(struct uni *u, uint64_t gva, uint64_t bytes);
/* Memory of its own. */
void uni_map(struct uni *u, uint64_t gpa, uint64_t bytes);
void uni_unmap(struct uni *u, uint64_t gpa, uint64_t bytes);
bool uni_write(struct uni *u, uint64_t gpa, uint64_t v);
bool uni_read(struct uni *u, uint64_t gpa, uint64_t *v);

#endif
