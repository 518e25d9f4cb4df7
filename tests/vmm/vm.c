/* SPDX-License-Identifier: MIT */
/*
 * The VM: descriptors, what KVM keeps in the kernel for it, devices, and the
 * registers of a 64-bit entry. Structures and invariants: vmm.h.
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

#include "vmm.h"

#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif

#define GIB	     ((uint64_t)1 << 30)
#define TSS_ADDR     0xfffbd000 /* three pages that VMX without unrestricted guests needs, in the PC's hole */
#define IDENTITY_MAP 0xfffbc000

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
	vm = why == NULL ? ioctl(kvm, KVM_CREATE_VM, 0) : -1;
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
	struct kvm_irq_level irq = {.irq = gsi, .level = level};

	if (!(vmm->config.flags & VMM_IRQCHIP))
		return -ENXIO;
	return ioctl(vmm->fd, KVM_IRQ_LINE, &irq) < 0 ? -errno : 0;
}

void *vmm_ptr(struct vmm *vmm, uint64_t gpa, size_t len)
{
	return vmm->ram && vmm->ram->ops->ptr ? vmm->ram->ops->ptr(vmm->ram, gpa, len) : NULL;
}

/* -- creation --------------------------------------------------------------------------- */

static int take_cpuid(struct vmm *vmm)
{
	unsigned n = 64;
	struct kvm_cpuid2 *cpuid = NULL, *more;

	for (;; n *= 2) {
		more = realloc(cpuid, sizeof(*cpuid) + n * sizeof(cpuid->entries[0]));
		if (more == NULL) {
			free(cpuid);
			return -ENOMEM;
		}
		cpuid = more;
		cpuid->nent = n;
		cpuid->padding = 0;
		if (ioctl(vmm->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) == 0) {
			vmm->cpuid = cpuid;
			return 0;
		}
		if (errno != E2BIG || n > 4096) {
			free(cpuid);
			return -errno;
		}
	}
}

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

static int make_chips(struct vmm *vmm)
{
	struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
	uint64_t identity_map = IDENTITY_MAP;

	if (!(vmm->config.flags & VMM_IRQCHIP))
		return 0;
	if (ioctl(vmm->fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map) < 0 ||
	    ioctl(vmm->fd, KVM_SET_TSS_ADDR, (unsigned long)TSS_ADDR) < 0 ||
	    ioctl(vmm->fd, KVM_CREATE_IRQCHIP, NULL) < 0 || ioctl(vmm->fd, KVM_CREATE_PIT2, &pit) < 0)
		return -errno;
	return 0;
}

static int open_vm(struct vmm *vmm)
{
	int r;

	vmm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vmm->kvm < 0)
		return -errno;
	vmm->fd = ioctl(vmm->kvm, KVM_CREATE_VM, 0);
	if (vmm->fd < 0)
		return -errno;
	r = take_cpuid(vmm);
	if (r == 0)
		r = enable_dirty_rings(vmm);
	return r < 0 ? r : make_chips(vmm);
}

static struct vmm *alloc_vmm(const struct vmm_config *config)
{
	struct vmm *vmm = calloc(1, sizeof(*vmm));
	pthread_condattr_t attr;

	if (vmm == NULL)
		return NULL;
	vmm->kvm = vmm->fd = -1;
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

static void set_apic_id(struct kvm_cpuid2 *cpuid, unsigned id)
{
	unsigned i;

	for (i = 0; i < cpuid->nent; i++) {
		struct kvm_cpuid_entry2 *e = &cpuid->entries[i];

		if (e->function == 1)
			e->ebx = (e->ebx & 0x00ffffff) | id << 24;
		else if (e->function == 0xb || e->function == 0x1f)
			e->edx = id;
	}
}

static int set_cpuid(struct vmm_vcpu *vcpu, const struct kvm_cpuid2 *given)
{
	struct vmm *vmm = vcpu->vmm;
	struct kvm_cpuid2 *cpuid;
	size_t len = sizeof(*cpuid) + vmm->cpuid->nent * sizeof(cpuid->entries[0]);
	int r;

	if (given != NULL)
		return ioctl(vcpu->fd, KVM_SET_CPUID2, given) < 0 ? -errno : 0;
	cpuid = malloc(len);
	if (cpuid == NULL)
		return -ENOMEM;
	memcpy(cpuid, vmm->cpuid, len);
	set_apic_id(cpuid, vcpu->index);
	if (vmm->config.cpuid != NULL)
		vmm->config.cpuid(cpuid, vcpu->index, vmm->config.opaque);
	r = ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) < 0 ? -errno : 0;
	free(cpuid);
	return r;
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
		r = set_cpuid(vcpu, cpuid);
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
	if (vmm->fd >= 0)
		close(vmm->fd);
	if (vmm->kvm >= 0)
		close(vmm->kvm);
	if (vmm->ram != NULL)
		vmm->ram->ops->destroy(vmm->ram);
	pthread_cond_destroy(&vmm->changed);
	pthread_mutex_destroy(&vmm->lock);
	free(vmm->cpuid);
	free(vmm);
}

int vmm_identify(struct vmm *vmm, const struct vmm_identity *parent)
{
	static _Atomic uint64_t last;
	struct vmm_identity *fresh = &vmm->identity;

	memset(fresh, 0, sizeof(*fresh));
	if (getrandom(&fresh->seed, sizeof(fresh->seed), 0) != sizeof(fresh->seed))
		return -EIO;
	fresh->id = atomic_fetch_add(&last, 1) + 1;
	if (parent != NULL) {
		fresh->parent = parent->id;
		fresh->generation = parent->generation + 1;
	}
	return vmm->config.identity ? vmm_write(vmm, vmm->config.identity, fresh, sizeof(*fresh)) : 0;
}

/* -- a 64-bit entry ----------------------------------------------------------------------------- */

static struct kvm_segment code_segment(uint16_t selector, unsigned dpl)
{
	return (struct kvm_segment){.selector = selector, .limit = 0xffffffff, .type = 0xb, .present = 1,
				    .dpl = dpl, .s = 1, .l = 1, .g = 1};
}

static struct kvm_segment data_segment(uint16_t selector, unsigned dpl)
{
	return (struct kvm_segment){.selector = selector, .limit = 0xffffffff, .type = 3, .present = 1,
				    .dpl = dpl, .s = 1, .db = 1, .g = 1};
}

static void set_tables(struct kvm_sregs *s, const struct vmm_entry *e)
{
	s->gdt = (struct kvm_dtable){.base = e->gdt, .limit = e->gdt ? 0xfff : 0};
	s->idt = (struct kvm_dtable){.base = e->idt, .limit = e->idt ? 0xfff : 0};
	s->tr = (struct kvm_segment){.base = e->tss, .limit = e->tss_limit ? e->tss_limit : 0x67, .type = 0xb,
				     .present = 1};
	s->ldt = (struct kvm_segment){.type = 2, .unusable = 1};
	s->cr0 = e->cr0 ? e->cr0 : 0x80050033;
	s->cr3 = e->cr3;
	s->cr4 = e->cr4 ? e->cr4 : 0xa0;
	s->efer = e->efer ? e->efer : 0xd01;
}

static void set_segments(struct kvm_sregs *s, const struct vmm_entry *e)
{
	bool user = e->cpl == 3;

	s->cs = code_segment(e->cs ? e->cs : user ? 0x33 : 0x10, e->cpl);
	s->ss = data_segment(e->ss ? e->ss : user ? 0x2b : 0x18, e->cpl);
	s->ds = data_segment(e->ds ? e->ds : user ? 0x2b : 0x18, e->cpl);
	s->es = s->fs = s->gs = s->ds;
}

int vmm_vcpu_enter_long_mode(struct vmm_vcpu *vcpu, const struct vmm_entry *e)
{
	struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
	struct kvm_regs regs = {.rip = e->rip, .rsp = e->rsp, .rdi = e->rdi, .rsi = e->rsi};
	struct kvm_sregs sregs;

	regs.rflags = e->rflags ? e->rflags : e->cpl == 3 ? 0x3002 : 2;
	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
		return -errno;
	set_segments(&sregs, e);
	set_tables(&sregs, e);
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0)
		return -errno;
	/* Without chips in the kernel there is only one state. */
	if (ioctl(vcpu->fd, KVM_SET_MP_STATE, &runnable) < 0 && errno != EINVAL && errno != ENXIO)
		return -errno;
	return 0;
}
