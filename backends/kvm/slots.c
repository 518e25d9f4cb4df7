/* SPDX-License-Identifier: MIT */
/*
 * Memory slots: KVM's table gpa -> hva of this process, and its dirty bitmaps.
 *
 * `slot` is indexed by id. `order` holds every index once: first those in use,
 * by gfn, for searches by address; behind them the free ones, a stack.
 *
 * Invariants:
 *  K1  slot[] says what KVM has: it changes after the ioctl (or the callback)
 *      succeeded.
 *  K2  slots in use do not overlap, and order[0 .. used) ascends by gfn.
 *  K3  while `logging`, every slot has KVM_MEM_LOG_DIRTY_PAGES, and with
 *      config.bitmap the buffer holds the bits of the largest one.
 *  K4  a page taken from the dirty log is write-protected again before mark() hears of it:
 *
 *        this thread                      guest                another consumer
 *        KVM_GET_DIRTY_LOG: X is dirty
 *        KVM_CLEAR_DIRTY_LOG
 *                                         writes X: logged anew
 *        mark(X)
 *                                                              takes X's mark, reads X
 *
 *      With mark(X) first, the consumer could read X before a write that CLEAR then forgets. (A page that is left in
 *      the log is marked without that: a write that the mark does not cover is still in the log.)
 *
 * Locks: none taken; the caller's lock is around all calls on one `struct slots`.
 *
 * Why KVM_CLEAR_DIRTY_LOG is always called: only whoever enables
 * KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (the VMM) knows whether KVM_GET_DIRTY_LOG
 * clears; KVM has no query. Enabling it here would change what
 * KVM_GET_DIRTY_LOG means for the VMM's own slots. KVM_CLEAR_DIRTY_LOG works
 * in both modes: where GET has cleared already, it protects again what was
 * written in between, which the coming mark covers (K4). It is left out where nothing is dirty.
 */
#include <linux/kvm.h>
#include <sys/ioctl.h>

#include "slots.h"

#define ROOM_FIRST     16u
#define SLOT_MAX_UNITS (((uint64_t)1 << 31) - 1) /* KVM_MEM_MAX_NR_PAGES of the kernel */

/* KVM counts a slot in pages of the host. */
static uint64_t slot_units(const struct slots *s, const struct slot *slot)
{
	return slot->npages / s->config.unit;
}

static int check_extension(int vmfd, unsigned long cap)
{
	int r = ioctl(vmfd, KVM_CHECK_EXTENSION, cap);

	return r < 0 ? -errno : r;
}

/* Only a VM descriptor looks at the argument of this ioctl, and it finds nothing there. */
bool slots_is_vm(int vmfd)
{
	return ioctl(vmfd, KVM_GET_DIRTY_LOG, NULL) < 0 && errno == EFAULT;
}

/* Old kernels do not say how many: 32 (Documentation/virt/kvm/api.rst, KVM_CAP_NR_MEMSLOTS). */
static uint32_t kernel_slots(int vmfd)
{
	int r = check_extension(vmfd, KVM_CAP_NR_MEMSLOTS);

	return r > 0 ? (uint32_t)r : 32;
}

int slots_init(struct slots *s, struct env *env, int vmfd, const struct slots_config *config)
{
	uint32_t have;

	if (!slots_is_vm(vmfd)) {
		env_log(env, KAGE_LOG_WARN, "kvm: descriptor %d is no KVM VM", vmfd);
		return -EINVAL;
	}
	have = kernel_slots(vmfd);
	if (config->first >= have || config->count > have - config->first) {
		env_log(env, KAGE_LOG_WARN, "kvm: %u slots from %u: KVM has %u", config->count, config->first,
			have);
		return -EINVAL;
	}
	*s = (struct slots){.env = env, .vmfd = vmfd, .config = *config};
	if (!s->config.count)
		s->config.count = have - config->first;
	if (!s->config.unit)
		s->config.unit = 1;
	s->clear = check_extension(vmfd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) > 0;
	return 0;
}

/* -- what KVM is told ---------------------------------------------------------- */

static int slot_ioctl(struct slots *s, const struct kage_kvm_slot *k)
{
	struct kvm_userspace_memory_region region = {
	    .slot = k->slot,
	    .flags = k->flags,
	    .guest_phys_addr = k->gpa,
	    .memory_size = k->len,
	    .userspace_addr = k->hva,
	};

	return ioctl(s->vmfd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? -errno : 0;
}

/* Makes KVM's slot `index` what `to` says, and then our record of it (K1). */
static int slot_set(struct slots *s, uint32_t index, const struct slot *to)
{
	struct kage_kvm_slot k = {
	    .slot = s->config.first + index,
	    .flags = to->flags,
	    .gpa = gfn_gpa(to->gfn).v,
	    .len = to->npages << PAGE_SHIFT,
	    .hva = (uintptr_t)to->hva,
	};
	int r = s->config.set_slot ? s->config.set_slot(s->config.opaque, &k) : slot_ioctl(s, &k);

	if (r) {
		env_log(s->env, KAGE_LOG_WARN, "kvm: slot %u, gpa %#llx, %llu bytes, flags %#x: %s says %d",
			k.slot, (unsigned long long)k.gpa, (unsigned long long)k.len, k.flags,
			s->config.set_slot ? "set_slot" : "KVM_SET_USER_MEMORY_REGION", r);
		return r < 0 ? r : -EINVAL;
	}
	s->slot[index] = *to;
	return 0;
}

static int slot_delete(struct slots *s, uint32_t index)
{
	struct slot none = {.gfn = s->slot[index].gfn, .hva = s->slot[index].hva};

	return slot_set(s, index, &none);
}

/* -- room ------------------------------------------------------------------------ */

static int room_grow(struct slots *s, uint32_t n)
{
	uint32_t room = MIN(MAX(MAX(2 * s->room, ROOM_FIRST), s->used + n), s->config.count);
	struct slot *slot;
	uint32_t *order;

	if (n <= s->room - s->used)
		return 0;
	slot = env_alloc(s->env, room * sizeof(*slot));
	order = env_alloc(s->env, room * sizeof(*order));
	if (!slot || !order) {
		env_free(s->env, slot, room * sizeof(*slot));
		env_free(s->env, order, room * sizeof(*order));
		return -ENOMEM;
	}
	if (s->room) {
		memcpy(slot, s->slot, s->room * sizeof(*slot));
		memcpy(order, s->order, s->room * sizeof(*order));
	}
	for (uint32_t i = s->room; i < room; i++)
		order[i] = i;
	env_free(s->env, s->slot, s->room * sizeof(*slot));
	env_free(s->env, s->order, s->room * sizeof(*order));
	s->slot = slot;
	s->order = order;
	s->room = room;
	return 0;
}

static void bitmap_replace(struct slots *s, uint64_t *bitmap, uint64_t units)
{
	env_free(s->env, s->bitmap, ALIGN_UP(s->bitmap_units, 64) / 8);
	s->bitmap = bitmap;
	s->bitmap_units = units;
}

static int bitmap_grow(struct slots *s, uint64_t pages)
{
	uint64_t *bitmap, units = ALIGN_UP(pages, (uint64_t)s->config.unit) / s->config.unit;

	if (!s->config.bitmap || units <= s->bitmap_units)
		return 0;
	bitmap = env_alloc(s->env, ALIGN_UP(units, 64) / 8);
	if (!bitmap)
		return -ENOMEM;
	bitmap_replace(s, bitmap, units);
	return 0;
}

int slots_reserve(struct slots *s, uint32_t n, uint64_t largest)
{
	int r;

	if (n > s->config.count - s->used) {
		env_log(s->env, KAGE_LOG_WARN, "kvm: %u slots in use, %u more wanted, %u allowed", s->used, n,
			s->config.count);
		return -ENOSPC;
	}
	r = s->logging ? bitmap_grow(s, largest) : 0;
	return r ? r : room_grow(s, n);
}

void slots_finish(struct slots *s)
{
	for (uint32_t i = 0; i < s->used; i++)
		slot_delete(s, s->order[i]);
	env_free(s->env, s->slot, s->room * sizeof(*s->slot));
	env_free(s->env, s->order, s->room * sizeof(*s->order));
	bitmap_replace(s, NULL, 0);
	*s = (struct slots){.vmfd = -1};
}

/* -- adding and removing --------------------------------------------------------- */

/* The first slot in `order` that ends after gfn; s->used if none does. */
static uint32_t slots_search(const struct slots *s, gfn_t gfn)
{
	uint32_t lo = 0, hi = s->used;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;
		const struct slot *slot = &s->slot[s->order[mid]];

		if (slot->gfn.v + slot->npages <= gfn.v)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

int slots_add(struct slots *s, gfn_t gfn, uint64_t npages, void *hva, bool readonly)
{
	struct slot slot = {.gfn = gfn, .npages = npages, .hva = hva};
	uint32_t at, index;
	int r;

	if (!npages || (gfn.v | npages) % s->config.unit || slot_units(s, &slot) > SLOT_MAX_UNITS)
		return -EINVAL;
	if (readonly && !s->config.readonly)
		return -EOPNOTSUPP;
	r = slots_reserve(s, 1, npages);
	if (r)
		return r;
	at = slots_search(s, gfn);
	if (at < s->used && s->slot[s->order[at]].gfn.v < gfn.v + npages)
		return -EEXIST;
	slot.flags = (readonly ? KVM_MEM_READONLY : 0) | (s->logging ? KVM_MEM_LOG_DIRTY_PAGES : 0);
	index = s->order[s->used];
	r = slot_set(s, index, &slot);
	if (r)
		return r;
	memmove(&s->order[at + 1], &s->order[at], (s->used - at) * sizeof(*s->order));
	s->order[at] = index;
	s->used++;
	return 0;
}

int slots_remove(struct slots *s, gfn_t gfn, uint64_t npages)
{
	uint32_t at = slots_search(s, gfn), index;
	int r;

	if (at == s->used)
		return -ENOENT;
	index = s->order[at];
	if (s->slot[index].gfn.v != gfn.v || s->slot[index].npages != npages)
		return -ENOENT;
	r = slot_delete(s, index);
	if (r)
		return r;
	s->used--;
	memmove(&s->order[at], &s->order[at + 1], (s->used - at) * sizeof(*s->order));
	s->order[s->used] = index;
	return 0;
}

bool slots_gfn(const struct slots *s, uint32_t id, uint64_t offset, gfn_t *gfn)
{
	uint32_t index = (id & 0xffff) - s->config.first; /* bits 31:16 are the address space */

	if (index >= s->room || offset >= slot_units(s, &s->slot[index]))
		return false;
	*gfn = gfn_add(s->slot[index].gfn, offset * s->config.unit);
	return true;
}

/* -- the dirty log --------------------------------------------------------------- */

/* KVM allows this flag to change in place, under running vCPUs. */
static int slot_log(struct slots *s, uint32_t index, bool on)
{
	struct slot slot = s->slot[index];

	if (on)
		slot.flags |= KVM_MEM_LOG_DIRTY_PAGES;
	else
		slot.flags &= ~KVM_MEM_LOG_DIRTY_PAGES;
	return slot.flags == s->slot[index].flags ? 0 : slot_set(s, index, &slot);
}

static uint64_t largest_slot(const struct slots *s)
{
	uint64_t largest = 0;

	for (uint32_t i = 0; i < s->used; i++)
		largest = MAX(largest, s->slot[s->order[i]].npages);
	return largest;
}

static int log_get(struct slots *s, uint32_t index)
{
	struct kvm_dirty_log log = {.slot = s->config.first + index, .dirty_bitmap = s->bitmap};

	return ioctl(s->vmfd, KVM_GET_DIRTY_LOG, &log) < 0 ? -errno : 0;
}

/* Clears words [first, end) of what log_get() found. KVM wants multiples of 64 units, but at the end. */
static int log_clear(struct slots *s, uint32_t index, uint64_t first, uint64_t end)
{
	struct kvm_clear_dirty_log log = {
	    .slot = s->config.first + index,
	    .first_page = first * 64,
	    .num_pages = (uint32_t)(MIN(end * 64, slot_units(s, &s->slot[index])) - first * 64),
	    .dirty_bitmap = s->bitmap + first,
	};

	return ioctl(s->vmfd, KVM_CLEAR_DIRTY_LOG, &log) < 0 ? -errno : 0;
}

/* Words [*first, *end) hold all that is set in a slot's bitmap. */
static void bitmap_span(const struct slots *s, uint32_t index, uint64_t *first, uint64_t *end)
{
	uint64_t words = ALIGN_UP(slot_units(s, &s->slot[index]), 64) / 64;

	*first = *end = 0;
	while (words && !s->bitmap[words - 1])
		words--;
	if (!words)
		return;
	while (!s->bitmap[*first])
		++*first;
	*end = words;
}

/* Fetches a slot's log and has its pages protected again. Words [*first, *end) hold all that is set. */
static int log_take(struct slots *s, uint32_t index, uint64_t *first, uint64_t *end)
{
	int r = log_get(s, index);

	*first = *end = 0;
	if (r)
		return r;
	bitmap_span(s, index, first, end);
	return s->clear && *first < *end ? log_clear(s, index, *first, *end) : 0;
}

/* Passes on the runs of set bits of words [first, end); a run may span many words. */
static void mark_runs(const struct slots *s, uint64_t first, uint64_t end, gfn_t base, slots_mark_fn *mark, void *arg)
{
	uint64_t unit = s->config.unit;
	uint64_t from = 0, to = 0; /* the run that is open, empty if there is none */

	for (uint64_t w = first; w < end; w++) {
		uint64_t bits = s->bitmap[w];

		while (bits) {
			unsigned at = __builtin_ctzll(bits);
			uint64_t rest = ~(bits >> at), len = rest ? __builtin_ctzll(rest) : 64;

			if (w * 64 + at != to) {
				if (from != to)
					mark(arg, gfn_add(base, from * unit), (to - from) * unit);
				from = w * 64 + at;
			}
			to = w * 64 + at + len;
			bits = at + len == 64 ? 0 : bits & (~(uint64_t)0 << (at + len));
		}
	}
	if (from != to)
		mark(arg, gfn_add(base, from * unit), (to - from) * unit);
}

/* Marks the pages of `left` among words [first, end), and takes their bits out: they stay in the log. */
static void leave(struct slots *s, uint64_t first, uint64_t end, gfn_t base, const struct dirty_left *left, slots_mark_fn *mark,
		  void *arg)
{
	for (uint64_t w = first; w < end; w++) {
		gfn_t gfn = gfn_add(base, w * 64);
		uint64_t bits = s->bitmap[w] ? s->bitmap[w] & left->word(left, gfn) : 0;

		s->bitmap[w] &= ~bits;
		for (; bits; bits &= bits - 1)
			mark(arg, gfn_add(gfn, (unsigned)__builtin_ctzll(bits)), 1);
	}
}

/* log_take(), but for what is left. */
static int log_take_but(struct slots *s, uint32_t index, const struct dirty_left *left, uint64_t *first, uint64_t *end,
			slots_mark_fn *mark, void *arg)
{
	int r = log_get(s, index);

	*first = *end = 0;
	if (r)
		return r;
	bitmap_span(s, index, first, end);
	leave(s, *first, *end, s->slot[index].gfn, left, mark, arg);
	bitmap_span(s, index, first, end);
	return *first < *end ? log_clear(s, index, *first, *end) : 0;
}

/* All that may have been written in a slot. Without a log, or if KVM does not give it, that is all of it. */
static int slot_dirty(struct slots *s, uint32_t index, const struct dirty_left *left, slots_mark_fn *mark, void *arg)
{
	const struct slot *slot = &s->slot[index];
	uint64_t first, end;
	int r;

	if (slot->flags & KVM_MEM_READONLY)
		return 0;
	if (!s->config.bitmap) {
		mark(arg, slot->gfn, slot->npages);
		return 0;
	}
	if (left && s->clear && s->config.unit == 1)
		r = log_take_but(s, index, left, &first, &end, mark, arg);
	else
		r = log_take(s, index, &first, &end);
	if (r) {
		env_log(s->env, KAGE_LOG_ERROR, "kvm: dirty log of slot %u: %d", s->config.first + index, r);
		mark(arg, slot->gfn, slot->npages);
		return r;
	}
	mark_runs(s, first, end, slot->gfn, mark, arg);
	return 0;
}

int slots_dirty(struct slots *s, gfn_t start, gfn_t end, slots_mark_fn *mark, void *arg)
{
	return slots_dirty_but(s, start, end, NULL, mark, arg);
}

int slots_dirty_but(struct slots *s, gfn_t start, gfn_t end, const struct dirty_left *left, slots_mark_fn *mark, void *arg)
{
	int err = 0;

	if (!s->logging)
		return 0;
	for (uint32_t i = slots_search(s, start); i < s->used; i++) {
		int r;

		if (s->slot[s->order[i]].gfn.v >= end.v)
			break;
		r = slot_dirty(s, s->order[i], left, mark, arg);
		err = err ? err : r;
	}
	return err;
}

/*
 * Empties the logs, and so finds out whether KVM gives them at all. Where the
 * VMM asked for KVM_DIRTY_LOG_INITIALLY_SET, a new log says that everything is dirty.
 */
static int logs_drain(struct slots *s)
{
	int r = 0;

	for (uint32_t i = 0; r == 0 && s->config.bitmap && i < s->used; i++) {
		uint64_t first, end;

		r = log_take(s, s->order[i], &first, &end);
		if (r)
			env_log(s->env, KAGE_LOG_WARN, "kvm: dirty log of slot %u: %d",
				s->config.first + s->order[i], r);
	}
	return r;
}

/* All slots or none. */
static int logs_set(struct slots *s, bool on)
{
	for (uint32_t i = 0; i < s->used; i++) {
		int r = slot_log(s, s->order[i], on);

		if (r) {
			/* a slot that refuses this too is unlike the others, and slots_dirty() copes */
			while (i--)
				slot_log(s, s->order[i], !on);
			return r;
		}
	}
	return 0;
}

int slots_log(struct slots *s, bool on)
{
	int r = on ? bitmap_grow(s, largest_slot(s)) : 0;

	if (r || on == s->logging)
		return r;
	r = logs_set(s, on);
	if (r)
		return r;
	r = on ? logs_drain(s) : 0;
	if (r) {
		logs_set(s, false);
		return r;
	}
	s->logging = on;
	if (!on)
		bitmap_replace(s, NULL, 0);
	return 0;
}
