/* SPDX-License-Identifier: MIT */
/*
 * vCPU threads: KVM_RUN, what it returned for, and how the threads are brought
 * to rest. Invariants V1 to V5 are in vmm.h.
 *
 *   vCPU's thread                       who parks
 *   -------------                       ---------
 *                                       lock; parks++
 *                                       immediate_exit = 1; signal     (V3)
 *   KVM_RUN returns: an access          waits for the states
 *   the access is answered
 *   KVM_RUN completes it, sees
 *   immediate_exit: EINTR               (V2)
 *   lock; parks != 0: PARKED, waits  -> every state is PARKED: returns
 *                                       lock; parks--; wakes
 *   immediate_exit = 0; RUNNING
 *
 * locks
 *	vmm.lock
 *
 * Why not a mask given to KVM_SET_SIGNAL_MASK: immediate_exit closes the same
 * race without a system call, and leaves other signals to the embedder.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#include "arch.h"

#define KICK (SIGRTMIN + 2)

static __thread struct vmm_vcpu *self;

struct vmm_vcpu *vmm_vcpu_self(void)
{
	return self;
}

static struct vmm_vcpu *self_of(const struct vmm *vmm)
{
	return self != NULL && self->vmm == vmm ? self : NULL;
}

static void kicked(int sig)
{
}

static void install(void)
{
	struct sigaction sa;

	memset(&sa, 0, sizeof(sa));
	sa.sa_handler = kicked; /* without SA_RESTART: KVM_RUN returns EINTR */
	sigemptyset(&sa.sa_mask);
	sigaction(KICK, &sa, NULL);
}

void vmm_install_kick(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, install);
}

/* -- rest ---------------------------------------------------------------------------------- */

static void set_immediate_exit(struct vmm_vcpu *vcpu, uint8_t value)
{
	__atomic_store_n(&vcpu->run->immediate_exit, value, __ATOMIC_SEQ_CST);
}

/* Under the lock. A thread that is IDLE, STOPPED or PARKED looks at parks and stop before it runs. */
static void kick_locked(struct vmm_vcpu *vcpu)
{
	if (vcpu->state != VMM_RUNNING && vcpu->state != VMM_OUTSIDE)
		return;
	set_immediate_exit(vcpu, 1);
	pthread_kill(vcpu->thread, KICK);
}

static void set_state(struct vmm_vcpu *vcpu, enum vmm_vcpu_state state)
{
	vcpu->state = state;
	pthread_cond_broadcast(&vcpu->vmm->changed);
}

/* Its registers are whole. PARKED until the guest may run; true if the thread shall end instead. */
static bool rest(struct vmm_vcpu *vcpu)
{
	struct vmm *vmm = vcpu->vmm;
	bool stop;

	pthread_mutex_lock(&vmm->lock);
	if (vmm->parks || vmm->pauses)
		set_state(vcpu, VMM_PARKED);
	while ((vmm->parks || vmm->pauses) && !vcpu->stop && !vcpu->stopping)
		pthread_cond_wait(&vmm->changed, &vmm->lock);
	stop = vcpu->stop || vcpu->stopping;
	if (!stop) {
		set_immediate_exit(vcpu, 0);
		vcpu->state = VMM_RUNNING;
	}
	pthread_mutex_unlock(&vmm->lock);
	return stop;
}

/* Before a call that may wait for somebody who pauses (V5). Returns false if it is not RUNNING anyway. */
static bool step_out(struct vmm_vcpu *vcpu, enum vmm_vcpu_state state)
{
	bool was;

	pthread_mutex_lock(&vcpu->vmm->lock);
	was = vcpu->state == VMM_RUNNING;
	if (was)
		set_state(vcpu, state);
	pthread_mutex_unlock(&vcpu->vmm->lock);
	return was;
}

/* Back in a callback: RUNNING as soon as memory need not stand still. */
static void step_in(struct vmm_vcpu *vcpu)
{
	struct vmm *vmm = vcpu->vmm;

	pthread_mutex_lock(&vmm->lock);
	while (vmm->pauses)
		pthread_cond_wait(&vmm->changed, &vmm->lock);
	set_state(vcpu, VMM_RUNNING);
	if (vmm->parks || vcpu->stop)
		set_immediate_exit(vcpu, 1);
	pthread_mutex_unlock(&vmm->lock);
}

int vmm_read(struct vmm *vmm, uint64_t gpa, void *buf, size_t len)
{
	struct vmm_vcpu *vcpu = self_of(vmm);
	bool out = vcpu != NULL && step_out(vcpu, VMM_OUTSIDE);
	int r = vmm->ram ? vmm->ram->ops->read(vmm->ram, gpa, buf, len) : -ENXIO;

	if (out)
		step_in(vcpu);
	return r;
}

int vmm_write(struct vmm *vmm, uint64_t gpa, const void *buf, size_t len)
{
	struct vmm_vcpu *vcpu = self_of(vmm);
	bool out = vcpu != NULL && step_out(vcpu, VMM_OUTSIDE);
	int r = vmm->ram ? vmm->ram->ops->write(vmm->ram, gpa, buf, len) : -ENXIO;

	if (out)
		step_in(vcpu);
	return r;
}

/* Whether a vCPU but `except` is in one of the states first .. last. */
static bool any(const struct vmm *vmm, enum vmm_vcpu_state first, enum vmm_vcpu_state last)
{
	unsigned i;

	for (i = 0; i < vmm->vcpus; i++)
		if (vmm->vcpu[i]->state >= first && vmm->vcpu[i]->state <= last)
			return true;
	return false;
}

static void kick_and_wait(struct vmm *vmm, enum vmm_vcpu_state first, enum vmm_vcpu_state last)
{
	unsigned i;

	for (i = 0; i < vmm->vcpus; i++)
		kick_locked(vmm->vcpu[i]);
	while (any(vmm, first, last))
		pthread_cond_wait(&vmm->changed, &vmm->lock);
}

int vmm_park(struct vmm *vmm)
{
	if (self_of(vmm) != NULL)
		return -EDEADLK;
	pthread_mutex_lock(&vmm->lock);
	vmm->parks++;
	kick_and_wait(vmm, VMM_RUNNING, VMM_OUTSIDE);
	pthread_mutex_unlock(&vmm->lock);
	return 0;
}

void vmm_unpark(struct vmm *vmm)
{
	pthread_mutex_lock(&vmm->lock);
	if (--vmm->parks == 0)
		pthread_cond_broadcast(&vmm->changed);
	pthread_mutex_unlock(&vmm->lock);
}

void vmm_pause(struct vmm *vmm)
{
	struct vmm_vcpu *vcpu = self_of(vmm);

	pthread_mutex_lock(&vmm->lock);
	vmm->pauses++;
	if (vcpu != NULL && vcpu->own_pauses++ == 0 && vcpu->state == VMM_RUNNING)
		set_state(vcpu, VMM_OUTSIDE);
	kick_and_wait(vmm, VMM_RUNNING, VMM_RUNNING);
	pthread_mutex_unlock(&vmm->lock);
}

void vmm_unpause(struct vmm *vmm)
{
	struct vmm_vcpu *vcpu = self_of(vmm);
	bool in;

	pthread_mutex_lock(&vmm->lock);
	if (--vmm->pauses == 0)
		pthread_cond_broadcast(&vmm->changed);
	in = vcpu != NULL && --vcpu->own_pauses == 0 && vcpu->state == VMM_OUTSIDE;
	pthread_mutex_unlock(&vmm->lock);
	if (in)
		step_in(vcpu);
}

void vmm_vcpu_kick(struct vmm_vcpu *vcpu)
{
	pthread_mutex_lock(&vcpu->vmm->lock);
	kick_locked(vcpu);
	pthread_mutex_unlock(&vcpu->vmm->lock);
}

/* -- what KVM_RUN returned for ------------------------------------------------------------------ */

static const struct vmm_device *find(const struct vmm *vmm, enum vmm_space space, uint64_t at)
{
	unsigned i;

	for (i = 0; i < vmm->devices; i++)
		if (vmm->device[i].space == space && at - vmm->device[i].base < vmm->device[i].len)
			return &vmm->device[i];
	return NULL;
}

static int unclaimed(struct vmm_vcpu *vcpu, int otherwise)
{
	const struct vmm_config *config = &vcpu->vmm->config;

	return config->exit != NULL ? config->exit(vcpu, vcpu->run, config->opaque) : otherwise;
}

static int port_access(struct vmm_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	const struct vmm_device *d = find(vcpu->vmm, VMM_PIO, run->io.port);
	bool write = run->io.direction == KVM_EXIT_IO_OUT;
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	int r = VMM_CONTINUE, result = VMM_CONTINUE;
	uint32_t i;

	if (d == NULL) {
		if (!write)
			memset(data, 0xff, (size_t)run->io.size * run->io.count);
		return unclaimed(vcpu, VMM_CONTINUE);
	}
	for (i = 0; i < run->io.count && r >= 0; i++, data += run->io.size) {
		r = d->access(vcpu, d->opaque, run->io.port - d->base, data, run->io.size, write);
		if (r != VMM_CONTINUE)
			result = r;
	}
	return result;
}

static int mmio_access(struct vmm_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	const struct vmm_device *d = find(vcpu->vmm, VMM_MMIO, run->mmio.phys_addr);

	if (d != NULL)
		return d->access(vcpu, d->opaque, run->mmio.phys_addr - d->base, run->mmio.data, run->mmio.len,
				 run->mmio.is_write);
	if (!run->mmio.is_write)
		memset(run->mmio.data, 0xff, sizeof(run->mmio.data));
	return unclaimed(vcpu, VMM_CONTINUE);
}

static int dirty_ring_full(struct vmm_vcpu *vcpu)
{
	struct vmm_ram *ram = vcpu->vmm->ram;
	int r;

	if (ram == NULL || ram->ops->dirty_full == NULL)
		return unclaimed(vcpu, -EIO);
	step_out(vcpu, VMM_PARKED);
	r = ram->ops->dirty_full(ram);
	if (r < 0)
		return r;
	return rest(vcpu) ? VMM_STOP : VMM_CONTINUE;
}

int vmm_dispatch(struct vmm_vcpu *vcpu)
{
	vcpu->reason = vcpu->run->exit_reason;
	switch (vcpu->reason) {
	case KVM_EXIT_IO:
		return port_access(vcpu);
	case KVM_EXIT_MMIO:
		return mmio_access(vcpu);
	case KVM_EXIT_INTR:
	case KVM_EXIT_IRQ_WINDOW_OPEN:
		return VMM_CONTINUE;
	case KVM_EXIT_DIRTY_RING_FULL:
		return dirty_ring_full(vcpu);
	case KVM_EXIT_HLT:
	case KVM_EXIT_SHUTDOWN:
	case KVM_EXIT_SYSTEM_EVENT:
		return unclaimed(vcpu, VMM_STOP);
	default:
		return unclaimed(vcpu, -EIO);
	}
}

/* KVM_RUN returned -1: the registers are whole. */
static int run_failed(struct vmm_vcpu *vcpu, int err)
{
	struct vmm_ram *ram = vcpu->vmm->ram;
	int r;

	if (err == EAGAIN) /* a vCPU that waits for INIT or SIPI was woken */
		return VMM_CONTINUE;
	if (err == EINTR) {
		atomic_fetch_add_explicit(&vcpu->kicks, 1, memory_order_relaxed);
		return rest(vcpu) ? VMM_STOP : VMM_CONTINUE;
	}
	if (ram == NULL || ram->ops->run_failed == NULL)
		return -err;
	atomic_fetch_add_explicit(&vcpu->failed, 1, memory_order_relaxed);
	step_out(vcpu, VMM_PARKED);
	r = ram->ops->run_failed(ram, vcpu->fd, vcpu->run, err);
	if (r < 0)
		return r;
	return rest(vcpu) ? VMM_STOP : VMM_CONTINUE;
}

static int run_loop(struct vmm_vcpu *vcpu)
{
	int r;

	for (;;) {
		if (ioctl(vcpu->fd, KVM_RUN, NULL) < 0) {
			r = run_failed(vcpu, errno);
			if (r != VMM_CONTINUE)
				return r;
			continue;
		}
		atomic_fetch_add_explicit(&vcpu->exits, 1, memory_order_relaxed);
		r = vmm_dispatch(vcpu);
		if (r < 0)
			return r;
		if (r == VMM_STOP) {
			vcpu->stopping = true;
			set_immediate_exit(vcpu, 1); /* the access is completed first: V2 */
		}
	}
}

/* -- threads -------------------------------------------------------------------------------------- */

/* However the thread ends (V4): a callback may call pthread_exit(). */
static void gone(void *arg)
{
	struct vmm_vcpu *vcpu = arg;
	struct vmm *vmm = vcpu->vmm;

	pthread_mutex_lock(&vmm->lock);
	vmm->pauses -= vcpu->own_pauses;
	vcpu->own_pauses = 0;
	set_state(vcpu, VMM_STOPPED);
	pthread_mutex_unlock(&vmm->lock);
}

static void *thread_main(void *arg)
{
	struct vmm_vcpu *vcpu = arg;
	sigset_t kick;
	int r;

	sigemptyset(&kick);
	sigaddset(&kick, KICK);
	pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
	self = vcpu;
	pthread_cleanup_push(gone, vcpu);
	r = rest(vcpu) ? VMM_STOP : run_loop(vcpu);
	vcpu->result = r == VMM_STOP && !vcpu->stopping ? 0 : r;
	pthread_cleanup_pop(1);
	return NULL;
}

static void join(struct vmm_vcpu *vcpu)
{
	if (vcpu->joinable)
		pthread_join(vcpu->thread, NULL);
	vcpu->joinable = false;
}

int vmm_vcpu_start(struct vmm_vcpu *vcpu)
{
	struct vmm *vmm = vcpu->vmm;
	enum vmm_vcpu_state before;
	int err;

	pthread_mutex_lock(&vmm->lock);
	before = vcpu->state;
	if (before == VMM_IDLE || before == VMM_STOPPED)
		vcpu->state = VMM_PARKED; /* it looks at parks before it runs */
	pthread_mutex_unlock(&vmm->lock);
	if (before != VMM_IDLE && before != VMM_STOPPED)
		return -EBUSY;
	join(vcpu);
	vcpu->stop = vcpu->stopping = false;
	vcpu->result = -ECANCELED; /* what stays if the thread ends half-way */
	vcpu->reason = KVM_EXIT_UNKNOWN;
	err = -vmm_arch_ready(vmm);
	if (!err)
		err = pthread_create(&vcpu->thread, NULL, thread_main, vcpu);
	if (err) {
		pthread_mutex_lock(&vmm->lock);
		set_state(vcpu, before);
		pthread_mutex_unlock(&vmm->lock);
		return -err;
	}
	vcpu->joinable = true;
	return 0;
}

static void ask_to_stop(struct vmm_vcpu *vcpu)
{
	pthread_mutex_lock(&vcpu->vmm->lock);
	vcpu->stop = true;
	kick_locked(vcpu);
	pthread_cond_broadcast(&vcpu->vmm->changed);
	pthread_mutex_unlock(&vcpu->vmm->lock);
}

int vmm_vcpu_stop(struct vmm_vcpu *vcpu)
{
	if (self == vcpu)
		return -EDEADLK;
	ask_to_stop(vcpu);
	join(vcpu);
	return 0;
}

int vmm_start(struct vmm *vmm)
{
	unsigned i;
	int r;

	for (i = 0; i < vmm->vcpus; i++) {
		r = vmm_vcpu_start(vmm->vcpu[i]);
		if (r < 0)
			return r;
	}
	return 0;
}

void vmm_stop(struct vmm *vmm)
{
	unsigned i;

	for (i = 0; i < vmm->vcpus; i++)
		ask_to_stop(vmm->vcpu[i]);
	for (i = 0; i < vmm->vcpus; i++)
		join(vmm->vcpu[i]);
}

static bool ended(const struct vmm_vcpu *vcpu)
{
	return vcpu->state == VMM_STOPPED || vcpu->state == VMM_IDLE;
}

int vmm_vcpu_wait(struct vmm_vcpu *vcpu, int timeout_ms)
{
	struct vmm *vmm = vcpu->vmm;
	struct timespec until;
	int err = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	pthread_mutex_lock(&vmm->lock);
	while (!ended(vcpu) && err != ETIMEDOUT)
		err = timeout_ms < 0 ? pthread_cond_wait(&vmm->changed, &vmm->lock) :
				       pthread_cond_timedwait(&vmm->changed, &vmm->lock, &until);
	err = ended(vcpu) ? 0 : -ETIMEDOUT;
	pthread_mutex_unlock(&vmm->lock);
	return err;
}

int vmm_wait(struct vmm *vmm, int timeout_ms)
{
	unsigned i;
	int r;

	for (i = 0; i < vmm->vcpus; i++) {
		r = vmm_vcpu_wait(vmm->vcpu[i], timeout_ms);
		if (r < 0)
			return r;
	}
	return 0;
}
