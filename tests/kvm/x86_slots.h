/* SPDX-License-Identifier: MIT */
/*
 * The guest of test_slots.c on x86-64: in user mode with IOPL 3, so that it also runs where KVM interprets
 * supervisor code; it reports by OUT.
 */
#ifndef KAGE_TESTS_X86_SLOTS_H
#define KAGE_TESTS_X86_SLOTS_H

/*
 * payload_list: rdi at, rsi n, rdx value. payload_storm: rbx first, rcx mask, r8 seed, rdi at.
 */
__asm__(".pushsection .rodata\n"
	"payload_list:\n"
	"1:	mov (%rdi), %rax\n"
	"	mov %rdx, (%rax)\n"
	"	add $8, %rdi\n"
	"	inc %rdx\n"
	"	dec %rsi\n"
	"	jnz 1b\n"
	"	out %al, $0x10\n"
	"	jmp 1b\n"
	"payload_list_end:\n"
	"payload_storm:\n"
	"1:	mov %r8, %rax\n"
	"	shl $13, %rax\n"
	"	xor %rax, %r8\n"
	"	mov %r8, %rax\n"
	"	shr $7, %rax\n"
	"	xor %rax, %r8\n"
	"	mov %r8, %rax\n"
	"	shl $17, %rax\n"
	"	xor %rax, %r8\n"
	"	mov %r8, %rax\n"
	"	and %rcx, %rax\n"
	"	shl $12, %rax\n"
	"	inc %r9\n"
	"	mov %r9, (%rbx,%rax)\n"
	"	cmpl $0, (%rdi)\n"
	"	je 1b\n"
	"	out %al, $0x10\n"
	"	jmp 1b\n"
	"payload_storm_end:\n"
	".popsection\n");

#define CR0_GUEST    0x80050033
#define CR4_GUEST    0xa0
#define EFER_GUEST   0xd01
#define RFLAGS_GUEST 0x3002

static void vm_tables(struct vm *vm)
{
	uint64_t *pml4 = (uint64_t *)(vm->low + AT_TABLES), *pdpt = pml4 + 512, *pd = pdpt + 512;

	pml4[0] = (AT_TABLES + 4096) | 0x67;
	pdpt[0] = (AT_TABLES + 8192) | 0x67;
	for (uint64_t i = 0; i < 512; i++)
		pd[i] = i << 21 | 0xe7;
}

static struct kvm_segment vm_segment(int selector, int type, int code)
{
	return (struct kvm_segment){.limit = 0xffffffff,
				    .selector = (uint16_t)selector,
				    .type = (uint8_t)type,
				    .present = 1,
				    .dpl = 3,
				    .s = 1,
				    .l = (uint8_t)code,
				    .db = (uint8_t)!code,
				    .g = 1};
}

static void vm_cpuid(struct vm *vm)
{
	struct kvm_cpuid2 *c = calloc(1, sizeof(*c) + 256 * sizeof(c->entries[0]));

	c->nent = 256;
	ck_assert_int_eq(ioctl(vm->kvm, KVM_GET_SUPPORTED_CPUID, c), 0);
	ck_assert_int_eq(ioctl(vm->cpu, KVM_SET_CPUID2, c), 0);
	free(c);
}

static void vm_user_mode(struct vm *vm)
{
	struct kvm_sregs s;

	ck_assert_int_eq(ioctl(vm->cpu, KVM_GET_SREGS, &s), 0);
	s.cs = vm_segment(0x33, 11, 1);
	s.ss = s.ds = s.es = vm_segment(0x2b, 3, 0);
	s.cr0 = CR0_GUEST;
	s.cr3 = AT_TABLES;
	s.cr4 = CR4_GUEST;
	s.efer = EFER_GUEST;
	ck_assert_int_eq(ioctl(vm->cpu, KVM_SET_SREGS, &s), 0);
}

static void vm_cpu(struct vm *vm)
{
	vm_cpuid(vm);
	vm_user_mode(vm);
}

static void vm_load(struct vm *vm, const char *code, const char *end, struct args args)
{
	const struct kvm_regs regs = {.rip = AT_CODE, .rflags = RFLAGS_GUEST, .rdi = args.at, .rsi = args.n,
				      .rdx = args.value, .rbx = args.first, .rcx = args.mask, .r8 = args.seed};

	memcpy(vm->low + AT_CODE, code, (size_t)(end - code));
	ck_assert_int_eq(ioctl(vm->cpu, KVM_SET_REGS, &regs), 0);
}

static bool vm_reported(const struct vm *vm, unsigned exit)
{
	return exit == KVM_EXIT_IO;
}

#endif
