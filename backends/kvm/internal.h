/* SPDX-License-Identifier: MIT */
/*
 * What the files of the KVM backend share.
 *
 * Read order: compat.h, features, uffd, scan (what the host kernel offers);
 * slots, ring, arch (KVM); runs (the mirror's table); mirror.c (listener: block,
 * sync, freeze), window.c (regions: windows and slots), reconcile.c, trap.c,
 * helper.c, inspect.c (audit and dump), kvm.c (attach, the public calls).
 *
 * Invariants, beside V1 to V5 of mm/mirror.h:
 *  W1  the runs cover exactly the windows of the guest's regions; each is what is mapped there.
 *  W2  of changes that put frames in the place of others (reason CLEAR), no two of overlapping
 *      ranges are between start and end: so writes that one has blocked stay blocked until its own end.
 *  W3  who waits for W2 holds nothing that the other needs to come to its end.
 *
 * Lock order: the mirror's lock is of RANK_SHADOW, like the lock of the
 * shadow tables, which is never held with it: after all table locks, before the dirty logs'.
 * slots_lock is taken before it. Neither it nor mm->range for writing is held by anybody whom a vCPU in a trap waits
 * for: KVM's slot calls wait for such a vCPU. pause_lock is taken before both, and by nobody who runs guest code. The
 * embedder's callbacks run without the mirror's lock, set_slot excepted.
 */
#ifndef KAGE_KVM_INTERNAL_H
#define KAGE_KVM_INTERNAL_H

#include <kage/kage.h>
#include <kage/kvm.h>

#include "api/vm.h"
#include "base/lock.h"
#include "features.h"
#include "mm/mirror.h"
#include "mm/region.h"
#include "ring.h"
#include "runs.h"
#include "slots.h"
#include "uffd.h"

/* Address space, of one mapped region at first; given back when no window lies in it any more. */
struct reservation {
	void *map;
	size_t len;
	unsigned refs;
};

/* Address space that shows [gfn, gfn + npages), which regions cover without a gap. Sorted by gfn in kage_kvm.window. */
struct window {
	gfn_t gfn;
	uint64_t npages;
	char *hva;
	struct reservation *reservation;
	bool shown; /* mapped as the table says; before, all zero */
};

/* A slot as it has been set. */
struct span {
	gfn_t gfn;
	uint64_t npages;
	bool readonly;
};

struct spans {
	struct span *span;
	unsigned count, room;
};

/* A change between start and end. */
struct blocked {
	gfn_t start, end;
	uint64_t id;
	uint64_t reserved; /* pages, see runs_reserve() */
	bool used, protected, paused, split;
};

#define BLOCKED_MAX NOTIFY_CHANGES
#define BALLAST_PAGES 32 /* half of them in VMAs of their own */

struct helper;

/* A trapped page whose owner has said KAGE_WAIT. */
struct waiting {
	gfn_t gfn;
	uint32_t access;
};

struct kage_kvm {
	struct mirror mirror;
	struct kage_notifier notifier;
	struct kage_vm *vm;
	struct mm *mm;
	struct env *env;
	struct pool *pool;
	struct kage_kvm_config config;
	int vmfd;
	const char *policy_why;
	struct features features;
	struct uffd uffd;
	struct slots slots;
	struct rings rings;
	bool ring;     /* KVM logs into rings */
	bool wp;       /* writes are blocked through userfaultfd; else through pause() */
	bool unblockable; /* some region's file is none of a kind that userfaultfd knows: through pause() */
	bool detaching; /* nobody writes: nothing has to be blocked */
	bool attaching; /* granules whose pages do not lie side by side are copied into the window */
	bool gathered;	/* some have been */

	struct lock slots_lock; /* slots, rings: KVM's calls wait for vCPUs, and those for who holds `lock` */
	struct lock lock;	/* all below */
	struct window *window;
	unsigned windows, window_room;
	struct spans spans, next; /* slots as they are, and as a change of regions wants them */
	bool preparing;
	struct runs runs;
	uint64_t reserved; /* pages, of all blocked ranges */
	struct blocked blocked[BLOCKED_MAX];
	bool mapped_private;  /* since it was cleared */
	struct gfn_range slip; /* a write slipped by here; merging replaces one page at a time */
	_Atomic uint32_t unblocked; /* futex: moves when a range is */
	char *ballast; /* mappings to give up when the kernel has no more; NULL: given up */
	struct waiting *waiting;
	unsigned nwaiting, waiting_room;

	bool events;   /* all of the windows is registered, for the helper to hear of changes */
	int kick;      /* eventfd: wakes trap_run */

	struct lock pause_lock;
	unsigned paused;

	_Atomic uint64_t host_private, reconciled_ns, reconciles, healed, traps, broken;
	_Atomic int64_t anon_seen; /* anonymous bytes of the process at the last reconcile */
	struct defer_node defer;
	struct helper *_Atomic helper; /* NULL: the embedder serves traps */
};

static inline struct kage_kvm *kvm_of(struct mirror *m)
{
	return container_of(m, struct kage_kvm, mirror);
}

/* -- mirror.c -------------------------------------------------------------- */

extern const struct mirror_ops kvm_mirror_ops;
extern const struct kage_notifier_ops kvm_notifier_ops;

/*
 * Makes the mappings of [start, end) what the table says. k->lock held. Pages mapped, or -errno: the rest is as it was.
 */
int64_t mirror_sync(struct kage_kvm *k, gfn_t start, gfn_t end);
/* Registers what must trap of a piece of one run, with one userfaultfd context or another. k->lock held. */
int mirror_register(struct kage_kvm *k, const struct run *run);
/* UFFDIO_REGISTER_MODE_* of a run; 0: not registered. */
uint64_t mirror_mode(const struct kage_kvm *k, const struct run *run);
/* Takes what KVM logged into the open logs; `left`: as in slots_dirty_but(). k->slots_lock held. */
int mirror_take_log(struct kage_kvm *k, gfn_t start, gfn_t end, const struct dirty_left *left);
int mirror_track(struct mirror *m);
/* Maps one piece. k->lock held. */
int mirror_map(struct kage_kvm *k, const struct run *want);
void ballast_fill(struct kage_kvm *k);
void ballast_drop(struct kage_kvm *k);

/* V6 */
static inline gfn_t granule_down(const struct kage_kvm *k, gfn_t gfn)
{
	return GFN(ALIGN_DOWN(gfn.v, (uint64_t)k->mirror.granule));
}

static inline gfn_t granule_up(const struct kage_kvm *k, gfn_t gfn)
{
	return GFN(ALIGN_UP(gfn.v, (uint64_t)k->mirror.granule));
}

/* -- window.c --------------------------------------------------------------- */

int window_prepare(struct mirror *m, const struct regions *next);
void window_commit(struct mirror *m, const struct regions *next);
void window_cancel(struct mirror *m);
/* Maps what new windows are to show. k->lock held. -ENOMEM. */
int window_show_all(struct kage_kvm *k);
/* Slots and windows go. The guest does not run. */
void window_finish(struct kage_kvm *k);
/* The window that holds gfn, or NULL. k->lock or mm->range held. */
struct window *window_find(const struct kage_kvm *k, gfn_t gfn);
static inline char *window_hva(const struct window *w, gfn_t gfn)
{
	return w->hva + ((gfn.v - w->gfn.v) << PAGE_SHIFT);
}
char *kvm_hva(const struct kage_kvm *k, gfn_t gfn); /* NULL: in no window */
/* The page shown at an address; false: none of ours. k->lock held. */
bool window_gfn(const struct kage_kvm *k, const char *hva, gfn_t *gfn);

/* -- reconcile.c -------------------------------------------------------------- */

void mirror_diverged(struct mirror *m, gfn_t start, unsigned npages, uint64_t map[MIRROR_WORDS]);
int mirror_each_diverged(struct mirror *m, gfn_t start, gfn_t end,
			 int (*fn)(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], void *arg), void *arg);
int64_t mirror_reconcile(struct mirror *m, bool adopt);
void mirror_step(struct mirror *m);
/* Mappings this guest may have. */
uint64_t mirror_share(const struct kage_kvm *k);

/* Runs cover [first, last]. k->lock held. */
bool window_whole(const struct kage_kvm *k, gfn_t first, gfn_t last);

/* -- kvm.c ---------------------------------------------------------------- */

/* Some region traps. */
bool kvm_trapped(const struct kage_kvm *k);

/* -- trap.c --------------------------------------------------------------------- */

/* Serves one fault. 1; 0: its owner wants it later; -errno. */
int trap_serve(struct kage_kvm *k, struct notify_reader *reader, gfn_t gfn, uint32_t access);
int trap_message(struct kage_kvm *k, struct notify_reader *reader, const struct uffd_msg *msg);
int trap_waiting(struct kage_kvm *k, struct notify_reader *reader);

/* -- inspect.c -------------------------------------------------------------------- */

int mirror_audit(struct mirror *m, struct audit *a);
int mirror_dump(struct mirror *m, bool json, int (*put)(void *arg, const char *text, size_t len), void *arg);
/* Puts mappings right that somebody else has changed. Their number, or -errno. */
int mirror_repair(struct kage_kvm *k);

#endif
