/* SPDX-License-Identifier: MIT */
#include "format_space.h"

#define BIT(n) ((uint64_t)1 << (n))
#define TABLE_GPA(level) (BIT(20) + (uint64_t)(level) * BIT(16))
#define PAGES_OFFSET BIT(21) /* of the pages, in low and in high memory */
#define X86_PHYS_BITS 38     /* with PSE-36 some address bits of a 4 MiB page exist and some do not */
#define MANY_TABLES 4

const struct space spaces[] = {
	{ "arm64-4k", true, false, 12, 8, 48, 3, 0 },
	{ "arm64-4k-2m", true, false, 12, 8, 48, 3, 1 },
	{ "arm64-4k-1g", true, false, 12, 8, 48, 3, 2 },
	{ "arm64-4k-52bit", true, true, 12, 8, 52, 4, 0 },
	{ "arm64-4k-52bit-2m", true, true, 12, 8, 52, 4, 1 },
	{ "arm64-4k-52bit-1g", true, true, 12, 8, 52, 4, 2 },
	{ "arm64-4k-52bit-512g", true, true, 12, 8, 52, 4, 3 },
	{ "arm64-16k", true, false, 14, 8, 48, 3, 0 },
	{ "arm64-16k-32m", true, false, 14, 8, 48, 3, 1 },
	{ "arm64-16k-52bit", true, true, 14, 8, 52, 3, 0 },
	{ "arm64-16k-52bit-32m", true, true, 14, 8, 52, 3, 1 },
	{ "arm64-16k-52bit-64g", true, true, 14, 8, 52, 3, 2 },
	{ "arm64-64k", true, false, 16, 8, 48, 2, 0 },
	{ "arm64-64k-512m", true, false, 16, 8, 48, 2, 1 },
	{ "arm64-64k-52bit", true, true, 16, 8, 52, 2, 0 },
	{ "arm64-64k-52bit-512m", true, true, 16, 8, 52, 2, 1 },
	{ "arm64-64k-52bit-4t", true, true, 16, 8, 52, 2, 2 },
	{ "x86-4level", false, false, 12, 8, 48, 3, 0 },
	{ "x86-4level-2m", false, false, 12, 8, 48, 3, 1 },
	{ "x86-4level-1g", false, false, 12, 8, 48, 3, 2 },
	{ "x86-5level", false, false, 12, 8, 57, 4, 0 },
	{ "x86-5level-2m", false, false, 12, 8, 57, 4, 1 },
	{ "x86-5level-1g", false, false, 12, 8, 57, 4, 2 },
	{ "x86-pae", false, false, 12, 8, 32, 1, 0 },
	{ "x86-pae-2m", false, false, 12, 8, 32, 1, 1 },
	{ "x86-32bit", false, false, 12, 4, 32, 1, 0 },
	{ "x86-32bit-4m", false, false, 12, 4, 32, 1, 1 },
};
const unsigned nspaces = sizeof(spaces) / sizeof(spaces[0]);

static bool long_mode(const struct space *s)
{
	return !s->arm64 && s->va_bits > 32;
}

bool space_is_pae(const struct space *s)
{
	return !s->arm64 && s->va_bits == 32 && s->entry_bytes == 8;
}

static unsigned tables(const struct space *s)
{
	return s->top - s->leaf;
}

static bool many(const struct space *s)
{
	return tables(s) >= MANY_TABLES;
}

static unsigned rights_bits(const struct space *s)
{
	return s->arm64 ? 4 : s->entry_bytes == 8 ? 3 : 2;
}

/* Of all table entries together. */
static unsigned tables_bits(const struct space *s)
{
	unsigned accessed = s->arm64 ? 0 : many(s) ? 1 : tables(s);

	return tables(s) * rights_bits(s) + accessed;
}

static unsigned leaf_bits(const struct space *s)
{
	return s->arm64 ? 6 + !many(s) : rights_bits(s) + 2;
}

static unsigned mode_bits(const struct space *s)
{
	return s->arm64 ? 8 : long_mode(s) ? 9 : 7;
}

static unsigned accesses(const struct space *s)
{
	return s->arm64 ? 3 : 5;
}

unsigned space_modes(const struct space *s)
{
	return 1u << mode_bits(s);
}

uint64_t space_size(const struct space *s)
{
	return BIT(mode_bits(s) + tables_bits(s) + leaf_bits(s)) * accesses(s);
}

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
	while (b) {
		uint64_t c = a % b;

		a = b;
		b = c;
	}
	return a;
}

uint64_t space_stride(const struct space *s)
{
	uint64_t size = space_size(s), n = size / 1000 * 618 + 1;

	while (common_divisor(n, size) != 1)
		n++;
	return n;
}

/* -- registers ------------------------------------------------------------ */

struct fg_config space_config(const struct space *s)
{
	if (s->arm64)
		return (struct fg_config){
			.arch = KAGE_ARCH_ARM64,
			.phys_bits = s->wide ? 52 : 48,
			.high_bit = s->wide ? 51 : 47,
			.features = KAGE_ARM64_GRAN16 | KAGE_ARM64_GRAN64 | KAGE_ARM64_HAF | KAGE_ARM64_HD |
				    KAGE_ARM64_PAN | KAGE_ARM64_EPAN | KAGE_ARM64_HPDS |
				    (s->wide ? KAGE_ARM64_LVA | KAGE_ARM64_LPA | KAGE_ARM64_LPA2 : 0),
		};
	return (struct fg_config){
		.arch = KAGE_ARCH_X86,
		.phys_bits = X86_PHYS_BITS,
		.high_bit = X86_PHYS_BITS - 2,
		.features = KAGE_X86_NX | KAGE_X86_SMEP | KAGE_X86_SMAP | KAGE_X86_PKU | KAGE_X86_LA57 |
			    KAGE_X86_PAGE1GB,
	};
}

static void arm64_registers(const struct space *s, unsigned mode, struct arm64_ref_cpu *c)
{
	bool upper = mode & 128, hpd = mode & 64;
	uint64_t size = 64 - s->va_bits, tg0 = s->page_bits == 12 ? 0 : s->page_bits == 14 ? 2 : 1;
	uint64_t tg1 = s->page_bits == 12 ? 2 : s->page_bits == 14 ? 1 : 3;

	*c = (struct arm64_ref_cpu){ .pa_bits = s->wide ? 52 : 48, .haf = true, .hd = true, .pan = true, .epan = true,
				     .hpds = true, .lva = s->wide, .lpa = s->wide, .lpa2 = s->wide, .gran16 = true,
				     .gran64 = true };
	c->pstate = (mode & 1 ? 0 : 4) | (mode & 2 ? BIT(22) : 0);
	c->sctlr = 1 | (mode & 4 ? BIT(19) : 0) | (mode & 8 ? BIT(57) : 0);
	c->tcr = size | size << 16 | tg0 << 14 | tg1 << 30 | (uint64_t)(s->wide ? 6 : 5) << 32;
	c->tcr |= (mode & 16 ? BIT(39) : 0) | (mode & 32 ? BIT(40) : 0);
	c->tcr |= (hpd != upper ? BIT(41) : 0) | (hpd == upper ? BIT(42) : 0); /* one of them */
	c->tcr |= upper ? BIT(7) : BIT(23); /* EPD of the other half */
	c->tcr |= s->wide && s->page_bits != 16 ? BIT(59) : 0;
	c->ttbr0 = c->ttbr1 = TABLE_GPA(s->top);
}

static void x86_registers(const struct space *s, unsigned mode, struct ref_cpu *c)
{
	/* the page's key is 5 */
	bool key = mode & 64, ad = mode & 128, wd = mode & 256;

	*c = (struct ref_cpu){ .phys_bits = X86_PHYS_BITS, .page1gb = true };
	c->cpl = mode & 1 ? 3 : 0;
	c->cr0 = 0x80000011 | (mode & 2 ? BIT(16) : 0);
	c->cr4 = (s->entry_bytes == 8 ? BIT(5) : 0) | (s->va_bits == 57 ? BIT(12) : 0) | (mode & 4 ? BIT(20) : 0) |
		 (mode & 8 ? BIT(21) : 0) | (key ? BIT(22) : 0);
	c->cr4 |= (s->entry_bytes == 4 && s->leaf) || (mode & 1) ? BIT(4) : 0;
	c->rflags = 2 | (mode & 16 ? BIT(18) : 0);
	c->efer = (mode & 32 ? 0x800 : 0) | (long_mode(s) ? 0x500 : 0);
	c->cr3 = space_is_pae(s) ? SPACE_PDPT : TABLE_GPA(s->top);
	c->pkru = long_mode(s) ? (ad ? BIT(10) : 0) | (wd ? BIT(11) : 0) : 0xffffffff;
	if (space_is_pae(s))
		c->pdpte[2] = SPACE_PDPTE;
}

void space_registers(const struct space *s, unsigned mode, struct ref_cpu *x86, struct arm64_ref_cpu *arm64)
{
	if (s->arm64)
		arm64_registers(s, mode, arm64);
	else
		x86_registers(s, mode, x86);
}

/* -- combinations --------------------------------------------------------- */

static uint64_t hash_of(uint64_t number)
{
	number *= UINT64_C(0x9e3779b97f4a7c15);
	return number ^ number >> 32;
}

static unsigned take(uint64_t *number, unsigned bits)
{
	unsigned v = (unsigned)(*number & (BIT(bits) - 1));

	*number >>= bits;
	return v;
}

static unsigned shift_of(const struct space *s, unsigned level)
{
	return s->page_bits + level * (s->page_bits - (s->entry_bytes == 8 ? 3 : 2));
}

static unsigned index_of(const struct space *s, unsigned level)
{
	return s->arm64 && s->page_bits == 14 && s->va_bits == 48 && level == 3 ? 1 : 2 + level;
}

static uint64_t arm64_leaf(const struct space *s, unsigned bits, uint64_t hash)
{
	uint64_t e = (s->leaf ? 1 : 3) | (uint64_t)(bits & 3) << 6 | (uint64_t)(bits >> 2 & 1) << 10 |
		     (uint64_t)(bits >> 3 & 1) << 51 | (uint64_t)(bits >> 4 & 3) << 53;

	e |= many(s) ? (hash >> 8 & 1) << 52 : (uint64_t)(bits >> 6 & 1) << 52;
	return e | (hash >> 9 & 1) << 11; /* nG */
}

static uint64_t arm64_address(const struct space *s, uint64_t a)
{
	uint64_t e = a & (BIT(48) - 1);

	if (s->wide && s->page_bits == 16)
		return e | (a >> 48 & 15) << 12;
	return s->wide ? e | (a >> 48 & 3) << 48 | (a >> 50 & 3) << 8 : e;
}

/* P, and R/W, U/S, XD as bits 0 to 2 say. */
static uint64_t x86_rights(unsigned bits)
{
	return 1 | (bits & 1 ? 2 : 0) | (bits & 2 ? 4 : 0) | (bits & 4 ? BIT(63) : 0);
}

static uint64_t x86_leaf(const struct space *s, unsigned bits, uint64_t a)
{
	unsigned n = rights_bits(s);
	uint64_t e = x86_rights(bits & ((1u << n) - 1)) | (bits >> n & 1 ? 0x20 : 0) | (bits >> n & 2 ? 0x40 : 0);

	if (long_mode(s))
		e |= (uint64_t)5 << 59;
	if (s->leaf)
		e |= 0x80;
	return s->entry_bytes == 4 && s->leaf ? e | (a & 0xffffffff) | (a >> 32 & 0xff) << 13 : e | a;
}

/* Where the page is: low or high memory, and which of sixteen. */
static uint64_t target_of(const struct space *s, uint64_t hash)
{
	bool high = hash >> 16 & 1 && (s->entry_bytes == 8 || s->leaf);

	return (high ? BIT(space_config(s).high_bit) : 0) + PAGES_OFFSET + (hash >> 17 & 15) * BIT(16);
}

static uint64_t table_entry(const struct space *s, unsigned level, unsigned rights, bool accessed, uint64_t hash)
{
	uint64_t next = TABLE_GPA(level - 1);

	if (s->arm64)
		return next | 3 | (uint64_t)rights << 59 | (hash >> (24 + level) & 1) << 63;
	return next | x86_rights(rights) | (accessed ? 0x20 : 0);
}

static void tables_of(const struct space *s, unsigned bits, uint64_t hash, struct space_case *c)
{
	unsigned n = rights_bits(s), accessed = bits >> (tables(s) * n);

	for (unsigned level = s->top; level > s->leaf; level--, bits >>= n, c->n++) {
		bool a = accessed >> (many(s) ? 0 : level - s->leaf - 1) & 1;

		c->entry[c->n].gpa = TABLE_GPA(level) + (uint64_t)index_of(s, level) * s->entry_bytes;
		c->entry[c->n].value = table_entry(s, level, bits & ((1u << n) - 1), a, hash);
	}
}

static uint64_t address_of(const struct space *s, unsigned mode)
{
	uint64_t va = space_is_pae(s) ? BIT(31) : 0;

	for (unsigned level = s->leaf; level <= s->top; level++)
		va |= (uint64_t)index_of(s, level) << shift_of(s, level);
	return s->arm64 && mode & 128 ? va | ~(BIT(s->va_bits) - 1) : va;
}

void space_case_of(const struct space *s, uint64_t number, struct space_case *c)
{
	uint64_t hash = hash_of(number), size = BIT(shift_of(s, s->leaf)), target = target_of(s, hash), a;
	unsigned leaf, all;

	c->access = (enum fg_access)(number % accesses(s));
	number /= accesses(s);
	leaf = take(&number, leaf_bits(s));
	all = take(&number, tables_bits(s));
	c->mode = (unsigned)number;
	c->n = 0;
	tables_of(s, all, hash, c);
	a = target & ~(size - 1);
	c->entry[c->n].gpa = TABLE_GPA(s->leaf) + (uint64_t)index_of(s, s->leaf) * s->entry_bytes;
	c->entry[c->n++].value =
		s->arm64 ? arm64_leaf(s, leaf, hash) | arm64_address(s, a) : x86_leaf(s, leaf, a);
	c->va = address_of(s, c->mode) | (target & (size - 1)) | 0x120;
}
