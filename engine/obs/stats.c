/* SPDX-License-Identifier: MIT */
/*
 * Counters. Events are counted where they happen (mm_count); what is held is
 * counted here, by classifying every page of every region, for who wants that.
 *
 * Why not counted as it changes: a clone turns every page of its parent from private to
 * shared, and the last sharer's end turns them back, in a time that does not depend on how many there are.
 */
#include "mm/fused.h"
#include "mm/region.h"
#include "mm/stable.h"
#include "obs/obs.h"

static void add_counters(const struct mm_counters *c, struct kage_stats *out)
{
#define X(name) out->name += atomic_load_explicit(&c->name, memory_order_relaxed);
	X(faults) X(faults_spurious) X(faults_retried) X(cow_breaks) X(cow_reused) X(tables_unshared)
	X(blocks_split) X(changes) X(changes_raced) X(clones) X(pages_discarded) X(ksm_merges) X(ksm_unmerges)
	X(ksm_cow_breaks)
#undef X
}

static void add_notify(const struct notify *n, struct kage_stats *out)
{
	out->faults_retried += READ_ONCE(n->retried);
	out->retries_spurious += READ_ONCE(n->spurious);
}

static void add_class(struct kage_stats *out, uint8_t class)
{
	switch ((enum kage_page_class)class) {
	case KAGE_PAGE_HOME:
	case KAGE_PAGE_PRIVATE:
	case KAGE_PAGE_DEVICE:
		out->pages_private++;
		break;
	case KAGE_PAGE_CLONE:
		out->pages_shared_clone++;
		break;
	case KAGE_PAGE_MERGED:
		out->pages_shared_merge++;
		break;
	case KAGE_PAGE_HOST_PRIVATE:
		out->pages_private++;
		out->pages_host_private++;
		break;
	case KAGE_PAGE_ZERO:
		out->pages_zero++;
		break;
	case KAGE_PAGE_UNTOUCHED:
		out->pages_untouched++;
		break;
	case KAGE_PAGE_NONE:
	case KAGE_PAGE_POISON:
		break;
	}
}

uint64_t obs_region_at(struct mm *mm, unsigned i, gfn_t *start)
{
	struct regions *set;
	uint64_t n = 0;

	rcu_enter();
	set = load_acquire(&mm->regions);
	if (i < set->count) {
		*start = set->r[i].start;
		n = set->r[i].npages;
	}
	rcu_leave();
	return n;
}

static uint64_t count_nominal(struct mm *mm)
{
	uint64_t n, sum = 0;
	gfn_t at;

	for (unsigned i = 0; (n = obs_region_at(mm, i, &at)) != 0; i++)
		sum += n;
	return sum;
}

/* Mapped and untouched pages add up to what this one walk met, whatever is mapped or unmapped meanwhile. */
static void add_pages(struct mm *mm, struct kage_stats *out)
{
	uint8_t map[BLOCK_PAGES];
	uint64_t n, mapped = 0;
	gfn_t at;

	for (unsigned i = 0; (n = obs_region_at(mm, i, &at)) != 0; i++) {
		while (n) {
			uint64_t run = MIN(n, BLOCK_PAGES - at.v % BLOCK_PAGES);

			obs_page_map(mm, at, run, map);
			for (uint64_t j = 0; j < run; j++)
				add_class(out, map[j]);
			mapped += run;
			at = gfn_add(at, run);
			n -= run;
		}
	}
	out->pages_mapped = mapped - out->pages_untouched;
}

static void add_events(struct mm *mm, struct kage_stats *out)
{
	out->guests++;
	out->pages_nominal += count_nominal(mm);
	add_counters(&mm->count, out);
	add_notify(&mm->notify, out);
}

static void add_held(struct mm *mm, struct kage_stats *out)
{
	add_pages(mm, out);
	out->ksm_pages_sharing = out->pages_shared_merge;
	out->ksm_zero_pages = out->pages_zero;
	out->ksm_general_profit = (int64_t)((out->pages_shared_merge + out->pages_zero) * PAGE_SIZE);
}

/* The same in a hardened domain, where all that was looked at is fused. */
static bool fused_alone(const struct mm *mm, const struct mm_lookup *l)
{
	return entry_is_fused(l->entry) && READ_ONCE(pfn_frame(mm->host->pool, l->pfn)->refs) == 1;
}

/* Pages of a guest whose frame is a candidate: looked at, unique so far. */
static uint64_t count_unshared(struct mm *mm)
{
	uint64_t n, unshared = 0;
	gfn_t at;

	for (unsigned i = 0; (n = obs_region_at(mm, i, &at)) != 0; i++) {
		for (; n; n--, at.v++) {
			struct mm_lookup l;

			rcu_enter();
			l = mm_lookup(mm, at);
			unshared += entry_is_leaf(l.entry) && !(l.entry & ENTRY_SPECIAL) &&
				    (candidate_alive(mm->host->pool, l.pfn) || fused_alone(mm, &l));
			rcu_leave();
		}
	}
	return unshared;
}

/* It lives as long as the guest, which the caller keeps from being destroyed. */
static struct merge_mm *merge_of(struct merge *m, const struct mm *mm)
{
	struct merge_mm *g;

	lock_take(&m->lock);
	g = mm->merge;
	lock_drop(&m->lock);
	return g;
}

void obs_guest(struct mm *mm, struct merge *m, bool walk, struct kage_stats *out)
{
	struct merge_mm *g = merge_of(m, mm);

	add_events(mm, out);
	out->ksm_bytes = merge_mm_bytes(m, mm);
	if (walk) {
		add_held(mm, out);
		out->ksm_general_profit -= (int64_t)out->ksm_bytes;
	}
	if (g) {
		out->ksm_pages_volatile = READ_ONCE(g->volatiles_last);
		out->ksm_pages_skipped = READ_ONCE(g->skipped_last);
		out->ksm_pages_scanned = READ_ONCE(g->scanned);
		out->ksm_pages_backed_off = READ_ONCE(g->backed_off_last);
		out->ksm_chunk_visits = READ_ONCE(g->visits);
		out->ksm_full_scans = READ_ONCE(g->passes);
		out->ksm_pages_unshared = walk ? count_unshared(mm) : 0;
	}
}

static int add_guest(struct mm *mm, void *arg)
{
	add_events(mm, arg);
	return 0;
}

static int add_guest_held(struct mm *mm, void *arg)
{
	struct kage_stats *out = arg, one = { 0 };

	add_held(mm, &one);
	out->pages_mapped += one.pages_mapped;
	out->pages_private += one.pages_private;
	out->pages_shared_clone += one.pages_shared_clone;
	out->pages_shared_merge += one.pages_shared_merge;
	out->pages_zero += one.pages_zero;
	out->pages_untouched += one.pages_untouched;
	out->pages_host_private += one.pages_host_private;
	return 0;
}

struct sharing {
	struct host *h;
	uint64_t shared, sharing, alone, chain;
};

static void add_stable(struct stable *s, void *arg)
{
	struct sharing *sh = arg;
	uint64_t refs = READ_ONCE(pfn_frame(sh->h->pool, s->pfn)->refs);

	/* of a hardened domain: what is a candidate elsewhere */
	sh->alone += s->fused && refs <= 1;
	sh->shared += !(s->fused && refs <= 1);
	sh->sharing += refs ? refs - 1 : 0;
	sh->chain += sizeof(*s) + (s->room > STABLE_FIRST ? s->room * sizeof(*s->chain) : 0);
}

static void add_merge(struct host *h, struct merge *m, bool walk, struct kage_stats *out)
{
	struct sharing sh = { .h = h };

	stable_each(h, add_stable, &sh);
	stable_chains(h, &out->ksm_stable_chains, &out->ksm_stable_dups);
	out->ksm_bytes += sh.chain + stable_bytes(h);
	out->ksm_pages_shared = sh.shared;
	out->ksm_pages_sharing = sh.sharing;
	out->ksm_zero_pages = out->pages_zero;
	out->ksm_pages_unshared = candidates_count(&m->candidates, h->pool) + sh.alone;
	out->ksm_pages_volatile = atomic_load(&m->volatiles);
	out->ksm_pages_skipped = atomic_load(&m->skipped);
	out->ksm_full_scans = atomic_load(&m->passes);
	out->ksm_pages_scanned = atomic_load(&m->scanned);
	out->ksm_pages_backed_off = atomic_load(&m->backed_off);
	out->ksm_chunk_visits = atomic_load(&m->visits);
	if (walk)
		out->ksm_general_profit =
			(int64_t)((sh.sharing + out->pages_zero) * PAGE_SIZE) - (int64_t)out->ksm_bytes;
}

static void add_pool(struct host *h, struct kage_stats *out)
{
	struct pool_stats st;

	pool_stats(h->pool, &st);
	out->frames_used = st.arena_used - st.arena_tables + pool_home_pages(h->pool);
	/* the two were not read at one instant */
	out->frames_used -= MIN(out->frames_used, out->frames_reserve);
	out->frames_table = st.arena_tables;
	out->frames_free = st.arena_free;
	out->frames_pending = st.pending;
	out->bytes_metadata = st.metadata_bytes;
}

static void add_reserve(struct tenant *t, void *arg)
{
	struct kage_stats *out = arg;

	out->frames_reserve += READ_ONCE(t->reserve->count);
	out->references_noted += READ_ONCE(t->reserve->noted);
	out->ksm_bytes += reserve_bytes(t->reserve);
}

void obs_engine(struct host *h, struct merge *m, bool walk, struct kage_stats *out)
{
	add_counters(&h->retired, out);
	host_each_mm(h, add_guest, out);
	if (walk)
		host_each_mm(h, add_guest_held, out);
	tenants_hardened(h, add_reserve, out);
	add_merge(h, m, walk, out);
	add_pool(h, out);
}
