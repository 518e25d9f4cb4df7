/* SPDX-License-Identifier: MIT */
/* The kernel as a peer: memory of 4 KiB pages, private mappings, fork(). */
#include <errno.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

static void populate(char *p, uint64_t bytes)
{
	must(madvise(p, bytes, MADV_NOHUGEPAGE) ? -errno : 0, "MADV_NOHUGEPAGE");
	for (uint64_t at = 0; at < bytes; at += PAGE)
		*(volatile uint64_t *)(p + at) = at + 1;
}

struct host_memory host_memfd(uint64_t bytes)
{
	struct host_memory m = {.bytes = bytes, .fd = memfd_create("kage-bench", MFD_CLOEXEC)};

	must(m.fd < 0 ? -errno : 0, "memfd");
	must(ftruncate(m.fd, (off_t)bytes) ? -errno : 0, "ftruncate");
	m.p = must_map(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd, 0), "mmap");
	populate(m.p, bytes);
	return m;
}

struct host_memory host_anon(uint64_t bytes)
{
	struct host_memory m = {.bytes = bytes, .fd = -1};

	m.p = must_map(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
	populate(m.p, bytes);
	return m;
}

void host_release(struct host_memory *m)
{
	munmap(m->p, m->bytes);
	if (m->fd >= 0)
		close(m->fd);
}

struct host_child host_fork(double *fork_ns)
{
	struct host_child c;
	double begin;
	int fd[2];

	must(pipe(fd) ? -errno : 0, "pipe");
	begin = cpu_ns();
	c.pid = fork();
	*fork_ns = cpu_ns() - begin;
	must(c.pid < 0 ? -errno : 0, "fork");
	if (c.pid == 0) {
		char byte;

		close(fd[1]);
		while (read(fd[0], &byte, 1) < 0 && errno == EINTR)
			;
		_exit(0);
	}
	close(fd[0]);
	c.fd = fd[1];
	return c;
}

void host_reap(struct host_child c)
{
	close(c.fd);
	while (waitpid(c.pid, NULL, 0) < 0 && errno == EINTR)
		;
}
