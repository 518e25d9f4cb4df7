/* SPDX-License-Identifier: MIT */
/*
 * What merging's scan reads of a guest under KVM: pages that were written, each once, and nothing else.
 *
 * structures
 *	scanned		a guest, of which a stretch of data may be merged, and how many pages had been read
 *
 * invariants
 *	R1. Only the data is mergeable, and no two pages of it are equal: so no other page is read, none is merged, and what the
 *	    guest has beside (tables, mailbox, log) does not count.
 *	R2. There is no back-off: each page that is written is read once it has been quiet.
 *	R3. Guests whose mirror works by granules of several pages are left alone by merging (mm/mirror.h, V6): nothing
 *	    of them is read, whatever they write. What they write is in the logs all the same (rule 7 of test_rules.c).
 */
#include "kvm_test.h"

#define DATA	400
#define SETTLES 5 /* passes: written, quiet; or made private by the host kernel, quiet, at home, quiet, read */

struct scanned {
	struct kage_vm *vm;
	uint64_t base, seen;
};

static void tune(void)
{
	ok(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE | KAGE_TUNE_NO_BACKOFF)));
}

/* R1 */
static struct scanned scanned_of(struct kage_vm *vm, uint64_t len, uint64_t base, uint64_t pages)
{
	ok(kage_vm_advise(vm, 0, len, KAGE_ADVICE_UNMERGEABLE));
	ok(kage_vm_advise(vm, base, pages * PAGE, KAGE_ADVICE_MERGEABLE));
	return (struct scanned){.vm = vm, .base = base};
}

static uint64_t reads_since(struct scanned *s)
{
	uint64_t now = stats_of(s->vm).ksm_pages_scanned, n = now - s->seen;

	s->seen = now;
	return n;
}

/* Pages that passes read until all is quiet. */
static uint64_t reads(struct scanned *s)
{
	for (unsigned i = 0; i < SETTLES; i++) {
		ok(kage_engine_step(engine, NULL, NULL));
		audit();
	}
	return reads_since(s);
}

/* R3 */
static uint64_t want(uint64_t pages)
{
	return granule > PAGE ? 0 : pages;
}

static void fill(struct vmm *vmm, uint64_t base)
{
	put_program(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_TOUCH, .base = base, .pages = DATA,
						     .mode = PAYLOAD_WRITE, .seed = 1});
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	audit();
}

/* Writes of the vCPU, to pages that it draws. Returns how many pages. */
static uint64_t guest_writes(struct vmm *vmm, uint64_t writes, uint64_t seed)
{
	struct payload_mailbox mb = mailbox(vmm, 0);
	bool written[DATA] = {false};
	uint64_t n = 0;

	mb.program = PAYLOAD_DIRTY;
	mb.iterations = writes;
	mb.seed = seed;
	ok(payload_put(vmm, 0, &mb));
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	for (uint64_t i = 0; i < writes; i++) {
		uint64_t page = read64(vm_of(vmm), mb.log + i * 8) - mb.base / PAGE;

		ck_assert_uint_lt(page, DATA);
		n += !written[page];
		written[page] = true;
	}
	return n;
}

/* kage_vm_write(), and a pointer into the window of which KVM knows nothing. Returns how many pages. */
static uint64_t device_writes(struct vmm *vmm, const struct scanned *s, uint64_t word)
{
	void *window = kage_kvm_window(kvm_of(vmm), s->base + 200 * PAGE, 3 * PAGE);
	volatile uint64_t *p = window;

	ck_assert_ptr_nonnull(window);
	write64(s->vm, s->base + 3 * PAGE, word);
	write64(s->vm, s->base + 9 * PAGE - 4, word << 8 | 1); /* two */
	p[1] = word + 1;
	p[PAGE / 8 + 1] = word + 2;
	ok(kage_vm_mark_dirty(s->vm, s->base + 200 * PAGE, PAGE + 1)); /* the third one was not written */
	return 5;
}

static void rounds(struct vmm *vmm, struct scanned *s, uint64_t seed)
{
	uint64_t n;

	for (unsigned i = 0; i < 3; i++) {
		n = guest_writes(vmm, 20 + 90 * i, seed + i);
		same(reads(s), want(n));
		same(reads(s), 0);
	}
	n = device_writes(vmm, s, seed + 77);
	same(reads(s), want(n));
	same(reads(s), 0);
}

/* A guest and its clone: what the clone shares is known, what either breaks is read once. */
static void clone_rounds(struct vmm *a, struct scanned *s)
{
	struct vmm *b = clone_vmm(a, true);
	struct scanned child = {.vm = vm_of(b), .base = s->base};
	uint64_t n;

	same(reads(s), 0);
	same(reads_since(&child), 0);
	n = guest_writes(a, 30, 1234);
	same(reads(s), want(n));
	same(reads_since(&child), 0);
	n = device_writes(a, s, 4321);
	write64(child.vm, s->base + 50 * PAGE, 99);
	same(reads(s), want(n));
	same(reads_since(&child), want(1));
	free_vmm(b);
	same(reads(s), 0);
}

/* Memory that was loaded anew, and will last: the next step reads it, and no later one does. */
static void restore(struct scanned *s)
{
	static uint64_t page[PAGE / 8];

	for (uint64_t i = 100; i < 164; i++) {
		for (unsigned w = 0; w < PAGE / 8; w++)
			page[w] = i << 32 | (w + 1);
		ok(kage_vm_write(s->vm, s->base + i * PAGE, page, PAGE));
	}
	ok(kage_vm_advise(s->vm, s->base, DATA * PAGE, KAGE_ADVICE_MERGE_FIRST));
	ok(kage_engine_step(engine, NULL, NULL));
	same(reads_since(s), want(64));
	same(reads(s), 0);
}

static void guest_is_read_once(uint32_t policy, uint32_t ring_bytes)
{
	uint64_t base = payload_free(&payload_small) + MIB;
	struct scanned s;
	struct vmm *a;

	engine_up();
	tune();
	a = new_vmm((struct vmm_wish){.policy = policy, .ring_bytes = ring_bytes});
	s = scanned_of(vm_of(a), 32 * MIB, base, DATA);
	fill(a, base);
	same(reads(&s), want(DATA));
	same(reads(&s), 0);
	rounds(a, &s, 10);
	restore(&s);
	clone_rounds(a, &s);
	rounds(a, &s, 20); /* what was the clone's is the guest's alone again, and mapped anew */
	free_vmm(a);
	engine_down();
}

START_TEST(each_write_is_read_once)
{
	guest_is_read_once(policies[_i], 0);
}
END_TEST

START_TEST(rings_each_write_is_read_once)
{
	int fd = new_kvm();
	bool rings = ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING) > 0;

	close(fd);
	need(!(mask & 1u << KAGE_KVM_DIRTY_RING), "dirty rings are masked");
	need(rings, "KVM has no dirty rings that are used (on arm64 none are)");
	guest_is_read_once(policies[_i], 65536);
}
END_TEST

static int touch(void *opaque, uint64_t gpa, void *page)
{
	uint64_t *word = page;

	for (unsigned i = 0; i < PAGE / 8; i++)
		word[i] = gpa + i + 1;
	return 0;
}

/* What traps is read once it has been fetched; not what nobody has touched. */
START_TEST(trapped_memory_is_read_once)
{
	struct scanned s;
	struct bare b;

	need(has(KAGE_KVM_USERFAULTFD), "no userfaultfd");
	engine_up();
	tune();
	ok(kage_vm_create(engine, NULL, &s.vm));
	ok(kage_vm_map(s.vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_TRAP | KAGE_REGION_MERGEABLE, .len = 4 * MIB,
				      .touch = touch)));
	b = attach(s.vm, policies[_i]);
	if (info_of(b.kvm).policy != KAGE_KVM_EXACT)
		ok(kage_kvm_helper_start(b.kvm));
	s.seen = 0;
	same(reads(&s), 0);
	for (uint64_t i = 0; i < 64; i += 16) /* no two of a granule */
		same(get(&b, i * PAGE), i * PAGE + 1);
	same(reads(&s), want(4));
	same(reads(&s), 0);
	write64(b.vm, 5 * PAGE, 7);
	write64(b.vm, 16 * PAGE, 7);
	same(reads(&s), want(2));
	put(&b, 32 * PAGE, 9);
	ok(kage_vm_mark_dirty(b.vm, 32 * PAGE, 8));
	same(reads(&s), want(1));
	same(reads(&s), 0);
	free_bare(&b);
	engine_down();
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("kvm scan");

	skip_without_kvm();
	probe();
	add_policies(suite, each_write_is_read_once);
	add_policies(suite, rings_each_write_is_read_once);
	add_policies(suite, trapped_memory_is_read_once);
	return run(suite);
}
