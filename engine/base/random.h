/* SPDX-License-Identifier: MIT */
/*
 * Numbers that a guest must not be able to guess: salts of hashes, choices of
 * frames. ChaCha20's block function (D. J. Bernstein, "ChaCha, a variant of
 * Salsa20", 2008; RFC 8439 section 2.3) under a key that the engine draws once
 * from getrandom(2), so nothing asks the kernel later on and a fixed key
 * repeats a run.
 *
 * Locks: none; a stream belongs to its owner's lock.
 */
#ifndef KAGE_BASE_RANDOM_H
#define KAGE_BASE_RANDOM_H

#include "base/base.h"

struct random_key {
	uint32_t word[8];
};

/* A stream of its own for each nonce of a key. */
struct random {
	struct random_key key;
	uint64_t nonce, counter;
	uint32_t word[16];
	unsigned left; /* words not handed out yet, at the end */
};

/* Key from a fixed seed, to repeat a run: no more secret than the seed is. */
struct random_key random_key_of(uint64_t seed);
/* 64 bytes of the key's stream `nonce`: words in the order of RFC 8439, 64 bits of counter and of nonce. */
void random_block(const struct random_key *key, uint64_t nonce, uint64_t counter, uint32_t out[16]);
/* 64 bits that depend on key and nonce alone; of a range of nonces that no stream uses. */
uint64_t random_of(const struct random_key *key, uint64_t nonce);

void random_init(struct random *r, const struct random_key *key, uint64_t nonce);
/* Uniform in [0, n), n > 0. */
uint32_t random_below(struct random *r, uint32_t n);

#endif
