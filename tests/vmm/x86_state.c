/* SPDX-License-Identifier: MIT */
/*
 * Everything of a VM but its memory: taken from KVM, put into another VM.
 *
 * structures
 *	part		one fixed-size piece of a vCPU: a pair of ioctls and a place in vcpu_state
 *	vcpu_state	all parts of a vCPU, its MSRs and its extended state
 *	vmm_state	all vCPUs, chips, clock, serial port
 *
 * invariants
 *	T1. What a KVM does not have is not saved, and what was not saved is not restored. Only
 *	    registers and segment registers must be there.
 *	T2. Order of restoring: the APIC base (in sregs) before the LAPIC, the LAPIC before the TSC deadline
 *	    (an MSR); registers before events, because KVM_SET_REGS drops pending exceptions.
 *	T3. Time goes on: TSC offsets are copied as they are and the clock is set with the real time at which
 *	    it was read, so a clone sees the TSC and the clock of its parent. Where KVM
 *	    has no TSC offset attribute, the TSC continues from where it was read.
 *
 * locks
 *	none; the VM is parked.
 *
 * Source for the order of parts: Linux, Documentation/virt/kvm/api.rst, and for
 * TSC and clock Documentation/virt/kvm/devices/vcpu.rst, section 4.1.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "arch.h"

#define MSR_TSC	 0x10
#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

struct vcpu_state {
	bool started;
	uint32_t have;           /* bit n: part n; see below */
	bool have_tsc_offset;
	uint64_t tsc_offset;
	struct kvm_cpuid2 *cpuid;
	struct kvm_msrs *msrs;
	void *xsave;             /* NULL: fpu instead */
	struct kvm_sregs sregs;
	struct kvm_sregs2 sregs2;
	struct kvm_lapic_state lapic;
	struct kvm_xcrs xcrs;
	struct kvm_fpu fpu;
	struct kvm_debugregs debugregs;
	struct kvm_mp_state mp_state;
	struct kvm_regs regs;
	struct kvm_vcpu_events events;
};

enum {
	CHIPS = 3, /* two PICs, one IOAPIC */
};

struct vmm_state {
	uint32_t flags; /* of the VM's config */
	unsigned skipped;
	bool have_clock, have_pit;
	unsigned have_chips;
	struct kvm_clock_data clock;
	struct kvm_irqchip chip[CHIPS];
	struct kvm_pit_state2 pit;
	struct vmm_serial_state serial;
	unsigned vcpus;
	struct vcpu_state vcpu[];
};

struct part {
	unsigned long get, set;
	size_t at;
	int cap;      /* 0: always there */
	bool chips;   /* only with VMM_IRQCHIP */
	bool needed;
	bool late;    /* after the MSRs, T2 */
};

enum {
	SREGS = 0,
	SREGS2 = 1,
};

#define PART(GET, SET, FIELD, ...) {GET, SET, offsetof(struct vcpu_state, FIELD), __VA_ARGS__}
static const struct part parts[] = {
	[SREGS] = PART(KVM_GET_SREGS, KVM_SET_SREGS, sregs, .needed = true),
	[SREGS2] = PART(KVM_GET_SREGS2, KVM_SET_SREGS2, sregs2, .cap = KVM_CAP_SREGS2),
	PART(KVM_GET_LAPIC, KVM_SET_LAPIC, lapic, .chips = true),
	PART(KVM_GET_XCRS, KVM_SET_XCRS, xcrs, .cap = KVM_CAP_XCRS),
	PART(KVM_GET_FPU, KVM_SET_FPU, fpu),
	PART(KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, debugregs, .cap = KVM_CAP_DEBUGREGS, .late = true),
	PART(KVM_GET_MP_STATE, KVM_SET_MP_STATE, mp_state, .cap = KVM_CAP_MP_STATE, .late = true),
	PART(KVM_GET_REGS, KVM_SET_REGS, regs, .needed = true, .late = true),
	PART(KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, events, .cap = KVM_CAP_VCPU_EVENTS, .late = true),
};

static bool has_cap(const struct vmm *vmm, int cap)
{
	return ioctl(vmm->fd, KVM_CHECK_EXTENSION, (unsigned long)cap) > 0;
}

/* Errors that say "this KVM or this VM does not do that". */
static bool lacking(int err)
{
	return err == EINVAL || err == ENXIO || err == ENOTTY || err == EOPNOTSUPP || err == EPERM || err == ENODEV;
}

/* -- saving ---------------------------------------------------------------------------------- */

/* Asks with more and more entries until KVM is content. `entry` bytes each, after `head`; the count comes first. */
static void *ask_list(int fd, unsigned long request, size_t head, size_t entry)
{
	uint32_t n, *list = NULL, *more;

	for (n = 128; n <= 8192; n *= 2) {
		more = realloc(list, head + n * entry);
		if (more == NULL)
			break;
		list = more;
		memset(list, 0, head);
		*list = n;
		if (ioctl(fd, request, list) == 0)
			return list;
		if (errno != E2BIG)
			break;
	}
	free(list);
	return NULL;
}

/* KVM_GET_MSRS stops at the first one that it cannot read: that one is left out, and it is asked for the rest. */
static int read_msrs(struct vmm_state *state, int fd, struct kvm_msrs *msrs)
{
	struct kvm_msrs *some = malloc(sizeof(*some) + msrs->nmsrs * sizeof(some->entries[0]));
	uint32_t todo = msrs->nmsrs, from = 0, kept = 0;
	int n = 0;

	if (some == NULL)
		return -ENOMEM;
	while (from < todo) {
		some->nmsrs = todo - from;
		some->pad = 0;
		memcpy(some->entries, msrs->entries + from, some->nmsrs * sizeof(some->entries[0]));
		n = ioctl(fd, KVM_GET_MSRS, some);
		if (n < 0)
			break;
		memmove(msrs->entries + kept, some->entries, n * sizeof(some->entries[0]));
		kept += n;
		from += n;
		if (from < todo) {
			from++;
			state->skipped++;
		}
	}
	n = n < 0 ? -errno : 0;
	free(some);
	msrs->nmsrs = kept;
	return n;
}

static int save_msrs(struct vmm *vmm, struct vmm_state *state, struct vcpu_state *to, int fd)
{
	struct kvm_msr_list *list = ask_list(vmm->kvm, KVM_GET_MSR_INDEX_LIST, sizeof(*list), sizeof(list->indices[0]));
	uint32_t i;

	if (list == NULL)
		return -ENOMEM;
	to->msrs = calloc(1, sizeof(*to->msrs) + list->nmsrs * sizeof(to->msrs->entries[0]));
	if (to->msrs == NULL) {
		free(list);
		return -ENOMEM;
	}
	to->msrs->nmsrs = list->nmsrs;
	for (i = 0; i < list->nmsrs; i++)
		to->msrs->entries[i].index = list->indices[i];
	free(list);
	return read_msrs(state, fd, to->msrs);
}

static int save_xsave(struct vmm *vmm, struct vcpu_state *to, int fd)
{
	int len = ioctl(vmm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
	bool two = len > (int)sizeof(struct kvm_xsave);

	if (!two && !has_cap(vmm, KVM_CAP_XSAVE))
		return 0;
	to->xsave = calloc(1, two ? (size_t)len : sizeof(struct kvm_xsave));
	if (to->xsave == NULL)
		return -ENOMEM;
	return ioctl(fd, two ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, to->xsave) < 0 ? -errno : 0;
}

static struct kvm_device_attr tsc_offset_attr(uint64_t *at)
{
	return (struct kvm_device_attr){.group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET,
					.addr = (uintptr_t)at};
}

static void save_tsc_offset(struct vcpu_state *to, int fd)
{
	struct kvm_device_attr attr = tsc_offset_attr(&to->tsc_offset);

	to->have_tsc_offset = ioctl(fd, KVM_GET_DEVICE_ATTR, &attr) == 0;
}

static int save_parts(struct vmm *vmm, struct vmm_state *state, struct vcpu_state *to, int fd)
{
	unsigned i;

	for (i = 0; i < COUNT(parts); i++) {
		const struct part *p = &parts[i];

		if ((p->cap && !has_cap(vmm, p->cap)) || (p->chips && !(vmm->config.flags & VMM_IRQCHIP)))
			continue;
		if (ioctl(fd, p->get, (char *)to + p->at) == 0) {
			to->have |= 1u << i;
			continue;
		}
		if (p->needed || !lacking(errno))
			return -errno;
		state->skipped++;
	}
	return 0;
}

static int save_vcpu(struct vmm *vmm, struct vmm_state *state, unsigned i)
{
	struct vcpu_state *to = &state->vcpu[i];
	struct vmm_vcpu *vcpu = vmm->vcpu[i];
	int r;

	to->started = vcpu->state == VMM_PARKED;
	to->cpuid = ask_list(vcpu->fd, KVM_GET_CPUID2, sizeof(*to->cpuid), sizeof(to->cpuid->entries[0]));
	if (to->cpuid == NULL)
		return -ENOMEM;
	r = save_parts(vmm, state, to, vcpu->fd);
	if (r == 0)
		r = save_xsave(vmm, to, vcpu->fd);
	if (r == 0)
		r = save_msrs(vmm, state, to, vcpu->fd);
	save_tsc_offset(to, vcpu->fd);
	return r;
}

static void save_chips(struct vmm *vmm, struct vmm_state *state)
{
	unsigned i;

	if (!(vmm->config.flags & VMM_IRQCHIP))
		return;
	for (i = 0; i < CHIPS; i++) {
		state->chip[i].chip_id = i;
		if (ioctl(vmm->fd, KVM_GET_IRQCHIP, &state->chip[i]) == 0)
			state->have_chips |= 1u << i;
		else
			state->skipped++;
	}
	state->have_pit = ioctl(vmm->fd, KVM_GET_PIT2, &state->pit) == 0;
	if (!state->have_pit)
		state->skipped++;
}

int vmm_arch_save(struct vmm *vmm, struct vmm_state *state)
{
	unsigned i;
	int r;

	state->flags = vmm->config.flags;
	state->vcpus = vmm->vcpus;
	for (i = 0; i < vmm->vcpus; i++) {
		r = save_vcpu(vmm, state, i);
		if (r < 0)
			return r;
	}
	save_chips(vmm, state);
	if (has_cap(vmm, KVM_CAP_ADJUST_CLOCK))
		state->have_clock = ioctl(vmm->fd, KVM_GET_CLOCK, &state->clock) == 0;
	if (vmm->serial != NULL)
		vmm_serial_save(vmm->serial, &state->serial);
	return 0;
}

struct vmm_state *vmm_arch_state(const struct vmm *vmm)
{
	return calloc(1, sizeof(struct vmm_state) + vmm->vcpus * sizeof(struct vcpu_state));
}

void vmm_state_destroy(struct vmm_state *state)
{
	unsigned i;

	if (state == NULL)
		return;
	for (i = 0; i < state->vcpus; i++) {
		free(state->vcpu[i].cpuid);
		free(state->vcpu[i].msrs);
		free(state->vcpu[i].xsave);
	}
	free(state);
}

unsigned vmm_state_skipped(const struct vmm_state *state)
{
	return state->skipped;
}

bool vmm_state_started(const struct vmm_state *state, unsigned index)
{
	return index < state->vcpus && state->vcpu[index].started;
}

/* -- restoring -------------------------------------------------------------------------------- */

/* 0, 1 (this KVM would not take it), or -errno. */
static int put(int fd, unsigned long request, const void *from)
{
	if (ioctl(fd, request, from) >= 0)
		return 0;
	return lacking(errno) ? 1 : -errno;
}

/* Part n unless a better one says the same: sregs2 over sregs, XSAVE over the FPU. */
static bool superseded(const struct vcpu_state *from, unsigned n)
{
	if (n == SREGS)
		return from->have & 1u << SREGS2;
	return parts[n].get == KVM_GET_FPU && from->xsave != NULL;
}

static int restore_parts(const struct vcpu_state *from, int fd, bool late)
{
	int r, skipped = 0;
	unsigned i;

	static_assert(COUNT(parts) <= 32, "`have` has a bit for each");
	for (i = 0; i < COUNT(parts); i++) {
		if (parts[i].late != late || !(from->have & 1u << i) || superseded(from, i))
			continue;
		r = put(fd, parts[i].set, (const char *)from + parts[i].at);
		if (r < 0 || (r && parts[i].needed))
			return r < 0 ? r : -EINVAL;
		skipped += r;
	}
	return skipped;
}

/* Whether an MSR is set from its saved value; T3 says why not the TSC. */
static uint32_t wanted_msrs(const struct vcpu_state *from, struct kvm_msr_entry *to)
{
	uint32_t i, n = 0;

	for (i = 0; i < from->msrs->nmsrs; i++)
		if (from->msrs->entries[i].index != MSR_TSC || !from->have_tsc_offset)
			to[n++] = from->msrs->entries[i];
	return n;
}

/* KVM_SET_MSRS stops at the first one that it refuses: that one is left out. A zero that it refuses loses nothing. */
static int restore_msrs(const struct vcpu_state *from, int fd)
{
	struct kvm_msrs *some = malloc(sizeof(*some) + from->msrs->nmsrs * sizeof(some->entries[0]));
	int n, skipped = 0;

	if (some == NULL)
		return -ENOMEM;
	some->pad = 0;
	some->nmsrs = wanted_msrs(from, some->entries);
	while (some->nmsrs > 0) {
		n = ioctl(fd, KVM_SET_MSRS, some);
		if (n < 0) {
			skipped = -errno;
			break;
		}
		if ((uint32_t)n >= some->nmsrs)
			break;
		skipped += some->entries[n].data != 0;
		some->nmsrs -= n + 1;
		memmove(some->entries, some->entries + n + 1, some->nmsrs * sizeof(some->entries[0]));
	}
	free(some);
	return skipped;
}

static int restore_xsave(const struct vcpu_state *from, int fd)
{
	return from->xsave != NULL ? put(fd, KVM_SET_XSAVE, from->xsave) : 0;
}

static int restore_tsc_offset(const struct vcpu_state *from, int fd)
{
	uint64_t offset = from->tsc_offset;
	struct kvm_device_attr attr = tsc_offset_attr(&offset);

	return from->have_tsc_offset ? put(fd, KVM_SET_DEVICE_ATTR, &attr) : 0;
}

static int restore_early(const struct vcpu_state *from, int fd)
{
	return restore_parts(from, fd, false);
}

static int restore_late(const struct vcpu_state *from, int fd)
{
	return restore_parts(from, fd, true);
}

static int restore_vcpu(const struct vcpu_state *from, int fd)
{
	static int (*const step[])(const struct vcpu_state *, int) = { /* T2 */
		restore_early, restore_xsave, restore_tsc_offset, restore_msrs, restore_late,
	};
	int r, skipped = 0;
	unsigned i;

	for (i = 0; i < COUNT(step); i++) {
		r = step[i](from, fd);
		if (r < 0)
			return r;
		skipped += r;
	}
	return skipped;
}

static int restore_chips(struct vmm *vmm, const struct vmm_state *state)
{
	int r, skipped = 0;
	unsigned i;

	for (i = 0; i < CHIPS; i++) {
		if (!(state->have_chips & 1u << i))
			continue;
		r = put(vmm->fd, KVM_SET_IRQCHIP, &state->chip[i]);
		if (r < 0)
			return r;
		skipped += r;
	}
	r = state->have_pit ? put(vmm->fd, KVM_SET_PIT2, &state->pit) : 0;
	return r < 0 ? r : skipped + r;
}

/* Flags of KVM_GET_CLOCK say what it knew; KVM_SET_CLOCK takes only the real time. */
static int restore_clock(struct vmm *vmm, const struct vmm_state *state)
{
	struct kvm_clock_data clock = state->clock;

	clock.flags &= KVM_CLOCK_REALTIME;
	return state->have_clock ? put(vmm->fd, KVM_SET_CLOCK, &clock) : 0;
}

int vmm_state_restore(struct vmm *vmm, const struct vmm_state *state)
{
	int r, skipped = 0;
	unsigned i;

	if (vmm->vcpus || vmm->config.flags != state->flags)
		return -EINVAL;
	for (i = 0; i < state->vcpus; i++) {
		r = vmm_make_vcpu(vmm, state->vcpu[i].cpuid, NULL);
		if (r < 0)
			return r;
	}
	r = restore_chips(vmm, state);
	for (i = 0; i < state->vcpus && r >= 0; i++) {
		skipped += r;
		r = restore_vcpu(&state->vcpu[i], vmm->vcpu[i]->fd);
	}
	if (r < 0)
		return r;
	skipped += r;
	r = restore_clock(vmm, state);
	if (vmm->serial != NULL)
		vmm_serial_restore(vmm->serial, &state->serial);
	return r < 0 ? r : skipped + r;
}
