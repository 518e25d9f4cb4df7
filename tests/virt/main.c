/* SPDX-License-Identifier: MIT */
/*
 * Runs one leg of the virt suite: a machine, and in it the tests that tests/virt/legs/NAME lists.
 *
 *	virt-leg [-v] [-S SYSROOT] SOURCE PROGRAMS OUT LEG [TEST...]
 *
 * SOURCE is Kage's source folder, PROGRAMS a build folder for the machine's architecture, SYSROOT the prefix of its
 * libraries. In OUT: LEG/console, LEG/initramfs, and the kernel. -v prints the console as it comes. Exit: 0, 1, or
 * 77 with "SKIP: reason and remedy".
 *
 * The process that is started only waits: QEMU becomes a daemon and would else be a child of PID 1, which may be slow
 * to reap it, and libvirt waits for that. It is the one that is left when the worker crashes or is told
 * to end, and kills the leg's QEMU then.
 */
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
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

/* fetch.sh says why it cannot. */
static int fetch(void)
{
	char script[PATH_MAX];
	int status;
	pid_t pid;

	fill(script, sizeof(script), "%s/tests/virt/fetch.sh", paths.source);
	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		execlp("sh", "sh", script, leg.machine->debian, leg.suite, paths.boot, (char *)NULL);
		_exit(127);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
		return FAILED;
	return WEXITSTATUS(status);
}

static const char *missing_program(void)
{
	static char text[PATH_MAX + 128];
	char program[PATH_MAX / 2], path[PATH_MAX];

	for (unsigned i = 0; i < leg.tests; i++) {
		leg_program(&leg.test[i], program, sizeof(program));
		fill(path, sizeof(path), "%s/%s", paths.programs, program);
		if (access(path, X_OK)) {
			fill(text, sizeof(text), "%.3000s is not built for %s; see tests/virt/README.md", path,
			     leg.machine->arch);
			return text;
		}
	}
	return NULL;
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

	if (!reason)
		reason = missing_program();
	if (reason)
		return skip(reason);
	status = fetch();
	if (status)
		return status;
	if (!initramfs_make(&leg, &paths) || !domain_open(&paths))
		return FAILED;
	status = run_machine();
	domain_close();
	return status;
}

/* -- the process that waits ---------------------------------------------------------------------------- */

static int end_of(pid_t worker)
{
	int status, result = -1;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (pid == worker)
			result = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
	return result;
}

static int supervise(pid_t worker, const sigset_t *signals)
{
	int status = -1, number;

	while (status < 0 && !sigwait(signals, &number)) {
		if (number != SIGCHLD)
			kill(worker, SIGKILL);
		status = end_of(worker);
	}
	if (status >= 128) {
		printf("virt: the harness was killed by signal %d\n", status - 128);
		domain_kill_strays(paths.root);
		status = FAILED;
	}
	return status;
}

static int start(void)
{
	sigset_t signals, before;
	pid_t worker;

	sigemptyset(&signals);
	for (const int *n = (const int[]){ SIGCHLD, SIGHUP, SIGINT, SIGTERM, 0 }; *n; n++)
		sigaddset(&signals, *n);
	sigprocmask(SIG_BLOCK, &signals, &before);
	if (prctl(PR_SET_CHILD_SUBREAPER, 1))
		return FAILED;
	fflush(stdout);
	worker = fork();
	if (worker < 0)
		return FAILED;
	if (worker == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		sigprocmask(SIG_SETMASK, &before, NULL);
		exit(work());
	}
	return supervise(worker, &signals);
}

/* -- the command line ------------------------------------------------------------------------------------- */

static int usage(void)
{
	fprintf(stderr, "usage: virt-leg [-v] [-S SYSROOT] SOURCE PROGRAMS OUT LEG [TEST...]\n");
	return 2;
}

static bool make_paths(const char *out, const char *name)
{
	char real[PATH_MAX];
	uint32_t hash = 2166136261; /* FNV-1a */

	mkdir(out, 0755);
	fill(paths.out, sizeof(paths.out), "%s/%s", out, name);
	mkdir(paths.out, 0755);
	if (!realpath(paths.out, real)) {
		fprintf(stderr, "virt: %s: %s\n", paths.out, strerror(errno));
		return false;
	}
	fill(paths.out, sizeof(paths.out), "%s", real);
	for (const char *c = real; *c; c++)
		hash = (hash ^ (unsigned char)*c) * 16777619;
	fill(paths.root, sizeof(paths.root), "/tmp/kage-virt-%u-%08x", geteuid(), hash);
	real[strlen(real) - strlen(name) - 1] = 0;
	fill(paths.boot, sizeof(paths.boot), "%s/%s-%s", real, leg.machine->debian, leg.suite);
	return true;
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
	while ((c = getopt(argc, argv, "+vS:")) != -1) {
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
	if (!read_leg(argv[optind + 3]) || !make_paths(argv[optind + 2], leg.name))
		return FAILED;
	if (argc - optind > 4 && !leg_only(&leg, argv + optind + 4, argc - optind - 4))
		return FAILED;
	return start();
}
