/* SPDX-License-Identifier: MIT */
/**
 * @file
 * Counters, and dumps of the tables of a guest.
 */
#ifndef KAGE_STATS_H
#define KAGE_STATS_H

#include <kage/types.h>

KAGE_BEGIN

/**
 * Counters of an engine or of one guest; a field that makes no sense for a
 * guest is 0 there. Pages are 4 KiB. Names follow KSM's sysfs files where it has one
 * (Documentation/admin-guide/mm/ksm.rst).
 */
struct kage_stats {
	uint32_t size;
	uint32_t guests;

	/* memory; "nominal" is what the guests believe they have */
	uint64_t pages_nominal;  /**< length of all regions */
	uint64_t pages_mapped;   /**< pages that hold memory; one that guests share counts for each of them */
	uint64_t frames_used;    /**< frames that hold guest memory, each once; the zero frame is not counted */
	uint64_t frames_table;   /**< frames that hold primary tables */
	uint64_t frames_free;    /**< populated frames in the arena's free lists and caches */
	uint64_t frames_pending; /**< waiting for their grace period */
	uint64_t bytes_metadata; /**< populated bytes of the frame array, and section descriptors; of sections in use */
	uint64_t pages_private;  /**< guest: pages whose frame no other entry maps */
	uint64_t pages_shared_clone; /**< guest: pages shared with clones only */
	uint64_t pages_shared_merge; /**< guest: pages on a stable frame */
	uint64_t pages_zero;     /**< guest: pages on the zero frame */
	uint64_t pages_untouched;/**< pages that hold none: without an entry, or mapped and never written */

	/* faults and changes */
	uint64_t faults;         /**< primary faults taken; a TLB miss of a page that is present is none, only one of tlb_misses */
	uint64_t faults_spurious; /**< of these, those that found the page as they needed it */
	uint64_t faults_retried; /**< because an overlapping change was in flight */
	uint64_t retries_spurious; /**< retries for a change that did not overlap: stays 0 */
	uint64_t cow_breaks;
	uint64_t cow_reused;     /**< write to a shared entry whose other users had gone */
	uint64_t tables_unshared;
	uint64_t blocks_split;
	uint64_t changes;        /**< runs of the change funnel */
	uint64_t changes_raced;  /**< that ended with -EAGAIN */
	uint64_t clones;
	uint64_t pages_discarded;

	/* merging: KSM's names. For a guest: sharing and zero are its pages on shared frames, shared is 0 */
	uint64_t ksm_pages_shared;   /**< stable frames in use */
	uint64_t ksm_pages_sharing;  /**< further entries that map them: the frames saved */
	uint64_t ksm_pages_unshared; /**< unique at the last pass */
	uint64_t ksm_pages_volatile; /**< that the last pass found written again: while they waited to be quiet, or just after they were looked at */
	uint64_t ksm_pages_skipped;  /**< pinned or otherwise not eligible at the last pass */
	uint64_t ksm_zero_pages;     /**< entries that merging put on the zero frame */
	uint64_t ksm_full_scans;
	uint64_t ksm_pages_scanned;  /**< pages whose contents were read */
	uint64_t ksm_merges;         /**< merges done, ever */
	uint64_t ksm_unmerges;       /**< merged pages that UNMERGEABLE gave a frame of their own, ever; of ksm_cow_breaks */
	/** Bytes: saved (sharing and zero pages) minus ksm_bytes. A guest: as if others had the shared frames (ksm_process_profit) */
	int64_t ksm_general_profit;

	/* shadow tables */
	uint64_t shadow_pages;
	uint64_t shadow_bytes;
	uint64_t shadow_faults;  /**< entries installed */
	uint64_t shadow_dropped; /**< entries dropped by invalidation */
	uint64_t shadow_unsync;  /**< pages out of sync now */
	uint64_t table_writes;   /**< writes caught on tracked guest tables */
	uint64_t tlb_misses;     /**< out-of-line translations */
	uint64_t tlb_flushes;    /**< whole-context flushes */
	uint64_t shootdowns;     /**< membarrier rounds */
	uint64_t window_waits;   /**< windows waited for */

	/* KVM: of the pages above, those in memory of the host kernel's, outside of the pool (kvm.h) */
	uint64_t pages_host_private;

	/* hardened domains (enum kage_domain_flags) */
	uint64_t frames_reserve; /**< frames kept for draws; not among frames_used */
	uint64_t references_noted; /**< that broken pages had, and the next step lets go of */

	/* merging, continued */
	uint64_t ksm_pages_backed_off;  /**< left alone by the last pass: they keep changing, or a clone does not let them merge (KSM's smart scan: skipped) */
	uint64_t ksm_chunk_visits;      /**< times that the state of 128 MiB was gone through, ever: none where nothing was written */
	uint64_t ksm_cow_breaks;        /**< merged pages that got a frame of their own again, whatever for (vmstat: cow_ksm), ever */
	uint64_t ksm_stable_chains;     /**< contents on more than one stable frame: max_sharing pages and more have them */
	uint64_t ksm_stable_dups;       /**< stable frames of such contents */
	uint64_t ksm_bytes;             /**< what merging remembers: records of frames, candidates, state of guests' pages, their logs, lists of hardened domains */
};

/**
 * Reads the counters of an engine (`vm` NULL) or a guest. The memory fields
 * are counted by walking the tables: time follows their size.
 * Returns KAGE_OK, -EINVAL, -E2BIG, -ENOMEM. Any thread.
 */
KAGE_API int kage_stats_get(struct kage_engine *engine, struct kage_vm *vm, struct kage_stats *stats);

/**
 * The same without that walk: time follows the number of guests and of stable frames, not the guests' size. What is counted
 * by walking is 0: pages_mapped, pages_private, pages_shared_clone, pages_shared_merge, pages_zero, pages_untouched,
 * pages_host_private, ksm_zero_pages and ksm_general_profit; of a guest also ksm_pages_sharing and ksm_pages_unshared. Nor does it
 * look for what the host kernel has broken of a KVM guest's pages.
 * Returns KAGE_OK, -EINVAL, -E2BIG. Any thread.
 */
KAGE_API int kage_counters_get(struct kage_engine *engine, struct kage_vm *vm, struct kage_stats *stats);

enum kage_dump_what {
	KAGE_DUMP_PRIMARY = 0, /**< the guest's primary table, runs of like entries joined */
	KAGE_DUMP_SHADOW = 1,  /**< its shadow tables */
	KAGE_DUMP_GUEST = 2,   /**< the guest's own tables, from the registers of its first vCPU */
	KAGE_DUMP_REGIONS = 3,
	KAGE_DUMP_MIRROR = 4,  /**< what a KVM guest's windows map, run by run (kvm.h) */
};

enum kage_dump_format { KAGE_DUMP_TEXT = 0, KAGE_DUMP_JSON = 1 };

/**
 * Writes a dump to a descriptor. Returns KAGE_OK, -EINVAL, -ENOENT (GUEST or
 * SHADOW of a guest that never had a vCPU, MIRROR of one that is not attached), -ENOMEM, or the errno of write(2).
 */
KAGE_API int kage_dump(struct kage_vm *vm, enum kage_dump_what what, enum kage_dump_format format, int fd);

/** How a guest page is held; one byte for each page of a map. */
enum kage_page_class {
	KAGE_PAGE_NONE = 0,      /**< no region */
	KAGE_PAGE_UNTOUCHED = 1, /**< no entry, or memory that was never touched */
	KAGE_PAGE_HOME = 2,      /**< private, in its home extent */
	KAGE_PAGE_PRIVATE = 3,   /**< private, a copy in the common arena */
	KAGE_PAGE_CLONE = 4,     /**< shared with clones */
	KAGE_PAGE_MERGED = 5,    /**< shared by merging */
	KAGE_PAGE_ZERO = 6,      /**< the zero frame */
	KAGE_PAGE_DEVICE = 7,    /**< FILE or FOREIGN memory */
	KAGE_PAGE_POISON = 8,
	KAGE_PAGE_HOST_PRIVATE = 9, /**< private, in a page of the host kernel's that is not adopted yet (kvm.h) */
};

/**
 * Classifies the pages of a range into `map`, one byte (enum kage_page_class)
 * a page. Returns KAGE_OK, -EINVAL. Any thread.
 */
KAGE_API int kage_page_map(struct kage_vm *vm, uint64_t gpa, uint64_t len, uint8_t *map);

/** What a page holds, in 128 bits. Salted: only digests of one engine compare. */
struct kage_digest {
	uint64_t word[2];
};

/**
 * Digests of the contents of a range, one a page, as kage_vm_read() reads them; of files, and of memory that somebody
 * else owns, without giving memory to their holes. Equal contents have equal digests; different ones differ, but
 * for one pair in 2^128. So it says which pages of FOREIGN memory its owner changed: those whose digests are not
 * what they were, where a dirty log knows only writes that go through the engine. Guests
 * may run: a page that is written meanwhile gets a digest of neither state, unlike both.
 *
 * Returns KAGE_OK, -EINVAL (range not aligned or empty), or what kage_vm_read() returns. Any thread.
 */
KAGE_API int kage_page_digest(struct kage_vm *vm, uint64_t gpa, uint64_t len, struct kage_digest *digest);

/** How much of some guests is the same. */
struct kage_census {
	uint32_t size;
	uint32_t reserved;
	uint64_t pages;    /**< pages of all regions that were read */
	uint64_t skipped;  /**< pages that cannot be read, or not yet (KAGE_WAIT) */
	uint64_t distinct; /**< different contents among them: pages - distinct is what sharing everything would save */
	uint64_t zero;     /**< pages that are all zeroes */
	uint64_t common;   /**< pages whose contents another one of the guests has too */
};

/**
 * Compares the contents of every page of `count` guests of one engine, of whatever regions: FOREIGN memory and
 * guests of several merge domains too, so it tells what merging cannot do as well. Exact for what does not change
 * meanwhile. Time follows the regions' length, memory the number of distinct contents, 64 to 128 bytes each.
 *
 * Returns KAGE_OK, -EINVAL (no guests, of several engines, or one of them twice), -E2BIG, -ENOMEM, or what a region's
 * touch returned. Any thread; no guest may be destroyed meanwhile.
 */
KAGE_API int kage_census_take(struct kage_vm *const *vms, unsigned count, struct kage_census *census);

/**
 * What a guest holds of the memory in use. A frame that several guest pages are, of one guest or of several, by
 * cloning or by merging, counts for each of them with its part: 4096 / their number (what smaps calls Pss). Over all
 * guests of an engine `bytes` add up to 4096 * (kage_stats.frames_used + pages_host_private), but for half a byte a guest. Neither
 * the zero frame counts nor files' pages, which are the host's page cache.
 */
struct kage_share {
	uint64_t bytes;         /**< 4096 * pages_private, and the parts of all shared pages; rounded to the nearest byte */
	uint64_t bytes_clone;   /**< of these, on frames shared with clones only, rounded down */
	uint64_t bytes_merge;   /**< on stable frames, rounded down; all of it if the guest is the last on a frame */
	uint64_t pages_private; /**< pages whose memory no other page is: what ending the guest would free for sure */
	uint64_t pages_shared;  /**< pages on frames of the other two kinds */
	uint64_t reserved[3];   /**< 0 */
};

/**
 * Fills in one struct for each of `count` guests of one engine. Time follows the length of the regions of all guests in
 * their merge domains, memory the number of shared frames, 16 to 32 bytes each. Exact for what does not change
 * meanwhile; a page that is written or merged during the call counts as it was or as it is.
 *
 * Returns KAGE_OK, -EINVAL (no guests, of several engines, or one of them twice), -ENOMEM. Any thread; none of the guests may
 * be destroyed meanwhile. Clones, and guests that come and go, wait for it.
 */
KAGE_API int kage_share_take(struct kage_vm *const *vms, unsigned count, struct kage_share *shares);

KAGE_END
#endif
