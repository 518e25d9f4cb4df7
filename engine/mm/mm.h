/* SPDX-License-Identifier: MIT */
/*
 * The primary MMU of one guest: regions, and a table gfn -> pfn. The truth.
 *
 *   host      what all guests of an engine share: pool, layers, families
 *   family    guests that are clones of each other: they share table pages
 *   mm        one guest; its root is itself an entry, with a W bit
 *   layer     node of the family's tree of clones; object of the reverse map
 *
 * Table pages are shared between the mms of a family and counted: a clone takes
 * one reference on the root table and clears W in both root entries; the first
 * write below un-shares one path (table.c).
 *
 * Invariants:
 *  M1  an effective W (the AND from the root entry down) means that every table
 *      on the path has one reference, and that the frame is this guest's alone
 *      (refs 1, and no block entry covers it; a block: block refs 1, and no
 *      4 KiB entry maps a piece).
 *  M2  frame refs == number of leaf entries, in distinct table pages, that map
 *      it; table refs == number of entries (and roots) that point to it. Entries
 *      with ENTRY_SPECIAL (zero frame, device frames) are not counted.
 *  M3  a frame that is not exclusive is never written.
 *  M4  an mm is changed by the change funnel only (change.c), except for what
 *      no secondary MMU can see: filling an empty entry, un-sharing a table,
 *      splitting a block, granting W to a frame that has become exclusive.
 *  M5  every entry that maps a frame (not special) is found by its reverse map.
 *
 * Locks, outermost first: host->lock; family->lock (read: changes that reach
 * into several guests; write: clone, destroy, audit); mm->range (read: faults
 * and changes of single pages; write: clone, regions, discard, destroy); table
 * locks, higher level first; host->stable.
 *
 * The table lock of (family, level, gfn range of one table of that level)
 * guards, in all tables of the family at that level and range, the entries and
 * the reference counts of what they point to. So the 512 references of an
 * un-share are plain adds under one lock.
 *
 * Lookups take no lock: tables and frames are freed after a grace period.
 */
#ifndef KAGE_MM_MM_H
#define KAGE_MM_MM_H

#include <kage/vm.h>
#include "base/lock.h"
#include "base/random.h"
#include "base/trace.h"
#include "frame/pool.h"
#include "notify/notify.h"
#include "pt/entry.h"

struct mm;
struct layer;
struct dirty_log;
struct tenant;
struct tenant_table;
struct mirror;

struct region {
	gfn_t start;
	uint64_t npages;
	uint32_t kind;  /* enum kage_region_kind */
	uint32_t flags; /* enum kage_region_flags */
	uint32_t prot;
	/* ANON: home, NULL until needed; FILE, FOREIGN: the device extent. The set holds a reference. */
	struct extent *_Atomic extent;
	int (*touch)(void *opaque, uint64_t gpa, void *page);
	void *opaque;
};

/* Replaced as a whole; sorted by start. Only `extent` of a region is ever filled in. */
struct regions {
	uint32_t room;
	uint32_t count;
	struct defer_node defer;
	struct host *host;
	struct region r[];
};

#define MM_COUNTERS(X)                                                                           \
	X(faults) X(faults_spurious) X(faults_retried) X(cow_breaks) X(cow_reused)               \
	X(tables_unshared) X(blocks_split) X(changes) X(changes_raced) X(clones)                 \
	X(pages_discarded) X(ksm_merges) X(ksm_unmerges) X(ksm_zero_pages) X(ksm_cow_breaks) X(pages_adopted) X(pages_broken)           \
	X(blocks_widened)

struct mm_counters {
#define X(name) _Atomic int64_t name;
	MM_COUNTERS(X)
#undef X
};
#define mm_count(mm, name) atomic_fetch_add_explicit(&(mm)->count.name, 1, memory_order_relaxed)
#define mm_count_add(mm, name, n) atomic_fetch_add_explicit(&(mm)->count.name, (n), memory_order_relaxed)

struct host {
	struct env *env;
	struct pool *pool;
	struct brlock lock;   /* the list of families; outermost. Read: walks, merging; write: guests come and go, audit */
	struct lock ids;      /* layer ids, mm ids; innermost */
	struct lock stable;   /* chains of stable frames */
	struct list families;
	uint64_t next_family, next_mm;
	struct layer_table *layers;
	struct stable_table *stable_table;
	struct tenant_table *tenants;
	struct random_key key; /* salts, and whatever else nobody may guess */
	struct mm_counters retired; /* of destroyed guests */
	_Atomic uint64_t stable_frames; /* FRAME_STABLE frames in use */
	_Atomic uint64_t map_budget; /* host mappings that all mirrors may have; 0: nobody has said */
	_Atomic uint32_t mirrors;
	bool limited; /* a memory limit is set: map 4 KiB pieces only, so that charging is exact */
};

#define TABLE_LOCKS_0 128
#define TABLE_LOCKS_1 32
#define TABLE_LOCKS_2 8

struct family {
	uint64_t id;
	_Atomic uint32_t users; /* one for its guests, and one for each thread in family_wait() */
	struct host *host;
	struct list node;
	struct list mms;
	uint64_t count;
	uint32_t domain;
	struct tenant *tenant; /* of that domain (mm/tenant.h) */
	struct brlock lock;
	struct lock top;                   /* root entries, refs of root tables */
	struct lock level4, level3;
	struct lock level2[TABLE_LOCKS_2];
	struct lock level1[TABLE_LOCKS_1];
	struct lock level0[TABLE_LOCKS_0];
};

/* A pinned range; guarded by mm->pin_lock. */
struct pin {
	struct list node;
	gfn_t gfn;
	uint64_t npages;
	uint64_t count;
};

struct mm {
	_Atomic entry_t root; /* ENTRY_TABLE | pfn | W | level of the root table in bits 52.. */
	struct regions *_Atomic regions;
	struct host *host;
	struct family *family;
	struct layer *layer;
	uint64_t id;
	uint32_t domain;
	bool cloned; /* it has been, or is a clone: new homes stay sparse. Changes under range held for writing */
	struct list node; /* in family->mms */
	struct brlock range;
	struct lock pin_lock;
	struct list pins;
	struct dirty_log *_Atomic dirty; /* open logs, linked; NULL: none (mm/dirty.h) */
	struct lock dirty_lock;
	struct mm_counters count;
	void *owner; /* the API's object */
	void *merge; /* what merging knows of this guest */
	struct list merging; /* in merging's list of guests; its lock */
	struct mirror *mirror; /* NULL: none (mm/mirror.h). Changes with family and range held for writing; reads without them acquire */
	struct notify notify;
};

#define ROOT_LEVEL_SHIFT 52
static inline unsigned root_level(entry_t root) { return (root >> ROOT_LEVEL_SHIFT) & 7; }

/* -- lifetime (mm.c, clone.c) -------------------------------------------- */

int host_init(struct host *h, struct env *env, struct pool *pool, const struct random_key *key, bool limited);
void host_finish(struct host *h);
int mm_create(struct host *h, struct mm *mm, uint32_t domain, unsigned levels);
/* -EBUSY while pins, readers or interval notifiers exist. Calls release of the listeners. Logs are closed before. */
int mm_destroy(struct mm *mm);
bool mm_busy(struct mm *mm);
/* Somebody hears of changes, at this moment: guests may be waiting for their ends. */
bool mm_listening(struct mm *mm);
/* `child` is zeroed memory. */
int mm_clone(struct mm *parent, struct mm *child);

/* For who may not wait for the family's lock where it is, but can come back: host->lock held, or a guest of it kept otherwise. */
static inline void family_get(struct family *f)
{
	atomic_fetch_add(&f->users, 1);
}
/* Sleeps while somebody writes to the family, and lets go of that reference. No lock held. */
void family_wait(struct family *f);

/* Calls fn for every mm of the engine with its family held for reading; stops at a nonzero return. */
int host_each_mm(struct host *h, int (*fn)(struct mm *mm, void *arg), void *arg);

/* For mm_create() and mm_clone(): an mm in zeroed memory that nobody sees. */
int mm_init(struct mm *mm, struct host *h, struct family *f);

/* -- regions (region.c) -------------------------------------------------- */

const struct region *mm_region(const struct mm *mm, gfn_t gfn); /* inside rcu or mm->range; NULL: none */
int mm_map(struct mm *mm, const struct kage_region *cfg);
int mm_unmap(struct mm *mm, gfn_t start, uint64_t npages);
int mm_protect(struct mm *mm, gfn_t start, uint64_t npages, uint32_t prot);
/* Marks dirty what regions have of [start, end). */
void mm_mark_regions(struct mm *mm, gfn_t start, gfn_t end);
int mm_advise(struct mm *mm, gfn_t start, uint64_t npages, enum kage_advice advice);

/* -- looking up (table.c) ------------------------------------------------ */

struct mm_lookup {
	entry_t entry;   /* as found; ENTRY_NONE if a table is missing */
	unsigned level;  /* of the entry */
	bool writable;   /* effective W */
	pfn_t pfn;       /* of the gfn asked for (a leaf), else PFN_NONE */
};
/* Lock-free; inside rcu_enter()/rcu_leave() or with mm->range held. */
struct mm_lookup mm_lookup(const struct mm *mm, gfn_t gfn);

/* -- faults (fault.c) ---------------------------------------------------- */

struct mm_fault {
	/* in */
	gfn_t gfn;
	uint32_t access;              /* KAGE_READ | WRITE | EXEC; 0: none in particular (no protection is checked) */
	bool unshare;                 /* the frame must become exclusive (pin, unmerge), as for a write, without being dirtied */
	bool logged;                  /* whoever writes keeps a log of its own, from which the write is harvested */
	struct notify_reader *reader; /* in a section that covers gfn; its own change does not hit it. May be NULL */
	const void *owner;
	/* out, with KAGE_OK (mm_fault) */
	pfn_t pfn;      /* of gfn */
	unsigned level; /* of the entry that maps it: contiguous around gfn as far as its level says */
	uint32_t prot;  /* what may be installed: WRITE only if the frame is exclusive and the region lets it */
	bool foreign;   /* memory that others change behind our back: guest tables in it cannot be tracked */
	bool zero;      /* the zero frame */
};

/*
 * Makes a page present with the access asked for. KAGE_OK, KAGE_RETRY (raced;
 * call again, with a new section if there is a reader), KAGE_MMIO, KAGE_WAIT,
 * -EFAULT (poison), -ENOMEM, -ETIMEDOUT, -EDEADLK or what the region's touch returned.
 * Takes mm->range for reading. With WRITE the page is marked dirty before return, unless it is logged.
 */
int mm_fault(struct mm *mm, struct mm_fault *f);
/* The same with mm->range held for reading by the caller. */
int mm_fault_held(struct mm *mm, struct mm_fault *f, struct brlock_held held);
/*
 * The answer that mm_fault() would give without doing anything, since the page is there with the access asked for; false:
 * there is none, or a mirror has a say. Takes no lock; the caller keeps changes away (notify_quiet()). Nobody counts it.
 */
bool mm_present(struct mm *mm, struct mm_fault *f);

/* -- engine access (access.c) -------------------------------------------- */

int mm_read(struct mm *mm, gpa_t gpa, void *buf, size_t len);
/* The same, and leaves fused pages as they are. */
int mm_peek(struct mm *mm, gpa_t gpa, void *buf, size_t len);
/* That for a whole page that may be a file's: its holes stay holes. */
int mm_read_page(struct mm *mm, gfn_t gfn, void *page);
/*
 * Writes; before a page is written `written(arg, gpa, len)` may veto nothing but learns of it,
 * after all bytes of a page are in place it is called: guest tables and code may have changed.
 */
int mm_write(struct mm *mm, gpa_t gpa, const void *buf, size_t len,
	     void (*written)(void *arg, gpa_t gpa, size_t len), void *arg);
int mm_pin(struct mm *mm, gfn_t gfn, uint64_t npages, struct iovec *iov, unsigned *n);
int mm_unpin(struct mm *mm, gfn_t gfn, uint64_t npages);
/* Calls fn for the pinned ranges; nonzero stops. mm->range held. */
int mm_each_pin(struct mm *mm, int (*fn)(struct mm *mm, gfn_t gfn, uint64_t npages, void *arg), void *arg);
/* 4 KiB of the page behind an entry as they are, into buf: holes read zero and stay holes. Inside rcu. */
void mm_copy_page(const struct mm *mm, const struct mm_lookup *l, size_t offset, void *buf, size_t len);

/* -- dirty logs (dirty.c) ------------------------------------------------ */

/* Somebody got, or used, the right to write [gfn, gfn + npages). Cheap when no log is open. */
void mm_mark_dirty(struct mm *mm, gfn_t gfn, uint64_t npages);
/* Merging has to look at the range again, though nobody wrote: regions or their flags changed. */
void mm_mark_changed(struct mm *mm, gfn_t gfn, uint64_t npages);
/* The same for any access; called when a secondary MMU caches a translation. */
void mm_mark_accessed(struct mm *mm, gfn_t gfn, uint64_t npages);
static inline bool mm_dirty_logged(const struct mm *mm)
{
	return READ_ONCE(mm->dirty) != NULL;
}
/* A log of accessed pages is open. */
bool mm_dirty_accessed(const struct mm *mm);
/* A log with KAGE_DIRTY_FINE is open: secondary MMUs map 4 KiB pieces for writing. */
bool mm_dirty_fine(const struct mm *mm);

/* -- the audit (audit.c) ------------------------------------------------- */

struct audit {
	void (*report)(struct audit *a, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
	uint64_t checks, violations;
	void *priv;
};
/* Stops all faults, checks everything; `more` adds what higher layers know of each mm (may be NULL). -ENOMEM. */
int host_audit(struct host *h, struct audit *a, int (*more)(struct mm *mm, struct audit *a));

#endif
