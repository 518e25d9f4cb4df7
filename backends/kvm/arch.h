/* SPDX-License-Identifier: MIT */
/* What the KVM backend needs of an architecture. One of x86.c, arm64.c is built. */
#ifndef KAGE_KVM_ARCH_H
#define KAGE_KVM_ARCH_H

#include <kage/vcpu.h>

/*
 * The registers of a vCPU that take part in translation, as
 * kage_vcpu_set_regs() takes them. KVM answers when the vCPU is not in KVM_RUN, and makes the caller wait
 * until then. Returns 0; errno of an ioctl; -EOPNOTSUPP (an architecture without them).
 */
int arch_vcpu_regs(int vcpufd, struct kage_x86_regs *regs);

/*
 * Can this process see and move the memory of such a guest? 0; -EINVAL (no VM);
 * -EOPNOTSUPP: it is confidential, as far as KVM can be asked (the limits are in
 * the .c file), or this architecture is not done.
 */
int arch_guest_ok(int vmfd);

#endif
