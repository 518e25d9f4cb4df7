/* SPDX-License-Identifier: MIT */
/*
 * x86: registers of a vCPU, and which guests are confidential.
 *
 * Sources: Intel SDM vol. 3A 2.5 and 4.6; vol. 1 13.4 (layout of XSAVE areas);
 * Documentation/virt/kvm/api.rst; Documentation/virt/kvm/x86/amd-memory-encryption.rst,
 * intel-tdx.rst.
 *
 * Locks: none; KVM takes the vCPU's.
 */
#include <cpuid.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>

#include "arch.h"
#include "slots.h"

#define CR0_PG		  ((uint64_t)1 << 31)
#define CR4_PAE		  ((uint64_t)1 << 5)
#define CR4_PKE		  ((uint64_t)1 << 22)
#define CR4_FRED	  ((uint64_t)1 << 32)
#define EFER_LMA	  ((uint64_t)1 << 10)
#define XSTATE_PKRU	  9
#define XSAVE_HEADER	  512 /* of a standard-format area: XSTATE_BV is its first word */

/* KVM_GET_XSAVE gives the standard format, whose offsets are the host CPU's. */
static int get_pkru(int vcpufd, uint32_t *pkru)
{
	struct kvm_xsave xsave;
	unsigned size, offset, c, d;
	uint64_t present;

	if (ioctl(vcpufd, KVM_GET_XSAVE, &xsave) < 0)
		return -errno;
	memcpy(&present, (char *)&xsave + XSAVE_HEADER, sizeof(present));
	*pkru = 0; /* its initial value, which an area may leave out */
	if (!(present >> XSTATE_PKRU & 1))
		return 0;
	if (!__get_cpuid_count(0xd, XSTATE_PKRU, &size, &offset, &c, &d) ||
	    offset + sizeof(*pkru) > sizeof(xsave))
		return -EOPNOTSUPP;
	memcpy(pkru, (char *)&xsave + offset, sizeof(*pkru));
	return 0;
}

/* Kernels before 5.14 do not tell the PDPTEs: they are read from memory then. */
static void get_pdptes(int vcpufd, arch_regs *regs)
{
	struct kvm_sregs2 sregs2;

	if (!(regs->cr0 & CR0_PG) || !(regs->cr4 & CR4_PAE) || (regs->efer & EFER_LMA))
		return;
	if (ioctl(vcpufd, KVM_GET_SREGS2, &sregs2) < 0 || !(sregs2.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID))
		return;
	regs->flags = KAGE_X86_PDPTES;
	for (unsigned i = 0; i < ARRAY_SIZE(regs->pdpte); i++)
		regs->pdpte[i] = sregs2.pdptrs[i];
}

int arch_vcpu_regs(int vcpufd, arch_regs *regs)
{
	struct kvm_sregs sregs;
	struct kvm_regs gprs;
	uint32_t pkru = 0;

	if (ioctl(vcpufd, KVM_GET_SREGS, &sregs) < 0 || ioctl(vcpufd, KVM_GET_REGS, &gprs) < 0)
		return -errno;
	if (sregs.cr4 & CR4_PKE) {
		int r = get_pkru(vcpufd, &pkru);

		if (r)
			return r;
	}
	*regs = (struct kage_x86_regs){
	    .cr0 = sregs.cr0,
	    .cr3 = sregs.cr3,
	    .cr4 = sregs.cr4 & ~CR4_FRED, /* event delivery: nothing to do with translation */
	    .efer = sregs.efer,
	    .rflags = gprs.rflags,
	    .cpl = sregs.ss.dpl,
	    .pkru = pkru,
	};
	get_pdptes(vcpufd, regs);
	return 0;
}

/*
 * SEV and SEV-ES keep encrypted memory in ordinary slots. Of the commands of
 * KVM_MEMORY_ENCRYPT_OP all but those that make a VM confidential are refused with ENOTTY
 * if it is not, before anything else is looked at. This one changes nothing
 * and gets no further: its descriptor of the security processor is no
 * descriptor. TDX knows no such command and says EINVAL, to its own guests only.
 */
static bool is_encrypted(int vmfd)
{
	struct kvm_sev_cmd cmd = {.id = KVM_SEV_GUEST_STATUS, .sev_fd = UINT32_MAX};

	return ioctl(vmfd, KVM_MEMORY_ENCRYPT_OP, &cmd) == 0 || errno != ENOTTY;
}

/*
 * What this misses: a VM that the VMM makes confidential after it was attached
 * (KVM_SEV_INIT2 comes later than KVM_CREATE_VM), and kinds that later kernels add
 * without either sign. KVM_CAP_VM_TYPES lists what can be created, not what this VM is.
 */
int arch_guest_ok(int vmfd)
{
	if (!slots_is_vm(vmfd))
		return -EINVAL;
	return arch_private_memory(vmfd) || is_encrypted(vmfd) ? -EOPNOTSUPP : 0;
}
