/* SPDX-License-Identifier: MIT */
/*
 * What a guest does to its own page tables, and the first use of pages of them.
 * Peer: Unicorn, which runs guest code that does the same on a copy of the memory.
 *
 *   shadow-miss     each page of 1 GiB for the first time: the guest's tables and
 *                   the primary table are walked, what is found is installed
 *   context-switch  MOV to CR3, then a load from each of 32 pages
 *   invlpg          INVLPG, then a load from the page
 *   pte-write       a store to a table in use, INVLPG, a load through the new entry
 *   fork-storm      as a kernel forks: all entries of the parent lose W and are
 *                   copied; the child runs, breaks 32 pages, exits; the parent
 *                   breaks the same; the child's tables are emptied and used again
 *
 * Kage's accesses are made by C code through the inline functions, all at one CPL.
 * A guest's own handling of faults, and copying pages, are left out on both sides.
 *
 * Unicorn 2.0 walks the guest's tables, and then uses the gva as if the entry said
 * so: what it reads is checked against that, or against what the tables say.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "unicorn.h"

#define DATA   (64 * MIB)
#define CODE   (DATA)	    /* of Unicorn */
#define FIRST  (CODE + MIB) /* tables of the first process */
#define SECOND (CODE + 2 * MIB)
#define KERNEL (CODE + 3 * MIB) /* tables of the direct map, which both have */
#define BYTES  (CODE + 4 * MIB)
#define USER   ((uint64_t)1 << 46)
#define DIRECT ((uint64_t)3 << 45) /* gva of gpa 0 */
#define PTS(t) ((t) + 3 * PAGE)	   /* the first table of level 0 */
#define ENTRY  0x67		   /* present, writable, user, accessed, dirty */

#define SPOTS  32
#define PERIOD 61 /* pages from one spot to the next */
#define SPACE  (32 * MIB)
#define FORKED 2048 /* pages of a process that forks */
#define FRESH  (48 * MIB)
#define LOOKS  64

struct tables {
	struct guest g;
	char *raw, *copy; /* the peer's memory: the same contents */
	struct kage_vcpu *v;
	struct uni *uni;
	uint64_t n, from;
	bool pcid;
	bool emitted;
	int bad;
};

static inline uint64_t load(struct tables *t, uint64_t gva)
{
	uint64_t v = 0;
	int r = kage_vcpu_load(t->v, gva, &v, 8, NULL);

	if (unlikely(r))
		t->bad = r;
	return v;
}

static inline void store(struct tables *t, uint64_t gva, uint64_t v)
{
	int r = kage_vcpu_store(t->v, gva, &v, 8, NULL);

	if (unlikely(r))
		t->bad = r;
}

static inline void flush(struct tables *t, uint32_t kind, uint64_t gva, uint64_t value)
{
	const struct kage_flush f = {.size = sizeof(f), .kind = kind, .gva = gva, .value = value};
	int r = kage_vcpu_flush(t->v, &f);

	if (unlikely(r))
		t->bad = r;
}

/* Two processes whose USER lies at 0 and at SPACE, and the direct map. */
static void build(struct tables *t)
{
	uint64_t link = (KERNEL + PAGE) | ENTRY;
	struct lane l = {.raw = t->raw, .bytes = DATA};

	guest_tables(&t->g, (struct guest_map){.gva = USER, .bytes = SPACE, .tables = FIRST});
	guest_tables(&t->g, (struct guest_map){.gva = USER, .gpa = SPACE, .bytes = SPACE, .tables = SECOND});
	guest_tables(&t->g,
		     (struct guest_map){.gva = DIRECT, .bytes = BYTES, .tables = KERNEL, .large = true});
	must(kage_vm_write(t->g.vm, FIRST + (DIRECT >> 39 & 511) * 8, &link, 8), "guest table");
	must(kage_vm_write(t->g.vm, SECOND + (DIRECT >> 39 & 511) * 8, &link, 8), "guest table");
	access_fill(&l, LINES, false);
}

/* Runs guest code. `emit` writes it once. sum: if it translates; flat: if it does not. */
static double run_uni(struct tables *t, void (*emit)(struct asm_code *c), uint64_t reg[UNI_REGS],
		      uint64_t sum, uint64_t flat)
{
	static struct asm_code c;
	double ns;
	bool ok;

	if (!t->emitted) {
		c.n = 0;
		emit(&c);
		uni_code(t->uni, &c);
		t->emitted = true;
	}
	ns = cpu_ns();
	ok = uni_run(t->uni, reg);
	ns = cpu_ns() - ns;
	return ok && (reg[RAX] == sum || reg[RAX] == flat) ? ns / (double)t->n : -1;
}

static double result(const struct tables *t, double ns, uint64_t found, uint64_t sum)
{
	return found == sum && !t->bad ? ns / (double)t->n : -1;
}

/* -- context-switch ----------------------------------------------------------------------- */

static uint64_t spot(unsigned k)
{
	return access_line(k * PERIOD);
}

/* second: gpa of the second process's memory */
static uint64_t switch_sum(const struct tables *t, uint64_t second)
{
	uint64_t sum = 0;

	for (unsigned k = 0; k < SPOTS; k++)
		sum += access_content(spot(k)) + access_content(spot(k) + second);
	return sum * (t->n / 2);
}

static double sample_switch(void *arg)
{
	struct tables *t = arg;
	uint64_t found = 0, keep = t->pcid ? (uint64_t)1 << 63 : 0;
	uint64_t root[2] = {FIRST | keep | (t->pcid ? 1 : 0), SECOND | keep | (t->pcid ? 2 : 0)};
	double ns = cpu_ns();

	for (uint64_t i = 0; i < t->n; i++) {
		flush(t, KAGE_FLUSH_CR3, 0, root[i & 1]);
		for (unsigned k = 0; k < SPOTS; k++)
			found += load(t, USER + spot(k));
	}
	return result(t, cpu_ns() - ns, found, switch_sum(t, SPACE));
}

static void emit_switch(struct asm_code *c)
{
	uint32_t begin = c->n;

	for (unsigned process = 0; process < 2; process++) {
		asm_cr3(c, process ? R11 : R10);
		for (unsigned k = 0; k < SPOTS; k++)
			asm_mem(c, ASM_ADD_MEM, RAX, RSI, (int32_t)spot(k));
	}
	asm_dec(c, RCX);
	asm_jnz(c, begin);
}

static double uni_switch(void *arg)
{
	struct tables *t = arg;
	uint64_t reg[UNI_REGS] = {[RCX] = t->n / 2, [RSI] = USER, [R10] = FIRST, [R11] = SECOND};

	return run_uni(t, emit_switch, reg, switch_sum(t, SPACE), switch_sum(t, 0));
}

/* -- invlpg, pte-write --------------------------------------------------------------------- */

static uint64_t invlpg_sum(const struct tables *t)
{
	uint64_t sum = 0;

	for (uint64_t i = 1; i <= t->n; i++)
		sum += access_content(access_line(i * PERIOD & 511));
	return sum;
}

static double sample_invlpg(void *arg)
{
	struct tables *t = arg;
	uint64_t found = 0;
	double ns = cpu_ns();

	for (uint64_t i = 1; i <= t->n; i++) {
		uint64_t page = i * PERIOD & 511;

		flush(t, KAGE_FLUSH_PAGE, USER + page * PAGE, 0);
		found += load(t, USER + access_line(page));
	}
	return result(t, cpu_ns() - ns, found, invlpg_sum(t));
}

static void emit_invlpg(struct asm_code *c)
{
	uint32_t begin = c->n;

	asm_imm(c, ASM_ADD_IMM, R8, PERIOD);
	asm_imm(c, ASM_AND_IMM, R8, 511);
	asm_rr(c, ASM_MOV, R9, R8);
	asm_shl(c, R9, 12);
	asm_invlpg(c, RSI, R9);
	asm_imul(c, R10, R8, 7);
	asm_imm(c, ASM_AND_IMM, R10, 63);
	asm_shl(c, R10, 6);
	asm_rr(c, ASM_ADD, R10, R9);
	asm_sib(c, ASM_ADD_MEM, RAX, RSI, R10, 1);
	asm_dec(c, RCX);
	asm_jnz(c, begin);
}

static double uni_invlpg(void *arg)
{
	struct tables *t = arg;
	uint64_t reg[UNI_REGS] = {[RCX] = t->n, [RSI] = USER};

	return run_uni(t, emit_invlpg, reg, invlpg_sum(t), invlpg_sum(t));
}

static uint64_t pte_target(uint64_t i)
{
	return (i * 7 & (DATA / PAGE - 1)) * PAGE;
}

static uint64_t pte_sum(const struct tables *t, bool translates)
{
	uint64_t sum = 0;

	for (uint64_t i = t->from; i < t->from + t->n; i++)
		sum += access_content(translates ? pte_target(i) : (i * PERIOD & 511) * PAGE);
	return sum;
}

static double sample_pte(void *arg)
{
	struct tables *t = arg;
	uint64_t found = 0;
	double ns = cpu_ns();

	for (uint64_t i = t->from; i < t->from + t->n; i++) {
		uint64_t page = i * PERIOD & 511;

		store(t, DIRECT + PTS(FIRST) + page * 8, pte_target(i) | ENTRY);
		flush(t, KAGE_FLUSH_PAGE, USER + page * PAGE, 0);
		found += load(t, USER + page * PAGE);
	}
	ns = result(t, cpu_ns() - ns, found, pte_sum(t, true));
	t->from += t->n;
	return ns;
}

static void emit_pte(struct asm_code *c)
{
	uint32_t begin = c->n;

	asm_imul(c, R9, R8, PERIOD);
	asm_imm(c, ASM_AND_IMM, R9, 511);
	asm_imul(c, R10, R8, 7);
	asm_imm(c, ASM_AND_IMM, R10, DATA / PAGE - 1);
	asm_shl(c, R10, 12);
	asm_imm(c, ASM_OR_IMM, R10, ENTRY);
	asm_sib(c, ASM_STORE, R10, RDI, R9, 8);
	asm_shl(c, R9, 12);
	asm_invlpg(c, RSI, R9);
	asm_sib(c, ASM_ADD_MEM, RAX, RSI, R9, 1);
	asm_inc(c, R8);
	asm_dec(c, RCX);
	asm_jnz(c, begin);
}

static double uni_pte(void *arg)
{
	struct tables *t = arg;
	uint64_t reg[UNI_REGS] = {[RCX] = t->n, [RSI] = USER, [RDI] = DIRECT + PTS(FIRST), [R8] = t->from};
	double ns = run_uni(t, emit_pte, reg, pte_sum(t, true), pte_sum(t, false));

	t->from += t->n;
	return ns;
}

/* -- fork-storm ----------------------------------------------------------------------------- */

static uint64_t broken(uint64_t k)
{
	return k * PERIOD & (FORKED - 1);
}

static uint64_t looked(uint64_t k)
{
	return (k * 37 + 5) & (FORKED - 1);
}

static uint64_t storm_sum(const struct tables *t, bool translates)
{
	uint64_t sum = 0;
	bool own[FORKED] = {false};

	for (unsigned k = 0; k < SPOTS; k++)
		own[broken(k)] = true;
	for (uint64_t i = t->n; i > 0; i--) {
		for (unsigned k = 0; k < SPOTS; k++)
			sum += i + (translates ? access_content(broken(k) * PAGE) : i);
		for (unsigned k = 0; k < LOOKS; k++)
			sum += own[looked(k)] ? i : access_content(looked(k) * PAGE);
	}
	return sum;
}

static void parent_forks(struct tables *t)
{
	for (uint64_t e = 0; e < FORKED; e++) {
		uint64_t pte = load(t, DIRECT + PTS(FIRST) + e * 8) & ~(uint64_t)2;

		store(t, DIRECT + PTS(FIRST) + e * 8, pte);
		store(t, DIRECT + PTS(SECOND) + e * 8, pte);
	}
}

static uint64_t child_runs(struct tables *t, uint64_t i)
{
	uint64_t found = 0;

	flush(t, KAGE_FLUSH_CR3, 0, SECOND);
	for (uint64_t k = 0; k < SPOTS; k++) {
		uint64_t gva = USER + broken(k) * PAGE;

		store(t, DIRECT + PTS(SECOND) + broken(k) * 8, (FRESH + k * PAGE) | ENTRY);
		flush(t, KAGE_FLUSH_PAGE, gva, 0);
		store(t, gva, i);
		found += load(t, gva);
	}
	for (uint64_t k = 0; k < LOOKS; k++)
		found += load(t, USER + looked(k) * PAGE);
	return found;
}

static uint64_t parent_goes_on(struct tables *t)
{
	uint64_t found = 0;

	flush(t, KAGE_FLUSH_CR3, 0, FIRST);
	for (uint64_t k = 0; k < SPOTS; k++) {
		uint64_t gva = USER + broken(k) * PAGE, slot = DIRECT + PTS(FIRST) + broken(k) * 8, v;

		store(t, slot, load(t, slot) | 2);
		flush(t, KAGE_FLUSH_PAGE, gva, 0);
		v = load(t, gva);
		store(t, gva, v);
		found += v;
	}
	for (uint64_t e = 0; e < FORKED; e++)
		store(t, DIRECT + PTS(SECOND) + e * 8, 0);
	return found;
}

static double sample_storm(void *arg)
{
	struct tables *t = arg;
	uint64_t found = 0;
	double ns = cpu_ns();

	for (uint64_t i = t->n; i > 0; i--) {
		parent_forks(t);
		found += child_runs(t, i);
		found += parent_goes_on(t);
	}
	ns = cpu_ns() - ns;
	/* a page that the parent has not written since may not be written */
	t->bad |= kage_vcpu_store(t->v, USER + looked(0) * PAGE, &found, 8, NULL) != KAGE_GUEST_FAULT;
	return result(t, ns / 1e3, found, storm_sum(t, true));
}

/* r9: the page; rbx: USER; rsi, rdi: tables of parent and child; r14: entry of the child's next new frame. */
static void emit_child(struct asm_code *c)
{
	uint32_t begin;

	asm_cr3(c, R11);
	asm_rr(c, ASM_MOV, RDX, R14);
	asm_imm(c, ASM_AND_IMM, R8, 0);
	begin = c->n;
	asm_imul(c, R9, R8, PERIOD);
	asm_imm(c, ASM_AND_IMM, R9, FORKED - 1);
	asm_sib(c, ASM_STORE, RDX, RDI, R9, 8);
	asm_imm(c, ASM_ADD_IMM, RDX, PAGE);
	asm_shl(c, R9, 12);
	asm_invlpg(c, RBX, R9);
	asm_sib(c, ASM_STORE, RCX, RBX, R9, 1);
	asm_sib(c, ASM_ADD_MEM, RAX, RBX, R9, 1);
	asm_inc(c, R8);
	asm_imm(c, ASM_CMP_IMM, R8, SPOTS);
	asm_jnz(c, begin);
	asm_imm(c, ASM_AND_IMM, R8, 0);
	begin = c->n;
	asm_imul(c, R9, R8, 37);
	asm_imm(c, ASM_ADD_IMM, R9, 5);
	asm_imm(c, ASM_AND_IMM, R9, FORKED - 1);
	asm_shl(c, R9, 12);
	asm_sib(c, ASM_ADD_MEM, RAX, RBX, R9, 1);
	asm_inc(c, R8);
	asm_imm(c, ASM_CMP_IMM, R8, LOOKS);
	asm_jnz(c, begin);
}

static void emit_parent(struct asm_code *c)
{
	uint32_t begin;

	asm_cr3(c, R10);
	asm_imm(c, ASM_AND_IMM, R8, 0);
	begin = c->n;
	asm_imul(c, R9, R8, PERIOD);
	asm_imm(c, ASM_AND_IMM, R9, FORKED - 1);
	asm_sib(c, ASM_LOAD, RDX, RSI, R9, 8);
	asm_imm(c, ASM_OR_IMM, RDX, 2);
	asm_sib(c, ASM_STORE, RDX, RSI, R9, 8);
	asm_shl(c, R9, 12);
	asm_invlpg(c, RBX, R9);
	asm_sib(c, ASM_LOAD, RDX, RBX, R9, 1);
	asm_sib(c, ASM_STORE, RDX, RBX, R9, 1);
	asm_rr(c, ASM_ADD, RAX, RDX);
	asm_inc(c, R8);
	asm_imm(c, ASM_CMP_IMM, R8, SPOTS);
	asm_jnz(c, begin);
	asm_imm(c, ASM_AND_IMM, R8, 0);
	begin = c->n;
	asm_sib(c, ASM_STORE, R15, RDI, R8, 8);
	asm_inc(c, R8);
	asm_imm(c, ASM_CMP_IMM, R8, FORKED);
	asm_jnz(c, begin);
}

static void emit_storm(struct asm_code *c)
{
	uint32_t begin = c->n, entry;

	asm_imm(c, ASM_AND_IMM, R8, 0);
	entry = c->n;
	asm_sib(c, ASM_LOAD, RDX, RSI, R8, 8);
	asm_imm(c, ASM_AND_IMM, RDX, ~(uint32_t)2);
	asm_sib(c, ASM_STORE, RDX, RSI, R8, 8);
	asm_sib(c, ASM_STORE, RDX, RDI, R8, 8);
	asm_inc(c, R8);
	asm_imm(c, ASM_CMP_IMM, R8, FORKED);
	asm_jnz(c, entry);
	emit_child(c);
	emit_parent(c);
	asm_dec(c, RCX);
	asm_jnz(c, begin);
}

static double uni_storm(void *arg)
{
	struct tables *t = arg;
	uint64_t reg[UNI_REGS] = {
	    [RCX] = t->n,  [RBX] = USER,   [RSI] = DIRECT + PTS(FIRST), [RDI] = DIRECT + PTS(SECOND),
	    [R10] = FIRST, [R11] = SECOND, [R14] = FRESH | ENTRY};

	return run_uni(t, emit_storm, reg, storm_sum(t, true), storm_sum(t, false)) / 1e3;
}

/* -- rows --------------------------------------------------------------------------------------- */

struct kind {
	const char *name, *unit, *note;
	sample_fn ours, peer;
	uint64_t n;
};

static void tables_row(const struct bench *b, struct tables *t, const struct kind *k)
{
	struct row row = {.suite = "translate", .name = k->name, .unit = k->unit};
	bool peer = !unicorn_missing();
	struct turns turns;

	build(t);
	t->n = k->n >> b->shift;
	if (t->n < 2)
		t->n = 2;
	t->from = 0;
	t->bad = 0;
	t->emitted = false;
	t->v = vcpu_paged(t->g.vm, FIRST, 0);
	if (t->pcid) {
		struct kage_x86_regs regs;

		must(kage_vcpu_get_regs(t->v, &regs, sizeof(regs)), "registers");
		regs.cr4 |= 1 << 17;
		must(kage_vcpu_set_regs(t->v, &regs, sizeof(regs)), "registers");
	}
	if (peer) {
		row.peer = "Unicorn";
		memcpy(t->copy, t->raw, BYTES);
		t->uni = uni_create(t->copy, BYTES, DIRECT, FIRST, CODE);
		uni_known(t->uni, USER, SPACE);
	}
	turns = take_turns(b, k->ours, t, peer ? k->peer : NULL, t);
	row_note(&row, "%s%s%s", k->note, peer ? "" : "; no peer: ", peer ? "" : unicorn_missing());
	report_turns(&row, &turns);
	if (peer)
		uni_destroy(t->uni);
	kage_vcpu_destroy(t->v);
}

/* -- shadow-miss --------------------------------------------------------------------------------- */

struct first {
	struct guest g;
	struct lane lane;
	uint64_t pages, tables, bytes;
	bool large;
};

static double sample_first(void *arg)
{
	struct first *f = arg;
	struct kage_vm *clone = must_clone(f->g.vm);
	struct kage_vcpu *v = vcpu_paged(clone, f->tables, 0);
	uint64_t found = 0, sum = 0, before = guest_counters(&f->g, clone).shadow_faults, installed;
	int bad = 0;
	double ns = cpu_ns();

	for (uint64_t i = 0; i < f->pages; i++) {
		uint64_t seen = 0;

		bad |=
		    kage_vcpu_load(v, USER + access_line(i * 0x9e3779b1u & (f->pages - 1)), &seen, 8, NULL);
		found += seen;
	}
	ns = cpu_ns() - ns;
	for (uint64_t i = 0; i < f->pages; i++)
		sum += access_content(access_line(i));
	installed = guest_counters(&f->g, clone).shadow_faults - before;
	kage_vcpu_destroy(v);
	must(kage_vm_destroy(clone), "destroy clone");
	guest_settle(&f->g);
	return !bad && found == sum && installed >= f->pages / (f->large ? 512 : 1) ? ns / (double)f->pages
										    : -1;
}

/* A new CPU each time: its TLB is empty. */
static double uni_first(void *arg)
{
	struct first *f = arg;
	struct work w = {.lane = &f->lane,
			 .shape = PAGES,
			 .n = f->pages,
			 .pages = f->pages,
			 .uni = uni_create(f->lane.raw, f->bytes, USER, f->tables, f->pages * PAGE)};
	double ns = uni_sample(&w);

	uni_destroy(w.uni);
	return ns;
}

static void first_row(const struct bench *b, const char *name, bool large, double limit)
{
	uint64_t data = bench_size(b, GIB), tables = data + 2 * MIB;
	struct first f = {.g = guest_create(data + 8 * MIB, 0, 0),
			  .pages = data / PAGE,
			  .tables = tables,
			  .bytes = data + 8 * MIB,
			  .large = large};
	struct row row = {.suite = "translate",
			  .name = name,
			  .unit = "ns",
			  .goal = limit > 0 ? GOAL_MOST : GOAL_NONE,
			  .limit = limit};
	bool peer = !unicorn_missing();
	struct turns t;
	uint64_t entries;

	entries = guest_tables(
	    &f.g, (struct guest_map){.gva = USER, .bytes = tables, .tables = tables, .large = large});
	f.lane = (struct lane){.raw = guest_raw(&f.g, f.bytes), .gva = USER, .bytes = data};
	access_fill(&f.lane, LINES, false);
	guest_unraw(&f.g,
		    f.bytes); /* no pin, which would keep clones from sharing; the memory stays where it is */
	if (peer)
		row.peer = "Unicorn, TLB empty";
	t = take_turns(b, sample_first, &f, peer ? uni_first : NULL, &f);
	row_note(&row,
		 "first load from each page of %llu MiB, at random, in a new clone; walk of the guest's "
		 "tables (%llu leaf "
		 "entries present), lookup, installing%s%s",
		 (unsigned long long)(data / MIB), (unsigned long long)entries,
		 peer ? "" : "; no peer: ", peer ? "" : unicorn_missing());
	report_turns(&row, &t);
	guest_destroy(&f.g);
}

void bench_tables(const struct bench *b)
{
	static const struct kind kinds[] = {
	    {"context-switch", "ns", "MOV to CR3 and 32 loads from the process's pages", sample_switch,
	     uni_switch, 1 << 15},
	    {"invlpg", "ns", "INVLPG and a load from that page", sample_invlpg, uni_invlpg, 1 << 18},
	    {"pte-write", "ns", "store to an entry of a table in use, INVLPG, load through it", sample_pte,
	     uni_pte, 1 << 17},
	    {"fork-storm", "us",
	     "a fork: 2,048 entries write-protected and copied, child and parent each break 32, tables "
	     "emptied",
	     sample_storm, uni_storm, 1 << 7},
	};
	static const struct kind pcid = {
	    "context-switch-pcid", "ns",       "the same with PCIDs, which the peer lacks: no flush",
	    sample_switch,	   uni_switch, 1 << 15};
	struct tables t = {.g = guest_create(BYTES, 0, 0)};

	t.raw = guest_raw(&t.g, BYTES);
	t.copy =
	    must_map(mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "mmap");
	madvise(t.copy, BYTES, MADV_HUGEPAGE); /* as good as the host has it */
	for (unsigned i = 0; i < LENGTH(kinds); i++)
		tables_row(b, &t, &kinds[i]);
	t.pcid = true;
	tables_row(b, &t, &pcid);
	munmap(t.copy, BYTES);
	guest_unraw(&t.g, BYTES);
	guest_destroy(&t.g);
	first_row(b, "shadow-miss-1g", false, 500);
	first_row(b, "shadow-miss-1g-2m", true, 0);
}
