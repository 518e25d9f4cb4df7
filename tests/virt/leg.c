/* SPDX-License-Identifier: MIT */
/*
 * Descriptions of legs: text, one keyword and its value a line, # for comments.
 *
 *	machine NAME		x86_64 or aarch64
 *	cpu MODEL [+F] [-F]	libvirt's name of the CPU; features that it must have or must not
 *	suite SUITE		where the kernel comes from, by codename: bookworm, bookworm-backports
 *	memory MIB
 *	cmdline TEXT		more for the kernel's command line
 *	boot SECONDS		how long it may be silent where no test runs (180)
 *	module NAME [PARAMETER=VALUE]...
 *	background PROGRAM	runs beside all tests
 *	mode TEXT		what the kernel must say of its KVM
 *	file SOURCE-FILE	a file of the source tree that tests read, below /kage
 *	test NAME SECONDS [VARIABLE=VALUE]... PROGRAM [ARGUMENT]...
 *
 * PROGRAM is a path in the build folder, and below /kage in the machine. The skips that a leg is known for stand in
 * NAME.skips, one a line: "TEST: text", as fnmatch(3) has it.
 */
#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "virt.h"

static const struct machine machines[] = {
	{ .arch = "x86_64", .debian = "amd64", .emulator = "qemu-system-x86_64", .package = "qemu-system-x86",
	  .type = "pc", .console = "ttyS0", .features = "<acpi/><apic/>", .qemu = "", .elf = EM_X86_64 },
	{ .arch = "aarch64", .debian = "arm64", .emulator = "qemu-system-aarch64", .package = "qemu-system-arm",
	  .type = "virt", .console = "ttyAMA0", .features = "<gic version='3'/>", .elf = EM_AARCH64,
	  .qemu = "<qemu:commandline><qemu:arg value='-machine'/><qemu:arg value='virtualization=on'/>"
		  "</qemu:commandline>" },
};

static const struct machine *find_machine(const char *name)
{
	for (size_t i = 0; i < sizeof(machines) / sizeof(machines[0]); i++)
		if (!strcmp(machines[i].arch, name))
			return &machines[i];
	return NULL;
}

static bool add(char **list, unsigned *count, char *value)
{
	if (*count == MAX)
		return false;
	list[(*count)++] = value;
	return true;
}

static bool add_test(struct leg *leg, char *value)
{
	struct test *t = &leg->test[leg->tests];
	char *rest = NULL;

	if (leg->tests == MAX)
		return false;
	t->name = strtok_r(value, " ", &rest);
	value = strtok_r(NULL, " ", &rest);
	t->seconds = value ? (unsigned)atoi(value) : 0;
	t->command = strtok_r(NULL, "", &rest);
	leg->tests++;
	return t->seconds && t->command;
}

static bool set(struct leg *leg, const char *key, char *value)
{
	if (!strcmp(key, "machine"))
		return (leg->machine = find_machine(value));
	if (!strcmp(key, "cpu"))
		return (leg->cpu = value);
	if (!strcmp(key, "suite"))
		return (leg->suite = value);
	if (!strcmp(key, "mode"))
		return (leg->mode = value);
	if (!strcmp(key, "cmdline"))
		return (leg->cmdline = value);
	if (!strcmp(key, "background"))
		return (leg->background = value);
	if (!strcmp(key, "memory"))
		return (leg->mib = (unsigned)atoi(value));
	if (!strcmp(key, "boot"))
		return (leg->boot = (unsigned)atoi(value));
	if (!strcmp(key, "module"))
		return add(leg->module, &leg->modules, value);
	if (!strcmp(key, "file"))
		return add(leg->file, &leg->files, value);
	return !strcmp(key, "test") && add_test(leg, value);
}

/* Each line that is not empty and no comment; they live as long as the process. */
static bool each_line(const char *path, bool (*use)(struct leg *, char *), struct leg *leg)
{
	FILE *f = fopen(path, "r");
	char *line = NULL;
	size_t room = 0;
	bool good = f;

	if (!f)
		fprintf(stderr, "virt: %s: %s\n", path, strerror(errno));
	for (int n = 1; good && getline(&line, &room, f) > 0; n++) {
		line[strcspn(line, "\n")] = 0;
		if (!line[0] || line[0] == '#')
			continue;
		good = use(leg, line);
		if (!good)
			fprintf(stderr, "virt: %s:%d: not understood\n", path, n);
		line = NULL;
		room = 0;
	}
	free(line);
	if (f)
		fclose(f);
	return good;
}

static bool use_line(struct leg *leg, char *line)
{
	char *value = line + strcspn(line, " ");

	if (!*value)
		return false;
	*value++ = 0;
	return set(leg, line, value + strspn(value, " "));
}

bool leg_read(struct leg *leg, const char *path)
{
	if (!each_line(path, use_line, leg))
		return false;
	if (leg->machine && leg->cpu && leg->suite && leg->mode && leg->mib && leg->tests)
		return true;
	fprintf(stderr, "virt: %s: needs machine, cpu, suite, mode, memory and a test\n", path);
	return false;
}

static bool use_skip(struct leg *leg, char *line)
{
	if (leg->skips == MAX)
		return false;
	leg->skip[leg->skips++].pattern = line;
	return true;
}

bool leg_read_skips(struct leg *leg, const char *path)
{
	return each_line(path, use_skip, leg);
}

/* Of the skips only those that can still happen. */
static void drop_skips(struct leg *leg)
{
	unsigned kept = 0;

	for (unsigned i = 0; i < leg->skips; i++) {
		size_t len = strcspn(leg->skip[i].pattern, ":");

		for (unsigned k = 0; k < leg->tests; k++)
			if (strlen(leg->test[k].name) == len && !strncmp(leg->test[k].name, leg->skip[i].pattern, len)) {
				leg->skip[kept++] = leg->skip[i];
				break;
			}
	}
	leg->skips = kept;
}

/* Only the tests of these names. */
bool leg_only(struct leg *leg, char **names, int count)
{
	unsigned kept = 0;

	for (unsigned i = 0; i < leg->tests; i++)
		for (int k = 0; k < count; k++)
			if (!strcmp(leg->test[i].name, names[k])) {
				leg->test[kept++] = leg->test[i];
				break;
			}
	leg->tests = kept;
	drop_skips(leg);
	if (kept != (unsigned)count)
		fprintf(stderr, "virt: not all of these tests are in leg %s\n", leg->name);
	return kept == (unsigned)count;
}

/* The first word of a command that sets no variable. */
char *leg_program(const struct test *test, char *buf, size_t size)
{
	const char *word = test->command;
	size_t len = strcspn(word, " ");

	while (memchr(word, '=', len)) {
		word += len + strspn(word + len, " ");
		len = strcspn(word, " ");
	}
	fill(buf, size, "%.*s", (int)len, word);
	return buf;
}
