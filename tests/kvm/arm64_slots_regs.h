/* SPDX-License-Identifier: MIT */
/* What the backend reads from a vCPU of arm64, for test_slots.c. */
#ifndef KAGE_TESTS_ARM64_SLOTS_REGS_H
#define KAGE_TESTS_ARM64_SLOTS_REGS_H

static void regs_are(struct vm *vm, struct kage_vcpu *vcpu, struct kage_arm64_regs want)
{
	struct kage_arm64_regs regs;

	ck_assert_int_eq(arch_vcpu_regs(vm->cpu, &regs), 0);
	ck_assert_uint_eq(regs.sctlr, want.sctlr);
	ck_assert_uint_eq(regs.tcr, want.tcr);
	ck_assert_uint_eq(regs.ttbr0, want.ttbr0);
	ck_assert_uint_eq(regs.ttbr1, want.ttbr1);
	ck_assert_uint_eq(regs.pstate & 0xf0040f, want.pstate & 0xf0040f); /* conditions are the guest's affair */
	ck_assert_int_eq(kage_vcpu_set_regs(vcpu, &regs, sizeof(regs)), KAGE_OK);
	ck_assert_int_eq(kage_kvm_load_regs(vcpu, vm->cpu), KAGE_OK);
}

/* As set, after the guest has run, and with both roots, ASIDs and PAN. */
START_TEST(registers_are_read)
{
	const struct kage_vcpu_config config = {.size = sizeof(config), .arch = KAGE_ARCH_ARM64};
	struct kage_arm64_regs want = {.sctlr = SCTLR_GUEST, .tcr = TCR_GUEST, .ttbr0 = AT_TABLES, .pstate = PSTATE_GUEST};
	uint64_t gpa = DATA << 12;
	struct kage_engine *engine;
	struct kage_vcpu *vcpu;
	struct kage_vm *guest;
	struct vm vm;

	vm_start(&vm, 0, 0);
	ck_assert_int_eq(vm_add(&vm, DATA, 1), 0);
	ck_assert_int_eq(kage_engine_create(NULL, &engine), KAGE_OK);
	ck_assert_int_eq(kage_vm_create(engine, NULL, &guest), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_create(guest, &config, &vcpu), KAGE_OK);
	vm_load(&vm, payload_list, payload_list_end, (struct args){0});
	vm_set(&vm, TTBR1_EL1, 0); /* a reset leaves something there */
	regs_are(&vm, vcpu, want);
	vm_write(&vm, &gpa, 1, 5, NULL, NULL);
	regs_are(&vm, vcpu, want);
	want.ttbr0 = (uint64_t)0x21 << 48 | 0x123000;
	want.ttbr1 = (uint64_t)0x43 << 48 | 0x456000;
	want.tcr = (uint64_t)2 << 32 | (uint64_t)2 << 30 | 3 << 28 | 16 << 16 | 3 << 12 | 16; /* both roots, 48 bits */
	want.pstate = PSTATE_GUEST | 1 << 22;
	vm_set(&vm, TTBR0_EL1, want.ttbr0);
	vm_set(&vm, TTBR1_EL1, want.ttbr1);
	vm_set(&vm, TCR_EL1, want.tcr);
	vm_set(&vm, CORE(regs.pstate), want.pstate);
	regs_are(&vm, vcpu, want);
	want.sctlr = 0x30d00800; /* the MMU off, as after a reset */
	want.pstate = 0x3c0;	 /* EL0 */
	vm_set(&vm, SCTLR_EL1, want.sctlr);
	vm_set(&vm, CORE(regs.pstate), want.pstate);
	regs_are(&vm, vcpu, want);
	ck_assert_int_eq(arch_vcpu_regs(-1, &want), -EBADF);
	kage_vcpu_destroy(vcpu);
	ck_assert_int_eq(kage_vm_destroy(guest), KAGE_OK);
	ck_assert_int_eq(kage_engine_destroy(engine), KAGE_OK);
	vm_stop(&vm);
}
END_TEST

static void add_register_tests(TCase *tc)
{
	tcase_add_test(tc, registers_are_read);
}

#endif
