/* SPDX-License-Identifier: MIT */
/*
 * Clones of running guests.
 *
 *   parent                          child
 *   ------                          -----
 *   park
 *   state, devices: copied
 *   memory: ram->ops->clone
 *   unpark, runs on
 *                                   KVM VM, memory attached
 *                                   devices, state
 *                                   identity written
 *                                   vCPUs started
 *
 * invariants
 *	L1. What the child is made of is taken between one park and its unpark. So it
 *	    is the parent at one instant, and the parent does not wait for KVM to make a VM.
 *	L2. The state is taken before memory: KVM may write to guest memory when it is asked
 *	    for some of it (the virtual APIC page).
 *	L3. The identity is written before the child's first instruction.
 *
 * locks
 *	none of its own; several threads may clone one parent.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vmm.h"

struct snapshot {
	struct vmm_state *state;
	struct vmm_ram *ram;
	struct vmm_identity parent;
	struct vmm_device device[VMM_DEVICES];
	unsigned devices;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void drop(struct snapshot *s)
{
	unsigned i;

	for (i = 0; i < s->devices; i++)
		if (s->device[i].destroy != NULL)
			s->device[i].destroy(s->device[i].opaque);
	if (s->ram != NULL)
		s->ram->ops->destroy(s->ram);
	vmm_state_destroy(s->state);
}

/* The serial port is part of the state. */
static int copy_devices(struct vmm *parent, struct snapshot *s)
{
	unsigned i;

	for (i = 0; i < parent->devices; i++) {
		struct vmm_device device = parent->device[i];

		if (parent->serial != NULL && device.opaque == parent->serial)
			continue;
		if (device.clone != NULL)
			device.opaque = device.clone(device.opaque, parent);
		else
			device.destroy = NULL; /* it stays the parent's */
		if (device.clone != NULL && device.opaque == NULL)
			return -ENOMEM;
		s->device[s->devices++] = device;
	}
	return 0;
}

/* L1, L2 */
static int take(struct vmm *parent, struct snapshot *s, struct vmm_clone_times *times)
{
	uint64_t begin = now_ns(), mid;
	int r = vmm_park(parent);

	if (r < 0)
		return r;
	times->park_ns = now_ns() - begin;
	mid = now_ns();
	s->parent = parent->identity;
	r = vmm_state_save(parent, &s->state);
	if (r == 0)
		r = copy_devices(parent, s);
	times->state_ns = now_ns() - mid;
	mid = now_ns();
	if (r == 0)
		r = parent->ram->ops->clone(parent->ram, &s->ram);
	times->memory_ns = now_ns() - mid;
	vmm_unpark(parent);
	times->parked_ns = now_ns() - begin;
	return r;
}

static struct vmm_config config_of(const struct vmm *parent, const struct vmm_clone_config *config,
				   struct vmm_ram *ram)
{
	struct vmm_config child = parent->config;

	child.ram = ram;
	if (config->serial_out != NULL)
		child.serial_out = config->serial_out;
	if (config->exit != NULL)
		child.exit = config->exit;
	if (config->opaque != NULL)
		child.opaque = config->opaque;
	return child;
}

static int start(struct vmm *child, const struct vmm_state *state)
{
	unsigned i;
	int r = 0;

	for (i = 0; i < child->vcpus && r == 0; i++)
		if (vmm_state_started(state, i))
			r = vmm_vcpu_start(child->vcpu[i]);
	return r;
}

static int hand_over(struct snapshot *s, struct vmm *child)
{
	unsigned i;
	int r = 0;

	for (i = 0; i < s->devices && r == 0; i++)
		r = vmm_add_device(child, &s->device[i]);
	if (r < 0)
		i--; /* that one is still the snapshot's */
	s->devices -= i;
	memmove(s->device, s->device + i, s->devices * sizeof(s->device[0]));
	return r;
}

static int make(struct vmm *parent, const struct vmm_clone_config *config, struct snapshot *s, struct vmm **out)
{
	struct vmm_config child_config = config_of(parent, config, s->ram);
	struct vmm *child;
	int r = vmm_create(&child_config, &child);

	if (r < 0)
		return r;
	s->ram = NULL;
	r = hand_over(s, child);
	if (r == 0)
		r = vmm_state_restore(child, s->state);
	if (r >= 0)
		r = vmm_identify(child, &s->parent);
	if (r == 0 && !config->paused)
		r = start(child, s->state);
	if (r < 0) {
		vmm_destroy(child);
		return r;
	}
	*out = child;
	return 0;
}

int vmm_clone(struct vmm *parent, const struct vmm_clone_config *config, struct vmm **child)
{
	const struct vmm_clone_config none = {0};
	struct vmm_clone_times times = {0};
	struct snapshot s = {0};
	uint64_t begin;
	int r;

	if (config == NULL)
		config = &none;
	if (parent->ram == NULL)
		return -ENXIO;
	r = take(parent, &s, &times);
	begin = now_ns();
	if (r == 0)
		r = make(parent, config, &s, child);
	times.child_ns = now_ns() - begin;
	if (config->times != NULL)
		*config->times = times;
	drop(&s);
	return r;
}
