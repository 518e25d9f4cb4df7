/* SPDX-License-Identifier: MIT */
/*
 * Direct 64-bit boot of Linux: what a boot loader and the firmware leave
 * behind, written into a guest's memory, and the state in which CPU 0 enters
 * the kernel. No firmware runs.
 *
 * Sources: Linux Documentation/arch/x86/boot.rst (64-bit boot protocol) and
 * zero-page.rst; the ACPI specification 6.5, chapter 5; Linux
 * Documentation/virt/kvm/api.rst.
 *
 * Guest physical memory, from below:
 *
 *   0000 0500  GDT
 *   0000 7000  boot_params ("zero page")
 *   0000 9000  page tables: the first 4 GiB one to one
 *   0002 0000  command line
 *   0009 fc00  reserved from here to 1 MiB
 *   000d 0000  struct vmm_identity, if the VMM wants one
 *   000e 0000  ACPI tables
 *   0010 0000  RAM again; the kernel where it asks to be (Linux: 16 MiB),
 *              the initramfs at the top of what is below 3 GiB
 *   c000 0000  no RAM: local APIC, I/O APIC, KVM's own pages
 *   1 0000 0000  the RAM beyond 3 GiB
 *
 * What is RAM is read from struct vmm_ram's regions.
 *
 * Invariants
 *   B1  Everything is checked before the first byte of guest memory is
 *       written: an image that is refused leaves the guest as it was. (Errors
 *       of the memory itself may come in between.)
 *   B2  An image is data from outside: no length or offset in it is used
 *       before it was compared with what is there.
 *   B3  The kernel with all the memory it needs before it reads the memory
 *       map (init_size), the initramfs and the tables above do not overlap.
 *   B4  Memory is fresh: what is not written reads as zero (BSS).
 *
 * No locks: the guest does not run yet.
 */
#ifndef KAGE_TESTS_VMM_X86_BOOT_H
#define KAGE_TESTS_VMM_X86_BOOT_H

#include <asm/bootparam.h>

#include "boot.h"

#define BOOT_GDT	0x500u
#define BOOT_PARAMS	0x7000u
#define BOOT_TABLES	0x9000u
#define BOOT_CMDLINE	0x20000u
#define BOOT_CMDLINE_MAX 0x10000u
#define BOOT_LOW_TOP	0x9fc00u
#define BOOT_ACPI	0xe0000u
#define BOOT_MIB	((uint64_t)1 << 20)
#define BOOT_HOLE	((uint64_t)3 << 30) /* RAM below it, and ... */
#define BOOT_HIGH	((uint64_t)4 << 30) /* ... the rest from here */
#define BOOT_RAM_MIN	(16 * BOOT_MIB)
#define BOOT_CPUS_MAX	255u /* APIC ids of 8 bits; 255 is everybody */

#define BOOT_IOAPIC_ADDR 0xfec00000u
#define BOOT_LAPIC_ADDR	 0xfee00000u
#define BOOT_SCI_IRQ	 9
#define BOOT_PM_PORT	 0x600 /* struct acpi_pm: 7 ports */
#define BOOT_PM_PORTS	 7

/* How CPU 0 enters; the others wait for INIT and SIPI. The rest is for messages. */
struct boot_entry {
	uint64_t rip, rsi, cr3, gdt;
	uint64_t kernel, kernel_len, initrd;
};

/*
 * Loads kernel and initramfs and writes all tables. Returns 0; -EINVAL (CPUs, or RAM that is not laid out
 * as vmm_pc_layout() does); -ENOEXEC (no kernel image, or a broken one); -EOPNOTSUPP (a kernel
 * without this protocol); -ENOSPC (RAM too small); -E2BIG (the command line); what writing to `ram`
 * returned. `*why` is then a sentence; `out` is untouched.
 */
int boot_load(struct vmm_ram *ram, const struct boot_config *config, struct boot_entry *out, const char **why);

/* -- one kernel image, checked but not written: x86_boot_bzimage.c, x86_boot_elf.c ---------- */

#define BOOT_SEGMENTS 16

struct boot_segment {
	uint64_t gpa, len;
	const void *data;
};

struct boot_image {
	struct boot_segment segment[BOOT_SEGMENTS];
	unsigned segments;
	uint64_t start, end; /* all memory that the kernel needs for itself at first */
	uint64_t entry;
	uint64_t initrd_last; /* highest address that a byte of the initramfs may have */
	uint64_t cmdline_max; /* characters without the final NUL */
	struct setup_header header;
};

bool bzimage_is(struct boot_blob image);
int bzimage_parse(struct boot_blob image, struct boot_image *out, const char **why);
bool elf_is(struct boot_blob image);
int elf_parse(struct boot_blob image, struct boot_image *out, const char **why);

/* -- the firmware's part: x86_acpi.c ----------------------------------------------------- */

/*
 * Builds RSDP, XSDT, FADT, FACS, MADT and DSDT as they lie from BOOT_ACPI on
 * (the RSDP first). Returns their length, or -ENOSPC, -EINVAL.
 */
int acpi_build(unsigned cpus, uint8_t *buf, size_t len);

/*
 * The few registers that the FADT promises: PM1a event and control, and reset.
 * Plain data: copy it with the guest.
 */
struct acpi_pm {
	uint16_t status, enable, control;
	uint8_t off, reset; /* the guest asked for it */
};
/* One port access of `size` bytes at BOOT_PM_PORT + offset. */
void acpi_pm_io(struct acpi_pm *pm, unsigned offset, bool write, void *data, unsigned size);
/* As a device: the vCPU that switches the machine off or resets it stops (VMM_STOP). */
int acpi_pm_add(struct vmm *vmm);

/* -- the CPU's part: x86_boot_cpu.c ------------------------------------------------------- */

/*
 * Turns what KVM supports into what the CPU with APIC id `id` of `cpus` says: one package of
 * single-threaded cores. Leaves that KVM does not list stay away. Behind the nent entries there
 * must be room for BOOT_CPUID_MORE.
 */
#define BOOT_CPUID_MORE 3
void boot_cpuid(struct kvm_cpuid2 *cpuid, unsigned id, unsigned cpus, bool tsc_deadline);
/* CPUID and MSRs of every vCPU, and vCPU 0 at the entry. None has run yet. */
int boot_cpus(struct vmm *vmm, const struct boot_entry *entry);

#endif
