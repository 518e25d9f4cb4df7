/* SPDX-License-Identifier: MIT */
/*
 * How Linux tells which pages of a process were written: userfaultfd(2) with write
 * protection that resolves itself (UFFD_FEATURE_WP_ASYNC) and PAGEMAP_SCAN
 * (Documentation/admin-guide/mm/pagemap.rst, since 6.7), or write protection that
 * a thread of the process resolves. Newer than some headers: constants are here.
 *
 * Memory is 128 MiB of a memfd mapped over and over, so that 16 GiB have all their
 * page table entries without being that much memory: both work on entries alone.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "scan.h"

#define PIECE		   (128 * MIB)
#define FEATURE_WP_SHMEM   ((uint64_t)1 << 12)
#define FEATURE_WP_ASYNC   ((uint64_t)1 << 15)
#define SCAN_WP_MATCHING   1
#define SCAN_CHECK_WPASYNC 2
#define IS_WRITTEN	   2
#define POPULATE_READ	   22

struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg)

struct scan_region {
	uint64_t start, end, categories;
};

static void map_all(struct scan *s)
{
	uint64_t piece = s->bytes < PIECE ? s->bytes : PIECE;
	char *room = must_map(
	    mmap(NULL, s->bytes + PIECE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
	    "mmap");

	s->room = room;
	s->p = (char *)(((uintptr_t)room + PIECE - 1) & ~(PIECE - 1));
	s->fd = memfd_create("kage-bench", MFD_CLOEXEC);
	must(s->fd < 0 || ftruncate(s->fd, (off_t)piece) ? -errno : 0, "memfd");
	for (uint64_t at = 0; at < s->bytes; at += piece) {
		must_map(mmap(s->p + at, piece, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, s->fd, 0),
			 "mmap");
		must(madvise(s->p + at, piece, MADV_NOHUGEPAGE) ? -errno : 0, "madvise");
		for (uint64_t i = 0; at == 0 && i < piece; i += PAGE)
			*(volatile uint64_t *)(s->p + i) = i + 1;
	}
}

/* NULL, or why there is no such thing here. */
static const char *watch(struct scan *s, bool async)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register reg = {.range = {(uintptr_t)s->p, s->bytes}, .mode = UFFDIO_REGISTER_MODE_WP};

	api.features = FEATURE_WP_SHMEM | (async ? FEATURE_WP_ASYNC : 0);
	s->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (s->uffd < 0)
		return "no userfaultfd (root, or vm.unprivileged_userfaultfd)";
	if (ioctl(s->uffd, UFFDIO_API, &api) || ioctl(s->uffd, UFFDIO_REGISTER, &reg))
		return async ? "no asynchronous write protection by userfaultfd (Linux 6.7)"
			     : "no write protection of shared memory by userfaultfd (Linux 5.19)";
	s->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	return s->pagemap < 0 ? "no /proc/self/pagemap" : NULL;
}

const char *scan_create(struct scan *s, uint64_t bytes, bool async)
{
	const char *why;

	*s = (struct scan){.bytes = bytes, .uffd = -1, .pagemap = -1};
	map_all(s);
	why = watch(s, async);
	for (uint64_t at = 0; !why && at < bytes; at += GIB)
		must(madvise(s->p + at, bytes - at < GIB ? bytes - at : GIB, POPULATE_READ) ? -errno : 0,
		     "MADV_POPULATE_READ");
	s->vec = must_map(calloc(SCAN_REGIONS, sizeof(struct scan_region)), "memory");
	if (!why && async) {
		int64_t pages;

		if (scan_take(s, &pages, NULL))
			why = "no PAGEMAP_SCAN (Linux 6.7)";
	}
	if (why)
		scan_destroy(s);
	return why;
}

void scan_destroy(struct scan *s)
{
	if (s->uffd >= 0)
		close(s->uffd);
	if (s->pagemap >= 0)
		close(s->pagemap);
	munmap(s->room, s->bytes + PIECE);
	close(s->fd);
	free(s->vec);
}

int scan_take(struct scan *s, int64_t *pages, double *ns)
{
	const struct scan_region *vec = s->vec;
	struct scan_arg a = {.size = sizeof(a),
			     .flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
			     .start = (uintptr_t)s->p,
			     .end = (uintptr_t)s->p + s->bytes,
			     .vec = (uintptr_t)s->vec,
			     .vec_len = SCAN_REGIONS,
			     .category_mask = IS_WRITTEN,
			     .return_mask = IS_WRITTEN};
	double begin = cpu_ns();

	*pages = 0;
	while (a.start < a.end) {
		int n = ioctl(s->pagemap, SCAN_IOCTL, &a);

		if (n < 0)
			return -errno;
		for (int i = 0; i < n; i++)
			*pages += (int64_t)((vec[i].end - vec[i].start) / PAGE);
		a.start = a.walk_end;
	}
	if (ns)
		*ns = cpu_ns() - begin;
	return 0;
}

void scan_protect(struct scan *s, bool protect)
{
	struct uffdio_writeprotect wp = {.range = {(uintptr_t)s->p, s->bytes},
					 .mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0};

	must(ioctl(s->uffd, UFFDIO_WRITEPROTECT, &wp) ? -errno : 0, "UFFDIO_WRITEPROTECT");
}

/* -- a thread that resolves ---------------------------------------------------------- */

static void *resolve(void *arg)
{
	struct scan *s = arg;
	struct pollfd fds[2] = {{.fd = s->uffd, .events = POLLIN}, {.fd = s->stop[0], .events = POLLIN}};

	while (!(fds[1].revents & (POLLIN | POLLHUP))) {
		struct uffd_msg m;

		poll(fds, 2, -1);
		while (read(s->uffd, &m, sizeof(m)) == sizeof(m)) {
			struct uffdio_writeprotect wp = {
			    .range = {m.arg.pagefault.address & ~(PAGE - 1), PAGE}};

			s->resolved++;
			must(ioctl(s->uffd, UFFDIO_WRITEPROTECT, &wp) ? -errno : 0, "UFFDIO_WRITEPROTECT");
		}
	}
	return NULL;
}

void scan_resolver_start(struct scan *s)
{
	must(pipe(s->stop) ? -errno : 0, "pipe");
	must(-pthread_create(&s->thread, NULL, resolve, s), "thread");
}

void scan_resolver_stop(struct scan *s)
{
	close(s->stop[1]);
	pthread_join(s->thread, NULL);
	close(s->stop[0]);
}
