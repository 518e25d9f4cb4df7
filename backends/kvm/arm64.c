/* SPDX-License-Identifier: MIT */
/*
 * arm64: it compiles, and refuses. Missing are registers for translation (TCR, two roots, three
 * granules), hosts with pages of 16 and 64 KiB, memory tags (a copy of a page has
 * to carry its tags, and KVM does not say whether a guest has them), and how to
 * recognise a protected guest of pKVM.
 */
#include "base/base.h"
#include "arch.h"

int arch_vcpu_regs(int vcpufd, struct kage_x86_regs *regs)
{
	return -EOPNOTSUPP;
}

int arch_guest_ok(int vmfd)
{
	return -EOPNOTSUPP;
}
