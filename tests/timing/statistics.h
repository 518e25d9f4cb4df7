/* SPDX-License-Identifier: MIT */
/*
 * Do two samples come from one distribution? Two answers:
 *
 *  - Welch's t: do the means differ? Asked of the samples whole and of a hundred
 *    croppings of them, as a machine's interrupts and other people's work make
 *    upper tails so heavy that they hide a mean (O. Reparaz, J. Balasch,
 *    I. Verbauwhede, "Dude, is my code constant time?", DATE 2017). |t| >= 4.5 is
 *    what leakage assessment calls a difference (G. Goodwill et al., "A testing methodology for
 *    side-channel resistance validation", NIAT 2011): one case in 150,000 of equal means.
 *  - Kolmogorov and Smirnov's D: do the distributions differ anywhere? With the
 *    probability of a D as large as this one if they do not.
 */
#ifndef KAGE_TESTS_STATISTICS_H
#define KAGE_TESTS_STATISTICS_H

#include <stddef.h>

struct sample {
	double *x;
	size_t n;
};

/* In place, ascending. */
void sample_sort(struct sample *s);
/* Of the whole samples; 0 if one has less than two values, or none varies and the means are equal. */
double welch_t(const struct sample *a, const struct sample *b);
/* The t of largest size among the whole samples and croppings of both at common percentiles. Sorted samples. */
double welch_t_cropped(const struct sample *a, const struct sample *b);
/* Largest distance of the empirical distributions. Sorted samples. */
double ks_distance(const struct sample *a, const struct sample *b);
/* P(D' >= d) of samples of these sizes from one distribution, asymptotically (Stephens 1970). */
double ks_probability(double d, size_t na, size_t nb);

#endif
