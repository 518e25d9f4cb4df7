/* SPDX-License-Identifier: MIT */
/* The kernel's ways to tell which pages were written, for dirty.c. See scan.c. */
#ifndef KAGE_BENCH_SCAN_H
#define KAGE_BENCH_SCAN_H

#include <pthread.h>

#include "core.h"

#define SCAN_REGIONS 65536

struct scan {
	char *p, *room;
	uint64_t bytes;
	int fd, uffd, pagemap, stop[2];
	void *vec;
	pthread_t thread;
	_Atomic uint64_t resolved; /* pages that the thread has been asked for */
};

/* Memory with every entry present and, if async, clean. NULL, or why it cannot be had; nothing is left then.
 */
const char *scan_create(struct scan *s, uint64_t bytes, bool async);
void scan_destroy(struct scan *s);
/* Which pages were written since the last time: their number; they are clean then. 0 or -errno. ns may be
 * NULL. */
int scan_take(struct scan *s, int64_t *pages, double *ns);
/* false: all pages are as after a write. */
void scan_protect(struct scan *s, bool protect);
/* Not async: a thread that lets every page be written to that is. */
void scan_resolver_start(struct scan *s);
void scan_resolver_stop(struct scan *s);

#endif
