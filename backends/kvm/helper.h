/* SPDX-License-Identifier: MIT */
/*
 * The optional helper: two threads that serve a guest's traps, and carry what
 * the VMM does to windows into the notifier contract.
 *
 * The kernel holds up whoever changes registered memory (munmap, mremap,
 * madvise) until the event has been read; the engine's own mmap(2) calls as well. So
 * one thread only reads and queues, and takes no lock that anybody holds across such a call;
 * the other one does the work.
 *
 *      engine (k->lock held)          reader                    worker
 *      own = range
 *      mmap(MAP_FIXED) ─ waits ─────► reads UNMAP: within own: dropped
 *      waits until the reader is
 *      past it; own = nothing
 *                                     reads PAGEFAULT ────────► serves it
 *      VMM: munmap(window) ─────────► reads UNMAP: queued ────► listeners hear of it; the
 *                                                               window is put right
 */
#ifndef KAGE_KVM_HELPER_H
#define KAGE_KVM_HELPER_H

#include "internal.h"

/* Around a call of the engine's own that changes mappings of a window. k->lock held. */
void helper_own(struct kage_kvm *k, const char *at, size_t len);
void helper_own_end(struct kage_kvm *k);
/* Its threads look up: trapping was abandoned. k->lock held. */
void helper_kick(struct kage_kvm *k);

#endif
