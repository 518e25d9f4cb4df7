/* SPDX-License-Identifier: MIT */
/*
 * A guest of any format on the library, and beside it the same guest as the
 * reference walkers see it: memory as plain bytes, registers as plain values.
 * Each check asks both and ends the program where they differ.
 *
 * Memory: `low` from 0 on, and `high`, a piece at the upper end of the physical
 * addresses that the CPU has. Everything else is MMIO.
 */
#ifndef KAGE_TESTS_FORMAT_GUEST_H
#define KAGE_TESTS_FORMAT_GUEST_H

#include <kage/kage.h>

#include "arm64_reference.h"
#include "x86_reference.h"

#define FG_LOW ((uint64_t)8 << 20)
#define FG_HIGH ((uint64_t)4 << 20)
#define FG_TOUCHED 16

struct fg_config {
	uint32_t arch; /* enum kage_arch */
	uint32_t phys_bits, features;
	unsigned high_bit; /* `high` begins here; below phys_bits */
};

struct format_guest {
	struct kage_engine *engine;
	struct kage_vm *vm;
	struct kage_vcpu *vcpu;
	struct fg_config config;
	uint8_t *low, *high;
	struct ref_cpu x86;
	struct arm64_ref_cpu arm64;
	uint64_t touched[FG_TOUCHED]; /* the words of tables that the reference read last */
	unsigned ntouched;
	char about[160]; /* printed when something differs */
	/* Optional: what memory at a gpa answers (KAGE_READ ...; else it is MMIO), and whether its page is still to come. */
	uint32_t (*prot)(const struct format_guest *g, uint64_t gpa);
	bool (*waits)(const struct format_guest *g, uint64_t gpa);
	bool met_wait; /* by the reference's last walk: a table is still to come */
	struct {
		unsigned long translations, granted, faults, mmio, outside, flags_set, waits;
		uint64_t fault_kinds; /* bits: x86 error code, arm64 fault status code */
	} count;
};

void fg_create(struct format_guest *g, const struct fg_config *config);
void fg_destroy(struct format_guest *g);

/* Prints `about`, the registers and the message, and exits with 1. */
__attribute__((format(printf, 2, 3), noreturn)) void fg_fail(const struct format_guest *g, const char *format, ...);
void fg_require(const struct format_guest *g, bool holds, const char *what);

/* The bytes that the reference has for a gpa; NULL: MMIO. */
void *fg_memory(const struct format_guest *g, uint64_t gpa);
/* Writes guest memory as a VMM or a device does, and the reference's; bytes: 4 or 8, aligned. */
void fg_write(struct format_guest *g, uint64_t gpa, uint64_t value, unsigned bytes);
/* Gives the registers of the reference to the vCPU; returns what kage_vcpu_set_regs() says. */
int fg_set_regs(struct format_guest *g);
void fg_flush(struct format_guest *g, uint32_t kind, uint64_t gva);

enum fg_access { FG_READ, FG_WRITE, FG_FETCH, FG_IMPLICIT_READ, FG_IMPLICIT_WRITE };

/* kage_vcpu_translate() and the reference: outcome, address, level, syndrome; neither changes anything. */
void fg_translate(struct format_guest *g, uint64_t gva, enum fg_access access);
/*
 * One load, store or fetch of eight bytes (aligned): besides the above the
 * bytes themselves, and flags in each entry of the path. *gpa is where it went;
 * returns false if it faulted or met no memory.
 */
bool fg_do(struct format_guest *g, uint64_t gva, enum fg_access access, uint64_t value, uint64_t *gpa);
/* All memory is what the reference has; the engine's audit finds nothing. */
void fg_compare_all(struct format_guest *g);
void fg_audit(struct format_guest *g);

/* Runs each case in a process of its own; returns the exit status for all. Prints one line a case. */
struct fg_case {
	const char *name;
	void (*run)(const struct fg_case *c);
	unsigned arg;
};
int fg_run_cases(const char *program, const struct fg_case *cases, unsigned n);

#endif
