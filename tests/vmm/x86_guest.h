/* SPDX-License-Identifier: MIT */
/* What guest.c needs of x86-64: the time stamp counter, ports, words of memory. */
#ifndef KAGE_TESTS_X86_GUEST_H
#define KAGE_TESTS_X86_GUEST_H

INLINE uint64_t ticks_now(void)
{
	uint32_t lo, hi;

	__asm__ volatile("lfence; rdtsc" : "=a"(lo), "=d"(hi) : : "memory");
	return (uint64_t)hi << 32 | lo;
}

INLINE void out(uint16_t port, uint32_t value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "d"(port) : "memory");
}

INLINE uint32_t in(uint16_t port)
{
	uint32_t value;

	__asm__ volatile("inl %1, %0" : "=a"(value) : "d"(port) : "memory");
	return value;
}

INLINE void store(uint64_t at, uint64_t value)
{
	*(volatile uint64_t *)at = value;
}

INLINE uint64_t load(uint64_t at)
{
	return *(volatile uint64_t *)at;
}

#endif
