/* SPDX-License-Identifier: MIT */
/*
 * The shadow MMU of one guest: a secondary MMU that the engine owns. It turns
 * guest virtual addresses into frames, from the guest's own tables and the
 * primary table, and fills the TLBs of the guest's vCPUs. README.md tells how.
 *
 *   shadow      one for each guest, made at the first vCPU, gone with the guest
 *   shadow_cpu  what the shadow MMU knows of a vCPU; embedded in the backend's
 *               vCPU, which it reaches through the ops only
 *
 * Locks: the shadow lock (RANK_SHADOW), then a vCPU's TLB lock (RANK_TLB, taken
 * by the ops). mm_fault(), the notify functions and code callbacks run without
 * either. The list of vCPUs is guarded by both the shadow lock and `cpus_lock`,
 * a brlock: who changes it takes both, who walks it one of them.
 */
#ifndef KAGE_SHADOW_SHADOW_H
#define KAGE_SHADOW_SHADOW_H

#include <kage/stats.h>
#include <kage/vcpu.h>
#include "base/guest.h"
#include "mm/mm.h"
#include "pt/guest.h"

struct shadow;
struct shadow_cpu;
struct shadow_page;

/* One translation for the TLB. */
struct shadow_fill {
	uint64_t gva;	 /* of the page; large: of its 2 MiB */
	void *hva;	 /* what gva is */
	bool large;	 /* 2 MiB, else 4 KiB */
	uint32_t rights; /* KAGE_READ | WRITE | EXEC in the mode that the vCPU is in */
};

/* What a TLB must lose: pages of a range, in every context. */
struct shadow_drop {
	uint64_t gva;
	uint32_t npages; /* at most BLOCK_PAGES */
	uint32_t kinds;	 /* KAGE_RWX or a part of it */
};

/* All are called under the shadow lock except code_written. */
struct shadow_cpu_ops {
	void (*fill)(struct shadow_cpu *cpu, const struct shadow_fill *f);
	/*
	 * Overwrites the tags of `n` ranges, and of everything for the kinds in
	 * `flush`. True if a tag or context that could have been in use went.
	 */
	bool (*drop)(struct shadow_cpu *cpu, const struct shadow_drop *d, unsigned n, uint32_t flush);
	/* NULL: this vCPU does not track code. Under cpus_lock (read) only. */
	void (*code_written)(struct shadow_cpu *cpu, gpa_t gpa, uint64_t len);
	/* Every TLB entry that could hit is handed to shadow_audit_tlb(). */
	void (*audit)(struct shadow_cpu *cpu, struct audit *a);
};

struct shadow_cpu {
	/* set by the backend before shadow_attach() */
	const struct shadow_cpu_ops *ops;
	uint64_t *win;	  /* the window of use: odd while one is open */
	uint32_t *wanted; /* counts who waits for it */
	/* kept by the backend */
	_Atomic uint32_t running;	/* 0: no window opens before a full fence */
	_Atomic uintptr_t slow_thread;	/* the thread that is in a slow path, its window closed; or 0 */
	_Atomic uintptr_t enter_thread; /* the thread between enter and leave; or 0 */
	_Atomic uint64_t misses;
	/* the shadow MMU's */
	struct shadow *shadow;
	struct list node;
	struct pt_guest mode;	    /* what the registers say about translation */
	uint64_t role[PT_ROOTS];    /* of its roots */
	bool direct_used;	    /* its TLB may hold translations from paging off */
	struct shadow_page *root[PT_ROOTS]; /* NULL: to be looked up. Under the shadow lock */
	uint64_t resolved;	    /* shadow->broadcasts when SHADOW_EMULATE was found */
	struct notify_reader reader;
};

/* Results of shadow_fault() besides enum kage_outcome and -errno. */
#define SHADOW_EMULATE 16

enum shadow_fault_flags {
	/* A page whose writes are watched becomes writable instead of SHADOW_EMULATE. */
	SHADOW_UNTRACK = 1u << 0,
};

/* -- lifetime (shadow.c) -------------------------------------------------- */

/* The guest's shadow MMU, made and put into *slot if there is none. `lock` guards the making. -ENOMEM. */
int shadow_get(struct mm *mm, struct shadow *_Atomic *slot, struct lock *lock, struct shadow **out);
/* Adds a vCPU; shadow_set_mode() comes before its first use. -ENOMEM. */
int shadow_attach(struct shadow *s, struct shadow_cpu *cpu);
/* Removes one that no thread uses; returns when nobody looks at it any more. */
void shadow_detach(struct shadow_cpu *cpu);
/* The vCPU's registers changed. A kept root makes this a lookup. The TLB's contexts are the backend's
 * business. */
void shadow_set_mode(struct shadow_cpu *cpu, const struct pt_guest *mode);
/* The calling thread is between enter and leave of this vCPU, from here to shadow_leave(). */
void shadow_enter(struct shadow_cpu *cpu);
void shadow_leave(struct shadow_cpu *cpu);
/* The calling thread is between enter and leave of one of the guest's vCPUs. */
bool shadow_entered(struct shadow *s);
/* False: it is so of no guest's, and nobody needs to ask each. */
bool shadow_entered_any(void);
/* Adds to the fields shadow_*, table_writes, tlb_*, shootdowns, window_waits. */
void shadow_stats(struct shadow *s, struct kage_stats *out);
/* Inline probes may hit: shootdowns reach other threads by membarrier(2). */
bool shadow_fast_windows(const struct shadow *s);

/* -- translating (map.c, walk.c) ------------------------------------------ */

/*
 * Fills the vCPU's TLB for one access (a single kind) to the page of `gva`.
 * KAGE_OK: filled (it may be gone again at once); KAGE_GUEST_FAULT, KAGE_MMIO:
 * *fault says what; SHADOW_EMULATE: a store must go through shadow_store() at
 * fault->gpa; KAGE_WAIT or -errno of mm_fault(), -ETIMEDOUT, -EDEADLK. The
 * window of the vCPU is closed.
 */
int shadow_fault(struct shadow_cpu *cpu, uint64_t gva, uint32_t access, unsigned flags,
		 struct kage_fault *fault);
/* gva -> fault->gpa by the guest's tables alone; access 0 checks nothing, KAGE_IMPLICIT may be set. */
int shadow_translate(struct shadow_cpu *cpu, uint64_t gva, uint32_t access, struct kage_fault *fault);

/* -- writes that are watched (track.c) ------------------------------------ */

/* A vCPU's store to a watched page, within the page, right after SHADOW_EMULATE; then shadow_written(). Results of
 * mm_fault(); KAGE_RETRY: a broadcast came between, ask shadow_fault() again. */
int shadow_store(struct shadow_cpu *cpu, gpa_t gpa, const void *buf, size_t len);
/* Around a write and its shadow_written(): between the two a table is not what was made from it, and an audit lets that be. */
void shadow_write_begin(struct shadow *s);
void shadow_write_end(struct shadow *s);
/* Bytes of guest memory were written other than by a TLB hit: tables and code follow. */
void shadow_written(struct shadow *s, gpa_t gpa, uint64_t len);
/* INVLPG on this vCPU. */
int shadow_sync_page(struct shadow_cpu *cpu, uint64_t gva);
/* Any flush of more than a page. */
int shadow_sync_all(struct shadow *s);
/* After a flush that is for all vCPUs: none uses what it dropped once this returns. 0, -ETIMEDOUT, -EDEADLK. */
int shadow_broadcast(struct shadow *s);

/* -- audit and dump (audit.c, dump.c) ------------------------------------- */

/* Faults and changes are stopped by the caller; vCPUs may go on using their TLBs. */
void shadow_audit(struct shadow *s, struct audit *a);
/* One TLB entry of the vCPU for translations made in `mode`. Under the shadow lock. */
void shadow_audit_tlb(struct shadow_cpu *cpu, const struct pt_guest *mode, const struct shadow_fill *f,
		      struct audit *a);
int shadow_dump(struct shadow *s, bool json, int (*put)(void *arg, const char *text, size_t len), void *arg);
/* The guest's own tables, by the registers of its first vCPU. -ENOENT: it has none. Paging off: nothing is
 * put. */
int shadow_dump_guest(struct shadow *s, bool json, int (*put)(void *arg, const char *text, size_t len),
		      void *arg);

#endif
