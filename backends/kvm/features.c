/* SPDX-License-Identifier: MIT */
/*
 * Finding out what there is.
 *
 * Each feature is tried on four pages (the host's) of a memfd, mapped MAP_PRIVATE as guests'
 * shared frames are: page 0 is never touched, page 1 is written through the
 * mapping, page 2 is in the file and read, page 3 is only a source and target for
 * system calls.
 *
 * Whether userfaultfd traps an access is seen without a second thread: with
 * UFFD_FEATURE_SIGBUS a fault is refused in place of waiting, and a refused access of
 * the kernel is no signal but -EFAULT from the system call that made it.
 *
 * Invariants:
 *  1. a path is opened only in features_probe() and never with KAGE_KVM_NO_OPEN.
 *  2. a feature that is used has passed its probe, and so have those that it needs.
 *
 * Locks: none; who probes owns the structure.
 */
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "compat.h"
#include "features.h"
#include "frame/pool.h"
#include "scan.h"
#include "uffd.h"

#define SCRATCH_PAGES 4

struct scratch {
	int fd;
	char *map;
};

static const char in_use[] = "in use";
static const char masked[] = "masked by feature_mask";
static const char no_path[] = "it was not handed in, and KAGE_KVM_NO_OPEN forbids opening it";
static const char no_pagemap[] = "/proc/self/pagemap cannot be opened: no /proc, or no permission";
static const char bad_pagemap[] =
    "it does not show this process's pages: no pagemap, or that of another process";
static const char needs_pagemap[] = "needs /proc/self/pagemap";
static const char old_scan[] = "the kernel is too old: PAGEMAP_SCAN came with Linux 6.7";
static const char no_uffd[] = "the kernel has no userfaultfd";
static const char forbidden_uffd[] =
    "no permission: CAP_SYS_PTRACE, vm.unprivileged_userfaultfd or /dev/userfaultfd";
static const char bad_uffd_fd[] = "uffd_fd is no /dev/userfaultfd";
static const char needs_uffd[] = "needs a userfaultfd";
static const char old_wp[] =
    "the kernel is too old or its architecture has none: write protection of shmem came with Linux 5.19";
static const char old_minor[] = "the kernel is too old: minor faults of shmem came with Linux 5.14";
static const char old_continue[] = "the kernel is too old: UFFDIO_CONTINUE_MODE_WP came with Linux 6.4";
static const char needs_both[] = "needs write protection and minor faults";
static const char no_trap[] = "the kernel offers it, but it does not work";
static const char no_vm[] = "there is no KVM VM";
static const char no_log[] = "KVM has no memory slots with a dirty log";
static const char no_ring[] = "KVM has no dirty rings, or smaller ones than dirty_ring_bytes says";
#if defined(__aarch64__)
static const char no_ring_arm64[] = "not used on arm64: what KVM itself writes is in a bitmap, in no ring";
#endif
static const char no_ring_wanted[] = "not needed: dirty_ring_bytes is 0";
static const char no_readonly[] = "KVM has no read-only slots";
static const char no_memory_fault[] = "the kernel is too old: KVM_EXIT_MEMORY_FAULT came with Linux 6.8";

static bool may_use(const struct features *f, enum kage_kvm_feature n)
{
	return !(f->mask & 1u << n);
}

static void set_used(struct features *f, enum kage_kvm_feature n)
{
	f->info[n] = (struct kage_kvm_feature_info){.used = 1, .why = in_use};
}

static void set_missing(struct features *f, enum kage_kvm_feature n, int err, const char *why)
{
	if (may_use(f, n))
		f->info[n] = (struct kage_kvm_feature_info){.error = err < 0 ? -err : err, .why = why};
}

/* -- descriptors ------------------------------------------------------------- */

static int dup_fd(int fd)
{
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);

	return copy < 0 ? -errno : copy;
}

static int open_fd(const struct kage_kvm_config *config, const char *path, int flags)
{
	int fd;

	if (config->flags & KAGE_KVM_NO_OPEN)
		return -ENOENT;
	fd = open(path, flags | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

/* Duplicates what was handed in; *to stays -1 if it was not. */
static int take_fd(const struct kage_kvm_config *config, uint32_t flag, int fd, int *to)
{
	if (!(config->flags & flag))
		return 0;
	*to = dup_fd(fd);
	return MIN(*to, 0);
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static char *page_of(const struct scratch *s, unsigned n)
{
	return s->map + n * host_page_size();
}

static int scratch_init(struct scratch *s)
{
	size_t len = SCRATCH_PAGES * host_page_size();
	int err;

	s->fd = memfd_create("kage-probe", MFD_CLOEXEC);
	if (s->fd < 0)
		return -errno;
	s->map = MAP_FAILED;
	if (ftruncate(s->fd, (off_t)len) == 0 && pwrite(s->fd, "", 1, 2 * (off_t)host_page_size()) == 1)
		s->map = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE, s->fd, 0);
	if (s->map == MAP_FAILED) {
		err = -errno;
		close(s->fd);
		return err;
	}
	WRITE_ONCE(*page_of(s, 1), 1);
	(void)READ_ONCE(*page_of(s, 2));
	return 0;
}

static void scratch_finish(struct scratch *s)
{
	munmap(s->map, SCRATCH_PAGES * host_page_size());
	close(s->fd);
}

/* -- pagemap ----------------------------------------------------------------- */

struct seen {
	char *from, *to;
	unsigned runs;
};

static int see_run(void *arg, char *from, char *to)
{
	struct seen *seen = arg;

	*seen = (struct seen){from, to, seen->runs + 1};
	return 0;
}

/* Private: page 1 and no other. Present: pages 1 and 2. */
static int scan_works(const struct features *f, const struct scratch *s)
{
	struct seen private = {0}, present = {0};
	int err;

	err = scan_private(f, s->map, SCRATCH_PAGES * host_page_size(), see_run, &private);
	if (!err)
		err = scan_present(f, s->map, SCRATCH_PAGES * host_page_size(), see_run, &present);
	if (err)
		return err;
	return private.runs == 1 && private.from == page_of(s, 1) && private.to == page_of(s, 2) &&
		       present.runs == 1 && present.from == page_of(s, 1) && present.to == page_of(s, 3)
		   ? 0
		   : -ENODATA;
}

static void probe_zero_frame(struct features *f)
{
	char *page = mmap(NULL, host_page_size(), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		return;
	(void)READ_ONCE(*page);
	f->zero_frame = scan_frame(f, page);
	munmap(page, host_page_size());
}

static void probe_pagemap(struct features *f, const struct kage_kvm_config *config, const struct scratch *s)
{
	int err;

	set_missing(f, KAGE_KVM_PAGEMAP_SCAN, ENOENT, needs_pagemap);
	if (!may_use(f, KAGE_KVM_PAGEMAP))
		return;
	if (f->pagemap < 0) {
		set_missing(f, KAGE_KVM_PAGEMAP, f->pagemap,
			    config->flags & KAGE_KVM_NO_OPEN ? no_path : no_pagemap);
		return;
	}
	set_used(f, KAGE_KVM_PAGEMAP);
	err = scan_works(f, s);
	if (err) {
		set_missing(f, KAGE_KVM_PAGEMAP, err, bad_pagemap);
		return;
	}
	probe_zero_frame(f);
	if (!may_use(f, KAGE_KVM_PAGEMAP_SCAN))
		return;
	set_used(f, KAGE_KVM_PAGEMAP_SCAN);
	err = scan_works(f, s);
	if (err)
		set_missing(f, KAGE_KVM_PAGEMAP_SCAN, err, err == -ENODATA ? no_trap : old_scan);
}

/* -- userfaultfd ------------------------------------------------------------- */

static int uffd_from_dev(int dev)
{
	int fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);

	return fd < 0 ? -errno : fd;
}

int features_uffd_new(const struct features *f)
{
	int fd;

	if (f->uffd_dev >= 0)
		return uffd_from_dev(f->uffd_dev);
	/* Without UFFD_USER_MODE_ONLY: KVM's and system calls' accesses are the kernel's faults. */
	fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	return fd < 0 ? -errno : fd;
}

/* Finds the source of userfaultfds and makes the first. */
static int first_uffd(struct features *f, const struct kage_kvm_config *config, const char **why)
{
	int fd = features_uffd_new(f);

	if (fd >= 0)
		return fd;
	*why = f->uffd_dev >= 0 ? bad_uffd_fd : fd == -ENOSYS ? no_uffd : forbidden_uffd;
	if (f->uffd_dev >= 0 || fd == -ENOSYS)
		return fd;
	f->uffd_dev = open_fd(config, "/dev/userfaultfd", O_RDWR);
	if (f->uffd_dev < 0) {
		f->uffd_dev = -1;
		return fd;
	}
	return uffd_from_dev(f->uffd_dev);
}

static int probe_uffd(struct features *f, const struct kage_kvm_config *config)
{
	const char *why = NULL;
	int fd = first_uffd(f, config, &why), err = fd;

	if (fd >= 0) {
		err = uffd_handshake(fd, 0, &f->uffd_features);
		close(fd);
		why = no_uffd;
	}
	if (err < 0) {
		set_missing(f, KAGE_KVM_USERFAULTFD, err, why);
		return err;
	}
	set_used(f, KAGE_KVM_USERFAULTFD);
	return 0;
}

/* Does the kernel refuse to write to, or to read the page? */
static bool write_traps(const struct scratch *s, char *page)
{
	return pread(s->fd, page, 8, 3 * (off_t)host_page_size()) < 0 && errno == EFAULT;
}

static bool read_traps(const struct scratch *s, const char *page)
{
	return pwrite(s->fd, page, 8, 3 * (off_t)host_page_size()) < 0 && errno == EFAULT;
}

static bool wp_works(struct features *f, const struct uffd *u, const struct scratch *s)
{
	if (uffd_register(u, s->map, 2 * host_page_size(), UFFDIO_REGISTER_MODE_WP) ||
	    uffd_protect(u, s->map, 2 * host_page_size()))
		return false;
	if (feature_used(f, KAGE_KVM_PAGEMAP))
		f->marker_frame = scan_frame(f, page_of(s, 0));
	return write_traps(s, page_of(s, 0)) && write_traps(s, page_of(s, 1)) &&
	       !read_traps(s, page_of(s, 1)) && !uffd_unprotect(u, s->map, 2 * host_page_size()) &&
	       !write_traps(s, page_of(s, 1)) && !uffd_unregister(u, s->map, 2 * host_page_size());
}

/* Page 2 is in the file, so a fault on it is minor. */
static bool minor_works(const struct uffd *u, const struct scratch *s)
{
	char *page = page_of(s, 2);

	return !madvise(page, host_page_size(), MADV_DONTNEED) &&
	       !uffd_register(u, page, host_page_size(), UFFDIO_REGISTER_MODE_MINOR) && read_traps(s, page) &&
	       write_traps(s, page) && uffd_continue(u, page, host_page_size(), false) == (int64_t)host_page_size() &&
	       !read_traps(s, page) && !uffd_unregister(u, page, host_page_size());
}

static bool continue_wp_works(const struct uffd *u, const struct scratch *s)
{
	char *page = page_of(s, 2);

	return !madvise(page, host_page_size(), MADV_DONTNEED) &&
	       !uffd_register(u, page, host_page_size(), UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP) &&
	       uffd_continue(u, page, host_page_size(), true) == (int64_t)host_page_size() && !read_traps(s, page) &&
	       write_traps(s, page) && !uffd_unprotect(u, page, host_page_size()) && !write_traps(s, page) &&
	       !uffd_unregister(u, page, host_page_size());
}

static void probe_traps(struct features *f, const struct uffd *u, const struct scratch *s)
{
	const uint64_t wp = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;

	if ((f->uffd_features & wp) != wp)
		set_missing(f, KAGE_KVM_UFFD_WP, EINVAL, old_wp);
	else if (may_use(f, KAGE_KVM_UFFD_WP) && wp_works(f, u, s))
		set_used(f, KAGE_KVM_UFFD_WP);
	if (!(f->uffd_features & UFFD_FEATURE_MINOR_SHMEM))
		set_missing(f, KAGE_KVM_UFFD_MINOR, EINVAL, old_minor);
	else if (may_use(f, KAGE_KVM_UFFD_MINOR) && minor_works(u, s))
		set_used(f, KAGE_KVM_UFFD_MINOR);
	if (!feature_used(f, KAGE_KVM_UFFD_WP) || !feature_used(f, KAGE_KVM_UFFD_MINOR))
		set_missing(f, KAGE_KVM_UFFD_CONTINUE_WP, EOPNOTSUPP, needs_both);
	else if (may_use(f, KAGE_KVM_UFFD_CONTINUE_WP) && continue_wp_works(u, s))
		set_used(f, KAGE_KVM_UFFD_CONTINUE_WP);
	else
		set_missing(f, KAGE_KVM_UFFD_CONTINUE_WP, EINVAL, old_continue);
}

static void probe_uffd_kinds(struct features *f, const struct scratch *s)
{
	const uint64_t ask = UFFD_FEATURE_SIGBUS | UFFD_FEATURE_PAGEFAULT_FLAG_WP |
			     UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_MINOR_SHMEM;
	const char *why = feature_used(f, KAGE_KVM_USERFAULTFD) ? no_trap : needs_uffd;
	struct uffd u = {.fd = -1};

	for (int n = KAGE_KVM_UFFD_WP; n <= KAGE_KVM_UFFD_CONTINUE_WP; n++)
		set_missing(f, n, EOPNOTSUPP, why);
	if (!feature_used(f, KAGE_KVM_USERFAULTFD))
		return;
	u.fd = features_uffd_new(f);
	if (u.fd >= 0 && uffd_handshake(u.fd, ask & f->uffd_features, NULL) == 0)
		probe_traps(f, &u, s);
	close_fd(&u.fd);
}

/* -- KVM --------------------------------------------------------------------- */

static int extension(int vmfd, int cap)
{
	int v = ioctl(vmfd, KVM_CHECK_EXTENSION, cap);

	return MAX(v, 0);
}

/* /dev/kvm answers KVM_CHECK_EXTENSION as well, but a VM has no API version. */
static bool is_vm(int vmfd)
{
	return ioctl(vmfd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) > 0 &&
	       ioctl(vmfd, KVM_GET_API_VERSION, 0) < 0;
}

static void probe_one(struct features *f, enum kage_kvm_feature n, bool have, const char *why)
{
	if (!have)
		set_missing(f, n, EOPNOTSUPP, why);
	else if (may_use(f, n))
		set_used(f, n);
}

static void probe_ring(struct features *f, const struct kage_kvm_config *config, int vmfd)
{
	uint32_t strong = (uint32_t)extension(vmfd, KVM_CAP_DIRTY_LOG_RING);
	uint32_t weak = (uint32_t)extension(vmfd, KVM_CAP_DIRTY_LOG_RING_ACQ_REL);

	if (!config->dirty_ring_bytes) {
		set_missing(f, KAGE_KVM_DIRTY_RING, 0, no_ring_wanted);
		return;
	}
#if defined(__aarch64__) /* api.rst, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: interrupt tables, written without a vCPU */
	set_missing(f, KAGE_KVM_DIRTY_RING, EOPNOTSUPP, no_ring_arm64);
	return;
#endif
	probe_one(f, KAGE_KVM_DIRTY_RING, config->dirty_ring_bytes <= MAX(strong, weak), no_ring);
	f->dirty_ring_bytes = feature_used(f, KAGE_KVM_DIRTY_RING) ? config->dirty_ring_bytes : 0;
	f->ring_acq_rel = weak != 0;
}

static void probe_kvm(struct features *f, const struct kage_kvm_config *config, int vmfd)
{
	if (vmfd == FEATURES_NO_VM) {
		for (int n = KAGE_KVM_DIRTY_LOG; n < KAGE_KVM_FEATURES; n++)
			set_missing(f, n, ENODEV, no_vm);
		return;
	}
	f->slots = (uint32_t)extension(vmfd, KVM_CAP_NR_MEMSLOTS);
	f->dirty_manual = (uint32_t)extension(vmfd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	probe_one(f, KAGE_KVM_DIRTY_LOG, extension(vmfd, KVM_CAP_USER_MEMORY) > 0, no_log);
	probe_ring(f, config, vmfd);
	probe_one(f, KAGE_KVM_READONLY_SLOT, extension(vmfd, KVM_CAP_READONLY_MEM) > 0, no_readonly);
	probe_one(f, KAGE_KVM_MEMORY_FAULT, extension(vmfd, KVM_CAP_MEMORY_FAULT_INFO) > 0, no_memory_fault);
}

/* -- all of it --------------------------------------------------------------- */

/*
 * All duplicates before the first open: a stale number of the embedder's must
 * fail, not name what was opened a moment ago.
 */
static int take_fds(struct features *f, const struct kage_kvm_config *config)
{
	int err = take_fd(config, KAGE_KVM_MAPS_FD, config->maps_fd, &f->maps);

	if (!err && may_use(f, KAGE_KVM_PAGEMAP))
		err = take_fd(config, KAGE_KVM_PAGEMAP_FD, config->pagemap_fd, &f->pagemap);
	if (!err && may_use(f, KAGE_KVM_USERFAULTFD))
		err = take_fd(config, KAGE_KVM_UFFD_FD, config->uffd_fd, &f->uffd_dev);
	if (err)
		return err;
	if (!(config->flags & KAGE_KVM_MAPS_FD))
		f->maps = open_fd(config, "/proc/self/maps", O_RDONLY);
	if (!(config->flags & KAGE_KVM_PAGEMAP_FD) && may_use(f, KAGE_KVM_PAGEMAP))
		f->pagemap = open_fd(config, "/proc/self/pagemap", O_RDONLY);
	f->statm = open_fd(config, "/proc/self/statm", O_RDONLY);
	return 0;
}

static void forget_errors(struct features *f)
{
	f->pagemap = MAX(f->pagemap, -1);
	f->maps = MAX(f->maps, -1);
	f->statm = MAX(f->statm, -1);
	f->uffd_dev = MAX(f->uffd_dev, -1);
}

static void drop_unused(struct features *f)
{
	if (!feature_used(f, KAGE_KVM_PAGEMAP))
		close_fd(&f->pagemap);
	if (!feature_used(f, KAGE_KVM_USERFAULTFD))
		close_fd(&f->uffd_dev);
}

int features_probe(struct features *f, struct env *env, const struct kage_kvm_config *config, int vmfd)
{
	struct scratch s;
	int err;

	*f = (struct features){
	    .env = env, .mask = config->feature_mask, .pagemap = -1, .maps = -1, .statm = -1, .uffd_dev = -1};
	if (vmfd != FEATURES_NO_VM && !is_vm(vmfd))
		return -EINVAL;
	for (int n = 0; n < KAGE_KVM_FEATURES; n++)
		f->info[n].why = masked;
	err = take_fds(f, config);
	if (!err)
		err = scratch_init(&s);
	if (err) {
		features_finish(f);
		return err;
	}
	probe_pagemap(f, config, &s);
	if (may_use(f, KAGE_KVM_USERFAULTFD))
		probe_uffd(f, config);
	probe_uffd_kinds(f, &s);
	probe_kvm(f, config, vmfd);
	scratch_finish(&s);
	forget_errors(f);
	drop_unused(f);
	return 0;
}

void features_finish(struct features *f)
{
	close_fd(&f->pagemap);
	close_fd(&f->maps);
	close_fd(&f->statm);
	close_fd(&f->uffd_dev);
}
