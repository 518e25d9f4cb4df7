/* SPDX-License-Identifier: MIT */
/*
 * Slots, dirty log and dirty rings against a real KVM VM, and what the backend reads from a vCPU.
 *
 * The guest is a page of machine code: it writes where it is told and reports (x86_slots.h,
 * arm64_slots.h). Its tables map the first GiB to itself, accessed
 * and dirty bits set beforehand: it writes nothing but what is asked for.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <check.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kvm/arch.h"
#include "kvm/ring.h"
#include "kvm/slots.h"
#include "pt/pt.h"

#include "short.h"

/* -- the guest ------------------------------------------------------------------- */

/*
 * What an architecture's header has: payload_list writes to `n` addresses that lie at `at`, `value` to the first,
 * one more to each; payload_storm writes random ones of the `mask` + 1 pages from `first` on, until
 * there is a word at `at` that is not 0. Both report, which ends KVM_RUN (vm_reported()).
 */
extern const char payload_list[], payload_list_end[];
extern const char payload_storm[], payload_storm_end[];

struct args {
	uint64_t at, n, value, first, mask, seed;
};

#define LOW_PAGES  256 /* tables, code and the list of addresses */
#define AT_TABLES  0x1000
#define AT_CODE	   0x10000
#define AT_STOP	   0x18000
#define AT_LIST	   0x20000
#define LIST_MAX   ((LOW_PAGES * 4096 - AT_LIST) / 8)
#define DATA	   0x1000 /* gfn */
#define DATA_PAGES 8192

struct vm {
	int kvm, fd, cpu;
	struct kvm_run *run;
	size_t run_bytes;
	char *low, *data;
	struct env env;
	struct slots slots;
	struct rings rings;
	unsigned ring_bytes;  /* 0: the bitmap */
	pthread_mutex_t lock; /* of slots and rings */
	char *replica;
	uint64_t marks;
	unsigned ring_full;
};

static int kvm_fd; /* /dev/kvm */

/* -- a KVM on a host with larger pages ------------------------------------------------------ */

/*
 * It counts in pages of `unit` times 4 KiB: in bitmaps, and in the offsets of rings. Here that is made of what this
 * KVM says, between it and the backend; `unit` 1: nothing is.
 */
static unsigned unit = 1;

#define FAKE_SLOTS 16
#define FAKE_WORDS (DATA_PAGES / 64)

static uint64_t fake_pages[FAKE_SLOTS]; /* of each slot */
static struct kvm_dirty_gfn *fake_ring;
static uint64_t *fake_offset; /* what KVM wrote, + 1; 0: the entry is as KVM wrote it */
static unsigned fake_entries;

static int fake_get(int fd, struct kvm_dirty_log *log)
{
	uint64_t all[FAKE_WORDS] = {0}, units = fake_pages[log->slot] / unit, *to = log->dirty_bitmap;
	struct kvm_dirty_log real = {.slot = log->slot, .dirty_bitmap = all};
	int r = (int)syscall(SYS_ioctl, fd, KVM_GET_DIRTY_LOG, &real);

	if (r)
		return r;
	memset(to, 0, (units + 63) / 64 * 8);
	for (uint64_t i = 0; i < fake_pages[log->slot]; i++)
		if (all[i / 64] >> i % 64 & 1)
			to[i / unit / 64] |= 1ull << i / unit % 64;
	return 0;
}

static int fake_clear(int fd, const struct kvm_clear_dirty_log *log)
{
	uint64_t all[FAKE_WORDS] = {0}, end = log->first_page + (uint64_t)log->num_pages;
	struct kvm_clear_dirty_log real = {.slot = log->slot, .first_page = log->first_page * unit,
					   .num_pages = log->num_pages * unit, .dirty_bitmap = all};
	const uint64_t *from = log->dirty_bitmap;

	if (log->first_page % 64 || end > fake_pages[log->slot] / unit ||
	    (log->num_pages % 64 && end != fake_pages[log->slot] / unit)) {
		errno = EINVAL; /* as KVM */
		return -1;
	}
	for (uint64_t i = 0; i < real.num_pages; i++)
		if (from[i / unit / 64] >> i / unit % 64 & 1)
			all[i / 64] |= 1ull << i % 64;
	return (int)syscall(SYS_ioctl, fd, KVM_CLEAR_DIRTY_LOG, &real);
}

/* What is dirty in the ring is named in larger pages, until it goes back. */
static void fake_ring_fold(void)
{
	for (unsigned i = 0; i < fake_entries; i++)
		if (fake_ring[i].flags == KVM_DIRTY_GFN_F_DIRTY && !fake_offset[i]) {
			fake_offset[i] = fake_ring[i].offset + 1;
			fake_ring[i].offset /= unit;
		}
}

static void fake_ring_unfold(void)
{
	for (unsigned i = 0; i < fake_entries; i++)
		if (fake_offset[i]) {
			fake_ring[i].offset = fake_offset[i] - 1;
			fake_offset[i] = 0;
		}
}

/* A second view of a vCPU's ring, which the test changes. */
static void fake_ring_view(int cpu, unsigned bytes)
{
	fake_entries = bytes / sizeof(*fake_ring);
	fake_ring = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, cpu, KVM_DIRTY_LOG_PAGE_OFFSET * 4096);
	ck_assert_ptr_ne(fake_ring, MAP_FAILED);
	fake_offset = calloc(fake_entries, sizeof(*fake_offset));
	ck_assert_ptr_nonnull(fake_offset);
}

static void fake_ring_end(void)
{
	if (fake_entries)
		munmap(fake_ring, fake_entries * sizeof(*fake_ring));
	free(fake_offset);
	fake_offset = NULL;
	fake_entries = 0;
}

/* This one stands before libc's at link time. */
int ioctl(int fd, unsigned long request, ...)
{
	const struct kvm_userspace_memory_region *slot;
	va_list args;
	void *arg;
	int r;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	if (unit > 1 && request == KVM_GET_DIRTY_LOG && arg)
		return fake_get(fd, arg);
	if (unit > 1 && request == KVM_CLEAR_DIRTY_LOG)
		return fake_clear(fd, arg);
	if (unit > 1 && request == KVM_RESET_DIRTY_RINGS)
		fake_ring_unfold();
	r = (int)syscall(SYS_ioctl, fd, request, arg);
	slot = arg;
	if (unit > 1 && request == KVM_SET_USER_MEMORY_REGION && r == 0)
		fake_pages[slot->slot] = slot->memory_size >> 12;
	if (unit > 1 && request == KVM_RESET_DIRTY_RINGS)
		fake_ring_fold();
	return r;
}

#if defined(__x86_64__)
#include "x86_slots.h"
#else
#include "arm64_slots.h"
#endif

static void vm_enable(struct vm *vm, unsigned cap, uint64_t arg)
{
	struct kvm_enable_cap c = {.cap = cap, .args = {arg}};

	ck_assert_int_eq(ioctl(vm->fd, KVM_ENABLE_CAP, &c), 0);
}

static char *pages(uint64_t n)
{
	char *p = mmap(NULL, n * 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	ck_assert_ptr_ne(p, MAP_FAILED);
	return p;
}

/* arm64 has only the kind of rings that need their accesses ordered. */
static unsigned ring_cap(void)
{
	return ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING) > 0 ? KVM_CAP_DIRTY_LOG_RING :
										KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
}

/* A VM without slots; `manual`: argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. */
static void vm_create(struct vm *vm, unsigned manual, unsigned ring_bytes)
{
	memset(vm, 0, sizeof(*vm));
	vm->kvm = kvm_fd;
	vm->ring_bytes = ring_bytes;
	pthread_mutex_init(&vm->lock, NULL);
	env_init(&vm->env, NULL);
	vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0);
	ck_assert_int_ge(vm->fd, 0);
	if (manual)
		vm_enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, manual);
	if (ring_bytes)
		vm_enable(vm, ring_cap(), ring_bytes);
	vm->cpu = ioctl(vm->fd, KVM_CREATE_VCPU, 0);
	ck_assert_int_ge(vm->cpu, 0);
	vm->run_bytes = (size_t)ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	vm->run = mmap(NULL, vm->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vm->cpu, 0);
	ck_assert_ptr_ne(vm->run, MAP_FAILED);
	vm->low = pages(LOW_PAGES);
	vm->data = pages(DATA_PAGES);
	vm_tables(vm);
	vm_cpu(vm);
	ck_assert_int_eq(rings_init(&vm->rings, &vm->env, vm->fd), 0);
	if (ring_bytes)
		ck_assert_int_eq(ring_add(&vm->rings, vm->cpu, ring_bytes), 0);
	if (ring_bytes && unit > 1)
		fake_ring_view(vm->cpu, ring_bytes);
}

/* The same with slots ready, and the one at 0 there. */
static void vm_start(struct vm *vm, unsigned manual, unsigned ring_bytes)
{
	struct slots_config c = {.readonly = true, .bitmap = !ring_bytes, .unit = unit};

	vm_create(vm, manual, ring_bytes);
	ck_assert_int_eq(slots_init(&vm->slots, &vm->env, vm->fd, &c), 0);
	ck_assert_int_eq(slots_add(&vm->slots, GFN(0), LOW_PAGES, vm->low, false), 0);
}

static void vm_stop(struct vm *vm)
{
	fake_ring_end();
	slots_finish(&vm->slots);
	rings_finish(&vm->rings);
	munmap(vm->run, vm->run_bytes);
	close(vm->cpu);
	close(vm->fd);
	munmap(vm->low, LOW_PAGES * 4096);
	munmap(vm->data, DATA_PAGES * 4096ul);
	env_finish(&vm->env);
	pthread_mutex_destroy(&vm->lock);
}

static char *data_hva(struct vm *vm, uint64_t gfn)
{
	return vm->data + (gfn - DATA) * 4096;
}

static int vm_add(struct vm *vm, uint64_t gfn, uint64_t npages)
{
	return slots_add(&vm->slots, GFN(gfn), npages, data_hva(vm, gfn), false);
}

/* Runs until something other than a signal comes back. */
static unsigned vm_run(struct vm *vm)
{
	int r;

	do
		r = ioctl(vm->cpu, KVM_RUN, 0);
	while (r < 0 && errno == EINTR);
	ck_assert_msg(r == 0, "KVM_RUN: %s", strerror(errno));
	return vm->run->exit_reason;
}

static void count_mark(void *arg, gfn_t gfn, uint64_t npages)
{
	struct vm *vm = arg;

	vm->marks += npages;
}

static int vm_harvest(struct vm *vm, gfn_t start, gfn_t end, slots_mark_fn *mark, void *arg)
{
	if (vm->ring_bytes && unit > 1)
		fake_ring_fold();
	if (vm->ring_bytes)
		return rings_harvest(&vm->rings, &vm->slots, mark, arg);
	return slots_dirty(&vm->slots, start, end, mark, arg);
}

#define EVERYWHERE GFN(0), GFN(UINT64_MAX)

/* Writes to the addresses of the list, in order; `full` is called when a ring is full. */
static void vm_write(struct vm *vm, const uint64_t *gpa, unsigned n, uint64_t value, slots_mark_fn *full,
		     void *arg)
{
	unsigned exit;

	ck_assert_uint_le(n, LIST_MAX);
	if (!n)
		return;
	memcpy(vm->low + AT_LIST, gpa, n * sizeof(*gpa));
	vm_load(vm, payload_list, payload_list_end,
		(struct args){.at = AT_LIST, .n = n, .value = value});
	while ((exit = vm_run(vm)) == KVM_EXIT_DIRTY_RING_FULL) {
		vm->ring_full++;
		ck_assert_int_eq(vm_harvest(vm, EVERYWHERE, full, arg), 0);
	}
	ck_assert_msg(vm_reported(vm, exit), "exit %u, address %#llx if it is MMIO", exit,
		      vm->run->mmio.phys_addr);
}

static uint64_t *vm_word(struct vm *vm, uint64_t gpa)
{
	return (uint64_t *)(data_hva(vm, gpa >> 12) + (gpa & 4095));
}

/* What this kernel has not is left out, and said. */
static bool left_out(bool there, const char *what)
{
	if (!there)
		printf("skipped: this KVM has no %s\n", what);
	return !there;
}

static bool no_manual(unsigned mode)
{
	int r = ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);

	return left_out(!mode || (r > 0 && ((unsigned)r & mode) == mode), "manual dirty log protection");
}

static bool no_rings(void)
{
	return left_out(ioctl(kvm_fd, KVM_CHECK_EXTENSION, ring_cap()) >= 65536, "dirty ring");
}

/* -- adding and removing ----------------------------------------------------------- */

START_TEST(descriptors_are_checked)
{
	struct slots_config c = {0};
	struct slots s;
	struct vm vm;
	int other = open("/dev/null", O_RDONLY);

	vm_create(&vm, 0, 0);
	ck_assert_int_eq(slots_init(&s, &vm.env, vm.kvm, &c), -EINVAL);
	ck_assert_int_eq(slots_init(&s, &vm.env, vm.cpu, &c), -EINVAL);
	ck_assert_int_eq(slots_init(&s, &vm.env, other, &c), -EINVAL);
	ck_assert_int_eq(slots_init(&s, &vm.env, -1, &c), -EINVAL);
	ck_assert_int_eq(slots_init(&s, &vm.env, vm.fd, &c), 0);
	slots_finish(&s);
	ck_assert_int_eq(ring_add(&vm.rings, vm.cpu, 65536), -EINVAL); /* rings are not enabled */
	ck_assert_int_eq(arch_guest_ok(vm.fd), 0);
	ck_assert_int_eq(arch_guest_ok(vm.kvm), -EINVAL);
	ck_assert_int_eq(arch_guest_ok(vm.cpu), -EINVAL);
	ck_assert_int_eq(arch_guest_ok(other), -EINVAL);
	close(other);
	vm_stop(&vm);
}
END_TEST

START_TEST(rings_are_checked)
{
	struct vm vm;

	if (no_rings())
		return;
	vm_start(&vm, 0, 65536);
	ck_assert_int_eq(ring_add(&vm.rings, vm.cpu, 5000), -EINVAL);
	ck_assert_int_eq(ring_add(&vm.rings, vm.cpu, 2048), -EINVAL);
	ck_assert_int_eq(ring_add(&vm.rings, vm.cpu, 32768), -EINVAL);	/* the ring is larger */
	ck_assert_int_eq(ring_add(&vm.rings, vm.cpu, 131072), -EINVAL); /* it is smaller */
	ck_assert_int_eq(ring_add(&vm.rings, vm.fd, 65536), -EINVAL);
	ck_assert_int_eq(ring_add(&vm.rings, -1, 65536), -EBADF);
	ck_assert(vm.rings.list.next->next == &vm.rings.list);
	vm_stop(&vm);
}
END_TEST

START_TEST(ids_run_out)
{
	struct slots_config c = {.first = 7, .count = 3};
	struct vm vm;
	uint32_t have;

	vm_create(&vm, 0, 0);
	have = (uint32_t)ioctl(vm.fd, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS);
	ck_assert_int_eq(slots_init(&vm.slots, &vm.env, vm.fd, &c), 0);
	ck_assert_int_eq(slots_reserve(&vm.slots, 4, 1), -ENOSPC);
	for (unsigned i = 0; i < 3; i++)
		ck_assert_int_eq(vm_add(&vm, DATA + 10 * i, 10), 0);
	ck_assert_int_eq(vm_add(&vm, DATA + 30, 10), -ENOSPC);
	ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA + 10), 10), 0);
	ck_assert_int_eq(vm_add(&vm, DATA + 30, 10), 0);
	ck_assert_int_eq(vm_add(&vm, DATA + 10, 10), -ENOSPC);
	ck_assert_uint_eq(vm.slots.used, 3);
	slots_finish(&vm.slots);

	c = (struct slots_config){.first = have - 2};
	ck_assert_int_eq(slots_init(&vm.slots, &vm.env, vm.fd, &c), 0);
	ck_assert_int_eq(vm_add(&vm, DATA, 10), 0); /* finish gave the addresses back */
	ck_assert_int_eq(vm_add(&vm, DATA + 10, 10), 0);
	ck_assert_int_eq(vm_add(&vm, DATA + 20, 10), -ENOSPC);
	slots_finish(&vm.slots);

	c = (struct slots_config){.first = have};
	ck_assert_int_eq(slots_init(&vm.slots, &vm.env, vm.fd, &c), -EINVAL);
	c = (struct slots_config){.first = 1, .count = have};
	ck_assert_int_eq(slots_init(&vm.slots, &vm.env, vm.fd, &c), -EINVAL);
	c = (struct slots_config){.first = 1, .count = UINT32_MAX};
	ck_assert_int_eq(slots_init(&vm.slots, &vm.env, vm.fd, &c), -EINVAL);
	vm_stop(&vm);
}
END_TEST

START_TEST(refusals)
{
	struct slots_config c = {.readonly = false};
	struct kvm_userspace_memory_region theirs = {
	    .slot = 9999, .guest_phys_addr = 0x40000000, .memory_size = 4096};
	struct slots s;
	struct vm vm;
	gfn_t gfn;

	vm_start(&vm, 0, 0);
	ck_assert_int_eq(vm_add(&vm, DATA, 100), 0);
	ck_assert_int_eq(vm_add(&vm, DATA + 99, 2), -EEXIST);
	ck_assert_int_eq(vm_add(&vm, DATA - 1, 2), -EEXIST);
	ck_assert_int_eq(vm_add(&vm, DATA + 5, 1), -EEXIST);
	ck_assert_int_eq(vm_add(&vm, DATA + 100, 0), -EINVAL);
	ck_assert_int_eq(vm_add(&vm, DATA + 100, (uint64_t)1 << 31), -EINVAL);
	ck_assert_int_eq(slots_add(&vm.slots, GFN(DATA + 100), 1, vm.data + 1, false),
			 -EINVAL); /* KVM's word */
	theirs.userspace_addr = (uintptr_t)vm.data;
	ck_assert_int_eq(ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION, &theirs), 0);
	ck_assert_int_eq(slots_add(&vm.slots, GFN(0x40000), 1, vm.data, false), -EEXIST);
	ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA), 99), -ENOENT);
	ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA + 1), 99), -ENOENT);
	ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA + 200), 1), -ENOENT);
	ck_assert_uint_eq(vm.slots.used, 2);
	ck_assert(slots_gfn(&vm.slots, 0x10001, 99, &gfn) && gfn.v == DATA + 99);
	ck_assert(!slots_gfn(&vm.slots, 1, 100, &gfn));
	ck_assert(!slots_gfn(&vm.slots, 2, 0, &gfn));
	ck_assert(!slots_gfn(&vm.slots, 9999, 0, &gfn));
	ck_assert_int_eq(slots_init(&s, &vm.env, vm.fd, &c), 0);
	ck_assert_int_eq(slots_add(&s, GFN(0x50000), 1, vm.data, true), -EOPNOTSUPP);
	slots_finish(&s);
	vm_stop(&vm);
}
END_TEST

/* Many slots come and go in any order; what the guest reaches is always what is there. */
START_TEST(slots_split_and_move)
{
	enum { PIECE = 8, PIECES = DATA_PAGES / PIECE };
	static uint8_t there[PIECES];
	struct rng rng = rng_seed(42);
	uint64_t value = 1;
	struct vm vm;

	memset(there, 0, sizeof(there));
	vm_start(&vm, 0, 0);
	for (unsigned step = 0; step < times(3000, 300); step++) {
		unsigned i = (unsigned)rng_below(&rng, PIECES);
		uint64_t gfn = DATA + i * PIECE, gpa = (gfn + step % PIECE) << 12;

		if (there[i])
			ck_assert_int_eq(slots_remove(&vm.slots, GFN(gfn), PIECE), 0);
		else
			ck_assert_int_eq(vm_add(&vm, gfn, PIECE), 0);
		there[i] ^= 1;
		if (step % 10 == 0 && there[i]) {
			vm_write(&vm, &gpa, 1, ++value, NULL, NULL);
			ck_assert_uint_eq(*vm_word(&vm, gpa), value);
		}
	}
	for (unsigned i = 0; i < PIECES; i++)
		if (there[i])
			ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA + i * PIECE), PIECE), 0);
	/* one slot becomes three, the middle one with other memory behind it */
	ck_assert_int_eq(vm_add(&vm, DATA, 90), 0);
	ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA), 90), 0);
	ck_assert_int_eq(slots_add(&vm.slots, GFN(DATA + 60), 30, data_hva(&vm, DATA + 60), false), 0);
	ck_assert_int_eq(slots_add(&vm.slots, GFN(DATA), 30, data_hva(&vm, DATA), false), 0);
	ck_assert_int_eq(slots_add(&vm.slots, GFN(DATA + 30), 30, data_hva(&vm, DATA + 1000), false), 0);
	vm_write(&vm,
		 (uint64_t[]){DATA << 12, (DATA + 29) << 12, (DATA + 30) << 12, (DATA + 59) << 12,
			      (DATA + 89) << 12},
		 5, 1000, NULL, NULL);
	ck_assert_uint_eq(*vm_word(&vm, DATA << 12), 1000);
	ck_assert_uint_eq(*vm_word(&vm, (DATA + 29) << 12), 1001);
	ck_assert_uint_eq(*vm_word(&vm, (DATA + 1000) << 12), 1002);
	ck_assert_uint_eq(*vm_word(&vm, (DATA + 1029) << 12), 1003);
	ck_assert_uint_eq(*vm_word(&vm, (DATA + 89) << 12), 1004);
	ck_assert_uint_ne(*vm_word(&vm, (DATA + 30) << 12), 1002);
	ck_assert_uint_eq(vm.slots.used, 4);
	vm_stop(&vm);
}
END_TEST

START_TEST(readonly_slots_exit)
{
	uint64_t gpa = (DATA + 3) << 12;
	struct vm vm;

	vm_start(&vm, 0, 0);
	ck_assert_int_eq(slots_add(&vm.slots, GFN(DATA), 10, vm.data, true), 0);
	*vm_word(&vm, gpa) = 77;
	memcpy(vm.low + AT_LIST, &gpa, 8);
	vm_load(&vm, payload_list, payload_list_end,
		(struct args){.at = AT_LIST, .n = 1, .value = 1234});
	ck_assert_uint_eq(vm_run(&vm), KVM_EXIT_MMIO);
	ck_assert_uint_eq(vm.run->mmio.phys_addr, gpa);
	ck_assert_uint_eq(vm.run->mmio.is_write, 1);
	ck_assert_uint_eq(vm.run->mmio.len, 8);
	ck_assert_mem_eq(vm.run->mmio.data, &(uint64_t){1234}, 8);
	ck_assert(vm_reported(&vm, vm_run(&vm)));
	ck_assert_uint_eq(*vm_word(&vm, gpa), 77);
	/* the list itself is read through a read-only slot */
	memcpy(vm.data, &(uint64_t){AT_STOP}, 8);
	vm_load(&vm, payload_list, payload_list_end,
		(struct args){.at = DATA << 12, .n = 1, .value = 9});
	ck_assert(vm_reported(&vm, vm_run(&vm)));
	ck_assert_uint_eq(*(uint64_t *)(vm.low + AT_STOP), 9);
	/* logging leaves it alone */
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	ck_assert_int_eq(slots_dirty(&vm.slots, GFN(DATA), GFN(DATA + 10), count_mark, &vm), 0);
	ck_assert_uint_eq(vm.marks, 0);
	ck_assert_int_eq(slots_log(&vm.slots, false), 0);
	vm_stop(&vm);
}
END_TEST

/* -- the VMM's callback, and failures ---------------------------------------------------- */

struct vmm {
	int fd;
	int fail_in; /* the call that is refused, and all until `heal_in` more; -1: none */
	int fail_for;
	unsigned calls;
	struct kage_kvm_slot last;
};

static int vmm_set_slot(void *opaque, const struct kage_kvm_slot *k)
{
	struct vmm *vmm = opaque;
	struct kvm_userspace_memory_region r = {.slot = k->slot,
						.flags = k->flags,
						.guest_phys_addr = k->gpa,
						.memory_size = k->len,
						.userspace_addr = k->hva};

	vmm->calls++;
	vmm->last = *k;
	if (vmm->fail_in >= 0 && vmm->fail_in-- == 0) {
		if (--vmm->fail_for > 0)
			vmm->fail_in = 0;
		return -EPERM;
	}
	return ioctl(vmm->fd, KVM_SET_USER_MEMORY_REGION, &r) ? -errno : 0;
}

static bool all_logged(const struct slots *s, bool on)
{
	for (uint32_t i = 0; i < s->used; i++)
		if (!!(s->slot[s->order[i]].flags & KVM_MEM_LOG_DIRTY_PAGES) != on)
			return false;
	return true;
}

START_TEST(the_vmm_sets_slots)
{
	struct vmm vmm = {.fail_in = -1};
	struct slots_config c = {
	    .first = 5, .count = 100, .bitmap = true, .set_slot = vmm_set_slot, .opaque = &vmm};
	struct vm vm;

	vm_create(&vm, 0, 0);
	vmm.fd = vm.fd;
	ck_assert_int_eq(slots_init(&vm.slots, &vm.env, vm.fd, &c), 0);
	ck_assert_int_eq(slots_add(&vm.slots, GFN(0), LOW_PAGES, vm.low, false), 0);
	for (unsigned i = 0; i < 9; i++)
		ck_assert_int_eq(vm_add(&vm, DATA + 10 * i, 10), 0);
	ck_assert_uint_eq(vmm.calls, 10);
	ck_assert_uint_eq(vmm.last.slot, 14);
	ck_assert_uint_eq(vmm.last.gpa, (DATA + 80) << 12);
	ck_assert_uint_eq(vmm.last.len, 40960);
	ck_assert_uint_eq(vmm.last.hva, (uintptr_t)data_hva(&vm, DATA + 80));
	ck_assert_uint_eq(vmm.last.flags, 0);

	/* each call refused in its turn: logging goes on whole, or not at all */
	for (int at = 0; at < 10; at++) {
		vmm.fail_in = at;
		ck_assert_int_eq(slots_log(&vm.slots, true), -EPERM);
		ck_assert(!vm.slots.logging && all_logged(&vm.slots, false));
	}
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	ck_assert(vm.slots.logging && all_logged(&vm.slots, true));
	ck_assert_uint_eq(vmm.last.flags, KVM_MEM_LOG_DIRTY_PAGES);
	for (int at = 0; at < 10; at++) {
		vmm.fail_in = at;
		ck_assert_int_eq(slots_log(&vm.slots, false), -EPERM);
		ck_assert(vm.slots.logging && all_logged(&vm.slots, true));
	}
	/* refused twice, on the way back too: the next call puts it right */
	vmm.fail_in = 4;
	vmm.fail_for = 2;
	ck_assert_int_eq(slots_log(&vm.slots, false), -EPERM);
	ck_assert(vm.slots.logging && !all_logged(&vm.slots, true));
	ck_assert_int_eq(slots_dirty(&vm.slots, EVERYWHERE, count_mark, &vm), -ENOENT);
	ck_assert_uint_eq(vm.marks, 10); /* all of the slot that has no log */
	vmm.fail_for = 0;
	ck_assert_int_eq(slots_log(&vm.slots, false), 0);
	ck_assert(all_logged(&vm.slots, false));

	vmm.fail_in = 0;
	ck_assert_int_eq(vm_add(&vm, DATA + 90, 10), -EPERM);
	ck_assert_uint_eq(vm.slots.used, 10);
	vmm.fail_in = 0;
	ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA), 10), -EPERM);
	ck_assert_uint_eq(vm.slots.used, 10);
	ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA), 10), 0);
	ck_assert_uint_eq(vmm.last.slot, 6);
	ck_assert_uint_eq(vmm.last.len, 0);
	slots_finish(&vm.slots);
	vm_stop(&vm);
}
END_TEST

static bool no_memory;

static void *test_alloc(void *opaque, size_t bytes)
{
	void *p = NULL;

	if (no_memory || posix_memalign(&p, 64, bytes))
		return NULL;
	return memset(p, 0, bytes);
}

static void test_free(void *opaque, void *p, size_t bytes)
{
	free(p);
}

START_TEST(memory_runs_out)
{
	struct vm vm;

	vm_start(&vm, 0, 0);
	slots_finish(&vm.slots);
	rings_finish(&vm.rings);
	vm.env.alloc = (struct kage_alloc){.alloc = test_alloc, .free = test_free};
	ck_assert_int_eq(slots_init(&vm.slots, &vm.env, vm.fd, &(struct slots_config){.bitmap = true}), 0);
	no_memory = true;
	ck_assert_int_eq(rings_init(&vm.rings, &vm.env, vm.fd), -ENOMEM);
	ck_assert_int_eq(vm_add(&vm, DATA, 1), -ENOMEM);
	ck_assert_int_eq(slots_reserve(&vm.slots, 200, 1), -ENOMEM);
	no_memory = false;
	ck_assert_int_eq(slots_reserve(&vm.slots, 200, 1), 0);
	no_memory = true;
	for (unsigned i = 0; i < 100; i++)
		ck_assert_int_eq(vm_add(&vm, DATA + 2 * i, 1), 0);
	ck_assert_int_eq(slots_log(&vm.slots, true), -ENOMEM);
	ck_assert(!vm.slots.logging && all_logged(&vm.slots, false));
	no_memory = false;
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	no_memory = true;
	ck_assert_int_eq(vm_add(&vm, DATA + 1000, 1000), -ENOMEM); /* its bitmap */
	no_memory = false;
	ck_assert_int_eq(slots_reserve(&vm.slots, 100, 1000), 0);
	no_memory = true;
	for (unsigned i = 100; i < 199; i++)
		ck_assert_int_eq(vm_add(&vm, DATA + 2 * i, 1), 0);
	ck_assert_int_eq(vm_add(&vm, DATA + 1000, 1000), 0);
	ck_assert_int_eq(slots_dirty(&vm.slots, EVERYWHERE, count_mark, &vm), 0);
	no_memory = false;
	vm_stop(&vm);
}
END_TEST

/* -- exactness ----------------------------------------------------------------------------- */

/* Sizes around the words of a bitmap; between two slots lies a hole of their index. */
static const uint64_t small_areas[] = {1, 63, 64, 65, 100, 127, 128, 1, 2000, 513, 64};
static const uint64_t large_areas[] = {1, 3, 64, 65, 2, 127, 128, 1, 5, 33, 4}; /* in units */
#define AREAS	   ARRAY_SIZE(small_areas)
static uint64_t area_pages[AREAS];

struct oracle {
	struct vm *vm;
	gfn_t gfn[AREAS];
	uint8_t written[DATA_PAGES], seen[DATA_PAGES];
	uint64_t runs, last_end;
	bool twice; /* a ring may tell of a page twice */
};

static void oracle_mark(void *arg, gfn_t gfn, uint64_t npages)
{
	struct oracle *o = arg;

	ck_assert_uint_gt(npages, 0);
	if (gfn.v <
	    DATA) /* code and list: a page that KVM maps writable counts as written, also when it was read */
		return;
	ck_assert_uint_le(gfn.v + npages, DATA + DATA_PAGES);
	if (!o->twice) /* ascending, and neighbours are one run */
		ck_assert_uint_gt(gfn.v, o->last_end);
	o->last_end = gfn.v + npages;
	o->runs++;
	for (uint64_t i = gfn.v - DATA; i < gfn.v - DATA + npages; i++) {
		ck_assert(o->twice || !o->seen[i]);
		o->seen[i] = 1;
	}
}

static void oracle_areas(struct oracle *o)
{
	uint64_t gfn = DATA;

	for (unsigned i = 0; i < AREAS; i++) {
		area_pages[i] = unit == 1 ? small_areas[i] : unit * large_areas[i];
		o->gfn[i] = GFN(gfn);
		ck_assert_int_eq(vm_add(o->vm, gfn, area_pages[i]), 0);
		gfn += area_pages[i] + (i + 1) * unit;
	}
}

/* Random writes: single pages, runs, and one page again and again. */
static void oracle_write(struct oracle *o, struct rng *rng)
{
	static uint64_t list[LIST_MAX];
	unsigned n = 0, want = (unsigned)rng_below(rng, 300);

	while (n < want) {
		unsigned a = (unsigned)rng_below(rng, AREAS);
		uint64_t at = rng_below(rng, area_pages[a]);
		uint64_t len = rng_chance(rng, 75) ? 1 : 1 + rng_below(rng, 200);

		len = MIN(len, area_pages[a] - at);

		for (uint64_t i = 0; i < len; i++) {
			uint64_t gfn = o->gfn[a].v + at + i;

			list[n++] = gfn << 12 | rng_below(rng, 512) << 3;
			memset(&o->written[(gfn - DATA) / unit * unit], 1, unit);
		}
	}
	vm_write(o->vm, list, n, rng_next(rng), oracle_mark, o);
}

/* Harvests [start, end) and compares: slots that overlap, all of their pages, and no others. */
static void oracle_compare(struct oracle *o, gfn_t start, gfn_t end)
{
	o->last_end = 0;
	o->runs = 0;
	ck_assert_int_eq(vm_harvest(o->vm, start, end, oracle_mark, o), 0);
	for (unsigned a = 0; a < AREAS; a++) {
		bool in = o->twice || (o->gfn[a].v < end.v && o->gfn[a].v + area_pages[a] > start.v);

		for (uint64_t i = o->gfn[a].v - DATA; i < o->gfn[a].v - DATA + area_pages[a]; i++) {
			ck_assert_msg(o->seen[i] == (in ? o->written[i] : 0),
				      "page %u of area %u: written %u, seen %u",
				      (unsigned)(i - (o->gfn[a].v - DATA)), a, o->written[i], o->seen[i]);
			if (in)
				o->written[i] = 0;
		}
	}
	memset(o->seen, 0, sizeof(o->seen));
}

static void exact_rounds(unsigned manual, unsigned ring_bytes, unsigned rounds)
{
	struct oracle *o = calloc(1, sizeof(*o));
	struct rng rng = rng_seed(1 + manual + ring_bytes);
	struct vm vm;

	vm_start(&vm, manual, ring_bytes);
	o->vm = &vm;
	o->twice = ring_bytes != 0;
	oracle_areas(o);
	oracle_write(o, &rng); /* before the log is on: not in it */
	memset(o->written, 0, sizeof(o->written));
	ck_assert_int_eq(vm_harvest(&vm, EVERYWHERE, oracle_mark, o), 0);
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	oracle_compare(o, EVERYWHERE);
	for (unsigned round = 0; round < rounds; round++) {
		gfn_t start = GFN(DATA + rng_below(&rng, 3000)),
		      end = GFN(start.v + 1 + rng_below(&rng, 500));

		oracle_write(o, &rng);
		if (round % 3)
			oracle_compare(o, start, end);
		else
			oracle_compare(o, EVERYWHERE);
	}
	oracle_compare(o, EVERYWHERE);
	/* off: nothing is logged; on again: only what came since */
	ck_assert_int_eq(slots_log(&vm.slots, false), 0);
	oracle_write(o, &rng);
	memset(o->written, 0, sizeof(o->written));
	oracle_compare(o, EVERYWHERE);
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	oracle_compare(o, EVERYWHERE);
	oracle_write(o, &rng);
	oracle_compare(o, EVERYWHERE);
	vm_stop(&vm);
	free(o);
}

static const unsigned manual_modes[] = {0, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
					KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET};

START_TEST(the_log_is_exact)
{
	unsigned mode = manual_modes[_i];

	if (!no_manual(mode))
		exact_rounds(mode, 0, times(150, 15));
}
END_TEST

static const unsigned ring_sizes[] = {4096, 65536};

struct some_left {
	struct dirty_left left;
	uint64_t mask, asked; /* of the first words of the slot: which pages; bits of words that were asked for */
};

static uint64_t some_word(const struct dirty_left *left, gfn_t gfn)
{
	struct some_left *l = container_of(left, struct some_left, left);

	if (gfn.v < DATA)
		return 0; /* code and list */
	ck_assert_uint_eq((gfn.v - DATA) % 64, 0);
	l->asked |= (uint64_t)1 << (gfn.v - DATA) / 64;
	return gfn.v == DATA + 64 ? l->mask : 0;
}

static void compare_seen(struct oracle *o, const uint8_t *expected)
{
	for (unsigned i = 0; i < DATA_PAGES; i++)
		ck_assert_msg(o->seen[i] == expected[i], "page %u: %s", i, expected[i] ? "lost" : "invented");
	memset(o->seen, 0, sizeof(o->seen));
}

/*
 * Pages that are left in the log are in each harvest, written or not, where the VMM has made GET leave them there; the
 * others as always. A harvest that leaves nothing finds them, once.
 */
START_TEST(pages_are_left_in_the_log)
{
	static const uint64_t list[] = {(uint64_t)DATA << 12, (uint64_t)(DATA + 63) << 12, (uint64_t)(DATA + 64) << 12,
					(uint64_t)(DATA + 70) << 12, (uint64_t)(DATA + 200) << 12};
	struct some_left l = {.left.word = some_word, .mask = (uint64_t)1 << 6 | 2}; /* 70, and 65, which nobody writes */
	struct oracle *o = calloc(1, sizeof(*o));
	uint8_t expected[DATA_PAGES] = {0};
	unsigned mode = manual_modes[_i];
	struct vm vm;

	if (no_manual(mode))
		return;
	vm_start(&vm, mode, 0);
	o->vm = &vm;
	o->twice = true;
	ck_assert_int_eq(vm_add(&vm, DATA, DATA_PAGES), 0);
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	for (unsigned round = 0; round < 3; round++) {
		for (unsigned i = 0; i < ARRAY_SIZE(list); i++)
			expected[(list[i] >> 12) - DATA] = 1;
		vm_write(&vm, list, ARRAY_SIZE(list), round + 1, NULL, NULL);
		ck_assert_int_eq(slots_dirty_but(&vm.slots, EVERYWHERE, &l.left, oracle_mark, o), 0);
		compare_seen(o, expected);
		ck_assert_uint_eq(l.asked, 1 | 2 | 8);
		memset(expected, 0, sizeof(expected));
		expected[70] = mode != 0;
		for (unsigned i = 0; i < 2; i++) {
			ck_assert_int_eq(slots_dirty_but(&vm.slots, EVERYWHERE, &l.left, oracle_mark, o), 0);
			compare_seen(o, expected);
		}
		if (round == 1) { /* 70 is written again, which faults nobody, and then taken */
			vm_write(&vm, &list[3], 1, 99, NULL, NULL);
			expected[70] = 1;
			ck_assert_int_eq(slots_dirty(&vm.slots, EVERYWHERE, oracle_mark, o), 0);
			compare_seen(o, expected);
			expected[70] = 0;
			ck_assert_int_eq(slots_dirty_but(&vm.slots, EVERYWHERE, &l.left, oracle_mark, o), 0);
			compare_seen(o, expected);
		}
	}
	vm_stop(&vm);
	free(o);
}
END_TEST

START_TEST(rings_are_exact)
{
	if (!no_rings())
		exact_rounds(0, ring_sizes[_i], times(150, 15));
}
END_TEST

static const unsigned units[] = {4, 16};

/* KVM counts in pages of 16 and 64 KiB: each that is written marks its 4, its 16 guest pages, and nothing else. */
START_TEST(the_log_is_exact_by_larger_pages)
{
	unsigned mode = manual_modes[_i % 3];
	struct vm vm;

	unit = units[_i / 3];
	if (!no_manual(mode))
		exact_rounds(mode, 0, times(60, 6));
	vm_start(&vm, 0, 0);
	ck_assert_int_eq(vm_add(&vm, DATA, unit + 1), -EINVAL);
	ck_assert_int_eq(vm_add(&vm, DATA + 1, unit), -EINVAL);
	ck_assert_int_eq(vm_add(&vm, DATA + unit, unit), 0);
	vm_stop(&vm);
	unit = 1;
}
END_TEST

START_TEST(rings_are_exact_by_larger_pages)
{
	unit = units[_i];
	if (!no_rings())
		exact_rounds(0, 65536, times(60, 6));
	unit = 1;
}
END_TEST

/* More runs than one batch holds, all in one harvest. */
START_TEST(rings_are_emptied)
{
	struct oracle *o = calloc(1, sizeof(*o));
	static uint64_t list[DATA_PAGES];
	struct vm vm;

	if (no_rings())
		return;
	vm_start(&vm, 0, 1 << 20);
	o->vm = &vm;
	o->twice = true;
	ck_assert_int_eq(vm_add(&vm, DATA, DATA_PAGES), 0);
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	for (unsigned i = 0; i < DATA_PAGES; i++)
		list[i] = (uint64_t)(DATA + i * 3001 % DATA_PAGES) << 12;
	for (unsigned round = 0; round < 3; round++) {
		vm_write(&vm, list, DATA_PAGES, 1, NULL, NULL);
		ck_assert_int_eq(rings_harvest(&vm.rings, &vm.slots, oracle_mark, o), 0);
		for (unsigned i = 0; i < DATA_PAGES; i++)
			ck_assert(o->seen[i]);
		memset(o->seen, 0, sizeof(o->seen));
	}
	ck_assert_uint_eq(vm.ring_full, 0);
	/* entries of a slot that has gone are dropped, and the ring goes on */
	vm_write(&vm, list, 100, 1, NULL, NULL);
	ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA), DATA_PAGES), 0);
	ck_assert_int_eq(rings_harvest(&vm.rings, &vm.slots, oracle_mark, o), 0);
	for (unsigned i = 0; i < DATA_PAGES; i++)
		ck_assert(!o->seen[i]);
	ck_assert_int_eq(vm_add(&vm, DATA, 100), 0);
	vm_write(&vm, (uint64_t[]){DATA << 12}, 1, 1, NULL, NULL);
	ck_assert_int_eq(rings_harvest(&vm.rings, &vm.slots, oracle_mark, o), 0);
	ck_assert(o->seen[0] && !o->seen[1]);
	vm_stop(&vm);
	free(o);
}
END_TEST

START_TEST(runs_cross_words)
{
	static uint64_t list[1000];
	struct oracle *o = calloc(1, sizeof(*o));
	struct vm vm;

	vm_start(&vm, 0, 0);
	o->vm = &vm;
	ck_assert_int_eq(vm_add(&vm, DATA, 1000), 0);
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	for (unsigned first = 0; first < 130; first += 13)
		for (unsigned len = 1; first + len <= 1000; len += len < 130 ? 7 : 290) {
			for (unsigned i = 0; i < len; i++)
				list[i] = (uint64_t)(DATA + first + i) << 12;
			vm_write(&vm, list, len, 1, NULL, NULL);
			o->runs = o->last_end = 0;
			ck_assert_int_eq(
			    slots_dirty(&vm.slots, GFN(DATA + 999), GFN(DATA + 1000), oracle_mark, o), 0);
			ck_assert_uint_eq(o->runs, 1);
			ck_assert_uint_eq(o->last_end, DATA + first + len);
			ck_assert(o->seen[first] && o->seen[first + len - 1]);
			memset(o->seen, 0, sizeof(o->seen));
		}
	/* a range beside the slot takes nothing */
	vm_write(&vm, list, 5, 1, NULL, NULL);
	ck_assert_int_eq(slots_dirty(&vm.slots, GFN(DATA + 1000), GFN(DATA + 2000), oracle_mark, o), 0);
	ck_assert_int_eq(slots_dirty(&vm.slots, GFN(DATA - 10), GFN(DATA), oracle_mark, o), 0);
	ck_assert_int_eq(slots_dirty(&vm.slots, GFN(DATA + 10), GFN(DATA + 10), count_mark, &vm), 0);
	ck_assert_uint_eq(vm.marks, 5);
	vm_stop(&vm);
	free(o);
}
END_TEST

START_TEST(without_a_log_everything_is_dirty)
{
	struct slots_config c = {.first = 1, .bitmap = true};
	struct slots s;
	struct vm vm;

	/* rings that the caller does not know of: no bitmaps */
	if (no_rings())
		return;
	vm_start(&vm, 0, 65536);
	ck_assert_int_eq(slots_init(&s, &vm.env, vm.fd, &c), 0);
	ck_assert_int_eq(slots_add(&s, GFN(DATA), 10, vm.data, false), 0);
	ck_assert_int_eq(slots_log(&s, true), -ENXIO);
	ck_assert(!s.logging && all_logged(&s, false));
	slots_finish(&s);

	c.bitmap = false;
	c.readonly = true;
	ck_assert_int_eq(slots_init(&s, &vm.env, vm.fd, &c), 0);
	ck_assert_int_eq(slots_add(&s, GFN(DATA), 10, vm.data, false), 0);
	ck_assert_int_eq(slots_add(&s, GFN(DATA + 10), 100, vm.data, true), 0);
	ck_assert_int_eq(slots_add(&s, GFN(DATA + 110), 1000, vm.data, false), 0);
	ck_assert_int_eq(slots_dirty(&s, EVERYWHERE, count_mark, &vm), 0);
	ck_assert_uint_eq(vm.marks, 0);
	ck_assert_int_eq(slots_log(&s, true), 0);
	ck_assert_int_eq(slots_dirty(&s, GFN(DATA + 9), GFN(DATA + 20), count_mark, &vm), 0);
	ck_assert_uint_eq(vm.marks, 10);
	ck_assert_int_eq(slots_dirty(&s, EVERYWHERE, count_mark, &vm), 0);
	ck_assert_uint_eq(vm.marks, 1020);
	slots_finish(&s);
	vm_stop(&vm);
}
END_TEST

START_TEST(slots_added_later_are_logged)
{
	uint64_t gpa = (DATA + 5) << 12;
	struct oracle *o = calloc(1, sizeof(*o));
	struct vm vm;

	vm_start(&vm, 0, 0);
	o->vm = &vm;
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	ck_assert_int_eq(vm_add(&vm, DATA, 5000), 0); /* a larger bitmap than before */
	vm_write(&vm, &gpa, 1, 1, NULL, NULL);
	ck_assert_int_eq(slots_dirty(&vm.slots, EVERYWHERE, oracle_mark, o), 0);
	ck_assert_uint_eq(o->runs, 1);
	ck_assert(o->seen[5]);
	vm_write(&vm, &gpa, 1, 1, NULL, NULL);
	ck_assert_int_eq(slots_remove(&vm.slots, GFN(DATA), 5000), 0); /* its log goes with it */
	/* Not the pages below: the CPU writes to its tables there. */
	ck_assert_int_eq(slots_dirty(&vm.slots, GFN(DATA), GFN(UINT64_MAX), count_mark, &vm), 0);
	ck_assert_uint_eq(vm.marks, 0);
	vm_stop(&vm);
	free(o);
}
END_TEST

/* -- a guest that goes on writing -------------------------------------------------------------- */

#define STORM_PAGES (uint64_t)times(4096, 2048)

static void replica_mark(void *arg, gfn_t gfn, uint64_t npages)
{
	struct vm *vm = arg;

	if (gfn.v < DATA)
		return;
	vm->marks += npages;
	memcpy(vm->replica + (gfn.v - DATA) * 4096, data_hva(vm, gfn.v), npages * 4096);
}

/* What a migration does: pages that the log names are copied, again and again. */
static void replicate(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	ck_assert_int_eq(vm_harvest(vm, EVERYWHERE, replica_mark, vm), 0);
	pthread_mutex_unlock(&vm->lock);
}

static void *storm_thread(void *arg)
{
	struct vm *vm = arg;
	unsigned exit;

	while ((exit = vm_run(vm)) == KVM_EXIT_DIRTY_RING_FULL) {
		pthread_mutex_lock(&vm->lock);
		vm->ring_full++;
		pthread_mutex_unlock(&vm->lock);
		replicate(vm);
	}
	ck_assert(vm_reported(vm, exit));
	return NULL;
}

static void storm_start(struct vm *vm, pthread_t *thread)
{
	vm->replica = pages(STORM_PAGES);
	memcpy(vm->replica, vm->data, STORM_PAGES * 4096);
	vm_load(vm, payload_storm, payload_storm_end,
		(struct args){
		    .first = DATA << 12, .mask = STORM_PAGES - 1, .seed = 88172645463325252, .at = AT_STOP});
	ck_assert_int_eq(pthread_create(thread, NULL, storm_thread, vm), 0);
}

/* Whatever was written and not harvested again would differ. */
static void storm_end(struct vm *vm, pthread_t thread)
{
	unsigned stale = 0;

	__atomic_store_n((uint32_t *)(vm->low + AT_STOP), 1, __ATOMIC_SEQ_CST);
	pthread_join(thread, NULL);
	replicate(vm);
	for (unsigned i = 0; i < STORM_PAGES; i++)
		stale += memcmp(vm->replica + i * 4096, vm->data + i * 4096, 4096) != 0;
	ck_assert_msg(!stale, "%u pages of the copy are stale", stale);
	munmap(vm->replica, STORM_PAGES * 4096);
}

/* Pages were written again after a harvest, and a small ring was full: however long that takes here. */
static bool storm_enough(struct vm *vm)
{
	bool enough;

	pthread_mutex_lock(&vm->lock);
	enough = vm->marks > 2 * STORM_PAGES && (vm->ring_bytes != 4096 || vm->ring_full);
	pthread_mutex_unlock(&vm->lock);
	return enough;
}

static void short_pause(void)
{
	nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* Slots of several sizes cover the pages of the storm. */
static void storm_slots(struct vm *vm)
{
	ck_assert_int_eq(vm_add(vm, DATA, 1000), 0);
	ck_assert_int_eq(vm_add(vm, DATA + 1000, 70), 0);
	ck_assert_int_eq(vm_add(vm, DATA + 1070, STORM_PAGES - 1070), 0);
}

static void storm_rounds(unsigned manual, unsigned ring_bytes, unsigned rounds)
{
	pthread_t thread;
	struct vm vm;

	vm_start(&vm, manual, ring_bytes);
	storm_slots(&vm);
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	storm_start(&vm, &thread);
	for (unsigned i = 0; i < rounds || !storm_enough(&vm); i++) {
		short_pause();
		replicate(&vm);
	}
	storm_end(&vm, thread);
	vm_stop(&vm);
}

START_TEST(the_log_loses_no_write)
{
	unsigned mode = manual_modes[_i];

	if (!no_manual(mode))
		storm_rounds(mode, 0, times(300, 30));
}
END_TEST

START_TEST(rings_lose_no_write)
{
	if (!no_rings())
		storm_rounds(0, ring_sizes[_i], times(300, 30));
}
END_TEST

/* The flag changes under a running guest: what is written after slots_log() returned is logged. */
START_TEST(logging_starts_under_a_running_guest)
{
	unsigned mode = manual_modes[_i];
	bool rings = mode == KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE; /* that round is about rings instead */
	pthread_t thread;
	struct vm vm;

	if (rings ? no_rings() : no_manual(mode))
		return;
	vm_start(&vm, rings ? 0 : mode, rings ? 65536 : 0);
	storm_slots(&vm);
	storm_start(&vm, &thread);
	for (unsigned round = 0, rounds = times(30, 6); round < rounds; round++) {
		pthread_mutex_lock(&vm.lock);
		ck_assert_int_eq(slots_log(&vm.slots, true), 0);
		memcpy(vm.replica, vm.data, STORM_PAGES * 4096); /* what was written before */
		vm.marks = 0;
		pthread_mutex_unlock(&vm.lock);
		for (unsigned i = 0; i < 3; i++) {
			short_pause();
			replicate(&vm);
		}
		if (round == rounds - 1)
			break;
		pthread_mutex_lock(&vm.lock);
		ck_assert_int_eq(slots_log(&vm.slots, false), 0);
		pthread_mutex_unlock(&vm.lock);
		short_pause();
	}
	for (unsigned i = 0; i < 20 || !storm_enough(&vm); i++) {
		short_pause();
		replicate(&vm);
	}
	storm_end(&vm, thread);
	vm_stop(&vm);
}
END_TEST

static void on_signal(int sig)
{
}

/* Signals at the harvesting thread, from 6.16 on, make KVM stop in the middle of a reset. */
START_TEST(signals_lose_no_write)
{
	struct sigaction act = {.sa_handler = on_signal}, before;
	struct sigevent to = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR1};
	struct itimerspec often = {.it_value.tv_nsec = 30000, .it_interval.tv_nsec = 30000};
	pthread_t thread;
	timer_t timer;
	sigset_t usr1;
	struct vm vm;

	if (no_rings())
		return;
	vm_start(&vm, 0, 65536);
	storm_slots(&vm);
	ck_assert_int_eq(slots_log(&vm.slots, true), 0);
	storm_start(&vm, &thread);
	sigaction(SIGUSR1, &act, &before);
	to._sigev_un._tid = (pid_t)syscall(SYS_gettid);
	ck_assert_int_eq(timer_create(CLOCK_MONOTONIC, &to, &timer), 0);
	ck_assert_int_eq(timer_settime(timer, 0, &often, NULL), 0);
	for (unsigned i = 0; i < times(300, 100) || !storm_enough(&vm); i++) {
		short_pause(); /* a signal ends it early */
		replicate(&vm);
	}
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	ck_assert_int_eq(pthread_sigmask(SIG_UNBLOCK, NULL, &usr1), 0);
	ck_assert(!sigismember(&usr1, SIGUSR1)); /* the mask is what it was */
	timer_delete(timer);
	storm_end(&vm, thread);
	sigaction(SIGUSR1, &before, NULL);
	vm_stop(&vm);
}
END_TEST

#if defined(__x86_64__)
#include "x86_slots_regs.h"
#else
#include "arm64_slots_regs.h"
#endif

int main(void)
{
	Suite *suite = suite_create("kvm slots");
	TCase *tc = tcase_create("slots");
	SRunner *sr;
	int failed;

	kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm_fd < 0) {
		printf("skipped: /dev/kvm: %s\n", strerror(errno));
		return 77;
	}
	tcase_set_timeout(tc, 240);
	tcase_add_test(tc, descriptors_are_checked);
	tcase_add_test(tc, rings_are_checked);
	tcase_add_test(tc, ids_run_out);
	tcase_add_test(tc, refusals);
	tcase_add_test(tc, slots_split_and_move);
	tcase_add_test(tc, readonly_slots_exit);
	tcase_add_test(tc, the_vmm_sets_slots);
	tcase_add_test(tc, memory_runs_out);
	tcase_add_loop_test(tc, the_log_is_exact, 0, ARRAY_SIZE(manual_modes));
	tcase_add_loop_test(tc, pages_are_left_in_the_log, 0, ARRAY_SIZE(manual_modes));
	tcase_add_loop_test(tc, rings_are_exact, 0, ARRAY_SIZE(ring_sizes));
	tcase_add_loop_test(tc, the_log_is_exact_by_larger_pages, 0, 3 * ARRAY_SIZE(units));
	tcase_add_loop_test(tc, rings_are_exact_by_larger_pages, 0, ARRAY_SIZE(units));
	tcase_add_test(tc, rings_are_emptied);
	tcase_add_test(tc, runs_cross_words);
	tcase_add_test(tc, without_a_log_everything_is_dirty);
	tcase_add_test(tc, slots_added_later_are_logged);
	tcase_add_loop_test(tc, the_log_loses_no_write, 0, ARRAY_SIZE(manual_modes));
	tcase_add_loop_test(tc, rings_lose_no_write, 0, ARRAY_SIZE(ring_sizes));
	tcase_add_loop_test(tc, logging_starts_under_a_running_guest, 0, ARRAY_SIZE(manual_modes));
	tcase_add_test(tc, signals_lose_no_write);
	add_register_tests(tc);
	suite_add_tcase(suite, tc);
	sr = srunner_create(suite);
	srunner_set_fork_status(sr, CK_NOFORK);
	srunner_run_all(sr, CK_NORMAL);
	failed = srunner_ntests_failed(sr);
	srunner_free(sr);
	close(kvm_fd);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
