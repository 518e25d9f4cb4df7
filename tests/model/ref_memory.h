/* SPDX-License-Identifier: MIT */
/*
 * How the reference walkers read and write the guest's memory: eight bytes at
 * an address that is a multiple of eight.
 */
#ifndef KAGE_TESTS_REF_MEMORY_H
#define KAGE_TESTS_REF_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

struct ref_memory {
	bool (*read)(void *arg, uint64_t gpa, uint64_t *value); /* false: no memory there */
	bool (*write)(void *arg, uint64_t gpa, uint64_t value); /* NULL: flags in entries stay as they are */
	void *arg;
};

#endif
