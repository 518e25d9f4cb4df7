/* SPDX-License-Identifier: MIT */
/*
 * x86 registers: what a CPU would refuse, what they mean for translation, and
 * which of their changes flush.
 *
 *      CR0.PG  CR4.PAE  EFER.LME
 *        0        -        -       off
 *        1        0        0       32-bit; 4 MiB pages with CR4.PSE, up to 40 bits of address (PSE-36)
 *        1        1        0       PAE
 *        1        1        1       4 levels, or 5 with CR4.LA57
 *        1        0        1       refused
 *
 * PAE's upper level is four registers, read from memory at a MOV to CR3 and at
 * the changes of CR0 and CR4 that the manual names (4.4.1), not when the guest
 * writes that memory; or given with the others by who restores a vCPU.
 *
 * Sources: Intel SDM vol. 3A 2.5 (control registers), 2.2.1 (EFER), 4.1
 * (paging modes), 4.3, 4.4, 4.10.4.1 (operations that invalidate TLBs).
 *
 * Locks: none.
 */
#include "vcpu.h"

#define FEATURES_KNOWN	  0x7fu
#define FEATURES_DEFAULT  (KAGE_X86_NX | KAGE_X86_PAGE1GB | KAGE_X86_SMEP | KAGE_X86_SMAP | KAGE_X86_PCID)
#define PHYS_BITS_DEFAULT 46

#define CR0_PE	    ((uint64_t)1 << 0)
#define CR0_WP	    ((uint64_t)1 << 16)
#define CR0_NW	    ((uint64_t)1 << 29)
#define CR0_CD	    ((uint64_t)1 << 30)
#define CR0_PG	    ((uint64_t)1 << 31)
#define CR3_NOFLUSH ((uint64_t)1 << 63)
#define CR4_PSE	    ((uint64_t)1 << 4)
#define CR4_PAE	    ((uint64_t)1 << 5)
#define CR4_PGE	    ((uint64_t)1 << 7)
#define CR4_LA57    ((uint64_t)1 << 12)
#define CR4_PCIDE   ((uint64_t)1 << 17)
#define CR4_SMEP    ((uint64_t)1 << 20)
#define CR4_SMAP    ((uint64_t)1 << 21)
#define CR4_PKE	    ((uint64_t)1 << 22)
#define CR4_CET	    ((uint64_t)1 << 23)
#define CR4_PKS	    ((uint64_t)1 << 24)
#define CR4_LAM_SUP ((uint64_t)1 << 28)
#define EFER_LME    ((uint64_t)1 << 8)
#define EFER_LMA    ((uint64_t)1 << 10)
#define EFER_NXE    ((uint64_t)1 << 11)
#define RFLAGS_AC   ((uint64_t)1 << 18)

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

static int check_regs(const struct kage_vcpu *v, const struct kage_x86_regs *r)
{
	int err = check_cr0(r);

	if (!err)
		err = check_efer(v, r);
	if (!err)
		err = check_cr4(v, r);
	if (!err)
		err = check_cr3(v, r);
	if (!err && (r->cpl > 3 || r->reserved || (r->flags & ~(uint32_t)KAGE_X86_PDPTES)))
		err = -EINVAL;
	if (err || !(r->cr0 & CR0_PG))
		return err;
	return (r->efer & EFER_LME) && !(r->cr4 & CR4_PAE) ? -EINVAL : 0;
}

/* -- what they mean ----------------------------------------------------------- */

static bool long_mode(const struct kage_x86_regs *r)
{
	return (r->cr0 & CR0_PG) && (r->efer & EFER_LME);
}

static bool pae_mode(const struct kage_x86_regs *r)
{
	return (r->cr0 & CR0_PG) && (r->cr4 & CR4_PAE) && !(r->efer & EFER_LME);
}

static struct pt_params params_of(const struct kage_vcpu *v)
{
	return (struct pt_params){
	    .phys_bits = (uint8_t)v->phys_bits,
	    .nx = v->x86.efer & EFER_NXE,
	    .page1g = v->features & KAGE_X86_PAGE1GB,
	};
}

static void roots_long(const struct kage_vcpu *v, struct pt_guest *g)
{
	bool five = v->x86.cr4 & CR4_LA57;

	g->nroots = 1;
	g->asids = v->x86.cr4 & CR4_PCIDE;
	g->root[0] = (struct pt_root){
	    .format = five ? &pt_x86_5 : &pt_x86_4,
	    .table = v->x86.cr3 & (((uint64_t)1 << v->phys_bits) - 1) & ~(PAGE_SIZE - 1),
	    .params = params_of(v),
	    .bits = five ? 57 : 48,
	    .level = five ? 4 : 3,
	    .state = PT_TABLE,
	};
}

static void roots_pae(const struct kage_vcpu *v, struct pt_guest *g)
{
	struct pt_params params = params_of(v);

	params.page1g = false;
	g->nroots = ARRAY_SIZE(v->x86.pdpte);
	for (unsigned i = 0; i < g->nroots; i++) {
		struct pt_decoded d = pt_level_of(&pt_x86_pae, 2)->decode(v->x86.pdpte[i], &params);

		g->root[i] = (struct pt_root){
		    .format = &pt_x86_pae,
		    .table = d.addr,
		    .base = (uint64_t)i << 30,
		    .params = params,
		    .bits = 30,
		    .level = d.state == PT_TABLE ? 1 : 2,
		    .state = d.state,
		};
	}
}

/* There is no XD; keys are for long mode. */
static void roots_32(const struct kage_vcpu *v, struct pt_guest *g)
{
	g->nroots = 1;
	g->root[0] = (struct pt_root){
	    .format = &pt_x86_32,
	    .table = v->x86.cr3 & 0xfffff000u,
	    .params = {.phys_bits = (uint8_t)v->phys_bits, .pse = v->x86.cr4 & CR4_PSE},
	    .bits = 32,
	    .level = 1,
	    .state = PT_TABLE,
	};
}

static struct pt_guest x86_mode_of(const struct kage_vcpu *v)
{
	const struct kage_x86_regs *r = &v->x86;
	struct pt_guest g = {
	    .arch = &pt_arch_x86,
	    .x86 = {.wp = r->cr0 & CR0_WP,
		    .smep = r->cr4 & CR4_SMEP,
		    .smap = r->cr4 & CR4_SMAP,
		    .pke = (r->cr4 & CR4_PKE) && long_mode(r),
		    .nxe = (r->efer & EFER_NXE) && (r->cr4 & CR4_PAE),
		    .user = r->cpl == 3,
		    .ac = r->rflags & RFLAGS_AC,
		    .pkru = r->pkru},
	};

	if (!(r->cr0 & CR0_PG))
		return g;
	if (long_mode(r))
		roots_long(v, &g);
	else if (pae_mode(r))
		roots_pae(v, &g);
	else
		roots_32(v, &g);
	return g;
}

/* -- changes -------------------------------------------------------------------- */

/*
 * SMAP, PKE and WP flush nothing: they are looked up at the fill of a context of their own. Bit 63 of CR3 does not
 * spare tables that are out of sync: the new PCID may never have seen what they held before.
 */
static bool flushes(const struct kage_x86_regs *old, const struct kage_x86_regs *new)
{
	uint64_t cr4 = CR4_PSE | CR4_PGE | CR4_PAE | CR4_PCIDE | CR4_SMEP | CR4_LA57;

	return (old->cr3 ^ new->cr3) || memcmp(old->pdpte, new->pdpte, sizeof(old->pdpte)) ||
	       ((old->cr0 ^ new->cr0) & CR0_PG) ||
	       ((old->cr4 ^ new->cr4) & cr4) || ((old->efer ^ new->efer) & EFER_NXE);
}

static bool loads_pdptes(const struct kage_x86_regs *old, const struct kage_x86_regs *new)
{
	return pae_mode(new) && (!pae_mode(old) || old->cr3 != new->cr3 ||
				 ((old->cr0 ^ new->cr0) & (CR0_CD | CR0_NW | CR0_PG)) ||
				 ((old->cr4 ^ new->cr4) & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP)));
}

/* KAGE_OK; -EINVAL: no memory reads as ones, which the CPU refuses; KAGE_WAIT or -errno of mm_read(). */
static int read_pdptes(struct kage_vcpu *v, struct kage_x86_regs *regs)
{
	int r = mm_read(&v->vm->mm, GPA(regs->cr3 & 0xffffffe0u), regs->pdpte, sizeof(regs->pdpte));

	return r == KAGE_MMIO ? -EINVAL : r;
}

/* The PDPTEs that go with new registers: given, read or kept. */
static int take_pdptes(struct kage_vcpu *v, struct kage_x86_regs *regs, bool mov_cr3)
{
	struct pt_params params = {.phys_bits = (uint8_t)v->phys_bits};
	int r = KAGE_OK;

	if (!pae_mode(regs)) {
		memset(regs->pdpte, 0, sizeof(regs->pdpte));
		return KAGE_OK;
	}
	if (!(regs->flags & KAGE_X86_PDPTES)) {
		if (mov_cr3 || loads_pdptes(&v->x86, regs))
			r = read_pdptes(v, regs);
		else
			memcpy(regs->pdpte, v->x86.pdpte, sizeof(regs->pdpte));
	}
	for (unsigned i = 0; !r && i < ARRAY_SIZE(regs->pdpte); i++)
		if (!x86_pdpte_valid(regs->pdpte[i], &params))
			r = -EINVAL;
	return r;
}

/* `mov_cr3`: the guest loads CR3, also with the value that it has. */
static int take_regs(struct kage_vcpu *v, struct kage_x86_regs regs, bool mov_cr3)
{
	bool noflush = regs.cr3 & CR3_NOFLUSH;
	int r = check_regs(v, &regs);

	if (r)
		return r;
	regs.cr3 &= ~CR3_NOFLUSH;
	regs.rflags &= RFLAGS_AC;
	r = take_pdptes(v, &regs, mov_cr3);
	if (r)
		return r;
	regs.flags = 0;
	if (flushes(&v->x86, &regs) || (mov_cr3 && !noflush))
		shadow_sync_all(v->cpu.shadow);
	v->x86 = regs;
	vcpu_switch(v);
	return KAGE_OK;
}

static int x86_set_regs(struct kage_vcpu *v, const void *regs)
{
	return take_regs(v, *(const struct kage_x86_regs *)regs, false);
}

static void x86_get_regs(const struct kage_vcpu *v, void *regs)
{
	struct kage_x86_regs *r = regs;

	*r = v->x86;
	r->flags = pae_mode(r) ? KAGE_X86_PDPTES : 0;
}

static int x86_flush_cr3(struct kage_vcpu *v, uint64_t value)
{
	struct kage_x86_regs regs = v->x86;
	int r;

	regs.cr3 = value;
	r = take_regs(v, regs, true);
	return r == -EOPNOTSUPP ? -EINVAL : r;
}

/* SDM vol. 2, INVPCID: types 0 and 1 take a PCID other than 0 only with CR4.PCIDE. */
static bool x86_asid_valid(const struct kage_vcpu *v, uint64_t asid)
{
	return asid <= 0xfff && (!asid || (v->x86.cr4 & CR4_PCIDE));
}

static bool x86_phys_bits_valid(uint32_t phys_bits, uint32_t features)
{
	return phys_bits >= 36 && phys_bits <= 52;
}

const struct soft_arch soft_x86 = {
    .features_known = FEATURES_KNOWN,
    .features_default = FEATURES_DEFAULT,
    .phys_bits_default = PHYS_BITS_DEFAULT,
    .regs_size = sizeof(struct kage_x86_regs),
    .regs_least = offsetof(struct kage_x86_regs, flags),
    .phys_bits_valid = x86_phys_bits_valid,
    .set_regs = x86_set_regs,
    .get_regs = x86_get_regs,
    .mode = x86_mode_of,
    .asid_valid = x86_asid_valid,
    .flush_cr3 = x86_flush_cr3,
};
