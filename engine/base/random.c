/* SPDX-License-Identifier: MIT */
/*
 * ChaCha20 streams. See random.h.
 *
 * Why not getrandom(2) for each number: a system call for each break of a page,
 * and one more for a jailed VMM to allow. Why not a faster generator: who sees
 * many frame numbers could tell the next ones.
 */
#include "base/random.h"

#define ROUNDS 20
#define SINGLE ((uint64_t)1 << 63) /* nonces of random_of() */

static uint32_t rotate(uint32_t x, unsigned n)
{
	return x << n | x >> (32 - n);
}

static void quarter(uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d)
{
	*a += *b, *d = rotate(*d ^ *a, 16);
	*c += *d, *b = rotate(*b ^ *c, 12);
	*a += *b, *d = rotate(*d ^ *a, 8);
	*c += *d, *b = rotate(*b ^ *c, 7);
}

void random_block(const struct random_key *key, uint64_t nonce, uint64_t counter, uint32_t out[16])
{
	uint32_t in[16] = { 0x61707865, 0x3320646e, 0x79622d32, 0x6b206574 }, x[16];

	memcpy(&in[4], key->word, sizeof(key->word));
	in[12] = (uint32_t)counter;
	in[13] = (uint32_t)(counter >> 32);
	in[14] = (uint32_t)nonce;
	in[15] = (uint32_t)(nonce >> 32);
	memcpy(x, in, sizeof(x));
	for (unsigned i = 0; i < ROUNDS; i += 2) {
		for (unsigned c = 0; c < 4; c++)
			quarter(&x[c], &x[4 + c], &x[8 + c], &x[12 + c]);
		for (unsigned c = 0; c < 4; c++)
			quarter(&x[c], &x[4 + (c + 1) % 4], &x[8 + (c + 2) % 4], &x[12 + (c + 3) % 4]);
	}
	for (unsigned i = 0; i < 16; i++)
		out[i] = x[i] + in[i];
}

struct random_key random_key_of(uint64_t seed)
{
	struct random_key k = { { (uint32_t)seed, (uint32_t)(seed >> 32) } };

	return k;
}

uint64_t random_of(const struct random_key *key, uint64_t nonce)
{
	uint32_t block[16];

	random_block(key, nonce | SINGLE, 0, block);
	return block[0] | (uint64_t)block[1] << 32;
}

void random_init(struct random *r, const struct random_key *key, uint64_t nonce)
{
	*r = (struct random){ .key = *key, .nonce = nonce };
}

static uint32_t random_word(struct random *r)
{
	if (r->left == 0) {
		random_block(&r->key, r->nonce, r->counter++, r->word);
		r->left = ARRAY_SIZE(r->word);
	}
	return r->word[ARRAY_SIZE(r->word) - r->left--];
}

/* The high half of a product, without bias: D. Lemire, "Fast random integer generation in an interval", 2019. */
uint32_t random_below(struct random *r, uint32_t n)
{
	uint64_t m = (uint64_t)random_word(r) * n;

	if ((uint32_t)m < n) {
		uint32_t least = -n % n;

		while ((uint32_t)m < least)
			m = (uint64_t)random_word(r) * n;
	}
	return (uint32_t)(m >> 32);
}
