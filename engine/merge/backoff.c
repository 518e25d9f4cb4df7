/* SPDX-License-Identifier: MIT */
/*
 * Exponential back-off for pages that change too fast. See backoff.h.
 */
#include "merge/backoff.h"

#define LEVEL_MAX 8 /* 2^7 passes are more than BACKOFF_MOST */
_Static_assert((1u << (LEVEL_MAX - 1)) > BACKOFF_MOST && BACKOFF_MOST < 127, "a level says enough, and pass numbers mod 256 too");

uint64_t backoff_stays(const struct backoff *b, unsigned word, uint64_t pass)
{
	uint64_t off = b ? b->off[word] : 0;

	for (uint64_t bits = off; bits; bits &= bits - 1) {
		unsigned i = (unsigned)__builtin_ctzll(bits);

		if ((int8_t)((uint8_t)pass - b->until[word * 64 + i]) >= 0)
			off &= ~((uint64_t)1 << i);
	}
	return off;
}

uint64_t backoff_off(struct backoff *b, unsigned word, uint64_t pass, uint64_t *back)
{
	uint64_t before = b ? b->off[word] : 0, off = backoff_stays(b, word, pass);

	*back = before & ~off;
	if (*back)
		b->off[word] = off;
	return off;
}

void backoff_failed(struct env *env, struct backoff **b, unsigned word, uint64_t pages, uint64_t pass, unsigned most)
{
	if (pages && !*b)
		*b = env_alloc(env, sizeof(**b));
	if (!*b)
		return;
	for (; pages; pages &= pages - 1) {
		unsigned i = word * 64 + (unsigned)__builtin_ctzll(pages);
		uint8_t *level = &(*b)->level[i];
		unsigned passes = MIN(1u << *level, most);

		(*b)->failed += *level == 0;
		*level = MIN(*level + 1, LEVEL_MAX - 1);
		(*b)->until[i] = (uint8_t)(pass + 1 + passes);
		(*b)->off[word] |= (uint64_t)1 << (i % 64);
	}
}

void backoff_lasted(struct env *env, struct backoff **b, unsigned word, uint64_t pages)
{
	if (!*b)
		return;
	for (; pages; pages &= pages - 1) {
		unsigned bit = (unsigned)__builtin_ctzll(pages);
		uint8_t *level = &(*b)->level[word * 64 + bit];

		(*b)->failed -= *level != 0;
		*level = 0;
		(*b)->off[word] &= ~((uint64_t)1 << bit);
	}
	if ((*b)->failed == 0) {
		env_free(env, *b, sizeof(**b));
		*b = NULL;
	}
}
