/* SPDX-License-Identifier: MIT */
/*
 * What the guest of a row runs: a page of arguments, two programs.
 *
 * structures
 *	guest_args	in guest memory, at GUEST_ARGS: parameters in, results out
 *
 * invariants
 *	1. The guest works in rounds: GUEST_PORT_BEGIN, the program, GUEST_PORT_END, where its
 *	   thread ends; when it is started again it reads the arguments anew.
 *	2. Of guest memory it writes the arguments, the log and pages of base .. base + pages, and a stack
 *	   frame of less than a page.
 */
#ifndef KAGE_BENCH_KVM_GUEST_H
#define KAGE_BENCH_KVM_GUEST_H

#include <stdint.h>

#define GUEST_CODE 0xa000 /* between page tables and mailboxes of payload.h; those are not used */
#define GUEST_ARGS 0x10000

enum guest_port {
	GUEST_PORT_BEGIN = 0x600,
	GUEST_PORT_END = 0x604,
};

enum guest_program {
	/*
	 * `iterations` reads of a random line of the pages. Every 8th time also a write to a random line of
	 * the first `write_pages` pages; the next page, if that is kept. Ends early when `stop` is set. If
	 * there is a log, the time of every 256th iteration goes there, round and round.
	 */
	GUEST_MIXED = 1,
	/* The first word of pages 0, stride, 2 * stride ... that are not kept is read, written, or both. */
	GUEST_TOUCH = 2,
};
#define GUEST_READ     1
#define GUEST_WRITE    2
#define GUEST_LOG_STEP 256

struct guest_args {
	uint64_t program;
	uint64_t base, pages;
	uint64_t keep; /* pages whose number has none of these bits set are kept; 0: none is */
	uint64_t iterations, seed, write_pages;
	uint64_t stride, mode, pair; /* TOUCH; pair: see guest_key() */
	uint64_t log, log_len;	     /* gpa; entries, a power of two */
	uint64_t stop;
	/* by the guest */
	uint64_t checksum, count;
};

/* The finaliser of splitmix64 (Steele, Lea, Flood, 2014). */
static inline __attribute__((always_inline)) uint64_t guest_mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

/* Touched page number i of a pass; two of them have the same key: 2^pair apart. */
static inline __attribute__((always_inline)) uint64_t guest_key(uint64_t i, uint64_t pair)
{
	return (i >> (pair + 1)) << pair | (i & (((uint64_t)1 << pair) - 1));
}

/* What TOUCH writes to a page. */
static inline __attribute__((always_inline)) uint64_t guest_word(uint64_t key, uint64_t seed)
{
	return guest_mix(key + guest_mix(seed + 0x9e3779b97f4a7c15));
}

/* The entry. Never returns. */
void guest_bench(struct guest_args *args);

#endif
