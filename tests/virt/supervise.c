/* SPDX-License-Identifier: MIT */
/*
 * What programs that run domains have in common: where things lie, what is fetched, and who cleans up.
 *
 * The process that is started only waits: QEMU becomes a daemon and would else be a child of PID 1, which may be slow
 * to reap it, and libvirt waits for that. It is the one that is left when the worker crashes or is told
 * to end, and kills the root's QEMU then.
 */
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "virt.h"

/* -- where things lie ------------------------------------------------------------------------------------- */

bool make_paths(struct paths *paths, const char *out, const char *name, const char *debian, const char *suite)
{
	char real[PATH_MAX];
	uint32_t hash = 2166136261; /* FNV-1a */

	mkdir(out, 0755);
	fill(paths->out, sizeof(paths->out), "%s/%s", out, name);
	mkdir(paths->out, 0755);
	if (!realpath(paths->out, real)) {
		fprintf(stderr, "virt: %s: %s\n", paths->out, strerror(errno));
		return false;
	}
	fill(paths->out, sizeof(paths->out), "%s", real);
	for (const char *c = real; *c; c++)
		hash = (hash ^ (unsigned char)*c) * 16777619;
	fill(paths->root, sizeof(paths->root), ROOTS "%u-%08x", geteuid(), hash);
	real[strlen(real) - strlen(name) - 1] = 0;
	fill(paths->boot, sizeof(paths->boot), "%s/%s-%s", real, debian, suite);
	return true;
}

static int script(const struct paths *paths, const char *name, const char *a, const char *b, const char *c)
{
	char path[PATH_MAX];
	int status;
	pid_t pid;

	fill(path, sizeof(path), "%s/tests/%s", paths->source, name);
	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		execlp("sh", "sh", path, a, b, c, (char *)NULL);
		_exit(127);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
		return FAILED;
	return WEXITSTATUS(status);
}

/* fetch.sh says why it cannot. */
int fetch(const struct paths *paths, const char *debian, const char *suite)
{
	return script(paths, "virt/fetch.sh", debian, suite, paths->boot);
}

/* Programs of another architecture, with the cross compiler; build.sh says why it cannot. */
int build_programs(const struct paths *paths)
{
	char cross[PATH_MAX];
	size_t len = strlen(paths->sysroot);

	if (len < 9 || strcmp(paths->sysroot + len - 8, "/sysroot")) {
		printf("virt: to build the programs a sysroot is needed: -S DIR/sysroot\n");
		return FAILED;
	}
	fill(cross, sizeof(cross), "%.*s", (int)len - 8, paths->sysroot);
	return script(paths, "cross/build.sh", paths->programs, cross, NULL);
}

/* -- the process that waits -------------------------------------------------------------------------------- */

static int end_of(pid_t worker)
{
	int status, result = -1;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (pid == worker)
			result = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
	return result;
}

static int supervise(pid_t worker, const sigset_t *signals, const char *root)
{
	int status = -1, number;

	while (status < 0 && !sigwait(signals, &number)) {
		if (number != SIGCHLD)
			kill(worker, SIGKILL);
		status = end_of(worker);
	}
	if (status >= 128) {
		printf("virt: the harness was killed by signal %d\n", status - 128);
		kill_strays(root);
		status = FAILED;
	}
	return status;
}

int supervised(int (*work)(void), const char *root)
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
	return supervise(worker, &signals, root);
}
