/* SPDX-License-Identifier: MIT */
/*
 * The CPU's caches, where what lies in them must not tell anything: lines of a
 * range are written back and dropped from all levels, on all CPUs.
 *
 * x86-64: CLFLUSH (Intel SDM vol. 2A), in every CPU of that architecture. arm64: DC CIVAC (Arm ARM D8), which
 * Linux lets user space execute. Elsewhere: nothing.
 */
#ifndef KAGE_BASE_CACHE_H
#define KAGE_BASE_CACHE_H

#include "base/base.h"

static inline void cache_flush(const void *addr, size_t len)
{
	const char *at = (const char *)ALIGN_DOWN((uintptr_t)addr, (uintptr_t)CACHE_LINE), *end = (const char *)addr + len;

#if defined(__x86_64__)
	for (; at < end; at += CACHE_LINE)
		__asm__ volatile("clflush %0" : : "m"(*at) : "memory");
	__asm__ volatile("mfence" : : : "memory");
#elif defined(__aarch64__)
	for (; at < end; at += CACHE_LINE)
		__asm__ volatile("dc civac, %0" : : "r"(at) : "memory");
	__asm__ volatile("dsb ish" : : : "memory");
#else
	(void)at;
	(void)end;
#endif
}

#endif
