/* SPDX-License-Identifier: MIT */
/*
 * What runs in the guest, compiled as tests/vmm/guest.c is: it needs nothing
 * outside of its section, and gpa = gva.
 */
#include "guest.h"

#define GUEST	  __attribute__((section("bench_guest")))
#define INLINE	  static inline __attribute__((always_inline))
#define PAGE	  4096
#define LINES	  64
#define PLACE(at) (*(volatile uint64_t *)(at))

INLINE void out(uint16_t port, uint32_t value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "d"(port) : "memory");
}

INLINE uint64_t rdtsc(void)
{
	uint32_t lo, hi;

	__asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi) : : "memory");
	return (uint64_t)hi << 32 | lo;
}

/* xorshift64 (Marsaglia, 2003). */
INLINE uint64_t next(uint64_t *rng)
{
	*rng ^= *rng << 13;
	*rng ^= *rng >> 7;
	*rng ^= *rng << 17;
	return *rng;
}

INLINE uint64_t below(uint64_t *rng, uint64_t n)
{
	return (uint64_t)(((unsigned __int128)next(rng) * n) >> 64);
}

INLINE int kept(uint64_t page, uint64_t keep)
{
	return keep && !(page & keep);
}

INLINE void write_line(uint64_t base, uint64_t line, uint64_t keep, uint64_t value)
{
	uint64_t page = line / LINES;

	page += kept(page, keep);
	PLACE(base + page * PAGE + line % LINES * 64) = value;
}

GUEST static void mixed(volatile struct guest_args *a)
{
	uint64_t rng = guest_mix(a->seed + 0x9e3779b97f4a7c15) | 1, sum = 0, i;
	uint64_t base = a->base, lines = a->pages * LINES, writes = a->write_pages * LINES, keep = a->keep;
	uint64_t n = a->iterations, log = a->log, mask = a->log_len - 1;

	for (i = 0; i < n; i++) {
		sum = (sum << 1 | sum >> 63) + PLACE(base + below(&rng, lines) * 64);
		if (i % 8 == 0 && writes)
			write_line(base, below(&rng, writes), keep, i + rng);
		if (i % GUEST_LOG_STEP)
			continue;
		if (log)
			PLACE(log + (i / GUEST_LOG_STEP & mask) * 8) = rdtsc();
		if (a->stop)
			break;
		a->count = i;
	}
	a->checksum = sum;
	a->count = i;
}

GUEST static void touch(volatile struct guest_args *a)
{
	uint64_t sum = 0, n = 0, page, at;

	for (page = 0; page < a->pages; page += a->stride) {
		at = a->base + page * PAGE;
		if (kept(page, a->keep))
			continue;
		if (a->mode & GUEST_READ)
			sum = (sum << 1 | sum >> 63) + PLACE(at);
		if (a->mode & GUEST_WRITE)
			PLACE(at) = guest_word(guest_key(n, a->pair), a->seed);
		n++;
	}
	a->checksum = sum;
	a->count = n;
}

GUEST void guest_bench(struct guest_args *args)
{
	for (;;) {
		out(GUEST_PORT_BEGIN, 0);
		if (((volatile struct guest_args *)args)->program == GUEST_MIXED)
			mixed(args);
		else
			touch(args);
		out(GUEST_PORT_END, 0);
	}
}
