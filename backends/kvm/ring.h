/* SPDX-License-Identifier: MIT */
/*
 * KVM's dirty rings: one a vCPU, filled by KVM with (slot, offset) of pages
 * written, emptied here. Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING.
 *
 * Where the CPU logs writes by itself (PML), KVM moves its buffer into the ring
 * when the vCPU leaves guest mode. A write that such a vCPU made just before
 * is found by a later harvest, unless it has been made to exit in between.
 */
#ifndef KAGE_KVM_RING_H
#define KAGE_KVM_RING_H

#include "slots.h"

struct ring_run;

struct rings {
	struct env *env;
	int vmfd;
	struct list list;	/* struct ring */
	struct ring_run *batch; /* what is taken between two resets */
	uint32_t batched;
};

/* -ENOMEM. */
int rings_init(struct rings *r, struct env *env, int vmfd);
/* Unmaps the rings. What is in them stays there. */
void rings_finish(struct rings *r);

/*
 * Maps the ring of a vCPU, `bytes` long as the VMM has set it; once for each vCPU. The
 * descriptor may be closed afterwards. -EINVAL (bytes is no size of a ring, a
 * descriptor without rings), -ENOMEM, errno of mmap(2).
 */
int ring_add(struct rings *r, int vcpufd, size_t bytes);

/*
 * Takes all entries that are in the rings, gives them back to KVM and marks
 * their pages, after those are write-protected again. vCPUs may run. Entries of slots that
 * are not in `s` are dropped. Returns 0 or the errno of KVM_RESET_DIRTY_RINGS
 * (logged): what was taken has been marked, but may not be logged again.
 */
int rings_harvest(struct rings *r, const struct slots *s, slots_mark_fn *mark, void *arg);

#endif
