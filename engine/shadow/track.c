/* SPDX-License-Identifier: MIT */
/*
 * Watched writes: guest tables, their going out of sync, and code.
 *
 * A gfn that backs a synced shadow page is watched: nothing may write to it but
 * shadow_store() and the engine's own writes, and both end in shadow_written(),
 * which compares the entries that were written with what was made of them.
 *
 *      synced ----- written FLOOD times without a use in between ----> unsync
 *        ^                                                               |
 *        +-- QUIET flushes that found nothing changed; watched again ----+
 *
 * An unsync page may be written at will; the guest's flush instructions re-read
 * it, as hardware would. A flush by address misses a page that hangs nowhere, and
 * an address without a translation gets one without a flush: so a page that is
 * linked, or becomes a root, is re-read first, with what is unsync below it. Tables
 * in memory that others write (`foreign`) are always unsync. Pages above level 0
 * are only where a pointer to them is asked for (SHADOW_UNTRACK); written often,
 * they are zapped.
 *
 * Code: a page from which instructions were fetched is watched too, if any vCPU
 * wants to know. The first write breaks the watch: execute rights go, windows
 * end, callbacks run, and only then may anybody write.
 *
 * Invariants:
 *  R1  chunk->track has the bit of a gfn iff a page with that gfn is synced or
 *      syncing.
 *  R2  between the setting of a bit and the first trust in it lies a shootdown,
 *      if a vCPU could be writing (settle_seq, code_seq).
 *  R3  while `breaking`, no write is granted.
 *  R4  an unsync page has been re-read since the newest way to it from a root was
 *      made.
 *
 * Locks: the shadow lock for all of it; code_lock outside of it; callbacks under
 * code_lock and cpus_lock (read).
 */
#include "shadow/internal.h"

#define FLOOD	    3
#define FLOOD_UPPER 64
#define LONG_WRITE  (16 * PAGE_SIZE)
#define QUIET	    2

void watch(struct shadow *s, struct chunk *c, uint64_t *map, gfn_t gfn)
{
	unsigned n = level_index(gfn, 0);

	if (bit_test(map, n))
		return;
	bit_set(map, n);
	c->watched++;
	c->live++;
	chunk_drop_large(s, c);
	rmap_clear_write(s, c, gfn);
	if (s->direct_cpus)
		batch_add(s, gfn_gpa(gfn).v, 1, KAGE_WRITE);
}

void unwatch(struct shadow *s, struct chunk *c, uint64_t *map, gfn_t gfn)
{
	unsigned n = level_index(gfn, 0);

	if (!bit_test(map, n))
		return;
	bit_clear(map, n);
	c->watched--;
	if (--c->live == 0)
		chunk_put(s, c);
}

/* -- tables ----------------------------------------------------------------- */

static bool memory_is_foreign(struct shadow *s, gfn_t gfn)
{
	const struct region *r;
	bool foreign;

	rcu_enter();
	r = mm_region(s->mm, gfn);
	foreign = r && (r->kind == KAGE_REGION_FOREIGN || (r->flags & KAGE_REGION_EXTERNAL) || s->mm->mirror);
	rcu_leave();
	return foreign;
}

static void unsync_list_add(struct shadow *s, struct shadow_page *p)
{
	p->unsync = true;
	p->quiet = 0;
	list_add_tail(&s->unsync, &p->unsync_node);
	s->nunsync++;
	s->nunsync_upper += p->level > 0;
}

static void unsync_list_del(struct shadow *s, struct shadow_page *p)
{
	p->unsync = p->syncing = false;
	list_del(&p->unsync_node);
	s->nunsync--;
	s->nunsync_upper -= p->level > 0;
}

void track_page(struct shadow *s, struct shadow_page *p)
{
	struct chunk *c;

	p->foreign = memory_is_foreign(s, p->gfn);
	if (p->foreign) {
		unsync_list_add(s, p);
		return;
	}
	c = chunk_get(s, p->gfn);
	watch(s, c, c->track, p->gfn);
}

/* Unwatches a gfn that no page needs watched. */
static void unwatch_table(struct shadow *s, gfn_t gfn)
{
	struct chunk *c = chunk_find(s, gfn);

	for (struct shadow_page *q = page_next_table(s, NULL, gfn); q; q = page_next_table(s, q, gfn))
		if (!q->unsync || q->syncing)
			return;
	if (c)
		unwatch(s, c, c->track, gfn);
}

/* The page has left the hash. */
void untrack_page(struct shadow *s, struct shadow_page *p)
{
	if (p->unsync)
		unsync_list_del(s, p);
	unwatch_table(s, p->gfn);
}

void page_unsync(struct shadow *s, struct shadow_page *p)
{
	if (!p->unsync)
		unsync_list_add(s, p);
	p->syncing = false;
	p->quiet = 0;
	p->writes = 0;
	unwatch_table(s, p->gfn);
}

void gfn_unsync(struct shadow *s, gfn_t gfn)
{
	for (struct shadow_page *p = page_next_table(s, NULL, gfn); p; p = page_next_table(s, p, gfn))
		page_unsync(s, p);
}

/* Does what was made at p[idx] point where the guest's entry points? */
bool same_target(struct shadow *s, const struct shadow_page *p, unsigned idx, const struct guest_entry *g)
{
	const struct shadow_page *child;

	if (spte_is_leaf(p->spte[idx]))
		return g->leaf && p->side[idx].gfn == g->target.v;
	child = spte_child(s, p->spte[idx]);
	return child->gfn.v == g->target.v && (g->leaf ? child->role & ROLE_DIRECT : child->role == g->role);
}

/*
 * Makes an entry agree with the guest's again: keeps it, grants it what the
 * guest added, or drops it. `table` NULL: find the table.
 */
void sync_entry(struct shadow *s, struct shadow_page *p, unsigned idx, const void *table)
{
	spte_t e = p->spte[idx];
	struct guest_entry g;
	bool same;

	if (!(e & SPTE_P) || (p->role & ROLE_UNFED))
		return;
	rcu_enter();
	if (!table)
		table = table_map(s, p->gfn);
	same = table && guest_entry(s, p, idx, table_entry(p, table, idx), &g) && same_target(s, p, idx, &g);
	rcu_leave();
	if (!same || ((e ^ g.bits) & no_grants(p)) || (e & ~g.bits & SPTE_GUEST))
		page_drop(s, p, idx);
	else
		p->spte[idx] = (e & ~SPTE_NOAD) | g.bits;
}

/* True if anything changed. */
static bool sync_whole(struct shadow *s, struct shadow_page *p)
{
	const void *table;
	bool changed = false;

	rcu_enter();
	table = table_map(s, p->gfn);
	for (unsigned i = 0; p->live && i < LEVEL_ENTRIES; i++) {
		spte_t e = p->spte[i];

		if (!(e & SPTE_P))
			continue;
		if (table)
			sync_entry(s, p, i, table);
		else
			page_drop(s, p, i);
		changed |= p->spte[i] != e;
	}
	rcu_leave();
	return changed;
}

/* Do links lead from `top` to the page? Each page is asked once; recursion is bounded by the levels. */
static bool is_below(struct shadow *s, struct shadow_page *p, const struct shadow_page *top)
{
	if (p->level >= top->level)
		return p == top;
	if (p->asked == s->asking)
		return p->below;
	p->asked = s->asking;
	p->below = false;
	for (ref_t r = p->parents; r && !p->below; r = ref_side(s, r)->next)
		p->below = is_below(s, ref_page(s, r), top);
	return p->below;
}

void sync_below(struct shadow *s, struct shadow_page *top)
{
	if (!s->nunsync || !top->live)
		return;
	if (top->level == 0) {
		if (top->unsync)
			sync_whole(s, top);
		return;
	}
	s->asking++;
	list_for_each(n, &s->unsync) {
		struct shadow_page *p = container_of(n, struct shadow_page, unsync_node);

		if (is_below(s, p, top))
			sync_whole(s, p);
	}
}

/* Makes the entries agree that are made from bytes `first` to `last` of the frame. */
static void sync_bytes(struct shadow *s, struct shadow_page *p, uint64_t first, uint64_t last)
{
	uint64_t bytes = p->format->entry_bytes, own = p->first, n = LEVEL_ENTRIES >> p->split;

	first = MAX(first / bytes, own);
	last = MIN(last / bytes, own + n - 1);
	if (first > last)
		return;
	for (uint64_t i = (first - own) << p->split; i < (last + 1 - own) << p->split; i++)
		sync_entry(s, p, (unsigned)i, NULL);
}

void entry_used(struct shadow *s, gpa_t gpa, unsigned bytes)
{
	gfn_t gfn = gpa_gfn(gpa);

	lock_take(&s->lock);
	for (struct shadow_page *p = page_next_table(s, NULL, gfn); p; p = page_next_table(s, p, gfn))
		sync_bytes(s, p, gpa_offset(gpa), gpa_offset(gpa) + bytes - 1);
	batch_apply(s);
	lock_drop(&s->lock);
}

static void page_written(struct shadow *s, struct shadow_page *p, uint64_t first, uint64_t last)
{
	shadow_count_locked(s, table_writes);
	sync_bytes(s, p, first, last);
	if (p->unsync && !p->syncing)
		return;
	p->writes++;
	if (p->writes >= FLOOD && !p->nparents && !p->roots)
		page_zap(s, p);
	else if (p->writes >= FLOOD && p->level == 0)
		page_unsync(s, p);
	else if (p->writes >= FLOOD_UPPER)
		page_zap(s, p);
}

/* True: the page is watched as code, code_break() has to follow. */
static bool written_locked(struct shadow *s, gfn_t gfn, uint64_t offset, uint64_t len)
{
	struct shadow_page *next;

	for (struct shadow_page *p = page_next_table(s, NULL, gfn); p; p = next) {
		next = page_next_table(s, p, gfn);
		page_written(s, p, offset, offset + len - 1);
	}
	batch_apply(s);
	return chunk_code(chunk_find(s, gfn), gfn);
}

static void gfn_written(struct shadow *s, gfn_t gfn, uint64_t offset, uint64_t len)
{
	bool code;

	lock_take(&s->lock);
	code = written_locked(s, gfn, offset, len);
	lock_drop(&s->lock);
	if (code)
		code_break(s, gfn);
}

/* A long range: by the pages there are, not by the gfns. */
static void range_written(struct shadow *s, gpa_t gpa, uint64_t len)
{
	gfn_t start = gpa_gfn(gpa), last = gpa_gfn(GPA(gpa.v + len - 1));

	lock_take(&s->lock);
	list_for_each_safe(n, tmp, &s->pages) {
		struct shadow_page *p = container_of(n, struct shadow_page, node);

		if (!(p->role & ROLE_UNFED) && p->gfn.v >= start.v && p->gfn.v <= last.v)
			page_written(s, p, 0, PAGE_SIZE - 1);
	}
	batch_apply(s);
	lock_drop(&s->lock);
	break_code(s, start, gfn_add(last, 1));
}

/* shadow_written() takes the lock: who holds it and sees the bytes before that, sees the count too. */
void shadow_write_begin(struct shadow *s)
{
	atomic_fetch_add(&s->untold, 1);
	atomic_thread_fence(memory_order_release);
}

void shadow_write_end(struct shadow *s)
{
	atomic_fetch_sub(&s->untold, 1);
}

void shadow_written(struct shadow *s, gpa_t gpa, uint64_t len)
{
	if (len > LONG_WRITE) {
		range_written(s, gpa, len);
		return;
	}
	while (len) {
		uint64_t n = MIN(len, PAGE_SIZE - gpa_offset(gpa));

		gfn_written(s, gpa_gfn(gpa), gpa_offset(gpa), n);
		gpa.v += n;
		len -= n;
	}
}

/*
 * The whole store under the lock, where no change is in flight and the page may be written as it is: a change that begins
 * meanwhile waits for the lock. -ENOENT: there is more to do; KAGE_RETRY: a broadcast has ended the translation.
 */
static int store_present(struct shadow_cpu *cpu, gpa_t gpa, const void *buf, size_t len)
{
	struct shadow *s = cpu->shadow;
	struct mm_fault f = {.gfn = gpa_gfn(gpa), .access = KAGE_WRITE};
	bool code = false;
	int r = KAGE_RETRY;

	lock_take(&s->lock);
	if (cpu->resolved == s->broadcasts) {
		bool there = notify_quiet(&s->mm->notify, f.gfn, gfn_add(f.gfn, 1)) && mm_present(s->mm, &f);

		r = there ? KAGE_OK : -ENOENT;
		if (there) {
			guest_copy((char *)pfn_hva(s->mm->host->pool, f.pfn) + gpa_offset(gpa), buf, len);
			code = written_locked(s, f.gfn, gpa_offset(gpa), len);
		}
	}
	lock_drop(&s->lock);
	if (code)
		code_break(s, f.gfn);
	return r;
}

/* Stores by a translation that no broadcast has ended: one that comes waits for the lock. */
static bool store_resolved(struct shadow_cpu *cpu, void *to, const void *buf, size_t len)
{
	struct shadow *s = cpu->shadow;
	bool valid;

	lock_take(&s->lock);
	valid = cpu->resolved == s->broadcasts;
	if (valid)
		guest_copy(to, buf, len);
	lock_drop(&s->lock);
	return valid;
}

int shadow_store(struct shadow_cpu *cpu, gpa_t gpa, const void *buf, size_t len)
{
	struct shadow *s = cpu->shadow;
	gfn_t gfn = gpa_gfn(gpa);
	struct mm_fault f = {.gfn = gfn, .access = KAGE_WRITE, .reader = &cpu->reader};
	bool valid = true;
	int r = store_present(cpu, gpa, buf, len);

	if (r != -ENOENT)
		return r;
	shadow_write_begin(s);
	do {
		notify_read_begin(&cpu->reader, gfn, gfn_add(gfn, 1));
		r = mm_fault(s->mm, &f);
		if (!r && !notify_read_hold(&cpu->reader))
			r = KAGE_RETRY;
		if (!r)
			valid = store_resolved(cpu, (char *)pfn_hva(s->mm->host->pool, f.pfn) + gpa_offset(gpa),
					       buf, len);
		notify_read_end(&cpu->reader);
	} while (r == KAGE_RETRY);
	if (!r && valid)
		shadow_written(s, gpa, len);
	shadow_write_end(s);
	return r || valid ? r : KAGE_RETRY;
}

/* -- the guest's flushes ------------------------------------------------------ */

static bool may_map(const struct shadow_page *p, uint64_t gva)
{
	return p->reach == REACH_MANY || (p->reach == REACH_ONE && gva - p->gva < BLOCK_PAGES * PAGE_SIZE);
}

/* What is made from the guest entry that p[idx] is made from: a flush of a page is one of the guest's page size. */
static void sync_siblings(struct shadow *s, struct shadow_page *p, unsigned idx)
{
	unsigned n = 1u << p->split, first = idx & ~(n - 1);

	for (unsigned i = first; i < first + n; i++)
		sync_entry(s, p, i, NULL);
}

/* Unsync pages above level 0 are re-read whole: INVLPG drops every paging-structure cache (SDM vol.
 * 3A 4.10.4.1). */
static void sync_listed(struct shadow *s, uint64_t gva)
{
	list_for_each_safe(n, tmp, &s->unsync) {
		struct shadow_page *p = container_of(n, struct shadow_page, unsync_node);

		if (p->level > 0 || (p->rooted && p->reach == REACH_MANY))
			sync_whole(s, p);
		else if (may_map(p, gva))
			sync_siblings(s, p, level_index(GFN((gva - p->gva) >> PAGE_SHIFT), 0));
	}
}

static void sync_path(struct shadow *s, struct shadow_cpu *cpu, unsigned root, uint64_t gva)
{
	struct shadow_page *p = cpu->root[root];

	while (p) {
		unsigned idx = root_index(&cpu->mode.root[root], gva, p->level);

		if (p->unsync)
			sync_siblings(s, p, idx);
		p = spte_is_link(p->spte[idx]) ? spte_child(s, p->spte[idx]) : NULL;
	}
}

int shadow_sync_page(struct shadow_cpu *cpu, uint64_t gva)
{
	const struct pt_guest *mode = &cpu->mode;
	struct shadow *s = cpu->shadow;

	lock_take(&s->lock);
	if (s->nunsync && (mode->nroots || mode->asids)) {
		int root = mode->arch->root_of(mode, gva);

		if (mode->asids || s->nunsync_upper || root < 0 || !cpu->root[root])
			sync_listed(s, gva);
		else
			sync_path(s, cpu, (unsigned)root, gva);
		batch_apply(s);
	}
	lock_drop(&s->lock);
	return 0;
}

/* Watches a quiet page's gfn again. It is relied on after a shootdown (R2). */
static void start_syncing(struct shadow *s, struct shadow_page *p)
{
	struct chunk *c = chunk_get(s, p->gfn);

	p->syncing = true;
	watch(s, c, c->track, p->gfn);
	batch_apply(s);
	p->settle_seq = s->dirty_seq;
}

/* True if a page waits for a shootdown. */
static bool finish_syncing(struct shadow *s)
{
	bool wait = false;

	list_for_each_safe(n, tmp, &s->unsync) {
		struct shadow_page *p = container_of(n, struct shadow_page, unsync_node);

		if (!p->syncing)
			continue;
		if (unflushed(s, p->settle_seq)) {
			wait = true;
			continue;
		}
		sync_whole(s, p);
		unsync_list_del(s, p);
	}
	return wait;
}

static bool sync_all_locked(struct shadow *s)
{
	list_for_each_safe(n, tmp, &s->unsync) {
		struct shadow_page *p = container_of(n, struct shadow_page, unsync_node);

		p->quiet = sync_whole(s, p) ? 0 : p->quiet + 1;
		if (p->quiet >= QUIET && !p->foreign && !p->syncing && s->nfree_chunks)
			start_syncing(s, p);
	}
	return finish_syncing(s);
}

int shadow_sync_all(struct shadow *s)
{
	bool wait = false;
	int r = 0;

	lock_take(&s->lock);
	if (s->nunsync)
		wait = sync_all_locked(s);
	batch_apply(s);
	lock_drop(&s->lock);
	if (!wait)
		return 0;
	r = shootdown(s, true);
	lock_take(&s->lock);
	finish_syncing(s);
	batch_apply(s);
	lock_drop(&s->lock);
	return r;
}

/* -- code --------------------------------------------------------------------- */

static void tell_code_written(struct shadow *s, gfn_t gfn)
{
	struct brlock_held held = brlock_read(&s->cpus_lock);

	list_for_each(n, &s->cpus) {
		struct shadow_cpu *cpu = container_of(n, struct shadow_cpu, node);

		if (cpu->ops->code_written)
			cpu->ops->code_written(cpu, gfn_gpa(gfn), PAGE_SIZE);
	}
	brlock_read_drop(&s->cpus_lock, held);
}

/* Ends the watch over a page of code, if there is one; returns when every callback has. 0, or shootdown()'s
 * error. */
int code_break(struct shadow *s, gfn_t gfn)
{
	struct chunk *c;
	bool code;
	int r = 0;

	lock_take(&s->code_lock);
	lock_take(&s->lock);
	c = chunk_find(s, gfn);
	code = chunk_code(c, gfn);
	if (code) {
		s->breaking++;
		rmap_drop(s, c, gfn);
		unwatch(s, c, c->code, gfn);
		if (s->direct_cpus)
			batch_add(s, gfn_gpa(gfn).v, 1, KAGE_EXEC);
		batch_apply(s);
	}
	lock_drop(&s->lock);
	if (code) {
		r = shootdown(s, true);
		tell_code_written(s, gfn);
		lock_take(&s->lock);
		s->breaking--;
		lock_drop(&s->lock);
	}
	lock_drop(&s->code_lock);
	return r;
}
