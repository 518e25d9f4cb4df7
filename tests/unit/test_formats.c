/* SPDX-License-Identifier: MIT */
/*
 * Guests of every table format through the public API: what a vCPU's accesses
 * find in shadow tables is what a walk of the guest's tables says, while the
 * tables change under them; faults, accessed and dirty state, by hand.
 *
 * struct fmt tells how a guest of a format builds its tables; that each entry
 * means what the architecture says is held against reference walkers in
 * tests/model. KAGE_SEED and KAGE_STEPS choose the random sequence.
 */
#include "guest_tables.h"

#define A_VALID 1ull
#define A_TABLE 2ull
#define A_EL0	0x40ull
#define A_RO	0x80ull
#define A_AF	0x400ull
#define A_DBM	(1ull << 51)
#define A_PXN	(1ull << 53)
#define A_UXN	(1ull << 54)

#define ARM_ALL 0xfffu
#define RAM	(96 * MIB)
#define POOL	(16 * MIB) /* tables live in [POOL, 2 * POOL), contents above */

/* A format, and how large its addresses are. */
struct fmt {
	const char *name;
	uint32_t arch;
	unsigned shift, stride, bytes; /* of a page; log2 entries of a table; of an entry */
	unsigned bits;		       /* of addresses of a half */
	unsigned blocks;	       /* highest level that may map memory */
	uint64_t tcr;
	bool pae;
};

#define ARM(n, sh, b, bl, t) \
	{ .name = n, .arch = KAGE_ARCH_ARM64, .shift = sh, .stride = (sh)-3, .bytes = 8, .bits = b, .blocks = bl, .tcr = t }
#define TG_4K  (2ull << 30)
#define TG_16K (2ull << 14 | 1ull << 30)
#define TG_64K (1ull << 14 | 3ull << 30)
#define TCR_DS (1ull << 59)

static const struct fmt fmts[] = {
	ARM("arm64 4k 48", 12, 48, 2, TG_4K),
	ARM("arm64 4k 39", 12, 39, 2, TG_4K),
	ARM("arm64 4k 36", 12, 36, 2, TG_4K),
	ARM("arm64 4k 31", 12, 31, 1, TG_4K),
	ARM("arm64 4k 30", 12, 30, 1, TG_4K),
	ARM("arm64 4k 20", 12, 20, 0, TG_4K),
	ARM("arm64 4k 52", 12, 52, 2, TG_4K | TCR_DS),
	ARM("arm64 16k 48", 14, 48, 1, TG_16K),
	ARM("arm64 16k 47", 14, 47, 1, TG_16K),
	ARM("arm64 16k 36", 14, 36, 1, TG_16K),
	ARM("arm64 16k 25", 14, 25, 0, TG_16K),
	ARM("arm64 16k 52", 14, 52, 1, TG_16K | TCR_DS),
	ARM("arm64 64k 52", 16, 52, 1, TG_64K),
	ARM("arm64 64k 48", 16, 48, 1, TG_64K),
	ARM("arm64 64k 42", 16, 42, 1, TG_64K),
	ARM("arm64 64k 29", 16, 29, 0, TG_64K),
	{ .name = "x86 PAE", .arch = KAGE_ARCH_X86, .shift = 12, .stride = 9, .bytes = 8, .bits = 32, .blocks = 1, .pae = true },
	{ .name = "x86 32-bit", .arch = KAGE_ARCH_X86, .shift = 12, .stride = 10, .bytes = 4, .bits = 32, .blocks = 1 },
};
#define FMTS (int)(sizeof(fmts) / sizeof(fmts[0]))

static struct guest g;
static const struct fmt *f;
static struct kage_arm64_regs arm;
static uint64_t root[2];
static uint64_t seed;

static uint64_t rnd(uint64_t n)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (seed * 0x2545f4914f6cdd1dull >> 11) % n;
}

static bool is_arm(void)
{
	return f->arch == KAGE_ARCH_ARM64;
}

static uint64_t table_bytes(void)
{
	return (uint64_t)f->bytes << f->stride;
}

static unsigned shift_of(unsigned level)
{
	return f->shift + level * f->stride;
}

static unsigned top_level(void)
{
	return f->pae ? 2 : (f->bits - f->shift - 1) / f->stride;
}

static uint64_t new_table(void)
{
	static const char zero[65536];
	uint64_t gpa = (g.next_table + table_bytes() - 1) & ~(table_bytes() - 1);

	g.next_table = gpa + table_bytes();
	ck_assert_uint_lt(g.next_table, 2 * POOL);
	ck_assert_int_eq(kage_vm_write(g.vm, gpa, zero, table_bytes()), KAGE_OK);
	return gpa;
}

static uint64_t get(uint64_t at)
{
	uint64_t v = 0;

	ck_assert_int_eq(kage_vm_read(g.vm, at, &v, f->bytes), KAGE_OK);
	return v;
}

static void put(uint64_t at, uint64_t v)
{
	ck_assert_int_eq(kage_vm_write(g.vm, at, &v, f->bytes), KAGE_OK);
}

static uint64_t table_entry(uint64_t table, unsigned level)
{
	if (is_arm())
		return table | A_VALID | A_TABLE;
	return table | PTE_P | (f->pae && level == 2 ? 0 : PTE_W | PTE_U | PTE_A);
}

/* KAGE_WRITE, KAGE_EXEC for both modes, KAGE_READ for the user. */
static uint64_t leaf_entry(uint64_t gpa, unsigned level, uint32_t perm)
{
	if (is_arm())
		return gpa | A_VALID | (level ? 0 : A_TABLE) | A_AF | (perm & KAGE_WRITE ? 0 : A_RO) |
		       (perm & KAGE_READ ? A_EL0 : 0) | (perm & KAGE_EXEC ? 0 : A_PXN | A_UXN);
	return gpa | PTE_P | (level ? PTE_PS : 0) | (perm & KAGE_WRITE ? PTE_W : 0) | (perm & KAGE_READ ? PTE_U : 0) |
	       (f->bytes == 8 && !(perm & KAGE_EXEC) ? PTE_NX : 0);
}

static uint64_t address_of(uint64_t entry)
{
	return entry & (is_arm() ? ((1ull << 48) - 1) & ~((1ull << f->shift) - 1) : PTE_ADDR & (f->bytes == 4 ? 0xffffffff : ~0ull));
}

/* Where the entry of `level` for gva lies; tables above are made. 0: something that is no table of ours is in the way. */
static uint64_t entry_at(uint64_t gva, unsigned level)
{
	unsigned half = is_arm() && gva >> 55 & 1;
	uint64_t table = root[half], offset = gva & ((1ull << f->bits) - 1);

	for (unsigned l = top_level();; l--) {
		uint64_t at = table + (offset >> shift_of(l) & ((1ull << f->stride) - 1)) * f->bytes, e;

		if (l == level)
			return at;
		e = get(at);
		if (!(e & 1))
			put(at, e = table_entry(new_table(), l));
		else if (is_arm() ? !(e & A_TABLE) : l < 2 && (e & PTE_PS))
			return 0;
		table = address_of(e);
		if (table < POOL || table >= 2 * POOL)
			return 0;
	}
}

static void map(uint64_t gva, uint64_t gpa, unsigned level, uint32_t perm)
{
	uint64_t at = entry_at(gva, level);

	ck_assert_uint_ne(at, 0);
	put(at, leaf_entry(gpa, level, perm));
}

static int set_regs(void)
{
	return is_arm() ? kage_vcpu_set_regs(g.cpu, &arm, sizeof(arm)) : guest_set_regs(&g);
}

static void user(bool on)
{
	arm.pstate = (arm.pstate & ~0xcull) | (on ? 0 : 4);
	g.regs.cpl = on ? 3 : 0;
	ck_assert_int_eq(set_regs(), KAGE_OK);
}

static void flush(uint32_t kind, uint64_t gva)
{
	struct kage_flush fl = { .size = sizeof(fl), .kind = kind, .gva = gva };

	ck_assert_int_eq(kage_vcpu_flush(g.cpu, &fl), KAGE_OK);
}

static void start(int i)
{
	const char *s = getenv("KAGE_SEED");

	f = &fmts[i];
	seed = (s ? strtoull(s, NULL, 0) : 1) * 0x9e3779b97f4a7c15ull + (unsigned)i + 1;
	guest_start(&g, RAM);
	kage_vcpu_destroy(g.cpu);
	ck_assert_int_eq(kage_vcpu_create(g.vm,
					  KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .arch = f->arch,
						   .features = is_arm() ? ARM_ALL : 0x7f,
						   .phys_bits = is_arm() ? 52 : 46, .tlb_bits = 9),
					  &g.cpu),
			 KAGE_OK);
	g.next_table = POOL;
	root[0] = new_table();
	root[1] = is_arm() ? new_table() : 0;
	arm = (struct kage_arm64_regs){
	    .sctlr = 1,
	    .tcr = f->tcr | (64 - f->bits) | (64 - f->bits) << 16 | 5ull << 32,
	    .ttbr0 = root[0],
	    .ttbr1 = root[1],
	    .pstate = 4,
	};
	g.regs = (struct kage_x86_regs){ .cr0 = 0x80010001, .cr3 = root[0], .cr4 = f->pae ? 0x20 : 0x10 };
	g.regs.efer = f->pae ? 1 << 11 : 0;
	if (f->pae) /* the upper level is registers: all there from the beginning */
		for (unsigned k = 0; k < 4; k++)
			put(root[0] + 8 * k, table_entry(new_table(), 2));
	ck_assert_int_eq(set_regs(), KAGE_OK);
}

static void stop(void)
{
	guest_stop(&g);
}

static int access_at(uint64_t gva, int kind, uint64_t *v, struct kage_fault *fault)
{
	return kind == KIND_LOAD    ? kage_vcpu_load(g.cpu, gva, v, 8, fault)
	       : kind == KIND_STORE ? kage_vcpu_store(g.cpu, gva, v, 8, fault)
				    : kage_vcpu_fetch(g.cpu, gva, v, 8, fault);
}

/* The access and the walk must agree, about faults and about memory. */
static void agree(uint64_t gva, int kind)
{
	struct kage_fault said = { 0 }, got = { 0 };
	int want = kage_vcpu_translate(g.cpu, gva, 1u << kind, &said), r;
	uint64_t v = seed, seen;

	r = access_at(gva, kind, &v, &got);
	if (want == KAGE_OK && said.gpa >= RAM) {
		ck_assert_int_eq(r, KAGE_MMIO);
		ck_assert_uint_eq(got.gpa, said.gpa);
		return;
	}
	ck_assert_msg(r == want && (r != KAGE_GUEST_FAULT || (got.vector == said.vector && got.error == said.error &&
							      got.level == said.level)),
		      "%s: gva %#lx kind %d: %d %#x %#x level %u, the walk says %d %#x %#x level %u", f->name,
		      (unsigned long)gva, kind, r, got.vector, got.error, got.level, want, said.vector, said.error,
		      said.level);
	if (r != KAGE_OK)
		return;
	seen = guest_r64(&g, said.gpa);
	ck_assert_msg(seen == v, "%s: gva %#lx kind %d: %#lx, at gpa %#lx is %#lx", f->name, (unsigned long)gva, kind,
		      (unsigned long)v, (unsigned long)said.gpa, (unsigned long)seen);
}

/* -- random tables -------------------------------------------------------------- */

#define SPOTS 24

/* Addresses that share tables with others at every level, in both halves. */
static uint64_t spot(unsigned i)
{
	uint64_t top = (1ull << f->bits) - 1, gva = i % 4 * (1ull << f->shift);

	for (unsigned l = 1; l <= top_level(); l++)
		if (i >> 2 & 1u << (l % 3))
			gva += (1 + l % 2) * 5ull << shift_of(l);
	gva &= top;
	return is_arm() && i % 2 ? gva | ~top : gva;
}

static uint64_t content(unsigned level)
{
	uint64_t size = 1ull << shift_of(level), first = (2 * POOL + size - 1) & ~(size - 1);

	return first >= RAM ? first : first + rnd((RAM - first) / size + 1) * size;
}

static uint64_t random_entry(unsigned level)
{
	uint64_t e = leaf_entry(content(level), level, (uint32_t)rnd(8));

	switch (rnd(8)) {
	case 0: return 0;
	case 1: return e ^ (is_arm() ? A_AF : PTE_A);
	case 2: return is_arm() ? e | A_DBM : e | PTE_D;
	case 3: return e ^ 1ull << rnd(f->bytes * 8);
	default: return e;
	}
}

/* By the host, or by the guest through a mapping of its tables, which has to flush. */
static void change(uint64_t gva, unsigned level, uint64_t window)
{
	uint64_t at = entry_at(gva, level), e = random_entry(level), was;
	struct kage_fault fault = { 0 };
	int r;

	if (!at)
		return;
	was = get(at);
	if (level && (was & 1) && !(is_arm() ? !(was & A_TABLE) : was & PTE_PS) && rnd(4))
		return; /* most tables stay */
	if (rnd(2)) {
		put(at, e);
	} else {
		user(false);
		r = f->bytes == 4 ? kage_vcpu_store(g.cpu, window + (at - POOL), &(uint32_t){ (uint32_t)e }, 4, &fault)
				  : kage_vcpu_store(g.cpu, window + (at - POOL), &e, 8, &fault);
		ck_assert_msg(r == KAGE_OK, "%s: store to a table: %d %#x %#x", f->name, r, fault.vector, fault.error);
	}
	if (level || rnd(4) == 0)
		flush(rnd(2) ? KAGE_FLUSH_ALL : KAGE_FLUSH_ASID, 0);
	else
		flush(rnd(2) ? KAGE_FLUSH_PAGE : KAGE_FLUSH_PAGE_ASID, gva);
}

static void random_regs(void)
{
	if (is_arm()) {
		arm.tcr = (arm.tcr & ~(15ull << 39)) | rnd(16) << 39; /* HA, HD, HPD0, HPD1 */
		arm.sctlr = 1 | rnd(2) << 19 | rnd(2) << 57;
		arm.pstate = rnd(2) << 22;
	} else {
		g.regs.cr4 = (g.regs.cr4 & ~0x300000ull) | rnd(4) << 20;
		g.regs.cr0 = (g.regs.cr0 & ~0x10000ull) | rnd(2) << 16;
	}
	user(rnd(2));
}

/* The tables appear at the top of the lower half, by the largest blocks that are not too large. */
static uint64_t map_window(void)
{
	unsigned level = f->blocks && shift_of(1) <= 24 ? 1 : 0;
	uint64_t base = (1ull << f->bits) - POOL;

	for (uint64_t at = 0; at < POOL; at += 1ull << shift_of(level))
		map(base + at, POOL + at, level, KAGE_WRITE);
	return base;
}

START_TEST(test_random)
{
	const char *n = getenv("KAGE_STEPS");
	unsigned steps = n ? (unsigned)atoi(n) : 6000;
	uint64_t window;

	start(_i);
	if (f->bits < 25) { /* the window is half of it */
		stop();
		return;
	}
	window = map_window();
	for (unsigned i = 0; i < steps; i++) {
		uint64_t gva = spot((unsigned)rnd(SPOTS));

		if (gva >= window && !(gva >> 55))
			continue;
		switch (rnd(16)) {
		case 0: random_regs(); break;
		case 1:
		case 2:
		case 3: change(gva, f->blocks ? (unsigned)rnd(4) == 0 : 0, window); break;
		default: agree(gva + rnd(1ull << f->shift) / 8 * 8, (int)rnd(3));
		}
		if (i % 512 == 0)
			guest_audit(&g);
	}
	stop();
}
END_TEST

/* -- all of them ------------------------------------------------------------------ */

static uint64_t high(uint64_t gva)
{
	return is_arm() ? gva | ~((1ull << f->bits) - 1) : gva;
}

/* Every 4 KiB piece of a page is where it belongs, in both halves; a table that changes is followed. */
START_TEST(test_pieces)
{
	uint64_t page, gpa = 64 * MIB, mark = 1;

	start(_i);
	page = 1ull << f->shift;
	for (uint64_t at = 0; at < 2 * page; at += 4096)
		guest_w64(&g, gpa + at, mark++);
	map(page, gpa, 0, KAGE_RWX);
	map(high(3 * page), gpa + page, 0, KAGE_RWX);
	for (uint64_t at = 0; at < page; at += 4096) {
		ck_assert_uint_eq(cpu_load(g.cpu, page + at), 1 + at / 4096);
		ck_assert_uint_eq(cpu_load(g.cpu, high(3 * page) + at), 1 + (page + at) / 4096);
	}
	guest_audit(&g);
	put(entry_at(page, 0), leaf_entry(gpa + page, 0, KAGE_RWX));
	for (uint64_t at = 0; at < page; at += 4096)
		ck_assert_uint_eq(cpu_load(g.cpu, page + at), 1 + (page + at) / 4096);
	put(entry_at(page, 0), 0);
	for (uint64_t at = 0; at < page; at += 4096) {
		struct kage_fault fault;
		uint64_t v;

		ck_assert_int_eq(kage_vcpu_load(g.cpu, page + at, &v, 8, &fault), KAGE_GUEST_FAULT);
		ck_assert_uint_eq(fault.gva, page + at);
		ck_assert_uint_eq(fault.level, 0);
	}
	stop();
}
END_TEST

/* A block is there as a whole, and becomes large entries where frames allow it. */
START_TEST(test_blocks)
{
	start(_i);
	for (unsigned level = 1; level <= f->blocks && shift_of(level) <= 30; level++) {
		uint64_t size = 1ull << shift_of(level), gva = size * 5 & ((1ull << f->bits) - 1);

		if (shift_of(level) + 3 > f->bits) /* no room for a sixth */
			continue;
		map(gva, 0, level, KAGE_RWX);
		for (uint64_t at = 2 * POOL; at < (size < RAM ? size : RAM); at += MIB + 4096) {
			guest_w64(&g, at, at + level);
			ck_assert_uint_eq(cpu_load(g.cpu, gva + at), at + level);
			cpu_store(g.cpu, gva + at + 8, at);
			ck_assert_uint_eq(guest_r64(&g, at + 8), at);
		}
		guest_audit(&g);
	}
	stop();
}
END_TEST

/* Tables written so often that they go out of sync come back. */
START_TEST(test_unsync)
{
	uint64_t page, at, window, gva;

	start(_i);
	page = 1ull << f->shift;
	gva = 2 * page;
	at = entry_at(gva, 0);
	window = 8 * page;
	map(window, at & ~(page - 1), 0, KAGE_WRITE | KAGE_READ);
	window += at & (page - 1);
	for (unsigned i = 0; i < 200; i++) {
		uint64_t gpa = 64 * MIB + i % 7 * page, e = leaf_entry(gpa, 0, KAGE_RWX);

		guest_w64(&g, gpa, i);
		ck_assert_int_eq(kage_vcpu_store(g.cpu, window, &e, f->bytes == 8 ? 8 : 4, NULL), KAGE_OK);
		if (i % 5)
			flush(i % 3 ? KAGE_FLUSH_PAGE : KAGE_FLUSH_ALL, gva);
		else
			flush(KAGE_FLUSH_ALL, 0);
		if (i % 11)
			ck_assert_uint_eq(cpu_load(g.cpu, gva), i);
		if (i % 16 == 0)
			guest_audit(&g);
	}
	stop();
}
END_TEST

/* What a dump says, in static memory. */
static const char *dumped(enum kage_dump_what what, enum kage_dump_format format)
{
	static char text[1 << 18];
	FILE *file = tmpfile();
	size_t n;

	ck_assert_ptr_nonnull(file);
	ck_assert_int_eq(kage_dump(g.vm, what, format, fileno(file)), KAGE_OK);
	rewind(file);
	n = fread(text, 1, sizeof(text) - 1, file);
	text[n] = 0;
	fclose(file);
	return text;
}

static void says(const char *text, const char *word)
{
	ck_assert_msg(strstr(text, word) != NULL, "%s: no \"%s\" in:\n%.2000s", f->name, word, text);
}

START_TEST(test_dumps)
{
	uint64_t page, gva;
	char word[64];

	start(_i);
	page = 1ull << f->shift;
	gva = 2 * page;
	map(gva, 64 * MIB, 0, KAGE_RWX);
	map(high(3 * page), 64 * MIB, 0, KAGE_RWX);
	cpu_load(g.cpu, gva);
	cpu_load(g.cpu, high(3 * page));
	snprintf(word, sizeof(word), "0x%016lx-0x%016lx page", (unsigned long)gva,
		 (unsigned long)(gva + page));
	says(dumped(KAGE_DUMP_GUEST, KAGE_DUMP_TEXT), word);
	snprintf(word, sizeof(word), "{\"start\":\"0x%016lx\"", (unsigned long)gva);
	says(dumped(KAGE_DUMP_GUEST, KAGE_DUMP_JSON), word);
	if (is_arm()) {
		snprintf(word, sizeof(word), "0x%016lx-0x%016lx page", (unsigned long)high(3 * page),
			 (unsigned long)(high(3 * page) + page));
		says(dumped(KAGE_DUMP_GUEST, KAGE_DUMP_TEXT), word);
	}
	says(dumped(KAGE_DUMP_SHADOW, KAGE_DUMP_TEXT), is_arm() ? "arm64-" : f->pae ? "x86-pae" : "x86-32bit");
	says(dumped(KAGE_DUMP_SHADOW, KAGE_DUMP_JSON), "\"format\":\"");
	stop();
}
END_TEST

int main(void)
{
	Suite *s = suite_create("formats");
	TCase *all = tcase_create("all");
	SRunner *r;
	int failed;

	tcase_set_timeout(all, 120);
	tcase_add_loop_test(all, test_pieces, 0, FMTS);
	tcase_add_loop_test(all, test_blocks, 0, FMTS);
	tcase_add_loop_test(all, test_unsync, 0, FMTS);
	tcase_add_loop_test(all, test_random, 0, FMTS);
	tcase_add_loop_test(all, test_dumps, 0, FMTS);
	suite_add_tcase(s, all);
	r = srunner_create(s);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed != 0;
}
