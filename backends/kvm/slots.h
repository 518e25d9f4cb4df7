/* SPDX-License-Identifier: MIT */
/*
 * The memory slots of one guest, on a VM descriptor that the VMM owns, and
 * KVM's dirty log of them.
 *
 * Slots are in address space 0. A guest that enters SMM sees other slots, which
 * are the VMM's affair (`set_slot` may set both).
 */
#ifndef KAGE_KVM_SLOTS_H
#define KAGE_KVM_SLOTS_H

#include <kage/kvm.h>
#include "base/addr.h"
#include "base/env.h"
#include "mm/dirty.h"

struct slot {
	gfn_t gfn;
	uint64_t npages; /* 0: the id is free */
	char *hva;
	uint32_t flags; /* what KVM has been told: KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES */
};

struct slots_config {
	uint32_t first, count; /* ids that may be used; count 0: from `first` as many as KVM has */
	bool readonly;	       /* KVM_MEM_READONLY may be used */
	bool bitmap;	       /* KVM_GET_DIRTY_LOG may be used (not beside dirty rings) */
	uint32_t unit;	       /* pages of 4 KiB in one of the host's, in which KVM counts; a power of two, 0: 1 */
	/* NULL: KVM_SET_USER_MEMORY_REGION */
	int (*set_slot)(void *opaque, const struct kage_kvm_slot *slot);
	void *opaque;
};

struct slots {
	struct env *env;
	int vmfd;
	struct slots_config config; /* count is never 0 here */
	bool logging;		    /* every slot has KVM_MEM_LOG_DIRTY_PAGES */
	bool clear;		    /* the kernel has KVM_CLEAR_DIRTY_LOG */
	uint32_t used, room;
	struct slot *slot; /* [room], by id - first */
	uint32_t *order;   /* [room], a permutation: the used ones by gfn, then the free ones */
	uint64_t *bitmap;  /* for one slot's dirty log: a bit a unit */
	uint64_t bitmap_units;
};

/* Is it the descriptor of a KVM VM? */
bool slots_is_vm(int vmfd);

typedef void slots_mark_fn(void *arg, gfn_t gfn, uint64_t npages);

/*
 * Makes no slot yet. -EINVAL: vmfd is no VM, or the ids do not exist (logged).
 * Nothing needs finishing after an error.
 */
int slots_init(struct slots *s, struct env *env, int vmfd, const struct slots_config *config);
/* Removes all slots that are left; the log says which KVM would not let go. */
void slots_finish(struct slots *s);

/*
 * Room for n more slots, each of at most `largest` pages: the next n calls of
 * slots_add() can fail only in the kernel. -ENOSPC, -ENOMEM; nothing has changed then.
 */
int slots_reserve(struct slots *s, uint32_t n, uint64_t largest);

/*
 * Puts [gfn, gfn + npages) at hva. Returns 0; -ENOSPC (no id is left); -EEXIST
 * (overlaps a slot, of anybody's); -EOPNOTSUPP (read-only slots are not there);
 * -EINVAL (npages is 0, or 2^31 units and more: KVM's limit; or not in whole units); -ENOMEM; errno of the ioctl.
 */
int slots_add(struct slots *s, gfn_t gfn, uint64_t npages, void *hva, bool readonly);
/*
 * Removes exactly the slot [gfn, gfn + npages): vCPUs use it no more when this returns. What KVM
 * logged of it and nobody took is gone. -ENOENT; errno of the ioctl: it is still there.
 */
int slots_remove(struct slots *s, gfn_t gfn, uint64_t npages);

/*
 * Dirty logging of all slots, and of those added later. vCPUs may run: a write
 * that begins after this returned is logged. -ENOMEM; errno of an ioctl (ENXIO: the VMM has
 * enabled dirty rings). On an error everything is as it was.
 */
int slots_log(struct slots *s, bool on);

/*
 * Takes the dirty log of every slot that overlaps [start, end) and passes it
 * on, whole slots at a time: also pages outside of the range, for their bits are
 * gone from KVM, and all pages of a unit. A page is marked after KVM write-protected it again: a write that
 * the mark does not cover is logged anew.
 *
 * A page that is not there yet when the guest reads it may be marked as well: KVM maps it writable.
 * Without config.bitmap, and in a slot that KVM refuses to report on, all pages
 * are marked. Returns 0, or the first such refusal (logged). Nothing happens while logging is off.
 */
int slots_dirty(struct slots *s, gfn_t start, gfn_t end, slots_mark_fn *mark, void *arg);
/*
 * The same, but pages of `left` (NULL: none) are only marked: KVM does not protect them again, so the guest's next write
 * to one costs it nothing, and the log still has it. (Where KVM_GET_DIRTY_LOG clears the log, for the VMM has not enabled
 * KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, it has protected them already.)
 */
int slots_dirty_but(struct slots *s, gfn_t start, gfn_t end, const struct dirty_left *left, slots_mark_fn *mark, void *arg);

/* The first page of unit `offset` of slot `id` as dirty rings name it, whatever its address space. False: not one of ours. */
bool slots_gfn(const struct slots *s, uint32_t id, uint64_t offset, gfn_t *gfn);

#endif
