/* SPDX-License-Identifier: MIT */
/*
 * Random operations over several guests, against the oracle. After every step:
 * the result code is the oracle's, the engine's audit finds nothing, random
 * pages read the same in both. At the end of a sequence, and before a guest is
 * destroyed, all pages do.
 *
 *   struct run    one sequence: an engine, its guests, the last operations
 *   struct guest  an engine's guest and the oracle's
 *
 * Environment: KAGE_SEED (of the first sequence; sequence i has seed + i, so a
 * failure is repeated with KAGE_SEED=<printed> KAGE_SEQUENCES=1),
 * KAGE_SEQUENCES, KAGE_STEPS, KAGE_JOBS (processes), KAGE_VERBOSE (every
 * operation is printed).
 *
 * Invariants of the driver: guests 0..count-1 are alive; a region lies inside
 * one area (AREA_PAGES pages from an entry of `areas`), so that harvesting all
 * areas harvests everything; FILE and FOREIGN regions show files whose bytes
 * the oracle shares.
 *
 * One thread; no locks.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <kage/kage.h>

#include "oracle.h"
#include "rng.h"

#define MAX_GUESTS 6
#define MIN_GUESTS 2
#define MAX_PAGES  1500
#define AREA_PAGES 1024
#define VCPUS	   1
#define HISTORY	   30
#define PATTERNS   8
#define FILE_PAGES 128
#define BIG	   (MAX_PAGES + AREA_PAGES)

/* Aligned to 2 MiB; far apart, so that tables of two to five levels occur. */
static const uint64_t areas[] = {
    0,
    (uint64_t)AREA_PAGES *OR_PAGE,
    ((uint64_t)1 << 30) - ((uint64_t)1 << 21),
    (uint64_t)3 << 32,
    (uint64_t)1 << 40,
    ((uint64_t)1 << 51) + ((uint64_t)1 << 30),
};
#define AREAS (sizeof(areas) / sizeof(areas[0]))

struct pinned {
	uint64_t gpa, pages;
	unsigned count;
	struct iovec *iov;
	unsigned n;
};

struct guest {
	struct kage_vm *vm;
	struct or_vm * or ;
	struct kage_vcpu *vcpu[VCPUS];
	struct kage_dirty *log[OR_LOGS];
	bool ring[OR_LOGS];
	struct pinned pin[OR_PINS];
	unsigned id;
};

struct run {
	struct rng rng;
	uint64_t seed, step;
	struct kage_engine *engine;
	uint64_t limit;
	unsigned reach; /* areas in use */
	struct guest guest[MAX_GUESTS];
	unsigned count, next_id;
	struct or_file file[2]; /* FILE, FOREIGN */
	int fd[2];
	char history[HISTORY][200];
	uint64_t ops, refused, out_of_memory;
	bool verbose;
};

static struct total {
	uint64_t steps, refused, out_of_memory, merges, breaks, blocks_split, clones, checks, unshared;
} total;

static uint8_t buf_engine[BIG * OR_PAGE], buf_oracle[BIG * OR_PAGE], buf_new[BIG * OR_PAGE];
static uint8_t bits[BIG / 8 + 8];

/* -- reporting ------------------------------------------------------------- */

static void op(struct run *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void op(struct run *r, const char *fmt, ...)
{
	char *line = r->history[r->ops++ % HISTORY];
	int n = snprintf(line, sizeof(r->history[0]), "%5llu  ", (unsigned long long)r->step);
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line + n, sizeof(r->history[0]) - n, fmt, ap);
	va_end(ap);
	if (r->verbose)
		puts(line);
}

static void fail(struct run *r, const char *fmt, ...) __attribute__((format(printf, 2, 3), noreturn));
static void fail(struct run *r, const char *fmt, ...)
{
	va_list ap;

	printf("model: FAILED, step %llu: ", (unsigned long long)r->step);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\nlast operations:\n");
	for (uint64_t i = r->ops < HISTORY ? 0 : r->ops - HISTORY; i < r->ops; i++)
		printf("  %s\n", r->history[i % HISTORY]);
	printf("repeat: KAGE_SEED=%llu KAGE_SEQUENCES=1\n", (unsigned long long)r->seed);
	fflush(stdout);
	abort();
}

static void audit_line(void *opaque, const char *line)
{
	printf("audit: %s\n", line);
}

static void audit(struct run *r)
{
	struct kage_audit a = {.size = sizeof(a), .report = audit_line};
	int ret = kage_engine_audit(r->engine, &a);

	if (ret != KAGE_OK || a.violations != 0 || a.checks == 0)
		fail(r, "audit: %d, %llu of %llu checks violated", ret, (unsigned long long)a.violations,
		     (unsigned long long)a.checks);
	total.checks += a.checks;
}

static void log_line(void *opaque, int level, const char *line)
{
	printf("log: %s\n", line);
}

/* With `pages` more, would the limit really be passed? Tables and 2 MiB pieces included, generously. */
static void check_out_of_memory(struct run *r, uint64_t pages)
{
	struct kage_stats s = {.size = sizeof(s)};
	uint64_t used;

	r->out_of_memory++;
	if (r->limit == 0 || kage_stats_get(r->engine, NULL, &s) != KAGE_OK)
		fail(r, "-ENOMEM without a limit");
	used = s.frames_used + s.frames_table + s.frames_pending;
	if (used + pages + 600 < r->limit / OR_PAGE)
		fail(r, "-ENOMEM with %llu of %llu pages used", (unsigned long long)used,
		     (unsigned long long)r->limit / OR_PAGE);
}

/*
 * Compares a result with the oracle's, which is asked only if memory did not
 * run out: then the operation did not happen, and true is returned.
 */
static bool ran_out(struct run *r, int got, uint64_t pages)
{
	if (got != -ENOMEM)
		return false;
	check_out_of_memory(r, pages);
	return true;
}

static void expect(struct run *r, int got, int want)
{
	if (got != want)
		fail(r, "result %d, should be %d", got, want);
	if (want != 0)
		r->refused++;
}

/* -- contents -------------------------------------------------------------- */

/* Eight contents only, so that merging happens; 0 is the zero page. */
static void fill_pattern(uint8_t *page, unsigned pattern)
{
	for (unsigned i = 0; i < OR_PAGE / 8; i++) {
		uint64_t v = pattern == 0  ? 0
			     : pattern < 6 ? pattern * UINT64_C(0x0101010101010101)
					   : pattern * i;

		memcpy(page + 8 * i, &v, 8);
	}
}

static void fill_touched(uint64_t gpa, uint8_t *page)
{
	fill_pattern(page, gpa / OR_PAGE % 3);
}

static int touch(void *opaque, uint64_t gpa, void *page)
{
	fill_touched(gpa, page);
	return 0;
}

static void random_bytes(struct run *r, uint64_t gpa, uint8_t *buf, uint64_t len)
{
	if (gpa % OR_PAGE == 0 && len % OR_PAGE == 0) {
		for (uint64_t i = 0; i < len; i += OR_PAGE)
			fill_pattern(buf + i, rng_below(&r->rng, PATTERNS));
	} else {
		memset(buf, rng_below(&r->rng, 3), len);
	}
}

static void compare(struct run *r, struct guest *g, uint64_t gpa, const uint8_t *got, const uint8_t *want,
		    uint64_t len)
{
	uint64_t i = 0;

	if (memcmp(got, want, len) == 0)
		return;
	while (got[i] == want[i])
		i++;
	fail(r, "guest %u gpa 0x%llx: 0x%02x, should be 0x%02x", g->id, (unsigned long long)(gpa + i), got[i],
	     want[i]);
}

static void check_page(struct run *r, struct guest *g, const struct or_page *p, bool by_vcpu)
{
	uint8_t page[OR_PAGE];
	uint64_t gpa = p->gfn * OR_PAGE;
	int ret;

	if (!(p->prot & OR_R))
		return;
	if (by_vcpu && g->vcpu[0] != NULL) {
		ret = kage_vcpu_load(g->vcpu[0], gpa, page, OR_PAGE, NULL);
		if (ret == KAGE_OK)
			or_load(g->or, gpa, buf_oracle, OR_PAGE, &(uint64_t){0});
	} else {
		ret = kage_vm_read(g->vm, gpa, page, OR_PAGE);
	}
	if (ret != -ENOMEM || r->limit == 0)
		expect(r, ret, KAGE_OK);
	if (ret == KAGE_OK)
		compare(r, g, gpa, page, p->bytes, OR_PAGE);
}

static void check_some(struct run *r)
{
	struct guest *g = &r->guest[rng_below(&r->rng, r->count)];

	for (int i = 0; i < 4 && g->or->count != 0; i++)
		check_page(r, g, &g->or->page[rng_below(&r->rng, g->or->count)], i == 3);
}

/* How a page is held says nothing about its bytes, but no class may be impossible. */
static void check_classes(struct run *r, struct guest *g)
{
	uint8_t map[AREA_PAGES];

	for (unsigned a = 0; a < r->reach; a++) {
		expect(r, kage_page_map(g->vm, areas[a], sizeof(map) * OR_PAGE, map), KAGE_OK);
		for (unsigned i = 0; i < AREA_PAGES; i++) {
			struct or_page *p = or_page_at(g->or, areas[a] / OR_PAGE + i);
			bool zero =
			    map[i] == KAGE_PAGE_ZERO || (map[i] == KAGE_PAGE_UNTOUCHED && p && !p->fill);

			if ((map[i] == KAGE_PAGE_NONE) != (p == NULL))
				fail(r, "guest %u page 0x%llx: class %u", g->id,
				     (unsigned long long)(areas[a] / OR_PAGE + i), map[i]);
			for (unsigned b = 0; zero && p->kind == OR_ANON && b < OR_PAGE; b++)
				if (p->bytes[b] != 0)
					fail(r, "guest %u page 0x%llx: class %u, but not zero", g->id,
					     (unsigned long long)p->gfn, map[i]);
		}
	}
}

static void check_guest(struct run *r, struct guest *g)
{
	struct kage_stats s = {.size = sizeof(s)};

	for (size_t i = 0; i < g->or->count; i++)
		check_page(r, g, &g->or->page[i], i % 2);
	check_classes(r, g);
	expect(r, kage_stats_get(r->engine, g->vm, &s), KAGE_OK);
	if (s.pages_nominal != or_nominal(g->or))
		fail(r, "guest %u: nominal %llu pages, should be %llu", g->id,
		     (unsigned long long)s.pages_nominal, (unsigned long long)or_nominal(g->or));
	if (s.pages_mapped + s.pages_untouched != s.pages_nominal)
		fail(r, "guest %u: mapped %llu + untouched %llu != nominal %llu", g->id,
		     (unsigned long long)s.pages_mapped, (unsigned long long)s.pages_untouched,
		     (unsigned long long)s.pages_nominal);
}

/* -- where ----------------------------------------------------------------- */

struct where {
	uint64_t gpa, len;
};

/* Any page-aligned range inside an area; mostly it begins in memory that exists. */
static struct where some_range(struct run *r, struct guest *g, uint64_t most)
{
	uint64_t pages = 1 + rng_below(&r->rng, rng_chance(&r->rng, 85) ? (most < 12 ? most : 12) : most);
	unsigned area = rng_below(&r->rng, r->reach);
	uint64_t first = areas[area] / OR_PAGE + rng_below(&r->rng, AREA_PAGES), end;

	if (g->or->count != 0 && rng_chance(&r->rng, 94))
		first = g->or->page[rng_below(&r->rng, g->or->count)].gfn;
	for (area = 0; area + 1 < AREAS && areas[area + 1] / OR_PAGE <= first; area++)
		;
	if (rng_chance(&r->rng, 10))
		first &= ~(uint64_t)511;
	end = areas[area] / OR_PAGE + AREA_PAGES;
	if (first + pages > end)
		pages = end - first;
	return (struct where){first * OR_PAGE, pages * OR_PAGE};
}

static struct where some_bytes(struct run *r, struct guest *g, uint64_t most)
{
	struct where w = some_range(r, g, 1);

	w.gpa += rng_below(&r->rng, OR_PAGE);
	w.len = 1 + rng_below(&r->rng, most);
	return w;
}

static struct guest *some_guest(struct run *r)
{
	return &r->guest[rng_below(&r->rng, r->count)];
}

/* Now and then a range that no call may take. */
static bool spoil(struct run *r, struct where *w)
{
	if (!rng_chance(&r->rng, 2))
		return false;
	switch (rng_below(&r->rng, 3)) {
	case 0:
		w->gpa += 1 + rng_below(&r->rng, OR_PAGE - 1);
		break;
	case 1:
		w->len += 1 + rng_below(&r->rng, OR_PAGE - 1);
		break;
	default:
		w->gpa = ~(uint64_t)0 << 12;
		w->len = 2 * OR_PAGE;
		break;
	}
	return true;
}

#define W(w) (unsigned long long)(w).gpa, (unsigned long long)(w).len

/* -- operations: regions --------------------------------------------------- */

static unsigned some_prot(struct run *r)
{
	static const unsigned prots[] = {0, 0, 7, 7, 3, 3, 1, 5};

	return prots[rng_below(&r->rng, 8)];
}

static void choose_kind(struct run *r, struct or_region *o, struct kage_region *k, uint64_t pages)
{
	unsigned dice = rng_below(&r->rng, 100);

	if (dice < 70)
		o->flags = OR_MERGEABLE;
	else if (dice < 76)
		o->flags = OR_EXTERNAL;
	else if (dice < 82)
		o->flags = OR_TRAP | (rng_chance(&r->rng, 50) ? OR_MERGEABLE : 0);
	else if (dice < 86 && pages <= FILE_PAGES)
		o->kind = OR_FILE;
	else if (dice < 90 && pages <= FILE_PAGES)
		o->kind = OR_FOREIGN;
	if (o->kind != OR_ANON) {
		o->file = &r->file[o->kind == OR_FOREIGN];
		o->offset = rng_below(&r->rng, FILE_PAGES + 2 - pages) * OR_PAGE;
	}
	k->kind = o->kind;
	k->flags = (o->flags & OR_MERGEABLE ? KAGE_REGION_MERGEABLE : 0) |
		   (o->flags & OR_EXTERNAL ? KAGE_REGION_EXTERNAL : 0) |
		   (o->flags & OR_TRAP ? KAGE_REGION_TRAP : 0) | (o->kind != OR_ANON ? KAGE_REGION_FD : 0) |
		   (rng_chance(&r->rng, 15) ? KAGE_REGION_NOHUGE : 0);
	k->fd = o->kind != OR_ANON ? r->fd[o->kind == OR_FOREIGN] : 0;
	k->offset = o->offset;
	if (o->flags & OR_TRAP) {
		o->fill = fill_touched;
		k->touch = touch;
	}
}

static uint64_t region_pages(struct run *r)
{
	unsigned dice = rng_below(&r->rng, 100);

	return dice < 50   ? 1 + rng_below(&r->rng, 40)
	       : dice < 92 ? 64 + rng_below(&r->rng, 100)
			   : 512 + rng_below(&r->rng, 200);
}

/* Inside one area, more often than not at a border of 2 MiB. */
static uint64_t some_place(struct run *r, uint64_t pages)
{
	uint64_t area = areas[rng_below(&r->rng, r->reach)], last = AREA_PAGES - pages;

	if (rng_chance(&r->rng, 60))
		return area + (last >= 512 ? rng_below(&r->rng, 2) * 512 : 0) * OR_PAGE;
	return area + rng_below(&r->rng, last + 1) * OR_PAGE;
}

static void do_map(struct run *r, struct guest *g)
{
	struct kage_region k = {.size = sizeof(k)};
	struct or_region o = {0};
	struct where w;
	int ret;

	o.len = region_pages(r) * OR_PAGE;
	if (g->or->count + o.len / OR_PAGE > MAX_PAGES)
		return;
	o.gpa = some_place(r, o.len / OR_PAGE);
	choose_kind(r, &o, &k, o.len / OR_PAGE);
	w = (struct where){o.gpa, o.len};
	spoil(r, &w);
	o.gpa = k.gpa = w.gpa;
	o.len = k.len = w.len;
	o.prot = k.prot = some_prot(r);
	op(r, "guest %u map 0x%llx + 0x%llx kind %u flags 0x%x prot %u", g->id, W(w), k.kind, k.flags,
	   k.prot);
	ret = kage_vm_map(g->vm, &k);
	if (!ran_out(r, ret, 0))
		expect(r, ret, or_map(g->or, &o));
}

static void do_unmap(struct run *r, struct guest *g)
{
	struct where w = some_range(r, g, rng_chance(&r->rng, 30) ? AREA_PAGES : 64);
	int ret;

	spoil(r, &w);
	op(r, "guest %u unmap 0x%llx + 0x%llx", g->id, W(w));
	ret = kage_vm_unmap(g->vm, w.gpa, w.len);
	if (!ran_out(r, ret, 0))
		expect(r, ret, or_unmap(g->or, w.gpa, w.len));
}

static void do_protect(struct run *r, struct guest *g)
{
	struct where w = some_range(r, g, 600);
	unsigned prot = some_prot(r);
	int ret;

	if (prot == 0 || rng_chance(&r->rng, 50))
		prot = KAGE_RWX;
	spoil(r, &w);
	op(r, "guest %u protect 0x%llx + 0x%llx prot %u", g->id, W(w), prot);
	ret = kage_vm_protect(g->vm, w.gpa, w.len, prot);
	if (!ran_out(r, ret, 0))
		expect(r, ret, or_protect(g->or, w.gpa, w.len, prot));
}

static bool has_kind(const struct guest *g, const struct where *w, unsigned kind)
{
	for (uint64_t i = 0; i < w->len / OR_PAGE; i++) {
		struct or_page *p = or_page_at(g->or, w->gpa / OR_PAGE + i);

		if (p != NULL && p->kind == kind)
			return true;
	}
	return false;
}

static void do_advise(struct run *r, struct guest *g)
{
	static const enum kage_advice advice[] = {
	    KAGE_ADVICE_MERGEABLE, KAGE_ADVICE_MERGEABLE, KAGE_ADVICE_UNMERGEABLE, KAGE_ADVICE_DISCARD,
	    KAGE_ADVICE_DISCARD,   KAGE_ADVICE_DISCARD,	  KAGE_ADVICE_WILLNEED,
	};
	enum kage_advice a = advice[rng_below(&r->rng, 7)];
	struct where w = some_range(r, g, 600);
	int ret;

	spoil(r, &w);
	op(r, "guest %u advise 0x%llx + 0x%llx advice %d", g->id, W(w), a);
	ret = kage_vm_advise(g->vm, w.gpa, w.len, a);
	if (!ran_out(r, ret, w.len / OR_PAGE))
		expect(r, ret, or_advise(g->or, w.gpa, w.len, (enum or_advice)a));
	else if (a == KAGE_ADVICE_WILLNEED || a == KAGE_ADVICE_UNMERGEABLE)
		or_advise(g->or, w.gpa, w.len, OR_WILLNEED); /* a part may be done: contents stay */
}

/* -- operations: access ---------------------------------------------------- */

/* How much of a range the oracle lets be written. */
static uint64_t writable(const struct guest *g, struct where w)
{
	uint64_t at = w.gpa;

	while (at < w.gpa + w.len) {
		struct or_page *p = or_page_at(g->or, at / OR_PAGE);

		if (p == NULL || !(p->prot & OR_W))
			return at - w.gpa;
		at = (at | (OR_PAGE - 1)) + 1;
	}
	return w.len;
}

/* What a range holds now, into buf_engine; a page that cannot be read for want of memory was not written
 * either. */
static void read_now(struct run *r, struct guest *g, struct where w)
{
	uint64_t piece;

	for (uint64_t n = 0; n < w.len; n += piece) {
		uint64_t off = (w.gpa + n) % OR_PAGE;
		int ret;

		piece = OR_PAGE - off < w.len - n ? OR_PAGE - off : w.len - n;
		ret = kage_vm_read(g->vm, w.gpa + n, buf_engine + n, piece);
		if (ret == -ENOMEM)
			or_read(g->or, w.gpa + n, buf_engine + n, piece);
		else
			expect(r, ret, KAGE_OK);
	}
}

/*
 * A write of buf_new ran out of memory. `whole`: nothing may have changed;
 * else each page is old or new, and the oracle takes what is.
 */
static void adopt_partial(struct run *r, struct guest *g, struct where w, bool whole)
{
	check_out_of_memory(r, w.len / OR_PAGE + 2);
	w.len = writable(g, w);
	read_now(r, g, w);
	if (whole) {
		or_read(g->or, w.gpa, buf_oracle, w.len);
		compare(r, g, w.gpa, buf_engine, buf_oracle, w.len);
	}
	if (!or_write_partly(g->or, w.gpa, buf_new, buf_engine, w.len))
		fail(r, "guest %u: a page is neither old nor new after -ENOMEM", g->id);
}

static void do_write(struct run *r, struct guest *g)
{
	struct where w = rng_chance(&r->rng, 60) ? some_range(r, g, 40) : some_bytes(r, g, 9000);
	bool one_page = w.gpa / OR_PAGE == (w.gpa + w.len - 1) / OR_PAGE;
	int ret;

	random_bytes(r, w.gpa, buf_new, w.len);
	op(r, "guest %u write 0x%llx + 0x%llx first byte 0x%02x", g->id, W(w), buf_new[0]);
	ret = kage_vm_write(g->vm, w.gpa, buf_new, w.len);
	if (ret != -ENOMEM) {
		expect(r, ret, or_write(g->or, w.gpa, buf_new, w.len));
		return;
	}
	adopt_partial(r, g, w, one_page);
}

static void do_read(struct run *r, struct guest *g)
{
	struct where w = rng_chance(&r->rng, 40) ? some_range(r, g, 200) : some_bytes(r, g, 9000);
	int ret;

	op(r, "guest %u read 0x%llx + 0x%llx", g->id, W(w));
	ret = kage_vm_read(g->vm, w.gpa, buf_engine, w.len);
	if (ran_out(r, ret, w.len / OR_PAGE + 1))
		return;
	expect(r, ret, or_read(g->or, w.gpa, buf_oracle, w.len));
	if (ret == KAGE_OK)
		compare(r, g, w.gpa, buf_engine, buf_oracle, w.len);
}

static void check_fault(struct run *r, struct guest *g, const struct kage_fault *f, struct where w,
			uint64_t done)
{
	uint64_t bad = w.gpa;

	while (bad < w.gpa + w.len) {
		struct or_page *p = or_page_at(g->or, bad / OR_PAGE);

		if (p == NULL || (p->prot & f->access) != f->access)
			break;
		bad = (bad | (OR_PAGE - 1)) + 1;
	}
	if (f->gva != bad || f->gpa != bad || f->done != done)
		fail(r, "fault at 0x%llx gpa 0x%llx after %llu bytes, should be 0x%llx after %llu",
		     (unsigned long long)f->gva, (unsigned long long)f->gpa, (unsigned long long)f->done,
		     (unsigned long long)bad, (unsigned long long)done);
}

static void vcpu_load(struct run *r, struct guest *g, struct kage_vcpu *v, struct where w, bool fetch)
{
	struct kage_fault f = {0};
	uint64_t done;
	int ret, want;

	op(r, "guest %u %s 0x%llx + 0x%llx", g->id, fetch ? "fetch" : "load", W(w));
	if (w.len == 8)
		ret = fetch ? kage_vcpu_fetch(v, w.gpa, buf_engine, 8, &f)
			    : kage_vcpu_load(v, w.gpa, buf_engine, 8, &f);
	else
		ret = fetch ? kage_vcpu_fetch(v, w.gpa, buf_engine, w.len, &f)
			    : kage_vcpu_load(v, w.gpa, buf_engine, w.len, &f);
	if (ran_out(r, ret, w.len / OR_PAGE + 2))
		return;
	want = fetch ? or_fetch(g->or, w.gpa, buf_oracle, w.len, &done)
		     : or_load(g->or, w.gpa, buf_oracle, w.len, &done);
	expect(r, ret, want);
	compare(r, g, w.gpa, buf_engine, buf_oracle, done);
	if (ret != KAGE_OK)
		check_fault(r, g, &f, w, done);
}

static void vcpu_store(struct run *r, struct guest *g, struct kage_vcpu *v, struct where w)
{
	struct kage_fault f = {0};
	uint64_t done;
	int ret;

	random_bytes(r, w.gpa, buf_new, w.len);
	op(r, "guest %u store 0x%llx + 0x%llx first byte 0x%02x", g->id, W(w), buf_new[0]);
	if (w.len == 8)
		ret = kage_vcpu_store(v, w.gpa, buf_new, 8, &f);
	else
		ret = kage_vcpu_store(v, w.gpa, buf_new, w.len, &f);
	if (ret == -ENOMEM) {
		adopt_partial(r, g, w, w.len <= OR_PAGE);
		return;
	}
	expect(r, ret, or_store(g->or, w.gpa, buf_new, w.len, &done));
	if (ret != KAGE_OK)
		check_fault(r, g, &f, w, done);
}

/* A pointer for an atomic instruction: used at once, inside the window. */
static void vcpu_pointer(struct run *r, struct guest *g, struct kage_vcpu *v, struct where w)
{
	uint64_t gpa = w.gpa & ~(uint64_t)7, done, word = rng_below(&r->rng, 3);
	struct kage_fault f = {0};
	void *p = NULL;
	int ret;

	op(r, "guest %u ptr 0x%llx word %llu", g->id, (unsigned long long)gpa, (unsigned long long)word);
	ret = kage_vcpu_ptr(v, gpa, 8, KAGE_READ | KAGE_WRITE, &p, &f);
	if (ran_out(r, ret, 2))
		return;
	if (or_load(g->or, gpa, buf_oracle, 8, &done) != 0 ||
	    or_store(g->or, gpa, buf_oracle, 8, &done) != 0) {
		expect(r, ret, KAGE_MMIO);
		return;
	}
	expect(r, ret, KAGE_OK);
	compare(r, g, gpa, p, buf_oracle, 8);
	memcpy(p, &word, 8);
	or_store(g->or, gpa, &word, 8, &done);
}

static void vcpu_access(struct run *r, struct guest *g, struct kage_vcpu *v, bool inside)
{
	struct where w = rng_chance(&r->rng, 3) ? some_range(r, g, 6) : some_bytes(r, g, 300);
	unsigned dice = rng_below(&r->rng, 100);

	if (rng_chance(&r->rng, 50))
		w.len = 8;
	if (inside && dice < 25)
		vcpu_pointer(r, g, v, w);
	else if (dice < 55)
		vcpu_load(r, g, v, w, false);
	else if (dice < 60)
		vcpu_load(r, g, v, w, true);
	else
		vcpu_store(r, g, v, w);
}

static void do_vcpu(struct run *r, struct guest *g)
{
	struct kage_vcpu **v = &g->vcpu[rng_below(&r->rng, VCPUS)];
	bool block = rng_chance(&r->rng, 40);

	if (*v == NULL && !rng_chance(&r->rng, 15))
		return;
	if (*v == NULL) {
		int ret = kage_vcpu_create(
		    g->vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .phys_bits = 52, .tlb_bits = 9),
		    v);

		if (ran_out(r, ret, 64))
			return;
		expect(r, ret, KAGE_OK);
		g->or->vcpus++;
	}
	if (block)
		kage_vcpu_enter(*v);
	for (unsigned i = 0; i < (block ? 6 : 3); i++)
		vcpu_access(r, g, *v, block);
	if (block)
		kage_vcpu_leave(*v);
}

static void do_vcpu_destroy(struct run *r, struct guest *g)
{
	unsigned i = rng_below(&r->rng, VCPUS);

	if (g->vcpu[i] == NULL)
		return;
	op(r, "guest %u vcpu %u destroyed", g->id, i);
	kage_vcpu_destroy(g->vcpu[i]);
	g->vcpu[i] = NULL;
	g->or->vcpus--;
}

/* -- operations: pins ------------------------------------------------------ */

static struct pinned *find_pinned(struct guest *g, uint64_t gpa, uint64_t pages)
{
	for (unsigned i = 0; i < OR_PINS; i++)
		if (g->pin[i].count != 0 && g->pin[i].gpa == gpa && g->pin[i].pages == pages)
			return &g->pin[i];
	for (unsigned i = 0; i < OR_PINS; i++)
		if (g->pin[i].count == 0)
			return &g->pin[i];
	return NULL;
}

/* A pinned page stays where it is: what the pointers show is what the guest has. */
static void check_pinned(struct run *r, struct guest *g, const struct pinned *p)
{
	uint64_t at = p->gpa;

	for (unsigned i = 0; i < p->n; i++) {
		for (uint64_t o = 0; o < p->iov[i].iov_len; o += OR_PAGE, at += OR_PAGE)
			compare(r, g, at, (uint8_t *)p->iov[i].iov_base + o,
				or_page_at(g->or, at / OR_PAGE)->bytes, OR_PAGE);
	}
	if (at != p->gpa + p->pages * OR_PAGE)
		fail(r, "guest %u: pin of %llu pages gave %llu", g->id, (unsigned long long)p->pages,
		     (unsigned long long)(at - p->gpa) / OR_PAGE);
}

static void do_pin(struct run *r, struct guest *g)
{
	struct where w = some_range(r, g, 40);
	struct pinned *p = find_pinned(g, w.gpa, w.len / OR_PAGE);
	struct iovec iov[AREA_PAGES];
	unsigned n = w.len / OR_PAGE;
	int ret;

	if (p == NULL || has_kind(g, &w, OR_FOREIGN))
		return;
	op(r, "guest %u pin 0x%llx + 0x%llx", g->id, W(w));
	ret = kage_vm_pin(g->vm, w.gpa, w.len, 0, iov, &n);
	if (ran_out(r, ret, w.len / OR_PAGE))
		return;
	expect(r, ret, or_pin(g->or, w.gpa, w.len));
	if (ret != KAGE_OK)
		return;
	if (p->count != 0 && (p->n != n || memcmp(p->iov, iov, n * sizeof(*iov)) != 0))
		fail(r, "guest %u: a pinned page moved", g->id);
	if (p->count++ == 0) {
		*p = (struct pinned){w.gpa, w.len / OR_PAGE, 1, malloc(n * sizeof(*iov)), n};
		memcpy(p->iov, iov, n * sizeof(*iov));
	}
	check_pinned(r, g, p);
}

static struct pinned *some_pinned(struct run *r, struct guest *g)
{
	unsigned from = rng_below(&r->rng, OR_PINS);

	for (unsigned i = 0; i < OR_PINS; i++)
		if (g->pin[(from + i) % OR_PINS].count != 0)
			return &g->pin[(from + i) % OR_PINS];
	return NULL;
}

static void unpin(struct run *r, struct guest *g, struct pinned *p)
{
	check_pinned(r, g, p);
	op(r, "guest %u unpin 0x%llx + 0x%llx", g->id, (unsigned long long)p->gpa,
	   (unsigned long long)p->pages * OR_PAGE);
	expect(r, kage_vm_unpin(g->vm, p->gpa, p->pages * OR_PAGE),
	       or_unpin(g->or, p->gpa, p->pages * OR_PAGE));
	if (--p->count == 0) {
		free(p->iov);
		*p = (struct pinned){0};
	}
}

static void do_unpin(struct run *r, struct guest *g)
{
	struct pinned *p = some_pinned(r, g);
	struct where w = some_range(r, g, 4);

	if (p != NULL)
		unpin(r, g, p);
	else
		expect(r, kage_vm_unpin(g->vm, w.gpa, w.len), or_unpin(g->or, w.gpa, w.len));
}

/* The device writes through a pinned pointer and says so. */
static void do_pin_write(struct run *r, struct guest *g)
{
	struct pinned *p = some_pinned(r, g);

	if (p == NULL)
		return;
	fill_pattern(buf_new, rng_below(&r->rng, PATTERNS));
	op(r, "guest %u device write 0x%llx", g->id, (unsigned long long)p->gpa);
	if (or_write(g->or, p->gpa, buf_new, OR_PAGE) != 0)
		return; /* protected since */
	memcpy(p->iov[0].iov_base, buf_new, OR_PAGE);
	expect(r, kage_vm_mark_dirty(g->vm, p->gpa, OR_PAGE), KAGE_OK);
}

/* -- operations: dirty logs ------------------------------------------------ */

static void do_log_open(struct run *r, struct guest *g)
{
	bool fine = rng_chance(&r->rng, 60), accessed = rng_chance(&r->rng, 20),
	     set = rng_chance(&r->rng, 20);
	bool ring = rng_chance(&r->rng, 30);
	struct kage_dirty *log;
	int i, ret;

	for (i = 0; i < OR_LOGS && g->log[i] != NULL; i++)
		;
	if (i == OR_LOGS)
		return;
	op(r, "guest %u log %d opened%s%s%s%s", g->id, i, fine ? " fine" : "", accessed ? " accessed" : "",
	   set ? " set" : "", ring ? " ring" : "");
	ret = kage_dirty_open(
	    g->vm,
	    KAGE_CFG(kage_dirty_config, .kind = accessed ? KAGE_DIRTY_ACCESSED : KAGE_DIRTY_WRITTEN,
		     .format = ring ? KAGE_DIRTY_RING : KAGE_DIRTY_BITMAP,
		     .flags = (fine ? KAGE_DIRTY_FINE : 0) | (set ? KAGE_DIRTY_INITIALLY_SET : 0)),
	    &log);
	if (ran_out(r, ret, 64))
		return;
	expect(r, ret, KAGE_OK);
	if (or_log_open(g->or, fine, accessed, set) != i)
		fail(r, "the driver lost count of the logs");
	g->log[i] = log;
	g->ring[i] = ring;
}

/* Runs to bits; returns whether the ring was full. */
static bool collect_ring(struct run *r, struct guest *g, int i, struct where w)
{
	struct kage_dirty_run runs[64];
	unsigned room = 1 + rng_below(&r->rng, 64);
	int n = kage_dirty_collect(g->log[i], w.gpa, w.len, runs, room * sizeof(runs[0]));

	if (n < 0 || (unsigned)n > room)
		fail(r, "guest %u log %d: collect returned %d", g->id, i, n);
	for (int k = 0; k < n; k++) {
		if (runs[k].pages == 0 || runs[k].gpa < w.gpa ||
		    runs[k].gpa + runs[k].pages * OR_PAGE > w.gpa + w.len)
			fail(r, "guest %u log %d: run outside of the range", g->id, i);
		for (uint64_t p = (runs[k].gpa - w.gpa) / OR_PAGE, e = p + runs[k].pages; p < e; p++) {
			if (bits[p / 8] >> (p % 8) & 1)
				fail(r, "guest %u log %d: a page twice", g->id, i);
			bits[p / 8] |= 1 << (p % 8);
		}
	}
	return (unsigned)n == room;
}

static void collect_bitmap(struct run *r, struct guest *g, int i, struct where w)
{
	uint64_t bytes = (w.len / OR_PAGE + 63) / 64 * 8;
	int n, count = 0;

	memset(bits, 0xff, bytes);
	n = kage_dirty_collect(g->log[i], w.gpa, w.len, bits, bytes);
	for (uint64_t b = 0; b < bytes; b++)
		count += __builtin_popcount(bits[b]);
	if (n != count)
		fail(r, "guest %u log %d: collect returned %d for %d bits", g->id, i, n, count);
}

static void collect(struct run *r, struct guest *g, int i, struct where w)
{
	bool partial = false;
	uint64_t gfn;
	int ret;

	op(r, "guest %u log %d collect 0x%llx + 0x%llx", g->id, i, W(w));
	memset(bits, 0, sizeof(bits));
	if (g->ring[i])
		partial = collect_ring(r, g, i, w);
	else
		collect_bitmap(r, g, i, w);
	ret = or_log_collect(g->or, i, w.gpa, w.len, bits, partial, &gfn);
	if (ret != 0)
		fail(r, "guest %u log %d: page 0x%llx %s", g->id, i, (unsigned long long)gfn,
		     ret == -1 ? "was written and is not reported" : "is reported and was not written");
}

static void do_collect(struct run *r, struct guest *g)
{
	int i = rng_below(&r->rng, OR_LOGS);
	struct where w = some_range(r, g, 600);

	if (g->log[i] == NULL)
		return;
	if (rng_chance(&r->rng, 50))
		w = (struct where){areas[rng_below(&r->rng, r->reach)], (uint64_t)AREA_PAGES * OR_PAGE};
	collect(r, g, i, w);
}

static void log_close(struct run *r, struct guest *g, int i)
{
	op(r, "guest %u log %d closed", g->id, i);
	kage_dirty_close(g->log[i]);
	g->log[i] = NULL;
	or_log_close(g->or, i);
}

static void do_log_close(struct run *r, struct guest *g)
{
	int i = rng_below(&r->rng, OR_LOGS);

	if (g->log[i] != NULL)
		log_close(r, g, i);
}

static void do_mark_dirty(struct run *r, struct guest *g)
{
	struct where w = some_bytes(r, g, 9000);

	op(r, "guest %u mark dirty 0x%llx + 0x%llx", g->id, W(w));
	expect(r, kage_vm_mark_dirty(g->vm, w.gpa, w.len), or_mark_dirty(g->or, w.gpa, w.len));
}

/* -- operations: guests and the engine ------------------------------------- */

static void add_guest(struct run *r, struct kage_vm *vm, struct or_vm * or)
{
	r->guest[r->count++] = (struct guest){.vm = vm, .or = or, .id = r->next_id++};
}

static void do_create(struct run *r, struct guest *g)
{
	struct kage_vm *vm;
	unsigned levels = rng_below(&r->rng, 6), domain = rng_chance(&r->rng, r->seed % 4 ? 0 : 40) ? 7 : 0;
	int ret;

	if (r->count == MAX_GUESTS)
		return;
	levels = levels < 2 ? 0 : levels;
	op(r, "guest %u created, %u levels, domain %u", r->next_id, levels, domain);
	ret = kage_vm_create(r->engine, KAGE_CFG(kage_vm_config, .levels = levels, .merge_domain = domain),
			     &vm);
	if (ran_out(r, ret, 16))
		return;
	expect(r, ret, KAGE_OK);
	add_guest(r, vm, or_create());
}

static void do_clone(struct run *r, struct guest *g)
{
	struct kage_vm *vm = NULL;
	int ret;

	if (r->count == MAX_GUESTS)
		return;
	op(r, "guest %u cloned to %u", g->id, r->next_id);
	ret = kage_vm_clone(g->vm, NULL, &vm);
	if (ran_out(r, ret, g->or->count)) {
		if (vm != NULL)
			fail(r, "a failed clone set its result");
		return;
	}
	expect(r, ret, KAGE_OK);
	add_guest(r, vm, or_clone(g->or));
}

/* What holds a guest goes first: pins, logs, vCPUs. */
static void release_guest(struct run *r, struct guest *g)
{
	struct pinned *p;

	while ((p = some_pinned(r, g)) != NULL)
		unpin(r, g, p);
	for (int i = 0; i < OR_LOGS; i++)
		if (g->log[i] != NULL)
			log_close(r, g, i);
	for (unsigned i = 0; i < VCPUS; i++) {
		kage_vcpu_destroy(g->vcpu[i]);
		g->vcpu[i] = NULL;
	}
	g->or->vcpus = 0;
}

static void do_destroy(struct run *r, struct guest *g)
{
	int ret, want;

	if (r->count <= MIN_GUESTS)
		return;
	if (rng_chance(&r->rng, 80))
		release_guest(r, g);
	check_guest(r, g);
	op(r, "guest %u destroyed", g->id);
	ret = kage_vm_destroy(g->vm);
	want = or_destroy(g->or);
	expect(r, ret, want);
	if (want == 0) {
		*g = r->guest[--r->count];
		r->guest[r->count] = (struct guest){0};
	}
}

static void do_step(struct run *r, struct guest *g)
{
	struct kage_progress p = {.size = sizeof(p)};
	struct kage_budget b = {.size = sizeof(b)};
	int ret;

	if (rng_chance(&r->rng, 30))
		b.pages = 1 + rng_below(&r->rng, 400);
	op(r, "step, %llu pages", (unsigned long long)b.pages);
	ret = kage_engine_step(r->engine, b.pages || rng_chance(&r->rng, 50) ? &b : NULL, &p);
	if (!ran_out(r, ret, 600))
		expect(r, ret, KAGE_OK);
	else
		return;
	if (p.more && b.pages == 0)
		fail(r, "a step without budget did not end its pass");
}

/*
 * Small sharing limits: an audit looks for each entry of a stable frame in all
 * places of the frame. Every tenth sequence goes without a limit.
 */
static int tune(struct run *r, bool merge, bool no_zero)
{
	unsigned most = r->seed % 10 == 9 ? 0 : 2 + rng_below(&r->rng, 40);

	op(r, "tune merge %d, no_zero_pages %d, max_sharing %u", merge, no_zero, most);
	return kage_engine_tune(r->engine, KAGE_CFG(kage_tune, .flags = merge ? KAGE_TUNE_MERGE : 0,
						    .no_zero_pages = no_zero, .max_sharing = most));
}

static void do_tune(struct run *r, struct guest *g)
{
	bool merge = rng_chance(&r->rng, 90);

	expect(r, tune(r, merge, rng_chance(&r->rng, 20)), KAGE_OK);
}

/* -- the sequence ---------------------------------------------------------- */

static const struct {
	unsigned weight;
	void (*run)(struct run *r, struct guest *g);
} operations[] = {
    {60, do_map},	{35, do_unmap},	   {45, do_protect},	  {90, do_advise},    {180, do_write},
    {60, do_read},	{200, do_vcpu},	   {25, do_vcpu_destroy}, {25, do_pin},	      {35, do_unpin},
    {15, do_pin_write}, {20, do_log_open}, {60, do_collect},	  {12, do_log_close}, {15, do_mark_dirty},
    {10, do_create},	{30, do_clone},	   {30, do_destroy},	  {120, do_step},     {5, do_tune},
};
#define OPERATIONS (sizeof(operations) / sizeof(operations[0]))

static void one_step(struct run *r)
{
	unsigned all = 0, dice, i;

	for (i = 0; i < OPERATIONS; i++)
		all += operations[i].weight;
	dice = rng_below(&r->rng, all);
	for (i = 0; dice >= operations[i].weight; i++)
		dice -= operations[i].weight;
	operations[i].run(r, some_guest(r));
	audit(r);
	check_some(r);
	if (r->step % 64 == 0)
		check_classes(r, some_guest(r));
}

static void make_file(struct run *r, int i)
{
	r->file[i] = (struct or_file){malloc(FILE_PAGES * OR_PAGE), FILE_PAGES};
	for (unsigned p = 0; p < FILE_PAGES; p++)
		fill_pattern(r->file[i].bytes + p * OR_PAGE, p % PATTERNS);
	r->fd[i] = memfd_create("model", MFD_CLOEXEC);
	if (r->fd[i] < 0 || write(r->fd[i], r->file[i].bytes, FILE_PAGES * OR_PAGE) != FILE_PAGES * OR_PAGE)
		fail(r, "no file for the test: %s", strerror(errno));
}

/* Merging in this domain fuses all that it looks at: what guests see is the same. */
static void harden(struct run *r, uint32_t domain)
{
	op(r, "domain %u hardened", domain);
	expect(r, kage_domain_configure(r->engine, domain,
					KAGE_CFG(kage_domain_config, .flags = KAGE_DOMAIN_HARDENED, .reserve_frames = 64)),
	       KAGE_OK);
}

static void start(struct run *r, uint64_t seed)
{
	struct kage_engine_config c = {.size = sizeof(c), .seed = seed + 1, .log = log_line};

	*r = (struct run){.rng = rng_seed(seed), .seed = seed, .verbose = env_number("KAGE_VERBOSE", 0)};
	r->reach = 1 + rng_below(&r->rng, AREAS);
	if (seed % 5 == 4)
		r->limit = (uint64_t)(512 + rng_below(&r->rng, 4096)) << 10;
	c.backing = seed % 2 ? KAGE_BACKING_MEMFD : KAGE_BACKING_ANON;
	c.memory_limit = r->limit;
	c.address_space = seed % 64 == 5 ? 0 : (uint64_t)1 << 36; /* the audit looks at every section of it */
	op(r, "seed %llu: backing %u, limit %llu, %u areas", (unsigned long long)seed, c.backing,
	   (unsigned long long)r->limit, r->reach);
	expect(r, kage_engine_create(&c, &r->engine), KAGE_OK);
	if (seed % 3 == 2 && !r->limit) /* a read may need memory there: not where that runs out */
		harden(r, seed % 4 ? 0 : 7);
	expect(r, tune(r, true, false), KAGE_OK);
	make_file(r, 0);
	make_file(r, 1);
	while (r->count < MIN_GUESTS)
		do_create(r, NULL);
	for (unsigned i = 0; i < 6; i++)
		do_map(r, &r->guest[i % r->count]);
}

static void add_totals(struct run *r)
{
	struct kage_stats s = {.size = sizeof(s)};

	expect(r, kage_stats_get(r->engine, NULL, &s), KAGE_OK);
	if (s.guests != r->count || s.retries_spurious != 0)
		fail(r, "%u guests (should be %u), %llu spurious retries", s.guests, r->count,
		     (unsigned long long)s.retries_spurious);
	total.steps += r->step;
	total.refused += r->refused;
	total.out_of_memory += r->out_of_memory;
	total.merges += s.ksm_merges;
	total.breaks += s.cow_breaks;
	total.blocks_split += s.blocks_split;
	total.clones += s.clones;
	total.unshared += s.tables_unshared;
}

/* Everything goes; nothing may be left behind. */
static void finish(struct run *r)
{
	struct kage_stats s = {.size = sizeof(s)};

	add_totals(r);
	while (r->count != 0) {
		struct guest *g = &r->guest[--r->count];

		check_guest(r, g);
		release_guest(r, g);
		expect(r, kage_vm_destroy(g->vm), KAGE_OK);
		or_free(g->or);
		audit(r);
	}
	expect(r, kage_engine_step(r->engine, NULL, NULL), KAGE_OK);
	expect(r, kage_stats_get(r->engine, NULL, &s), KAGE_OK);
	if (s.frames_used != 0 || s.frames_table != 0 || s.pages_mapped != 0 || s.ksm_pages_shared != 0)
		fail(r, "left behind: %llu frames, %llu tables, %llu stable frames",
		     (unsigned long long)s.frames_used, (unsigned long long)s.frames_table,
		     (unsigned long long)s.ksm_pages_shared);
	expect(r, kage_engine_destroy(r->engine), KAGE_OK);
	for (int i = 0; i < 2; i++) {
		close(r->fd[i]);
		free(r->file[i].bytes);
	}
}

static void run_sequences(uint64_t seed, uint64_t sequences, uint64_t steps, unsigned first, unsigned stride)
{
	static struct run r;

	for (uint64_t i = first; i < sequences; i += stride) {
		start(&r, seed + i);
		for (r.step = 0; r.step < steps; r.step++)
			one_step(&r);
		finish(&r);
	}
}

/* Sequences share nothing: each process takes every `jobs`-th. Returns false if one of them failed. */
static bool run_jobs(uint64_t seed, uint64_t sequences, uint64_t steps, unsigned jobs)
{
	struct total *part =
	    mmap(NULL, jobs * sizeof(*part), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	bool good = part != MAP_FAILED;
	int status;

	for (unsigned j = 0; good && j < jobs; j++) {
		if (fork() != 0)
			continue;
		run_sequences(seed, sequences, steps, j, jobs);
		part[j] = total;
		exit(0);
	}
	while (wait(&status) > 0)
		good &= WIFEXITED(status) && WEXITSTATUS(status) == 0;
	for (unsigned j = 0; good && j < jobs; j++)
		for (unsigned k = 0; k < sizeof(total) / sizeof(uint64_t); k++)
			((uint64_t *)&total)[k] += ((uint64_t *)&part[j])[k];
	return good;
}

#define LLU(field) (unsigned long long)total.field

int main(void)
{
	uint64_t seed = env_number("KAGE_SEED", 1), sequences = env_number("KAGE_SEQUENCES", 200);
	uint64_t steps = env_number("KAGE_STEPS", 2000),
		 jobs = env_number("KAGE_JOBS", sequences > 1 ? 2 : 1);
	bool good = true;

	printf("model: seed %llu, %llu sequences of %llu steps, %llu processes\n", (unsigned long long)seed,
	       (unsigned long long)sequences, (unsigned long long)steps, (unsigned long long)jobs);
	fflush(stdout);
	if (jobs > 1)
		good = run_jobs(seed, sequences, steps, jobs);
	else
		run_sequences(seed, sequences, steps, 0, 1);
	printf("model: %llu steps, %llu refused, %llu out of memory, %llu merges, %llu COW breaks, %llu "
	       "blocks split, "
	       "%llu clones, %llu tables un-shared, %llu audit checks\n",
	       LLU(steps), LLU(refused), LLU(out_of_memory), LLU(merges), LLU(breaks), LLU(blocks_split),
	       LLU(clones), LLU(unshared), LLU(checks));
	if (sequences >= 20 && steps >= 1000 &&
	    (!total.merges || !total.breaks || !total.clones || !total.unshared || !total.out_of_memory)) {
		printf("model: FAILED: something never happened\n");
		good = false;
	}
	return !good;
}
