/* SPDX-License-Identifier: MIT */
/*
 * Subjects: a VM with one vCPU, its rounds, and what its memory's operations cost.
 *
 * Costs are taken by a second table of operations in front of that of ram.c of
 * the VMM, which clones inherit with the rest of their struct; slots by the
 * library's set_slot callback, on the thread that attaches.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm.h"

#define TIMEOUT_MS 600000

extern const char __start_bench_guest[] __attribute__((visibility("hidden")));
extern const char __stop_bench_guest[] __attribute__((visibility("hidden")));

/* Whose operations are being timed; the benchmark makes one VM at a time. */
static struct subject *timed;
static const struct vmm_ram_ops *inner;

/* -- costs --------------------------------------------------------------------------------- */

static int timed_clone(struct vmm_ram *ram, struct vmm_ram **copy)
{
	double cpu = cpu_ns(), wall = wall_ns();
	int r = inner->clone(ram, copy);

	timed->cost.clone += cpu_ns() - cpu;
	timed->cost.clone_wall += wall_ns() - wall;
	timed->cost.cloned_tsc = tsc_now();
	timed->cost.clones++;
	return r;
}

static int timed_attach(struct vmm_ram *ram, struct vmm *vmm)
{
	double cpu, wall;
	int r;

	if (timed->attaching)
		timed->attaching(timed->arg);
	cpu = cpu_ns();
	wall = wall_ns();
	r = inner->attach(ram, vmm);
	timed->cost.attach += cpu_ns() - cpu;
	timed->cost.attach_wall += wall_ns() - wall;
	timed->cost.attaches++;
	return r;
}

/* opaque: the VMM, see tests/vmm/ram.c. */
static int timed_slot(void *opaque, const struct kage_kvm_slot *slot)
{
	const struct vmm *vmm = opaque;
	struct kvm_userspace_memory_region region = {.slot = slot->slot,
						     .flags = slot->flags,
						     .guest_phys_addr = slot->gpa,
						     .memory_size = slot->len,
						     .userspace_addr = slot->hva};
	double cpu = cpu_ns(), wall = wall_ns();
	int r = ioctl(vmm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? -errno : 0;

	timed->cost.slots += cpu_ns() - cpu;
	timed->cost.slots_wall += wall_ns() - wall;
	return r;
}

static void time_ops(struct subject *s, struct vmm_ram *ram)
{
	static struct vmm_ram_ops ops;

	inner = ram->ops;
	ops = *inner;
	ops.clone = timed_clone;
	ops.attach = timed_attach;
	ram->ops = &ops;
	timed = s;
}

/* -- making one ------------------------------------------------------------------------------ */

static int access_port(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size,
		       bool write)
{
	struct subject *s = opaque;

	if (offset == 0) {
		s->begin = cpu_ns();
		return VMM_CONTINUE;
	}
	s->end = cpu_ns();
	return VMM_STOP;
}

void guest_enter(struct vmm *vmm)
{
	struct vmm_entry entry = payload_entry(0);

	must(vmm_write(vmm, GUEST_CODE, __start_bench_guest,
		       (size_t)(__stop_bench_guest - __start_bench_guest)),
	     "guest code");
	entry.rip = GUEST_CODE + (uint64_t)((const char *)(uintptr_t)guest_bench - __start_bench_guest);
	entry.rdi = GUEST_ARGS;
	must(vmm_vcpu_enter(vmm->vcpu[0], &entry), "entry");
}

static struct subject *subject_create(struct kage_engine *engine, struct vmm_ram *ram, uint64_t bytes)
{
	struct subject *s = must_map(calloc(1, sizeof(*s)), "memory");
	const struct vmm_config config = {.ram = ram, .identity = PAYLOAD_IDENTITY};
	const struct payload_config payload = {.map = bytes};
	const struct vmm_device port = {
	    .space = VMM_PIO, .base = GUEST_PORT_BEGIN, .len = 8, .access = access_port, .opaque = s};

	s->engine = engine;
	s->bytes = bytes;
	s->base = payload_free(&payload);
	if (engine)
		time_ops(s, ram);
	must(vmm_create(&config, &s->vmm), "VM");
	must(vmm_add_device(s->vmm, &port), "port");
	must(vmm_add_vcpu(s->vmm, NULL), "vCPU");
	must(payload_load(s->vmm, &payload), "payload");
	guest_enter(s->vmm);
	return s;
}

static void say(void *opaque, int level, const char *line)
{
	if (level == KAGE_LOG_ERROR)
		fprintf(stderr, "kage: %s\n", line);
}

static struct subject *subject_of(struct kage_engine *engine, uint64_t bytes)
{
	const struct vmm_region region = {.gpa = 0, .len = bytes};
	const struct kage_kvm_config kvm = {.policy = KAGE_KVM_NATIVE, .set_slot = timed_slot};
	struct vmm_ram *ram;

	must(vmm_ram_kage(engine, &region, 1, &kvm, &ram), "guest memory");
	return subject_create(engine, ram, bytes);
}

struct subject *subject_kage(uint64_t bytes)
{
	struct kage_engine *engine;

	must(kage_engine_create(KAGE_CFG(kage_engine_config, .backing = KAGE_BACKING_MEMFD, .log = say),
				&engine),
	     "engine");
	return subject_of(engine, bytes);
}

struct subject *subject_kage_beside(const struct subject *other, uint64_t bytes)
{
	struct subject *s = subject_of(other->engine, bytes);

	s->shares = true;
	return s;
}

struct subject *subject_plain(enum ram_kind kind, uint64_t bytes)
{
	return subject_create(NULL, ram_create(kind, bytes), bytes);
}

void subject_destroy(struct subject *s)
{
	vmm_destroy(s->vmm);
	if (s->engine && !s->shares) {
		subject_settle(s);
		must(kage_engine_destroy(s->engine), "engine destroy");
	}
	free(s);
}

struct kage_vm *subject_vm(const struct subject *s)
{
	return vmm_ram_kage_vm(s->vmm->ram);
}

struct kage_kvm *subject_kvm(const struct subject *s)
{
	return vmm_ram_kage_kvm(s->vmm->ram);
}

/* -- contents ----------------------------------------------------------------------------------- */

void subject_write(struct subject *s, uint64_t gpa, const void *data, size_t len)
{
	must(vmm_write(s->vmm, gpa, data, len), "write");
}

uint64_t subject_word(struct subject *s, uint64_t gpa)
{
	uint64_t word = 0;

	must(vmm_read(s->vmm, gpa, &word, sizeof(word)), "read");
	return word;
}

void subject_fill(struct subject *s, uint64_t page, uint64_t key)
{
	uint64_t words[PAGE / 8];

	for (unsigned i = 0; i < LENGTH(words); i++)
		words[i] = mix(key * LENGTH(words) + i + 1);
	subject_write(s, s->base + page * PAGE, words, sizeof(words));
}

/* -- rounds -------------------------------------------------------------------------------------- */

void subject_start(struct subject *s, const struct guest_args *args)
{
	subject_write(s, GUEST_ARGS, args, sizeof(*args));
	s->begin = s->end = 0;
	must(vmm_vcpu_start(s->vmm->vcpu[0]), "start");
}

int subject_wait(struct subject *s, struct guest_args *args, int wait_ms)
{
	const struct vmm_vcpu *vcpu = s->vmm->vcpu[0];
	int r = vmm_vcpu_wait(s->vmm->vcpu[0], wait_ms);

	if (r)
		return r;
	must(vmm_read(s->vmm, GUEST_ARGS, args, sizeof(*args)), "read");
	if (vcpu->result == VMM_STOP && vcpu->reason == KVM_EXIT_IO)
		return 0;
	return vcpu->result < 0 ? vcpu->result : -EIO;
}

double subject_round(struct subject *s, struct guest_args *args)
{
	subject_start(s, args);
	return subject_wait(s, args, TIMEOUT_MS) ? -1 : s->end - s->begin;
}

/* -- the engine ------------------------------------------------------------------------------------ */

struct kage_stats subject_stats(const struct subject *s)
{
	struct kage_stats stats = {.size = sizeof(stats)};

	must(kage_stats_get(s->engine, subject_vm(s), &stats), "stats");
	return stats;
}

struct kage_kvm_info subject_info(const struct subject *s)
{
	struct kage_kvm_info info = {.size = sizeof(info)};

	must(kage_kvm_info(subject_kvm(s), &info), "info");
	return info;
}

double subject_reconcile(const struct subject *s, uint32_t flags)
{
	double ns = cpu_ns();
	int r = kage_kvm_reconcile(subject_kvm(s), flags);

	ns = cpu_ns() - ns;
	must(r < 0 ? r : 0, "reconcile");
	return ns;
}

static void print_violation(void *opaque, const char *line)
{
	fprintf(stderr, "audit: %s\n", line);
}

bool subject_sound(const struct subject *s)
{
	return kage_engine_audit(s->engine, KAGE_CFG(kage_audit, .report = print_violation)) == KAGE_OK;
}

/* -- the time stamp counter -------------------------------------------------------------------------- */

uint64_t tsc_now(void)
{
	return __builtin_ia32_rdtsc();
}

double tsc_per_ns(void)
{
	static double rate;

	if (rate == 0) {
		double ns = wall_ns();
		uint64_t tsc = tsc_now();

		while (wall_ns() - ns < 5e7)
			;
		rate = (double)(tsc_now() - tsc) / (wall_ns() - ns);
	}
	return rate;
}
