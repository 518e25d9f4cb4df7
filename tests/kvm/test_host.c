/* SPDX-License-Identifier: MIT */
/*
 * backends/kvm: what the host offers (features), what it says of our memory
 * (scan), traps (uffd). Needs no /dev/kvm, but for the tests of a VM descriptor.
 *
 * Tests that give up rights or open(2) do so in the process that Check forks for each test.
 */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "../common/leak.h"
#include "kvm/compat.h"
#include "kvm/scan.h"
#include "kvm/uffd.h"

#include "short.h"

#define NOBODY 65534
#define bit(n) (1u << (n))

static struct env env;
static bool forks;

static struct kage_kvm_config config_of(uint32_t flags, uint32_t mask)
{
	return (struct kage_kvm_config){.size = sizeof(struct kage_kvm_config), .flags = flags, .feature_mask = mask};
}

static struct features probed(uint32_t flags, uint32_t mask)
{
	struct kage_kvm_config config = config_of(flags, mask);
	struct features f;

	ck_assert_int_eq(features_probe(&f, &env, &config, FEATURES_NO_VM), 0);
	return f;
}

/* True, and a line, if the test cannot run. */
static bool skip(const struct features *f, uint32_t needs)
{
	for (unsigned n = 0; n < KAGE_KVM_FEATURES; n++)
		if ((needs & bit(n)) && !feature_used(f, n)) {
			printf("skipped: feature %u: %s\n", n, f->info[n].why);
			return true;
		}
	return false;
}

static void leave(int status, void *arg)
{
	fflush(NULL);
	_exit(status);
}

/* The process gives something up: a leak checker could not work at its end, and would wait for ever. */
static void leave_early(void)
{
	ck_assert_int_eq(on_exit(leave, NULL), 0);
}

static bool skip_rights(void)
{
	if (forks && geteuid() == 0) {
		leave_early();
		return false;
	}
	printf("skipped: needs root and a process of its own\n");
	return true;
}

static int file_of(size_t npages)
{
	int fd = memfd_create("test", MFD_CLOEXEC);

	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, (off_t)(npages * PAGE_SIZE)), 0);
	return fd;
}

static char *map(int fd, size_t npages, int flags)
{
	char *at = mmap(NULL, npages * PAGE_SIZE, PROT_READ | PROT_WRITE,
			flags | (fd < 0 ? MAP_ANONYMOUS : 0) | MAP_NORESERVE, fd, 0);

	ck_assert_ptr_ne(at, MAP_FAILED);
	madvise(at, npages * PAGE_SIZE, MADV_NOHUGEPAGE);
	return at;
}

static void file_word(int fd, size_t page, uint64_t v)
{
	ck_assert_int_eq(pwrite(fd, &v, sizeof(v), (off_t)(page * PAGE_SIZE)), sizeof(v));
}

static uint64_t read_word(int fd, size_t page)
{
	uint64_t v;

	ck_assert_int_eq(pread(fd, &v, sizeof(v), (off_t)(page * PAGE_SIZE)), sizeof(v));
	return v;
}

static uint64_t *word(char *at, size_t page)
{
	return (uint64_t *)(at + page * PAGE_SIZE);
}

/* -- features ---------------------------------------------------------------- */

static bool kernel_at_least(unsigned major, unsigned minor)
{
	struct utsname u;
	unsigned a, b;

	ck_assert_int_eq(uname(&u), 0);
	ck_assert_int_eq(sscanf(u.release, "%u.%u", &a, &b), 2);
	return a > major || (a == major && b >= minor);
}

static void check_cloexec(int fd)
{
	if (fd >= 0)
		ck_assert_int_eq(fcntl(fd, F_GETFD), FD_CLOEXEC);
}

START_TEST(features_all)
{
	struct leak before = leak_take();
	struct features f = probed(0, 0);

	for (int n = 0; n < KAGE_KVM_FEATURES; n++) {
		ck_assert_ptr_nonnull(f.info[n].why);
		if (f.info[n].used)
			ck_assert_int_eq(f.info[n].error, 0);
		ck_assert_int_ge(f.info[n].error, 0);
	}
	ck_assert(feature_used(&f, KAGE_KVM_PAGEMAP)); /* the test's own process, its own /proc */
	ck_assert_int_eq(feature_used(&f, KAGE_KVM_PAGEMAP_SCAN), kernel_at_least(6, 7));
	if (feature_used(&f, KAGE_KVM_USERFAULTFD)) {
		ck_assert_int_eq(feature_used(&f, KAGE_KVM_UFFD_MINOR), kernel_at_least(5, 14));
#ifdef __x86_64__
		ck_assert_int_eq(feature_used(&f, KAGE_KVM_UFFD_WP), kernel_at_least(5, 19));
		ck_assert_int_eq(feature_used(&f, KAGE_KVM_UFFD_CONTINUE_WP), kernel_at_least(6, 4));
#endif
	}
	ck_assert_int_eq(f.info[KAGE_KVM_DIRTY_LOG].error, ENODEV);
	check_cloexec(f.pagemap);
	check_cloexec(f.maps);
	check_cloexec(f.statm);
	check_cloexec(f.uffd_dev);
	features_finish(&f);
	ck_assert_int_eq(leak_check(&before), 0);
}
END_TEST

/* Features that cannot be without feature n. */
static uint32_t dependents(unsigned n)
{
	const uint32_t cwp = bit(KAGE_KVM_UFFD_CONTINUE_WP);

	switch (n) {
	case KAGE_KVM_USERFAULTFD:
		return bit(KAGE_KVM_UFFD_WP) | bit(KAGE_KVM_UFFD_MINOR) | cwp;
	case KAGE_KVM_UFFD_WP:
	case KAGE_KVM_UFFD_MINOR:
		return cwp;
	case KAGE_KVM_PAGEMAP:
		return bit(KAGE_KVM_PAGEMAP_SCAN);
	}
	return 0;
}

START_TEST(features_masked)
{
	struct leak before = leak_take();
	struct features all = probed(0, 0);

	for (unsigned n = 0; n < KAGE_KVM_FEATURES; n++) {
		struct features f = probed(0, bit(n));

		ck_assert_uint_eq(f.info[n].used, 0);
		ck_assert_int_eq(f.info[n].error, 0);
		ck_assert_str_eq(f.info[n].why, "masked by feature_mask");
		for (unsigned i = 0; i < KAGE_KVM_FEATURES; i++) {
			if (i == n)
				continue;
			ck_assert_ptr_nonnull(f.info[i].why);
			ck_assert_uint_eq(f.info[i].used, dependents(n) & bit(i) ? 0 : all.info[i].used);
		}
		features_finish(&f);
	}
	features_finish(&all);
	ck_assert_int_eq(leak_check(&before), 0);
}
END_TEST

static volatile sig_atomic_t opened;

static void count_open(int sig, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;

	opened++;
#if defined(__x86_64__)
	uc->uc_mcontext.gregs[REG_RAX] = -EPERM;
#elif defined(__aarch64__)
	uc->uc_mcontext.regs[0] = (unsigned long)-EPERM;
#endif
}

/* From here on open(2) and its kin fail, and are counted. */
static void forbid_open(void)
{
	struct sock_filter code[] = {
	    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
#ifdef SYS_open
	    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_open, 3, 0),
#endif
	    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 2, 0),
	    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 437 /* openat2 */, 1, 0),
	    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
	};
	struct sock_fprog prog = {.len = ARRAY_SIZE(code), .filter = code};
	struct sigaction act = {.sa_sigaction = count_open, .sa_flags = SA_SIGINFO};

	leave_early();
	ck_assert_int_eq(sigaction(SIGSYS, &act, NULL), 0);
	ck_assert_int_eq(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
	ck_assert_int_eq(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog), 0);
	ck_assert_int_eq(open("/dev/null", O_RDONLY), -1);
	ck_assert_int_eq(errno, EPERM);
	ck_assert_int_eq(opened, 1);
}

static int fail_run(void *arg, char *from, char *to)
{
	ck_abort_msg("nothing was to be reported");
	return 0;
}

static int fail_line(void *arg, const struct scan_map *m)
{
	ck_abort_msg("nothing was to be reported");
	return 0;
}

START_TEST(features_no_open)
{
	char *page = map(-1, 1, MAP_PRIVATE);
	struct features f;

	if (!forks) {
		printf("skipped: needs a process of its own\n");
		return;
	}
	forbid_open();
	f = probed(KAGE_KVM_NO_OPEN, 0);
	ck_assert_int_eq(opened, 1);
	ck_assert_int_eq(f.pagemap, -1);
	ck_assert_int_eq(f.maps, -1);
	ck_assert_int_eq(f.statm, -1);
	ck_assert_int_eq(f.uffd_dev, -1);
	ck_assert_uint_eq(f.info[KAGE_KVM_PAGEMAP].used, 0);
	ck_assert_int_eq(f.info[KAGE_KVM_PAGEMAP].error, ENOENT);
	ck_assert_int_eq(scan_private(&f, page, PAGE_SIZE, fail_run, NULL), -EOPNOTSUPP);
	ck_assert_int_eq(scan_present(&f, page, PAGE_SIZE, fail_run, NULL), -EOPNOTSUPP);
	ck_assert_int_eq(scan_maps(&f, fail_line, NULL), -EOPNOTSUPP);
	ck_assert_int_eq(scan_anon_rss(&f), -EOPNOTSUPP);
	features_finish(&f);
}
END_TEST

static int count_line(void *arg, const struct scan_map *m)
{
	++*(unsigned *)arg;
	return 0;
}

static int count_run(void *arg, char *from, char *to)
{
	++*(unsigned *)arg;
	return 0;
}

/* A VMM jails itself after it has attached. */
START_TEST(features_jailed)
{
	struct features f = probed(0, 0);
	unsigned lines = 0, runs = 0;
	struct uffd u, other;
	char *at;

	if (!forks || skip(&f, bit(KAGE_KVM_USERFAULTFD))) {
		features_finish(&f);
		return;
	}
	forbid_open();
	ck_assert_int_eq(uffd_open(&u, &f, false), 0);
	ck_assert_int_eq(uffd_open(&other, &f, true), 0);
	at = map(-1, 4, MAP_PRIVATE);
	*word(at, 1) = 1;
	ck_assert_int_eq(scan_private(&f, at, 4 * PAGE_SIZE, count_run, &runs), 0);
	ck_assert_uint_eq(runs, 1);
	ck_assert_int_eq(scan_maps(&f, count_line, &lines), 0);
	ck_assert_uint_gt(lines, 3);
	ck_assert_int_gt(scan_anon_rss(&f), 0);
	ck_assert_int_eq(opened, 1);
	uffd_close(&u);
	uffd_close(&other);
	features_finish(&f);
}
END_TEST

START_TEST(features_handed_in)
{
	struct kage_kvm_config config = config_of(KAGE_KVM_NO_OPEN | KAGE_KVM_PAGEMAP_FD | KAGE_KVM_MAPS_FD, 0);
	struct features all = probed(0, 0), f;
	unsigned lines = 0;

	config.pagemap_fd = open("/proc/self/pagemap", O_RDONLY);
	config.maps_fd = open("/proc/self/maps", O_RDONLY);
	config.uffd_fd = open("/dev/userfaultfd", O_RDWR);
	if (config.uffd_fd >= 0)
		config.flags |= KAGE_KVM_UFFD_FD;
	else
		printf("skipped: a handed-in /dev/userfaultfd (%s)\n", strerror(errno));
	ck_assert_int_eq(features_probe(&f, &env, &config, FEATURES_NO_VM), 0);
	close(config.pagemap_fd);
	close(config.maps_fd);
	if (config.uffd_fd >= 0) {
		close(config.uffd_fd);
		ck_assert_int_ge(f.uffd_dev, 0);
		check_cloexec(f.uffd_dev);
	}
	check_cloexec(f.pagemap);
	check_cloexec(f.maps);
	for (int n = 0; n < KAGE_KVM_FEATURES; n++)
		ck_assert_uint_eq(f.info[n].used, all.info[n].used);
	ck_assert_int_eq(scan_maps(&f, count_line, &lines), 0);
	ck_assert_uint_gt(lines, 3);
	if (feature_used(&f, KAGE_KVM_USERFAULTFD)) {
		int fd = features_uffd_new(&f);

		ck_assert_int_ge(fd, 0);
		check_cloexec(fd);
		ck_assert(fcntl(fd, F_GETFL) & O_NONBLOCK);
		close(fd);
	}
	features_finish(&all);
	features_finish(&f);
}
END_TEST

START_TEST(features_wrong_fds)
{
	struct leak before = leak_take();
	struct kage_kvm_config config;
	struct features f;
	char path[64];
	int fd = file_of(1), status;
	pid_t child;

	config = config_of(KAGE_KVM_PAGEMAP_FD, 0);
	config.pagemap_fd = fd;
	ck_assert_int_eq(features_probe(&f, &env, &config, FEATURES_NO_VM), 0);
	ck_assert_uint_eq(f.info[KAGE_KVM_PAGEMAP].used, 0);
	ck_assert_int_ne(f.info[KAGE_KVM_PAGEMAP].error, 0);
	ck_assert_uint_eq(f.info[KAGE_KVM_PAGEMAP_SCAN].used, 0);
	ck_assert_int_eq(f.pagemap, -1);
	features_finish(&f);

	config = config_of(KAGE_KVM_UFFD_FD, 0);
	config.uffd_fd = fd;
	ck_assert_int_eq(features_probe(&f, &env, &config, FEATURES_NO_VM), 0);
	ck_assert_uint_eq(f.info[KAGE_KVM_USERFAULTFD].used, 0);
	ck_assert_uint_eq(f.info[KAGE_KVM_UFFD_WP].used, 0);
	features_finish(&f);
	close(fd);

	for (uint32_t flag = KAGE_KVM_PAGEMAP_FD; flag <= KAGE_KVM_UFFD_FD; flag <<= 1) {
		config = config_of(flag, 0);
		config.pagemap_fd = config.maps_fd = config.uffd_fd = fd;
		ck_assert_int_eq(features_probe(&f, &env, &config, FEATURES_NO_VM), -EBADF);
	}

	child = fork();
	if (child == 0) {
		pause();
		_exit(0);
	}
	snprintf(path, sizeof(path), "/proc/%d/pagemap", (int)child);
	config = config_of(KAGE_KVM_PAGEMAP_FD, 0);
	config.pagemap_fd = open(path, O_RDONLY);
	ck_assert_int_ge(config.pagemap_fd, 0);
	ck_assert_int_eq(features_probe(&f, &env, &config, FEATURES_NO_VM), 0);
	ck_assert_uint_eq(f.info[KAGE_KVM_PAGEMAP].used, 0);
	features_finish(&f);
	close(config.pagemap_fd);
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	ck_assert_int_eq(leak_check(&before), 0);
}
END_TEST

static int probe_vm(struct features *f, int vmfd, uint32_t ring)
{
	struct kage_kvm_config config = config_of(0, 0);

	config.dirty_ring_bytes = ring;
	return features_probe(f, &env, &config, vmfd);
}

START_TEST(features_vm)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), error = errno, vm, other = file_of(1), ring;
	struct features f;

	ck_assert_int_eq(probe_vm(&f, -1, 0), -EINVAL);
	ck_assert_int_eq(probe_vm(&f, other, 0), -EINVAL);
	close(other);
	if (kvm < 0) {
		printf("skipped: a VM's features: no /dev/kvm (%s)\n", strerror(error));
		return;
	}
	ck_assert_int_eq(probe_vm(&f, kvm, 0), -EINVAL);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	ck_assert_int_ge(vm, 0);
	ck_assert_int_eq(probe_vm(&f, vm, 0), 0);
	ck_assert(feature_used(&f, KAGE_KVM_DIRTY_LOG));
	ck_assert_uint_gt(f.slots, 0);
	ck_assert_uint_eq(f.info[KAGE_KVM_DIRTY_RING].used, 0);
	ck_assert_int_eq(f.info[KAGE_KVM_DIRTY_RING].error, 0);
	ck_assert_int_eq(feature_used(&f, KAGE_KVM_READONLY_SLOT),
			 ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_READONLY_MEM) > 0);
	ck_assert_int_eq(feature_used(&f, KAGE_KVM_MEMORY_FAULT),
			 ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_MEMORY_FAULT_INFO) > 0);
	features_finish(&f);

	ck_assert_int_eq(probe_vm(&f, vm, UINT32_MAX), 0);
	ck_assert_int_eq(f.info[KAGE_KVM_DIRTY_RING].error, EOPNOTSUPP);
	ck_assert_uint_eq(f.dirty_ring_bytes, 0);
	features_finish(&f);
	ring = MAX(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING),
		   ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL));
#if defined(__aarch64__)
	ring = 0; /* not used there */
#endif
	ck_assert_int_eq(probe_vm(&f, vm, 65536), 0);
	ck_assert_int_eq(feature_used(&f, KAGE_KVM_DIRTY_RING), ring >= 65536);
	ck_assert_uint_eq(f.dirty_ring_bytes, ring >= 65536 ? 65536 : 0);
	features_finish(&f);
	close(vm);
	close(kvm);
}
END_TEST

/* -- scan_private, scan_present ---------------------------------------------- */

#define PAGES 4096

struct pages {
	char *start, *last; /* of the mapping; end of the last run */
	size_t npages;
	unsigned runs;
	bool seen[PAGES];
};

static int take_run(void *arg, char *from, char *to)
{
	struct pages *p = arg;

	ck_assert(from < to);
	ck_assert(from >= p->start);
	ck_assert(to <= p->start + p->npages * PAGE_SIZE);
	/* Ascending, and with a gap: runs are maximal. */
	if (p->runs++)
		ck_assert(from > p->last);
	p->last = to;
	for (char *at = from; at < to; at += PAGE_SIZE)
		p->seen[(size_t)(at - p->start) / PAGE_SIZE] = true;
	return 0;
}

enum deed { NOTHING, READ, WRITE, READ_WRITE, DISCARD, DEEDS };

static void do_deed(char *page, enum deed deed)
{
	if (deed == READ || deed == READ_WRITE)
		(void)READ_ONCE(*page);
	if (deed == WRITE || deed == READ_WRITE || deed == DISCARD)
		WRITE_ONCE(*page, 7);
	if (deed == DISCARD)
		ck_assert_int_eq(madvise(page, PAGE_SIZE, MADV_DONTNEED), 0);
}

static bool is_private(enum deed deed)
{
	return deed == WRITE || deed == READ_WRITE;
}

/* A page of the file that was only read: the kernel may unmap it at any time, but hardly twice in a row. */
static void check_read(const struct features *f, char *page)
{
	struct pages one = {.start = page, .npages = 1};

	for (unsigned i = 0; i < 10 && !one.seen[0]; i++) {
		do_deed(page, READ);
		ck_assert_int_eq(scan_present(f, page, PAGE_SIZE, take_run, &one), 0);
	}
	ck_assert(one.seen[0]);
}

/* Compares both scans of pages [a, b) with what was done to them. */
static void check_scan(const struct features *f, char *at, size_t a, size_t b, const enum deed *deed,
		       const bool *cached)
{
	static struct pages private, present;

	private = present = (struct pages){.start = at + a * PAGE_SIZE, .npages = b - a};
	ck_assert_int_eq(scan_private(f, private.start, (b - a) * PAGE_SIZE, take_run, &private), 0);
	ck_assert_int_eq(scan_present(f, private.start, (b - a) * PAGE_SIZE, take_run, &present), 0);
	for (size_t i = a; i < b; i++) {
		ck_assert_msg(private.seen[i - a] == is_private(deed[i]), "page %zu, deed %d, private %d", i, deed[i],
			      private.seen[i - a]);
		if (is_private(deed[i]))
			ck_assert(present.seen[i - a]);
		else if (deed[i] == READ && !present.seen[i - a])
			check_read(f, at + i * PAGE_SIZE);
		/* A read maps its neighbours that are in the file; a hole has no page to map. */
		else if (deed[i] == NOTHING && !cached[i])
			ck_assert(!present.seen[i - a]);
	}
}

static void random_pattern(const struct features *f, unsigned seed)
{
	static enum deed deed[PAGES];
	static bool cached[PAGES];
	int fd = file_of(PAGES);
	char *at = map(fd, PAGES, MAP_PRIVATE);

	srand(seed);
	for (size_t i = 0; i < PAGES; i++) {
		cached[i] = rand() % 2;
		if (cached[i])
			file_word(fd, i, i);
	}
	/* Runs of one deed and single pages. */
	for (size_t i = 0; i < PAGES;) {
		size_t n = rand() % 3 ? 1 : 1 + (size_t)rand() % 60;
		enum deed d = (enum deed)(rand() % DEEDS);

		for (; n-- && i < PAGES; i++)
			deed[i] = d;
	}
	for (size_t i = 0; i < PAGES; i++)
		do_deed(at + i * PAGE_SIZE, deed[i]);
	check_scan(f, at, 0, PAGES, deed, cached);
	for (unsigned i = 0; i < times(40, 6); i++) {
		size_t a = (size_t)rand() % PAGES, b = a + (size_t)rand() % (PAGES - a + 1);

		check_scan(f, at, a, b, deed, cached);
	}
	munmap(at, PAGES * PAGE_SIZE);
	close(fd);
}

/* The two methods: with the ioctl, by entries. */
static const uint32_t methods[] = {0, bit(KAGE_KVM_PAGEMAP_SCAN)};

START_TEST(scan_private_exact)
{
	struct features f = probed(0, methods[_i]);

	if (_i == 0 && skip(&f, bit(KAGE_KVM_PAGEMAP_SCAN)))
		printf("  the entries are read twice\n");
	for (unsigned seed = 1; seed <= times(8, 1); seed++)
		random_pattern(&f, seed);
	features_finish(&f);
}
END_TEST

/* Without rights the kernel shows no frames. */
START_TEST(scan_private_unprivileged)
{
	struct features f;

	if (skip_rights())
		return;
	ck_assert_int_eq(setresgid(NOBODY, NOBODY, NOBODY), 0);
	ck_assert_int_eq(setresuid(NOBODY, NOBODY, NOBODY), 0);
	ck_assert_int_eq(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), 0);
	f = probed(0, methods[_i]);
	ck_assert(feature_used(&f, KAGE_KVM_PAGEMAP));
	ck_assert_uint_eq(f.zero_frame, 0);
	ck_assert_uint_eq(f.marker_frame, 0);
	random_pattern(&f, 9);
	features_finish(&f);
}
END_TEST

START_TEST(scan_zero_page)
{
	struct features f = probed(0, methods[_i]);
	static struct pages p;
	bool exact = feature_used(&f, KAGE_KVM_PAGEMAP_SCAN) || f.zero_frame;
	char *at = map(-1, 64, MAP_PRIVATE);

	for (size_t i = 0; i < 64; i++)
		do_deed(at + i * PAGE_SIZE, i % 4 == 0 ? READ : i % 4 == 1 ? WRITE : NOTHING);
	p = (struct pages){.start = at, .npages = 64};
	ck_assert_int_eq(scan_private(&f, at, 64 * PAGE_SIZE, take_run, &p), 0);
	for (size_t i = 0; i < 64; i++)
		ck_assert_int_eq(p.seen[i], i % 4 == 1 || (i % 4 == 0 && !exact));
	p = (struct pages){.start = at, .npages = 64};
	ck_assert_int_eq(scan_present(&f, at, 64 * PAGE_SIZE, take_run, &p), 0);
	for (size_t i = 0; i < 64; i++)
		ck_assert_int_eq(p.seen[i], i % 4 < 2);
	munmap(at, 64 * PAGE_SIZE);
	features_finish(&f);
}
END_TEST

START_TEST(scan_swapped)
{
	struct features f = probed(0, methods[_i]);
	static struct pages p;
	struct sysinfo si;
	int fd = file_of(PAGES);
	char *at = map(fd, PAGES, MAP_PRIVATE);

	ck_assert_int_eq(sysinfo(&si), 0);
	if (!si.totalswap)
		printf("skipped: there is no swap\n");
	for (size_t i = 0; i < PAGES; i += 2)
		do_deed(at + i * PAGE_SIZE, WRITE);
	madvise(at, PAGES * PAGE_SIZE, 21 /* MADV_PAGEOUT */);
	p = (struct pages){.start = at, .npages = PAGES};
	ck_assert_int_eq(scan_private(&f, at, PAGES * PAGE_SIZE, take_run, &p), 0);
	for (size_t i = 0; i < PAGES; i++)
		ck_assert_int_eq(p.seen[i], i % 2 == 0);
	munmap(at, PAGES * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

struct run_list {
	unsigned n;
	char *from[3];
};

static int list_run(void *arg, char *from, char *to)
{
	struct run_list *l = arg;

	ck_assert_uint_lt(l->n, 3);
	ck_assert_ptr_eq(to, from + PAGE_SIZE);
	l->from[l->n++] = from;
	return 0;
}

/* 16 GiB with three pages in it. */
START_TEST(scan_sparse)
{
	struct features f = probed(0, methods[_i]);
	const size_t n = (size_t)16 << (30 - PAGE_SHIFT), there[] = {0, n / 2 + 3, n - 1};
	struct run_list found = {0};
	int fd = file_of(n);
	char *at = map(fd, n, MAP_PRIVATE);

	for (int i = 0; i < 3; i++)
		do_deed(at + there[i] * PAGE_SIZE, WRITE);
	ck_assert_int_eq(scan_private(&f, at, n * PAGE_SIZE, list_run, &found), 0);
	ck_assert_uint_eq(found.n, 3);
	for (int i = 0; i < 3; i++)
		ck_assert_ptr_eq(found.from[i], at + there[i] * PAGE_SIZE);
	munmap(at, n * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

static int stop_at_second(void *arg, char *from, char *to)
{
	return ++*(int *)arg == 2 ? 77 : 0;
}

START_TEST(scan_stops)
{
	struct features f = probed(0, methods[_i]);
	char *at = map(-1, 2048, MAP_PRIVATE);
	int calls = 0;

	for (size_t i = 0; i < 2048; i += 2)
		do_deed(at + i * PAGE_SIZE, WRITE);
	ck_assert_int_eq(scan_private(&f, at, 2048 * PAGE_SIZE, stop_at_second, &calls), 77);
	ck_assert_int_eq(calls, 2);
	ck_assert_int_eq(scan_private(&f, at, 0, fail_run, NULL), 0);
	/* The last run of a scan can end it too. */
	calls = 1;
	ck_assert_int_eq(scan_present(&f, at, PAGE_SIZE, stop_at_second, &calls), 77);
	munmap(at, 2048 * PAGE_SIZE);
	features_finish(&f);
}
END_TEST

/* Write protection puts markers where no page is; they are not private memory. */
START_TEST(scan_markers)
{
	struct features f = probed(0, methods[_i]);
	static struct pages p;
	struct uffd u;
	int fd;
	char *at;

	if (skip(&f, bit(KAGE_KVM_UFFD_WP))) {
		features_finish(&f);
		return;
	}
	fd = file_of(64);
	at = map(fd, 64, MAP_PRIVATE);
	ck_assert_int_eq(uffd_open(&u, &f, false), 0);
	ck_assert_int_eq(uffd_register(&u, at, 64 * PAGE_SIZE, UFFDIO_REGISTER_MODE_WP), 0);
	for (size_t i = 0; i < 64; i++)
		do_deed(at + i * PAGE_SIZE, i % 4 == 0 ? READ : i % 4 == 1 ? WRITE : NOTHING);
	ck_assert_int_eq(uffd_protect(&u, at, 64 * PAGE_SIZE), 0);
	p = (struct pages){.start = at, .npages = 64};
	ck_assert_int_eq(scan_private(&f, at, 64 * PAGE_SIZE, take_run, &p), 0);
	if (!f.marker_frame)
		printf("skipped: markers told apart: the kernel shows no frames to this process\n");
	for (size_t i = 0; i < 64; i++) {
		if (i % 4 == 1)
			ck_assert(p.seen[i]);
		else if (i % 4 == 0 || f.marker_frame)
			ck_assert(!p.seen[i]);
	}
	uffd_close(&u);
	munmap(at, 64 * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

/* -- scan_maps, scan_anon_rss ------------------------------------------------ */

struct wanted {
	const char *at;
	struct scan_map found;
	unsigned n;
	uint64_t last;
};

static int find_map(void *arg, const struct scan_map *m)
{
	struct wanted *w = arg;

	ck_assert_uint_lt(m->start, m->end);
	ck_assert_uint_ge(m->start, w->last);
	w->last = m->end;
	if (m->start <= (uintptr_t)w->at && (uintptr_t)w->at < m->end) {
		w->found = *m;
		w->n++;
	}
	return 0;
}

static struct scan_map map_at(const struct features *f, const char *at)
{
	struct wanted w = {.at = at};

	ck_assert_int_eq(scan_maps(f, find_map, &w), 0);
	ck_assert_uint_eq(w.n, 1);
	return w.found;
}

static int stop_line(void *arg, const struct scan_map *m)
{
	return ++*(int *)arg == 3 ? -ECANCELED : 0;
}

START_TEST(maps_are_read)
{
	struct features f = probed(0, 0);
	/* A name that would pass for a line of its own. */
	int fd = memfd_create("a b\n7f0000000000-7f0000001000 rwxs 0", MFD_CLOEXEC), calls = 0;
	char *at = map(-1, 2000, MAP_PRIVATE);
	struct scan_map m;

	ck_assert_int_eq(ftruncate(fd, 64 * (off_t)PAGE_SIZE), 0);
	/* Many kilobytes of lines, so that lines cross buffers. */
	for (size_t i = 0; i < 2000; i += 2)
		ck_assert_int_eq(mprotect(at + i * PAGE_SIZE, PAGE_SIZE, PROT_READ), 0);
	ck_assert_ptr_eq(mmap(at + 100 * PAGE_SIZE, 2 * PAGE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED,
			      fd, 7 * PAGE_SIZE),
			 at + 100 * PAGE_SIZE);
	ck_assert_ptr_eq(mmap(at + 200 * PAGE_SIZE, PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_FIXED, fd, 0),
			 at + 200 * PAGE_SIZE);
	/* A second reading sees the state of now. */
	for (int i = 0; i < 2; i++) {
		m = map_at(&f, at + 101 * PAGE_SIZE);
		ck_assert_uint_eq(m.start, (uintptr_t)at + 100 * PAGE_SIZE);
		ck_assert_uint_eq(m.end, (uintptr_t)at + 102 * PAGE_SIZE);
		ck_assert_int_eq(m.prot, PROT_READ | PROT_EXEC);
		ck_assert(m.shared);
		ck_assert_uint_eq(m.offset, 7 * PAGE_SIZE);
		ck_assert_uint_ne(m.inode, 0);
		ck_assert_uint_eq(map_at(&f, at + 200 * PAGE_SIZE).inode, m.inode);
		ck_assert_int_eq(map_at(&f, at + 200 * PAGE_SIZE).prot, PROT_NONE);
		ck_assert(!map_at(&f, at + 200 * PAGE_SIZE).shared);
		for (size_t p = 400; p < 2000; p += times(97, 397)) {
			m = map_at(&f, at + p * PAGE_SIZE);
			ck_assert_int_eq(m.prot, p % 2 ? PROT_READ | PROT_WRITE : PROT_READ);
			ck_assert_uint_eq(m.end - m.start, PAGE_SIZE);
			ck_assert_uint_eq(m.inode, 0);
		}
	}
	ck_assert_int_eq(scan_maps(&f, stop_line, &calls), -ECANCELED);
	ck_assert_int_eq(calls, 3);
	munmap(at, 2000 * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

START_TEST(rss_of_anonymous)
{
	struct features f = probed(0, 0);
	const size_t n = 16384; /* 64 MiB: the kernel's counters lag by some pages a CPU */
	const int64_t bytes = (int64_t)(n * PAGE_SIZE), slack = bytes / 4;
	int fd = file_of(n);
	char *shared = map(fd, n, MAP_SHARED), *private = map(fd, n, MAP_PRIVATE);
	int64_t before = scan_anon_rss(&f), after;

	ck_assert_int_gt(before, 0);
#ifdef KAGE_TSAN
	printf("skipped: what shared memory adds: TSan's shadow of it is anonymous\n");
	return;
#endif
	for (size_t i = 0; i < n; i++)
		do_deed(shared + i * PAGE_SIZE, WRITE);
	after = scan_anon_rss(&f);
	ck_assert_int_lt(after, before + slack);
	for (size_t i = 0; i < n; i++)
		do_deed(private + i * PAGE_SIZE, WRITE);
	after = scan_anon_rss(&f);
	ck_assert_int_gt(after, before + bytes - slack);
	ck_assert_int_lt(after, before + bytes + slack);
	munmap(shared, n * PAGE_SIZE);
	munmap(private, n * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

/* -- uffd -------------------------------------------------------------------- */

#define EVENT_MS 20000 /* a hang, not a measure */

static unsigned next_event(const struct uffd *u, struct uffd_msg *msg)
{
	struct pollfd p = {.fd = u->fd, .events = POLLIN};

	ck_assert_int_eq(poll(&p, 1, EVENT_MS), 1);
	ck_assert_int_eq(uffd_read(u, msg, 1), 1);
	return msg->event;
}

/* The flags of the next page fault, on `page`. */
static uint64_t next_fault(const struct uffd *u, const char *page)
{
	struct uffd_msg msg;

	ck_assert_uint_eq(next_event(u, &msg), UFFD_EVENT_PAGEFAULT);
	ck_assert_uint_eq(ALIGN_DOWN(msg.arg.pagefault.address, PAGE_SIZE), (uintptr_t)page);
	return msg.arg.pagefault.flags & (UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_MINOR);
}

struct access {
	pthread_t thread;
	uint64_t *at;
	bool write;
	uint64_t value;
	_Atomic bool done;
};

static void *access_thread(void *arg)
{
	struct access *a = arg;

	if (a->write)
		WRITE_ONCE(*a->at, a->value);
	else
		a->value = READ_ONCE(*a->at);
	a->done = true;
	return NULL;
}

static void access_start(struct access *a, uint64_t *at, bool write, uint64_t value)
{
	*a = (struct access){.at = at, .write = write, .value = value};
	ck_assert_int_eq(pthread_create(&a->thread, NULL, access_thread, a), 0);
}

static uint64_t access_end(struct access *a)
{
	ck_assert_int_eq(pthread_join(a->thread, NULL), 0);
	ck_assert(a->done);
	return a->value;
}

START_TEST(uffd_contexts)
{
	struct leak before = leak_take();
	struct features f = probed(0, 0), few = probed(0, bit(KAGE_KVM_UFFD_WP) | bit(KAGE_KVM_UFFD_MINOR)),
			none = probed(0, bit(KAGE_KVM_USERFAULTFD));
	const uint64_t wp = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
	struct uffd u, other;
	struct uffd_msg msg;
	char *at = map(-1, 4, MAP_PRIVATE);

	ck_assert_int_eq(uffd_open(&u, &none, false), -EOPNOTSUPP);
	ck_assert_int_eq(u.fd, -1);
	uffd_close(&u);
	if (!skip(&f, bit(KAGE_KVM_USERFAULTFD))) {
		ck_assert_int_eq(uffd_open(&u, &few, false), 0);
		ck_assert_uint_eq(u.features & (wp | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_EVENT_UNMAP), 0);
		uffd_close(&u);
		ck_assert_int_eq(uffd_open(&u, &f, false), 0);
		check_cloexec(u.fd);
		ck_assert_int_eq((u.features & wp) == wp, feature_used(&f, KAGE_KVM_UFFD_WP));
		ck_assert_int_eq(uffd_open(&other, &f, true), 0);
		ck_assert_uint_ne(other.features & UFFD_FEATURE_EVENT_REMAP, 0);
		ck_assert_int_eq(uffd_register(&u, at, 4 * PAGE_SIZE, UFFDIO_REGISTER_MODE_MISSING), 0);
		ck_assert_int_eq(uffd_register(&other, at, PAGE_SIZE, UFFDIO_REGISTER_MODE_MISSING), -EBUSY);
		ck_assert_int_eq(uffd_read(&u, &msg, 1), 0);
		ck_assert_int_eq(uffd_unregister(&u, at, 4 * PAGE_SIZE), 0);
		ck_assert_int_eq(uffd_register(&other, at, PAGE_SIZE, UFFDIO_REGISTER_MODE_MISSING), 0);
		uffd_close(&other);
		uffd_close(&u);
		uffd_close(&u);
	}
	munmap(at, 4 * PAGE_SIZE);
	features_finish(&f);
	features_finish(&few);
	features_finish(&none);
	ck_assert_int_eq(leak_check(&before), 0);
}
END_TEST

/* Events for what others do, without CAP_SYS_PTRACE those that need none. */
START_TEST(uffd_events_unprivileged)
{
	struct kage_kvm_config config = config_of(KAGE_KVM_UFFD_FD, 0);
	struct features f;
	struct uffd u;

	if (skip_rights())
		return;
	config.uffd_fd = open("/dev/userfaultfd", O_RDWR);
	if (config.uffd_fd < 0) {
		printf("skipped: no /dev/userfaultfd\n");
		return;
	}
	ck_assert_int_eq(features_probe(&f, &env, &config, FEATURES_NO_VM), 0);
	ck_assert(feature_used(&f, KAGE_KVM_USERFAULTFD));
	ck_assert_int_eq(setresuid(NOBODY, NOBODY, NOBODY), 0);
	ck_assert_int_eq(uffd_open(&u, &f, true), 0);
	ck_assert_uint_eq(u.features & UFFD_FEATURE_EVENT_FORK, 0);
	ck_assert_uint_ne(u.features & UFFD_FEATURE_EVENT_UNMAP, 0);
	uffd_close(&u);
	features_finish(&f);
	close(config.uffd_fd);
}
END_TEST

struct range {
	char *at;
	size_t len;
	_Atomic bool done;
};

static void *unmap_thread(void *arg)
{
	struct range *r = arg;

	munmap(r->at, r->len);
	r->done = true;
	return NULL;
}

START_TEST(uffd_tells_of_unmap)
{
	struct features f = probed(0, 0);
	struct range r = {.at = map(-1, 8, MAP_PRIVATE), .len = 8 * PAGE_SIZE};
	struct uffd_msg msg;
	struct uffd u;
	pthread_t t;

	if (skip(&f, bit(KAGE_KVM_USERFAULTFD))) {
		features_finish(&f);
		return;
	}
	ck_assert_int_eq(uffd_open(&u, &f, true), 0);
	ck_assert_int_eq(uffd_register(&u, r.at, r.len, UFFDIO_REGISTER_MODE_MISSING), 0);
	ck_assert_int_eq(pthread_create(&t, NULL, unmap_thread, &r), 0);
	ck_assert_uint_eq(next_event(&u, &msg), UFFD_EVENT_UNMAP);
	ck_assert_uint_eq(msg.arg.remove.start, (uintptr_t)r.at);
	ck_assert_uint_eq(msg.arg.remove.end, (uintptr_t)r.at + r.len);
	pthread_join(t, NULL);
	uffd_close(&u);
	features_finish(&f);
}
END_TEST

/* Kinds of pages that can be protected: mapping, and what the page was before. */
static const struct {
	int flags;
	bool cached;
	enum deed before;
} kinds[] = {
    {MAP_SHARED, false, NOTHING}, {MAP_SHARED, true, NOTHING},	{MAP_SHARED, true, READ},
    {MAP_SHARED, true, WRITE},	  {MAP_PRIVATE, false, NOTHING}, {MAP_PRIVATE, true, NOTHING},
    {MAP_PRIVATE, true, READ},	  {MAP_PRIVATE, true, WRITE},
};

/* A write to a protected page waits until it is unprotected. */
START_TEST(wp_blocks)
{
	struct features f = probed(0, 0);
	int fd = file_of(3);
	char *at = map(fd, 3, kinds[_i].flags), *page = at + PAGE_SIZE;
	struct access a;
	struct uffd u;
	uint64_t old;

	if (skip(&f, bit(KAGE_KVM_UFFD_WP))) {
		features_finish(&f);
		return;
	}
	if (kinds[_i].cached)
		file_word(fd, 1, 0x1111);
	do_deed(page, kinds[_i].before);
	ck_assert_int_eq(uffd_open(&u, &f, false), 0);
	ck_assert_int_eq(uffd_register(&u, at, 3 * PAGE_SIZE, UFFDIO_REGISTER_MODE_WP), 0);
	ck_assert_int_eq(uffd_protect(&u, page, PAGE_SIZE), 0);
	*word(at, 2) = 5; /* the neighbour is free */
	access_start(&a, (uint64_t *)page, true, 0x2222);
	ck_assert_uint_eq(next_fault(&u, page), UFFD_PAGEFAULT_FLAG_WP);
	ck_assert(!a.done);
	old = READ_ONCE(*(uint64_t *)page); /* reads are free too */
	ck_assert_uint_eq(old & ~(uint64_t)0xff, kinds[_i].cached ? 0x1100 : 0);
	ck_assert(!a.done);
	ck_assert_int_eq(uffd_unprotect(&u, page, PAGE_SIZE), 0);
	access_end(&a);
	ck_assert_uint_eq(*(uint64_t *)page, 0x2222);
	ck_assert_uint_eq(read_word(fd, 1), kinds[_i].flags == MAP_SHARED ? 0x2222 : kinds[_i].cached ? 0x1111 : 0);
	uffd_close(&u);
	munmap(at, 3 * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

/* ... or until its mapping has been replaced and it was woken; then it lands in the new one. */
START_TEST(wp_blocks_until_replaced)
{
	struct features f = probed(0, 0);
	int fd = file_of(8);
	char *at = map(fd, 3, kinds[_i].flags), *page = at + PAGE_SIZE;
	struct access a;
	struct uffd u;

	if (skip(&f, bit(KAGE_KVM_UFFD_WP))) {
		features_finish(&f);
		return;
	}
	if (kinds[_i].cached)
		file_word(fd, 1, 0x1111);
	file_word(fd, 6, 0x6666);
	do_deed(page, kinds[_i].before);
	ck_assert_int_eq(uffd_open(&u, &f, false), 0);
	ck_assert_int_eq(uffd_register(&u, at, 3 * PAGE_SIZE, UFFDIO_REGISTER_MODE_WP), 0);
	ck_assert_int_eq(uffd_protect(&u, page, PAGE_SIZE), 0);
	access_start(&a, (uint64_t *)page + 1, true, 0x2222);
	ck_assert_uint_eq(next_fault(&u, page), UFFD_PAGEFAULT_FLAG_WP);
	ck_assert_ptr_eq(
	    mmap(page, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 6 * (off_t)PAGE_SIZE), page);
	ck_assert(!a.done);
	ck_assert_int_eq(uffd_wake(&u, page, PAGE_SIZE), 0); /* not registered any more: it works all the same */
	access_end(&a);
	ck_assert_uint_eq(word(at, 1)[0], 0x6666);
	ck_assert_uint_eq(word(at, 1)[1], 0x2222);
	ck_assert_uint_eq(read_word(fd, 6), 0x6666);
	if (kinds[_i].cached && (kinds[_i].flags == MAP_PRIVATE || kinds[_i].before != WRITE))
		ck_assert_uint_eq(read_word(fd, 1), 0x1111);
	uffd_close(&u);
	munmap(at, 3 * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

/* -- no write is lost -------------------------------------------------------- */

#define MOVES 2000
#define COUNTERS 8

struct counting {
	char *page;
	_Atomic bool stop;
	_Atomic uint64_t written; /* of each counter */
};

/*
 * TSan takes the mover's mmap(2) for a write to the page; what orders the two is the
 * kernel. Not atomic: clang's TSan looks at atomics even here.
 */
__attribute__((no_sanitize_thread)) static void *count_up(void *arg)
{
	struct counting *c = arg;

	while (!c->stop) {
		for (int i = 0; i < COUNTERS; i++)
			++*(volatile uint64_t *)&word(c->page, 0)[i * 64];
		c->written++;
	}
	return NULL;
}

static void copy_page(char *to, char *from)
{
	for (size_t i = 0; i < PAGE_SIZE / 8; i++)
		WRITE_ONCE(word(to, 0)[i], READ_ONCE(word(from, 0)[i]));
}

/*
 * Writer                            Mover
 * writes                            protect
 * writes: traps, waits              copy to the other page of the file
 *                                   MAP_FIXED of that, register, wake
 * goes on in the new mapping
 *
 * In every second move the mover lets the writer run between copy and MAP_FIXED, until it
 * is trapped or has written all counters twice: what protection does not stop is lost.
 */
static bool let_write(const struct uffd *u, struct counting *c)
{
	struct pollfd p = {.fd = u->fd, .events = POLLIN};
	uint64_t before = c->written;

	while (c->written < before + 2)
		if (poll(&p, 1, 0) == 1)
			return true;
	return false;
}

/* Was the writer trapped? */
static bool move_page(const struct uffd *u, int fd, char *window, struct counting *c, unsigned n, int flags)
{
	unsigned target = n % 2;
	struct uffd_msg msg[8];
	char *page = c->page;
	bool trapped = false;

	ck_assert_int_eq(uffd_protect(u, page, PAGE_SIZE), 0);
	copy_page(window + target * PAGE_SIZE, page);
	if (n % 4 < 2)
		trapped = let_write(u, c);
	ck_assert_ptr_eq(mmap(page, PAGE_SIZE, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd,
			      (off_t)(target * PAGE_SIZE)),
			 page);
	ck_assert_int_eq(uffd_register(u, page, PAGE_SIZE, UFFDIO_REGISTER_MODE_WP), 0);
	while (uffd_read(u, msg, 8) > 0)
		trapped = true;
	ck_assert_int_eq(uffd_wake(u, page, PAGE_SIZE), 0);
	return trapped;
}

/*
 * MAP_SHARED pages, and MAP_PRIVATE ones: those are private at the time of the
 * move, for the writer has written. MAP_FIXED then throws the private page away: after the copy nobody misses it.
 */
START_TEST(no_lost_write)
{
	const int flags = _i == 0 ? MAP_SHARED : MAP_PRIVATE;
	struct features f = probed(0, 0);
	struct counting c = {0};
	unsigned traps = 0, moves = times(MOVES, MOVES / 20);
	int fd = file_of(2);
	char *window = map(fd, 2, MAP_SHARED), *at = map(fd, 3, flags);
	struct uffd u;
	pthread_t t;

	if (skip(&f, bit(KAGE_KVM_UFFD_WP))) {
		features_finish(&f);
		return;
	}
	c.page = at + PAGE_SIZE;
	ck_assert_int_eq(uffd_open(&u, &f, false), 0);
	ck_assert_int_eq(uffd_register(&u, at, 3 * PAGE_SIZE, UFFDIO_REGISTER_MODE_WP), 0);
	ck_assert_int_eq(pthread_create(&t, NULL, count_up, &c), 0);
	for (unsigned n = 0; n < moves; n++)
		traps += move_page(&u, fd, window, &c, n, flags);
	c.stop = true;
	pthread_join(t, NULL);
	for (int i = 0; i < COUNTERS; i++)
		ck_assert_uint_eq(word(c.page, 0)[i * 64], c.written);
	ck_assert_uint_ge(traps, moves / 2);
	uffd_close(&u);
	munmap(at, 3 * PAGE_SIZE);
	munmap(window, 2 * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

/* -- exact: traps on MAP_PRIVATE pages of a memfd ----------------------------- */

#define EXACT_PAGES 64
#define EXACT (bit(KAGE_KVM_UFFD_WP) | bit(KAGE_KVM_UFFD_MINOR) | bit(KAGE_KVM_UFFD_CONTINUE_WP))

static const char zeroes[4096] __attribute__((aligned(4096)));

/* A fault of page i that is not there. How holes are filled alternates: a page of the file, or an anonymous one. */
static void fill_page(const struct uffd *u, int fd, char *at, size_t i, bool cached)
{
	char *page = at + i * PAGE_SIZE;
	uint64_t kind = next_fault(u, page);

	ck_assert_uint_eq(kind, cached ? UFFD_PAGEFAULT_FLAG_MINOR : 0);
	if (!cached && i % 4 < 2) {
		ck_assert_int_eq(uffd_continue(u, page, PAGE_SIZE, true), -EFAULT);
		ck_assert_int_eq(uffd_copy(u, page, zeroes, PAGE_SIZE, true), PAGE_SIZE);
		return;
	}
	if (!cached)
		ck_assert_int_eq(fallocate(fd, 0, (off_t)(i * PAGE_SIZE), PAGE_SIZE), 0);
	ck_assert_int_eq(uffd_continue(u, page, PAGE_SIZE, true), PAGE_SIZE);
}

static void write_page(const struct uffd *u, int fd, char *at, size_t i, bool cached, bool fresh)
{
	struct access a;

	access_start(&a, word(at, i), true, 1000 + i);
	if (fresh)
		fill_page(u, fd, at, i, cached);
	ck_assert_uint_eq(next_fault(u, at + i * PAGE_SIZE), UFFD_PAGEFAULT_FLAG_WP);
	ck_assert(!a.done);
	ck_assert_int_eq(uffd_unprotect(u, at + i * PAGE_SIZE, PAGE_SIZE), 0);
	access_end(&a);
	ck_assert_uint_eq(*word(at, i), 1000 + i);
}

/* Pages 3k: read, then written. 3k + 1: written at once. 3k + 2: protected before anything. Half of the file is holes. */
START_TEST(exact_traps)
{
	struct features f = probed(0, 0);
	int fd = file_of(EXACT_PAGES);
	char *at = map(fd, EXACT_PAGES, MAP_PRIVATE);
	struct access a;
	struct uffd u;
	struct uffd_msg msg;

	if (skip(&f, EXACT)) {
		features_finish(&f);
		return;
	}
	for (size_t i = 0; i < EXACT_PAGES; i += 2)
		file_word(fd, i, 100 + i);
	ck_assert_int_eq(uffd_open(&u, &f, false), 0);
	ck_assert_int_eq(uffd_register(&u, at, EXACT_PAGES * PAGE_SIZE,
				       UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR |
					   UFFDIO_REGISTER_MODE_WP),
			 0);
	for (size_t i = 0; i < EXACT_PAGES; i++) {
		bool cached = i % 2 == 0;

		if (i % 3 == 2)
			ck_assert_int_eq(uffd_protect(&u, at + i * PAGE_SIZE, PAGE_SIZE), 0);
		if (i % 3 == 0) {
			access_start(&a, word(at, i), false, 0);
			fill_page(&u, fd, at, i, cached);
			ck_assert_uint_eq(access_end(&a), cached ? 100 + i : 0);
		}
		write_page(&u, fd, at, i, cached, i % 3 != 0);
		ck_assert_int_eq(uffd_read(&u, &msg, 1), 0);
	}
	for (size_t i = 0; i < EXACT_PAGES; i++)
		ck_assert_uint_eq(read_word(fd, i), i % 2 ? 0 : 100 + i);
	uffd_close(&u);
	munmap(at, EXACT_PAGES * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

/* One answer continues a run; pages that are there count, a hole ends it. */
START_TEST(exact_runs)
{
	struct features f = probed(0, 0);
	int fd = file_of(32);
	char *at = map(fd, 32, MAP_PRIVATE);
	struct uffd u;

	if (skip(&f, EXACT)) {
		features_finish(&f);
		return;
	}
	for (size_t i = 0; i < 20; i++)
		file_word(fd, i, 100 + i);
	ck_assert_int_eq(uffd_open(&u, &f, false), 0);
	ck_assert_int_eq(uffd_register(&u, at, 32 * PAGE_SIZE,
				       UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR |
					   UFFDIO_REGISTER_MODE_WP),
			 0);
	ck_assert_int_eq(uffd_continue(&u, at + 3 * PAGE_SIZE, PAGE_SIZE, true), PAGE_SIZE);
	ck_assert_int_eq(uffd_continue(&u, at + 7 * PAGE_SIZE, 2 * PAGE_SIZE, true), 2 * PAGE_SIZE);
	ck_assert_int_eq(uffd_continue(&u, at, 16 * PAGE_SIZE, true), 16 * PAGE_SIZE);
	ck_assert_int_eq(uffd_continue(&u, at + 16 * PAGE_SIZE, 16 * PAGE_SIZE, true), 4 * PAGE_SIZE);
	ck_assert_int_eq(uffd_continue(&u, at + 20 * PAGE_SIZE, PAGE_SIZE, true), -EFAULT);
	for (size_t i = 0; i < 20; i++) { /* no trap, or this would hang */
		ck_assert_uint_eq(*word(at, i), 100 + i);
		write_page(&u, fd, at, i, true, false);
	}
	/* Zeroes go where nothing is, but not over a page or a marker. */
	ck_assert_int_eq(uffd_protect(&u, at + 24 * PAGE_SIZE, PAGE_SIZE), 0);
	ck_assert_int_eq(uffd_zeropage(&u, at + 20 * PAGE_SIZE, 8 * PAGE_SIZE), 4 * PAGE_SIZE);
	ck_assert_int_eq(uffd_zeropage(&u, at + 24 * PAGE_SIZE, PAGE_SIZE), -EEXIST);
	ck_assert_int_eq(uffd_zeropage(&u, at + 20 * PAGE_SIZE, PAGE_SIZE), -EEXIST);
	ck_assert_int_eq(uffd_copy(&u, at + 23 * PAGE_SIZE, zeroes, PAGE_SIZE, true), PAGE_SIZE);
	ck_assert_int_eq(uffd_copy(&u, at + 24 * PAGE_SIZE, zeroes, PAGE_SIZE, true), PAGE_SIZE);
	ck_assert_uint_eq(*word(at, 22), 0);
	ck_assert_uint_eq(*word(at, 24), 0);
	ck_assert_int_eq(lseek(fd, 20 * (off_t)PAGE_SIZE, SEEK_DATA), -1); /* nothing of it is in the file */
	uffd_close(&u);
	munmap(at, 32 * PAGE_SIZE);
	close(fd);
	features_finish(&f);
}
END_TEST

static TCase *features_case(void)
{
	TCase *tc = tcase_create("features");

	tcase_add_test(tc, features_all);
	tcase_add_test(tc, features_masked);
	tcase_add_test(tc, features_no_open);
	tcase_add_test(tc, features_jailed);
	tcase_add_test(tc, features_handed_in);
	tcase_add_test(tc, features_wrong_fds);
	tcase_add_test(tc, features_vm);
	return tc;
}

static TCase *scan_case(void)
{
	const int n = ARRAY_SIZE(methods);
	TCase *tc = tcase_create("scan");

	tcase_add_loop_test(tc, scan_private_exact, 0, n);
	tcase_add_loop_test(tc, scan_private_unprivileged, 0, n);
	tcase_add_loop_test(tc, scan_zero_page, 0, n);
	tcase_add_loop_test(tc, scan_swapped, 0, n);
	tcase_add_loop_test(tc, scan_sparse, 0, n);
	tcase_add_loop_test(tc, scan_stops, 0, n);
	tcase_add_loop_test(tc, scan_markers, 0, n);
	tcase_add_test(tc, maps_are_read);
	tcase_add_test(tc, rss_of_anonymous);
	return tc;
}

static TCase *uffd_case(void)
{
	TCase *tc = tcase_create("uffd");

	tcase_add_test(tc, uffd_contexts);
	tcase_add_test(tc, uffd_events_unprivileged);
	tcase_add_test(tc, uffd_tells_of_unmap);
	tcase_add_loop_test(tc, wp_blocks, 0, ARRAY_SIZE(kinds));
	tcase_add_loop_test(tc, wp_blocks_until_replaced, 0, ARRAY_SIZE(kinds));
	tcase_add_loop_test(tc, no_lost_write, 0, 2);
	tcase_add_test(tc, exact_traps);
	tcase_add_test(tc, exact_runs);
	return tc;
}

int main(void)
{
	TCase *cases[] = {features_case(), scan_case(), uffd_case()};
	Suite *s = suite_create("kvm-host");
	SRunner *sr;
	int failed;

	env_init(&env, NULL);
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		tcase_set_timeout(cases[i], 240);
		suite_add_tcase(s, cases[i]);
	}
	sr = srunner_create(s);
	forks = srunner_fork_status(sr) == CK_FORK;
	setvbuf(stdout, NULL, _IOLBF, 0);
	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	env_finish(&env);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
