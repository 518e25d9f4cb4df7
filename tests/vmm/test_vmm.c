/* SPDX-License-Identifier: MIT */
/*
 * The reference VMM on memory of mmap: payloads do what the same code does in
 * this process, threads come to rest and leave in every way, and a VM goes on exactly
 * where its state was taken from another one.
 */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <kage/kage.h>
#include <kage/kvm.h>

#include "../common/leak.h"
#include "../model/rng.h"
#include "payload.h"

#define PAGE	   ((uint64_t)4096)
#define MIB	   ((uint64_t)1 << 20)
#define RAM	   (32 * MIB)
#define MAP	   (64 * MIB) /* the rest has no memory */
#define TIMEOUT_MS (60000 * (1 + (int)env_number("CK_TIMEOUT_MULTIPLIER", 0))) /* as Check's own */
#define ok(x)	   ck_assert_int_eq((x), 0)
#define is(x, y)   ck_assert_uint_eq((x), (y))

static const struct payload_config large = {.map = MAP}, small = {.map = MAP, .small_pages = true};

static void sleep_ms(unsigned ms)
{
	const struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};

	nanosleep(&t, NULL);
}

static struct vmm *make_with(struct vmm_config config, unsigned vcpus, const struct payload_config *payload)
{
	const struct vmm_region region = {0, RAM};
	struct vmm *vmm;
	unsigned i;

	if (config.ram == NULL)
		ok(vmm_ram_plain(&region, 1, &config.ram));
	config.identity = PAYLOAD_IDENTITY;
	ok(vmm_create(&config, &vmm));
	for (i = 0; i < vcpus; i++)
		ok(vmm_add_vcpu(vmm, NULL));
	if (payload != NULL)
		ok(payload_load(vmm, payload));
	return vmm;
}

static struct vmm *make(unsigned vcpus, const struct payload_config *payload)
{
	return make_with((struct vmm_config){0}, vcpus, payload);
}

/* vCPU i works on its own `pages` pages, with its log behind them. */
static void put(struct vmm *vmm, unsigned i, struct payload_mailbox mb)
{
	uint64_t room = mb.pages * PAGE + 2 * MIB;

	if (!mb.base)
		mb.base = payload_free(&small) + i * room;
	mb.log = mb.base + mb.pages * PAGE;
	ok(payload_put(vmm, i, &mb));
}

static struct payload_mailbox get(struct vmm *vmm, unsigned i)
{
	struct payload_mailbox mb;

	ok(payload_get(vmm, i, &mb));
	return mb;
}

static void put_stamps(struct vmm *vmm)
{
	unsigned i;

	for (i = 0; i < vmm->vcpus; i++)
		put(vmm, i, (struct payload_mailbox){.program = PAYLOAD_STAMP, .pages = 256, .words = i ? 8 : 512,
						     .seed = i});
}

/* Starts the vCPUs and lets each stamp something. */
static void run_stamps(struct vmm *vmm)
{
	uint64_t before[VMM_VCPUS];
	unsigned i;

	for (i = 0; i < vmm->vcpus; i++)
		before[i] = payload_peek(vmm, i, count);
	ok(vmm_start(vmm));
	for (i = 0; i < vmm->vcpus; i++)
		while (payload_peek(vmm, i, count) == before[i])
			sleep_ms(1);
}

static void check_stamps(struct vmm *vmm)
{
	unsigned i;

	ok(payload_stop(vmm, TIMEOUT_MS));
	for (i = 0; i < vmm->vcpus; i++) {
		struct payload_mailbox mb = get(vmm, i);

		ck_assert_msg(!mb.errors, "vcpu %u: %lu errors; gfn %lx word %lx found %lx expected %lx", i,
			      mb.errors, mb.error_page, mb.error_word, mb.error_found, mb.error_expected);
		is(mb.audited, mb.pages);
		ck_assert_uint_gt(mb.count, 0);
		ck_assert_int_eq(payload_check_stamps(vmm, i), 0);
	}
}

#if defined(__x86_64__)
#include "x86_test_vmm.h"
#else
#include "arm64_test_vmm.h"
#endif

/* -- exits ---------------------------------------------------------------------------- */

START_TEST(ports)
{
	struct vmm *vmm = make(1, &large);
	struct payload_port *port = payload_port(vmm);

	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_HYPERCALL, .pages = 1, .iterations = 100, .seed = 7});
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	is(port->values, 100);
	is(port->sum, 100 * 7 + 99 * 100 / 2);
	is(port->last, 106);
	is(port->done, 1);
	ok(payload_poke(vmm, 0, mode, PAYLOAD_IN));
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	is(payload_peek(vmm, 0, checksum), 100 * 107);
	is(port->done, 2);
	is(vmm->vcpu[0]->exits, 202);
	vmm_destroy(vmm);
}
END_TEST

struct seen {
	uint64_t sum, reads, writes;
};

static int device_access(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size, bool write)
{
	struct seen *seen = opaque;
	uint64_t value = 1000;

	ck_assert_uint_eq(size, 8);
	ck_assert_uint_eq(offset, 16);
	if (!write) {
		seen->reads++;
		memcpy(data, &value, 8);
		return VMM_CONTINUE;
	}
	memcpy(&value, data, 8);
	seen->sum += value;
	seen->writes++;
	return VMM_CONTINUE;
}

START_TEST(mmio)
{
	struct vmm *vmm = make(1, _i ? &small : &large);
	struct seen seen = {0};
	const struct vmm_device device = {VMM_MMIO, RAM + PAGE, 64, device_access, NULL, NULL, &seen};

	ok(vmm_add_device(vmm, &device));
	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_HYPERCALL, .base = RAM + PAGE + 16, .iterations = 50,
					     .seed = 1, .mode = PAYLOAD_MMIO_WRITE});
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	is(seen.writes, 50);
	is(seen.sum, 50 * 51 / 2);
	ok(payload_poke(vmm, 0, mode, PAYLOAD_MMIO_READ));
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	is(seen.reads, 50);
	is(payload_peek(vmm, 0, checksum), 50 * 1000);
	ok(payload_poke(vmm, 0, base, RAM)); /* nothing answers there */
	ok(payload_poke(vmm, 0, iterations, 1));
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	is(payload_peek(vmm, 0, checksum), ~(uint64_t)0);
	vmm_destroy(vmm);
}
END_TEST

/* A fault without a handler: the vCPU stops and says so, the process goes on. */
START_TEST(triple_fault)
{
	struct vmm *vmm = make(1, &large);

	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_TOUCH, .base = MAP, .pages = 1, .mode = PAYLOAD_READ});
	ck_assert_int_eq(payload_round(vmm, 0, TIMEOUT_MS), -EIO);
	is(vmm->vcpu[0]->reason, PAYLOAD_EXIT_FAULT);
	check_fault(vmm, MAP);
	vmm_destroy(vmm);
}
END_TEST

/* -- programs: what they find is what the same code finds in this process --------------------- */

static void compare_with_host(struct vmm *vmm, void (*program)(struct payload_mailbox *, char *))
{
	char *copy = malloc(RAM), *ram = vmm_ptr(vmm, 0, RAM);
	struct payload_mailbox *host = (void *)(copy + PAYLOAD_MAILBOX), guest;

	memcpy(copy, ram, RAM);
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	host->go++;
	program(host, copy);
	guest = get(vmm, 0);
	is(guest.count, host->count);
	is(guest.checksum, host->checksum);
	is(guest.errors, 0);
	ck_assert_uint_gt(guest.tsc_end, guest.tsc_begin);
	ck_assert_int_eq(memcmp(copy + payload_free(&small), ram + payload_free(&small), RAM - payload_free(&small)), 0);
	free(copy);
}

START_TEST(memory)
{
	struct vmm *vmm = make(1, _i & 1 ? &small : &large);

	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_MEMORY, .pages = 1000, .iterations = 300000, .seed = 3,
					     .mode = _i & 2 ? PAYLOAD_RANDOM : PAYLOAD_SEQUENTIAL});
	compare_with_host(vmm, guest_memory);
	compare_with_host(vmm, guest_memory); /* on what the first round left */
	ck_assert_uint_ne(payload_peek(vmm, 0, checksum), 0);
	is(payload_peek(vmm, 0, count), 300000);
	vmm_destroy(vmm);
}
END_TEST

START_TEST(dirty)
{
	struct vmm *vmm = make(1, &large);
	uint64_t *log, base = payload_free(&small) / PAGE, i;

	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_DIRTY, .pages = 1000, .iterations = 5000, .seed = 11});
	compare_with_host(vmm, guest_dirty);
	log = vmm_ptr(vmm, payload_peek(vmm, 0, log), 5000 * 8);
	for (i = 0; i < 5000; i++)
		ck_assert(log[i] >= base && log[i] < base + 1000);
	is(payload_peek(vmm, 0, count), 5000);
	vmm_destroy(vmm);
}
END_TEST

START_TEST(touch)
{
	struct vmm *vmm = make(1, &small);

	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_TOUCH, .pages = 1000, .mode = PAYLOAD_READ, .seed = 5});
	compare_with_host(vmm, guest_touch);
	is(payload_peek(vmm, 0, checksum), 0);
	ok(payload_poke(vmm, 0, mode, PAYLOAD_WRITE));
	compare_with_host(vmm, guest_touch);
	ok(payload_poke(vmm, 0, mode, PAYLOAD_READ));
	compare_with_host(vmm, guest_touch);
	ck_assert_uint_ne(payload_peek(vmm, 0, checksum), 0);
	vmm_destroy(vmm);
}
END_TEST

START_TEST(ticks)
{
	struct vmm *vmm = make(1, &large);
	struct payload_mailbox mb;
	uint64_t i, *ram = vmm_ptr(vmm, 0, RAM);

	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_TICKS, .pages = 1000, .iterations = 1000});
	ok(vmm_start(vmm));
	ok(payload_go(vmm, 0));
	while (payload_peek(vmm, 0, done) != 1)
		sleep_ms(1);
	ok(payload_stop(vmm, TIMEOUT_MS));
	mb = get(vmm, 0);
	ck_assert_uint_gt(mb.longest, 0);
	ck_assert_uint_gt(mb.count, 0);
	ck_assert_uint_gt(mb.slowest, 0);
	ck_assert_uint_ge(mb.tsc_end - mb.tsc_begin, mb.slowest);
	for (i = 0; i < 1000; i++)
		ck_assert_uint_ge(ram[(mb.base + i * PAGE) / 8], mb.tsc_begin);
	is(ram[(mb.base + i * PAGE) / 8], 0);
	vmm_destroy(vmm);
}
END_TEST

START_TEST(stamps)
{
	struct vmm *vmm = make(_i, _i & 1 ? &large : &small);
	uint64_t *word;
	unsigned i;

	put_stamps(vmm);
	run_stamps(vmm);
	sleep_ms(50);
	check_stamps(vmm);
	/* A flipped bit is found from both sides. */
	word = vmm_ptr(vmm, payload_peek(vmm, 0, base) + 17 * PAGE + 8, 8);
	*word ^= 1;
	ck_assert_int_eq(payload_check_stamps(vmm, 0), 1);
	for (i = 0; i < vmm->vcpus; i++)
		ok(payload_poke(vmm, i, stop, 0));
	run_stamps(vmm);
	ok(payload_stop(vmm, TIMEOUT_MS));
	is(payload_peek(vmm, 0, errors), 1);
	is(payload_peek(vmm, 0, error_page), payload_peek(vmm, 0, base) / PAGE + 17);
	is(payload_peek(vmm, 0, error_word), 1);
	vmm_destroy(vmm);
}
END_TEST

/* -- threads -------------------------------------------------------------------------------- */

START_TEST(park_1000_times)
{
	struct vmm *vmm = make(2, &large);
	uint64_t *count[2], before, moved = 0;
	unsigned i, v;

	put_stamps(vmm);
	for (v = 0; v < 2; v++)
		count[v] = vmm_ptr(vmm, PAYLOAD_MAILBOX + v * PAGE + offsetof(struct payload_mailbox, count), 8);
	run_stamps(vmm);
	for (i = 0; i < 1000; i++) {
		ok(vmm_park(vmm));
		for (v = 0; v < 2; v++) {
			ck_assert_int_eq(vmm->vcpu[v]->state, VMM_PARKED);
			before = __atomic_load_n(count[v], __ATOMIC_RELAXED);
			sched_yield();
			is(__atomic_load_n(count[v], __ATOMIC_RELAXED), before);
		}
		before = *count[0] + *count[1];
		vmm_unpark(vmm);
		if (i % 10 == 0)
			sleep_ms(1);
		moved += __atomic_load_n(count[0], __ATOMIC_RELAXED) + __atomic_load_n(count[1], __ATOMIC_RELAXED) > before;
	}
	ck_assert_uint_gt(moved, 0);
	check_stamps(vmm);
	vmm_destroy(vmm);
}
END_TEST

/* Parks nest, also from several threads. */
static void *parker(void *arg)
{
	struct vmm *vmm = arg;
	unsigned i;

	for (i = 0; i < 200; i++) {
		vmm_park(vmm);
		vmm_pause(vmm);
		vmm_unpark(vmm);
		vmm_unpause(vmm);
	}
	return NULL;
}

START_TEST(parks_of_many)
{
	struct vmm *vmm = make(2, &large);
	pthread_t thread[3];
	unsigned i;

	put_stamps(vmm);
	run_stamps(vmm);
	for (i = 0; i < 3; i++)
		ok(pthread_create(&thread[i], NULL, parker, vmm));
	for (i = 0; i < 3; i++)
		ok(pthread_join(thread[i], NULL));
	is(vmm->parks, 0);
	is(vmm->pauses, 0);
	check_stamps(vmm);
	vmm_destroy(vmm);
}
END_TEST

/* A device that stops the guest, writes to its memory, and may not park or clone. */
static int pausing_access(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size, bool write)
{
	_Atomic uint64_t *calls = opaque, at = payload_free(&small) + vcpu->index * 8, value = 0;
	struct vmm *vmm = vcpu->vmm, *none = NULL;
	unsigned i;

	vmm_pause(vmm);
	for (i = 0; i < vmm->vcpus; i++)
		ck_assert_int_ne(vmm->vcpu[i]->state, VMM_RUNNING);
	vmm_unpause(vmm);
	ck_assert_int_eq(vmm_park(vmm), -EDEADLK);
	ck_assert_int_eq(vmm_clone(vmm, NULL, &none), -EDEADLK);
	ck_assert_int_eq(vmm_vcpu_stop(vcpu), -EDEADLK);
	vmm_read(vmm, at, (void *)&value, 8);
	value++;
	vmm_write(vmm, at, (void *)&value, 8);
	atomic_fetch_add(calls, 1);
	return VMM_CONTINUE;
}

START_TEST(pause_in_a_device)
{
	struct vmm *vmm = make(2, &large);
	_Atomic uint64_t calls = 0;
	const struct vmm_device device = {VMM_MMIO, RAM, 64, pausing_access, NULL, NULL, (void *)&calls};
	const uint64_t *counted = vmm_ptr(vmm, payload_free(&small), 16);
	pthread_t thread;
	unsigned i;

	ok(vmm_add_device(vmm, &device));
	for (i = 0; i < 2; i++) {
		put(vmm, i, (struct payload_mailbox){.program = PAYLOAD_HYPERCALL, .base = RAM, .iterations = 500,
						     .mode = PAYLOAD_MMIO_WRITE, .go = 1});
	}
	ok(pthread_create(&thread, NULL, parker, vmm));
	ok(vmm_start(vmm));
	ok(vmm_wait(vmm, TIMEOUT_MS));
	ok(pthread_join(thread, NULL));
	is(calls, 1000);
	is(counted[0], 500);
	is(counted[1], 500);
	is(payload_peek(vmm, 0, done), 1);
	is(payload_peek(vmm, 1, done), 1);
	vmm_destroy(vmm);
}
END_TEST

static void on_signal(int sig)
{
}

/* Signals of somebody else end KVM_RUN but not the thread. */
START_TEST(foreign_signals)
{
	struct sigaction sa = {.sa_handler = on_signal};
	struct vmm *vmm = make(2, &large);
	unsigned i;

	ok(sigaction(SIGUSR1, &sa, NULL));
	put_stamps(vmm);
	run_stamps(vmm);
	for (i = 0; i < 500; i++) {
		ok(pthread_kill(vmm->vcpu[i % 2]->thread, SIGUSR1));
		vmm_vcpu_kick(vmm->vcpu[i % 2]);
		if (i % 50 == 0)
			sleep_ms(1);
	}
	ck_assert_int_eq(vmm_vcpu_wait(vmm->vcpu[0], 0), -ETIMEDOUT);
	check_stamps(vmm);
	ck_assert_uint_gt(vmm->vcpu[0]->kicks, 0);
	vmm_destroy(vmm);
}
END_TEST

static int dying_access(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size, bool write)
{
	if (opaque != NULL)
		vmm_pause(vcpu->vmm); /* which nobody will undo */
	pthread_exit(NULL);
}

/* A vCPU's thread that dies in a device: nobody waits for it, and the vCPU can be given another. */
START_TEST(thread_dies)
{
	struct vmm *vmm = make(2, &large);
	struct vmm_device device = {VMM_MMIO, RAM, 64, dying_access, NULL, NULL, _i ? vmm : NULL};

	ok(vmm_add_device(vmm, &device));
	put_stamps(vmm);
	put(vmm, 1, (struct payload_mailbox){.program = PAYLOAD_HYPERCALL, .base = RAM, .iterations = 1,
					     .mode = PAYLOAD_MMIO_WRITE, .go = 1});
	ok(vmm_start(vmm));
	ok(vmm_vcpu_wait(vmm->vcpu[1], TIMEOUT_MS));
	ck_assert_int_eq(vmm->vcpu[1]->result, -ECANCELED);
	is(vmm->pauses, 0);
	ok(vmm_park(vmm));
	vmm_unpark(vmm);
	ok(vmm_vcpu_start(vmm->vcpu[1])); /* the write that it died in is completed: the round ends */
	ok(vmm_vcpu_wait(vmm->vcpu[1], TIMEOUT_MS));
	is(payload_peek(vmm, 1, done), 1);
	while (!payload_peek(vmm, 0, count)) /* the other one goes on */
		sleep_ms(1);
	ok(payload_poke(vmm, 0, stop, 1));
	ok(vmm_vcpu_wait(vmm->vcpu[0], TIMEOUT_MS));
	ck_assert_int_eq(payload_check_stamps(vmm, 0), 0);
	vmm_destroy(vmm);
}
END_TEST

/* A VM is closed while its guest runs, or while it is parked. */
START_TEST(close_while_running)
{
	struct vmm *vmm;
	unsigned i;

	for (i = 0; i < 20; i++) {
		vmm = make(2, &large);
		put_stamps(vmm);
		ok(vmm_start(vmm));
		if (i % 2)
			sleep_ms(2);
		ck_assert_int_eq(vmm_vcpu_start(vmm->vcpu[0]), -EBUSY);
		if (i % 4 >= 2) {
			ok(vmm_park(vmm));
			ok(vmm_vcpu_stop(vmm->vcpu[1]));
			ck_assert_int_eq(vmm->vcpu[1]->result, 0);
		}
		vmm_destroy(vmm);
	}
}
END_TEST

/* -- KVM_RUN = -1 --------------------------------------------------------------------------------- */

static void *hidden;
static unsigned repairs;

static int repair(struct vmm_ram *ram, int vcpufd, const struct kvm_run *run, int err)
{
	ck_assert_int_eq(err, EFAULT);
	repairs++;
	return mprotect(hidden, PAGE, PROT_READ | PROT_WRITE) < 0 ? -errno : 0;
}

static int refuse(struct vmm_ram *ram, int vcpufd, const struct kvm_run *run, int err)
{
	repairs++;
	return -err;
}

START_TEST(run_failed)
{
	const struct vmm_region region = {0, RAM};
	struct vmm_ram_ops ops;
	struct vmm_config config = {0};
	struct vmm *vmm;
	uint64_t gpa = payload_free(&small) + 5 * PAGE;

	ok(vmm_ram_plain(&region, 1, &config.ram));
	ops = *config.ram->ops;
	ops.run_failed = _i ? refuse : repair;
	config.ram->ops = &ops;
	vmm = make_with(config, 1, &large);
	hidden = vmm_ptr(vmm, gpa, PAGE);
	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_TOUCH, .pages = 10, .mode = PAYLOAD_WRITE});
	ok(mprotect(hidden, PAGE, PROT_NONE));
	ck_assert_int_eq(payload_round(vmm, 0, TIMEOUT_MS), _i ? -EFAULT : 0);
	is(repairs, 1);
	is(vmm->vcpu[0]->failed, 1);
	if (_i) {
		ok(mprotect(hidden, PAGE, PROT_READ | PROT_WRITE));
		ok(vmm_vcpu_start(vmm->vcpu[0])); /* goes on at the access that failed */
		ok(vmm_vcpu_wait(vmm->vcpu[0], TIMEOUT_MS));
	}
	is(payload_peek(vmm, 0, count), 10);
	ck_assert_uint_ne(*(uint64_t *)hidden, 0);
	vmm_destroy(vmm);
}
END_TEST

/* -- state ------------------------------------------------------------------------------------------ */

/* Runs a round until it is parked in the middle of it. */
static void park_in_a_round(struct vmm *vmm)
{
	uint64_t n;

	for (n = 1000000;; n *= 4) {
		memset(vmm_ptr(vmm, payload_free(&small), 1000 * PAGE), 0, 1000 * PAGE);
		put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_MEMORY, .pages = 1000, .iterations = n,
						     .mode = PAYLOAD_RANDOM, .seed = n, .go = 1});
		ok(vmm_vcpu_start(vmm->vcpu[0]));
		while (!payload_peek(vmm, 0, tsc_begin))
			sleep_ms(1);
		sleep_ms(5);
		ok(vmm_park(vmm));
		if (vmm->vcpu[0]->state == VMM_PARKED && !payload_peek(vmm, 0, done))
			return;
		vmm_unpark(vmm);
		ok(vmm_vcpu_wait(vmm->vcpu[0], TIMEOUT_MS));
		ck_assert_uint_lt(n, (uint64_t)1 << 40);
	}
}

/*
 * State and a copy of memory, taken in the middle of a computation: the parent, a second VM, and a third one
 * from the second's end up with the same result, which is the one of this process.
 */
START_TEST(moved)
{
	const struct vmm_config config = {.flags = _i ? VMM_IRQCHIP | VMM_SERIAL : 0};
	struct vmm *vmm[3] = {make_with(config, 1, _i ? &small : &large), NULL, NULL};
	struct payload_mailbox *host;
	struct vmm_state *state;
	char *copy = malloc(RAM);
	unsigned i;

	park_in_a_round(vmm[0]);
	memcpy(copy, vmm_ptr(vmm[0], 0, RAM), RAM);
	for (i = 1; i < 3; i++) {
		vmm[i] = make_with(config, 0, NULL);
		ok(vmm_state_save(vmm[i - 1], &state));
		is(vmm_state_skipped(state), 0);
		ck_assert(i > 1 || vmm_state_started(state, 0));
		memcpy(vmm_ptr(vmm[i], 0, RAM), copy, RAM);
		ck_assert_int_ge(vmm_state_restore(vmm[i], state), 0);
		vmm_state_destroy(state);
	}
	for (i = 1; i < 3; i++) {
		const struct vmm_device *port = &vmm[0]->device[vmm[0]->devices - 1];
		struct vmm_device own = *port;

		own.destroy = NULL;
		ok(vmm_add_device(vmm[i], &own));
		ok(vmm_vcpu_start(vmm[i]->vcpu[0]));
	}
	vmm_unpark(vmm[0]);
	host = (void *)(copy + PAYLOAD_MAILBOX);
	memset(copy + host->base, 0, host->pages * PAGE);
	guest_memory(host, copy);
	for (i = 0; i < 3; i++) {
		ok(vmm_wait(vmm[i], TIMEOUT_MS));
		is(payload_peek(vmm[i], 0, done), 1);
		is(payload_peek(vmm[i], 0, checksum), host->checksum);
		ck_assert_int_eq(memcmp(vmm_ptr(vmm[i], host->base, host->pages * PAGE), copy + host->base,
					host->pages * PAGE), 0);
	}
	vmm_destroy(vmm[2]);
	vmm_destroy(vmm[1]);
	vmm_destroy(vmm[0]);
	free(copy);
}
END_TEST

START_TEST(every_part)
{
	const struct vmm_config config = {.flags = _i ? VMM_IRQCHIP | VMM_SERIAL : 0};
	struct vmm *from = make_with(config, 1, &large), *to = make_with(config, 0, NULL);
	struct seen_state *seen = calloc(3, sizeof(*seen));
	struct vmm_state *state;

	look(from, &seen[0], _i);
	disturb(from, _i);
	look(from, &seen[1], _i);
	is_disturbed(&seen[0], &seen[1], _i);
	ok(vmm_state_save(from, &state));
	ck_assert_int_eq(vmm_state_restore(from, state), -EINVAL); /* it has a vCPU */
	ck_assert_int_eq(vmm_state_restore(to, state), 0);
	look(to, &seen[2], _i);
	same_state(&seen[1], &seen[2]);
	vmm_state_destroy(state);
	vmm_destroy(to);
	vmm_destroy(from);
	free(seen);
}
END_TEST

START_TEST(save_needs_rest)
{
	struct vmm *vmm = make(1, &large);
	struct vmm_state *state = NULL;

	put_stamps(vmm);
	run_stamps(vmm);
	ck_assert_int_eq(vmm_state_save(vmm, &state), -EBUSY);
	ck_assert_ptr_null(state);
	vmm_destroy(vmm);
}
END_TEST

static int stopping_access(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size, bool write)
{
	_Atomic uint64_t *reads = opaque;
	const uint64_t value = 1000;

	ck_assert(!write);
	memcpy(data, &value, size);
	atomic_fetch_add(reads, 1);
	return VMM_STOP;
}

/* A vCPU that a device stopped has its access behind it: a clone does not do it again. */
START_TEST(stopped_in_an_access)
{
	struct vmm *vmm = make(1, &large), *child;
	_Atomic uint64_t reads = 0;
	const struct vmm_device device = {VMM_MMIO, RAM, 64, stopping_access, NULL, NULL, (void *)&reads};

	ok(vmm_add_device(vmm, &device));
	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_HYPERCALL, .base = RAM, .iterations = 1,
					     .mode = PAYLOAD_MMIO_READ, .go = 1});
	ok(vmm_start(vmm));
	ok(vmm_wait(vmm, TIMEOUT_MS));
	is(payload_peek(vmm, 0, done), 0);
	ok(vmm_clone(vmm, NULL, &child));
	ck_assert_int_eq(child->vcpu[0]->state, VMM_IDLE);
	ok(vmm_start(child));
	ok(vmm_wait(child, TIMEOUT_MS));
	is(payload_peek(child, 0, done), 1);
	is(payload_peek(child, 0, checksum), 1000);
	is(reads, 1);
	is(payload_peek(vmm, 0, done), 0);
	vmm_destroy(vmm);
	vmm_destroy(child);
}
END_TEST

/* -- clones ------------------------------------------------------------------------------------------ */

/* Reads find 1, 2, 3 …; writes are added up. One access of the parent's lasts until somebody wants the guest to rest. */
struct holding {
	_Atomic uint64_t accesses, sum;
	_Atomic int held; /* that one has begun */
};

#define HELD	 3
#define ACCESSES 5

static int holding_access(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size, bool write)
{
	struct holding *h = opaque;
	struct vmm *vmm = vcpu->vmm;
	uint64_t n = atomic_fetch_add(&h->accesses, 1) + 1, value = 0;

	if (write) {
		memcpy(&value, data, size);
		atomic_fetch_add(&h->sum, value);
	} else {
		memcpy(data, &n, size);
	}
	if (n == HELD && !atomic_exchange(&h->held, 1))
		for (unsigned parks = 0; !parks; sleep_ms(1)) {
			pthread_mutex_lock(&vmm->lock);
			parks = vmm->parks;
			pthread_mutex_unlock(&vmm->lock);
		}
	return VMM_CONTINUE;
}

static void *clone_holding(void *opaque, struct vmm *parent)
{
	const struct holding *h = opaque;
	struct holding *copy = calloc(1, sizeof(*copy));

	if (copy != NULL)
		*copy = (struct holding){h->accesses, h->sum, h->held};
	return copy;
}

/* It had all accesses, each once, with what the other side of it wanted. */
static void check_holding(struct vmm *vmm, bool write)
{
	const struct holding *h = NULL;
	const uint64_t all = ACCESSES * (ACCESSES + 1) / 2;

	ok(vmm_wait(vmm, TIMEOUT_MS));
	for (unsigned i = 0; i < vmm->devices; i++)
		if (vmm->device[i].access == holding_access)
			h = vmm->device[i].opaque;
	ck_assert_ptr_nonnull(h);
	is(payload_peek(vmm, 0, done), 1);
	is(h->accesses, ACCESSES);
	is(h->sum, write ? all : 0);
	is(payload_peek(vmm, 0, checksum), write ? 0 : all);
}

/*
 * The clone is asked for while an access of the guest's waits for its device (ports and memory, both ways): KVM completes it
 * before state is taken (Documentation/virt/kvm/api.rst, KVM_RUN, immediate_exit), so neither side repeats or loses it.
 */
START_TEST(cloned_in_an_access)
{
	static const uint64_t modes[] = {PAYLOAD_OUT, PAYLOAD_IN, PAYLOAD_MMIO_WRITE, PAYLOAD_MMIO_READ};
	const uint64_t mode = modes[_i % 4];
	const bool write = mode == PAYLOAD_OUT || mode == PAYLOAD_MMIO_WRITE;
	const struct vmm_region region = {0, RAM};
	struct holding *h = calloc(1, sizeof(*h));
	struct vmm_device device = {VMM_MMIO, RAM, 64, holding_access, clone_holding, free, h};
	struct vmm_config config = {0};
	struct kage_engine *engine = NULL;
	struct vmm *vmm, *child;

	if (_i >= 4) {
		ok(kage_engine_create(KAGE_CFG(kage_engine_config, .backing = KAGE_BACKING_MEMFD), &engine));
		ok(vmm_ram_kage(engine, &region, 1, NULL, &config.ram));
	}
	vmm = make_with(config, 1, &large);
	if (mode == PAYLOAD_OUT || mode == PAYLOAD_IN) {
		device.space = PAYLOAD_SPACE;
		device.base = PAYLOAD_PORTS + PAYLOAD_PORT_VALUE;
		device.len = 4;
	}
	ok(vmm_add_device(vmm, &device));
	vmm->device[vmm->devices - 1] = vmm->device[0]; /* the first that fits answers: before the payload's own port */
	vmm->device[0] = device;
	put(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_HYPERCALL, .base = RAM, .iterations = ACCESSES, .seed = 1,
					     .mode = mode, .go = 1});
	ok(vmm_start(vmm));
	while (!h->held)
		sleep_ms(1);
	ok(vmm_clone(vmm, NULL, &child));
	check_holding(vmm, write);
	check_holding(child, write);
	vmm_destroy(vmm);
	vmm_destroy(child);
	ok(kage_engine_destroy(engine));
}
END_TEST

/* Each of the one before and of the first, all running; every guest verifies its own past. */
START_TEST(clones)
{
	const struct vmm_config config = {.flags = _i ? VMM_IRQCHIP | VMM_SERIAL : 0};
	struct vmm *vmm[7] = {make_with(config, 2, _i ? &small : &large)};
	struct vmm_clone_times times;
	struct vmm_identity identity[7];
	unsigned i, j;

	put_stamps(vmm[0]);
	run_stamps(vmm[0]);
	for (i = 1; i < 7; i++) {
		sleep_ms(10);
		ok(vmm_clone(vmm[i & 1 ? i - 1 : 0], &(struct vmm_clone_config){.times = &times}, &vmm[i]));
		ck_assert_uint_ge(times.parked_ns, times.park_ns + times.state_ns + times.memory_ns);
	}
	sleep_ms(50);
	for (i = 0; i < 7; i++) {
		check_stamps(vmm[i]);
		ok(vmm_read(vmm[i], PAYLOAD_IDENTITY, &identity[i], sizeof(identity[i])));
		is(identity[i].parent, i ? identity[i & 1 ? i - 1 : 0].id : 0);
		for (j = 0; j < 2; j++) { /* a vCPU that did not run between two clones sees one change */
			ck_assert_uint_le(payload_peek(vmm[i], j, reseeded), identity[i].generation);
			is(payload_peek(vmm[i], j, reseeded) > 0, i > 0);
		}
		for (j = 0; j < i; j++) {
			ck_assert_uint_ne(identity[i].id, identity[j].id);
			ck_assert_uint_ne(identity[i].seed, identity[j].seed);
		}
	}
	for (i = 0; i < 7; i++)
		vmm_destroy(vmm[(i * 3) % 7]); /* parents before and after their clones */
}
END_TEST

/* A paused clone does not run; what the parent had stopped stays stopped; devices are copied. */
START_TEST(paused_clone)
{
	struct vmm *vmm = make(2, &large), *child;

	put_stamps(vmm);
	put(vmm, 1, (struct payload_mailbox){.program = PAYLOAD_HYPERCALL, .pages = 1, .iterations = 5, .seed = 1});
	ok(vmm_vcpu_start(vmm->vcpu[0]));
	ok(payload_round(vmm, 1, TIMEOUT_MS));
	ok(vmm_clone(vmm, &(struct vmm_clone_config){.paused = true}, &child));
	ck_assert_int_eq(child->vcpu[0]->state, VMM_IDLE);
	ok(vmm_vcpu_start(child->vcpu[0]));
	ck_assert_int_eq(child->vcpu[1]->state, VMM_IDLE);
	is(payload_port(child)->values, 5);
	ok(payload_round(child, 1, TIMEOUT_MS)); /* its second */
	is(payload_port(child)->values, 10);
	is(payload_port(vmm)->values, 5);
	ok(payload_poke(child, 0, stop, 1));
	ok(vmm_vcpu_wait(child->vcpu[0], TIMEOUT_MS));
	ck_assert_int_eq(payload_check_stamps(child, 0), 0);
	vmm_destroy(vmm);
	vmm_destroy(child);
}
END_TEST

static int clone_nothing(struct vmm_ram *ram, struct vmm_ram **copy)
{
	return -ENOMEM;
}

static int attach_nothing(struct vmm_ram *ram, struct vmm *vmm)
{
	return -ENOSPC;
}

static struct vmm_ram_ops failing_ops;

static int clone_to_fail_later(struct vmm_ram *ram, struct vmm_ram **copy)
{
	int r = vmm_ram_plain(ram->region, ram->regions, copy);

	failing_ops = *(*copy)->ops;
	failing_ops.attach = attach_nothing;
	(*copy)->ops = &failing_ops;
	return r;
}

/* A clone that fails, early or late, leaves the parent running. */
START_TEST(failed_clone)
{
	struct vmm *vmm = make(2, &large), *child = NULL;
	struct vmm_ram_ops ops = *vmm->ram->ops;

	ops.clone = _i ? clone_to_fail_later : clone_nothing;
	vmm->ram->ops = &ops;
	put_stamps(vmm);
	run_stamps(vmm);
	ck_assert_int_eq(vmm_clone(vmm, NULL, &child), _i ? -ENOSPC : -ENOMEM);
	ck_assert_ptr_null(child);
	is(vmm->parks, 0);
	check_stamps(vmm);
	vmm_destroy(vmm);
}
END_TEST

/* -- the serial port ------------------------------------------------------------------------------ */

static char sent[64];
static size_t sent_len;

static void collect(void *opaque, const void *bytes, size_t n)
{
	memcpy(sent + sent_len, bytes, n);
	sent_len += n;
}

static uint8_t port(struct vmm *vmm, unsigned reg, int write)
{
	uint8_t value = write < 0 ? 0 : write;

	ok(vmm->device[0].access(vmm->vcpu[0], vmm->device[0].opaque, reg, &value, 1, write >= 0));
	return value;
}

START_TEST(serial)
{
	struct vmm *vmm = make_with((struct vmm_config){.flags = VMM_SERIAL, .serial_out = collect}, 1, NULL);
	unsigned i;

	is(port(vmm, 5, -1), 0x60);
	port(vmm, 0, 'o');
	port(vmm, 0, 'k');
	ck_assert_mem_eq(sent, "ok", 3);
	port(vmm, 3, 0x83); /* the divisor latch */
	port(vmm, 0, 0x0c);
	port(vmm, 1, 0x01);
	is(port(vmm, 0, -1), 0x0c);
	is(port(vmm, 1, -1), 1);
	port(vmm, 3, 3);
	is(port(vmm, 1, -1), 0);
	is(port(vmm, 2, -1), 1); /* nothing pends */
	port(vmm, 1, 3);
	is(port(vmm, 2, -1), 2); /* the transmitter is empty; reading says so once */
	is(port(vmm, 2, -1), 1);
	is(vmm_serial_input(vmm->serial, "ab", 2), 2);
	is(port(vmm, 2, -1), 4);
	is(port(vmm, 5, -1), 0x61);
	is(port(vmm, 0, -1), 'a');
	is(port(vmm, 0, -1), 'b');
	is(port(vmm, 5, -1), 0x60);
	port(vmm, 4, 0x1a); /* loop: what is sent is received, modem outputs are inputs */
	is(port(vmm, 6, -1), 0x90);
	port(vmm, 0, 'x');
	is(port(vmm, 0, -1), 'x');
	is(sent_len, 2);
	port(vmm, 4, 0xb);
	port(vmm, 7, 0x5a);
	is(port(vmm, 7, -1), 0x5a);
	for (i = 0; vmm_serial_input(vmm->serial, "z", 1); i++)
		;
	is(i, VMM_SERIAL_FIFO);
	port(vmm, 2, 3); /* clears what was received */
	is(port(vmm, 5, -1), 0x60);
	is(port(vmm, 2, -1) & 0xc0, 0xc0);
	vmm_destroy(vmm);
}
END_TEST

/* Its interrupt reaches the chips. */
START_TEST(serial_interrupt)
{
	struct vmm *vmm = make_with((struct vmm_config){.flags = VMM_SERIAL | VMM_IRQCHIP}, 1, NULL);

	ck_assert(!serial_line(vmm));
	port(vmm, 1, 1);
	port(vmm, 4, 8);
	is(vmm_serial_input(vmm->serial, "i", 1), 1);
	ck_assert(serial_line(vmm));
	port(vmm, 0, -1);
	ck_assert(!serial_line(vmm));
	vmm_destroy(vmm);
}
END_TEST

/* -- nothing stays --------------------------------------------------------------------------------- */

START_TEST(leaves_nothing)
{
	struct leak before = leak_take();
	struct vmm *vmm = make_with((struct vmm_config){.flags = VMM_IRQCHIP | VMM_SERIAL}, 2, &small), *child[3];
	unsigned i;

	put_stamps(vmm);
	ok(vmm_start(vmm));
	for (i = 0; i < 3; i++)
		ok(vmm_clone(vmm, NULL, &child[i]));
	vmm_destroy(vmm);
	for (i = 0; i < 3; i++)
		vmm_destroy(child[i]);
	vmm_destroy(NULL);
	ok(leak_check(&before));
}
END_TEST

START_TEST(layouts)
{
	struct vmm_region region[VMM_REGIONS];
	struct payload_config huge = {.map = (uint64_t)513 << 30}, gigabytes = {.map = (uint64_t)4 << 30, .small_pages = true};
	size_t len;

	is(vmm_pc_layout(64 * MIB, region), 1);
	is(region[0].len, 64 * MIB);
	is(vmm_pc_layout(4096 * MIB, region), 2);
	is(region[0].len, 3072 * MIB);
	is(region[1].gpa, 4096 * MIB);
	is(region[1].len, 1024 * MIB);
	ck_assert_ptr_null(payload_image(&huge, &len));
	is(payload_free(&large), 2 * MIB);
	is(payload_free(&gigabytes), 1 * MIB + 8 * MIB + 1 * MIB); /* 2048 tables and 4, rounded up */
}
END_TEST

static Suite *suite(void)
{
	Suite *s = suite_create("vmm");
	TCase *exits = tcase_create("exits"), *programs = tcase_create("programs"), *threads = tcase_create("threads");
	TCase *state = tcase_create("state"), *clone = tcase_create("clones"), *rest = tcase_create("rest");
	TCase *all[] = {exits, programs, threads, state, clone, rest};
	unsigned i;

	tcase_add_test(exits, ports);
	tcase_add_loop_test(exits, mmio, 0, 2);
	tcase_add_test(exits, triple_fault);
	tcase_add_loop_test(exits, run_failed, 0, 2);
	tcase_add_loop_test(programs, memory, 0, 4);
	tcase_add_test(programs, dirty);
	tcase_add_test(programs, touch);
	tcase_add_test(programs, ticks);
	add_arch_tests(programs);
	tcase_add_loop_test(programs, stamps, 1, 5);
	tcase_add_test(threads, park_1000_times);
	tcase_add_test(threads, parks_of_many);
	tcase_add_test(threads, pause_in_a_device);
	tcase_add_test(threads, foreign_signals);
	tcase_add_loop_test(threads, thread_dies, 0, 2);
	tcase_add_test(threads, close_while_running);
	tcase_add_loop_test(state, moved, 0, 2);
	tcase_add_loop_test(state, every_part, 0, 2);
	tcase_add_test(state, save_needs_rest);
	tcase_add_test(state, stopped_in_an_access);
	tcase_add_loop_test(clone, clones, 0, 2);
	tcase_add_loop_test(clone, cloned_in_an_access, 0, 8);
	tcase_add_test(clone, paused_clone);
	tcase_add_loop_test(clone, failed_clone, 0, 2);
	tcase_add_test(rest, serial);
	tcase_add_test(rest, serial_interrupt);
	tcase_add_test(rest, leaves_nothing);
	tcase_add_test(rest, layouts);
	for (i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
		tcase_set_timeout(all[i], 120);
		suite_add_tcase(s, all[i]);
	}
	return s;
}

int main(void)
{
	const char *missing = vmm_missing();
	SRunner *runner;
	int failures;

	if (missing != NULL) {
		printf("skipped: %s\n", missing);
		return 77;
	}
	runner = srunner_create(suite());
	srunner_run_all(runner, CK_NORMAL);
	failures = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failures != 0;
}
