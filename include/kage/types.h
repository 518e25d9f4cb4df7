/* SPDX-License-Identifier: MIT */
/**
 * @file
 * What every other header of libkage needs: version, outcomes, forward
 * declarations and the rules of a configuration struct.
 *
 * Rules that hold for all functions of the library:
 *  - `int` results are -errno, or an outcome >= 0 (enum kage_outcome). After
 *    an error, out-parameters are untouched and the engine is as it was.
 *  - Addresses are `uint64_t`, lengths are bytes, both multiples of
 *    KAGE_PAGE_SIZE unless the comment says otherwise.
 *  - Configuration structs begin with `size` (KAGE_CFG fills it). Zero in a
 *    field means its default. A struct that is longer than the library knows
 *    is taken if its tail is zero, else the call returns -E2BIG; one that is
 *    shorter than the first published version returns -EINVAL.
 *  - File descriptors in a config count only if the flag that announces them
 *    is set (0 is a valid descriptor). They are duplicated (O_CLOEXEC).
 *  - Callbacks run on the thread that caused them and must not call back into
 *    the engine unless their comment says so.
 *  - The library starts no thread, installs no signal handler, prints nothing
 *    and opens no path after kage_engine_create().
 *  - Memory of the engine is MADV_DONTFORK and MADV_DONTDUMP. A child of
 *    fork() may only exec or _exit.
 */
#ifndef KAGE_TYPES_H
#define KAGE_TYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KAGE_VERSION_MAJOR 0
#define KAGE_VERSION_MINOR 1
#define KAGE_VERSION_PATCH 0

#ifdef __cplusplus
#define KAGE_BEGIN extern "C" {
#define KAGE_END }
#else
#define KAGE_BEGIN
#define KAGE_END
#endif

#if defined(__GNUC__)
#define KAGE_API __attribute__((visibility("default")))
/* An inline function that the library also exports, for callers that cannot inline C. */
#ifndef KAGE_INLINE
#define KAGE_INLINE extern inline __attribute__((gnu_inline))
#endif
/* Part of such a function; inlined even where the compiler inlines nothing else, so it needs no symbol. */
#define KAGE_HELPER extern inline __attribute__((gnu_inline, always_inline))
#define KAGE_LIKELY(x) __builtin_expect(!!(x), 1)
#else
#error "libkage needs the GNU C dialect (gcc or clang)"
#endif

/** A configuration struct on the stack with its size filled in (C only). */
#define KAGE_CFG(T, ...) (&(struct T){ .size = sizeof(struct T), __VA_ARGS__ })

/** The engine's page: frames stay 4 KiB on every host. */
#define KAGE_PAGE_SHIFT 12
#define KAGE_PAGE_SIZE ((uint64_t)1 << KAGE_PAGE_SHIFT)

/** What a call achieved when it did not fail. Errors are negative errno values. */
enum kage_outcome {
	KAGE_OK = 0,
	/** Lost a race that the caller can win by calling again. */
	KAGE_RETRY = 1,
	/** No memory answers at this guest physical address (or not with this access). */
	KAGE_MMIO = 2,
	/** The guest's own tables forbid the access: deliver the fault to the guest. */
	KAGE_GUEST_FAULT = 3,
	/** Contents are not there yet (a region's pager said so); call again later. */
	KAGE_WAIT = 4,
};

/** Access and permission bits. */
enum kage_access {
	KAGE_READ = 1u << 0,
	KAGE_WRITE = 1u << 1,
	KAGE_EXEC = 1u << 2,
	/** x86: an implicit supervisor access (descriptor tables): SMAP ignores AC, CPL counts as 0. */
	KAGE_IMPLICIT = 1u << 3,
};
#define KAGE_RWX (KAGE_READ | KAGE_WRITE | KAGE_EXEC)

struct iovec;
struct kage_engine;
struct kage_vm;
struct kage_vcpu;
struct kage_dirty;

#endif
