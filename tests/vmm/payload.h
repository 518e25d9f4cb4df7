/* SPDX-License-Identifier: MIT */
/*
 * Payloads: small programs that run as a guest without firmware or kernel.
 *
 * x86-64: in 64-bit mode at CPL 3, so that they also run at full speed where KVM emulates
 * the kernel mode of its guests. OUT is their hypercall: IOPL is 3, and as not
 * every KVM keeps a guest's IOPL, there is a task state segment whose bitmap
 * allows all ports (Intel SDM volume 1, 19.5.2).
 *
 * arm64: at EL1 with the MMU and caches on. Their hypercall is a load or store at
 * PAYLOAD_PORTS, where there is no memory.
 *
 * structures
 *	payload_mailbox	a page of guest memory for each vCPU: parameters in, results out
 *	payload_config	size of the identity map, its page size
 *	payload_port	what the VMM counts of the payload's ports
 *
 * Guest memory:
 *	0x1000		struct vmm_identity
 *	0x2000		code
 *	0x7000		arm64: what the last exception said (PAYLOAD_FAULT)
 *	0x8000		root of the page tables, 0x9000 the next level
 *	0x10000		mailboxes, a page for each vCPU
 *	0x50000		stacks, a page for each vCPU
 *	0x90000		x86: task state segment, 3 pages
 *	0x100000	the other page tables
 *	payload_free()	first page that a payload does not use
 *
 * invariants
 *	P1. A program that works in rounds does one when `go` differs from `done`, sets `done`
 *	    and reports at PAYLOAD_PORT_DONE, where the vCPU's thread ends. So a round is: put
 *	    parameters, payload_go(), vmm_vcpu_start(), vmm_vcpu_wait(), read the results.
 *	P2. Any program that sees `stop` reports at PAYLOAD_PORT_STOP until it is 0 again.
 *	P3. A program writes: its mailbox, its stack, its log, and the pages base .. base + pages.
 */
#ifndef KAGE_TESTS_PAYLOAD_H
#define KAGE_TESTS_PAYLOAD_H

#include "vmm.h"

#define PAYLOAD_IDENTITY 0x1000
#define PAYLOAD_CODE	 0x2000
#define PAYLOAD_CODE_MAX 0x5000
#define PAYLOAD_PML4	 0x8000
#define PAYLOAD_PDPT	 0x9000
#define PAYLOAD_MAILBOX	 0x10000
#define PAYLOAD_STACK	 0x50000
#define PAYLOAD_TSS	 0x90000
#define PAYLOAD_TABLES	 0x100000

#if defined(__x86_64__)
#define PAYLOAD_SPACE	  VMM_PIO
#define PAYLOAD_PORTS	  0
#define PAYLOAD_EXIT	  KVM_EXIT_IO
#define PAYLOAD_EXIT_FAULT KVM_EXIT_SHUTDOWN /* an exception ends the guest */
#else
#define PAYLOAD_SPACE	  VMM_MMIO
#define PAYLOAD_PORTS	  0xc0000000u /* device memory of 1 GiB, the hole of vmm_pc_layout() */
#define PAYLOAD_EXIT	  KVM_EXIT_MMIO
#define PAYLOAD_EXIT_FAULT KVM_EXIT_SYSTEM_EVENT
#define PAYLOAD_FAULT	  0x7000
#define PAYLOAD_FAULT_TEXT "0x7000"
/* What an exception leaves at PAYLOAD_FAULT. */
struct payload_fault {
	uint64_t esr, far, elr, spsr;
};
#endif

/* From PAYLOAD_PORTS on. */
enum payload_port_number {
	PAYLOAD_PORT_DONE = 0x500,  /* 4 bytes out: `done` */
	PAYLOAD_PORT_STOP = 0x504,  /* 4 bytes out */
	PAYLOAD_PORT_VALUE = 0x508, /* 4 bytes out: counted; in: the last value plus 1 */
};

enum payload_program {
	/*
	 * For ever: picks a random page, verifies what it wrote there last (log: 16 bytes a page, generation
	 * and identity), writes `words` words made of page number, generation and identity. Reseeds when the
	 * identity page changes. When it sees `stop` it verifies all pages first. count, errors, audited, error_*.
	 */
	PAYLOAD_STAMP = 1,
	/* Rounds: `iterations` read-modify-writes of 8 bytes. mode: enum payload_order. checksum, tsc_*. */
	PAYLOAD_MEMORY = 2,
	/*
	 * For ever: longest gap between two reads of the TSC (`longest`; the VMM may put 0). When `go` changes:
	 * writes to `iterations` distinct pages, from tsc_begin to tsc_end, the slowest in `slowest`; then sets
	 * `done`, without a report.
	 */
	PAYLOAD_TICKS = 3,
	/* Rounds: writes `iterations` pages drawn from `seed`, logs their numbers (8 bytes each) at `log`. count. */
	PAYLOAD_DIRTY = 4,
	/* Rounds: the first word of every page, in order. mode: PAYLOAD_READ, _WRITE or both. checksum, tsc_*. */
	PAYLOAD_TOUCH = 5,
	/* Rounds: `iterations` exits. mode: enum payload_exit; MMIO at `base`. checksum: sum of reads, tsc_*. */
	PAYLOAD_HYPERCALL = 6,
};

enum payload_order {
	PAYLOAD_SEQUENTIAL = 0, /* 64 bytes further each time */
	PAYLOAD_RANDOM = 1,
};
#define PAYLOAD_READ  1
#define PAYLOAD_WRITE 2
enum payload_exit {
	PAYLOAD_OUT = 0,
	PAYLOAD_IN = 1,
	PAYLOAD_MMIO_WRITE = 2,
	PAYLOAD_MMIO_READ = 3,
};

#define PAYLOAD_ANCESTORS 32

/* All fields are 8 bytes; either side reads and writes single ones at any time. */
struct payload_mailbox {
	/* by the VMM */
	uint64_t program;    /* enum payload_program; looked at once, when the vCPU starts */
	uint64_t index;      /* of the vCPU; payload_load() */
	uint64_t base;       /* gpa of the first page */
	uint64_t pages;      /* not 0 */
	uint64_t log;        /* gpa, or 0 */
	uint64_t iterations;
	uint64_t seed;
	uint64_t mode;
	uint64_t words;      /* STAMP: 1 to 512 a page; a power of 2 */
	uint64_t stop, go;
	/* by the guest */
	uint64_t done;
	uint64_t count;      /* STAMP: pages stamped, the generation of the next is one more */
	uint64_t errors;
	uint64_t audited;    /* STAMP: pages verified since `stop` was seen */
	uint64_t error_page, error_word, error_found, error_expected; /* the first; word ~0: the log itself */
	uint64_t checksum;
	uint64_t tsc_begin, tsc_end;
	uint64_t longest, slowest;
	uint64_t reseeded;   /* times that the identity changed */
	uint64_t ancestors;  /* STAMP: identities it had before, and the generation reached under each */
	struct {
		uint64_t id, generation;
	} ancestor[PAYLOAD_ANCESTORS];
};

struct payload_stamp_log {
	uint64_t generation; /* 0: not written yet, the page is zero */
	uint64_t id;
};

struct payload_config {
	uint64_t map;     /* bytes mapped gva = gpa from 0, at most 512 GiB; memory or not */
	bool small_pages; /* 4 KiB pages, else 2 MiB */
};

/* First gpa after what a payload with this config uses, a multiple of 2 MiB. */
uint64_t payload_free(const struct payload_config *config);

/*
 * The image: len bytes for guest memory from gpa 0 on; free() it. NULL: no memory, or map is too large. It is
 * the same for all programs.
 */
void *payload_image(const struct payload_config *config, size_t *len);
/* Bits of the tables' entries beside the address. */
struct payload_entries {
	uint64_t table, large, page;
};
extern const struct payload_entries payload_entries;
/* What the architecture has in the image besides. */
void payload_arch_image(char *image);
/* The code, copied to PAYLOAD_CODE. The linker names the ends of a section. */
extern const char __start_vmm_guest[] __attribute__((visibility("hidden")));
extern const char __stop_vmm_guest[] __attribute__((visibility("hidden")));
/* Registers with which vCPU `index` begins. */
struct vmm_entry payload_entry(unsigned index);

/*
 * Writes the image to a VM, adds the payload's ports, gives it an identity (its config.identity should be
 * PAYLOAD_IDENTITY), and sets all its vCPUs to the entry with empty mailboxes.
 */
int payload_load(struct vmm *vmm, const struct payload_config *config);

/* A vCPU's mailbox, whole. put keeps `index`. */
int payload_get(struct vmm *vmm, unsigned index, struct payload_mailbox *mailbox);
int payload_put(struct vmm *vmm, unsigned index, const struct payload_mailbox *mailbox);
/* One field: payload_poke(vmm, 0, stop, 1). */
#define payload_poke(vmm, index, field, value) \
	payload_poke_at(vmm, index, offsetof(struct payload_mailbox, field), value)
#define payload_peek(vmm, index, field) payload_peek_at(vmm, index, offsetof(struct payload_mailbox, field))
int payload_poke_at(struct vmm *vmm, unsigned index, size_t offset, uint64_t value);
uint64_t payload_peek_at(struct vmm *vmm, unsigned index, size_t offset); /* ~0 if it cannot be read */
/* go = done + 1 */
int payload_go(struct vmm *vmm, unsigned index);
/* A round, P1. -ETIMEDOUT, -EIO (the vCPU stopped for another reason). */
int payload_round(struct vmm *vmm, unsigned index, int timeout_ms);
/* Sets `stop` on all vCPUs and waits until they have reported. */
int payload_stop(struct vmm *vmm, int timeout_ms);

struct payload_port {
	_Atomic uint64_t values, sum; /* written to PAYLOAD_PORT_VALUE */
	_Atomic uint64_t last;
	_Atomic uint64_t done, stop;  /* reports */
};
struct payload_port *payload_port(struct vmm *vmm); /* NULL: no payload is loaded */

/*
 * Verifies from the VMM's side what a STAMP payload that was stopped should have left in memory. Returns the
 * number of pages that are wrong, or -errno.
 */
int64_t payload_check_stamps(struct vmm *vmm, unsigned index);

/* -- guest.c: position independent, also callable in this process; ram: where gpa 0 lies ------------ */

/* One round of MEMORY, DIRTY or TOUCH. */
void guest_memory(struct payload_mailbox *mb, char *ram);
void guest_dirty(struct payload_mailbox *mb, char *ram);
void guest_touch(struct payload_mailbox *mb, char *ram);
/* Word `word` of a stamp. */
uint64_t guest_stamp(uint64_t gfn, uint64_t generation, uint64_t id, uint64_t word);
/* The entry. Never returns. */
void guest_main(struct payload_mailbox *mb, char *ram);

#endif
