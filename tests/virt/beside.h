/* SPDX-License-Identifier: MIT */
/*
 * virt-beside: Kage beside Linux guests that somebody else runs.
 *
 * structures
 *	arch		what differs between x86-64 and arm64 guests
 *	guest		one domain of libvirt: its RAM file, what its console said, and its Kage guest
 *	page		one of its pages, by what it said of it
 *
 * Files: beside.c (order, skips), beside_guest.c (domains, monitor, console), beside_gdb.c (registers that
 * the monitor does not print), beside_walk.c, beside_same.c, beside_change.c (the three things that are shown).
 *
 * invariants
 *	B1. Kage only ever reads: RAM files are opened and mapped read-only. What it shows of a guest that
 *	    goes on it shows without the guest's help.
 *	B2. Whatever is shown is compared with somebody who does not use Kage: the guest's own words, QEMU's own walk
 *	    (gva2gpa), coreutils over the RAM files, memcmp() of copies of them.
 */
#ifndef KAGE_TESTS_VIRT_BESIDE_H
#define KAGE_TESTS_VIRT_BESIDE_H

#include <kage/kage.h>
#include <libvirt/libvirt.h>

#include "virt.h"

#define GUESTS 3
#define MIB    128
#define QUIET  12 /* pages that a guest leaves alone (beside_init.sh) */
#define TURN   8  /* pages that it writes in turn */

struct arch {
	struct machine machine;
	const char *cpu;
	const char *more; /* of the second guest's command line */
	const char *ram;  /* QEMU's name of the RAM's memory backend */
	uint64_t ram_gpa; /* where it begins; the RAM file has no holes from there on (below 3 GiB, on a PC) */
	uint32_t kage;    /* enum kage_arch */
};

struct page {
	uint64_t gpa;
	char text[64];
	unsigned round; /* of those that are written in turn */
};

union regs {
	struct kage_x86_regs x86;
	struct kage_arm64_regs arm64;
};

struct guest {
	const struct arch *arch;
	unsigned number;
	char name[64], console[500], ram[500];
	virDomainPtr domain;
	int fd; /* of the RAM */
	uint64_t bytes;
	struct kage_vm *vm;
	/* said on the console */
	long heard; /* how far it was read */
	bool ready;
	char version[512];
	uint64_t stext, linux_banner, init_top_pgt;
	unsigned quiets;
	struct page quiet[QUIET], turn[TURN]; /* turn[round % TURN] */
	unsigned round; /* the last one */
};

/* beside.c: one line a check; returns `good`. */
bool check(bool good, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* beside_guest.c */
bool guest_start(struct guest *g, const struct paths *paths);
void guest_stop(struct guest *g);
bool guest_suspend(struct guest *g);
bool guest_resume(struct guest *g);
/* The human monitor's answer, to be freed; NULL: it failed, and that has been told. */
char *guest_monitor(const struct guest *g, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Reads what is new on the console. */
void guest_listen(struct guest *g);
/* Waits until it is ready, or has written a round. False: it went away, or fell silent; its console has been shown. */
bool guest_wait(struct guest *g, unsigned round);
/* Opens its RAM and maps it, read-only, into a guest of Kage's. */
bool guest_map(struct guest *g, struct kage_engine *engine);

/* beside_gdb.c */
bool gdb_arm64_registers(const struct guest *g, const char *socket_path, struct kage_arm64_regs *regs);

/* beside_walk.c, beside_same.c, beside_change.c: false if a check failed. */
bool walk_show(struct guest *g, const struct paths *paths);
bool same_show(struct guest *guests, const struct paths *paths);
bool change_show(struct guest *g);

#endif
