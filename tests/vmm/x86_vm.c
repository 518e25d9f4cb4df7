/* SPDX-License-Identifier: MIT */
/*
 * x86-64: CPUID, the chips of a PC, and the registers of a 64-bit entry.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "arch.h"

#define TSS_ADDR     0xfffbd000 /* three pages that VMX without unrestricted guests needs, in the PC's hole */
#define IDENTITY_MAP 0xfffbc000

unsigned long vmm_arch_type(int kvm)
{
	return 0;
}

static int take_cpuid(struct vmm *vmm)
{
	unsigned n = 64;
	struct kvm_cpuid2 *cpuid = NULL, *more;

	for (;; n *= 2) {
		more = realloc(cpuid, sizeof(*cpuid) + n * sizeof(cpuid->entries[0]));
		if (more == NULL) {
			free(cpuid);
			return -ENOMEM;
		}
		cpuid = more;
		cpuid->nent = n;
		cpuid->padding = 0;
		if (ioctl(vmm->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) == 0) {
			vmm->cpuid = cpuid;
			return 0;
		}
		if (errno != E2BIG || n > 4096) {
			free(cpuid);
			return -errno;
		}
	}
}

static int make_chips(struct vmm *vmm)
{
	struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
	uint64_t identity_map = IDENTITY_MAP;

	if (!(vmm->config.flags & VMM_IRQCHIP))
		return 0;
	if (ioctl(vmm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map) < 0 ||
	    ioctl(vmm->fd, KVM_SET_TSS_ADDR, (unsigned long)TSS_ADDR) < 0 ||
	    ioctl(vmm->fd, KVM_CREATE_IRQCHIP, NULL) < 0 || ioctl(vmm->fd, KVM_CREATE_PIT2, &pit) < 0)
		return -errno;
	return 0;
}

int vmm_arch_open(struct vmm *vmm)
{
	int r = take_cpuid(vmm);

	return r < 0 ? r : make_chips(vmm);
}

void vmm_arch_close(struct vmm *vmm)
{
	free(vmm->cpuid);
}

int vmm_arch_ready(struct vmm *vmm)
{
	return 0;
}

int vmm_arch_irq(struct vmm *vmm, unsigned gsi, bool level)
{
	struct kvm_irq_level irq = {.irq = gsi, .level = level};

	return ioctl(vmm->fd, KVM_IRQ_LINE, &irq) < 0 ? -errno : 0;
}

/* Caches are coherent with all that a guest does. */
void vmm_arch_wrote(struct vmm *vmm, uint64_t gpa, size_t len)
{
}

/* -- vCPUs ------------------------------------------------------------------------------ */

static void set_apic_id(struct kvm_cpuid2 *cpuid, unsigned id)
{
	unsigned i;

	for (i = 0; i < cpuid->nent; i++) {
		struct kvm_cpuid_entry2 *e = &cpuid->entries[i];

		if (e->function == 1)
			e->ebx = (e->ebx & 0x00ffffff) | id << 24;
		else if (e->function == 0xb || e->function == 0x1f)
			e->edx = id;
	}
}

int vmm_arch_vcpu(struct vmm_vcpu *vcpu, const struct kvm_cpuid2 *given)
{
	struct vmm *vmm = vcpu->vmm;
	struct kvm_cpuid2 *cpuid;
	size_t len = sizeof(*cpuid) + vmm->cpuid->nent * sizeof(cpuid->entries[0]);
	int r;

	if (given != NULL)
		return ioctl(vcpu->fd, KVM_SET_CPUID2, given) < 0 ? -errno : 0;
	cpuid = malloc(len);
	if (cpuid == NULL)
		return -ENOMEM;
	memcpy(cpuid, vmm->cpuid, len);
	set_apic_id(cpuid, vcpu->index);
	if (vmm->config.cpuid != NULL)
		vmm->config.cpuid(cpuid, vcpu->index, vmm->config.opaque);
	r = ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) < 0 ? -errno : 0;
	free(cpuid);
	return r;
}

/* -- a 64-bit entry ----------------------------------------------------------------------------- */

static struct kvm_segment code_segment(uint16_t selector, unsigned dpl)
{
	return (struct kvm_segment){.selector = selector, .limit = 0xffffffff, .type = 0xb, .present = 1,
				    .dpl = dpl, .s = 1, .l = 1, .g = 1};
}

static struct kvm_segment data_segment(uint16_t selector, unsigned dpl)
{
	return (struct kvm_segment){.selector = selector, .limit = 0xffffffff, .type = 3, .present = 1,
				    .dpl = dpl, .s = 1, .db = 1, .g = 1};
}

static void set_tables(struct kvm_sregs *s, const struct vmm_entry *e)
{
	s->gdt = (struct kvm_dtable){.base = e->gdt, .limit = e->gdt ? 0xfff : 0};
	s->idt = (struct kvm_dtable){.base = e->idt, .limit = e->idt ? 0xfff : 0};
	s->tr = (struct kvm_segment){.base = e->tss, .limit = e->tss_limit ? e->tss_limit : 0x67, .type = 0xb,
				     .present = 1};
	s->ldt = (struct kvm_segment){.type = 2, .unusable = 1};
	s->cr0 = e->cr0 ? e->cr0 : 0x80050033;
	s->cr3 = e->cr3;
	s->cr4 = e->cr4 ? e->cr4 : 0xa0;
	s->efer = e->efer ? e->efer : 0xd01;
}

static void set_segments(struct kvm_sregs *s, const struct vmm_entry *e)
{
	bool user = e->cpl == 3;

	s->cs = code_segment(e->cs ? e->cs : user ? 0x33 : 0x10, e->cpl);
	s->ss = data_segment(e->ss ? e->ss : user ? 0x2b : 0x18, e->cpl);
	s->ds = data_segment(e->ds ? e->ds : user ? 0x2b : 0x18, e->cpl);
	s->es = s->fs = s->gs = s->ds;
}

int vmm_vcpu_enter(struct vmm_vcpu *vcpu, const struct vmm_entry *e)
{
	struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
	struct kvm_regs regs = {.rip = e->rip, .rsp = e->rsp, .rdi = e->rdi, .rsi = e->rsi};
	struct kvm_sregs sregs;

	regs.rflags = e->rflags ? e->rflags : e->cpl == 3 ? 0x3002 : 2;
	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
		return -errno;
	set_segments(&sregs, e);
	set_tables(&sregs, e);
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0)
		return -errno;
	/* Without chips in the kernel there is only one state. */
	if (ioctl(vcpu->fd, KVM_SET_MP_STATE, &runnable) < 0 && errno != EINVAL && errno != ENXIO)
		return -errno;
	return 0;
}

/* -- what a vCPU is doing ----------------------------------------------------------------------- */

/* The bits of an interrupt register of the LAPIC, lowest vector first: eight registers of 32 bits, 16 bytes apart. */
static void say_vectors(const char *name, const struct kvm_lapic_state *lapic, unsigned at)
{
	uint32_t bits;
	unsigned i;

	printf(" %s", name);
	for (i = 0; i < 256; i++) {
		memcpy(&bits, lapic->regs + at + i / 32 * 16, sizeof(bits));
		if (bits >> i % 32 & 1)
			printf(" %02x", i);
	}
}

void vmm_arch_report(struct vmm_vcpu *vcpu)
{
	struct kvm_regs regs = {0};
	struct kvm_sregs sregs = {0};
	struct kvm_vcpu_events events = {0};
	struct kvm_lapic_state lapic = {0};
	struct kvm_mp_state mp = {0};

	ioctl(vcpu->fd, KVM_GET_REGS, &regs);
	ioctl(vcpu->fd, KVM_GET_SREGS, &sregs);
	ioctl(vcpu->fd, KVM_GET_VCPU_EVENTS, &events);
	ioctl(vcpu->fd, KVM_GET_LAPIC, &lapic);
	ioctl(vcpu->fd, KVM_GET_MP_STATE, &mp);
	printf("report: vCPU %u: rip %" PRIx64 " rsp %" PRIx64 " rflags %" PRIx64 " cr2 %" PRIx64 " cr3 %" PRIx64
	       " cpl %u mp_state %u\n",
	       vcpu->index, (uint64_t)regs.rip, (uint64_t)regs.rsp, (uint64_t)regs.rflags, (uint64_t)sregs.cr2,
	       (uint64_t)sregs.cr3, sregs.ss.dpl, mp.mp_state);
	printf("report: vCPU %u: exception %u/%u nr %u; interrupt %u nr %u soft %u shadow %u; NMI %u pending %u masked %u;"
	       " SMM %u;",
	       vcpu->index, events.exception.injected, events.exception.pending, events.exception.nr,
	       events.interrupt.injected, events.interrupt.nr, events.interrupt.soft, events.interrupt.shadow,
	       events.nmi.injected, events.nmi.pending, events.nmi.masked, events.smi.smm);
	say_vectors("ISR", &lapic, 0x100);
	say_vectors("IRR", &lapic, 0x200);
	printf("\n");
}
