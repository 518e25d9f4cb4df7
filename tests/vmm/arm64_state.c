/* SPDX-License-Identifier: MIT */
/*
 * Everything of an arm64 VM but its memory: taken from KVM, put into another VM.
 *
 * structures
 *	vcpu_state	all registers of KVM_GET_REG_LIST, one behind the other, events, MP state
 *	vmm_state	all vCPUs, the GIC, the virtual counter, the serial port
 *
 * invariants
 *	T1. What a KVM does not have is not saved. A register that another VM of the same machine does not
 *	    take is counted.
 *	T2. Order of restoring: all vCPUs and their registers; the counter, of which KVM keeps one offset for the VM
 *	    and which making a vCPU sets anew; timers' compare values, then their controls; the GIC;
 *	    MP states.
 *	T3. Time goes on: the clone's virtual counter is the parent's plus what passed since it was read, by this
 *	    machine's own counter. The physical counter is the machine's in both, and is not touched.
 *
 * locks
 *	none; the VM is parked.
 *
 * Sources: Linux, Documentation/virt/kvm/api.rst (4.68, 4.69: registers), devices/vcpu.rst.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "arm64.h"

struct vcpu_state {
	bool started;
	struct kvm_reg_list *list;
	size_t len;
	uint8_t *value;
	bool have_events;
	struct kvm_vcpu_events events;
	struct kvm_mp_state mp_state;
};

struct vmm_state {
	uint32_t flags; /* of the VM's config */
	unsigned skipped;
	uint64_t counter, read_at; /* the guest's, by the machine's */
	struct arm64_gic_state *gic;
	struct vmm_serial_state serial;
	unsigned vcpus;
	struct vcpu_state vcpu[];
};

static size_t size_of(uint64_t id)
{
	return (size_t)1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT);
}

static bool is_timer(uint64_t id)
{
	return id == KVM_REG_ARM_TIMER_CNT || id == KVM_REG_ARM_TIMER_CVAL || id == KVM_REG_ARM_TIMER_CTL ||
	       id == KVM_REG_ARM_PTIMER_CNT;
}

/* Errors that say "this KVM or this VM does not do that". */
static bool lacking(int err)
{
	return err == -EINVAL || err == -ENXIO || err == -ENOENT || err == -EPERM || err == -ENODEV || err == -ENOTTY;
}

/* -- time ------------------------------------------------------------------------------------ */

/* What this process's CPU counts; KVM's guests count the same with another offset. */
static uint64_t machine_counter(void)
{
	uint64_t now;

	__asm__ volatile("isb; mrs %0, cntvct_el0" : "=r"(now) : : "memory");
	return now;
}

/* The tightest of some tries: the guest's counter was read between two readings of the machine's. */
static int read_counter(int fd, struct vmm_state *state)
{
	uint64_t best = UINT64_MAX, before, after, guest;
	unsigned i;
	int r = 0;

	for (i = 0; i < 8 && r == 0; i++) {
		before = machine_counter();
		r = arm64_get(fd, KVM_REG_ARM_TIMER_CNT, &guest);
		after = machine_counter();
		if (r || after - before >= best)
			continue;
		best = after - before;
		state->counter = guest;
		state->read_at = before + best / 2;
	}
	return r;
}

/* -- saving ---------------------------------------------------------------------------------- */

static struct kvm_reg_list *list_registers(int fd)
{
	struct kvm_reg_list head = {0}, *list;

	if (ioctl(fd, KVM_GET_REG_LIST, &head) == 0 || errno != E2BIG)
		return NULL;
	list = calloc(1, sizeof(*list) + head.n * sizeof(list->reg[0]));
	if (list == NULL)
		return NULL;
	list->n = head.n;
	if (ioctl(fd, KVM_GET_REG_LIST, list) == 0)
		return list;
	free(list);
	return NULL;
}

/* A register that is listed and cannot be read is left out. */
static int read_registers(struct vmm_state *state, struct vcpu_state *to, int fd)
{
	uint64_t i, kept = 0;
	int r;

	for (i = 0; i < to->list->n; i++)
		to->len += size_of(to->list->reg[i]);
	to->value = calloc(1, to->len);
	if (to->value == NULL)
		return -ENOMEM;
	for (i = 0, to->len = 0; i < to->list->n; i++) {
		uint64_t id = to->list->reg[i];

		r = arm64_get(fd, id, to->value + to->len);
		if (r < 0 && !lacking(r))
			return r;
		if (r < 0) {
			state->skipped++;
			continue;
		}
		to->list->reg[kept++] = id;
		to->len += size_of(id);
	}
	to->list->n = kept;
	return 0;
}

static int save_vcpu(struct vmm *vmm, struct vmm_state *state, unsigned i)
{
	struct vcpu_state *to = &state->vcpu[i];
	struct vmm_vcpu *vcpu = vmm->vcpu[i];

	to->started = vcpu->state == VMM_PARKED;
	to->list = list_registers(vcpu->fd);
	if (to->list == NULL)
		return -ENOMEM;
	if (ioctl(vcpu->fd, KVM_GET_MP_STATE, &to->mp_state) < 0)
		return -errno;
	to->have_events = ioctl(vcpu->fd, KVM_GET_VCPU_EVENTS, &to->events) == 0;
	return read_registers(state, to, vcpu->fd);
}

int vmm_arch_save(struct vmm *vmm, struct vmm_state *state)
{
	unsigned i;
	int r = 0;

	state->flags = vmm->config.flags;
	for (i = 0; i < vmm->vcpus && r == 0; i++) {
		state->vcpus++;
		r = save_vcpu(vmm, state, i);
	}
	if (r == 0 && vmm->gic >= 0)
		r = arm64_gic_save(vmm, &state->gic);
	if (r == 0 && vmm->vcpus)
		r = read_counter(vmm->vcpu[0]->fd, state);
	if (r == 0 && vmm->serial != NULL)
		vmm_serial_save(vmm->serial, &state->serial);
	return r;
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
		free(state->vcpu[i].list);
		free(state->vcpu[i].value);
	}
	arm64_gic_free(state->gic);
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

static const void *value_of(const struct vcpu_state *from, uint64_t id)
{
	size_t at = 0;
	uint64_t i;

	for (i = 0; i < from->list->n && from->list->reg[i] != id; i++)
		at += size_of(from->list->reg[i]);
	return i < from->list->n ? from->value + at : NULL;
}

/* All but the timers. Returns how many were not taken, or -errno. */
static int restore_registers(const struct vcpu_state *from, int fd)
{
	size_t at = 0;
	uint64_t i;
	int r, skipped = 0;

	for (i = 0; i < from->list->n; at += size_of(from->list->reg[i++])) {
		if (is_timer(from->list->reg[i]))
			continue;
		r = arm64_set(fd, from->list->reg[i], from->value + at);
		if (r < 0 && !lacking(r))
			return r;
		skipped += r < 0;
	}
	if (from->have_events && ioctl(fd, KVM_SET_VCPU_EVENTS, &from->events) < 0)
		skipped++;
	return skipped;
}

static int restore_timer(const struct vcpu_state *from, int fd)
{
	static const uint64_t order[] = {KVM_REG_ARM_TIMER_CVAL, KVM_REG_ARM_TIMER_CTL};
	unsigned i;
	int r = 0;

	for (i = 0; i < 2 && r == 0; i++) {
		const void *value = value_of(from, order[i]);

		if (value != NULL)
			r = arm64_set(fd, order[i], value);
	}
	return r;
}

static int restore_time(struct vmm *vmm, const struct vmm_state *state)
{
	unsigned i;
	int r = 0;

	if (state->vcpus)
		r = arm64_set64(vmm->vcpu[0]->fd, KVM_REG_ARM_TIMER_CNT,
				state->counter + (machine_counter() - state->read_at));
	for (i = 0; i < state->vcpus && r == 0; i++)
		r = restore_timer(&state->vcpu[i], vmm->vcpu[i]->fd);
	return r;
}

static int restore_rest(struct vmm *vmm, const struct vmm_state *state)
{
	unsigned i;
	int r = restore_time(vmm, state);

	if (r == 0 && state->gic != NULL)
		r = arm64_gic_restore(vmm, state->gic);
	for (i = 0; i < state->vcpus && r == 0; i++)
		if (ioctl(vmm->vcpu[i]->fd, KVM_SET_MP_STATE, &state->vcpu[i].mp_state) < 0)
			r = -errno;
	if (r == 0 && vmm->serial != NULL)
		vmm_serial_restore(vmm->serial, &state->serial);
	return r;
}

int vmm_state_restore(struct vmm *vmm, const struct vmm_state *state)
{
	int r = 0, skipped = 0;
	unsigned i;

	if (vmm->vcpus || vmm->config.flags != state->flags)
		return -EINVAL;
	for (i = 0; i < state->vcpus && r >= 0; i++)
		r = vmm_make_vcpu(vmm, NULL, NULL);
	for (i = 0; i < state->vcpus && r >= 0; i++) {
		r = restore_registers(&state->vcpu[i], vmm->vcpu[i]->fd);
		skipped += r;
	}
	if (r >= 0)
		r = restore_rest(vmm, state);
	return r < 0 ? r : skipped;
}
