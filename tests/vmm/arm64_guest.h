/* SPDX-License-Identifier: MIT */
/*
 * What guest.c needs of arm64: the virtual counter, "ports" (words at PAYLOAD_PORTS), MMIO,
 * and exception vectors.
 *
 * An access that leaves the guest is one plain load or store of one register: for others (pairs, those that
 * change their base register) the CPU does not tell KVM what was accessed (Arm ARM, ISS encoding for a
 * Data Abort, ISV), so the compiler may not choose.
 */
#ifndef KAGE_TESTS_ARM64_GUEST_H
#define KAGE_TESTS_ARM64_GUEST_H

INLINE uint64_t ticks_now(void)
{
	uint64_t ticks;

	__asm__ volatile("isb; mrs %0, cntvct_el0" : "=r"(ticks) : : "memory");
	return ticks;
}

INLINE void store(uint64_t at, uint64_t value)
{
	__asm__ volatile("str %0, [%1]" : : "r"(value), "r"(at) : "memory");
}

INLINE uint64_t load(uint64_t at)
{
	uint64_t value;

	__asm__ volatile("ldr %0, [%1]" : "=r"(value) : "r"(at) : "memory");
	return value;
}

INLINE void out(uint16_t port, uint32_t value)
{
	uint64_t at = PAYLOAD_PORTS + port;

	__asm__ volatile("str %w0, [%1]" : : "r"(value), "r"(at) : "memory");
}

INLINE uint32_t in(uint16_t port)
{
	uint64_t at = PAYLOAD_PORTS + port;
	uint32_t value;

	__asm__ volatile("ldr %w0, [%1]" : "=r"(value) : "r"(at) : "memory");
	return value;
}

/*
 * Whatever exception: what happened is left at PAYLOAD_FAULT (ESR, FAR, ELR, SPSR), and the machine is
 * reset by PSCI, which ends KVM_RUN with KVM_EXIT_SYSTEM_EVENT.
 */
__asm__(".pushsection vmm_guest, \"ax\", %progbits\n"
	".balign 2048\n"
	".globl guest_vectors\n"
	".hidden guest_vectors\n"
	".type guest_vectors, %function\n"
	"guest_vectors:\n"
	".rept 16\n"
	"	.balign 128\n"
	"	mov	x0, #" PAYLOAD_FAULT_TEXT "\n"
	"	mrs	x1, esr_el1\n"
	"	str	x1, [x0]\n"
	"	mrs	x1, far_el1\n"
	"	str	x1, [x0, #8]\n"
	"	mrs	x1, elr_el1\n"
	"	str	x1, [x0, #16]\n"
	"	mrs	x1, spsr_el1\n"
	"	str	x1, [x0, #24]\n"
	"	movz	w0, #0x8400, lsl #16\n" /* SYSTEM_RESET */
	"	movk	w0, #9\n"
	"	hvc	#0\n"
	"	b	.\n"
	".endr\n"
	".popsection\n");

#endif
