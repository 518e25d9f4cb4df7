/* SPDX-License-Identifier: MIT */
/*
 * KVM's dirty log of one slot: KVM_GET_DIRTY_LOG copies its bitmap out, and makes
 * it clean; with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 that is left to
 * KVM_CLEAR_DIRTY_LOG, and a new slot begins all dirty
 * (Documentation/virt/kvm/api.rst). No guest runs here, so no entries of KVM's
 * page tables have to be write protected: it is KVM's best.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvmlog.h"

#ifdef BENCH_KVM_HEADERS
#include <linux/kvm.h>

static void set_slot(struct kvmlog *k, uint64_t bytes)
{
	struct kvm_userspace_memory_region slot = {
	    .flags = KVM_MEM_LOG_DIRTY_PAGES, .memory_size = bytes, .userspace_addr = (uintptr_t)k->p};

	must(ioctl(k->vm, KVM_SET_USER_MEMORY_REGION, &slot) ? -errno : 0, "KVM slot");
}

const char *kvmlog_create(struct kvmlog *k, uint64_t bytes)
{
	struct kvm_enable_cap cap = {
	    .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
	    .args = {KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET}};

	*k = (struct kvmlog){.bytes = bytes, .kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), .vm = -1};
	if (k->kvm < 0)
		return "no /dev/kvm";
	k->vm = ioctl(k->kvm, KVM_CREATE_VM, 0);
	if (k->vm < 0) {
		close(k->kvm);
		return "/dev/kvm makes no VM";
	}
	k->manual = ioctl(k->vm, KVM_ENABLE_CAP, &cap) == 0;
	k->p = must_map(
	    mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
	    "mmap");
	k->bitmap = must_map(calloc(bytes / PAGE / 64 + 1, 8), "memory");
	set_slot(k, bytes);
	kvmlog_take(k, NULL);
	return NULL;
}

void kvmlog_destroy(struct kvmlog *k)
{
	close(k->vm);
	close(k->kvm);
	munmap(k->p, k->bytes);
	free(k->bitmap);
}

void kvmlog_fill(struct kvmlog *k)
{
	set_slot(k, 0);
	set_slot(k, k->bytes);
}

uint64_t kvmlog_take(struct kvmlog *k, double *ns)
{
	struct kvm_dirty_log get = {.dirty_bitmap = k->bitmap};
	struct kvm_clear_dirty_log clear = {.num_pages = (uint32_t)(k->bytes / PAGE),
					    .dirty_bitmap = k->bitmap};
	double begin = cpu_ns();
	uint64_t pages = 0;

	must(ioctl(k->vm, KVM_GET_DIRTY_LOG, &get) ? -errno : 0, "KVM_GET_DIRTY_LOG");
	if (k->manual)
		must(ioctl(k->vm, KVM_CLEAR_DIRTY_LOG, &clear) ? -errno : 0, "KVM_CLEAR_DIRTY_LOG");
	if (ns)
		*ns = cpu_ns() - begin;
	for (uint64_t i = 0; i < k->bytes / PAGE / 64; i++)
		pages += (uint64_t)__builtin_popcountll(k->bitmap[i]);
	return pages;
}

#else

const char *kvmlog_create(struct kvmlog *k, uint64_t bytes)
{
	return "built without KVM's headers";
}

void kvmlog_destroy(struct kvmlog *k)
{
}

void kvmlog_fill(struct kvmlog *k)
{
}

uint64_t kvmlog_take(struct kvmlog *k, double *ns)
{
	return 0;
}

#endif
