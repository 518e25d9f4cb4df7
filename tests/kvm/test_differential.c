/* SPDX-License-Identifier: MIT */
/*
 * Two engines are told the same: one has no KVM, all guests of the other are attached to VMs of /dev/kvm.
 *After each step results are equal and an audit finds nothing; now and then, and at the end, all guests hold
 *the same bytes with the same permissions, and share the same pages.
 *
 *   struct pair   a guest of both engines. Without `vmm` the test plays the guest through the window;
 *                 with it a payload writes, and the soft side is told from the payload's log
 *   struct shape  policy, features that are masked, who writes: a test each
 *   struct story  what a sequence has done, in memory that outlives a failed test's process
 *
 * Environment: KAGE_SEED (sequence i has seed + i: KAGE_SEED=<printed> KAGE_SEQUENCES=1
 * repeats one), KAGE_SEQUENCES, KAGE_STEPS; KAGE_KVM_MASK.
 *
 * invariants
 *	D1. The soft engine decides whether a write is allowed; what it refuses is not written through a
 *window. D2. A strict sequence merges until nothing more merges, on both sides at the same step. What a page
 *shares depends on when it was merged (a stable frame whose last but one user has gone stays one), so loose
 *sequences, which merge in small pieces and under running guests, compare no classes. D3. Fewer than 64 runs
 *of a 2 MiB diverge between two reconciles, so that no block is widened: that would un-share pages which the
 *soft side goes on sharing.
 */
#include <stdarg.h>

#include "kvm_test.h"

#define PAIRS	   5
#define PINS	   3
#define HISTORY	   40
#define PATTERNS   8
#define AREA_PAGES ((uint64_t)1024)
#define FILE_PAGES ((uint64_t)64)
#define SLOTS	   512
#define SHAPES	   16
#define BIG	   ((uint64_t)320 * PAGE) /* longest access */

struct shape {
	const char *name;
	uint32_t policy, mask;
	bool guests;	  /* payloads run */
	bool by_contents; /* nothing but contents tells who has diverged */
};

#define BIT(n) (1u << (n))
#define NO_UFFD                                                                                              \
	(BIT(KAGE_KVM_USERFAULTFD) | BIT(KAGE_KVM_UFFD_WP) | BIT(KAGE_KVM_UFFD_MINOR) |                      \
	 BIT(KAGE_KVM_UFFD_CONTINUE_WP))

static const struct shape shapes[] = {
    {"native", KAGE_KVM_NATIVE, 0, false, false},
    {"exact", KAGE_KVM_EXACT, 0, false, false},
    {"native, no PAGEMAP_SCAN", KAGE_KVM_NATIVE, BIT(KAGE_KVM_PAGEMAP_SCAN), false, false},
    {"native, contents compared", KAGE_KVM_NATIVE, BIT(KAGE_KVM_PAGEMAP_SCAN) | BIT(KAGE_KVM_PAGEMAP), false,
     true},
    {"native, no userfaultfd", KAGE_KVM_NATIVE, NO_UFFD, false, false},
    {"exact, no PAGEMAP_SCAN", KAGE_KVM_EXACT, BIT(KAGE_KVM_PAGEMAP_SCAN), false, false},
    {"native payloads", KAGE_KVM_NATIVE, 0, true, false},
    {"exact payloads", KAGE_KVM_EXACT, 0, true, false},
    {"native payloads, no userfaultfd", KAGE_KVM_NATIVE, NO_UFFD, true, false},
};

struct pinned {
	uint64_t gpa, pages; /* 0: free */
	struct iovec soft[16], hard[16];
	unsigned n_soft, n_hard;
};

struct pair {
	unsigned id;
	struct kage_vm *soft;
	struct kage_vm *vm;
	struct kage_kvm *kvm;
	int fd;
	struct vmm *vmm;		  /* NULL: no vCPU */
	struct kage_kvm_slot slot[SLOTS]; /* as KVM has them; len 0: none. Not of a vmm's */
	struct pinned pin[PINS];
};

static struct story {
	bool open; /* the sequence has not ended */
	char name[40];
	uint64_t seed, step, ops;
	char line[HISTORY][120];
} * stories;

static struct {
	const struct shape *shape;
	struct story *story;
	struct rng rng;
	struct kage_engine *soft;
	struct pair *pair[PAIRS];
	unsigned count, next_id;
	bool loose, helper;
	uint64_t area[2];
	uint64_t log, stamps;	 /* payloads: where they log, and memory that only STAMP writes */
	int file[2], foreign[2]; /* of the soft and the other side */
} run_;

#define r_ (&run_.rng)

static struct total {
	uint64_t steps, refused, merged, adopted, host_private, guest_writes, traps;
} total;

static uint8_t bytes_a[BIG], bytes_b[BIG], fresh[BIG + PAGE];

/* -- reporting ------------------------------------------------------------------------------- */

static void op(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void op(const char *fmt, ...)
{
	struct story *s = run_.story;
	char *line = s->line[s->ops++ % HISTORY];
	int n = snprintf(line, sizeof(s->line[0]), "%5lu  ", s->step);
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line + n, sizeof(s->line[0]) - n, fmt, ap);
	va_end(ap);
}

static void stories_tell(void)
{
	for (unsigned i = 0; i < COUNT(shapes); i++) {
		const struct story *s = &stories[i];

		if (!s->open)
			continue;
		printf("%s: failed at step %lu; last operations:\n", s->name, s->step);
		for (uint64_t k = s->ops < HISTORY ? 0 : s->ops - HISTORY; k < s->ops; k++)
			printf("  %s\n", s->line[k % HISTORY]);
		printf("repeat: KAGE_SEED=%lu KAGE_SEQUENCES=1 CK_RUN_CASE='%s'\n", s->seed, s->name);
	}
}

/* Both sides say the same. Returns whether it was done. */
#define both(soft, hard) both_at(__LINE__, soft, hard)
static bool both_at(int line, int soft, int hard)
{
	if (soft != hard) /* Check's own assertions take their time */
		ck_abort_msg("line %d: %d, without KVM %d", line, hard, soft);
	total.refused += soft != KAGE_OK;
	return soft == KAGE_OK;
}

static void audit_both(void)
{
	struct kage_audit a = {.size = sizeof(a), .report = audit_line};

	audit();
	ok(kage_engine_audit(run_.soft, &a));
}

/* -- contents ----------------------------------------------------------------------------------- */

/* Few contents, so that merging happens; 0 is the zero page. */
static void fill_pattern(void *page, unsigned pattern)
{
	uint64_t *w = page;

	for (unsigned i = 0; i < PAGE / 8; i++)
		w[i] = pattern < 6 ? pattern * UINT64_C(0x0101010101010101) : pattern * i;
}

static int touch(void *opaque, uint64_t gpa, void *page)
{
	fill_pattern(page, gpa / PAGE % 3);
	return 0;
}

static void fill_fresh(uint64_t gpa, uint64_t len)
{
	if (gpa % PAGE == 0 && len % PAGE == 0)
		for (uint64_t i = 0; i < len; i += PAGE)
			fill_pattern(fresh + i, rng_below(r_, PATTERNS));
	else
		memset(fresh, (int)rng_below(r_, 3), len);
}

/* -- where ---------------------------------------------------------------------------------------- */

struct where {
	uint64_t gpa, len;
};

#define W(w) (w).gpa, (w).len

static struct where some_range(uint64_t most)
{
	uint64_t pages = 1 + rng_below(r_, rng_chance(r_, 85) && most > 12 ? 12 : most);
	uint64_t first = rng_chance(r_, 60) ? 480 + rng_below(r_, 64) : rng_below(r_, AREA_PAGES);

	if (first + pages > AREA_PAGES)
		pages = AREA_PAGES - first;
	return (struct where){run_.area[rng_chance(r_, 30)] + first * PAGE, pages * PAGE};
}

static struct where some_bytes(void)
{
	struct where w = some_range(1);

	w.gpa += rng_below(r_, PAGE);
	w.len = 1 + rng_below(r_, 9000);
	return w;
}

static struct pair *some_pair(void)
{
	return run_.pair[rng_below(r_, run_.count)];
}

/* -- guests ------------------------------------------------------------------------------------------ */

static int set_slot(void *opaque, const struct kage_kvm_slot *s)
{
	struct pair *p = opaque;
	struct kvm_userspace_memory_region m = {.slot = s->slot,
						.flags = s->flags,
						.guest_phys_addr = s->gpa,
						.memory_size = s->len,
						.userspace_addr = s->hva};

	if (s->slot >= SLOTS)
		return -EINVAL;
	if (ioctl(p->fd, KVM_SET_USER_MEMORY_REGION, &m) < 0)
		return -errno;
	p->slot[s->slot] = *s;
	return 0;
}

static void pair_helper(struct pair *p)
{
	if (run_.helper)
		ok(kage_kvm_helper_start(p->kvm));
}

static void pair_attach(struct pair *p)
{
	struct kage_kvm_config config = config_of(run_.shape->policy);

	p->fd = new_kvm();
	config.feature_mask |= run_.shape->mask;
	config.set_slot = set_slot;
	config.slot_count = SLOTS;
	config.opaque = p;
	ok(kage_kvm_attach(p->vm, p->fd, &config, &p->kvm));
	pair_helper(p);
}

static void pair_detach(struct pair *p)
{
	if (run_.helper)
		ok(kage_kvm_helper_stop(p->kvm));
	ok(kage_kvm_detach(p->kvm));
	close(p->fd);
	memset(p->slot, 0, sizeof(p->slot));
}

static struct pair *pair_add(void)
{
	struct pair *p = calloc(1, sizeof(*p));

	ck_assert_ptr_nonnull(p);
	p->id = run_.next_id++;
	run_.pair[run_.count++] = p;
	return p;
}

static void pair_take_vmm(struct pair *p, struct vmm *vmm)
{
	p->vmm = vmm;
	p->vm = vm_of(vmm);
	p->kvm = kvm_of(vmm);
}

#define RAM_SIZE (run_.stamps + MIB)

/* A payload's own pages are not compared, and so must not be merged with others. */
static void pair_with_vmm(struct pair *p)
{
	struct vmm_wish wish = {.ram = RAM_SIZE, .policy = run_.shape->policy, .mask = run_.shape->mask};

	pair_take_vmm(p, new_vmm(wish));
	ok(kage_vm_map(p->soft, KAGE_CFG(kage_region, .flags = KAGE_REGION_MERGEABLE, .len = RAM_SIZE)));
	ok(kage_vm_advise(p->vm, 0, run_.area[0], KAGE_ADVICE_UNMERGEABLE));
	ok(kage_vm_advise(p->soft, 0, run_.area[0], KAGE_ADVICE_UNMERGEABLE));
	ok(kage_vm_advise(p->vm, run_.log, MIB, KAGE_ADVICE_UNMERGEABLE));
	ok(kage_vm_advise(p->soft, run_.log, MIB, KAGE_ADVICE_UNMERGEABLE));
}

static void do_create(struct pair *unused)
{
	struct pair *p;

	if (run_.count == PAIRS)
		return;
	p = pair_add();
	op("guest %u created", p->id);
	ok(kage_vm_create(run_.soft, NULL, &p->soft));
	if (run_.shape->guests) {
		pair_with_vmm(p);
		return;
	}
	ok(kage_vm_create(engine, NULL, &p->vm));
	pair_attach(p);
}

static void do_clone(struct pair *p)
{
	struct pair *c;
	int soft, hard;

	if (run_.count == PAIRS)
		return;
	c = pair_add();
	op("guest %u cloned to %u", p->id, c->id);
	soft = kage_vm_clone(p->soft, NULL, &c->soft);
	ok(soft);
	if (p->vmm) {
		pair_take_vmm(c, clone_vmm(p->vmm, true));
		return;
	}
	hard = kage_vm_clone(p->vm, NULL, &c->vm);
	both(soft, hard);
	pair_attach(c);
}

static void unpin(struct pair *p, struct pinned *pin)
{
	op("guest %u unpin %lx + %lx", p->id, pin->gpa, pin->pages);
	ck_assert(both(kage_vm_unpin(p->soft, pin->gpa, pin->pages * PAGE),
		       kage_vm_unpin(p->vm, pin->gpa, pin->pages * PAGE)));
	pin->pages = 0;
}

static void pair_destroy(struct pair *p)
{
	struct kage_kvm_info info = info_of(p->kvm);

	same(info.broken, 0);
	ck_assert(run_.loose || info.widened == 0);
	total.adopted += info.adopted;
	total.traps += info.traps;
	for (unsigned i = 0; i < PINS; i++)
		if (p->pin[i].pages)
			unpin(p, &p->pin[i]);
	op("guest %u destroyed", p->id);
	if (p->vmm) {
		vmm_destroy(p->vmm);
	} else {
		pair_detach(p);
		ok(kage_vm_destroy(p->vm));
	}
	ok(kage_vm_destroy(p->soft));
	for (unsigned i = 0; i < run_.count; i++)
		if (run_.pair[i] == p)
			run_.pair[i] = run_.pair[--run_.count];
	free(p);
}

/* -- comparing --------------------------------------------------------------------------------------- */

static bool is_zero(const uint8_t *page)
{
	return page[0] == 0 && !memcmp(page, page + 1, PAGE - 1);
}

/*
 * HOME, PRIVATE and HOST_PRIVATE differ in where the page lies. A page of a file that nobody has written has
 * an entry if somebody asked the engine for it, and none if it was seen through a window only.
 */
static uint8_t kind_of(uint8_t class)
{
	if (class == KAGE_PAGE_PRIVATE || class == KAGE_PAGE_HOST_PRIVATE)
		return KAGE_PAGE_HOME;
	return class == KAGE_PAGE_UNTOUCHED ? KAGE_PAGE_DEVICE : class;
}

/*
 * A page that reads zero may be held in many ways: a window that is read brings memory into the pool's
 * file where the soft side has a hole; a clone gets holes of its own where the soft side shares them.
 */
static void same_class(const struct pair *p, uint64_t gpa, uint8_t soft, uint8_t hard, const uint8_t *bytes)
{
	bool none = soft == KAGE_PAGE_NONE || hard == KAGE_PAGE_NONE;

	if (!none && (run_.loose || run_.shape->by_contents || !bytes || is_zero(bytes)))
		return;
	if (kind_of(soft) != kind_of(hard))
		ck_abort_msg("guest %u gpa %lx: class %u, without KVM %u", p->id, gpa, hard, soft);
}

static void same_page(const struct pair *p, uint64_t gpa, const uint8_t *got, const uint8_t *want,
		      const char *how)
{
	unsigned i = 0;

	if (!memcmp(got, want, PAGE))
		return;
	while (got[i] == want[i])
		i++;
	ck_abort_msg("guest %u gpa %lx: %s %#x, without KVM %#x", p->id, gpa + i, how, got[i], want[i]);
}

/* False: it cannot be read. */
static bool same_bytes(struct pair *p, uint64_t gpa, uint8_t *page)
{
	const uint8_t *window;
	uint8_t hard[PAGE];

	if (!both(kage_vm_read(p->soft, gpa, page, PAGE), kage_vm_read(p->vm, gpa, hard, PAGE)))
		return false;
	same_page(p, gpa, hard, page, "read");
	window = kage_kvm_window(p->kvm, gpa, PAGE);
	if (!window)
		ck_abort_msg("guest %u gpa %lx: in no window", p->id, gpa);
	same_page(p, gpa, window, page, "the window shows");
	return true;
}

/* Two passes: reading may bring contents about (TRAP), on either side. */
static void compare_area(struct pair *p, uint64_t gpa, uint64_t pages)
{
	static uint8_t page[AREA_PAGES][PAGE], soft[AREA_PAGES], hard[AREA_PAGES];
	static bool there[AREA_PAGES];

	for (uint64_t i = 0; i < pages; i++)
		there[i] = same_bytes(p, gpa + i * PAGE, page[i]);
	ok(kage_page_map(p->soft, gpa, pages * PAGE, soft));
	ok(kage_page_map(p->vm, gpa, pages * PAGE, hard));
	for (uint64_t i = 0; i < pages; i++)
		same_class(p, gpa + i * PAGE, soft[i], hard[i], there[i] ? page[i] : NULL);
}

/* What KVM's slots allow. */
static uint32_t slot_access(struct pair *p, uint64_t gpa)
{
	uint32_t access = 0;
	unsigned found = 0;

	for (unsigned i = 0; i < SLOTS; i++) {
		const struct kage_kvm_slot *s = &p->slot[i];

		if (gpa < s->gpa || gpa >= s->gpa + s->len)
			continue;
		found++;
		access = s->flags & KVM_MEM_READONLY ? KAGE_READ : KAGE_READ | KAGE_WRITE;
		if ((char *)s->hva + (gpa - s->gpa) != kage_kvm_window(p->kvm, gpa, PAGE) || found > 1)
			ck_abort_msg("guest %u gpa %lx: slot %u shows something else", p->id, gpa, i);
	}
	return access;
}

/* What the regions allow, page by page; ~0: no region. */
static void region_access(struct kage_vm *vm, uint64_t gpa, uint32_t access[AREA_PAGES])
{
	FILE *f = dump_of(vm, KAGE_DUMP_REGIONS);
	unsigned long long start, end;
	char line[200], kind[16], prot[8];

	memset(access, 0xff, AREA_PAGES * sizeof(access[0]));
	while (fgets(line, sizeof(line), f)) {
		is(sscanf(line, "%llx-%llx %7s %15s", &start, &end, prot, kind), 4);
		for (uint64_t at = start; at < end; at += PAGE)
			if (at >= gpa && at < gpa + AREA_PAGES * PAGE)
				access[(at - gpa) / PAGE] = (strchr(prot, 'r') ? KAGE_READ : 0) |
							    (strchr(prot, 'w') ? KAGE_WRITE : 0) |
							    (strchr(prot, 'x') ? KAGE_EXEC : 0);
	}
	fclose(f);
}

/* What cannot be read has no slot; KVM knows of no other right than to write. */
static void compare_access(struct pair *p, uint64_t gpa)
{
	uint32_t soft[AREA_PAGES], hard[AREA_PAGES];

	region_access(p->soft, gpa, soft);
	region_access(p->vm, gpa, hard);
	for (uint64_t i = 0; i < AREA_PAGES; i++) {
		uint32_t want =
		    soft[i] != ~0u && soft[i] & KAGE_READ ? soft[i] & (KAGE_READ | KAGE_WRITE) : 0;

		if (hard[i] != soft[i])
			ck_abort_msg("guest %u gpa %lx: access %x, without KVM %x", p->id, gpa + i * PAGE,
				     hard[i], soft[i]);
		if (!p->vmm && slot_access(p, gpa + i * PAGE) != want)
			ck_abort_msg("guest %u gpa %lx: KVM's slot allows %u, not %u", p->id, gpa + i * PAGE,
				     slot_access(p, gpa + i * PAGE), want);
	}
}

static void compare_stats(struct pair *p)
{
	struct kage_stats hard = stats_of(p->vm), soft = {.size = sizeof(soft)};

	ok(kage_stats_get(run_.soft, p->soft, &soft));
	same(hard.pages_nominal, soft.pages_nominal);
	same(hard.pages_mapped + hard.pages_untouched, hard.pages_nominal);
}

static int reconcile(struct pair *p, uint32_t flags)
{
	int r = kage_kvm_reconcile(p->kvm, flags);

	op("guest %u reconcile %u: %d", p->id, flags, r);
	ck_assert_int_ge(r, 0);
	ck_assert(!(flags & KAGE_KVM_ADOPT) || r == 0);
	same(info_of(p->kvm).host_private, (uint64_t)r);
	total.host_private += r;
	return r;
}

static void compare_all(bool access)
{
	uint32_t flags = rng_chance(r_, 40) ? KAGE_KVM_ADOPT : 0;

	for (unsigned i = 0; i < run_.count; i++)
		reconcile(run_.pair[i], flags);
	audit();
	for (unsigned i = 0; i < run_.count; i++) {
		struct pair *p = run_.pair[i];

		compare_area(p, run_.area[0], AREA_PAGES);
		compare_area(p, run_.area[1], AREA_PAGES);
		if (p->vmm)
			compare_area(p, run_.stamps, MIB / PAGE);
		compare_stats(p);
		if (access) {
			compare_access(p, run_.area[0]);
			compare_access(p, run_.area[1]);
		}
	}
	audit();
}

/* -- operations: regions ----------------------------------------------------------------------------------
 */

static uint32_t some_prot(void)
{
	static const uint32_t prots[] = {0, 0, 0, KAGE_RWX, KAGE_RWX, 3, KAGE_READ, KAGE_READ | KAGE_EXEC};

	return prots[rng_below(r_, COUNT(prots))];
}

static struct kage_region some_region(void)
{
	struct kage_region k = {.size = sizeof(k), .prot = some_prot()};
	uint64_t dice = rng_below(r_, 100),
		 pages = dice % 3 ? 1 + rng_below(r_, 60) : 100 + rng_below(r_, 500);
	uint64_t first = rng_chance(r_, 50) ? 480 + rng_below(r_, 50) : rng_below(r_, AREA_PAGES);

	if (dice < 68) {
		k.flags = KAGE_REGION_MERGEABLE;
	} else if (dice < 76) {
		k.flags = KAGE_REGION_EXTERNAL;
	} else if (dice < 84 && run_.helper) {
		k.flags = KAGE_REGION_TRAP | (dice % 2 ? KAGE_REGION_MERGEABLE : 0);
		k.touch = touch;
	} else if (dice < 94) {
		k.kind = dice % 2 ? KAGE_REGION_FILE : KAGE_REGION_FOREIGN;
		k.flags = KAGE_REGION_FD;
		pages = pages < FILE_PAGES ? pages : FILE_PAGES;
		k.offset = rng_below(r_, FILE_PAGES + 1 - pages) * PAGE;
	}
	if (first + pages > AREA_PAGES)
		first = AREA_PAGES - pages;
	k.gpa = run_.area[rng_chance(r_, 30)] + first * PAGE;
	k.len = pages * PAGE;
	return k;
}

static void map(struct pair *p, struct kage_region k)
{
	const int *fds = k.kind == KAGE_REGION_FILE ? run_.file : run_.foreign;
	int soft;

	op("guest %u map %lx + %lx kind %u flags %#x prot %u", p->id, W(k), k.kind, k.flags, k.prot);
	k.fd = k.kind ? fds[0] : 0;
	soft = kage_vm_map(p->soft, &k);
	k.fd = k.kind ? fds[1] : 0;
	both(soft, kage_vm_map(p->vm, &k));
}

static void do_map(struct pair *p)
{
	map(p, some_region());
}

static void do_unmap(struct pair *p)
{
	struct where w = some_range(rng_chance(r_, 30) ? 300 : 40);

	op("guest %u unmap %lx + %lx", p->id, W(w));
	both(kage_vm_unmap(p->soft, w.gpa, w.len), kage_vm_unmap(p->vm, w.gpa, w.len));
}

static void do_protect(struct pair *p)
{
	struct where w = some_range(200);
	uint32_t prot = rng_chance(r_, 60) ? KAGE_RWX : rng_chance(r_, 10) ? KAGE_EXEC : KAGE_READ;

	op("guest %u protect %lx + %lx prot %u", p->id, W(w), prot);
	both(kage_vm_protect(p->soft, w.gpa, w.len, prot), kage_vm_protect(p->vm, w.gpa, w.len, prot));
}

static void do_advise(struct pair *p)
{
	static const enum kage_advice advice[] = {KAGE_ADVICE_MERGEABLE, KAGE_ADVICE_UNMERGEABLE,
						  KAGE_ADVICE_DISCARD, KAGE_ADVICE_DISCARD,
						  KAGE_ADVICE_WILLNEED};
	enum kage_advice a = advice[rng_below(r_, COUNT(advice))];
	struct where w = some_range(200);

	op("guest %u advise %lx + %lx advice %d", p->id, W(w), a);
	both(kage_vm_advise(p->soft, w.gpa, w.len, a), kage_vm_advise(p->vm, w.gpa, w.len, a));
}

/* -- operations: access ------------------------------------------------------------------------------------
 */

static void write_window(struct pair *p, struct where w)
{
	for (uint64_t done = 0, n; done < w.len; done += n) {
		uint64_t at = w.gpa + done;
		char *to;

		n = PAGE - at % PAGE < w.len - done ? PAGE - at % PAGE : w.len - done;
		to = kage_kvm_window(p->kvm, at, n);
		ck_assert_ptr_nonnull(to);
		memcpy(to, fresh + done, n);
	}
	ok(kage_vm_mark_dirty(p->vm, w.gpa, w.len));
}

static void do_write(struct pair *p)
{
	struct where w = rng_chance(r_, 65) ? some_range(24) : some_bytes();
	bool window = rng_chance(r_, 60);
	int soft;

	fill_fresh(w.gpa, w.len);
	op("guest %u %s %lx + %lx first byte %#x", p->id, window ? "window" : "write", W(w), fresh[0]);
	soft = kage_vm_write(p->soft, w.gpa, fresh, w.len);
	if (window && soft == KAGE_OK) /* D1 */
		write_window(p, w);
	else
		both(soft, kage_vm_write(p->vm, w.gpa, fresh, w.len));
}

static void do_read(struct pair *p)
{
	struct where w = rng_chance(r_, 50) ? some_range(100) : some_bytes();

	op("guest %u read %lx + %lx", p->id, W(w));
	if (both(kage_vm_read(p->soft, w.gpa, bytes_a, w.len), kage_vm_read(p->vm, w.gpa, bytes_b, w.len)))
		ck_assert_mem_eq(bytes_b, bytes_a, w.len);
}

static void do_pin(struct pair *p)
{
	struct where w = some_range(12);
	struct pinned *pin = NULL;

	for (unsigned i = 0; i < PINS; i++)
		if (!p->pin[i].pages)
			pin = &p->pin[i];
	if (!pin)
		return;
	op("guest %u pin %lx + %lx", p->id, W(w));
	pin->n_soft = pin->n_hard = COUNT(pin->soft);
	if (both(kage_vm_pin(p->soft, w.gpa, w.len, 0, pin->soft, &pin->n_soft),
		 kage_vm_pin(p->vm, w.gpa, w.len, 0, pin->hard, &pin->n_hard))) {
		pin->gpa = w.gpa;
		pin->pages = w.len / PAGE;
	}
}

static void iov_write(const struct iovec *iov, unsigned n)
{
	for (uint64_t done = 0; n-- > 0; done += iov++->iov_len)
		memcpy(iov->iov_base, fresh + done, iov->iov_len);
}

/* A device writes through the pointers that it was given. */
static void do_pinned(struct pair *p)
{
	struct pinned *pin = &p->pin[rng_below(r_, PINS)];

	if (!pin->pages)
		return;
	if (rng_chance(r_, 40)) {
		unpin(p, pin);
		return;
	}
	op("guest %u device writes %lx", p->id, pin->gpa);
	fill_fresh(pin->gpa, pin->pages * PAGE);
	iov_write(pin->soft, pin->n_soft);
	iov_write(pin->hard, pin->n_hard);
	both(kage_vm_mark_dirty(p->soft, pin->gpa, pin->pages * PAGE),
	     kage_vm_mark_dirty(p->vm, pin->gpa, pin->pages * PAGE));
}

/* -- operations: payloads
 * --------------------------------------------------------------------------------------- */

/* What the guest did outside of the areas (its log, its mailbox) is its own. */
static void write_soft(struct pair *p, uint64_t gpa, uint64_t word)
{
	int r = kage_vm_write(p->soft, gpa, &word, sizeof(word));

	ck_assert(r == KAGE_OK || r == KAGE_MMIO); /* the payload's VMM drops such writes */
	total.guest_writes += r == KAGE_OK;
}

static void guest_dirties(struct pair *p, struct payload_mailbox mb)
{
	mb.program = PAYLOAD_DIRTY;
	mb.iterations = 1 + rng_below(r_, 30);
	mb.done = mb.go = rng_below(r_, 1000);
	mb.log = run_.log;
	op("guest %u payload writes %lu pages of %lx + %lx", p->id, mb.iterations, mb.base, mb.pages * PAGE);
	ok(payload_put(p->vmm, 0, &mb));
	ok(payload_round(p->vmm, 0, TIMEOUT_MS));
	same(payload_peek(p->vmm, 0, count), mb.iterations);
	for (uint64_t i = 0; i < mb.iterations; i++)
		write_soft(p, read64(p->vm, mb.log + i * 8) * PAGE + i % 512 * 8,
			   (mb.go + 1) << 32 | (i + 1));
}

/* The payload's own code, run here on what the soft side has, says what it should have seen and written. */
static void guest_touches(struct pair *p, struct payload_mailbox mb)
{
	uint64_t i;

	mb.program = PAYLOAD_TOUCH;
	mb.mode = 1 + rng_below(r_, 3);
	op("guest %u payload touches %lx + %lx mode %lu", p->id, mb.base, mb.pages * PAGE, mb.mode);
	ok(payload_put(p->vmm, 0, &mb));
	ok(payload_round(p->vmm, 0, TIMEOUT_MS));
	for (i = 0; i < mb.pages; i++)
		if (!(mb.mode & PAYLOAD_READ) ||
		    kage_vm_read(p->soft, mb.base + i * PAGE, fresh + i * PAGE, 8) != KAGE_OK)
			memset(fresh + i * PAGE, 0xff, 8); /* no memory: all ones */
	guest_touch(&mb, (char *)fresh - mb.base);
	same(payload_peek(p->vmm, 0, checksum), mb.checksum);
	for (i = 0; mb.mode & PAYLOAD_WRITE && i < mb.pages; i++)
		write_soft(p, mb.base + i * PAGE, *(uint64_t *)(fresh + i * PAGE));
}

static void do_guest(struct pair *p)
{
	struct where w = some_range(60);
	struct payload_mailbox mb = {.base = w.gpa, .pages = w.len / PAGE, .seed = 1 + rng_below(r_, 4)};

	if (!p->vmm)
		do_write(p);
	else if (rng_chance(r_, 50))
		guest_dirties(p, mb);
	else
		guest_touches(p, mb);
}

/* A page of stamps as the log says. */
static void stamp_soft(struct pair *p, const struct payload_mailbox *mb, uint64_t i)
{
	struct payload_stamp_log log;
	uint64_t gpa = mb->base + i * PAGE, page[PAGE / 8] = {0};

	ok(kage_vm_read(p->vm, mb->log + i * sizeof(log), &log, sizeof(log)));
	for (uint64_t w = 0; log.generation && w < PAGE / 8; w += PAGE / 8 / mb->words)
		page[w] = guest_stamp(gpa / PAGE, log.generation, log.id, w);
	ok(kage_vm_write(p->soft, gpa, page, PAGE));
	total.guest_writes += log.generation != 0;
}

/* While the guest stamps, its pages are merged, found out about, adopted, read and pinned. */
static void disturb(struct pair *p)
{
	uint64_t until = payload_peek(p->vmm, 0, count) + 300;
	struct iovec iov[16];
	unsigned n;

	while (payload_peek(p->vmm, 0, count) < until) {
		uint64_t gpa = run_.stamps + rng_below(r_, MIB / PAGE - 8) * PAGE;

		ck_assert_int_ne(p->vmm->vcpu[0]->state, VMM_STOPPED);
		ok(kage_engine_step(engine, NULL, NULL));
		ck_assert_int_ge(kage_kvm_reconcile(p->kvm, rng_chance(r_, 50) ? KAGE_KVM_ADOPT : 0), 0);
		ok(kage_vm_read(p->vm, gpa, bytes_b, 8 * PAGE));
		n = COUNT(iov);
		ok(kage_vm_pin(p->vm, gpa, 8 * PAGE, 0, iov, &n));
		audit();
		ok(kage_vm_unpin(p->vm, gpa, 8 * PAGE));
	}
}

static void do_stamp(struct pair *p)
{
	struct payload_mailbox mb = {.program = PAYLOAD_STAMP,
				     .base = run_.stamps,
				     .pages = MIB / PAGE,
				     .log = run_.log,
				     .words = 8,
				     .seed = 7};
	struct vmm_entry entry = payload_entry(0);

	if (!p->vmm || !run_.loose)
		return;
	op("guest %u stamps", p->id);
	ok(kage_vm_advise(p->vm, run_.stamps, MIB, KAGE_ADVICE_DISCARD));
	ok(kage_vm_advise(p->vm, run_.log, MIB, KAGE_ADVICE_DISCARD));
	ok(payload_put(p->vmm, 0, &mb));
	ok(vmm_vcpu_enter(p->vmm->vcpu[0], &entry));
	ok(vmm_start(p->vmm));
	disturb(p);
	ok(payload_stop(p->vmm, TIMEOUT_MS));
	same(payload_peek(p->vmm, 0, errors), 0);
	is(payload_check_stamps(p->vmm, 0), 0);
	for (uint64_t i = 0; i < mb.pages; i++)
		stamp_soft(p, &mb, i);
	ok(payload_put(p->vmm, 0, &(struct payload_mailbox){0}));
	ok(vmm_vcpu_enter(p->vmm->vcpu[0], &entry));
}

/* -- operations: the engines
 * ---------------------------------------------------------------------------------------- */

static uint64_t settle(struct kage_engine *e)
{
	struct kage_progress p;
	uint64_t merged = 0;
	unsigned idle = 0;

	for (unsigned i = 0; i < 64 && idle < 6; i++) {
		p = (struct kage_progress){.size = sizeof(p)};
		ok(kage_engine_step(e, NULL, &p));
		merged += p.pages_merged;
		idle = p.pages_merged ? 0 : idle + 1;
	}
	is(idle, 6);
	return merged;
}

/* Merging knows of a page that the kernel made private when somebody has looked for it. */
static void adopt_all(void)
{
	for (unsigned i = 0; i < run_.count; i++)
		is(kage_kvm_reconcile(run_.pair[i]->kvm, KAGE_KVM_ADOPT), 0);
}

static void do_step(struct pair *unused)
{
	struct kage_budget b = {.size = sizeof(b), .pages = 1 + rng_below(r_, 400)};
	uint64_t soft, hard;

	if (run_.loose && rng_chance(r_, 50)) {
		op("step of %lu pages", b.pages);
		ok(kage_engine_step(run_.soft, &b, NULL));
		ok(kage_engine_step(engine, &b, NULL));
		return;
	}
	adopt_all();
	soft = settle(run_.soft);
	hard = settle(engine);
	total.merged += hard;
	op("merged %lu, without KVM %lu", hard, soft);
}

static void do_reconcile(struct pair *p)
{
	reconcile(p, rng_chance(r_, 50) ? KAGE_KVM_ADOPT : 0);
}

/* KVM's side alone: nothing of this is to be seen. */
static void do_reattach(struct pair *p)
{
	if (p->vmm)
		return;
	op("guest %u detached and attached", p->id);
	pair_detach(p);
	audit();
	pair_attach(p);
}

static void do_policy(struct pair *p)
{
	uint32_t policy = rng_below(r_, 3);
	int r;

	if (!run_.helper || run_.shape->by_contents || !can_exact())
		return;
	op("guest %u policy %u", p->id, policy);
	r = kage_kvm_set_policy(p->kvm, policy);
	ck_assert_msg(r == KAGE_OK, "policy %u: %d", policy, r);
}

static void do_destroy(struct pair *p)
{
	if (run_.count <= 2)
		return;
	compare_all(false);
	pair_destroy(p);
}

static void do_compare(struct pair *unused)
{
	op("all compared");
	compare_all(rng_chance(r_, 30));
}

/* -- sequences
 * ------------------------------------------------------------------------------------------------------ */

static const struct {
	unsigned weight;
	void (*run)(struct pair *p);
} operations[] = {
    {50, do_map},      {30, do_unmap},	{40, do_protect}, {70, do_advise}, {220, do_write},
    {40, do_read},     {30, do_pin},	{40, do_pinned},  {200, do_guest}, {10, do_stamp},
    {8, do_create},    {35, do_clone},	{18, do_destroy}, {70, do_step},   {50, do_reconcile},
    {12, do_reattach}, {10, do_policy}, {40, do_compare},
};

static void one_step(void)
{
	unsigned all = 0, dice, i;

	for (i = 0; i < COUNT(operations); i++)
		all += operations[i].weight;
	dice = (unsigned)rng_below(r_, all);
	for (i = 0; dice >= operations[i].weight; i++)
		dice -= operations[i].weight;
	operations[i].run(some_pair());
	audit_both();
	total.steps++;
}

static int make_file(void)
{
	int fd = memfd_create("differential", MFD_CLOEXEC);

	for (unsigned i = 0; i < FILE_PAGES; i++) {
		fill_pattern(fresh, i % PATTERNS);
		is(pwrite(fd, fresh, PAGE, (off_t)(i * PAGE)), (ssize_t)PAGE);
	}
	return fd;
}

static void places(bool guests)
{
	uint64_t at = guests ? payload_free(&payload_small) : 0;

	run_.area[0] = at;
	run_.log = at + AREA_PAGES * PAGE;
	run_.stamps = run_.log + MIB;
	run_.area[1] = guests ? 48 * MIB : (UINT64_C(1) << 30) - 2 * MIB;
}

static void start(const struct shape *shape, uint64_t seed)
{
	struct story *s = &stories[shape - shapes];
	struct kage_engine_config c = {.size = sizeof(c), .seed = seed + 1, .log = engine_log};

	*s = (struct story){.open = true, .seed = seed};
	snprintf(s->name, sizeof(s->name), "%s", shape->name);
	memset(&run_, 0, sizeof(run_));
	run_.shape = shape;
	run_.story = s;
	run_.rng = rng_seed(seed);
	run_.loose = seed % 3 == 0;
	run_.helper =
	    shape->policy == KAGE_KVM_EXACT || (!shape->guests && has(KAGE_KVM_USERFAULTFD) &&
						!(shape->mask & BIT(KAGE_KVM_USERFAULTFD)) && seed % 2);
	places(shape->guests);
	op("seed %lu%s%s", seed, run_.loose ? ", loose" : "", run_.helper ? ", helper" : "");
	ok(kage_engine_create(&c, &run_.soft));
	engine_up();
	merging(true);
	ok(kage_engine_tune(run_.soft, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)));
	run_.file[0] = run_.file[1] = make_file();
	run_.foreign[0] = make_file();
	run_.foreign[1] = make_file();
	while (run_.count < 2)
		do_create(NULL);
	if (seed % 4 && !shape->guests) /* else windows are many and small */
		map(run_.pair[seed % 2], (struct kage_region){.size = sizeof(struct kage_region),
							      .flags = KAGE_REGION_MERGEABLE,
							      .gpa = run_.area[0],
							      .len = AREA_PAGES * PAGE});
	for (unsigned i = 0; i < 6; i++)
		do_map(run_.pair[i % 2]);
	map(run_.pair[0], (struct kage_region){.size = sizeof(struct kage_region),
					       .flags = KAGE_REGION_MERGEABLE,
					       .gpa = run_.area[1] + 128 * PAGE,
					       .len = 800 * PAGE});
	audit_both();
}

static void finish(void)
{
	struct kage_stats s = {.size = sizeof(s)};

	run_.loose = run_.loose || run_.shape->by_contents;
	adopt_all();
	settle(run_.soft);
	settle(engine);
	op("the end");
	compare_all(true);
	while (run_.count) {
		pair_destroy(run_.pair[0]);
		audit_both();
	}
	ok(kage_engine_step(run_.soft, NULL, NULL));
	ok(kage_engine_destroy(run_.soft));
	ok(kage_engine_step(engine, NULL, NULL));
	ok(kage_stats_get(engine, NULL, &s));
	same(s.frames_used + s.frames_table + s.pages_mapped + s.ksm_pages_shared + s.pages_host_private, 0);
	engine_down();
	close(run_.file[0]);
	close(run_.foreign[0]);
	close(run_.foreign[1]);
	run_.story->open = false;
}

START_TEST(same_as_without_kvm)
{
	const struct shape *shape = &shapes[_i];
	uint64_t seed = env_number("KAGE_SEED", 1), sequences = env_number("KAGE_SEQUENCES", times(3, 1));
	uint64_t steps = env_number("KAGE_STEPS", times(100, 20));

	need(shape->policy != KAGE_KVM_EXACT || can_exact(), "this kernel cannot do exact");
	for (uint64_t i = 0; i < sequences; i++) {
		start(shape, seed + i);
		for (; run_.story->step < steps; run_.story->step++)
			one_step();
		finish();
	}
	printf("%s: %lu steps, %lu refused, %lu merged, %lu host-private, %lu adopted, %lu traps, %lu writes "
	       "by payloads\n",
	       shape->name, total.steps, total.refused, total.merged, total.host_private, total.adopted,
	       total.traps, total.guest_writes);
	fflush(stdout);
	if (sequences * steps < 300)
		return;
	ck_assert_uint_gt(total.merged, 0);
	ck_assert_uint_gt(total.adopted, 0);
	ck_assert_uint_gt(shape->policy == KAGE_KVM_EXACT ? total.traps : total.host_private, 0);
	ck_assert(!shape->guests || total.guest_writes > 0);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("kvm differential");
	int r;

	skip_without_kvm();
	probe();
	stories = mmap(NULL, COUNT(shapes) * sizeof(*stories), PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (stories == MAP_FAILED)
		return EXIT_FAILURE;
	for (unsigned i = 0; i < COUNT(shapes); i++) {
		TCase *tc = tcase_create(shapes[i].name);

		tcase_set_timeout(tc,
				  60 + env_number("KAGE_SEQUENCES", 0) * env_number("KAGE_STEPS", 100) / 10);
		tcase_add_loop_test(tc, same_as_without_kvm, (int)i, (int)i + 1);
		suite_add_tcase(suite, tc);
	}
	r = run(suite);
	stories_tell();
	return r;
}
