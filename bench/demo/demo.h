/* SPDX-License-Identifier: MIT */
/*
 * The demo program's parts.
 *
 *   image.c     the RAM file and registers of a guest; loading it into the engine
 *   banner.c    linux_banner through the guest's page tables
 *   clones.c    many clones of one guest, their writes, their stamps
 *   proof.c     sha256 of what every guest reads
 *   svg.c       the picture of the frames
 *   sha256.c    FIPS 180-4
 *   host.c      time, this process's Pss, the progress line
 *   demo.c      the order of things, and the checks
 *
 * A check that fails is printed, counted, and makes the exit status 1; a step
 * that cannot be done at all (no memory, no files) ends the program with 2.
 */
#ifndef KAGE_DEMO_H
#define KAGE_DEMO_H

#include <kage/kage.h>

#define DEMO_IMAGES 3
#define DEMO_CHUNK (1u << 20)
#define DEMO_MIB(pages) ((double)(pages) / 256.0)

/* -- sha256.c -------------------------------------------------------------- */

#define SHA256_BYTES 32

struct sha256 {
	uint32_t state[8];
	uint64_t bytes;
	uint8_t block[64];
};

void sha256_init(struct sha256 *s);
void sha256_update(struct sha256 *s, const void *data, size_t len);
void sha256_finish(struct sha256 *s, uint8_t digest[SHA256_BYTES]);

/* -- host.c ---------------------------------------------------------------- */

uint64_t host_ns(void);
/* Pss of this process in bytes, from /proc/self/smaps_rollup; 0 if it cannot be read. */
uint64_t host_pss(void);
/* Rewrites one line on a terminal; elsewhere prints a line every two seconds. NULL ends it. */
__attribute__((format(printf, 1, 2))) void host_progress(const char *format, ...);

/* -- image.c --------------------------------------------------------------- */

struct image {
	unsigned number; /* 1 ... DEMO_IMAGES */
	int fd;
	uint64_t bytes;
	struct kage_x86_regs regs;
	uint8_t sha256[SHA256_BYTES]; /* from sha256sum(1), not from this program */
	/* by image_load() */
	uint64_t pages_data; /* not a hole of the file */
	uint64_t pages_zero; /* of those, all zero */
};

/* Opens DIR/guestN.{ram,regs,sha256}. Returns 0 or -errno. */
int image_open(struct image *image, const char *dir, unsigned number);
void image_close(struct image *image);
/* Maps a region as large as the image and writes what the file holds; holes stay untouched. */
int image_load(struct image *image, struct kage_vm *vm, void *chunk);
/* One page of the file. */
int image_page(const struct image *image, uint64_t page, void *buf);
/* A soft vCPU with the image's registers. */
int image_vcpu(const struct image *image, struct kage_vm *vm, struct kage_vcpu **out);

/* -- banner.c -------------------------------------------------------------- */

struct banner {
	uint64_t gva, gpa;
	unsigned level; /* of the guest entry that maps it */
	uint64_t read;  /* bytes loaded to find it */
	char text[512];
};

/* Room that banner_find() needs. */
#define BANNER_BUFFER ((2u << 20) + 64)

/* Returns 0, -ENOENT if the kernel's address range has no banner, or an error. */
int banner_find(struct kage_vcpu *vcpu, void *buffer, struct banner *out);

/* -- clones.c -------------------------------------------------------------- */

#define STAMP_BYTES 64

struct clones {
	unsigned n;
	unsigned writes; /* pages that each clone writes */
	struct kage_vm **vm;
	uint64_t *ns;     /* time of each clone, sorted */
	uint64_t *shared; /* pages of the parent that have an entry */
	uint64_t nshared;
};

int clones_init(struct clones *c, unsigned n, unsigned writes, uint64_t pages);
void clones_finish(struct clones *c); /* destroys the guests too */
int clones_make(struct clones *c, struct kage_vm *parent);
/* Page that clone i writes as its k-th; distinct for distinct k. */
uint64_t clones_page(const struct clones *c, unsigned i, unsigned k);
/* The bytes it writes there, and where in the page. */
unsigned clones_stamp(unsigned i, uint64_t page, uint8_t stamp[STAMP_BYTES]);
/* Even writes go through a soft vCPU, odd ones through kage_vm_write(). `map`: room for a page map. */
int clones_write(struct clones *c, struct kage_vm *parent, uint8_t *map, uint64_t pages);

/* -- proof.c --------------------------------------------------------------- */

/* What one guest must read. */
struct claim {
	struct kage_vm *vm;
	const struct image *image;
	const struct clones *clones; /* NULL: exactly the image */
	unsigned clone;              /* its index */
	/* by proof_run() */
	int result; /* 0, -EBADMSG (digest differs), -EILSEQ (a written page is wrong), or an error */
};

/* Fills `result` of each; returns how many are not 0, or -errno. */
int proof_run(struct claim *claims, unsigned n);

/* -- svg.c ----------------------------------------------------------------- */

struct panel {
	char title[64];
	uint64_t pages;
	uint8_t *map; /* enum kage_page_class a page */
};

/* Panels in rows of `columns`. Returns 0 or -errno. */
int svg_write(const char *path, const char *title, const struct panel *panels, unsigned n, unsigned columns);

#endif
