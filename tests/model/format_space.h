/* SPDX-License-Identifier: MIT */
/*
 * The whole space of what tables and modes can say about one access, for every
 * format: each combination has a number. Shared by the tests that go through it
 * (test_format_product.c the engine's walk and rights, test_format_permissions.c
 * vCPUs).
 *
 * A combination is a mode (registers), what each table entry on the path
 * grants, what the page's or block's entry says, and a kind of access:
 *
 *   arm64  mode   EL0, PAN, WXN, EPAN, HA, HD, HPD of this half, which half
 *          table  APTable, UXNTable, PXNTable, at each level
 *          leaf   AP[2:1], AF, DBM, UXN, PXN, contiguous
 *   x86    mode   CPL 3, WP, SMEP, SMAP, AC, NXE; PKE, and for long mode AD and WD of the page's key
 *          table  R/W, U/S, XD, A, at each level
 *          leaf   R/W, U/S, XD, A, D
 *
 * What says nothing about rights rides along, from a hash of the number: NSTable,
 * nG, the other half's HPD (which must not count), the page's address, PSE where
 * no entry is large. Above four levels of tables so do the contiguous bit and, for
 * x86, the A bits of single levels (all of the tables have it, or none).
 */
#ifndef KAGE_TESTS_FORMAT_SPACE_H
#define KAGE_TESTS_FORMAT_SPACE_H

#include "format_guest.h"

#define SPACE_ENTRIES 5
#define SPACE_MODES_MAX 512

struct space {
	const char *name;
	bool arm64, wide; /* wide: 52-bit addresses */
	unsigned page_bits, entry_bytes;
	unsigned va_bits, top, leaf; /* levels; `leaf` maps memory */
};

struct space_case {
	unsigned mode;
	enum fg_access access;
	uint64_t va;
	unsigned n; /* entries, from the root down */
	struct {
		uint64_t gpa, value;
	} entry[SPACE_ENTRIES];
};

extern const struct space spaces[];
extern const unsigned nspaces;

unsigned space_modes(const struct space *s);
uint64_t space_size(const struct space *s);
/* A number below space_size(), at about 0.618 of it and without a common divisor: its multiples go everywhere. */
uint64_t space_stride(const struct space *s);
/* What the vCPU must have. */
struct fg_config space_config(const struct space *s);
/* The registers of a mode, for the reference. */
void space_registers(const struct space *s, unsigned mode, struct ref_cpu *x86, struct arm64_ref_cpu *arm64);
/* PAE: where the one present PDPTE stands, and what it is; registers load it (mode 0 to the last). */
#define SPACE_PDPT ((uint64_t)0x100000 + 7 * 0x10000)
#define SPACE_PDPTE (SPACE_PDPT - 6 * 0x10000 + 1)
bool space_is_pae(const struct space *s);
void space_case_of(const struct space *s, uint64_t number, struct space_case *c);

#endif
