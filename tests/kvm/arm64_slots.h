/* SPDX-License-Identifier: MIT */
/*
 * The guest of test_slots.c on arm64: at EL1 with MMU and caches on; it reports by a store to REPORT, where
 * no memory is. Tables: 39 bits of TTBR0, 4 KiB granules (Arm ARM, D8.3).
 */
#ifndef KAGE_TESTS_ARM64_SLOTS_H
#define KAGE_TESTS_ARM64_SLOTS_H

/*
 * The names are global: a program's address of a local one is that of its section and an offset, and the linker
 * makes one entry of the global offset table for a section, whatever the offset.
 *
 * payload_list: x0 at, x1 n, x2 value. payload_storm: x4 first, x5 mask, x6 seed, x0 at.
 */
__asm__(".pushsection .rodata\n"
	".globl payload_list, payload_list_end, payload_storm, payload_storm_end\n"
	".balign 4\n"
	"payload_list:\n"
	"1:	ldr x3, [x0]\n"
	"	str x2, [x3]\n"
	"	add x0, x0, #8\n"
	"	add x2, x2, #1\n"
	"	subs x1, x1, #1\n"
	"	b.ne 1b\n"
	"	movz x3, #0xc000, lsl #16\n"
	"	str w2, [x3]\n"
	"	b 1b\n"
	"payload_list_end:\n"
	"payload_storm:\n"
	"1:	eor x6, x6, x6, lsl #13\n"
	"	eor x6, x6, x6, lsr #7\n"
	"	eor x6, x6, x6, lsl #17\n"
	"	and x3, x6, x5\n"
	"	lsl x3, x3, #12\n"
	"	add x7, x7, #1\n"
	"	str x7, [x4, x3]\n"
	"	ldr w3, [x0]\n"
	"	cbz w3, 1b\n"
	"	movz x3, #0xc000, lsl #16\n"
	"	str w2, [x3]\n"
	"	b 1b\n"
	"payload_storm_end:\n"
	".popsection\n");

#define REPORT	     0xc0000000u
#define PSTATE_GUEST 0x3c5u /* EL1, everything masked */
#define SCTLR_GUEST  0x30d01805u
#define TCR_GUEST    ((uint64_t)2 << 32 | 1 << 23 | 3 << 12 | 1 << 10 | 1 << 8 | (64 - 39))
#define MAIR_GUEST   0x04ffu /* 0: write-back; 1: device */
#define NORMAL_BLOCK ((uint64_t)1 << 54 | 1 << 10 | 3 << 8 | 1)
#define DEVICE_BLOCK ((uint64_t)3 << 53 | 1 << 10 | 1 << 2 | 1)

#define CORE(field) (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(field))
#define SCTLR_EL1   ARM64_SYS_REG(3, 0, 1, 0, 0)
#define TTBR0_EL1   ARM64_SYS_REG(3, 0, 2, 0, 0)
#define TTBR1_EL1   ARM64_SYS_REG(3, 0, 2, 0, 1)
#define TCR_EL1	    ARM64_SYS_REG(3, 0, 2, 0, 2)
#define MAIR_EL1    ARM64_SYS_REG(3, 0, 10, 2, 0)

static void vm_tables(struct vm *vm)
{
	uint64_t *root = (uint64_t *)(vm->low + AT_TABLES), *next = root + 512;

	root[0] = (AT_TABLES + 4096) | 3;
	root[REPORT >> 30] = REPORT | DEVICE_BLOCK;
	for (uint64_t i = 0; i < 512; i++)
		next[i] = i << 21 | NORMAL_BLOCK;
}

static void vm_set(struct vm *vm, uint64_t id, uint64_t value)
{
	struct kvm_one_reg reg = {.id = id, .addr = (uintptr_t)&value};

	ck_assert_msg(ioctl(vm->cpu, KVM_SET_ONE_REG, &reg) == 0, "register %lx: %s", id, strerror(errno));
}

static void vm_cpu(struct vm *vm)
{
	struct kvm_vcpu_init init;

	ck_assert_int_eq(ioctl(vm->fd, KVM_ARM_PREFERRED_TARGET, &init), 0);
	init.features[0] |= 1u << KVM_ARM_VCPU_PSCI_0_2;
	ck_assert_int_eq(ioctl(vm->cpu, KVM_ARM_VCPU_INIT, &init), 0);
	vm_set(vm, MAIR_EL1, MAIR_GUEST);
	vm_set(vm, TCR_EL1, TCR_GUEST);
	vm_set(vm, TTBR0_EL1, AT_TABLES);
	vm_set(vm, SCTLR_EL1, SCTLR_GUEST);
}

/* The store that reported is completed by the next KVM_RUN, and until then the program counter is not what it says. */
static void vm_complete(struct vm *vm)
{
	vm->run->immediate_exit = 1;
	ck_assert(ioctl(vm->cpu, KVM_RUN, 0) < 0 && errno == EINTR);
	vm->run->immediate_exit = 0;
}

static void vm_load(struct vm *vm, const char *code, const char *end, struct args args)
{
	const uint64_t x[] = {args.at, args.n, args.value, 0, args.first, args.mask, args.seed, 0};

	memcpy(vm->low + AT_CODE, code, (size_t)(end - code));
	__builtin___clear_cache(vm->low + AT_CODE, vm->low + AT_CODE + (end - code));
	vm_complete(vm);
	for (unsigned i = 0; i < ARRAY_SIZE(x); i++)
		vm_set(vm, CORE(regs.regs[0]) + 2 * i, x[i]);
	vm_set(vm, CORE(regs.pc), AT_CODE);
	vm_set(vm, CORE(regs.pstate), PSTATE_GUEST);
}

static bool vm_reported(const struct vm *vm, unsigned exit)
{
	return exit == KVM_EXIT_MMIO && vm->run->mmio.phys_addr == REPORT;
}

#endif
