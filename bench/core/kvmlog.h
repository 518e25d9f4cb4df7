/* SPDX-License-Identifier: MIT */
/* KVM's dirty log, for dirty.c. See kvmlog.c. */
#ifndef KAGE_BENCH_KVMLOG_H
#define KAGE_BENCH_KVMLOG_H

#include "core.h"

struct kvmlog {
	int kvm, vm;
	char *p;
	uint64_t bytes;
	uint64_t *bitmap;
	bool manual; /* KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
};

/* A VM with one slot that is logged. NULL, or why there is none; nothing is left then. */
const char *kvmlog_create(struct kvmlog *k, uint64_t bytes);
void kvmlog_destroy(struct kvmlog *k);
/* Every page is dirty (with `manual`), as after a first harvest of a guest that wrote to all of it. */
void kvmlog_fill(struct kvmlog *k);
/* Takes what is dirty; the number of pages. */
uint64_t kvmlog_take(struct kvmlog *k, double *ns);

#endif
