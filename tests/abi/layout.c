/* SPDX-License-Identifier: MIT */
/*
 * Sizes and offsets that programs compiled against these headers rely on.
 *
 * Two kinds. What the inline functions of kage/vcpu.h touch is named by
 * KAGE_VCPU_ABI: whoever changes a figure of the first part gives that macro a
 * new value. Structs that begin with `size` may grow at their end, and the rest
 * may not change at all while the soname stays.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include <kage/kage.h>
#include <kage/backend.h>

#define SIZE(type, n) _Static_assert(sizeof(struct type) == (n), "size of struct " #type)
#define FIRST(type, n) _Static_assert(sizeof(struct type) >= (n), "first published size of struct " #type)
#define AT(type, field, n) _Static_assert(offsetof(struct type, field) == (n), #type "." #field)

#if defined(__LP64__)

_Static_assert(KAGE_VCPU_ABI == 0x4b470002u, "a new layout: new figures here");
SIZE(kage_vcpu_head, 64);
AT(kage_vcpu_head, win, 0);
AT(kage_vcpu_head, ctx, 8);
AT(kage_vcpu_head, tlb, 32);
AT(kage_vcpu_head, mask, 40);
AT(kage_vcpu_head, wanted, 48);
SIZE(kage_tlb_entry, 32);
AT(kage_tlb_entry, tag, 0);
AT(kage_tlb_entry, addend, 24);

FIRST(kage_engine_config, 88);
AT(kage_engine_config, backing, 4);
AT(kage_engine_config, memory_limit, 8);
AT(kage_engine_config, address_space, 16);
AT(kage_engine_config, reserve, 24);
AT(kage_engine_config, seed, 32);
AT(kage_engine_config, window_timeout_ms, 40);
AT(kage_engine_config, log, 48);
AT(kage_engine_config, log_opaque, 56);
AT(kage_engine_config, alloc, 64);
SIZE(kage_alloc, 24);
FIRST(kage_budget, 24);
FIRST(kage_progress, 40);
FIRST(kage_tune, 16);
FIRST(kage_domain_config, 16);
FIRST(kage_audit, 40);
FIRST(kage_vm_config, 16);
FIRST(kage_region, 64);
AT(kage_region, gpa, 16);
AT(kage_region, len, 24);
AT(kage_region, fd, 32);
AT(kage_region, offset, 40);
AT(kage_region, touch, 48);
AT(kage_region, opaque, 56);
FIRST(kage_vcpu_config, 40);
AT(kage_vcpu_config, code_written, 24);
AT(kage_vcpu_config, opaque, 32);
FIRST(kage_x86_regs, 48);
SIZE(kage_x86_regs, 88);
AT(kage_x86_regs, cr0, 0);
AT(kage_x86_regs, pkru, 44);
AT(kage_x86_regs, flags, 48);
AT(kage_x86_regs, pdpte, 56);
SIZE(kage_arm64_regs, 40);
SIZE(kage_fault, 48);
AT(kage_fault, gva, 0);
AT(kage_fault, gpa, 8);
AT(kage_fault, access, 16);
AT(kage_fault, vector, 20);
AT(kage_fault, error, 24);
AT(kage_fault, level, 28);
AT(kage_fault, done, 32);
FIRST(kage_flush, 32);
FIRST(kage_tlb_layout, 48);
FIRST(kage_dirty_config, 16);
SIZE(kage_dirty_run, 16);
FIRST(kage_stats, 400);
AT(kage_stats, pages_nominal, 8);
AT(kage_stats, faults, 104);
AT(kage_stats, ksm_pages_shared, 200);
AT(kage_stats, ksm_general_profit, 280);
AT(kage_stats, shadow_pages, 288);
SIZE(kage_digest, 16);
SIZE(kage_share, 64);
AT(kage_share, pages_private, 24);
SIZE(kage_clock, 16);
AT(kage_engine_config, clock, 88);
AT(kage_tune, cpu_share, 16);
AT(kage_progress, wait_usec, 40);
FIRST(kage_census, 48);
AT(kage_census, pages, 8);
AT(kage_census, common, 40);

SIZE(kage_range, 48);
AT(kage_range, start, 0);
AT(kage_range, end, 8);
AT(kage_range, reason, 16);
AT(kage_range, flags, 20);
AT(kage_range, lost, 24);
AT(kage_range, owner, 32);
AT(kage_range, id, 40);
SIZE(kage_notifier_ops, 40);
SIZE(kage_notifier, 56);
SIZE(kage_interval, 88);
SIZE(kage_reader, 64);
SIZE(kage_page, 32);
AT(kage_page, hva, 0);
AT(kage_page, gpa, 8);
AT(kage_page, len, 16);
AT(kage_page, prot, 24);

#endif

_Static_assert(KAGE_OK == 0 && KAGE_RETRY == 1 && KAGE_MMIO == 2 && KAGE_GUEST_FAULT == 3 && KAGE_WAIT == 4,
	       "outcomes");
_Static_assert(KAGE_READ == 1 && KAGE_WRITE == 2 && KAGE_EXEC == 4 && KAGE_RWX == 7, "access bits");

static int checks, failures;

static void is(const char *what, uint64_t got, uint64_t want)
{
	checks++;
	if (got == want)
		return;
	failures++;
	printf("%s: the library says %llu, the header %llu\n", what, (unsigned long long)got,
	       (unsigned long long)want);
}

/* What the library tells a JIT is what the header tells a compiler. */
static void check_layout(void)
{
	struct kage_tlb_layout l = { .size = sizeof(l) };

	is("kage_vcpu_layout()", (uint64_t)kage_vcpu_layout(&l), KAGE_OK);
	is("abi", l.abi, KAGE_VCPU_ABI);
	is("win", l.win_offset, offsetof(struct kage_vcpu_head, win));
	is("ctx", l.ctx_offset, offsetof(struct kage_vcpu_head, ctx));
	is("wanted", l.wanted_offset, offsetof(struct kage_vcpu_head, wanted));
	is("tlb", l.tlb_offset, offsetof(struct kage_vcpu_head, tlb));
	is("entry size", l.entry_size, sizeof(struct kage_tlb_entry));
	is("mask", l.mask_offset, offsetof(struct kage_vcpu_head, mask));
	is("index shift", l.index_shift, KAGE_TLB_SHIFT);
	is("tag", l.tag_offset, offsetof(struct kage_tlb_entry, tag));
	is("addend", l.addend_offset, offsetof(struct kage_tlb_entry, addend));
	is("kage_vcpu_layout(NULL)", (uint64_t)kage_vcpu_layout(NULL), (uint64_t)-EINVAL);
}

/* A struct from the future: a zero tail is taken, anything else is -E2BIG and changes nothing. */
static void check_tail(void)
{
	struct {
		struct kage_tlb_layout known;
		unsigned char tail[24];
	} longer;

	memset(&longer, 0, sizeof(longer));
	longer.known.size = sizeof(longer);
	is("a zero tail", (uint64_t)kage_vcpu_layout(&longer.known), KAGE_OK);
	is("a zero tail: abi", longer.known.abi, KAGE_VCPU_ABI);
	longer.known.size = sizeof(longer);
	longer.known.abi = 77;
	longer.tail[23] = 1;
	is("a tail that is not zero", (uint64_t)kage_vcpu_layout(&longer.known), (uint64_t)-E2BIG);
	is("a tail that is not zero: abi", longer.known.abi, 77);
	longer.known.size = 4;
	is("too short", (uint64_t)kage_vcpu_layout(&longer.known), (uint64_t)-EINVAL);
}

int main(void)
{
	is("kage_version()", kage_version(),
	   KAGE_VERSION_MAJOR << 16 | KAGE_VERSION_MINOR << 8 | KAGE_VERSION_PATCH);
	check_layout();
	check_tail();
	printf("layout: %d checks, %d failed\n", checks, failures);
	return failures != 0;
}
