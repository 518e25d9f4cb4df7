/* SPDX-License-Identifier: MIT */
/* See statistics.h. */
#include <math.h>
#include <stdlib.h>

#include "statistics.h"

#define CROPS	  100
#define CROP_LEAST 1000 /* of each sample: a cropping that leaves less says nothing */

static int order(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

void sample_sort(struct sample *s)
{
	qsort(s->x, s->n, sizeof(*s->x), order);
}

struct moments {
	double mean, variance;
};

/* Two passes: values are large compared with what they differ by. */
static struct moments moments(const double *x, size_t n)
{
	struct moments m = {0, 0};

	for (size_t i = 0; i < n; i++)
		m.mean += x[i];
	m.mean /= (double)n;
	for (size_t i = 0; i < n; i++)
		m.variance += (x[i] - m.mean) * (x[i] - m.mean);
	m.variance /= (double)(n - 1);
	return m;
}

double welch_t(const struct sample *a, const struct sample *b)
{
	struct moments ma, mb;
	double error;

	if (a->n < 2 || b->n < 2)
		return 0;
	ma = moments(a->x, a->n);
	mb = moments(b->x, b->n);
	error = sqrt(ma.variance / (double)a->n + mb.variance / (double)b->n);
	if (error == 0)
		return ma.mean == mb.mean ? 0 : ma.mean > mb.mean ? HUGE_VAL : -HUGE_VAL;
	return (ma.mean - mb.mean) / error;
}

/* Values up to `most`, of a sorted sample. */
static struct sample below(const struct sample *s, double most)
{
	size_t low = 0, high = s->n;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (s->x[middle] <= most)
			low = middle + 1;
		else
			high = middle;
	}
	return (struct sample){s->x, low};
}

/* The value that a share of both samples together does not exceed. */
static double quantile(const struct sample *a, const struct sample *b, double share)
{
	size_t want = (size_t)(share * (double)(a->n + b->n)), i = 0, j = 0;
	double at = -HUGE_VAL;

	while (i + j < want) {
		if (j >= b->n || (i < a->n && a->x[i] <= b->x[j]))
			at = a->x[i++];
		else
			at = b->x[j++];
	}
	return at;
}

double welch_t_cropped(const struct sample *a, const struct sample *b)
{
	double worst = welch_t(a, b);

	for (unsigned i = 0; i < CROPS; i++) {
		double most = quantile(a, b, 1 - pow(0.5, 10.0 * (i + 1) / CROPS));
		struct sample ca = below(a, most), cb = below(b, most);
		double t;

		if (ca.n < CROP_LEAST || cb.n < CROP_LEAST)
			continue;
		t = welch_t(&ca, &cb);
		if (fabs(t) > fabs(worst))
			worst = t;
	}
	return worst;
}

double ks_distance(const struct sample *a, const struct sample *b)
{
	double worst = 0;
	size_t i = 0, j = 0;

	while (i < a->n && j < b->n) {
		double x = fmin(a->x[i], b->x[j]), d;

		while (i < a->n && a->x[i] <= x)
			i++;
		while (j < b->n && b->x[j] <= x)
			j++;
		d = fabs((double)i / (double)a->n - (double)j / (double)b->n);
		if (d > worst)
			worst = d;
	}
	return worst;
}

double ks_probability(double d, size_t na, size_t nb)
{
	double n = sqrt((double)na * (double)nb / (double)(na + nb));
	double lambda = (n + 0.12 + 0.11 / n) * d, sum = 0, sign = 1;

	if (lambda < 0.3)
		return 1; /* to nine places; the series converges too slowly */
	for (unsigned k = 1; k <= 100; k++, sign = -sign)
		sum += sign * exp(-2.0 * k * k * lambda * lambda);
	return fmin(fmax(2 * sum, 0), 1);
}
