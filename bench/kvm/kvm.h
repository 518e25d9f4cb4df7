/* SPDX-License-Identifier: MIT */
/*
 * The parts of kage-bench-kvm, beside ../common and the reference VMM of tests/vmm.
 *
 *   guest.c     what guests run; guest.h
 *   ram.c       guest memory as other VMMs have it: the peers
 *   subject.c   a VM with one vCPU on some memory, and rounds of its guest
 *   steady.c    a memory-bound guest while nothing happens but reconciling
 *   cow.c       a write to a shared page, and the way of the page home
 *   pause.c     the live clone of a running guest, as that guest sees it
 *   clones.c    many clones; what an idle one takes
 *   dirty.c     dirty logging of a running guest
 *   scale.c     many guests against few
 *
 * Every row's note says what its time contains. CPU time of a guest is that of
 * its vCPU's thread between two OUT, KVM's work for it included.
 */
#ifndef KAGE_BENCH_KVM_H
#define KAGE_BENCH_KVM_H

#include <kage/kvm.h>

#include "common.h"
#include "guest.h"
#include "payload.h"

/* -- ram.c ---------------------------------------------------------------------------- */

enum ram_kind {
	RAM_SHARED,  /* a memfd of 4 KiB pages, MAP_SHARED */
	RAM_PRIVATE, /* the same MAP_PRIVATE: what is written first is seen through the file */
	RAM_HUGE,    /* anonymous, transparent huge pages */
	RAM_SMALL,   /* anonymous, 4 KiB pages */
};

/* One region from gpa 0. Ends the program if there is no memory. */
struct vmm_ram *ram_create(enum ram_kind kind, uint64_t bytes);
/* RAM_PRIVATE: the window shows the file again; what was written is lost. ram_file() is the file itself. */
void ram_renew(struct vmm_ram *ram);
char *ram_file(struct vmm_ram *ram);
/* RAM_PRIVATE: what the window shows becomes what the file holds. */
void ram_settle(struct vmm_ram *ram);

/* -- subject.c -------------------------------------------------------------------------- */

struct subject {
	struct kage_engine *engine; /* NULL: a peer */
	bool shares;		    /* the engine is another subject's */
	struct vmm *vmm;
	uint64_t bytes, base; /* RAM; the first page that a row may use */
	double begin, end;    /* CPU of the vCPU's thread at the last GUEST_PORT_BEGIN and _END */
	struct cost {	      /* of what ops of the RAM did since costs_reset(): CPU */
		double clone, attach, slots;
		double clone_wall, attach_wall, slots_wall;
		uint64_t cloned_tsc; /* when the last clone of memory was done */
		unsigned clones, attaches;
	} cost;
	void (*attaching)(
	    void *arg); /* called before a clone's memory is attached, its parent runs again; or NULL */
	void *arg;
};

/* On Kage's memory, native policy. Heap-allocated, since callbacks know it. */
struct subject *subject_kage(uint64_t bytes);
/* In the engine of another one, which is destroyed after it. Costs are those of the last subject made. */
struct subject *subject_kage_beside(const struct subject *other, uint64_t bytes);
struct subject *subject_plain(enum ram_kind kind, uint64_t bytes);
void subject_destroy(struct subject *s);
struct kage_vm *subject_vm(const struct subject *s);
struct kage_kvm *subject_kvm(const struct subject *s);

void subject_write(struct subject *s, uint64_t gpa, const void *data, size_t len);
uint64_t subject_word(struct subject *s, uint64_t gpa);
/* The whole page is made of `key`. */
void subject_fill(struct subject *s, uint64_t page, uint64_t key);

/* Makes guest_bench() what a vCPU of this VM (the subject's or a clone's) runs next. */
void guest_enter(struct vmm *vmm);
/* One round. ns of CPU, or a negative number if the guest did not get to its end. args are put and read back.
 */
double subject_round(struct subject *s, struct guest_args *args);
/* The same in two parts; wait_ms passed: -ETIMEDOUT. */
void subject_start(struct subject *s, const struct guest_args *args);
int subject_wait(struct subject *s, struct guest_args *args, int wait_ms);

static inline double subject_settle(const struct subject *s)
{
	return steps_settle(s->engine);
}

static inline double subject_merge(const struct subject *s)
{
	return steps_merge(s->engine);
}

struct kage_stats subject_stats(const struct subject *s);
struct kage_kvm_info subject_info(const struct subject *s);
/* CPU ns of kage_kvm_reconcile(). */
double subject_reconcile(const struct subject *s, uint32_t flags);
/* No violation. */
bool subject_sound(const struct subject *s);

double tsc_per_ns(void);
uint64_t tsc_now(void);

/* -- suites -------------------------------------------------------------------------------- */

void bench_steady(const struct bench *b);
void bench_cow(const struct bench *b);
void bench_pause(const struct bench *b);
void bench_clones(const struct bench *b);
void bench_dirty(const struct bench *b);
void bench_scale(const struct bench *b);

#endif
