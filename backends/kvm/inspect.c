/* SPDX-License-Identifier: MIT */
/*
 * Is the mirror what it believes to be? Runs are compared with the table (audit),
 * and with what the kernel says of this process's mappings (audit, repair).
 *
 * Locks taken: k->lock. The audit runs with the engine stopped; guests may run.
 */
#include <stdio.h>
#include <sys/mman.h>

#include "internal.h"
#include "scan.h"

static const char *const kind_name[] = {
    [RUN_ZERO] = "zero", [RUN_PRIVATE] = "private", [RUN_SHARED] = "shared"};

/* -- against the kernel ---------------------------------------------------------------- */

struct check {
	struct kage_kvm *k;
	uint64_t pages; /* of runs, seen mapped as they ought to be */
	/* A piece of a run that is mapped otherwise; `mapped`: only its protection is wrong. */
	int (*bad)(struct check *c, const struct run *piece, bool mapped);
	struct audit *a;
	struct run *list;
	unsigned count, room;
	int fixed;
};

static int run_prot(const struct kage_kvm *k, const struct run *run)
{
	const struct extent *e = run->kind == RUN_ZERO ? NULL : pool_extent(k->pool, run->pfn);

	return e && e->kind == EXTENT_DEVICE && run->kind == RUN_SHARED ? e->prot : PROT_READ | PROT_WRITE;
}

/* The right memory lies at the piece, whose first page is `at` in the VMA. */
static bool same_memory(const struct kage_kvm *k, const struct run *piece, const struct scan_map *map,
			uint64_t at)
{
	uint64_t offset;
	int fd;

	if (piece->kind == RUN_ZERO)
		return map->inode == 0 && !map->shared;
	if (map->shared != (piece->kind == RUN_SHARED) || pool_file(k->pool, piece->pfn, &fd, &offset))
		return false;
	return map->inode != 0 && map->offset + (at - map->start) == offset;
}

/* The part of a VMA that lies in a window. */
static int check_part(struct check *c, const struct window *w, const struct scan_map *map, uint64_t from,
		      uint64_t to)
{
	gfn_t at = gfn_add(w->gfn, (from - (uintptr_t)w->hva) >> PAGE_SHIFT);
	gfn_t end = gfn_add(w->gfn, (to - (uintptr_t)w->hva) >> PAGE_SHIFT);
	struct run piece;
	int r = 0;

	while (r == 0 && runs_piece(&c->k->runs, at, end, &piece)) {
		bool same;

		at = run_end(&piece);
		same = same_memory(c->k, &piece, map, (uintptr_t)window_hva(w, piece.gfn));
		c->pages += piece.npages;
		if (!same || map->prot != run_prot(c->k, &piece))
			r = c->bad(c, &piece, same);
	}
	return r;
}

static int check_map(void *arg, const struct scan_map *map)
{
	struct check *c = arg;
	int r = 0;

	for (unsigned i = 0; r == 0 && i < c->k->windows; i++) {
		const struct window *w = &c->k->window[i];
		uint64_t from = MAX(map->start, (uintptr_t)w->hva);
		uint64_t to = MIN(map->end, (uintptr_t)w->hva + (w->npages << PAGE_SHIFT));

		if (from < to)
			r = check_part(c, w, map, from, to);
	}
	return r;
}

static uint64_t runs_pages(const struct runs *r)
{
	const struct run *run;
	uint64_t pages = 0;

	for (gfn_t at = GFN(0); (run = runs_from(r, at)); at = run_end(run))
		pages += run->npages;
	return pages;
}

/* -- audit -------------------------------------------------------------------------------- */

#define CHECK(cond, ...)                                                                                     \
	do {                                                                                                 \
		a->checks++;                                                                                 \
		if (unlikely(!(cond)))                                                                       \
			a->report(a, __VA_ARGS__);                                                           \
	} while (0)

static int audit_bad(struct check *c, const struct run *piece, bool mapped)
{
	struct audit *a = c->a;

	CHECK(false, "mm %lu gfn %#lx: %lu pages %s are mapped otherwise%s", (long)c->k->mm->id,
	      (long)piece->gfn.v, (long)piece->npages, kind_name[piece->kind], mapped ? " (protection)" : "");
	return 0;
}

static void audit_leaf(struct kage_kvm *k, struct audit *a, const struct region *reg, const struct run *run,
		       gfn_t gfn, const struct mm_lookup *l)
{
	bool open = reg->kind == KAGE_REGION_FOREIGN || reg->flags & KAGE_REGION_EXTERNAL;
	long id = (long)k->mm->id, g = (long)gfn.v;

	if (pfn_is_zero(l->pfn)) {
		CHECK(run->kind == RUN_ZERO, "mm %lu gfn %#lx: on the zero frame, mapped %s", id, g,
		      kind_name[run->kind]);
		return;
	}
	CHECK(run->kind != RUN_ZERO && pfn_eq(run_pfn(run, gfn), l->pfn),
	      "mm %lu gfn %#lx: frame %#lx, mapped %s %#lx", id, g, (long)l->pfn.v, kind_name[run->kind],
	      (long)run_pfn(run, gfn).v);
	CHECK(!l->writable || open || run->kind == RUN_SHARED, "mm %lu gfn %#lx: exclusive, mapped %s", id, g,
	      kind_name[run->kind]);
	CHECK(run->kind != RUN_SHARED || open || mm_exclusive(k->mm, gfn, l),
	      "mm %lu gfn %#lx: frame %#lx is shared and mapped MAP_SHARED", id, g, (long)l->pfn.v);
}

/* V1 and W1, one entry at a time. Returns the next gfn. */
static gfn_t audit_entry(struct kage_kvm *k, struct audit *a, const struct region *reg, gfn_t gfn)
{
	struct mm_lookup l = mm_lookup(k->mm, gfn);
	const struct run *run = runs_find(&k->runs, gfn);
	uint64_t span = mm_block_mixed(k->mm, gfn, &l) ? 1 : level_pages(MIN(l.level, 1u));
	gfn_t next = GFN(MIN(ALIGN_DOWN(gfn.v, span) + span, region_end(reg).v));

	CHECK(!run || (run->gfn.v | run->npages | (run->kind == RUN_ZERO ? 0 : run->pfn.v)) % k->mirror.granule == 0,
	      "mm %lu gfn %#lx: a mapping of less than a granule", (long)k->mm->id, (long)gfn.v);
	CHECK(run && window_find(k, gfn), "mm %lu gfn %#lx: in no window", (long)k->mm->id, (long)gfn.v);
	if (!run)
		return gfn_add(gfn, 1);
	if (entry_is_leaf(l.entry))
		audit_leaf(k, a, reg, run, gfn, &l);
	else if (entry_state(l.entry) == ENTRY_HOST_PRIVATE)
		CHECK(run->kind != RUN_SHARED, "mm %lu gfn %#lx: host-private, mapped shared",
		      (long)k->mm->id, (long)gfn.v);
	else if (entry_is_none(l.entry) && reg->kind == KAGE_REGION_ANON)
		CHECK(run->kind == RUN_ZERO, "mm %lu gfn %#lx: no entry, mapped %s", (long)k->mm->id,
		      (long)gfn.v, kind_name[run->kind]);
	return GFN(MIN(next.v, run_end(run).v));
}

int mirror_audit(struct mirror *m, struct audit *a)
{
	struct kage_kvm *k = kvm_of(m);
	struct check c = {.k = k, .bad = audit_bad, .a = a};
	const struct regions *set = k->mm->regions;
	int r;

	lock_take(&k->lock);
	for (unsigned i = 0; i < set->count; i++)
		for (gfn_t at = set->r[i].start; at.v < region_end(&set->r[i]).v;)
			at = audit_entry(k, a, &set->r[i], at);
	r = scan_maps(&k->features, check_map, &c);
	if (r == 0)
		CHECK(c.pages == runs_pages(&k->runs), "mm %lu: %lu pages of %lu are mapped at all",
		      (long)k->mm->id, (long)c.pages, (long)runs_pages(&k->runs));
	lock_drop(&k->lock);
	return r == -EOPNOTSUPP ? 0 : r; /* the kernel cannot be asked; kage_kvm_info() says so */
}

/* -- repair -------------------------------------------------------------------------------- */

/* Collected first: what is mapped while the list of mappings is read may be seen twice. */
static int repair_note(struct check *c, const struct run *piece, bool mapped)
{
	if (mapped) {
		if (mprotect(kvm_hva(c->k, piece->gfn), piece->npages << PAGE_SHIFT, run_prot(c->k, piece)) ==
		    0)
			c->fixed++;
		return 0;
	}
	if (c->count < c->room)
		c->list[c->count++] = *piece;
	return 0;
}

/* The page of the host at gfn has been unmapped. */
static bool page_gone(const struct kage_kvm *k, gfn_t gfn)
{
	unsigned char vec;

	return mincore(kvm_hva(k, gfn), host_page_size(), &vec) != 0 && errno == ENOMEM;
}

/* Pieces of runs that no VMA at all covers: their window has been unmapped. What is there beside them stays. */
static int repair_gaps(struct check *c)
{
	const uint64_t page = host_page_size() >> PAGE_SHIFT;
	struct kage_kvm *k = c->k;
	const struct run *run;
	int fixed = 0;

	for (gfn_t at = GFN(0); (run = runs_from(&k->runs, at));) {
		struct run piece = *run;

		at = run_end(&piece);
		for (gfn_t g = piece.gfn, next; g.v < at.v; g = next) {
			struct run one = {.gfn = g, .pfn = run_pfn(&piece, g), .kind = piece.kind};

			for (next = g; next.v < at.v && page_gone(k, next); next = gfn_add(next, page))
				;
			one.npages = next.v - g.v;
			if (one.npages == 0)
				next = gfn_add(g, page);
			else if (mirror_map(k, &one) == 0)
				fixed++;
		}
	}
	return fixed;
}

#define REPAIRS 64

int mirror_repair(struct kage_kvm *k)
{
	struct run list[REPAIRS];
	struct check c = {.k = k, .bad = repair_note, .list = list, .room = REPAIRS};
	int r = scan_maps(&k->features, check_map, &c);

	if (r)
		return r;
	for (unsigned i = 0; i < c.count; i++)
		if (mirror_map(k, &list[i]) == 0)
			c.fixed++;
	if (c.pages != runs_pages(&k->runs))
		c.fixed += repair_gaps(&c);
	return c.fixed;
}

/* -- dump ------------------------------------------------------------------------------------ */

int mirror_dump(struct mirror *m, bool json, int (*put)(void *arg, const char *text, size_t len), void *arg)
{
	struct kage_kvm *k = kvm_of(m);
	const struct run *run;
	char line[160];
	int r = 0, n;

	lock_take(&k->lock);
	if (json)
		r = put(arg, "[", 1);
	for (gfn_t at = GFN(0); r >= 0 && (run = runs_from(&k->runs, at)); at = run_end(run)) {
		if (json)
			n = snprintf(line, sizeof(line),
				     "%s\n{\"gpa\": %llu, \"pages\": %llu, \"kind\": \"%s\", \"pfn\": %llu}",
				     at.v ? "," : "", (unsigned long long)gfn_gpa(run->gfn).v,
				     (unsigned long long)run->npages, kind_name[run->kind],
				     (unsigned long long)run->pfn.v);
		else
			n = snprintf(line, sizeof(line), "%012llx-%012llx %-7s pfn %llx\n",
				     (unsigned long long)gfn_gpa(run->gfn).v,
				     (unsigned long long)gfn_gpa(run_end(run)).v, kind_name[run->kind],
				     (unsigned long long)run->pfn.v);
		r = put(arg, line, (size_t)n);
	}
	if (json && r >= 0)
		r = put(arg, "\n]\n", 3);
	lock_drop(&k->lock);
	return r < 0 ? r : 0;
}
