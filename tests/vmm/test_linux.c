/* SPDX-License-Identifier: MIT */
/*
 * Linux as a guest on Kage's memory, cloned while it runs.
 *
 *   vmm-linux [options] KERNEL INITRD      (tests/virt makes the initramfs: linux_init.sh)
 *
 * The guest says KAGE-READY on its serial port, with the digest of data that it
 * made before. Then it is cloned, on all its CPUs running, and each guest gets the line
 * "go": it reads its identity (struct vmm_identity at BOOT_IDENTITY), fills memory
 * with a text made of its id and that digest, and answers KAGE-PROOF with id, generation and the
 * digests of both. "go" is sent twice; clones are made of clones too (generation 2).
 * "off" makes it switch off by ACPI.
 *
 * What is checked: every guest answers with the identity that the VMM gave it; old data
 * is the same in all; its own text is different in all and the same both times; nobody said
 * KAGE-BAD; the engine's audit finds nothing. Whether the digests are those of the texts
 * is for who reads the output: tests/virt/proofs.sh computes them again, outside of the guests.
 *
 * Exit: 0 and the line "vmm-linux: PASS", 1, or 77 with "SKIP: reason".
 *
 * Locks: guest.lock, what its console said. Serial callbacks run on vCPU threads.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <kage/kage.h>
#include "boot.h"

#define GUESTS	 8
#define DIGEST	 65 /* with the final NUL */
#define LINE	 512
#define PROOFS	 2
#define SKIPPED	 77

struct proof {
	uint64_t id, generation;
	char common[DIGEST], own[DIGEST];
};

struct guest {
	struct vmm *vmm;
	char name[16];
	pthread_mutex_t lock;
	pthread_cond_t said;
	char line[LINE];
	size_t len;
	unsigned cpus, mib; /* of KAGE-READY */
	char common[DIGEST];
	unsigned proofs;
	struct proof proof[PROOFS];
	bool bad;
	bool stuck, reported; /* its kernel says that a CPU stands still, or one does */
	bool shutdown;        /* a triple fault */
};

static struct options {
	uint64_t mib;
	unsigned cpus, clones;
	bool plain, merge;
	int timeout;
	const char *append, *kernel, *initrd;
} opt = { .mib = 256, .cpus = 2, .clones = 1, .timeout = 120, .append = "" };

static struct guest guests[GUESTS];
static struct kage_engine *engine;

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* -- the console ----------------------------------------------------------------------- */

static void parse(struct guest *g)
{
	struct proof p;
	unsigned cpus, mib;
	char *at;

	if ((at = strstr(g->line, "KAGE-READY ")) &&
	    sscanf(at, "KAGE-READY cpus %u mib %u common %64[0-9a-f]", &cpus, &mib, g->common) == 3) {
		g->cpus = cpus;
		g->mib = mib;
	}
	if ((at = strstr(g->line, "KAGE-PROOF ")) && g->proofs < PROOFS &&
	    sscanf(at, "KAGE-PROOF id %" SCNx64 " generation %" SCNx64 " common %64[0-9a-f] own %64[0-9a-f]", &p.id,
		   &p.generation, p.common, p.own) == 4)
		g->proof[g->proofs++] = p;
	if (strstr(g->line, "KAGE-BAD") || strstr(g->line, "Kernel panic") || strstr(g->line, "BUG:"))
		g->bad = true;
	if (strstr(g->line, "rcu: INFO: ") || strstr(g->line, "BUG: soft lockup"))
		g->stuck = true;
}

static void end_line(struct guest *g)
{
	g->line[g->len] = 0;
	printf("%s| %s\n", g->name, g->line);
	parse(g);
	g->len = 0;
	pthread_cond_broadcast(&g->said);
}

static void serial_out(void *opaque, const void *bytes, size_t n)
{
	struct guest *g = opaque;
	const char *c = bytes;

	pthread_mutex_lock(&g->lock);
	for (size_t i = 0; i < n; i++) {
		if (c[i] == '\n' || g->len == LINE - 1)
			end_line(g);
		if (c[i] >= ' ' && c[i] < 127)
			g->line[g->len++] = c[i];
	}
	pthread_mutex_unlock(&g->lock);
}

/* A triple fault, among others: the guest's other CPUs would wait for that one for ever. */
static int guest_exit(struct vmm_vcpu *vcpu, struct kvm_run *run, void *opaque)
{
	struct guest *g = opaque;

	if (run->exit_reason == KVM_EXIT_IO || run->exit_reason == KVM_EXIT_MMIO)
		return VMM_CONTINUE;
	if (run->exit_reason == KVM_EXIT_SYSTEM_EVENT || run->exit_reason == KVM_EXIT_HLT)
		return VMM_STOP;
	pthread_mutex_lock(&g->lock);
	g->bad = g->stuck = true;
	g->shutdown = run->exit_reason == KVM_EXIT_SHUTDOWN;
	printf("vmm-linux: %s: vCPU %u: exit reason %u\n", g->name, vcpu->index, run->exit_reason);
	pthread_mutex_unlock(&g->lock);
	return g->shutdown ? VMM_STOP : -EIO;
}

static bool is_ready(const struct guest *g)
{
	return g->cpus != 0;
}

static bool proved_once(const struct guest *g)
{
	return g->proofs >= 1;
}

static bool proved_twice(const struct guest *g)
{
	return g->proofs >= 2;
}

/* Without the lock. Once a guest: what its vCPUs are doing when its kernel says that one stands still. */
static void report_stuck(struct guest *g)
{
	bool first;

	pthread_mutex_lock(&g->lock);
	first = g->stuck && !g->reported;
	g->reported |= first;
	pthread_mutex_unlock(&g->lock);
	if (!first)
		return;
	vmm_report(g->vmm);
	if (g->shutdown && !guests[1].vmm) /* who reads this takes it for a fault of the machine below */
		printf("vmm-linux: %s: triple fault before any clone\n", g->name);
}

static void report_all(void)
{
	for (unsigned i = 0; i <= opt.clones; i++)
		if (guests[i].vmm)
			report_stuck(&guests[i]);
}

/* False: it did not come true before the time ran out, or vCPU 0 ended. */
static bool wait_for(struct guest *g, bool (*true_of)(const struct guest *), const char *what)
{
	double end = seconds() + opt.timeout;
	struct timespec until;
	bool is;

	pthread_mutex_lock(&g->lock);
	while (!(is = true_of(g)) && seconds() < end && vmm_vcpu_wait(g->vmm->vcpu[0], 0) == -ETIMEDOUT) {
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec++;
		pthread_cond_timedwait(&g->said, &g->lock, &until);
		pthread_mutex_unlock(&g->lock);
		report_all();
		pthread_mutex_lock(&g->lock);
	}
	pthread_mutex_unlock(&g->lock);
	report_all();
	if (!is)
		printf("vmm-linux: %s: no %s; vCPU 0: state %d, result %d, exit %u\n", g->name, what,
		       g->vmm->vcpu[0]->state, g->vmm->vcpu[0]->result, g->vmm->vcpu[0]->reason);
	return is;
}

static bool send_line(struct guest *g, const char *line)
{
	return vmm_serial_input(g->vmm->serial, line, strlen(line)) == strlen(line);
}

static void init_guest(unsigned i)
{
	struct guest *g = &guests[i];

	snprintf(g->name, sizeof(g->name), "guest %u", i);
	pthread_mutex_init(&g->lock, NULL);
	pthread_cond_init(&g->said, NULL);
}

/* -- the machines ------------------------------------------------------------------------ */

static int failed(const char *what, int err)
{
	printf("vmm-linux: %s: %s\n", what, strerror(-err));
	return err;
}

static void engine_log(void *opaque, int level, const char *line)
{
	printf("kage: %s\n", line);
}

static int make_ram(struct vmm_ram **ram)
{
	struct vmm_region region[VMM_REGIONS];
	unsigned n = vmm_pc_layout(opt.mib << 20, region);
	int err;

	if (opt.plain)
		return vmm_ram_plain(region, n, ram);
	err = kage_engine_create(KAGE_CFG(kage_engine_config, .backing = KAGE_BACKING_MEMFD, .log = engine_log),
				 &engine);
	return err ? err : vmm_ram_kage(engine, region, n, NULL, ram);
}

static int make_parent(struct guest *g)
{
	struct vmm_config config = { .flags = VMM_IRQCHIP | VMM_SERIAL,
				     .identity = BOOT_IDENTITY,
				     .serial_out = serial_out,
				     .exit = guest_exit,
				     .opaque = g };
	int err = make_ram(&config.ram);

	if (err)
		return failed("memory", err);
	err = vmm_create(&config, &g->vmm);
	if (err) {
		config.ram->ops->destroy(config.ram);
		return failed("vmm_create", err);
	}
	for (unsigned i = 0; i < opt.cpus && !err; i++)
		err = vmm_add_vcpu(g->vmm, NULL);
	if (!err)
		err = vmm_identify(g->vmm, NULL);
	return err ? failed("the VM", err) : 0;
}

static int start_parent(struct guest *g)
{
	char cmdline[1024];
	int err;

	snprintf(cmdline, sizeof(cmdline), "console=ttyS0 panic=-1 kage.identity=0x%x %s", BOOT_IDENTITY, opt.append);
	err = vmm_boot_linux(g->vmm, opt.kernel, opt.initrd, cmdline);
	if (!err)
		err = vmm_start(g->vmm);
	return err ? failed("start", err) : 0;
}

/* The first half are clones of the first guest, the rest of the clone before it. */
static int clone_guest(unsigned i)
{
	struct guest *parent = i <= (opt.clones + 1) / 2 ? &guests[0] : &guests[i - 1], *g = &guests[i];
	struct vmm_clone_times t = { 0 };
	struct vmm_clone_config config = { .serial_out = serial_out, .opaque = g, .times = &t };
	int err = vmm_clone(parent->vmm, &config, &g->vmm);

	if (err)
		return failed("vmm_clone", err);
	printf("vmm-linux: %s is a clone of %s: the parent stood %.1f ms (memory %.3f); ready after %.1f ms more\n",
	       g->name, parent->name, (double)t.parked_ns / 1e6, (double)t.memory_ns / 1e6,
	       (double)t.child_ns / 1e6);
	return 0;
}

/* -- the checks ------------------------------------------------------------------------------ */

static unsigned bad;

static void check(bool good, const struct guest *g, const char *what)
{
	if (good)
		return;
	bad++;
	printf("vmm-linux: FAILED: %s: %s\n", g->name, what);
}

static void check_guest(unsigned n)
{
	const struct guest *g = &guests[n];

	check(!g->bad, g, "it complained");
	for (unsigned i = 0; i < PROOFS; i++) {
		const struct proof *p = &g->proof[i];

		check(p->id == g->vmm->identity.id, g, "the identity is another one than the VMM gave it");
		check(p->generation == g->vmm->identity.generation, g, "the generation is wrong");
		check(!strcmp(p->common, guests[0].common), g, "data from before the clone has changed");
		check(!strcmp(p->own, g->proof[0].own), g, "its own data has changed");
	}
	for (unsigned i = 0; i < n; i++) {
		check(g->vmm->identity.id != guests[i].vmm->identity.id, g, "the identity is there twice");
		check(strcmp(g->proof[0].own, guests[i].proof[0].own), g, "its own data is another guest's");
	}
}

static void report(void *opaque, const char *line)
{
	printf("audit: %s\n", line);
}

static void check_engine(void)
{
	struct kage_audit audit = { .size = sizeof(audit), .report = report };
	int err;

	if (!engine)
		return;
	err = kage_engine_audit(engine, &audit);
	printf("vmm-linux: audit: %" PRIu64 " checks, %" PRIu64 " violations\n", audit.checks, audit.violations);
	if (err || !audit.checks)
		bad++;
}

/* -- the run ----------------------------------------------------------------------------------- */

#define MERGED 256 /* pages; enough to break if a byte were wrong */

/* Merging while all guests run, in small steps: the guests share their CPUs with it. */
static int merge(void)
{
	struct kage_progress progress = { .size = sizeof(progress) };
	double begin = seconds();
	uint64_t scanned = 0, merged = 0;
	int err = kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE));

	while (!err && merged < MERGED && seconds() < begin + opt.timeout) {
		err = kage_engine_step(engine, KAGE_CFG(kage_budget, .pages = 1024, .usec = 1000000), &progress);
		scanned += progress.pages_scanned;
		merged += progress.pages_merged;
	}
	printf("vmm-linux: merged %" PRIu64 " pages of %" PRIu64 " in %.1f s\n", merged, scanned,
	       seconds() - begin);
	check(err || merged >= MERGED, &guests[0], "too little was merged with its clones");
	return err < 0 ? failed("kage_engine_step", err) : 0;
}

static bool prove_all(bool (*proved)(const struct guest *))
{
	bool good = true;

	for (unsigned i = 0; i <= opt.clones; i++)
		good &= send_line(&guests[i], "go\n");
	for (unsigned i = 0; i <= opt.clones && good; i++)
		good = wait_for(&guests[i], proved, "KAGE-PROOF");
	return good;
}

static bool switch_off(struct guest *g)
{
	double end = seconds() + opt.timeout;
	bool off = send_line(g, "off\n");

	while (off && vmm_vcpu_wait(g->vmm->vcpu[0], 1000) && (off = seconds() < end))
		report_all();
	report_all();
	check(off && g->vmm->vcpu[0]->result == VMM_STOP && !g->bad, g, "it did not switch off");
	return off;
}

static bool run(void)
{
	double begin = seconds();

	if (start_parent(&guests[0]) || !wait_for(&guests[0], is_ready, "KAGE-READY"))
		return false;
	printf("vmm-linux: ready after %.1f s\n", seconds() - begin);
	check(guests[0].cpus == opt.cpus, &guests[0], "another number of CPUs than it was given");
	/* MemTotal leaves out the kernel and what describes memory: 16 bytes in 1024 and more */
	check(guests[0].mib <= opt.mib && guests[0].mib >= opt.mib - opt.mib / 32 - 64, &guests[0],
	      "another amount of memory than it was given");
	for (unsigned i = 1; i <= opt.clones; i++)
		if (clone_guest(i))
			return false;
	if (!prove_all(proved_once) || (opt.merge && engine && merge()) || !prove_all(proved_twice))
		return false;
	for (unsigned i = 0; i <= opt.clones; i++)
		check_guest(i);
	check_engine();
	for (unsigned i = 0; i <= opt.clones; i++)
		switch_off(&guests[i]);
	printf("vmm-linux: %.1f s in all\n", seconds() - begin);
	return true;
}

/* -- the command line ------------------------------------------------------------------------------ */

static int usage(void)
{
	fprintf(stderr, "usage: vmm-linux [--mib N] [--cpus N] [--clones 0..%d] [--plain] [--merge] [--timeout S]"
			" [--append TEXT] KERNEL INITRD\n", GUESTS - 1);
	return 2;
}

static bool set_option(int c)
{
	switch (c) {
	case 'm':
		opt.mib = strtoull(optarg, NULL, 0);
		return opt.mib >= 64;
	case 'c':
		opt.cpus = (unsigned)atoi(optarg);
		return opt.cpus && opt.cpus <= VMM_VCPUS;
	case 'n':
		opt.clones = (unsigned)atoi(optarg);
		return opt.clones < GUESTS;
	case 'p':
		return opt.plain = true;
	case 'M':
		return opt.merge = true;
	case 't':
		opt.timeout = atoi(optarg);
		return opt.timeout > 0;
	case 'a':
		return (opt.append = optarg);
	default:
		return false;
	}
}

static bool parse_options(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "mib", 1, NULL, 'm' },   { "cpus", 1, NULL, 'c' },	{ "clones", 1, NULL, 'n' },
		{ "plain", 0, NULL, 'p' }, { "merge", 0, NULL, 'M' },	{ "timeout", 1, NULL, 't' },
		{ "append", 1, NULL, 'a' }, { 0 },
	};
	int c;

	while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1)
		if (!set_option(c))
			return false;
	if (argc - optind != 2)
		return false;
	opt.kernel = argv[optind];
	opt.initrd = argv[optind + 1];
	return true;
}

int main(int argc, char **argv)
{
	const char *missing;
	bool done;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!parse_options(argc, argv))
		return usage();
	missing = vmm_missing();
	if (missing) {
		printf("SKIP: %s\n", missing);
		return SKIPPED;
	}
	for (unsigned i = 0; i < GUESTS; i++)
		init_guest(i);
	done = !make_parent(&guests[0]) && run();
	for (unsigned i = 0; i < GUESTS; i++)
		vmm_destroy(guests[i].vmm);
	if (engine && kage_engine_destroy(engine)) {
		printf("vmm-linux: the engine cannot be destroyed: something is left\n");
		bad++;
	}
	printf("vmm-linux: %s\n", done && !bad ? "PASS" : "FAIL");
	return done && !bad ? 0 : 1;
}
