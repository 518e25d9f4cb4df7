/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "qemu.h"

#define TIMEOUT_MS 90000

static pid_t start(char *const argv[], int *from)
{
	int fds[2];
	pid_t pid;

	if (pipe(fds))
		return -1;
	pid = fork();
	if (pid == 0) {
		dup2(fds[1], STDOUT_FILENO);
		close(fds[0]);
		close(fds[1]);
		execvp(argv[0], argv);
		_exit(127);
	}
	close(fds[1]);
	*from = fds[0];
	return pid;
}

static long now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Everything until end of file; false at the deadline. */
static bool read_all(int fd, char *buf, size_t size)
{
	long deadline = now_ms() + TIMEOUT_MS;
	size_t n = 0;

	for (;;) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		long left = deadline - now_ms();
		ssize_t r;

		if (left <= 0 || n + 1 >= size || (poll(&p, 1, left) < 0 && errno != EINTR))
			return false;
		if (!p.revents)
			continue;
		r = read(fd, buf + n, size - 1 - n);
		if (r < 0 && errno == EINTR)
			continue;
		if (r <= 0) {
			buf[n] = 0;
			return r == 0;
		}
		n += r;
	}
}

char *qemu_run(char *const argv[], int status, size_t size)
{
	char *out = calloc(1, size);
	int from, ended;
	pid_t pid = out ? start(argv, &from) : -1;
	bool whole;

	if (pid < 0) {
		free(out);
		return NULL;
	}
	whole = read_all(from, out, size);
	close(from);
	if (!whole)
		kill(pid, SIGKILL);
	while (waitpid(pid, &ended, 0) < 0 && errno == EINTR)
		;
	if (whole && WIFEXITED(ended) && WEXITSTATUS(ended) == status)
		return out;
	fprintf(stderr, "%s: %s, wait status %x, output: %.200s\n", argv[0],
		whole ? "ended" : "timed out or too long", ended, out);
	free(out);
	return NULL;
}
