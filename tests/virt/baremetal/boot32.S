/* SPDX-License-Identifier: MIT */
/*
 * A guest of 32-bit protected mode, from a Multiboot 1 loader (QEMU -kernel).
 * Its C code runs without paging; case_enter switches paging on with the
 * registers it is given, leaves for a case by IRET, and trap entries switch
 * paging off and come back as if case_enter returned. While paging is on, the
 * tables of guest32.c map the first 4 MiB at 0 for the supervisor and at
 * 0x40000000 for user mode.
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
	lgdt gdt_pointer
	ljmp $0x08, $1f
1:	movl $0x10, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	xorl %eax, %eax
	movl %eax, %fs
	movl %eax, %gs
	call guest_main
1:	hlt
	jmp 1b

/* void case_enter(const struct case_frame *frame); offsets: cr0 cr3 cr4 efer, user, eip eflags, address value */
	.globl case_enter
case_enter:
	pushl %ebx
	pushl %ebp
	pushl %esi
	pushl %edi
	movl 20(%esp), %ebx
	movl %esp, saved_esp
	movl 8(%ebx), %eax
	movl %eax, %cr4
	movl $0xc0000080, %ecx
	rdmsr
	movl 12(%ebx), %eax
	wrmsr
	movl 4(%ebx), %eax
	movl %eax, %cr3
	movl (%ebx), %eax
	movl %eax, %cr0
	jmp 1f
1:	movl 28(%ebx), %edi
	movl 32(%ebx), %esi
	cmpl $0, 16(%ebx)
	je 2f
	pushl $0x23
	pushl $trap_stack_end
	pushl 24(%ebx)
	pushl $0x1b
	pushl 20(%ebx)
	movl $0x23, %eax
	movl %eax, %ds
	iret
2:	pushl 24(%ebx)
	pushl $0x08
	pushl 20(%ebx)
	iret

/* What a case executes; edi is the address, esi the value to write. */
	.globl stub_read, stub_write, stub_fetch
stub_read:
	movl (%edi), %eax
	int $0x80
stub_write:
	movl %esi, (%edi)
	int $0x80
stub_fetch:
	jmp *%edi

	.globl trap_page_fault, trap_done, trap_other
trap_page_fault:
	movl $0x10, %eax
	movl %eax, %ds
	popl trap_error
	movl $14, trap_vector
	movl %cr2, %eax
	movl %eax, trap_cr2
	jmp trap_return
trap_done:
	movl $0x10, %ecx
	movl %ecx, %ds
	movl $0x80, trap_vector
	movl %eax, trap_eax
	popl trap_eip
trap_return:
	movl $0x11, %eax
	movl %eax, %cr0
	jmp 1f
1:	movl saved_esp, %esp
	pushl $2 /* traps leave AC as it was */
	popfl
	cld
	popl %edi
	popl %esi
	popl %ebp
	popl %ebx
	ret
trap_other:
	movl $0x10, %eax
	movl %eax, %ds
	movl $0x11, %eax
	movl %eax, %cr0
	movl $boot_stack_end, %esp
	call guest_unexpected
1:	hlt
	jmp 1b

	.data
	.balign 8
	.globl gdt
gdt:
	.quad 0
	.quad 0x00cf9a000000ffff /* 08: code, ring 0 */
	.quad 0x00cf92000000ffff /* 10: data, ring 0 */
	.quad 0x00cffa000000ffff /* 18: code, ring 3 */
	.quad 0x00cff2000000ffff /* 20: data, ring 3 */
	.quad 0                  /* 28: TSS, filled by guest_main */
gdt_pointer:
	.word . - gdt - 1
	.long gdt

	.bss
	.balign 4096
boot_stack: .skip 16384
boot_stack_end:
trap_stack: .skip 4096
	.globl trap_stack_end
trap_stack_end:
	.globl saved_esp, trap_vector, trap_error, trap_cr2, trap_eax, trap_eip
saved_esp: .skip 4
trap_vector: .skip 4
trap_error: .skip 4
trap_cr2: .skip 4
trap_eax: .skip 4
trap_eip: .skip 4

	.section .note.GNU-stack, "", @progbits
