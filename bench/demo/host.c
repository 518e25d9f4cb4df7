/* SPDX-License-Identifier: MIT */
/* What the demo asks the host: the time, its own memory, a line on the terminal. */
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "demo.h"

uint64_t host_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t host_pss(void)
{
	char text[4096];
	const char *line;
	ssize_t n;
	int fd = open("/proc/self/smaps_rollup", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return 0;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return 0;
	text[n] = 0;
	line = strstr(text, "\nPss:");
	return line ? strtoull(line + 5, NULL, 10) << 10 : 0;
}

void host_progress(const char *format, ...)
{
	static uint64_t last;
	static int open_line;
	int tty = isatty(STDOUT_FILENO);
	uint64_t now = host_ns();
	va_list args;

	if (!format) {
		if (open_line)
			fputs("\r\033[K", stdout);
		open_line = 0;
		last = 0;
		return;
	}
	if (!last && !tty)
		last = now;
	if (last && now - last < (tty ? 100000000u : 2000000000u))
		return;
	last = now;
	fputs(tty ? "\r\033[K   ... " : "   ... ", stdout);
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	if (tty)
		open_line = 1;
	else
		putchar('\n');
	fflush(stdout);
}
