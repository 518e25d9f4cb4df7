/* SPDX-License-Identifier: MIT */
/*
 * The naive model of guests (see oracle.h).
 *
 * Invariants: vm->page and log->page are sorted by gfn without duplicates;
 * page->bytes is owned by the page unless its kind is OR_FOREIGN.
 *
 * No locks: one thread. It is not simpler because sorted arrays are searched
 * by halving; the model runs hundreds of thousands of steps.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "oracle.h"

#define LARGE_PAGES 512

static void *must_alloc(void *p)
{
	if (p == NULL)
		abort();
	return p;
}

/* Index of the first page that is not below gfn. */
static size_t page_lower(const struct or_vm *vm, uint64_t gfn)
{
	size_t lo = 0, hi = vm->count;

	while (lo < hi) {
		size_t mid = (lo + hi) / 2;

		if (vm->page[mid].gfn < gfn)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

struct or_page *or_page_at(const struct or_vm *vm, uint64_t gfn)
{
	size_t i = page_lower(vm, gfn);

	return i < vm->count && vm->page[i].gfn == gfn ? &vm->page[i] : NULL;
}

uint64_t or_nominal(const struct or_vm *vm)
{
	return vm->count;
}

/* -- dirty logs ------------------------------------------------------------ */

static size_t dirty_lower(const struct or_log *log, uint64_t gfn)
{
	size_t lo = 0, hi = log->count;

	while (lo < hi) {
		size_t mid = (lo + hi) / 2;

		if (log->page[mid].gfn < gfn)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

static struct or_dirty *dirty_find(const struct or_log *log, uint64_t gfn)
{
	size_t i = dirty_lower(log, gfn);

	return i < log->count && log->page[i].gfn == gfn ? &log->page[i] : NULL;
}

static struct or_dirty *dirty_get(struct or_log *log, uint64_t gfn)
{
	size_t i = dirty_lower(log, gfn);

	if (i < log->count && log->page[i].gfn == gfn)
		return &log->page[i];
	if (log->count == log->room) {
		log->room = log->room ? 2 * log->room : 64;
		log->page = must_alloc(realloc(log->page, log->room * sizeof(*log->page)));
	}
	memmove(&log->page[i + 1], &log->page[i], (log->count - i) * sizeof(*log->page));
	log->count++;
	log->page[i] = (struct or_dirty){.gfn = gfn};
	return &log->page[i];
}

/* Neighbours in the 2 MiB around a page that is written may be reported with it. */
static void mark_neighbours(struct or_vm *vm, struct or_log *log, uint64_t gfn)
{
	uint64_t first = gfn & ~(uint64_t)(LARGE_PAGES - 1);

	for (size_t i = page_lower(vm, first); i < vm->count && vm->page[i].gfn < first + LARGE_PAGES; i++)
		dirty_get(log, vm->page[i].gfn)->may = true;
}

static void mark_log(struct or_vm *vm, struct or_log *log, uint64_t gfn, bool must)
{
	struct or_dirty *d = dirty_get(log, gfn);
	bool was = d->must || d->may;

	if (must)
		d->must = true;
	else
		d->may = true;
	if (!log->fine && !(was && must))
		mark_neighbours(vm, log, gfn);
}

/* Written: in logs of writes it must be reported, in logs of accesses it may. */
static void mark_written(struct or_vm *vm, uint64_t gfn)
{
	for (int i = 0; i < OR_LOGS; i++)
		if (vm->log[i].open)
			mark_log(vm, &vm->log[i], gfn, !vm->log[i].accessed);
}

static void mark_may(struct or_vm *vm, uint64_t gfn)
{
	for (int i = 0; i < OR_LOGS; i++)
		if (vm->log[i].open)
			mark_log(vm, &vm->log[i], gfn, false);
}

/* A vCPU used the page. */
static void mark_accessed(struct or_vm *vm, uint64_t gfn)
{
	for (int i = 0; i < OR_LOGS; i++)
		if (vm->log[i].open && vm->log[i].accessed)
			mark_log(vm, &vm->log[i], gfn, true);
}

/* The page is gone: whether the log remembers it is the engine's affair. */
static void mark_gone(struct or_vm *vm, uint64_t gfn)
{
	for (int i = 0; i < OR_LOGS; i++) {
		struct or_dirty *d = vm->log[i].open ? dirty_find(&vm->log[i], gfn) : NULL;

		if (d == NULL)
			continue;
		d->may |= d->must;
		d->must = false;
	}
}

int or_log_open(struct or_vm *vm, bool fine, bool accessed, bool initially_set)
{
	for (int i = 0; i < OR_LOGS; i++) {
		struct or_log *log = &vm->log[i];

		if (log->open)
			continue;
		*log = (struct or_log){.open = true, .fine = fine, .accessed = accessed};
		for (size_t p = 0; initially_set && p < vm->count; p++)
			dirty_get(log, vm->page[p].gfn)->must = true;
		return i;
	}
	return -1;
}

void or_log_close(struct or_vm *vm, int log)
{
	free(vm->log[log].page);
	vm->log[log] = (struct or_log){.open = false};
}

/* Reads are not followed: an existing page may be in a log of accesses; a first touch may count as a write.
 */
static bool excused(const struct or_vm *vm, const struct or_log *log, uint64_t gfn)
{
	const struct or_page *p = or_page_at(vm, gfn);

	return p != NULL && (log->accessed || p->fill != NULL);
}

int or_log_collect(struct or_vm *vm, int index, uint64_t gpa, uint64_t len, const uint8_t *bits, bool partial,
		   uint64_t *gfn)
{
	struct or_log *log = &vm->log[index];

	for (uint64_t i = 0; i < len / OR_PAGE; i++) {
		bool reported = bits[i / 8] >> (i % 8) & 1;
		struct or_dirty *d = dirty_find(log, gpa / OR_PAGE + i);

		*gfn = gpa / OR_PAGE + i;
		if (reported && (d == NULL || (!d->must && !d->may)) && !excused(vm, log, *gfn))
			return -2;
		if (!reported && !partial && d != NULL && d->must)
			return -1;
		if (d != NULL && (reported || !partial))
			d->must = d->may = false;
	}
	return 0;
}

/* -- lifetime -------------------------------------------------------------- */

struct or_vm *or_create(void)
{
	return must_alloc(calloc(1, sizeof(struct or_vm)));
}

struct or_vm *or_clone(const struct or_vm *parent)
{
	struct or_vm *vm = or_create();

	vm->count = parent->count;
	vm->page = must_alloc(malloc((vm->count + 1) * sizeof(*vm->page)));
	if (vm->count != 0)
		memcpy(vm->page, parent->page, vm->count * sizeof(*vm->page));
	for (size_t i = 0; i < vm->count; i++) {
		struct or_page *p = &vm->page[i];

		p->pins = 0;
		if (p->kind == OR_FOREIGN)
			continue;
		p->bytes = must_alloc(malloc(OR_PAGE));
		memcpy(p->bytes, parent->page[i].bytes, OR_PAGE);
	}
	return vm;
}

void or_free(struct or_vm *vm)
{
	if (vm == NULL)
		return;
	for (size_t i = 0; i < vm->count; i++)
		if (vm->page[i].kind != OR_FOREIGN)
			free(vm->page[i].bytes);
	for (int i = 0; i < OR_LOGS; i++)
		free(vm->log[i].page);
	free(vm->page);
	free(vm);
}

int or_destroy(struct or_vm *vm)
{
	if (vm->vcpus != 0)
		return -EBUSY;
	for (int i = 0; i < OR_LOGS; i++)
		if (vm->log[i].open)
			return -EBUSY;
	for (int i = 0; i < OR_PINS; i++)
		if (vm->pin[i].count != 0)
			return -EBUSY;
	or_free(vm);
	return 0;
}

/* -- regions --------------------------------------------------------------- */

static bool bad_range(uint64_t gpa, uint64_t len)
{
	return len == 0 || gpa % OR_PAGE != 0 || len % OR_PAGE != 0 || gpa + len < gpa ||
	       gpa + len > OR_GPA_END;
}

/* What a page holds that nobody has written. */
static void fill_initial(struct or_page *p)
{
	if (p->kind == OR_FOREIGN)
		return; /* it is the file's, before and after */
	if (p->kind == OR_FILE)
		memcpy(p->bytes, p->file->bytes + p->file_page * OR_PAGE, OR_PAGE);
	else if (p->fill != NULL)
		p->fill(p->gfn * OR_PAGE, p->bytes);
	else
		memset(p->bytes, 0, OR_PAGE);
}

static void init_page(struct or_page *p, const struct or_region *r, uint64_t i)
{
	*p = (struct or_page){
	    .gfn = r->gpa / OR_PAGE + i,
	    .prot = r->prot ? r->prot : OR_R | OR_W | OR_X,
	    .kind = r->kind,
	    .flags = r->flags,
	    .file = r->file,
	    .file_page = r->offset / OR_PAGE + i,
	    .fill = r->flags & OR_TRAP ? r->fill : NULL,
	};
	if (p->kind == OR_FOREIGN) {
		p->read_only = !(p->prot & OR_W);
		p->bytes = p->file->bytes + p->file_page * OR_PAGE;
		return;
	}
	p->bytes = must_alloc(malloc(OR_PAGE));
	fill_initial(p);
}

int or_map(struct or_vm *vm, const struct or_region *r)
{
	uint64_t pages = r->len / OR_PAGE, first = r->gpa / OR_PAGE;
	size_t at;

	if (bad_range(r->gpa, r->len) || r->offset % OR_PAGE != 0)
		return -EINVAL;
	at = page_lower(vm, first);
	if (at < vm->count && vm->page[at].gfn < first + pages)
		return -EEXIST;
	if (r->kind != OR_ANON && r->offset / OR_PAGE + pages > r->file->pages)
		return -EOVERFLOW;
	vm->page = must_alloc(realloc(vm->page, (vm->count + pages) * sizeof(*vm->page)));
	memmove(&vm->page[at + pages], &vm->page[at], (vm->count - at) * sizeof(*vm->page));
	vm->count += pages;
	for (uint64_t i = 0; i < pages; i++)
		init_page(&vm->page[at + i], r, i);
	return 0;
}

/* Pages of a range as indices [*from, *to); true if there is no hole. */
static bool covered(const struct or_vm *vm, uint64_t gpa, uint64_t len, size_t *from, size_t *to)
{
	*from = page_lower(vm, gpa / OR_PAGE);
	*to = page_lower(vm, (gpa + len + OR_PAGE - 1) / OR_PAGE);
	return *to - *from == (gpa + len + OR_PAGE - 1) / OR_PAGE - gpa / OR_PAGE;
}

static bool any_pinned(const struct or_vm *vm, size_t from, size_t to)
{
	for (size_t i = from; i < to; i++)
		if (vm->page[i].pins != 0)
			return true;
	return false;
}

int or_unmap(struct or_vm *vm, uint64_t gpa, uint64_t len)
{
	size_t from, to;

	if (bad_range(gpa, len))
		return -EINVAL;
	covered(vm, gpa, len, &from, &to);
	if (any_pinned(vm, from, to))
		return -EBUSY;
	for (size_t i = from; i < to; i++) {
		mark_gone(vm, vm->page[i].gfn);
		if (vm->page[i].kind != OR_FOREIGN)
			free(vm->page[i].bytes);
	}
	if (from == to)
		return 0;
	memmove(&vm->page[from], &vm->page[to], (vm->count - to) * sizeof(*vm->page));
	vm->count -= to - from;
	return 0;
}

int or_protect(struct or_vm *vm, uint64_t gpa, uint64_t len, unsigned prot)
{
	size_t from, to;

	if (bad_range(gpa, len) || (prot & ~(unsigned)(OR_R | OR_W | OR_X)))
		return -EINVAL;
	if (!covered(vm, gpa, len, &from, &to))
		return -ENOENT;
	for (size_t i = from; i < to; i++)
		if (prot & OR_W && vm->page[i].read_only)
			return -EACCES;
	for (size_t i = from; i < to; i++)
		vm->page[i].prot = prot;
	return 0;
}

static void advise_page(struct or_vm *vm, struct or_page *p, enum or_advice advice)
{
	switch (advice) {
	case OR_MERGE:
		p->flags |= OR_MERGEABLE;
		break;
	case OR_UNMERGE:
		p->flags &= ~OR_MERGEABLE;
		mark_may(vm, p->gfn);
		break;
	case OR_DISCARD:
		fill_initial(p);
		mark_may(vm, p->gfn);
		break;
	case OR_WILLNEED:
		mark_may(vm, p->gfn);
		break;
	}
}

/* Memory that others use by its address is neither merged nor given back. */
static bool advice_fits(const struct or_page *p, enum or_advice advice)
{
	bool external = p->flags & OR_EXTERNAL;

	return !(advice == OR_MERGE && (external || p->kind == OR_FOREIGN)) &&
	       !(advice == OR_DISCARD && external);
}

int or_advise(struct or_vm *vm, uint64_t gpa, uint64_t len, enum or_advice advice)
{
	size_t from, to;

	if (bad_range(gpa, len))
		return -EINVAL;
	if (!covered(vm, gpa, len, &from, &to))
		return -ENOENT;
	for (size_t i = from; i < to; i++)
		if (!advice_fits(&vm->page[i], advice))
			return -EOPNOTSUPP;
	if (advice == OR_DISCARD && any_pinned(vm, from, to))
		return -EBUSY;
	for (size_t i = from; i < to; i++)
		advise_page(vm, &vm->page[i], advice);
	return 0;
}

/* -- access ---------------------------------------------------------------- */

/* Bytes from gpa on that may be accessed so, at most len. */
static uint64_t allowed(const struct or_vm *vm, uint64_t gpa, uint64_t len, unsigned prot)
{
	uint64_t n = 0;

	while (n < len) {
		struct or_page *p = or_page_at(vm, (gpa + n) / OR_PAGE);

		if (p == NULL || (p->prot & prot) != prot)
			return n;
		n += OR_PAGE - (gpa + n) % OR_PAGE;
	}
	return len;
}

/* Moves `len` bytes that exist, page by page. */
static void move(const struct or_vm *vm, uint64_t gpa, uint8_t *buf, uint64_t len, bool write)
{
	for (uint64_t n = 0; n < len;) {
		struct or_page *p = or_page_at(vm, (gpa + n) / OR_PAGE);
		uint64_t off = (gpa + n) % OR_PAGE, piece = OR_PAGE - off;

		if (piece > len - n)
			piece = len - n;
		if (write)
			memcpy(p->bytes + off, buf + n, piece);
		else
			memcpy(buf + n, p->bytes + off, piece);
		n += piece;
	}
}

static void mark_range(struct or_vm *vm, uint64_t gpa, uint64_t len,
		       void (*mark)(struct or_vm *, uint64_t gfn))
{
	for (uint64_t g = gpa / OR_PAGE; len != 0 && g <= (gpa + len - 1) / OR_PAGE; g++)
		if (or_page_at(vm, g) != NULL)
			mark(vm, g);
}

int or_read(const struct or_vm *vm, uint64_t gpa, void *buf, size_t len)
{
	if (allowed(vm, gpa, len, OR_R) < len)
		return OR_MMIO;
	move(vm, gpa, buf, len, false);
	return 0;
}

int or_write(struct or_vm *vm, uint64_t gpa, const void *buf, size_t len)
{
	if (allowed(vm, gpa, len, OR_W) < len)
		return OR_MMIO;
	move(vm, gpa, (uint8_t *)buf, len, true);
	mark_range(vm, gpa, len, mark_written);
	return 0;
}

/* All or nothing up to a page; of a longer access, the part before the first bad page. */
static int access_by_vcpu(struct or_vm *vm, uint64_t gpa, void *buf, size_t len, unsigned prot,
			  uint64_t *done)
{
	uint64_t n = allowed(vm, gpa, len, prot);

	*done = n < len && len <= OR_PAGE ? 0 : n;
	move(vm, gpa, buf, *done, prot == OR_W);
	mark_range(vm, gpa, *done, mark_accessed);
	if (prot == OR_W)
		mark_range(vm, gpa, *done, mark_written);
	return n < len ? OR_MMIO : 0;
}

int or_load(struct or_vm *vm, uint64_t gpa, void *buf, size_t len, uint64_t *done)
{
	return access_by_vcpu(vm, gpa, buf, len, OR_R, done);
}

int or_store(struct or_vm *vm, uint64_t gpa, const void *buf, size_t len, uint64_t *done)
{
	int ret = access_by_vcpu(vm, gpa, (void *)buf, len, OR_W, done);

	/* An access that fails in its second page may have got the right to write the first. */
	if (ret != 0)
		mark_range(vm, gpa, len, mark_may);
	return ret;
}

int or_fetch(struct or_vm *vm, uint64_t gpa, void *buf, size_t len, uint64_t *done)
{
	return access_by_vcpu(vm, gpa, buf, len, OR_X, done);
}

bool or_write_partly(struct or_vm *vm, uint64_t gpa, const uint8_t *buf, const uint8_t *now, size_t len)
{
	uint64_t piece;

	for (uint64_t n = 0; n < len; n += piece) {
		struct or_page *p = or_page_at(vm, (gpa + n) / OR_PAGE);
		uint64_t off = (gpa + n) % OR_PAGE;

		piece = OR_PAGE - off < len - n ? OR_PAGE - off : len - n;
		mark_may(vm, p->gfn);
		if (memcmp(p->bytes + off, now + n, piece) == 0)
			continue;
		if (memcmp(buf + n, now + n, piece) != 0)
			return false;
		memcpy(p->bytes + off, buf + n, piece);
		mark_written(vm, p->gfn);
	}
	return true;
}

int or_mark_dirty(struct or_vm *vm, uint64_t gpa, uint64_t len)
{
	if (len == 0 || gpa + len < gpa || gpa + len > OR_GPA_END)
		return -EINVAL;
	mark_range(vm, gpa, len, mark_written);
	/* Said of a page that does not exist: a log may repeat it. */
	for (uint64_t g = gpa / OR_PAGE; g <= (gpa + len - 1) / OR_PAGE; g++)
		mark_may(vm, g);
	return 0;
}

/* -- pins ------------------------------------------------------------------ */

static struct or_pin *find_pin(struct or_vm *vm, uint64_t gfn, uint64_t pages)
{
	for (int i = 0; i < OR_PINS; i++)
		if (vm->pin[i].count != 0 && vm->pin[i].gfn == gfn && vm->pin[i].pages == pages)
			return &vm->pin[i];
	return NULL;
}

static struct or_pin *free_pin(struct or_vm *vm)
{
	for (int i = 0; i < OR_PINS; i++)
		if (vm->pin[i].count == 0)
			return &vm->pin[i];
	abort(); /* the driver keeps count */
}

int or_pin(struct or_vm *vm, uint64_t gpa, uint64_t len)
{
	struct or_pin *pin = find_pin(vm, gpa / OR_PAGE, len / OR_PAGE);

	if (bad_range(gpa, len))
		return -EINVAL;
	if (allowed(vm, gpa, len, OR_W) < len)
		return OR_MMIO;
	if (pin == NULL)
		pin = free_pin(vm);
	*pin = (struct or_pin){gpa / OR_PAGE, len / OR_PAGE, pin->count + 1};
	for (uint64_t i = 0; i < pin->pages; i++) {
		or_page_at(vm, pin->gfn + i)->pins++;
		mark_may(vm, pin->gfn + i);
	}
	return 0;
}

int or_unpin(struct or_vm *vm, uint64_t gpa, uint64_t len)
{
	struct or_pin *pin = find_pin(vm, gpa / OR_PAGE, len / OR_PAGE);

	if (bad_range(gpa, len))
		return -EINVAL;
	if (pin == NULL)
		return -ENOENT;
	for (uint64_t i = 0; i < pin->pages; i++)
		or_page_at(vm, pin->gfn + i)->pins--;
	pin->count--;
	return 0;
}
