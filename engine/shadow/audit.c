/* SPDX-License-Identifier: MIT */
/*
 * The audit of the shadow tables: invariants S1 to S5 of internal.h, lists,
 * counts, and every TLB entry.
 *
 * Locks: the shadow lock for all of it. The caller has stopped changes of the mm, and so
 * faults that need one; misses of pages that are present go on, each under the shadow lock. vCPUs may go on hitting their TLBs.
 */
#include "shadow/internal.h"

#define CHECK(a, cond, ...)                                                                                  \
	do {                                                                                                 \
		(a)->checks++;                                                                               \
		if (!(cond)) {                                                                               \
			(a)->violations++;                                                                   \
			if ((a)->report)                                                                     \
				(a)->report(a, __VA_ARGS__);                                                 \
		}                                                                                            \
	} while (0)

#define LARGE_STEP 64 /* pages of a large leaf that are looked up: one in so many */

static void audit_guest_side(struct shadow *s, struct shadow_page *p, unsigned i, struct audit *a)
{
	struct guest_entry g = {0};
	const void *table;
	bool same, more;

	if (p->role & ROLE_UNFED) {
		unfed_entry(p, i, &g);
		CHECK(a, p->side[i].gfn == g.target.v && ((p->role & ROLE_DIRECT) || same_target(s, p, i, &g)),
		      "shadow %u: entry %u maps gfn %#llx", p->id, i, (unsigned long long)p->side[i].gfn);
		return;
	}
	if (p->unsync)
		return;
	rcu_enter();
	table = table_peek(s, p->gfn);
	same = table && guest_entry(s, p, i, table_entry(p, table, i), &g) && same_target(s, p, i, &g);
	rcu_leave();
	more = same && ((p->spte[i] & ~g.bits & SPTE_GUEST) || ((p->spte[i] ^ g.bits) & no_grants(p)));
	atomic_thread_fence(memory_order_acquire);
	if ((!same || more) && atomic_load(&s->untold))
		return;
	CHECK(a, same, "shadow %u (table gfn %#llx level %u): entry %u is not what the guest's says", p->id,
	      (unsigned long long)p->gfn.v, p->level, i);
	CHECK(a, !more, "shadow %u: entry %u grants more than the guest's (%#llx, %#llx)", p->id, i,
	      (unsigned long long)p->spte[i], (unsigned long long)g.bits);
}

/* Does the primary table map gfn to pfn, and may the bits be granted? */
static bool primary_agrees(struct shadow *s, gfn_t gfn, pfn_t pfn, uint32_t rights)
{
	const struct region *r;
	struct mm_lookup l;
	bool ok;

	rcu_enter();
	l = mm_lookup(s->mm, gfn);
	r = mm_region(s->mm, gfn);
	ok = r && entry_is_leaf(l.entry) && !entry_is_fused(l.entry) && pfn_eq(l.pfn, pfn) && !(rights & ~r->prot) &&
	     (l.writable || !(rights & KAGE_WRITE));
	rcu_leave();
	return ok;
}

static uint32_t spte_rights(spte_t e)
{
	return (e & SPTE_HR ? KAGE_READ : 0) | (e & SPTE_HW ? KAGE_WRITE : 0) | (e & SPTE_HX ? KAGE_EXEC : 0);
}

static void audit_leaf(struct shadow *s, struct shadow_page *p, unsigned i, struct audit *a)
{
	spte_t e = p->spte[i];
	gfn_t gfn = GFN(p->side[i].gfn);
	uint64_t n = e & SPTE_LARGE ? BLOCK_PAGES : 1;
	struct chunk *c = chunk_find(s, gfn);
	ref_t head = !c ? 0 : e & SPTE_LARGE ? c->large : c->head[level_index(gfn, 0)];
	const struct side *side = &p->side[i];

	for (uint64_t k = 0; k < n; k += LARGE_STEP)
		CHECK(a, primary_agrees(s, gfn_add(gfn, k), pfn_add(spte_pfn(e), k), spte_rights(e)),
		      "shadow %u: entry %u (%#llx) is not what the primary table says of gfn %#llx", p->id, i,
		      (unsigned long long)e, (unsigned long long)(gfn.v + k));
	CHECK(a, c != NULL, "shadow %u: entry %u has no chunk", p->id, i);
	CHECK(a, side->prev ? ref_side(s, side->prev)->next == REF(p, i) : head == REF(p, i),
	      "shadow %u: entry %u is not in the chain of gfn %#llx", p->id, i, (unsigned long long)gfn.v);
	CHECK(a, !side->next || ref_side(s, side->next)->prev == REF(p, i),
	      "shadow %u: entry %u: next has another prev", p->id, i);
	CHECK(a, !(e & SPTE_HW) || !(n > 1 ? c->watched : chunk_tracked(c, gfn) || chunk_code(c, gfn)),
	      "shadow %u: entry %u may write to watched gfn %#llx", p->id, i, (unsigned long long)gfn.v);
}

static void audit_link(struct shadow *s, struct shadow_page *p, unsigned i, struct audit *a)
{
	const struct shadow_page *child = spte_child(s, p->spte[i]);

	CHECK(a, child->used, "shadow %u: entry %u points to free page %u", p->id, i, child->id);
	CHECK(a, child->level + 1 == p->level, "shadow %u: entry %u points to level %u", p->id, i,
	      child->level);
	CHECK(a,
	      p->reach == REACH_NONE || child->reach == REACH_MANY ||
		  (p->reach == REACH_ONE && child->reach == REACH_ONE && child->gva == entry_gva(p, i)),
	      "shadow %u: page %u below is reached at more than it knows", p->id, child->id);
}

static void audit_parents(struct shadow *s, struct shadow_page *p, struct audit *a)
{
	uint32_t n = 0;

	for (ref_t r = p->parents, prev = 0; r && n <= p->nparents; prev = r, r = ref_side(s, r)->next, n++) {
		CHECK(a,
		      spte_is_link(ref_page(s, r)->spte[ref_idx(r)]) &&
			  spte_child(s, ref_page(s, r)->spte[ref_idx(r)]) == p,
		      "shadow %u: a parent does not point to it", p->id);
		CHECK(a, ref_side(s, r)->prev == prev, "shadow %u: chain of parents is broken", p->id);
	}
	CHECK(a, n == p->nparents, "shadow %u: %u parents counted, %u found", p->id, p->nparents, n);
}

static uint64_t audit_page(struct shadow *s, struct shadow_page *p, struct audit *a)
{
	uint64_t leaves = 0;
	uint32_t live = 0;

	page_settle(s, p);
	for (unsigned i = 0; i < LEVEL_ENTRIES; i++) {
		if (!(p->spte[i] & SPTE_P))
			continue;
		live++;
		audit_guest_side(s, p, i, a);
		if (spte_is_leaf(p->spte[i])) {
			leaves++;
			audit_leaf(s, p, i, a);
		} else {
			audit_link(s, p, i, a);
		}
	}
	CHECK(a, live == p->live, "shadow %u: %u entries counted, %u found", p->id, p->live, live);
	CHECK(a, list_empty(&p->idle) == (p->nparents || p->roots), "shadow %u: wrongly idle or not", p->id);
	CHECK(a, list_empty(&p->unsync_node) == !p->unsync, "shadow %u: wrongly unsync or not", p->id);
	CHECK(a, page_find(s, p->gfn, p->role) == p, "shadow %u: not found by its hash", p->id);
	CHECK(a,
	      (p->role & ROLE_UNFED) || (p->unsync && !p->syncing) ||
		  chunk_tracked(chunk_find(s, p->gfn), p->gfn),
	      "shadow %u: gfn %#llx is not watched", p->id, (unsigned long long)p->gfn.v);
	audit_parents(s, p, a);
	return leaves;
}

static uint64_t chain_length(struct shadow *s, ref_t r)
{
	uint64_t n = 0;

	for (; r; r = ref_side(s, r)->next)
		n++;
	return n;
}

static bool gfn_needs_watch(struct shadow *s, gfn_t gfn)
{
	for (struct shadow_page *p = page_next_table(s, NULL, gfn); p; p = page_next_table(s, p, gfn))
		if (!p->unsync || p->syncing)
			return true;
	return false;
}

static uint64_t audit_chunk(struct shadow *s, struct chunk *c, struct audit *a)
{
	uint64_t leaves = chain_length(s, c->large);
	uint32_t live = c->large != 0, watched = 0;

	for (unsigned i = 0; i < LEVEL_ENTRIES; i++) {
		bool track = bit_test(c->track, i);
		gfn_t gfn = GFN(c->key << LEVEL_BITS | i);

		leaves += chain_length(s, c->head[i]);
		live += c->head[i] != 0;
		watched += track + bit_test(c->code, i);
		if (track)
			CHECK(a, gfn_needs_watch(s, gfn), "gfn %#llx is watched for nothing",
			      (unsigned long long)gfn.v);
	}
	CHECK(a, watched == c->watched, "chunk %#llx: %u bits counted, %u set", (unsigned long long)c->key,
	      c->watched, watched);
	CHECK(a, live + watched == c->live, "chunk %#llx: %u things counted, %u found",
	      (unsigned long long)c->key, c->live, live + watched);
	return leaves;
}

static uint64_t audit_chunks(struct shadow *s, struct audit *a)
{
	uint64_t leaves = 0;
	uint32_t n = 0;

	for (uint32_t i = 0; i < 1u << s->chunk_bits; i++) {
		for (struct chunk *c = s->chunk_hash[i]; c; c = c->hash_next) {
			leaves += audit_chunk(s, c, a);
			n++;
		}
	}
	CHECK(a, n == s->nchunks, "%u chunks counted, %u found", s->nchunks, n);
	return leaves;
}

void shadow_audit(struct shadow *s, struct audit *a)
{
	uint64_t leaves = 0;
	uint32_t n = 0, unsync = 0;

	lock_take(&s->lock);
	list_for_each(pos, &s->pages) {
		struct shadow_page *p = container_of(pos, struct shadow_page, node);

		leaves += audit_page(s, p, a);
		unsync += p->unsync;
		n++;
	}
	CHECK(a, n == s->npages, "%u shadow pages counted, %u found", s->npages, n);
	CHECK(a, unsync == s->nunsync, "%u unsync pages counted, %u found", s->nunsync, unsync);
	CHECK(a, audit_chunks(s, a) == leaves, "rmap chains do not hold the %llu leaves",
	      (unsigned long long)leaves);
	CHECK(a, !s->nbatch && !s->batch_flush, "TLB work left over");
	list_for_each(pos, &s->cpus) {
		struct shadow_cpu *cpu = container_of(pos, struct shadow_cpu, node);

		for (unsigned i = 0; i < PT_ROOTS; i++)
			CHECK(a, !cpu->root[i] || (cpu->root[i]->used && cpu->root[i]->roots), "a vCPU's root is free");
		cpu->ops->audit(cpu, a);
	}
	lock_drop(&s->lock);
}

/* -- TLB entries -------------------------------------------------------------- */

/* The leaf that backs an address in a mode; 0: none. *guest: permissions ANDed along the path. */
static spte_t leaf_of(struct shadow *s, const struct pt_guest *mode, uint64_t gva, spte_t *guest)
{
	int n = mode->arch->root_of(mode, gva);
	const struct pt_root *r = n < 0 ? NULL : &mode->root[n];
	struct shadow_page *p = r && r->state == PT_TABLE ? page_find(s, root_gfn(r), root_role(r)) : NULL;
	spte_t e = 0, and = SPTE_ALL, key = 0;

	while (p) {
		e = p->spte[root_index(r, gva, p->level)];
		if (!(e & SPTE_P))
			return 0;
		and &= e;
		key |= e & SPTE_PKEY;
		p = spte_is_link(e) ? spte_child(s, e) : NULL;
	}
	*guest = and | key;
	return e;
}

void shadow_audit_tlb(struct shadow_cpu *cpu, const struct pt_guest *mode, const struct shadow_fill *f,
		      struct audit *a)
{
	struct shadow *s = cpu->shadow;
	pfn_t pfn = pool_hva_pfn(s->mm->host->pool, f->hva);
	spte_t guest = 0, e;

	if (!mode->nroots) {
		gfn_t gfn = GFN(f->gva >> PAGE_SHIFT);
		struct chunk *c = chunk_find(s, gfn);

		CHECK(a, primary_agrees(s, gfn, pfn, f->rights), "TLB: gpa %#llx has pfn %#llx, rights %u",
		      (unsigned long long)f->gva, (unsigned long long)pfn.v, f->rights);
		CHECK(a, !(f->rights & KAGE_WRITE) || !(chunk_tracked(c, gfn) || chunk_code(c, gfn)),
		      "TLB: gpa %#llx is watched and may be written", (unsigned long long)f->gva);
		return;
	}
	e = leaf_of(s, mode, f->gva, &guest);
	CHECK(a, spte_is_leaf(e), "TLB: gva %#llx is backed by no shadow entry", (unsigned long long)f->gva);
	if (!spte_is_leaf(e))
		return;
	if ((e & SPTE_LARGE) && !f->large)
		e += (spte_t)level_index(GFN(f->gva >> PAGE_SHIFT), 0) << PAGE_SHIFT;
	CHECK(a, pfn_eq(spte_pfn(e), pfn) && !(f->rights & ~(mode->arch->allowed(mode, guest_rights(guest)) & spte_rights(e))),
	      "TLB: gva %#llx has pfn %#llx, rights %u; its shadow entry is %#llx, guest %#llx",
	      (unsigned long long)f->gva, (unsigned long long)pfn.v, f->rights, (unsigned long long)e,
	      (unsigned long long)guest);
}
