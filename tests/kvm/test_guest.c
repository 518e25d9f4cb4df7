/* SPDX-License-Identifier: MIT */
/*
 * Guests that run while their memory is mapped anew, merged, broken, adopted,
 * cloned and widened under them. Each verifies its own memory: every page carries a stamp
 * that the guest itself, or one of its ancestors, wrote last; or a program's result is
 * compared with what the same program does in this process.
 */
#include "kvm_test.h"

#define STAMPS times(512, 128)

static struct vmm *stamping(struct vmm_wish wish, uint64_t pages)
{
	struct vmm *vmm = new_vmm(wish);

	put_stamps(vmm, pages);
	ok(vmm_start(vmm));
	stamps_go_on(vmm, 50);
	return vmm;
}

/* -- mappings under a running guest ---------------------------------------------- */

/* Memory that the guest does not use comes, changes and goes; pages that it uses are shared and come home. */
START_TEST(mappings_change_under_a_running_guest)
{
	const uint64_t gpa = 256 * MIB, len = 4 * MIB;
	struct kage_vm *vm, *clone;
	struct vmm *vmm;
	unsigned i;

	engine_up();
	vmm = stamping((struct vmm_wish){.policy = policies[_i], .vcpus = 2}, STAMPS);
	vm = vm_of(vmm);
	for (i = 0; i < times(20, 5); i++) {
		ok(kage_vm_map(vm, KAGE_CFG(kage_region, .gpa = gpa, .len = len, .flags = KAGE_REGION_MERGEABLE)));
		audit();
		write64(vm, gpa + i * PAGE, i);
		same(*(volatile uint64_t *)kage_kvm_window(kvm_of(vmm), gpa + i * PAGE, 8), i);
		ok(vmm_park(vmm)); /* slots are cut */
		ok(kage_vm_protect(vm, gpa + MIB, MIB, KAGE_READ));
		vmm_unpark(vmm);
		is(kage_vm_write(vm, gpa + MIB, &i, 4), KAGE_MMIO);
		audit();
		ok(vmm_park(vmm));
		ok(kage_vm_clone(vm, NULL, &clone));
		vmm_unpark(vmm);
		stamps_go_on(vmm, 20);
		same(read64(clone, gpa + i * PAGE), i);
		ok(kage_vm_destroy(clone));
		ok(vmm_park(vmm));
		ok(kage_vm_protect(vm, gpa + MIB, MIB, KAGE_RWX));
		vmm_unpark(vmm);
		ok(kage_vm_advise(vm, gpa, 2 * MIB, KAGE_ADVICE_DISCARD));
		same(read64(vm, gpa + i * PAGE), 0);
		same(*(volatile uint64_t *)kage_kvm_window(kvm_of(vmm), gpa + i * PAGE, 8), 0);
		audit();
		is(kage_kvm_reconcile(kvm_of(vmm), KAGE_KVM_ADOPT), 0);
		ok(vmm_park(vmm));
		ok(kage_vm_unmap(vm, gpa + 3 * MIB, MIB)); /* a part first */
		vmm_unpark(vmm);
		ck_assert_ptr_null(kage_kvm_window(kvm_of(vmm), gpa + 3 * MIB - PAGE, 2 * PAGE));
		audit();
		ok(kage_vm_unmap(vm, gpa, len));
		ck_assert_ptr_null(kage_kvm_window(kvm_of(vmm), gpa, PAGE));
		audit();
	}
	check_stamps(vmm);
	free_vmm(vmm);
	engine_down();
}
END_TEST

/* -- merge, break, adopt, heal, merge again ---------------------------------------- */

#define EQUAL_PAGES times(1024, 256)

static void touch_round(struct vmm *vmm, uint64_t seed)
{
	payload_poke(vmm, 0, seed, seed);
	ok(payload_go(vmm, 0));
	ok(vmm_vcpu_start(vmm->vcpu[0]));
}

/*
 * vCPU 0 of both guests fills the same pages with the same words, vCPU 1 stamps for ever. Merging runs all
 * the time, on another thread and between rounds.
 */
static void *step_for_ever(void *arg)
{
	_Atomic bool *stop = arg;

	while (!*stop) {
		if (kage_engine_step(engine, NULL, NULL))
			atomic_fetch_add(&logged_errors, 1);
		sleep_ms(1);
	}
	return NULL;
}

static void check_touched(struct vmm *vmm, struct vmm *other)
{
	struct payload_mailbox mb = mailbox(vmm, 0);
	uint64_t page[512], theirs[512], seen, seen_theirs;

	for (uint64_t i = 0; i < mb.pages; i++) {
		ok(kage_vm_read(vm_of(vmm), mb.base + i * PAGE, page, PAGE));
		ok(kage_vm_read(vm_of(other), mb.base + i * PAGE, theirs, PAGE));
		seen = *(volatile uint64_t *)kage_kvm_window(kvm_of(vmm), mb.base + i * PAGE, 8);
		seen_theirs = *(volatile uint64_t *)kage_kvm_window(kvm_of(other), mb.base + i * PAGE, 8);
		ck_assert_msg(!memcmp(page, theirs, PAGE) && page[0] && seen == page[0] && seen_theirs == page[0],
			      "page %lu: read %lx and %lx, in the windows %lx and %lx, of classes %u and %u", i, page[0],
			      theirs[0], seen, seen_theirs, class_of(vm_of(vmm), mb.base + i * PAGE),
			      class_of(vm_of(other), mb.base + i * PAGE));
	}
}

START_TEST(merge_break_adopt_heal_merge)
{
	struct vmm *vmm[2];
	_Atomic bool stop = false;
	pthread_t thread;
	uint64_t merged = 0;
	unsigned i, round, tries;

	need_single_pages();
	engine_up();
	merging(true);
	for (i = 0; i < 2; i++) {
		vmm[i] = new_vmm((struct vmm_wish){.policy = policies[_i], .vcpus = 2});
		put_program(vmm[i], 0, (struct payload_mailbox){.program = PAYLOAD_TOUCH, .mode = PAYLOAD_WRITE,
								.pages = EQUAL_PAGES, .seed = 1});
		put_program(vmm[i], 1, (struct payload_mailbox){.program = PAYLOAD_STAMP, .pages = STAMPS, .words = 8});
		ok(vmm_vcpu_start(vmm[i]->vcpu[1]));
	}
	ok(pthread_create(&thread, NULL, step_for_ever, &stop));
	for (round = 1; round <= times(6, 2); round++) {
		for (i = 0; i < 2; i++)
			touch_round(vmm[i], round);
		for (i = 0; i < 2; i++)
			ok(vmm_vcpu_wait(vmm[i]->vcpu[0], TIMEOUT_MS));
		audit();
		check_touched(vmm[0], vmm[1]);
		for (tries = 0; tries < 3000; tries++) { /* pages that change often are left alone longer */
			if (stats_of(vm_of(vmm[0])).pages_shared_merge >= EQUAL_PAGES / 2)
				break;
			sleep_ms(5);
		}
		ck_assert_uint_ge(stats_of(vm_of(vmm[0])).pages_shared_merge, EQUAL_PAGES / 2);
		ck_assert_uint_gt(stats_of(NULL).ksm_merges, merged);
		merged = stats_of(NULL).ksm_merges;
		audit();
		check_touched(vmm[0], vmm[1]);
	}
	stop = true;
	ok(pthread_join(thread, NULL));
	merging(false);
	/* Broken for the last time. */
	for (i = 0; i < 2; i++)
		touch_round(vmm[i], 99);
	for (i = 0; i < 2; i++)
		ok(vmm_vcpu_wait(vmm[i]->vcpu[0], TIMEOUT_MS));
	is(kage_kvm_reconcile(kvm_of(vmm[0]), KAGE_KVM_ADOPT), 0);
	is(kage_kvm_reconcile(kvm_of(vmm[1]), KAGE_KVM_ADOPT), 0);
	audit();
	ck_assert_uint_gt(info_of(kvm_of(vmm[0])).healed + info_of(kvm_of(vmm[1])).healed, 0);
	check_touched(vmm[0], vmm[1]);
	for (i = 0; i < 2; i++) {
		ok(payload_poke(vmm[i], 1, stop, 1));
		ok(vmm_vcpu_wait(vmm[i]->vcpu[1], TIMEOUT_MS));
		same(payload_peek(vmm[i], 1, errors), 0);
		same(payload_peek(vmm[i], 1, audited), STAMPS);
		is(payload_check_stamps(vmm[i], 1), 0);
		free_vmm(vmm[i]);
	}
	engine_down();
}
END_TEST

/* -- exact and native -------------------------------------------------------------------- */

#define PROGRAM_PAGES 512

/* Rounds of one program, with clones and merging in between; leaves the program's pages in `out`. */
static uint64_t run_program(uint32_t policy, char *out)
{
	struct vmm *a, *b, *c;
	uint64_t sum = 0;

	engine_up();
	merging(true);
	a = new_vmm((struct vmm_wish){.policy = policy});
	put_program(a, 0, (struct payload_mailbox){.program = PAYLOAD_MEMORY, .mode = PAYLOAD_RANDOM, .seed = 42,
						   .pages = PROGRAM_PAGES, .iterations = 50000});
	ok(payload_round(a, 0, TIMEOUT_MS));
	sum += payload_peek(a, 0, checksum);
	b = clone_vmm(a, true);
	ok(payload_round(b, 0, TIMEOUT_MS));
	sum = sum * 31 + payload_peek(b, 0, checksum);
	merge_all();
	c = clone_vmm(b, true);
	ok(payload_poke(c, 0, mode, PAYLOAD_SEQUENTIAL));
	ok(payload_round(c, 0, TIMEOUT_MS));
	sum = sum * 31 + payload_peek(c, 0, checksum);
	ok(payload_round(a, 0, TIMEOUT_MS));
	sum = sum * 31 + payload_peek(a, 0, checksum);
	ok(kage_vm_read(vm_of(a), mailbox(a, 0).base, out, PROGRAM_PAGES * PAGE));
	ok(kage_vm_read(vm_of(b), mailbox(a, 0).base, out + PROGRAM_PAGES * PAGE, PROGRAM_PAGES * PAGE));
	ok(kage_vm_read(vm_of(c), mailbox(a, 0).base, out + 2 * PROGRAM_PAGES * PAGE, PROGRAM_PAGES * PAGE));
	audit();
	free_vmm(b);
	free_vmm(a);
	free_vmm(c);
	engine_down();
	return sum;
}

START_TEST(exact_and_native_give_the_same_bytes)
{
	const size_t len = 3 * PROGRAM_PAGES * PAGE;
	char *native = malloc(len), *exact = malloc(len), *model = calloc(1, 32 * MIB);
	struct payload_mailbox mb = {.base = payload_free(&payload_small), .pages = PROGRAM_PAGES, .seed = 42,
				     .mode = PAYLOAD_RANDOM, .iterations = 50000};
	uint64_t sum;

	sum = run_program(KAGE_KVM_NATIVE, native);
	guest_memory(&mb, model);
	guest_memory(&mb, model);
	ck_assert(!memcmp(native, model + mb.base, PROGRAM_PAGES * PAGE));
	ck_assert(!memcmp(native + PROGRAM_PAGES * PAGE, model + mb.base, PROGRAM_PAGES * PAGE));
	mb.mode = PAYLOAD_SEQUENTIAL;
	guest_memory(&mb, model);
	ck_assert(!memcmp(native + 2 * PROGRAM_PAGES * PAGE, model + mb.base, PROGRAM_PAGES * PAGE));
	if (can_exact()) {
		same(run_program(KAGE_KVM_EXACT, exact), sum);
		ck_assert(!memcmp(native, exact, len));
	}
	free(native);
	free(exact);
	free(model);
}
END_TEST

/* -- clones ---------------------------------------------------------------------------------- */

START_TEST(clones_under_load)
{
	struct vmm *parent, *clone[8];
	unsigned i, n = times(COUNT(clone), 3);

	engine_up();
	parent = stamping((struct vmm_wish){.policy = policies[_i], .vcpus = 2}, STAMPS);
	for (i = 0; i < n; i++) {
		clone[i] = clone_vmm(parent, false);
		stamps_go_on(parent, 30);
	}
	for (i = 0; i < n; i++)
		stamps_go_on(clone[i], 30);
	audit();
	check_stamps(parent);
	for (i = 0; i < n; i++) {
		check_stamps(clone[i]);
		ck_assert_uint_gt(payload_peek(clone[i], 0, reseeded), 0);
	}
	free_vmm(parent); /* before its clones */
	for (i = 0; i < n; i++) {
		ok(vmm_start(clone[i]));
		stamps_go_on(clone[i], 30);
		check_stamps(clone[i]);
		free_vmm(clone[i]);
	}
	engine_down();
}
END_TEST

START_TEST(clones_of_clones)
{
	struct vmm *vmm[7];
	unsigned i, n = times(COUNT(vmm), 4);

	engine_up();
	vmm[0] = stamping((struct vmm_wish){.policy = policies[_i]}, STAMPS);
	for (i = 1; i < n; i++) {
		vmm[i] = clone_vmm(vmm[i - 1], false);
		stamps_go_on(vmm[i], 40);
		if (i == 3) {
			is(kage_kvm_reconcile(kvm_of(vmm[2]), KAGE_KVM_ADOPT), 0);
			audit();
		}
	}
	for (i = 0; i < n; i++)
		check_stamps(vmm[i]);
	same(payload_peek(vmm[n - 1], 0, ancestors), n - 1);
	for (i = 0; i < n; i += 2)
		free_vmm(vmm[i]);
	for (i = 1; i < n; i += 2) {
		ok(vmm_start(vmm[i]));
		stamps_go_on(vmm[i], 40);
		check_stamps(vmm[i]);
		free_vmm(vmm[i]);
	}
	engine_down();
}
END_TEST

#define MANY 64

START_TEST(sixty_four_clones)
{
	const struct vmm_clone_config paused = {.paused = true};
	struct vmm *parent, *clone[MANY];
	struct kage_stats s;
	unsigned i, n = times(MANY, 8);

	engine_up();
	parent = stamping((struct vmm_wish){.policy = KAGE_KVM_NATIVE, .ram = 16 * MIB}, 128);
	for (i = 0; i < n; i++) {
		ok(vmm_clone(i % 4 == 3 ? clone[i - 1] : parent, &paused, &clone[i]));
		if (i % 4 == 0)
			ok(vmm_start(clone[i]));
		if (i % 16 == 0)
			audit();
	}
	for (i = 0; i < n; i++) {
		if (i % 4)
			ok(vmm_start(clone[i]));
		stamps_go_on(clone[i], 5);
		if (i % 8 == 7) /* two cores do not carry all of them for long */
			for (unsigned j = i - 7; j < i; j++)
				verify_stamps(clone[j]);
	}
	s = stats_of(NULL);
	same(s.guests, n + 1);
	ck_assert_uint_lt(s.frames_used, s.pages_mapped); /* most of it is shared */
	for (i = 7; i < n; i += 8)
		verify_stamps(clone[i]);
	check_stamps(parent);
	for (i = 0; i < n; i++)
		vmm_destroy(clone[i]);
	audit();
	free_vmm(parent);
	engine_down();
}
END_TEST

/*
 * The clone of a parked guest is the guest at that instant, whatever it writes a moment later. It writes a page's stamp word by
 * word, then its log entry, then the counter; so but for one page each is what its log says.
 */
static void check_instant(struct kage_vm *clone, const struct payload_mailbox *at)
{
	struct payload_mailbox mb;
	struct payload_stamp_log log;
	uint64_t page[512], wrong = 0, newest = 0;

	ok(kage_vm_read(clone, PAYLOAD_MAILBOX, &mb, sizeof(mb)));
	for (uint64_t i = 0; i < at->pages; i++) {
		ok(kage_vm_read(clone, at->log + i * sizeof(log), &log, sizeof(log)));
		ok(kage_vm_read(clone, at->base + i * PAGE, page, PAGE));
		newest = log.generation > newest ? log.generation : newest;
		for (unsigned w = 0; w < 512; w += 512 / at->words) {
			uint64_t want = log.generation ? guest_stamp(at->base / PAGE + i, log.generation, log.id, w) : 0;

			if (page[w] == want)
				continue;
			wrong++;
			break;
		}
	}
	ck_assert_msg(wrong <= 1, "%lu pages are not what the log says", wrong);
	ck_assert_msg(newest == mb.count || newest == mb.count + 1, "log %lu, counter %lu", newest, mb.count);
}

START_TEST(a_clone_is_one_instant)
{
	struct payload_mailbox mb;
	struct kage_vm *clone;
	struct vmm *vmm;
	unsigned i;

	engine_up();
	vmm = stamping((struct vmm_wish){.policy = policies[_i]}, STAMPS);
	mb = mailbox(vmm, 0);
	for (i = 0; i < times(60, 15); i++) {
		ok(vmm_park(vmm));
		ok(kage_vm_clone(vm_of(vmm), NULL, &clone));
		vmm_unpark(vmm);
		check_instant(clone, &mb);
		stamps_go_on(vmm, 1 + i % 40);
		ok(kage_vm_destroy(clone));
		if (i % 16 == 0)
			audit();
	}
	check_stamps(vmm);
	free_vmm(vmm);
	engine_down();
}
END_TEST

/* -- few mappings ----------------------------------------------------------------------------- */

START_TEST(a_budget_of_a_thousand_mappings)
{
	struct vmm *vmm, *other;
	struct kage_kvm_info info;
	uint64_t widened = granule > PAGE; /* larger granules need fewer mappings */
	unsigned i;

	engine_up();
	merging(true);
	vmm = stamping((struct vmm_wish){.policy = policies[_i], .map_budget = 1000, .vcpus = 2}, 1536);
	other = clone_vmm(vmm, false);
	for (i = 0; i < times(12, 3) || (!widened && i < 200); i++) {
		stamps_go_on(vmm, 200);
		stamps_go_on(other, 200);
		ck_assert_int_ge(kage_kvm_reconcile(kvm_of(vmm), i % 2 ? KAGE_KVM_ADOPT : 0), 0);
		ck_assert_int_ge(kage_kvm_reconcile(kvm_of(other), KAGE_KVM_ADOPT), 0);
		ok(kage_engine_step(engine, NULL, NULL));
		audit();
		info = info_of(kvm_of(vmm));
		widened += info.widened + info_of(kvm_of(other)).widened;
	}
	ck_assert_uint_le(info.map_budget, 1000);
	ck_assert_uint_gt(widened, 0);
	ck_assert_uint_le(info.mappings, 1000);
	check_stamps(vmm);
	check_stamps(other);
	free_vmm(vmm);
	free_vmm(other);
	engine_down();
}
END_TEST

/* -- vacated slots ------------------------------------------------------------------------------ */

/*
 * MADV_DONTNEED on a MAP_PRIVATE window shows whatever lies in the file now. Frames that a window can show are nobody else's:
 * their old contents, or zeroes, but never the bytes of another guest.
 */
static void check_vacated(const struct bare *b, uint64_t pages, uint64_t foreign)
{
	for (uint64_t i = 0; i < pages; i++) {
		ok(madvise(at(b, i * PAGE), PAGE, MADV_DONTNEED));
		ck_assert_msg(get(b, i * PAGE) >> 32 != foreign, "page %lu shows another guest's bytes", i);
	}
}

START_TEST(a_vacated_slot_shows_nobody_elses_bytes)
{
	const uint64_t pages = 1024, secret = 0x5ec7e7;
	struct bare a, b, c;
	struct kage_vm *idle;
	uint64_t i;

	engine_up();
	a = new_bare(8 * MIB, KAGE_KVM_NATIVE);
	for (i = 0; i < pages; i++)
		put(&a, i * PAGE, i + 1);
	b = clone_bare(&a, KAGE_KVM_NATIVE);
	for (i = 0; i < pages; i++) /* b's own: the frames it shared are dropped */
		put(&b, i * PAGE, 1000 + i);
	ck_assert_int_ge(kage_kvm_reconcile(b.kvm, 0), 0);
	if (_i == 0) {
		for (i = 0; i < pages; i++) /* the parent leaves them too */
			put(&a, i * PAGE, 2000 + i);
		ck_assert_int_ge(kage_kvm_reconcile(a.kvm, 0), 0);
	} else {
		free_bare(&a); /* the parent goes */
	}
	ok(kage_engine_step(engine, NULL, NULL));
	audit();
	c = new_bare(16 * MIB, KAGE_KVM_NATIVE); /* new tenants: homes, and copies of the arena */
	for (i = 0; i < 4 * pages; i++)
		put(&c, i * PAGE, secret << 32 | i);
	ok(kage_vm_clone(c.vm, NULL, &idle));
	for (i = 0; i < pages; i++)
		write64(idle, i * PAGE, secret << 32 | i);
	audit();
	check_vacated(&b, pages, secret);
	if (_i == 0)
		check_vacated(&a, pages, secret);
	for (i = 0; i < 4 * pages; i++)
		same(get(&c, i * PAGE), secret << 32 | i);
	ok(kage_vm_destroy(idle));
	if (_i == 0)
		free_bare(&a);
	free_bare(&b);
	free_bare(&c);
	engine_down();
}
END_TEST

/*
 * Regions side by side: each has its window, so that no run reaches across. What one shows, or traps, is its own.
 */
static struct bare pair_bare(const struct kage_region *low, const struct kage_region *high)
{
	struct kage_vm *vm;

	struct bare b;

	ok(kage_vm_create(engine, NULL, &vm));
	ok(kage_vm_map(vm, high));
	b = attach(vm, KAGE_KVM_NATIVE);
	ok(kage_vm_map(vm, low)); /* after it: Linux reserves addresses from high to low */
	audit();
	return b;
}

START_TEST(neighbouring_files_show_themselves)
{
	const uint64_t len = 128 * MIB, /* whole sections: their frames are neighbours too */
	    last = len - PAGE;
	const uint32_t kind = _i ? KAGE_REGION_FOREIGN : KAGE_REGION_FILE;
	struct kage_region region[2];
	struct bare b;
	int fd[2];

	engine_up();
	for (unsigned i = 0; i < 2; i++) {
		uint64_t word = 0x1111 * (i + 1);

		fd[i] = memfd_create("region", MFD_CLOEXEC);
		ok(ftruncate(fd[i], (off_t)len));
		is(pwrite(fd[i], &word, sizeof(word), 0), sizeof(word));
		is(pwrite(fd[i], &word, sizeof(word), (off_t)last), sizeof(word));
		region[i] = *KAGE_CFG(kage_region, .kind = kind, .flags = KAGE_REGION_FD, .fd = fd[i], .gpa = i * len, .len = len);
	}
	b = pair_bare(&region[0], &region[1]);
	for (unsigned i = 0; i < 2; i++) {
		same(get(&b, i * len), 0x1111 * (i + 1));
		same(get(&b, i * len + last), 0x1111 * (i + 1));
		same(read64(b.vm, i * len), 0x1111 * (i + 1));
		put(&b, i * len + PAGE, i + 1);
	}
	ck_assert_int_ge(kage_kvm_reconcile(b.kvm, 0), 0);
	for (unsigned i = 0; i < 2; i++)
		same(read64(b.vm, i * len + PAGE), i + 1);
	audit();
	free_bare(&b);
	close(fd[0]);
	close(fd[1]);
	engine_down();
}
END_TEST

static _Atomic unsigned touched;

static int touch(void *opaque, uint64_t gpa, void *page)
{
	atomic_fetch_add(&touched, 1);
	memset(page, 0x5a, PAGE);
	return 0;
}

START_TEST(a_region_that_traps_beside_one_that_does_not)
{
	const uint64_t len = 2 * MIB, trapping = _i ? len : 0, other = len - trapping;
	struct kage_region region[2] = {
	    *KAGE_CFG(kage_region, .gpa = trapping, .len = len, .flags = KAGE_REGION_TRAP, .touch = touch),
	    *KAGE_CFG(kage_region, .gpa = other, .len = len)};
	struct bare b;

	need(has(KAGE_KVM_USERFAULTFD), "no userfaultfd");
	need_single_pages();
	engine_up();
	b = pair_bare(&region[_i], &region[1 - _i]);
	ok(kage_kvm_helper_start(b.kvm));
	atomic_store(&touched, 0);
	same(get(&b, other), 0);
	same(get(&b, other + len - PAGE), 0);
	is(touched, 0);
	same(get(&b, trapping), 0x5a5a5a5a5a5a5a5a);
	same(get(&b, trapping + len - PAGE), 0x5a5a5a5a5a5a5a5a);
	is(touched, 2);
	put(&b, other, 7);
	ck_assert_int_ge(kage_kvm_reconcile(b.kvm, 0), 0);
	same(read64(b.vm, other), 7);
	audit();
	ok(kage_vm_advise(b.vm, 0, 2 * len, KAGE_ADVICE_DISCARD)); /* one run of zeroes, by then */
	same(get(&b, other), 0);
	is(touched, 2);
	same(get(&b, trapping), 0x5a5a5a5a5a5a5a5a);
	is(touched, 3);
	free_bare(&b);
	engine_down();
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("kvm guests");

	skip_without_kvm();
	probe();
	add_policies(suite, mappings_change_under_a_running_guest);
	add_policies(suite, merge_break_adopt_heal_merge);
	add_test(suite, exact_and_native_give_the_same_bytes, 1);
	add_policies(suite, clones_under_load);
	add_policies(suite, clones_of_clones);
	add_test(suite, sixty_four_clones, 1);
	add_policies(suite, a_clone_is_one_instant);
	add_policies(suite, a_budget_of_a_thousand_mappings);
	add_test(suite, a_vacated_slot_shows_nobody_elses_bytes, 2);
	add_test(suite, neighbouring_files_show_themselves, 2);
	add_test(suite, a_region_that_traps_beside_one_that_does_not, 2);
	return run(suite);
}
