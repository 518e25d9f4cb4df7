/* SPDX-License-Identifier: MIT */
/*
 * Finds linux_banner as a debugger would: by virtual address.
 *
 * The kernel's text and data lie somewhere in the 1 GiB below the modules,
 * where address layout randomisation put them (Linux,
 * Documentation/arch/x86/x86_64/mm.rst). Every mapped page of it is loaded
 * through the soft vCPU, so through the guest's own tables; holes are skipped
 * by the size of the guest entry that is not present.
 *
 * Several strings begin like it. Copies in the log buffer are data, where the
 * banner is constant: its page may not be written by the kernel either. Linux
 * 6.1 has a weak definition too, of an early link stage, whose string stays in
 * .rodata; the object with the real one is linked last (init/version.c and
 * scripts/link-vmlinux.sh). So it is the last one that is read-only.
 */
#include <ctype.h>
#include <errno.h>
#include <string.h>
#include "demo.h"

#define KERNEL_START 0xffffffff80000000u
#define KERNEL_END 0xffffffffc0000000u
#define CHUNK (2u << 20)
#define BEGINNING "Linux version "
#define KEEP (sizeof(BEGINNING)) /* one more than a match that ends in the next chunk has before */

static uint64_t entry_bytes(unsigned level)
{
	return KAGE_PAGE_SIZE << (9 * (level > 2 ? 2 : level));
}

static const char *match(const char *p, size_t len)
{
	const char *end = p + len;

	while ((p = memmem(p, (size_t)(end - p), BEGINNING, sizeof(BEGINNING) - 1))) {
		if (p + sizeof(BEGINNING) - 1 < end && isdigit((unsigned char)p[sizeof(BEGINNING) - 1]))
			return p;
		p++;
	}
	return NULL;
}

/* The text byte by byte, as it may cross into another page. -ENOENT: writable, or no newline at its end. */
static int read_banner(struct kage_vcpu *vcpu, uint64_t gva, struct banner *out)
{
	struct kage_fault fault;
	struct banner b = { .gva = gva };
	int err;

	if (kage_vcpu_translate(vcpu, gva, KAGE_WRITE, &fault) != KAGE_GUEST_FAULT)
		return -ENOENT;
	err = kage_vcpu_translate(vcpu, gva, KAGE_READ, &fault);
	b.gpa = fault.gpa;
	b.level = fault.level;
	for (size_t i = 0; !err && i < sizeof(b.text); i++) {
		err = kage_vcpu_load(vcpu, gva + i, &b.text[i], 1, NULL);
		if (b.text[i])
			continue;
		if (!i || b.text[i - 1] != '\n')
			return -ENOENT;
		b.text[i - 1] = 0;
		*out = b;
		return 0;
	}
	return err < 0 ? err : -ENOENT;
}

struct scan {
	struct kage_vcpu *vcpu;
	char *keep;    /* the end of the chunk before, if it was the neighbour */
	char *chunk;
	uint64_t next; /* gva after that chunk */
	uint64_t read;
	struct banner *out;
	int found;
};

/* Looks at `len` loaded bytes of `gva`, and at what was kept before them. */
static int scan_chunk(struct scan *s, uint64_t gva, size_t len)
{
	const char *end = s->chunk + len, *p = s->keep;

	if (s->next != gva)
		memset(s->keep, 0, KEEP);
	while ((p = match(p, (size_t)(end - p)))) {
		int err = read_banner(s->vcpu, gva + (uint64_t)(p - s->chunk), s->out);

		if (err && err != -ENOENT)
			return err;
		s->found |= !err;
		p++;
	}
	memcpy(s->keep, end - KEEP, KEEP);
	s->next = gva + len;
	s->read += len;
	return 0;
}

/* One entry's reach from `gva`, or a hole. Sets the number of bytes to go on by. */
static int scan_step(struct scan *s, uint64_t gva, size_t *len)
{
	struct kage_fault fault = { 0 };
	int err = kage_vcpu_translate(s->vcpu, gva, 0, &fault);
	uint64_t bytes = err == KAGE_MMIO ? KAGE_PAGE_SIZE : entry_bytes(fault.level);

	*len = bytes - (gva & (bytes - 1));
	if (*len > CHUNK)
		*len = CHUNK;
	if (!err)
		err = kage_vcpu_load(s->vcpu, gva, s->chunk, *len, NULL);
	if (!err)
		err = scan_chunk(s, gva, *len);
	return err < 0 ? err : 0; /* outcomes: a hole, or no memory behind it */
}

int banner_find(struct kage_vcpu *vcpu, void *buffer, struct banner *out)
{
	struct scan s = { .vcpu = vcpu, .keep = buffer, .chunk = (char *)buffer + KEEP, .out = out };

	for (uint64_t gva = KERNEL_START; gva < KERNEL_END;) {
		size_t len;
		int err = scan_step(&s, gva, &len);

		if (err)
			return err;
		gva += len;
		host_progress("scanning the kernel's addresses: %lx", (unsigned long)gva);
	}
	out->read = s.read;
	return s.found ? 0 : -ENOENT;
}
