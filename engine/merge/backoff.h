/* SPDX-License-Identifier: MIT */
/*
 * Pages that change too fast are left alone, for exponentially longer.
 *
 * A page is tried when it has been quiet for a pass: it is read, and perhaps
 * merged. The try fails if the page is written before it comes to that, or in the pass
 * after: reading it was for nothing, or merging it has cost a COW break. (Not if nothing was left to do for that
 * pass: then nobody knows how long it took, and work is no burden.) After the k-th failure on end it is left alone for 2^(k-1) passes, at most `most`. A try
 * that lasts sets k back to 0. A page that cannot be merged because a clone that sees it too is not mergeable has failed as
 * well: nobody says when that ends. (KSM's smart scan skips at most 8 scans, and only counts how
 * old a page is: https://docs.kernel.org/admin-guide/mm/ksm.html)
 *
 *   struct backoff   2 MiB with pages whose k is not 0: allocated at the first failure, freed after the last success
 *
 * Invariants:
 *  K1  `level` of a page is its k, as far as it matters for `most`. `failed` counts the pages with k > 0.
 *  K2  a page in `off` comes back in pass `until`, mod 256: `most` is at most BACKOFF_MOST, and whoever has
 *      such a group asks in every pass.
 *
 * Locks: the caller's, who has the chunk.
 */
#ifndef KAGE_MERGE_BACKOFF_H
#define KAGE_MERGE_BACKOFF_H

#include "base/addr.h"
#include "base/env.h"

#define BACKOFF_WORDS (BLOCK_PAGES / 64)
#define BACKOFF_MOST 100u /* passes */
#define BACKOFF_DEFAULT 64u

struct backoff {
	uint32_t failed;
	uint64_t off[BACKOFF_WORDS];
	uint8_t level[BLOCK_PAGES];
	uint8_t until[BLOCK_PAGES];
};

/* Pages of a word that this pass leaves alone. `b` may be NULL. */
uint64_t backoff_stays(const struct backoff *b, unsigned word, uint64_t pass);
/* The same, when the pass comes to them. *back: those that the last one left alone, and this one does not. */
uint64_t backoff_off(struct backoff *b, unsigned word, uint64_t pass, uint64_t *back);
/* Tries that have failed in this pass. Without memory they are simply tried again. */
void backoff_failed(struct env *env, struct backoff **b, unsigned word, uint64_t pages, uint64_t pass, unsigned most);
/* Tries that have lasted. Frees *b if nothing is left to remember. */
void backoff_lasted(struct env *env, struct backoff **b, unsigned word, uint64_t pages);

#endif
