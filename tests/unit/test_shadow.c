/* SPDX-License-Identifier: MIT */
/*
 * The shadow tables under everything at once: a random guest against its own
 * page tables as the model, several vCPUs on threads while the engine changes
 * what they use, tables in foreign memory, windows that do not close. It looks
 * inside for one thing: to take membarrier(2) away.
 */
#include "guest_tables.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../backends/soft/vcpu.h"
#include "shadow/internal.h"

static struct guest g;
static uint64_t rng;

static uint64_t rnd(uint64_t n)
{
	rng = rng * 6364136223846793005ull + 1442695040888963407ull;
	return (rng >> 33) % n;
}

static void setup(void)
{
	rng = 1;
	guest_start(&g, 64 * MIB);
}

static void teardown(void)
{
	guest_stop(&g);
}

static void flush_cpu(struct kage_vcpu *cpu, uint32_t kind, uint64_t gva)
{
	ck_assert_int_eq(kage_vcpu_flush(cpu, KAGE_CFG(kage_flush, .kind = kind, .gva = gva)), KAGE_OK);
}

/* -- a random guest ---------------------------------------------------------- */

#define ROOTS	3
#define DATA	(32 * MIB)
#define NTABLES 40
#define WINDOW	0xffff800000000000ull /* where the guest maps its own tables, in the last root entry */

static uint64_t roots[ROOTS];

static uint64_t random_gva(void)
{
	uint64_t gva = rnd(2) << 39 | rnd(2) << 30 | rnd(3) << 21 | rnd(4) << 12;

	return gva | (rnd(4) ? 0 : 0xffffff0000000000);
}

static uint64_t random_flags(void)
{
	return (rnd(8) ? PTE_P : 0) | (rnd(4) ? PTE_W : 0) | (rnd(2) ? PTE_U : 0) | (rnd(6) ? 0 : PTE_NX) |
	       (rnd(2) ? PTE_A : 0) | (rnd(2) ? PTE_D : 0) | (rnd(3) ? 0 : PTE_KEY(rnd(3)));
}

/* An entry of some level: a page, a large page, or one of the tables, whatever level that has elsewhere. */
static uint64_t random_entry(unsigned level)
{
	if (level == 0)
		return (rnd(8) ? DATA + rnd(64) * 4096 : TABLES + rnd(NTABLES) * 4096) | random_flags();
	if (level < 3 && rnd(3) == 0)
		return (level == 1 ? DATA + rnd(2) * 2 * MIB : 0) | PTE_PS | random_flags();
	return (TABLES + (ROOTS + rnd(NTABLES - ROOTS)) * 4096) | random_flags() | PTE_P | PTE_U | PTE_W;
}

/* Follows present tables down from a root to a random level: where the entry for gva is. */
static uint64_t random_entry_at(uint64_t gva, unsigned *level)
{
	uint64_t table = roots[rnd(ROOTS)];
	unsigned want = rnd(4), l = 3;

	for (; l > want; l--) {
		uint64_t e = guest_r64(&g, table + (gva >> (12 + 9 * l) & 511) * 8), next = e & PTE_ADDR;

		if (!(e & PTE_P) || (e & PTE_PS) || next < TABLES || next >= TABLES + NTABLES * 4096)
			break;
		table = next;
	}
	*level = l;
	return table + (gva >> (12 + 9 * l) & 511) * 8;
}

static void store_entry(struct kage_vcpu *cpu, uint64_t at, uint64_t e)
{
	uint64_t gva = WINDOW + (at - TABLES);
	struct kage_fault f;
	void *p;

	switch (rnd(4)) {
	case 0:
		guest_w64(&g, at, e);
		return;
	case 1:
		kage_vcpu_enter(cpu);
		if (kage_vcpu_ptr(cpu, gva, 8, KAGE_WRITE, &p, &f) == KAGE_OK)
			__atomic_store_n((uint64_t *)p, e, __ATOMIC_SEQ_CST);
		kage_vcpu_leave(cpu);
		return;
	case 2: /* in two halves, as 32-bit code does */
		(void)kage_vcpu_store(cpu, gva, &e, 4, &f);
		(void)kage_vcpu_store(cpu, gva + 4, (char *)&e + 4, 4, &f);
		return;
	default:
		(void)kage_vcpu_store(cpu, gva, &e, 8, &f);
	}
}

static void change_tables(struct kage_vcpu *cpu)
{
	uint64_t gva = random_gva(), at;
	unsigned level;

	at = random_entry_at(gva, &level);
	if (level == 3 && (at & 0xfff) == 256 * 8)
		return; /* the window stays */
	store_entry(cpu, at, random_entry(level));
	if (level == 0 && rnd(2))
		flush_cpu(cpu, KAGE_FLUSH_PAGE, gva);
	else
		flush_cpu(cpu, rnd(2) ? KAGE_FLUSH_ALL : KAGE_FLUSH_ASID, 0);
}

static void switch_mode(void)
{
	g.regs.cr3 = roots[rnd(ROOTS)];
	g.regs.cpl = rnd(3) ? 0 : 3;
	g.regs.cr0 = rnd(4) ? 0x80010001 : 0x80000001;
	g.regs.cr4 = 0x20 | rnd(2) << 20 | rnd(2) << 21 | rnd(2) << 22;
	g.regs.rflags = rnd(2) << 18;
	g.regs.pkru = (uint32_t)rnd(64);
	ck_assert_int_eq(guest_set_regs(&g), KAGE_OK);
}

static unsigned outcomes[8];

/* What the walk of the tables says is what the access does. */
static void check_access(struct kage_vcpu *cpu)
{
	uint64_t gva = random_gva() + 8 * rnd(512), v = rnd(1u << 30), old = 0;
	unsigned kind = rnd(3);
	struct kage_fault want = {0}, got = {0};
	int expect = kage_vcpu_translate(cpu, gva, 1u << kind, &want), r;

	if (expect == KAGE_OK)
		expect = kage_vm_read(g.vm, want.gpa, &old, 8); /* no memory there: KAGE_MMIO */
	r = kind == 0	? kage_vcpu_load(cpu, gva, &v, 8, &got)
	    : kind == 1 ? kage_vcpu_store(cpu, gva, &v, 8, &got)
			: kage_vcpu_fetch(cpu, gva, &v, 8, &got);
	outcomes[r & 7]++;
	ck_assert_msg(r == expect, "gva %#lx kind %u: %d, expected %d", (unsigned long)gva, kind, r, expect);
	if (r == KAGE_GUEST_FAULT) {
		ck_assert_uint_eq(got.error, want.error);
		ck_assert_uint_eq(got.level, want.level);
	} else if (r == KAGE_MMIO) {
		ck_assert_uint_eq(got.gpa, want.gpa);
	} else if (want.gpa >= DATA) { /* not a table: accessed bits are at work there */
		if (kind == 1)
			ck_assert_uint_eq(guest_r64(&g, want.gpa), v);
		else
			ck_assert_uint_eq(v, old);
	}
	if (kind == 1 && r == KAGE_OK && want.gpa < DATA)
		flush_cpu(cpu, KAGE_FLUSH_ALL, 0);
}

static void engine_event(void)
{
	struct kage_vm *clone;
	uint64_t gpa = DATA + rnd(64) * 4096;

	switch (rnd(5)) {
	case 0:
		ck_assert_int_eq(kage_vm_advise(g.vm, gpa, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
		break;
	case 1:
		ck_assert_int_eq(kage_vm_clone(g.vm, NULL, &clone), KAGE_OK);
		if (rnd(2))
			guest_w64(&g, gpa, 1);
		ck_assert_int_eq(kage_vm_destroy(clone), KAGE_OK);
		break;
	case 2:
		guest_w64(&g, gpa + 8 * rnd(512), rnd(1000));
		break;
	case 3:
		ck_assert_int_eq(kage_vm_protect(g.vm, gpa, 4096, KAGE_READ | KAGE_EXEC), KAGE_OK);
		ck_assert_int_eq(kage_vm_protect(g.vm, gpa, 4096, KAGE_RWX), KAGE_OK);
		break;
	default:
		ck_assert_int_eq(kage_engine_step(g.engine, NULL, NULL), KAGE_OK);
	}
}

static void random_guest(struct kage_vcpu *cpu, unsigned steps)
{
	static const char zero[4096];
	struct kage_stats s = {.size = sizeof(s)};
	uint64_t pd, pt;

	g.levels = 4;
	for (unsigned i = 0; i < NTABLES; i++)
		ck_assert_int_eq(kage_vm_write(g.vm, TABLES + i * 4096, zero, 4096), KAGE_OK);
	for (unsigned i = 0; i < ROOTS; i++)
		roots[i] = TABLES + i * 4096;
	/* the window's own tables lie behind the others */
	pd = TABLES + NTABLES * 4096;
	pt = pd + 8192;
	for (unsigned i = 0; i < ROOTS; i++)
		guest_w64(&g, roots[i] + 256 * 8, pd | 7);
	guest_w64(&g, pd, (pd + 4096) | 7);
	guest_w64(&g, pd + 4096, pt | 7);
	for (unsigned i = 0; i < NTABLES; i++)
		guest_w64(&g, pt + i * 8, (TABLES + i * 4096) | 3);
	g.regs = (struct kage_x86_regs){.efer = 0xd00};
	memset(outcomes, 0, sizeof(outcomes));
	switch_mode();
	for (unsigned i = 0; i < steps; i++) {
		uint64_t what = rnd(100);

		if (what < 12)
			change_tables(cpu);
		else if (what < 16)
			switch_mode();
		else if (what < 18)
			engine_event();
		else
			check_access(cpu);
		if (i % 1000 == 999)
			guest_audit(&g);
	}
	/* it was no walk in an empty park */
	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &s), KAGE_OK);
	ck_assert_uint_gt(outcomes[KAGE_OK], steps / 20);
	ck_assert_uint_gt(outcomes[KAGE_GUEST_FAULT], steps / 20);
	ck_assert_uint_gt(s.table_writes, steps / 50);
	ck_assert_uint_gt(s.shadow_dropped, steps / 20);
}

START_TEST(test_random_guest)
{
	rng = (uint64_t)_i * 7919 + 3;
	random_guest(g.cpu, 12000);
}
END_TEST

static void ignore_code(void *opaque, struct kage_vcpu *cpu, uint64_t gpa, uint64_t len)
{
	(void)cpu;
	ck_assert_uint_eq(len, 4096);
	ck_assert_uint_eq(gpa & 4095, 0);
	(*(unsigned *)opaque)++;
}

START_TEST(test_random_guest_with_code)
{
	unsigned calls = 0;

	kage_vcpu_destroy(g.cpu);
	ck_assert_int_eq(kage_vcpu_create(g.vm,
					  KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .features = 0x7f,
						   .code_written = ignore_code, .opaque = &calls),
					  &g.cpu),
			 KAGE_OK);
	rng = 77 + (uint64_t)_i;
	random_guest(g.cpu, 8000);
	ck_assert_uint_gt(calls, 0);
}
END_TEST

/* -- threads ------------------------------------------------------------------ */

#define CPUS	3
#define PRIVATE 64
#define BASE	0x400000ull
#define SHARED	(BASE + CPUS * PRIVATE * 4096)
#define ROUNDS	6000

static atomic_bool stop;
static atomic_uint failures;

struct worker {
	pthread_t thread;
	struct kage_vcpu *cpu;
	unsigned n;
	uint64_t added;
};

/* Private pages hold what this thread wrote last; a shared word is only added to. */
static void *work(void *arg)
{
	struct worker *w = arg;
	uint64_t seen[PRIVATE] = {0}, x = w->n + 1, mine = BASE + w->n * PRIVATE * 4096ull, *p;

	for (unsigned i = 0; i < ROUNDS; i++) {
		unsigned page;
		uint64_t v = 0;

		x = x * 6364136223846793005ull + 1;
		page = (x >> 40) % PRIVATE;
		if (kage_vcpu_load(w->cpu, mine + page * 4096, &v, 8, NULL) || v != seen[page])
			failures++;
		seen[page] = x;
		if (kage_vcpu_store(w->cpu, mine + page * 4096, &x, 8, NULL))
			failures++;
		if (i % 16)
			continue;
		kage_vcpu_enter(w->cpu);
		for (unsigned k = 0; k < 50 && !kage_vcpu_wanted(w->cpu); k++) {
			if (kage_vcpu_ptr(w->cpu, SHARED, 8, KAGE_READ | KAGE_WRITE, (void **)&p, NULL))
				failures++;
			else
				__atomic_fetch_add(p, 1, __ATOMIC_RELAXED), w->added++;
		}
		kage_vcpu_leave(w->cpu);
	}
	kage_vcpu_leave(w->cpu);
	return NULL;
}

/* Things that must not show. */
static void disturb(unsigned i)
{
	uint64_t bits[64 * MIB / 4096 / 64];
	struct kage_dirty *log;
	struct kage_vm *clone;

	switch (i % 5) {
	case 0:
		if (kage_vm_clone(g.vm, NULL, &clone) || kage_vm_destroy(clone))
			failures++;
		break;
	case 1:
		if (kage_dirty_open(g.vm, KAGE_CFG(kage_dirty_config, .flags = i & 8 ? KAGE_DIRTY_FINE : 0),
				    &log) ||
		    kage_dirty_collect(log, 0, 64 * MIB, bits, sizeof(bits)) < 0)
			failures++;
		kage_dirty_close(log);
		break;
	case 2:
		if (kage_vm_advise(g.vm, 60 * MIB, 4096, KAGE_ADVICE_DISCARD))
			failures++;
		break;
	case 3:
		if (kage_vm_protect(g.vm, DATA, MIB, KAGE_RWX))
			failures++;
		break;
	default:
		if (kage_engine_step(g.engine, NULL, NULL))
			failures++;
	}
}

static void make_workers(struct worker *w)
{
	for (unsigned i = 0; i < CPUS; i++) {
		w[i] = (struct worker){.n = i, .cpu = i ? guest_cpu(&g) : g.cpu};
		ck_assert_int_eq(kage_vcpu_set_regs(w[i].cpu, &g.regs, sizeof(g.regs)), KAGE_OK);
	}
}

static void start_workers(struct worker *w, void *(*fn)(void *))
{
	for (unsigned i = 0; i < CPUS; i++)
		ck_assert_int_eq(pthread_create(&w[i].thread, NULL, fn, &w[i]), 0);
}

static void join_workers(struct worker *w)
{
	for (unsigned i = 0; i < CPUS; i++)
		pthread_join(w[i].thread, NULL);
	guest_audit(&g);
	for (unsigned i = 1; i < CPUS; i++)
		kage_vcpu_destroy(w[i].cpu);
}

static void *disturb_loop(void *arg)
{
	for (unsigned i = 0; !stop; i++) {
		disturb(i);
		usleep(200);
	}
	return arg;
}

/* A host without membarrier(2): inline probes never hit, windows use real fences. */
static void take_membarrier_away(struct worker *w)
{
	atomic_load(&g.vm->shadow)->membarrier = false;
	for (unsigned i = 0; i < CPUS; i++) {
		kage_vcpu_leave(w[i].cpu);
		w[i].cpu->fast = false;
	}
}

static void run_threads(bool paging, bool membarrier)
{
	struct worker w[CPUS];
	pthread_t other;
	uint64_t sum = 0, v;

	stop = false;
	failures = 0;
	if (paging) {
		uint64_t root = guest_long_mode(&g, 4);

		for (unsigned i = 0; i <= CPUS * PRIVATE; i++)
			guest_map(&g, root, BASE + i * 4096, DATA + i * 4096, PTE_W, 0);
	}
	make_workers(w);
	if (!membarrier)
		take_membarrier_away(w);
	start_workers(w, work);
	ck_assert_int_eq(pthread_create(&other, NULL, disturb_loop, NULL), 0);
	for (unsigned i = 0; i < CPUS; i++)
		pthread_join(w[i].thread, NULL);
	stop = true;
	pthread_join(other, NULL);
	guest_audit(&g);
	for (unsigned i = 0; i < CPUS; i++)
		sum += w[i].added;
	v = guest_r64(&g, paging ? DATA + CPUS * PRIVATE * 4096 : SHARED);
	ck_assert_uint_eq(v, sum);
	ck_assert_uint_eq(failures, 0);
	for (unsigned i = 1; i < CPUS; i++)
		kage_vcpu_destroy(w[i].cpu);
}

START_TEST(test_threads_paging_off)
{
	run_threads(false, true);
}
END_TEST

START_TEST(test_threads_paging)
{
	run_threads(true, true);
}
END_TEST

START_TEST(test_threads_without_membarrier)
{
	run_threads(true, false);
}
END_TEST

/* -- a guest's own shootdown ---------------------------------------------------- */

#define FLIPS 400
static atomic_uint epoch, acked[CPUS];
static uint64_t flip_pte;

/*
 * vCPU 0 moves a page between two frames; each other one that has been told and
 * has executed INVLPG must see the new frame, whichever path the PTE write took.
 */
static void *flip_reader(struct worker *w)
{
	unsigned last = 0;

	while (last < FLIPS) {
		unsigned now = epoch;
		uint64_t v = 0;

		if (kage_vcpu_load(w->cpu, BASE, &v, 8, NULL))
			failures++;
		if (now == last)
			continue;
		flush_cpu(w->cpu, KAGE_FLUSH_PAGE, BASE);
		if (kage_vcpu_load(w->cpu, BASE, &v, 8, NULL) || v != (now & 1))
			failures++;
		last = now;
		acked[w->n] = now;
	}
	kage_vcpu_leave(w->cpu);
	return NULL;
}

static void *flip_writer(struct worker *w)
{
	for (unsigned i = 1; i <= FLIPS; i++) {
		uint64_t e = (DATA + (i & 1) * 4096) | PTE_P | PTE_W | PTE_A;
		void *p;

		if (i % 3 == 0) {
			kage_vcpu_enter(w->cpu);
			if (kage_vcpu_ptr(w->cpu, flip_pte, 8, KAGE_WRITE, &p, NULL))
				failures++;
			else
				__atomic_store_n((uint64_t *)p, e, __ATOMIC_SEQ_CST);
			kage_vcpu_leave(w->cpu);
		} else if (kage_vcpu_store(w->cpu, flip_pte, &e, 8, NULL)) {
			failures++;
		}
		flush_cpu(w->cpu, i % 7 ? KAGE_FLUSH_PAGE : KAGE_FLUSH_ALL, BASE);
		epoch = i;
		for (unsigned c = 1; c < CPUS; c++)
			while (acked[c] != i)
				usleep(1);
	}
	kage_vcpu_leave(w->cpu);
	return NULL;
}

static void *flip(void *arg)
{
	struct worker *w = arg;

	return w->n ? flip_reader(w) : flip_writer(w);
}

START_TEST(test_guest_shootdown)
{
	uint64_t root = guest_long_mode(&g, 4), at;
	struct worker w[CPUS];

	epoch = failures = 0;
	for (unsigned i = 0; i < CPUS; i++)
		acked[i] = 0;
	at = guest_map(&g, root, BASE, DATA, PTE_W, 0);
	guest_map(&g, root, 0x80000000, at & ~0xfffull, PTE_W, 0);
	flip_pte = 0x80000000 + (at & 0xfff);
	guest_w64(&g, DATA, 0);
	guest_w64(&g, DATA + 4096, 1);
	make_workers(w);
	start_workers(w, flip);
	join_workers(w);
	ck_assert_uint_eq(failures, 0);
}
END_TEST

/* -- windows -------------------------------------------------------------------- */

static atomic_uint phase;

static void *stay_inside(void *arg)
{
	uint64_t v;

	kage_vcpu_enter(arg);
	if (kage_vcpu_load(arg, DATA, &v, 8, NULL))
		failures++;
	phase = 1;
	while (phase != 2)
		usleep(100);
	kage_vcpu_leave(arg);
	return NULL;
}

static void *leave_when_wanted(void *arg)
{
	uint64_t v;

	while (!stop) {
		kage_vcpu_enter(arg);
		while (!kage_vcpu_wanted(arg) && !stop)
			if (kage_vcpu_load(arg, DATA, &v, 8, NULL))
				failures++;
		phase = 1;
		kage_vcpu_leave(arg);
	}
	return NULL;
}

START_TEST(test_window_that_stays_open)
{
	pthread_t t;

	phase = failures = 0;
	cpu_store(g.cpu, DATA, 1);
	kage_vcpu_leave(g.cpu);
	ck_assert_int_eq(pthread_create(&t, NULL, stay_inside, g.cpu), 0);
	while (phase != 1)
		usleep(100);
	/* elsewhere nothing has to wait */
	ck_assert_int_eq(kage_vm_advise(g.vm, DATA + 2 * MIB, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
	ck_assert_int_eq(kage_vm_advise(g.vm, DATA, 4096, KAGE_ADVICE_DISCARD), -ETIMEDOUT);
	ck_assert_uint_eq(guest_r64(&g, DATA), 1);
	phase = 2;
	pthread_join(t, NULL);
	ck_assert_int_eq(kage_vm_advise(g.vm, DATA, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
	ck_assert_uint_eq(cpu_load(g.cpu, DATA), 0);
	ck_assert_uint_eq(failures, 0);
}
END_TEST

START_TEST(test_window_is_left_when_wanted)
{
	struct kage_stats s = {.size = sizeof(s)};
	pthread_t t;

	failures = 0;
	stop = false;
	cpu_store(g.cpu, DATA, 1);
	ck_assert_int_eq(pthread_create(&t, NULL, leave_when_wanted, g.cpu), 0);
	for (unsigned i = 0; i < 300; i++)
		ck_assert_int_eq(kage_vm_advise(g.vm, DATA, 4096, KAGE_ADVICE_DISCARD), KAGE_OK);
	stop = true;
	pthread_join(t, NULL);
	ck_assert_uint_eq(failures, 0);
	ck_assert_int_eq(kage_stats_get(g.engine, g.vm, &s), KAGE_OK);
	ck_assert_uint_gt(s.shootdowns, 0);
	ck_assert_uint_eq(s.retries_spurious, 0);
}
END_TEST

/* -- foreign memory ---------------------------------------------------------------- */

START_TEST(test_tables_in_foreign_memory)
{
	int fd = memfd_create("tables", MFD_CLOEXEC);
	uint64_t *t, base = 0x10000000;

	ck_assert_int_eq(ftruncate(fd, 16 * 4096), 0);
	t = mmap(NULL, 16 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ck_assert_ptr_ne(t, MAP_FAILED);
	ck_assert_int_eq(
	    kage_vm_map(g.vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_FOREIGN, .flags = KAGE_REGION_FD,
				       .gpa = base, .len = 16 * 4096, .fd = fd)),
	    KAGE_OK);
	g.levels = 4;
	for (unsigned i = 0; i < 3; i++)
		t[i * 512] = (base + (i + 1) * 4096) | 7;
	t[3 * 512] = DATA | 7;
	g.regs = (struct kage_x86_regs){.cr0 = 0x80010001, .cr3 = base, .cr4 = 0x20, .efer = 0xd00};
	ck_assert_int_eq(guest_set_regs(&g), KAGE_OK);
	guest_w64(&g, DATA + 4096, 5);
	cpu_store(g.cpu, 0, 4);
	ck_assert_uint_eq(t[3 * 512] & (PTE_A | PTE_D), PTE_A | PTE_D);
	/* the other side moves the page, and then the leaf table */
	t[3 * 512] = (DATA + 4096) | 7;
	flush_cpu(g.cpu, KAGE_FLUSH_PAGE, 0);
	ck_assert_uint_eq(cpu_load(g.cpu, 0), 5);
	t[4 * 512] = DATA | 7;
	t[2 * 512] = (base + 4 * 4096) | 7;
	flush_cpu(g.cpu, KAGE_FLUSH_PAGE, 0);
	ck_assert_uint_eq(cpu_load(g.cpu, 0), 4);
	t[0] = 0;
	flush_cpu(g.cpu, KAGE_FLUSH_ALL, 0);
	cpu_faults(g.cpu, 0, KIND_LOAD, 0);
	munmap(t, 16 * 4096);
	close(fd);
}
END_TEST

/* -- allocations that fail ------------------------------------------------------------ */

static int allowed; /* allocations before one fails; < 0: none does */

static void *short_alloc(void *opaque, size_t bytes)
{
	void *p;

	(void)opaque;
	if (allowed == 0)
		return NULL;
	allowed -= allowed > 0;
	p = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
	if (p)
		memset(p, 0, bytes);
	return p;
}

static void short_free(void *opaque, void *p, size_t bytes)
{
	(void)opaque;
	(void)bytes;
	free(p);
}

/* Makes a vCPU and stores through it with `n` allocations; false if that was not enough. */
static bool starved(int n)
{
	uint64_t v = 42;
	int r;

	allowed = n;
	r = kage_vcpu_create(g.vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &g.cpu);
	if (r) {
		ck_assert_int_eq(r, -ENOMEM);
		return false;
	}
	r = kage_vcpu_set_regs(g.cpu, &g.regs, sizeof(g.regs));
	ck_assert_int_eq(r, KAGE_OK);
	r = kage_vcpu_store(g.cpu, BASE, &v, 8, NULL);
	allowed = -1;
	if (r)
		ck_assert_int_eq(r, -ENOMEM);
	guest_audit(&g);
	/* what failed once works when there is memory */
	cpu_store(g.cpu, BASE, 43);
	ck_assert_uint_eq(guest_r64(&g, DATA), 43);
	kage_vcpu_destroy(g.cpu);
	return r == KAGE_OK;
}

START_TEST(test_allocations_fail)
{
	struct kage_alloc alloc = {.alloc = short_alloc, .free = short_free};
	int n = 0;
	bool done;

	do { /* the shadow stays with its guest: a new guest for each number */
		allowed = -1;
		memset(&g, 0, sizeof(g));
		ck_assert_int_eq(
		    kage_engine_create(
			KAGE_CFG(kage_engine_config, .address_space = 64 * GIB, .alloc = alloc), &g.engine),
		    KAGE_OK);
		ck_assert_int_eq(kage_vm_create(g.engine, NULL, &g.vm), KAGE_OK);
		ck_assert_int_eq(kage_vm_map(g.vm, KAGE_CFG(kage_region, .len = 64 * MIB)), KAGE_OK);
		g.next_table = TABLES;
		g.levels = 4;
		g.regs = (struct kage_x86_regs){
		    .cr0 = 0x80010001, .cr3 = guest_table(&g), .cr4 = 0x20, .efer = 0xd00};
		guest_map(&g, g.regs.cr3, BASE, DATA, PTE_W, 0);
		done = starved(n++);
		allowed = -1;
		ck_assert_int_eq(kage_vm_destroy(g.vm), KAGE_OK);
		ck_assert_int_eq(kage_engine_destroy(g.engine), KAGE_OK);
	} while (!done);
	ck_assert_int_gt(n, 5);
}
END_TEST

static Suite *suite(void)
{
	Suite *s = suite_create("shadow");
	TCase *t = tcase_create("shadow"), *bare = tcase_create("starved");

	tcase_set_timeout(bare, 240);
	tcase_add_test(bare, test_allocations_fail);
	suite_add_tcase(s, bare);
	tcase_set_timeout(t, 240);
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_loop_test(t, test_random_guest, 0, 6);
	tcase_add_loop_test(t, test_random_guest_with_code, 0, 2);
	tcase_add_test(t, test_threads_paging_off);
	tcase_add_test(t, test_threads_paging);
	tcase_add_test(t, test_threads_without_membarrier);
	tcase_add_test(t, test_guest_shootdown);
	tcase_add_test(t, test_window_that_stays_open);
	tcase_add_test(t, test_window_is_left_when_wanted);
	tcase_add_test(t, test_tables_in_foreign_memory);
	suite_add_tcase(s, t);
	return s;
}

int main(void)
{
	SRunner *r = srunner_create(suite());
	int failed;

	srunner_set_fork_status(r, CK_NOFORK);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed != 0;
}
