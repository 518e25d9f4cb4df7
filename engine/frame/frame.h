/* SPDX-License-Identifier: MIT */
/*
 * A frame: 4 KiB of the pool, and its 16 bytes of metadata.
 *
 * `refs` counts the leaf entries, in distinct table pages, that map the frame
 * (a table: the entries that point to it). It has a word of its own because it
 * is changed by plain adds under the table lock of (family, level, range), see
 * mm/table.h; frames that several families or ranges share (kind STABLE) use
 * atomics. `bits` is changed atomically by anybody.
 *
 * All-zero: a frame of a home extent that no 4 KiB entry maps, either because
 * nothing does or because a block entry covers it (then its struct block
 * counts).
 *
 * Invariants:
 *  F1  refs == 0 and kind != HOME, DEVICE  <=>  the frame is free, cached or pending.
 *  F2  a frame's contents change only through a writer that has it exclusively.
 *  F3  where.owner/where.index of a PRIVATE frame name the layer and gfn under
 *      which every entry that maps it is found (mm/layer.h). HOME and DEVICE
 *      frames take both from their extent. A STABLE frame's `where` points to
 *      its chain.
 */
#ifndef KAGE_FRAME_FRAME_H
#define KAGE_FRAME_FRAME_H

#include "base/addr.h"

enum frame_kind {
	FRAME_HOME = 0,    /* in a home extent */
	FRAME_PRIVATE = 1, /* a copy in the common arena */
	FRAME_STABLE = 2,  /* merged: home or arena frame, never written */
	FRAME_TABLE = 3,   /* a primary table */
	FRAME_DEVICE = 4,  /* memory that the pool does not own */
	FRAME_ZERO = 5,    /* the zero frame; refs are not counted */
	FRAME_FREE = 6,    /* in the buddy (head of a free run; order says how long) */
	FRAME_CACHED = 7,  /* in a per-CPU cache */
	FRAME_TAIL = 8,    /* not the head of an allocation of order > 0 */
	FRAME_PENDING = 9, /* released, waits for its grace period */
	FRAME_RESERVED = 10,
};

struct frame {
	_Atomic uint32_t refs;
	_Atomic uint32_t bits; /* pins:10 kind:4 order:5 gen:3 flags:10 */
	union {
		_Atomic uint64_t where; /* in use: owner:24 | index:40; STABLE: pointer to its chain */
		struct {
			uint32_t prev, next; /* free: neighbours in the list, as pfns; arenas lie below pfn 2^32 */
		} free;
	};
};
_Static_assert(sizeof(struct frame) == 16, "0.39 % of memory; the budget for metadata and tables is 0.6 %");

#define FRAME_PINS_BITS 10
#define FRAME_PINS_MAX ((1u << FRAME_PINS_BITS) - 1)
#define FRAME_KIND_SHIFT 10
#define FRAME_KIND_MASK (0xfu << FRAME_KIND_SHIFT)
#define FRAME_ORDER_SHIFT 14
#define FRAME_ORDER_MASK (0x1fu << FRAME_ORDER_SHIFT)
#define FRAME_GEN_SHIFT 19
#define FRAME_GEN_MASK (7u << FRAME_GEN_SHIFT)
#define FRAME_FLAG(n) (1u << (22 + (n)))
#define FRAME_LOCKED FRAME_FLAG(0)
#define FRAME_WAITERS FRAME_FLAG(1)
#define FRAME_POISON FRAME_FLAG(2)
#define FRAME_CANDIDATE FRAME_FLAG(6) /* merging knows its content's hash */
#define FRAME_DEAD FRAME_FLAG(7) /* its last entry is gone; not released yet: a home slot is not vacant */
#define FRAME_TAG (FRAME_FLAG(8) | FRAME_FLAG(9)) /* CANDIDATE: two bits of that hash */
#define FRAME_WAS_HOME FRAME_FLAG(4) /* STABLE: lies in a home extent */
#define FRAME_FULL FRAME_FLAG(3) /* STABLE: as many share it as may (mm/stable.h, S4) */
_Static_assert(FRAME_PINS_BITS + 4 + 5 + 3 + 10 == 32, "the bits word is full");

#define FRAME_OWNER_BITS 24
#define FRAME_INDEX_BITS 40
_Static_assert(FRAME_INDEX_BITS >= GFN_BITS, "an index holds any gfn");

static inline enum frame_kind frame_kind(const struct frame *f)
{
	return (enum frame_kind)((READ_ONCE(f->bits) & FRAME_KIND_MASK) >> FRAME_KIND_SHIFT);
}

static inline unsigned frame_order(const struct frame *f)
{
	return (READ_ONCE(f->bits) & FRAME_ORDER_MASK) >> FRAME_ORDER_SHIFT;
}

static inline unsigned frame_pins(const struct frame *f)
{
	return READ_ONCE(f->bits) & FRAME_PINS_MAX;
}

/* Sets kind and order, keeps the rest. */
void frame_set_kind(struct frame *f, enum frame_kind kind, unsigned order);
/* -EOVERFLOW at FRAME_PINS_MAX. */
int frame_pin(struct frame *f);
void frame_unpin(struct frame *f);

static inline uint64_t frame_where(uint32_t owner, gfn_t index)
{
	return (uint64_t)owner << FRAME_INDEX_BITS | index.v;
}
static inline uint32_t where_owner(uint64_t where) { return (uint32_t)(where >> FRAME_INDEX_BITS); }
static inline gfn_t where_index(uint64_t where) { return GFN(where & (((uint64_t)1 << FRAME_INDEX_BITS) - 1)); }

#endif
