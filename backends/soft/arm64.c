/* SPDX-License-Identifier: MIT */
/*
 * arm64 registers: what they mean for stage 1 of EL1&0.
 *
 *      bit 55 of an address   clear: TTBR0, T0SZ, TG0 ...   set: TTBR1, T1SZ, TG1 ...
 *      64 - TxSZ              how many bits of address that half has; so where walks begin
 *
 * ASIDs do not tell translations apart: tables are found by their address. What
 * is out of sync may hold what another ASID alone can have cached, so a change of
 * TTBRn or TCR re-reads it. TTBRn.CnP, the
 * cacheability fields and features that struct kage_arm64_regs does not name are
 * ignored.
 *
 * Sources: Arm ARM D8.2 (translation process, TCR_EL1, TTBRn_EL1), D17.2
 * (registers); AArch64.S1TTBaseAddress(), S1InvalidTxSZ() of the pseudocode.
 *
 * Locks: none.
 */
#include "vcpu.h"

#define FEATURES_KNOWN 0xfffu
#define FEATURES_DEFAULT                                                                                        \
	(KAGE_ARM64_HAF | KAGE_ARM64_HD | KAGE_ARM64_PAN | KAGE_ARM64_HPDS | KAGE_ARM64_ASID16 |                \
	 KAGE_ARM64_GRAN16 | KAGE_ARM64_GRAN64)
#define PHYS_BITS_DEFAULT 48

#define SCTLR_M	   ((uint64_t)1 << 0)
#define SCTLR_WXN  ((uint64_t)1 << 19)
#define SCTLR_EE   ((uint64_t)1 << 25)
#define SCTLR_EPAN ((uint64_t)1 << 57)
#define TCR_IPS_SHIFT 32
#define TCR_HA	   ((uint64_t)1 << 39)
#define TCR_HD	   ((uint64_t)1 << 40)
#define TCR_DS	   ((uint64_t)1 << 59)
#define PSTATE_PAN ((uint64_t)1 << 22)
#define ARM_LEVEL_0 3 /* which faults that no table has are reported at */
#define HALF_BITS   55

/* Where a half has its fields in TCR_EL1; TG0 and TG1 number granules differently. */
static const struct half {
	uint8_t size, epd, granule, tbi, hpd;
	uint8_t granules[4]; /* log2; 0: reserved */
} halves[2] = {
    {.size = 0, .epd = 7, .granule = 14, .tbi = 37, .hpd = 41, .granules = {12, 16, 14, 0}},
    {.size = 16, .epd = 23, .granule = 30, .tbi = 38, .hpd = 42, .granules = {0, 14, 12, 16}},
};

static bool has(const struct kage_vcpu *v, uint32_t feature)
{
	return v->features & feature;
}

static unsigned granule_of(const struct kage_vcpu *v, const struct half *h)
{
	unsigned g = h->granules[v->arm64.tcr >> h->granule & 3];

	if ((g == 14 && has(v, KAGE_ARM64_GRAN16)) || (g == 16 && has(v, KAGE_ARM64_GRAN64)))
		return g;
	return 12;
}

static const struct pt_format *format_of(unsigned granule)
{
	return granule == 16 ? &pt_arm64_64k : granule == 14 ? &pt_arm64_16k : &pt_arm64_4k;
}

static bool is_lpa2(const struct kage_vcpu *v, unsigned granule)
{
	return granule < 16 && has(v, KAGE_ARM64_LPA2) && (v->arm64.tcr & TCR_DS);
}

static unsigned ips_bits(const struct kage_vcpu *v)
{
	static const uint8_t bits[8] = {32, 36, 40, 42, 44, 48, 52, 52};

	return bits[v->arm64.tcr >> TCR_IPS_SHIFT & 7];
}

static struct pt_params params_of(const struct kage_vcpu *v, const struct half *h, unsigned granule)
{
	struct pt_params p = {
	    .ds = is_lpa2(v, granule),
	    .lpa = granule == 16 && has(v, KAGE_ARM64_LPA) && v->phys_bits == 52,
	    .ha = has(v, KAGE_ARM64_HAF) && (v->arm64.tcr & TCR_HA),
	    .hpd = has(v, KAGE_ARM64_HPDS) && (v->arm64.tcr >> h->hpd & 1),
	};
	unsigned most = p.ds || p.lpa ? 52 : 48;

	p.hd = p.ha && has(v, KAGE_ARM64_HD) && (v->arm64.tcr & TCR_HD);
	p.giant = p.lpa;
	p.phys_bits = (uint8_t)MIN(MIN(ips_bits(v), v->phys_bits), most);
	return p;
}

/* Bits of address in a half, or 0: TxSZ is out of range. */
static unsigned address_bits(const struct kage_vcpu *v, const struct half *h, unsigned granule)
{
	bool large = is_lpa2(v, granule) || (granule == 16 && has(v, KAGE_ARM64_LVA));
	unsigned size = v->arm64.tcr >> h->size & 63, most = 39;

	if (has(v, KAGE_ARM64_TTST))
		most = granule == 16 ? 47 : 48;
	return size < (large ? 12u : 16u) || size > most ? 0 : 64 - size;
}

/* The table's address in TTBRn_EL1; a table is aligned to its size, of 64 bytes at least where it has 52 bits. */
static uint64_t table_of(uint64_t ttbr, const struct pt_params *p, unsigned ips, unsigned size_shift)
{
	uint64_t low = ttbr & (((uint64_t)1 << 48) - 1);

	if (!p->ds && !(p->lpa && ips == 52))
		return ALIGN_DOWN(low, (uint64_t)1 << MAX(size_shift, 1));
	return ALIGN_DOWN(low, (uint64_t)1 << MAX(size_shift, 6)) | (ttbr >> 2 & 15) << 48;
}

static struct pt_root root_of(const struct kage_vcpu *v, unsigned n)
{
	const struct half *h = &halves[n];
	unsigned granule = granule_of(v, h), bits = address_bits(v, h, granule), stride = granule - 3;
	struct pt_root r = {.format = format_of(granule), .bits = HALF_BITS, .level = ARM_LEVEL_0, .state = PT_NONE};

	r.params = params_of(v, h, granule);
	if (bits && !(v->arm64.tcr >> h->epd & 1)) {
		unsigned level = (bits - granule - 1) / stride, shift = granule + level * stride;

		r.bits = (uint8_t)bits;
		r.table = table_of(n ? v->arm64.ttbr1 : v->arm64.ttbr0, &r.params, ips_bits(v), bits - shift + 3);
		r.state = r.table >> r.params.phys_bits ? PT_ADDRESS_SIZE : PT_TABLE;
		r.level = r.state == PT_TABLE ? (uint8_t)level : ARM_LEVEL_0;
	}
	r.base = n ? ~(uint64_t)0 << r.bits : 0;
	return r;
}

static struct pt_guest arm64_mode_of(const struct kage_vcpu *v)
{
	const struct kage_arm64_regs *r = &v->arm64;
	struct pt_guest g = {
	    .arch = &pt_arch_arm64,
	    .asids = true,
	    .arm64 = {.el0 = (r->pstate >> 2 & 3) == 0,
		      .pan = has(v, KAGE_ARM64_PAN) && (r->pstate & PSTATE_PAN),
		      .epan = has(v, KAGE_ARM64_EPAN) && (r->sctlr & SCTLR_EPAN),
		      .wxn = r->sctlr & SCTLR_WXN,
		      .phys_bits = (uint8_t)v->phys_bits},
	};

	if (!(r->sctlr & SCTLR_M))
		return g;
	g.nroots = ARRAY_SIZE(halves);
	for (unsigned n = 0; n < g.nroots; n++)
		g.root[n] = root_of(v, n);
	return g;
}

/*
 * Nothing else is flushed: what changes with TTBRn, TCR or SCTLR is another root
 * or another context, and the architecture wants a TLBI for the rest.
 */
static int arm64_set_regs(struct kage_vcpu *v, const void *regs)
{
	const struct kage_arm64_regs *r = regs;

	if ((r->pstate >> 2 & 3) > 1)
		return -EINVAL;
	if (r->sctlr & SCTLR_EE)
		return -EOPNOTSUPP;
	if (r->ttbr0 != v->arm64.ttbr0 || r->ttbr1 != v->arm64.ttbr1 || r->tcr != v->arm64.tcr)
		shadow_sync_all(v->cpu.shadow);
	v->arm64 = *r;
	for (unsigned n = 0; n < ARRAY_SIZE(halves); n++)
		v->tagged[n] = r->tcr >> halves[n].tbi & 1;
	v->tags = v->tagged[0] || v->tagged[1];
	vcpu_switch(v);
	return KAGE_OK;
}

static void arm64_get_regs(const struct kage_vcpu *v, void *regs)
{
	memcpy(regs, &v->arm64, sizeof(v->arm64));
}

/* The upper byte of an ASID of 16 bits is ignored where there are 8. */
static bool arm64_asid_valid(const struct kage_vcpu *v, uint64_t asid)
{
	return asid <= 0xffff;
}

static bool arm64_phys_bits_valid(uint32_t phys_bits, uint32_t features)
{
	static const uint8_t valid[] = {32, 36, 40, 42, 44, 48};

	if (phys_bits == 52)
		return features & (KAGE_ARM64_LPA | KAGE_ARM64_LPA2);
	for (unsigned i = 0; i < ARRAY_SIZE(valid); i++)
		if (valid[i] == phys_bits)
			return true;
	return false;
}

const struct soft_arch soft_arm64 = {
    .features_known = FEATURES_KNOWN,
    .features_default = FEATURES_DEFAULT,
    .phys_bits_default = PHYS_BITS_DEFAULT,
    .regs_size = sizeof(struct kage_arm64_regs),
    .regs_least = sizeof(struct kage_arm64_regs),
    .phys_bits_valid = arm64_phys_bits_valid,
    .set_regs = arm64_set_regs,
    .get_regs = arm64_get_regs,
    .mode = arm64_mode_of,
    .asid_valid = arm64_asid_valid,
    .broadcasts = true,
};
