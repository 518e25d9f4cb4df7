/* SPDX-License-Identifier: MIT */
/*
 * What the machine says on its console, and what it means.
 *
 * Lines that begin with VIRT- are init.sh's. Between VIRT-BEGIN and VIRT-END they are a test's own: the counts
 * of Check, "skipped: case: reason", "SKIP: reason", and KAGE-PROOF lines of Linux guests, whose digests proofs.sh
 * computes again. A test without counts is one.
 *
 * The file is read while it grows (result_look()): how long a machine may say nothing of its own depends on which
 * test runs. What its kernel says does not count: one that hangs can complain of it for ever.
 */
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "virt.h"

#define BOOT_SECONDS 180 /* until a machine says something */
#define LOCKUP_SECONDS 70 /* a kernel that is locked up for so long stays so */
#define GRACE	     60	 /* for init.sh's own limit to be late */
#define LINE	     2048
#define TAIL	     60 /* lines that are shown of a console where something failed */

static struct {
	int fd;
	bool verbose;
	char line[LINE];
	size_t len;
	struct test *current;
	bool news; /* init.sh has said something */
	bool enough;
} console = { .fd = -1 };

/* -- lines --------------------------------------------------------------------------------------------- */

static struct test *find_test(struct leg *leg, const char *name)
{
	for (unsigned i = 0; i < leg->tests; i++)
		if (!strcmp(leg->test[i].name, name))
			return &leg->test[i];
	return NULL;
}

static void trouble(struct leg *leg, const char *line)
{
	leg->bad++;
	printf("  BAD   %s: %s\n", leg->name, line);
}

static void note_skip(struct leg *leg, struct test *t, const char *text)
{
	char whole[LINE];

	fill(whole, sizeof(whole), "%s: %.1800s", t->name, text);
	t->skips++;
	for (unsigned i = 0; i < leg->skips; i++)
		if (!fnmatch(leg->skip[i].pattern, whole, 0)) {
			leg->skip[i].seen++;
			printf("  skipped: %s\n", whole);
			return;
		}
	fill(whole, sizeof(whole), "a skip that the list does not have: %s: %.1800s", t->name, text);
	trouble(leg, whole);
}

static void test_line(struct leg *leg, struct test *t, const char *line)
{
	unsigned checks, failures, errors;
	const char *at = strstr(line, "Checks: ");

	if (at && sscanf(at, "Checks: %u, Failures: %u, Errors: %u", &checks, &failures, &errors) == 3) {
		t->failed += failures + errors + !checks; /* a case that nobody knows any more is no pass */
		t->passed += checks - failures - errors;
	} else if (!strncmp(line, "skipped: ", 9)) {
		note_skip(leg, t, line + 9);
	} else if (!strncmp(line, "SKIP: ", 6)) {
		note_skip(leg, t, line + 6);
	}
}

static void end_test(struct test *t, int status, unsigned seconds)
{
	t->ended = true;
	t->status = status;
	t->took = seconds;
	if (!t->passed && !t->failed && status == 0)
		t->passed = 1;
	if (!t->failed && status != 0 && status != SKIPPED)
		t->failed = 1;
	if (status == SKIPPED && !t->skips)
		t->failed = 1; /* without a reason */
}

static void init_line(struct leg *leg, const char *line)
{
	char name[64];
	int status;
	unsigned seconds;

	console.news = true;
	if (sscanf(line, "VIRT-BEGIN %63s", name) == 1) {
		console.current = find_test(leg, name);
		if (console.current)
			console.current->begun = true;
	} else if (sscanf(line, "VIRT-END %63s status %d seconds %u", name, &status, &seconds) == 3) {
		if (console.current && !strcmp(console.current->name, name))
			end_test(console.current, status, seconds);
		console.current = NULL;
	} else if (!strncmp(line, "VIRT-KERNEL ", 12)) {
		fill(leg->kernel, sizeof(leg->kernel), "%.200s", line + 12);
	} else if (!strncmp(line, "VIRT-DONE", 9)) {
		leg->done = true;
	} else {
		trouble(leg, line);
	}
}

/* The kernel says it again every 20 seconds or so; a slow machine says it once. */
static void lock_up(struct leg *leg, const char *line)
{
	unsigned cpu, seconds;

	leg->locked = true;
	if (sscanf(line, "BUG: soft lockup - CPU#%u stuck for %us", &cpu, &seconds) == 2 && seconds >= LOCKUP_SECONDS)
		console.enough = true;
}

static void use_line(struct leg *leg, const char *line)
{
	const char *lockup;

	if (console.verbose)
		printf("  | %s\n", line);
	if (!strncmp(line, "VIRT-", 5))
		init_line(leg, line);
	else if (strstr(line, "Kernel panic") && !strstr(line, "| "))
		leg->panic = true;
	else if ((lockup = strstr(line, "BUG: soft lockup"))) /* of a nested guest's kernel too */
		lock_up(leg, lockup);
	else if (strstr(line, ": triple fault before any clone")) /* of a nested guest: test_linux.c */
		leg->locked = console.enough = true;
	else if (console.current)
		test_line(leg, console.current, line);
}

static void take(struct leg *leg, const char *bytes, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		if (bytes[i] == '\n' || console.len == LINE - 1) {
			console.line[console.len] = 0;
			console.len = 0;
			use_line(leg, console.line);
		}
		if ((unsigned char)bytes[i] >= ' ')
			console.line[console.len++] = bytes[i];
	}
}

/* -- the file ----------------------------------------------------------------------------------------------- */

/* Forgets what an earlier run of the machine said; its console is kept as console.1. */
bool result_begin(struct leg *leg, const struct paths *paths)
{
	char path[PATH_MAX];

	result_end();
	console.len = 0;
	console.current = NULL;
	console.verbose = paths->verbose;
	for (unsigned i = 0; i < leg->tests; i++) {
		struct test *t = &leg->test[i];

		*t = (struct test){ .name = t->name, .command = t->command, .seconds = t->seconds };
	}
	for (unsigned i = 0; i < leg->skips; i++)
		leg->skip[i].seen = 0;
	leg->bad = 0;
	leg->done = leg->panic = leg->locked = false;
	console.news = true;
	console.enough = false;
	leg->kernel[0] = 0;
	fill(path, sizeof(path), "%s/console", paths->out);
	console.fd = open(path, O_CREAT | O_TRUNC | O_RDONLY | O_CLOEXEC, 0644);
	if (console.fd < 0)
		fprintf(stderr, "virt: %s: %s\n", path, strerror(errno));
	return console.fd >= 0;
}

void result_end(void)
{
	if (console.fd >= 0)
		close(console.fd);
	console.fd = -1;
}

/* Reads on. How long the machine may be silent from here; 0: it had nothing new to say. */
unsigned result_look(void *opaque)
{
	struct leg *leg = opaque;
	char buf[4096];
	ssize_t n;

	while ((n = read(console.fd, buf, sizeof(buf))) > 0)
		take(leg, buf, (size_t)n);
	if (console.enough)
		return WATCH_ENOUGH;
	if (!console.news)
		return 0;
	console.news = false;
	if (console.current)
		return console.current->seconds + GRACE;
	return leg->boot ? leg->boot : BOOT_SECONDS;
}

/*
 * The machine itself failed, not what ran in it: it reset itself without a word (or a nested guest did), or its kernel
 * locked up. Both are faults of QEMU's emulation: of SVM, and of code that one CPU changes while another one runs it. Not
 * if a test has failed before: that is not forgotten.
 */
bool result_machine_failed(const struct leg *leg, enum ended ended)
{
	for (unsigned i = 0; i < leg->tests; i++)
		if (leg->test[i].failed)
			return false;
	return !leg->done && !leg->panic &&
	       ((ended == ENDED_OFF && !leg->bad) || (ended == ENDED_STUCK && leg->locked));
}

/* -- the verdict ---------------------------------------------------------------------------------------------- */

static void show_tail(const struct paths *paths)
{
	char path[PATH_MAX], *lines[TAIL] = { 0 }, line[LINE];
	unsigned n = 0;
	FILE *f;

	fill(path, sizeof(path), "%s/console", paths->out);
	printf("  console: %s; it ends with:\n", path);
	f = fopen(path, "r");
	while (f && fgets(line, sizeof(line), f)) {
		line[strcspn(line, "\r\n")] = 0;
		free(lines[n % TAIL]);
		lines[n++ % TAIL] = strdup(line);
	}
	if (f)
		fclose(f);
	for (unsigned i = n > TAIL ? n - TAIL : 0; i < n; i++)
		printf("  | %s\n", lines[i % TAIL]);
	for (unsigned i = 0; i < TAIL; i++)
		free(lines[i]);
}

static void report_test(const struct test *t)
{
	const char *word = t->failed || !t->ended ? "FAIL" : t->passed ? "ok  " : "skip";

	printf("  %s  %-20s %3u passed, %u failed, %u skipped, %u s", word, t->name, t->passed, t->failed, t->skips,
	       t->took);
	if (!t->begun)
		printf(" (never begun)");
	else if (!t->ended)
		printf(" (the machine ended in it)");
	else if (t->status && t->status != SKIPPED)
		printf(" (exit status %d; its limit is %u s)", t->status, t->seconds);
	putchar('\n');
}

static void check_skips(struct leg *leg)
{
	char text[LINE];

	for (unsigned i = 0; i < leg->skips; i++)
		if (!leg->skip[i].seen && leg->done) {
			fill(text, sizeof(text), "listed, but not skipped: %.1900s", leg->skip[i].pattern);
			trouble(leg, text);
		}
}

/* Guests that vmm-linux has to have had prove who they are: the first one and its clones. */
static unsigned guests_wanted(const struct leg *leg)
{
	unsigned guests = 0;

	for (unsigned i = 0; i < leg->tests; i++) {
		const struct test *t = &leg->test[i];
		const char *clones = strstr(t->command, "--clones ");

		if (strstr(t->command, "/vmm-linux ") && t->ended && t->status == 0)
			guests += 1 + (clones ? (unsigned)atoi(clones + 9) : 0);
	}
	return guests;
}

/* The digests that Linux guests printed, computed again outside of them. */
static void check_proofs(struct leg *leg, const struct paths *paths)
{
	char script[PATH_MAX], path[PATH_MAX], wanted[16];
	int status;
	pid_t pid;

	fill(script, sizeof(script), "%s/tests/virt/proofs.sh", paths->source);
	fill(path, sizeof(path), "%s/console", paths->out);
	fill(wanted, sizeof(wanted), "%u", guests_wanted(leg));
	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		execlp("sh", "sh", script, path, wanted, (char *)NULL);
		_exit(127);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
		trouble(leg, "not all Linux guests proved who they are");
}

static void check_leg(struct leg *leg, enum ended ended)
{
	const char *const how[] = { "the machine ended before its tests did", "the machine hung, and was destroyed",
				    "QEMU crashed", "the machine could not be started" };

	if (!leg->done || ended != ENDED_OFF)
		trouble(leg, leg->panic ? "the machine's kernel panicked" : how[ended]);
	if (leg->done && !strstr(leg->kernel, leg->mode))
		trouble(leg, "KVM is in another mode than this leg is for, or does not say");
}

/* A line for each test, and the last one, which tests/run.sh reads. */
int result_report(struct leg *leg, const struct paths *paths, enum ended ended, unsigned seconds)
{
	unsigned passed = 0, failed = 0, skips = 0;

	check_leg(leg, ended);
	check_skips(leg);
	check_proofs(leg, paths);
	for (unsigned i = 0; i < leg->tests; i++) {
		struct test *t = &leg->test[i];

		report_test(t);
		passed += t->passed;
		failed += t->failed ? t->failed : !t->ended;
		skips += t->skips;
	}
	failed += leg->bad;
	if (failed)
		show_tail(paths);
	printf("LEG %s: %u passed, %u failed, %u skipped in %u s; %s\n", leg->name, passed, failed, skips, seconds,
	       leg->kernel[0] ? leg->kernel : "its kernel said nothing");
	return failed ? FAILED : PASSED;
}
