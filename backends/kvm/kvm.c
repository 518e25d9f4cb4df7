/* SPDX-License-Identifier: MIT */
/*
 * The public calls of kage/kvm.h: attaching a guest to a VM, taking it off again,
 * and what the VMM asks in between. See internal.h for the read order.
 *
 * Locks taken: attach and detach hold the guest's family and range for writing,
 * so that no change, fault or step meets a mirror that comes or goes.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "api/engine.h"
#include "arch.h"
#include "compat.h"
#include "internal.h"
#include "mm/tenant.h"

/* -- policy ------------------------------------------------------------------------------ */

static bool exact_possible(const struct kage_kvm *k)
{
	return !k->mirror.abandoned && feature_used(&k->features, KAGE_KVM_USERFAULTFD) && feature_used(&k->features, KAGE_KVM_UFFD_WP) &&
	       feature_used(&k->features, KAGE_KVM_UFFD_MINOR) &&
	       feature_used(&k->features, KAGE_KVM_UFFD_CONTINUE_WP) && feature_used(&k->features, KAGE_KVM_PAGEMAP);
}

/* The one place that decides. Other listeners: the shadow tables of vCPUs, or the embedder's own. */
static int policy_choose(struct kage_kvm *k)
{
	bool possible = exact_possible(k);
	bool listeners = notify_listening(&k->mm->notify) > (k->mm->mirror == &k->mirror);

	k->mirror.exact = false;
	switch ((enum kage_kvm_policy)k->config.policy) {
	case KAGE_KVM_NATIVE:
		k->policy_why = "asked for";
		return 0;
	case KAGE_KVM_EXACT:
		if (!possible) {
			env_log(k->env, KAGE_LOG_ERROR, "exact policy needs userfaultfd with write protection, minor faults and "
				"CONTINUE_MODE_WP, and /proc/self/pagemap");
			return -EOPNOTSUPP;
		}
		k->mirror.exact = true;
		k->policy_why = "asked for";
		return 0;
	case KAGE_KVM_AUTO:
		k->mirror.exact = possible && listeners;
		k->policy_why = !listeners ? "nothing but KVM mirrors the guest" :
				possible   ? "others listen to the guest, and the kernel can trap" :
					     "others listen to the guest, but the kernel cannot trap";
		return 0;
	default:
		return -EINVAL;
	}
}

bool kvm_trapped(const struct kage_kvm *k)
{
	const struct regions *set;
	bool trapped = false;

	rcu_enter();
	set = load_acquire(&k->mm->regions);
	for (unsigned i = 0; i < set->count; i++)
		trapped |= (set->r[i].flags & KAGE_REGION_TRAP) != 0;
	rcu_leave();
	return trapped;
}

/* -- attach -------------------------------------------------------------------------------- */

static int open_trap(struct kage_kvm *k)
{
	int r;

	k->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (k->kick < 0)
		return -errno;
	if (!feature_used(&k->features, KAGE_KVM_USERFAULTFD))
		return kvm_trapped(k) ? -EOPNOTSUPP : 0;
	r = uffd_open(&k->uffd, &k->features, false);
	if (r)
		return r;
	k->wp = feature_used(&k->features, KAGE_KVM_UFFD_WP);
	return 0;
}

static int open_slots(struct kage_kvm *k)
{
	struct slots_config c = {
		.first = k->config.slot_first, .count = k->config.slot_count,
		.readonly = feature_used(&k->features, KAGE_KVM_READONLY_SLOT),
		.bitmap = feature_used(&k->features, KAGE_KVM_DIRTY_LOG) && !k->config.dirty_ring_bytes,
		.unit = (uint32_t)(host_page_size() >> PAGE_SHIFT),
		.set_slot = k->config.set_slot, .opaque = k->config.opaque,
	};
	int r = slots_init(&k->slots, k->env, k->vmfd, &c);

	if (r)
		return r;
	k->ring = feature_used(&k->features, KAGE_KVM_DIRTY_RING) && k->config.dirty_ring_bytes;
	return k->ring ? rings_init(&k->rings, k->env, k->vmfd) : 0;
}

#define MAP_COUNT_DEFAULT 65530

/* 3/4 of what the kernel allows a process. */
static uint32_t budget_default(const struct kage_kvm *k)
{
	char text[32];
	long n = MAP_COUNT_DEFAULT;
	ssize_t got;
	int fd = k->config.flags & KAGE_KVM_NO_OPEN ? -1 : open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);

	if (fd >= 0) {
		got = read(fd, text, sizeof(text) - 1);
		if (got > 0) {
			text[got] = 0;
			n = atol(text);
		}
		close(fd);
	}
	return (uint32_t)MIN(n > 0 ? n : MAP_COUNT_DEFAULT, (long)UINT32_MAX) / 4 * 3;
}

static void budget_join(struct kage_kvm *k)
{
	struct host *h = k->mm->host;
	uint64_t none = 0;

	atomic_compare_exchange_strong(&h->map_budget, &none, k->config.map_budget ? k->config.map_budget : budget_default(k));
	atomic_fetch_add(&h->mirrors, 1);
}

static int homes_fill(struct kage_kvm *k)
{
	const struct regions *set = k->mm->regions;
	int r = 0;

	for (unsigned i = 0; r == 0 && !k->mm->host->limited && i < set->count; i++)
		r = mm_fill(k->mm, set->r[i].start, region_end(&set->r[i]));
	return r;
}

/*
 * Granules whose pages lay here and there have been copied into their windows (mirror_sync()): that is where adoption
 * takes them home from, as it does with what the kernel made private. Nobody writes yet.
 */
static int gathered_adopt(struct kage_kvm *k)
{
	bool blocks = k->mirror.blocks;
	int r;

	k->detaching = k->mirror.blocks = true;
	r = mm_adopt_diverged(k->mm, GFN(0), GFN((uint64_t)1 << GFN_BITS));
	k->detaching = false;
	k->mirror.blocks = blocks;
	if (r == 0)
		return 0;
	store_release(&k->mm->mirror, NULL);
	notify_unregister(&k->notifier);
	return r;
}

/* The guest's memory appears in windows and slots. Its family and range are held for writing. */
static int attach_held(struct kage_kvm *k)
{
	struct mm *mm = k->mm;
	int r;

	if (mm->mirror || mm_dirty_accessed(mm)) /* KVM does not say who read */
		return -EBUSY;
	r = policy_choose(k);
	if (r == 0)
		r = open_trap(k);
	if (r)
		return r;
	k->mirror.blocks = k->wp || k->config.pause;
	r = homes_fill(k);
	if (r == 0)
		r = open_slots(k);
	if (r)
		return r;
	r = window_prepare(&k->mirror, mm->regions);
	if (r == 0) {
		lock_take(&k->lock);
		k->attaching = true;
		r = window_show_all(k);
		k->attaching = false;
		lock_drop(&k->lock);
		if (r)
			window_cancel(&k->mirror);
	}
	if (r == 0 && mm_dirty_logged(mm))
		r = mirror_track(&k->mirror);
	if (r == 0) /* shadow tables that watch guest tables: KVM's vCPUs write to those without a word */
		r = mm_tell(mm, GFN(0), GFN((uint64_t)1 << GFN_BITS), &k->mirror);
	if (r == 0)
		r = notify_register(&mm->notify, &k->notifier, &kvm_notifier_ops);
	if (r)
		return r;
	window_commit(&k->mirror, mm->regions);
	store_release(&mm->mirror, &k->mirror);
	return k->gathered ? gathered_adopt(k) : 0;
}

static void kvm_free(struct kage_kvm *k)
{
	if (k->slots.env)
		window_finish(k);
	if (k->rings.env)
		rings_finish(&k->rings);
	if (k->uffd.fd >= 0)
		uffd_close(&k->uffd);
	if (k->kick >= 0)
		close(k->kick);
	ballast_drop(k);
	features_finish(&k->features);
	env_free(k->env, k->waiting, k->waiting_room * sizeof(*k->waiting));
	env_free_rcu(k->env, k, sizeof(*k), &k->defer); /* lock-free lookups ask what policy it has */
}

static int kvm_config(struct kage_kvm_config *c, const struct kage_kvm_config *config)
{
	uint32_t flags = KAGE_KVM_PAGEMAP_FD | KAGE_KVM_MAPS_FD | KAGE_KVM_UFFD_FD | KAGE_KVM_NO_OPEN;
	int r = config ? config_check(config, sizeof(*c), sizeof(*c)) : 0;

	if (r)
		return r;
	config_copy(c, config, sizeof(*c));
	if (c->flags & ~flags || c->policy > KAGE_KVM_EXACT || c->granule & (c->granule - 1) ||
	    c->granule > MIRROR_GRANULE_MAX << PAGE_SHIFT || c->feature_mask >> KAGE_KVM_FEATURES ||
	    !c->pause != !c->resume)
		return -EINVAL;
	return 0;
}

static int kvm_new(struct kage_vm *vm, int vmfd, const struct kage_kvm_config *config, struct kage_kvm **out)
{
	struct kage_kvm_config c;
	struct kage_kvm *k;
	int r = kvm_config(&c, config);

	if (r)
		return r;
	k = env_alloc(&vm->engine->env, sizeof(*k));
	if (!k)
		return -ENOMEM;
	k->env = &vm->engine->env;
	k->vm = vm;
	k->mm = &vm->mm;
	k->pool = vm->mm.host->pool;
	k->vmfd = vmfd;
	k->config = c;
	k->mirror.ops = &kvm_mirror_ops;
	k->mirror.mm = k->mm;
	k->mirror.granule = (unsigned)(MAX((uint64_t)c.granule, host_page_size()) >> PAGE_SHIFT);
	k->uffd.fd = k->kick = -1;
	lock_init(&k->slots_lock, RANK_SLOTS, k->mm->id);
	lock_init(&k->lock, RANK_SHADOW, k->mm->id);
	lock_init(&k->pause_lock, RANK_NONE, 0);
	runs_init(&k->runs, k->pool);
	r = k->mirror.granule > MIRROR_GRANULE_MAX ? -EOPNOTSUPP : arch_guest_ok(vmfd);
	if (r == 0)
		r = features_probe(&k->features, k->env, &k->config, vmfd);
	if (r) {
		env_free(k->env, k, sizeof(*k));
		return r;
	}
	*out = k;
	return 0;
}

static int kvm_attach(struct kage_vm *vm, int vmfd, const struct kage_kvm_config *config, struct kage_kvm **out)
{
	struct kage_kvm *k;
	int r;

	if (!out)
		return -EINVAL;
	if (!pool_has_files(vm->mm.host->pool)) {
		env_log(&vm->engine->env, KAGE_LOG_ERROR, "KVM needs an engine with KAGE_BACKING_MEMFD");
		return -EINVAL;
	}
	if (vm->mm.family->tenant->reserve) {
		env_log(&vm->engine->env, KAGE_LOG_ERROR, "KVM: the guest's merge domain is hardened, and reads cannot be made to trap");
		return -EOPNOTSUPP;
	}
	r = kvm_new(vm, vmfd, config, &k);
	if (r)
		return r;
	budget_join(k);
	ballast_fill(k);
	brlock_write(&vm->mm.family->lock);
	brlock_write(&vm->mm.range);
	r = attach_held(k);
	brlock_write_drop(&vm->mm.range);
	brlock_write_drop(&vm->mm.family->lock);
	if (r) {
		atomic_fetch_sub(&k->mm->host->mirrors, 1);
		kvm_free(k);
		return r;
	}
	*out = k;
	return KAGE_OK;
}

int kage_kvm_attach(struct kage_vm *vm, int vmfd, const struct kage_kvm_config *config, struct kage_kvm **out)
{
	return vm ? api_result(vm->engine, __func__, 0, 0, kvm_attach(vm, vmfd, config, out)) : -EINVAL;
}

/* -- detach ---------------------------------------------------------------------------------- */

static int kvm_detach(struct kage_kvm *k)
{
	struct mm *mm = k->mm;
	bool blocks;
	int r;

	if (atomic_load(&k->helper))
		return -EBUSY;
	brlock_write(&mm->family->lock);
	brlock_write(&mm->range);
	lock_take(&k->lock);
	k->detaching = true; /* no vCPU runs: that is the caller's promise */
	blocks = k->mirror.blocks;
	k->mirror.blocks = true;
	lock_drop(&k->lock);
	if (mm_dirty_logged(mm))
		kvm_mirror_ops.harvest(&k->mirror, GFN(0), GFN((uint64_t)1 << GFN_BITS), NULL);
	r = mm_adopt_diverged(mm, GFN(0), GFN((uint64_t)1 << GFN_BITS));
	if (r == 0) {
		store_release(&mm->mirror, NULL);
		notify_unregister(&k->notifier);
	} else {
		k->mirror.blocks = blocks;
		k->detaching = false;
	}
	brlock_write_drop(&mm->range);
	brlock_write_drop(&mm->family->lock);
	if (r)
		return r;
	atomic_fetch_sub(&mm->host->mirrors, 1);
	kvm_free(k);
	return KAGE_OK;
}

int kage_kvm_detach(struct kage_kvm *k)
{
	struct kage_engine *e = k ? k->vm->engine : NULL;
	int r = k ? kvm_detach(k) : KAGE_OK;

	if (e && !r)
		engine_settle(e);
	return api_result(e, __func__, 0, 0, r);
}

/* -- another policy ----------------------------------------------------------------------------- */

static int policy_remap(struct kage_kvm *k)
{
	const struct run *run;
	int r = 0;

	lock_take(&k->lock);
	for (gfn_t at = GFN(0); r == 0 && (run = runs_from(&k->runs, at));) {
		struct run copy = *run;

		at = run_end(&copy);
		if (copy.kind != RUN_SHARED)
			r = mirror_map(k, &copy);
	}
	lock_drop(&k->lock);
	return r;
}

static int any_diverged(struct mm *mm, gfn_t base, const uint64_t map[MIRROR_WORDS], void *arg)
{
	return -EAGAIN;
}

/* The guest stands, as far as it can be made to. Its family and range are held for writing. */
static int policy_change(struct kage_kvm *k, uint32_t policy)
{
	gfn_t all = GFN((uint64_t)1 << GFN_BITS);
	uint32_t before = k->config.policy;
	bool exact = k->mirror.exact;
	int r = mm_adopt_diverged(k->mm, GFN(0), all);

	if (r)
		return r;
	k->config.policy = policy;
	r = policy_choose(k);
	if (r == 0 && k->mirror.exact != exact)
		r = mirror_each_diverged(&k->mirror, GFN(0), all, any_diverged, NULL);
	if (r == 0 && k->mirror.exact != exact)
		r = policy_remap(k);
	if (r) {
		k->config.policy = before;
		k->mirror.exact = exact;
	}
	return r;
}

static int kvm_set_policy(struct kage_kvm *k, uint32_t policy)
{
	int r;

	if (policy > KAGE_KVM_EXACT)
		return -EINVAL;
	if (k->mirror.abandoned && policy == KAGE_KVM_EXACT)
		return -EOPNOTSUPP;
	r = kvm_mirror_ops.stop(&k->mirror);
	if (r)
		return r;
	brlock_write(&k->mm->family->lock);
	brlock_write(&k->mm->range);
	r = policy_change(k, policy);
	brlock_write_drop(&k->mm->range);
	brlock_write_drop(&k->mm->family->lock);
	kvm_mirror_ops.go(&k->mirror);
	return r;
}

int kage_kvm_set_policy(struct kage_kvm *k, uint32_t policy)
{
	return k ? api_result(k->vm->engine, __func__, 0, 0, kvm_set_policy(k, policy)) : -EINVAL;
}

/* -- what the VMM asks -------------------------------------------------------------------------- */

void *kage_kvm_window(struct kage_kvm *k, uint64_t gpa, uint64_t len)
{
	gfn_t gfn = gpa_gfn(GPA(gpa));
	const struct window *w;
	uint64_t offset, bytes;
	void *at = NULL;

	if (!k || !len)
		return NULL;
	lock_take(&k->lock);
	w = window_find(k, gfn);
	if (w) {
		offset = gpa - gfn_gpa(w->gfn).v;
		bytes = w->npages << PAGE_SHIFT;
		if (len <= bytes - offset && window_whole(k, gfn, gpa_gfn(GPA(gpa + len - 1))))
			at = w->hva + offset;
	}
	lock_drop(&k->lock);
	return at;
}

int kage_kvm_run_failed(struct kage_kvm *k, int vcpufd, const struct kvm_run *run, int err)
{
	int r;

	if (!k || !run || err <= 0)
		return -EINVAL;
	if (err != EFAULT)
		return -err;
	lock_take(&k->lock);
	if (run->exit_reason == KVM_EXIT_MEMORY_FAULT && feature_used(&k->features, KAGE_KVM_MEMORY_FAULT))
		r = window_find(k, gpa_gfn(GPA(KAGE_KVM_RUN_MEMORY_FAULT(run)->gpa))) ? mirror_repair(k) : 0;
	else
		r = mirror_repair(k);
	lock_drop(&k->lock);
	if (r <= 0)
		return api_result(k->vm->engine, __func__, 0, 0, -err);
	atomic_fetch_add(&k->broken, 1);
	env_log(k->env, KAGE_LOG_ERROR, "mm %llu: somebody else has changed a window: %d pieces put right",
		(unsigned long long)k->mm->id, r);
	return KAGE_RETRY;
}

int kage_kvm_load_regs(struct kage_vcpu *vcpu, int vcpufd)
{
	arch_regs regs;
	int r = vcpu ? arch_vcpu_regs(vcpufd, &regs) : -EINVAL;

	return r ? r : kage_vcpu_set_regs(vcpu, &regs, sizeof(regs));
}

int kage_kvm_add_vcpu(struct kage_kvm *k, int vcpufd)
{
	int r = -ENOENT;

	if (!k)
		return -EINVAL;
	lock_take(&k->slots_lock);
	if (k->ring)
		r = ring_add(&k->rings, vcpufd, k->config.dirty_ring_bytes);
	lock_drop(&k->slots_lock);
	return api_result(k->vm->engine, __func__, 0, 0, r);
}

int kage_kvm_sync_dirty(struct kage_kvm *k)
{
	struct brlock_held held;
	int r;

	if (!k)
		return -EINVAL;
	held = brlock_read(&k->mm->family->lock);
	r = kvm_mirror_ops.harvest(&k->mirror, GFN(0), GFN((uint64_t)1 << GFN_BITS), NULL);
	brlock_read_drop(&k->mm->family->lock, held);
	return api_result(k->vm->engine, __func__, 0, 0, r);
}

int kage_kvm_reconcile(struct kage_kvm *k, uint32_t flags)
{
	int64_t r;

	if (!k || flags & ~(uint32_t)KAGE_KVM_ADOPT)
		return -EINVAL;
	r = mirror_reconcile(&k->mirror, flags & KAGE_KVM_ADOPT);
	engine_settle(k->vm->engine);
	return api_result(k->vm->engine, __func__, 0, 0, (int)MIN(r, (int64_t)INT32_MAX));
}

int kage_kvm_info(struct kage_kvm *k, struct kage_kvm_info *info)
{
	struct kage_kvm_info i = { .size = sizeof(i) };
	uint32_t size;
	int r = k && info ? config_check(info, sizeof(i), sizeof(i)) : -EINVAL;

	if (r)
		return r;
	size = info->size;
	lock_take(&k->slots_lock);
	i.slots = k->slots.used;
	lock_drop(&k->slots_lock);
	lock_take(&k->lock);
	i.policy = k->mirror.exact ? KAGE_KVM_EXACT : KAGE_KVM_NATIVE;
	i.policy_why = k->policy_why;
	i.mappings = k->runs.count;
	i.map_budget = mirror_share(k);
	memcpy(i.feature, k->features.info, sizeof(i.feature));
	lock_drop(&k->lock);
	i.widened = (uint32_t)atomic_load(&k->mm->count.blocks_widened);
	i.host_private = atomic_load(&k->host_private);
	i.reconciled_ns = atomic_load(&k->reconciled_ns);
	i.reconciles = atomic_load(&k->reconciles);
	i.adopted = (uint64_t)atomic_load(&k->mm->count.pages_adopted);
	i.healed = atomic_load(&k->healed);
	i.traps = atomic_load(&k->traps);
	i.broken = atomic_load(&k->broken);
	i.size = size;
	*info = i;
	return KAGE_OK;
}
