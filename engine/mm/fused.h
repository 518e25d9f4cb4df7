/* SPDX-License-Identifier: MIT */
/*
 * Hardened merging: what a guest can time says nothing about what others hold.
 * After M. Oliverio, K. Razavi, H. Bos, C. Giuffrida, "Secure Page Fusion with
 * VUsion", SOSP 2017, whose two rules are
 *
 *  - share xor fetch: a page that merging has looked at, merged or not, is out of
 *    its guest's reach. The first read, write or fetch of it takes one path, which
 *    gives it a frame of its own.
 *  - frames for merging and for that path are drawn at random: which memory cells a guest's
 *    contents come to lie in is nobody's choice.
 *
 *   quiet page ── hash ──► equal stable frame? ── yes: its entries map that one ─┐
 *                          └─ no: a frame from the reserve, contents copied,     ├─► fused entries
 *                             stable, with one user                             ─┘
 *   first access ─► mm_fault(): a frame from the reserve, contents copied; the reference on the
 *                   old one is noted, and let go of in a step
 *
 * A *fused* entry is a leaf without R. All that it can map is a stable frame.
 *
 * Invariants:
 *  H1  a fused entry is of level 0, without W and X, maps a STABLE frame, and that is mapped by fused
 *      entries alone. Hardened domains have no other stable frames, nor candidates.
 *  H2  no secondary MMU has a translation made of a fused entry: mm_fault() answers
 *      with it to nobody.
 *  H3  what a fault does to a fused entry depends on nothing but the entry and the contents it copies:
 *      not on the frame's metadata (references, chain), which it does not even read, nor on whether
 *      the frame is in a cache: whoever has read one flushes it. And while there is memory no fault lets go of what
 *      others, or itself, have noted, however much that is: it would take as long as there are frames among it that nobody
 *      else has.
 *  H4  refs of a stable frame == entries that map it + references noted here.
 *  H5  a frame of the reserve is of the domain's arena, FRAME_RESERVED, and in one place.
 *  H6  there is room to note the reference of every fused entry: who makes one, or copies it, has been promised the
 *      room before. So nobody is ever without room when an entry goes, and nothing is allocated then.
 *
 * Locks: reserve->lock, inside of table locks; nothing is taken inside of it.
 */
#ifndef KAGE_MM_FUSED_H
#define KAGE_MM_FUSED_H

#include "mm/mm.h"
#include "mm/tenant.h"

#define RESERVE_FRAMES_MIN 64u
#define RESERVE_FRAMES_MAX (1u << 20)
/* As VUsion's: a frame that was given back is the one handed out next in one of 32,768 cases. 128 MiB. */
#define RESERVE_FRAMES_DEFAULT (1u << 15)
#define NOTED_DUE 8192u /* from here on a step is asked for */
#define NOTES_PAGE 1022u

/* References to let go of: a stack of pages, all full but for the first. */
struct notes {
	struct notes *next;
	uint32_t pfn[NOTES_PAGE]; /* of an arena: below 2^32 */
};
_Static_assert(sizeof(struct notes) == 4096, "four bytes for each fused entry");

/* Frames to draw from, and references to let go of, of one hardened tenant. */
struct reserve {
	struct lock lock;
	struct random random;
	struct tenant *tenant;
	uint32_t want;  /* frames that it is to hold; log2 is the entropy of a draw */
	_Atomic uint32_t count;
	bool told;      /* the log has heard that it is not full */
	bool used;      /* it has been full: pages are fused, and their breaks draw on it. Until then it holds all or nothing */
	pfn_t *frame;   /* room for `want` */
	bool late;      /* the last upkeep has not let go of everything: fusing waits, or ever more frames would */
	_Atomic uint64_t noted;
	uint64_t owed;  /* fused entries, what is noted, what is promised: H6, never more than `room` */
	uint64_t room;  /* of all pages */
	struct notes *note, *spare;
};

/* NULL: no memory. */
struct reserve *reserve_make(struct tenant *t, uint32_t want);
void reserve_free(struct reserve *r);
/*
 * Notes are let go of, the reserve is filled, or emptied if no guest is left. Any thread; no lock held. `until`: by the
 * engine's clock, 0: whenever. True: it is not full for lack of time, or not all is let go of.
 */
bool reserve_upkeep(struct reserve *r, uint64_t until);
/* Bytes of its lists. */
uint64_t reserve_bytes(const struct reserve *r);
static inline bool reserve_full(const struct reserve *r)
{
	return atomic_load_explicit(&r->count, memory_order_relaxed) >= r->want;
}
/* Pages may be fused. */
static inline bool reserve_ready(const struct reserve *r)
{
	return reserve_full(r) && !READ_ONCE(r->late);
}

/* Room for the references of n more fused entries (H6), which are made, or given up. No table lock held. -ENOMEM. */
int notes_promise(struct reserve *r, unsigned n);
void notes_give_up(struct reserve *r, unsigned n);

/*
 * A random frame of the reserve, which gets another one in its place. `must`: if none is to
 * be had, the reserve shrinks. Kind RESERVED, one reference. -ENOMEM.
 */
int reserve_draw(struct reserve *r, bool must, pfn_t *out);
/* The same for a page of the mm, private to it: layer_frame() for whoever breaks a fused entry. */
int fused_frame(struct mm *mm, gfn_t gfn, pfn_t *out);
/* A fused entry is gone: its reference goes later. */
void fused_gone(struct tenant *t, pfn_t pfn);
/* A stable frame of a hardened tenant has been read. */
void fused_was_read(const struct pool *pool, pfn_t pfn);

/* What waits for a step, given back now: for who is short of frames. No table lock held. */
uint64_t mm_reap(struct mm *mm);

#endif
