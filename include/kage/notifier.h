/* SPDX-License-Identifier: MIT */
/**
 * @file
 * The notifier contract: how a guest's primary table tells everything that
 * caches it (shadow tables, KVM, a device) that a range is about to change.
 *
 * After `invalidate_range_start` returned, the listener writes through no
 * translation of the range, and makes none that it would not make after
 * `invalidate_range_end`; it has flushed what caches them. Reads may go on from
 * the old frames until the end callback. Every start that returned 0 gets its
 * end. Model: Linux, Documentation/mm/mmu_notifier.rst and mm/mmu_notifier.c,
 * but exact by range (see engine/notify).
 */
#ifndef KAGE_NOTIFIER_H
#define KAGE_NOTIFIER_H

#include <kage/types.h>

KAGE_BEGIN

enum kage_reason {
	KAGE_REASON_UNMAP = 0,      /**< the memory goes away */
	KAGE_REASON_CLEAR = 1,      /**< other frames come: COW break, merge, migration, discard */
	KAGE_REASON_PROTECT = 2,    /**< same frames, fewer permissions (see `lost`) */
	KAGE_REASON_SOFT_DIRTY = 3, /**< same frames; write tracking starts anew */
	KAGE_REASON_EXCLUSIVE = 4,  /**< one party asks for exclusive use */
	KAGE_REASON_RELEASE = 5,    /**< the guest is being destroyed */
};

enum kage_range_flags {
	/** The callback may sleep. If not set and it would have to, start returns -EAGAIN. */
	KAGE_RANGE_BLOCKABLE = 1u << 0,
	/** The change may be abandoned: start may return -ENOMEM or -ETIMEDOUT. Otherwise only -EAGAIN, -ETIMEDOUT. */
	KAGE_RANGE_OPTIONAL = 1u << 1,
	/** Contents of the new frames equal those of the old: entries may be redirected in place. */
	KAGE_RANGE_SAME_CONTENT = 1u << 2,
};

struct kage_range {
	uint64_t start, end; /**< guest physical, page aligned, end exclusive */
	uint32_t reason;     /**< enum kage_reason */
	uint32_t flags;      /**< enum kage_range_flags */
	uint32_t lost;       /**< PROTECT: the permissions that go (KAGE_WRITE …); else KAGE_RWX; SOFT_DIRTY: KAGE_WRITE */
	uint32_t reserved;
	const void *owner;   /**< who asked for the change; NULL: the engine */
	uint64_t id;         /**< same in start and end, unique in the guest among changes in flight */
};

struct kage_notifier;

struct kage_notifier_ops {
	/** 0, or an error that the range's flags allow. May be NULL. Must not call the engine. */
	int (*invalidate_range_start)(struct kage_notifier *n, const struct kage_range *range);
	/** May be NULL. Must not call the engine. */
	void (*invalidate_range_end)(struct kage_notifier *n, const struct kage_range *range);
	/** Were pages of the range accessed since the last `age`? Clears the knowledge. May be NULL. Asked by reclaim, of a later version. */
	bool (*age)(struct kage_notifier *n, uint64_t start, uint64_t end);
	/** The same without clearing. May be NULL. */
	bool (*test_young)(struct kage_notifier *n, uint64_t start, uint64_t end);
	/** The guest goes away: drop everything; no callback comes after it. May be NULL. */
	void (*release)(struct kage_notifier *n);
};

/** Embedded in the listener's own struct, zeroed before it is registered; fields belong to the engine. */
struct kage_notifier {
	const struct kage_notifier_ops *ops;
	void *priv[6];
};

/**
 * Registers a listener. A change that is in flight at that moment is not seen
 * by the listener, neither its start nor its end, and the call returns only
 * when no change that the listener missed can still be in flight.
 * Returns KAGE_OK, -EINVAL, -EBUSY (it is registered), -ENOMEM. Not from a callback.
 */
KAGE_API int kage_notifier_register(struct kage_vm *vm, struct kage_notifier *n,
				    const struct kage_notifier_ops *ops);

/**
 * Unregisters a listener; returns after its last callback. A change in flight
 * whose start the listener saw still delivers its end first. Returns KAGE_OK,
 * -EINVAL (NULL), -ENOENT (not registered, or released). Not from a callback.
 */
KAGE_API int kage_notifier_unregister(struct kage_notifier *n);

/**
 * A device that mirrors part of a guest: instead of blocking a change it reads
 * with begin and retry, as Linux's mmu_interval_notifier.
 *
 *     again: seq = kage_interval_read_begin(&i);
 *            look up, prepare the device's entries;
 *            take the device's lock;
 *            if (kage_interval_read_retry(&i, seq)) { unlock; goto again; }
 *            install; unlock;
 */
struct kage_interval {
	/**
	 * The range is about to change: under the device's lock, drop entries
	 * of the range. Called between start and the change. Returns 0, or
	 * -EAGAIN if the range is not blockable.
	 */
	int (*invalidate)(struct kage_interval *i, const struct kage_range *range);
	uint64_t start, end; /**< guest physical, page aligned; fixed while inserted */
	void *priv[8];       /**< the engine's */
};

/** Inserts. Returns KAGE_OK, -EINVAL (range, NULL), -EBUSY (inserted already), -ENOMEM. Not from a callback. */
KAGE_API int kage_interval_insert(struct kage_vm *vm, struct kage_interval *i);
/** Removes; returns after the last callback. Returns KAGE_OK, -EINVAL, -ENOENT. Not from a callback. */
KAGE_API int kage_interval_remove(struct kage_interval *i);
/** Waits until no overlapping change is in flight; the value goes to read_retry. */
KAGE_API uint64_t kage_interval_read_begin(struct kage_interval *i);
/** True if an overlapping change began since. Call it under the lock that `invalidate` takes. */
KAGE_API bool kage_interval_read_retry(struct kage_interval *i, uint64_t seq);

KAGE_END
#endif
