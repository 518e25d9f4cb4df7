/* SPDX-License-Identifier: MIT */
/* Runs QEMU until it ends and takes what it prints. */
#ifndef KAGE_TESTS_BAREMETAL_QEMU_H
#define KAGE_TESTS_BAREMETAL_QEMU_H

#include <stddef.h>

#define SKIPPED 77

/*
 * Executes argv[0] with the arguments argv (NULL-terminated). Returns its
 * standard output, at most `size` bytes, to be freed; NULL, and the reason on
 * standard error, unless it exits with `status` within the time it is given.
 */
char *qemu_run(char *const argv[], int status, size_t size);

#endif
