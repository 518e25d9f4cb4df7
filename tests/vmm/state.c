/* SPDX-License-Identifier: MIT */
/*
 * The state of a machine that rests: what is in it is the architecture's (x86_state.c, arm64_state.c).
 *
 * Locks taken: vmm->lock.
 */
#include <errno.h>

#include "arch.h"

/* Nobody is in a vCPU, or may change what it is in the middle of. */
static bool at_rest(struct vmm *vmm)
{
	bool yes = true;
	unsigned i;

	pthread_mutex_lock(&vmm->lock);
	for (i = 0; i < vmm->vcpus; i++)
		yes = yes && vmm->vcpu[i]->state != VMM_RUNNING && vmm->vcpu[i]->state != VMM_OUTSIDE;
	pthread_mutex_unlock(&vmm->lock);
	return yes;
}

int vmm_state_save(struct vmm *vmm, struct vmm_state **out)
{
	struct vmm_state *state;
	int r;

	if (!at_rest(vmm))
		return -EBUSY;
	state = vmm_arch_state(vmm);
	if (state == NULL)
		return -ENOMEM;
	r = vmm_arch_save(vmm, state);
	if (r < 0) {
		vmm_state_destroy(state);
		return r;
	}
	*out = state;
	return 0;
}
