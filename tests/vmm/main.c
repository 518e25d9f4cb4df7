/* SPDX-License-Identifier: MIT */
/*
 * kage-vmm: the reference VMM as a program.
 *
 *	kage-vmm payload [options] stamp|memory|ticks|dirty|touch|hypercall
 *	kage-vmm linux [options] KERNEL [INITRD] [COMMAND LINE]
 *
 * payload runs one of payload.h's programs, clones the running guest, lets
 * parent and clones run, stops them and prints what each found. Exit status: 0,
 * 1 (a guest found wrong memory or something failed), 2 (usage), 77 (no KVM).
 */
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <kage/kage.h>
#include <kage/kvm.h>

#include "payload.h"

#define MIB	   ((uint64_t)1 << 20)
#define CLONES	   256
#define TIMEOUT_MS 30000

struct options {
	uint64_t ram_mib;
	unsigned vcpus, clones, seconds;
	uint64_t pages, iterations, mode;
	bool plain, small_pages;
	uint32_t policy;
};

static const struct {
	const char *name;
	uint64_t number;
} programs[] = {
	{"stamp", PAYLOAD_STAMP}, {"memory", PAYLOAD_MEMORY}, {"ticks", PAYLOAD_TICKS},
	{"dirty", PAYLOAD_DIRTY}, {"touch", PAYLOAD_TOUCH},   {"hypercall", PAYLOAD_HYPERCALL},
};

static int usage(void)
{
	fprintf(stderr,
		"usage: kage-vmm payload [options] stamp|memory|ticks|dirty|touch|hypercall\n"
		"       kage-vmm linux [options] KERNEL [INITRD] [COMMAND LINE]\n"
		"  --ram MIB        guest memory (64; linux: 256)\n"
		"  --vcpus N        (1)\n"
		"  --plain          memory of mmap, clones copy it; else memory of Kage\n"
		"  --policy P       auto, native or exact (auto)\n"
		" payload:\n"
		"  --pages N        that each vCPU works on (1024)\n"
		"  --iterations N   of a round (100000; ticks: 1000)\n"
		"  --mode N         see payload.h (0; touch: 3)\n"
		"  --clones N       each of the one before (4)\n"
		"  --seconds N      how long all of them run (2)\n"
		"  --small-pages    the guest maps 4 KiB pages\n");
	return 2;
}

static int failed(const char *what, int r)
{
	fprintf(stderr, "%s: %s\n", what, strerror(-r));
	return 1;
}

/* -- memory ------------------------------------------------------------------------------ */

static void say(void *opaque, int level, const char *line)
{
	fprintf(stderr, "kage: %s\n", line);
}

static int make_ram(const struct options *o, struct kage_engine **engine, struct vmm_ram **ram)
{
	struct kage_engine_config config = {.size = sizeof(config), .backing = KAGE_BACKING_MEMFD, .log = say};
	struct kage_kvm_config kvm = {.size = sizeof(kvm), .policy = o->policy};
	struct vmm_region region[VMM_REGIONS];
	unsigned n = vmm_pc_layout(o->ram_mib * MIB, region);
	int r;

	if (o->plain)
		return vmm_ram_plain(region, n, ram);
	r = kage_engine_create(&config, engine);
	return r < 0 ? r : vmm_ram_kage(*engine, region, n, &kvm, ram);
}

/* The engine's background work is done here, as the library starts no thread. */
static void run_for(struct kage_engine *engine, unsigned seconds)
{
	struct pollfd due = {.fd = engine ? kage_engine_fd(engine) : -1, .events = POLLIN};
	struct timespec begin, now;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	do {
		if (poll(&due, 1, 100) > 0)
			kage_engine_step(engine, NULL, NULL);
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (now.tv_sec - begin.tv_sec < (time_t)seconds);
}

static void print_stats(struct kage_engine *engine)
{
	struct kage_stats s = {.size = sizeof(s)};

	if (engine == NULL || kage_stats_get(engine, NULL, &s) < 0)
		return;
	printf("memory: %.1f MiB nominal, %.1f in frames, %.1f private to the host; %llu COW breaks\n",
	       s.pages_nominal / 256.0, s.frames_used / 256.0, s.pages_host_private / 256.0,
	       (unsigned long long)s.cow_breaks);
}

/* -- payload ------------------------------------------------------------------------------ */

static int fill_mailboxes(struct vmm *vmm, const struct options *o, uint64_t program, uint64_t base)
{
	uint64_t log_len = (o->pages * 16 > o->iterations * 8 ? o->pages * 16 : o->iterations * 8) + 4096;
	struct payload_mailbox mb = {.program = program, .pages = o->pages, .iterations = o->iterations,
				     .mode = o->mode, .words = 8, .go = 1};
	unsigned i;
	int r = 0;

	log_len &= ~(uint64_t)4095;
	if (program == PAYLOAD_TICKS) /* the burst comes after the clones */
		mb.go = 0;
	for (i = 0; i < vmm->vcpus && r == 0; i++) {
		mb.base = base + i * (o->pages * 4096 + log_len);
		mb.log = mb.base + o->pages * 4096;
		mb.seed = i;
		if (program == PAYLOAD_HYPERCALL && o->mode >= PAYLOAD_MMIO_WRITE)
			mb.base = o->ram_mib * MIB; /* the first address without memory */
		else if (mb.log + log_len > o->ram_mib * MIB)
			return -ENOSPC;
		r = payload_put(vmm, i, &mb);
	}
	return r;
}

static int make_payload(const struct options *o, uint64_t program, struct vmm_ram *ram, struct vmm **out)
{
	const struct vmm_config config = {.ram = ram, .identity = PAYLOAD_IDENTITY};
	const struct payload_config payload = {.map = o->ram_mib * MIB + 2 * MIB, .small_pages = o->small_pages};
	struct vmm *vmm;
	unsigned i;
	int r = vmm_create(&config, &vmm);

	if (r < 0) {
		ram->ops->destroy(ram);
		return r;
	}
	for (i = 0; i < o->vcpus && r == 0; i++)
		r = vmm_add_vcpu(vmm, NULL);
	if (r == 0)
		r = payload_load(vmm, &payload);
	if (r == 0)
		r = fill_mailboxes(vmm, o, program, payload_free(&payload));
	if (r == 0)
		r = vmm_start(vmm);
	if (r < 0) {
		vmm_destroy(vmm);
		return r;
	}
	*out = vmm;
	return 0;
}

static int make_clones(struct vmm *vmm[], unsigned n)
{
	struct vmm_clone_times t;
	const struct vmm_clone_config config = {.times = &t};
	unsigned i;
	int r;

	for (i = 1; i <= n; i++) {
		r = vmm_clone(vmm[i - 1], &config, &vmm[i]);
		if (r < 0)
			return r;
		printf("clone %u: the parent stood %.1f us (%.1f parking, %.1f state, %.1f memory); "
		       "ready after %.1f us more\n", i, t.parked_ns / 1e3, t.park_ns / 1e3, t.state_ns / 1e3, t.memory_ns / 1e3, t.child_ns / 1e3);
	}
	return 0;
}

/* Returns true if it found what it should. */
static bool print_vcpu(struct vmm *vmm, unsigned guest, unsigned i, uint64_t program)
{
	struct payload_mailbox mb;
	int64_t wrong = 0;

	if (payload_get(vmm, i, &mb) < 0)
		return false;
	if (program == PAYLOAD_STAMP)
		wrong = payload_check_stamps(vmm, i);
	printf("guest %u vcpu %u: %llu done, %llu errors, checksum %016llx, %llu exits, %llu failed runs", guest, i,
	       (unsigned long long)mb.count, (unsigned long long)mb.errors, (unsigned long long)mb.checksum,
	       (unsigned long long)vmm->vcpu[i]->exits, (unsigned long long)vmm->vcpu[i]->failed);
	if (mb.tsc_end)
		printf(", %.1f cycles each", (double)(mb.tsc_end - mb.tsc_begin) /
		       (program == PAYLOAD_TICKS ? mb.iterations : mb.count ? mb.count : 1));
	if (program == PAYLOAD_TICKS)
		printf(", longest gap %llu, slowest write %llu", (unsigned long long)mb.longest,
		       (unsigned long long)mb.slowest);
	if (wrong)
		printf(", %lld pages wrong", (long long)wrong);
	printf("\n");
	return !mb.errors && !wrong;
}

static int finish(struct vmm *vmm[], unsigned n, uint64_t program)
{
	bool endless = program == PAYLOAD_STAMP || program == PAYLOAD_TICKS;
	int r, status = 0;
	unsigned g, i;

	for (g = 0; g < n; g++) {
		for (i = 0; program == PAYLOAD_TICKS && i < vmm[g]->vcpus; i++)
			payload_go(vmm[g], i);
		r = endless ? payload_stop(vmm[g], TIMEOUT_MS) : vmm_wait(vmm[g], TIMEOUT_MS);
		if (r < 0)
			status = failed("stopping a guest", r);
		for (i = 0; i < vmm[g]->vcpus; i++)
			if (!print_vcpu(vmm[g], g, i, program))
				status = 1;
	}
	return status;
}

static int run_payload(const struct options *o, uint64_t program)
{
	struct vmm *vmm[CLONES + 1] = {NULL};
	struct kage_engine *engine = NULL;
	struct vmm_ram *ram;
	unsigned n;
	int r = make_ram(o, &engine, &ram);

	if (r == 0)
		r = make_payload(o, program, ram, &vmm[0]);
	if (r < 0) {
		kage_engine_destroy(engine);
		return failed("making the guest", r);
	}
	run_for(engine, 1);
	r = make_clones(vmm, o->clones);
	if (r < 0)
		failed("cloning", r);
	run_for(engine, o->seconds);
	for (n = 0; n <= CLONES && vmm[n] != NULL; n++)
		;
	r = finish(vmm, n, program) || r;
	print_stats(engine);
	while (n > 0)
		vmm_destroy(vmm[--n]);
	if (kage_engine_destroy(engine) < 0)
		return failed("destroying the engine", -EBUSY);
	return r;
}

static int payload_command(struct options *o, char **argv)
{
	unsigned i;

	for (i = 0; argv[0] != NULL && i < sizeof(programs) / sizeof(programs[0]); i++) {
		if (strcmp(argv[0], programs[i].name))
			continue;
		if (!o->iterations)
			o->iterations = programs[i].number == PAYLOAD_TICKS ? 1000 : 100000;
		if (programs[i].number == PAYLOAD_TOUCH && !o->mode)
			o->mode = PAYLOAD_READ | PAYLOAD_WRITE;
		if (programs[i].number == PAYLOAD_TICKS && o->pages < o->iterations)
			o->pages = o->iterations;
		return run_payload(o, programs[i].number);
	}
	return usage();
}

/* -- linux ------------------------------------------------------------------------------------ */

static void to_stdout(void *opaque, const void *bytes, size_t n)
{
	fwrite(bytes, 1, n, stdout);
	fflush(stdout);
}

/* Until the guest stops by itself; what is typed goes to its serial port. */
static void serve(struct vmm *vmm, struct kage_engine *engine)
{
	struct pollfd fds[2] = {{.fd = STDIN_FILENO, .events = POLLIN},
				{.fd = engine ? kage_engine_fd(engine) : -1, .events = POLLIN}};
	char byte;

	while (vmm_vcpu_wait(vmm->vcpu[0], 0) == -ETIMEDOUT) {
		if (poll(fds, 2, 100) <= 0)
			continue;
		if (fds[1].revents & POLLIN)
			kage_engine_step(engine, NULL, NULL);
		if (fds[0].revents & POLLIN && read(STDIN_FILENO, &byte, 1) == 1)
			vmm_serial_input(vmm->serial, &byte, 1);
		else if (fds[0].revents)
			fds[0].fd = -1;
	}
}

static int run_linux(struct vmm *vmm, struct kage_engine *engine, const struct options *o, char **argv)
{
	const char *initrd = argv[1] != NULL && *argv[1] ? argv[1] : NULL;
	const char *cmdline = argv[1] != NULL && argv[2] != NULL ? argv[2] : "console=ttyS0";
	unsigned i;
	int r = 0;

	for (i = 0; i < o->vcpus && r == 0; i++)
		r = vmm_add_vcpu(vmm, NULL);
	if (r == 0)
		r = vmm_boot_linux(vmm, argv[0], initrd, cmdline);
	if (r == 0)
		r = vmm_start(vmm);
	if (r < 0)
		return failed(argv[0], r);
	serve(vmm, engine);
	r = vmm->vcpu[0]->result;
	return r < 0 ? failed("the guest ended", r) : 0;
}

static int linux_command(const struct options *o, char **argv)
{
	struct vmm_config config = {.flags = VMM_IRQCHIP | VMM_SERIAL, .serial_out = to_stdout};
	struct kage_engine *engine = NULL;
	struct vmm *vmm = NULL;
	int r;

	if (argv[0] == NULL)
		return usage();
	r = make_ram(o, &engine, &config.ram);
	if (r == 0)
		r = vmm_create(&config, &vmm);
	if (r < 0 && config.ram != NULL)
		config.ram->ops->destroy(config.ram);
	r = r < 0 ? failed("making the guest", r) : run_linux(vmm, engine, o, argv);
	print_stats(engine);
	vmm_destroy(vmm);
	kage_engine_destroy(engine);
	return r;
}

/* -- options ------------------------------------------------------------------------------------ */

static bool parse_policy(const char *name, uint32_t *policy)
{
	static const char *const names[] = {"auto", "native", "exact"};
	uint32_t i;

	for (i = 0; i < 3; i++)
		if (!strcmp(name, names[i])) {
			*policy = i;
			return true;
		}
	return false;
}

static bool parse(int argc, char **argv, struct options *o)
{
	static const struct option known[] = {
		{"ram", 1, NULL, 'r'},	   {"vcpus", 1, NULL, 'v'},   {"clones", 1, NULL, 'c'},
		{"seconds", 1, NULL, 's'}, {"pages", 1, NULL, 'p'},   {"iterations", 1, NULL, 'i'},
		{"mode", 1, NULL, 'm'},	   {"policy", 1, NULL, 'P'},  {"plain", 0, NULL, 'x'},
		{"small-pages", 0, NULL, '4'}, {NULL, 0, NULL, 0},
	};
	int c;

	while ((c = getopt_long(argc, argv, "+", known, NULL)) != -1) {
		uint64_t n = optarg != NULL ? strtoull(optarg, NULL, 0) : 0;

		if (c == 'r')
			o->ram_mib = n;
		else if (c == 'v')
			o->vcpus = n;
		else if (c == 'c')
			o->clones = n;
		else if (c == 's')
			o->seconds = n;
		else if (c == 'p')
			o->pages = n;
		else if (c == 'i')
			o->iterations = n;
		else if (c == 'm')
			o->mode = n;
		else if (c == 'x')
			o->plain = true;
		else if (c == '4')
			o->small_pages = true;
		else if (c != 'P' || !parse_policy(optarg, &o->policy))
			return false;
	}
	return o->ram_mib && o->pages && o->vcpus && o->vcpus <= VMM_VCPUS && o->clones <= CLONES;
}

int main(int argc, char **argv)
{
	struct options o = {.ram_mib = 64, .vcpus = 1, .clones = 4, .seconds = 2, .pages = 1024};
	const char *missing;
	bool linux_guest;

	if (argc < 2 || (strcmp(argv[1], "payload") && strcmp(argv[1], "linux")))
		return usage();
	linux_guest = !strcmp(argv[1], "linux");
	if (linux_guest)
		o.ram_mib = 256;
	if (!parse(argc - 1, argv + 1, &o))
		return usage();
	missing = vmm_missing();
	if (missing != NULL) {
		printf("skipped: %s\n", missing);
		return 77;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	argv += 1 + optind;
	return linux_guest ? linux_command(&o, argv) : payload_command(&o, argv);
}
