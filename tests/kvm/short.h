/* SPDX-License-Identifier: MIT */
/*
 * KAGE_KVM_SHORT: the short form of the KVM suites, for emulated machines. It repeats less, and less often what one
 * repetition shows as well; what is asserted of each is the same. Where each repetition is a case of its own, it does
 * some of them: which, in_short_from() says, others on each day. Nor does Check take note of each assertion that holds: that is
 * a system call, and there are millions.
 */
#ifndef KAGE_TESTS_SHORT_H
#define KAGE_TESTS_SHORT_H

#include <check.h>
#include <stdbool.h>
#include <stdio.h>

#include "../model/rng.h"

static inline bool in_short(void)
{
	static int known = -1;

	if (known < 0)
		known = env_number("KAGE_KVM_SHORT", 0) != 0;
	return known;
}

static inline unsigned times(unsigned n, unsigned brief)
{
	return in_short() ? brief : n;
}

/* Of cases in a row: the first one that is done, below `step`. */
static inline unsigned in_short_from(const char *what, unsigned step)
{
	uint64_t seed = seed_of_today();

	if (step <= 1)
		return 0;
	printf("%s: cases %u, %u and so on; these again: KAGE_KVM_SHORT=1 KAGE_SEED=%llu\n", what, (unsigned)(seed % step),
	       (unsigned)(seed % step) + step, (unsigned long long)seed);
	fflush(stdout);
	return (unsigned)(seed % step);
}

#undef ck_assert_msg
#define ck_assert_msg(expr, ...) ((expr) ? (in_short() ? (void)0 : mark_point()) : ck_abort_msg(__VA_ARGS__))
#undef ck_assert
#define ck_assert(expr) ck_assert_msg(expr, "Assertion '%s' failed", #expr)

#endif
