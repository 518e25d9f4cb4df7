/* SPDX-License-Identifier: MIT */
/*
 * The shadow tables as text or JSON: a line (object) for each page, one for
 * each run of its entries that map neighbouring frames with like bits.
 *
 * Pages are copied one at a time under the shadow lock and printed without it,
 * so the dump of a running guest is exact for each page, not as a whole.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include "shadow/internal.h"

struct out {
	int (*put)(void *arg, const char *text, size_t len);
	void *arg;
	bool json, first;
	int err;
};

static void say(struct out *o, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(struct out *o, const char *fmt, ...)
{
	char line[256];
	va_list ap;
	int n, r;

	if (o->err)
		return;
	va_start(ap, fmt);
	n = vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	r = o->put(o->arg, line, (size_t)n);
	if (r < 0)
		o->err = r;
}

static bool continues(const struct shadow_page *p, unsigned first, unsigned i)
{
	spte_t a = p->spte[first], b = p->spte[i];
	uint64_t step = a & SPTE_LARGE ? BLOCK_PAGES : 1;

	return spte_is_leaf(a) && (b & ~SPTE_PFN) == (a & ~SPTE_PFN) &&
	       spte_pfn(b).v == spte_pfn(a).v + (i - first) * step &&
	       p->side[i].gfn == p->side[first].gfn + (i - first) * step;
}

static void dump_run(struct out *o, const struct shadow_page *p, unsigned i, unsigned n)
{
	spte_t e = p->spte[i];
	char bits[10];

	snprintf(bits, sizeof(bits), "%c%c%c%c%c%c%c%c", e & SPTE_W ? 'w' : '-', e & SPTE_U ? 'u' : '-',
		 e & SPTE_X ? 'x' : '-', e & SPTE_UX ? 'y' : '-', e & SPTE_D ? 'd' : '-', e & SPTE_HR ? 'R' : '-',
		 e & SPTE_HW ? 'W' : '-', e & SPTE_HX ? 'X' : '-');
	if (o->json)
		say(o,
		    "%s{\"index\":%u,\"count\":%u,\"kind\":\"%s\",\"gfn\":%" PRIu64 ",\"%s\":%" PRIu64
		    ",\"bits\":\"%s\",\"pkey\":%u}",
		    o->first ? "" : ",", i, n,
		    e & SPTE_LINK    ? "link"
		    : e & SPTE_LARGE ? "large"
				     : "leaf",
		    p->side[i].gfn, e & SPTE_LINK ? "page" : "pfn", spte_pfn(e).v, bits,
		    (unsigned)((e & SPTE_PKEY) >> SPTE_PKEY_SHIFT));
	else
		say(o, "  %3u+%-3u %s gfn %#" PRIx64 " -> %s %#" PRIx64 " %s pkey %u\n", i, n,
		    e & SPTE_LINK    ? "link "
		    : e & SPTE_LARGE ? "large"
				     : "leaf ",
		    p->side[i].gfn, e & SPTE_LINK ? "page" : "pfn", spte_pfn(e).v, bits,
		    (unsigned)((e & SPTE_PKEY) >> SPTE_PKEY_SHIFT));
	o->first = false;
}

static void dump_entries(struct out *o, const struct shadow_page *p)
{
	unsigned n;

	o->first = true;
	for (unsigned i = 0; i < LEVEL_ENTRIES; i += n) {
		n = 1;
		if (!(p->spte[i] & SPTE_P))
			continue;
		while (i + n < LEVEL_ENTRIES && continues(p, i, i + n))
			n++;
		dump_run(o, p, i, n);
	}
}

static void dump_page(struct out *o, const struct shadow_page *p, bool first)
{
	static const char *const reach[] = {"none", "one", "many"};
	const char *sync = p->role & ROLE_DIRECT ? "direct" : p->role & ROLE_PASS ? "pass" : p->unsync ? "unsync" : "synced";
	const char *format = p->format ? p->format->name : "-";

	if (!o->json) {
		say(o,
		    "page %u level %u gfn %#" PRIx64
		    " role %#" PRIx64 " %s %s first %u entries %u parents %u roots %u reach %s gva %#" PRIx64 "\n",
		    p->id, p->level, p->gfn.v, p->role, format, sync, p->first, p->live, p->nparents, p->roots, reach[p->reach],
		    p->gva);
		dump_entries(o, p);
		return;
	}
	say(o, "%s{\"page\":%u,\"level\":%u,\"gfn\":%" PRIu64 ",\"role\":%" PRIu64
	    ",\"format\":\"%s\",\"first\":%u,\"state\":\"%s\",",
	    first ? "" : ",", p->id, p->level, p->gfn.v, p->role, format, p->first, sync);
	say(o, "\"parents\":%u,\"roots\":%u,\"reach\":\"%s\",\"gva\":%" PRIu64 ",\"entries\":[", p->nparents,
	    p->roots, reach[p->reach], p->gva);
	dump_entries(o, p);
	say(o, "]}");
}

/* Copies the page of an id: 1, 0 if there is none, -1 behind the last id. */
static int copy_page(struct shadow *s, uint32_t id, struct shadow_page *copy)
{
	int r = -1;

	lock_take(&s->lock);
	if (id < s->page_ids) {
		struct shadow_page *p = page_of_id(s, id);

		r = !((uintptr_t)p & 1) && p->used;
		if (r) {
			page_settle(s, p);
			*copy = *p;
		}
	}
	lock_drop(&s->lock);
	return r;
}

int shadow_dump(struct shadow *s, bool json, int (*put)(void *arg, const char *text, size_t len), void *arg)
{
	struct out o = {.put = put, .arg = arg, .json = json};
	struct shadow_page *copy = env_alloc(s->env, sizeof(*copy));
	bool first = true;
	int found;

	if (!copy)
		return -ENOMEM;
	if (json)
		say(&o, "[");
	for (uint32_t id = 1; !o.err && (found = copy_page(s, id, copy)) >= 0; id++) {
		if (!found)
			continue;
		dump_page(&o, copy, first);
		first = false;
	}
	if (json)
		say(&o, "]\n");
	env_free(s->env, copy, sizeof(*copy));
	return o.err;
}

static int read_guest_memory(void *arg, uint64_t addr, unsigned bytes, uint64_t *entry)
{
	struct shadow *s = arg;

	if (addr >> KAGE_GPA_BITS)
		return -EFAULT;
	*entry = 0;
	return mm_peek(s->mm, GPA(addr), entry, bytes) ? -EFAULT : 0;
}

int shadow_dump_guest(struct shadow *s, bool json, int (*put)(void *arg, const char *text, size_t len),
		      void *arg)
{
	struct pt_guest mode = {0};
	struct pt_dump d = {.json = json, .put = put, .put_arg = arg};
	bool found;

	lock_take(&s->lock);
	found = !list_empty(&s->cpus);
	if (found)
		mode = container_of(s->cpus.next, struct shadow_cpu, node)->mode;
	lock_drop(&s->lock);
	if (!found)
		return -ENOENT;
	if (!mode.nroots)
		return 0;
	d.walk = (struct pt_walk){.read = read_guest_memory, .arg = s};
	d.roots = mode.root;
	d.nroots = mode.nroots;
	return pt_dump(&d, 0, UINT64_MAX); /* (0, 0) is an empty range to pt_walk() */
}
