/* SPDX-License-Identifier: MIT */
/*
 * The shadow walk: from a guest virtual address to a TLB entry, making what is
 * missing on the way.
 *
 * struct map is one attempt under the shadow lock. It goes down from the root
 * and either fills the TLB or says (enum map_step) what has to happen without
 * the lock first; shadow_fault() does that and tries again. The usual cases:
 *
 *      all there, or the leaf   MAP_DONE at once
 *      is missing but not the page
 *      page missing, COW        MAP_MM, then mm_fault() in a reader section, then
 *                               the same walk again under the lock, validated
 *      first use of an entry    MAP_WALK (accessed bits), MAP_DONE
 *
 * Invariants:
 *  M1  the primary table's answer is used only under the lock under which it was
 *      found while no change was in flight (N7 of notify.h), or in its section,
 *      after notify_read_valid(): so the listener either sees the new leaf or
 *      has made the section invalid.
 *  M2  a guest entry is read under the lock from a table that is watched and
 *      whose writers have stopped (settle_seq), or that is unsync; and of which
 *      no change in flight replaces the contents (S7). So it needs no second
 *      look.
 *  M3  leaves are at level 0 and 1. A guest's 1 GiB page is a direct page of
 *      2 MiB leaves: TLBs have no larger entry either.
 *  M4  rights that depend on the mode (CPL, AC, PKRU) are in TLB entries only.
 *
 * Locks: the shadow lock for map(); shadow_fault() holds none while it calls
 * mm_fault(), walk_guest(), shootdown(), pages_topup().
 *
 * Why not simpler: everything under one lock would be, but mm_fault() may wait
 * for a listener, and our own listener takes this lock.
 */
#include "shadow/internal.h"

enum map_step {
	MAP_DONE,
	MAP_AGAIN,   /* something changed under the lock: from the root again */
	MAP_WALK,    /* the guest's tables must be asked: fault, accessed, dirty */
	MAP_MM,	     /* map.gfn must be faulted in */
	MAP_WAIT,    /* a change in flight replaces the table in map.gfn */
	MAP_BARRIER, /* writers must be stopped first */
	MAP_MEMORY,  /* pages_topup() */
	MAP_EMULATE, /* map.gfn is watched */
	MAP_CODE,    /* map.gfn is watched as code */
};

struct map {
	/* in */
	struct shadow *s;
	struct shadow_cpu *cpu;
	uint64_t gva;
	uint32_t access;
	unsigned flags;
	unsigned root;		   /* that translates gva */
	const struct mm_fault *mf; /* valid as long as the lock is held; NULL: none yet */
	struct mm_fault present;   /* what mf points to if nothing had to be done for it */
	/* derived on the way down (AND along the path) */
	uint64_t offset;	   /* of gva within its root */
	spte_t guest;		   /* SPTE_ALL and the key of the guest's leaf */
	uint32_t allowed;	   /* what the guest's tables let this mode do; set by leaf_check() */
	struct shadow_page *table; /* that holds the guest's leaf entry */
	/* out */
	gfn_t gfn;
};

static uint32_t host_rights(spte_t e)
{
	return (e & SPTE_HR ? KAGE_READ : 0) | (e & SPTE_HW ? KAGE_WRITE : 0) | (e & SPTE_HX ? KAGE_EXEC : 0);
}

static void and_path(struct map *m, spte_t e)
{
	spte_t key = (m->guest | e) & SPTE_PKEY; /* only the guest's leaf has one */

	m->guest = (m->guest & e & ~SPTE_PKEY) | key;
}

/* -- TLB ------------------------------------------------------------------- */

static void fill(struct map *m, uint32_t rights, pfn_t pfn, bool large)
{
	struct shadow *s = m->s;
	struct shadow_fill f = {.gva = ALIGN_DOWN(m->gva, PAGE_SIZE), .rights = rights};

	f.large = large && !mm_dirty_fine(s->mm);
	if (f.large) {
		f.gva = ALIGN_DOWN(m->gva, BLOCK_PAGES * PAGE_SIZE);
		pfn = PFN(ALIGN_DOWN(pfn.v, BLOCK_PAGES));
	}
	f.hva = pfn_hva(s->mm->host->pool, pfn);
	mm_mark_accessed(s->mm, f.large ? GFN(ALIGN_DOWN(m->gfn.v, BLOCK_PAGES)) : m->gfn,
			 f.large ? BLOCK_PAGES : 1);
	m->cpu->ops->fill(m->cpu, &f);
}

static void fill_from_leaf(struct map *m, struct shadow_page *p, spte_t e)
{
	uint32_t rights = m->allowed & host_rights(e);
	pfn_t pfn = spte_pfn(e);

	if (!(m->guest & SPTE_D))
		rights &= ~KAGE_WRITE | m->access;
	if (e & SPTE_LARGE)
		pfn = pfn_add(pfn, level_index(GFN(m->gva >> PAGE_SHIFT), 0));
	p->writes = 0;
	fill(m, rights, pfn, e & SPTE_LARGE);
}

/* -- watching -------------------------------------------------------------- */

/* What must be so before the page may be written or executed. MAP_DONE: go on. */
static enum map_step check_watched(struct map *m, struct chunk *c)
{
	struct shadow *s = m->s;

	if (m->access & KAGE_WRITE) {
		if (chunk_code(c, m->gfn) || s->breaking)
			return MAP_CODE;
		if (!chunk_tracked(c, m->gfn))
			return MAP_DONE;
		if (!(m->flags & SHADOW_UNTRACK)) {
			m->cpu->resolved = s->broadcasts;
			return MAP_EMULATE;
		}
		gfn_unsync(s, m->gfn);
		return MAP_AGAIN;
	}
	if (!(m->access & KAGE_EXEC) || !s->code_cpus)
		return MAP_DONE;
	if (!chunk_code(c, m->gfn)) {
		c = chunk_get(s, m->gfn);
		watch(s, c, c->code, m->gfn);
		batch_apply(s);
		c->code_seq = s->dirty_seq;
		return MAP_AGAIN;
	}
	return unflushed(s, c->code_seq) ? MAP_BARRIER : MAP_DONE;
}

/* What a leaf for map.gfn may grant, given the primary table's answer. */
static spte_t leaf_host_bits(const struct map *m, const struct chunk *c, bool large)
{
	const struct mm_fault *f = m->mf;
	bool watched = c && c->watched && (large || chunk_tracked(c, m->gfn) || chunk_code(c, m->gfn));
	spte_t h = 0;

	if (f->prot & KAGE_READ)
		h |= SPTE_HR;
	if ((f->prot & KAGE_EXEC) && (!m->s->code_cpus || (!large && chunk_code(c, m->gfn))))
		h |= SPTE_HX;
	/* While writes are logged, only one that happens grants them: mm_fault() has marked it. */
	if ((f->prot & KAGE_WRITE) && !watched && ((m->access & KAGE_WRITE) || !mm_dirty_logged(m->s->mm)))
		h |= SPTE_HW;
	return h;
}

/*
 * A large leaf stands for 512 pages, the answer for one: of all of them it has to be true under this lock, with no change
 * of any in flight (M1). Otherwise the leaf is of 4 KiB.
 */
static bool may_be_large(const struct map *m, const struct chunk *c)
{
	struct mm *mm = m->s->mm;
	gfn_t block = GFN(ALIGN_DOWN(m->gfn.v, BLOCK_PAGES));
	struct mm_fault now = {.gfn = m->gfn, .access = m->access};

	if (m->mf->level < 1 || (c && c->watched) || mm_dirty_fine(mm) ||
	    !notify_quiet(&mm->notify, block, gfn_add(block, BLOCK_PAGES)))
		return false;
	return mm_present(mm, &now) && now.level >= 1 && pfn_eq(now.pfn, m->mf->pfn) && now.prot == m->mf->prot;
}

/* -- leaves ---------------------------------------------------------------- */

static enum map_step finish(struct map *m, struct shadow_page *p, spte_t e)
{
	if (!(host_rights(e) & m->access))
		return MAP_MM;
	fill_from_leaf(m, p, e);
	return MAP_DONE;
}

static enum map_step install(struct map *m, struct shadow_page *p, unsigned idx, spte_t guest,
			     struct chunk *c, bool large)
{
	struct shadow *s = m->s;
	pfn_t pfn = large ? PFN(ALIGN_DOWN(m->mf->pfn.v, BLOCK_PAGES)) : m->mf->pfn;
	spte_t e = SPTE_P | guest | (large ? SPTE_LARGE : 0) | pfn.v << PAGE_SHIFT;

	page_settle(s, p);
	e |= leaf_host_bits(m, c, large);
	if ((p->spte[idx] & SPTE_P) &&
	    (p->spte[idx] & (SPTE_PFN | SPTE_LARGE)) != (e & (SPTE_PFN | SPTE_LARGE)))
		page_drop(s, p, idx);
	else if (m->mf->prot & KAGE_WRITE)
		e |= p->spte[idx] & SPTE_HW; /* granted before, and not taken since */
	if (large && (e & SPTE_HW))
		mm_mark_dirty(s->mm, GFN(ALIGN_DOWN(m->gfn.v, BLOCK_PAGES)), BLOCK_PAGES);
	page_set_leaf(s, p, idx, e, large ? GFN(ALIGN_DOWN(m->gfn.v, BLOCK_PAGES)) : m->gfn);
	batch_apply(s);
	return finish(m, p, e);
}

/* Is the primary table's answer there for map.gfn? */
static bool answered(struct map *m)
{
	struct mm *mm = m->s->mm;

	if (m->mf && m->mf->gfn.v == m->gfn.v)
		return true;
	m->present = (struct mm_fault){.gfn = m->gfn, .access = m->access};
	if (!notify_quiet(&mm->notify, m->gfn, gfn_add(m->gfn, 1)) || !mm_present(mm, &m->present))
		return false;
	m->mf = &m->present;
	/* what the guest is about to access: nothing is read that it may not read */
	__builtin_prefetch((char *)pfn_hva(mm->host->pool, m->mf->pfn) + (m->gva & (PAGE_SIZE - 1)));
	return true;
}

/* May the guest, and what of the primary table is needed? MAP_DONE: map.mf is there for map.gfn. */
static enum map_step leaf_check(struct map *m, struct chunk *c, spte_t e)
{
	const struct pt_guest *mode = &m->cpu->mode;
	enum map_step step;

	m->allowed = mode->arch->allowed(mode, guest_rights(m->guest));
	if (!(m->allowed & m->access))
		return MAP_WALK;
	if ((m->access & KAGE_WRITE) && !(m->guest & SPTE_D) && !table_readonly(m->s, m->table->gfn))
		return MAP_WALK;
	step = check_watched(m, c);
	if (step != MAP_DONE || (spte_is_leaf(e) && (host_rights(e) & m->access)))
		return step;
	return answered(m) ? MAP_DONE : MAP_MM;
}

/*
 * The guest's mapping ends here, or the page is direct: `e` is the entry (0 if
 * missing), `guest` its guest bits, `base` the first gfn that it maps. Returns
 * the page to go on with if this is a large page in pieces, else NULL and *step.
 */
static struct shadow_page *map_leaf(struct map *m, struct shadow_page *p, unsigned idx, spte_t guest,
				    gfn_t base, enum map_step *step)
{
	uint64_t within = (m->gva >> PAGE_SHIFT) & (level_pages(p->level) - 1);
	spte_t e = p->spte[idx];
	struct shadow_page *child;
	struct chunk *c;

	m->gfn = gfn_add(base, within);
	c = chunk_find(m->s, m->gfn);
	if (c && !(e & SPTE_P))
		__builtin_prefetch(&c->head[level_index(m->gfn, 0)]);
	*step = leaf_check(m, c, e);
	if (*step != MAP_DONE)
		return NULL;
	c = chunk_find(m->s, m->gfn);
	if (spte_is_leaf(e) && (host_rights(e) & m->access)) {
		*step = finish(m, p, e);
		return NULL;
	}
	if (p->level == 0 || (p->level == 1 && may_be_large(m, c))) {
		*step = install(m, p, idx, guest, c, p->level == 1);
		return NULL;
	}
	if (e & SPTE_P)
		page_drop(m->s, p, idx);
	child = page_get(m->s, base, (p->level - 1u) | ROLE_DIRECT);
	page_link(m->s, p, idx, guest, child);
	return child;
}

/* -- the way down ---------------------------------------------------------- */

/* Reads what is missing at p[idx]. MAP_DONE: *g is good to use (M2). */
static enum map_step read_guest(struct map *m, struct shadow_page *p, unsigned idx, struct guest_entry *g)
{
	struct shadow *s = m->s;
	const void *table;
	uint64_t raw = 0;

	if (p->role & ROLE_UNFED) {
		unfed_entry(p, idx, g);
		return MAP_DONE;
	}
	m->gfn = p->gfn;
	if (s->ninflight && inflight_overlaps(s, p->gfn))
		return MAP_WAIT;
	if (unflushed(s, p->settle_seq))
		return MAP_BARRIER;
	rcu_enter();
	table = table_map(s, p->gfn);
	if (table)
		raw = table_entry(p, table, idx);
	rcu_leave();
	return table && guest_entry(s, p, idx, raw, g) ? MAP_DONE : MAP_WALK;
}

/* Makes a table's page, watched, or one that leads to such. */
static enum map_step make_table(struct map *m, struct shadow_page *p, unsigned idx,
				const struct guest_entry *g)
{
	struct shadow_page *child = page_get(m->s, g->target, g->role);

	sync_below(m->s, child);
	page_link(m->s, p, idx, g->bits, child);
	batch_apply(m->s);
	if (!child->settle_seq)
		child->settle_seq = m->s->dirty_seq;
	return MAP_DONE;
}

static enum map_step map_down(struct map *m, struct shadow_page *p)
{
	struct shadow *s = m->s;

	for (;;) {
		unsigned idx = level_index(GFN(m->offset >> PAGE_SHIFT), p->level);
		spte_t e = p->spte[idx];
		struct guest_entry g = {.bits = e & SPTE_GUEST};
		enum map_step step;

		if (p->level <= 1) { /* a leaf is or will be there */
			__builtin_prefetch(&p->side[idx]);
			page_settle(s, p), e = p->spte[idx];
		}
		if (!(p->role & ROLE_UNFED))
			m->table = p;
		if (!(e & SPTE_P)) {
			step = read_guest(m, p, idx, &g);
			if (step != MAP_DONE)
				return step;
			if (!g.leaf && make_table(m, p, idx, &g) == MAP_DONE)
				e = p->spte[idx];
		} else if (spte_is_leaf(e)) {
			g.leaf = true;
			g.target = GFN(p->side[idx].gfn);
		}
		and_path(m, g.bits);
		if (g.leaf) {
			p = map_leaf(m, p, idx, g.bits, g.target, &step);
			if (!p)
				return step;
		} else {
			p->writes = 0;
			p = spte_child(s, e);
		}
	}
}

static enum map_step map_paged(struct map *m)
{
	struct shadow_cpu *cpu = m->cpu;
	struct shadow_page *root = cpu->root[m->root];

	if (!root) {
		root = page_get(m->s, root_gfn(&cpu->mode.root[m->root]), cpu->role[m->root]);
		page_root_get(m->s, cpu, m->root, root);
		batch_apply(m->s);
		if (!root->settle_seq)
			root->settle_seq = m->s->dirty_seq;
	}
	m->guest = SPTE_ALL;
	return map_down(m, root);
}

/* Paging is off: the TLB caches the primary table itself. */
static enum map_step map_direct(struct map *m)
{
	struct shadow *s = m->s;
	struct chunk *c;
	enum map_step step;
	spte_t host;
	uint32_t rights;
	bool large;

	m->gfn = GFN(m->gva >> PAGE_SHIFT);
	c = chunk_find(s, m->gfn);
	step = check_watched(m, c);
	if (step != MAP_DONE)
		return step;
	if (!answered(m))
		return MAP_MM;
	c = chunk_find(s, m->gfn);
	large = may_be_large(m, c);
	host = leaf_host_bits(m, c, large);
	rights = host_rights(host);
	if (large && (rights & KAGE_WRITE))
		mm_mark_dirty(s->mm, GFN(ALIGN_DOWN(m->gfn.v, BLOCK_PAGES)), BLOCK_PAGES);
	if (!m->cpu->direct_used) {
		m->cpu->direct_used = true;
		s->direct_cpus++;
	}
	fill(m, rights, m->mf->pfn, large);
	return MAP_DONE;
}

static enum map_step map(struct map *m)
{
	struct shadow *s = m->s;
	enum map_step step;

	do {
		if (!pages_ready(s))
			return MAP_MEMORY;
		if (s->npages + NEED_PAGES > s->limit)
			pages_shrink(s);
		step = m->cpu->mode.nroots ? map_paged(m) : map_direct(m);
		batch_apply(s);
	} while (step == MAP_AGAIN);
	return step;
}

/* -- without the lock -------------------------------------------------------- */

/* Faults map.gfn in and tries again with the answer. KAGE_OK: *step is what became of it. */
static int fault_mm(struct map *m, enum map_step *step)
{
	struct shadow_cpu *cpu = m->cpu;
	struct mm_fault f = {.gfn = m->gfn, .access = m->access, .reader = &cpu->reader};
	int r;

	notify_read_begin(&cpu->reader, f.gfn, gfn_add(f.gfn, 1));
	r = mm_fault(m->s->mm, &f);
	if (r == KAGE_OK) {
		lock_take(&m->s->lock);
		if (notify_read_valid(&cpu->reader)) {
			m->mf = &f;
			*step = map(m);
			m->mf = NULL;
		} else {
			*step = MAP_AGAIN;
		}
		lock_drop(&m->s->lock);
	}
	notify_read_end(&cpu->reader);
	if (r == KAGE_RETRY) {
		*step = MAP_AGAIN;
		return KAGE_OK;
	}
	return r;
}

static int step_out(struct map *m, enum map_step *step, struct kage_fault *fault)
{
	struct shadow_cpu *cpu = m->cpu;
	int r;

	switch (*step) {
	case MAP_WALK:
		r = walk_guest(cpu, m->gva, m->access, fault);
		return r == KAGE_RETRY ? KAGE_OK : r;
	case MAP_MM:
		fault->gpa = gfn_gpa(m->gfn).v | (m->gva & (PAGE_SIZE - 1));
		return m->gfn.v >> GFN_BITS ? KAGE_MMIO : fault_mm(m, step);
	case MAP_WAIT:
		notify_read_begin(&cpu->reader, m->gfn, gfn_add(m->gfn, 1));
		notify_read_end(&cpu->reader);
		return KAGE_OK;
	case MAP_BARRIER:
		return shootdown(m->s, true);
	case MAP_MEMORY:
		return pages_topup(m->s);
	case MAP_EMULATE:
		fault->gpa = gfn_gpa(m->gfn).v | (m->gva & (PAGE_SIZE - 1));
		return SHADOW_EMULATE;
	case MAP_CODE:
		return code_break(m->s, m->gfn);
	default:
		return KAGE_OK;
	}
}

int shadow_fault(struct shadow_cpu *cpu, uint64_t gva, uint32_t access, unsigned flags,
		 struct kage_fault *fault)
{
	struct map m = {.s = cpu->shadow, .cpu = cpu, .gva = gva, .access = access, .flags = flags};
	int root = find_root(&cpu->mode, gva, access, fault);

	atomic_store_explicit(&cpu->misses, atomic_load_explicit(&cpu->misses, memory_order_relaxed) + 1,
			      memory_order_relaxed);
	if (root < 0)
		return KAGE_GUEST_FAULT;
	m.root = (unsigned)root;
	if (cpu->mode.nroots)
		m.offset = pt_root_offset(&cpu->mode.root[root], gva);
	for (;;) {
		enum map_step step;
		int r;

		lock_take(&m.s->lock);
		step = map(&m);
		m.mf = NULL;
		lock_drop(&m.s->lock);
		if (step == MAP_DONE)
			return KAGE_OK;
		r = step_out(&m, &step, fault);
		if (r != KAGE_OK)
			return r;
		if (step == MAP_DONE)
			return KAGE_OK;
	}
}
