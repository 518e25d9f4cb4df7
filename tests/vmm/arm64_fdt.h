/* SPDX-License-Identifier: MIT */
/*
 * A writer of flattened device trees (Devicetree Specification 0.4, chapter 5), as small as a boot needs:
 * nodes and properties in the order of the calls, version 17, no reserved memory.
 *
 * An error (no room) is kept and told by fdt_finish(), so that calls need no checks.
 */
#ifndef KAGE_TESTS_VMM_ARM64_FDT_H
#define KAGE_TESTS_VMM_ARM64_FDT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FDT_NAMES 1024 /* bytes of all different property names */

struct fdt {
	uint8_t *buf;
	size_t len, room;
	unsigned depth;
	bool full;
	char names[FDT_NAMES];
	size_t names_len;
};

/* `buf` of `room` bytes, 8-byte aligned, begins with the root node. */
void fdt_begin(struct fdt *fdt, void *buf, size_t room);
void fdt_node(struct fdt *fdt, const char *name);
void fdt_node_end(struct fdt *fdt);
void fdt_prop(struct fdt *fdt, const char *name, const void *value, size_t len);
void fdt_text(struct fdt *fdt, const char *name, const char *text);
void fdt_u32(struct fdt *fdt, const char *name, uint32_t value);
void fdt_u64(struct fdt *fdt, const char *name, uint64_t value);
void fdt_cells(struct fdt *fdt, const char *name, const uint32_t *value, unsigned n);
/* n values of two cells each. */
void fdt_u64s(struct fdt *fdt, const char *name, const uint64_t *value, unsigned n);
/* Ends the root node. Returns the length of the tree, or -ENOSPC. */
int fdt_finish(struct fdt *fdt);

#endif
