/* SPDX-License-Identifier: MIT */
/*
 * What the running kernel and this process's rights allow the KVM backend to
 * use, each found out by doing it once on scratch memory, and the descriptors
 * that go with it.
 *
 * After features_probe() no path is opened any more: a VMM that jails itself
 * after attaching keeps everything, also further userfaultfds.
 */
#ifndef KAGE_KVM_FEATURES_H
#define KAGE_KVM_FEATURES_H

#include <kage/kvm.h>
#include <limits.h>

#include "base/env.h"

#define FEATURES_NO_VM INT_MIN /* as `vmfd`: leave KVM's own features out */

struct features {
	struct env *env;
	struct kage_kvm_feature_info info[KAGE_KVM_FEATURES];
	uint32_t mask;		  /* bits of enum kage_kvm_feature that must not be used */
	int pagemap, maps, statm; /* of /proc/self; -1: not to be had */
	int uffd_dev;		  /* /dev/userfaultfd; -1: the system call is used */
	uint64_t uffd_features;	  /* UFFD_FEATURE_* that the kernel knows; 0 without USERFAULTFD */
	/*
	 * Frame fields (bits 0 to 54) of pagemap entries for the zero page and for the marker that
	 * write protection leaves where there is no page. 0: the kernel does not show them (CAP_SYS_ADMIN).
	 */
	uint64_t zero_frame, marker_frame;
	uint32_t dirty_manual;	   /* value of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: flags that may be enabled */
	uint32_t dirty_ring_bytes; /* with KAGE_KVM_DIRTY_RING: what the VMM said */
	bool ring_acq_rel; /* the rings are KVM_CAP_DIRTY_LOG_RING_ACQ_REL's: order accesses to them */
	uint32_t slots;	   /* KVM_CAP_NR_MEMSLOTS */
};

/*
 * Descriptors of `config` are duplicated. Missing features are no failure.
 * Returns 0; -EINVAL (`vmfd` is no KVM VM); -EBADF (a descriptor of `config` is
 * closed); the errno of memfd_create(2), ftruncate(2) or mmap(2) for the scratch memory.
 */
int features_probe(struct features *f, struct env *env, const struct kage_kvm_config *config, int vmfd);
void features_finish(struct features *f);

static inline bool feature_used(const struct features *f, enum kage_kvm_feature n)
{
	return f->info[n].used != 0;
}

/* A fresh userfaultfd, O_NONBLOCK | O_CLOEXEC, before UFFDIO_API. -errno. */
int features_uffd_new(const struct features *f);

#endif
