/* SPDX-License-Identifier: MIT */
/* What the x86 guests of this folder say, and how they end. A guest prints to port 0xe9. */
#ifndef KAGE_BAREMETAL_SAY_H
#define KAGE_BAREMETAL_SAY_H

#include <stdint.h>

void guest_unexpected(void); /* boot.S and boot32.S call it */

static void out8(uint16_t port, uint8_t v)
{
	__asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port));
}

static void put(const char *s)
{
	for (; *s; s++)
		out8(0xe9, *s);
}

/* By halves: there is no 64-bit shift of a variable in 32-bit code without a library. */
static void put_hex(uint64_t v, char after)
{
	uint32_t half[2] = { (uint32_t)v, (uint32_t)(v >> 32) };
	unsigned digit = 16;

	while (digit > 1 && !(half[(digit - 1) / 8] >> (digit - 1) % 8 * 4 & 15))
		digit--;
	for (; digit; digit--)
		out8(0xe9, "0123456789abcdef"[half[(digit - 1) / 8] >> (digit - 1) % 8 * 4 & 15]);
	out8(0xe9, after);
}

static void cpuid(uint32_t leaf, uint32_t r[4])
{
	__asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(0));
}

static void leave(uint8_t code)
{
	out8(0xf4, code); /* isa-debug-exit */
}

void guest_unexpected(void)
{
	put("unexpected trap\n");
	leave(2);
}

#endif
