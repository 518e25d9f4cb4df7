/* SPDX-License-Identifier: MIT */
/*
 * x86 registers: what a CPU would refuse, what they mean for translation, and
 * which of their changes flush.
 *
 * Sources: Intel SDM vol. 3A 2.5 (control registers), 2.2.1 (EFER), 4.1
 * (paging modes), 4.10.4.1 (operations that invalidate TLBs).
 *
 * Locks: none.
 */
#include "vcpu.h"

#define CR0_KNOWN  0xe005003full
#define CR4_KNOWN  0x3ff7fffull /* bits 0 to 25 but the reserved bit 15 and what is refused below */
#define EFER_KNOWN 0x0020fd01ull

static int check_cr0(const struct kage_x86_regs *r)
{
	if (r->cr0 & ~CR0_KNOWN)
		return -EINVAL;
	if ((r->cr0 & CR0_PG) && !(r->cr0 & CR0_PE))
		return -EINVAL;
	return (r->cr0 & CR0_NW) && !(r->cr0 & CR0_CD) ? -EINVAL : 0;
}

static int check_cr4(const struct kage_vcpu *v, const struct kage_x86_regs *r)
{
	static const struct {
		uint64_t bit;
		uint32_t feature;
	} needs[] = {
	    {CR4_LA57, KAGE_X86_LA57}, {CR4_PCIDE, KAGE_X86_PCID}, {CR4_SMEP, KAGE_X86_SMEP},
	    {CR4_SMAP, KAGE_X86_SMAP}, {CR4_PKE, KAGE_X86_PKU},
	};

	if (r->cr4 & (CR4_CET | CR4_PKS | CR4_LAM_SUP))
		return -EOPNOTSUPP;
	if (r->cr4 & ~CR4_KNOWN)
		return -EINVAL;
	for (unsigned i = 0; i < ARRAY_SIZE(needs); i++)
		if ((r->cr4 & needs[i].bit) && !(v->features & needs[i].feature))
			return -EINVAL;
	return (r->cr4 & CR4_PCIDE) && !(r->efer & EFER_LMA) ? -EINVAL : 0;
}

static int check_efer(const struct kage_vcpu *v, const struct kage_x86_regs *r)
{
	bool lma = (r->efer & EFER_LME) && (r->cr0 & CR0_PG);

	if (r->efer & ~EFER_KNOWN)
		return -EINVAL;
	if ((r->efer & EFER_NXE) && !(v->features & KAGE_X86_NX))
		return -EINVAL;
	return lma != !!(r->efer & EFER_LMA) ? -EINVAL : 0;
}

static int check_cr3(const struct kage_vcpu *v, const struct kage_x86_regs *r)
{
	uint64_t ok = (((uint64_t)1 << v->phys_bits) - 1) | (r->cr4 & CR4_PCIDE ? CR3_NOFLUSH : 0);

	if (r->cr3 & ((uint64_t)3 << 61))
		return -EOPNOTSUPP; /* LAM */
	return r->cr3 & ~ok ? -EINVAL : 0;
}

int x86_check_regs(const struct kage_vcpu *v, const struct kage_x86_regs *r)
{
	int err = check_cr0(r);

	if (!err)
		err = check_efer(v, r);
	if (!err)
		err = check_cr4(v, r);
	if (!err)
		err = check_cr3(v, r);
	if (!err && r->cpl > 3)
		err = -EINVAL;
	if (err || !(r->cr0 & CR0_PG))
		return err;
	if (!(r->efer & EFER_LME))
		return -EOPNOTSUPP; /* 32-bit and PAE paging */
	return r->cr4 & CR4_PAE ? 0 : -EINVAL;
}

struct shadow_mode x86_mode_of(const struct kage_vcpu *v)
{
	const struct kage_x86_regs *r = &v->regs;
	uint64_t low = PAGE_SIZE - 1;

	if (!(r->cr0 & CR0_PG))
		return (struct shadow_mode){0};
	return (struct shadow_mode){
	    .format = r->cr4 & CR4_LA57 ? &pt_x86_5 : &pt_x86_4,
	    .params = {.phys_bits = (uint8_t)v->phys_bits,
		       .nx = r->efer & EFER_NXE,
		       .page1g = v->features & KAGE_X86_PAGE1GB},
	    .x86 = {.wp = r->cr0 & CR0_WP,
		    .smep = r->cr4 & CR4_SMEP,
		    .smap = r->cr4 & CR4_SMAP,
		    .pke = r->cr4 & CR4_PKE,
		    .nxe = r->efer & EFER_NXE,
		    .user = r->cpl == 3,
		    .ac = r->rflags & RFLAGS_AC,
		    .pkru = r->pkru},
	    .pcid = r->cr4 & CR4_PCIDE,
	    .root = r->cr3 & (((uint64_t)1 << v->phys_bits) - 1) & ~low,
	};
}

/* SMAP, PKE and WP flush nothing: they are looked up at the fill of a context of their own. */
bool x86_flushes(const struct kage_x86_regs *old, const struct kage_x86_regs *new, bool noflush)
{
	uint64_t cr4 = CR4_PGE | CR4_PAE | CR4_PCIDE | CR4_SMEP | CR4_LA57;

	return ((old->cr3 ^ new->cr3) && !noflush) || ((old->cr0 ^ new->cr0) & CR0_PG) ||
	       ((old->cr4 ^ new->cr4) & cr4) || ((old->efer ^ new->efer) & EFER_NXE);
}
