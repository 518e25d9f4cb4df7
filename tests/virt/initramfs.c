/* SPDX-License-Identifier: MIT */
/*
 * The initramfs of a machine, and the one of the Linux guest that it boots in turn: archives of cpio's
 * "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst), not compressed, because it is an
 * emulated CPU that would have to unpack them.
 *
 *	/init /bin/busybox /leg /modules		the machine
 *	/kage/...				programs and files of the tests
 *	/vmlinuz /vmlinux /inner.cpio		what test_linux.c boots
 */
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "virt.h"

/* Names in the archive that is being written, folders too. */
static char *added[1024];
static unsigned names;

bool cpio_has(const char *as)
{
	for (unsigned i = 0; i < names; i++)
		if (!strcmp(added[i], as))
			return true;
	return false;
}

static void pad(FILE *archive)
{
	while (ftell(archive) & 3)
		fputc(0, archive);
}

static void put_header(FILE *archive, const char *as, unsigned mode, size_t size)
{
	/* ino, mode, uid, gid, nlink, mtime, filesize, device and rdevice, namesize, check */
	fprintf(archive, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", names + 1, mode, 0, 0, 1, 0,
		(unsigned)size, 0, 0, 0, 0, (unsigned)strlen(as) + 1, 0);
	fwrite(as, 1, strlen(as) + 1, archive);
	pad(archive);
}

static bool remember(const char *as)
{
	if (names == sizeof(added) / sizeof(added[0])) {
		fprintf(stderr, "virt: too many files in an initramfs\n");
		return false;
	}
	added[names] = strdup(as);
	return added[names++];
}

static bool add_folders(FILE *archive, const char *as)
{
	char folder[PATH_MAX];

	for (const char *slash = strchr(as, '/'); slash; slash = strchr(slash + 1, '/')) {
		fill(folder, sizeof(folder), "%.*s", (int)(slash - as), as);
		if (cpio_has(folder))
			continue;
		if (!remember(folder))
			return false;
		put_header(archive, folder, S_IFDIR | 0755, 0);
	}
	return true;
}

static bool add_bytes(FILE *archive, const void *bytes, size_t size, const char *as, unsigned mode)
{
	if (!add_folders(archive, as) || !remember(as))
		return false;
	put_header(archive, as, S_IFREG | mode, size);
	fwrite(bytes, 1, size, archive);
	pad(archive);
	return true;
}

/* The file `from`, as `as` (no / before it). */
bool cpio_add(FILE *archive, const char *from, const char *as, unsigned mode)
{
	FILE *f = fopen(from, "r");
	char *bytes = NULL;
	struct stat st;
	bool good;

	if (!f || fstat(fileno(f), &st)) {
		fprintf(stderr, "virt: %s: %s\n", from, strerror(errno));
		if (f)
			fclose(f);
		return false;
	}
	bytes = malloc((size_t)st.st_size + 1);
	good = bytes && fread(bytes, 1, (size_t)st.st_size, f) == (size_t)st.st_size &&
	       add_bytes(archive, bytes, (size_t)st.st_size, as, mode);
	free(bytes);
	fclose(f);
	return good;
}

static FILE *cpio_begin(const char *path)
{
	FILE *f = fopen(path, "w");

	while (names)
		free(added[--names]);
	if (!f)
		fprintf(stderr, "virt: %s: %s\n", path, strerror(errno));
	return f;
}

static bool cpio_end(FILE *archive, bool good)
{
	put_header(archive, "TRAILER!!!", 0, 0);
	good &= !ferror(archive);
	if (fclose(archive))
		good = false;
	if (!good)
		fprintf(stderr, "virt: an initramfs could not be written\n");
	return good;
}

static bool add_from(FILE *archive, const char *folder, const char *name, const char *as, unsigned mode)
{
	char from[PATH_MAX];

	fill(from, sizeof(from), "%s/%s", folder, name);
	return cpio_add(archive, from, as, mode);
}

bool initramfs_plain(const struct paths *paths, const char *init, const char *name)
{
	char path[PATH_MAX];
	FILE *f;

	fill(path, sizeof(path), "%s/%s", paths->out, name);
	f = cpio_begin(path);
	return f && cpio_end(f, add_from(f, paths->boot, "busybox", "bin/busybox", 0755) &&
				add_from(f, paths->source, init, "init", 0755));
}

/* /leg, for init.sh. */
static bool add_description(FILE *archive, const struct leg *leg)
{
	char *text = NULL, program[PATH_MAX];
	size_t size = 0;
	FILE *f = open_memstream(&text, &size);
	bool good;

	if (!f)
		return false;
	for (unsigned i = 0; i < leg->modules; i++)
		fprintf(f, "module %s\n", leg->module[i]);
	if (leg->background)
		fprintf(f, "background /kage/%s\n", leg->background);
	for (unsigned i = 0; i < leg->tests; i++) {
		const struct test *t = &leg->test[i];
		const char *at = strstr(t->command, leg_program(t, program, sizeof(program)));

		fprintf(f, "test %s %u %.*s/kage/%s\n", t->name, t->seconds, (int)(at - t->command), t->command, at);
	}
	good = !fclose(f) && add_bytes(archive, text, size, "leg", 0644);
	free(text);
	return good;
}

static bool add_modules(FILE *archive, const struct leg *leg, const struct paths *paths)
{
	char name[PATH_MAX], from[PATH_MAX];

	for (unsigned i = 0; i < leg->modules; i++) {
		fill(name, sizeof(name), "modules/%.*s.ko", (int)strcspn(leg->module[i], " "), leg->module[i]);
		fill(from, sizeof(from), "%s/%s", paths->boot, name);
		if (!cpio_has(name) && !cpio_add(archive, from, name, 0644))
			return false;
	}
	return true;
}

static bool add_program(FILE *archive, const char *program, const struct leg *leg, const struct paths *paths)
{
	char from[PATH_MAX], as[PATH_MAX];

	fill(from, sizeof(from), "%s/%s", paths->programs, program);
	fill(as, sizeof(as), "kage/%s", program);
	return cpio_has(as) || elf_add_program(archive, from, as, paths, leg->machine->elf);
}

static bool add_tests(FILE *archive, const struct leg *leg, const struct paths *paths)
{
	char program[PATH_MAX / 2], as[PATH_MAX];

	if (!elf_add_libgcc(archive, paths, leg->machine->elf))
		return false;
	if (leg->background && !add_program(archive, leg->background, leg, paths))
		return false;
	for (unsigned i = 0; i < leg->tests; i++)
		if (!add_program(archive, leg_program(&leg->test[i], program, sizeof(program)), leg, paths))
			return false;
	for (unsigned i = 0; i < leg->files; i++) {
		fill(as, sizeof(as), "kage/%s", leg->file[i]);
		if (!add_from(archive, paths->source, leg->file[i], as, 0644))
			return false;
	}
	return true;
}

/* Does a test name this file of the machine? */
static bool wanted(const struct leg *leg, const char *path)
{
	for (unsigned i = 0; i < leg->tests; i++) {
		const char *at = strstr(leg->test[i].command, path);

		if (at && (!at[strlen(path)] || at[strlen(path)] == ' '))
			return true;
	}
	return false;
}

static bool add_guest(FILE *archive, const struct leg *leg, const struct paths *paths)
{
	return (!wanted(leg, "/vmlinuz") || add_from(archive, paths->boot, "vmlinuz", "vmlinuz", 0644)) &&
	       (!wanted(leg, "/vmlinux") || add_from(archive, paths->boot, "vmlinux", "vmlinux", 0644)) &&
	       (!wanted(leg, "/inner.cpio") || add_from(archive, paths->out, "inner.cpio", "inner.cpio", 0644));
}

/* OUT/initramfs */
bool initramfs_make(const struct leg *leg, const struct paths *paths)
{
	char path[PATH_MAX];
	FILE *f;

	if (!initramfs_plain(paths, "tests/vmm/linux_init.sh", "inner.cpio"))
		return false;
	fill(path, sizeof(path), "%s/initramfs", paths->out);
	f = cpio_begin(path);
	return f && cpio_end(f, add_from(f, paths->boot, "busybox", "bin/busybox", 0755) &&
				add_from(f, paths->source, "tests/virt/init.sh", "init", 0755) &&
				add_description(f, leg) && add_modules(f, leg, paths) && add_tests(f, leg, paths) &&
				add_guest(f, leg, paths));
}
