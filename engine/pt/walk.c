/* SPDX-License-Identifier: MIT */
/*
 * The one walker over page tables of any format, and the walk of a single
 * address through a guest's tables.
 *
 * struct pt_walk (pt.h) says what is walked and how tables are reached; struct
 * piece is the part of the range that one entry maps. Inside this file a range
 * is kept as first and *last* byte: `end` of 2^64 is 0 in 64 bits.
 *
 * Invariants:
 *  W1  PRE and POST of an entry carry the value by which the walk descended,
 *      even if the entry has changed meanwhile.
 *  W2  POST follows exactly those PREs that were descended from.
 *  W3  An entry gets at most one LEAF and one PRE visit, so PT_REREAD ends.
 *  W4  A table at level 0 is no table, whatever its bits say: the depth is
 *      bounded by the format, never by what memory holds.
 *
 * Locks: none taken. Entries are read with acquire, which pairs with the
 * release that published a table after filling it.
 *
 * Why not simpler: the address space of a root is a rule of the format. Guest
 * formats may repeat the top bit, so their space is two halves; a root below
 * the format's top, or one of which it is said how much it translates, is taken
 * to be the table that holds `start`.
 */
#include "pt/pt.h"

static const struct pt_params no_params;

struct piece {
	uint64_t table; /* physical address of the table */
	uint64_t *map;  /* the table in our memory, or NULL: through read */
	uint64_t first, last;
	unsigned level;
};

static uint64_t entry_span(const struct pt_format *f, unsigned level)
{
	return (uint64_t)1 << pt_level_of(f, level)->shift;
}

static unsigned entry_index(const struct pt_format *f, unsigned level, uint64_t addr)
{
	const struct pt_level *l = pt_level_of(f, level);

	return (addr >> l->shift) & (((uint64_t)1 << l->bits) - 1);
}

/* Bits above what a root translates are no part of an index. */
static uint64_t below(unsigned bits, uint64_t addr)
{
	return bits && bits < 64 ? addr & (((uint64_t)1 << bits) - 1) : addr;
}

static const struct pt_params *walk_params(const struct pt_walk *w)
{
	return w->params ? w->params : &no_params;
}

static struct pt_decoded decode(const struct pt_format *f, const struct pt_params *p, unsigned level,
				uint64_t entry)
{
	struct pt_decoded d = pt_level_of(f, level)->decode(entry, p);

	if (level == 0 && d.state == PT_TABLE)
		d.state = PT_RESERVED;
	return d;
}

/* Reads the entry of a piece. 0, or -errno that ends the walk; what cannot be read is none. */
static int read_entry(const struct pt_walk *w, const struct piece *p, uint64_t *entry, struct pt_decoded *d)
{
	unsigned index = entry_index(w->format, p->level, below(w->root_bits, p->first));
	int r = 0;

	if (p->map)
		*entry = load_acquire(&p->map[index]);
	else if (w->map)
		r = -EFAULT;
	else
		r = w->read(w->arg, p->table + (uint64_t)index * w->format->entry_bytes,
			    w->format->entry_bytes, entry);
	if (r && r != -EFAULT)
		return r;
	if (r) {
		*entry = 0;
		*d = (struct pt_decoded){ .state = PT_NONE };
		return 0;
	}
	*d = decode(w->format, walk_params(w), p->level, *entry);
	return 0;
}

static int call_visit(const struct pt_walk *w, const struct piece *p, uint64_t entry, enum pt_when when)
{
	struct pt_visit v = {
		.format = w->format,
		.addr = p->first & ~(entry_span(w->format, p->level) - 1),
		.start = p->first,
		.end = p->last + 1,
		.level = p->level,
		.when = when,
		.entry = entry,
		.entryp = p->map ? &p->map[entry_index(w->format, p->level, below(w->root_bits, p->first))] : NULL,
		.table = p->table,
		.arg = w->arg,
	};

	return w->visit(&v);
}

static int walk_table(const struct pt_walk *w, uint64_t table, unsigned level, uint64_t first, uint64_t last);

static int descend(const struct pt_walk *w, const struct piece *p, uint64_t entry, uint64_t table)
{
	int r = walk_table(w, table, p->level - 1, p->first, p->last);

	if (r || !(w->flags & PT_VISIT_POST))
		return r;
	r = call_visit(w, p, entry, PT_VISIT_POST);
	return r < 0 || r == PT_STOP ? r : 0;
}

static int walk_entry(const struct pt_walk *w, const struct piece *p)
{
	unsigned visited = 0;

	for (;;) {
		struct pt_decoded d;
		enum pt_when when;
		uint64_t entry;
		int r = read_entry(w, p, &entry, &d);

		if (r)
			return r;
		if (d.state == PT_NONE && !w->none)
			return 0;
		when = d.state == PT_TABLE ? PT_VISIT_PRE : PT_VISIT_LEAF;
		if ((w->flags & when) && !(visited & when)) {
			visited |= when;
			r = call_visit(w, p, entry, when);
			if (r < 0 || r == PT_STOP)
				return r;
			if (r == PT_SKIP)
				return 0;
			if (r == PT_REREAD)
				continue;
		}
		return when == PT_VISIT_PRE ? descend(w, p, entry, d.addr) : 0;
	}
}

static int walk_table(const struct pt_walk *w, uint64_t table, unsigned level, uint64_t first, uint64_t last)
{
	uint64_t span = entry_span(w->format, level);
	struct piece p = { .table = table, .map = w->map ? w->map(w->arg, table) : NULL, .level = level };

	for (p.first = first;; p.first = p.last + 1) {
		int r;

		p.last = MIN(last, p.first | (span - 1));
		r = walk_entry(w, &p);
		if (r || p.last == last)
			return r;
	}
}

/* The part of [first, last] that lies in [lo, hi]. */
static int walk_clipped(const struct pt_walk *w, uint64_t first, uint64_t last, uint64_t lo, uint64_t hi)
{
	first = MAX(first, lo);
	last = MIN(last, hi);
	return first > last ? 0 : walk_table(w, w->root, w->root_level, first, last);
}

int pt_walk(const struct pt_walk *w, uint64_t start, uint64_t end)
{
	const struct pt_level *l = pt_level_of(w->format, w->root_level);
	uint64_t last = end - 1, span = (uint64_t)1 << (w->root_bits ? w->root_bits : l->shift + l->bits);
	int r;

	if (start > last || (start == 0 && end == 0))
		return 0;
	if (w->root_bits || w->root_level < w->format->levels - 1u)
		return walk_clipped(w, start, last, start & ~(span - 1), start | (span - 1));
	if (!w->format->sign_extended)
		return walk_clipped(w, start, last, 0, span - 1);
	r = walk_clipped(w, start, last, 0, span / 2 - 1);
	return r ? r : walk_clipped(w, start, last, -(span / 2), UINT64_MAX);
}

/* `path` is scratch until 0 is returned: this runs at every miss of a TLB. */
int pt_root_walk(const struct pt_root *root, uint64_t addr,
		 int (*read)(void *arg, uint64_t gpa, unsigned bytes, uint64_t *entry), void *arg,
		 struct pt_guest_path *path)
{
	const struct pt_format *f = root->format;
	uint64_t table = root->table, offset = below(root->bits, addr);

	path->perm = KAGE_RWX;
	path->user = path->user_exec = true;
	path->pkey = 0;
	path->gpa = 0;
	for (unsigned level = root->level;; level--) {
		struct pt_guest_step *s = &path->step[level];
		int r;

		path->level = level;
		s->gpa = table + (uint64_t)entry_index(f, level, offset) * f->entry_bytes;
		r = read(arg, s->gpa, f->entry_bytes, &s->entry);
		if (r && r != -EFAULT)
			return r;
		if (r) {
			s->entry = 0;
			s->d = (struct pt_decoded){ .state = PT_POISON };
			path->state = PT_POISON;
			return 0;
		}
		s->d = decode(f, &root->params, level, s->entry);
		path->state = s->d.state;
		if (s->d.state != PT_TABLE && s->d.state != PT_LEAF)
			return 0;
		path->perm &= s->d.perm;
		path->user &= s->d.user;
		path->user_exec &= s->d.user_exec;
		if (s->d.state == PT_LEAF)
			break;
		table = s->d.addr;
	}
	path->gpa = path->step[path->level].d.addr + (offset & (entry_span(f, path->level) - 1));
	path->pkey = path->step[path->level].d.pkey;
	return 0;
}

int pt_guest_walk(const struct pt_format *f, const struct pt_params *p, uint64_t root, uint64_t addr,
		  int (*read)(void *arg, uint64_t gpa, unsigned bytes, uint64_t *entry), void *arg,
		  struct pt_guest_path *path)
{
	struct pt_root r = { .format = f, .params = p ? *p : no_params, .table = root, .level = f->levels - 1u };

	return pt_root_walk(&r, addr, read, arg, path);
}
