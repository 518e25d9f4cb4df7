/* SPDX-License-Identifier: MIT */
/*
 * Direct boot of Linux on arm64: an Image, a device tree, an initramfs, and the state in which CPU 0 enters
 * the kernel; the others wait for PSCI CPU_ON.
 *
 * Sources: Linux Documentation/arch/arm64/booting.rst; Devicetree Specification 0.4; Linux
 * Documentation/devicetree/bindings.
 *
 * Guest physical memory, from below:
 *
 *   0000 0000  2 MiB that the kernel is not told of; struct vmm_identity at BOOT_IDENTITY
 *   0020 0000  RAM: the Image at its text_offset; the device tree at the next multiple of 2 MiB
 *              behind the memory that the Image asks for; the initramfs at the top of what is below 3 GiB
 *   c000 0000  no RAM: devices (arm64.h)
 *   1 0000 0000  the RAM beyond 3 GiB
 *
 * Invariants
 *   B1  Everything is checked before the first byte of guest memory is written.
 *   B2  An image is data from outside: no length or offset in it is used before it was compared with what is there.
 *   B3  The Image with all the memory it asks for (image_size), the tree and the initramfs do not overlap.
 *   B4  Memory is fresh: what is not written reads as zero.
 *
 * Why the first 2 MiB are left out: the guest reads its identity through /dev/mem, which a kernel with
 * STRICT_DEVMEM allows outside of RAM only; and the Image wants a multiple of 2 MiB.
 */
#ifndef KAGE_TESTS_VMM_ARM64_BOOT_H
#define KAGE_TESTS_VMM_ARM64_BOOT_H

#include "boot.h"

#define BOOT_BASE	 0x200000u
#define BOOT_ALIGN	 0x200000u
#define BOOT_HOLE	 ((uint64_t)3 << 30)
#define BOOT_HIGH	 ((uint64_t)4 << 30)
#define BOOT_TREE_MAX	 0x10000u
#define BOOT_CMDLINE_MAX 2048u /* COMMAND_LINE_SIZE of arm64 */

/* What the tree says of the machine beside its memory. */
struct boot_machine {
	uint32_t gic_version;
	uint64_t mpidr[VMM_VCPUS]; /* one for each CPU */
	uint8_t seed[40];	   /* random */
};

struct boot_entry {
	uint64_t pc, tree;
	uint64_t kernel, kernel_len, initrd;
};

/*
 * Loads Image and initramfs and writes the tree. Returns 0; -EINVAL (CPUs, or RAM that is not laid out as
 * vmm_pc_layout() does); -ENOEXEC (no Image, or a broken one); -EOPNOTSUPP (a big-endian kernel, or one that does not say
 * how large it is); -ENOSPC (RAM too small); -E2BIG (the command line); what writing to `ram` returned.
 * `*why` is then a sentence; `out` is untouched.
 */
int boot_load(struct vmm_ram *ram, const struct boot_config *config, const struct boot_machine *machine,
	      struct boot_entry *out, const char **why);

/* The tree alone, into `buf` (8-byte aligned). Its length, or -ENOSPC. */
int boot_tree(const struct vmm_ram *ram, const struct boot_config *config, const struct boot_machine *machine,
	      uint64_t initrd, void *buf, size_t room);

#endif
