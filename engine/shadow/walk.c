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

#define X86_ENTRY_A ((uint64_t)1 << 5)
#define X86_ENTRY_D ((uint64_t)1 << 6)

const struct pt_format *role_format(uint32_t role)
{
	return role & ROLE_FIVE ? &pt_x86_5 : &pt_x86_4;
}

struct pt_params role_params(uint32_t role)
{
	return (struct pt_params){
	    .phys_bits = (role >> ROLE_PHYS_SHIFT) & 63,
	    .nx = role & ROLE_NX,
	    .page1g = role & ROLE_PAGE1G,
	};
}

uint32_t mode_role(const struct shadow_mode *mode)
{
	return (mode->format == &pt_x86_5 ? ROLE_FIVE : 0) | (mode->params.nx ? ROLE_NX : 0) |
	       (mode->params.page1g ? ROLE_PAGE1G : 0) | (uint32_t)mode->params.phys_bits << ROLE_PHYS_SHIFT;
}

bool gva_canonical(const struct shadow_mode *mode, uint64_t gva)
{
	unsigned bits = mode->format == &pt_x86_5 ? 57 : 48;
	int64_t top = (int64_t)gva >> (bits - 1);

	return top == 0 || top == -1;
}

const uint64_t *table_map(struct shadow *s, gfn_t gfn)
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

bool guest_entry(struct shadow *s, const struct shadow_page *p, unsigned idx, uint64_t raw,
		 struct guest_entry *g)
{
	struct pt_params params = role_params(p->role);
	struct pt_decoded d = pt_level_of(role_format(p->role), p->level)->decode(raw, &params);

	if (d.state != PT_LEAF && d.state != PT_TABLE)
		return false;
	if (!d.accessed && !(p->spte[idx] & SPTE_NOAD) && !table_readonly(s, p->gfn))
		return false;
	g->leaf = d.state == PT_LEAF;
	g->target = GFN(d.addr >> PAGE_SHIFT);
	g->bits = (d.perm & KAGE_WRITE ? SPTE_W : 0) | (d.perm & KAGE_EXEC ? SPTE_X : 0) |
		  (d.user ? SPTE_U : 0) | (d.dirty || !g->leaf ? SPTE_D : 0) | (d.accessed ? 0 : SPTE_NOAD) |
		  (spte_t)d.pkey << SPTE_PKEY_SHIFT;
	return true;
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
		const uint64_t *table;
		bool same;
		int r;

		rcu_enter();
		table = table_map(cpu->shadow, gfn);
		if (table)
			*entry = READ_ONCE(table[gpa_offset(GPA(gpa)) / bytes]);
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
	r = mm_read(cpu->shadow->mm, GPA(gpa), entry, bytes);
	return r == KAGE_MMIO ? -EFAULT : r;
}

static int guest_fault(struct kage_fault *f, uint32_t error, unsigned level)
{
	f->vector = 14;
	f->error = error;
	f->level = level;
	return KAGE_GUEST_FAULT;
}

/* What the guest's tables say to the access. */
static int judge(const struct shadow_mode *mode, const struct pt_guest_path *path, uint32_t access,
		 struct kage_fault *fault)
{
	uint32_t error;

	if (path->state == PT_POISON) {
		fault->gpa = path->step[path->level].gpa;
		fault->level = path->level;
		return KAGE_MMIO;
	}
	if (path->state != PT_LEAF)
		return guest_fault(fault, x86_walk_error(&mode->x86, access, path->state == PT_RESERVED),
				   path->level);
	if (!(access & KAGE_RWX))
		return KAGE_OK;
	error = x86_check(&mode->x86, path->perm, path->user, path->pkey, access);
	return error ? guest_fault(fault, error, path->level) : KAGE_OK;
}

/* Sets bits in a guest entry that is still `old`. KAGE_OK also for memory that cannot be written (G2). */
static int update_entry(struct shadow_cpu *cpu, const struct pt_guest_step *step, uint64_t bits)
{
	gfn_t gfn = gpa_gfn(GPA(step->gpa));
	struct mm_fault f = {.gfn = gfn, .access = KAGE_WRITE, .reader = &cpu->reader};
	uint64_t old = step->entry, *entry;
	int r;

	notify_read_begin(&cpu->reader, gfn, gfn_add(gfn, 1));
	r = mm_fault(cpu->shadow->mm, &f);
	if (!r && !notify_read_hold(&cpu->reader))
		r = KAGE_RETRY;
	if (!r) {
		entry = (uint64_t *)((char *)pfn_hva(cpu->shadow->mm->host->pool, f.pfn) +
				     gpa_offset(GPA(step->gpa)));
		if (!cas_acq_rel(entry, &old, old | bits))
			r = KAGE_RETRY;
	}
	notify_read_end(&cpu->reader);
	return r == KAGE_MMIO ? KAGE_OK : r;
}

static int set_accessed(struct shadow_cpu *cpu, const struct pt_guest_path *path, bool write)
{
	unsigned top = cpu->mode.format->levels - 1u;

	for (unsigned i = 0; i + path->level <= top; i++) {
		unsigned level = top - i;
		const struct pt_guest_step *step = &path->step[level];
		uint64_t bits = 0;
		int r;

		if (!step->d.accessed)
			bits |= X86_ENTRY_A;
		if (write && level == path->level && !step->d.dirty)
			bits |= X86_ENTRY_D;
		r = bits ? update_entry(cpu, step, bits) : 0;
		if (r)
			return r;
	}
	return 0;
}

/* The guest's tables allow it: whatever the shadow path has that says otherwise is out of date. */
static void refresh(struct shadow_cpu *cpu, uint64_t gva)
{
	struct shadow *s = cpu->shadow;
	struct shadow_page *p;

	lock_take(&s->lock);
	p = cpu->root;
	while (p && !(p->role & ROLE_DIRECT)) {
		unsigned idx = level_index(GFN(gva >> PAGE_SHIFT), p->level);

		sync_entry(s, p, idx, NULL);
		p = spte_is_link(p->spte[idx]) ? spte_child(s, p->spte[idx]) : NULL;
	}
	batch_apply(s);
	lock_drop(&s->lock);
}

int walk_guest(struct shadow_cpu *cpu, uint64_t gva, uint32_t access, struct kage_fault *fault)
{
	struct pt_guest_path path;
	int r =
	    pt_guest_walk(cpu->mode.format, &cpu->mode.params, cpu->mode.root, gva, read_entry, cpu, &path);

	if (r)
		return r == -EHWPOISON ? -EFAULT : r;
	r = judge(&cpu->mode, &path, access, fault);
	if (r)
		return r;
	r = set_accessed(cpu, &path, access & KAGE_WRITE);
	if (r)
		return r;
	refresh(cpu, gva);
	return KAGE_OK;
}

int shadow_translate(struct shadow_cpu *cpu, uint64_t gva, uint32_t access, struct kage_fault *fault)
{
	const struct shadow_mode *mode = &cpu->mode;
	struct pt_guest_path path;
	int r;

	if (!mode->format) {
		fault->gpa = gva;
		fault->level = 0;
		return gva >> KAGE_GPA_BITS ? KAGE_MMIO : KAGE_OK;
	}
	if (!gva_canonical(mode, gva)) {
		fault->vector = 13;
		fault->error = 0;
		return KAGE_GUEST_FAULT;
	}
	r = pt_guest_walk(mode->format, &mode->params, mode->root, gva, read_quietly, cpu, &path);
	if (!r)
		r = judge(mode, &path, access, fault);
	if (r)
		return r;
	fault->gpa = path.gpa;
	fault->level = path.level;
	return KAGE_OK;
}
