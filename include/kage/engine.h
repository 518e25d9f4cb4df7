/* SPDX-License-Identifier: MIT */
/**
 * @file
 * The engine: one pool of frames and the guests that live in it.
 */
#ifndef KAGE_ENGINE_H
#define KAGE_ENGINE_H

#include <kage/types.h>

KAGE_BEGIN

/** What stands behind the pool's frames. */
enum kage_backing {
	/** Anonymous memory with transparent huge pages: fastest to grow. */
	KAGE_BACKING_ANON = 0,
	/** One memfd for each merge domain: what a KVM mirror or another process can map. */
	KAGE_BACKING_MEMFD = 1,
};

enum kage_log_level { KAGE_LOG_ERROR = 0, KAGE_LOG_WARN = 1, KAGE_LOG_INFO = 2 };

/** Replaces malloc for the engine's own objects (not for frames and tables). */
struct kage_alloc {
	/** Returns zeroed memory aligned to 64 bytes, or NULL. */
	void *(*alloc)(void *opaque, size_t bytes);
	void (*free)(void *opaque, void *ptr, size_t bytes);
	void *opaque;
};

enum kage_clock_id {
	KAGE_CLOCK_WALL = 0,   /**< time that passes, from any beginning */
	KAGE_CLOCK_THREAD = 1, /**< CPU time of the calling thread */
};

/** Replaces clock_gettime(2): for embedders that run on a time of their own, and for tests. */
struct kage_clock {
	/** Nanoseconds; never less than what it answered before. Any thread, no locks that a call of the engine is made under. */
	uint64_t (*now)(void *opaque, enum kage_clock_id id);
	void *opaque;
};

struct kage_engine_config {
	uint32_t size;
	uint32_t backing; /**< enum kage_backing */
	/** Bytes of guest memory and tables that may be in use at once. 0: no limit but the host's. */
	uint64_t memory_limit;
	/**
	 * Bytes of address space to reserve for frames, a power of two from
	 * 1 GiB to 64 TiB. 0: 16 TiB. If the host refuses, it is halved until
	 * the host agrees.
	 */
	uint64_t address_space;
	/** Bytes of populated frames kept ready for COW breaks. 0: 4 MiB. */
	uint64_t reserve;
	/**
	 * Key of the salts of content hashes, one for each merge domain, and of all other random choices; 0: 256 bits
	 * from getrandom(2). Fix it only to repeat a run: what follows from it can be guessed then.
	 */
	uint64_t seed;
	/** Milliseconds to wait for a vCPU to leave its window of use. 0: 10,000. */
	uint32_t window_timeout_ms;
	uint32_t reserved;
	/** Called with one line (no newline): WARN a refused call, ERROR a violated invariant. From any thread that is in the library. */
	void (*log)(void *opaque, int level, const char *line);
	void *log_opaque;
	/** NULL members: malloc; what is as large as a huge page (2 MiB) is mapped apart. */
	struct kage_alloc alloc;
	/** What budgets and the advisor go by. NULL: CLOCK_MONOTONIC and CLOCK_THREAD_CPUTIME_ID. */
	struct kage_clock clock;
};

/**
 * Creates an engine.
 *
 * Returns KAGE_OK, -EINVAL (NULL out, unknown backing, address_space out of
 * range), -E2BIG (unknown config tail), -ENOMEM, or the errno of mmap(2),
 * memfd_create(2), eventfd(2).
 * Any thread. `config` may be NULL: all defaults.
 */
KAGE_API int kage_engine_create(const struct kage_engine_config *config, struct kage_engine **out);

/**
 * Destroys an engine; NULL is fine. Returns KAGE_OK, or -EBUSY while guests
 * exist (nothing is changed then). No other call on the engine may be running.
 */
KAGE_API int kage_engine_destroy(struct kage_engine *engine);

/**
 * A descriptor that polls readable when a step is due (deferred frees wait,
 * the populated reserve is low, or merging has work). Borrowed: do not close.
 * kage_engine_step() clears it. Returns -EINVAL for NULL.
 */
KAGE_API int kage_engine_fd(struct kage_engine *engine);

enum kage_budget_flags {
	/**
	 * The advisor sets the number of pages, from a CPU share and the time that a pass should take (struct kage_tune).
	 * It begins a pass no sooner than that time after the last one began, whatever is due; and says in
	 * kage_progress.wait_usec when it wants to be called again. `pages`, if not 0, is one more limit.
	 */
	KAGE_BUDGET_ADVISED = 1u << 0,
};

/** What one step may spend. All zero: one whole pass over what is due. */
struct kage_budget {
	uint32_t size;
	uint32_t flags; /**< enum kage_budget_flags; others: -EINVAL */
	uint64_t pages; /**< pages to examine for merging */
	uint64_t usec;  /**< microseconds of wall time; checked between batches of at most 512 pages */
};

/** What one step did. */
struct kage_progress {
	uint32_t size;
	/** Nonzero: the budget ran out before the pass ended. */
	uint32_t more;
	uint64_t pages_scanned;
	uint64_t pages_merged;
	uint64_t frames_freed; /**< released after their grace period */
	uint64_t passes;       /**< merge passes completed since creation */
	/**
	 * Advised steps: microseconds until the next one is worth while, 0: at once. What the guests do meanwhile does not
	 * shorten it, and does not make kage_engine_fd() readable; other work for a step, new guests and hints do. So
	 * an embedder polls the descriptor with this time-out. 0 after steps that are not advised.
	 */
	uint64_t wait_usec;
	uint64_t pages_budget; /**< advised steps: pages that the advisor allowed this one, 0: it was too early */
};

/**
 * Does the background work that is due: merging, releasing of frames after
 * their grace period, refilling the populated reserve. The embedder decides on
 * which thread and how often; several threads may call at once: they share a pass, and each
 * call ends with the pass that it has begun in.
 *
 * `budget` may be NULL (one whole pass), `progress` may be NULL.
 * Returns KAGE_OK, -EINVAL, -E2BIG, -ENOMEM (what there was memory for has been done, the rest
 * waits for a later step; `progress` is not filled in), -ETIMEDOUT (a vCPU did not leave its window of use). The calling thread must not be inside a vCPU's window of
 * use (else -EDEADLK).
 */
KAGE_API int kage_engine_step(struct kage_engine *engine, const struct kage_budget *budget,
			      struct kage_progress *progress);

enum kage_tune_flags {
	/** Merging runs in steps (default: off, as KSM's `run`). */
	KAGE_TUNE_MERGE = 1u << 0,
	/** Pages that change fast are looked at as soon as all others (KSM: smart_scan 0). */
	KAGE_TUNE_NO_BACKOFF = 1u << 1,
};

/** Settings that may change while the engine runs. All fields are taken as they are. */
struct kage_tune {
	uint32_t size;
	uint32_t flags; /**< enum kage_tune_flags */
	/**
	 * 0: zero pages are merged into a frame of zeroes (enum kage_domain_flags says whose); 1: like any other content.
	 * Default 0, as a frame of zeroes costs no frame, no hash and no chain, and most duplicates are zeroes; 1 bounds
	 * who shares it, by `max_sharing` (KSM: use_zero_pages, 0 by default, since its zero page is everybody's).
	 */
	uint32_t no_zero_pages;
	/**
	 * Most guest pages that may share one stable frame; what comes beyond gets another frame of the same content. At least 2.
	 * It bounds the frame's chain, of 8 bytes for each place that it was merged from, and how long pruning that takes. 0: 256 Ki,
	 * which are 2 MiB of chain (KSM: max_page_sharing, 256, since whoever reclaims or migrates a page there walks all its
	 * places; here a break does not, only pruning and the audit do).
	 */
	uint32_t max_sharing;

	/* the advisor, for steps with KAGE_BUDGET_ADVISED */

	/**
	 * Percent of one CPU that merging may use, over any second; up to 10,000, for several threads that step. 0: 20
	 * (KSM's advisor: 70, for it reads every page of every pass; a fifth of a CPU hashes more than a GiB a second,
	 * and a pass reads what was written).
	 */
	uint32_t cpu_share;
	/**
	 * Milliseconds that a pass should take; up to a day. A page is looked at once it has been quiet for a whole pass, so this is also
	 * how long content must last to be worth sharing. 0: 10,000 (KSM's advisor: 200,000, see above; much
	 * less merges pages that are about to be written, each of which costs a merge and a COW break).
	 */
	uint32_t scan_msec;
	/** Pages that a step may look at even if the share is used up: it never stands still. 0: 64, some 30 us. */
	uint32_t min_pages;
	/** Most pages of a step: bounds how long it keeps its thread, about 15 ms of hashing. 0: 32,768. Not less than `min_pages`. */
	uint32_t max_pages;

	/**
	 * Most passes for which a page is left alone that keeps changing, 1 to 100: after the k-th failure on end (it
	 * was written before it had been quiet for a pass, or in the pass after it was looked at) it is left alone for 2^(k-1) passes, until a try lasts.
	 * So is a page whose equal was found, but that another guest sees too, a clone, whose region is not mergeable.
	 * 0: 64, with passes of ten seconds some eleven minutes (KSM's smart scan: 8 scans of 200 seconds).
	 * Memory: 1,096 bytes for each 2 MiB with such a page.
	 */
	uint32_t backoff;
	/**
	 * The advisor again: pages of guests under KVM that merging may map anew in a second, of all guests together. A guest's next access
	 * to such a page is a fault of its own, which KVM answers in one to nine microseconds; merging a page with another one moves both, with one
	 * that is merged already only itself. 0: 6,000, some 1 to 3 % of one vCPU, however many guests run; they
	 * share 12 to 24 MiB a second at that pace (KSM looks at 20 MiB a second by default, merged or not). Guests that
	 * do not run yet lose nothing: merge those in steps that are not advised.
	 */
	uint32_t moved_pages;
};

/**
 * Applies settings, all of them. Returns KAGE_OK, -EINVAL (unknown flags, a field out of its range) or -E2BIG. Any
 * thread.
 */
KAGE_API int kage_engine_tune(struct kage_engine *engine, const struct kage_tune *tune);

enum kage_domain_flags {
	/**
	 * Pages of zeroes are merged into a frame that all domains with this flag
	 * share. Without it each domain has a frame of zeroes of its own, so that
	 * nothing that is done to the frame's cache lines or memory cells reaches
	 * another domain. (There are 32,000 such frames; further domains merge pages of zeroes as
	 * any other content. Memory that was never written is no page of zeroes: it
	 * has no frame of the pool yet, whatever the domain.)
	 */
	KAGE_DOMAIN_ZERO_SHARED = 1u << 0,
	/**
	 * Merging between guests that do not trust each other: how long an access
	 * takes does not tell whether another guest of the domain holds the same
	 * contents. After M. Oliverio, K. Razavi, H. Bos, C. Giuffrida, "Secure Page
	 * Fusion with VUsion", SOSP 2017.
	 *
	 * A page that merging looks at is out of its guest's reach afterwards, whether
	 * it was merged or not. The first access to it, a read too, takes one and
	 * the same path, at the price of a COW break: contents are copied to a
	 * frame that is drawn at random, which is the guest's own. Frames that pages are merged into
	 * are drawn in the same way. kage_vm_read() counts as an access, as device models read
	 * on behalf of guests; kage_page_digest(), kage_census_take() and dumps do not. Pages of zeroes
	 * are merged as any other contents (so not with ZERO_SHARED: -EINVAL).
	 *
	 * Guests of such a domain cannot be attached to KVM (kage_kvm_attach() returns -EOPNOTSUPP).
	 * What this protects against, and what not: engine/README.md, "Tenants".
	 */
	KAGE_DOMAIN_HARDENED = 1u << 1,
};

/** What a merge domain (kage_vm_config.merge_domain) is like. All fields are taken as they are. */
struct kage_domain_config {
	uint32_t size;
	uint32_t flags; /**< enum kage_domain_flags */
	/**
	 * HARDENED: frames that are kept for draws, 64 to 2^20; log2 of it is the entropy of a draw. Merging
	 * waits until there is memory for all of them, and says so in the log; guests' accesses
	 * need none but that of a COW break, and may use the reserve when memory is short. 0: 32,768 (128 MiB, 15 bits, as VUsion's),
	 * or a sixteenth of memory_limit if that is less, but at least 64. Else must be 0.
	 */
	uint32_t reserve_frames;
	uint32_t reserved; /**< must be 0 */
};

/**
 * Configures a merge domain, 0 to 65535, before its first guest is created. A
 * domain that was never configured is as if with a zeroed struct. Frames are never shared between domains
 * except for the one frame that KAGE_DOMAIN_ZERO_SHARED names, and contents
 * are hashed with a secret of each domain's own (see kage_engine_config.seed).
 *
 * Returns KAGE_OK, -EINVAL (domain, flags or reserve_frames), -E2BIG, -ENOMEM, -EBUSY (guests
 * live in the domain; nothing is changed). Any thread.
 */
KAGE_API int kage_domain_configure(struct kage_engine *engine, uint32_t domain,
				   const struct kage_domain_config *config);

struct kage_audit {
	uint32_t size;
	uint32_t reserved;
	/** Called with one line for each violated invariant. May be NULL. */
	void (*report)(void *opaque, const char *line);
	void *opaque;
	uint64_t checks;     /**< out: single assertions made */
	uint64_t violations; /**< out */
};

/**
 * Checks every invariant of the whole engine: reference counts against the
 * tables, the write rule, reverse maps, pool free lists, shadow tables against
 * guest and primary tables. Threads that change a guest's memory, by a fault too, wait for it; vCPU threads
 * may keep running: their TLB misses wait only where a page is not present yet, or for a shadow table's turn.
 *
 * Returns KAGE_OK (no violation), -EUCLEAN (violations; see the struct),
 * -EINVAL, -E2BIG, -ENOMEM.
 */
KAGE_API int kage_engine_audit(struct kage_engine *engine, struct kage_audit *audit);

KAGE_END
#endif
