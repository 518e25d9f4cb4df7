/* SPDX-License-Identifier: MIT */
/*
 * From a guest frame number to the shadow entries that map it.
 *
 * struct chunk holds 512 chain heads, found by a hash on gfn >> 9; the chains
 * run through the side entries of the shadow pages, doubly linked by refs, so
 * that an entry leaves its chain without a search. A large leaf is in its
 * chunk's own chain.
 *
 * Invariants: S3, S4 (internal.h); a chunk with nothing in it is free, except
 * while its caller is about to add to it.
 *
 * Locks: all under the shadow lock.
 *
 * Why not simpler: single links would make the removal from the chain of a
 * page that is mapped a million times (a guest's zero page) quadratic.
 */
#include "shadow/internal.h"

static uint32_t chunk_slot(const struct shadow *s, uint64_t key)
{
	return (uint32_t)((key * 0x9e3779b97f4a7c15ull) >> (64 - s->chunk_bits));
}

struct chunk *chunk_find(const struct shadow *s, gfn_t gfn)
{
	uint64_t key = gfn.v >> LEVEL_BITS;
	struct chunk *c = s->chunk_hash[chunk_slot(s, key)];

	while (c && c->key != key)
		c = c->hash_next;
	return c;
}

struct chunk *chunk_get(struct shadow *s, gfn_t gfn)
{
	struct chunk *c = chunk_find(s, gfn);
	struct chunk **slot;

	if (c)
		return c;
	c = s->free_chunks;
	kage_assert(c != NULL);
	s->free_chunks = c->hash_next;
	s->nfree_chunks--;
	s->nchunks++;
	c->key = gfn.v >> LEVEL_BITS;
	c->code_seq = 0;
	slot = &s->chunk_hash[chunk_slot(s, c->key)];
	c->hash_next = *slot;
	*slot = c;
	return c;
}

/* A chunk that empties has all heads and bits zero already. */
void chunk_put(struct shadow *s, struct chunk *c)
{
	struct chunk **pos = &s->chunk_hash[chunk_slot(s, c->key)];

	if (c->live)
		return;
	while (*pos != c)
		pos = &(*pos)->hash_next;
	*pos = c->hash_next;
	c->hash_next = s->free_chunks;
	s->free_chunks = c;
	s->nfree_chunks++;
	s->nchunks--;
}

static ref_t *chain_head(struct chunk *c, gfn_t gfn, bool large)
{
	return large ? &c->large : &c->head[level_index(gfn, 0)];
}

void rmap_add(struct shadow *s, struct shadow_page *p, unsigned idx, gfn_t gfn, bool large)
{
	struct chunk *c = chunk_get(s, gfn);
	ref_t *head = chain_head(c, gfn, large);

	p->side[idx] = (struct side){.gfn = gfn.v, .next = *head};
	if (*head)
		ref_side(s, *head)->prev = REF(p, idx);
	else
		c->live++;
	*head = REF(p, idx);
}

void rmap_del(struct shadow *s, struct shadow_page *p, unsigned idx, bool large)
{
	struct side *side = &p->side[idx];

	if (side->next)
		ref_side(s, side->next)->prev = side->prev;
	if (side->prev) {
		ref_side(s, side->prev)->next = side->next;
	} else {
		struct chunk *c = chunk_find(s, GFN(side->gfn));

		*chain_head(c, GFN(side->gfn), large) = side->next;
		if (!side->next && --c->live == 0)
			chunk_put(s, c);
	}
	*side = (struct side){0};
}

static void chain_drop(struct shadow *s, ref_t r)
{
	while (r) {
		ref_t next = ref_side(s, r)->next;

		page_drop(s, ref_page(s, r), ref_idx(r));
		r = next;
	}
}

void chunk_drop_large(struct shadow *s, struct chunk *c)
{
	chain_drop(s, c->large);
}

/* Drops what maps one gfn. The chunk may be freed. */
void rmap_drop(struct shadow *s, struct chunk *c, gfn_t gfn)
{
	ref_t one = c->head[level_index(gfn, 0)];

	chain_drop(s, c->large);
	chain_drop(s, one);
}

/* All that maps into the chunk; it may be freed. */
void rmap_drop_chunk(struct shadow *s, struct chunk *c)
{
	c->live++; /* hold it */
	chain_drop(s, c->large);
	for (unsigned i = 0; i < LEVEL_ENTRIES; i++)
		chain_drop(s, c->head[i]);
	c->live--;
	chunk_put(s, c);
}

static void chain_clear_write(struct shadow *s, ref_t r)
{
	for (; r; r = ref_side(s, r)->next)
		entry_clear_write(s, ref_page(s, r), ref_idx(r));
}

void rmap_clear_write(struct shadow *s, struct chunk *c, gfn_t gfn)
{
	chain_clear_write(s, c->large);
	chain_clear_write(s, c->head[level_index(gfn, 0)]);
}
