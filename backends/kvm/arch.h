/* SPDX-License-Identifier: MIT */
/* What the KVM backend needs of an architecture. One of x86.c, arm64.c is built. */
#ifndef KAGE_KVM_ARCH_H
#define KAGE_KVM_ARCH_H

#include <kage/vcpu.h>
#include <sys/ioctl.h>

#include "compat.h"

/* The registers of a vCPU that take part in translation, as kage_vcpu_set_regs() takes them. */
#if defined(__aarch64__)
typedef struct kage_arm64_regs arch_regs;
#else
typedef struct kage_x86_regs arch_regs;
#endif

/*
 * KVM answers when the vCPU is not in KVM_RUN, and makes the caller wait
 * until then. Returns 0; errno of an ioctl; -EOPNOTSUPP (a guest that cannot be translated).
 */
int arch_vcpu_regs(int vcpufd, arch_regs *regs);

/*
 * Can this process see and move the memory of such a guest? 0; -EINVAL (no VM);
 * -EOPNOTSUPP: it cannot, as far as KVM can be asked (the limits are in
 * the .c file).
 */
int arch_guest_ok(int vmfd);

#define ARCH_ATTRIBUTE_PRIVATE (1 << 3) /* KVM_MEMORY_ATTRIBUTE_PRIVATE */

/* Guests with private memory: asked of a VM, the extension tells what this VM can do, not the kernel. */
static inline bool arch_private_memory(int vmfd)
{
	int r = ioctl(vmfd, KVM_CHECK_EXTENSION, KVM_CAP_MEMORY_ATTRIBUTES);

	return r > 0 && (r & ARCH_ATTRIBUTE_PRIVATE);
}

#endif
