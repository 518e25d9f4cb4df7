/* SPDX-License-Identifier: MIT */
/*
 * The public calls of kage/dirty.h.
 */
#include <limits.h>

#include <kage/dirty.h>
#include "api/engine.h"
#include "api/vm.h"
#include "mm/dirty.h"

struct kage_dirty {
	struct kage_vm *vm;
	struct dirty_log *log;
	uint32_t format;
};

static int log_open(struct kage_vm *vm, const struct kage_dirty_config *config, struct kage_dirty **out)
{
	struct kage_dirty_config c;
	struct kage_dirty *d;
	int r;

	if (!out)
		return -EINVAL;
	r = config ? config_check(config, sizeof(c), sizeof(c)) : 0;
	if (r)
		return r;
	config_copy(&c, config, sizeof(c));
	if (c.kind > KAGE_DIRTY_ACCESSED || c.format > KAGE_DIRTY_RING ||
	    c.flags & ~(uint32_t)(KAGE_DIRTY_FINE | KAGE_DIRTY_INITIALLY_SET))
		return -EINVAL;
	d = env_alloc(&vm->engine->env, sizeof(*d));
	if (!d)
		return -ENOMEM;
	r = dirty_open(&vm->mm, c.kind, c.flags, &d->log);
	if (r) {
		env_free(&vm->engine->env, d, sizeof(*d));
		return r;
	}
	d->vm = vm;
	d->format = c.format;
	atomic_fetch_add(&vm->logs, 1);
	*out = d;
	return KAGE_OK;
}

int kage_dirty_open(struct kage_vm *vm, const struct kage_dirty_config *config, struct kage_dirty **out)
{
	return vm ? api_result(vm->engine, __func__, 0, 0, log_open(vm, config, out)) : -EINVAL;
}

int kage_dirty_collect(struct kage_dirty *d, uint64_t gpa, uint64_t len, void *buf, size_t bytes)
{
	uint64_t npages = len >> PAGE_SHIFT;
	gfn_t gfn = GFN(gpa >> PAGE_SHIFT);
	int64_t n;

	if (!d || !buf || !len || (gpa | len) & (PAGE_SIZE - 1) || gpa >= (uint64_t)1 << KAGE_GPA_BITS ||
	    len > ((uint64_t)1 << KAGE_GPA_BITS) - gpa || (uintptr_t)buf % 8)
		return -EINVAL;
	if (d->format == KAGE_DIRTY_BITMAP) {
		if (bytes < (npages + 63) / 64 * 8)
			return -EINVAL;
		n = dirty_collect_bitmap(d->log, gfn, npages, buf);
	} else {
		if (bytes < sizeof(struct kage_dirty_run))
			return -EINVAL;
		n = dirty_collect_runs(d->log, gfn, npages, buf, bytes / sizeof(struct kage_dirty_run));
	}
	return (int)MIN(n, INT_MAX);
}

void kage_dirty_close(struct kage_dirty *d)
{
	struct kage_vm *vm;

	if (!d)
		return;
	vm = d->vm;
	dirty_close(d->log);
	env_free(&vm->engine->env, d, sizeof(*d));
	atomic_fetch_sub(&vm->logs, 1);
	engine_settle(vm->engine);
}
