/* SPDX-License-Identifier: MIT */
/*
 * What guests hold: digests of pages, and how much of some guests is the same.
 *
 * Merging knows equal contents of frames that it may merge, once they are quiet.
 * This looks at every page there is, foreign memory as well, now: each page is
 * read and its digest put into a hash table, open addressing, never more than
 * half full. A digest is as good as a hash itself: it is its own place.
 *
 * Invariants:
 *  C1  an entry with count 0 is free; count is how many pages had the digest.
 *  C2  entry->guest is the guest that had it first; `common` says that another had it too.
 *
 * Locks: none; pages are read as mm_read() does.
 */
#include <xxhash.h>

#include "mm/mm.h"
#include "mm/region.h"
#include "obs/obs.h"

struct content {
	struct kage_digest digest;
	uint64_t count;
	uint32_t guest;
	bool common;
};

struct contents {
	struct env *env;
	struct content *slot;
	uint64_t slots, used; /* slots: a power of two */
};

#define SLOTS_MIN 4096

static void digest_of(const void *page, uint64_t salt, struct kage_digest *out)
{
	XXH128_hash_t h = XXH3_128bits_withSeed(page, PAGE_SIZE, salt);

	out->word[0] = h.low64;
	out->word[1] = h.high64;
}

int obs_digest(struct mm *mm, uint64_t salt, gfn_t gfn, struct kage_digest *out)
{
	_Alignas(64) char page[PAGE_SIZE];
	int r = mm_read_page(mm, gfn, page);

	if (r == KAGE_OK)
		digest_of(page, salt, out);
	return r;
}

static bool same(const struct kage_digest *a, const struct kage_digest *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1];
}

/* The entry of a digest, or the free one where it belongs. */
static struct content *contents_find(const struct contents *t, const struct kage_digest *d)
{
	uint64_t at = d->word[0] & (t->slots - 1);

	while (t->slot[at].count && !same(&t->slot[at].digest, d))
		at = (at + 1) & (t->slots - 1);
	return &t->slot[at];
}

static int contents_init(struct contents *t, struct env *env, uint64_t slots)
{
	*t = (struct contents){ .env = env, .slots = slots };
	t->slot = env_alloc(env, slots * sizeof(*t->slot));
	return t->slot ? 0 : -ENOMEM;
}

static void contents_finish(struct contents *t)
{
	env_free(t->env, t->slot, t->slots * sizeof(*t->slot));
}

static int contents_grow(struct contents *t)
{
	struct contents next;

	if (contents_init(&next, t->env, 2 * t->slots))
		return -ENOMEM;
	for (uint64_t i = 0; i < t->slots; i++)
		if (t->slot[i].count)
			*contents_find(&next, &t->slot[i].digest) = t->slot[i];
	next.used = t->used;
	contents_finish(t);
	*t = next;
	return 0;
}

static int contents_add(struct contents *t, uint32_t guest, const struct kage_digest *d)
{
	struct content *c;

	if (2 * (t->used + 1) > t->slots && contents_grow(t))
		return -ENOMEM;
	c = contents_find(t, d);
	if (!c->count) {
		c->digest = *d;
		c->guest = guest;
		t->used++;
	}
	c->count++;
	c->common |= c->guest != guest;
	return 0;
}

static int add_range(struct contents *t, struct mm *mm, uint32_t guest, uint64_t salt, gfn_t gfn, uint64_t npages,
		     struct kage_census *out)
{
	int r = 0;

	for (uint64_t i = 0; r == 0 && i < npages; i++) {
		struct kage_digest d;

		r = obs_digest(mm, salt, gfn_add(gfn, i), &d);
		if (r > 0) {
			out->skipped++;
			r = 0;
		} else if (r == 0) {
			out->pages++;
			r = contents_add(t, guest, &d);
		}
	}
	return r;
}

static void count(const struct contents *t, uint64_t salt, struct kage_census *out)
{
	static const char zeroes[PAGE_SIZE];
	struct kage_digest zero;

	digest_of(zeroes, salt, &zero);
	out->distinct = t->used;
	out->zero = contents_find(t, &zero)->count;
	for (uint64_t i = 0; i < t->slots; i++)
		if (t->slot[i].common)
			out->common += t->slot[i].count;
}

int obs_census(struct mm *const *mms, unsigned guests, uint64_t salt, struct kage_census *out)
{
	struct contents t;
	int r = contents_init(&t, mms[0]->host->env, SLOTS_MIN);

	if (r)
		return r;
	for (unsigned g = 0; r == 0 && g < guests; g++) {
		uint64_t n;
		gfn_t at;

		for (unsigned i = 0; r == 0 && (n = obs_region_at(mms[g], i, &at)) != 0; i++)
			r = add_range(&t, mms[g], g, salt, at, n, out);
	}
	if (r == 0)
		count(&t, salt, out);
	contents_finish(&t);
	return r;
}
