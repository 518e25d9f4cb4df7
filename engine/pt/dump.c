/* SPDX-License-Identifier: MIT */
/*
 * Writes any table as text or JSON.
 *
 * struct run is what is being gathered: neighbours of one level that say the
 * same and map contiguous memory. Text is a line a run; JSON is one array of
 * objects, addresses as hexadecimal strings (a JSON number holds 53 bits).
 *
 * Invariants:
 *  D1  what is printed as permission is effective: the AND along the path,
 *      kept in perm[] and user[] by level while tables are entered.
 *  D2  a run is put out once, when its successor differs or the walk ends; the
 *      accessed and dirty bits do not split runs, they are counted.
 *  D3  an error of `put` or of the walk ends the dump at once; what was put
 *      until then stands.
 *
 * Locks: none taken; the caller's `map` or `read` say what the tables need.
 * Labels stay valid until the dump returns.
 */
#include <stdio.h>

#include "pt/pt.h"

struct run {
	uint64_t start, last, addr;
	const char *label;
	uint64_t entries, accessed, dirty;
	enum pt_state state;
	unsigned level;
	uint32_t perm;
	bool user, global;
	uint8_t pkey;
};

struct dumper {
	const struct pt_dump *d;
	const struct pt_params *params;
	uint32_t perm[PT_MAX_LEVELS + 1];
	bool user[PT_MAX_LEVELS + 1];
	struct run run;
	bool open;  /* `run` holds something */
	bool first; /* no object was put yet */
};

static const char *const state_names[] = {
	[PT_NONE] = "none",         [PT_LEAF] = "page",         [PT_TABLE] = "table",
	[PT_SWAP] = "swap",         [PT_MIGRATION] = "migration", [PT_PROTNONE] = "protnone",
	[PT_POISON] = "poison",     [PT_HOST_PRIVATE] = "host-private", [PT_RESERVED] = "reserved",
	[PT_ADDRESS_SIZE] = "address-size", [PT_ACCESS_FLAG] = "access-flag", [PT_OUTSIDE] = "outside",
};

static int put_text(const struct dumper *p, const char *text)
{
	int r = p->d->put(p->d->put_arg, text, strlen(text));

	return r < 0 ? r : 0;
}

static int put_escaped(const struct dumper *p, const char *text)
{
	char buf[8];
	int r = 0;

	for (; *text && !r; text++) {
		unsigned char c = *text;

		if (c == '"' || c == '\\')
			snprintf(buf, sizeof(buf), "\\%c", c);
		else if (c < 0x20)
			snprintf(buf, sizeof(buf), "\\u%04x", c);
		else
			snprintf(buf, sizeof(buf), "%c", c);
		r = put_text(p, buf);
	}
	return r;
}

/* Exclusive end of a run; 2^64 does not fit in 64 bits. */
static const char *end_text(uint64_t last, char buf[24])
{
	if (last == UINT64_MAX)
		return "0x10000000000000000";
	snprintf(buf, 24, "0x%016llx", (unsigned long long)last + 1);
	return buf;
}

static const char *perm_text(uint32_t perm, char buf[4])
{
	buf[0] = perm & KAGE_READ ? 'r' : '-';
	buf[1] = perm & KAGE_WRITE ? 'w' : '-';
	buf[2] = perm & KAGE_EXEC ? 'x' : '-';
	buf[3] = 0;
	return buf;
}

static int put_line(const struct dumper *p, const struct run *r)
{
	char line[256], end[24], perm[4], addr[32] = "-";
	int n;

	if (r->state == PT_LEAF)
		snprintf(addr, sizeof(addr), "0x%013llx", (unsigned long long)r->addr);
	snprintf(line, sizeof(line),
		 "0x%016llx-%s %-12s %s %s%s%s key %u level %u entries %llu accessed %llu dirty %llu",
		 (unsigned long long)r->start, end_text(r->last, end), state_names[r->state], addr,
		 perm_text(r->perm, perm), r->user ? " user" : "", r->global ? " global" : "", r->pkey,
		 r->level, (unsigned long long)r->entries, (unsigned long long)r->accessed,
		 (unsigned long long)r->dirty);
	n = put_text(p, line);
	if (!n && r->label && !(n = put_text(p, " ")))
		n = put_text(p, r->label);
	return n ? n : put_text(p, "\n");
}

static int put_object(struct dumper *p, const struct run *r)
{
	char text[512], end[24], perm[4], addr[40] = "null";
	int n;

	if (r->state == PT_LEAF)
		snprintf(addr, sizeof(addr), "\"0x%llx\"", (unsigned long long)r->addr);
	snprintf(text, sizeof(text),
		 "%s{\"start\":\"0x%016llx\",\"end\":\"%s\",\"state\":\"%s\",\"addr\":%s,\"perm\":\"%s\","
		 "\"user\":%s,"
		 "\"global\":%s,\"pkey\":%u,\"level\":%u,\"entries\":%llu,\"accessed\":%llu,\"dirty\":%llu",
		 p->first ? "\n" : ",\n", (unsigned long long)r->start, end_text(r->last, end),
		 state_names[r->state], addr, perm_text(r->perm, perm), r->user ? "true" : "false",
		 r->global ? "true" : "false", r->pkey, r->level, (unsigned long long)r->entries,
		 (unsigned long long)r->accessed, (unsigned long long)r->dirty);
	p->first = false;
	n = put_text(p, text);
	if (!n && r->label && !(n = put_text(p, ",\"label\":\"")) && !(n = put_escaped(p, r->label)))
		n = put_text(p, "\"");
	return n ? n : put_text(p, "}");
}

static int put_run(struct dumper *p)
{
	if (!p->open)
		return 0;
	p->open = false;
	return p->d->json ? put_object(p, &p->run) : put_line(p, &p->run);
}

static bool same_label(const char *a, const char *b)
{
	return a == b || (a && b && strcmp(a, b) == 0);
}

static bool continues(const struct run *r, const struct run *n)
{
	return n->start == r->last + 1 && n->state == r->state && n->level == r->level &&
	       n->perm == r->perm && n->user == r->user && n->global == r->global && n->pkey == r->pkey &&
	       same_label(n->label, r->label) &&
	       (r->state != PT_LEAF || n->addr - r->addr == n->start - r->start);
}

static int add_run(struct dumper *p, const struct run *n)
{
	int r;

	if (p->open && continues(&p->run, n)) {
		p->run.last = n->last;
		p->run.entries++;
		p->run.accessed += n->accessed;
		p->run.dirty += n->dirty;
		return 0;
	}
	r = put_run(p);
	p->run = *n;
	p->open = true;
	return r;
}

static int dump_visit(const struct pt_visit *v)
{
	struct dumper *p = v->arg;
	struct pt_decoded d = pt_level_of(v->format, v->level)->decode(v->entry, p->params);
	struct run n = {
		.start = v->start, .last = v->end - 1, .addr = d.addr + (v->start - v->addr),
		.entries = 1, .accessed = d.accessed, .dirty = d.dirty,
		.state = d.state, .level = v->level,
		.perm = d.perm & p->perm[v->level + 1], .user = d.user && p->user[v->level + 1],
		.global = d.global, .pkey = d.pkey,
	};

	if (v->when == PT_VISIT_PRE) {
		p->perm[v->level] = n.perm;
		p->user[v->level] = n.user;
		return PT_CONTINUE;
	}
	if (p->d->label)
		n.label = p->d->label(p->d->walk.arg, v->entry, v->level);
	return add_run(p, &n);
}

/* `map` and `read` get the caller's argument, the visits get the dumper. */
static void *dump_map(void *arg, uint64_t addr)
{
	const struct dumper *p = arg;

	return p->d->walk.map(p->d->walk.arg, addr);
}

static int dump_read(void *arg, uint64_t addr, unsigned bytes, uint64_t *entry)
{
	const struct dumper *p = arg;

	return p->d->walk.read(p->d->walk.arg, addr, bytes, entry);
}

static int dump_tree(struct dumper *p, struct pt_walk *w, uint64_t start, uint64_t end)
{
	static const struct pt_params none;

	p->perm[w->root_level + 1] = KAGE_RWX;
	p->user[w->root_level + 1] = true;
	p->params = w->params ? w->params : &none;
	return pt_walk(w, start, end);
}

/* The part of [start, end) that a root translates; one of repeated top bits has it at both ends. */
static int dump_root(struct dumper *p, struct pt_walk *w, const struct pt_root *r, uint64_t start, uint64_t end)
{
	uint64_t last = end - 1, first = MAX(start, r->base);

	if (r->state != PT_TABLE)
		return 0;
	w->format = r->format;
	w->params = &r->params;
	w->root = r->table;
	w->root_level = r->level;
	w->root_bits = 0;
	if (r->format->sign_extended)
		return dump_tree(p, w, start, end);
	w->root_bits = r->bits;
	last = MIN(last, r->base + (((uint64_t)1 << r->bits) - 1));
	return first > last ? 0 : dump_tree(p, w, first, last + 1);
}

int pt_dump(struct pt_dump *d, uint64_t start, uint64_t end)
{
	struct dumper p = { .d = d, .first = true };
	struct pt_walk w = d->walk;
	int r = 0;

	w.flags = PT_VISIT_LEAF | PT_VISIT_PRE;
	w.none = false;
	w.map = w.map ? dump_map : NULL;
	w.read = w.read ? dump_read : NULL;
	w.visit = dump_visit;
	w.arg = &p;
	if (d->json)
		r = put_text(&p, "[");
	if (!r && !d->roots)
		r = dump_tree(&p, &w, start, end);
	for (unsigned i = 0; !r && d->roots && i < d->nroots; i++)
		r = dump_root(&p, &w, &d->roots[i], start, end);
	if (!r)
		r = put_run(&p);
	if (!r && d->json)
		r = put_text(&p, "\n]\n");
	return r;
}
