/* SPDX-License-Identifier: MIT */
/*
 * The public calls of kage/notifier.h and kage/backend.h that name a guest; the
 * others are exported where they are implemented.
 */
#include <kage/backend.h>
#include <kage/notifier.h>
#include "api/vm.h"

_Static_assert(sizeof(struct notify_reader) <= sizeof(struct kage_reader), "a public reader holds the engine's");

/* A public reader is the engine's reader, with its guest. */
struct reader {
	struct notify_reader r;
	struct kage_vm *vm;
};
_Static_assert(sizeof(struct reader) <= sizeof(struct kage_reader), "with its guest");

static struct reader *reader_of(struct kage_reader *r)
{
	return (struct reader *)r;
}

static bool range_valid(uint64_t gpa, uint64_t len)
{
	return len && !((gpa | len) & (PAGE_SIZE - 1)) && gpa < (uint64_t)1 << KAGE_GPA_BITS &&
	       len <= ((uint64_t)1 << KAGE_GPA_BITS) - gpa;
}

int kage_notifier_register(struct kage_vm *vm, struct kage_notifier *n, const struct kage_notifier_ops *ops)
{
	return vm && n && ops ? notify_register(&vm->mm.notify, n, ops) : -EINVAL;
}

int kage_notifier_unregister(struct kage_notifier *n)
{
	return n ? notify_unregister(n) : -EINVAL;
}

int kage_interval_insert(struct kage_vm *vm, struct kage_interval *i)
{
	if (!vm || !i || !i->invalidate || i->end <= i->start || !range_valid(i->start, i->end - i->start))
		return -EINVAL;
	return notify_interval_insert(&vm->mm.notify, i);
}

int kage_interval_remove(struct kage_interval *i)
{
	return i ? notify_interval_remove(i) : -EINVAL;
}

int kage_reader_init(struct kage_vm *vm, struct kage_reader *r)
{
	int err;

	if (!vm || !r)
		return -EINVAL;
	memset(r, 0, sizeof(*r));
	err = notify_reader_attach(&vm->mm.notify, &reader_of(r)->r);
	if (!err)
		reader_of(r)->vm = vm;
	return err;
}

void kage_reader_finish(struct kage_reader *r)
{
	if (r && reader_of(r)->vm) {
		notify_reader_detach(&reader_of(r)->r);
		reader_of(r)->vm = NULL;
	}
}

void kage_reader_begin(struct kage_reader *r, uint64_t gpa, uint64_t len)
{
	notify_read_begin(&reader_of(r)->r, GFN(gpa >> PAGE_SHIFT), GFN((gpa + len) >> PAGE_SHIFT));
}

bool kage_reader_valid(struct kage_reader *r)
{
	return notify_read_valid(&reader_of(r)->r);
}

void kage_reader_end(struct kage_reader *r)
{
	notify_read_end(&reader_of(r)->r);
}

bool kage_reader_hold(struct kage_reader *r)
{
	return notify_read_hold(&reader_of(r)->r);
}

int kage_backend_fault(struct kage_vm *vm, struct kage_reader *r, uint64_t gpa, uint32_t access, struct kage_page *page)
{
	struct mm_fault f;
	uint64_t span;
	int err;

	if (!vm || !r || !page || reader_of(r)->vm != vm || access & ~KAGE_RWX || !access ||
	    gpa >= (uint64_t)1 << KAGE_GPA_BITS)
		return -EINVAL;
	f = (struct mm_fault){ .gfn = GFN(gpa >> PAGE_SHIFT), .access = access, .reader = &reader_of(r)->r };
	err = mm_fault(&vm->mm, &f);
	if (err)
		return err;
	/* with a dirty log open, writing is granted only page by page, to whom asked for it */
	if (mm_dirty_logged(&vm->mm)) {
		mm_mark_accessed(&vm->mm, f.gfn, 1);
		f.level = 0;
		if (!(access & KAGE_WRITE))
			f.prot &= ~(uint32_t)KAGE_WRITE;
	}
	span = level_pages(f.level) << PAGE_SHIFT;
	*page = (struct kage_page){
		.hva = pfn_hva(vm->mm.host->pool, f.pfn), .gpa = ALIGN_DOWN(gpa, span), .len = span, .prot = f.prot,
	};
	return KAGE_OK;
}
