/* SPDX-License-Identifier: MIT */
/*
 * The cases that the bare-metal arm64 guest tries and the test expects: both
 * sides compute them from the number and the CPU's ID registers. Freestanding.
 *
 * One address is translated through one table a level, of which a case fills
 * one descriptor each. Whatever the granule and the size of the block, the low
 * 42 bits of the address are those of the page it points to, as far as the
 * address space goes.
 */
#ifndef KAGE_TESTS_BAREMETAL_ARM64_CASES_H
#define KAGE_TESTS_BAREMETAL_ARM64_CASES_H

#include <stdbool.h>
#include <stdint.h>

#define ARM64_CASES 24576
#define ARM64_PAGE UINT64_C(0x41000000)
#define ARM64_TABLE(level) (UINT64_C(0x40800000) + 0x10000 * (unsigned)((level) + 1))
#define ARM64_DATA 16 /* reads and writes go here; an instruction stands at 0 */
#define A64(n) (UINT64_C(1) << (n))

enum arm64_case_access { A64_READ, A64_WRITE, A64_FETCH, A64_AT };
enum arm64_case_granule { G4K, G16K, G64K };

struct arm64_id {
	unsigned pa_bits;
	bool haf, hd, pan, epan, hpds, lva, lpa, lpa2, ttst, gran16, gran64;
};

struct arm64_case {
	bool upper; /* TTBR1's half is tried */
	enum arm64_case_granule granule;
	unsigned el, txsz, ips;
	bool pan, wxn, epan, tbi, epd, hpd, ha, hd, ds;
	enum arm64_case_access access;
	int start, leaf;       /* levels, as Arm counts */
	uint64_t desc[5];      /* descriptor of level n at n + 1 */
	uint64_t va, ttbr;
	uint64_t marker;       /* what lies at ARM64_DATA or is written there */
};

static inline unsigned arm64_field(uint64_t v, unsigned low)
{
	return v >> low & 15;
}

static inline struct arm64_id arm64_identify(uint64_t mmfr0, uint64_t mmfr1, uint64_t mmfr2)
{
	static const uint8_t pa_bits[16] = { 32, 36, 40, 42, 44, 48, 52 };
	struct arm64_id id = { .pa_bits = pa_bits[arm64_field(mmfr0, 0)] };

	id.haf = arm64_field(mmfr1, 0) >= 1;
	id.hd = arm64_field(mmfr1, 0) >= 2;
	id.hpds = arm64_field(mmfr1, 12) >= 1;
	id.pan = arm64_field(mmfr1, 20) >= 1;
	id.epan = arm64_field(mmfr1, 20) >= 3;
	id.lva = arm64_field(mmfr2, 16) >= 1;
	id.ttst = arm64_field(mmfr2, 28) >= 1;
	id.gran16 = arm64_field(mmfr0, 20) >= 1;
	id.gran64 = arm64_field(mmfr0, 24) == 0;
	id.lpa = id.gran64 && id.pa_bits == 52;
	id.lpa2 = arm64_field(mmfr0, 28) == 1 && arm64_field(mmfr0, 20) == 2;
	return id;
}

static inline uint64_t arm64_mix(uint64_t x)
{
	x += UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

static inline unsigned arm64_take(uint64_t *r, unsigned n)
{
	unsigned v = (unsigned)(*r >> 8 & 0xffffff) % n;

	*r = arm64_mix(*r);
	return v;
}

static inline unsigned arm64_page_bits(enum arm64_case_granule g)
{
	return g == G4K ? 12 : g == G16K ? 14 : 16;
}

static inline unsigned arm64_shift(const struct arm64_case *c, int level)
{
	unsigned page = arm64_page_bits(c->granule);

	return page + (unsigned)(3 - level) * (page - 3);
}

static inline uint64_t *arm64_entry(const struct arm64_case *c, uint64_t table, int level)
{
	uint64_t below = c->va & ((A64(64 - c->txsz)) - 1), mask = A64(arm64_page_bits(c->granule) - 3) - 1;

	return (uint64_t *)(uintptr_t)(table + 8 * (below >> arm64_shift(c, level) & mask));
}

static inline unsigned arm64_output_bits(const struct arm64_case *c, const struct arm64_id *id)
{
	static const uint8_t bits[7] = { 32, 36, 40, 42, 44, 48, 52 };
	unsigned n = bits[c->ips] < id->pa_bits ? bits[c->ips] : id->pa_bits;

	return n > 48 && !c->ds && !(c->granule == G64K && id->lpa) ? 48 : n;
}

static inline void arm64_make_mode(struct arm64_case *c, const struct arm64_id *id, uint64_t *r)
{
	unsigned least, most;

	c->upper = arm64_take(r, 2);
	c->granule = (enum arm64_case_granule)arm64_take(r, 3);
	if ((c->granule == G16K && !id->gran16) || (c->granule == G64K && !id->gran64))
		c->granule = G4K;
	c->el = arm64_take(r, 2);
	c->access = (enum arm64_case_access)arm64_take(r, 3);
	c->pan = id->pan && arm64_take(r, 2);
	c->wxn = arm64_take(r, 4) == 0;
	c->epan = id->epan && arm64_take(r, 2);
	c->tbi = arm64_take(r, 4) == 0;
	c->hpd = id->hpds && arm64_take(r, 4) == 0;
	c->ha = id->haf && arm64_take(r, 2);
	c->hd = id->hd && arm64_take(r, 2);
	c->ds = id->lpa2 && c->granule != G64K && arm64_take(r, 3) == 0;
	c->ips = arm64_take(r, id->pa_bits == 52 ? 7 : 6);
	least = c->ds || (c->granule == G64K && id->lva) ? 12 : 16;
	most = !id->ttst ? 39 : c->granule == G64K ? 47 : 48;
	c->txsz = least + arm64_take(r, most - least + 1);
}

static inline bool arm64_block(const struct arm64_case *c, int level)
{
	if (level == 3 || level == 2)
		return true;
	if (c->granule == G4K)
		return level == 1 || (level == 0 && c->ds);
	return c->granule == G16K && level == 1 && c->ds;
}

/* The descriptors of all levels; half of the cases grant nearly everything, so that enough of them succeed. */
static inline void arm64_make_entries(struct arm64_case *c, uint64_t *r)
{
	bool generous = arm64_take(r, 2);
	unsigned page = arm64_page_bits(c->granule);

	c->start = 3 - (int)((64 - c->txsz - 1 - page) / (page - 3));
	do
		c->leaf = c->start + (int)arm64_take(r, (unsigned)(4 - c->start));
	while (!arm64_block(c, c->leaf));
	for (int level = c->start; level < c->leaf; level++) {
		c->desc[level + 1] = ARM64_TABLE(level + 1) | 3;
		for (unsigned bit = 59; bit <= 62; bit++)
			if (arm64_take(r, generous ? 16 : 4) == 0)
				c->desc[level + 1] |= A64(bit);
	}
	c->desc[c->leaf + 1] = (ARM64_PAGE & ~(A64(arm64_shift(c, c->leaf)) - 1)) | (c->leaf == 3 ? 3 : 1) |
			       (uint64_t)arm64_take(r, 4) << 6 | (uint64_t)arm64_take(r, 2) << 11;
	if (arm64_take(r, 4))
		c->desc[c->leaf + 1] |= A64(10);
	if (arm64_take(r, 2))
		c->desc[c->leaf + 1] |= A64(51);
	for (unsigned bit = 53; bit <= 54; bit++)
		if (arm64_take(r, generous ? 8 : 2) == 0)
			c->desc[c->leaf + 1] |= A64(bit);
}

static inline uint64_t arm64_make_address(const struct arm64_case *c, uint64_t *r)
{
	uint64_t below = A64(64 - c->txsz) - 1, va;

	va = (ARM64_PAGE | (uint64_t)arm64_take(r, 1024) << 42) & below;
	if (c->upper)
		va |= ~below;
	if (c->tbi && c->access != A64_FETCH)
		va ^= (uint64_t)arm64_take(r, 256) << 56;
	return va + (c->access == A64_FETCH ? 0 : ARM64_DATA);
}

/* An output address that exists nowhere: looked at by AT, which touches nothing. */
static inline void arm64_high_page(struct arm64_case *c, unsigned output, uint64_t *r)
{
	uint64_t high = ((uint64_t)arm64_take(r, 1u << 20) << 32 | (uint64_t)arm64_take(r, 1u << 20) << 12) &
			(A64(output) - 1) & ~(A64(arm64_shift(c, c->leaf)) - 1);
	uint64_t d = c->desc[c->leaf + 1] & 0xfff0000000000fff;

	d |= high & 0x0000ffffffffffff;
	if (c->granule == G64K && output == 52)
		d |= (high >> 48) << 12;
	if (c->ds)
		d |= (high >> 48 & 3) << 48 | (high >> 50 & 3) << 8;
	c->desc[c->leaf + 1] = d | A64(10);
	c->access = A64_AT;
	c->pan = false;
	c->ha = false;
}

static inline void arm64_make_odd(struct arm64_case *c, const struct arm64_id *id, uint64_t *r)
{
	unsigned output = arm64_output_bits(c, id);
	int level = c->start + (int)arm64_take(r, (unsigned)(c->leaf - c->start + 1));
	unsigned pick = arm64_take(r, 1u << 20), top = c->tbi ? 54 : 63, first = 64 - c->txsz, most = c->ds ? 50 : 48;
	unsigned bad;

	switch (arm64_take(r, 16)) {
	case 0:
		c->desc[level + 1] &= ~A64(0);
		break;
	case 1:
		if (c->leaf == 3)
			c->desc[4] &= ~A64(1);
		break;
	case 2:
		/* bits below the size of a block are no part of the address; the highest of 52 are in other places */
		bad = level == c->leaf && arm64_shift(c, level) > output ? arm64_shift(c, level) : output;
		if (bad < most)
			c->desc[level + 1] |= A64(bad + pick % (most - bad));
		break;
	case 3:
		if (first + pick % (top - first + 1) != 55)
			c->va ^= A64(first + pick % (top - first + 1));
		break;
	case 4:
		if (output < 48)
			c->ttbr |= A64(output + pick % (48 - output));
		break;
	case 5:
		c->epd = true;
		break;
	case 6:
	case 7:
		arm64_high_page(c, output, r);
		break;
	}
}

static inline struct arm64_case arm64_case_make(unsigned number, const struct arm64_id *id)
{
	uint64_t r = arm64_mix(number);
	struct arm64_case c = { 0 };

	arm64_make_mode(&c, id, &r);
	arm64_make_entries(&c, &r);
	c.va = arm64_make_address(&c, &r);
	c.ttbr = ARM64_TABLE(c.start);
	c.marker = arm64_mix(r);
	arm64_make_odd(&c, id, &r);
	return c;
}

/* TCR_EL1: the half that is tried as the case says, the other one 4 KiB granules and 39 bits. */
static inline uint64_t arm64_tcr(const struct arm64_case *c)
{
	uint64_t txsz = c->txsz, tcr = (uint64_t)c->ips << 32;

	tcr |= c->ha ? A64(39) : 0;
	tcr |= c->hd ? A64(40) : 0;
	tcr |= c->ds ? A64(59) : 0;
	if (c->upper) {
		tcr |= 25 | txsz << 16 | (c->granule == G4K ? UINT64_C(2) << 30 : c->granule == G16K ? A64(30) :
				UINT64_C(3) << 30);
		tcr |= (c->tbi ? A64(38) : 0) | (c->epd ? A64(23) : 0) | (c->hpd ? A64(42) : 0);
	} else {
		tcr |= 25u << 16 | UINT64_C(2) << 30 | txsz | (c->granule == G4K ? 0 : c->granule == G16K ? A64(15) :
				A64(14));
		tcr |= (c->tbi ? A64(37) : 0) | (c->epd ? A64(7) : 0) | (c->hpd ? A64(41) : 0);
	}
	return tcr;
}

#endif
