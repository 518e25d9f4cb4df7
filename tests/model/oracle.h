/* SPDX-License-Identifier: MIT */
/*
 * A naive model of several guests: what include/kage/vm.h and dirty.h promise,
 * written down a second time, as simply as can be. Includes no header of the
 * engine, public or not, so that a misunderstanding cannot be shared.
 *
 * A guest is a flat sorted array of pages; every attribute of a region
 * (protection, kind, flags) is kept for each page, and every page has its 4096
 * bytes. A clone is a deep copy. A dirty log is an array of pages with two
 * bits: `must` (written: has to be reported) and `may` (something happened that
 * may count as a write: pins, discards, unmapping, a neighbour in a large page).
 *
 * Functions return what the engine's function of the same name has to return:
 * 0, OR_MMIO or -errno. Nothing is ever out of memory here; a caller whose
 * engine answered -ENOMEM does not apply the operation.
 */
#ifndef KAGE_TESTS_ORACLE_H
#define KAGE_TESTS_ORACLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define OR_PAGE	   4096
#define OR_GPA_END ((uint64_t)1 << 52)
#define OR_MMIO	   2
#define OR_LOGS	   3
#define OR_PINS	   16

enum or_prot { OR_R = 1, OR_W = 2, OR_X = 4 };
enum or_kind { OR_ANON = 0, OR_FILE = 1, OR_FOREIGN = 2 };
enum or_flag { OR_MERGEABLE = 1, OR_TRAP = 2, OR_EXTERNAL = 4 };
enum or_advice { OR_MERGE = 1, OR_UNMERGE = 2, OR_DISCARD = 3, OR_WILLNEED = 4 };

/* Contents of a file that regions show. FOREIGN regions write to it. */
struct or_file {
	uint8_t *bytes;
	uint64_t pages;
};

struct or_region {
	uint64_t gpa, len;
	unsigned kind, flags, prot; /* enum or_kind, or_flag, or_prot */
	struct or_file *file;
	uint64_t offset;
	void (*fill)(uint64_t gpa, uint8_t *page); /* OR_TRAP: what the first touch puts there */
};

struct or_page {
	uint64_t gfn;
	uint8_t prot, kind, flags;
	bool read_only; /* FOREIGN: mapped so, and stays so: the file may have been opened for reading */
	uint32_t pins;
	struct or_file *file;
	uint64_t file_page;
	void (*fill)(uint64_t gpa, uint8_t *page);
	uint8_t *bytes; /* FOREIGN: inside file->bytes */
};

struct or_dirty {
	uint64_t gfn;
	bool must, may;
};

struct or_log {
	bool open, fine, accessed;
	struct or_dirty *page; /* sorted */
	size_t count, room;
};

struct or_pin {
	uint64_t gfn, pages;
	unsigned count; /* 0: free */
};

struct or_vm {
	struct or_page *page; /* sorted by gfn */
	size_t count;
	unsigned vcpus;
	struct or_pin pin[OR_PINS];
	struct or_log log[OR_LOGS];
};

struct or_vm *or_create(void);
struct or_vm *or_clone(const struct or_vm *parent);
int or_destroy(struct or_vm *vm); /* -EBUSY: vCPUs, logs or pins; frees it on 0 */
void or_free(struct or_vm *vm);

int or_map(struct or_vm *vm, const struct or_region *r);
int or_unmap(struct or_vm *vm, uint64_t gpa, uint64_t len);
int or_protect(struct or_vm *vm, uint64_t gpa, uint64_t len, unsigned prot);
int or_advise(struct or_vm *vm, uint64_t gpa, uint64_t len, enum or_advice advice);
int or_read(const struct or_vm *vm, uint64_t gpa, void *buf, size_t len);
int or_write(struct or_vm *vm, uint64_t gpa, const void *buf, size_t len);
int or_pin(struct or_vm *vm, uint64_t gpa, uint64_t len);
int or_unpin(struct or_vm *vm, uint64_t gpa, uint64_t len);
int or_mark_dirty(struct or_vm *vm, uint64_t gpa, uint64_t len);

/* A vCPU without paging. `*done`: bytes transferred if the result is not 0. */
int or_load(struct or_vm *vm, uint64_t gpa, void *buf, size_t len, uint64_t *done);
int or_store(struct or_vm *vm, uint64_t gpa, const void *buf, size_t len, uint64_t *done);
int or_fetch(struct or_vm *vm, uint64_t gpa, void *buf, size_t len, uint64_t *done);

/*
 * A write of `buf` failed half way and the guest now reads as `now` there:
 * true if each page of the range is wholly old or wholly new (which is then adopted).
 */
bool or_write_partly(struct or_vm *vm, uint64_t gpa, const uint8_t *buf, const uint8_t *now, size_t len);

struct or_page *or_page_at(const struct or_vm *vm, uint64_t gfn); /* NULL: none */
/* The length of all regions in pages. */
uint64_t or_nominal(const struct or_vm *vm);

/* Returns the index of the log, or -1 if all are open. */
int or_log_open(struct or_vm *vm, bool fine, bool accessed, bool initially_set);
void or_log_close(struct or_vm *vm, int log);
/*
 * A harvest reported the pages whose bits are set. `partial`: there may be
 * more (the ring was full). Returns 0 and starts the next epoch, or says in
 * `*gfn` which page is wrong: -1 lost (written, not reported), -2 invented.
 */
int or_log_collect(struct or_vm *vm, int log, uint64_t gpa, uint64_t len, const uint8_t *bits, bool partial,
		   uint64_t *gfn);

#endif
