/* SPDX-License-Identifier: MIT */
/*
 * The guest's own tables: reading entries, one whole walk with faults, accessed
 * and dirty bits.
 *
 * Two readers of guest tables: the shadow walk reads single entries under the
 * shadow lock (table_map()) once their page is watched; what it cannot use it
 * leaves to walk_guest(), which follows the whole path without locks, reports
 * the guest's faults and sets accessed and dirty bits, so that the next shadow
 * walk gets further.
 *
 * Invariants:
 *  G1  accessed and dirty bits are set after the permission check of the whole
 *      path (as KVM does; Intel SDM vol. 3A 4.8 allows it), by compare and
 *      exchange, in a frame that is this guest's alone and held.
 *  G2  a table in memory that the guest may not write is used without them, as
 *      KVM uses tables in read-only slots.
 *
 * Locks: walk_guest() takes none over its reads; refresh() the shadow lock. An
 * update is a reader section with a hold (notify.h) on the table's page.
 */
#include "mm/mirror.h"
#include "shadow/internal.h"

const void *table_peek(struct shadow *s, gfn_t gfn)
{
	struct mm_lookup l;

	if (gfn.v >> GFN_BITS)
		return NULL;
	l = mm_lookup(s->mm, gfn);
	if (!entry_is_leaf(l.entry) || pfn_is_none(l.pfn))
		return NULL;
	/* the host kernel may have given the guest a page of its own; a fault brings it home */
	if (!l.writable && mm_native(s->mm)) {
		const struct region *r = mm_region(s->mm, gfn);

		if (!r || r->kind != KAGE_REGION_FOREIGN)
			return NULL;
	}
	return pfn_hva(s->mm->host->pool, l.pfn);
}

const void *table_map(struct shadow *s, gfn_t gfn)
{
	/* a walk is an access: hardened merging has put the page out of its reach, a fault brings it back */
	return gfn.v >> GFN_BITS || !entry_is_fused(mm_lookup(s->mm, gfn).entry) ? table_peek(s, gfn) : NULL;
}

bool table_readonly(struct shadow *s, gfn_t gfn)
{
	const struct region *r;
	bool ro;

	rcu_enter();
	r = mm_region(s->mm, gfn);
	ro = r && !(r->prot & KAGE_WRITE);
	rcu_leave();
	return ro;
}

/* -- the whole walk --------------------------------------------------------- */

/* Makes a table's page present. Anything but KAGE_OK is what the access returns; memory that is none:
 * -EFAULT. */
static int table_fault(struct shadow_cpu *cpu, gfn_t gfn, uint32_t access)
{
	struct mm_fault f = {.gfn = gfn, .access = access, .reader = &cpu->reader};
	int r;

	do {
		notify_read_begin(&cpu->reader, gfn, gfn_add(gfn, 1));
		r = mm_fault(cpu->shadow->mm, &f);
		notify_read_end(&cpu->reader);
	} while (r == KAGE_RETRY);
	return r;
}

static int read_entry(void *arg, uint64_t gpa, unsigned bytes, uint64_t *entry)
{
	struct shadow_cpu *cpu = arg;
	gfn_t gfn = gpa_gfn(GPA(gpa));

	if (gfn.v >> GFN_BITS)
		return -EFAULT;
	for (;;) {
		const char *table;
		bool same;
		int r;

		rcu_enter();
		table = table_map(cpu->shadow, gfn);
		if (table)
			*entry = kage_guest_get(table + gpa_offset(GPA(gpa)), bytes);
		/* a frame that our entry has let go of may be another guest's by now: it must still be there after the load */
		atomic_thread_fence(memory_order_acquire);
		same = table == table_map(cpu->shadow, gfn);
		rcu_leave();
		if (!same)
			continue;
		if (table)
			return 0;
		r = table_fault(cpu, gfn, KAGE_READ);
		if (r)
			return r == KAGE_MMIO ? -EFAULT : r == -EFAULT ? -EHWPOISON : r;
	}
}

/* For translate: touches nothing. */
static int read_quietly(void *arg, uint64_t gpa, unsigned bytes, uint64_t *entry)
{
	struct shadow_cpu *cpu = arg;
	int r;

	if (gpa >> KAGE_GPA_BITS)
		return -EFAULT;
	*entry = 0;
	r = mm_peek(cpu->shadow->mm, GPA(gpa), entry, bytes);
	return r == KAGE_MMIO ? -EFAULT : r;
}

static int guest_fault(const struct pt_guest *mode, enum pt_state state, unsigned level, struct pt_rights rights,
		       uint32_t access, struct kage_fault *fault)
{
	struct pt_fault f = mode->arch->fault(mode, state, level, rights, access);

	fault->vector = f.vector;
	fault->error = f.error;
	fault->level = f.level;
	return KAGE_GUEST_FAULT;
}

int find_root(const struct pt_guest *mode, uint64_t gva, uint32_t access, struct kage_fault *fault)
{
	int n = mode->arch->root_of(mode, gva);
	enum pt_state state = n < 0 ? PT_OUTSIDE : mode->nroots ? mode->root[n].state : PT_TABLE;

	if (likely(state == PT_TABLE))
		return n;
	guest_fault(mode, state, n < 0 ? 0 : mode->root[n].level, (struct pt_rights){0}, access, fault);
	return -1;
}

/* What the guest's tables say to the access. */
static int judge(const struct pt_guest *mode, const struct pt_guest_path *path, uint32_t access,
		 struct kage_fault *fault)
{
	struct pt_rights rights = pt_path_rights(path);

	if (path->state == PT_POISON) {
		fault->gpa = path->step[path->level].gpa;
		fault->level = path->level;
		return KAGE_MMIO;
	}
	if (path->state == PT_LEAF && (!(access & KAGE_RWX) || mode->arch->allows(mode, rights, access)))
		return KAGE_OK;
	return guest_fault(mode, path->state, path->level, rights, access, fault);
}

static bool entry_exchange(void *entry, unsigned bytes, uint64_t old, uint64_t new)
{
	uint32_t old32 = (uint32_t)old;

	return bytes == sizeof(uint32_t) ? cas_acq_rel((uint32_t *)entry, &old32, (uint32_t)new) :
					   cas_acq_rel((uint64_t *)entry, &old, new);
}

/* Replaces a guest entry that is still what was read. KAGE_OK also for memory that cannot be written (G2). */
static int update_entry(struct shadow_cpu *cpu, const struct pt_guest_step *step, unsigned bytes, uint64_t new)
{
	gfn_t gfn = gpa_gfn(GPA(step->gpa));
	struct mm_fault f = {.gfn = gfn, .access = KAGE_WRITE, .reader = &cpu->reader};
	int r;

	notify_read_begin(&cpu->reader, gfn, gfn_add(gfn, 1));
	r = mm_fault(cpu->shadow->mm, &f);
	if (!r && !notify_read_hold(&cpu->reader))
		r = KAGE_RETRY;
	if (!r && !entry_exchange((char *)pfn_hva(cpu->shadow->mm->host->pool, f.pfn) + gpa_offset(GPA(step->gpa)),
				  bytes, step->entry, new))
		r = KAGE_RETRY;
	notify_read_end(&cpu->reader);
	return r == KAGE_MMIO ? KAGE_OK : r;
}

static int set_used(struct shadow_cpu *cpu, const struct pt_root *root, const struct pt_guest_path *path, bool write)
{
	for (unsigned i = 0; i + path->level <= root->level; i++) {
		unsigned level = root->level - i;
		const struct pt_guest_step *step = &path->step[level];
		uint64_t new = cpu->mode.arch->used(root, step->entry, level == path->level, write);
		int r;

		if (new == step->entry)
			continue;
		r = update_entry(cpu, step, root->format->entry_bytes, new);
		if (r)
			return r;
		if (root->format->entangled)
			entry_used(cpu->shadow, GPA(step->gpa), root->format->entry_bytes);
	}
	return 0;
}

/* The guest's tables allow it: whatever the shadow path has that says otherwise is out of date. */
static void refresh(struct shadow_cpu *cpu, unsigned root, uint64_t gva)
{
	struct shadow *s = cpu->shadow;
	struct shadow_page *p;

	lock_take(&s->lock);
	p = cpu->root[root];
	while (p && !(p->role & ROLE_DIRECT)) {
		unsigned idx = root_index(&cpu->mode.root[root], gva, p->level);

		sync_entry(s, p, idx, NULL);
		p = spte_is_link(p->spte[idx]) ? spte_child(s, p->spte[idx]) : NULL;
	}
	batch_apply(s);
	lock_drop(&s->lock);
}

int walk_guest(struct shadow_cpu *cpu, uint64_t gva, uint32_t access, struct kage_fault *fault)
{
	int n = find_root(&cpu->mode, gva, access, fault);
	const struct pt_root *root = &cpu->mode.root[n];
	struct pt_guest_path path;
	int r;

	if (n < 0)
		return KAGE_GUEST_FAULT;
	r = pt_root_walk(root, gva, read_entry, cpu, &path);
	if (r)
		return r == -EHWPOISON ? -EFAULT : r;
	r = judge(&cpu->mode, &path, access, fault);
	if (r)
		return r;
	r = set_used(cpu, root, &path, access & KAGE_WRITE);
	if (r)
		return r;
	refresh(cpu, (unsigned)n, gva);
	return KAGE_OK;
}

int shadow_translate(struct shadow_cpu *cpu, uint64_t gva, uint32_t access, struct kage_fault *fault)
{
	const struct pt_guest *mode = &cpu->mode;
	int n = find_root(mode, gva, access, fault), r;
	struct pt_guest_path path;

	if (n < 0)
		return KAGE_GUEST_FAULT;
	if (!mode->nroots) {
		fault->gpa = gva;
		fault->level = 0;
		return gva >> KAGE_GPA_BITS ? KAGE_MMIO : KAGE_OK;
	}
	r = pt_root_walk(&mode->root[n], gva, read_quietly, cpu, &path);
	if (!r)
		r = judge(mode, &path, access, fault);
	if (r)
		return r;
	fault->gpa = path.gpa;
	fault->level = path.level;
	return KAGE_OK;
}
