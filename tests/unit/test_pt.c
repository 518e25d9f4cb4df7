/* SPDX-License-Identifier: MIT */
/*
 * pt/: the walker (order, ranges, what visitors ask for), Kage's own formats,
 * the fake one, x86 decoding and the walk of a guest's tables. Tables lie in
 * an arena whose "physical" addresses are offset, so that a pointer taken for
 * an address shows.
 */
#include <check.h>
#include <stdlib.h>

#include "pt/entry.h"

#define ARENA_TABLES 64
#define ARENA_BASE ((uint64_t)0x40000000)
#define LOG_MAX 4096

static struct arena {
	uint64_t table[ARENA_TABLES][512];
	unsigned used;
} arena;

static struct {
	struct pt_visit v[LOG_MAX];
	unsigned n;
} visits;

static void setup(void)
{
	memset(&arena, 0, sizeof(arena));
	visits.n = 0;
}

static uint64_t new_table(void)
{
	ck_assert_uint_lt(arena.used, ARENA_TABLES);
	return ARENA_BASE + PAGE_SIZE * arena.used++;
}

static void *arena_map(void *arg, uint64_t addr)
{
	uint64_t n = (addr - ARENA_BASE) / PAGE_SIZE;

	ck_assert_msg(addr >= ARENA_BASE && n < arena.used && addr % PAGE_SIZE == 0, "no table at %llx",
		      (unsigned long long)addr);
	return arena.table[n];
}

static int arena_read(void *arg, uint64_t addr, unsigned bytes, uint64_t *entry)
{
	if (addr < ARENA_BASE || addr - ARENA_BASE >= PAGE_SIZE * arena.used)
		return -EFAULT;
	ck_assert_uint_eq(bytes, 8);
	*entry = arena.table[(addr - ARENA_BASE) / PAGE_SIZE][addr % PAGE_SIZE / 8];
	return 0;
}

static uint64_t *entry_of(const struct pt_format *f, uint64_t table, unsigned level, uint64_t addr)
{
	const struct pt_level *l = pt_level_of(f, level);

	return (uint64_t *)arena_map(NULL, table) + ((addr >> l->shift) & ((1ul << l->bits) - 1));
}

static bool is_table(const struct pt_format *f, unsigned level, uint64_t e)
{
	return pt_level_of(f, level)->decode(e, &(struct pt_params){ 0 }).state == PT_TABLE;
}

/* Entry for `addr` at `level`, making the tables above it. */
static uint64_t *make_path(const struct pt_format *f, uint64_t root, uint64_t addr, unsigned level)
{
	uint64_t table = root;

	for (unsigned l = f->levels - 1; l > level; l--) {
		uint64_t *e = entry_of(f, table, l, addr);

		if (!is_table(f, l, *e))
			*e = f->make_table(new_table(), KAGE_RWX);
		table = pt_level_of(f, l)->decode(*e, &(struct pt_params){ 0 }).addr;
	}
	return entry_of(f, table, level, addr);
}

static void make_page(const struct pt_format *f, uint64_t root, uint64_t addr, uint64_t to, unsigned level)
{
	*make_path(f, root, addr, level) = f->make_leaf(to, level, KAGE_RWX);
}

static int log_visit(const struct pt_visit *v)
{
	ck_assert_uint_lt(visits.n, LOG_MAX);
	visits.v[visits.n++] = *v;
	return PT_CONTINUE;
}

static struct pt_walk walk_of(const struct pt_format *f, uint64_t root, unsigned flags)
{
	return (struct pt_walk){ .format = f, .root = root, .root_level = f->levels - 1u, .flags = flags,
				 .map = arena_map, .visit = log_visit, .arg = &arena };
}

static void expect_visit(unsigned i, enum pt_when when, unsigned level, uint64_t addr, uint64_t start,
			 uint64_t end)
{
	const struct pt_visit *v = &visits.v[i];

	ck_assert_uint_lt(i, visits.n);
	ck_assert_msg(v->when == when && v->level == level && v->addr == addr && v->start == start &&
			  v->end == end,
		      "visit %u: when %d level %u addr %llx start %llx end %llx", i, v->when, v->level,
		      (unsigned long long)v->addr, (unsigned long long)v->start, (unsigned long long)v->end);
	ck_assert_ptr_eq(v->arg, &arena);
}

START_TEST(order_of_visits)
{
	const struct pt_format *f = &pt_kage[1];
	uint64_t root = new_table();
	struct pt_walk w = walk_of(f, root, PT_VISIT_LEAF | PT_VISIT_PRE | PT_VISIT_POST);

	make_page(f, root, 0x1000, 0x7000, 0);
	make_page(f, root, 0x200000, 0xa00000, 1);
	make_page(f, root, 0x401000, 0x9000, 0);
	ck_assert_int_eq(pt_walk(&w, 0, 1ull << 39), 0);
	ck_assert_uint_eq(visits.n, 9);
	expect_visit(0, PT_VISIT_PRE, 2, 0, 0, 1ull << 30);
	expect_visit(1, PT_VISIT_PRE, 1, 0, 0, 0x200000);
	expect_visit(2, PT_VISIT_LEAF, 0, 0x1000, 0x1000, 0x2000);
	expect_visit(3, PT_VISIT_POST, 1, 0, 0, 0x200000);
	expect_visit(4, PT_VISIT_LEAF, 1, 0x200000, 0x200000, 0x400000);
	expect_visit(5, PT_VISIT_PRE, 1, 0x400000, 0x400000, 0x600000);
	expect_visit(6, PT_VISIT_LEAF, 0, 0x401000, 0x401000, 0x402000);
	expect_visit(7, PT_VISIT_POST, 1, 0x400000, 0x400000, 0x600000);
	expect_visit(8, PT_VISIT_POST, 2, 0, 0, 1ull << 30);
	ck_assert_uint_eq(visits.v[2].entry, (entry_leaf(PFN(7), ENTRY_W)));
	ck_assert_uint_eq(*visits.v[2].entryp, visits.v[2].entry);
	ck_assert_uint_eq(visits.v[0].table, root);
	ck_assert_uint_eq(visits.v[1].table, entry_pfn(visits.v[0].entry).v << PAGE_SHIFT);
}
END_TEST

START_TEST(flags_choose_visits)
{
	const struct pt_format *f = &pt_kage[1];
	uint64_t root = new_table();

	make_page(f, root, 0x1000, 0x7000, 0);
	for (unsigned flags = 0; flags < 8; flags++) {
		struct pt_walk w = walk_of(f, root, flags);
		unsigned want = (flags & PT_VISIT_LEAF ? 1 : 0) + (flags & PT_VISIT_PRE ? 2 : 0) +
				(flags & PT_VISIT_POST ? 2 : 0);

		visits.n = 0;
		ck_assert_int_eq(pt_walk(&w, 0, 0x200000), 0);
		ck_assert_uint_eq(visits.n, want);
	}
}
END_TEST

START_TEST(range_inside_entries)
{
	const struct pt_format *f = &pt_kage[2];
	uint64_t root = new_table();
	struct pt_walk w = walk_of(f, root, PT_VISIT_LEAF | PT_VISIT_PRE);

	make_page(f, root, 1ull << 30, 0x40000000, 2);
	make_page(f, root, 0x3fe00000, 0x600000, 1);
	ck_assert_int_eq(pt_walk(&w, 0x3fe01000, 0x40003123), 0);
	ck_assert_uint_eq(visits.n, 4);
	expect_visit(0, PT_VISIT_PRE, 3, 0, 0x3fe01000, 0x40003123);
	expect_visit(1, PT_VISIT_PRE, 2, 0, 0x3fe01000, 0x40000000);
	expect_visit(2, PT_VISIT_LEAF, 1, 0x3fe00000, 0x3fe01000, 0x40000000);
	expect_visit(3, PT_VISIT_LEAF, 2, 0x40000000, 0x40000000, 0x40003123);
	visits.n = 0;
	ck_assert_int_eq(pt_walk(&w, 0x1000, 0x1000), 0);
	ck_assert_int_eq(pt_walk(&w, 0x2000, 0x1000), 0);
	ck_assert_int_eq(pt_walk(&w, 0, 0), 0);
	ck_assert_uint_eq(visits.n, 0);
}
END_TEST

START_TEST(folding)
{
	for (unsigned levels = 2; levels <= 5; levels++) {
		const struct pt_format *f = &pt_kage[levels - 2];
		uint64_t span = 1ull << (12 + 9 * levels), root;
		struct pt_walk w;

		setup();
		root = new_table();
		ck_assert_uint_eq(f->levels, levels);
		make_page(f, root, 0, 0x3000, 0);
		make_page(f, root, span - PAGE_SIZE, 0x5000, 0);
		w = walk_of(f, root, PT_VISIT_LEAF);
		/* Beyond what the root reaches nothing is visited, and nothing wraps. */
		ck_assert_int_eq(pt_walk(&w, 0, 1ull << 60), 0);
		ck_assert_uint_eq(visits.n, 2);
		expect_visit(0, PT_VISIT_LEAF, 0, 0, 0, PAGE_SIZE);
		expect_visit(1, PT_VISIT_LEAF, 0, span - PAGE_SIZE, span - PAGE_SIZE, span);
		ck_assert_int_eq(pt_walk(&w, span, span + PAGE_SIZE), 0);
		ck_assert_uint_eq(visits.n, 2);
	}
}
END_TEST

START_TEST(walk_of_a_subtable)
{
	const struct pt_format *f = &pt_kage[2];
	uint64_t root = new_table(), base = 0x7f40000000ull;
	struct pt_walk w;

	make_page(f, root, base + 0x3000, 0x5000, 0);
	w = walk_of(f, root, PT_VISIT_LEAF);
	w.root = ARENA_BASE + PAGE_SIZE * (arena.used - 1); /* the level 0 table */
	w.root_level = 0;
	ck_assert_int_eq(pt_walk(&w, base, base + (1ull << 30)), 0);
	ck_assert_uint_eq(visits.n, 1);
	expect_visit(0, PT_VISIT_LEAF, 0, base + 0x3000, base + 0x3000, base + 0x4000);
}
END_TEST

START_TEST(none_visits)
{
	const struct pt_format *f = &pt_kage[0];
	uint64_t root = new_table();
	struct pt_walk w = walk_of(f, root, PT_VISIT_LEAF);

	make_page(f, root, 0x2000, 0x5000, 0);
	w.none = true;
	ck_assert_int_eq(pt_walk(&w, 0x1000, 0x600000), 0);
	ck_assert_uint_eq(visits.n, 511 + 2);
	expect_visit(0, PT_VISIT_LEAF, 0, 0x1000, 0x1000, 0x2000);
	ck_assert_uint_eq(visits.v[0].entry, 0);
	ck_assert_uint_eq(visits.v[1].entry, (entry_leaf(PFN(5), ENTRY_W)));
	expect_visit(511, PT_VISIT_LEAF, 1, 0x200000, 0x200000, 0x400000);
	expect_visit(512, PT_VISIT_LEAF, 1, 0x400000, 0x400000, 0x600000);
}
END_TEST

static int answer_next;
static enum pt_when answer_when;

static int answering_visit(const struct pt_visit *v)
{
	log_visit(v);
	return v->when == answer_when ? answer_next : PT_CONTINUE;
}

START_TEST(skip_and_stop)
{
	const struct pt_format *f = &pt_kage[1];
	uint64_t root = new_table();
	struct pt_walk w = walk_of(f, root, PT_VISIT_LEAF | PT_VISIT_PRE | PT_VISIT_POST);

	make_page(f, root, 0x1000, 0x7000, 0);
	make_page(f, root, 1ull << 30, 1ull << 30, 2);
	w.visit = answering_visit;
	answer_when = PT_VISIT_PRE;
	answer_next = PT_SKIP;
	ck_assert_int_eq(pt_walk(&w, 0, 1ull << 39), 0);
	ck_assert_uint_eq(visits.n, 2); /* no POST of what was not entered */
	expect_visit(1, PT_VISIT_LEAF, 2, 1ull << 30, 1ull << 30, 2ull << 30);
	for (unsigned when = PT_VISIT_LEAF; when <= PT_VISIT_POST; when <<= 1) {
		answer_when = when;
		answer_next = PT_STOP;
		visits.n = 0;
		ck_assert_int_eq(pt_walk(&w, 0, 1ull << 39), PT_STOP);
		ck_assert_int_eq(visits.v[visits.n - 1].when, when);
		answer_next = -ENOMEM;
		visits.n = 0;
		ck_assert_int_eq(pt_walk(&w, 0, 1ull << 39), -ENOMEM);
		ck_assert_int_eq(visits.v[visits.n - 1].when, when);
	}
}
END_TEST

/* Splits blocks into tables of pages, as a change would. */
static int splitting_visit(const struct pt_visit *v)
{
	uint64_t table, *e;

	log_visit(v);
	if (v->when != PT_VISIT_LEAF || v->level == 0)
		return PT_CONTINUE;
	table = new_table();
	e = arena_map(NULL, table);
	for (unsigned i = 0; i < 512; i++)
		e[i] = entry_leaf(pfn_add(entry_pfn(v->entry), i * level_pages(v->level - 1)), 0);
	*v->entryp = entry_table(PFN(table >> PAGE_SHIFT), ENTRY_W);
	return PT_REREAD;
}

START_TEST(reread_descends_into_what_came)
{
	const struct pt_format *f = &pt_kage[1];
	uint64_t root = new_table();
	struct pt_walk w = walk_of(f, root, PT_VISIT_LEAF | PT_VISIT_PRE | PT_VISIT_POST);

	make_page(f, root, 0, 0x40000000, 2);
	w.visit = splitting_visit;
	ck_assert_int_eq(pt_walk(&w, 0x3000, 0x5000), 0);
	ck_assert_uint_eq(visits.n, 8);
	expect_visit(0, PT_VISIT_LEAF, 2, 0, 0x3000, 0x5000);
	expect_visit(1, PT_VISIT_PRE, 2, 0, 0x3000, 0x5000);
	expect_visit(2, PT_VISIT_LEAF, 1, 0, 0x3000, 0x5000);
	expect_visit(3, PT_VISIT_PRE, 1, 0, 0x3000, 0x5000);
	expect_visit(4, PT_VISIT_LEAF, 0, 0x3000, 0x3000, 0x4000);
	expect_visit(5, PT_VISIT_LEAF, 0, 0x4000, 0x4000, 0x5000);
	ck_assert_uint_eq(entry_pfn(visits.v[5].entry).v, 0x40004);
	expect_visit(6, PT_VISIT_POST, 1, 0, 0x3000, 0x5000);
	expect_visit(7, PT_VISIT_POST, 2, 0, 0x3000, 0x5000);
}
END_TEST

/* PRE turns a table into a block: the walk must not enter the old table. */
static int collapsing_visit(const struct pt_visit *v)
{
	log_visit(v);
	if (v->when == PT_VISIT_PRE && v->level == 1)
		*v->entryp = entry_leaf(PFN(0x200), 0);
	return PT_REREAD;
}

START_TEST(reread_visits_a_kind_once)
{
	const struct pt_format *f = &pt_kage[1];
	uint64_t root = new_table();
	struct pt_walk w = walk_of(f, root, PT_VISIT_LEAF | PT_VISIT_PRE | PT_VISIT_POST);

	make_page(f, root, 0x1000, 0x7000, 0);
	w.visit = collapsing_visit;
	ck_assert_int_eq(pt_walk(&w, 0, 0x200000), 0);
	ck_assert_uint_eq(visits.n, 4);
	expect_visit(0, PT_VISIT_PRE, 2, 0, 0, 0x200000);
	expect_visit(1, PT_VISIT_PRE, 1, 0, 0, 0x200000);
	expect_visit(2, PT_VISIT_LEAF, 1, 0, 0, 0x200000);
	expect_visit(3, PT_VISIT_POST, 2, 0, 0, 0x200000);
}
END_TEST

/* Random pages and blocks: the walk reports exactly these, ascending. */
START_TEST(fake_format_random)
{
	const struct pt_format *f = &pt_fake;
	uint64_t root = new_table(), want[4096] = { 0 };
	struct pt_walk w = walk_of(f, root, PT_VISIT_LEAF);
	unsigned mapped = 0;

	srand(7);
	for (unsigned i = 0; i < 400; i++) {
		uint64_t page = rand() % 1024, to = (uint64_t)rand() << 12;

		mapped += !want[page];
		want[page] = to | 1;
		make_page(f, root, page << 12, to, 0);
	}
	make_page(f, root, 0x800000, 0xabc000, 1);
	ck_assert_int_eq(pt_walk(&w, 0, 1 << 24), 0);
	ck_assert_uint_eq(visits.n, mapped + 1);
	for (unsigned i = 0; i < mapped; i++) {
		const struct pt_visit *v = &visits.v[i];
		struct pt_decoded d = pt_level_of(f, 0)->decode(v->entry, w.params);

		ck_assert(i == 0 || v->addr > visits.v[i - 1].addr);
		ck_assert_uint_eq(d.addr | 1, want[v->addr >> 12]);
		ck_assert_uint_eq(d.perm, KAGE_RWX);
	}
	expect_visit(mapped, PT_VISIT_LEAF, 1, 0x800000, 0x800000, 0x820000);
}
END_TEST

START_TEST(encode_and_decode)
{
	static const struct pt_format *const formats[] = {
		&pt_kage[0], &pt_kage[1], &pt_kage[2], &pt_kage[3], &pt_fake,
	};

	for (unsigned i = 0; i < ARRAY_SIZE(formats); i++) {
		const struct pt_format *f = formats[i];

		for (unsigned level = 0; level < f->levels; level++)
			for (uint32_t perm = 0; perm <= KAGE_RWX; perm++) {
				const struct pt_level *l = pt_level_of(f, level);
				struct pt_decoded d = l->decode(f->make_leaf(0x1234567000, level, perm),
								&(struct pt_params){ 0 });

				ck_assert_int_eq(d.state, l->block ? PT_LEAF : PT_RESERVED);
				ck_assert_uint_eq(d.perm, perm);
				ck_assert(!l->block || d.addr == 0x1234567000);
				d = l->decode(f->make_table(0x89abcde000, perm), &(struct pt_params){ 0 });
				ck_assert(level == 0 || d.state == PT_TABLE);
				ck_assert(level == 0 || d.addr == 0x89abcde000);
				ck_assert_uint_eq(d.perm, perm);
				ck_assert_int_eq(l->decode(0, &(struct pt_params){ 0 }).state, PT_NONE);
			}
	}
	ck_assert_int_eq(pt_level_of(&pt_fake, 0)->decode(entry_leaf(PFN(5), 0), NULL).state, PT_RESERVED);
}
END_TEST

START_TEST(kage_states)
{
	const struct pt_level *l = pt_level_of(&pt_kage[2], 0);
	static const struct {
		entry_t e;
		enum pt_state s;
	} t[] = {
		{ ENTRY_SWAP, PT_SWAP },         { ENTRY_MIGRATION, PT_MIGRATION },
		{ ENTRY_PROTNONE, PT_PROTNONE }, { ENTRY_POISON, PT_POISON },
		{ ENTRY_TABLE, PT_RESERVED },    { ENTRY_HOST_PRIVATE, PT_HOST_PRIVATE },
	};
	struct pt_decoded d = l->decode(entry_leaf(PFN(9), ENTRY_D), NULL);

	for (unsigned i = 0; i < ARRAY_SIZE(t); i++)
		ck_assert_int_eq(l->decode(t[i].e, NULL).state, t[i].s);
	ck_assert(d.dirty && !d.accessed && d.perm == (KAGE_READ | KAGE_EXEC));
	d = l->decode(entry_leaf(PFN(9), ENTRY_A | ENTRY_W), NULL);
	ck_assert(!d.dirty && d.accessed && d.perm == KAGE_RWX);
}
END_TEST

#define P 1ull
#define RW 2ull
#define US 4ull
#define PS 0x80ull
#define XD (1ull << 63)

START_TEST(x86_reserved_bits)
{
	for (unsigned phys = 36; phys <= 52; phys++)
		for (unsigned level = 0; level < 5; level++)
			for (unsigned bit = 1; bit < 64; bit++) {
				struct pt_params p = { .phys_bits = phys, .nx = true, .page1g = true };
				const struct pt_level *l = pt_level_of(&pt_x86_5, level);
				bool rsvd = (bit >= phys && bit < 52) || (bit == 7 && level >= 3);

				ck_assert_int_eq(l->decode(P | 1ull << bit, &p).state == PT_RESERVED, rsvd);
				ck_assert_int_eq(l->decode(1ull << bit, &p).state, PT_NONE);
				if (level == 1 || level == 2) {
					unsigned top = level == 1 ? 21 : 30;

					rsvd = (bit >= phys && bit < 52) || (bit >= 13 && bit < top);
					ck_assert_int_eq(l->decode(P | PS | 1ull << bit, &p).state,
							 rsvd ? PT_RESERVED : PT_LEAF);
				}
				p.nx = p.page1g = false;
				ck_assert_int_eq(l->decode(P | XD, &p).state, PT_RESERVED);
				ck_assert_int_eq(l->decode(P | PS, &p).state,
						 level >= 2 ? PT_RESERVED : PT_LEAF);
			}
}
END_TEST

START_TEST(x86_fields)
{
	struct pt_params p = { .phys_bits = 46, .nx = true, .page1g = true };
	const struct pt_level *pte = pt_level_of(&pt_x86_4, 0), *pde = pt_level_of(&pt_x86_4, 1);
	struct pt_decoded d = pte->decode(P | RW | US | 0x1e0 | 7ull << 59 | 0x123456789000, &p);

	ck_assert_int_eq(d.state, PT_LEAF);
	ck_assert_uint_eq(d.addr, 0x123456789000);
	ck_assert(d.perm == KAGE_RWX && d.user && d.accessed && d.dirty && d.global && d.pkey == 7);
	d = pde->decode(P | PS | XD | 0x1000 | 0x40000000, &p); /* PAT is no address bit */
	ck_assert(d.state == PT_LEAF && d.addr == 0x40000000 && d.perm == KAGE_READ && !d.user && !d.dirty);
	d = pde->decode(P | 0x140 | 15ull << 59 | 0x5000, &p); /* D, G, key are ignored in a table's entry */
	ck_assert(d.state == PT_TABLE && d.addr == 0x5000 && !d.dirty && !d.global && d.pkey == 0);
}
END_TEST

static const struct pt_params x86_params = { .phys_bits = 46, .nx = true, .page1g = true };

/* Guest tables: one path for `addr`; `bits` go into the entries, by level. */
static uint64_t guest_path(unsigned levels, uint64_t addr, const uint64_t bits[5], unsigned leaf, uint64_t to)
{
	uint64_t root = new_table(), table = root;

	for (unsigned level = levels - 1;; level--) {
		uint64_t *e = entry_of(&pt_x86_5, table, level, addr);

		if (level == leaf) {
			*e = to | bits[level];
			return root;
		}
		table = new_table();
		*e = table | bits[level];
	}
}

START_TEST(guest_walk_leafs)
{
	static const uint64_t upper[5] = { P | RW | US, P | RW | US, P | RW | US, P | RW | US, P | RW | US };

	for (unsigned levels = 4; levels <= 5; levels++)
		for (unsigned leaf = 0; leaf < 3; leaf++) {
			const struct pt_format *f = levels == 4 ? &pt_x86_4 : &pt_x86_5;
			uint64_t bits[5], addr = 0xffff8123456789abull, root, to = 0x1ull << 40;
			uint64_t mask = (1ull << (12 + 9 * leaf)) - 1;
			struct pt_guest_path path;

			setup();
			memcpy(bits, upper, sizeof(bits));
			bits[leaf] |= (leaf ? PS : 0) | 5ull << 59;
			bits[3] &= ~RW;
			bits[leaf + 1] |= XD;
			root = guest_path(levels, addr, bits, leaf, to);
			ck_assert_int_eq(pt_guest_walk(f, &x86_params, root, addr, arena_read, NULL, &path),
					 0);
			ck_assert_int_eq(path.state, PT_LEAF);
			ck_assert_uint_eq(path.level, leaf);
			ck_assert_uint_eq(path.gpa, to + (addr & mask));
			ck_assert_uint_eq(path.perm, KAGE_READ);
			ck_assert(path.user);
			ck_assert_uint_eq(path.pkey, 5);
			ck_assert_uint_eq(path.step[levels - 1].gpa & ~0xfffull, root);
			ck_assert_uint_eq(path.step[leaf].entry, to | bits[leaf]);
		}
}
END_TEST

static int eio_read(void *arg, uint64_t addr, unsigned bytes, uint64_t *entry)
{
	return -EIO;
}

START_TEST(guest_walk_ends)
{
	uint64_t addr = 0x7123456789ab;

	for (unsigned level = 0; level < 4; level++) {
		uint64_t bits[5] = { P | US, P | US, P | US, P | US, P | US }, root;
		struct pt_guest_path path;

		setup();
		bits[level] = 0xf00ull; /* not present */
		root = guest_path(4, addr, bits, 0, 0x5000);
		ck_assert_int_eq(pt_guest_walk(&pt_x86_4, &x86_params, root, addr, arena_read, NULL, &path),
				 0);
		ck_assert_int_eq(path.state, PT_NONE);
		ck_assert_uint_eq(path.level, level);

		setup();
		bits[level] = P | 1ull << 50;
		root = guest_path(4, addr, bits, 0, 0x5000);
		ck_assert_int_eq(pt_guest_walk(&pt_x86_4, &x86_params, root, addr, arena_read, NULL, &path),
				 0);
		ck_assert_int_eq(path.state, PT_RESERVED);
		ck_assert_uint_eq(path.level, level);

		setup();
		if (level == 3)
			root = 0x1000; /* the root itself is in no memory */
		else {
			bits[level] = P;
			root = guest_path(4, addr, bits, level + 1, 0x1000);
		}
		ck_assert_int_eq(pt_guest_walk(&pt_x86_4, &x86_params, root, addr, arena_read, NULL, &path),
				 0);
		ck_assert_int_eq(path.state, PT_POISON);
		ck_assert_uint_eq(path.level, level);
		ck_assert_int_eq(pt_guest_walk(&pt_x86_4, &x86_params, root, addr, eio_read, NULL, &path),
				 -EIO);
	}
}
END_TEST

/* A guest table that points to itself, read through a function; both halves of the address space. */
START_TEST(walk_guest_tables)
{
	uint64_t root = new_table();
	struct pt_walk w = walk_of(&pt_x86_4, root, PT_VISIT_LEAF);

	w.map = NULL;
	w.read = arena_read;
	w.params = &x86_params;
	arena.table[0][511] = root | P;
	arena.table[0][0] = 0x10000000 | P; /* a table in no memory: counts as none */
	ck_assert_int_eq(pt_walk(&w, 0, 0), 0);
	ck_assert_uint_eq(visits.n, 0);
	ck_assert_int_eq(pt_walk(&w, 0, UINT64_MAX), 0);
	ck_assert_uint_eq(visits.n, 2);
	/* level 0 of the loop: entry 0 and 511 taken for pages */
	expect_visit(0, PT_VISIT_LEAF, 0, 0xffffffffffe00000, 0xffffffffffe00000, 0xffffffffffe01000);
	expect_visit(1, PT_VISIT_LEAF, 0, 0xfffffffffffff000, 0xfffffffffffff000, UINT64_MAX);
	ck_assert_ptr_null(visits.v[0].entryp);
	visits.n = 0;
	ck_assert_int_eq(pt_walk(&w, PAGE_SIZE, 0), 0);
	ck_assert_uint_eq(visits.n, 2);
	expect_visit(1, PT_VISIT_LEAF, 0, 0xfffffffffffff000, 0xfffffffffffff000, 0);
	w.none = true;
	visits.n = 0;
	ck_assert_int_eq(pt_walk(&w, 0, 1ull << 39), 0);
	ck_assert_uint_eq(visits.n, 512); /* each entry of the table in no memory */
	ck_assert_uint_eq(visits.v[0].level, 2);
	w.read = eio_read;
	ck_assert_int_eq(pt_walk(&w, 0, PAGE_SIZE), -EIO);
}
END_TEST

START_TEST(level_zero_is_no_table)
{
	uint64_t root = new_table();
	struct pt_walk w = walk_of(&pt_fake, root, PT_VISIT_LEAF | PT_VISIT_PRE);

	*make_path(&pt_fake, root, 0x5000, 0) = pt_fake.make_table(root, KAGE_RWX);
	ck_assert_int_eq(pt_walk(&w, 0, 1 << 24), 0);
	ck_assert_uint_eq(visits.n, 3);
	expect_visit(2, PT_VISIT_LEAF, 0, 0x5000, 0x5000, 0x6000);
}
END_TEST

START_TEST(permission_examples)
{
	struct x86_mode kernel = { .wp = true, .nxe = true };
	struct x86_mode user = { .wp = true, .nxe = true, .user = true };
	struct x86_mode m;

	ck_assert_uint_eq(x86_check(&user, KAGE_RWX, true, 0, KAGE_WRITE), 0);
	ck_assert_uint_eq(x86_check(&user, KAGE_RWX, false, 0, KAGE_READ), X86_PF_P | X86_PF_U);
	ck_assert_uint_eq(x86_check(&user, KAGE_READ, true, 0, KAGE_WRITE), X86_PF_P | X86_PF_W | X86_PF_U);
	ck_assert_uint_eq(x86_check(&user, KAGE_READ, true, 0, KAGE_EXEC), X86_PF_P | X86_PF_U | X86_PF_I);
	/* an implicit access is the supervisor's even at CPL 3, and AC does not help it */
	ck_assert_uint_eq(x86_check(&user, KAGE_RWX, false, 0, KAGE_READ | KAGE_IMPLICIT), 0);
	m = user;
	m.smap = m.ac = true;
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 0, KAGE_READ | KAGE_IMPLICIT), X86_PF_P);
	m.user = false;
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 0, KAGE_READ), 0);
	m.ac = false;
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 0, KAGE_WRITE), X86_PF_P | X86_PF_W);
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 0, KAGE_EXEC), 0);
	m.smep = true;
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 0, KAGE_EXEC), X86_PF_P | X86_PF_I);
	ck_assert_uint_eq(x86_check(&kernel, KAGE_READ, false, 0, KAGE_WRITE), X86_PF_P | X86_PF_W);
	m = kernel;
	m.wp = false;
	ck_assert_uint_eq(x86_check(&m, KAGE_READ, false, 0, KAGE_WRITE), 0);
	ck_assert_uint_eq(x86_allowed(&kernel, KAGE_READ | KAGE_EXEC, false, 0), KAGE_READ | KAGE_EXEC);
	ck_assert_uint_eq(x86_allowed(&user, KAGE_RWX, false, 0), 0);
	m = kernel;
	m.nxe = false;
	ck_assert_uint_eq(x86_walk_error(&m, KAGE_EXEC, false), 0);
	ck_assert_uint_eq(x86_walk_error(&user, KAGE_EXEC, false), X86_PF_U | X86_PF_I);
	ck_assert_uint_eq(x86_walk_error(&user, KAGE_WRITE, true),
			  X86_PF_P | X86_PF_W | X86_PF_U | X86_PF_RSVD);
}
END_TEST

START_TEST(protection_keys)
{
	struct x86_mode m = { .wp = true, .nxe = true, .pke = true, .user = true };

	m.pkru = 1u << 6 | 2u << 10; /* key 3: access disabled; key 5: write disabled */
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 3, KAGE_READ), X86_PF_P | X86_PF_U | X86_PF_PK);
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 3, KAGE_EXEC), 0);
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 5, KAGE_READ), 0);
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 5, KAGE_WRITE),
			  X86_PF_P | X86_PF_U | X86_PF_W | X86_PF_PK);
	ck_assert_uint_eq(x86_check(&m, KAGE_READ, true, 5, KAGE_WRITE),
			  X86_PF_P | X86_PF_U | X86_PF_W | X86_PF_PK);
	m.user = false;
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 5, KAGE_WRITE), X86_PF_P | X86_PF_W | X86_PF_PK);
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, false, 3, KAGE_WRITE), 0);
	m.wp = false;
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 5, KAGE_WRITE), 0);
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 3, KAGE_WRITE), X86_PF_P | X86_PF_W | X86_PF_PK);
	m.pke = false;
	ck_assert_uint_eq(x86_check(&m, KAGE_RWX, true, 3, KAGE_WRITE), 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("pt");
	TCase *walk = tcase_create("walk"), *formats = tcase_create("formats"),
	      *guest = tcase_create("guest");
	SRunner *r;
	int failed;

	tcase_add_checked_fixture(walk, setup, NULL);
	tcase_add_test(walk, order_of_visits);
	tcase_add_test(walk, flags_choose_visits);
	tcase_add_test(walk, range_inside_entries);
	tcase_add_test(walk, folding);
	tcase_add_test(walk, walk_of_a_subtable);
	tcase_add_test(walk, none_visits);
	tcase_add_test(walk, skip_and_stop);
	tcase_add_test(walk, reread_descends_into_what_came);
	tcase_add_test(walk, reread_visits_a_kind_once);
	tcase_add_test(walk, fake_format_random);
	tcase_add_test(walk, level_zero_is_no_table);
	suite_add_tcase(s, walk);
	tcase_add_checked_fixture(formats, setup, NULL);
	tcase_add_test(formats, encode_and_decode);
	tcase_add_test(formats, kage_states);
	tcase_add_test(formats, x86_reserved_bits);
	tcase_add_test(formats, x86_fields);
	tcase_add_test(formats, permission_examples);
	tcase_add_test(formats, protection_keys);
	suite_add_tcase(s, formats);
	tcase_add_checked_fixture(guest, setup, NULL);
	tcase_add_test(guest, guest_walk_leafs);
	tcase_add_test(guest, guest_walk_ends);
	tcase_add_test(guest, walk_guest_tables);
	suite_add_tcase(s, guest);
	r = srunner_create(s);
	srunner_set_fork_status(r, CK_NOFORK);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
