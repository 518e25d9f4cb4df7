/* SPDX-License-Identifier: MIT */
/*
 * Dumps of a guest's primary table and regions. The table goes through the one
 * walker; a grace period keeps it while it is read.
 */
#include <stdio.h>

#include "mm/region.h"
#include "mm/table.h"
#include "obs/obs.h"

struct primary {
	struct mm *mm;
};

static void *map_table(void *arg, uint64_t addr)
{
	const struct primary *p = arg;

	return pfn_hva(p->mm->host->pool, PFN(addr >> PAGE_SHIFT));
}

static const char *label_leaf(void *arg, uint64_t entry, unsigned level)
{
	const struct primary *p = arg;
	pfn_t pfn = entry_pfn(entry);

	if (entry_is_fused(entry))
		return "fused";
	if (entry & ENTRY_SPECIAL)
		return pfn_is_zero(pfn) ? "zero" : "device";
	switch (frame_kind(pfn_frame(p->mm->host->pool, pfn))) {
	case FRAME_HOME:
		return "home";
	case FRAME_PRIVATE:
		return "private";
	case FRAME_STABLE:
		return "merged";
	default:
		return "?";
	}
}

int obs_dump_primary(struct mm *mm, bool json, int (*put)(void *arg, const char *text, size_t len), void *arg)
{
	struct primary p = { .mm = mm };
	entry_t root;
	int r;

	rcu_enter();
	root = atomic_load(&mm->root);
	struct pt_dump d = {
		.walk = { .format = &pt_kage[root_level(root) - 1], .root = entry_pfn(root).v << PAGE_SHIFT,
			  .root_level = root_level(root), .map = map_table, .arg = &p },
		.json = json, .put = put, .put_arg = arg, .label = label_leaf,
	};
	r = pt_dump(&d, 0, level_pages(root_level(root) + 1) << PAGE_SHIFT);
	rcu_leave();
	return r;
}

static const char *kind_name(uint32_t kind)
{
	static const char *const name[] = { "anon", "file", "foreign" };

	return kind < ARRAY_SIZE(name) ? name[kind] : "?";
}

static int region_line(const struct region *r, bool json, bool first, char *line, size_t room)
{
	static const char *const text = "%s%012llx-%012llx %c%c%c %s%s%s%s\n";
	static const char *const object = "%s{\"start\":\"0x%llx\",\"end\":\"0x%llx\",\"prot\":\"%c%c%c\","
					  "\"kind\":\"%s\",\"flags\":\"%s%s%s\"}";
	unsigned long long start = gfn_gpa(r->start).v, end = gfn_gpa(region_end(r)).v;

	return snprintf(line, room, json ? object : text, json && !first ? "," : "", start, end,
			r->prot & KAGE_READ ? 'r' : '-', r->prot & KAGE_WRITE ? 'w' : '-',
			r->prot & KAGE_EXEC ? 'x' : '-', kind_name(r->kind),
			r->flags & KAGE_REGION_MERGEABLE ? " mergeable" : "", r->flags & KAGE_REGION_TRAP ? " trap" : "",
			r->flags & KAGE_REGION_EXTERNAL ? " external" : "");
}

int obs_dump_regions(struct mm *mm, bool json, int (*put)(void *arg, const char *text, size_t len), void *arg)
{
	struct regions *set;
	char line[192];
	int r = json ? put(arg, "[", 1) : 0;

	rcu_enter();
	set = load_acquire(&mm->regions);
	for (unsigned i = 0; r >= 0 && i < set->count; i++) {
		int n = region_line(&set->r[i], json, i == 0, line, sizeof(line));

		r = put(arg, line, n);
	}
	rcu_leave();
	if (r >= 0 && json)
		r = put(arg, "]\n", 2);
	return r < 0 ? r : 0;
}
