/* SPDX-License-Identifier: MIT */
/*
 * ELF vmlinux: PT_LOAD segments at their physical addresses, entered at
 * e_entry, which Linux's linker script makes the physical address of
 * startup_64. boot_params are the same as for a bzImage, with a header of our
 * own: vmlinux has none. The PVH note (a 32-bit entry) is not used.
 *
 * Invariant E1: segments lie inside the file, above 1 MiB, below 3 GiB, and do not overlap.
 */
#include <elf.h>
#include <errno.h>
#include <string.h>

#include "x86_boot.h"

#define PHDRS_MAX 64u
/* COMMAND_LINE_SIZE of Linux on x86 with its NUL; vmlinux does not say its own. */
#define CMDLINE_MAX 2047u
/* What a bzImage says in initrd_addr_max. */
#define INITRD_LAST 0x7fffffffu

static int refuse(const char **why, int err, const char *text)
{
	*why = text;
	return err;
}

bool elf_is(struct boot_blob image)
{
	return image.len >= SELFMAG && !memcmp(image.data, ELFMAG, SELFMAG);
}

static int check_ehdr(const Elf64_Ehdr *e, size_t len, const char **why)
{
	if (e->e_ident[EI_CLASS] != ELFCLASS64 || e->e_ident[EI_DATA] != ELFDATA2LSB || e->e_machine != EM_X86_64)
		return refuse(why, -EOPNOTSUPP, "not an x86-64 ELF file");
	if (e->e_type != ET_EXEC)
		return refuse(why, -EOPNOTSUPP, "an ELF file, but not an executable with fixed addresses");
	if (e->e_phentsize != sizeof(Elf64_Phdr) || !e->e_phnum || e->e_phnum > PHDRS_MAX)
		return refuse(why, -ENOEXEC, "no usable program headers");
	if (e->e_phoff > len || e->e_phnum * sizeof(Elf64_Phdr) > len - e->e_phoff)
		return refuse(why, -ENOEXEC, "the program headers are beyond the end of the file");
	return 0;
}

static bool overlaps(const struct vmm_region *seen, unsigned n, uint64_t gpa, uint64_t len)
{
	for (unsigned i = 0; i < n; i++)
		if (gpa < seen[i].gpa + seen[i].len && seen[i].gpa < gpa + len)
			return true;
	return false;
}

/* E1. `seen` are the segments before it with their BSS. */
static int add_segment(struct boot_blob image, const Elf64_Phdr *p, struct boot_image *out,
		       struct vmm_region *seen, const char **why)
{
	if (p->p_offset > image.len || p->p_filesz > image.len - p->p_offset)
		return refuse(why, -ENOEXEC, "a segment is beyond the end of the file");
	if (p->p_filesz > p->p_memsz)
		return refuse(why, -ENOEXEC, "a segment is larger in the file than in memory");
	if (p->p_paddr < BOOT_MIB || p->p_paddr > BOOT_HOLE || p->p_memsz > BOOT_HOLE - p->p_paddr)
		return refuse(why, -ENOEXEC, "a segment is not between 1 MiB and 3 GiB");
	if (out->segments == BOOT_SEGMENTS)
		return refuse(why, -ENOEXEC, "too many segments");
	if (overlaps(seen, out->segments, p->p_paddr, p->p_memsz))
		return refuse(why, -ENOEXEC, "segments overlap");
	seen[out->segments] = (struct vmm_region){ p->p_paddr, p->p_memsz };
	out->segment[out->segments++] =
		(struct boot_segment){ p->p_paddr, p->p_filesz, (const char *)image.data + p->p_offset };
	if (out->segments == 1 || p->p_paddr < out->start)
		out->start = p->p_paddr;
	if (p->p_paddr + p->p_memsz > out->end)
		out->end = p->p_paddr + p->p_memsz;
	return 0;
}

static bool inside_segment(const struct boot_image *image, uint64_t gpa)
{
	for (unsigned i = 0; i < image->segments; i++)
		if (gpa >= image->segment[i].gpa && gpa - image->segment[i].gpa < image->segment[i].len)
			return true;
	return false;
}

static void make_header(struct boot_image *out)
{
	out->header = (struct setup_header){ .boot_flag = 0xaa55,
					     .header = 0x53726448,
					     .version = 0x020c,
					     .loadflags = LOADED_HIGH,
					     .kernel_alignment = 0x200000,
					     .cmdline_size = CMDLINE_MAX,
					     .initrd_addr_max = INITRD_LAST };
	out->cmdline_max = CMDLINE_MAX;
	out->initrd_last = INITRD_LAST;
}

int elf_parse(struct boot_blob image, struct boot_image *out, const char **why)
{
	struct vmm_region seen[BOOT_SEGMENTS];
	Elf64_Ehdr e;
	Elf64_Phdr p;
	int err;

	if (!elf_is(image) || image.len < sizeof(e))
		return refuse(why, -ENOEXEC, "the ELF header is cut short");
	memcpy(&e, image.data, sizeof(e));
	err = check_ehdr(&e, image.len, why);
	for (unsigned i = 0; !err && i < e.e_phnum; i++) {
		memcpy(&p, (const char *)image.data + e.e_phoff + i * sizeof(p), sizeof(p));
		if (p.p_type == PT_LOAD && p.p_memsz)
			err = add_segment(image, &p, out, seen, why);
	}
	if (err)
		return err;
	if (!inside_segment(out, e.e_entry))
		return refuse(why, -ENOEXEC, "the entry is in no segment");
	make_header(out);
	out->entry = e.e_entry;
	return 0;
}
