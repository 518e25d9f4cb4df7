/* SPDX-License-Identifier: MIT */
/*
 * The structures of the shadow MMU, for the files of this folder.
 *
 *   page    512 entries, found by (gfn, role), of the shadow tables' own shape
 *           whatever the guest's: an entry of level n maps 4 KiB << 9n. Inherited
 *           permissions are not in the role: a walk ANDs along its path. It is
 *             of a table: made from guest entries, all in the frame `gfn`, of
 *             which each gives 2^split entries (a table of more frames, or with
 *             more than 512 entries, or of small entries, has several such pages)
 *             pass: no entry of the guest's is that large; its links lead to
 *             pages for parts of the same table
 *             direct: a large guest page in pieces
 *   entry   bits as below; its side entry holds the gfn and the links of the
 *           chain that it is in: of the gfn it maps (rmap), or of the page it
 *           points to (parents)
 *   ref     names an entry: page id << 9 | index; 0 is none
 *   chunk   what is known of 2 MiB of guest physical memory: heads of the rmap
 *           chains, which gfns are watched as tables, which as code
 *
 * Invariants (audit.c checks them):
 *  S1  a present entry equals what the guest entry that it shadows says now,
 *      less permissions at most, unless its page is unsync. Present implies
 *      that the guest's accessed bit is set (or cannot be written).
 *  S2  a leaf maps the frame that the primary table maps, with hW only if
 *      writing needs no further primary fault.
 *  S3  a gfn in chunk->track or chunk->code has no entry with hW, no large
 *      entry covers it, and no TLB has a tag for writing it.
 *  S4  every leaf is in the chain of its gfn, every link in its child's.
 *  S5  a TLB entry is backed by a leaf with at least its rights (paging off: by
 *      the primary table). Who takes rights from an entry adds to the batch,
 *      and batch_apply() runs before the shadow lock is dropped.
 *  S6  dirty_seq > flushed_seq while a vCPU may be inside a window with a tag
 *      that has been overwritten since it opened.
 *  S7  no entry is made from a guest table whose contents a change in flight
 *      replaces.
 *
 * All of it is guarded by the shadow lock; flushed_seq is atomic.
 */
#ifndef KAGE_SHADOW_INTERNAL_H
#define KAGE_SHADOW_INTERNAL_H

#include "shadow/shadow.h"

typedef uint64_t spte_t;

#define SPTE_P		((spte_t)1 << 0)
#define SPTE_W		((spte_t)1 << 1) /* what the guest's entry grants */
#define SPTE_U		((spte_t)1 << 2)
#define SPTE_X		((spte_t)1 << 3)
#define SPTE_D		((spte_t)1 << 4) /* the guest's dirty bit is set; links to tables: always */
#define SPTE_LINK	((spte_t)1 << 5)
#define SPTE_LARGE	((spte_t)1 << 6)
#define SPTE_UX		((spte_t)1 << 7) /* user mode may execute; X is for the supervisor where they differ */
#define SPTE_PKEY_SHIFT 8
#define SPTE_PKEY	((spte_t)15 << SPTE_PKEY_SHIFT)
#define SPTE_PFN	(ENTRY_PFN_MASK) /* leaf: pfn; link: id of the child */
/* What the primary table grants; hX also means that code is watched, if it has to be. */
#define SPTE_HR		((spte_t)1 << 52)
#define SPTE_HW		((spte_t)1 << 53)
#define SPTE_HX		((spte_t)1 << 54)
#define SPTE_NOAD	((spte_t)1 << 55) /* made while the guest entry could not be written (walk.c G2) */
#define SPTE_ALL	(SPTE_W | SPTE_U | SPTE_X | SPTE_UX | SPTE_D) /* of an entry that limits nothing */
#define SPTE_GUEST	(SPTE_ALL | SPTE_PKEY)
#define SPTE_HOST	(SPTE_HR | SPTE_HW | SPTE_HX)
_Static_assert(((SPTE_GUEST | SPTE_P | SPTE_LINK | SPTE_LARGE) & SPTE_PFN) == 0, "flags lie outside the pfn");
_Static_assert(((SPTE_HOST | SPTE_NOAD) & SPTE_PFN) == 0 && PFN_BITS == 40, "the pfn ends at bit 51");

static inline pfn_t spte_pfn(spte_t e)
{
	return PFN((e & SPTE_PFN) >> PAGE_SHIFT);
}
static inline bool spte_is_leaf(spte_t e)
{
	return (e & (SPTE_P | SPTE_LINK)) == SPTE_P;
}
static inline bool spte_is_link(spte_t e)
{
	return (e & (SPTE_P | SPTE_LINK)) == (SPTE_P | SPTE_LINK);
}

/*
 * role: level, which guest entries, and all that decides how they are decoded.
 *
 *   63     17 16    8  7       6       5     3 2     0
 *  |  params | first | pass | direct | table  | level |
 *
 * `table` is the level of the guest's entries, `first` the offset of the first
 * one in its frame, in units of 8 bytes; params is shape.c's.
 */
#define ROLE_LEVEL	 7u
#define ROLE_TABLE_SHIFT 3
#define ROLE_DIRECT	 ((uint64_t)1 << 6)
#define ROLE_PASS	 ((uint64_t)1 << 7)
#define ROLE_UNFED	 (ROLE_DIRECT | ROLE_PASS) /* made from no guest entry */
#define ROLE_FIRST_SHIFT 8			   /* 9 bits */
#define ROLE_FIRST	 ((uint64_t)(LEVEL_ENTRIES - 1) << ROLE_FIRST_SHIFT)
#define ROLE_PARAM_SHIFT 17
#define ROLE_PARAMS	 (~(uint64_t)0 << ROLE_PARAM_SHIFT)

enum reach {
	REACH_NONE, /* no parent since it was last without one; no TLB holds what it maps */
	REACH_ONE,  /* at page->gva only */
	REACH_MANY,
};

typedef uint32_t ref_t;
#define REF(page, idx) ((page)->id << LEVEL_BITS | (idx))

struct side {
	uint64_t gfn;	  /* leaf: of the first page it maps */
	ref_t prev, next; /* prev 0: the head of the chain points here */
};

struct shadow_page {
	_Alignas(CACHE_LINE) struct shadow_page *hash_next; /* or next in the list of free pages */
	gfn_t gfn;		       /* of the guest's entries; direct: first gfn mapped */
	uint64_t role;
	uint32_t id;   /* for life */
	ref_t parents; /* chain of links that point here */
	uint32_t nparents;
	uint32_t roots;	 /* vCPUs whose root it is */
	uint32_t live;	 /* entries present */
	uint32_t writes; /* caught since it was last walked through */
	uint32_t quiet;	 /* unsync: syncs in a row that found nothing */
	uint8_t level;
	uint8_t reach;	     /* enum reach */
	bool used;	     /* in the hash; else free */
	bool rooted;	     /* has been a root: TLBs may hold what it maps without a parent */
	bool unsync;	     /* its gfn may be written; flushes re-read it */
	bool foreign;	     /* for ever so: somebody else writes that memory */
	bool syncing;	     /* being watched again; not yet relied on */
	bool below;	     /* sync_below(): the answer to question `asked` */
	const struct pt_format *format; /* from the role, as the next four; NULL: direct */
	struct pt_params params;
	uint8_t table_level; /* of the guest's entries */
	uint8_t split;	     /* log2 of the entries that one of the guest's gives */
	uint16_t first;	     /* index of the first of them in its frame */
	uint64_t gva;	     /* REACH_ONE: of entry 0 */
	uint64_t write_gen;  /* older than the shadow's: hW bits are void */
	uint64_t settle_seq; /* writers have stopped once flushed_seq >= this */
	uint64_t asked;	     /* sync_below() */
	struct list node;    /* all pages in use, oldest first */
	struct list idle;    /* no parents and no vCPU's root; else empty */
	struct list unsync_node;
	struct page_run *run;
	spte_t spte[LEVEL_ENTRIES];
	struct side side[LEVEL_ENTRIES];
};
_Static_assert(sizeof(struct side) == 16, "a shadow page is 12 KiB for 2 MiB of guest memory");

/* What pages are allocated in: one by one, or, once there are as many, a huge page full. */
struct page_run {
	struct list node; /* all of the guest's; or of those that go */
	uint32_t n, used; /* pages; those not in the free list */
	bool leaves;
	struct shadow_page page[];
};
#define RUN_BYTES (BLOCK_PAGES * PAGE_SIZE)
#define RUN_PAGES ((uint32_t)((RUN_BYTES - sizeof(struct page_run)) / sizeof(struct shadow_page)))

struct chunk {
	struct chunk *hash_next;
	uint64_t key;	   /* gfn >> 9 */
	uint64_t code_seq; /* writers of code pages have stopped once flushed_seq >= this */
	uint32_t live;	   /* chains that are not empty, and bits set: 0 frees it */
	uint32_t watched;  /* bits set in track and code */
	ref_t large;	   /* chain of the large leaves */
	uint64_t track[LEVEL_ENTRIES / 64];
	uint64_t code[LEVEL_ENTRIES / 64];
	ref_t head[LEVEL_ENTRIES];
};

#define BATCH_MAX    16
#define INFLIGHT_MAX 64 /* NOTIFY_CHANGES */
_Static_assert(INFLIGHT_MAX >= NOTIFY_CHANGES, "every change in flight has a place");

/* A change that replaces contents, between start and end. id 0: none. */
struct inflight {
	uint64_t id;
	gfn_t start, end;
};

struct shadow {
	struct mm *mm;
	struct env *env;
	struct shadow *_Atomic *slot;
	struct lock lock;
	struct brlock cpus_lock;
	struct list cpus;
	struct kage_notifier listener;
	bool membarrier;
	_Atomic uint32_t untold; /* writes that are under way: shadow_written() comes */

	/* page tables of our own: indexes sized for `cap` pages and chunks */
	struct shadow_page **page_hash, **page_by_id;
	struct chunk **chunk_hash;
	uint32_t page_bits, chunk_bits;
	uint32_t page_ids, id_cap; /* ids given out; size of page_by_id */
	uint32_t free_id, nfree_ids; /* given back: page_by_id[id] is next << 1 | 1 */
	struct shadow_page *free_pages;
	struct list runs;
	uint32_t nunused; /* pages of runs none of whose pages is used */
	struct chunk *free_chunks;
	uint32_t nfree_pages, nfree_chunks, npages, nchunks, ntables; /* ntables: not direct */
	uint32_t limit;
	struct list pages, idle, unsync;
	uint32_t nunsync, nunsync_upper; /* upper: above level 0 */
	uint64_t asking;		 /* the last sync_below() */

	/* what TLBs must lose before the lock is dropped */
	struct shadow_drop batch[BATCH_MAX];
	unsigned nbatch;
	uint32_t batch_flush;
	uint32_t direct_cpus;  /* vCPUs with direct_used */
	uint32_t code_cpus;    /* vCPUs that track code */
	uint32_t breaking;     /* code_break() is at work: nobody gets to write meanwhile */
	struct lock code_lock; /* one code_break() at a time; outside the shadow lock */

	uint64_t write_gen;
	uint64_t dirty_seq;
	uint64_t broadcasts; /* shadow_broadcast() calls: stores to watched pages resolved before are void */
	_Atomic uint64_t flushed_seq;
	struct inflight inflight[INFLIGHT_MAX];
	unsigned ninflight;

	uint64_t misses_retired; /* of vCPUs that are gone */
	/* counters; _Atomic for readers without the lock */
	_Atomic uint64_t installed, dropped, table_writes, flushes, shootdowns, window_waits;
};

#define shadow_count(s, name) atomic_fetch_add_explicit(&(s)->name, 1, memory_order_relaxed)
/* The same where the shadow lock is held and every other writer holds it: no locked instruction. */
#define shadow_count_locked(s, name)                                                                         \
	atomic_store_explicit(&(s)->name, atomic_load_explicit(&(s)->name, memory_order_relaxed) + 1,        \
			      memory_order_relaxed)

/* Free pages and chunks that a walk may need: every level, direct pages below, the chunks they are tracked in. */
#define NEED_PAGES  (PT_MAX_LEVELS + 2)
#define NEED_CHUNKS (PT_MAX_LEVELS + 3)

void shadow_destroy(struct shadow *s); /* shadow.c; no vCPU is left */

/* -- page.c ---------------------------------------------------------------- */

bool pages_ready(const struct shadow *s);
int pages_topup(struct shadow *s);   /* takes the lock itself */
void pages_shrink(struct shadow *s); /* zaps down to the limit */
int pages_init(struct shadow *s);
void pages_finish(struct shadow *s);
/* Much more is unused than there was use for lately: pages_trim(), which takes the lock itself. */
bool pages_to_trim(const struct shadow *s);
void pages_trim(struct shadow *s);
struct shadow_page *page_find(struct shadow *s, gfn_t gfn, uint64_t role);
struct shadow_page *page_get(struct shadow *s, gfn_t gfn, uint64_t role);
/* The next page made from guest entries at gfn; `after` NULL: the first. */
struct shadow_page *page_next_table(struct shadow *s, struct shadow_page *after, gfn_t gfn);
void page_zap(struct shadow *s, struct shadow_page *p);
void page_link(struct shadow *s, struct shadow_page *p, unsigned idx, spte_t guest,
	       struct shadow_page *child);
void page_set_leaf(struct shadow *s, struct shadow_page *p, unsigned idx, spte_t e, gfn_t gfn);
void page_drop(struct shadow *s, struct shadow_page *p, unsigned idx);
void page_void_writes(struct shadow *s, struct shadow_page *p);
uint64_t entry_gva(const struct shadow_page *p, unsigned idx); /* REACH_ONE */
void page_root_get(struct shadow *s, struct shadow_cpu *cpu, unsigned root, struct shadow_page *p);
void page_roots_put(struct shadow *s, struct shadow_cpu *cpu);
void entry_lost(struct shadow *s, struct shadow_page *p, unsigned idx, uint32_t kinds);
void entry_clear_write(struct shadow *s, struct shadow_page *p, unsigned idx);

static inline struct shadow_page *page_of_id(const struct shadow *s, uint32_t id)
{
	return s->page_by_id[id];
}
static inline struct shadow_page *spte_child(const struct shadow *s, spte_t e)
{
	return page_of_id(s, spte_pfn(e).v);
}
static inline struct shadow_page *ref_page(const struct shadow *s, ref_t r)
{
	return page_of_id(s, r >> LEVEL_BITS);
}
static inline unsigned ref_idx(ref_t r)
{
	return r & (LEVEL_ENTRIES - 1);
}
static inline struct side *ref_side(const struct shadow *s, ref_t r)
{
	return &ref_page(s, r)->side[ref_idx(r)];
}

/* hW bits of a page that a whole-guest write protection has passed are void: clears them. */
static inline void page_settle(struct shadow *s, struct shadow_page *p)
{
	if (unlikely(p->write_gen != s->write_gen))
		page_void_writes(s, p);
}

/* -- rmap.c ---------------------------------------------------------------- */

struct chunk *chunk_find(const struct shadow *s, gfn_t gfn);
struct chunk *chunk_get(struct shadow *s, gfn_t gfn);
void chunk_put(struct shadow *s, struct chunk *c); /* frees it if nothing is in it */
void rmap_add(struct shadow *s, struct shadow_page *p, unsigned idx, gfn_t gfn, bool large);
void rmap_del(struct shadow *s, struct shadow_page *p, unsigned idx, bool large);
void rmap_drop(struct shadow *s, struct chunk *c, gfn_t gfn);
void rmap_drop_chunk(struct shadow *s, struct chunk *c);
void rmap_clear_write(struct shadow *s, struct chunk *c, gfn_t gfn);
void chunk_drop_large(struct shadow *s, struct chunk *c);

/* -- track.c --------------------------------------------------------------- */

static inline bool chunk_tracked(const struct chunk *c, gfn_t g)
{
	return c && bit_test(c->track, level_index(g, 0));
}
static inline bool chunk_code(const struct chunk *c, gfn_t g)
{
	return c && bit_test(c->code, level_index(g, 0));
}
void watch(struct shadow *s, struct chunk *c, uint64_t *map, gfn_t gfn);
void unwatch(struct shadow *s, struct chunk *c, uint64_t *map, gfn_t gfn);
void track_page(struct shadow *s, struct shadow_page *p);   /* a new page's gfn is watched */
void untrack_page(struct shadow *s, struct shadow_page *p); /* p no longer needs it */
void page_unsync(struct shadow *s, struct shadow_page *p);
void gfn_unsync(struct shadow *s, gfn_t gfn);
struct guest_entry;
bool same_target(struct shadow *s, const struct shadow_page *p, unsigned idx, const struct guest_entry *g);
void sync_entry(struct shadow *s, struct shadow_page *p, unsigned idx, const void *table);
/* The page, which is about to be used by a new way, and what is out of sync below it. */
void sync_below(struct shadow *s, struct shadow_page *top);
int code_break(struct shadow *s, gfn_t gfn);
/* A use has changed a guest entry: pages of all roles follow. */
void entry_used(struct shadow *s, gpa_t gpa, unsigned bytes);

/* -- shape.c --------------------------------------------------------------- */

/* gfn and role of a root's page. */
gfn_t root_gfn(const struct pt_root *r);
uint64_t root_role(const struct pt_root *r);
/* Fills what a page keeps of its role. */
void page_shape(struct shadow_page *p);
/* What a guest entry comes to. */
struct guest_entry {
	spte_t bits;   /* SPTE_GUEST, SPTE_NOAD */
	bool leaf;     /* maps memory; else the next table */
	gfn_t target;  /* leaf: the first that p[idx] maps; else of the page below */
	uint64_t role; /* of the page below */
};
/*
 * False if the entry at p[idx] cannot be shadowed as it is: not present, reserved, accessed bit clear (which
 * is forgiven to an entry that was made without).
 */
bool guest_entry(struct shadow *s, const struct shadow_page *p, unsigned idx, uint64_t raw,
		 struct guest_entry *g);
/* The same of a page that is made from none. */
void unfed_entry(const struct shadow_page *p, unsigned idx, struct guest_entry *g);

/* The guest entry that p[idx] is made from. */
static inline uint64_t table_entry(const struct shadow_page *p, const void *table, unsigned idx)
{
	unsigned i = p->first + (idx >> p->split);

	return p->format->entry_bytes == sizeof(uint32_t) ? READ_ONCE(((const uint32_t *)table)[i])
							  : READ_ONCE(((const uint64_t *)table)[i]);
}
/* The index of an address in a page of its root's tree. */
static inline unsigned root_index(const struct pt_root *r, uint64_t gva, unsigned level)
{
	return level_index(GFN(pt_root_offset(r, gva) >> PAGE_SHIFT), level);
}
/* Bits that may take from one mode what they give another: SMEP, SMAP, PAN, WXN, keys. */
static inline spte_t no_grants(const struct shadow_page *p)
{
	return SPTE_U | SPTE_PKEY | (p->format->entangled ? SPTE_W | SPTE_UX : 0);
}
/* What the entries of a path, ANDed, let the guest do. */
static inline struct pt_rights guest_rights(spte_t guest)
{
	return (struct pt_rights){
	    .perm = KAGE_READ | (guest & SPTE_W ? KAGE_WRITE : 0) | (guest & SPTE_X ? KAGE_EXEC : 0),
	    .user = guest & SPTE_U,
	    .user_exec = guest & SPTE_UX,
	    .pkey = (guest & SPTE_PKEY) >> SPTE_PKEY_SHIFT,
	};
}

/* -- walk.c ---------------------------------------------------------------- */

/* The frame's contents, inside rcu_enter(): NULL if its page is not present. */
const void *table_map(struct shadow *s, gfn_t gfn);
/* The same, in hardened domains too where the page has been merged: for who only compares. */
const void *table_peek(struct shadow *s, gfn_t gfn);
/* No accessed or dirty bit can be set in it (walk.c G2). */
bool table_readonly(struct shadow *s, gfn_t gfn);
/* The root for an address, or -1: no walk is needed to tell that the guest faults, *fault says how. */
int find_root(const struct pt_guest *mode, uint64_t gva, uint32_t access, struct kage_fault *fault);
/* One whole walk with faults, accessed and dirty bits. KAGE_OK: the shadow walk may go on; KAGE_RETRY: raced.
 */
int walk_guest(struct shadow_cpu *cpu, uint64_t gva, uint32_t access, struct kage_fault *fault);

/* -- invalidate.c ---------------------------------------------------------- */

extern const struct kage_notifier_ops shadow_listener_ops;
void batch_add(struct shadow *s, uint64_t gva, uint64_t npages, uint32_t kinds);
void batch_apply(struct shadow *s);
/* Makes every window that was open when a tag was overwritten end. No lock held. 0, -ETIMEDOUT, -EDEADLK,
 * -EAGAIN. */
int shootdown(struct shadow *s, bool blockable);
static inline bool unflushed(struct shadow *s, uint64_t seq)
{
	return atomic_load_explicit(&s->flushed_seq, memory_order_acquire) < seq;
}
void break_code(struct shadow *s, gfn_t g, gfn_t end);
bool inflight_overlaps(const struct shadow *s, gfn_t gfn);

#endif
