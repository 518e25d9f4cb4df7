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
#include "mm/mirror.h"
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

static void vm_begin(struct kage_vm *vm, struct kage_vm **out)
{
	merge_enter(&vm->engine->merge, &vm->mm);
	*out = vm;
}

static int vm_create(struct kage_engine *e, const struct kage_vm_config *config, struct kage_vm **out)
{
	struct kage_vm_config c;
	struct kage_vm *vm;
	int r = out ? vm_config(&c, config) : -EINVAL;

	if (r)
		return r;
	vm = vm_alloc(e);
	if (!vm)
		return -ENOMEM;
	r = mm_create(&e->host, &vm->mm, c.merge_domain, c.levels ? c.levels : 2);
	if (r)
		vm_free(vm);
	else
		vm_begin(vm, out);
	return r;
}

int kage_vm_create(struct kage_engine *e, const struct kage_vm_config *config, struct kage_vm **out)
{
	return e ? api_result(e, __func__, 0, 0, vm_create(e, config, out)) : -EINVAL;
}

static int vm_clone(struct kage_vm *parent, const struct kage_vm_config *config, struct kage_vm **out)
{
	struct kage_vm_config c;
	struct kage_vm *vm;
	int r = out ? vm_config(&c, config) : -EINVAL;

	if (r)
		return r;
	if (c.merge_domain && c.merge_domain != parent->mm.domain)
		return -EINVAL;
	vm = vm_alloc(parent->engine);
	if (!vm)
		return -ENOMEM;
	r = mm_clone(&parent->mm, &vm->mm);
	if (r)
		vm_free(vm);
	else
		vm_begin(vm, out);
	return r;
}

int kage_vm_clone(struct kage_vm *parent, const struct kage_vm_config *config, struct kage_vm **out)
{
	return parent ? api_result(parent->engine, __func__, 0, 0, vm_clone(parent, config, out)) : -EINVAL;
}

static int vm_destroy(struct kage_vm *vm)
{
	int r;

	if (atomic_load(&vm->vcpus) || atomic_load(&vm->logs) || vm->mm.mirror || mm_busy(&vm->mm))
		return -EBUSY;
	merge_forget(&vm->engine->merge, &vm->mm);
	r = mm_destroy(&vm->mm);
	if (r)
		merge_enter(&vm->engine->merge, &vm->mm);
	else
		vm_free(vm);
	return r;
}

int kage_vm_destroy(struct kage_vm *vm)
{
	struct kage_engine *e = vm ? vm->engine : NULL;
	int r = vm ? vm_destroy(vm) : KAGE_OK;

	if (e && !r)
		engine_settle(e);
	return api_result(e, __func__, 0, 0, r);
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

/* The end of a call about a range: what it released is not left lying, what it refused is told. */
static int range_result(struct kage_vm *vm, const char *call, uint64_t gpa, uint64_t len, int r)
{
	if (!vm)
		return r;
	if (!r)
		engine_settle(vm->engine);
	return api_result(vm->engine, call, gpa, len, r);
}

/*
 * Slots of a KVM guest come and go with regions; KVM waits for vCPUs then, and one of them might wait for a page
 * that needs what the change holds. So the guest stands, if its VMM lets us make it.
 */
static int guest_stop(struct kage_vm *vm)
{
	return vm->mm.mirror ? vm->mm.mirror->ops->stop(vm->mm.mirror) : 0;
}

static void guest_go(struct kage_vm *vm)
{
	if (vm->mm.mirror)
		vm->mm.mirror->ops->go(vm->mm.mirror);
}

/* Memory that may be merged goes before what merging is at. Without memory for that it comes like all else. */
static void merge_first(struct kage_vm *vm, uint64_t gpa, uint64_t len)
{
	merge_hint(&vm->engine->merge, &vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT, false);
}

int kage_vm_map(struct kage_vm *vm, const struct kage_region *region)
{
	struct kage_region c = { .size = 0 };
	int r = vm && region ? config_check(region, sizeof(c), sizeof(c)) : -EINVAL;

	if (!r) {
		config_copy(&c, region, sizeof(c));
		r = guest_stop(vm);
	}
	if (!r) {
		r = mm_map(&vm->mm, &c);
		guest_go(vm);
	}
	if (!r && c.flags & KAGE_REGION_MERGEABLE)
		merge_first(vm, c.gpa, c.len);
	return range_result(vm, __func__, c.gpa, c.len, r);
}

int kage_vm_unmap(struct kage_vm *vm, uint64_t gpa, uint64_t len)
{
	int r = range_check(vm, gpa, len);

	if (!r)
		r = guest_stop(vm);
	if (!r) {
		r = mm_unmap(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT);
		guest_go(vm);
	}
	return range_result(vm, __func__, gpa, len, r);
}

int kage_vm_protect(struct kage_vm *vm, uint64_t gpa, uint64_t len, uint32_t prot)
{
	int r = range_check(vm, gpa, len);

	if (!r)
		r = guest_stop(vm);
	if (!r) {
		r = mm_protect(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT, prot);
		guest_go(vm);
	}
	return range_result(vm, __func__, gpa, len, r);
}

int kage_vm_advise(struct kage_vm *vm, uint64_t gpa, uint64_t len, enum kage_advice advice)
{
	int r = range_check(vm, gpa, len);

	if (!r)
		r = mm_advise(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT, advice);
	if (!r && advice == KAGE_ADVICE_MERGEABLE)
		merge_first(vm, gpa, len);
	if (!r && advice == KAGE_ADVICE_MERGE_FIRST)
		r = merge_hint(&vm->engine->merge, &vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT, true);
	if (!r && advice == KAGE_ADVICE_DISCARD && vm->mm.mirror)
		engine_refill(vm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT);
	return range_result(vm, __func__, gpa, len, r);
}

static bool beyond_memory(uint64_t gpa, uint64_t len)
{
	return len && (gpa >= (uint64_t)1 << KAGE_GPA_BITS || len > ((uint64_t)1 << KAGE_GPA_BITS) - gpa);
}

int kage_vm_read(struct kage_vm *vm, uint64_t gpa, void *buf, size_t len)
{
	int r = bytes_check(vm, buf, len);

	if (!r)
		r = beyond_memory(gpa, len) ? KAGE_MMIO : mm_read(&vm->mm, GPA(gpa), buf, len);
	return api_result(vm ? vm->engine : NULL, __func__, gpa, len, r);
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
	struct shadow *s = vm ? atomic_load(&vm->shadow) : NULL;

	if (!r && beyond_memory(gpa, len))
		return KAGE_MMIO;
	if (!r)
		r = engine_entered(vm->engine);
	if (!r && len)
		vm_written(vm, GPA(gpa), len); /* who translated code from these pages hears of it before they change */
	if (s)
		shadow_write_begin(s);
	if (!r)
		r = mm_write(&vm->mm, GPA(gpa), buf, len, vm_written, vm);
	if (s)
		shadow_write_end(s);
	return api_result(vm ? vm->engine : NULL, __func__, gpa, len, r);
}

int kage_vm_pin(struct kage_vm *vm, uint64_t gpa, uint64_t len, uint32_t flags, struct iovec *iov, unsigned *n)
{
	int r = range_check(vm, gpa, len);

	if (!r && (flags || !n || (*n && !iov)))
		r = -EINVAL;
	if (!r)
		r = engine_entered(vm->engine);
	if (!r)
		r = mm_pin(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT, iov, n);
	return range_result(vm, __func__, gpa, len, r);
}

int kage_vm_unpin(struct kage_vm *vm, uint64_t gpa, uint64_t len)
{
	int r = range_check(vm, gpa, len);

	if (!r)
		r = mm_unpin(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT);
	return range_result(vm, __func__, gpa, len, r);
}

int kage_vm_mark_dirty(struct kage_vm *vm, uint64_t gpa, uint64_t len)
{
	gfn_t gfn = GFN(gpa >> PAGE_SHIFT);

	if (!vm || gpa >= (uint64_t)1 << KAGE_GPA_BITS || beyond_memory(gpa, len))
		return api_result(vm ? vm->engine : NULL, __func__, gpa, len, -EINVAL);
	if (len) {
		mm_mark_regions(&vm->mm, gfn, GFN(((gpa + len - 1) >> PAGE_SHIFT) + 1));
		vm_written(vm, GPA(gpa), len);
	}
	return KAGE_OK;
}
