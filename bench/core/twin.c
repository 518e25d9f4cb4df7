/* SPDX-License-Identifier: MIT */
/*
 * A process beside this one with as much memory as a guest, for what fork() costs
 * and what /proc says. It is this program executed anew, so that no memory of the
 * benchmark's is in its figures, and does one thing a line on its standard input:
 *
 *   f         forks; CPU ns of it
 *   w         forks, writes to a page of each of TWIN_SPOTS ranges; CPU ns a write
 *   m         KiB: page tables
 *   c N       forks N children; KiB of one child: page tables, private memory
 *
 * Memory, all of it mapped by 4 KiB entries that are present:
 *   TWIN_REAL   anonymous, as much as is said
 *   TWIN_MANY   128 MiB of a memfd mapped privately over and over, one page of each mapping written (a
 * private mapping of a file is copied by fork() only if it has such a page). fork() copies as many entries as
 * of a real process and counts as many references, in 32 times to 2,048 times fewer struct pages: it misses
 * the cache less often than in a real process, so this is the peer's best TWIN_HUGE   anonymous, in 2 MiB
 * pages
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core.h"

#define PIECE	 (128 * MIB)
#define POPULATE 22 /* MADV_POPULATE_READ */
#define CHILDREN 16

/* -- the other side ------------------------------------------------------------------ */

struct memory {
	enum twin_kind kind;
	uint64_t bytes, piece;
	char *at;
	uint64_t round;
};

/* A line "name: N kB" of a file of /proc; 0 if there is none. */
static double proc_kib(int pid, const char *file, const char *name)
{
	char path[64], line[256];
	double kib = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
	f = fopen(path, "r");
	while (f && kib == 0 && fgets(line, sizeof(line), f))
		if (!strncmp(line, name, strlen(name)) && line[strlen(name)] == ':')
			sscanf(line + strlen(name) + 1, "%lf", &kib);
	if (f)
		fclose(f);
	return kib;
}

static void map_piece(struct memory *m, int fd, uint64_t at)
{
	int flags = MAP_FIXED | MAP_PRIVATE | (fd < 0 ? MAP_ANONYMOUS : 0);
	char *p = must_map(mmap(m->at + at, m->piece, PROT_READ | PROT_WRITE, flags, fd, 0), "mmap");

	must(madvise(p, m->piece, m->kind == TWIN_HUGE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) ? -errno : 0,
	     "madvise");
	if (fd < 0) {
		for (uint64_t i = 0; i < m->piece; i += PAGE)
			*(volatile uint64_t *)(p + i) = at + i + 1;
		return;
	}
	for (uint64_t i = 0; i < m->piece && madvise(p, m->piece, POPULATE); i += PAGE)
		(void)*(volatile uint64_t *)(p + i); /* before Linux 5.14 */
	*(volatile uint64_t *)p = at + 1;
}

static int shared_file(void)
{
	int fd = memfd_create("kage-bench", MFD_CLOEXEC);
	char *p;

	must(fd < 0 || ftruncate(fd, (off_t)PIECE) ? -errno : 0, "memfd");
	p = must_map(mmap(NULL, PIECE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), "mmap");
	for (uint64_t i = 0; i < PIECE; i += PAGE)
		*(volatile uint64_t *)(p + i) = i + 1;
	munmap(p, PIECE);
	return fd;
}

static void map_all(struct memory *m)
{
	int fd = m->kind == TWIN_MANY ? shared_file() : -1;
	uintptr_t room;

	m->piece = m->bytes < PIECE ? m->bytes : PIECE;
	room = (uintptr_t)must_map(
	    mmap(NULL, m->bytes + PIECE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
	    "mmap");
	m->at = (char *)((room + PIECE - 1) & ~(PIECE - 1));
	for (uint64_t at = 0; at < m->bytes; at += m->piece)
		map_piece(m, fd, at);
}

static void write_spots(const struct memory *m)
{
	for (unsigned i = 0; i < TWIN_SPOTS; i++)
		*(volatile uint64_t *)(m->at + m->bytes / TWIN_SPOTS * i) = m->round + i;
}

/* The pages are anonymous before the fork, and shared with the child after it. */
static double write_after_fork(struct memory *m)
{
	struct host_child c;
	double ns;

	m->round++;
	write_spots(m);
	c = host_fork(&ns);
	m->round++;
	ns = cpu_ns();
	write_spots(m);
	ns = cpu_ns() - ns;
	host_reap(c);
	return ns / TWIN_SPOTS;
}

/* fork(), and that the child has the memory's page tables; those of libraries are not copied. */
static double fork_once(const struct memory *m)
{
	double ns, tables = (double)(m->bytes / (m->kind == TWIN_HUGE ? GIB : 2 * MIB)) * 4;
	struct host_child c = host_fork(&ns);
	bool ok = proc_kib(c.pid, "status", "VmPTE") >= tables;

	host_reap(c);
	return ok ? ns : -1;
}

static void children(unsigned n)
{
	struct host_child c[CHILDREN];
	unsigned left = n;
	double ns, tables = 0, private = 0;

	for (unsigned i = 0; i < n; i++)
		c[i] = host_fork(&ns);
	for (unsigned i = 0; i < n; i++) {
		tables += proc_kib(c[i].pid, "status", "VmPTE");
		private += proc_kib(c[i].pid, "smaps_rollup", "Private_Dirty");
	}
	while (left)
		host_reap(c[--left]); /* the last first: later ones have the earlier ones' pipes */
	printf("%f %f\n", tables / n, private / n);
}

int twin_main(int argc, char **argv)
{
	struct memory m = {.kind = argc == 4 ? atoi(argv[2]) : 0,
			   .bytes = argc == 4 ? strtoull(argv[3], NULL, 0) : 0};
	char line[64];

	if (!m.bytes)
		return 2;
	map_all(&m);
	puts("0 0"); /* ready */
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (line[0] == 'f')
			printf("%f 0\n", fork_once(&m));
		else if (line[0] == 'w')
			printf("%f 0\n", write_after_fork(&m));
		else if (line[0] == 'm')
			printf("%f 0\n", proc_kib(getpid(), "status", "VmPTE"));
		else
			children((unsigned)atoi(line + 1) % (CHILDREN + 1));
		fflush(stdout);
	}
	return 0;
}

/* -- this side -------------------------------------------------------------------------- */

struct twin twin_start(enum twin_kind kind, uint64_t bytes)
{
	char kind_text[16], bytes_text[32];
	struct twin t;
	int in[2], out[2];

	snprintf(kind_text, sizeof(kind_text), "%d", (int)kind);
	snprintf(bytes_text, sizeof(bytes_text), "%llu", (unsigned long long)bytes);
	must(pipe(in) || pipe(out) ? -errno : 0, "pipe");
	fflush(stdout);
	t.pid = fork();
	must(t.pid < 0 ? -errno : 0, "fork");
	if (t.pid == 0) {
		dup2(in[0], 0);
		dup2(out[1], 1);
		for (int fd = 3; fd < 64; fd++)
			close(fd);
		execl("/proc/self/exe", "twin", "--twin", kind_text, bytes_text, (char *)NULL);
		_exit(127);
	}
	close(in[0]);
	close(out[1]);
	t.to = fdopen(in[1], "w");
	t.from = fdopen(out[0], "r");
	must(t.to && t.from ? 0 : -ENOMEM, "pipe");
	return t;
}

double twin_ask(struct twin *t, const char *what, double *second)
{
	double a, b;

	if (!t->ready) {
		t->ready = true;
		twin_ask(t, "", NULL);
	}
	if (*what) {
		fprintf(t->to, "%s\n", what);
		fflush(t->to);
	}
	must(fscanf(t->from, "%lf %lf", &a, &b) == 2 ? 0 : -EIO, "the process beside this one");
	if (second)
		*second = b;
	return a;
}

void twin_stop(struct twin *t)
{
	fclose(t->to);
	fclose(t->from);
	while (waitpid(t->pid, NULL, 0) < 0 && errno == EINTR)
		;
}

double sample_twin_fork(void *arg)
{
	return twin_ask(arg, "f", NULL);
}

double sample_twin_write(void *arg)
{
	return twin_ask(arg, "w", NULL);
}

double own_kib(const char *file, const char *name)
{
	return proc_kib(getpid(), file, name);
}
