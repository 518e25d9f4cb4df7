/* SPDX-License-Identifier: MIT */
/*
 * Guest memory of Kage: what a VMM author changes to have guests whose memory
 * is cloned, merged and shared.
 *
 *	at start	kage_vm_create(), kage_vm_map() for each region of RAM, KVM_CREATE_VM,
 *			kage_kvm_attach(); if anything traps, a thread that serves traps
 *	in KVM_RUN	-1: kage_kvm_run_failed(), run again on KAGE_RETRY
 *	devices		kage_vm_read(), kage_vm_write(), or kage_kvm_window() pointers
 *	clone		vCPUs stand; kage_vm_clone(); vCPUs go on; a VM for the child, kage_kvm_attach()
 *	at the end	vCPUs have ended; kage_kvm_detach(), kage_vm_destroy()
 *
 * No slot is set here and no memory is mapped: the library does both.
 *
 * locks
 *	none. Kage may call pause() with its own locks held; vmm.h V5 says why that is safe.
 */
#include <errno.h>
#include <stdlib.h>

#include <kage/kage.h>
#include <kage/kvm.h>

#include "vmm.h"

struct kage_ram {
	struct vmm_ram ram;
	struct kage_vm *vm;
	struct kage_kvm *kvm; /* NULL: not attached */
	bool helper;          /* runs */
	struct kage_kvm_config config;
};

static struct kage_ram *kage_of(struct vmm_ram *ram)
{
	return (struct kage_ram *)((char *)ram - offsetof(struct kage_ram, ram));
}

/* An outcome that is not KAGE_OK is an error to a VMM that expects memory there. */
static int error_of(int r)
{
	return r == KAGE_OK || r < 0 ? r : -EFAULT;
}

static int pause_vcpus(void *opaque)
{
	vmm_pause(opaque);
	return 0;
}

static void resume_vcpus(void *opaque)
{
	vmm_unpause(opaque);
}

static int detach(struct vmm_ram *ram)
{
	struct kage_ram *k = kage_of(ram);
	int r;

	if (k->helper)
		kage_kvm_helper_stop(k->kvm);
	k->helper = false;
	r = kage_kvm_detach(k->kvm);
	if (r == KAGE_OK)
		k->kvm = NULL;
	return r;
}

static int attach(struct vmm_ram *ram, struct vmm *vmm)
{
	struct kage_ram *k = kage_of(ram);
	int r;

	k->config.dirty_ring_bytes = vmm->config.dirty_ring_bytes;
	k->config.pause = pause_vcpus;
	k->config.resume = resume_vcpus;
	k->config.opaque = vmm;
	r = kage_kvm_attach(k->vm, vmm->fd, &k->config, &k->kvm);
	if (r < 0)
		return r;
	if (kage_kvm_trap_fd(k->kvm) < 0)
		return 0;
	r = kage_kvm_helper_start(k->kvm);
	k->helper = r == 0;
	if (r < 0)
		detach(ram);
	return r;
}

static void destroy(struct vmm_ram *ram)
{
	kage_vm_destroy(kage_of(ram)->vm);
	free(kage_of(ram));
}

static int clone_guest(struct vmm_ram *ram, struct vmm_ram **copy)
{
	struct kage_ram *k = kage_of(ram), *c = malloc(sizeof(*c));
	int r;

	if (c == NULL)
		return -ENOMEM;
	*c = *k;
	c->kvm = NULL;
	c->helper = false;
	r = kage_vm_clone(k->vm, NULL, &c->vm);
	if (r < 0) {
		free(c);
		return r;
	}
	*copy = &c->ram;
	return 0;
}

static int kage_read(struct vmm_ram *ram, uint64_t gpa, void *buf, size_t len)
{
	return error_of(kage_vm_read(kage_of(ram)->vm, gpa, buf, len));
}

static int kage_write(struct vmm_ram *ram, uint64_t gpa, const void *buf, size_t len)
{
	return error_of(kage_vm_write(kage_of(ram)->vm, gpa, buf, len));
}

static void *ptr(struct vmm_ram *ram, uint64_t gpa, size_t len)
{
	return kage_of(ram)->kvm ? kage_kvm_window(kage_of(ram)->kvm, gpa, len) : NULL;
}

static int vcpu_added(struct vmm_ram *ram, int vcpufd)
{
	struct kage_ram *k = kage_of(ram);

	return k->config.dirty_ring_bytes ? kage_kvm_add_vcpu(k->kvm, vcpufd) : 0;
}

static int run_failed(struct vmm_ram *ram, int vcpufd, const struct kvm_run *run, int err)
{
	int r = kage_kvm_run_failed(kage_of(ram)->kvm, vcpufd, run, err);

	return r == KAGE_RETRY ? 0 : r;
}

static int dirty_full(struct vmm_ram *ram)
{
	return kage_kvm_sync_dirty(kage_of(ram)->kvm);
}

static const struct vmm_ram_ops kage_ops = {
	.attach = attach, .detach = detach, .clone = clone_guest, .destroy = destroy,
	.read = kage_read, .write = kage_write, .ptr = ptr,
	.vcpu_added = vcpu_added, .run_failed = run_failed, .dirty_full = dirty_full,
};

static int map_regions(struct kage_ram *k, const struct vmm_region *region, unsigned n)
{
	unsigned i;
	int r;

	for (i = 0; i < n && i < VMM_REGIONS; i++) {
		r = kage_vm_map(k->vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_MERGEABLE, .gpa = region[i].gpa,
						.len = region[i].len));
		if (r < 0)
			return r;
		k->ram.region[i] = region[i];
		k->ram.regions++;
	}
	return 0;
}

int vmm_ram_kage(struct kage_engine *engine, const struct vmm_region *region, unsigned n,
		 const struct kage_kvm_config *config, struct vmm_ram **out)
{
	struct kage_ram *k = calloc(1, sizeof(*k));
	int r;

	if (k == NULL)
		return -ENOMEM;
	k->ram.ops = &kage_ops;
	if (config != NULL)
		k->config = *config;
	k->config.size = sizeof(k->config);
	r = kage_vm_create(engine, NULL, &k->vm);
	if (r == 0)
		r = map_regions(k, region, n);
	if (r < 0) {
		destroy(&k->ram);
		return r;
	}
	*out = &k->ram;
	return 0;
}

struct kage_vm *vmm_ram_kage_vm(struct vmm_ram *ram)
{
	return kage_of(ram)->vm;
}

struct kage_kvm *vmm_ram_kage_kvm(struct vmm_ram *ram)
{
	return kage_of(ram)->kvm;
}
