/* SPDX-License-Identifier: MIT */
/*
 * What the VMM needs of an architecture: x86_vm.c, arm64_vm.c. State that is cloned is in x86_state.c and
 * arm64_state.c, which implement the calls of vmm.h but for what state.c says once.
 */
#ifndef KAGE_TESTS_VMM_ARCH_H
#define KAGE_TESTS_VMM_ARCH_H

#include "vmm.h"

/* The argument of KVM_CREATE_VM on this KVM. */
unsigned long vmm_arch_type(int kvm);
/* The VM exists, nothing else: what it keeps for vCPUs, and the chips of VMM_IRQCHIP. */
int vmm_arch_open(struct vmm *vmm);
/* vCPUs are closed, descriptors are not. Undoes vmm_arch_open(), however far that came. */
void vmm_arch_close(struct vmm *vmm);
/* A vCPU descriptor exists: as a CPU is reset. `cpuid` as in vmm_make_vcpu(). */
int vmm_arch_vcpu(struct vmm_vcpu *vcpu, const struct kvm_cpuid2 *cpuid);
/* All vCPUs are there and none has run. May be called again. */
int vmm_arch_ready(struct vmm *vmm);
/* Zeroed state with room for the machine's vCPUs; NULL: no memory. And what fills it while they all rest. */
struct vmm_state *vmm_arch_state(const struct vmm *vmm);
int vmm_arch_save(struct vmm *vmm, struct vmm_state *state);
int vmm_arch_irq(struct vmm *vmm, unsigned gsi, bool level);
/* The VMM has written guest memory that the guest may read with its caches off. */
void vmm_arch_wrote(struct vmm *vmm, uint64_t gpa, size_t len);
/* Registers and pending events of a vCPU at rest, as lines on stdout. */
void vmm_arch_report(struct vmm_vcpu *vcpu);

#endif
