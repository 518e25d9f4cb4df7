/* SPDX-License-Identifier: MIT */
/*
 * Many clones of one guest with 32 MiB resident, and what an idle one takes.
 *
 * What KVM needs for a VM (the VM, its vCPU, its registers, the slot) is told
 * apart from what Kage needs (cloning the guest, attaching it without KVM's part of
 * setting the slot). Memory is Pss and page tables of this process; KVM's part
 * is what as many VMs take whose memory nobody has touched.
 */
#include <errno.h>
#include <malloc.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "kvm.h"

#define CLONES	 100
#define READERS	 8
#define RAM	 (512 * MIB)
#define RESIDENT (32 * MIB)
#define PAGES	 (RESIDENT / PAGE)

struct clones {
	unsigned n;
	struct vmm *child[CLONES];
	double pss_idle, tables_idle, pss_read, tables_read; /* KiB of one clone */
	struct series ours, wall, vm, slots, clone, attach;  /* ms of all clones */
	struct series copy;
	bool ok;
};

/* A line "name: N kB" of a file of /proc. Ends the program if it is not there. */
static double proc_kib(const char *path, const char *name)
{
	FILE *f = must_map(fopen(path, "r"), path);
	char line[256];
	double kib = -1;

	while (kib < 0 && fgets(line, sizeof(line), f))
		if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == ':')
			sscanf(line + strlen(name) + 1, "%lf", &kib);
	fclose(f);
	must(kib < 0 ? -ENODATA : 0, name);
	return kib;
}

/* Free memory of the C library does not count: it would hide what is allocated next. */
static double pss(void)
{
	malloc_trim(0);
	return proc_kib("/proc/self/smaps_rollup", "Pss");
}

static double tables(void)
{
	return proc_kib("/proc/self/status", "VmPTE");
}

/* -- making them --------------------------------------------------------------------------- */

static struct subject *parent_create(void)
{
	struct subject *s = subject_kage(RAM);
	struct guest_args args = {.program = GUEST_TOUCH,
				  .base = s->base,
				  .pages = PAGES,
				  .stride = 1,
				  .mode = GUEST_WRITE,
				  .seed = 1};

	must(subject_round(s, &args) > 0 ? 0 : -EIO, "the guest's round");
	subject_settle(s);
	return s;
}

static void make(struct clones *c, struct subject *s, bool counts)
{
	const struct vmm_clone_config config = {.paused = true};
	double cpu = cpu_ns(), wall = wall_ns(), ours;

	memset(&s->cost, 0, sizeof(s->cost));
	for (unsigned i = 0; i < c->n; i++)
		must(vmm_clone(s->vmm, &config, &c->child[i]), "clone");
	cpu = cpu_ns() - cpu;
	wall = wall_ns() - wall;
	c->ok &= s->cost.clones == c->n && s->cost.attaches == c->n;
	if (!counts)
		return;
	ours = s->cost.clone + s->cost.attach - s->cost.slots;
	series_add(&c->ours, ours / 1e6);
	series_add(&c->wall, (s->cost.clone_wall + s->cost.attach_wall - s->cost.slots_wall) / 1e6);
	series_add(&c->clone, s->cost.clone / 1e6);
	series_add(&c->attach, (s->cost.attach - s->cost.slots) / 1e6);
	series_add(&c->slots, s->cost.slots / 1e6);
	series_add(&c->vm, (cpu - ours - s->cost.slots) / 1e6);
}

static void destroy(struct clones *c)
{
	for (unsigned i = 0; i < c->n; i++)
		vmm_destroy(c->child[i]);
}

/* A clone has the parent's bytes, and a write to it stays its own. */
static bool clone_holds(struct subject *s, struct vmm *child, uint64_t key)
{
	struct kage_vm *vm = vmm_ram_kage_vm(child->ram);
	uint64_t at = s->base + mix(key) % PAGES * PAGE, was = subject_word(s, at), word = 0,
		 mine = was + key + 1;

	must(kage_vm_read(vm, at, &word, 8), "read");
	if (word != was || word != guest_word(guest_key((at - s->base) / PAGE, 0), 1))
		return false;
	must(vmm_write(child, at, &mine, 8), "write");
	must(vmm_read(child, at, &word, 8), "read");
	return word == mine && subject_word(s, at) == was;
}

/* The alternative: a copy of what is resident for each. */
static double copy_all(unsigned n)
{
	struct host_memory from = host_anon(RESIDENT);
	char *copies = must_map(
	    mmap(NULL, n * RESIDENT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
	double ns;

	must(madvise(copies, n * RESIDENT, MADV_NOHUGEPAGE) ? -errno : 0, "madvise");
	ns = cpu_ns();
	for (unsigned i = 0; i < n; i++)
		memcpy(copies + i * RESIDENT, from.p, RESIDENT);
	ns = cpu_ns() - ns;
	munmap(copies, n * RESIDENT);
	host_release(&from);
	return ns / 1e6;
}

/* -- what they take --------------------------------------------------------------------------- */

/* Not the first clone, which also takes the parent's own window away from Pss. */
static void measure_idle(struct clones *c, struct subject *s, struct vmm **first)
{
	double p, t;

	must(vmm_clone(s->vmm, &(struct vmm_clone_config){.paused = true}, first), "clone");
	p = pss();
	t = tables();
	make(c, s, false);
	c->pss_idle = (pss() - p) / c->n;
	c->tables_idle = (tables() - t) / c->n;
}

/* The guest of a clone reads all 32 MiB. */
static bool read_all(struct subject *s, struct vmm *child)
{
	struct guest_args args = {
	    .program = GUEST_TOUCH, .base = s->base, .pages = PAGES, .stride = 1, .mode = GUEST_READ};

	guest_enter(child);
	must(vmm_write(child, GUEST_ARGS, &args, sizeof(args)), "arguments");
	must(vmm_vcpu_start(child->vcpu[0]), "start");
	must(vmm_vcpu_wait(child->vcpu[0], 60000), "the clone's round");
	must(vmm_read(child, GUEST_ARGS, &args, sizeof(args)), "read");
	return args.count == PAGES;
}

/* The first one makes the shared pages count in Pss at all. */
static void measure_read(struct clones *c, struct subject *s, struct vmm *first)
{
	double p, t;

	c->ok &= read_all(s, first);
	p = pss();
	t = tables();
	for (unsigned i = 0; i < READERS; i++)
		c->ok &= read_all(s, c->child[i]);
	c->pss_read = (pss() - p) / READERS;
	c->tables_read = (tables() - t) / READERS;
}

/* As many VMs on memory that nobody touches. */
static void measure_kvm(unsigned n, double *pss_kib, double *tables_kib)
{
	struct vmm *vmm[CLONES];
	double p = pss(), t = tables();

	for (unsigned i = 0; i < n; i++) {
		const struct vmm_config config = {.ram = ram_create(RAM_SMALL, RAM)};

		must(vmm_create(&config, &vmm[i]), "VM");
		must(vmm_add_vcpu(vmm[i], NULL), "vCPU");
	}
	*pss_kib = (pss() - p) / n;
	*tables_kib = (tables() - t) / n;
	for (unsigned i = 0; i < n; i++)
		vmm_destroy(vmm[i]);
}

/* -- rows ------------------------------------------------------------------------------------------ */

static void time_rows(struct clones *c)
{
	struct row row = {.suite = "kvm",
			  .name = "clone-100",
			  .unit = "ms",
			  .value = series_median(&c->ours),
			  .spread = series_spread(&c->ours),
			  .isvoid = !c->ok,
			  .goal = GOAL_MOST,
			  .limit = 3.0 * c->n,
			  .peer = "memcpy() of the resident 32 MiB for each",
			  .peer_value = series_median(&c->copy)};

	row_note(&row,
		 "CPU for %u clones of a guest with 32 MiB resident, VM, vCPU and slot apart: "
		 "kage_vm_clone() %.1f, attach "
		 "%.1f; %.1f by the clock",
		 c->n, series_median(&c->clone), series_median(&c->attach), series_median(&c->wall));
	report_row(&row);
	row = (struct row){.suite = "kvm",
			   .name = "clone-100-kvm",
			   .unit = "ms",
			   .value = series_median(&c->vm),
			   .spread = series_spread(&c->vm),
			   .isvoid = !c->ok};
	row_note(&row,
		 "CPU for the same %u: parking, state, KVM's VM, vCPU and registers; setting the slots takes "
		 "%.1f more",
		 c->n, series_median(&c->slots));
	report_row(&row);
}

static void memory_rows(const struct clones *c, double kvm_pss, double kvm_tables)
{
	struct row row = {.suite = "kvm",
			  .name = "idle-clone",
			  .unit = "KiB",
			  .isvoid = !c->ok,
			  .goal = GOAL_MOST,
			  .limit = 64,
			  .value = c->pss_idle + c->tables_idle - kvm_pss - kvm_tables};

	row_note(
	    &row,
	    "Pss %.1f and page tables %.1f of one of %u clones that never ran, less KVM's own: %.1f and %.1f",
	    c->pss_idle, c->tables_idle, c->n, kvm_pss, kvm_tables);
	report_row(&row);
	row.name = "idle-clone-read";
	row.goal = GOAL_NONE;
	row.value = c->pss_read + c->tables_read;
	row_note(&row,
		 "Pss %.1f and page tables %.1f more after its guest has read all 32 MiB; KVM's tables are "
		 "the kernel's",
		 c->pss_read, c->tables_read);
	report_row(&row);
}

void bench_clones(const struct bench *b)
{
	unsigned reps = b->quick ? 1 : 5;
	struct clones c = {.n = b->quick ? 20 : CLONES, .ok = true};
	struct subject *s = parent_create();
	double kvm_pss, kvm_tables;
	struct vmm *first;

	measure_idle(&c, s, &first);
	measure_read(&c, s, first);
	destroy(&c);
	vmm_destroy(first);
	subject_settle(s);
	for (unsigned i = 0; i < reps; i++) {
		make(&c, s, true);
		for (unsigned k = 0; k < c.n; k++)
			c.ok &= clone_holds(s, c.child[k], k);
		c.ok &= subject_sound(s);
		destroy(&c);
		subject_settle(s);
		series_add(&c.copy, copy_all(c.n));
	}
	measure_kvm(c.n, &kvm_pss, &kvm_tables);
	time_rows(&c);
	memory_rows(&c, kvm_pss, kvm_tables);
	subject_destroy(s);
}
