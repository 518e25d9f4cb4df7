/* SPDX-License-Identifier: MIT */
/*
 * What runs in the guest: the programs of payload.h, in C, in one section that
 * payload.c copies to guest memory. gpa = gva there, so `ram` is 0.
 *
 * invariants
 *	G1. The section needs nothing outside of itself: no data, no library, no vector
 *	    registers, no table of jumps. (Compiled with -ffreestanding -mgeneral-regs-only
 *	    -fno-jump-tables and without instrumentation; guest.sh looks at the object.)
 *	G2. The identity changes between any two instructions. A program reads it at one place of its loop and
 *	    acts under what it read there until it comes back to it.
 *
 * Why not assembly: the same functions, called in the VMM's process on a copy of
 * guest memory, say what the guest should have found.
 */
#include "payload.h"

#define GUEST	  __attribute__((section("vmm_guest")))
#define INLINE	  static inline __attribute__((always_inline))
#if defined(__x86_64__)
#include "x86_guest.h"
#else
#include "arm64_guest.h"
#endif
#define WORDS	  512 /* of 8 bytes in a page */
#define LINES	  64  /* of 64 bytes in a page */
#define PAGE	  4096
#define LOAD(at) load((uint64_t)(uintptr_t)(at))
#define STORE(at, value) store((uint64_t)(uintptr_t)(at), value)

/* The finaliser of splitmix64 (Steele, Lea, Flood, 2014). */
INLINE uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

/* xorshift64 (Marsaglia, 2003). */
INLINE uint64_t next(uint64_t *rng)
{
	*rng ^= *rng << 13;
	*rng ^= *rng >> 7;
	*rng ^= *rng << 17;
	return *rng;
}

/* 0 .. n - 1, without a division. */
INLINE uint64_t below(uint64_t *rng, uint64_t n)
{
	return (uint64_t)(((unsigned __int128)next(rng) * n) >> 64);
}

INLINE uint64_t seed(uint64_t from)
{
	return mix(from + 0x9e3779b97f4a7c15) | 1;
}

/* -- stamp ---------------------------------------------------------------------------------- */

GUEST uint64_t guest_stamp(uint64_t gfn, uint64_t generation, uint64_t id, uint64_t word)
{
	return mix(mix(mix(gfn + 1) ^ generation) ^ id) + word;
}

GUEST static void error(volatile struct payload_mailbox *mb, uint64_t page, uint64_t word, uint64_t found,
			uint64_t expected)
{
	if (mb->errors++)
		return;
	mb->error_page = page;
	mb->error_word = word;
	mb->error_found = found;
	mb->error_expected = expected;
}

/* Whether this guest (`own`) or one of its ancestors, before it was cloned, wrote that. */
GUEST static bool own_past(volatile struct payload_mailbox *mb, uint64_t generation, uint64_t id, uint64_t own)
{
	uint64_t i, n = mb->ancestors;

	if (id == own)
		return generation <= mb->count;
	for (i = n > PAYLOAD_ANCESTORS ? n - PAYLOAD_ANCESTORS : 0; i < n; i++)
		if (mb->ancestor[i % PAYLOAD_ANCESTORS].id == id)
			return generation <= mb->ancestor[i % PAYLOAD_ANCESTORS].generation;
	return n > PAYLOAD_ANCESTORS; /* too long ago to know */
}

GUEST static void verify(volatile struct payload_mailbox *mb, uint64_t i, uint64_t own)
{
	volatile struct payload_stamp_log *log = (void *)(uintptr_t)(mb->log + i * sizeof(*log));
	uint64_t at = mb->base + i * PAGE, step = WORDS / mb->words, generation = log->generation, id = log->id;
	uint64_t word, expected, found;

	if (generation && !own_past(mb, generation, id, own))
		error(mb, at / PAGE, ~(uint64_t)0, generation, mb->count);
	for (word = 0; word < WORDS; word += step) {
		expected = generation ? guest_stamp(at / PAGE, generation, id, word) : 0;
		found = LOAD(at + word * 8);
		if (found != expected)
			error(mb, at / PAGE, word, found, expected);
	}
}

GUEST static void stamp_page(volatile struct payload_mailbox *mb, uint64_t i, uint64_t id)
{
	volatile struct payload_stamp_log *log = (void *)(uintptr_t)(mb->log + i * sizeof(*log));
	uint64_t at = mb->base + i * PAGE, step = WORDS / mb->words, generation = mb->count + 1, word;

	for (word = 0; word < WORDS; word += step)
		STORE(at + word * 8, guest_stamp(at / PAGE, generation, id, word));
	log->generation = generation;
	log->id = id;
	mb->count = generation;
}

GUEST static void stamp_stopped(volatile struct payload_mailbox *mb, uint64_t own)
{
	uint64_t i;

	mb->audited = 0;
	for (i = 0; i < mb->pages; i++) {
		verify(mb, i, own);
		mb->audited++;
	}
	while (mb->stop)
		out(PAYLOAD_PORT_STOP, (uint32_t)mb->errors);
}

GUEST static void stamp(volatile struct payload_mailbox *mb)
{
	volatile struct vmm_identity *identity = (void *)(uintptr_t)PAYLOAD_IDENTITY;
	uint64_t id = identity->id, rng = seed(identity->seed ^ mb->seed ^ mb->index), i;

	for (;;) {
		if (identity->id != id) {
			mb->ancestor[mb->ancestors % PAYLOAD_ANCESTORS].id = id;
			mb->ancestor[mb->ancestors % PAYLOAD_ANCESTORS].generation = mb->count;
			mb->ancestors++;
			mb->reseeded++;
			id = identity->id;
			rng = seed(identity->seed ^ mb->seed ^ mb->index);
		}
		if (mb->stop)
			stamp_stopped(mb, id);
		i = below(&rng, mb->pages);
		verify(mb, i, id);
		stamp_page(mb, i, id);
	}
}

/* -- rounds ------------------------------------------------------------------------------------ */

GUEST void guest_memory(struct payload_mailbox *mb, char *ram)
{
	uint64_t n = mb->pages * LINES, rng = seed(mb->seed), sum = 0, line = 0, i, was;
	char *base = ram + mb->base;
	bool random = mb->mode == PAYLOAD_RANDOM;

	mb->tsc_begin = ticks_now();
	for (i = 0; i < mb->iterations; i++) {
		if (random)
			line = below(&rng, n);
		was = LOAD(base + line * 64);
		sum = (sum << 1 | sum >> 63) + was;
		STORE(base + line * 64, was + i + 1);
		if (!random && ++line == n)
			line = 0;
	}
	mb->tsc_end = ticks_now();
	mb->checksum = sum;
	mb->count = i;
}

GUEST void guest_dirty(struct payload_mailbox *mb, char *ram)
{
	uint64_t rng = seed(mb->seed), i, page;

	mb->tsc_begin = ticks_now();
	for (i = 0; i < mb->iterations; i++) {
		page = mb->base / PAGE + below(&rng, mb->pages);
		STORE(ram + page * PAGE + i % WORDS * 8, mb->go << 32 | (i + 1));
		if (mb->log)
			STORE(ram + mb->log + i * 8, page);
	}
	mb->tsc_end = ticks_now();
	mb->count = i;
}

GUEST void guest_touch(struct payload_mailbox *mb, char *ram)
{
	uint64_t sum = 0, i, at;

	mb->tsc_begin = ticks_now();
	for (i = 0; i < mb->pages; i++) {
		at = mb->base + i * PAGE;
		if (mb->mode & PAYLOAD_READ)
			sum = (sum << 1 | sum >> 63) + LOAD(ram + at);
		if (mb->mode & PAYLOAD_WRITE)
			STORE(ram + at, mix(at ^ mb->seed));
	}
	mb->tsc_end = ticks_now();
	mb->checksum = sum;
	mb->count = i;
}

GUEST static void hypercall(struct payload_mailbox *mb)
{
	uint64_t sum = 0, i;

	mb->tsc_begin = ticks_now();
	for (i = 0; i < mb->iterations; i++) {
		if (mb->mode == PAYLOAD_OUT)
			out(PAYLOAD_PORT_VALUE, (uint32_t)(mb->seed + i));
		else if (mb->mode == PAYLOAD_IN)
			sum += in(PAYLOAD_PORT_VALUE);
		else if (mb->mode == PAYLOAD_MMIO_WRITE)
			STORE(mb->base, mb->seed + i);
		else
			sum += LOAD(mb->base);
	}
	mb->tsc_end = ticks_now();
	mb->checksum = sum;
	mb->count = i;
}

GUEST static void work(struct payload_mailbox *mb, char *ram)
{
	if (mb->program == PAYLOAD_MEMORY)
		guest_memory(mb, ram);
	else if (mb->program == PAYLOAD_DIRTY)
		guest_dirty(mb, ram);
	else if (mb->program == PAYLOAD_TOUCH)
		guest_touch(mb, ram);
	else if (mb->program == PAYLOAD_HYPERCALL)
		hypercall(mb);
	else
		mb->errors++;
}

/* P1 */
GUEST static void rounds(struct payload_mailbox *mb, char *ram)
{
	volatile struct payload_mailbox *v = mb;
	uint64_t go;

	for (;;) {
		while (v->stop)
			out(PAYLOAD_PORT_STOP, (uint32_t)v->errors);
		go = v->go;
		if (go != v->done) {
			work(mb, ram);
			v->done = go;
		}
		out(PAYLOAD_PORT_DONE, (uint32_t)go);
	}
}

/* -- ticks ---------------------------------------------------------------------------------------- */

GUEST static void burst(volatile struct payload_mailbox *mb)
{
	uint64_t i, before, now, slowest = 0;

	mb->tsc_begin = before = ticks_now();
	for (i = 0; i < mb->iterations; i++) {
		STORE(mb->base + i * PAGE, before);
		now = ticks_now();
		if (now - before > slowest)
			slowest = now - before;
		before = now;
	}
	mb->tsc_end = before;
	mb->slowest = slowest;
	mb->done = mb->go;
}

GUEST static void ticks(volatile struct payload_mailbox *mb)
{
	volatile struct vmm_identity *identity = (void *)(uintptr_t)PAYLOAD_IDENTITY;
	uint64_t id = identity->id, before = ticks_now(), now;

	for (;;) {
		now = ticks_now();
		if (identity->id != id) { /* the time in which a clone came to be is no gap of it */
			id = identity->id;
			mb->reseeded++;
			mb->longest = 0;
		} else if (now - before > mb->longest)
			mb->longest = now - before;
		mb->count++;
		before = now;
		if (mb->go != mb->done) {
			burst(mb);
			before = ticks_now();
		}
		if (mb->stop) {
			out(PAYLOAD_PORT_STOP, 0);
			before = ticks_now();
		}
	}
}

GUEST void guest_main(struct payload_mailbox *mb, char *ram)
{
	if (mb->program == PAYLOAD_STAMP)
		stamp(mb);
	if (mb->program == PAYLOAD_TICKS)
		ticks(mb);
	rounds(mb, ram);
}
