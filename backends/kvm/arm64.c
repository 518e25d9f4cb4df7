/* SPDX-License-Identifier: MIT */
/*
 * arm64: registers of a vCPU, and which guests this process cannot keep the memory of.
 *
 * A guest's stage 1 is what it says at EL1: nested guests at EL2 have translations of their own, and are not covered.
 *
 * Sources: Arm Architecture Reference Manual (DDI 0487), D19.2 (SCTLR_EL1, TCR_EL1, TTBRn_EL1), C5.2 (PSTATE);
 * Linux, Documentation/virt/kvm/api.rst.
 *
 * Locks: none; KVM takes the vCPU's.
 */
#include <linux/kvm.h>
#include <sys/ioctl.h>

#include "arch.h"
#include "slots.h"

#ifndef KVM_ARM_MTE_COPY_TAGS /* Linux 5.14 */
struct kvm_arm_copy_mte_tags {
	__u64 guest_ipa;
	__u64 length;
	void *addr;
	__u64 flags;
	__u64 reserved[2];
};
#define KVM_ARM_MTE_COPY_TAGS _IOR(KVMIO, 0xb4, struct kvm_arm_copy_mte_tags)
#define KVM_ARM_TAGS_FROM_GUEST 1
#endif

#define SCTLR_EL1 ARM64_SYS_REG(3, 0, 1, 0, 0)
#define TTBR0_EL1 ARM64_SYS_REG(3, 0, 2, 0, 0)
#define TTBR1_EL1 ARM64_SYS_REG(3, 0, 2, 0, 1)
#define TCR_EL1	  ARM64_SYS_REG(3, 0, 2, 0, 2)
#define PSTATE	  (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(regs.pstate))

#define PSTATE_AARCH32 (1u << 4)

int arch_vcpu_regs(int vcpufd, arch_regs *regs)
{
	struct kage_arm64_regs r = {0};
	const struct {
		uint64_t id, *to;
	} reg[] = {{SCTLR_EL1, &r.sctlr}, {TCR_EL1, &r.tcr}, {TTBR0_EL1, &r.ttbr0}, {TTBR1_EL1, &r.ttbr1}, {PSTATE, &r.pstate}};

	for (unsigned i = 0; i < sizeof(reg) / sizeof(reg[0]); i++) {
		struct kvm_one_reg one = {.id = reg[i].id, .addr = (uintptr_t)reg[i].to};

		if (ioctl(vcpufd, KVM_GET_ONE_REG, &one) < 0)
			return -errno;
	}
	if (r.pstate & PSTATE_AARCH32)
		return -EOPNOTSUPP;
	*regs = r;
	return 0;
}

/*
 * Memory tags lie beside memory, and a page that is copied or merged has to carry them: a guest that
 * has them is refused. KVM does not say whether it does, but copying the tags of no memory is an invalid argument
 * for all others, or unknown. Any other answer is one about tags (-EBUSY: a slot is being logged, which forbids
 * setting them; hence reading).
 */
static bool has_tags(int vmfd)
{
	struct kvm_arm_copy_mte_tags none = {.length = 0, .flags = KVM_ARM_TAGS_FROM_GUEST};

	return ioctl(vmfd, KVM_ARM_MTE_COPY_TAGS, &none) >= 0 || (errno != EINVAL && errno != ENOTTY);
}

/*
 * What this misses: protected guests of pKVM, which nothing that can be asked of a VM tells from others (their
 * KVM refuses read-only slots and dirty logs), and a VM that is given tags after it was attached.
 */
int arch_guest_ok(int vmfd)
{
	if (!slots_is_vm(vmfd))
		return -EINVAL;
	return arch_private_memory(vmfd) || has_tags(vmfd) ? -EOPNOTSUPP : 0;
}
