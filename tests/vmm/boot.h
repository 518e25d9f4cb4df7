/* SPDX-License-Identifier: MIT */
/*
 * Direct boot of Linux, without firmware. What is written into guest memory is
 * told in x86_boot.h and arm64_boot.h.
 */
#ifndef KAGE_TESTS_VMM_BOOT_H
#define KAGE_TESTS_VMM_BOOT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vmm.h"

/* Where a struct vmm_identity may lie: in the VM's memory, and not told to the guest's kernel to be RAM. */
#define BOOT_IDENTITY 0xd0000u

struct boot_blob {
	const void *data;
	size_t len;
};

struct boot_config {
	struct boot_blob kernel; /* x86: bzImage of protocol 2.12 or later, or ELF vmlinux; arm64: Image */
	struct boot_blob initrd; /* len 0: none */
	const char *cmdline;	 /* NULL: empty */
	unsigned cpus;
};

/* A file as a blob (mapped, read only). Returns 0 or -errno; an empty file is -ENODATA. */
int boot_map_file(const char *path, struct boot_blob *out);
void boot_unmap_file(struct boot_blob *blob);

/* Loads the kernel, sets the vCPUs and adds the devices that the kernel expects. -errno, and a sentence. */
int boot_vm(struct vmm *vmm, const struct boot_config *config, const char **why);

#endif
