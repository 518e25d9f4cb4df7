/* SPDX-License-Identifier: MIT */
/*
 * EL1 with the MMU on, and the way into a case and back.
 *
 * The guest's own tables map 64 MiB of RAM from 1 GiB on in both halves of the
 * address space, at the same offsets; 2 MiB of it are instructions. The guest runs in the lower half; while a case replaces TTBR0
 * it is executed in the upper one. Everything is addressed relative to the PC.
 * VBAR_EL1 is of the half that a case runs in; what a case does ends with an
 * exception, and exceptions of any other kind end the guest.
 */
#define UPPER 0xffffff8000000000
/* struct case_frame of arm64_guest.c */
#define F_OFFSET 0
#define F_SCTLR 8
#define F_TCR 16
#define F_TTBR0 24
#define F_TTBR1 32
#define F_SPSR 40
#define F_ELR 48
#define F_X0 56
#define F_X1 64
#define F_HOME_SCTLR 72
#define F_HOME_TCR 80
#define F_HOME_TTBR 88
#define F_SP 96
#define F_ESR 104
#define F_FAR 112
#define F_RETURN 120
#define F_VALUE 128

	.section .boot, "ax"
	.globl start
start:
	adrp x0, stack_end
	mov sp, x0
	adrp x0, l1_table
	adrp x1, l2_table
	orr x2, x1, #3
	str x2, [x0, #8]
	/* RAM: blocks, XN */
	mov x2, #0x0401
	movk x2, #0x4000, lsl #16
	movk x2, #0x0060, lsl #48
	mov x3, #0
1:	str x2, [x1, x3, lsl #3]
	add x2, x2, #0x200000
	add x3, x3, #1
	cmp x3, #32
	b.lo 1b
	/* instructions: read-only, executable at EL1 and EL0 */
	mov x2, #0x0481
	movk x2, #0x4020, lsl #16
	str x2, [x1, #8]
	mov x2, #0x00ff
	msr mair_el1, x2
	dsb sy
	bl guest_main
1:	wfi
	b 1b

	.text
/* void mmu_on(uint64_t sctlr, uint64_t tcr, uint64_t table) */
	.globl mmu_on
mmu_on:
	msr ttbr0_el1, x2
	msr ttbr1_el1, x2
	msr tcr_el1, x1
	adrp x3, vectors
	msr vbar_el1, x3
	isb
	tlbi vmalle1
	dsb sy
	msr sctlr_el1, x0
	isb
	ret

/* void case_enter(struct case_frame *frame) */
	.globl case_enter
case_enter:
	stp x29, x30, [sp, #-96]!
	stp x19, x20, [sp, #16]
	stp x21, x22, [sp, #32]
	stp x23, x24, [sp, #48]
	stp x25, x26, [sp, #64]
	stp x27, x28, [sp, #80]
	mov x9, sp
	str x9, [x0, #F_SP]
	ldr x9, [x0, #F_OFFSET]
	add x0, x0, x9
	adr x10, 1f
	add x10, x10, x9
	br x10
1:	msr tpidr_el1, x0
	adrp x10, vectors
	msr vbar_el1, x10
	ldr x10, [x0, #F_TTBR0]
	ldr x11, [x0, #F_TTBR1]
	ldr x12, [x0, #F_TCR]
	ldr x13, [x0, #F_SCTLR]
	msr ttbr0_el1, x10
	msr ttbr1_el1, x11
	msr tcr_el1, x12
	msr sctlr_el1, x13
	isb
	tlbi vmalle1
	dsb sy
	isb
	ldr x10, [x0, #F_SPSR]
	ldr x11, [x0, #F_ELR]
	msr spsr_el1, x10
	msr elr_el1, x11
	ldr x1, [x0, #F_X1]
	ldr x0, [x0, #F_X0]
	eret

/* What a case executes; x0 is the address, x1 the value to write. */
	.globl stub_read, stub_write, stub_fetch, stub_at_read, stub_at_read_el0
stub_read:
	ldr x0, [x0]
	svc #0
stub_write:
	str x1, [x0]
	svc #0
stub_fetch:
	br x0
stub_at_read:
	at s1e1r, x0
	isb
	mrs x0, par_el1
	svc #0
stub_at_read_el0:
	at s1e0r, x0
	isb
	mrs x0, par_el1
	svc #0

case_leave:
	mrs x9, tpidr_el1
	str x0, [x9, #F_VALUE]
	mrs x10, esr_el1
	mrs x11, far_el1
	mrs x12, elr_el1
	str x10, [x9, #F_ESR]
	str x11, [x9, #F_FAR]
	str x12, [x9, #F_RETURN]
	ldr x10, [x9, #F_HOME_TTBR]
	ldr x11, [x9, #F_HOME_TCR]
	ldr x12, [x9, #F_HOME_SCTLR]
	msr ttbr0_el1, x10
	msr ttbr1_el1, x10
	msr tcr_el1, x11
	msr sctlr_el1, x12
	isb
	tlbi vmalle1
	dsb sy
	isb
	ldr x10, [x9, #F_OFFSET]
	sub x9, x9, x10
	ldr x10, [x9, #F_SP]
	mov sp, x10
	ldp x19, x20, [sp, #16]
	ldp x21, x22, [sp, #32]
	ldp x23, x24, [sp, #48]
	ldp x25, x26, [sp, #64]
	ldp x27, x28, [sp, #80]
	ldp x29, x30, [sp], #96
	/* by ERET, so that PSTATE.PAN is clear again whether the CPU has it or not */
	mov x10, #0x3c5
	msr spsr_el1, x10
	msr elr_el1, x30
	eret

unexpected:
	mrs x0, esr_el1
	mrs x1, elr_el1
	mrs x2, far_el1
	b guest_unexpected

	.balign 4096
vectors:
	.rept 4
	.balign 128
	b unexpected
	.endr
	.balign 128
	b case_leave /* synchronous, from EL1 */
	.rept 3
	.balign 128
	b unexpected
	.endr
	.balign 128
	b case_leave /* synchronous, from EL0 */
	.rept 7
	.balign 128
	b unexpected
	.endr

	.bss
	.balign 4096
	.globl l1_table
l1_table: .skip 4096
l2_table: .skip 4096
	.skip 16384
stack_end:
	.skip 8

	.section .note.GNU-stack, "", @progbits
