/* SPDX-License-Identifier: MIT */
/*
 * The rules by which guests under KVM share memory, one test or more for each.
 *
 *  1. a frame that several pages show is never mapped MAP_SHARED; who misses a trap gets the kernel's COW
 *  2. native: the kernel breaks COW, the engine finds out; figures say as of when
 *  3. exact: every listener hears of a COW break before the write proceeds
 *  4. auto chooses
 *  5. what a native guest has is read through its window
 *  6. no mapping call loses a write of the guest
 *  7. what was written since a log was collected is what the log says
 *  8. pinned and EXTERNAL memory stays where it is
 *  9. a dead handler can be given up
 */
#include "kvm_test.h"


/* -- 1 -------------------------------------------------------------------------- */

#define SMALL (8 * MIB)

/* Frames that several pages of these guests show; asked of the mirror and of the kernel. */
static uint64_t shared_frames(const struct bare *const guests[], unsigned n)
{
	struct frame_uses mirror = {0}, kernel = {0};
	uint64_t several, by_kernel;

	for (unsigned i = 0; i < n; i++) {
		uses_mirror(&mirror, guests[i]->vm);
		uses_kernel(&kernel, guests[i]->kvm, 0, SMALL);
	}
	several = uses_check(&mirror);
	by_kernel = uses_check(&kernel);
	same(several, by_kernel);
	return several;
}

START_TEST(rule_1_shared_frame_is_never_map_shared)
{
	uint32_t policy = policies[_i];
	struct bare a, b, c;
	const struct bare *const one[] = {&a}, *const all[] = {&a, &b, &c};
	uint64_t i;

	need_single_pages();
	engine_up();
	a = new_bare(SMALL, policy);
	for (i = 0; i < 1024; i++)
		put(&a, i * PAGE, i % 16 < 8 ? 7 : i + 1);
	audit();
	same(shared_frames(one, 1), 0);
	b = clone_bare(&a, policy);
	c = clone_bare(&b, policy);
	ck_assert_uint_ge(shared_frames(all, 3), 1024);
	for (i = 0; i < 1024; i += 3) {
		put(&a, i * PAGE, 5000 + i);
		put(&b, (i + 1) * PAGE, 6000 + i % 9);
		write64(c.vm, i * PAGE, 6000 + i % 9);
	}
	audit();
	shared_frames(all, 3);
	merging(true);
	ck_assert_uint_gt(merge_all(), 0);
	ck_assert_uint_gt(shared_frames(all, 3), 0);
	for (i = 0; i < 1024; i += 5)
		put(&a, i * PAGE, 1000000 + i);
	ck_assert_int_ge(kage_kvm_reconcile(a.kvm, 0), 0);
	audit();
	shared_frames(all, 3);
	is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), 0);
	audit();
	shared_frames(all, 3);
	for (i = 0; i < 1024; i++)
		same(get(&a, i * PAGE), i % 5 == 0 ? 1000000 + i : i % 3 == 0 ? 5000 + i : i % 16 < 8 ? 7 : i + 1);
	free_bare(&a);
	free_bare(&c);
	free_bare(&b);
	engine_down();
}
END_TEST

/* Registrations that are gone: nothing traps, and the kernel's own COW stands behind. */
START_TEST(rule_1_a_missed_registration_costs_memory_only)
{
	struct uffdio_range {
		uint64_t start, len;
	} range;
	const unsigned long unregister = _IOR(0xaa, 0x01, struct uffdio_range);
	struct kage_kvm_config config = config_of(KAGE_KVM_EXACT);
	struct bare a, b;
	uint64_t i;
	int fd;

	engine_up();
	a = new_bare(SMALL, KAGE_KVM_NATIVE);
	for (i = 0; i < 256; i++)
		put(&a, i * PAGE, i + 1);
	b = (struct bare){.fd = new_kvm()};
	ok(kage_vm_clone(a.vm, NULL, &b.vm));
	ok(kage_kvm_attach(b.vm, b.fd, &config, &b.kvm)); /* no helper: nobody would answer */
	fd = kage_kvm_trap_fd(b.kvm);
	ck_assert_int_ge(fd, 0);
	range = (struct uffdio_range){(uintptr_t)at(&b, 0), SMALL};
	ok(ioctl(fd, unregister, &range));
	for (i = 0; i < 256; i++) {
		same(get(&b, i * PAGE), i + 1);
		put(&b, i * PAGE, 100 + i);
	}
	for (i = 0; i < 256; i++) {
		same(get(&a, i * PAGE), i + 1);
		same(read64(a.vm, i * PAGE), i + 1);
	}
	audit();
	is(kage_kvm_reconcile(b.kvm, KAGE_KVM_ADOPT), 0);
	audit();
	for (i = 0; i < 256; i++) {
		same(read64(b.vm, i * PAGE), 100 + i);
		same(get(&a, i * PAGE), i + 1);
	}
	free_bare(&a);
	free_bare(&b);
	engine_down();
}
END_TEST

/* -- 2 --------------------------------------------------------------------------- */

#define DATA_PAGES 1024

/* All pages of the data hold memory. */
static uint64_t fill(struct vmm *vmm, uint64_t pages)
{
	uint64_t base = put_program(vmm, 0, (struct payload_mailbox){.program = PAYLOAD_TOUCH, .pages = pages,
								     .mode = PAYLOAD_WRITE, .seed = 1});

	ok(payload_round(vmm, 0, TIMEOUT_MS));
	audit();
	return base;
}

/* A round of DIRTY, n writes; page by page, what it wrote. Returns how many pages. */
static unsigned write_n(struct vmm *vmm, uint64_t pages, uint64_t writes, uint64_t seed, uint8_t *written)
{
	struct payload_mailbox mb = mailbox(vmm, 0);
	uint64_t page, i;
	unsigned n = 0;

	mb.program = PAYLOAD_DIRTY;
	mb.iterations = writes;
	mb.seed = seed;
	ok(payload_put(vmm, 0, &mb));
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	memset(written, 0, pages);
	for (i = 0; i < mb.iterations; i++) {
		page = read64(vm_of(vmm), mb.log + i * 8) - mb.base / PAGE;
		ck_assert_uint_lt(page, pages);
		n += !written[page];
		written[page] = 1;
	}
	return n;
}

static unsigned write_some(struct vmm *vmm, uint64_t pages, uint64_t seed, uint8_t *written)
{
	return write_n(vmm, pages, pages / 2, seed, written);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t count_class(struct kage_vm *vm, uint64_t len, uint8_t class)
{
	uint8_t *map = malloc(len / PAGE);
	uint64_t n = 0;

	ok(kage_page_map(vm, 0, len, map));
	for (uint64_t i = 0; i < len / PAGE; i++)
		n += map[i] == class;
	free(map);
	return n;
}

static bool private_class(uint8_t class)
{
	return class == KAGE_PAGE_HOME || class == KAGE_PAGE_PRIVATE || class == KAGE_PAGE_HOST_PRIVATE;
}

START_TEST(rule_2_native_reconciles)
{
	uint8_t written[DATA_PAGES], class;
	uint64_t base, before, frames;
	struct kage_kvm_info info;
	struct vmm *a, *b;
	unsigned n, i;
	int left;

	need_single_pages();
	engine_up();
	a = new_vmm((struct vmm_wish){.policy = KAGE_KVM_NATIVE});
	base = fill(a, DATA_PAGES);
	b = clone_vmm(a, true);
	n = write_n(a, DATA_PAGES, 80, 3, written); /* too few to take 2 MiB home whole */
	audit();
	info = info_of(kvm_of(a));
	before = now_ns();
	left = kage_kvm_reconcile(kvm_of(a), 0);
	ck_assert_int_ge(left, (int)n);
	audit();
	same(info_of(kvm_of(a)).reconciles, info.reconciles + 1);
	info = info_of(kvm_of(a));
	same(info.host_private, (uint64_t)left);
	ck_assert_uint_ge(info.reconciled_ns, before);
	ck_assert_uint_le(info.reconciled_ns, now_ns());
	same(stats_of(vm_of(a)).pages_host_private, (uint64_t)left);
	same(count_class(vm_of(a), 32 * MIB, KAGE_PAGE_HOST_PRIVATE), (uint64_t)left);
	for (i = 0; i < DATA_PAGES; i++) {
		class = class_of(vm_of(a), base + i * PAGE);
		same(class, written[i] ? KAGE_PAGE_HOST_PRIVATE : KAGE_PAGE_CLONE);
	}
	/* Frames that both sides have left are nobody's. */
	frames = stats_of(NULL).frames_used;
	for (i = 0; i < DATA_PAGES; i++)
		if (written[i])
			*(volatile uint64_t *)kage_kvm_window(kvm_of(b), base + i * PAGE, 8) = i + 1;
	ck_assert_int_ge(kage_kvm_reconcile(kvm_of(b), 0), (int)n);
	ck_assert_uint_le(stats_of(NULL).frames_used, frames - n);
	audit();
	/* Home again, with what the guest wrote. */
	is(kage_kvm_reconcile(kvm_of(a), KAGE_KVM_ADOPT), 0);
	is(kage_kvm_reconcile(kvm_of(b), KAGE_KVM_ADOPT), 0);
	audit();
	ck_assert_uint_ge(info_of(kvm_of(a)).adopted, n);
	same(info_of(kvm_of(a)).host_private, 0);
	for (i = 0; i < DATA_PAGES; i++) {
		class = class_of(vm_of(a), base + i * PAGE);
		ck_assert_msg(written[i] ? class == KAGE_PAGE_HOME || class == KAGE_PAGE_PRIVATE : class == KAGE_PAGE_CLONE,
			      "page %u, written: %u, class %u", i, written[i], class);
		if (written[i])
			same(read64(vm_of(b), base + i * PAGE), i + 1);
	}
	free_vmm(a);
	free_vmm(b);
	engine_down();
}
END_TEST

/* What the kernel broke comes home when it is cloned. */
START_TEST(rule_2_a_clone_adopts)
{
	uint8_t written[DATA_PAGES];
	struct vmm *a, *b, *c;
	uint64_t base, i;

	engine_up();
	a = new_vmm((struct vmm_wish){.policy = KAGE_KVM_NATIVE});
	base = fill(a, DATA_PAGES);
	b = clone_vmm(a, true);
	write_some(a, DATA_PAGES, 4, written);
	c = clone_vmm(a, true);
	for (i = 0; i < DATA_PAGES; i++) {
		uint8_t class = class_of(vm_of(a), base + i * PAGE);

		same(class, KAGE_PAGE_CLONE);
		same(read64(vm_of(c), base + i * PAGE), read64(vm_of(a), base + i * PAGE));
		if (!written[i])
			same(read64(vm_of(b), base + i * PAGE), read64(vm_of(a), base + i * PAGE));
	}
	free_vmm(a);
	free_vmm(b);
	free_vmm(c);
	engine_down();
}
END_TEST

START_TEST(rule_2_a_step_reconciles_when_anonymous_memory_grew)
{
	const uint64_t pages = 6144; /* 24 MiB */
	struct kage_kvm_info info;
	struct bare a, b;
	uint64_t i;

	engine_up();
	a = new_bare(32 * MIB, KAGE_KVM_NATIVE);
	for (i = 0; i < pages; i++)
		put(&a, i * PAGE, i + 1);
	b = clone_bare(&a, KAGE_KVM_NATIVE);
	is(kage_kvm_reconcile(a.kvm, 0), 0);
	is(kage_kvm_reconcile(b.kvm, 0), 0);
	for (i = 0; i < pages; i++)
		put(&b, i * PAGE, 2 * i + 2); /* unlike before: where only contents can be compared, that counts */
	info = info_of(b.kvm);
	ok(kage_engine_step(engine, NULL, NULL));
	audit();
	ck_assert_uint_gt(info_of(b.kvm).reconciles, info.reconciles);
	same(info_of(b.kvm).host_private, pages);
	for (i = 0; i < pages; i++) {
		same(get(&a, i * PAGE), i + 1);
		same(get(&b, i * PAGE), 2 * i + 2);
	}
	free_bare(&b);
	free_bare(&a);
	engine_down();
}
END_TEST

/* -- 3 -------------------------------------------------------------------------------- */

struct listener {
	struct kage_notifier n;
	uint64_t base;		     /* of the pages that count */
	uint64_t pages;
	const volatile uint64_t *log; /* of the guest's writes; NULL: not looked at */
	uint64_t logged;
	_Atomic uint32_t starts[DATA_PAGES], ends[DATA_PAGES];
	uint64_t at[DATA_PAGES]; /* writes that the guest had done at the last start */
};

static int heard_start(struct kage_notifier *n, const struct kage_range *range)
{
	struct listener *l = (struct listener *)n;
	uint64_t i;

	if (range->reason != KAGE_REASON_CLEAR)
		return 0;
	while (l->log && l->log[l->logged])
		l->logged++;
	for (i = 0; i < l->pages; i++) {
		if (l->base + i * PAGE < range->start || l->base + i * PAGE >= range->end)
			continue;
		l->at[i] = l->logged;
		l->starts[i]++;
	}
	return 0;
}

static void heard_end(struct kage_notifier *n, const struct kage_range *range)
{
	struct listener *l = (struct listener *)n;

	for (uint64_t i = 0; i < l->pages && range->reason == KAGE_REASON_CLEAR; i++)
		if (l->base + i * PAGE >= range->start && l->base + i * PAGE < range->end)
			l->ends[i]++;
}

static const struct kage_notifier_ops listener_ops = {
    .invalidate_range_start = heard_start,
    .invalidate_range_end = heard_end,
};

/* Makes [base, base + pages) shared with a clone, the log behind it the guest's own. */
static struct vmm *share_data(struct vmm *vmm, uint64_t pages)
{
	struct payload_mailbox mb = mailbox(vmm, 0);
	struct vmm *clone = clone_vmm(vmm, true);
	uint64_t base = mb.base;

	mb.program = PAYLOAD_TOUCH;
	mb.mode = PAYLOAD_WRITE;
	mb.base = mb.log;
	mb.pages = 8;
	ok(payload_put(vmm, 0, &mb));
	ok(payload_round(vmm, 0, TIMEOUT_MS));
	memset(kage_kvm_window(kvm_of(vmm), mb.log, 8 * PAGE), 0, 8 * PAGE);
	mb = mailbox(vmm, 0);
	mb.base = base;
	mb.pages = pages;
	ok(payload_put(vmm, 0, &mb));
	return clone;
}

START_TEST(rule_3_listeners_hear_before_the_write)
{
	static struct listener l;
	static uint8_t written[DATA_PAGES];
	struct payload_mailbox mb;
	struct vmm *a, *b;
	uint64_t i, page, base;

	need_single_pages();
	engine_up();
	a = new_vmm((struct vmm_wish){.policy = KAGE_KVM_EXACT});
	base = fill(a, DATA_PAGES);
	b = share_data(a, DATA_PAGES);
	mb = mailbox(a, 0);
	l = (struct listener){.base = base, .pages = DATA_PAGES,
			      .log = kage_kvm_window(kvm_of(a), mb.log, 8 * PAGE)};
	ok(kage_notifier_register(vm_of(a), &l.n, &listener_ops));
	write_some(a, DATA_PAGES, 5, written);
	audit();
	for (i = DATA_PAGES / 2; i-- > 0;) { /* the first write of a page decides */
		page = l.log[i] - base / PAGE;
		ck_assert_uint_le(l.at[page], i);
	}
	for (i = 0; i < DATA_PAGES; i++) {
		ck_assert_msg(l.starts[i] == written[i], "page %lu: %u starts, written: %u", i, l.starts[i], written[i]);
		same(l.ends[i], l.starts[i]);
		ck_assert(written[i] ? private_class(class_of(vm_of(a), base + i * PAGE)) :
				       class_of(vm_of(a), base + i * PAGE) == KAGE_PAGE_CLONE);
	}
	same(info_of(kvm_of(a)).host_private, 0);
	ok(kage_notifier_unregister(&l.n));
	free_vmm(b);
	free_vmm(a);
	engine_down();
}
END_TEST

START_TEST(rule_3_one_answer_continues_a_run)
{
	struct payload_mailbox mb;
	struct vmm *a, *b;
	uint64_t traps, sum;

	engine_up();
	a = new_vmm((struct vmm_wish){.policy = KAGE_KVM_EXACT});
	fill(a, DATA_PAGES);
	b = share_data(a, DATA_PAGES);
	mb = mailbox(a, 0);
	mb.mode = PAYLOAD_READ;
	ok(payload_put(a, 0, &mb));
	traps = info_of(kvm_of(a)).traps;
	ok(payload_round(a, 0, TIMEOUT_MS));
	audit();
	sum = payload_peek(a, 0, checksum);
	traps = info_of(kvm_of(a)).traps - traps;
	ck_assert_uint_ge(traps, 1);
	ck_assert_uint_le(traps, DATA_PAGES / 4);
	same(count_class(vm_of(a), 32 * MIB, KAGE_PAGE_HOST_PRIVATE), 0);
	mb.pages = DATA_PAGES;
	ok(payload_put(b, 0, &mb));
	ok(payload_round(b, 0, TIMEOUT_MS));
	same(payload_peek(b, 0, checksum), sum);
	free_vmm(a);
	free_vmm(b);
	engine_down();
}
END_TEST

START_TEST(rule_3_falls_to_native_and_says_so)
{
	struct kage_kvm_config config = config_of(KAGE_KVM_AUTO);
	struct listener l = {.pages = 0};
	struct kage_kvm_info info;
	struct kage_vm *vm;
	struct bare b;
	int fd;

	engine_up();
	vm = new_vm(SMALL);
	ok(kage_notifier_register(vm, &l.n, &listener_ops));
	config.feature_mask |= 1u << KAGE_KVM_UFFD_CONTINUE_WP;
	b = attach_with(vm, &config);
	info = info_of(b.kvm);
	same(info.policy, KAGE_KVM_NATIVE);
	same(info.feature[KAGE_KVM_UFFD_CONTINUE_WP].used, 0);
	ck_assert_ptr_nonnull(info.feature[KAGE_KVM_UFFD_CONTINUE_WP].why);
	ck_assert_ptr_nonnull(strstr(info.policy_why, "cannot trap"));
	is(kage_kvm_trap_fd(b.kvm), -ENOENT);
	ok(kage_notifier_unregister(&l.n));
	free_bare(&b);
	vm = new_vm(SMALL);
	fd = new_kvm();
	config.policy = KAGE_KVM_EXACT;
	b.kvm = (void *)0x10;
	is(kage_kvm_attach(vm, fd, &config, &b.kvm), -EOPNOTSUPP);
	ck_assert_ptr_eq(b.kvm, (void *)0x10);
	expected_errors++;
	audit();
	close(fd);
	ok(kage_vm_destroy(vm));
	engine_down();
}
END_TEST

/* -- 4 ---------------------------------------------------------------------------------- */

START_TEST(rule_4_auto)
{
	struct listener l = {.pages = 0};
	struct kage_vcpu *vcpu;
	struct kage_vm *vm;
	struct bare b;
	uint32_t with_listeners = can_exact() ? KAGE_KVM_EXACT : KAGE_KVM_NATIVE;

	engine_up();
	b = new_bare(SMALL, KAGE_KVM_AUTO);
	same(info_of(b.kvm).policy, KAGE_KVM_NATIVE);
	free_bare(&b);
	vm = new_vm(SMALL);
	ok(kage_notifier_register(vm, &l.n, &listener_ops));
	b = attach(vm, KAGE_KVM_AUTO);
	same(info_of(b.kvm).policy, with_listeners);
	ok(kage_notifier_unregister(&l.n));
	free_bare(&b);
	vm = new_vm(SMALL);
	ok(kage_vcpu_create(vm, NULL, &vcpu));
	b = attach(vm, KAGE_KVM_AUTO);
	same(info_of(b.kvm).policy, with_listeners);
	kage_vcpu_destroy(vcpu);
	free_bare(&b);
	b = new_bare(SMALL, KAGE_KVM_NATIVE);
	same(info_of(b.kvm).policy, KAGE_KVM_NATIVE);
	free_bare(&b);
	engine_down();
}
END_TEST

/* The policy changes under a guest that runs. The helper is there before: no vCPU waits for one that is yet to come. */
START_TEST(rule_4_policies_change_under_a_running_guest)
{
	static struct listener l;
	struct vmm *a, *b;
	unsigned i, tries;
	int r;

	engine_up();
	merging(true);
	a = new_vmm((struct vmm_wish){.policy = KAGE_KVM_AUTO, .vcpus = 2});
	ok(kage_kvm_helper_start(kvm_of(a)));
	put_stamps(a, 256);
	ok(vmm_start(a));
	stamps_go_on(a, 50);
	b = clone_vmm(a, true);
	same(info_of(kvm_of(a)).policy, KAGE_KVM_NATIVE);
	for (i = 0; i < 6; i++) {
		stamps_go_on(a, 30);
		l = (struct listener){.pages = 0};
		if (i % 2 == 0)
			ok(kage_notifier_register(vm_of(a), &l.n, &listener_ops));
		for (tries = 0, r = -EAGAIN; r == -EAGAIN && tries < 100; tries++)
			r = kage_kvm_set_policy(kvm_of(a), i % 2 ? KAGE_KVM_NATIVE : KAGE_KVM_AUTO);
		ok(r);
		same(info_of(kvm_of(a)).policy, i % 2 ? KAGE_KVM_NATIVE : KAGE_KVM_EXACT);
		audit();
		stamps_go_on(a, 30);
		ok(kage_engine_step(engine, NULL, NULL));
		audit();
		if (i % 2 == 0)
			ok(kage_notifier_unregister(&l.n));
	}
	is(kage_kvm_set_policy(kvm_of(a), 3), -EINVAL);
	check_stamps(a);
	ok(kage_kvm_helper_stop(kvm_of(a)));
	audit();
	free_vmm(b);
	free_vmm(a);
	engine_down();
}
END_TEST

/* -- 5 ------------------------------------------------------------------------------------ */

static struct kage_vcpu *soft_vcpu(struct kage_vm *vm, bool paging)
{
	struct kage_vcpu *vcpu;

	ok(kage_vcpu_create(vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .arch = HOST_ARCH), &vcpu));
	if (paging)
		ok(kage_vcpu_set_regs(vcpu, &HOST_REGS, sizeof(HOST_REGS)));
	return vcpu;
}

static uint64_t load64(struct kage_vcpu *vcpu, uint64_t gva)
{
	struct kage_fault fault;
	uint64_t word = ~(uint64_t)0;

	ok(kage_vcpu_load(vcpu, gva, &word, sizeof(word), &fault));
	return word;
}

START_TEST(rule_5_reads_go_through_the_window)
{
	struct payload_mailbox mb;
	uint8_t written[DATA_PAGES];
	struct kage_vcpu *vcpu;
	struct vmm *a, *b;
	uint64_t base, i;

	engine_up();
	a = new_vmm((struct vmm_wish){.policy = policies[_i]});
	base = fill(a, DATA_PAGES);
	mb = mailbox(a, 0);
	vcpu = soft_vcpu(vm_of(a), true);
	for (i = 0; i < DATA_PAGES; i += 7) /* its TLB knows the frames that are shared in a moment */
		load64(vcpu, base + i * PAGE);
	b = clone_vmm(a, true);
	write_some(a, DATA_PAGES, 6, written);
	for (i = 0; i < mb.pages / 2; i++) { /* the last write of a page decides */
		uint64_t page = read64(vm_of(a), mb.log + i * 8), j = i + 1;

		while (j < mb.pages / 2 && read64(vm_of(a), mb.log + j * 8) != page)
			j++;
		if (j < mb.pages / 2)
			continue;
		same((uint32_t)read64(vm_of(a), page * PAGE + i % 512 * 8), i + 1);
		same((uint32_t)load64(vcpu, page * PAGE + i % 512 * 8), i + 1);
	}
	audit();
	for (i = 0; i < DATA_PAGES; i++)
		same(load64(vcpu, base + i * PAGE), *(uint64_t *)kage_kvm_window(kvm_of(a), base + i * PAGE, 8));
	audit();
	kage_vcpu_destroy(vcpu);
	free_vmm(b);
	free_vmm(a);
	engine_down();
}
END_TEST

/* A soft vCPU that has read a page goes on seeing what the guest writes to it, whatever the kernel does in between. */
START_TEST(rule_5_a_soft_vcpu_sees_every_write)
{
	struct kage_vcpu *vcpu;
	struct bare a, b;
	uint64_t i;

	engine_up();
	a = new_bare(SMALL, policies[_i]);
	vcpu = soft_vcpu(a.vm, false);
	for (i = 0; i < 64; i++) {
		put(&a, i * PAGE, i + 1);
		same(load64(vcpu, i * PAGE), i + 1);
	}
	b = clone_bare(&a, policies[_i]);
	for (i = 0; i < 64; i++) {
		same(load64(vcpu, i * PAGE), i + 1);
		put(&a, i * PAGE, i + 1000);
		same(load64(vcpu, i * PAGE), i + 1000);
		put(&a, i * PAGE, i + 2000);
		same(load64(vcpu, i * PAGE), i + 2000);
		same(get(&b, i * PAGE), i + 1);
	}
	audit();
	kage_vcpu_destroy(vcpu);
	free_bare(&a);
	free_bare(&b);
	engine_down();
}
END_TEST

START_TEST(rule_5_translation_sees_diverged_tables)
{
	const uint64_t leaf = PAYLOAD_TABLES + PAGE; /* of gva 0 */
	struct kage_vcpu *vcpu;
	struct kage_fault fault;
	struct kage_flush flush = {.size = sizeof(flush), .kind = KAGE_FLUSH_ALL};
	struct vmm *a, *b;
	uint64_t base, i;

	engine_up();
	a = new_vmm((struct vmm_wish){.policy = policies[_i]});
	base = fill(a, 64);
	for (i = 0; i < 64; i++)
		write64(vm_of(a), base + i * PAGE, 900 + i);
	b = clone_vmm(a, true);
	vcpu = soft_vcpu(vm_of(a), true);
	for (i = 0; i < 32; i++) {
		uint64_t gva = base + i * PAGE, gpa = base + (63 - i) * PAGE;

		same(load64(vcpu, gva), 900 + i);
		/* the guest's page for gva becomes another one; the first time, the kernel breaks the table's COW */
		*(volatile uint64_t *)kage_kvm_window(kvm_of(a), leaf + gva / PAGE * 8, 8) = gpa | payload_entries.page;
		ok(kage_vm_mark_dirty(vm_of(a), leaf + gva / PAGE * 8, 8));
		ok(kage_vcpu_flush(vcpu, &flush));
		ok(kage_vcpu_translate(vcpu, gva, KAGE_READ, &fault));
		same(fault.gpa, gpa);
		same(load64(vcpu, gva), 900 + 63 - i);
		audit();
	}
	kage_vcpu_destroy(vcpu);
	vcpu = soft_vcpu(vm_of(b), true);
	for (i = 0; i < 64; i++)
		same(load64(vcpu, base + i * PAGE), 900 + i);
	audit();
	kage_vcpu_destroy(vcpu);
	free_vmm(a);
	free_vmm(b);
	engine_down();
}
END_TEST

/* A soft vCPU with the registers of the guest's own one translates as KVM does, in tables that have diverged. */
START_TEST(rule_5_registers_of_the_guest)
{
	const uint64_t leaf = PAYLOAD_TABLES + PAGE;
	struct kage_vcpu *vcpu;
	struct kage_fault fault;
	struct vmm *a, *b;
	uint64_t base, gva, i;

	engine_up();
	a = new_vmm((struct vmm_wish){.policy = KAGE_KVM_NATIVE});
	base = fill(a, 64);
	b = clone_vmm(a, true);
	ok(kage_vcpu_create(vm_of(a), KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .arch = HOST_ARCH), &vcpu));
	for (i = 0; i < 32; i++) {
		uint64_t gpa;

		gva = base + i * PAGE;
		*(volatile uint64_t *)kage_kvm_window(kvm_of(a), leaf + gva / PAGE * 8, 8) = (base + (63 - i) * PAGE) | payload_entries.page;
		ok(kage_kvm_load_regs(vcpu, a->vcpu[0]->fd));
		ck_assert(translated(a, gva + 5, &gpa));
		ok(kage_vcpu_translate(vcpu, gva + 5, 0, &fault));
		same(fault.gpa, gpa);
		same(fault.gpa, base + (63 - i) * PAGE + 5);
	}
	is(kage_kvm_load_regs(NULL, a->vcpu[0]->fd), -EINVAL);
	ck_assert_int_lt(kage_kvm_load_regs(vcpu, -1), 0);
	expected_errors = logged_errors;
	audit();
	kage_vcpu_destroy(vcpu);
	free_vmm(a);
	free_vmm(b);
	engine_down();
}
END_TEST

#if defined(__x86_64__)
#define PDPTES 4

/* Of a table of four directories behind it, each of which maps 2 MiB from `to` on; `absent`: one that it has not. */
static void put_pae_tables(struct kage_vm *vm, uint64_t at, uint64_t to, unsigned absent, uint64_t *pdpte)
{
	for (unsigned i = 0; i < PDPTES; i++) {
		pdpte[i] = i == absent ? 0 : (at + (i + 1) * PAGE) | 1;
		write64(vm, at + i * 8, pdpte[i]);
		write64(vm, at + (i + 1) * PAGE, (to + i * 2 * MIB) | 0xe3);
	}
}

/* What KVM has in the PDPTE registers is what Kage has, and both translate by it. */
static void same_pdptes(struct vmm *a, struct kage_vcpu *vcpu, uint64_t to, unsigned absent, const uint64_t *pdpte)
{
	struct kage_x86_regs regs;
	struct kage_fault fault;

	ok(kage_kvm_load_regs(vcpu, a->vcpu[0]->fd));
	ok(kage_vcpu_get_regs(vcpu, &regs, sizeof(regs)));
	ck_assert_uint_ne(regs.flags & KAGE_X86_PDPTES, 0);
	for (unsigned i = 0; i < PDPTES; i++) {
		uint64_t gva = ((uint64_t)i << 30) + 5, gpa;

		same(regs.pdpte[i], pdpte[i]);
		is(translated(a, gva, &gpa), i != absent);
		is(kage_vcpu_translate(vcpu, gva, 0, &fault), i == absent ? KAGE_GUEST_FAULT : KAGE_OK);
		if (i != absent) {
			same(gpa, to + i * 2 * MIB + 5);
			same(fault.gpa, gpa);
		}
	}
}

/* A KVM that knows long mode alone may refuse, or take the registers and not turn on CR0.PG. */
static bool pae_paging(int fd, struct kvm_sregs2 *sregs2)
{
	struct kvm_sregs got;

	if (ioctl(fd, KVM_SET_SREGS2, sregs2) < 0)
		return false;
	ok(ioctl(fd, KVM_GET_SREGS, &got));
	return got.cr0 >> 31 & 1;
}

/*
 * PAE paging: the four PDPTEs are registers, loaded by MOV to CR3 (Intel SDM vol. 3A 4.4.1), and memory may hold others
 * since. KVM tells them by KVM_GET_SREGS2 (Documentation/virt/kvm/api.rst).
 */
START_TEST(rule_5_pdptes_are_registers)
{
	uint64_t at = payload_free(&payload_small), in_memory[PDPTES], in_cpu[PDPTES];
	struct kvm_sregs2 sregs2;
	struct kvm_sregs sregs;
	struct kage_vcpu *vcpu;
	struct vmm *a;
	int fd, kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), can = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_SREGS2);

	close(kvm);
	need(can > 0, "this kernel does not tell PDPTEs (KVM_CAP_SREGS2, Linux 5.14)");
	engine_up();
	a = new_vmm((struct vmm_wish){.policy = policies[_i]});
	fd = a->vcpu[0]->fd;
	ok(kage_vcpu_create(vm_of(a), KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .arch = HOST_ARCH), &vcpu));
	put_pae_tables(vm_of(a), at + 8 * PAGE, 4 * MIB, 2, in_cpu);
	put_pae_tables(vm_of(a), at, 16 * MIB, 1, in_memory);
	ok(ioctl(fd, KVM_GET_SREGS2, &sregs2));
	sregs2.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
	memcpy(sregs2.pdptrs, in_cpu, sizeof(in_cpu));
	sregs2.cr3 = at;
	sregs2.efer &= ~(uint64_t)0x500; /* LME, LMA */
	sregs2.cs.l = 0;
	sregs2.cs.db = 1;
	if (pae_paging(fd, &sregs2)) {
		same_pdptes(a, vcpu, 4 * MIB, 2, in_cpu);
		ok(ioctl(fd, KVM_GET_SREGS, &sregs));
		ok(ioctl(fd, KVM_SET_SREGS, &sregs)); /* this one loads them from memory, as MOV to CR3 does */
		same_pdptes(a, vcpu, 16 * MIB, 1, in_memory);
	} else {
		printf("skipped: rule_5_pdptes_are_registers: this host's KVM has no PAE paging (tests/virt: others)\n");
	}
	kage_vcpu_destroy(vcpu);
	free_vmm(a);
	engine_down();
}
END_TEST
#endif

/* Pages that are equal in windows, and unlike in the frames that the table names, merge by what is in the windows. */
START_TEST(rule_5_merging_compares_windows)
{
	struct bare a, b, c;
	uint64_t i;

	need_single_pages();
	engine_up();
	a = new_bare(SMALL, KAGE_KVM_NATIVE);
	for (i = 0; i < 512; i++)
		put(&a, i * PAGE, 77); /* equal frames ... */
	b = clone_bare(&a, KAGE_KVM_NATIVE);
	c = clone_bare(&a, KAGE_KVM_NATIVE);
	for (i = 0; i < 512; i++) {
		put(&b, i * PAGE, 3 * i + 1000); /* ... that are not equal any more */
		put(&c, i * PAGE, 3 * i + 1000);
	}
	merging(true);
	merge_all();
	for (i = 0; i < 512; i++) {
		same(get(&a, i * PAGE), 77);
		same(get(&b, i * PAGE), 3 * i + 1000);
		same(get(&c, i * PAGE), 3 * i + 1000);
		same(read64(b.vm, i * PAGE), 3 * i + 1000);
	}
	ck_assert_uint_ge(count_class(c.vm, 512 * PAGE, KAGE_PAGE_MERGED), 400);
	free_bare(&a);
	free_bare(&b);
	free_bare(&c);
	engine_down();
}
END_TEST

/* -- 6 ---------------------------------------------------------------------------------------- */

#define STORM_PAGES 256
#define STORM_MOVES 3000

struct storm {
	struct vmm *vmm[2]; /* that do the same: so their pages are equal when they rest */
	char *model;	    /* memory from gpa 0, as it has to be */
	bool park;
	_Atomic bool stop;
	_Atomic uint64_t clones, steps, adoptions;
};

static void *storm_step(void *arg)
{
	struct storm *s = arg;

	while (!s->stop) {
		ck_assert_int_ge(kage_engine_step(engine, NULL, NULL), 0);
		s->steps++;
		sleep_ms(1);
	}
	return NULL;
}

static void *storm_clone(void *arg)
{
	struct storm *s = arg;
	struct kage_vm *clone;
	unsigned i = 0;

	while (!s->stop) {
		struct vmm *vmm = s->vmm[i++ % 2];

		/* A snapshot wants the vCPUs parked; what they write loses nothing by it either way. */
		if (s->park)
			ok(vmm_park(vmm));
		ok(kage_vm_clone(vm_of(vmm), NULL, &clone));
		if (s->park)
			vmm_unpark(vmm);
		s->clones++;
		sleep_ms(5); /* the guest has to get on */
		ok(kage_vm_destroy(clone));
	}
	return NULL;
}

static void *storm_adopt(void *arg)
{
	struct storm *s = arg;
	unsigned i = 0;

	while (!s->stop) {
		ck_assert_int_ge(kage_kvm_reconcile(kvm_of(s->vmm[i % 2]), i % 5 ? KAGE_KVM_ADOPT : 0), 0);
		s->adoptions++;
		i++;
		sleep_ms(1);
	}
	return NULL;
}

static uint64_t storm_moves(const struct storm *s)
{
	uint64_t moves = stats_of(NULL).ksm_merges;

	for (unsigned i = 0; i < 2; i++) {
		moves += info_of(kvm_of(s->vmm[i])).adopted;
		moves += stats_of(vm_of(s->vmm[i])).cow_breaks;
	}
	return moves;
}

static void storm_compare(const struct storm *s, unsigned i, uint64_t gpa)
{
	const uint64_t *model = (const uint64_t *)(s->model + gpa);
	uint64_t page[512];
	unsigned bad = 0, first = 0;

	ok(kage_vm_read(vm_of(s->vmm[i]), gpa, page, PAGE));
	for (unsigned w = 512; w-- > 0;)
		if (page[w] != model[w]) {
			bad++;
			first = w;
		}
	ck_assert_msg(!bad, "guest %u, gfn %lx: %u words are wrong; word %u is %lx, not %lx; go %lu done %lu count %lu seed %lx",
		      i, gpa / PAGE, bad, first, page[first], model[first], payload_peek(s->vmm[i], 0, go),
		      payload_peek(s->vmm[i], 0, done), payload_peek(s->vmm[i], 0, count),
		      payload_peek(s->vmm[i], 0, seed));
}

/* One round of both, and of the model. */
static void storm_round(struct storm *s, uint64_t seed)
{
	struct payload_mailbox mb = mailbox(s->vmm[0], 0);
	const volatile struct payload_mailbox *at_place;

	mb.seed = seed;
	for (unsigned i = 0; i < 2; i++) {
		ok(payload_put(s->vmm[i], 0, &mb));
		ok(payload_go(s->vmm[i], 0));
		ok(vmm_vcpu_start(s->vmm[i]->vcpu[0]));
	}
	guest_memory(&mb, s->model);
	for (unsigned i = 0; i < 2; i++) {
		ok(vmm_vcpu_wait(s->vmm[i]->vcpu[0], TIMEOUT_MS));
		for (uint64_t j = 0; j < mb.pages; j++)
			storm_compare(s, i, mb.base + j * PAGE);
		at_place = kage_kvm_window(kvm_of(s->vmm[i]), PAYLOAD_MAILBOX, sizeof(*at_place));
		ck_assert_msg(payload_peek(s->vmm[i], 0, checksum) == mb.checksum,
			      "guest %u: checksum %lx, in the window %lx, not %lx; mailbox of class %u; go %lu done %lu", i,
			      payload_peek(s->vmm[i], 0, checksum), at_place->checksum, mb.checksum,
			      class_of(vm_of(s->vmm[i]), PAYLOAD_MAILBOX), payload_peek(s->vmm[i], 0, go),
			      payload_peek(s->vmm[i], 0, done));
	}
}

static void storm(struct vmm_wish wish)
{
	void *(*const work[])(void *) = {storm_step, storm_clone, storm_adopt};
	static struct storm s;
	pthread_t thread[COUNT(work)];
	unsigned round, i, moves = times(STORM_MOVES, STORM_MOVES / 30);

	s = (struct storm){.model = calloc(1, 32 * MIB), .park = wish.policy == KAGE_KVM_EXACT};
	engine_up();
	merging(true);
	s.vmm[0] = new_vmm(wish);
	put_program(s.vmm[0], 0, (struct payload_mailbox){.program = PAYLOAD_MEMORY, .mode = PAYLOAD_RANDOM,
							   .pages = STORM_PAGES, .iterations = 8000});
	ok(vmm_start(s.vmm[0])); /* `go` is `done`: it reports, and knows its program */
	ok(vmm_wait(s.vmm[0], TIMEOUT_MS));
	s.vmm[1] = clone_vmm(s.vmm[0], true);
	for (i = 0; i < COUNT(work); i++)
		ok(pthread_create(&thread[i], NULL, work[i], &s));
	for (round = 0; round < 400 && storm_moves(&s) < moves; round++) {
		storm_round(&s, round + 1);
		if (round % 16 == 0)
			audit();
		if (round % 2)
			sleep_ms(3); /* quiet enough to be merged */
	}
	s.stop = true;
	for (i = 0; i < COUNT(work); i++)
		ok(pthread_join(thread[i], NULL));
	audit();
	ck_assert_uint_ge(storm_moves(&s), moves);
	storm_round(&s, 12345);
	printf("storm: %u rounds, %lu clones, %lu merges, %lu + %lu adopted, %u widened\n", round, s.clones,
	       stats_of(NULL).ksm_merges, info_of(kvm_of(s.vmm[0])).adopted, info_of(kvm_of(s.vmm[1])).adopted,
	       info_of(kvm_of(s.vmm[0])).widened);
	free_vmm(s.vmm[0]);
	free_vmm(s.vmm[1]);
	free(s.model);
	engine_down();
}

START_TEST(rule_6_no_write_is_lost)
{
	storm((struct vmm_wish){.policy = policies[_i]});
}
END_TEST

START_TEST(rule_6_no_write_is_lost_when_mappings_are_scarce)
{
	storm((struct vmm_wish){.policy = policies[_i], .map_budget = 200});
}
END_TEST

START_TEST(rule_6_no_write_is_lost_by_pausing)
{
	storm((struct vmm_wish){.policy = KAGE_KVM_NATIVE, .mask = 1u << KAGE_KVM_UFFD_WP});
}
END_TEST

/* -- 7 ------------------------------------------------------------------------------------------ */

/* What the log says of the data, as bytes. Returns how many pages. */
static unsigned harvest(struct kage_dirty *log, uint64_t base, uint64_t pages, uint8_t *bytes)
{
	uint64_t bits[DATA_PAGES / 64];
	unsigned n = 0;
	int r = kage_dirty_collect(log, base, pages * PAGE, bits, sizeof(bits));

	ck_assert_int_ge(r, 0);
	for (unsigned i = 0; i < pages; i++)
		n += bytes[i] = bits[i / 64] >> (i % 64) & 1;
	is(r, n);
	return n;
}

static void compare_log(const uint8_t *log, const uint8_t *written)
{
	for (unsigned i = 0; i < DATA_PAGES; i++)
		ck_assert_msg(log[i] == written[i], "page %u: %s", i, written[i] ? "lost" : "invented");
}

static void log_rounds(struct vmm *a, uint64_t base)
{
	static uint8_t logged[DATA_PAGES], written[DATA_PAGES];
	struct kage_dirty *log, *other;
	struct vmm *b = NULL;
	unsigned round;

	ok(kage_dirty_open(vm_of(a), KAGE_CFG(kage_dirty_config, .flags = KAGE_DIRTY_FINE), &log));
	ok(kage_dirty_open(vm_of(a), KAGE_CFG(kage_dirty_config, .flags = KAGE_DIRTY_FINE), &other));
	is(harvest(log, base, DATA_PAGES, logged), 0);
	for (round = 0; round < 6; round++) {
		write_some(a, DATA_PAGES, 10 + round, written);
		if (round == 2) /* neither cloning nor what it makes of pages is a write */
			b = clone_vmm(a, true);
		if (round == 3 || round == 5)
			is(kage_kvm_reconcile(kvm_of(a), KAGE_KVM_ADOPT), 0);
		write64(vm_of(a), base + (round + 1) * PAGE, round);
		written[round + 1] = 1;
		((volatile char *)kage_kvm_window(kvm_of(a), base + 700 * PAGE, 2 * PAGE))[PAGE] = 1;
		ok(kage_vm_mark_dirty(vm_of(a), base + 701 * PAGE, 1));
		written[701] = 1;
		if (round == 4)
			merge_all();
		ok(kage_kvm_sync_dirty(kvm_of(a)));
		harvest(log, base, DATA_PAGES, logged);
		compare_log(logged, written);
		is(harvest(log, base, DATA_PAGES, logged), 0);
		audit();
		if (round == 0) { /* an epoch for each consumer */
			harvest(other, base, DATA_PAGES, logged);
			compare_log(logged, written);
		}
	}
	ck_assert_int_gt(kage_dirty_collect(other, 0, 32 * MIB, (uint8_t[32 * MIB / PAGE / 8]){0}, 32 * MIB / PAGE / 8), 0);
	kage_dirty_close(log);
	kage_dirty_close(other);
	free_vmm(b);
}

START_TEST(rule_7_the_log_is_what_the_guest_wrote)
{
	struct vmm *a;

	engine_up();
	merging(true);
	a = new_vmm((struct vmm_wish){.policy = policies[_i]});
	log_rounds(a, fill(a, DATA_PAGES));
	free_vmm(a);
	engine_down();
}
END_TEST

/* KVM logs what vCPUs write. That a write of the VMM's own thread trapped does not put it into the log beside. */
START_TEST(rule_7_pointers_are_marked_by_who_writes)
{
	uint8_t logged[64];
	struct kage_dirty *log;
	struct kage_vm *idle;
	struct bare a;
	uint64_t i;

	engine_up();
	a = new_bare(SMALL, policies[_i]);
	for (i = 0; i < COUNT(logged); i++)
		put(&a, i * PAGE, i + 1);
	ok(kage_vm_clone(a.vm, NULL, &idle)); /* so that under exact policy each first write traps */
	ok(kage_dirty_open(a.vm, KAGE_CFG(kage_dirty_config, .flags = KAGE_DIRTY_FINE), &log));
	for (i = 0; i < COUNT(logged); i++)
		put(&a, i * PAGE, i + 100);
	ok(kage_kvm_sync_dirty(a.kvm));
	is(harvest(log, 0, COUNT(logged), logged), 0);
	ok(kage_vm_mark_dirty(a.vm, 5 * PAGE, 2 * PAGE));
	is(harvest(log, 0, COUNT(logged), logged), 2);
	same(logged[5] + logged[6], 2);
	for (i = 0; i < COUNT(logged); i++)
		same(read64(idle, i * PAGE), i + 1);
	kage_dirty_close(log);
	ok(kage_vm_destroy(idle));
	free_bare(&a);
	engine_down();
}
END_TEST

static bool rings(void)
{
	int fd = new_kvm();
	bool any = ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING) > 0 ||
		   ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL) > 0;

	close(fd);
	return any;
}

START_TEST(rule_7_rings_too)
{
	struct vmm *a;

	need(!(mask & 1u << KAGE_KVM_DIRTY_RING), "dirty rings are masked");
#if defined(__aarch64__)
	need(false, "dirty rings are not used on arm64, by design: rule_7 has the log");
#endif
	need(rings(), "KVM has no dirty rings");
	engine_up();
	merging(true);
	a = new_vmm((struct vmm_wish){.policy = policies[_i], .ring_bytes = 16384}); /* 1,024 entries: it runs full */
	same(info_of(kvm_of(a)).feature[KAGE_KVM_DIRTY_RING].used, 1);
	log_rounds(a, fill(a, DATA_PAGES));
	free_vmm(a);
	engine_down();
}
END_TEST

/* -- 8 ------------------------------------------------------------------------------------------- */

START_TEST(rule_8_pinned_pages_stay)
{
	uint32_t policy = policies[_i];
	struct bare a, b;
	struct iovec iov[4];
	unsigned n = COUNT(iov);
	volatile uint64_t *pinned;
	struct kage_vm *clone;
	uint64_t i;

	engine_up();
	merging(true);
	a = new_bare(SMALL, policy);
	for (i = 0; i < 512; i++)
		put(&a, i * PAGE, 5);
	b = clone_bare(&a, policy);
	ok(kage_vm_pin(a.vm, 16 * PAGE, PAGE, 0, iov, &n));
	same(n, 1);
	same(iov[0].iov_len, PAGE);
	pinned = iov[0].iov_base;
	audit();
	for (i = 1; i < 40; i++) { /* what the device writes is what the guest sees, and the other way round */
		pinned[1] = i;
		same(at(&a, 16 * PAGE)[1], i);
		at(&a, 16 * PAGE)[2] = 2 * i;
		same(pinned[2], 2 * i);
		if (i % 4 == 0) {
			ok(kage_vm_clone(a.vm, NULL, &clone));
			audit();
			same(read64(clone, 16 * PAGE + 8), i);
			ck_assert(private_class(class_of(clone, 16 * PAGE)));
			pinned[1] = 1000;
			same(read64(clone, 16 * PAGE + 8), i);
			same(at(&a, 16 * PAGE)[1], 1000);
			ok(kage_vm_destroy(clone));
		}
		if (i % 4 == 1)
			ok(kage_engine_step(engine, NULL, NULL));
		if (i % 4 == 2)
			is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), 0);
		if (i % 4 == 3)
			put(&a, (17 + i) * PAGE, i);
		audit();
		ck_assert(private_class(class_of(a.vm, 16 * PAGE)));
	}
	is(kage_vm_advise(a.vm, 0, 32 * PAGE, KAGE_ADVICE_DISCARD), -EBUSY);
	is(kage_vm_unmap(a.vm, 0, SMALL), -EBUSY);
	audit();
	same(pinned[0], 5);
	same(get(&b, 16 * PAGE), 5);
	ok(kage_vm_unpin(a.vm, 16 * PAGE, PAGE));
	free_bare(&a);
	free_bare(&b);
	engine_down();
}
END_TEST

/* Where [gpa, gpa + len) of a guest lies, as another process would map it. */
static uint64_t file_place(const struct bare *b, uint64_t gpa, uint64_t len, uint64_t *file)
{
	struct frame_uses u = {0};
	uint64_t first;

	uses_kernel(&u, b->kvm, gpa, len);
	same(u.count, len / PAGE);
	first = u.use[0].page;
	*file = u.use[0].file;
	for (size_t i = 0; i < u.count; i++) {
		ck_assert(u.use[i].shared);
		same(u.use[i].page, first + i);
		same(u.use[i].file, *file);
	}
	free(u.use);
	return first;
}

START_TEST(rule_8_external_memory_stays)
{
	const uint64_t gpa = 64 * MIB, len = 2 * MIB;
	uint32_t policy = policies[_i];
	struct kage_vm *vm;
	struct bare a, b;
	uint64_t i, file, first, f;

	need_single_pages();
	engine_up();
	merging(true);
	vm = new_vm(SMALL);
	ok(kage_vm_map(vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_EXTERNAL, .gpa = gpa, .len = len)));
	a = attach(vm, policy);
	first = file_place(&a, gpa, len, &file);
	for (i = 0; i < len; i += PAGE) {
		put(&a, gpa + i, 9);
		put(&a, i, 9);
	}
	b = clone_bare(&a, policy);
	same(file_place(&a, gpa, len, &f), first);
	same(f, file);
	for (i = 0; i < len; i += PAGE) {
		same(get(&b, gpa + i), 9);
		put(&a, gpa + i, 10);
		same(get(&b, gpa + i), 9);
	}
	merge_all();
	is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), 0);
	audit();
	same(file_place(&a, gpa, len, &f), first);
	same(f, file);
	same(count_class(a.vm, SMALL, KAGE_PAGE_MERGED) > 0, 1);
	ck_assert(private_class(class_of(a.vm, gpa)));
	is(kage_vm_advise(a.vm, gpa, len, KAGE_ADVICE_DISCARD), -EOPNOTSUPP);
	is(kage_vm_advise(a.vm, gpa, len, KAGE_ADVICE_MERGEABLE), -EOPNOTSUPP);
	audit();
	free_bare(&a);
	free_bare(&b);
	engine_down();
}
END_TEST

/* -- 9 ---------------------------------------------------------------------------------------------- */

/* A vCPU waits for a handler that never comes; the VMM's watchdog gives it up. */
START_TEST(rule_9_a_dead_handler)
{
	uint8_t written[DATA_PAGES];
	struct payload_mailbox mb;
	struct vmm *a, *b;
	uint64_t base, i, sum = 0;
	bool helper = _i == 1;
	int fd;

	engine_up();
	a = new_vmm((struct vmm_wish){.policy = KAGE_KVM_EXACT});
	base = fill(a, DATA_PAGES);
	b = share_data(a, DATA_PAGES);
	if (!helper)
		ok(kage_kvm_helper_stop(kvm_of(a)));
	audit();
	mb = mailbox(a, 0);
	mb.mode = PAYLOAD_READ | PAYLOAD_WRITE;
	mb.seed = 99;
	for (i = 0; i < DATA_PAGES; i++)
		sum = (sum << 1 | sum >> 63) + read64(vm_of(b), base + i * PAGE);
	fd = kage_kvm_trap_fd(kvm_of(a));
	if (helper) {
		is(fd, -ENOENT);
		ok(payload_put(a, 0, &mb));
		ok(payload_go(a, 0));
		ok(vmm_start(a));
		ok(kage_kvm_trap_abandon(kvm_of(a)));
	} else {
		/* without a handler a VMM's write to shared memory is the engine's, and needs none */
		ok(payload_put(a, 0, &mb));
		ok(payload_go(a, 0));
		ok(vmm_start(a));
		is(vmm_vcpu_wait(a->vcpu[0], 200), -ETIMEDOUT); /* it waits for its handler */
		ok(kage_kvm_trap_abandon(kvm_of(a)));
	}
	ok(vmm_wait(a, TIMEOUT_MS));
	is(kage_kvm_trap_abandon(kvm_of(a)), -ENOENT);
	is(kage_kvm_trap_fd(kvm_of(a)), -ENOENT);
	is(kage_kvm_trap_run(kvm_of(a), 0), -ENOENT);
	same(payload_peek(a, 0, count), DATA_PAGES);
	same(payload_peek(a, 0, checksum), sum);
	same(info_of(kvm_of(a)).policy, KAGE_KVM_NATIVE);
	audit();
	if (helper)
		ok(kage_kvm_helper_stop(kvm_of(a)));
	ck_assert_int_ge(kage_kvm_reconcile(kvm_of(a), 0), 0);
	audit();
	for (i = 0; i < DATA_PAGES; i++)
		ck_assert_uint_ne(read64(vm_of(a), base + i * PAGE), read64(vm_of(b), base + i * PAGE));
	is(kage_kvm_reconcile(kvm_of(a), KAGE_KVM_ADOPT), 0);
	audit();
	write_some(a, DATA_PAGES, 1, written);
	free_vmm(a);
	free_vmm(b);
	engine_down();
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("kvm rules");

	skip_without_kvm();
	probe();
	add_policies(suite, rule_1_shared_frame_is_never_map_shared);
	add_test(suite, rule_1_a_missed_registration_costs_memory_only, can_exact());
	add_test(suite, rule_2_native_reconciles, 1);
	add_test(suite, rule_2_a_clone_adopts, 1);
	add_test(suite, rule_2_a_step_reconciles_when_anonymous_memory_grew, 1);
	add_test(suite, rule_3_listeners_hear_before_the_write, can_exact());
	add_test(suite, rule_3_one_answer_continues_a_run, can_exact());
	add_test(suite, rule_3_falls_to_native_and_says_so, 1);
	add_test(suite, rule_4_auto, 1);
	add_test(suite, rule_4_policies_change_under_a_running_guest, can_exact());
	add_policies(suite, rule_5_reads_go_through_the_window);
	add_policies(suite, rule_5_a_soft_vcpu_sees_every_write);
	add_policies(suite, rule_5_translation_sees_diverged_tables);
	add_test(suite, rule_5_registers_of_the_guest, 1);
#if defined(__x86_64__)
	add_policies(suite, rule_5_pdptes_are_registers);
#endif
	add_test(suite, rule_5_merging_compares_windows, 1);
	add_policies(suite, rule_6_no_write_is_lost);
	add_policies(suite, rule_6_no_write_is_lost_when_mappings_are_scarce);
	add_test(suite, rule_6_no_write_is_lost_by_pausing, 1);
	add_policies(suite, rule_7_the_log_is_what_the_guest_wrote);
	add_policies(suite, rule_7_pointers_are_marked_by_who_writes);
	add_policies(suite, rule_7_rings_too);
	add_policies(suite, rule_8_pinned_pages_stay);
	add_policies(suite, rule_8_external_memory_stays);
	add_test(suite, rule_9_a_dead_handler, 2 * can_exact());
	return run(suite);
}
