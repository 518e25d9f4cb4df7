/* SPDX-License-Identifier: MIT */
/*
 * The reference walker (tests/model) against a CPU that somebody else wrote:
 * QEMU's TCG boots the bare-metal guest beside this file, which tries each
 * case of cases.h and reports; each report must be what the reference says.
 *
 * Two things are not compared, because TCG differs from the manual or the
 * manual leaves them open:
 *  - accessed flags of an access that faulted: TCG has set them in the upper
 *    levels already;
 *  - P in the error code of a reserved-bit fault: vol. 3A 4.7 has RSVD only
 *    together with P; TCG reports RSVD alone (target/i386, do_fault_rsvd).
 *
 * usage: test_baremetal QEMU IMAGE; exits 77 (skipped) if either is missing.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cases.h"
#include "x86_reference.h"

#define SKIPPED 77
#define TIMEOUT_MS 60000
#define OUTPUT_MAX (CASES * 64ul + 4096)
#define ERROR_P 1u
#define ERROR_RSVD 8u
#define TABLE(level) (UINT64_C(0x10000) + 0x1000 * (level))

/* -- QEMU ----------------------------------------------------------------- */

static pid_t start_qemu(const char *qemu, const char *image, int *from)
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
		execlp(qemu, qemu, "-accel", "tcg", "-cpu", "max", "-machine", "pc", "-m", "64",
		       "-nodefaults", "-no-reboot", "-display", "none", "-debugcon", "stdio", "-device",
		       "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", image, (char *)NULL);
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

/* Runs the guest; its output, or NULL. The guest leaves by isa-debug-exit with code 0, which QEMU makes 1. */
static char *run_guest(const char *qemu, const char *image)
{
	char *out = calloc(1, OUTPUT_MAX);
	int from, status;
	pid_t pid = out ? start_qemu(qemu, image, &from) : -1;
	bool whole;

	if (pid < 0) {
		free(out);
		return NULL;
	}
	whole = read_all(from, out, OUTPUT_MAX);
	close(from);
	if (!whole)
		kill(pid, SIGKILL);
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	if (whole && WIFEXITED(status) && WEXITSTATUS(status) == 1)
		return out;
	fprintf(stderr, "%s: %s, wait status %x, output: %.200s\n", qemu,
		whole ? "ended" : "timed out or too long", status, out);
	free(out);
	return NULL;
}

/* -- what the reference says ---------------------------------------------- */

static uint64_t *entry_at(uint64_t entries[4], uint64_t gpa)
{
	for (unsigned level = 0; level < 4; level++)
		if (gpa == TABLE(level) + 8 * ((CASE_ADDR >> (12 + 9 * level)) & 511))
			return &entries[level];
	return NULL;
}

static bool read_entry(void *arg, uint64_t gpa, uint64_t *value)
{
	const uint64_t *e = entry_at(arg, gpa);

	if (e)
		*value = *e;
	return e;
}

static bool write_entry(void *arg, uint64_t gpa, uint64_t value)
{
	uint64_t *e = entry_at(arg, gpa);

	if (e)
		*e = value;
	return e;
}

static void fill_entries(const struct pf_case *c, uint64_t entries[4])
{
	for (unsigned level = 0; level < 4; level++) {
		uint64_t to = level ? TABLE(level - 1) : CASE_PAGE;

		if (level == c->leaf)
			to = CASE_PAGE & ~((UINT64_C(1) << (12 + 9 * level)) - 1);
		entries[level] = level < c->leaf ? 0 : to | c->bits[level];
	}
}

static struct ref_cpu cpu_of(const struct pf_case *c, unsigned phys_bits, unsigned cpu)
{
	return (struct ref_cpu){
		.cr0 = 0x80000011 | (c->wp ? 1u << 16 : 0),
		.cr3 = TABLE(3),
		.cr4 = 1u << 5 | (c->smep ? 1u << 20 : 0) | (c->smap ? 1u << 21 : 0) |
		       (c->pke ? 1u << 22 : 0),
		.efer = 0x500 | (c->nxe ? 1u << 11 : 0),
		.rflags = 2 | (c->ac ? 1u << 18 : 0),
		.cpl = c->user ? 3 : 0,
		.pkru = c->pkru,
		.phys_bits = phys_bits,
		.page1gb = cpu & CPU_PAGE1GB,
	};
}

struct report {
	unsigned number, vector, error, flags, good;
	unsigned long cr2;
};

static struct report expect(unsigned number, unsigned phys_bits, unsigned cpu)
{
	static const enum ref_access kinds[] = { REF_READ, REF_WRITE, REF_FETCH };
	struct pf_case c = case_make(number, phys_bits, cpu);
	struct ref_cpu rc = cpu_of(&c, phys_bits, cpu);
	uint64_t entries[4], addr = CASE_ADDR + (c.access == CASE_FETCH ? 0 : CASE_DATA);
	struct ref_memory m = { read_entry, write_entry, entries };
	struct ref_result r;
	struct report e = { .number = number, .vector = 0x80, .good = 1 };

	fill_entries(&c, entries);
	r = ref_translate(&rc, &m, addr, kinds[c.access]);
	if (r.outcome == REF_PAGE_FAULT) {
		e.vector = 14;
		e.error = r.error;
		e.cr2 = addr;
	} else if (r.outcome != REF_OK || r.gpa != (addr & 0x3fffffff)) {
		e.vector = 0; /* no case is made so: never equal */
	}
	for (unsigned level = 0; level < 4; level++)
		e.flags |= (entries[level] >> 5 & 3) << (2 * level);
	return e;
}

/* -- the comparison ------------------------------------------------------- */

struct tally {
	unsigned cases, granted, wrong;
	unsigned errors[64]; /* how often each error code was seen */
};

static bool same_error(unsigned got, unsigned want)
{
	return got == want || ((want & ERROR_RSVD) && (got | ERROR_P) == want);
}

static void compare(struct tally *t, const struct report *got, const struct report *want)
{
	bool same = got->number == want->number && got->vector == want->vector &&
		    same_error(got->error, want->error) && got->cr2 == want->cr2 && got->good == want->good &&
		    (want->vector != 0x80 || got->flags == want->flags);

	t->cases++;
	t->granted += want->vector == 0x80;
	if (want->vector == 14)
		t->errors[want->error & 63]++;
	if (!same && t->wrong++ < 20)
		fprintf(stderr, "case %x: cpu %x %x %x %lx flags %x good %x, reference %x %x %lx flags %x\n",
			want->number, got->number, got->vector, got->error, got->cr2, got->flags, got->good,
			want->vector, want->error, want->cr2, want->flags);
}

static bool read_report(char *line, struct report *r)
{
	return sscanf(line, "%x %x %x %lx %x %x", &r->number, &r->vector, &r->error, &r->cr2, &r->flags,
		      &r->good) == 6;
}

static int check_output(char *out)
{
	struct tally t = { 0 };
	unsigned phys_bits, cpu, kinds = 0;
	char *save, *line = strtok_r(out, "\n", &save);

	if (!line || sscanf(line, "cpu %x %x", &phys_bits, &cpu) != 2) {
		fprintf(stderr, "the guest said: %s\n", line ? line : "nothing");
		return line && strncmp(line, "no smep", 7) == 0 ? SKIPPED : EXIT_FAILURE;
	}
	while ((line = strtok_r(NULL, "\n", &save)) && strcmp(line, "end") != 0) {
		struct report got, want = expect(t.cases, phys_bits, cpu);

		if (!read_report(line, &got)) {
			fprintf(stderr, "the guest said: %s\n", line);
			return EXIT_FAILURE;
		}
		compare(&t, &got, &want);
	}
	for (unsigned i = 0; i < 64; i++)
		kinds += t.errors[i] > 0;
	printf("%u cases, %u went through, %u kinds of error code, %u differ (phys bits %u, features %x)\n",
	       t.cases, t.granted, kinds, t.wrong, phys_bits, cpu);
	/* a sample in which nearly all cases are alike would show nothing */
	if (t.cases != CASES || t.wrong || t.granted < CASES / 10 || kinds < 15)
		return EXIT_FAILURE;
	return EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
	char *out;
	int r;

	if (argc != 3 || !argv[1][0] || !argv[2][0]) {
		puts("skipped: this build has no qemu-system-x86_64 or cannot make an x86-64 image");
		return SKIPPED;
	}
	if (access(argv[2], R_OK)) {
		printf("skipped: no image %s\n", argv[2]);
		return SKIPPED;
	}
	out = run_guest(argv[1], argv[2]);
	if (!out)
		return EXIT_FAILURE;
	r = check_output(out);
	free(out);
	return r;
}
