/* SPDX-License-Identifier: MIT */
/*
 * What the kernel says of this process's own memory: which pages of a mapping
 * are private to the host, which are present, the list of mappings, the
 * anonymous resident set. Cheap enough for many GiB.
 *
 * None of it is a lock: it is true of the moment at which the kernel looked
 * at that page. A page that the host has made private stays so until its
 * mapping is replaced or MADV_DONTNEED; one that was not private stays so only
 * while writes to it are blocked.
 */
#ifndef KAGE_KVM_SCAN_H
#define KAGE_KVM_SCAN_H

#include "features.h"

/* `from` to `to` is a maximal run. Not 0: the scan ends and returns it. */
typedef int (*scan_run_fn)(void *arg, char *from, char *to);

/*
 * Pages of [start, start + len), both page aligned, that copy-on-write has made
 * anonymous: present or swapped, neither of a file nor the zero page. Runs come in
 * ascending order. `run` may change mappings, but whether the scan then sees the old or
 * the new state behind `to` is open.
 *
 * Exact where the kernel shows frames (CAP_SYS_ADMIN). Else it may report too
 * much, never too little:
 *  - a page with no memory in a range that was write-protected (userfaultfd) looks
 *    swapped; so does a guard page;
 *  - without PAGEMAP_SCAN the zero page (reads of untouched anonymous memory;
 *    UFFDIO_ZEROPAGE) looks private.
 *
 * Returns 0, what `run` returned, or -errno; -EOPNOTSUPP: compare contents.
 */
int scan_private(const struct features *f, void *start, size_t len, scan_run_fn run, void *arg);

/* The same for pages of any kind that this process's page tables map: a touch would not fault. */
int scan_present(const struct features *f, void *start, size_t len, scan_run_fn run, void *arg);

/* The frame field of a page's entry; 0: nothing is there, or the kernel does not show it. For probes. */
uint64_t scan_frame(const struct features *f, const void *page);

/* A line of /proc/self/maps. */
struct scan_map {
	uint64_t start, end;
	int prot; /* PROT_* */
	bool shared;
	uint64_t offset; /* bytes */
	uint64_t inode;	 /* 0: anonymous */
	uint32_t dev_major, dev_minor;
};

/*
 * Mappings in ascending order. Changes that are made meanwhile may or may not be seen;
 * others are reported once. Returns 0, what `line` returned, -EOPNOTSUPP, -EINVAL (a line
 * that makes no sense), or the errno of the read.
 */
int scan_maps(const struct features *f, int (*line)(void *arg, const struct scan_map *map), void *arg);

/* Anonymous resident bytes of this process, shared memory not among them; the kernel's count may lag by some
 * pages. -errno. */
int64_t scan_anon_rss(const struct features *f);

#endif
