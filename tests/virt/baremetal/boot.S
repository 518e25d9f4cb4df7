/* SPDX-License-Identifier: MIT */
/*
 * From a Multiboot 1 loader (QEMU -kernel) to long mode, and the two ways
 * across the border that the cases need: case_enter leaves for a case by
 * IRETQ, trap entries come back as if case_enter returned.
 *
 * Address space: slot 0 of the PML4 maps the first 128 MiB for the supervisor
 * alone, everything allowed; slot 2 shows the first 2 MiB to user mode, read
 * and execute; slot 1 belongs to the cases. No global pages: a CR3 load
 * flushes everything.
 */
#define MAGIC 0x1badb002
#define FLAGS 0x00010000 /* addresses below are valid */

	.section .boot, "ax"
	.code32
	.balign 4
header:
	.long MAGIC, FLAGS, -(MAGIC + FLAGS)
	.long header, header, image_end, bss_end, start

	.globl start
start:
	cli
	movl $boot_stack_end, %esp
	movl $low_pdpt + 3, pml4
	movl $user_pdpt + 7, pml4 + 16
	movl $low_pd + 3, low_pdpt
	movl $user_pd + 7, user_pdpt
	movl $0x85, user_pd
	movl $0x83, %eax
	xorl %ecx, %ecx
1:	movl %eax, low_pd(, %ecx, 8)
	addl $0x200000, %eax
	incl %ecx
	cmpl $64, %ecx
	jb 1b
	movl %cr4, %eax
	orl $0x20, %eax
	movl %eax, %cr4
	movl $pml4, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx
	rdmsr
	orl $0x900, %eax
	wrmsr
	movl %cr0, %eax
	orl $0x80000001, %eax
	movl %eax, %cr0
	lgdt gdt_pointer
	ljmp $0x08, $long_mode

	.code64
long_mode:
	movl $0x10, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	xorl %eax, %eax
	movl %eax, %fs
	movl %eax, %gs
	movq $boot_stack_end, %rsp
	call guest_main
1:	hlt
	jmp 1b

/* void case_enter(const struct case_frame *frame, uint64_t rdi, uint64_t rsi): frame as IRETQ pops it */
	.globl case_enter
case_enter:
	pushq %rbx
	pushq %rbp
	pushq %r12
	pushq %r13
	pushq %r14
	pushq %r15
	movq %rsp, saved_rsp(%rip)
	movq %rdi, %rsp
	movq %rsi, %rdi
	movq %rdx, %rsi
	iretq

/* What a case executes; rdi is the address, rsi the value to write. */
	.globl stub_read, stub_write, stub_fetch
stub_read:
	movq (%rdi), %rax
	int $0x80
stub_write:
	movq %rsi, (%rdi)
	int $0x80
stub_fetch:
	jmp *%rdi

	.globl trap_page_fault, trap_done, trap_other
trap_page_fault:
	popq trap_error(%rip)
	movq $14, trap_vector(%rip)
	movq %cr2, %rax
	movq %rax, trap_cr2(%rip)
	jmp trap_return
trap_done:
	movq $0x80, trap_vector(%rip)
	movq %rax, trap_rax(%rip)
	popq trap_rip(%rip)
trap_return:
	movq saved_rsp(%rip), %rsp
	pushq $2 /* traps leave AC as it was */
	popfq
	cld
	popq %r15
	popq %r14
	popq %r13
	popq %r12
	popq %rbp
	popq %rbx
	ret
trap_other:
	movq $boot_stack_end, %rsp
	call guest_unexpected
1:	hlt
	jmp 1b

	.data
	.balign 8
	.globl gdt
gdt:
	.quad 0
	.quad 0x00af9a000000ffff /* 08: code, ring 0 */
	.quad 0x00cf92000000ffff /* 10: data, ring 0 */
	.quad 0x00cff2000000ffff /* 18: data, ring 3 */
	.quad 0x00affa000000ffff /* 20: code, ring 3 */
	.quad 0, 0               /* 28: TSS, filled by guest_main */
gdt_pointer:
	.word . - gdt - 1
	.quad gdt

	.bss
	.balign 4096
	.globl pml4
pml4:	.skip 4096
low_pdpt: .skip 4096
low_pd:	.skip 4096
user_pdpt: .skip 4096
user_pd: .skip 4096
boot_stack: .skip 16384
boot_stack_end:
	.globl saved_rsp, trap_vector, trap_error, trap_cr2, trap_rax, trap_rip
saved_rsp: .skip 8
trap_vector: .skip 8
trap_error: .skip 8
trap_cr2: .skip 8
trap_rax: .skip 8
trap_rip: .skip 8

	.section .note.GNU-stack, "", @progbits
