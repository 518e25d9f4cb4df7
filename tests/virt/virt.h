/* SPDX-License-Identifier: MIT */
/*
 * The virt suite: the programs of tests/kvm and tests/vmm inside virtual machines, on a real kernel's /dev/kvm.
 *
 * structures
 *	leg		one machine and what runs in it: read from tests/virt/legs/NAME
 *	test		one program of a leg, and what came of it
 *	run		one start of the machine: how it ended
 *	paths		where things lie
 *
 * Files, in the order in which a leg goes through them: supervise.c (folders; who cleans up), leg.c (the description),
 * initramfs.c with elf.c (what the machine boots), sweep.c (what earlier runs left), domain.c (libvirt: define, start,
 * watch, destroy), result.c (what the console says), main.c (the order of all this). beside.h: the program that has guests of its own.
 *
 * invariants
 *	V1. What counts is on the console: a test that has no VIRT-END line has failed, and so has a
 *	    leg without VIRT-DONE, or whose kernel came up in another mode than `mode` of the leg.
 *	V2. A skip that the leg's list does not have fails, and so does one of the list that did not happen.
 *	V3. No machine outlives the harness: domain.c destroys, supervise.c kills what is left of the root, and the next
 *	    start of any leg looks again (sweep.c).
 */
#ifndef KAGE_TESTS_VIRT_H
#define KAGE_TESTS_VIRT_H

#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define ROOTS	"/tmp/kage-virt-" /* the user's number and a hash of the output folder follow */
#define RELEASE "bookworm" /* of Debian, whose kernel programs boot that read no description */
#define PASSED	0
#define FAILED	1
#define SKIPPED 77
#define MAX	128 /* tests, skips, files of a leg */

struct test {
	char *name, *command; /* command: [VARIABLE=value]... PROGRAM ARGUMENT... */
	unsigned seconds;     /* until it is stopped */
	/* result.c */
	bool begun, ended;
	int status;
	unsigned took, passed, failed, skips;
};

struct skip {
	char *pattern; /* fnmatch() on "TEST: text" */
	unsigned seen; /* result.c */
};

struct leg {
	const char *name;
	const struct machine *machine;
	char *suite, *cpu, *mode; /* suite of Debian: a release's codename, or its backports */
	char *cmdline; /* more of it; NULL */
	unsigned mib;
	unsigned boot; /* seconds until it must have said something; 0: BOOT_SECONDS */
	char *module[MAX], *file[MAX];
	char *background; /* a program that runs beside all tests */
	unsigned modules, files, tests, skips;
	struct test test[MAX];
	struct skip skip[MAX];
	/* result.c */
	char kernel[256];
	unsigned bad; /* complaints that belong to no test */
	bool done, panic, locked;
};

/* What a kind of machine is called by whom. */
struct machine {
	const char *arch;     /* of libvirt and of programs */
	const char *debian;
	const char *emulator, *package;
	const char *type, *console;
	const char *features; /* of the domain's XML */
	const char *qemu;     /* arguments that libvirt has no element for, as XML */
	uint16_t elf;	      /* e_machine */
};

struct paths {
	const char *source;   /* Kage's sources */
	const char *programs; /* a build folder of the machine's architecture */
	const char *sysroot;  /* prefix of its libraries, "" here */
	char out[400];	      /* of this leg: console, initramfs */
	char boot[400];	      /* kernel and busybox, made by fetch.sh */
	char root[100];	      /* libvirt's; short: a socket's path has 107 characters */
	char ram[150];	      /* where RAM files lie (memory_backing_dir of qemu.conf); "": where libvirt likes */
	bool verbose;
};

enum ended {
	ENDED_OFF,     /* switched off, or reset */
	ENDED_STUCK,   /* destroyed: it was silent for too long */
	ENDED_CRASHED, /* QEMU failed */
	ENDED_NEVER,   /* it could not be started */
};

/* What the watcher asks while the machine runs: is there news, and how long may it be silent from here on? */
#define WATCH_ENOUGH UINT_MAX
struct watch {
	unsigned (*look)(void *opaque); /* seconds; 0: nothing new; WATCH_ENOUGH: it is to be destroyed */
	void *opaque;
};

/* leg.c. Errors are printed; false then. */
bool leg_read(struct leg *leg, const char *path);
bool leg_read_skips(struct leg *leg, const char *path);
bool leg_only(struct leg *leg, char **names, int count);
char *leg_program(const struct test *test, char *buf, size_t size);

/* elf.c */
bool elf_add_program(FILE *archive, const char *path, const char *as, const struct paths *paths, uint16_t machine);
bool elf_add_libgcc(FILE *archive, const struct paths *paths, uint16_t machine);

/* initramfs.c */
bool cpio_add(FILE *archive, const char *from, const char *as, unsigned mode);
bool cpio_has(const char *as);
bool initramfs_plain(const struct paths *paths, const char *init, const char *name); /* busybox and a script */
bool initramfs_make(const struct leg *leg, const struct paths *paths);

/* supervise.c: what programs that run domains have in common */
bool make_paths(struct paths *paths, const char *out, const char *name, const char *debian, const char *suite);
int fetch(const struct paths *paths, const char *debian, const char *suite);
int build_programs(const struct paths *paths);
/* Calls `work` in a process of its own; the result is its, or FAILED: then what is left of the root's QEMUs is dead. */
int supervised(int (*work)(void), const char *root);

/* sweep.c: the folder of a connection, whose lock says that its run lives; what runs that were killed left behind */
bool take_root(const struct paths *paths);
bool make_folder(const char *path);
void remove_tree(const char *path);
void ram_folder(const char *root, char *path, size_t size);
void kill_strays(const char *root);
void sweep(void);

/* domain.c */
const char *domain_missing(const struct machine *machine);
int domain_open(const struct paths *paths);
struct _virConnect *domain_connection(void);
void domain_close(void);
enum ended domain_run(const struct leg *leg, const struct paths *paths, const struct watch *watch);

/* result.c */
bool result_begin(struct leg *leg, const struct paths *paths);
unsigned result_look(void *leg);
void result_end(void);
int result_report(struct leg *leg, const struct paths *paths, enum ended ended, unsigned seconds);
bool result_machine_failed(const struct leg *leg, enum ended ended);

static inline void fill(char *buf, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
static inline void fill(char *buf, size_t size, const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	if (vsnprintf(buf, size, format, ap) >= (int)size)
		fprintf(stderr, "virt: too long: %s\n", buf);
	va_end(ap);
}

#endif
