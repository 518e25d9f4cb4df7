/* SPDX-License-Identifier: MIT */
/*
 * The VM: descriptors and devices. What KVM keeps in the kernel for it, and vCPUs'
 * registers, are the architecture's. Structures and invariants: vmm.h.
 *
 * Order at creation: the VM, its dirty rings and chips, memory, vCPUs. KVM
 * wants rings and chips before the first vCPU, and kage_kvm_attach() wants no
 * running vCPU. Destruction is the reverse, so detaching memory still finds the
 * descriptors that it borrowed.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "arch.h"

#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif

#define GIB ((uint64_t)1 << 30)

const char *vmm_missing(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	const char *why = NULL;
	int vm;

	if (kvm < 0)
		return errno == ENOENT ? "there is no /dev/kvm" : "/dev/kvm cannot be opened";
	if (ioctl(kvm, KVM_GET_API_VERSION, NULL) != KVM_API_VERSION)
		why = "this KVM has another API version";
	else if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) <= 0)
		why = "this KVM has no immediate_exit";
	vm = why == NULL ? ioctl(kvm, KVM_CREATE_VM, vmm_arch_type(kvm)) : -1;
	if (why == NULL && vm < 0)
		why = "KVM_CREATE_VM fails";
	if (vm >= 0)
		close(vm);
	close(kvm);
	return why;
}

unsigned vmm_pc_layout(uint64_t len, struct vmm_region region[VMM_REGIONS])
{
	region[0] = (struct vmm_region){0, len};
	if (len <= 3 * GIB)
		return 1;
	region[0].len = 3 * GIB;
	region[1] = (struct vmm_region){4 * GIB, len - 3 * GIB};
	return 2;
}

int vmm_add_device(struct vmm *vmm, const struct vmm_device *device)
{
	if (vmm->devices == VMM_DEVICES)
		return -ENOSPC;
	vmm->device[vmm->devices++] = *device;
	return 0;
}

int vmm_irq(struct vmm *vmm, unsigned gsi, bool level)
{
	return vmm->config.flags & VMM_IRQCHIP ? vmm_arch_irq(vmm, gsi, level) : -ENXIO;
}

void *vmm_ptr(struct vmm *vmm, uint64_t gpa, size_t len)
{
	return vmm->ram && vmm->ram->ops->ptr ? vmm->ram->ops->ptr(vmm->ram, gpa, len) : NULL;
}

/* -- creation --------------------------------------------------------------------------- */

static int enable_dirty_rings(struct vmm *vmm)
{
	struct kvm_enable_cap cap = {.args[0] = vmm->config.dirty_ring_bytes};

	if (!vmm->config.dirty_ring_bytes)
		return 0;
	cap.cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
	if (ioctl(vmm->fd, KVM_ENABLE_CAP, &cap) == 0)
		return 0;
	cap.cap = KVM_CAP_DIRTY_LOG_RING;
	return ioctl(vmm->fd, KVM_ENABLE_CAP, &cap) < 0 ? -errno : 0;
}

/* KVM_GET_DIRTY_LOG leaves the log as it is, KVM_CLEAR_DIRTY_LOG takes pages out: some, if Kage wants only those. */
static void enable_clear_log(struct vmm *vmm)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE};

	if (!vmm->config.dirty_ring_bytes)
		ioctl(vmm->fd, KVM_ENABLE_CAP, &cap); /* before Linux 5.2 it is not there: GET clears, and that is fine */
}

static int open_vm(struct vmm *vmm)
{
	int r;

	vmm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vmm->kvm < 0)
		return -errno;
	vmm->fd = ioctl(vmm->kvm, KVM_CREATE_VM, vmm_arch_type(vmm->kvm));
	if (vmm->fd < 0)
		return -errno;
	enable_clear_log(vmm);
	r = enable_dirty_rings(vmm);
	return r < 0 ? r : vmm_arch_open(vmm);
}

static struct vmm *alloc_vmm(const struct vmm_config *config)
{
	struct vmm *vmm = calloc(1, sizeof(*vmm));
	pthread_condattr_t attr;

	if (vmm == NULL)
		return NULL;
	vmm->kvm = vmm->fd = vmm->gic = -1;
	vmm->config = *config;
	pthread_mutex_init(&vmm->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&vmm->changed, &attr);
	pthread_condattr_destroy(&attr);
	return vmm;
}

int vmm_create(const struct vmm_config *config, struct vmm **out)
{
	struct vmm *vmm = alloc_vmm(config);
	int r;

	if (vmm == NULL)
		return -ENOMEM;
	vmm_install_kick();
	r = open_vm(vmm);
	if (r == 0 && (config->flags & VMM_SERIAL))
		r = vmm_serial_create(vmm, &vmm->serial);
	if (r == 0 && config->ram != NULL)
		r = config->ram->ops->attach(config->ram, vmm);
	if (r < 0) {
		vmm_destroy(vmm);
		return r;
	}
	vmm->ram = config->ram;
	*out = vmm;
	return 0;
}

static void close_vcpu(struct vmm_vcpu *vcpu)
{
	if (vcpu->run != NULL)
		munmap(vcpu->run, vcpu->run_len);
	if (vcpu->fd >= 0)
		close(vcpu->fd);
	free(vcpu);
}

static int open_vcpu(struct vmm_vcpu *vcpu)
{
	struct vmm *vmm = vcpu->vmm;
	int len = ioctl(vmm->kvm, KVM_GET_VCPU_MMAP_SIZE, NULL);
	void *run;

	if (len < 0)
		return -errno;
	vcpu->fd = ioctl(vmm->fd, KVM_CREATE_VCPU, (unsigned long)vcpu->index);
	if (vcpu->fd < 0)
		return -errno;
	run = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (run == MAP_FAILED)
		return -errno;
	vcpu->run = run;
	vcpu->run_len = len;
	return 0;
}

int vmm_make_vcpu(struct vmm *vmm, const struct kvm_cpuid2 *cpuid, struct vmm_vcpu **out)
{
	struct vmm_vcpu *vcpu;
	int r;

	if (vmm->vcpus == VMM_VCPUS)
		return -ENOSPC;
	vcpu = calloc(1, sizeof(*vcpu));
	if (vcpu == NULL)
		return -ENOMEM;
	vcpu->vmm = vmm;
	vcpu->index = vmm->vcpus;
	vcpu->fd = -1;
	r = open_vcpu(vcpu);
	if (r == 0)
		r = vmm_arch_vcpu(vcpu, cpuid);
	if (r == 0 && vmm->ram != NULL && vmm->ram->ops->vcpu_added != NULL)
		r = vmm->ram->ops->vcpu_added(vmm->ram, vcpu->fd);
	if (r < 0) {
		close_vcpu(vcpu);
		return r;
	}
	pthread_mutex_lock(&vmm->lock);
	vmm->vcpu[vmm->vcpus++] = vcpu;
	pthread_mutex_unlock(&vmm->lock);
	if (out != NULL)
		*out = vcpu;
	return 0;
}

int vmm_add_vcpu(struct vmm *vmm, struct vmm_vcpu **out)
{
	return vmm_make_vcpu(vmm, NULL, out);
}

void vmm_destroy(struct vmm *vmm)
{
	unsigned i;

	if (vmm == NULL)
		return;
	vmm_stop(vmm);
	if (vmm->ram != NULL)
		vmm->ram->ops->detach(vmm->ram);
	for (i = 0; i < vmm->vcpus; i++)
		close_vcpu(vmm->vcpu[i]);
	for (i = 0; i < vmm->devices; i++)
		if (vmm->device[i].destroy != NULL)
			vmm->device[i].destroy(vmm->device[i].opaque);
	vmm_serial_destroy(vmm->serial);
	vmm_arch_close(vmm);
	if (vmm->fd >= 0)
		close(vmm->fd);
	if (vmm->kvm >= 0)
		close(vmm->kvm);
	if (vmm->ram != NULL)
		vmm->ram->ops->destroy(vmm->ram);
	pthread_cond_destroy(&vmm->changed);
	pthread_mutex_destroy(&vmm->lock);
	free(vmm);
}

int vmm_identify(struct vmm *vmm, const struct vmm_identity *parent)
{
	static _Atomic uint64_t last;
	struct vmm_identity *fresh = &vmm->identity;
	int r;

	memset(fresh, 0, sizeof(*fresh));
	if (getrandom(&fresh->seed, sizeof(fresh->seed), 0) != sizeof(fresh->seed))
		return -EIO;
	fresh->id = atomic_fetch_add(&last, 1) + 1;
	if (parent != NULL) {
		fresh->parent = parent->id;
		fresh->generation = parent->generation + 1;
	}
	if (!vmm->config.identity)
		return 0;
	r = vmm_write(vmm, vmm->config.identity, fresh, sizeof(*fresh));
	if (r == 0)
		vmm_arch_wrote(vmm, vmm->config.identity, sizeof(*fresh));
	return r;
}
