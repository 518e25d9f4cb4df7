/* SPDX-License-Identifier: MIT */
/**
 * @file
 * The KVM backend: guest memory of a KVM virtual machine, kept by the engine.
 *
 * The VMM owns the VM descriptor and its vCPUs. Kage owns the memory slots of
 * the guest's regions: behind each lies a window, a run of this process's
 * address space that shows what the guest's primary table says (the mirror). The
 * kernel's own MMU notifier keeps KVM's tables in step with the window.
 *
 * The engine must be created with KAGE_BACKING_MEMFD. A page that the guest
 * shares with another one is never mapped MAP_SHARED, so the kernel's own
 * copy-on-write stands behind everything: a lost handler or an old kernel costs
 * memory, never another guest's bytes. Two policies:
 *
 *  - native: the kernel breaks COW by itself, at its own speed. The engine
 *    finds out later (kage_kvm_reconcile(), and in steps and statistics).
 *  - exact: writes to shared pages trap through userfaultfd(2); the engine
 *    breaks COW before they proceed, and every listener hears of it first.
 *
 * What the VMM must not do: change the mappings of a window (munmap, mprotect,
 * mremap, madvise; see kage_kvm_helper_start()), fork without exec, or let the
 * kernel do asynchronous I/O into guest memory that is not pinned.
 */
#ifndef KAGE_KVM_H
#define KAGE_KVM_H

#include <kage/types.h>

KAGE_BEGIN

struct kage_kvm;
struct kvm_run;

enum kage_kvm_policy {
	KAGE_KVM_AUTO = 0,   /**< exact while anything but KVM mirrors the guest and the kernel can, else native */
	KAGE_KVM_NATIVE = 1,
	KAGE_KVM_EXACT = 2,
};

/** What the backend uses if it is there. Bits of `feature_mask`, indexes of kage_kvm_info.feature. */
enum kage_kvm_feature {
	KAGE_KVM_USERFAULTFD = 0,   /**< a userfaultfd that may serve faults of the kernel: trapped regions, exact, merging while the guest runs */
	KAGE_KVM_UFFD_WP = 1,       /**< write protection of shmem through it (Linux 5.19) */
	KAGE_KVM_UFFD_MINOR = 2,    /**< minor faults of shmem (Linux 5.14): exact */
	KAGE_KVM_UFFD_CONTINUE_WP = 3, /**< UFFDIO_CONTINUE_MODE_WP (Linux 6.4): exact */
	KAGE_KVM_PAGEMAP_SCAN = 4,  /**< ioctl of /proc/self/pagemap (Linux 6.7); else it is read */
	KAGE_KVM_PAGEMAP = 5,       /**< /proc/self/pagemap; else contents are compared */
	/**
	 * KVM_GET_DIRTY_LOG. A VMM that enables KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (without KVM_DIRTY_LOG_INITIALLY_SET) makes merging
	 * cheaper for its guests: pages that they write all the time stay in the log, and do not fault in each pass.
	 */
	KAGE_KVM_DIRTY_LOG = 6,
	KAGE_KVM_DIRTY_RING = 7,    /**< KVM's dirty rings, if the VMM has enabled them (`dirty_ring_bytes`) */
	KAGE_KVM_READONLY_SLOT = 8, /**< KVM_MEM_READONLY: writes to protected memory exit as MMIO */
	KAGE_KVM_MEMORY_FAULT = 9,  /**< KVM_EXIT_MEMORY_FAULT (Linux 6.8) names the address of a failed access */
	KAGE_KVM_FEATURES = 10,
};

/** A memory slot, for `set_slot`. len 0: the slot goes. */
struct kage_kvm_slot {
	uint32_t slot;
	uint32_t flags; /**< KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES */
	uint64_t gpa, len, hva;
};

enum kage_kvm_flags {
	KAGE_KVM_PAGEMAP_FD = 1u << 0, /**< `pagemap_fd` is set: /proc/self/pagemap, opened by this process */
	KAGE_KVM_MAPS_FD = 1u << 1,    /**< `maps_fd` is set: /proc/self/maps */
	KAGE_KVM_UFFD_FD = 1u << 2,    /**< `uffd_fd` is set: /dev/userfaultfd; else userfaultfd(2) is tried, then that path */
	KAGE_KVM_NO_OPEN = 1u << 3,    /**< open no path: what was not handed in is missing */
};

struct kage_kvm_config {
	uint32_t size;
	uint32_t flags;        /**< enum kage_kvm_flags; descriptors are duplicated */
	uint32_t policy;       /**< enum kage_kvm_policy */
	/** Slot numbers that Kage may use: slot_first .. slot_first + slot_count - 1; slot_count 0: as many as KVM has. */
	uint32_t slot_first, slot_count;
	/** Bit n: do not use feature n (enum kage_kvm_feature). */
	uint32_t feature_mask;
	/** Mappings (VMAs) that all mirrors of the engine may have together; 0: 3/4 of vm.max_map_count. The first attach decides. */
	uint32_t map_budget;
	/**
	 * Size of the dirty ring of each vCPU, if the VMM enabled KVM_CAP_DIRTY_LOG_RING; else 0. See kage_kvm_add_vcpu().
	 * arm64: rings are not used, as what KVM writes by itself (interrupt tables) is in none. Where the VMM enabled them
	 * dirty logs report everything and the VMM resets them: leave them off, and KVM's log is used.
	 */
	uint32_t dirty_ring_bytes;
	int32_t pagemap_fd, maps_fd, uffd_fd;
	/**
	 * Bytes: memory is mapped, protected and copied in aligned pieces of at least this size; a power of two up to 64 KiB.
	 * 0, or less than the host's page: the host's page. Where it is more than 4 KiB regions must begin and end on such a
	 * piece (so must what is discarded), a write to a shared page gives the guest all of the piece, and single pages of
	 * the guest are not merged.
	 */
	uint32_t granule;
	/** Sets a slot in place of KVM_SET_USER_MEMORY_REGION on vmfd; returns 0 or -errno. May be NULL. Must not call the engine. */
	int (*set_slot)(void *opaque, const struct kage_kvm_slot *slot);
	/**
	 * Stops whatever writes to guest memory (vCPUs, device threads) and
	 * returns when it has; it must not wait for a thread that is inside a call of the engine. `resume` lets it go on. Needed to merge, adopt and clone
	 * where the kernel has no write protection by userfaultfd. Neither may call the engine. May be NULL.
	 */
	int (*pause)(void *opaque);
	void (*resume)(void *opaque);
	void *opaque;
};

/**
 * Attaches a guest to a KVM VM: windows and memory slots for its regions come
 * to be, also for those that are mapped later. One attachment a guest.
 *
 * `vmfd` is borrowed until detach. Attach before vCPUs run, or while they are
 * parked; the same goes for mapping, unmapping and protecting memory later, unless `pause` is given. Guests with regions that trap need KAGE_KVM_USERFAULTFD.
 * Returns KAGE_OK; -EINVAL (arguments, a descriptor that is no VM, an engine
 * without KAGE_BACKING_MEMFD); -E2BIG; -EBUSY (it is attached, or a log of accessed pages is open, or a page is pinned
 * whose `granule` is not in one piece: unpin it, attach, and pin it then); -EOPNOTSUPP (a
 * policy or a region that this kernel cannot do, a guest of a hardened merge domain, and the log says what is
 * missing; an engine with a memory limit, but for regions that trap; a confidential guest); -ENOSPC (no slot is left);
 * -EAGAIN (of a `granule` in a region that traps some pages have been fetched and others not: `touch` was called for
 * those, and said KAGE_WAIT. The guest is as it was; attach again when they can be had), or the errno that `touch`
 * returned; -ENOMEM; the errno of an ioctl.
 */
KAGE_API int kage_kvm_attach(struct kage_vm *vm, int vmfd, const struct kage_kvm_config *config,
			     struct kage_kvm **out);
/**
 * Detaches: pages that the kernel made private are adopted first, so that the
 * guest's contents stay in the engine; then slots and windows go. vCPUs must not
 * run. NULL is fine. Returns KAGE_OK, -EBUSY (the helper runs; stop it first),
 * -ENOMEM, -EAGAIN (a page of a `granule` cannot be had yet: its `touch` said KAGE_WAIT); nothing was detached then.
 */
KAGE_API int kage_kvm_detach(struct kage_kvm *kvm);

/**
 * The address at which this process sees [gpa, gpa + len), which lies in one
 * window; NULL if it does not. Stable until the region is unmapped or the guest
 * detached. Reads and writes through it need no other care than
 * kage_vm_mark_dirty() after a write; the kernel's asynchronous I/O needs kage_vm_pin().
 */
KAGE_API void *kage_kvm_window(struct kage_kvm *kvm, uint64_t gpa, uint64_t len);

/**
 * After KVM_RUN returned -1 with errno `err` on a vCPU of this guest. Returns
 * KAGE_RETRY (run again), or -err: the error is not Kage's. A window that
 * somebody else changed is put right as far as possible, with a line in the log.
 */
KAGE_API int kage_kvm_run_failed(struct kage_kvm *kvm, int vcpufd, const struct kvm_run *run, int err);

/**
 * Changes the policy; AUTO is decided anew, by who listens to the guest now. Have somebody serve traps before: a vCPU
 * that waits in a trap cannot be stopped on every KVM until it is served, or trapping abandoned. Pauses the
 * guest through `pause`; without one the vCPUs must not run. All that the kernel made private is adopted first.
 * Returns KAGE_OK, -EINVAL, -EAGAIN (somebody wrote meanwhile), -EOPNOTSUPP (as attach), -ENOMEM.
 */
KAGE_API int kage_kvm_set_policy(struct kage_kvm *kvm, uint32_t policy);

/**
 * Gives a vCPU of the soft backend (kage_vcpu_create() on the same guest) the registers of a
 * vCPU of KVM's: from then on kage_vcpu_translate() answers for that one. It was created for this machine's
 * architecture (kage_vcpu_config.arch). KVM answers when the vCPU is not
 * in KVM_RUN; on arm64 after KVM_EXIT_MMIO the access is completed by another KVM_RUN (with immediate_exit) first.
 * Returns as kage_vcpu_set_regs(), errno of an ioctl, -EOPNOTSUPP (arm64: the guest is in AArch32).
 */
KAGE_API int kage_kvm_load_regs(struct kage_vcpu *vcpu, int vcpufd);

/** Poll it for reading and call kage_kvm_trap_run(). -ENOENT: nothing of this guest traps. Borrowed. */
KAGE_API int kage_kvm_trap_fd(struct kage_kvm *kvm);
/**
 * Serves traps for at most `timeout_ms` (-1: until one was served; 0: those that wait). Several threads may.
 * Returns the number served, -ENOENT, -EINVAL, or the first error of a fault
 * (-ENOMEM; what `touch` of a region returned): the vCPU goes on waiting and traps again at the next call.
 */
KAGE_API int kage_kvm_trap_run(struct kage_kvm *kvm, int timeout_ms);
/**
 * Gives up trapping, for a watchdog whose handler died: waiting vCPUs wake, the
 * guest falls to native. Trapped regions answer with zeroes from then on, until detach, and `touch` is not called. Returns KAGE_OK, -ENOENT.
 */
KAGE_API int kage_kvm_trap_abandon(struct kage_kvm *kvm);

/**
 * Starts a thread that serves traps, and makes what the VMM does to a window
 * (madvise, munmap, mremap, fork) part of the notifier contract: listeners hear of it, windows are put right.
 * vCPUs do not run meanwhile. Returns
 * KAGE_OK, -EBUSY (it runs), -EOPNOTSUPP (no userfaultfd), -EAGAIN (no thread).
 */
KAGE_API int kage_kvm_helper_start(struct kage_kvm *kvm);
/** Stops it. Returns KAGE_OK, -ENOENT. */
KAGE_API int kage_kvm_helper_stop(struct kage_kvm *kvm);

/**
 * Makes a vCPU's dirty ring known (mapped from its descriptor, borrowed). From then on the VMM does not reset
 * rings itself: KVM_RESET_DIRTY_RINGS loses writes when a signal interrupts it, which Kage holds back. Returns KAGE_OK,
 * -EINVAL, -ENOENT (no rings), -ENOMEM, errno of mmap.
 */
KAGE_API int kage_kvm_add_vcpu(struct kage_kvm *kvm, int vcpufd);
/** Takes what KVM logged into the open dirty logs; after KVM_EXIT_DIRTY_RING_FULL. Returns KAGE_OK or -errno. */
KAGE_API int kage_kvm_sync_dirty(struct kage_kvm *kvm);

enum kage_kvm_reconcile_flags {
	KAGE_KVM_ADOPT = 1u << 0, /**< copy what was found home and heal the mappings */
};
/**
 * Finds pages whose COW the kernel broke and drops the frames they shared
 * (native). Returns the number of pages that are private to the host now (adopted ones
 * not counted), at most INT_MAX; -ENOMEM; -EOPNOTSUPP (ADOPT without write protection and without `pause`);
 * -EAGAIN (as kage_kvm_detach()).
 */
KAGE_API int kage_kvm_reconcile(struct kage_kvm *kvm, uint32_t flags);

struct kage_kvm_feature_info {
	uint32_t used;     /**< 1: in use */
	int32_t error;     /**< why not: errno of the probe; 0: masked, or not needed */
	const char *why;   /**< a sentence, static */
};

struct kage_kvm_info {
	uint32_t size;
	uint32_t policy;         /**< in use: NATIVE or EXACT */
	const char *policy_why;  /**< a sentence, static */
	uint32_t slots;          /**< in use */
	uint32_t widened;        /**< 2 MiB runs copied home because mappings were scarce */
	uint64_t mappings;       /**< runs of the mirror: VMAs that this guest costs */
	uint64_t map_budget;     /**< its share of the engine's budget */
	uint64_t host_private;   /**< pages, as of the last reconcile */
	uint64_t reconciled_ns;  /**< when that was, CLOCK_MONOTONIC */
	uint64_t reconciles, adopted, healed; /**< ever; healed: mappings that became one with a neighbour again */
	uint64_t traps;          /**< served */
	uint64_t broken;         /**< times that a window was found changed by somebody else */
	struct kage_kvm_feature_info feature[KAGE_KVM_FEATURES];
};
/** Returns KAGE_OK, -EINVAL, -E2BIG. */
KAGE_API int kage_kvm_info(struct kage_kvm *kvm, struct kage_kvm_info *info);

KAGE_END
#endif
