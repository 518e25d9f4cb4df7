/* SPDX-License-Identifier: MIT */
/*
 * Guests: the public calls of kage/vm.h. Arguments are checked here; the work is
 * done in mm/. What several layers must hear of (a write by the VMM may change
 * guest tables and code) is put together here.
 */
#include <sys/uio.h>

#include <kage/kage.h>
#include "api/engine.h"
#include "api/vm.h"
#include "mm/region.h"
#include "shadow/shadow.h"

static int vm_config(struct kage_vm_config *c, const struct kage_vm_config *config)
{
	int r = config ? config_check(config, sizeof(*c), sizeof(*c)) : 0;

	if (r)
		return r;
	config_copy(c, config, sizeof(*c));
	if (c->merge_domain > UINT16_MAX || c->flags || (c->levels && (c->levels < 2 || c->levels > PT_MAX_LEVELS)))
		return -EINVAL;
	return 0;
}

static struct kage_vm *vm_alloc(struct kage_engine *e)
{
	struct kage_vm *vm = env_alloc(&e->env, sizeof(*vm));

	if (vm) {
		vm->engine = e;
		vm->mm.owner = vm;
		lock_init(&vm->shadow_lock, RANK_NONE, 0);
		atomic_fetch_add(&e->guests, 1);
	}
	return vm;
}

static void vm_free(struct kage_vm *vm)
{
	struct kage_engine *e = vm->engine;

	atomic_fetch_sub(&e->guests, 1);
	env_free(&e->env, vm, sizeof(*vm));
}

int kage_vm_create(struct kage_engine *e, const struct kage_vm_config *config, struct kage_vm **out)
{
	struct kage_vm_config c;
	struct kage_vm *vm;
	int r;

	if (!e || !out)
		return -EINVAL;
	r = vm_config(&c, config);
	if (r)
		return r;
	vm = vm_alloc(e);
	if (!vm)
		return -ENOMEM;
	r = mm_create(&e->host, &vm->mm, c.merge_domain, c.levels ? c.levels : 2);
	if (r) {
		vm_free(vm);
		return r;
	}
	*out = vm;
	return KAGE_OK;
}

int kage_vm_clone(struct kage_vm *parent, const struct kage_vm_config *config, struct kage_vm **out)
{
	struct kage_vm_config c;
	struct kage_vm *vm;
	int r;

	if (!parent || !out)
		return -EINVAL;
	r = vm_config(&c, config);
	if (r)
		return r;
	if (c.merge_domain && c.merge_domain != parent->mm.domain)
		return -EINVAL;
	vm = vm_alloc(parent->engine);
	if (!vm)
		return -ENOMEM;
	r = mm_clone(&parent->mm, &vm->mm);
	if (r) {
		vm_free(vm);
		return r;
	}
	*out = vm;
	return KAGE_OK;
}

int kage_vm_destroy(struct kage_vm *vm)
{
	struct kage_engine *e;
	int r;

	if (!vm)
		return KAGE_OK;
	e = vm->engine;
	if (atomic_load(&vm->vcpus) || atomic_load(&vm->logs))
		return -EBUSY;
	if (mm_busy(&vm->mm))
		return -EBUSY;
	merge_forget(&e->merge, &vm->mm);
	r = mm_destroy(&vm->mm);
	if (r) {
		vm->mm.leaving = false;
		return r;
	}
	vm_free(vm);
	engine_settle(e);
	return KAGE_OK;
}

/* A page-aligned, non-empty range within the guest physical space. */
static int range_check(const struct kage_vm *vm, uint64_t gpa, uint64_t len)
{
	if (!vm || !len || (gpa | len) & (PAGE_SIZE - 1) || gpa >= (uint64_t)1 << KAGE_GPA_BITS ||
	    len > ((uint64_t)1 << KAGE_GPA_BITS) - gpa)
		return -EINVAL;
	return 0;
}

/* Any range of bytes. */
static int bytes_check(const struct kage_vm *vm, const void *buf, uint64_t len)
{
	return vm && (buf || !len) ? 0 : -EINVAL;
}

int kage_vm_map(struct kage_vm *vm, const struct kage_region *region)
{
	struct kage_region c;
	int r;

	if (!vm || !region)
		return -EINVAL;
	r = config_check(region, sizeof(c), sizeof(c));
	if (r)
		return r;
	config_copy(&c, region, sizeof(c));
	r = mm_map(&vm->mm, &c);
	if (!r)
		engine_settle(vm->engine);
	return r;
}

int kage_vm_unmap(struct kage_vm *vm, uint64_t gpa, uint64_t len)
{
	int r = range_check(vm, gpa, len);

	if (!r)
		r = mm_unmap(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT);
	if (!r)
		engine_settle(vm->engine);
	return r;
}

int kage_vm_protect(struct kage_vm *vm, uint64_t gpa, uint64_t len, uint32_t prot)
{
	int r = range_check(vm, gpa, len);

	if (!r)
		r = mm_protect(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT, prot);
	if (!r)
		engine_settle(vm->engine);
	return r;
}

int kage_vm_advise(struct kage_vm *vm, uint64_t gpa, uint64_t len, enum kage_advice advice)
{
	int r = range_check(vm, gpa, len);

	if (!r)
		r = mm_advise(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT, advice);
	if (!r)
		engine_settle(vm->engine);
	return r;
}

int kage_vm_read(struct kage_vm *vm, uint64_t gpa, void *buf, size_t len)
{
	int r = bytes_check(vm, buf, len);

	if (r)
		return r;
	if (len && (gpa >= (uint64_t)1 << KAGE_GPA_BITS || len > ((uint64_t)1 << KAGE_GPA_BITS) - gpa))
		return KAGE_MMIO;
	return mm_read(&vm->mm, GPA(gpa), buf, len);
}

static void vm_written(void *arg, gpa_t gpa, size_t len)
{
	struct kage_vm *vm = arg;
	struct shadow *s = atomic_load(&vm->shadow);

	if (s)
		shadow_written(s, gpa, len);
}

int kage_vm_write(struct kage_vm *vm, uint64_t gpa, const void *buf, size_t len)
{
	int r = bytes_check(vm, buf, len);

	if (r)
		return r;
	if (len && (gpa >= (uint64_t)1 << KAGE_GPA_BITS || len > ((uint64_t)1 << KAGE_GPA_BITS) - gpa))
		return KAGE_MMIO;
	if (len && atomic_load(&vm->shadow))
		vm_written(vm, GPA(gpa), len); /* who translated code from these pages hears of it before they change */
	return mm_write(&vm->mm, GPA(gpa), buf, len, vm_written, vm);
}

int kage_vm_pin(struct kage_vm *vm, uint64_t gpa, uint64_t len, uint32_t flags, struct iovec *iov, unsigned *n)
{
	int r = range_check(vm, gpa, len);

	if (!r && (flags || !n || (*n && !iov)))
		r = -EINVAL;
	return r ? r : mm_pin(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT, iov, n);
}

int kage_vm_unpin(struct kage_vm *vm, uint64_t gpa, uint64_t len)
{
	int r = range_check(vm, gpa, len);

	return r ? r : mm_unpin(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT);
}

int kage_vm_mark_dirty(struct kage_vm *vm, uint64_t gpa, uint64_t len)
{
	gfn_t gfn = GFN(gpa >> PAGE_SHIFT), end;

	if (!vm || gpa >= (uint64_t)1 << KAGE_GPA_BITS || len > ((uint64_t)1 << KAGE_GPA_BITS) - gpa)
		return -EINVAL;
	if (!len)
		return KAGE_OK;
	end = GFN(((gpa + len - 1) >> PAGE_SHIFT) + 1);
	mm_mark_regions(&vm->mm, gfn, end);
	vm_written(vm, GPA(gpa), len);
	return KAGE_OK;
}
