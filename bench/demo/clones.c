/* SPDX-License-Identifier: MIT */
/*
 * Many clones of one guest, and a stamp of its own in some pages of each.
 *
 * Which pages a clone writes and what it writes there are functions of its
 * index, so that the proof knows them without being told. Half of the writes
 * go through a soft vCPU with paging off (gva = gpa): one with the guest's
 * CR3 would set dirty bits in the guest's own tables, as the architecture
 * says, and the bytes to prove would be others.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "demo.h"

int clones_init(struct clones *c, unsigned n, unsigned writes, uint64_t pages)
{
	*c = (struct clones){ .n = n, .writes = writes };
	c->vm = calloc(n, sizeof(*c->vm));
	c->ns = calloc(n, sizeof(*c->ns));
	c->shared = calloc(pages, sizeof(*c->shared));
	if (!c->vm || !c->ns || !c->shared)
		return -ENOMEM;
	return 0;
}

void clones_finish(struct clones *c)
{
	for (unsigned i = 0; c->vm && i < c->n; i++)
		kage_vm_destroy(c->vm[i]);
	free(c->vm);
	free(c->ns);
	free(c->shared);
	*c = (struct clones){ 0 };
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

int clones_make(struct clones *c, struct kage_vm *parent)
{
	for (unsigned i = 0; i < c->n; i++) {
		uint64_t start = host_ns();
		int err = kage_vm_clone(parent, NULL, &c->vm[i]);

		if (err)
			return err;
		c->ns[i] = host_ns() - start;
	}
	qsort(c->ns, c->n, sizeof(*c->ns), by_value);
	return 0;
}

uint64_t clones_page(const struct clones *c, unsigned i, unsigned k)
{
	uint64_t stride = c->nshared / c->writes;

	return c->shared[(i * (uint64_t)7919 + k * stride) % c->nshared];
}

unsigned clones_stamp(unsigned i, uint64_t page, uint8_t stamp[STAMP_BYTES])
{
	char text[STAMP_BYTES + 1];
	int n = snprintf(text, sizeof(text), "kage demo: clone %u wrote its page %lu", i,
			 (unsigned long)page);

	memset(stamp, '.', STAMP_BYTES);
	memcpy(stamp, text, (size_t)n);
	return (unsigned)((i + page) % (KAGE_PAGE_SIZE / STAMP_BYTES)) * STAMP_BYTES;
}

/* What the writers may choose from: pages that are present and not the guest's alone. */
static int find_shared(struct clones *c, struct kage_vm *parent, uint8_t *map, uint64_t pages)
{
	int err = kage_page_map(parent, 0, pages << KAGE_PAGE_SHIFT, map);

	if (err)
		return err;
	c->nshared = 0;
	for (uint64_t p = 0; p < pages; p++)
		if (map[p] == KAGE_PAGE_CLONE || map[p] == KAGE_PAGE_MERGED || map[p] == KAGE_PAGE_ZERO)
			c->shared[c->nshared++] = p;
	return c->nshared < c->writes ? -ENODATA : 0;
}

static int write_one(const struct clones *c, unsigned i)
{
	struct kage_vcpu *vcpu;
	/* a small TLB: clearing the default one would cost more than the writes */
	int err = kage_vcpu_create(c->vm[i],
				   KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .tlb_bits = 9), &vcpu);

	if (err)
		return err;
	for (unsigned k = 0; !err && k < c->writes; k++) {
		uint64_t page = clones_page(c, i, k);
		uint8_t stamp[STAMP_BYTES];
		uint64_t gpa = (page << KAGE_PAGE_SHIFT) + clones_stamp(i, page, stamp);

		if (k % 2)
			err = kage_vm_write(c->vm[i], gpa, stamp, STAMP_BYTES);
		else
			err = kage_vcpu_store(vcpu, gpa, stamp, STAMP_BYTES, NULL);
	}
	kage_vcpu_destroy(vcpu);
	return err > 0 ? -EFAULT : err;
}

int clones_write(struct clones *c, struct kage_vm *parent, uint8_t *map, uint64_t pages)
{
	int err = find_shared(c, parent, map, pages);

	for (unsigned i = 0; !err && i < c->n; i++) {
		err = write_one(c, i);
		host_progress("clones writing: %u of %u", i + 1, c->n);
	}
	return err;
}
