/* SPDX-License-Identifier: MIT */
/**
 * @file
 * A guest: its regions of memory, its clones, and access from the VMM's side.
 */
#ifndef KAGE_VM_H
#define KAGE_VM_H

#include <kage/types.h>

KAGE_BEGIN

/** Guest physical addresses are below this. */
#define KAGE_GPA_BITS 52

struct kage_vm_config {
	uint32_t size;
	/**
	 * Frames are only ever shared between guests of one merge domain (kage_domain_configure()). A
	 * clone is always in its parent's domain (its config says 0 or the
	 * same number, else -EINVAL). At most 65535.
	 */
	uint32_t merge_domain;
	/** Levels of the primary table at the start, 2 to 5; it grows when a region needs more. 0: 2. */
	uint32_t levels;
	uint32_t flags; /**< must be 0 */
};

/**
 * Creates an empty guest. Returns KAGE_OK, -EINVAL, -E2BIG, -ENOMEM.
 * `config` may be NULL. Any thread.
 */
KAGE_API int kage_vm_create(struct kage_engine *engine, const struct kage_vm_config *config,
			    struct kage_vm **out);

/**
 * Destroys a guest; NULL is fine. A parent may go before its clones. Listeners
 * get `release`. Returns KAGE_OK, or -EBUSY while vCPUs, dirty logs, interval
 * notifiers, pins or a KVM attachment exist (nothing is changed then).
 */
KAGE_API int kage_vm_destroy(struct kage_vm *vm);

enum kage_region_kind {
	/** Memory of the pool, zero at first. */
	KAGE_REGION_ANON = 0,
	/** A private view of a file: reads come from the file, the first write copies the page. */
	KAGE_REGION_FILE = 1,
	/** Memory that somebody else owns (another process's guest RAM): mapped shared, never moved or merged. */
	KAGE_REGION_FOREIGN = 2,
};

enum kage_region_flags {
	/**
	 * The region may be merged. New memory goes before all else: what has been written to it by the first step after
	 * the call, and has been quiet from then to a later one, is looked at there.
	 */
	KAGE_REGION_MERGEABLE = 1u << 0,
	/** Every first touch of a page goes through `touch` (see below). ANON only. */
	KAGE_REGION_TRAP = 1u << 1,
	/**
	 * Another party uses this memory by its address (vhost-user, DMA):
	 * never moved or merged, and a clone copies it. ANON only, not with MERGEABLE.
	 */
	KAGE_REGION_EXTERNAL = 1u << 2,
	/** `fd` is set. Needed for FILE and FOREIGN. */
	KAGE_REGION_FD = 1u << 3,
	/** Map with 4 KiB entries only. */
	KAGE_REGION_NOHUGE = 1u << 4,
};

struct kage_region {
	uint32_t size;
	uint32_t kind;  /**< enum kage_region_kind */
	uint32_t flags; /**< enum kage_region_flags */
	uint32_t prot;  /**< KAGE_READ | KAGE_WRITE | KAGE_EXEC; 0: all three */
	uint64_t gpa;   /**< page aligned */
	uint64_t len;   /**< bytes, page aligned, not 0; gpa + len <= 2^KAGE_GPA_BITS */
	int fd;
	int reserved;
	uint64_t offset; /**< in fd, page aligned */
	/**
	 * TRAP: fills `page` (KAGE_PAGE_SIZE bytes of zeroes, not yet visible
	 * to the guest) for the page at `gpa`. Returns 0, or KAGE_WAIT (the
	 * access returns KAGE_WAIT and nothing is installed), or -errno (the
	 * access returns it; KAGE_WAIT for -EAGAIN). NULL: pages stay zero. May run on several
	 * threads at once, for one page too: one of them wins.
	 * Must not call the engine.
	 */
	int (*touch)(void *opaque, uint64_t gpa, void *page);
	void *opaque;
};

/**
 * Maps a region into a guest.
 *
 * Returns KAGE_OK, -EINVAL (bad range, kind, flags or prot), -EEXIST (overlaps
 * a region), -EBADF or -EACCES or -ENODEV (the descriptor cannot be mapped as
 * asked), -EOVERFLOW (a FILE or FOREIGN region beyond the end of its file),
 * -ENOMEM, -E2BIG. Any thread; faults of other threads wait, misses of pages that are present do not.
 */
KAGE_API int kage_vm_map(struct kage_vm *vm, const struct kage_region *region);

/**
 * Removes all regions, or parts of them, in a range. Holes are fine. When it
 * returns, no vCPU, listener or pointer from a window of use reaches the
 * memory any more. Returns KAGE_OK, -EINVAL, -EBUSY (a page is pinned; nothing
 * is unmapped), -ENOMEM, or what a listener's start returned, -ETIMEDOUT (a
 * vCPU did not leave its window of use), -EDEADLK (the caller itself is inside
 * a window of use).
 */
KAGE_API int kage_vm_unmap(struct kage_vm *vm, uint64_t gpa, uint64_t len);

/**
 * Sets what accesses a range answers. An access that is not allowed returns
 * KAGE_MMIO, as a KVM read-only slot exits. The range must be covered by
 * regions without a hole, else -ENOENT. -EACCES: KAGE_WRITE on FOREIGN memory
 * that was mapped without it. Pinned pages may be protected. Other errors as
 * kage_vm_unmap().
 */
KAGE_API int kage_vm_protect(struct kage_vm *vm, uint64_t gpa, uint64_t len, uint32_t prot);

enum kage_advice {
	KAGE_ADVICE_MERGEABLE = 1,   /**< may be merged from now on */
	KAGE_ADVICE_UNMERGEABLE = 2, /**< break all sharing by merging, and merge no more */
	KAGE_ADVICE_DISCARD = 3,     /**< contents become zero (or the file's again); memory is given back */
	KAGE_ADVICE_WILLNEED = 4,    /**< make present and exclusive now */
	/**
	 * The contents will last (restored, loaded, given back by the guest): merging looks at all that was written in
	 * the range in the next step, before everything else, without waiting for a pass in which nobody writes.
	 * A page that is written all the same has cost a merge and a COW break. No effect while merging is off. At most
	 * 1,024 hints are kept until steps come to them (ranges that join count as one): further ones return -ENOMEM.
	 */
	KAGE_ADVICE_MERGE_FIRST = 5,
};

/**
 * Advises the engine about a range that regions cover without a hole.
 *
 * Returns KAGE_OK, -EINVAL, -ENOENT (a hole), -EOPNOTSUPP (the regions'
 * kind cannot do it: MERGEABLE on FOREIGN or EXTERNAL, DISCARD on EXTERNAL; MERGE_FIRST where it is not MERGEABLE), -EBUSY (DISCARD of a
 * pinned page), -ENOMEM (UNMERGEABLE and WILLNEED: what was done stays done, the other pages keep the frames that they share, none is lost
 * and none is merged anew, and the same call again goes on with what is left; MERGE_FIRST: it is looked at with all else),
 * -ETIMEDOUT, -EDEADLK as kage_vm_unmap().
 */
KAGE_API int kage_vm_advise(struct kage_vm *vm, uint64_t gpa, uint64_t len, enum kage_advice advice);

/**
 * Clones a guest: the new guest has the same regions and contents, and every
 * page is shared until one side writes. The parent's vCPUs may be running; the
 * clone is a snapshot at one instant between call and return. Not so of a guest that is attached to KVM
 * (kvm.h): its vCPUs are parked meanwhile; what a thread writes through a window during the call is in the clone or not,
 * page by page, and never lost. Pinned pages and
 * EXTERNAL regions are copied. Time does not depend on the size of the guest
 * apart from those. vCPUs, listeners and dirty logs are not cloned.
 *
 * Returns KAGE_OK, -EINVAL, -E2BIG, -ENOMEM, -ETIMEDOUT, -EDEADLK, -EAGAIN (as kage_kvm_detach()).
 */
KAGE_API int kage_vm_clone(struct kage_vm *vm, const struct kage_vm_config *config,
			   struct kage_vm **out);

/**
 * Reads guest memory by guest physical address; any alignment and length.
 * Untouched memory reads as zero and stays untouched. In a hardened merge domain it is an access as a guest's: it may
 * need a frame. Returns KAGE_OK,
 * KAGE_MMIO (part of the range is no readable memory; nothing is promised
 * about the buffer), KAGE_WAIT, -EINVAL, -ENOMEM. Any thread. Not atomic
 * against writers.
 */
KAGE_API int kage_vm_read(struct kage_vm *vm, uint64_t gpa, void *buf, size_t len);

/**
 * Writes guest memory as a device would: breaks sharing, marks pages dirty,
 * tells shadow tables when a guest page table changed. Fails before the first
 * byte if some of the range is no writable memory (KAGE_MMIO). Other results:
 * as kage_vm_read(), and -ENOMEM, -ETIMEDOUT, KAGE_WAIT after which a part may
 * be written; -EDEADLK (the calling thread is inside a window of use, of whichever guest of the engine; nothing is
 * written). Any thread.
 */
KAGE_API int kage_vm_write(struct kage_vm *vm, uint64_t gpa, const void *buf, size_t len);

/**
 * Pins a range: every page is made present and exclusive to this guest, and is
 * not moved, merged or discarded until kage_vm_unpin(). A clone copies pinned
 * pages. Fills `iov` with at most `*n` entries (neighbours are joined) and
 * sets `*n` to their number. Pins nest, at most 1023 on a page.
 *
 * flags must be 0. Returns KAGE_OK, KAGE_MMIO (some of the range is no
 * writable memory), KAGE_WAIT, -EINVAL, -ENOSPC (`*n` too small), -EOVERFLOW,
 * -ENOMEM, -ETIMEDOUT, -EDEADLK (the calling thread is inside a window of use, of whichever guest of the engine).
 * On any of these nothing is pinned. Any thread; waits for changes of these pages that are in flight. A VMM that
 * writes through the pointers says so with kage_vm_mark_dirty().
 */
KAGE_API int kage_vm_pin(struct kage_vm *vm, uint64_t gpa, uint64_t len, uint32_t flags,
			 struct iovec *iov, unsigned *n);

/** Undoes one kage_vm_pin() of exactly this range. Returns KAGE_OK, -EINVAL, -ENOENT (it is not pinned). */
KAGE_API int kage_vm_unpin(struct kage_vm *vm, uint64_t gpa, uint64_t len);

/**
 * Says that the VMM wrote to a range through pointers of its own. Any
 * alignment; parts without memory are ignored. Returns KAGE_OK, -EINVAL.
 */
KAGE_API int kage_vm_mark_dirty(struct kage_vm *vm, uint64_t gpa, uint64_t len);

KAGE_END
#endif
