/* SPDX-License-Identifier: MIT */
/*
 * KAGE_KVM_SHORT: the short form of the KVM suites, for emulated machines. It repeats less, and less often what one
 * repetition shows as well; what is asserted is the same.
 */
#ifndef KAGE_TESTS_SHORT_H
#define KAGE_TESTS_SHORT_H

#include "../model/rng.h"

static inline unsigned times(unsigned n, unsigned brief)
{
	return env_number("KAGE_KVM_SHORT", 0) ? brief : n;
}

#endif
