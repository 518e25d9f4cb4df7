/* SPDX-License-Identifier: MIT */
/*
 * arm64: the VM's address space, vCPUs with PSCI, the registers of an entry at EL1.
 *
 * An access that left the guest is completed by the next KVM_RUN, which looks at immediate_exit after that: so registers
 * of a vCPU whose thread has come to rest are whole (vmm.h, V2).
 *
 * Sources: Linux, Documentation/virt/kvm/api.rst and devices/arm-vgic-v3.rst; Arm Power State Coordination
 * Interface (DEN 0022).
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "arm64.h"

#define EL1H_MASKED  0x3c5u /* PSTATE: EL1 with its own stack; D, A, I and F masked */
#define DEFAULT_BITS 40	    /* of guest physical addresses, where KVM_CREATE_VM is given 0 */
#define CACHE_LINE   16	    /* none is shorter */

#define SCTLR_EL1 ARM64_SYS_REG(3, 0, 1, 0, 0)
#define TTBR0_EL1 ARM64_SYS_REG(3, 0, 2, 0, 0)
#define TCR_EL1	  ARM64_SYS_REG(3, 0, 2, 0, 2)
#define MAIR_EL1  ARM64_SYS_REG(3, 0, 10, 2, 0)
#define VBAR_EL1  ARM64_SYS_REG(3, 0, 12, 0, 0)

int arm64_get(int vcpufd, uint64_t id, void *value)
{
	struct kvm_one_reg reg = {.id = id, .addr = (uintptr_t)value};

	return ioctl(vcpufd, KVM_GET_ONE_REG, &reg) < 0 ? -errno : 0;
}

int arm64_set(int vcpufd, uint64_t id, const void *value)
{
	struct kvm_one_reg reg = {.id = id, .addr = (uintptr_t)value};

	return ioctl(vcpufd, KVM_SET_ONE_REG, &reg) < 0 ? -errno : 0;
}

int arm64_set64(int vcpufd, uint64_t id, uint64_t value)
{
	return arm64_set(vcpufd, id, &value);
}

/* -- the VM ----------------------------------------------------------------------------- */

/* CPUs with fewer address bits than the default refuse it. */
unsigned long vmm_arch_type(int kvm)
{
	int bits = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_ARM_VM_IPA_SIZE);

	return bits > 0 && bits < DEFAULT_BITS ? KVM_VM_TYPE_ARM_IPA_SIZE(bits) : 0;
}

int vmm_arch_open(struct vmm *vmm)
{
	return vmm->config.flags & VMM_IRQCHIP ? arm64_gic_create(vmm) : 0;
}

void vmm_arch_close(struct vmm *vmm)
{
	if (vmm->gic >= 0)
		close(vmm->gic);
}

int vmm_arch_ready(struct vmm *vmm)
{
	return vmm->gic >= 0 ? arm64_gic_init(vmm) : 0;
}

int vmm_arch_irq(struct vmm *vmm, unsigned gsi, bool level)
{
	struct kvm_irq_level irq = {.irq = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (gsi + 32),
				    .level = level};

	return ioctl(vmm->fd, KVM_IRQ_LINE, &irq) < 0 ? -errno : 0;
}

/* To where all observers look (Arm ARM, B2.8: mismatched memory attributes). Linux lets processes do that. */
void vmm_arch_wrote(struct vmm *vmm, uint64_t gpa, size_t len)
{
	char *at = vmm_ptr(vmm, gpa, len), *end = at != NULL ? at + len : NULL, *line;

	for (line = (char *)((uintptr_t)at & ~(uintptr_t)(CACHE_LINE - 1)); line < end; line += CACHE_LINE)
		__asm__ volatile("dc cvac, %0" : : "r"(line) : "memory");
	__asm__ volatile("dsb ish" : : : "memory");
}

/* -- vCPUs ------------------------------------------------------------------------------ */

int vmm_arch_vcpu(struct vmm_vcpu *vcpu, const struct kvm_cpuid2 *cpuid)
{
	struct kvm_vcpu_init init;

	if (vcpu->vmm->gic_ready)
		return -EBUSY;
	if (ioctl(vcpu->vmm->fd, KVM_ARM_PREFERRED_TARGET, &init) < 0)
		return -errno;
	init.features[0] |= 1u << KVM_ARM_VCPU_PSCI_0_2;
	if (vcpu->index && vcpu->vmm->config.flags & VMM_IRQCHIP)
		init.features[0] |= 1u << KVM_ARM_VCPU_POWER_OFF;
	return ioctl(vcpu->fd, KVM_ARM_VCPU_INIT, &init) < 0 ? -errno : 0;
}

int vmm_vcpu_enter(struct vmm_vcpu *vcpu, const struct vmm_entry *e)
{
	struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
	const struct {
		uint64_t id, value;
		bool set;
	} reg[] = {
		{ARM64_CORE(regs.pstate), e->pstate ? e->pstate : EL1H_MASKED, true},
		{ARM64_CORE(regs.pc), e->pc, true},
		{ARM64_CORE(sp_el1), e->sp, true},
		{ARM64_CORE(regs.regs[0]), e->x0, true},
		{ARM64_CORE(regs.regs[1]), e->x1, true},
		{ARM64_CORE(regs.regs[2]), e->x2, true},
		{ARM64_CORE(regs.regs[3]), e->x3, true},
		{TTBR0_EL1, e->ttbr0, e->sctlr},
		{TCR_EL1, e->tcr, e->sctlr},
		{MAIR_EL1, e->mair, e->sctlr},
		{VBAR_EL1, e->vbar, e->sctlr},
		{SCTLR_EL1, e->sctlr, e->sctlr},
	};
	unsigned i;
	int r = 0;

	for (i = 0; i < sizeof(reg) / sizeof(reg[0]) && r == 0; i++)
		if (reg[i].set)
			r = arm64_set64(vcpu->fd, reg[i].id, reg[i].value);
	if (r == 0 && ioctl(vcpu->fd, KVM_SET_MP_STATE, &runnable) < 0)
		r = -errno;
	return r;
}

void vmm_arch_report(struct vmm_vcpu *vcpu)
{
	static const struct {
		const char *name;
		uint64_t id;
	} reg[] = {
		{"pc", ARM64_CORE(regs.pc)}, {"pstate", ARM64_CORE(regs.pstate)}, {"sp_el1", ARM64_CORE(sp_el1)},
		{"lr", ARM64_CORE(regs.regs[30])},
	};
	struct kvm_mp_state mp = {0};
	uint64_t value;
	unsigned i;

	ioctl(vcpu->fd, KVM_GET_MP_STATE, &mp);
	printf("report: vCPU %u: mp_state %u", vcpu->index, mp.mp_state);
	for (i = 0; i < sizeof(reg) / sizeof(reg[0]); i++) {
		struct kvm_one_reg one = {.id = reg[i].id, .addr = (uintptr_t)&value};

		if (ioctl(vcpu->fd, KVM_GET_ONE_REG, &one) == 0)
			printf(" %s %" PRIx64, reg[i].name, value);
	}
	printf("\n");
}
