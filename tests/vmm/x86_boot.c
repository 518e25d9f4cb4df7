/* SPDX-License-Identifier: MIT */
/*
 * Direct boot: lays out kernel, initramfs, command line, boot_params, page
 * tables and GDT in guest memory. See x86_boot.h for the layout and B1 to B4.
 *
 * A plan is made first (struct plan: which image, where everything goes) and
 * written afterwards. The tables are built in buffers of this process and
 * written whole, so that nothing here holds a pointer to guest memory.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "x86_boot.h"

#define PAGE	     ((uint64_t)4096)
#define E820_RAM     1u
#define E820_RESERVED 2u

/* Six pages: one of level 4, one of level 3, four of 2 MiB entries. */
#define TABLE_PAGES 6
#define PTE_TABLE   0x03u /* present, writable */
#define PTE_2M	    0x83u
#define ACPI_MAX    8192u

struct plan {
	struct boot_image image;
	uint64_t low_end; /* of RAM below BOOT_HOLE */
	uint64_t initrd;
	size_t cmdline_len;
};

static int refuse(const char **why, int err, const char *text)
{
	*why = text;
	return err;
}

/* -- the plan ------------------------------------------------------------------------ */

static int parse_image(struct boot_blob kernel, struct boot_image *out, const char **why)
{
	memset(out, 0, sizeof(*out));
	if (elf_is(kernel))
		return elf_parse(kernel, out, why);
	if (bzimage_is(kernel))
		return bzimage_parse(kernel, out, why);
	return refuse(why, -ENOEXEC, "neither a bzImage nor an ELF file");
}

/* The end of RAM, as high as the kernel can reach: far from where the kernel unpacks itself. */
static int place_initrd(struct plan *plan, size_t len, const char **why)
{
	uint64_t top = plan->low_end;

	if (!len)
		return 0;
	if (len > UINT32_MAX)
		return refuse(why, -ENOSPC, "the initramfs is larger than 4 GiB");
	if (plan->image.initrd_last < top)
		top = plan->image.initrd_last + 1;
	if (top < len || ((top - len) & ~(PAGE - 1)) < plan->image.end)
		return refuse(why, -ENOSPC, "RAM is too small for kernel and initramfs");
	plan->initrd = (top - len) & ~(PAGE - 1);
	return 0;
}

/* As vmm_pc_layout() does it: from 0 to 3 GiB at most, then from 4 GiB on. */
static bool is_pc(const struct vmm_ram *ram)
{
	if (!ram->regions || ram->region[0].gpa || ram->region[0].len < BOOT_RAM_MIN ||
	    ram->region[0].len > BOOT_HOLE)
		return false;
	for (unsigned i = 0; i < ram->regions; i++)
		if ((ram->region[i].gpa | ram->region[i].len) % PAGE || (i && ram->region[i].gpa < BOOT_HIGH))
			return false;
	return true;
}

static int make_plan(const struct vmm_ram *ram, const struct boot_config *config, struct plan *plan,
		     const char **why)
{
	int err;

	memset(plan, 0, sizeof(*plan));
	if (!is_pc(ram))
		return refuse(why, -EINVAL, "RAM must begin at 0, be at least 16 MiB, and leave out 3 to 4 GiB");
	if (!config->cpus || config->cpus > BOOT_CPUS_MAX)
		return refuse(why, -EINVAL, "1 to 255 CPUs");
	err = parse_image(config->kernel, &plan->image, why);
	if (err)
		return err;
	plan->low_end = ram->region[0].len;
	if (plan->image.start < BOOT_MIB)
		return refuse(why, -ENOEXEC, "the kernel wants to be below 1 MiB");
	if (plan->image.end > plan->low_end)
		return refuse(why, -ENOSPC, "RAM is too small for the kernel");
	plan->cmdline_len = config->cmdline ? strlen(config->cmdline) : 0;
	if (plan->cmdline_len > plan->image.cmdline_max || plan->cmdline_len >= BOOT_CMDLINE_MAX)
		return refuse(why, -E2BIG, "the command line is longer than the kernel takes");
	return place_initrd(plan, config->initrd.len, why);
}

/* -- tables -------------------------------------------------------------------------- */

static void add_e820(struct boot_params *bp, uint64_t gpa, uint64_t len, uint32_t type)
{
	if (len)
		bp->e820_table[bp->e820_entries++] =
			(struct boot_e820_entry){ .addr = gpa, .size = len, .type = type };
}

static void fill_e820(struct boot_params *bp, const struct vmm_ram *ram)
{
	add_e820(bp, 0, BOOT_LOW_TOP, E820_RAM);
	add_e820(bp, BOOT_LOW_TOP, BOOT_MIB - BOOT_LOW_TOP, E820_RESERVED);
	add_e820(bp, BOOT_MIB, ram->region[0].len - BOOT_MIB, E820_RAM);
	for (unsigned i = 1; i < ram->regions; i++)
		add_e820(bp, ram->region[i].gpa, ram->region[i].len, E820_RAM);
}

static void fill_params(struct boot_params *bp, const struct vmm_ram *ram, const struct boot_config *config,
			const struct plan *plan)
{
	memset(bp, 0, sizeof(*bp)); /* also `sentinel`: the rest is known to be initialised */
	bp->hdr = plan->image.header;
	bp->hdr.type_of_loader = 0xff; /* no number assigned */
	bp->hdr.cmd_line_ptr = BOOT_CMDLINE;
	bp->hdr.ramdisk_image = (uint32_t)plan->initrd;
	bp->hdr.ramdisk_size = (uint32_t)config->initrd.len;
	bp->acpi_rsdp_addr = BOOT_ACPI;
	fill_e820(bp, ram);
}

static void fill_tables(uint64_t *t)
{
	memset(t, 0, TABLE_PAGES * PAGE);
	t[0] = (BOOT_TABLES + PAGE) | PTE_TABLE;
	for (unsigned i = 0; i < 4; i++)
		t[512 + i] = (BOOT_TABLES + (2 + i) * PAGE) | PTE_TABLE;
	for (uint64_t i = 0; i < 4 * 512; i++)
		t[1024 + i] = (i << 21) | PTE_2M;
}

/* __BOOT_CS is 0x10 and __BOOT_DS 0x18 (boot.rst); a task segment follows, as VMX wants one. */
static const uint64_t gdt[] = { 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x008f8b000000ffff, 0 };

static_assert(sizeof(struct boot_params) == 4096, "the zero page is a page");
static_assert(BOOT_TABLES + TABLE_PAGES * 4096 <= BOOT_CMDLINE, "tables end before the command line");
static_assert(BOOT_CMDLINE + BOOT_CMDLINE_MAX <= BOOT_LOW_TOP, "the command line lies in RAM");
static_assert(BOOT_GDT + sizeof(gdt) <= BOOT_PARAMS, "the GDT ends before boot_params");

/* -- writing ------------------------------------------------------------------------- */

static int put(struct vmm_ram *ram, uint64_t gpa, const void *data, size_t len, const char **why)
{
	int err = len ? ram->ops->write(ram, gpa, data, len) : 0;

	return err ? refuse(why, err, "cannot write guest memory") : 0;
}

/* Scratch for the tables. */
struct pages {
	struct boot_params params;
	uint64_t tables[TABLE_PAGES * 512];
	uint8_t acpi[ACPI_MAX];
};

static int put_tables(struct vmm_ram *ram, const struct boot_config *config, const struct plan *plan,
		      struct pages *pages, const char **why)
{
	int acpi = acpi_build(config->cpus, pages->acpi, sizeof(pages->acpi)), err;

	if (acpi < 0)
		return refuse(why, acpi, "cannot build the ACPI tables");
	fill_params(&pages->params, ram, config, plan);
	fill_tables(pages->tables);
	err = put(ram, BOOT_ACPI, pages->acpi, (size_t)acpi, why);
	if (!err)
		err = put(ram, BOOT_PARAMS, &pages->params, sizeof(pages->params), why);
	if (!err)
		err = put(ram, BOOT_TABLES, pages->tables, sizeof(pages->tables), why);
	if (!err)
		err = put(ram, BOOT_GDT, gdt, sizeof(gdt), why);
	if (!err)
		err = put(ram, BOOT_CMDLINE, config->cmdline ? config->cmdline : "", plan->cmdline_len + 1, why);
	return err;
}

static int put_images(struct vmm_ram *ram, const struct boot_config *config, const struct plan *plan,
		      const char **why)
{
	for (unsigned i = 0; i < plan->image.segments; i++) {
		const struct boot_segment *s = &plan->image.segment[i];
		int err = put(ram, s->gpa, s->data, s->len, why);

		if (err)
			return err;
	}
	return put(ram, plan->initrd, config->initrd.data, config->initrd.len, why);
}

int boot_load(struct vmm_ram *ram, const struct boot_config *config, struct boot_entry *out, const char **why)
{
	struct pages *pages;
	struct plan plan;
	int err;

	*why = "";
	err = make_plan(ram, config, &plan, why);
	if (err)
		return err;
	pages = calloc(1, sizeof(*pages));
	if (!pages)
		return refuse(why, -ENOMEM, "out of memory");
	err = put_tables(ram, config, &plan, pages, why);
	free(pages);
	if (!err)
		err = put_images(ram, config, &plan, why);
	if (err)
		return err;
	*out = (struct boot_entry){ .rip = plan.image.entry,
				    .rsi = BOOT_PARAMS,
				    .cr3 = BOOT_TABLES,
				    .gdt = BOOT_GDT,
				    .kernel = plan.image.start,
				    .kernel_len = plan.image.end - plan.image.start,
				    .initrd = plan.initrd };
	return 0;
}

/* -- the VM -------------------------------------------------------------------------- */

int boot_vm(struct vmm *vmm, const struct boot_config *config, const char **why)
{
	struct boot_entry entry;
	int err = boot_load(vmm->ram, config, &entry, why);

	if (!err && (err = boot_cpus(vmm, &entry)))
		*why = "cannot set the vCPUs";
	if (!err && (err = acpi_pm_add(vmm)))
		*why = "no room for a device";
	return err;
}
