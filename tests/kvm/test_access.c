/* SPDX-License-Identifier: MIT */
/*
 * The VMM's own access to a guest's memory, beside merging, cloning and discarding.
 *
 *   threads	three ways to reach memory, a thread each; each owns counters in pages that all three use
 *   I/O		the kernel writes to guest memory by itself: O_DIRECT, io_uring with fixed buffers
 *   balloon	memory given back reaches the host
 *   translate	kage_kvm_load_regs(), then kage_vcpu_translate() against KVM_TRANSLATE, or arm64's reference walker
 *
 * invariants
 *	C1. A counter is written by one thread, which knows what it wrote last: what it reads is that.
 *	C2. Churn merges, clones, reconciles and discards until `done`; its clones change nobody's counters.
 *	C3. What is shown to be lost without a pin is never looked for again: that guest is thrown away.
 */
#include <linux/io_uring.h>

#include "kvm_test.h"

#define need_threads()                                                                                       \
	need(has(KAGE_KVM_USERFAULTFD) && has(KAGE_KVM_UFFD_WP), "threads of a test cannot be paused")

/* -- churn ------------------------------------------------------------------------- */

#define COUNTER_PAGES 96
#define SPARE	      (128 * PAGE) /* behind the counters: memory that churn discards */
#define CHURN_LEN     (4 * MIB)

static void discard(struct kage_vm *vm, uint64_t gpa, uint64_t len)
{
	ok(kage_vm_advise(vm, gpa, len, KAGE_ADVICE_DISCARD));
}

static void churn(struct bare *b, struct rng *r)
{
	struct kage_vm *clone;
	uint64_t i;

	switch (rng_below(r, 4)) {
	case 0:
		ok(kage_vm_clone(b->vm, NULL, &clone));
		for (i = 0; i < 8; i++)
			write64(clone, rng_below(r, COUNTER_PAGES) * PAGE, rng_next(r));
		ok(kage_vm_destroy(clone));
		break;
	case 1:
		ok(kage_engine_step(engine, NULL, NULL));
		break;
	case 2:
		ck_assert_int_ge(kage_kvm_reconcile(b->kvm, rng_chance(r, 50) ? KAGE_KVM_ADOPT : 0), 0);
		break;
	default:
		for (i = 0; i < 8; i++)
			write64(b->vm, SPARE + rng_below(r, 256) * PAGE, 77);
		discard(b->vm, SPARE + rng_below(r, 128) * PAGE, (1 + rng_below(r, 128)) * PAGE);
	}
}

/* -- threads -------------------------------------------------------------------------- */

struct owner {
	pthread_t thread;
	const struct bare *b;
	unsigned way; /* 0: kage_vm_read() and kage_vm_write(); 1: pinned; 2: through the window */
	_Atomic bool *done;
	_Atomic uint64_t rounds;
	uint64_t count[COUNTER_PAGES];
	uint64_t page, found; /* of the first error */
	int error;
};

/* A counter, and twice what it is: a torn pair tells. In one cache line of the owner's. */
static void read_pair(struct owner *o, uint64_t gpa, uint64_t pair[2])
{
	struct iovec iov[1];
	unsigned n = 1;

	if (o->way == 2) {
		pair[0] = get(o->b, gpa);
		pair[1] = get(o->b, gpa + 8);
	} else if (o->way == 0) {
		o->error = kage_vm_read(o->b->vm, gpa, pair, 16);
	} else {
		o->error = kage_vm_pin(o->b->vm, gpa & ~(PAGE - 1), PAGE, 0, iov, &n);
		if (!o->error)
			memcpy(pair, (char *)iov->iov_base + gpa % PAGE, 16);
	}
}

/* A page that read_pair() has pinned is still pinned. */
static void write_pair(struct owner *o, uint64_t gpa, const uint64_t pair[2])
{
	struct iovec iov[1];
	unsigned n = 1;

	if (o->way == 2) {
		put(o->b, gpa, pair[0]);
		put(o->b, gpa + 8, pair[1]);
		o->error = kage_vm_mark_dirty(o->b->vm, gpa, 16);
	} else if (o->way == 0) {
		o->error = kage_vm_write(o->b->vm, gpa, pair, 16);
	} else {
		o->error = kage_vm_pin(o->b->vm, gpa & ~(PAGE - 1), PAGE, 0, iov, &n);
		if (o->error)
			return;
		memcpy((char *)iov->iov_base + gpa % PAGE, pair, 16);
		kage_vm_mark_dirty(o->b->vm, gpa, 16);
		kage_vm_unpin(o->b->vm, gpa & ~(PAGE - 1), PAGE);
		o->error = kage_vm_unpin(o->b->vm, gpa & ~(PAGE - 1), PAGE);
	}
}

static uint64_t pair_gpa(const struct owner *o, uint64_t page)
{
	return page * PAGE + 64 + o->way * 128;
}

static void *owner_main(void *arg)
{
	struct owner *o = arg;
	struct rng r = rng_seed(o->way);
	uint64_t pair[2], page;

	while (!atomic_load(o->done) && !o->error) {
		page = rng_below(&r, COUNTER_PAGES);
		read_pair(o, pair_gpa(o, page), pair);
		if (!o->error && (pair[0] != o->count[page] || pair[1] != 2 * o->count[page])) {
			o->page = page;
			o->found = pair[0];
			o->error = 1;
		}
		if (o->error)
			break;
		pair[0] = ++o->count[page];
		pair[1] = 2 * pair[0];
		write_pair(o, pair_gpa(o, page), pair);
		atomic_fetch_add(&o->rounds, 1);
	}
	return NULL;
}

static void owners_check(const struct owner *o)
{
	uint64_t pair[2], page;

	ck_assert_msg(!o->error, "way %u: %d; page %lu found %lu, not %lu", o->way, o->error, o->page,
		      o->found, o->count[o->page]);
	for (page = 0; page < COUNTER_PAGES; page++) {
		ok(kage_vm_read(o->b->vm, pair_gpa(o, page), pair, 16));
		same(pair[0], o->count[page]);
		same(pair[1], 2 * o->count[page]);
		same(get(o->b, pair_gpa(o, page)), o->count[page]);
	}
}

START_TEST(threads_lose_nothing)
{
	static struct owner owners[3];
	struct rng r = rng_seed(_i);
	_Atomic bool done = false;
	uint64_t slowest = 0, enough = times(2000, 300);
	struct bare b;

	need_threads();
	engine_up();
	merging(true);
	b = new_bare(CHURN_LEN, policies[_i]);
	for (unsigned i = 0; i < 3; i++) {
		owners[i] = (struct owner){.b = &b, .way = i, .done = &done};
		is(pthread_create(&owners[i].thread, NULL, owner_main, &owners[i]), 0);
	}
	for (unsigned n = 0; n < times(200, 40) || (slowest < enough && n < 5000); n++) {
		churn(&b, &r);
		slowest = UINT64_MAX;
		for (unsigned i = 0; i < 3; i++) {
			slowest = owners[i].rounds < slowest ? owners[i].rounds : slowest;
			n = owners[i].error ? 5000 : n;
		}
		if (n % 32 == 0)
			audit();
	}
	atomic_store(&done, true);
	for (unsigned i = 0; i < 3; i++)
		pthread_join(owners[i].thread, NULL);
	for (unsigned i = 0; i < 3; i++)
		owners_check(&owners[i]);
	ck_assert_uint_ge(slowest, enough);
	audit();
	is(kage_kvm_reconcile(b.kvm, KAGE_KVM_ADOPT), 0);
	for (unsigned i = 0; i < 3; i++)
		owners_check(&owners[i]);
	free_bare(&b);
	engine_down();
}
END_TEST

/* -- the kernel's own I/O ----------------------------------------------------------------- */

#define IO_PAGES ((uint64_t)16)
#define FILE_LEN (4 * MIB)
#define IO_GPA	 (400 * PAGE) /* behind churn's counters and spares, in the same 2 MiB */

static uint64_t file_word(uint64_t offset)
{
	return offset * UINT64_C(0x9e3779b97f4a7c15) + 1;
}

/* A file of known contents that can be read past the page cache; -1: there is no place for one. */
static int direct_file(void)
{
	static const char *const places[] = {"/var/tmp", "/tmp", "."};
	char name[64];
	uint64_t *words = aligned_alloc(PAGE, FILE_LEN); /* O_DIRECT asks for that too */

	for (uint64_t i = 0; i < FILE_LEN / 8; i++)
		words[i] = file_word(i * 8);
	for (unsigned i = 0; i < COUNT(places); i++) {
		int fd, direct;

		snprintf(name, sizeof(name), "%s/kage-access-XXXXXX", places[i]);
		fd = mkstemp(name);
		if (fd < 0)
			continue;
		direct = open(name, O_RDONLY | O_DIRECT | O_CLOEXEC);
		unlink(name);
		if (direct >= 0 && write(fd, words, FILE_LEN) == (ssize_t)FILE_LEN && fsync(fd) == 0 &&
		    pread(direct, words, PAGE, 0) >= 0) {
			close(fd);
			free(words);
			return direct;
		}
		close(fd);
		close(direct);
	}
	free(words);
	return -1;
}

/* The file's bytes from `offset` are in the guest. Returns the number of pages that are not. */
static unsigned io_wrong(const struct bare *b, uint64_t gpa, uint64_t offset)
{
	unsigned wrong = 0;

	for (uint64_t p = 0; p < IO_PAGES * PAGE; p += PAGE) {
		bool bad = false;

		for (uint64_t i = 0; !bad && i < PAGE; i += 512)
			bad = get(b, gpa + p + i) != file_word(offset + p + i) ||
			      read64(b->vm, gpa + p + i) != file_word(offset + p + i);
		wrong += bad;
	}
	return wrong;
}

/* Shared with a clone and, as all are alike, every other time merged. Returns whether they were. */
static bool io_share(struct bare *b, struct kage_vm **clone, uint64_t word)
{
	bool merged;

	for (uint64_t p = 0; p < IO_PAGES; p++)
		for (uint64_t i = 0; i < PAGE; i += 512)
			put(b, IO_GPA + p * PAGE + i, word);
	ok(kage_vm_mark_dirty(b->vm, IO_GPA, IO_PAGES * PAGE));
	if (word % 2)
		is(kage_kvm_reconcile(b->kvm, KAGE_KVM_ADOPT), 0);
	for (unsigned i = 0; word % 2 && i < 4; i++)
		ok(kage_engine_step(engine, NULL, NULL));
	merged = class_of(b->vm, IO_GPA) == KAGE_PAGE_MERGED;
	ok(kage_vm_clone(b->vm, NULL, clone));
	return merged;
}

static unsigned io_clone_wrong(struct kage_vm *clone, uint64_t word)
{
	unsigned wrong = 0;

	for (uint64_t p = 0; p < IO_PAGES; p++)
		wrong += read64(clone, IO_GPA + p * PAGE) != word;
	return wrong;
}

struct churner {
	pthread_t thread;
	struct bare *b;
	_Atomic bool done;
};

static void *churner_main(void *arg)
{
	struct churner *c = arg;
	struct rng r = rng_seed(9);

	while (!atomic_load(&c->done))
		churn(c->b, &r);
	return NULL;
}

static void churner_start(struct churner *c, struct bare *b)
{
	*c = (struct churner){.b = b};
	is(pthread_create(&c->thread, NULL, churner_main, c), 0);
}

static void churner_stop(struct churner *c)
{
	atomic_store(&c->done, true);
	pthread_join(c->thread, NULL);
	audit();
}

START_TEST(direct_reads_into_pinned_memory)
{
	struct iovec iov[IO_PAGES];
	struct kage_vm *clone;
	struct churner c;
	struct bare b;
	uint64_t offset;
	unsigned n, merged = 0;
	int fd;

	need_threads();
	fd = direct_file();
	need(fd >= 0, "no file system with O_DIRECT");
	engine_up();
	merging(true);
	b = new_bare(CHURN_LEN, policies[_i]);
	churner_start(&c, &b);
	for (uint64_t round = 0; round < times(60, 10) || (!merged && round < 200); round++) {
		offset = round * IO_PAGES * PAGE % FILE_LEN;
		merged += io_share(&b, &clone, round + 1);
		n = IO_PAGES;
		ok(kage_vm_pin(b.vm, IO_GPA, IO_PAGES * PAGE, 0, iov, &n));
		is(preadv(fd, iov, (int)n, (off_t)offset), (ssize_t)(IO_PAGES * PAGE));
		ok(kage_vm_mark_dirty(b.vm, IO_GPA, IO_PAGES * PAGE));
		ok(kage_vm_unpin(b.vm, IO_GPA, IO_PAGES * PAGE));
		is(io_wrong(&b, IO_GPA, offset), 0);
		is(io_clone_wrong(clone, round + 1), 0);
		ok(kage_vm_destroy(clone));
	}
	churner_stop(&c);
	ck_assert_uint_gt(merged, 0);
	free_bare(&b);
	close(fd);
	engine_down();
}
END_TEST

/* -- io_uring, by its system calls ------------------------------------------------------------ */

struct ring {
	int fd;
	char *sq, *cq;
	size_t sq_len, cq_len;
	struct io_uring_sqe *sqe;
	struct io_uring_params p;
};

static void *ring_map(struct ring *r, size_t len, uint64_t what)
{
	void *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, (off_t)what);

	ck_assert_ptr_ne(at, MAP_FAILED);
	return at;
}

static bool ring_open(struct ring *r)
{
	memset(r, 0, sizeof(*r));
	r->fd = (int)syscall(SYS_io_uring_setup, 4, &r->p);
	if (r->fd < 0)
		return false;
	r->sq_len = r->p.sq_off.array + r->p.sq_entries * sizeof(uint32_t);
	r->cq_len = r->p.cq_off.cqes + r->p.cq_entries * sizeof(struct io_uring_cqe);
	r->sq = ring_map(r, r->sq_len, IORING_OFF_SQ_RING);
	r->cq = ring_map(r, r->cq_len, IORING_OFF_CQ_RING);
	r->sqe = ring_map(r, r->p.sq_entries * sizeof(*r->sqe), IORING_OFF_SQES);
	return true;
}

static void ring_close(struct ring *r)
{
	munmap(r->sqe, r->p.sq_entries * sizeof(*r->sqe));
	munmap(r->cq, r->cq_len);
	munmap(r->sq, r->sq_len);
	close(r->fd);
}

/* From now on the kernel holds these pages, whatever is mapped at their addresses later. */
static int ring_register(struct ring *r, const struct iovec *iov, unsigned n)
{
	return syscall(SYS_io_uring_register, r->fd, IORING_REGISTER_BUFFERS, iov, n) ? -errno : 0;
}

static void ring_unregister(struct ring *r)
{
	ok((int)syscall(SYS_io_uring_register, r->fd, IORING_UNREGISTER_BUFFERS, NULL, 0));
}

/* One read into fixed buffer `index`, all of it. */
static void ring_read(struct ring *r, int fd, const struct iovec *iov, unsigned index, uint64_t offset)
{
	uint32_t *tail = (uint32_t *)(r->sq + r->p.sq_off.tail),
		 *array = (uint32_t *)(r->sq + r->p.sq_off.array);
	uint32_t *head = (uint32_t *)(r->cq + r->p.cq_off.head),
		 mask_sq = *(uint32_t *)(r->sq + r->p.sq_off.ring_mask);
	uint32_t mask_cq = *(uint32_t *)(r->cq + r->p.cq_off.ring_mask), slot = *tail & mask_sq;
	struct io_uring_cqe *cqe = (struct io_uring_cqe *)(r->cq + r->p.cq_off.cqes);
	int res;

	r->sqe[slot] = (struct io_uring_sqe){.opcode = IORING_OP_READ_FIXED,
					     .fd = fd,
					     .off = offset,
					     .buf_index = (uint16_t)index,
					     .addr = (uintptr_t)iov[index].iov_base,
					     .len = (uint32_t)iov[index].iov_len};
	array[slot] = slot;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	do
		res = (int)syscall(SYS_io_uring_enter, r->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
	while (res < 0 && errno == EINTR);
	is(res, 1);
	ck_assert_uint_ne(__atomic_load_n((uint32_t *)(r->cq + r->p.cq_off.tail), __ATOMIC_ACQUIRE), *head);
	is(cqe[*head & mask_cq].res, (int)iov[index].iov_len);
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
}

static void ring_read_all(struct ring *r, int fd, const struct iovec *iov, unsigned n, uint64_t offset)
{
	for (unsigned i = 0; i < n; offset += iov[i++].iov_len)
		ring_read(r, fd, iov, i, offset);
}

/* Writes after the buffer was registered: a page that a clone shares gets another frame, or the kernel's own.
 */
static void fixed_write(struct bare *b, uint64_t word)
{
	for (uint64_t p = 0; p < IO_PAGES; p++)
		put(b, IO_GPA + p * PAGE, word);
	ok(kage_vm_mark_dirty(b->vm, IO_GPA, IO_PAGES * PAGE));
}

START_TEST(fixed_buffers_in_pinned_memory)
{
	struct iovec iov[IO_PAGES];
	struct kage_vm *clone, *second;
	struct churner c;
	struct ring ring;
	struct bare b;
	uint64_t offset;
	unsigned n, merged = 0;
	int fd;

	need_threads();
	need(ring_open(&ring), strerror(errno));
	fd = direct_file();
	need(fd >= 0, "no file system with O_DIRECT");
	engine_up();
	merging(true);
	b = new_bare(CHURN_LEN, policies[_i]);
	churner_start(&c, &b);
	for (uint64_t round = 0; round < times(24, 6); round++) {
		offset = round * IO_PAGES * PAGE % FILE_LEN;
		merged += io_share(&b, &clone, round + 1);
		n = IO_PAGES;
		ok(kage_vm_pin(b.vm, IO_GPA, IO_PAGES * PAGE, 0, iov, &n));
		ok(ring_register(&ring, iov, n));
		ok(kage_vm_clone(b.vm, NULL, &second));
		fixed_write(&b, 99);
		ring_read_all(&ring, fd, iov, n, offset);
		ok(kage_vm_mark_dirty(b.vm, IO_GPA, IO_PAGES * PAGE));
		is(io_wrong(&b, IO_GPA, offset), 0);
		is(io_clone_wrong(clone, round + 1), 0);
		is(io_clone_wrong(second, round + 1), 0);
		ring_unregister(&ring);
		ok(kage_vm_unpin(b.vm, IO_GPA, IO_PAGES * PAGE));
		is(io_wrong(&b, IO_GPA, offset), 0);
		ok(kage_vm_destroy(clone));
		ok(kage_vm_destroy(second));
	}
	churner_stop(&c);
	ck_assert_uint_gt(merged, 0);
	free_bare(&b);
	ring_close(&ring);
	close(fd);
	engine_down();
}
END_TEST

/* C3: what include/kage/kvm.h tells a VMM not to do. */
START_TEST(fixed_buffers_that_are_not_pinned_lose)
{
	struct kage_vm *clone;
	struct ring ring;
	unsigned lost = 0;
	struct bare b;
	int fd;

	need(ring_open(&ring), strerror(errno));
	fd = direct_file();
	need(fd >= 0, "no file system with O_DIRECT");
	engine_up();
	b = new_bare(CHURN_LEN, policies[_i]);
	for (unsigned round = 0; round < 20 && !lost; round++) {
		const struct iovec iov = {kage_kvm_window(b.kvm, IO_GPA, IO_PAGES * PAGE), IO_PAGES * PAGE};

		fixed_write(&b, 50);
		ok(ring_register(&ring, &iov, 1));
		ok(kage_vm_clone(b.vm, NULL, &clone));
		fixed_write(&b, 99);
		ring_read_all(&ring, fd, &iov, 1, 0);
		lost = io_wrong(&b, IO_GPA, 0) + io_clone_wrong(clone, 50);
		ring_unregister(&ring);
		ok(kage_vm_destroy(clone));
	}
	if (!lost)
		printf("skipped: %s: nothing was lost in 20 rounds\n", __func__);
	free_bare(&b);
	ring_close(&ring);
	close(fd);
	engine_down();
}
END_TEST

/* -- balloon -------------------------------------------------------------------------------------- */

#define BALLOON (16 * MIB)

/* Bytes of the pool's files that hold memory. */
static uint64_t pool_bytes(void)
{
	char name[64], target[64];
	uint64_t bytes = 0;
	struct stat st;

	for (int fd = 0; fd < 256; fd++) {
		ssize_t n;

		snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
		n = readlink(name, target, sizeof(target) - 1);
		if (n < 12)
			continue;
		target[n] = 0;
		if (!strncmp(target, "/memfd:kage", 11) && fstat(fd, &st) == 0)
			bytes += (uint64_t)st.st_blocks * 512;
	}
	return bytes;
}

static uint64_t anonymous_bytes(void)
{
	unsigned long size, resident, shared;
	FILE *f = fopen("/proc/self/statm", "r");

	is(fscanf(f, "%lu %lu %lu", &size, &resident, &shared), 3);
	fclose(f);
	return (resident - shared) * PAGE;
}

static void fill_words(const struct bare *b, uint64_t from, uint64_t to, uint64_t word)
{
	for (uint64_t at = from; at < to; at += PAGE)
		put(b, at, word ? word : at / PAGE + 1);
	ok(kage_vm_mark_dirty(b->vm, from, to - from));
}

static void all_read(const struct bare *b, uint64_t from, uint64_t to, uint64_t word)
{
	for (uint64_t gpa = from; gpa < to; gpa += PAGE) {
		same(read64(b->vm, gpa), word);
		same(get(b, gpa), word);
	}
}

static void steps(unsigned n)
{
	while (n-- > 0)
		ok(kage_engine_step(engine, NULL, NULL));
	audit();
}

START_TEST(discarded_memory_reaches_the_host)
{
	uint64_t before, mappings;
	struct bare b;

	engine_up();
	b = new_bare(BALLOON, policies[_i]);
	mappings = info_of(b.kvm).mappings;
	fill_words(&b, 0, BALLOON, 0);
	steps(2); /* the engine's reserve is there */
	before = pool_bytes();
	ck_assert_uint_ge(before, BALLOON);
	discard(b.vm, 4 * MIB, 8 * MIB);
	steps(2);
	ck_assert_uint_le(pool_bytes(), before - 8 * MIB + MIB / 2); /* tables may come */
	all_read(&b, 4 * MIB, 12 * MIB, 0);
	for (uint64_t i = 0; i < 512; i += 2)
		discard(b.vm, i * PAGE, PAGE);
	audit();
	for (uint64_t i = 0; i < 512; i++)
		same(get(&b, i * PAGE), i % 2 ? i + 1 : 0);
	fill_words(&b, 0, 12 * MIB, 5); /* the guest takes it back */
	is(kage_kvm_reconcile(b.kvm, KAGE_KVM_ADOPT), 0);
	steps(2);
	all_read(&b, 0, 12 * MIB, 5);
	ck_assert_uint_le(info_of(b.kvm).mappings, mappings + 8);
	discard(b.vm, 0, BALLOON);
	steps(2);
	ck_assert_uint_le(pool_bytes(), before - BALLOON + MIB);
	all_read(&b, 0, BALLOON, 0);
	free_bare(&b);
	engine_down();
}
END_TEST

START_TEST(discarded_shared_memory)
{
	struct bare a, b;
	uint64_t anon, pool;

	engine_up();
	a = new_bare(BALLOON, policies[_i]);
	fill_words(&a, 0, BALLOON, 7);
	fill_words(&a, 8 * MIB, BALLOON, 0);
	b = clone_bare(&a, policies[_i]);
	/* cloned */
	discard(b.vm, 8 * MIB, MIB);
	audit();
	all_read(&b, 8 * MIB, 9 * MIB, 0);
	same(get(&a, 8 * MIB), 8 * MIB / PAGE + 1);
	same(read64(a.vm, 9 * MIB - PAGE), 9 * MIB / PAGE);
	/* merged */
	merging(true);
	ck_assert_uint_gt(merge_all(), 0);
	is(class_of(a.vm, 0), KAGE_PAGE_MERGED);
	discard(a.vm, 0, MIB);
	audit();
	all_read(&a, 0, MIB, 0);
	all_read(&b, 0, MIB, 7);
	merging(false);
	/* private to the host, where the policy lets that be */
	fill_words(&b, 10 * MIB, 14 * MIB, 3);
	ck_assert_int_ge(kage_kvm_reconcile(b.kvm, 0), 0);
	anon = anonymous_bytes();
	pool = pool_bytes();
	discard(b.vm, 10 * MIB, 4 * MIB);
	steps(2);
	if (policies[_i] == KAGE_KVM_NATIVE)
		ck_assert_uint_le(anonymous_bytes(), anon - 3 * MIB);
	else
		ck_assert_uint_le(pool_bytes(), pool - 3 * MIB);
	same(info_of(b.kvm).host_private <= 4 * MIB / PAGE, 1);
	is(kage_kvm_reconcile(b.kvm, 0), 0);
	all_read(&b, 10 * MIB, 14 * MIB, 0);
	same(get(&a, 10 * MIB), 10 * MIB / PAGE + 1);
	fill_words(&b, 10 * MIB, 14 * MIB, 4);
	all_read(&b, 10 * MIB, 14 * MIB, 4);
	free_bare(&b);
	free_bare(&a);
	engine_down();
}
END_TEST

/* -- translation -------------------------------------------------------------------------------------- */

#define MAPPED	  (64 * MIB) /* payload_small.map */
#define LEAF(gva) (PAYLOAD_TABLES + PAGE + (gva) / (2 * MIB) * PAGE + (gva) / PAGE % 512 * 8)
#define GARBAGE                                                                                              \
	(56 * MIB) /* gvas from here on: first words of their leaf tables are what a payload wrote there */

static uint32_t phys_bits(const struct vmm *vmm)
{
#if defined(__x86_64__)
	for (unsigned i = 0; i < vmm->cpuid->nent; i++)
		if (vmm->cpuid->entries[i].function == 0x80000008)
			return vmm->cpuid->entries[i].eax & 0xff;
	return 36;
#else
	return 40; /* what the payload's TCR says */
#endif
}

static uint64_t some_gva(struct rng *r)
{
	switch (rng_below(r, 10)) {
	case 0:
		return rng_next(r); /* mostly not canonical */
	case 1:
		return rng_below(r, (uint64_t)1 << 47);
	case 2:
		return GARBAGE + rng_below(r, (MAPPED - GARBAGE) / (2 * MIB)) * 2 * MIB + rng_below(r, PAGE);
	default:
		return 8 * MIB + rng_below(r, MAPPED - 8 * MIB);
	}
}

/* KVM_TRANSLATE asks for no permission; the reference walker reads. */
#define ACCESS (HOST_ARCH == KAGE_ARCH_X86 ? 0 : KAGE_READ)

static void same_translation(struct vmm *vmm, struct kage_vcpu *vcpu, uint64_t gva, unsigned *mapped)
{
	struct kage_fault fault = {0};
	int r = kage_vcpu_translate(vcpu, gva, ACCESS, &fault);
	uint64_t gpa;
	bool valid = translated(vmm, gva, &gpa);

	ck_assert_msg((r == KAGE_OK || r == KAGE_MMIO) == valid, "gva %lx: %d, not %u %lx", gva, r, valid, gpa);
	if (!valid)
		return;
	ck_assert_msg(fault.gpa == gpa, "gva %lx: %lx, not %lx", gva, fault.gpa, gpa);
	(*mapped)++;
}

/* The guest writes to its own tables, which it shares with a clone. */
static void garble(struct vmm *vmm, uint64_t seed)
{
	struct payload_mailbox mb = {.program = PAYLOAD_TOUCH,
				     .base = LEAF(GARBAGE),
				     .mode = PAYLOAD_WRITE,
				     .seed = seed,
				     .pages = (MAPPED - GARBAGE) / (2 * MIB)};

	put_program(vmm, 0, mb);
	ok(payload_round(vmm, 0, TIMEOUT_MS));
}

START_TEST(translates_as_kvm_does)
{
	struct rng r = rng_seed(_i);
	struct kage_vcpu *vcpu;
	struct vmm *a, *b;
	unsigned mapped = 0;

	engine_up();
	a = new_vmm((struct vmm_wish){.policy = policies[_i]});
	ok(kage_vcpu_create(vm_of(a), KAGE_CFG(kage_vcpu_config, .phys_bits = phys_bits(a), .arch = HOST_ARCH), &vcpu));
	b = clone_vmm(a, true);
	garble(a, 1);
	for (unsigned i = 0; i < 1000; i++) {
		uint64_t gva = some_gva(&r);

		if (i % 100 == 0)
			garble(a, i + 2);
		if (i % 3 == 0 && gva < MAPPED && gva >= 8 * MIB)
			*(volatile uint64_t *)kage_kvm_window(kvm_of(a), LEAF(gva), 8) =
			    (rng_next(&r) & 0x3fffff000) |
			    (payload_entries.page - !rng_below(&r, 8)); /* without bit 0: not present */
		ok(kage_kvm_load_regs(vcpu, a->vcpu[0]->fd));
		same_translation(a, vcpu, gva, &mapped);
		if (i % 200 == 99)
			ck_assert_int_ge(kage_kvm_reconcile(kvm_of(a), i % 400 == 99 ? KAGE_KVM_ADOPT : 0),
					 0);
	}
	ck_assert_uint_gt(mapped, 300);
	ck_assert_uint_lt(mapped, 1000);
	audit();
	kage_vcpu_destroy(vcpu);
	ok(kage_vcpu_create(vm_of(b), KAGE_CFG(kage_vcpu_config, .phys_bits = phys_bits(b), .arch = HOST_ARCH), &vcpu));
	ok(kage_kvm_load_regs(vcpu, b->vcpu[0]->fd));
	for (uint64_t gva = 0; gva < MAPPED; gva += 257 * PAGE + 8) /* untouched */ {
		struct kage_fault fault;

		ok(kage_vcpu_translate(vcpu, gva, KAGE_READ, &fault));
		same(fault.gpa, gva);
		same_translation(b, vcpu, gva, &mapped);
	}
	kage_vcpu_destroy(vcpu);
	free_vmm(b);
	free_vmm(a);
	engine_down();
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("kvm access");

	skip_without_kvm();
	probe();
	add_policies(suite, threads_lose_nothing);
	add_policies(suite, direct_reads_into_pinned_memory);
	add_policies(suite, fixed_buffers_in_pinned_memory);
	add_policies(suite, fixed_buffers_that_are_not_pinned_lose);
	add_policies(suite, discarded_memory_reaches_the_host);
	add_policies(suite, discarded_shared_memory);
	add_policies(suite, translates_as_kvm_does);
	return run(suite);
}
