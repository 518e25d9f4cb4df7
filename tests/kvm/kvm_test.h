/* SPDX-License-Identifier: MIT */
/*
 * What the tests of guests on the KVM backend share.
 *
 * structures
 *	engine		the engine of the test that runs
 *	caps		what the backend found on this host, under KAGE_KVM_MASK
 *	frame_use	one page of one guest, as the mirror or the kernel says that it is mapped
 *
 * Two kinds of guests: a `struct vmm` with memory of the engine runs payloads
 * (new_vmm()); a `struct bare` has a KVM VM and no vCPU, and the test plays its part through
 * the window.
 *
 * invariants
 *	T1. Each step of a test ends with audit(): it compares the tables, the mirror and
 *	    /proc/self/maps, and requires that the engine has logged no error.
 *	    KAGE_KVM_GRANULE (bytes, kage_kvm_config.granule) does so too.
 *	T2. KAGE_KVM_MASK (bits of enum kage_kvm_feature) goes into every attachment. A test that cannot
 *	    do without what is masked, or missing, says so and ends.
 */
#ifndef KAGE_TESTS_KVM_H
#define KAGE_TESTS_KVM_H

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <kage/kage.h>
#include <kage/kvm.h>

#include "payload.h"
#include "short.h"
#if defined(__aarch64__)
#include "../model/arm64_reference.h"
#include "arm64.h"
#endif

#define PAGE	   ((uint64_t)4096)
#define MIB	   ((uint64_t)1 << 20)
#define TIMEOUT_MS (60000 * (1 + (int)env_number("CK_TIMEOUT_MULTIPLIER", 0))) /* as Check's own */
#define COUNT(a)   (sizeof(a) / sizeof((a)[0]))
#define ok(x)	   ck_assert_int_eq((x), 0)
#define is(x, y)   ck_assert_int_eq((x), (y))
#define same(x, y) ck_assert_uint_eq((x), (y))

static struct kage_engine *engine;
static struct kage_kvm_info caps;
static uint32_t mask, granule;
static _Atomic unsigned logged_errors;
static unsigned expected_errors;

static inline bool has(enum kage_kvm_feature n)
{
	return caps.feature[n].used;
}

/* Of tests that run once for each. */
static const uint32_t policies[] __attribute__((unused)) = {KAGE_KVM_NATIVE, KAGE_KVM_EXACT};

static inline bool can_exact(void)
{
	return has(KAGE_KVM_USERFAULTFD) && has(KAGE_KVM_UFFD_WP) && has(KAGE_KVM_UFFD_MINOR) &&
	       has(KAGE_KVM_UFFD_CONTINUE_WP) && has(KAGE_KVM_PAGEMAP);
}

static inline int each_policy(void)
{
	return can_exact() ? 2 : 1;
}

/* Ends a test that cannot run here. (Check's name of its function ends in _fn.) */
#define need(condition, what)                                       \
	do {                                                        \
		if (!(condition)) {                                 \
			printf("skipped: %.*s: %s\n", (int)strlen(__func__) - 3, __func__, what); \
			return;                                     \
		}                                                   \
	} while (0)

/* What single pages do: they are merged, broken, counted. Not where the mirror's granule is more than one. */
#define need_single_pages() need(granule <= PAGE, "it is about single pages, and KAGE_KVM_GRANULE is larger")

static inline void sleep_ms(unsigned ms)
{
	const struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};

	nanosleep(&t, NULL);
}

/* -- the engine ------------------------------------------------------------------- */

static inline void engine_log(void *opaque, int level, const char *line)
{
	if (level != KAGE_LOG_ERROR)
		return;
	fprintf(stderr, "engine: %s\n", line);
	atomic_fetch_add(&logged_errors, 1);
}

static inline void audit_line(void *opaque, const char *line)
{
	fprintf(stderr, "audit: %s\n", line);
}

/* T1 */
#define audit() audit_at(__FILE__, __LINE__)
static inline void audit_at(const char *file, int line)
{
	struct kage_audit a = {.size = sizeof(a), .report = audit_line};
	int r = kage_engine_audit(engine, &a);

	ck_assert_msg(r == KAGE_OK && a.violations == 0, "%s:%d: audit: %d, %lu violations", file, line, r,
		      (unsigned long)a.violations);
	ck_assert_msg(logged_errors == expected_errors, "%s:%d: the engine logged %u errors", file, line,
		      logged_errors);
}

static inline void engine_up(void)
{
	atomic_store(&logged_errors, 0);
	expected_errors = 0;
	ok(kage_engine_create(KAGE_CFG(kage_engine_config, .backing = KAGE_BACKING_MEMFD, .log = engine_log), &engine));
}

static inline void engine_down(void)
{
	ok(kage_engine_step(engine, NULL, NULL));
	audit();
	ok(kage_engine_destroy(engine));
	engine = NULL;
}

static inline void merging(bool on)
{
	ok(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = on ? KAGE_TUNE_MERGE : 0)));
}

/* Steps until nothing more merges. Returns how many pages were. */
static inline uint64_t merge_all(void)
{
	struct kage_progress p;
	uint64_t merged = 0, idle = 0;

	for (unsigned i = 0; i < 32 && idle < 3; i++) {
		p = (struct kage_progress){.size = sizeof(p)};
		ok(kage_engine_step(engine, NULL, &p));
		audit();
		merged += p.pages_merged;
		idle = p.pages_merged ? 0 : idle + 1;
	}
	return merged;
}

static inline struct kage_kvm_info info_of(struct kage_kvm *kvm)
{
	struct kage_kvm_info info = {.size = sizeof(info)};

	ok(kage_kvm_info(kvm, &info));
	return info;
}

static inline struct kage_stats stats_of(struct kage_vm *vm)
{
	struct kage_stats s = {.size = sizeof(s)};

	ok(kage_stats_get(engine, vm, &s));
	return s;
}

static inline uint64_t read64(struct kage_vm *vm, uint64_t gpa)
{
	uint64_t word = ~(uint64_t)0;

	ok(kage_vm_read(vm, gpa, &word, sizeof(word)));
	return word;
}

static inline void write64(struct kage_vm *vm, uint64_t gpa, uint64_t word)
{
	ok(kage_vm_write(vm, gpa, &word, sizeof(word)));
}

static inline uint8_t class_of(struct kage_vm *vm, uint64_t gpa)
{
	uint8_t class = 0xff;

	ok(kage_page_map(vm, gpa, PAGE, &class));
	return class;
}

/* -- guests without vCPUs --------------------------------------------------------- */

struct bare {
	struct kage_vm *vm;
	struct kage_kvm *kvm;
	int fd; /* of the KVM VM */
};

static inline int no_pause(void *opaque)
{
	return 0;
}

static inline void no_resume(void *opaque)
{
}

static inline int new_kvm(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), fd;

	ck_assert_int_ge(kvm, 0);
	fd = ioctl(kvm, KVM_CREATE_VM, 0);
	ck_assert_int_ge(fd, 0);
	close(kvm);
	return fd;
}

/* Nobody writes while the test's own thread is in the engine: pausing has nothing to do. */
static inline struct kage_kvm_config config_of(uint32_t policy)
{
	return (struct kage_kvm_config){.size = sizeof(struct kage_kvm_config), .policy = policy,
					.feature_mask = mask, .pause = no_pause, .resume = no_resume, .granule = granule};
}

static inline struct bare attach_with(struct kage_vm *vm, const struct kage_kvm_config *config)
{
	struct bare b = {.vm = vm, .fd = new_kvm()};

	ok(kage_kvm_attach(vm, b.fd, config, &b.kvm));
	if (info_of(b.kvm).policy == KAGE_KVM_EXACT)
		ok(kage_kvm_helper_start(b.kvm));
	audit();
	return b;
}

static inline struct bare attach(struct kage_vm *vm, uint32_t policy)
{
	struct kage_kvm_config config = config_of(policy);

	return attach_with(vm, &config);
}

static inline struct kage_vm *new_vm(uint64_t len)
{
	struct kage_vm *vm;

	ok(kage_vm_create(engine, NULL, &vm));
	ok(kage_vm_map(vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_MERGEABLE, .len = len)));
	return vm;
}

static inline struct bare new_bare(uint64_t len, uint32_t policy)
{
	return attach(new_vm(len), policy);
}

static inline struct bare clone_bare(const struct bare *parent, uint32_t policy)
{
	struct kage_vm *vm;

	ok(kage_vm_clone(parent->vm, NULL, &vm));
	audit();
	return attach(vm, policy);
}

static inline void free_bare(struct bare *b)
{
	kage_kvm_helper_stop(b->kvm); /* -ENOENT: there is none */
	ok(kage_kvm_detach(b->kvm));
	close(b->fd);
	audit();
	ok(kage_vm_destroy(b->vm));
	audit();
}

/* Where the test sees a page of a guest. */
static inline uint64_t *at(const struct bare *b, uint64_t gpa)
{
	uint64_t *p = kage_kvm_window(b->kvm, gpa, PAGE);

	ck_assert_ptr_nonnull(p);
	return p;
}

static inline uint64_t get(const struct bare *b, uint64_t gpa)
{
	return *(volatile uint64_t *)at(b, gpa);
}

static inline void put(const struct bare *b, uint64_t gpa, uint64_t word)
{
	*(volatile uint64_t *)at(b, gpa) = word;
}

/* -- guests that run ---------------------------------------------------------------- */

static const struct payload_config payload_small = {.map = 64 * MIB, .small_pages = true};

static inline struct kage_vm *vm_of(const struct vmm *vmm)
{
	return vmm_ram_kage_vm(vmm->ram);
}

static inline struct kage_kvm *kvm_of(const struct vmm *vmm)
{
	return vmm_ram_kage_kvm(vmm->ram);
}

struct vmm_wish {
	uint64_t ram; /* 0: 32 MiB */
	unsigned vcpus; /* 0: 1 */
	uint32_t policy, mask, map_budget, ring_bytes;
};

static inline struct vmm *new_vmm(struct vmm_wish wish)
{
	struct kage_kvm_config kvm = {.size = sizeof(kvm), .policy = wish.policy, .feature_mask = mask | wish.mask,
				      .map_budget = wish.map_budget, .granule = granule};
	struct vmm_config config = {.identity = PAYLOAD_IDENTITY, .dirty_ring_bytes = wish.ring_bytes};
	const struct vmm_region region = {0, wish.ram ? wish.ram : 32 * MIB};
	struct vmm *vmm;

	ok(vmm_ram_kage(engine, &region, 1, &kvm, &config.ram));
	ok(vmm_create(&config, &vmm));
	for (unsigned i = 0; i < (wish.vcpus ? wish.vcpus : 1); i++)
		ok(vmm_add_vcpu(vmm, NULL));
	ok(payload_load(vmm, &payload_small));
	audit();
	return vmm;
}

static inline struct vmm *clone_vmm(struct vmm *parent, bool paused)
{
	struct vmm_clone_config config = {.paused = paused};
	struct vmm *child = NULL;

	ok(vmm_clone(parent, &config, &child));
	audit();
	return child;
}

/* vCPU i works on its own pages, its log lies behind them; base 0: chosen. Returns the base. */
static inline uint64_t put_program(struct vmm *vmm, unsigned i, struct payload_mailbox mb)
{
	if (!mb.base)
		mb.base = payload_free(&payload_small) + i * 8 * MIB;
	if (!mb.log)
		mb.log = mb.base + mb.pages * PAGE;
	ok(payload_put(vmm, i, &mb));
	return mb.base;
}

static inline struct payload_mailbox mailbox(struct vmm *vmm, unsigned i)
{
	struct payload_mailbox mb;

	ok(payload_get(vmm, i, &mb));
	return mb;
}

static inline void put_stamps(struct vmm *vmm, uint64_t pages)
{
	for (unsigned i = 0; i < vmm->vcpus; i++)
		put_program(vmm, i, (struct payload_mailbox){.program = PAYLOAD_STAMP, .pages = pages,
							     .words = i ? 8 : 64, .seed = i + 1});
}

/* Waits until each vCPU has stamped `n` pages more. */
static inline void stamps_go_on(struct vmm *vmm, uint64_t n)
{
	for (unsigned i = 0; i < vmm->vcpus; i++) {
		uint64_t until = payload_peek(vmm, i, count) + n;

		while (payload_peek(vmm, i, count) < until) {
			ck_assert_int_ne(vmm->vcpu[i]->state, VMM_STOPPED);
			sleep_ms(1);
		}
	}
}

/* Stops the guest and requires that its memory is what it wrote. */
static inline void verify_stamps(struct vmm *vmm)
{
	ok(payload_stop(vmm, TIMEOUT_MS));
	for (unsigned i = 0; i < vmm->vcpus; i++) {
		struct payload_mailbox mb = mailbox(vmm, i);

		ck_assert_msg(!mb.errors, "vcpu %u: %lu errors; gfn %lx word %lx found %lx expected %lx", i,
			      mb.errors, mb.error_page, mb.error_word, mb.error_found, mb.error_expected);
		same(mb.audited, mb.pages);
		ck_assert_uint_gt(mb.count, 0);
		is(payload_check_stamps(vmm, i), 0);
		ok(payload_poke(vmm, i, stop, 0));
	}
}

static inline void check_stamps(struct vmm *vmm)
{
	verify_stamps(vmm);
	audit();
}

static inline void free_vmm(struct vmm *vmm)
{
	vmm_destroy(vmm);
	audit();
}

/* -- translation ------------------------------------------------------------------------- */

/* What a payload's vCPU has, for a vCPU of the soft backend. */
#if defined(__x86_64__)
#define HOST_ARCH KAGE_ARCH_X86
#define HOST_REGS ((struct kage_x86_regs){.cr0 = 0x80010001, .cr3 = PAYLOAD_PML4, .cr4 = 0x20, .efer = 0xd00})
#else
#define HOST_ARCH KAGE_ARCH_ARM64
#define HOST_REGS                                                                                            \
	((struct kage_arm64_regs){.sctlr = payload_entry(0).sctlr, .tcr = payload_entry(0).tcr,              \
				  .ttbr0 = PAYLOAD_PML4, .pstate = 0x3c5})
#endif

/*
 * What vCPU 0, which does not run, makes of a gva: x86, KVM says; arm64, where KVM does not say, the reference
 * walker with the registers that KVM gives. False: nothing.
 */
#if defined(__x86_64__)
static inline bool translated(struct vmm *vmm, uint64_t gva, uint64_t *gpa)
{
	struct kvm_translation t = {.linear_address = gva};

	ok(ioctl(vmm->vcpu[0]->fd, KVM_TRANSLATE, &t));
	*gpa = t.physical_address;
	return t.valid;
}
#else
static inline bool reference_read(void *vm, uint64_t gpa, uint64_t *value)
{
	return kage_vm_read(vm, gpa, value, sizeof(*value)) == KAGE_OK;
}

static inline bool translated(struct vmm *vmm, uint64_t gva, uint64_t *gpa)
{
	const struct ref_memory memory = {.read = reference_read, .arg = vm_of(vmm)};
	struct arm64_ref_cpu cpu = {.pa_bits = 40, .haf = true, .hd = true, .pan = true};
	struct arm64_ref_result result;
	int fd = vmm->vcpu[0]->fd;

	ok(arm64_get(fd, ARM64_SYS_REG(3, 0, 1, 0, 0), &cpu.sctlr));
	ok(arm64_get(fd, ARM64_SYS_REG(3, 0, 2, 0, 2), &cpu.tcr));
	ok(arm64_get(fd, ARM64_SYS_REG(3, 0, 2, 0, 0), &cpu.ttbr0));
	ok(arm64_get(fd, ARM64_SYS_REG(3, 0, 2, 0, 1), &cpu.ttbr1));
	ok(arm64_get(fd, ARM64_CORE(regs.pstate), &cpu.pstate));
	result = arm64_ref_translate(&cpu, &memory, gva, ARM64_REF_READ);
	*gpa = result.gpa;
	return result.outcome == ARM64_REF_OK;
}
#endif

/* -- what is mapped where -------------------------------------------------------------- */

struct frame_use {
	uint64_t file, page; /* the mirror: 0 and the frame; the kernel: inode and page of the file */
	uint64_t gpa;	     /* the mirror; the kernel: the address */
	bool shared;	     /* MAP_SHARED */
};

struct frame_uses {
	struct frame_use *use;
	size_t count, room;
};

static inline void use_add(struct frame_uses *u, struct frame_use use)
{
	if (u->count == u->room) {
		u->room = 2 * u->room + 4096;
		u->use = realloc(u->use, u->room * sizeof(*u->use));
		ck_assert_ptr_nonnull(u->use);
	}
	u->use[u->count++] = use;
}

static inline FILE *dump_of(struct kage_vm *vm, enum kage_dump_what what)
{
	int fd = memfd_create("dump", MFD_CLOEXEC);
	FILE *f;

	ck_assert_int_ge(fd, 0);
	ok(kage_dump(vm, what, KAGE_DUMP_TEXT, fd));
	lseek(fd, 0, SEEK_SET);
	f = fdopen(fd, "r");
	ck_assert_ptr_nonnull(f);
	return f;
}

/* Pages that the guest's mirror says are mapped to frames. */
static inline void uses_mirror(struct frame_uses *u, struct kage_vm *vm)
{
	FILE *f = dump_of(vm, KAGE_DUMP_MIRROR);
	unsigned long long start, end, pfn;
	char kind[16];
	unsigned lines = 0;

	for (; fscanf(f, "%llx-%llx %15s pfn %llx\n", &start, &end, kind, &pfn) == 4; lines++)
		for (; strcmp(kind, "zero") && start < end; start += PAGE, pfn++)
			use_add(u, (struct frame_use){.page = pfn, .gpa = start, .shared = !strcmp(kind, "shared")});
	ck_assert(feof(f));
	ck_assert_uint_gt(lines, 0);
	fclose(f);
}

/* What the kernel says of [gpa, gpa + len) of a guest. */
static inline void uses_kernel(struct frame_uses *u, struct kage_kvm *kvm, uint64_t gpa, uint64_t len)
{
	unsigned long long start, end, offset, inode, from = (uintptr_t)kage_kvm_window(kvm, gpa, len);
	FILE *f = fopen("/proc/self/maps", "r");
	char line[512], prot[8];
	uint64_t seen = 0;

	ck_assert_ptr_nonnull(f);
	ck_assert_uint_ne(from, 0);
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%llx-%llx %7s %llx %*s %llu", &start, &end, prot, &offset, &inode) != 5)
			continue;
		if (start < from) {
			offset += from - start;
			start = from;
		}
		for (; start < end && start < from + len; start += PAGE, offset += PAGE) {
			seen++;
			if (inode)
				use_add(u, (struct frame_use){inode, offset / PAGE, start, prot[3] == 's'});
		}
	}
	fclose(f);
	same(seen, len / PAGE);
}

static inline int use_compare(const void *a, const void *b)
{
	const struct frame_use *x = a, *y = b;

	if (x->file != y->file)
		return x->file < y->file ? -1 : 1;
	return x->page < y->page ? -1 : x->page > y->page;
}

/* Frames that are mapped more than once, none of them MAP_SHARED. Returns their number; frees `u`. */
static inline uint64_t uses_check(struct frame_uses *u)
{
	uint64_t several = 0;

	if (u->count)
		qsort(u->use, u->count, sizeof(*u->use), use_compare);
	for (size_t i = 1; i < u->count; i++) {
		const struct frame_use *a = &u->use[i - 1], *b = &u->use[i];

		if (use_compare(a, b))
			continue;
		several++;
		ck_assert_msg(!a->shared && !b->shared, "file %lx page %lx is mapped at %lx and %lx, %s", a->file,
			      a->page, a->gpa, b->gpa, a->shared && b->shared ? "both shared" : "one shared");
	}
	free(u->use);
	*u = (struct frame_uses){0};
	return several;
}

/* -- the program --------------------------------------------------------------------------- */

/* Without Check's assertions: no test runs yet. */
static inline int probe_child(int to)
{
	struct kage_kvm_config config = config_of(KAGE_KVM_NATIVE);
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), fd = ioctl(kvm, KVM_CREATE_VM, 0), r;
	struct kage_kvm *k;
	struct kage_vm *vm;

	caps.size = sizeof(caps);
	r = kage_engine_create(KAGE_CFG(kage_engine_config, .backing = KAGE_BACKING_MEMFD, .log = engine_log), &engine);
	if (r == 0)
		r = kage_vm_create(engine, NULL, &vm);
	if (r == 0)
		r = kage_kvm_attach(vm, fd, &config, &k);
	if (r == 0)
		r = kage_kvm_info(k, &caps);
	if (r)
		printf("the probe failed: %s\n", strerror(-r));
	return r || write(to, &caps, sizeof(caps)) != sizeof(caps);
}

/* Found out in a process of its own: Check forks from one that has no engine. */
static inline void probe(void)
{
	int pipes[2], status;
	pid_t pid;

	mask = (uint32_t)env_number("KAGE_KVM_MASK", 0);
	granule = (uint32_t)env_number("KAGE_KVM_GRANULE", 0);
	if (pipe(pipes))
		exit(EXIT_FAILURE);
	fflush(stdout);
	pid = fork();
	if (pid == 0)
		_exit(probe_child(pipes[1]));
	close(pipes[1]);
	if (read(pipes[0], &caps, sizeof(caps)) != sizeof(caps))
		exit(EXIT_FAILURE);
	close(pipes[0]);
	waitpid(pid, &status, 0);
	if (mask)
		printf("masked: %#x\n", mask);
	if (!can_exact())
		printf("skipped: exact policy: this kernel cannot trap\n");
}

static inline void skip_without_kvm(void)
{
	const char *why = vmm_missing();

	if (why) {
		printf("skipped: %s\n", why);
		exit(77);
	}
}

/* A test, `n` times, as a case of its own: CK_RUN_CASE=name runs it alone. */
#define add_test(suite, test, n) add_test_case(suite, #test, test, 0, n)
static inline void add_test_case(Suite *suite, const char *name, const TTest *test, int first, int n)
{
	TCase *tc = n ? tcase_create(name) : NULL;

	if (!tc)
		return;
	tcase_set_timeout(tc, 60);
	tcase_add_loop_test(tc, test, first, n);
	suite_add_tcase(suite, tc);
}

/* Once for each policy that this kernel can do. KAGE_KVM_POLICY=exact leaves native to another run. */
#define add_policies(suite, test) add_test_case(suite, #test, test, only_exact(), each_policy())
static inline int only_exact(void)
{
	const char *policy = getenv("KAGE_KVM_POLICY");

	return policy && !strcmp(policy, "exact") && can_exact();
}

static inline int run(Suite *suite)
{
	SRunner *sr = srunner_create(suite);
	int failed;

	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

#endif
