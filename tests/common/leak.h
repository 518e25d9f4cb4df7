/* SPDX-License-Identifier: MIT */
/*
 * Threads and descriptors of this process, before and after.
 *
 *     struct leak before = leak_take();
 *     ... create, use and destroy engines ...
 *     failures += leak_check(&before);
 *
 * A thread that was joined may stay in /proc/self/task for a moment, so the
 * check looks again for up to a second. Other threads of the test must have
 * been joined.
 */
#ifndef KAGE_TESTS_LEAK_H
#define KAGE_TESTS_LEAK_H

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if defined(__SANITIZE_THREAD__)
#define LEAK_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define LEAK_TSAN 1
#endif
#endif
#ifdef LEAK_TSAN /* it starts a thread of its own with the first one of the program */
#define LEAK_THREADS 1
#else
#define LEAK_THREADS 0
#endif

struct leak {
	int threads, fds;
};

static inline int leak_threads_differ(const struct leak *a, const struct leak *b)
{
	return b->threads < a->threads || b->threads > a->threads + LEAK_THREADS;
}

/* Entries of a folder of /proc/self; -1 if it cannot be read. Reading /proc/self/fd counts its own descriptor, always. */
static inline int leak_count(const char *path)
{
	DIR *dir = opendir(path);
	struct dirent *e;
	int n = 0;

	if (dir == NULL)
		return -1;
	while ((e = readdir(dir)) != NULL)
		n += e->d_name[0] != '.';
	closedir(dir);
	return n;
}

static inline struct leak leak_take(void)
{
	struct leak l;

	l.threads = leak_count("/proc/self/task");
	l.fds = leak_count("/proc/self/fd");
	return l;
}

static inline void leak_print_fds(void)
{
	char link[64], target[256];
	ssize_t n;
	int fd;

	for (fd = 0; fd < 1024; fd++) {
		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
		n = readlink(link, target, sizeof(target) - 1);
		if (n < 0)
			continue;
		target[n] = 0;
		printf("  fd %d: %s\n", fd, target);
	}
}

/* 0 if the numbers are what they were, else prints them and returns 1. */
static inline int leak_check(const struct leak *before)
{
	struct timespec pause = { 0, 10 * 1000 * 1000 };
	struct leak now = leak_take();
	int tries;

	for (tries = 0; tries < 100 && leak_threads_differ(before, &now); tries++) {
		nanosleep(&pause, NULL);
		now = leak_take();
	}
	if (before->threads > 0 && before->fds > 0 && !leak_threads_differ(before, &now) && now.fds == before->fds)
		return 0;
	printf("threads: %d before, %d after; descriptors: %d before, %d after\n", before->threads, now.threads,
	       before->fds, now.fds);
	leak_print_fds();
	return 1;
}

#endif
