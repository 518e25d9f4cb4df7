/* SPDX-License-Identifier: MIT */
/*
 * What goes wrong around guests under KVM: arguments, descriptors that are not
 * what they should be, a VMM that changes windows itself, handlers and vCPUs that die, no more
 * mappings, no more memory. Each time: the call says so, the audit is content, and no byte is lost.
 */
#include <signal.h>

#include "kvm_test.h"

#define SMALL	  (8 * MIB)
#define UNTOUCHED ((void *)0x10)

/* -- arguments ------------------------------------------------------------------------ */

static void refused(struct kage_vm *vm, int fd, const struct kage_kvm_config *config, int error)
{
	struct kage_kvm *kvm = UNTOUCHED;

	is(kage_kvm_attach(vm, fd, config, &kvm), error);
	ck_assert_ptr_eq(kvm, UNTOUCHED);
	expected_errors = logged_errors; /* it may say why */
	audit();
}

START_TEST(descriptors_that_are_no_vm)
{
	struct kage_kvm_config config = config_of(KAGE_KVM_NATIVE);
	int vm_fd, kvm, memfd = memfd_create("no vm", MFD_CLOEXEC), closed = dup(memfd), vcpu;
	struct kage_vm *vm;
	struct bare b;

	engine_up();
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	vm_fd = new_kvm();
	vcpu = ioctl(vm_fd, KVM_CREATE_VCPU, 0);
	ck_assert_int_ge(vcpu, 0);
	close(closed);
	vm = new_vm(SMALL);
	refused(vm, -1, &config, -EINVAL);
	refused(vm, closed, &config, -EINVAL);
	refused(vm, memfd, &config, -EINVAL);
	refused(vm, kvm, &config, -EINVAL);
	refused(vm, vcpu, &config, -EINVAL);
	is(kage_kvm_attach(NULL, vm_fd, &config, &b.kvm), -EINVAL);
	is(kage_kvm_attach(vm, vm_fd, &config, NULL), -EINVAL);
	expected_errors = logged_errors;
	b = attach(vm, KAGE_KVM_NATIVE); /* it is as it was */
	put(&b, 0, 1);
	same(read64(b.vm, 0), 1);
	free_bare(&b);
	close(memfd);
	close(kvm);
	close(vcpu);
	close(vm_fd);
	engine_down();
}
END_TEST

/* Reads of what merging has looked at would have to trap: a hardened domain's guests, and their clones, are refused. */
START_TEST(hardened_domains_are_refused)
{
	struct kage_kvm_config config = config_of(KAGE_KVM_NATIVE);
	struct kage_vm *vm, *clone;
	int fd = new_kvm();

	engine_up();
	ok(kage_domain_configure(engine, 0, KAGE_CFG(kage_domain_config, .flags = KAGE_DOMAIN_HARDENED, .reserve_frames = 64)));
	vm = new_vm(SMALL);
	refused(vm, fd, &config, -EOPNOTSUPP);
	ck_assert_uint_ge(logged_errors, 1);
	ok(kage_vm_clone(vm, NULL, &clone));
	refused(clone, fd, &config, -EOPNOTSUPP);
	ok(kage_vm_destroy(clone));
	ok(kage_vm_destroy(vm));
	close(fd);
	engine_down();
}
END_TEST

START_TEST(configurations_that_are_refused)
{
	struct {
		struct kage_kvm_config config;
		uint64_t tail;
	} longer = {.config = config_of(KAGE_KVM_NATIVE)};
	struct {
		struct kage_kvm_info info;
		uint64_t tail;
	} info = {.info.size = sizeof(info), .tail = 1};
	struct kage_kvm_config c;
	struct kage_vm *vm;
	int fd = new_kvm();
	struct bare b;

	engine_up();
	vm = new_vm(SMALL);
	longer.config.size = sizeof(longer);
	longer.tail = 1;
	refused(vm, fd, &longer.config, -E2BIG);
	c = config_of(3);
	refused(vm, fd, &c, -EINVAL);
	c = config_of(KAGE_KVM_NATIVE);
	c.feature_mask = 1u << KAGE_KVM_FEATURES;
	refused(vm, fd, &c, -EINVAL);
	c = config_of(KAGE_KVM_NATIVE);
	c.flags = 1u << 4;
	refused(vm, fd, &c, -EINVAL);
	c = config_of(KAGE_KVM_NATIVE);
	c.granule = 12288;
	refused(vm, fd, &c, -EINVAL);
	c = config_of(KAGE_KVM_NATIVE);
	c.granule = 128 << 10;
	refused(vm, fd, &c, -EINVAL);
	c = config_of(KAGE_KVM_NATIVE);
	c.resume = NULL;
	refused(vm, fd, &c, -EINVAL);
	c = config_of(KAGE_KVM_NATIVE);
	c.slot_first = 1u << 30;
	c.slot_count = 1;
	ck_assert_int_lt(kage_kvm_attach(vm, fd, &c, &b.kvm), 0);
	expected_errors = logged_errors;
	audit();
	longer.tail = 0;
	ok(kage_kvm_attach(vm, fd, &longer.config, &b.kvm));
	b.vm = vm;
	b.fd = fd;
	audit();
	is(kage_kvm_info(b.kvm, &info.info), -E2BIG);
	is(kage_kvm_info(b.kvm, NULL), -EINVAL);
	is(kage_kvm_info(NULL, &info.info), -EINVAL);
	is(kage_kvm_reconcile(b.kvm, 2), -EINVAL);
	is(kage_kvm_reconcile(NULL, 0), -EINVAL);
	ck_assert_ptr_null(kage_kvm_window(b.kvm, SMALL, 1));
	ck_assert_ptr_null(kage_kvm_window(b.kvm, SMALL - 1, 2));
	ck_assert_ptr_null(kage_kvm_window(b.kvm, 0, 0));
	ck_assert_ptr_null(kage_kvm_window(NULL, 0, 1));
	is(kage_kvm_helper_stop(b.kvm), -ENOENT);
	is(kage_kvm_add_vcpu(b.kvm, fd), -ENOENT);
	c = config_of(KAGE_KVM_NATIVE);
	refused(vm, fd, &c, -EBUSY); /* one attachment a guest */
	is(kage_vm_destroy(vm), -EBUSY);
	ok(kage_kvm_detach(NULL));
	expected_errors = logged_errors;
	put(&b, PAGE, 3);
	free_bare(&b);
	engine_down();
}
END_TEST

START_TEST(an_engine_without_files)
{
	struct kage_kvm_config c = config_of(KAGE_KVM_NATIVE);
	int fd = new_kvm();

	ok(kage_engine_create(KAGE_CFG(kage_engine_config, .log = engine_log), &engine));
	struct kage_vm *vm = new_vm(SMALL);
	refused(vm, fd, &c, -EINVAL);
	write64(vm, 0, 1);
	ok(kage_vm_destroy(vm));
	close(fd);
	engine_down();
}
END_TEST

/* Nothing is opened: what was not handed in is missing, and all still works. */
START_TEST(no_paths)
{
	struct kage_kvm_config c = config_of(KAGE_KVM_NATIVE);
	struct kage_kvm_info info;
	struct bare a, b;
	uint64_t i;

	engine_up();
	c.flags = KAGE_KVM_NO_OPEN;
	a = attach_with(new_vm(SMALL), &c);
	info = info_of(a.kvm);
	same(info.feature[KAGE_KVM_PAGEMAP].used, 0);
	same(info.feature[KAGE_KVM_PAGEMAP_SCAN].used, 0);
	for (unsigned n = 0; n < KAGE_KVM_FEATURES; n++)
		ck_assert_ptr_nonnull(info.feature[n].why);
	for (i = 0; i < 300; i++)
		put(&a, i * PAGE, i + 1);
	ok(kage_vm_clone(a.vm, NULL, &b.vm));
	b = attach_with(b.vm, &c);
	for (i = 0; i < 300; i++)
		put(&b, i * PAGE, i + 1000);
	is(kage_kvm_reconcile(b.kvm, 0), 300); /* by their contents */
	audit();
	is(kage_kvm_reconcile(b.kvm, KAGE_KVM_ADOPT), 0);
	audit();
	for (i = 0; i < 300; i++) {
		same(get(&a, i * PAGE), i + 1);
		same(get(&b, i * PAGE), i + 1000);
		same(read64(b.vm, i * PAGE), i + 1000);
	}
	free_bare(&a);
	/* The same with descriptors; one that is wrong says so. */
	c.flags = KAGE_KVM_NO_OPEN | KAGE_KVM_PAGEMAP_FD | KAGE_KVM_MAPS_FD;
	c.pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	c.maps_fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	a = attach_with(new_vm(SMALL), &c);
	close(c.pagemap_fd);
	close(c.maps_fd);
	info = info_of(a.kvm);
	same(info.feature[KAGE_KVM_PAGEMAP].used, has(KAGE_KVM_PAGEMAP));
	put(&a, 0, 1);
	audit();
	free_bare(&a);
	free_bare(&b);
	engine_down();
}
END_TEST

/* -- the VMM changes a window --------------------------------------------------------------- */

static void audit_finds(void)
{
	struct kage_audit a = {.size = sizeof(a)};

	is(kage_engine_audit(engine, &a), -EUCLEAN);
	ck_assert_uint_gt(a.violations, 0);
	expected_errors = logged_errors;
}

static void change_window(char *at, int how)
{
	switch (how) {
	case 0:
		ok(munmap(at, 3 * PAGE));
		break;
	case 1:
		ok(mprotect(at, PAGE, PROT_READ));
		break;
	case 2:
		ok(mprotect(at, 3 * PAGE, PROT_NONE));
		break;
	case 3:
		ck_assert_ptr_eq(mmap(at, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
				 at);
		break;
	}
}

START_TEST(windows_that_the_vmm_changed)
{
	struct kvm_run run = {.exit_reason = 0};
	struct bare a, b;
	uint64_t i, broken;
	int how = _i;

	engine_up();
	a = new_bare(SMALL, KAGE_KVM_NATIVE);
	for (i = 0; i < 512; i++)
		put(&a, i * PAGE, i + 1);
	b = clone_bare(&a, KAGE_KVM_NATIVE);
	for (i = 0; i < 64; i++) /* exclusive, in frames of the engine's */
		write64(a.vm, (100 + i) * PAGE, 5000 + i);
	is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), 0);
	is(kage_kvm_run_failed(a.kvm, -1, &run, EFAULT), -EFAULT); /* nothing is wrong here */
	is(kage_kvm_run_failed(a.kvm, -1, &run, ENOSYS), -ENOSYS);
	is(kage_kvm_run_failed(a.kvm, -1, NULL, EFAULT), -EINVAL);
	expected_errors = logged_errors;
	broken = info_of(a.kvm).broken;
	change_window((char *)at(&a, 110 * PAGE), how);
	change_window((char *)at(&a, 300 * PAGE), how); /* shared, never written here */
	audit_finds();
	is(kage_kvm_run_failed(a.kvm, -1, &run, EFAULT), KAGE_RETRY);
	expected_errors = logged_errors;
	ck_assert_uint_gt(info_of(a.kvm).broken, broken);
	audit();
	for (i = 0; i < 512; i++) {
		same(get(&a, i * PAGE), i >= 100 && i < 164 ? 5000 + i - 100 : i + 1);
		same(read64(a.vm, i * PAGE), i >= 100 && i < 164 ? 5000 + i - 100 : i + 1);
		same(get(&b, i * PAGE), i + 1);
	}
	free_bare(&a);
	free_bare(&b);
	engine_down();
}
END_TEST

/* The vCPU meets it: KVM_RUN fails with EFAULT and no address, the window is put right, and it goes on. */
START_TEST(windows_that_the_vmm_changed_under_a_running_guest)
{
	struct vmm *vmm;
	uint64_t base, failed;
	unsigned i;

	engine_up();
	vmm = new_vmm((struct vmm_wish){.policy = KAGE_KVM_NATIVE});
	put_stamps(vmm, 128);
	base = mailbox(vmm, 0).base;
	ok(vmm_start(vmm));
	for (i = 0; i < 12; i++) {
		stamps_go_on(vmm, 300);
		failed = vmm->vcpu[0]->failed;
		change_window((char *)kage_kvm_window(kvm_of(vmm), base + i * 8 * PAGE, 3 * PAGE), i % 3);
		while (vmm->vcpu[0]->failed == failed) {
			ck_assert_int_ne(vmm->vcpu[0]->state, VMM_STOPPED);
			sleep_ms(1);
		}
		while (info_of(kvm_of(vmm)).broken <= i)
			sleep_ms(1);
		stamps_go_on(vmm, 10);
		expected_errors = logged_errors;
		audit();
	}
	check_stamps(vmm);
	free_vmm(vmm);
	engine_down();
}
END_TEST

struct heard {
	struct kage_notifier n;
	_Atomic uint64_t start, end;
	_Atomic unsigned count;
	uint64_t gpa; /* that counts */
};

static int heard_start(struct kage_notifier *n, const struct kage_range *range)
{
	struct heard *h = (struct heard *)n;

	if (range->start <= h->gpa && h->gpa < range->end) {
		h->start = range->start;
		h->end = range->end;
		h->count++;
	}
	return 0;
}

static const struct kage_notifier_ops heard_ops = {.invalidate_range_start = heard_start};

static void wait_heard(struct heard *h, unsigned before)
{
	for (unsigned i = 0; h->count == before && i < 5000; i++)
		sleep_ms(1);
	ck_assert_uint_gt(h->count, before);
	ck_assert_uint_le(h->start, h->gpa);
	ck_assert_uint_gt(h->end, h->gpa);
}

START_TEST(with_the_helper_listeners_hear_of_the_vmm)
{
	static struct heard h;
	struct bare a;
	uint64_t i;
	unsigned n;

	need(has(KAGE_KVM_USERFAULTFD) && has(KAGE_KVM_UFFD_WP), "no userfaultfd");
	engine_up();
	a = new_bare(SMALL, KAGE_KVM_NATIVE);
	for (i = 0; i < 512; i++)
		put(&a, i * PAGE, i + 1);
	ok(kage_kvm_helper_start(a.kvm));
	is(kage_kvm_helper_start(a.kvm), -EBUSY);
	is(kage_kvm_detach(a.kvm), -EBUSY);
	audit();
	h = (struct heard){.gpa = 16 * PAGE};
	ok(kage_notifier_register(a.vm, &h.n, &heard_ops));
	n = h.count;
	ok(madvise(at(&a, 16 * PAGE), PAGE, MADV_DONTNEED));
	wait_heard(&h, n);
	same(get(&a, 16 * PAGE), 17); /* a frame of its own: dropping a mapping drops no contents */
	audit();
	n = h.count;
	ok(munmap(at(&a, 16 * PAGE), PAGE));
	wait_heard(&h, n);
	for (i = 0; info_of(a.kvm).broken < 2 && i < 5000; i++)
		sleep_ms(1);
	audit();
	same(get(&a, 16 * PAGE), 17);
	same(get(&a, 17 * PAGE), 18);
	ok(kage_notifier_unregister(&h.n));
	ok(kage_kvm_helper_stop(a.kvm));
	audit();
	free_bare(&a);
	engine_down();
}
END_TEST

/* -- handlers and vCPUs that die --------------------------------------------------------------- */

static void *serve_one(void *arg)
{
	ck_assert_int_ge(kage_kvm_trap_run(arg, -1), 1);
	return NULL; /* and no more */
}

START_TEST(a_handler_that_ends)
{
	struct payload_mailbox mb;
	struct vmm *a, *b;
	pthread_t thread;
	uint64_t i, base;

	engine_up();
	a = new_vmm((struct vmm_wish){.policy = KAGE_KVM_EXACT});
	base = put_program(a, 0, (struct payload_mailbox){.program = PAYLOAD_TOUCH, .mode = PAYLOAD_WRITE, .pages = 64,
							  .seed = 1});
	ok(payload_round(a, 0, TIMEOUT_MS));
	b = clone_vmm(a, true);
	ok(kage_kvm_helper_stop(kvm_of(a)));
	mb = mailbox(a, 0);
	mb.seed = 2;
	ok(payload_put(a, 0, &mb));
	ok(payload_go(a, 0));
	ok(pthread_create(&thread, NULL, serve_one, kvm_of(a)));
	ok(vmm_start(a));
	ok(pthread_join(thread, NULL));
	is(vmm_vcpu_wait(a->vcpu[0], 100), -ETIMEDOUT);
	audit();
	ok(kage_kvm_trap_abandon(kvm_of(a)));
	ok(vmm_wait(a, TIMEOUT_MS));
	same(payload_peek(a, 0, count), 64);
	audit();
	for (i = 0; i < 64; i++) {
		ck_assert_uint_ne(read64(vm_of(a), base + i * PAGE), read64(vm_of(b), base + i * PAGE));
		same(read64(vm_of(a), base + i * PAGE),
		     *(volatile uint64_t *)kage_kvm_window(kvm_of(a), base + i * PAGE, 8));
	}
	free_vmm(b);
	free_vmm(a);
	engine_down();
}
END_TEST

static void leave_thread(int signal)
{
	pthread_exit(NULL);
}

/* A signal ends the vCPU threads of one clone wherever they are; then its VM is closed. */
START_TEST(vcpus_that_are_killed)
{
	const struct sigaction leave = {.sa_handler = leave_thread};
	struct vmm *parent, *victim, *other;
	unsigned round, i;

	engine_up();
	ok(sigaction(SIGUSR1, &leave, NULL));
	parent = new_vmm((struct vmm_wish){.policy = policies[_i], .vcpus = 2});
	put_stamps(parent, 256);
	ok(vmm_start(parent));
	stamps_go_on(parent, 50);
	other = clone_vmm(parent, false);
	for (round = 0; round < times(6, 2); round++) {
		victim = clone_vmm(round % 2 ? other : parent, false);
		stamps_go_on(victim, 20);
		for (i = 0; i < 2; i++)
			ok(pthread_kill(victim->vcpu[i]->thread, SIGUSR1));
		vmm_destroy(victim);
		audit();
		stamps_go_on(parent, 20);
		stamps_go_on(other, 20);
	}
	check_stamps(parent);
	check_stamps(other);
	free_vmm(parent);
	free_vmm(other);
	engine_down();
}
END_TEST

/* -- no more mappings ----------------------------------------------------------------------------- */

#define FILLER ((size_t)1 << 18) /* pages */

/* Mappings until there are no more, except for `spare`. */
static char *fill_mappings(unsigned spare)
{
	char *area = mmap(NULL, FILLER * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	size_t i = 1;

	ck_assert_ptr_ne(area, MAP_FAILED);
	while (i < FILLER && mprotect(area + i * PAGE, PAGE, PROT_READ) == 0)
		i += 2;
	if (i >= FILLER) {
		munmap(area, FILLER * PAGE);
		return NULL; /* vm.max_map_count is very large here */
	}
	for (; spare; spare--, i -= 2)
		mprotect(area + (i - 2) * PAGE, PAGE, PROT_NONE);
	return area;
}

static void check_pages(const struct bare *b, uint64_t pages, uint64_t (*want)(uint64_t i))
{
	for (uint64_t i = 0; i < pages; i++) {
		ck_assert_msg(get(b, i * PAGE) == want(i), "page %lu: %lx, not %lx", i, get(b, i * PAGE), want(i));
		same(read64(b->vm, i * PAGE), want(i));
	}
}

static uint64_t want_a(uint64_t i)
{
	return i % 4 == 1 ? 3000 + i : i % 8 < 4 ? 7 : i + 1;
}

static uint64_t want_b(uint64_t i)
{
	return i % 3 == 1 ? 4000 + i : i % 8 < 4 ? 7 : i + 1;
}

static int tolerable(int r)
{
	ck_assert_msg(r >= 0 || r == -ENOMEM, "%d", r);
	return r;
}

START_TEST(no_more_mappings)
{
	const uint64_t pages = 1024;
	struct bare a, b;
	struct kage_vm *clone = NULL;
	char *filler;
	uint64_t i;

	engine_up();
	merging(true);
	a = new_bare(SMALL, KAGE_KVM_NATIVE);
	for (i = 0; i < pages; i++)
		put(&a, i * PAGE, i % 8 < 4 ? 7 : i + 1);
	b = clone_bare(&a, KAGE_KVM_NATIVE);
	filler = fill_mappings((unsigned)_i * 8);
	if (!filler) {
		printf("skipped: %s: this host's limit of mappings is too high to meet\n", __func__);
		expected_errors = logged_errors;
	}
	for (i = 1; i < pages; i += 4)
		put(&a, i * PAGE, 3000 + i);
	for (i = 1; i < pages; i += 3)
		if (i % 2)
			put(&b, i * PAGE, 4000 + i);
		else if (tolerable(kage_vm_write(b.vm, i * PAGE, &(uint64_t){4000 + i}, 8)))
			put(&b, i * PAGE, 4000 + i);
	check_pages(&a, pages, want_a);
	check_pages(&b, pages, want_b);
	tolerable(kage_kvm_reconcile(a.kvm, 0));
	tolerable(kage_kvm_reconcile(b.kvm, KAGE_KVM_ADOPT));
	check_pages(&b, pages, want_b);
	for (i = 0; i < 4; i++)
		tolerable(kage_engine_step(engine, NULL, NULL));
	check_pages(&a, pages, want_a);
	check_pages(&b, pages, want_b);
	if (tolerable(kage_vm_clone(a.vm, NULL, &clone)))
		clone = NULL;
	for (i = 0; clone && i < pages; i++)
		same(read64(clone, i * PAGE), want_a(i));
	check_pages(&a, pages, want_a);
	if (filler) /* the audit needs memory itself */
		munmap(filler, FILLER * PAGE);
	audit();
	for (i = 0; i < 6; i++)
		ok(kage_engine_step(engine, NULL, NULL));
	audit();
	is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), 0);
	is(kage_kvm_reconcile(b.kvm, KAGE_KVM_ADOPT), 0);
	audit();
	check_pages(&a, pages, want_a);
	check_pages(&b, pages, want_b);
	ok(kage_vm_destroy(clone));
	free_bare(&a);
	free_bare(&b);
	engine_down();
}
END_TEST

/* -- no more memory ---------------------------------------------------------------------------------- */

static unsigned allow; /* allocations that will succeed */
static long live;

static void *counted_alloc(void *opaque, size_t bytes)
{
	void *p;

	if (allow == 0)
		return NULL;
	allow--;
	p = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
	live += p != NULL;
	return p ? memset(p, 0, bytes) : NULL;
}

static void counted_free(void *opaque, void *ptr, size_t bytes)
{
	live -= ptr != NULL;
	free(ptr);
}

static unsigned failures;

static int step_result(int r)
{
	tolerable(r);
	failures += r < 0;
	return r;
}

/* With exact policy only a guest with a helper may be looked at through its window. */
static bool seen(const struct bare *b)
{
	return b->kvm && (info_of(b->kvm).policy != KAGE_KVM_EXACT || kage_kvm_trap_fd(b->kvm) < 0);
}

static void check_life(struct kage_vm *vm, const struct bare *b)
{
	unsigned had = allow;

	allow = 1u << 20;
	audit();
	for (uint64_t i = 0; i < 64; i++) {
		same(read64(vm, i * PAGE), i < 16 ? 7 : i + 1);
		if (seen(b))
			same(get(b, i * PAGE), i < 16 ? 7 : i + 1);
	}
	allow = had;
}

static void life_attach(struct bare *b, const struct kage_kvm_config *config)
{
	struct kage_kvm *kvm;

	if (step_result(kage_kvm_attach(b->vm, b->fd, config, &kvm)))
		return;
	b->kvm = kvm;
	if (config->policy == KAGE_KVM_EXACT)
		step_result(kage_kvm_helper_start(kvm));
}

/* One life of a guest and a clone with `n` allocations to spend. Returns whether it ran into the end of them. */
static bool life(unsigned n, uint32_t policy)
{
	struct kage_kvm_config config = config_of(policy);
	struct bare a = {.fd = new_kvm()}, b = {.fd = new_kvm()};
	uint64_t i;

	failures = 0;
	allow = 1u << 20;
	ok(kage_engine_create(KAGE_CFG(kage_engine_config, .backing = KAGE_BACKING_MEMFD, .log = engine_log,
				       .alloc = {counted_alloc, counted_free, NULL}),
			      &engine));
	merging(true);
	a.vm = new_vm(4 * MIB);
	for (i = 0; i < 64; i++)
		write64(a.vm, i * PAGE, i < 16 ? 7 : i + 1);
	allow = n;
	life_attach(&a, &config);
	check_life(a.vm, &a);
	if (step_result(kage_vm_clone(a.vm, NULL, &b.vm)))
		b.vm = NULL;
	check_life(a.vm, &a);
	if (b.vm) {
		life_attach(&b, &config);
		check_life(b.vm, &b);
	}
	for (i = 0; i < 64; i += 3)
		step_result(kage_vm_write(a.vm, i * PAGE + 8, &i, 8));
	for (i = 0; seen(&b) && i < 64; i += 5)
		at(&b, i * PAGE)[2] = i;
	if (a.kvm)
		step_result(kage_kvm_reconcile(a.kvm, 0));
	if (b.kvm)
		step_result(kage_kvm_reconcile(b.kvm, KAGE_KVM_ADOPT));
	check_life(a.vm, &a);
	for (i = 0; i < 3; i++)
		step_result(kage_engine_step(engine, NULL, NULL));
	check_life(a.vm, &a);
	step_result(kage_vm_map(a.vm, KAGE_CFG(kage_region, .gpa = 16 * MIB, .len = MIB)));
	step_result(kage_vm_protect(a.vm, 2 * MIB, PAGE, KAGE_READ));
	step_result(kage_vm_advise(a.vm, 3 * MIB, MIB, KAGE_ADVICE_DISCARD));
	step_result(kage_vm_unmap(a.vm, 3 * MIB, MIB));
	check_life(a.vm, &a);
	kage_kvm_helper_stop(a.kvm); /* -ENOENT, -EINVAL: there is none */
	kage_kvm_helper_stop(b.kvm);
	if (a.kvm && step_result(kage_kvm_detach(a.kvm)) == 0)
		a.kvm = NULL;
	check_life(a.vm, &a);
	allow = 1u << 20;
	kage_kvm_helper_stop(a.kvm);
	kage_kvm_helper_stop(b.kvm);
	ok(kage_kvm_detach(a.kvm));
	ok(kage_kvm_detach(b.kvm));
	audit();
	ok(kage_vm_destroy(a.vm));
	ok(kage_vm_destroy(b.vm));
	engine_down();
	is(live, 0);
	close(a.fd);
	close(b.fd);
	return failures > 0;
}

START_TEST(no_memory_for_objects)
{
	unsigned step = times(1, 9), n = in_short_from("no_memory_for_objects", step), first = n, fds = 0, now;

	expected_errors = 0;
	for (; n < 600; n += step) {
		if (!life(n, policies[_i]))
			break;
		now = (unsigned)dup(0); /* the lowest free number: nothing was left open */
		close((int)now);
		if (n == first)
			fds = now;
		same(now, fds);
	}
	ck_assert_uint_gt(n, 3 + first);
	ck_assert_uint_lt(n, 600);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("kvm faults");

	skip_without_kvm();
	probe();
	add_test(suite, descriptors_that_are_no_vm, 1);
	add_test(suite, hardened_domains_are_refused, 1);
	add_test(suite, configurations_that_are_refused, 1);
	add_test(suite, an_engine_without_files, 1);
	add_test(suite, no_paths, 1);
	add_test(suite, windows_that_the_vmm_changed, 4);
	add_test(suite, windows_that_the_vmm_changed_under_a_running_guest, 1);
	add_test(suite, with_the_helper_listeners_hear_of_the_vmm, 1);
	add_test(suite, a_handler_that_ends, can_exact());
	add_policies(suite, vcpus_that_are_killed);
	add_test(suite, no_more_mappings, 3);
	add_policies(suite, no_memory_for_objects);
	return run(suite);
}
