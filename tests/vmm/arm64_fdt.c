/* SPDX-License-Identifier: MIT */
/*
 * Device trees: see arm64_fdt.h. Header, an empty list of reserved memory, the structure while it is
 * written, and the names of properties behind it at the end. All numbers are big-endian.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "arm64_fdt.h"

#define MAGIC	   0xd00dfeedu
#define VERSION	   17u
#define COMPATIBLE 16u
#define BEGIN_NODE 1u
#define END_NODE   2u
#define PROP	   3u
#define END	   9u

struct header {
	uint32_t magic, size, structure_at, names_at, reserved_at, version, compatible, boot_cpu, names_len,
		structure_len;
};

#define RESERVED_AT  sizeof(struct header)
#define RESERVED_LEN 16u /* one entry of zeroes ends the list */
#define STRUCTURE_AT (RESERVED_AT + RESERVED_LEN)

static_assert(sizeof(struct header) == 40, "as the specification has it");

static void put(struct fdt *fdt, const void *bytes, size_t len)
{
	size_t padded = (len + 3) & ~(size_t)3;

	fdt->full |= padded > fdt->room - fdt->len;
	if (fdt->full)
		return;
	memset(fdt->buf + fdt->len, 0, padded);
	if (len)
		memcpy(fdt->buf + fdt->len, bytes, len);
	fdt->len += padded;
}

static void put32(struct fdt *fdt, uint32_t value)
{
	value = htobe32(value);
	put(fdt, &value, sizeof(value));
}

/* Where a property's name lies among the names; each is there once. */
static uint32_t name_at(struct fdt *fdt, const char *name)
{
	size_t at = 0, len = strlen(name) + 1;

	while (at < fdt->names_len && strcmp(fdt->names + at, name))
		at += strlen(fdt->names + at) + 1;
	if (at < fdt->names_len)
		return (uint32_t)at;
	fdt->full |= len > sizeof(fdt->names) - at;
	if (fdt->full)
		return 0;
	memcpy(fdt->names + at, name, len);
	fdt->names_len += len;
	return (uint32_t)at;
}

void fdt_begin(struct fdt *fdt, void *buf, size_t room)
{
	memset(fdt, 0, sizeof(*fdt));
	fdt->buf = buf;
	fdt->room = room;
	fdt->full = room < STRUCTURE_AT;
	if (fdt->full)
		return;
	memset(buf, 0, STRUCTURE_AT);
	fdt->len = STRUCTURE_AT;
	fdt_node(fdt, "");
}

void fdt_node(struct fdt *fdt, const char *name)
{
	put32(fdt, BEGIN_NODE);
	put(fdt, name, strlen(name) + 1);
	fdt->depth++;
}

void fdt_node_end(struct fdt *fdt)
{
	put32(fdt, END_NODE);
	fdt->depth--;
}

void fdt_prop(struct fdt *fdt, const char *name, const void *value, size_t len)
{
	put32(fdt, PROP);
	put32(fdt, (uint32_t)len);
	put32(fdt, name_at(fdt, name));
	put(fdt, value, len);
}

void fdt_text(struct fdt *fdt, const char *name, const char *text)
{
	fdt_prop(fdt, name, text, strlen(text) + 1);
}

void fdt_u32(struct fdt *fdt, const char *name, uint32_t value)
{
	fdt_cells(fdt, name, &value, 1);
}

void fdt_u64(struct fdt *fdt, const char *name, uint64_t value)
{
	fdt_u64s(fdt, name, &value, 1);
}

void fdt_cells(struct fdt *fdt, const char *name, const uint32_t *value, unsigned n)
{
	put32(fdt, PROP);
	put32(fdt, n * 4);
	put32(fdt, name_at(fdt, name));
	for (unsigned i = 0; i < n; i++)
		put32(fdt, value[i]);
}

void fdt_u64s(struct fdt *fdt, const char *name, const uint64_t *value, unsigned n)
{
	put32(fdt, PROP);
	put32(fdt, n * 8);
	put32(fdt, name_at(fdt, name));
	for (unsigned i = 0; i < n; i++) {
		put32(fdt, (uint32_t)(value[i] >> 32));
		put32(fdt, (uint32_t)value[i]);
	}
}

int fdt_finish(struct fdt *fdt)
{
	struct header h = { 0 };
	size_t names_at;

	fdt_node_end(fdt);
	put32(fdt, END);
	names_at = fdt->len;
	put(fdt, fdt->names, fdt->names_len);
	if (fdt->full)
		return -ENOSPC;
	h.magic = htobe32(MAGIC);
	h.size = htobe32((uint32_t)fdt->len);
	h.structure_at = htobe32(STRUCTURE_AT);
	h.names_at = htobe32((uint32_t)names_at);
	h.reserved_at = htobe32(RESERVED_AT);
	h.version = htobe32(VERSION);
	h.compatible = htobe32(COMPATIBLE);
	h.names_len = htobe32((uint32_t)fdt->names_len);
	h.structure_len = htobe32((uint32_t)(names_at - STRUCTURE_AT));
	memcpy(fdt->buf, &h, sizeof(h));
	return (int)fdt->len;
}
