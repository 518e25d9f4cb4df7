/* SPDX-License-Identifier: MIT */
/*
 * ksmd as a peer (Documentation/admin-guide/mm/ksm.rst). It is one kernel thread
 * for the whole machine, so:
 *
 *  K1  its settings are saved first, and a child process puts them back when this
 *      one is gone, for whatever reason: it waits for the end of a pipe.
 *  K2  nobody else's memory may be scanned meanwhile (QEMU makes its guests' memory
 *      mergeable unless told not to): a case is not begun while another process has
 *      any, and a run is void if one had at its end, or if the counters do not add up to
 *      this process's pages. A lock on the file `run` keeps two benchmarks apart.
 *  K3  between runs nothing of the last one is left: its memory is unmapped, then
 *      run=2 drops what ksmd knew.
 *
 * sleep_millisecs is 0 and pages_to_scan large, so that its CPU time is that of
 * merging. Everything else is as the machine has it, but for zero pages, which
 * both sides put on a zero page.
 */
#include <errno.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "merge.h"

#define DIR_KSM	   "/sys/kernel/mm/ksm/"
#define BATCH	   "8192"
#define POLL_US	   500
#define TIMEOUT_NS 600e9
#define ALONE_NS   30e9

/* In the order of putting them back: `run` last. */
static const char *const setting[] = {"sleep_millisecs", "pages_to_scan", "use_zero_pages", "run"};
static char setting_was[LENGTH(setting)][32];
static int ksmd_stat = -1, guard_fd = -1, lock_fd = -1;
static pid_t guard;

static bool get_text(const char *name, char *text, size_t room)
{
	char path[128];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), DIR_KSM "%s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	n = fd < 0 ? -1 : read(fd, text, room - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	return n > 0;
}

static bool put_text(const char *name, const char *text)
{
	char path[128];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), DIR_KSM "%s", name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	n = fd < 0 ? -1 : write(fd, text, strlen(text));
	if (fd >= 0)
		close(fd);
	return n >= 0;
}

static uint64_t get(const char *name)
{
	char text[32];

	return get_text(name, text, sizeof(text)) ? strtoull(text, NULL, 10) : 0;
}

static void put(const char *name, const char *text)
{
	must(put_text(name, text) ? 0 : -errno, name);
}

static void find_ksmd(void)
{
	DIR *proc = opendir("/proc");

	for (struct dirent *e; ksmd_stat < 0 && proc && (e = readdir(proc));) {
		char path[300], comm[16] = "";
		FILE *f;

		if (*e->d_name < '0' || *e->d_name > '9')
			continue;
		snprintf(path, sizeof(path), "/proc/%s/comm", e->d_name);
		f = fopen(path, "re");
		if (f && fgets(comm, sizeof(comm), f) && !strcmp(comm, "ksmd\n")) {
			snprintf(path, sizeof(path), "/proc/%s/schedstat", e->d_name);
			ksmd_stat = open(path, O_RDONLY | O_CLOEXEC);
		}
		if (f)
			fclose(f);
	}
	if (proc)
		closedir(proc);
}

/* ns of CPU time that ksmd has used. */
static double ksmd_cpu(void)
{
	char text[96];
	ssize_t n = pread(ksmd_stat, text, sizeof(text) - 1, 0);

	must(n > 0 ? 0 : -EIO, "schedstat of ksmd");
	text[n] = 0;
	return strtod(text, NULL);
}

/* Why this process's memory would be merged too, or NULL. */
static const char *mergeable(const char *pid)
{
	static char why[160];
	char path[300], line[64], comm[32] = "";
	bool yes = false;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%s/ksm_stat", pid);
	f = fopen(path, "re");
	while (f && fgets(line, sizeof(line), f))
		yes |= !strcmp(line, "ksm_mergeable: yes\n") || !strcmp(line, "ksm_merge_any: yes\n") ||
		       (!strncmp(line, "ksm_rmap_items ", 15) && atol(line + 15) > 0);
	if (f)
		fclose(f);
	if (!yes || atoi(pid) == getpid())
		return NULL;
	snprintf(path, sizeof(path), "/proc/%s/comm", pid);
	f = fopen(path, "re");
	if (f && fgets(comm, sizeof(comm), f))
		comm[strcspn(comm, "\n")] = 0;
	if (f)
		fclose(f);
	snprintf(why, sizeof(why), "process %s (%s) has mergeable memory, which ksmd would scan too", pid,
		 comm);
	return why;
}

static const char *others(void)
{
	DIR *proc = opendir("/proc");
	const char *why = NULL;

	for (struct dirent *e; !why && proc && (e = readdir(proc));)
		if (*e->d_name >= '0' && *e->d_name <= '9')
			why = mergeable(e->d_name);
	if (proc)
		closedir(proc);
	return why;
}

const char *ksm_alone(void)
{
	double begin = wall_ns();
	const char *why;

	while ((why = others()) && wall_ns() - begin < ALONE_NS)
		sleep(1);
	return why;
}

/* K1 */
static void guard_settings(int fd)
{
	sigset_t all;
	char byte;

	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	setsid();
	while (read(fd, &byte, 1) < 0 && errno == EINTR)
		;
	if (get("pages_shared") || get("pages_unshared"))
		put_text("run", "2"); /* K3 */
	for (unsigned i = 0; i < LENGTH(setting); i++)
		put_text(setting[i], setting_was[i]);
	_exit(0);
}

static bool start_guard(void)
{
	int fd[2];

	for (unsigned i = 0; i < LENGTH(setting); i++)
		if (!get_text(setting[i], setting_was[i], sizeof(setting_was[i])))
			return false;
	if (pipe2(fd, O_CLOEXEC))
		return false;
	guard = fork();
	if (guard == 0) {
		close(fd[1]);
		guard_settings(fd[0]);
	}
	close(fd[0]);
	guard_fd = fd[1];
	return guard > 0;
}

const char *ksm_open(void)
{
	if (access(DIR_KSM "run", F_OK))
		return "the kernel has no KSM (CONFIG_KSM)";
	if (geteuid() || access(DIR_KSM "run", W_OK))
		return "not root: ksmd cannot be started";
	find_ksmd();
	if (ksmd_stat < 0)
		return "no /proc/PID/schedstat of ksmd (CONFIG_SCHED_INFO)";
	lock_fd = open(DIR_KSM "run", O_RDONLY | O_CLOEXEC);
	if (lock_fd < 0 || flock(lock_fd, LOCK_EX | LOCK_NB))
		return "another benchmark uses ksmd";
	if (get("pages_shared") || get("run") == 1)
		return "ksmd is in use: echo 2 >" DIR_KSM "run, if nobody needs it";
	if (!start_guard())
		return "the settings of ksmd cannot be saved";
	put("sleep_millisecs", "0");
	put("pages_to_scan", BATCH);
	if (!put_text("use_zero_pages", "1"))
		return "ksmd cannot use zero pages";
	return NULL;
}

void ksm_close(void)
{
	if (guard_fd < 0)
		return;
	close(guard_fd);
	guard_fd = -1;
	while (waitpid(guard, NULL, 0) < 0 && errno == EINTR)
		;
}

struct ksm_counts ksm_counts(void)
{
	return (struct ksm_counts){
	    .shared = get("pages_shared"),
	    .sharing = get("pages_sharing"),
	    .unshared = get("pages_unshared"),
	    .volatiles = get("pages_volatile"),
	    .zero = get("ksm_zero_pages"),
	    .full_scans = get("full_scans"),
	    .scanned = get("pages_scanned"),
	    .cpu = ksmd_cpu(),
	};
}

void ksm_start(void)
{
	put("run", "1");
}

void ksm_stop(void)
{
	put("run", "0");
}

bool ksm_clean(void)
{
	put("run", "2");
	ksm_stop();
	return !others();
}

/* -- the same contents ------------------------------------------------------------------ */

static void add(struct theirs *t, unsigned g)
{
	const struct contents *c = &t->contents;
	uint64_t bytes = c->pages * PAGE;
	char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), page[PAGE];

	t->p[g] = must_map(p, "mmap");
	/* It would have to split huge pages: spare it that. */
	must(madvise(p, bytes, MADV_NOHUGEPAGE) ? -errno : 0, "MADV_NOHUGEPAGE");
	for (uint64_t i = 0; i < c->pages; i++)
		if (contents_page(c, g, i, page))
			memcpy(p + i * PAGE, page, PAGE);
	must(madvise(p, bytes, MADV_MERGEABLE) ? -errno : 0, "MADV_MERGEABLE");
}

void theirs_create(struct theirs *t, const struct contents *c)
{
	*t = (struct theirs){.contents = *c};
	for (unsigned g = 0; g < c->guests; g++)
		add(t, g);
}

void theirs_add(struct theirs *t)
{
	add(t, t->contents.guests++);
}

void theirs_destroy(struct theirs *t)
{
	for (unsigned g = 0; g < t->contents.guests; g++)
		munmap(t->p[g], t->contents.pages * PAGE);
	ksm_clean();
}

/* Whether ksmd has come to the end: of what there is to share; or nothing new for two passes. */
static bool finished(const struct theirs *t, struct run *r, uint64_t saved)
{
	uint64_t goal = t->contents.distinct;

	if (goal)
		return saved >= contents_nominal(&t->contents) - goal;
	if (saved != r->seen) {
		r->seen = saved;
		r->seen_pass = r->passes;
	}
	return saved && r->passes >= r->seen_pass + 3; /* the one it happened in, and two whole ones */
}

static uint64_t saved_since(const struct ksm_counts *now, const struct ksm_counts *first)
{
	return now->sharing + now->zero - first->zero;
}

void theirs_merge(struct theirs *t, struct run *r)
{
	uint64_t nominal = contents_nominal(&t->contents);
	struct ksm_counts first = ksm_counts(), now;
	double begin = wall_ns();

	*r = (struct run){.ok = true};
	trace_add(&r->trace, 0, 0, 0);
	ksm_start();
	do {
		usleep(POLL_US);
		now = ksm_counts();
		r->wall = wall_ns() - begin;
		r->cpu = now.cpu - first.cpu;
		r->passes = now.full_scans - first.full_scans;
		trace_add(&r->trace, r->wall, r->cpu, saved_since(&now, &first));
	} while (r->wall < TIMEOUT_NS && !finished(t, r, saved_since(&now, &first)));
	ksm_stop();
	now = ksm_counts();
	r->frames = nominal - saved_since(&now, &first);
	if (!t->contents.distinct) /* it had been there long before that was known */
		r->cpu = trace_reach(&r->trace, 0.999 * (double)saved_since(&now, &first))->cpu;
	run_check(r, r->wall < TIMEOUT_NS, "ksmd did not come to an end");
	/* K2 */
	run_check(r, now.shared + now.sharing + now.unshared <= nominal && !others(),
		  "ksmd scanned memory of somebody else too");
}

void theirs_passes(struct theirs *t, unsigned first, unsigned n, struct run *r, struct series *s)
{
	struct ksm_counts before = ksm_counts(), now = before;
	uint64_t nominal = contents_nominal(&t->contents), most = 0;
	double begin = wall_ns(), last = before.cpu;

	*r = (struct run){.ok = true};
	ksm_start();
	while (r->passes < first + n && wall_ns() - begin < TIMEOUT_NS) {
		usleep(POLL_US);
		now = ksm_counts();
		if (now.shared + now.sharing + now.unshared > most)
			most = now.shared + now.sharing + now.unshared;
		if (now.full_scans - before.full_scans == r->passes)
			continue;
		if (++r->passes > first)
			series_add(s, (now.cpu - last) / (double)nominal);
		else
			r->cpu = now.cpu - before.cpu;
		last = now.cpu;
	}
	ksm_stop();
	now = ksm_counts();
	r->frames = nominal - saved_since(&now, &before);
	run_check(r, r->passes == first + n, "ksmd did not come to an end");
	run_check(r, most <= nominal && !others(), "ksmd scanned memory of somebody else too"); /* K2 */
	run_check(r, same_frames(most, nominal), "ksmd does not know all pages");
}

void theirs_check(const struct theirs *t, struct run *r)
{
	const struct contents *c = &t->contents;
	uint64_t wrong = 0;

	for (unsigned g = 0; g < c->guests; g++)
		for (uint64_t page = 0; page < c->pages; page++)
			wrong += !contents_is(c, g, page, t->p[g] + page * PAGE);
	run_check(r, wrong == 0, "ksmd's pages hold something else");
}
