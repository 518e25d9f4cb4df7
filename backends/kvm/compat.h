/* SPDX-License-Identifier: MIT */
/*
 * Constants and structures of the kernel's interface that are younger than
 * Linux 6.1's headers, so that the backend builds against those and finds
 * out at run time what the running kernel can do.
 *
 * What the installed headers have wins. Structures have names of our own, and
 * so has all of PAGEMAP_SCAN: newer headers define it in <linux/fs.h>, which
 * nothing here includes and which would otherwise clash.
 *
 * Sources: userfaultfd(2), ioctl_userfaultfd(2), PAGEMAP_SCAN(2const),
 * madvise(2), Documentation/virt/kvm/api.rst.
 */
#ifndef KAGE_KVM_COMPAT_H
#define KAGE_KVM_COMPAT_H

#include <linux/kvm.h>
#include <linux/types.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* -- userfaultfd ------------------------------------------------------------- */

#ifndef UFFD_FEATURE_EXACT_ADDRESS /* Linux 5.18 */
#define UFFD_FEATURE_EXACT_ADDRESS (1 << 11)
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM /* 5.19 */
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED /* 6.4 */
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_POISON /* 6.6 */
#define UFFD_FEATURE_POISON (1 << 14)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC /* 6.7 */
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef UFFD_FEATURE_MOVE /* 6.8 */
#define UFFD_FEATURE_MOVE (1 << 16)
#endif
#ifndef UFFDIO_CONTINUE_MODE_WP /* 6.4 */
#define UFFDIO_CONTINUE_MODE_WP ((__u64)1 << 1)
#endif
#ifndef USERFAULTFD_IOC /* 6.1: /dev/userfaultfd */
#define USERFAULTFD_IOC 0xAA
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(USERFAULTFD_IOC, 0x00)
#endif
#ifndef _UFFDIO_POISON /* 6.6 */
#define _UFFDIO_POISON (0x08)
#endif

struct kage_uffdio_poison {
	struct uffdio_range range;
	__u64 mode;    /* 1: do not wake */
	__s64 updated; /* out */
};

#define KAGE_UFFDIO_POISON _IOWR(UFFDIO, _UFFDIO_POISON, struct kage_uffdio_poison)

/* -- /proc/self/pagemap ------------------------------------------------------ */

struct kage_pm_region {
	__u64 start, end, categories;
};

struct kage_pm_scan_arg {
	__u64 size, flags;
	__u64 start, end;
	__u64 walk_end; /* out */
	__u64 vec, vec_len;
	__u64 max_pages; /* 0: any number */
	__u64 category_inverted, category_mask, category_anyof_mask, return_mask;
};

_Static_assert(sizeof(struct kage_pm_scan_arg) == 12 * 8, "the kernel's size is part of the ioctl's number");

#define KAGE_PAGEMAP_SCAN _IOWR('f', 16, struct kage_pm_scan_arg) /* 6.7 */

#define KAGE_PM_SCAN_WP_MATCHING   (1 << 0)
#define KAGE_PM_SCAN_CHECK_WPASYNC (1 << 1)

#define KAGE_PAGE_IS_WPALLOWED	(1 << 0)
#define KAGE_PAGE_IS_WRITTEN	(1 << 1)
#define KAGE_PAGE_IS_FILE	(1 << 2)
#define KAGE_PAGE_IS_PRESENT	(1 << 3)
#define KAGE_PAGE_IS_SWAPPED	(1 << 4)
#define KAGE_PAGE_IS_PFNZERO	(1 << 5)
#define KAGE_PAGE_IS_HUGE	(1 << 6)
#define KAGE_PAGE_IS_SOFT_DIRTY (1 << 7)

/* -- KVM --------------------------------------------------------------------- */

#ifndef KVM_EXIT_MEMORY_FAULT /* 6.8 */
#define KVM_EXIT_MEMORY_FAULT 39
#endif

/* At the start of kvm_run's union, where `mmio` is too. */
struct kage_kvm_memory_fault {
	__u64 flags, gpa, size;
};

#define KAGE_KVM_RUN_MEMORY_FAULT(run)                                                                       \
	((const struct kage_kvm_memory_fault *)((const char *)(run) + offsetof(struct kvm_run, mmio)))

#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL /* 6.1 */
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP /* 6.2 */
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP 225
#endif
#ifndef KVM_CAP_USER_MEMORY2 /* 6.8 */
#define KVM_CAP_USER_MEMORY2 231
#endif
#ifndef KVM_CAP_MEMORY_FAULT_INFO
#define KVM_CAP_MEMORY_FAULT_INFO 232
#endif
#ifndef KVM_CAP_MEMORY_ATTRIBUTES
#define KVM_CAP_MEMORY_ATTRIBUTES 233
#endif
#ifndef KVM_CAP_GUEST_MEMFD
#define KVM_CAP_GUEST_MEMFD 234
#endif
#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif
#ifndef KVM_CAP_PRE_FAULT_MEMORY /* 6.11 */
#define KVM_CAP_PRE_FAULT_MEMORY 236
#endif

/* -- madvise(2) -------------------------------------------------------------- */

#ifndef MADV_POPULATE_READ /* 5.14 */
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_DONTNEED_LOCKED /* 5.18 */
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_GUARD_INSTALL /* 6.13 */
#define MADV_GUARD_INSTALL 102
#endif
#ifndef MADV_GUARD_REMOVE
#define MADV_GUARD_REMOVE 103
#endif

#endif
