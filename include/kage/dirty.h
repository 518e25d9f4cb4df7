/* SPDX-License-Identifier: MIT */
/**
 * @file
 * Which pages were written, or used, since each consumer last asked.
 */
#ifndef KAGE_DIRTY_H
#define KAGE_DIRTY_H

#include <kage/types.h>

KAGE_BEGIN

enum kage_dirty_kind {
	KAGE_DIRTY_WRITTEN = 0,  /**< pages written */
	KAGE_DIRTY_ACCESSED = 1, /**< pages read, written or executed */
};

enum kage_dirty_format {
	/** Bit i of a little-endian bitmap is page (gpa >> 12) + i. */
	KAGE_DIRTY_BITMAP = 0,
	/** An array of struct kage_dirty_run. */
	KAGE_DIRTY_RING = 1,
};

enum kage_dirty_flags {
	/**
	 * Report single pages even where a guest maps large pages. Without it a
	 * write through a large mapping reports all of its 512 pages, and
	 * tracking does not shatter large mappings.
	 */
	KAGE_DIRTY_FINE = 1u << 0,
	/** Start with every page of every region dirty. */
	KAGE_DIRTY_INITIALLY_SET = 1u << 1,
};

struct kage_dirty_config {
	uint32_t size;
	uint32_t kind;   /**< enum kage_dirty_kind */
	uint32_t format; /**< enum kage_dirty_format */
	uint32_t flags;  /**< enum kage_dirty_flags */
};

struct kage_dirty_run {
	uint64_t gpa;
	uint64_t pages;
};

/**
 * Opens a log; several may be open, each with its own epoch. What is written
 * after the call returned is reported. Returns KAGE_OK, -EINVAL, -E2BIG,
 * -ENOMEM, -ETIMEDOUT, -EDEADLK.
 */
KAGE_API int kage_dirty_open(struct kage_vm *vm, const struct kage_dirty_config *config,
			     struct kage_dirty **out);

/**
 * Takes what was dirtied in a range since this log's last collection of it,
 * and starts a new epoch. A write that races is in this harvest or the next,
 * and its bytes are visible to whoever reads after the harvest that names it.
 *
 * BITMAP: `buf` holds at least one bit a page, rounded up to 8 bytes, and is
 * overwritten. RING: `buf` is an array of `bytes / sizeof(struct
 * kage_dirty_run)` runs; pages that did not fit stay for the next call.
 * Returns the number of bits set or of runs written, at most INT_MAX; -EINVAL
 * (range not aligned, buffer too small), -ETIMEDOUT, -EDEADLK. One thread at a time for a log.
 */
KAGE_API int kage_dirty_collect(struct kage_dirty *log, uint64_t gpa, uint64_t len, void *buf,
				size_t bytes);

/** Closes a log; NULL is fine. */
KAGE_API void kage_dirty_close(struct kage_dirty *log);

KAGE_END
#endif
