/* SPDX-License-Identifier: MIT */
/*
 * Page tables of any format, as data, and the one walker over them.
 *
 * A format is a constant: one descriptor a level, root first, plus functions
 * that decode an entry. Formats are Kage's own (read and written), guests' (read
 * only) and a fake one for tests, whose bits lie elsewhere so that code that
 * pokes bits by hand breaks loudly. Numbering of levels: leaf is 0.
 * (Habits: jailhouse paging.c, hafnium fake/mm.c, Linux arm64 pgtable.c.)
 *
 * Invariants:
 *  T1  a walker visits addresses in ascending order, a table before (PRE) and
 *      after (POST) what it holds.
 *  T2  an entry is read once (acquire) for each visit; a visitor that replaces
 *      it says so through the return value or by storing to *entryp itself.
 *  T3  the walker allocates nothing and takes no lock.
 */
#ifndef KAGE_PT_PT_H
#define KAGE_PT_PT_H

#include "base/addr.h"

#define PT_MAX_LEVELS 5

enum pt_state {
	PT_NONE,      /* nothing */
	PT_LEAF,      /* maps a page of the level's size (level 0: 4 KiB, above: a block) */
	PT_TABLE,     /* points to a table of the next level down */
	PT_SWAP,
	PT_MIGRATION,
	PT_PROTNONE,  /* NUMA hint */
	PT_POISON,
	PT_HOST_PRIVATE, /* the host kernel broke COW here; no pfn until adopted */
	PT_RESERVED,  /* reserved bits set: a guest format's fault */
	PT_ADDRESS_SIZE, /* points beyond the guest's physical addresses (arm64) */
	PT_ACCESS_FLAG,  /* software keeps the accessed bit, and it is clear (arm64) */
	PT_OUTSIDE,      /* of an address, not of an entry: no table translates it */
};

/* What an entry says, format aside. */
struct pt_decoded {
	enum pt_state state;
	uint64_t addr;     /* LEAF, TABLE: physical address it points to */
	uint32_t perm;     /* KAGE_READ | WRITE | EXEC granted here */
	bool user;         /* user mode may use it */
	bool user_exec;    /* user mode may execute it; where the format does not tell, as perm says */
	bool accessed, dirty, global; /* dirty: a write has nothing to set */
	uint8_t pkey;
};

/* Parameters of a guest format that change decoding; all-zero for Kage's own. Only bytes, so that memcmp() compares. */
struct pt_params {
	uint8_t phys_bits; /* 0: 52; arm64: output address bits in effect */
	bool nx;       /* x86: EFER.NXE */
	bool page1g;   /* x86: 1 GiB pages */
	bool pse;      /* x86, 32-bit: CR4.PSE */
	bool ds;       /* arm64, 4K and 16K: TCR.DS, addresses of 52 bits */
	bool lpa;      /* arm64, 64K: bits 15:12 of an entry are address bits 51:48 */
	bool giant;    /* arm64, 64K: blocks of 4 TiB */
	bool ha, hd;   /* arm64: hardware sets the access flag, the dirty state */
	bool hpd;      /* arm64: no attributes in table entries */
};

struct pt_level {
	uint8_t shift;       /* of the address: log2 of what one entry maps */
	uint8_t bits;        /* log2 of the number of entries */
	bool block;          /* an entry may map memory itself */
	struct pt_decoded (*decode)(uint64_t entry, const struct pt_params *p);
};

struct pt_format {
	const char *name;
	uint8_t levels;
	uint8_t entry_bytes;
	bool writable;       /* Kage may write such tables (not a guest's) */
	bool sign_extended;  /* addresses repeat their top bit (x86): two halves at the ends of 2^64 */
	bool entangled;      /* a permission that is gained may cost another mode one (arm64: WXN, PAN) */
	/* encode for writable formats */
	uint64_t (*make_leaf)(uint64_t addr, unsigned level, uint32_t perm);
	uint64_t (*make_table)(uint64_t addr, uint32_t perm);
	struct pt_level level[PT_MAX_LEVELS]; /* root first: level[levels - 1 - n] is level n */
};

static inline const struct pt_level *pt_level_of(const struct pt_format *f, unsigned level)
{
	return &f->level[f->levels - 1 - level];
}

/* Kage's own, folded to 2, 3, 4 or 5 levels (index by levels - 2). */
extern const struct pt_format pt_kage[4];
/* Intel SDM vol. 3A ch. 4: 4-level and 5-level paging, PAE, 32-bit. Read only. */
extern const struct pt_format pt_x86_4, pt_x86_5, pt_x86_pae, pt_x86_32;
/* Arm ARM D8.3: VMSAv8-64 stage 1 by granule, from the level that 52-bit addresses begin at. Read only. */
extern const struct pt_format pt_arm64_4k, pt_arm64_16k, pt_arm64_64k;
/* For tests: 3 levels, state and permission bits in places of their own. */
extern const struct pt_format pt_fake;

/* -- the walker ---------------------------------------------------------- */

enum pt_when { PT_VISIT_LEAF = 1, PT_VISIT_PRE = 2, PT_VISIT_POST = 4 };

struct pt_visit {
	const struct pt_format *format;
	uint64_t addr;    /* first address the entry maps */
	uint64_t start, end; /* the part of the walk that lies in the entry; end exclusive */
	unsigned level;
	enum pt_when when;
	uint64_t entry;
	uint64_t *entryp; /* NULL if the tables are read through `read` */
	uint64_t table;   /* physical address of the table that holds the entry */
	void *arg;
};

/* What a visitor asks for (>= 0), or -errno which ends the walk. */
enum pt_next {
	PT_CONTINUE = 0,
	PT_SKIP = 1,   /* PRE: do not descend */
	PT_REREAD = 2, /* the visitor changed the entry: read it again and act on what it is now (no second visit of the same kind) */
	PT_STOP = 3,   /* end the walk; pt_walk returns PT_STOP */
};

struct pt_walk {
	const struct pt_format *format;
	const struct pt_params *params;   /* NULL: all zero */
	uint64_t root;                    /* physical address of the root table */
	unsigned root_level;              /* usually format->levels - 1 */
	unsigned root_bits;               /* not 0: the root translates 2^root_bits bytes around `start` */
	unsigned flags;                   /* which visits (enum pt_when); LEAF: every entry that is no table, NONE too if `none` */
	bool none;
	/* Physical address of a table -> pointer, for tables in our own memory; or NULL and `read`. */
	void *(*map)(void *arg, uint64_t addr);
	/* Reads one entry; -errno ends the walk, except -EFAULT: the entry counts as none. */
	int (*read)(void *arg, uint64_t addr, unsigned bytes, uint64_t *entry);
	int (*visit)(const struct pt_visit *v);
	void *arg;
};

/*
 * Walks [start, end); end 0 is 2^64. Returns 0, PT_STOP or -errno. Addresses that the root does not reach are not
 * visited; a root_level below the format's top means the table that holds `start`. Guest walks are bounded by the
 * range alone: loops in guest tables end with their level.
 */
int pt_walk(const struct pt_walk *w, uint64_t start, uint64_t end);

/* -- where a walk begins -------------------------------------------------- */

/* A root table of a guest, from the registers: it translates 2^bits bytes from `base` up. */
struct pt_root {
	const struct pt_format *format;
	uint64_t table; /* physical address of its first entry */
	uint64_t base;
	struct pt_params params;
	uint8_t bits;
	uint8_t level; /* of its entries */
	/* PT_TABLE; else what is wrong with all addresses below, and `level` is what a fault reports. */
	enum pt_state state;
};

/* -- one address in a guest's tables ------------------------------------- */

struct pt_guest_step {
	uint64_t gpa;   /* of the entry */
	uint64_t entry;
	struct pt_decoded d;
};

struct pt_guest_path {
	unsigned level;  /* where the walk ended: the leaf's level, or that of the entry that stopped it */
	enum pt_state state; /* PT_LEAF, PT_NONE (not present), PT_RESERVED; PT_POISON: an entry is in no memory */
	uint64_t gpa;    /* LEAF: the translation of the address */
	uint32_t perm;   /* AND along the path */
	bool user, user_exec; /* AND along the path */
	uint8_t pkey;
	struct pt_guest_step step[PT_MAX_LEVELS]; /* by level */
};

/*
 * Follows one address through a guest's tables from `root`. Checks no
 * permission and writes nothing. `read` returns 0, or an error that ends the
 * walk and is returned, except -EFAULT: state PT_POISON, level of the unreadable entry.
 */
int pt_guest_walk(const struct pt_format *f, const struct pt_params *p, uint64_t root, uint64_t addr,
		  int (*read)(void *arg, uint64_t gpa, unsigned bytes, uint64_t *entry), void *arg,
		  struct pt_guest_path *path);
/* The same from one of several roots, which is a PT_TABLE. */
int pt_root_walk(const struct pt_root *root, uint64_t addr,
		 int (*read)(void *arg, uint64_t gpa, unsigned bytes, uint64_t *entry), void *arg,
		 struct pt_guest_path *path);

/* -- dump ---------------------------------------------------------------- */

/*
 * Writes any table as text or JSON, one line (object) a run of neighbours that
 * map contiguous memory with equal permissions. `put` takes pieces of output;
 * a negative return ends the dump and is returned. `params` as in pt_walk.
 */
struct pt_dump {
	struct pt_walk walk; /* visit and flags are the dump's */
	/* Not NULL: the trees to dump, one after the other, in place of the walk's own format and root. */
	const struct pt_root *roots;
	unsigned nroots;
	bool json;
	int (*put)(void *arg, const char *text, size_t len);
	void *put_arg;
	/* Optional: a word for a leaf ("zero", "merged", "home"); runs end where it changes. */
	const char *(*label)(void *arg, uint64_t entry, unsigned level);
};
int pt_dump(struct pt_dump *d, uint64_t start, uint64_t end);

/* -- x86 permission rules ------------------------------------------------ */

/* SDM vol. 3A 4.6; what decides besides the entries. */
struct x86_mode {
	bool wp, smep, smap, pke;
	bool nxe;
	bool user; /* CPL 3 */
	bool ac;   /* EFLAGS.AC */
	uint32_t pkru;
};

#define X86_PF_P 1u
#define X86_PF_W 2u
#define X86_PF_U 4u
#define X86_PF_RSVD 8u
#define X86_PF_I 16u
#define X86_PF_PK 32u

/* May `access` use a translation with these permissions? 0, or the #PF error code (P set). One access kind at a time. */
uint32_t x86_check(const struct x86_mode *m, uint32_t perm, bool user_page, uint8_t pkey, uint32_t access);
/* What of READ, WRITE, EXEC x86_check() lets through. */
uint32_t x86_allowed(const struct x86_mode *m, uint32_t perm, bool user_page, uint8_t pkey);
/* May a PDPTE be loaded by MOV to CR3 (4.4.1)? */
bool x86_pdpte_valid(uint64_t entry, const struct pt_params *p);
/* Error code of a fault found while walking (`rsvd`: reserved bits; else not present). */
uint32_t x86_walk_error(const struct x86_mode *m, uint32_t access, bool rsvd);

#endif
