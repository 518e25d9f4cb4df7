/* SPDX-License-Identifier: MIT */
/*
 * A program and all that it loads, into the archive: the program interpreter at its own path, libraries in /lib.
 *
 * ldd would run the program; this reads PT_INTERP and DT_NEEDED instead (System V gABI, chapter 5), so that it
 * works for programs of another architecture. Only little-endian 64-bit ELF. Libraries are looked for in the
 * build folder and in the usual folders of the sysroot.
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "virt.h"

struct elf {
	const char *base;
	size_t size;
	const Elf64_Ehdr *header;
};

static bool open_elf(struct elf *e, const char *path, uint16_t machine)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;

	e->base = MAP_FAILED;
	if (fd >= 0 && !fstat(fd, &st) && (size_t)st.st_size > sizeof(Elf64_Ehdr)) {
		e->size = (size_t)st.st_size;
		e->base = mmap(NULL, e->size, PROT_READ, MAP_PRIVATE, fd, 0);
	}
	if (fd >= 0)
		close(fd);
	if (e->base == MAP_FAILED)
		return false;
	e->header = (const void *)e->base;
	if (!memcmp(e->base, ELFMAG, SELFMAG) && e->base[EI_CLASS] == ELFCLASS64 && e->header->e_machine == machine &&
	    e->header->e_phoff + (uint64_t)e->header->e_phnum * sizeof(Elf64_Phdr) <= e->size)
		return true;
	munmap((void *)e->base, e->size);
	return false;
}

static const Elf64_Phdr *segment(const struct elf *e, uint32_t type, uint64_t va)
{
	const Elf64_Phdr *p = (const void *)(e->base + e->header->e_phoff);

	for (unsigned i = 0; i < e->header->e_phnum; i++)
		if (p[i].p_type == type && p[i].p_offset + p[i].p_filesz <= e->size &&
		    (!va || (va >= p[i].p_vaddr && va < p[i].p_vaddr + p[i].p_filesz)))
			return &p[i];
	return NULL;
}

static const char *strings(const struct elf *e, const Elf64_Dyn *dyn)
{
	const Elf64_Phdr *p;

	while (dyn->d_tag != DT_NULL && dyn->d_tag != DT_STRTAB)
		dyn++;
	p = dyn->d_tag ? segment(e, PT_LOAD, dyn->d_un.d_ptr) : NULL;
	return p ? e->base + p->p_offset + (dyn->d_un.d_ptr - p->p_vaddr) : NULL;
}

static bool find_library(char *buf, size_t size, const char *name, const struct paths *paths, const char *arch)
{
	const char *const forms[] = { "/lib/%s-linux-gnu/%s", "/usr/lib/%s-linux-gnu/%s", "/usr/%s-linux-gnu/lib/%s" };

	fill(buf, size, "%s/%s", paths->programs, name);
	if (!access(buf, R_OK))
		return true;
	for (unsigned i = 0; i < sizeof(forms) / sizeof(forms[0]); i++) {
		int n = snprintf(buf, size, "%s", paths->sysroot);

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
		snprintf(buf + n, size - (size_t)n, forms[i], arch, name);
#pragma GCC diagnostic pop
		if (!access(buf, R_OK))
			return true;
	}
	fprintf(stderr, "virt: no library %s for %s\n", name, arch);
	return false;
}

static bool add_libraries(FILE *archive, const struct elf *e, const struct paths *paths)
{
	const Elf64_Phdr *p = segment(e, PT_DYNAMIC, 0);
	const char *arch = e->header->e_machine == EM_AARCH64 ? "aarch64" : "x86_64";
	const Elf64_Dyn *first = p ? (const void *)(e->base + p->p_offset) : NULL;
	const char *names = first ? strings(e, first) : NULL;
	char path[PATH_MAX], as[PATH_MAX];

	for (const Elf64_Dyn *dyn = first; names && dyn->d_tag != DT_NULL; dyn++) {
		if (dyn->d_tag != DT_NEEDED || !strncmp(names + dyn->d_un.d_val, "ld-linux", 8))
			continue;
		fill(as, sizeof(as), "lib/%s", names + dyn->d_un.d_val);
		if (cpio_has(as))
			continue;
		if (!find_library(path, sizeof(path), names + dyn->d_un.d_val, paths, arch) ||
		    !elf_add_program(archive, path, as, paths, e->header->e_machine))
			return false;
	}
	return true;
}

/* The C library loads it by name when a thread is cancelled or exits. */
bool elf_add_libgcc(FILE *archive, const struct paths *paths, uint16_t machine)
{
	char path[PATH_MAX];

	return find_library(path, sizeof(path), "libgcc_s.so.1", paths, machine == EM_AARCH64 ? "aarch64" : "x86_64") &&
	       elf_add_program(archive, path, "lib/libgcc_s.so.1", paths, machine);
}

static bool add_interpreter(FILE *archive, const struct elf *e, const struct paths *paths)
{
	const Elf64_Phdr *p = segment(e, PT_INTERP, 0);
	const char *path = p ? e->base + p->p_offset : NULL;
	char from[PATH_MAX];

	if (!path || cpio_has(path + 1))
		return true;
	fill(from, sizeof(from), "%s%s", paths->sysroot, path);
	return cpio_add(archive, from, path + 1, 0755);
}

bool elf_add_program(FILE *archive, const char *path, const char *as, const struct paths *paths, uint16_t machine)
{
	struct elf e;
	bool good;

	if (!open_elf(&e, path, machine)) {
		fprintf(stderr, "virt: %s is no program of the machine's architecture\n", path);
		return false;
	}
	good = cpio_add(archive, path, as, 0755) && add_interpreter(archive, &e, paths) &&
	       add_libraries(archive, &e, paths);
	munmap((void *)e.base, e.size);
	return good;
}
