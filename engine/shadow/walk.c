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

/* -- roles -------------------------------------------------------------------- */

static const struct pt_format *const formats[] = {
    &pt_x86_4, &pt_x86_5, &pt_x86_pae, &pt_x86_32, &pt_arm64_4k, &pt_arm64_16k, &pt_arm64_64k,
};
_Static_assert(ARRAY_SIZE(formats) <= 8, "three bits of a role");

enum role_flag { F_NX, F_PAGE1G, F_PSE, F_DS, F_LPA, F_GIANT, F_HA, F_HD, F_HPD, FLAGS };
#define FORMAT_BITS 3
#define PHYS_BITS   6
_Static_assert(ROLE_PARAM_SHIFT + FORMAT_BITS + PHYS_BITS + FLAGS <= 64, "a role is 64 bits");

static uint64_t role_of_params(const struct pt_format *f, const struct pt_params *p)
{
	uint64_t flags = (uint64_t)p->nx << F_NX | (uint64_t)p->page1g << F_PAGE1G | (uint64_t)p->pse << F_PSE |
			 (uint64_t)p->ds << F_DS | (uint64_t)p->lpa << F_LPA | (uint64_t)p->giant << F_GIANT |
			 (uint64_t)p->ha << F_HA | (uint64_t)p->hd << F_HD | (uint64_t)p->hpd << F_HPD;
	uint64_t n = 0;

	while (formats[n] != f)
		n++;
	return (n | (uint64_t)p->phys_bits << FORMAT_BITS | flags << (FORMAT_BITS + PHYS_BITS)) << ROLE_PARAM_SHIFT;
}

static struct pt_params role_params(uint64_t role)
{
	uint64_t params = role >> (ROLE_PARAM_SHIFT + FORMAT_BITS), flags = params >> PHYS_BITS;

	return (struct pt_params){
	    .phys_bits = params & ((1u << PHYS_BITS) - 1),
	    .nx = flags >> F_NX & 1,
	    .page1g = flags >> F_PAGE1G & 1,
	    .pse = flags >> F_PSE & 1,
	    .ds = flags >> F_DS & 1,
	    .lpa = flags >> F_LPA & 1,
	    .giant = flags >> F_GIANT & 1,
	    .ha = flags >> F_HA & 1,
	    .hd = flags >> F_HD & 1,
	    .hpd = flags >> F_HPD & 1,
	};
}

static unsigned entry_shift(unsigned level)
{
	return PAGE_SHIFT + LEVEL_BITS * level;
}

/* The role of a page of `level` whose first guest entry, of `table`'s level, lies at `gpa`. */
static uint64_t role_at(const struct pt_format *f, uint64_t params, unsigned level, unsigned table, uint64_t gpa)
{
	bool pass = pt_level_of(f, table)->shift < entry_shift(level);

	return params | level | table << ROLE_TABLE_SHIFT | (pass ? ROLE_PASS : 0) |
	       (gpa & (PAGE_SIZE - 1)) / sizeof(uint64_t) << ROLE_FIRST_SHIFT;
}

void page_shape(struct shadow_page *p)
{
	unsigned shift = entry_shift(p->role & ROLE_LEVEL), table;

	p->level = p->role & ROLE_LEVEL;
	p->format = NULL;
	p->first = p->split = p->table_level = 0;
	if (p->role & ROLE_DIRECT)
		return;
	p->format = formats[p->role >> ROLE_PARAM_SHIFT & ((1u << FORMAT_BITS) - 1)];
	p->params = role_params(p->role);
	p->table_level = p->role >> ROLE_TABLE_SHIFT & ROLE_LEVEL;
	p->first = (uint16_t)(((p->role & ROLE_FIRST) >> ROLE_FIRST_SHIFT) * sizeof(uint64_t) / p->format->entry_bytes);
	table = pt_level_of(p->format, p->table_level)->shift;
	if (table > shift)
		p->split = (uint8_t)(table - shift);
	kage_assert(p->split < LEVEL_BITS);
}

gfn_t root_gfn(const struct pt_root *r)
{
	return GFN(r->table >> PAGE_SHIFT);
}

/* The lowest level whose page covers what the root translates. */
uint64_t root_role(const struct pt_root *r)
{
	unsigned level = 0;

	while (entry_shift(level) + LEVEL_BITS < r->bits)
		level++;
	return role_at(r->format, role_of_params(r->format, &r->params), level, r->level, r->table);
}

/* -- guest entries ------------------------------------------------------------ */

const void *table_map(struct shadow *s, gfn_t gfn)
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

/* Where the page below p[idx] has its first guest entry: in the table at `gpa`, which p[idx] is the n-th part of. */
static void below_entry(const struct shadow_page *p, unsigned table, uint64_t gpa, uint64_t n, struct guest_entry *g)
{
	unsigned shift = pt_level_of(p->format, table)->shift;

	kage_assert(shift <= entry_shift(p->level));
	gpa += (n << (entry_shift(p->level) - shift)) * p->format->entry_bytes;
	g->leaf = false;
	g->target = gpa_gfn(GPA(gpa));
	g->role = role_at(p->format, p->role & ROLE_PARAMS, p->level - 1u, table, gpa);
}

void unfed_entry(const struct shadow_page *p, unsigned idx, struct guest_entry *g)
{
	g->bits = SPTE_ALL;
	if (p->role & ROLE_DIRECT) {
		g->leaf = true;
		g->target = gfn_add(p->gfn, idx * level_pages(p->level));
		return;
	}
	below_entry(p, p->table_level, gfn_gpa(p->gfn).v + (uint64_t)p->first * p->format->entry_bytes, idx, g);
}

bool guest_entry(struct shadow *s, const struct shadow_page *p, unsigned idx, uint64_t raw,
		 struct guest_entry *g)
{
	struct pt_decoded d = pt_level_of(p->format, p->table_level)->decode(raw, &p->params);
	uint64_t part = idx & ((1u << p->split) - 1);

	if (d.state != PT_LEAF && (d.state != PT_TABLE || !p->table_level))
		return false;
	if (!d.accessed && !(p->spte[idx] & SPTE_NOAD) && !table_readonly(s, p->gfn))
		return false;
	g->leaf = d.state == PT_LEAF;
	if (g->leaf)
		g->target = gfn_add(GFN(d.addr >> PAGE_SHIFT), part * level_pages(p->level));
	else
		below_entry(p, p->table_level - 1u, d.addr, part, g);
	g->bits = (d.perm & KAGE_WRITE ? SPTE_W : 0) | (d.perm & KAGE_EXEC ? SPTE_X : 0) |
		  (d.user ? SPTE_U : 0) | (d.user_exec ? SPTE_UX : 0) | (d.dirty || !g->leaf ? SPTE_D : 0) |
		  (d.accessed ? 0 : SPTE_NOAD) | (spte_t)d.pkey << SPTE_PKEY_SHIFT;
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
	r = mm_read(cpu->shadow->mm, GPA(gpa), entry, bytes);
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
