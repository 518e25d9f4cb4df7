/* SPDX-License-Identifier: MIT */
/*
 * The CPU's side of a direct boot: topology in CPUID, the MSRs that firmware
 * would have set, and vCPU 0 at the kernel's 64-bit entry. The others are left
 * as KVM made them: they wait for INIT and SIPI from the guest.
 *
 * Why topology: KVM_GET_SUPPORTED_CPUID answers for the CPU that the call ran
 * on (Linux Documentation/virt/kvm/x86/errata.rst); a guest would take its CPUs
 * for threads or packages as the host has them.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "x86_boot.h"

#define LEAF1_ECX_TSC_DEADLINE (1u << 24)
#define LEAF1_ECX_HYPERVISOR   (1u << 31)
#define LEAF1_EDX_HTT	       (1u << 28)
#define LEAF_AMD_ECX_CMP_LEGACY (1u << 1)
#define LEVEL_SMT	       1u
#define LEVEL_CORE	       2u

#define MSR_MISC_ENABLE 0x1a0u /* bit 0: fast strings */
#define MSR_MTRR_DEF	0x2ffu /* enabled, write-back: no variable ranges are needed */
#define MTRR_WRITE_BACK 0x806u

/* Bits that hold the numbers 0 .. cpus - 1. */
static unsigned id_bits(unsigned cpus)
{
	unsigned bits = 0;

	while (1u << bits < cpus)
		bits++;
	return bits;
}

static bool is_amd(const struct kvm_cpuid2 *cpuid)
{
	for (unsigned i = 0; i < cpuid->nent; i++)
		if (cpuid->entries[i].function == 0)
			return cpuid->entries[i].ebx == 0x68747541 /* Auth */ ||
			       cpuid->entries[i].ebx == 0x6f677948 /* Hygo */;
	return false;
}

static void set_features(struct kvm_cpuid_entry2 *e, unsigned id, unsigned cpus, bool tsc_deadline)
{
	e->ebx = (e->ebx & 0xffff) | cpus << 16 | id << 24;
	e->ecx |= LEAF1_ECX_HYPERVISOR | (tsc_deadline ? LEAF1_ECX_TSC_DEADLINE : 0);
	e->edx = cpus > 1 ? e->edx | LEAF1_EDX_HTT : e->edx & ~LEAF1_EDX_HTT;
}

/* Intel 4, AMD 8000001d: first and second level caches belong to a core, the rest to the package. */
static void set_cache(struct kvm_cpuid_entry2 *e, unsigned cpus)
{
	unsigned level = (e->eax >> 5) & 7, sharing = level > 2 ? (1u << id_bits(cpus)) - 1 : 0;

	if (!(e->eax & 0x1f))
		return;
	e->eax = (e->eax & 0x3fff) | sharing << 14;
	if (e->function == 4)
		e->eax |= (cpus > 64 ? 63u : (1u << id_bits(cpus)) - 1) << 26;
}

static void set_leaf(struct kvm_cpuid_entry2 *e, unsigned id, unsigned cpus, bool tsc_deadline, bool amd)
{
	switch (e->function) {
	case 1:
		set_features(e, id, cpus, tsc_deadline);
		break;
	case 4:
	case 0x8000001d:
		set_cache(e, cpus);
		break;
	case 0x80000001:
		if (amd)
			e->ecx = cpus > 1 ? e->ecx | LEAF_AMD_ECX_CMP_LEGACY : e->ecx & ~LEAF_AMD_ECX_CMP_LEGACY;
		break;
	case 0x80000008:
		if (amd)
			e->ecx = (e->ecx & ~0xf0ffu) | id_bits(cpus) << 12 | (cpus - 1);
		break;
	case 0x8000001e: /* extended APIC id; core number and one thread; node 0 */
		e->eax = id;
		e->ebx = id;
		e->ecx = 0;
		break;
	default:
		break;
	}
}

/* One sub-leaf of extended topology; type 0 ends the list. */
static void add_level(struct kvm_cpuid2 *cpuid, unsigned index, unsigned type, unsigned shift, unsigned cpus,
		      unsigned id)
{
	cpuid->entries[cpuid->nent++] = (struct kvm_cpuid_entry2){ .function = 0xb,
								   .index = index,
								   .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
								   .eax = shift,
								   .ebx = cpus,
								   .ecx = index | type << 8,
								   .edx = id };
}

void boot_cpuid(struct kvm_cpuid2 *cpuid, unsigned id, unsigned cpus, bool tsc_deadline)
{
	bool amd = is_amd(cpuid), extended = false;
	unsigned n = 0;

	for (unsigned i = 0; i < cpuid->nent; i++) {
		struct kvm_cpuid_entry2 e = cpuid->entries[i];

		extended |= e.function == 0xb;
		if (e.function == 0xb || e.function == 0x1f)
			continue;
		set_leaf(&e, id, cpus, tsc_deadline, amd);
		cpuid->entries[n++] = e;
	}
	cpuid->nent = n;
	if (!extended)
		return;
	add_level(cpuid, 0, LEVEL_SMT, 0, 1, id);
	add_level(cpuid, 1, LEVEL_CORE, id_bits(cpus), cpus, id);
	add_level(cpuid, 2, 0, 0, 0, id);
}

static int set_cpuid(struct vmm_vcpu *vcpu, bool tsc_deadline)
{
	const struct vmm *vmm = vcpu->vmm;
	size_t len = sizeof(*vmm->cpuid) + vmm->cpuid->nent * sizeof(vmm->cpuid->entries[0]);
	struct kvm_cpuid2 *cpuid = calloc(1, len + BOOT_CPUID_MORE * sizeof(cpuid->entries[0]));
	int err;

	if (!cpuid)
		return -ENOMEM;
	memcpy(cpuid, vmm->cpuid, len);
	boot_cpuid(cpuid, vcpu->index, vmm->vcpus, tsc_deadline);
	if (vmm->config.cpuid)
		vmm->config.cpuid(cpuid, vcpu->index, vmm->config.opaque);
	err = ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) < 0 ? -errno : 0;
	free(cpuid);
	return err;
}

/* A KVM without one of them keeps its reset value, which Linux copes with. */
static int set_msrs(struct vmm_vcpu *vcpu)
{
	union {
		struct kvm_msrs list;
		char room[sizeof(struct kvm_msrs) + 2 * sizeof(struct kvm_msr_entry)];
	} m = { .list.nmsrs = 2 };

	m.list.entries[0] = (struct kvm_msr_entry){ .index = MSR_MISC_ENABLE, .data = 1 };
	m.list.entries[1] = (struct kvm_msr_entry){ .index = MSR_MTRR_DEF, .data = MTRR_WRITE_BACK };
	return ioctl(vcpu->fd, KVM_SET_MSRS, &m) < 0 ? -errno : 0;
}

int boot_cpus(struct vmm *vmm, const struct boot_entry *entry)
{
	bool tsc_deadline = ioctl(vmm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) > 0;
	struct vmm_entry state = { .rip = entry->rip, .rsi = entry->rsi, .cr3 = entry->cr3, .gdt = entry->gdt };
	int err = 0;

	for (unsigned i = 0; i < vmm->vcpus && !err; i++) {
		err = set_cpuid(vmm->vcpu[i], tsc_deadline);
		if (!err)
			err = set_msrs(vmm->vcpu[i]);
	}
	return err ? err : vmm_vcpu_enter(vmm->vcpu[0], &state);
}
