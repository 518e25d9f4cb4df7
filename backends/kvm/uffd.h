/* SPDX-License-Identifier: MIT */
/*
 * A userfaultfd(2) context and its calls, as -errno functions.
 *
 * addr and len are page aligned everywhere. Threads may use one context
 * together; who opens and closes it sees to it that nobody else does then.
 *
 * -EAGAIN from a call that changes page tables means: another thread's munmap(2),
 * mremap(2), madvise(2) or fork(2) waits for its event to be read. Read it, then try
 * again; looping in the thread that reads would wait for ever.
 */
#ifndef KAGE_KVM_UFFD_H
#define KAGE_KVM_UFFD_H

#include "compat.h"
#include "features.h"

struct uffd {
	int fd;		   /* -1: closed */
	uint64_t features; /* UFFD_FEATURE_* in force */
};

/*
 * Asks for what missing, minor and write-protect faults of shmem need, as far
 * as `f` uses it, and with `events` for what the process does to registered memory (UNMAP, REMAP,
 * REMOVE, and FORK if CAP_SYS_PTRACE allows it). -EOPNOTSUPP without KAGE_KVM_USERFAULTFD.
 */
int uffd_open(struct uffd *u, const struct features *f, bool events);
/* UFFDIO_API, once in the life of a descriptor; `known` may be NULL. For uffd_open() and probes. */
int uffd_handshake(int fd, uint64_t ask, uint64_t *known);
void uffd_close(struct uffd *u); /* wakes whoever waits; their accesses go on as without it */

int uffd_register(const struct uffd *u, void *addr, size_t len, uint64_t mode); /* UFFDIO_REGISTER_MODE_* */
int uffd_unregister(const struct uffd *u, void *addr, size_t len);

int uffd_protect(const struct uffd *u, void *addr, size_t len);
int uffd_unprotect(const struct uffd *u, void *addr, size_t len); /* and wakes */
int uffd_wake(const struct uffd *u, void *addr, size_t len);

/*
 * Three ways to fill pages and wake who waits for them. All return bytes done, from addr on: `len`, or less
 * if an error came later; -errno if it came first.
 *
 * continue: maps pages that the file has, write-protected with `wp`. -EFAULT: a hole.
 * copy: of `from`; anonymous pages in a MAP_PRIVATE mapping, pages of the file in a shared one. `wp` as
 * above. For both, pages that are mapped already count as done and keep the protection that they have.
 * zeropage: the zero page in a MAP_PRIVATE mapping, not protected; fresh pages of the file in a shared one.
 *   -EEXIST: a page is there, or the marker of a protected page that is not (fill that with a copy).
 */
int64_t uffd_continue(const struct uffd *u, void *addr, size_t len, bool wp);
int64_t uffd_copy(const struct uffd *u, void *addr, const void *from, size_t len, bool wp);
int64_t uffd_zeropage(const struct uffd *u, void *addr, size_t len);

/* Messages that wait, at most `n`; 0: none. -errno. */
int uffd_read(const struct uffd *u, struct uffd_msg *msg, unsigned n);

#endif
