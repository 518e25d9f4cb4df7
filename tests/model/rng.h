/* SPDX-License-Identifier: MIT */
/*
 * A small repeatable random number generator for tests (xorshift64*, Vigna
 * 2016), and numbers from the environment.
 */
#ifndef KAGE_TESTS_RNG_H
#define KAGE_TESTS_RNG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

struct rng {
	uint64_t s;
};

static inline struct rng rng_seed(uint64_t seed)
{
	/* splitmix64's finish, so that neighbouring seeds differ in every bit */
	uint64_t z = seed + UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	z ^= z >> 31;
	return (struct rng){z ? z : 1};
}

static inline uint64_t rng_next(struct rng *r)
{
	r->s ^= r->s >> 12;
	r->s ^= r->s << 25;
	r->s ^= r->s >> 27;
	return r->s * UINT64_C(0x2545f4914f6cdd1d);
}

/* 0 to n - 1 */
static inline uint64_t rng_below(struct rng *r, uint64_t n)
{
	return (rng_next(r) >> 16) % n;
}

static inline bool rng_chance(struct rng *r, unsigned percent)
{
	return rng_below(r, 100) < percent;
}

static inline uint64_t env_number(const char *name, uint64_t otherwise)
{
	const char *s = getenv(name);

	return s != NULL && *s != '\0' ? strtoull(s, NULL, 0) : otherwise;
}

/* KAGE_SEED, or else the number of the day: runs of one day do the same. Who uses it prints it. */
static inline uint64_t seed_of_today(void)
{
	return env_number("KAGE_SEED", (uint64_t)time(NULL) / 86400);
}

#endif
