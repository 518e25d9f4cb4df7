/* SPDX-License-Identifier: MIT */
/*
 * Hosts whose pages are larger than a frame, as far as a host with pages of 4 KiB can show them: the mirror's
 * granule is forced to 16 and 64 KiB.
 *
 * structures
 *	watched		what the test knows as windows: system calls there are looked at
 *	struct model	a guest and what each of its pages has to hold
 *
 * invariants
 *	G1. No system call maps, protects, registers, fills or wakes less than a granule of a window: calls that a host with
 *	    such pages would refuse are counted here, and there are none. (Run mappings: the engine's audit.)
 *	G2. Every guest reads what was written to it, through its window and through the engine, after every few steps.
 */
#include <stdarg.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include <linux/userfaultfd.h>

#include "kvm_test.h"

#define LEN	(4 * MIB)
#define PAGES	(LEN / PAGE)
#define GUESTS	5
#define OPS	300

/* -- G1 ------------------------------------------------------------------------------- */

struct watched {
	uintptr_t start, end;
};

static struct watched watched[GUESTS];
static size_t piece; /* bytes; 0: nothing is looked at */
static _Atomic unsigned odd_calls, window_calls;

static void look(const char *call, const void *addr, size_t len)
{
	uintptr_t from = (uintptr_t)addr;
	bool inside = false;

	for (unsigned i = 0; piece && i < GUESTS; i++)
		inside |= from < watched[i].end && watched[i].start < from + len;
	if (!inside)
		return;
	atomic_fetch_add(&window_calls, 1);
	if ((from | len) % piece) {
		fprintf(stderr, "%s of %#lx bytes at %#lx\n", call, (unsigned long)len, (unsigned long)from);
		atomic_fetch_add(&odd_calls, 1);
	}
}

/* The host has no mapping left for these addresses. */
static struct watched no_mapping;

static bool refused(const void *addr)
{
	if ((uintptr_t)addr < no_mapping.start || (uintptr_t)addr >= no_mapping.end)
		return false;
	errno = ENOMEM;
	return true;
}

/* These stand before libc's at link time. */
void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	if (flags & MAP_FIXED && refused(addr))
		return MAP_FAILED;
	if (flags & MAP_FIXED) {
		look("mmap", addr, len);
		if (!(flags & MAP_ANONYMOUS))
			look("mmap of a file", (char *)addr + (offset & (off_t)(piece - 1)), len);
	}
	return (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
}

void *mremap(void *old, size_t old_len, size_t new_len, int flags, ...)
{
	va_list args;
	void *to;

	va_start(args, flags);
	to = va_arg(args, void *);
	va_end(args);
	if (flags & MREMAP_FIXED && refused(to))
		return MAP_FAILED;
	if (flags & MREMAP_FIXED) {
		look("mremap", to, new_len);
		if (piece && (uintptr_t)old % PAGE == 0 && old_len == 0) /* a second view of frames */
			look("mremap of frames", (char *)to + ((uintptr_t)old & (piece - 1)), new_len);
	}
	return (void *)syscall(SYS_mremap, old, old_len, new_len, flags, to);
}

/* What happens once the bytes of 2 MiB have been copied home. */
static void (*copied)(void);

ssize_t pwrite(int fd, const void *buf, size_t len, off_t offset)
{
	ssize_t r = syscall(SYS_pwrite64, fd, buf, len, offset);
	void (*fn)(void) = copied;

	if (fn && r > 1 << 20) {
		copied = NULL;
		fn();
	}
	return r;
}

int mprotect(void *addr, size_t len, int prot)
{
	look("mprotect", addr, len);
	return (int)syscall(SYS_mprotect, addr, len, prot);
}

int madvise(void *addr, size_t len, int advice)
{
	look("madvise", addr, len);
	return (int)syscall(SYS_madvise, addr, len, advice);
}

int ioctl(int fd, unsigned long request, ...)
{
	/* The kernel stops at a page of its own, 4 KiB; where it did the engine goes on from there. What it refuses to
	 * protect in one go, for it is more than one mapping, the engine tries in halves, down to such a page. */
	static __thread bool stopped;
	static __thread struct watched refused;
	const struct uffdio_range *range;
	va_list args;
	void *arg;
	int r;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	range = arg;
	if (stopped && (request == UFFDIO_CONTINUE || request == UFFDIO_WAKE)) {
		r = (int)syscall(SYS_ioctl, fd, request, arg);
		stopped = request == UFFDIO_WAKE || r != 0;
		return r;
	}
	if (request == UFFDIO_WRITEPROTECT && refused.start <= range->start && range->start + range->len <= refused.end)
		return (int)syscall(SYS_ioctl, fd, request, arg);
	if (request == UFFDIO_REGISTER || request == UFFDIO_UNREGISTER || request == UFFDIO_WRITEPROTECT ||
	    request == UFFDIO_WAKE || request == UFFDIO_CONTINUE || request == UFFDIO_ZEROPAGE) /* a range comes first */
		look("ioctl of userfaultfd", (void *)(uintptr_t)range->start, range->len);
	r = (int)syscall(SYS_ioctl, fd, request, arg);
	stopped = request == UFFDIO_CONTINUE && r != 0;
	refused = (struct watched){0};
	if (request == UFFDIO_WRITEPROTECT && r != 0)
		refused = (struct watched){range->start, range->start + range->len};
	return r;
}

/* -- guests ------------------------------------------------------------------------------- */

struct model {
	struct bare b;
	bool live, attached;
	uint64_t word[PAGES];
	unsigned pinned; /* page + 1 */
};

static struct model *model; /* GUESTS */
static uint64_t seed;

static uint64_t rnd(uint64_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed % below;
}

static void watch(unsigned i)
{
	uintptr_t from = (uintptr_t)kage_kvm_window(model[i].b.kvm, 0, LEN);

	watched[i] = (struct watched){from, from + LEN};
}

static void join(unsigned i, uint32_t policy)
{
	model[i].b = attach(model[i].b.vm, policy);
	model[i].attached = true;
	watch(i);
}

static void leave(unsigned i)
{
	struct bare *b = &model[i].b;

	watched[i] = (struct watched){0, 0};
	kage_kvm_helper_stop(b->kvm);
	ok(kage_kvm_detach(b->kvm));
	close(b->fd);
	model[i].attached = false;
}

/* G2 */
static void compare(unsigned i)
{
	const struct model *m = &model[i];

	for (unsigned p = 0; p < PAGES; p++) {
		uint64_t gpa = p * PAGE + 8 * (p % 512);

		ck_assert_msg(read64(m->b.vm, gpa) == m->word[p], "guest %u page %u: %lx, not %lx", i, p,
			      (unsigned long)read64(m->b.vm, gpa), (unsigned long)m->word[p]);
		if (m->attached)
			same(at(&m->b, p * PAGE)[p % 512], m->word[p]);
	}
}

static void write_page_of(unsigned i, unsigned p)
{
	struct model *m = &model[i];
	uint64_t word = rnd(8) ? seed : 0;

	if (m->attached && rnd(2))
		at(&m->b, p * PAGE)[p % 512] = word;
	else
		write64(m->b.vm, p * PAGE + 8 * (p % 512), word);
	m->word[p] = word;
}

static void discard_of(unsigned i, size_t granule_bytes)
{
	struct model *m = &model[i];
	unsigned n = (unsigned)(granule_bytes / PAGE), p = (unsigned)rnd(PAGES / n - 4) * n, len = n * (1 + (unsigned)rnd(3));
	int r = kage_vm_advise(m->b.vm, p * PAGE, len * PAGE, KAGE_ADVICE_DISCARD);

	if (m->pinned && m->pinned - 1 >= p && m->pinned - 1 < p + len) {
		is(r, -EBUSY);
		return;
	}
	ok(r);
	memset(&m->word[p], 0, len * sizeof(m->word[0]));
	if (m->attached && n > 1) /* pieces of a granule are refused */
		is(kage_vm_advise(m->b.vm, (p + 1) * PAGE, PAGE, KAGE_ADVICE_DISCARD), -EINVAL);
}

static void pin_of(unsigned i)
{
	struct model *m = &model[i];
	struct iovec iov[1];
	unsigned n = 1, p = (unsigned)rnd(PAGES);

	if (m->pinned) {
		ok(kage_vm_unpin(m->b.vm, (m->pinned - 1) * PAGE, PAGE));
		m->pinned = 0;
		return;
	}
	if (!m->attached)
		return;
	ok(kage_vm_pin(m->b.vm, p * PAGE, PAGE, 0, iov, &n));
	m->pinned = p + 1;
}

static void clone_of(unsigned i)
{
	unsigned to = 0;

	while (to < GUESTS && model[to].live)
		to++;
	if (to == GUESTS)
		return;
	ok(kage_vm_clone(model[i].b.vm, NULL, &model[to].b.vm));
	memcpy(model[to].word, model[i].word, sizeof(model[i].word));
	model[to].live = true;
	model[to].attached = false;
	model[to].pinned = 0;
}

static void end_of(unsigned i)
{
	struct model *m = &model[i];

	if (m->pinned)
		pin_of(i);
	if (m->attached)
		leave(i);
	ok(kage_vm_destroy(m->b.vm));
	m->live = false;
}

static void one_step(unsigned i, uint32_t policy, size_t granule_bytes)
{
	struct model *m = &model[i];
	unsigned p = (unsigned)rnd(PAGES);

	switch (rnd(40)) {
	case 0:
		clone_of(i);
		break;
	case 1:
		if (i)
			end_of(i);
		break;
	case 2:
		if (m->attached)
			leave(i);
		else if (!m->pinned)
			join(i, policy);
		break;
	case 3:
		discard_of(i, granule_bytes);
		break;
	case 4:
		pin_of(i);
		break;
	case 5:
		ok(kage_engine_step(engine, NULL, NULL));
		break;
	case 6:
		if (m->attached)
			ck_assert_int_ge(kage_kvm_reconcile(m->b.kvm, rnd(2) ? KAGE_KVM_ADOPT : 0), 0);
		break;
	case 7:
		for (unsigned n = 0; n < 300; n++) /* scattered: whole blocks come home */
			write_page_of(i, (unsigned)rnd(PAGES));
		break;
	default:
		for (unsigned n = 0; n < 6; n++)
			write_page_of(i, (p + n) % PAGES);
	}
}

static void history(uint32_t policy, size_t granule_bytes, uint64_t first)
{
	seed = first;
	granule = (uint32_t)granule_bytes;
	piece = granule_bytes;
	atomic_store(&odd_calls, 0);
	atomic_store(&window_calls, 0);
	engine_up();
	merging(true);
	model = calloc(GUESTS, sizeof(*model));
	ck_assert_ptr_nonnull(model);
	model[0].b.vm = new_vm(LEN);
	model[0].live = true;
	join(0, policy);
	for (unsigned n = 0; n < times(OPS, OPS / 3); n++) {
		unsigned i = (unsigned)rnd(GUESTS);

		while (!model[i].live)
			i = (i + 1) % GUESTS;
		one_step(i, policy, granule_bytes);
		audit();
		if (n % 16 == 0)
			for (unsigned g = 0; g < GUESTS; g++)
				if (model[g].live)
					compare(g);
	}
	for (unsigned i = 0; i < GUESTS; i++)
		if (model[i].live) {
			compare(i);
			end_of(i);
		}
	free(model);
	same(odd_calls, 0);
	ck_assert_uint_gt(window_calls, 0);
	piece = 0;
	engine_down();
}

static const size_t granules[] = {4 * 1024, 16 * 1024, 64 * 1024};

/* -- what happens in the middle of a change ------------------------------------------------- */

/* A listener that has another thread pin page 1, once, at the start or the end of a change of CLEAR. */
struct pinner {
	struct kage_notifier n;
	struct kage_vm *vm;
	struct iovec iov[1];
	pthread_t thread;
	_Atomic int begun, done;
	bool at_end;
};

static void *pinner_main(void *arg)
{
	struct pinner *p = arg;
	unsigned n = 1;

	ok(kage_vm_pin(p->vm, PAGE, PAGE, 0, p->iov, &n));
	atomic_store(&p->done, 1);
	return NULL;
}

/* The thread may have to wait for the change's end: it gets the time that it needs if it has not. */
static void pinner_go(struct pinner *p, const struct kage_range *range)
{
	if (range->reason != KAGE_REASON_CLEAR || range->start > PAGE || range->end <= PAGE ||
	    atomic_exchange(&p->begun, 1))
		return;
	ok(pthread_create(&p->thread, NULL, pinner_main, p));
	for (unsigned i = 0; i < 200 && !atomic_load(&p->done); i++)
		sleep_ms(1);
}

static int pinner_start(struct kage_notifier *n, const struct kage_range *range)
{
	struct pinner *p = (struct pinner *)n;

	if (!p->at_end)
		pinner_go(p, range);
	return 0;
}

static void pinner_end(struct kage_notifier *n, const struct kage_range *range)
{
	struct pinner *p = (struct pinner *)n;

	if (p->at_end)
		pinner_go(p, range);
}

static const struct kage_notifier_ops pinner_ops = {
	.invalidate_range_start = pinner_start, .invalidate_range_end = pinner_end,
};

START_TEST(histories)
{
	unsigned policy = (unsigned)_i % 2, which = (unsigned)_i / 2;

	need(policy == 0 || can_exact(), "this kernel cannot trap");
	for (unsigned n = 0; n < times(2, 1); n++)
		history(policies[policy], granules[which], 0x9e3779b97f4a7c15ull * (n + 1) + (unsigned)_i);
}
END_TEST

/* One page of a shared granule is written: all of it comes home, as one mapping; no page of it is merged. */
START_TEST(breaks_are_widened)
{
	for (unsigned g = 1; g < 3; g++) {
		unsigned n = (unsigned)(granules[g] / PAGE);
		struct kage_stats before, after;
		struct bare a, b;

		granule = (uint32_t)granules[g];
		engine_up();
		a = new_bare(LEN, KAGE_KVM_NATIVE);
		for (unsigned p = 0; p < PAGES; p++)
			at(&a, p * PAGE)[0] = p / 2; /* pairs of equal pages */
		b = clone_bare(&a, KAGE_KVM_NATIVE);
		before = stats_of(b.vm);
		write64(b.vm, 5 * PAGE, 77);
		is(kage_kvm_reconcile(b.kvm, KAGE_KVM_ADOPT), 0);
		after = stats_of(b.vm);
		same(after.cow_breaks - before.cow_breaks + info_of(b.kvm).adopted, n);
		audit();
		merging(true);
		same(merge_all(), 0);
		for (unsigned p = 0; p < PAGES; p++)
			same(read64(b.vm, p * PAGE), p == 5 ? 77 : p / 2);
		free_bare(&b);
		free_bare(&a);
		engine_down();
	}
}
END_TEST

static struct bare pinned_bare(struct iovec *iov, struct kage_vm **second)
{
	struct bare a = attach(new_vm(2 * MIB), KAGE_KVM_NATIVE);
	struct kage_vm *first;
	unsigned n = 1;

	for (unsigned p = 0; p < 512; p++)
		write64(a.vm, p * PAGE, p + 1);
	ok(kage_vm_clone(a.vm, NULL, &first));
	ok(kage_vm_pin(a.vm, PAGE, PAGE, 0, iov, &n)); /* not at home: the clone has that */
	ok(kage_vm_clone(a.vm, NULL, second));
	ok(kage_vm_destroy(first));
	for (unsigned p = 16; p < 512; p += 4) /* scattered: all of the 2 MiB comes home */
		at(&a, p * PAGE)[0] = 1000 + p;
	return a;
}

static void pinned_holds(struct kage_vm *vm, const struct iovec *iov, uint64_t word)
{
	*(volatile uint64_t *)iov->iov_base = word;
	for (unsigned p = 0; p < 512; p++)
		same(read64(vm, p * PAGE), p == 1 ? word : p >= 16 && p % 4 == 0 ? 1000 + p : p + 1);
	audit();
}

/* A pinned page keeps its granule where it is, and nothing else of the 2 MiB from coming home. */
START_TEST(pins_stay)
{
	for (unsigned g = 0; g < 3; g++) {
		struct iovec iov[1];
		struct kage_vm *before, *clone;
		struct bare a;

		granule = (uint32_t)granules[g];
		engine_up();
		a = pinned_bare(iov, &before);
		is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), 0);
		ck_assert_uint_gt(info_of(a.kvm).adopted, 0);
		pinned_holds(a.vm, iov, 7);
		same(at(&a, PAGE)[0], 7);
		for (unsigned p = 16; p < 512; p += 4)
			at(&a, p * PAGE)[0] = 1000 + p;
		ok(kage_vm_clone(a.vm, NULL, &clone));
		pinned_holds(a.vm, iov, 8);
		same(read64(clone, PAGE), 7);
		for (unsigned p = 16; p < 512; p += 4)
			at(&a, p * PAGE)[0] = 1000 + p;
		ok(kage_kvm_detach(a.kvm));
		pinned_holds(a.vm, iov, 9);
		ok(kage_vm_unpin(a.vm, PAGE, PAGE));
		close(a.fd);
		ok(kage_vm_destroy(before));
		ok(kage_vm_destroy(clone));
		ok(kage_vm_destroy(a.vm));
		engine_down();
	}
}
END_TEST

/* Page 1 lies in a frame of its own away from home, not pinned any more, and the 2 MiB around it want to come home. */
static struct bare scattered_bare(struct kage_vm **second)
{
	struct iovec iov[1];
	struct bare a = pinned_bare(iov, second);
	unsigned n = 1;

	ok(kage_vm_pin(a.vm, PAGE, PAGE, 0, iov, &n)); /* its entry says so, too */
	ok(kage_vm_unpin(a.vm, PAGE, PAGE));
	ok(kage_vm_unpin(a.vm, PAGE, PAGE));
	return a;
}

/* A pin that is taken when a page is about to move home, after it was looked at: the page stays. */
START_TEST(pins_hold_back_what_has_begun)
{
	for (unsigned g = 0; g < 3; g++) {
		struct pinner p = {0};
		struct kage_vm *second;
		struct bare a;

		granule = (uint32_t)granules[g];
		engine_up();
		a = scattered_bare(&second);
		p.vm = a.vm;
		ok(kage_notifier_register(a.vm, &p.n, &pinner_ops));
		is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), 0);
		ck_assert_int_eq(p.begun, 1);
		ok(pthread_join(p.thread, NULL));
		pinned_holds(a.vm, p.iov, 7);
		same(at(&a, PAGE)[0], 7);
		ok(kage_notifier_unregister(&p.n));
		ok(kage_vm_unpin(a.vm, PAGE, PAGE));
		free_bare(&a);
		ok(kage_vm_destroy(second));
		engine_down();
	}
}
END_TEST

/* The host has no mapping for what adoption has put into the table, which goes back: nobody has pinned it meanwhile. */
START_TEST(pins_wait_for_what_is_shown)
{
	for (unsigned g = 0; g < 3; g++) {
		struct pinner p = {.at_end = true};
		struct kage_vm *second;
		struct bare a;

		granule = (uint32_t)granules[g];
		engine_up();
		a = scattered_bare(&second);
		p.vm = a.vm;
		ok(kage_notifier_register(a.vm, &p.n, &pinner_ops));
		no_mapping.start = (uintptr_t)kage_kvm_window(a.kvm, 0, 2 * MIB);
		no_mapping.end = no_mapping.start + 2 * MIB;
		is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), -ENOMEM);
		no_mapping = (struct watched){0, 0};
		expected_errors = atomic_load(&logged_errors);
		ck_assert_int_eq(p.begun, 1);
		ok(pthread_join(p.thread, NULL));
		pinned_holds(a.vm, p.iov, 7);
		same(at(&a, PAGE)[0], 7);
		ok(kage_notifier_unregister(&p.n));
		ok(kage_vm_unpin(a.vm, PAGE, PAGE));
		free_bare(&a);
		ok(kage_vm_destroy(second));
		engine_down();
	}
}
END_TEST

static struct pinner storing;

/* A whole pin, with a store of its device's. */
static void *store_pinned(void *arg)
{
	pinner_main(&storing);
	*(volatile uint64_t *)storing.iov[0].iov_base = 7;
	ok(kage_vm_unpin(storing.vm, PAGE, PAGE));
	return NULL;
}

static void store_in_between(void)
{
	storing.begun = 1;
	ok(pthread_create(&storing.thread, NULL, store_pinned, NULL));
	sleep_ms(200);
}

/* A pin that comes when the bytes have been copied, and is over when the table changes: its store is not lost. */
START_TEST(pins_that_are_over_are_not_lost)
{
	for (unsigned g = 0; g < 3; g++) {
		struct kage_vm *second;
		struct bare a;

		granule = (uint32_t)granules[g];
		engine_up();
		a = scattered_bare(&second);
		storing = (struct pinner){.vm = a.vm};
		copied = store_in_between;
		is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), 0);
		ck_assert_int_eq(storing.begun, 1);
		ok(pthread_join(storing.thread, NULL));
		same(read64(a.vm, PAGE), 7);
		same(at(&a, PAGE)[0], 7);
		audit();
		free_bare(&a);
		ok(kage_vm_destroy(second));
		engine_down();
	}
}
END_TEST

/* Pinned while soft, its neighbours elsewhere: refused as documented, and fine once it is unpinned. */
START_TEST(scattered_pins_are_refused)
{
	for (unsigned g = 0; g < 3; g++) {
		struct kage_kvm_config config;
		struct kage_vm *vm, *clone;
		struct kage_kvm *kvm;
		struct iovec iov[1];
		unsigned n = 1;
		int fd = new_kvm();

		granule = (uint32_t)granules[g];
		config = config_of(KAGE_KVM_NATIVE);
		engine_up();
		vm = new_vm(2 * MIB);
		for (unsigned p = 0; p < 512; p++)
			write64(vm, p * PAGE, p >= 16 && p % 4 == 0 ? 1000 + p : p + 1);
		ok(kage_vm_clone(vm, NULL, &clone));
		ok(kage_vm_pin(vm, PAGE, PAGE, 0, iov, &n));
		if (g) {
			is(kage_kvm_attach(vm, fd, &config, &kvm), -EBUSY);
			expected_errors = atomic_load(&logged_errors);
			pinned_holds(vm, iov, 7);
			ok(kage_vm_unpin(vm, PAGE, PAGE));
		}
		ok(kage_kvm_attach(vm, fd, &config, &kvm));
		if (g)
			ok(kage_vm_pin(vm, PAGE, PAGE, 0, iov, &n));
		pinned_holds(vm, iov, 8);
		ok(kage_vm_unpin(vm, PAGE, PAGE));
		ok(kage_kvm_detach(kvm));
		close(fd);
		ok(kage_vm_destroy(clone));
		ok(kage_vm_destroy(vm));
		engine_down();
	}
}
END_TEST

static bool fetched_later;

static int fetch(void *opaque, uint64_t gpa, void *page)
{
	if (fetched_later && gpa / PAGE == 70)
		return KAGE_WAIT;
	memset(page, 0x41 + (int)(gpa / PAGE % 16), PAGE);
	return 0;
}

static void fetched_holds(struct kage_vm *vm, unsigned from, unsigned to)
{
	for (unsigned p = from; p < to; p++)
		same(read64(vm, p * PAGE), 0x0101010101010101ull * (0x41 + p % 16));
	audit();
}

static _Atomic unsigned asked;
static int answer;

static int fetch_answer(void *opaque, uint64_t gpa, void *page)
{
	atomic_fetch_add(&asked, 1);
	return asked > 1000 ? -EIO : answer; /* who asks for ever comes to an end */
}

static struct bare trapping_bare(int says)
{
	struct kage_vm *vm;

	answer = says;
	atomic_store(&asked, 0);
	ok(kage_vm_create(engine, NULL, &vm));
	ok(kage_vm_map(vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_TRAP, .len = 2 * MIB, .touch = fetch_answer)));
	return attach(vm, KAGE_KVM_NATIVE);
}

/* An owner who says -EAGAIN is asked once an access, which hears KAGE_WAIT. */
START_TEST(later_is_not_again)
{
	need(has(KAGE_KVM_USERFAULTFD), "no userfaultfd: nothing traps");
	for (unsigned g = 0; g < 3; g++) {
		uint64_t word = 1;
		struct bare a;

		granule = (uint32_t)granules[g];
		engine_up();
		a = trapping_bare(-EAGAIN);
		is(kage_vm_read(a.vm, 5 * PAGE, &word, sizeof(word)), KAGE_WAIT);
		same(asked, 1);
		is(kage_vm_write(a.vm, 5 * PAGE, &word, sizeof(word)), KAGE_WAIT);
		same(asked, 2);
		is(kage_kvm_detach(a.kvm), 0);
		is(kage_vm_read(a.vm, 5 * PAGE, &word, sizeof(word)), KAGE_WAIT);
		same(asked, 3);
		close(a.fd);
		ok(kage_vm_destroy(a.vm));
		engine_down();
	}
}
END_TEST

/* Once trapping is abandoned what was not fetched is zero, for everybody: nobody is told to wait for it. */
START_TEST(abandoned_is_zero)
{
	need(has(KAGE_KVM_USERFAULTFD), "no userfaultfd: nothing traps");
	for (unsigned g = 0; g < 3; g++) {
		struct kage_vm *clone;
		struct bare a;

		granule = (uint32_t)granules[g];
		engine_up();
		a = trapping_bare(KAGE_WAIT);
		ok(kage_kvm_trap_abandon(a.kvm));
		put(&a, 5 * PAGE, 7);
		put(&a, 100 * PAGE, 8);
		same(read64(a.vm, 5 * PAGE), 7);
		same(read64(a.vm, 6 * PAGE), 0);
		write64(a.vm, 50 * PAGE, 9);
		same(get(&a, 50 * PAGE), 9);
		is(kage_kvm_reconcile(a.kvm, KAGE_KVM_ADOPT), 0);
		put(&a, 200 * PAGE, 10);
		ok(kage_vm_clone(a.vm, NULL, &clone));
		same(read64(clone, 200 * PAGE), 10);
		put(&a, 300 * PAGE, 11);
		ok(kage_kvm_detach(a.kvm));
		same(asked, 0);
		for (unsigned p = 0; p < 5; p++)
			same(read64(a.vm, (unsigned[]){5, 100, 50, 200, 300}[p] * PAGE), 7 + p);
		close(a.fd);
		ok(kage_vm_destroy(a.vm));
		ok(kage_vm_destroy(clone));
		engine_down();
	}
}
END_TEST

/* Some pages of a granule have been fetched, and one of the others is not to be had yet: attaching waits for it with an errno. */
START_TEST(half_fetched_granules)
{
	need(has(KAGE_KVM_USERFAULTFD), "no userfaultfd: nothing traps");
	for (unsigned g = 0; g < 3; g++) {
		struct kage_kvm *kvm = NULL;
		struct kage_kvm_config config;
		struct kage_vm *vm;
		uint64_t word;
		int fd = new_kvm();

		granule = (uint32_t)granules[g];
		config = config_of(KAGE_KVM_NATIVE);
		engine_up();
		fetched_later = false;
		ok(kage_vm_create(engine, NULL, &vm));
		ok(kage_vm_map(vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_TRAP, .len = 2 * MIB, .touch = fetch)));
		fetched_holds(vm, 1, 3); /* granules before that of the one that is late, and its own */
		fetched_holds(vm, 69, 70);
		fetched_later = true;
		if (g) {
			is(kage_kvm_attach(vm, fd, &config, &kvm), -EAGAIN);
			ck_assert_ptr_null(kvm);
			expected_errors = atomic_load(&logged_errors);
			fetched_holds(vm, 0, 70);
			is(kage_vm_read(vm, 70 * PAGE, &word, sizeof(word)), KAGE_WAIT);
			fetched_later = false;
		}
		ok(kage_kvm_attach(vm, fd, &config, &kvm));
		fetched_later = false;
		ok(kage_kvm_helper_start(kvm)); /* the rest traps */
		same(*(volatile uint8_t *)kage_kvm_window(kvm, 300 * PAGE, PAGE), 0x41 + 300 % 16);
		fetched_holds(vm, 0, 512);
		ok(kage_kvm_helper_stop(kvm));
		ok(kage_kvm_detach(kvm));
		fetched_holds(vm, 0, 512);
		close(fd);
		ok(kage_vm_destroy(vm));
		engine_down();
	}
}
END_TEST

/* What somebody else unmaps of a window is put right, in pieces that a host with such pages takes. */
START_TEST(repairs_are_whole)
{
	for (unsigned g = 0; g < 3; g++) {
		struct kvm_run run = {0};
		struct bare a;
		char *window;

		granule = (uint32_t)granules[g];
		engine_up();
		a = new_bare(2 * MIB, KAGE_KVM_NATIVE);
		for (unsigned p = 0; p < 512; p++)
			put(&a, p * PAGE, p + 1);
		window = kage_kvm_window(a.kvm, 0, 2 * MIB);
		ok(munmap(window + 3 * granules[g], granules[g]));
		ok(munmap(window + 6 * granules[g], 2 * granules[g]));
		watched[0] = (struct watched){(uintptr_t)window, (uintptr_t)window + 2 * MIB};
		piece = granules[g];
		atomic_store(&odd_calls, 0);
		is(kage_kvm_run_failed(a.kvm, -1, &run, EFAULT), KAGE_RETRY);
		piece = 0;
		watched[0] = (struct watched){0, 0};
		same(odd_calls, 0);
		expected_errors = atomic_load(&logged_errors);
		audit();
		for (unsigned p = 0; p < 512; p++)
			same(get(&a, p * PAGE), p + 1);
		free_bare(&a);
		engine_down();
	}
}
END_TEST

/* What does not begin and end on granules is refused before anything happens. */
START_TEST(odd_regions_are_refused)
{
	struct kage_kvm_config config = config_of(KAGE_KVM_NATIVE);
	struct kage_kvm *kvm;
	struct kage_vm *vm;
	int fd = new_kvm();

	config.granule = 16 * 1024;
	engine_up();
	vm = new_vm(MIB + PAGE);
	is(kage_kvm_attach(vm, fd, &config, &kvm), -EINVAL);
	ok(kage_vm_unmap(vm, MIB, PAGE));
	ok(kage_kvm_attach(vm, fd, &config, &kvm));
	is(kage_vm_map(vm, KAGE_CFG(kage_region, .gpa = MIB, .len = PAGE)), -EINVAL);
	is(kage_vm_unmap(vm, MIB - PAGE, PAGE), -EINVAL);
	is(kage_vm_protect(vm, PAGE, PAGE, KAGE_READ), -EINVAL);
	expected_errors = atomic_load(&logged_errors);
	audit();
	ok(kage_kvm_detach(kvm));
	close(fd);
	ok(kage_vm_destroy(vm));
	engine_down();
}
END_TEST

int main(void)
{
	Suite *s = suite_create("granule");
	SRunner *r;
	int failed;

	skip_without_kvm();
	probe();
	add_test(s, histories, 6);
	add_test(s, breaks_are_widened, 1);
	add_test(s, pins_stay, 1);
	add_test(s, pins_hold_back_what_has_begun, 1);
	add_test(s, pins_wait_for_what_is_shown, 1);
	add_test(s, pins_that_are_over_are_not_lost, 1);
	add_test(s, scattered_pins_are_refused, 1);
	add_test(s, half_fetched_granules, 1);
	add_test(s, later_is_not_again, 1);
	add_test(s, abandoned_is_zero, 1);
	add_test(s, repairs_are_whole, 1);
	add_test(s, odd_regions_are_refused, 1);
	r = srunner_create(s);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
