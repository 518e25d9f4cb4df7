/* SPDX-License-Identifier: MIT */
/*
 * The tree of layers, and the table of their ids. See layer.h.
 *
 * Ids are handed out lowest first from a two-level table, so that they stay
 * short: 24 bits are what a frame has room for.
 */
#include "mm/layer.h"

#define CHUNK 1024
#define CHUNKS ((1u << FRAME_OWNER_BITS) / CHUNK)

struct layer_table {
	struct layer *_Atomic *_Atomic chunk[CHUNKS];
	uint32_t used[CHUNKS];
	uint32_t first; /* no chunk below has a free id */
};

int layer_table_init(struct host *h)
{
	h->layers = env_alloc(h->env, sizeof(*h->layers));
	return h->layers ? 0 : -ENOMEM;
}

void layer_table_finish(struct host *h)
{
	if (!h->layers)
		return;
	for (unsigned i = 0; i < CHUNKS; i++)
		env_free(h->env, (void *)atomic_load(&h->layers->chunk[i]), CHUNK * sizeof(struct layer *));
	env_free(h->env, h->layers, sizeof(*h->layers));
	h->layers = NULL;
}

static struct layer *_Atomic *id_slot(struct host *h, uint32_t id)
{
	struct layer *_Atomic *chunk = load_acquire(&h->layers->chunk[id / CHUNK]);

	return chunk ? &chunk[id % CHUNK] : NULL;
}

/* Id 0 is never given out: an all-zero `where` names nobody. host->ids held. */
static int id_alloc(struct host *h, struct layer *l)
{
	struct layer_table *t = h->layers;

	for (uint32_t c = t->first; c < CHUNKS; c++) {
		struct layer *_Atomic *chunk = atomic_load(&t->chunk[c]);

		if (!chunk) {
			chunk = env_alloc(h->env, CHUNK * sizeof(struct layer *));
			if (!chunk)
				return -ENOMEM;
			atomic_store(&t->chunk[c], chunk);
			t->used[c] = c == 0;
		}
		if (t->used[c] == CHUNK)
			continue;
		t->first = c;
		for (uint32_t i = c == 0; i < CHUNK; i++) {
			if (atomic_load(&chunk[i]))
				continue;
			l->id = c * CHUNK + i;
			atomic_store(&chunk[i], l);
			t->used[c]++;
			return 0;
		}
	}
	return -ENOMEM;
}

int layer_new(struct host *h, struct family *f, struct layer **out)
{
	struct layer *l = env_alloc(h->env, sizeof(*l));
	int r;

	if (!l)
		return -ENOMEM;
	l->family = f;
	list_init(&l->children);
	list_init(&l->sibling);
	lock_take(&h->ids);
	r = id_alloc(h, l);
	lock_drop(&h->ids);
	if (r)
		env_free(h->env, l, sizeof(*l));
	else
		*out = l;
	return r;
}

static void id_free(struct host *h, struct layer *l)
{
	lock_take(&h->ids);
	atomic_store(id_slot(h, l->id), NULL);
	h->layers->used[l->id / CHUNK]--;
	h->layers->first = MIN(h->layers->first, l->id / CHUNK);
	lock_drop(&h->ids);
	env_free(h->env, l, sizeof(*l));
}

void layer_free(struct host *h, struct layer *l)
{
	struct layer *a, *next;

	if (!l)
		return;
	for (a = l->aliases; a; a = next) {
		next = a->parent;
		id_free(h, a);
	}
	id_free(h, l);
}

void layer_attach(struct layer *parent, struct layer *l, struct mm *mm)
{
	l->parent = parent;
	l->mm = mm;
	if (parent)
		list_add_tail(&parent->children, &l->sibling);
	if (mm)
		mm->layer = l;
}

void layer_beside(struct layer *l, struct layer *child, struct mm *mm)
{
	layer_attach(l->parent, child, mm);
}

/* `l` has one child left: the child answers for its id and those it answered for. */
static void layer_splice(struct layer *l)
{
	struct layer *child = container_of(l->children.next, struct layer, sibling);
	struct layer *a, *next;

	list_del(&child->sibling);
	child->parent = l->parent;
	if (l->parent) {
		list_add_tail(&l->parent->children, &child->sibling);
		list_del(&l->sibling);
	}
	for (a = l->aliases; a; a = next) {
		next = a->parent;
		a->into = child;
		a->parent = child->aliases;
		child->aliases = a;
	}
	l->aliases = NULL;
	l->into = child;
	l->parent = child->aliases;
	child->aliases = l;
	if (l->used)
		atomic_store(&child->used, true);
}

void layer_leave(struct host *h, struct layer *l)
{
	l->mm = NULL;
	while (l && !l->mm && list_empty(&l->children)) {
		struct layer *parent = l->parent;

		if (parent)
			list_del(&l->sibling);
		layer_free(h, l);
		l = parent;
	}
	if (l && !l->mm && l->children.next == l->children.prev)
		layer_splice(l);
}

struct layer *layer_find(struct host *h, uint32_t id)
{
	struct layer *_Atomic *slot = id_slot(h, id);
	struct layer *l = slot ? atomic_load(slot) : NULL;

	return l && l->into ? l->into : l;
}

int layer_each_mm(struct layer *l, int (*fn)(struct mm *mm, void *arg), void *arg)
{
	if (l->mm)
		return fn(l->mm, arg);
	list_for_each(pos, &l->children) {
		int r = layer_each_mm(container_of(pos, struct layer, sibling), fn, arg);

		if (r)
			return r;
	}
	return 0;
}

bool layer_above(const struct layer *l, const struct mm *mm)
{
	for (const struct layer *at = mm->layer; at; at = at->parent)
		if (at == l)
			return true;
	return false;
}

int layer_frames(struct mm *mm, gfn_t gfn, unsigned order, unsigned flags, pfn_t *out)
{
	struct pool *pool = mm->host->pool;
	int r = arena_alloc(pool, mm->domain, order, FRAME_PRIVATE, flags, out);

	if (r)
		return r;
	layer_use(mm->layer);
	if (order)
		arena_split(pool, *out);
	for (uint64_t i = 0; i < (uint64_t)1 << order; i++)
		atomic_store_explicit(&pfn_frame(pool, pfn_add(*out, i))->where,
				      frame_where(mm->layer->id, gfn_add(gfn, i)), memory_order_relaxed);
	return 0;
}

int layer_frame(struct mm *mm, gfn_t gfn, unsigned flags, pfn_t *out)
{
	return layer_frames(mm, gfn, 0, flags, out);
}
