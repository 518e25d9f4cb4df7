/* SPDX-License-Identifier: MIT */
/*
 * Shadow pages: finding, making, linking, dropping entries, zapping.
 *
 * Pages are found by a hash on (gfn, role) and named by ids. The list `pages`
 * holds those in use, oldest first; `idle` those that nothing points to and
 * that are no vCPU's root at the moment: kept roots of address spaces, and
 * tables below them that the guest took out. When the limit is reached, idle
 * pages go first, then the oldest.
 *
 * A page remembers the guest virtual address it was reached by as long as that
 * is one (enum reach), so that a dropped entry clears one TLB tag. A page
 * reached by several costs a flush of whole contexts.
 *
 * Invariants:
 *  A1  REACH_ONE of a page implies of each child: REACH_MANY, or REACH_ONE at
 *      the address its index says (or the page has no parents and its children
 *      are checked when it gets one).
 *  A2  a page in the free list has no entry, no parent, no bit set anywhere.
 *  A3  memory comes and goes without the shadow lock: a walk begins only if
 *      pages_ready().
 *  A4  pages are allocated in runs, and a run is freed when none of its pages is
 *      in use. A guest with many pages gets them 2 MiB at a time, which the host
 *      may back by huge pages: random walks miss the host's TLB less.
 *
 * Locks: the shadow lock, except pages_topup() and pages_trim(), which take it,
 * and pages_init() and pages_finish().
 *
 * Why not simpler: a growing hash and id table, since guests come in all sizes
 * and there may be thousands.
 */
#include "shadow/internal.h"

#define TRIM_ABOVE 64

static uint32_t page_slot(const struct shadow *s, gfn_t gfn, uint32_t bits)
{
	return (uint32_t)((gfn.v * 0x9e3779b97f4a7c15ull) >> (64 - bits));
}

struct shadow_page *page_find(struct shadow *s, gfn_t gfn, uint64_t role)
{
	struct shadow_page *p = s->page_hash[page_slot(s, gfn, s->page_bits)];

	while (p && (p->gfn.v != gfn.v || p->role != role))
		p = p->hash_next;
	return p;
}

struct shadow_page *page_next_table(struct shadow *s, struct shadow_page *after, gfn_t gfn)
{
	struct shadow_page *p = after ? after->hash_next : s->page_hash[page_slot(s, gfn, s->page_bits)];

	while (p && (p->gfn.v != gfn.v || (p->role & ROLE_UNFED)))
		p = p->hash_next;
	return p;
}

/* -- reach ----------------------------------------------------------------- */

uint64_t entry_gva(const struct shadow_page *p, unsigned idx)
{
	unsigned shift = PAGE_SHIFT + LEVEL_BITS * p->level;
	uint64_t gva = p->gva + ((uint64_t)idx << shift);
	unsigned top = shift + LEVEL_BITS - 1;

	/* Only a root's own entries reach the upper half; below it the address has the sign already. */
	if (p->format && p->format->sign_extended && p->level == p->format->levels - 1u && (gva >> top & 1))
		gva |= ~(uint64_t)0 << top;
	return gva;
}

/* A link at `gva` (or anywhere, if !one) leads to the page from now on. Recursion is bounded by the levels.
 */
static void reach_add(struct shadow *s, struct shadow_page *p, bool one, uint64_t gva)
{
	if (one && p->reach == REACH_ONE && p->gva == gva)
		return;
	if (p->reach == REACH_MANY)
		return;
	p->reach = one && p->reach == REACH_NONE ? REACH_ONE : REACH_MANY;
	p->gva = gva;
	for (unsigned i = 0; p->level && p->live && i < LEVEL_ENTRIES; i++)
		if (spte_is_link(p->spte[i]))
			reach_add(s, spte_child(s, p->spte[i]), p->reach == REACH_ONE, entry_gva(p, i));
}

/* TLBs must lose `kinds` of what the entry maps. */
void entry_lost(struct shadow *s, struct shadow_page *p, unsigned idx, uint32_t kinds)
{
	if (p->reach == REACH_ONE)
		batch_add(s, entry_gva(p, idx), level_pages(p->level), kinds);
	else if (p->reach == REACH_MANY)
		s->batch_flush |= kinds;
}

/* -- entries --------------------------------------------------------------- */

static void idle_check(struct shadow *s, struct shadow_page *p)
{
	list_del(&p->idle);
	if (!p->nparents && !p->roots)
		list_add_tail(&s->idle, &p->idle);
}

void page_link(struct shadow *s, struct shadow_page *p, unsigned idx, spte_t guest, struct shadow_page *child)
{
	kage_assert(!(p->spte[idx] & SPTE_P));
	p->side[idx] = (struct side){.gfn = child->gfn.v, .next = child->parents};
	if (child->parents)
		ref_side(s, child->parents)->prev = REF(p, idx);
	child->parents = REF(p, idx);
	child->nparents++;
	idle_check(s, child);
	p->spte[idx] = SPTE_P | SPTE_LINK | guest | (spte_t)child->id << PAGE_SHIFT;
	p->live++;
	if (p->reach != REACH_NONE)
		reach_add(s, child, p->reach == REACH_ONE, entry_gva(p, idx));
	shadow_count_locked(s, installed);
	trace(s->env, shadow_install, s->mm->id, child->gfn.v, p->level);
}

static void page_unlink(struct shadow *s, struct shadow_page *p, unsigned idx, struct shadow_page *child)
{
	struct side *side = &p->side[idx];

	if (side->next)
		ref_side(s, side->next)->prev = side->prev;
	if (side->prev)
		ref_side(s, side->prev)->next = side->next;
	else
		child->parents = side->next;
	*side = (struct side){0};
	child->nparents--;
	if (!child->nparents && !child->rooted)
		child->reach = REACH_NONE;
	idle_check(s, child);
}

/* Puts a leaf in place of nothing or of a leaf for the same gfn. */
void page_set_leaf(struct shadow *s, struct shadow_page *p, unsigned idx, spte_t e, gfn_t gfn)
{
	if (p->spte[idx] & SPTE_P) {
		p->spte[idx] = e;
		return;
	}
	p->spte[idx] = e;
	p->live++;
	rmap_add(s, p, idx, gfn, e & SPTE_LARGE);
	shadow_count_locked(s, installed);
	trace(s->env, shadow_install, s->mm->id, gfn.v, p->level);
}

void page_drop(struct shadow *s, struct shadow_page *p, unsigned idx)
{
	spte_t e = p->spte[idx];

	if (!(e & SPTE_P))
		return;
	entry_lost(s, p, idx, KAGE_RWX);
	p->spte[idx] = 0;
	p->live--;
	if (e & SPTE_LINK)
		page_unlink(s, p, idx, spte_child(s, e));
	else
		rmap_del(s, p, idx, e & SPTE_LARGE);
	shadow_count_locked(s, dropped);
}

void entry_clear_write(struct shadow *s, struct shadow_page *p, unsigned idx)
{
	page_settle(s, p);
	if (!(p->spte[idx] & SPTE_HW))
		return;
	p->spte[idx] &= ~SPTE_HW;
	entry_lost(s, p, idx, KAGE_WRITE);
}

/* The TLBs lost their write contexts when write_gen moved on. */
void page_void_writes(struct shadow *s, struct shadow_page *p)
{
	p->write_gen = s->write_gen;
	for (unsigned i = 0; p->live && i < LEVEL_ENTRIES; i++)
		if (spte_is_leaf(p->spte[i]))
			p->spte[i] &= ~SPTE_HW;
}

/* -- pages ----------------------------------------------------------------- */

struct shadow_page *page_get(struct shadow *s, gfn_t gfn, uint64_t role)
{
	struct shadow_page *p = page_find(s, gfn, role);
	uint32_t slot = page_slot(s, gfn, s->page_bits);

	if (p)
		return p;
	p = s->free_pages;
	kage_assert(p != NULL);
	s->free_pages = p->hash_next;
	s->nfree_pages--;
	s->npages++;
	if (!p->run->used++)
		s->nunused -= p->run->n;
	p->used = true;
	p->gfn = gfn;
	p->role = role;
	page_shape(p);
	p->writes = p->quiet = 0;
	p->unsync = p->foreign = p->syncing = p->rooted = false;
	p->gva = 0;
	p->reach = REACH_NONE;
	p->write_gen = s->write_gen;
	p->settle_seq = 0;
	p->hash_next = s->page_hash[slot];
	s->page_hash[slot] = p;
	list_add_tail(&s->pages, &p->node);
	list_init(&p->idle);
	list_init(&p->unsync_node);
	list_add_tail(&s->idle, &p->idle);
	if (!(role & ROLE_UNFED)) {
		s->ntables++;
		track_page(s, p);
	}
	return p;
}

static void page_unhash(struct shadow *s, struct shadow_page *p)
{
	struct shadow_page **pos = &s->page_hash[page_slot(s, p->gfn, s->page_bits)];

	while (*pos != p)
		pos = &(*pos)->hash_next;
	*pos = p->hash_next;
}

static void roots_forget(struct shadow *s, struct shadow_page *p)
{
	if (!p->roots)
		return;
	list_for_each(n, &s->cpus) {
		struct shadow_cpu *cpu = container_of(n, struct shadow_cpu, node);

		for (unsigned i = 0; i < PT_ROOTS; i++)
			if (cpu->root[i] == p)
				cpu->root[i] = NULL;
	}
	p->roots = 0;
}

void page_zap(struct shadow *s, struct shadow_page *p)
{
	while (p->parents)
		page_drop(s, ref_page(s, p->parents), ref_idx(p->parents));
	for (unsigned i = 0; p->live && i < LEVEL_ENTRIES; i++)
		page_drop(s, p, i);
	roots_forget(s, p);
	page_unhash(s, p);
	if (!(p->role & ROLE_UNFED)) {
		s->ntables--;
		untrack_page(s, p);
	}
	list_del(&p->node);
	list_del(&p->idle);
	p->used = false;
	p->hash_next = s->free_pages;
	s->free_pages = p;
	s->nfree_pages++;
	s->npages--;
	if (!--p->run->used)
		s->nunused += p->run->n;
}

void page_roots_put(struct shadow *s, struct shadow_cpu *cpu)
{
	for (unsigned i = 0; i < PT_ROOTS; i++) {
		struct shadow_page *p = cpu->root[i];

		if (!p)
			continue;
		cpu->root[i] = NULL;
		p->roots--;
		idle_check(s, p);
	}
}

void page_root_get(struct shadow *s, struct shadow_cpu *cpu, unsigned root, struct shadow_page *p)
{
	if (!p->rooted) /* else flushes have reached it, whether it was in use or not */
		sync_below(s, p);
	cpu->root[root] = p;
	p->roots++;
	p->rooted = true;
	reach_add(s, p, true, cpu->mode.root[root].base);
	idle_check(s, p);
}

static struct shadow_page *page_victim(struct shadow *s)
{
	if (!list_empty(&s->idle))
		return container_of(s->idle.next, struct shadow_page, idle);
	list_for_each(n, &s->pages) {
		struct shadow_page *p = container_of(n, struct shadow_page, node);

		if (!p->roots)
			return p;
	}
	return NULL;
}

/* In pages of guest memory for each shadow page; KVM's default is a fiftieth. */
#define LIMIT_SHARE 64
#define LIMIT_LEAST 1024

static uint32_t pages_limit(struct shadow *s)
{
	const struct regions *set;
	uint64_t n = 0;

	rcu_enter();
	set = atomic_load_explicit(&s->mm->regions, memory_order_acquire);
	for (uint32_t i = 0; set && i < set->count; i++)
		n += set->r[i].npages;
	rcu_leave();
	return (uint32_t)MIN(MAX(n / LIMIT_SHARE, LIMIT_LEAST), (uint64_t)1 << 22);
}

void pages_shrink(struct shadow *s)
{
	s->limit = pages_limit(s);
	while (s->npages + NEED_PAGES > s->limit) {
		struct shadow_page *p = page_victim(s);

		if (!p)
			return;
		page_zap(s, p);
	}
}

/* -- memory ---------------------------------------------------------------- */

bool pages_ready(const struct shadow *s)
{
	return s->nfree_pages >= NEED_PAGES && s->nfree_chunks >= NEED_CHUNKS;
}

static void page_rehash(struct shadow *s, struct shadow_page **table, uint32_t bits)
{
	list_for_each(n, &s->pages) {
		struct shadow_page *p = container_of(n, struct shadow_page, node);
		uint32_t slot = page_slot(s, p->gfn, bits);

		p->hash_next = table[slot];
		table[slot] = p;
	}
	s->page_hash = table;
	s->page_bits = bits;
}

static void chunk_rehash(struct shadow *s, struct chunk **table, uint32_t bits)
{
	struct chunk **old = s->chunk_hash;
	uint32_t n = 1u << s->chunk_bits;

	for (uint32_t i = 0; i < n; i++) {
		for (struct chunk *c = old[i], *next; c; c = next) {
			uint32_t slot = (uint32_t)((c->key * 0x9e3779b97f4a7c15ull) >> (64 - bits));

			next = c->hash_next;
			c->hash_next = table[slot];
			table[slot] = c;
		}
	}
	s->chunk_hash = table;
	s->chunk_bits = bits;
}

/* What a walk might miss, in the order in which it must come. Under the lock. */
enum lack { LACK_NOTHING, LACK_IDS, LACK_PAGE_HASH, LACK_CHUNK_HASH, LACK_PAGE, LACK_CHUNK };

/* How many pages are allocated at a time: never more than there are. */
static uint32_t run_pages(const struct shadow *s)
{
	return s->npages + s->nfree_pages < RUN_PAGES ? 1 : RUN_PAGES;
}

static size_t run_bytes(uint32_t n)
{
	return n > 1 ? RUN_BYTES : sizeof(struct page_run) + sizeof(struct shadow_page);
}

static enum lack what_lacks(const struct shadow *s)
{
	if (s->nfree_pages < 2 * NEED_PAGES && s->nfree_ids + s->id_cap - s->page_ids < run_pages(s))
		return LACK_IDS;
	if (s->npages >> s->page_bits > 1)
		return LACK_PAGE_HASH;
	if (s->nchunks >> s->chunk_bits > 1)
		return LACK_CHUNK_HASH;
	if (s->nfree_pages < 2 * NEED_PAGES)
		return LACK_PAGE;
	return s->nfree_chunks < 2 * NEED_CHUNKS ? LACK_CHUNK : LACK_NOTHING;
}

static size_t table_bytes(const struct shadow *s, enum lack lack)
{
	if (lack == LACK_IDS)
		return (size_t)s->id_cap * sizeof(void *);
	return ((size_t)1 << (lack == LACK_PAGE_HASH ? s->page_bits : s->chunk_bits)) * sizeof(void *);
}

/* Puts a table of twice the size in place; returns the old one. */
static void *table_replace(struct shadow *s, enum lack lack, void *table)
{
	void *old;

	if (lack == LACK_PAGE_HASH) {
		old = s->page_hash;
		page_rehash(s, table, s->page_bits + 1);
	} else if (lack == LACK_CHUNK_HASH) {
		old = s->chunk_hash;
		chunk_rehash(s, table, s->chunk_bits + 1);
	} else {
		old = s->page_by_id;
		memcpy(table, old, table_bytes(s, lack));
		s->page_by_id = table;
		s->id_cap *= 2;
	}
	return old;
}

static uint32_t id_take(struct shadow *s)
{
	uint32_t id = s->free_id;

	if (!id)
		return s->page_ids++;
	s->free_id = (uint32_t)((uintptr_t)s->page_by_id[id] >> 1);
	s->nfree_ids--;
	return id;
}

static void id_give(struct shadow *s, uint32_t id)
{
	s->page_by_id[id] = (void *)((uintptr_t)s->free_id << 1 | 1);
	s->free_id = id;
	s->nfree_ids++;
}

static void add_page(struct shadow *s, struct page_run *run, struct shadow_page *p)
{
	p->run = run;
	p->id = id_take(s);
	s->page_by_id[p->id] = p;
	list_init(&p->idle);
	list_init(&p->unsync_node);
	p->hash_next = s->free_pages;
	s->free_pages = p;
	s->nfree_pages++;
}

/* The first page is the next one to be used. */
static void add_run(struct shadow *s, struct page_run *run, uint32_t n)
{
	run->n = n;
	list_add_tail(&s->runs, &run->node);
	s->nunused += n;
	while (n--)
		add_page(s, run, &run->page[n]);
}

static void add_chunk(struct shadow *s, struct chunk *c)
{
	c->hash_next = s->free_chunks;
	s->free_chunks = c;
	s->nfree_chunks++;
}

/* Allocates one thing without the lock and puts it in place; somebody else may have been faster. */
static int supply(struct shadow *s, enum lack lack, size_t table, uint32_t pages)
{
	size_t bytes = lack == LACK_PAGE    ? run_bytes(pages)
		       : lack == LACK_CHUNK ? sizeof(struct chunk)
					    : 2 * table;
	void *mem = env_alloc(s->env, bytes);

	if (!mem && lack == LACK_PAGE && pages > 1)
		return supply(s, lack, table, 1);
	if (!mem)
		return -ENOMEM;
	lock_take(&s->lock);
	if (what_lacks(s) == lack && (lack >= LACK_PAGE || table_bytes(s, lack) == table)) {
		if (lack == LACK_PAGE)
			add_run(s, mem, pages);
		else if (lack == LACK_CHUNK)
			add_chunk(s, mem);
		mem = lack >= LACK_PAGE ? NULL : table_replace(s, lack, mem);
		bytes = table;
	}
	lock_drop(&s->lock);
	env_free(s->env, mem, bytes);
	return 0;
}

int pages_topup(struct shadow *s)
{
	for (;;) {
		enum lack lack;
		size_t table = 0;
		uint32_t pages;
		int r;

		lock_take(&s->lock);
		lack = what_lacks(s);
		pages = run_pages(s);
		if (lack != LACK_NOTHING && lack < LACK_PAGE)
			table = table_bytes(s, lack);
		lock_drop(&s->lock);
		if (lack == LACK_NOTHING)
			return 0;
		r = supply(s, lack, table, pages);
		if (r)
			return r;
	}
}

/* Runs leave that have no page in use, as long as more than `keep` pages are free. */
static void runs_leave(struct shadow *s, uint32_t keep, struct list *leaving)
{
	list_for_each_safe(n, tmp, &s->runs) {
		struct page_run *run = container_of(n, struct page_run, node);

		if (run->used || s->nfree_pages < keep + run->n)
			continue;
		run->leaves = true;
		s->nfree_pages -= run->n;
		s->nunused -= run->n;
		list_del(&run->node);
		list_add(leaving, &run->node);
	}
}

/* Takes what is much more than in use off the free lists; ids go into a list of their own. */
static void trim_locked(struct shadow *s, struct list *leaving, struct chunk **chunks)
{
	runs_leave(s, s->npages + TRIM_ABOVE, leaving);
	for (struct shadow_page **pos = &s->free_pages; !list_empty(leaving) && *pos;) {
		struct shadow_page *p = *pos;

		if (!p->run->leaves) {
			pos = &p->hash_next;
			continue;
		}
		*pos = p->hash_next;
		id_give(s, p->id);
	}
	while (s->nfree_chunks > s->nchunks + TRIM_ABOVE) {
		struct chunk *c = s->free_chunks;

		s->free_chunks = c->hash_next;
		s->nfree_chunks--;
		c->hash_next = *chunks;
		*chunks = c;
	}
}

static void chunks_free(struct shadow *s, struct chunk *c)
{
	for (struct chunk *next; c; c = next) {
		next = c->hash_next;
		env_free(s->env, c, sizeof(*c));
	}
}

static void runs_free(struct shadow *s, struct list *runs)
{
	list_for_each_safe(n, tmp, runs) {
		struct page_run *run = container_of(n, struct page_run, node);

		env_free(s->env, run, run_bytes(run->n));
	}
}

bool pages_to_trim(const struct shadow *s)
{
	return s->nunused > 2 * (s->npages + BLOCK_PAGES);
}

void pages_trim(struct shadow *s)
{
	struct chunk *chunks = NULL;
	struct list leaving;

	list_init(&leaving);
	lock_take(&s->lock);
	trim_locked(s, &leaving, &chunks);
	lock_drop(&s->lock);
	chunks_free(s, chunks);
	runs_free(s, &leaving);
}

#define FIRST_BITS 6
#define FIRST_IDS  64

int pages_init(struct shadow *s)
{
	s->page_bits = s->chunk_bits = FIRST_BITS;
	s->id_cap = FIRST_IDS;
	s->page_ids = 1;
	s->page_hash = env_alloc(s->env, sizeof(void *) << FIRST_BITS);
	s->chunk_hash = env_alloc(s->env, sizeof(void *) << FIRST_BITS);
	s->page_by_id = env_alloc(s->env, FIRST_IDS * sizeof(void *));
	return s->page_hash && s->chunk_hash && s->page_by_id ? 0 : -ENOMEM;
}

/* The shadow goes: nothing needs to be kept in order. */
void pages_finish(struct shadow *s)
{
	runs_free(s, &s->runs);
	for (uint32_t i = 0; s->chunk_hash && i < 1u << s->chunk_bits; i++)
		chunks_free(s, s->chunk_hash[i]);
	chunks_free(s, s->free_chunks);
	env_free(s->env, s->page_hash, sizeof(void *) << s->page_bits);
	env_free(s->env, s->chunk_hash, sizeof(void *) << s->chunk_bits);
	env_free(s->env, s->page_by_id, s->id_cap * sizeof(void *));
}
