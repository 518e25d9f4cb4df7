/* SPDX-License-Identifier: MIT */
/**
 * @file
 * For whoever writes a backend: something that translates guest accesses by
 * itself and caches what the primary table says. Unstable until 1.0.
 *
 * A backend registers a notifier (kage/notifier.h) and fills its own tables so:
 *
 *     again: kage_reader_begin(&r, gpa, len);          publishes the range; waits for changes in it
 *            kage_backend_fault(vm, &r, gpa, access, &p);   faults the page in
 *            take the lock that invalidate_range_start takes;
 *            if (!kage_reader_valid(&r)) { unlock; kage_reader_end(&r); goto again; }
 *            install p.hva for the page with p.prot; unlock;
 *            kage_reader_end(&r);
 *
 * Only changes that overlap the range make it invalid. Who wants to install a
 * larger piece begins with a larger range, and installs no more of the run
 * [p.gpa, p.gpa + p.len) than that range covers.
 */
#ifndef KAGE_BACKEND_H
#define KAGE_BACKEND_H

#include <kage/types.h>
#include <kage/notifier.h>

KAGE_BEGIN

/** One reader; a thread uses one at a time. Fields belong to the engine. */
struct kage_reader {
	void *priv[8];
};

/** What a fault found. */
struct kage_page {
	void *hva;     /**< of the page that was asked for */
	uint64_t gpa;  /**< start of the run around that page that is contiguous in host memory */
	uint64_t len;  /**< its length: KAGE_PAGE_SIZE, or of a block entry */
	uint32_t prot; /**< what may be installed: KAGE_WRITE only if writing needs no further fault */
	uint32_t reserved;
};

/** Attaches a reader to a guest. Returns KAGE_OK, -EINVAL, -ENOMEM. */
KAGE_API int kage_reader_init(struct kage_vm *vm, struct kage_reader *r);
/** Detaches it. */
KAGE_API void kage_reader_finish(struct kage_reader *r);
/** Publishes a page-aligned range and waits until no change overlaps it. Not within a lock that a listener takes. */
KAGE_API void kage_reader_begin(struct kage_reader *r, uint64_t gpa, uint64_t len);
/** True if no overlapping change began since begin. Call it under the lock that the backend's start callback takes. */
KAGE_API bool kage_reader_valid(struct kage_reader *r);
/** Ends the section that begin opened. */
KAGE_API void kage_reader_end(struct kage_reader *r);

/**
 * Faults in the page at `gpa` for `access` between begin and end of a reader
 * whose range covers it. With KAGE_WRITE the page becomes exclusive and is
 * marked dirty. Returns KAGE_OK, KAGE_RETRY (end, then begin again), KAGE_MMIO,
 * KAGE_WAIT, -EFAULT (poisoned), -EINVAL, -ENOMEM.
 */
KAGE_API int kage_backend_fault(struct kage_vm *vm, struct kage_reader *r, uint64_t gpa, uint32_t access,
				struct kage_page *page);

/**
 * Turns the section of a reader into a hold: until kage_reader_end(), a change
 * of the range waits in its start, so that the caller may write through the
 * pointer it has. Returns true, or false if a change came first (end, then
 * begin again). While it holds, the thread takes no lock and does not block.
 */
KAGE_API bool kage_reader_hold(struct kage_reader *r);

KAGE_END
#endif
