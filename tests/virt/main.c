/* SPDX-License-Identifier: MIT */
/*
 * Runs one leg of the virt suite: a machine, and in it the tests that tests/virt/legs/NAME lists.
 *
 *	virt-leg [-v] [-S SYSROOT] SOURCE PROGRAMS OUT LEG [TEST...]
 *	virt-leg -k		ends what runs that were killed left behind, and nothing else
 *
 * SOURCE is Kage's source folder, PROGRAMS a build folder for the machine's architecture, SYSROOT the prefix of its
 * libraries. In OUT: LEG/console, LEG/initramfs, and the kernel. -v prints the console as it comes. Exit: 0, 1, or
 * 77 with "SKIP: reason and remedy".
 */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "virt.h"

static struct paths paths = { .sysroot = "" };
static struct leg leg;

static int skip(const char *reason)
{
	printf("SKIP: %s\n", reason);
	return SKIPPED;
}

static unsigned now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (unsigned)t.tv_sec;
}

/* The first one; NULL: all are there. */
static const char *missing_program(void)
{
	static char path[PATH_MAX];
	char program[PATH_MAX / 2];

	for (unsigned i = 0; i < leg.tests; i++) {
		leg_program(&leg.test[i], program, sizeof(program));
		fill(path, sizeof(path), "%s/%s", paths.programs, program);
		if (access(path, X_OK))
			return path;
	}
	return NULL;
}

/*
 * Programs of this machine's own kind were built before this one runs (meson.build: depends). Those of another kind are
 * now, or what has changed of them: an old program would show that an old Kage works.
 */
static int have_programs(void)
{
	struct utsname host;
	int status = PASSED;

	if (!uname(&host) && strcmp(host.machine, leg.machine->arch)) {
		printf("virt: builds programs of %s (%s)\n", leg.machine->arch, paths.programs);
		status = build_programs(&paths);
	}
	if (status == PASSED && missing_program()) {
		printf("FAIL: %s is not built\n", missing_program());
		status = FAILED;
	}
	return status;
}

/* The console of the first run, for whoever wants to know why there was a second one. */
static void keep_console(enum ended ended)
{
	char from[PATH_MAX], to[PATH_MAX];

	fill(from, sizeof(from), "%s/console", paths.out);
	fill(to, sizeof(to), "%s/console.1", paths.out);
	rename(from, to);
	printf("  REPEATED: the machine %s: a fault of its emulation; its console: %s\n",
	       ended == ENDED_OFF ? "reset itself without a word" : "locked up", to);
}

static int run_machine(void)
{
	const struct watch watch = { result_look, &leg };
	unsigned begin = now();
	enum ended ended;

	if (!result_begin(&leg, &paths))
		return FAILED;
	ended = domain_run(&leg, &paths, &watch);
	if (result_machine_failed(&leg, ended)) {
		keep_console(ended);
		if (!result_begin(&leg, &paths))
			return FAILED;
		ended = domain_run(&leg, &paths, &watch);
	}
	return result_report(&leg, &paths, ended, now() - begin);
}

static int work(void)
{
	const char *reason = domain_missing(leg.machine);
	int status;

	if (reason)
		return skip(reason);
	status = domain_open(&paths);
	if (status == PASSED)
		status = have_programs();
	if (status == PASSED)
		status = fetch(&paths, leg.machine->debian, leg.suite);
	if (status == PASSED)
		status = initramfs_make(&leg, &paths) ? run_machine() : FAILED;
	domain_close();
	return status;
}

/* -- the command line ------------------------------------------------------------------------------------- */

static int usage(void)
{
	fprintf(stderr, "usage: virt-leg [-v] [-S SYSROOT] SOURCE PROGRAMS OUT LEG [TEST...]\n"
			"       virt-leg -k\n");
	return 2;
}

static bool read_leg(const char *name)
{
	char path[PATH_MAX], *slash = strrchr(name, '/');

	leg.name = slash ? slash + 1 : name;
	fill(path, sizeof(path), slash ? "%s" : "%2$s/tests/virt/legs/%1$s", name, paths.source);
	if (!leg_read(&leg, path))
		return false;
	fill(path, sizeof(path), slash ? "%s.skips" : "%2$s/tests/virt/legs/%1$s.skips", name, paths.source);
	return access(path, R_OK) || leg_read_skips(&leg, path);
}

int main(int argc, char **argv)
{
	int c;

	setvbuf(stdout, NULL, _IOLBF, 0);
	while ((c = getopt(argc, argv, "+kvS:")) != -1) {
		if (c == 'k' && optind == argc) {
			sweep();
			return PASSED;
		}
		if (c == 'v')
			paths.verbose = true;
		else if (c == 'S')
			paths.sysroot = optarg;
		else
			return usage();
	}
	if (argc - optind < 4)
		return usage();
	paths.source = argv[optind];
	paths.programs = argv[optind + 1];
	if (!read_leg(argv[optind + 3]) || !make_paths(&paths, argv[optind + 2], leg.name, leg.machine->debian, leg.suite))
		return FAILED;
	if (argc - optind > 4 && !leg_only(&leg, argv + optind + 4, argc - optind - 4))
		return FAILED;
	return supervised(work, paths.root);
}
