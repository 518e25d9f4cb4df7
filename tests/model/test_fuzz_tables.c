/* SPDX-License-Identifier: MIT */
/*
 * Guests that nobody wrote: tables of random bytes and of entries with bytes
 * changed, which point to themselves, to each other's middle, to read-only
 * memory, to memory that comes when it is touched or not yet, and to where
 * nothing is; registers with bits changed. What a vCPU does with all this is
 * what the reference walkers say, whether registers are refused is what the
 * manuals say, and a sanitizer has nothing to say.
 *
 * All memory a guest has may serve as a table, so every store is followed by a
 * flush of everything: what may stay in caches is for test_stale.c.
 *
 *   0      data
 *   1 MiB  tables, mostly (AREA)
 *   6 MiB  read-only; from 6.5 MiB on nothing is executed either
 *   7 MiB  comes when touched; each 8th page only when the test lets it
 *   8 MiB  nothing, but for 4 MiB at the top of the physical addresses
 *
 * KAGE_SEED, KAGE_SEQUENCES, KAGE_STEPS (accesses a sequence), KAGE_FORMAT: see
 * tests/README.md. The seed is printed where something differs.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "format_guest.h"
#include "rng.h"

#define BIT(n) ((uint64_t)1 << (n))
#define MIB BIT(20)
#define AREA MIB
#define AREA_LEN MIB
#define ROM (6 * MIB)
#define ROM_NX (6 * MIB + MIB / 2)
#define TRAP (7 * MIB)
#define TRAP_PAGES 256
#define AUDIT_EVERY 500

struct fuzz {
	struct format_guest g; /* first */
	struct rng rng;
	unsigned format;
	uint64_t seed, refused, taken;
	uint8_t fresh[TRAP_PAGES * 4096]; /* what pages hold when they come */
	bool held[TRAP_PAGES];
};

enum { X86_32, X86_PAE, X86_4, X86_5, ARM_4K, ARM_16K, ARM_64K, ARM_WIDE = 16 };

static uint64_t below(struct fuzz *z, uint64_t n)
{
	return rng_below(&z->rng, n);
}

static bool one_in(struct fuzz *z, unsigned n)
{
	return below(z, n) == 0;
}

static bool is_arm(const struct fuzz *z)
{
	return z->format % ARM_WIDE >= ARM_4K;
}

/* -- memory --------------------------------------------------------------- */

static uint32_t prot_of(const struct format_guest *g, uint64_t gpa)
{
	if (gpa >= ROM && gpa < TRAP)
		return gpa < ROM_NX ? KAGE_READ | KAGE_EXEC : KAGE_READ;
	return KAGE_RWX;
}

static bool is_held(const struct format_guest *g, uint64_t gpa)
{
	const struct fuzz *z = (const struct fuzz *)g;

	return gpa >= TRAP && gpa < FG_LOW && z->held[(gpa - TRAP) >> 12];
}

static int touch(void *opaque, uint64_t gpa, void *page)
{
	struct fuzz *z = opaque;

	if (is_held(&z->g, gpa))
		return KAGE_WAIT;
	memcpy(page, z->fresh + (gpa - TRAP), 4096);
	return 0;
}

static uint64_t random_address(struct fuzz *z)
{
	switch (below(z, 16)) {
	case 0 ... 7: return AREA + below(z, AREA_LEN);
	case 8: return below(z, FG_LOW) & ~(2 * MIB - 1); /* large pages */
	case 9: return ROM + below(z, MIB);
	case 10 ... 11: return TRAP + below(z, MIB);
	case 12: return BIT(z->g.config.high_bit) + below(z, FG_HIGH);
	case 13: return rng_next(&z->rng);
	default: return below(z, FG_LOW);
	}
}

/* Nobody knows for which level. */
static uint64_t random_entry(struct fuzz *z)
{
	uint64_t x = rng_next(&z->rng), a = random_address(z) & (BIT(52) - 1) & ~(uint64_t)0xfff, e;

	if (is_arm(z)) {
		e = (a & (BIT(48) - 1)) | (x & 0xffc) | (one_in(z, 3) ? 0 : BIT(10)) | (one_in(z, 5) ? 1 : 3);
		e |= one_in(z, 4) ? x & 0x7ff8000000000000 : 0;
		if (z->format >= ARM_WIDE && !one_in(z, 8)) /* bits of high addresses */
			e &= z->format % ARM_WIDE == ARM_64K ? ~UINT64_C(0xf000) : ~UINT64_C(0x0003000000000300);
	} else {
		e = a | (x & 0xf78) | (one_in(z, 12) ? 0 : 1) | (one_in(z, 6) ? 0 : 6);
		e &= one_in(z, 4) ? ~(uint64_t)0 : ~BIT(7);
		e |= one_in(z, 6) ? x & 0xfff0000000000000 : 0;
	}
	switch (below(z, 24)) {
	case 0: return rng_next(&z->rng);
	case 1: return e ^ BIT(x >> 20 & 63);
	case 2: return e ^ (x >> 30 & 255) << (x >> 40 & 56);
	case 3: return one_in(z, 2) ? 0 : ~(uint64_t)0;
	default: return e;
	}
}

static uint64_t random_word(struct fuzz *z)
{
	if (z->format != X86_32)
		return random_entry(z);
	return (random_entry(z) & 0xffffffff) | random_entry(z) << 32;
}

static void fill(struct fuzz *z, uint64_t gpa, uint64_t len)
{
	uint64_t *to = fg_memory(&z->g, gpa);

	for (uint64_t i = 0; i < len / 8; i++)
		to[i] = random_word(z);
	fg_require(&z->g, !kage_vm_write(z->g.vm, gpa, to, len), "kage_vm_write");
}

static void make_memory(struct fuzz *z)
{
	struct format_guest *g = &z->g;

	fill(z, 0, ROM + MIB);
	fill(z, TRAP, MIB);
	memcpy(z->fresh, fg_memory(g, TRAP), sizeof(z->fresh));
	for (unsigned i = 0; i < TRAP_PAGES; i++)
		z->held[i] = one_in(z, 8);
	fg_require(g, !kage_vm_protect(g->vm, ROM, ROM_NX - ROM, KAGE_READ | KAGE_EXEC), "kage_vm_protect");
	fg_require(g, !kage_vm_protect(g->vm, ROM_NX, TRAP - ROM_NX, KAGE_READ), "kage_vm_protect");
	fg_require(g, !kage_vm_unmap(g->vm, TRAP, MIB), "kage_vm_unmap");
	fg_require(g, !kage_vm_map(g->vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_TRAP, .gpa = TRAP, .len = MIB,
						   .touch = touch, .opaque = z)),
		   "kage_vm_map");
	g->prot = prot_of;
	g->waits = is_held;
}

/* -- registers ------------------------------------------------------------ */

/* One bit, now and then more, of a register that may hold anything. */
static uint64_t flipped(struct fuzz *z, uint64_t v)
{
	while (one_in(z, 3))
		v ^= BIT(below(z, 64));
	return v;
}

/* Intel SDM vol. 3A 2.5, 2.2.1, 4.1.1, 4.4.1: would the CPU have them? What Kage does not know it refuses as well. */
static bool x86_good(const struct fuzz *z, const struct ref_cpu *c)
{
	bool pg = c->cr0 & BIT(31), lme = c->efer & BIT(8), lma = c->efer & BIT(10), pae = c->cr4 & BIT(5);
	uint64_t cr3 = c->cr3;

	if ((c->cr0 & ~UINT64_C(0xe005003f)) || (pg && !(c->cr0 & 1)) || ((c->cr0 & BIT(29)) && !(c->cr0 & BIT(30))))
		return false;
	/* of EFER: SCE, LME, LMA, NXE, and AMD's SVME to TCE, and 21 */
	if ((c->efer & ~UINT64_C(0x20fd01)) || lma != (lme && pg) || (pg && lme && !pae))
		return false;
	/* bits 15, 23 (CET), 24 (PKS) and from 26 on */
	if ((c->cr4 & ~UINT64_C(0x27f7fff)) || ((c->cr4 & BIT(17)) && !lma))
		return false;
	if (c->cr4 & BIT(17))
		cr3 &= ~BIT(63);
	if (cr3 >> c->phys_bits)
		return false;
	for (unsigned i = 0; i < 4 && pg && pae && !lme; i++)
		if ((c->pdpte[i] & 1) && ((c->pdpte[i] & 0x1e6) || c->pdpte[i] >> c->phys_bits))
			return false;
	return c->cpl <= 3;
}

static struct ref_cpu x86_random(struct fuzz *z)
{
	struct ref_cpu c = z->g.x86;
	bool lm = z->format == X86_4 || z->format == X86_5;

	c.cr0 = flipped(z, 0x80000011 | (one_in(z, 2) ? BIT(16) : 0));
	c.cr4 = (z->format == X86_32 ? 0 : BIT(5)) | (z->format == X86_5 ? BIT(12) : 0) |
		(rng_next(&z->rng) & (BIT(4) | BIT(7) | BIT(20) | BIT(21) | BIT(22)));
	c.cr4 = flipped(z, c.cr4 | (lm && one_in(z, 2) ? BIT(17) : 0));
	c.efer = flipped(z, (lm ? 0x500 : 0) | (one_in(z, 4) ? 0 : 0x800));
	c.cr3 = (random_address(z) & (BIT(c.phys_bits) - 1) & ~(uint64_t)0xfff) | (one_in(z, 4) ? below(z, 4096) : 0);
	if (!one_in(z, 3))
		c.cr3 = AREA + below(z, AREA_LEN / 4096) * 4096;
	c.cr3 = flipped(z, c.cr3);
	c.cpl = one_in(z, 20) ? 4 + (uint32_t)below(z, 1000) : one_in(z, 2) ? 3 : 0;
	c.rflags = rng_next(&z->rng);
	c.pkru = (uint32_t)(rng_next(&z->rng) & rng_next(&z->rng));
	for (unsigned i = 0; i < 4; i++) {
		c.pdpte[i] = (random_address(z) & (BIT(c.phys_bits) - 1) & ~(uint64_t)0xfff) | !one_in(z, 8);
		if (one_in(z, 8))
			c.pdpte[i] = flipped(z, c.pdpte[i]);
	}
	return c;
}

static void x86_registers(struct fuzz *z)
{
	struct ref_cpu c = x86_random(z);
	struct kage_x86_regs r = { .cr0 = c.cr0, .cr3 = c.cr3, .cr4 = c.cr4, .efer = c.efer, .rflags = c.rflags,
				   .cpl = c.cpl, .pkru = c.pkru, .flags = KAGE_X86_PDPTES };
	bool good = x86_good(z, &c);
	int err;

	memcpy(r.pdpte, c.pdpte, sizeof(r.pdpte));
	err = kage_vcpu_set_regs(z->g.vcpu, &r, sizeof(r));
	if (good != !err || (err && err != -22 && err != -95))
		fg_fail(&z->g, "cr0 %llx cr3 %llx cr4 %llx efer %llx cpl %u: %d, should be %s",
			(unsigned long long)c.cr0, (unsigned long long)c.cr3, (unsigned long long)c.cr4,
			(unsigned long long)c.efer, c.cpl, err, good ? "taken" : "refused");
	if (err) {
		z->refused++;
		return;
	}
	z->taken++;
	z->g.x86 = c;
	z->g.x86.cr3 &= ~BIT(63);
}

static void arm64_registers(struct fuzz *z)
{
	static const struct {
		uint64_t tg0, tg1;
		unsigned least;
	} granules[] = { { 0, 2, 16 }, { 2, 1, 16 }, { 1, 3, 16 } };
	unsigned granule = z->format % ARM_WIDE - ARM_4K;
	bool wide = z->format >= ARM_WIDE;
	struct arm64_ref_cpu c = z->g.arm64;
	struct kage_arm64_regs r;
	bool good;
	int err;

	c.sctlr = flipped(z, (one_in(z, 12) ? 0 : 1) | (rng_next(&z->rng) & (BIT(19) | BIT(57))));
	c.tcr = (16 + below(z, 28)) | (16 + below(z, 28)) << 16 | granules[granule].tg0 << 14 |
		granules[granule].tg1 << 30 | (uint64_t)(wide ? 6 : 5) << 32 |
		(rng_next(&z->rng) & (BIT(37) | BIT(38) | BIT(39) | BIT(40) | BIT(41) | BIT(42)));
	c.tcr = flipped(z, c.tcr | (wide && one_in(z, 2) ? BIT(59) : 0));
	c.ttbr0 = flipped(z, AREA + (below(z, AREA_LEN) & ~UINT64_C(63)));
	c.ttbr1 = flipped(z, one_in(z, 3) ? random_address(z) : AREA + (below(z, AREA_LEN) & ~UINT64_C(63)));
	c.pstate = flipped(z, (one_in(z, 2) ? 4 : 0) | (one_in(z, 3) ? BIT(22) : 0));
	r = (struct kage_arm64_regs){ .sctlr = c.sctlr, .tcr = c.tcr, .ttbr0 = c.ttbr0, .ttbr1 = c.ttbr1,
				      .pstate = c.pstate };
	err = kage_vcpu_set_regs(z->g.vcpu, &r, sizeof(r));
	good = (c.pstate >> 2 & 3) <= 1 && !(c.sctlr & BIT(25)); /* EL2 and EL3 are not here, nor are big-endian tables */
	if (good != !err)
		fg_fail(&z->g, "sctlr %llx pstate %llx: %d, should be %s", (unsigned long long)c.sctlr,
			(unsigned long long)c.pstate, err, good ? "taken" : "refused");
	z->refused += !good;
	z->taken += good;
	if (good)
		z->g.arm64 = c;
}

static void new_registers(struct fuzz *z)
{
	if (is_arm(z))
		arm64_registers(z);
	else
		x86_registers(z);
	fg_flush(&z->g, KAGE_FLUSH_ALL, 0);
}

/* -- steps ---------------------------------------------------------------- */

/* Mostly one that the registers have an opinion about. */
static uint64_t random_va(struct fuzz *z)
{
	uint64_t x = rng_next(&z->rng) & ~(uint64_t)7, tcr = z->g.arm64.tcr;
	bool upper = one_in(z, 3), odd = one_in(z, 16);
	unsigned bits;

	if (is_arm(z)) {
		bits = 64 - (tcr >> (upper ? 16 : 0) & 63);
		if (!(z->g.arm64.sctlr & 1))
			x = odd ? x : random_address(z) & ~(uint64_t)7;
		else if (!odd && bits < 64)
			x = upper ? x | ~(BIT(bits) - 1) : x & (BIT(bits) - 1);
		return x;
	}
	if (!(z->g.x86.cr0 & BIT(31)))
		return random_address(z) & 0xfffffff8;
	if (!(z->g.x86.efer & BIT(10)))
		return x & 0xffffffff;
	bits = z->g.x86.cr4 & BIT(12) ? 56 : 47;
	return odd ? x : upper ? x | ~(BIT(bits) - 1) : x & (BIT(bits) - 1);
}

static void change_memory(struct fuzz *z)
{
	uint64_t gpa = (one_in(z, 4) ? below(z, ROM) : AREA + below(z, AREA_LEN)) & ~(uint64_t)7;

	switch (below(z, 8)) {
	case 0: /* a page anew, or what is there once more */
		gpa &= ~(uint64_t)0xfff;
		if (one_in(z, 2)) {
			fill(z, gpa, 4096);
		} else {
			memcpy(fg_memory(&z->g, gpa), fg_memory(&z->g, AREA), 4096);
			fg_require(&z->g, !kage_vm_write(z->g.vm, gpa, fg_memory(&z->g, gpa), 4096), "kage_vm_write");
		}
		break;
	case 1:
		z->held[below(z, TRAP_PAGES)] = false;
		break;
	default:
		fg_write(&z->g, gpa, random_word(z), 8);
	}
	fg_flush(&z->g, KAGE_FLUSH_ALL, 0);
}

static void one_step(struct fuzz *z)
{
	enum fg_access access = (enum fg_access)below(z, 3);
	uint64_t va, gpa;

	if (one_in(z, 16))
		new_registers(z);
	else if (one_in(z, 8))
		change_memory(z);
	va = random_va(z);
	if (one_in(z, 2))
		fg_translate(&z->g, va,
			     !is_arm(z) && one_in(z, 4) && access != FG_FETCH ?
				     access == FG_READ ? FG_IMPLICIT_READ : FG_IMPLICIT_WRITE : access);
	if (fg_do(&z->g, va, access, random_word(z), &gpa) && access == FG_WRITE)
		fg_flush(&z->g, KAGE_FLUSH_ALL, 0);
}

static void begin(struct fuzz *z, unsigned format, uint64_t seed)
{
	static const unsigned x86_bits[] = { 36, 40, 46, 52 }, arm64_bits[] = { 36, 40, 44, 48 };
	struct fg_config config = { .arch = KAGE_ARCH_X86 };
	struct ref_cpu x86 = { .page1gb = true };
	struct arm64_ref_cpu arm64 = { .haf = true, .hd = true, .pan = true, .epan = true, .hpds = true, .ttst = true,
				       .gran16 = true, .gran64 = true };

	memset(z, 0, sizeof(*z));
	z->rng = rng_seed(seed);
	z->format = format;
	z->seed = seed;
	if (is_arm(z)) {
		arm64.lva = arm64.lpa = arm64.lpa2 = format >= ARM_WIDE;
		config = (struct fg_config){ .arch = KAGE_ARCH_ARM64, .features = format >= ARM_WIDE ? 0xfff : 0xf1f };
		config.phys_bits = arm64.pa_bits = format >= ARM_WIDE ? 52 : arm64_bits[below(z, 4)];
	} else {
		config.features = 0x7f;
		config.phys_bits = x86.phys_bits = x86_bits[below(z, 4)];
	}
	config.high_bit = format == X86_32 ? 31 : config.phys_bits - 1;
	fg_create(&z->g, &config);
	z->g.x86 = x86;
	z->g.arm64 = arm64;
	snprintf(z->g.about, sizeof(z->g.about), "seed %llu: at the start", (unsigned long long)seed);
	make_memory(z);
}

struct total {
	unsigned long translations, granted, faults, mmio, outside, waits, flags_set, refused, taken;
	uint64_t kinds;
};

static void one_sequence(const struct fg_case *c, uint64_t seed, uint64_t steps, struct total *t)
{
	static struct fuzz z;

	begin(&z, c->arg, seed);
	for (uint64_t i = 0; i < steps; i++) {
		snprintf(z.g.about, sizeof(z.g.about),
			 "%s seed %llu step %llu; again: KAGE_FORMAT=%s KAGE_SEED=%llu KAGE_SEQUENCES=1", c->name,
			 (unsigned long long)seed, (unsigned long long)i, c->name, (unsigned long long)seed);
		if (i == 0)
			new_registers(&z);
		one_step(&z);
		if (i % AUDIT_EVERY == AUDIT_EVERY - 1)
			fg_audit(&z.g);
	}
	memset(z.held, 0, sizeof(z.held));
	fg_compare_all(&z.g);
	fg_audit(&z.g);
	t->translations += z.g.count.translations;
	t->granted += z.g.count.granted;
	t->faults += z.g.count.faults;
	t->mmio += z.g.count.mmio;
	t->outside += z.g.count.outside;
	t->waits += z.g.count.waits;
	t->flags_set += z.g.count.flags_set;
	t->kinds |= z.g.count.fault_kinds;
	t->refused += z.refused;
	t->taken += z.taken;
	fg_destroy(&z.g);
}

static void run_format(const struct fg_case *c)
{
	uint64_t seed = env_number("KAGE_SEED", 1), sequences = env_number("KAGE_SEQUENCES", 5);
	uint64_t steps = env_number("KAGE_STEPS", 2000);
	struct total t = { 0 };

	for (uint64_t i = 0; i < sequences; i++)
		one_sequence(c, seed + i, steps, &t);
	printf("%s: %lu translations (seeds %llu to %llu): %lu granted, %lu faults of %d kinds, %lu MMIO, %lu with a table "
	       "outside memory, %lu that wait for one, %lu entries updated; registers: %lu taken, %lu refused\n",
	       c->name, t.translations, (unsigned long long)seed, (unsigned long long)(seed + sequences - 1), t.granted,
	       t.faults, __builtin_popcountll(t.kinds), t.mmio, t.outside, t.waits, t.flags_set, t.taken, t.refused);
	if (sequences * steps >= 10000 &&
	    (t.granted < t.translations / 50 || t.faults < t.translations / 50 || !t.mmio || !t.outside || !t.waits ||
	     !t.flags_set || !t.taken || !t.refused)) {
		fprintf(stderr, "%s: the sample is too one-sided\n", c->name);
		exit(EXIT_FAILURE);
	}
}

int main(void)
{
	static const struct fg_case formats[] = {
		{ "x86-32bit", run_format, X86_32 },
		{ "x86-pae", run_format, X86_PAE },
		{ "x86-4level", run_format, X86_4 },
		{ "x86-5level", run_format, X86_5 },
		{ "arm64-4k", run_format, ARM_4K },
		{ "arm64-16k", run_format, ARM_16K },
		{ "arm64-64k", run_format, ARM_64K },
		{ "arm64-4k-52bit", run_format, ARM_4K | ARM_WIDE },
		{ "arm64-16k-52bit", run_format, ARM_16K | ARM_WIDE },
		{ "arm64-64k-52bit", run_format, ARM_64K | ARM_WIDE },
	};

	return fg_run_cases("fuzzed tables", formats, sizeof(formats) / sizeof(formats[0]));
}
