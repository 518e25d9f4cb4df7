/* SPDX-License-Identifier: MIT */
/*
 * Engine: create, step, tune, audit, destroy. And the rules of config structs.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include <kage/kage.h>
#include "api/engine.h"
#include "api/vm.h"
#include "merge/backoff.h"
#include "mm/fused.h"
#include "mm/mirror.h"
#include "shadow/shadow.h"

#define SPACE_DEFAULT ((uint64_t)16 << 40)
#define SPACE_MIN ((uint64_t)1 << 30)
#define SPACE_MAX ((uint64_t)64 << 40)
#define RESERVE_DEFAULT ((uint64_t)4 << 20)
#define WINDOW_TIMEOUT_MS 10000
#define DEFER_DUE 1024 /* objects */
#define UPKEEP_USEC 2000 /* of a step with a budget, for reserves */
#define SHARE_MAX 10000 /* percent: a hundred CPUs */
#define SCAN_MSEC_MAX (24 * 3600 * 1000u)
#define DIGESTS ((uint64_t)1 << 32) /* whose salt is nobody's; domains have theirs by number */

uint32_t kage_version(void)
{
	return KAGE_VERSION_MAJOR << 16 | KAGE_VERSION_MINOR << 8 | KAGE_VERSION_PATCH;
}

int config_check(const void *config, size_t known, size_t least)
{
	const uint8_t *bytes = config;
	uint32_t size;

	memcpy(&size, config, sizeof(size));
	if (size < least)
		return -EINVAL;
	for (size_t i = known; i < size; i++)
		if (bytes[i])
			return -E2BIG;
	return 0;
}

void config_copy(void *to, const void *config, size_t known)
{
	uint32_t size;

	memset(to, 0, known);
	if (!config)
		return;
	memcpy(&size, config, sizeof(size));
	memcpy(to, config, MIN(size, known));
}

int api_result(struct kage_engine *e, const char *call, uint64_t gpa, uint64_t len, int r)
{
	char text[64];

	if (likely(r >= 0) || !e || !e->env.log)
		return r;
	if (len)
		env_log(&e->env, KAGE_LOG_WARN, "%s: gpa %#llx len %#llx: %s", call, (unsigned long long)gpa,
			(unsigned long long)len, strerror_r(-r, text, sizeof(text)));
	else
		env_log(&e->env, KAGE_LOG_WARN, "%s: %s", call, strerror_r(-r, text, sizeof(text)));
	return r;
}

static int engine_config(struct kage_engine_config *c, const struct kage_engine_config *config)
{
	int r = config ? config_check(config, sizeof(*c), offsetof(struct kage_engine_config, clock)) : 0;

	if (r)
		return r;
	config_copy(c, config, sizeof(*c));
	if (c->backing > KAGE_BACKING_MEMFD)
		return -EINVAL;
	if (!c->address_space)
		c->address_space = SPACE_DEFAULT;
	if (c->address_space & (c->address_space - 1) || c->address_space < SPACE_MIN || c->address_space > SPACE_MAX)
		return -EINVAL;
	if (!c->alloc.alloc != !c->alloc.free)
		return -EINVAL;
	if (!c->reserve)
		c->reserve = RESERVE_DEFAULT;
	if (!c->window_timeout_ms)
		c->window_timeout_ms = WINDOW_TIMEOUT_MS;
	return 0;
}

/* What nobody may guess comes from it; a fixed seed repeats a run. */
static int engine_key(uint64_t seed, struct random_key *key)
{
	*key = random_key_of(seed);
	if (!seed && getrandom(key, sizeof(*key), 0) != sizeof(*key))
		return -errno;
	return 0;
}

static void due(void *arg)
{
	engine_due(arg);
}

int kage_engine_create(const struct kage_engine_config *config, struct kage_engine **out)
{
	struct kage_engine_config c;
	struct pool_config pc;
	struct kage_engine *e;
	struct random_key key;
	struct env env;
	int r;

	if (!out)
		return -EINVAL;
	r = engine_config(&c, config);
	if (!r)
		r = engine_key(c.seed, &key);
	if (r)
		return r;
	memset(&env, 0, sizeof(env));
	env_init(&env, &c);
	e = env_alloc(&env, sizeof(*e));
	if (!e)
		return -ENOMEM;
	env_init(&e->env, &c);
	e->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (e->event < 0) {
		r = -errno;
		goto free_engine;
	}
	pc = (struct pool_config){ .backing = c.backing, .address_space = c.address_space,
				   .memory_limit = c.memory_limit, .reserve = c.reserve };
	r = pool_create(&pc, &e->env, &e->pool);
	if (r)
		goto close_event;
	r = host_init(&e->host, &e->env, e->pool, &key, c.memory_limit != 0);
	if (r)
		goto destroy_pool;
	r = merge_init(&e->merge, &e->host, random_of(&key, DIGESTS));
	if (r)
		goto finish_host;
	pace_init(&e->pace);
	brlock_init(&e->upkeep, RANK_UPKEEP, 0);
	e->memory_limit = c.memory_limit;
	e->env.due = due;
	e->env.due_arg = e;
	*out = e;
	return KAGE_OK;
finish_host:
	host_finish(&e->host);
destroy_pool:
	pool_destroy(e->pool);
close_event:
	close(e->event);
free_engine:
	env_finish(&e->env);
	env_free(&env, e, sizeof(*e));
	return r;
}

int kage_engine_destroy(struct kage_engine *e)
{
	struct kage_alloc alloc;
	struct env env;

	if (!e)
		return KAGE_OK;
	if (atomic_load(&e->guests))
		return api_result(e, __func__, 0, 0, -EBUSY);
	merge_finish(&e->merge);
	while (pool_reap(e->pool) + defer_run(&e->env.defer)) /* a freed extent's sections leave after another grace period */
		;
	host_finish(&e->host);
	if (pool_destroy(e->pool))
		env_corrupt(&e->env, "frames were left when the engine was destroyed");
	close(e->event);
	env_finish(&e->env);
	alloc = e->env.alloc;
	memset(&env, 0, sizeof(env));
	env.alloc = alloc;
	env_free(&env, e, sizeof(*e));
	return KAGE_OK;
}

int kage_engine_fd(struct kage_engine *e)
{
	return e ? e->event : -EINVAL;
}

void engine_due(struct kage_engine *e)
{
	uint64_t one = 1;
	ssize_t n;

	if (atomic_load(&e->due) || atomic_exchange(&e->due, true))
		return;
	n = write(e->event, &one, sizeof(one)); /* EAGAIN: it is readable already */
	(void)n;
}

void engine_settle(struct kage_engine *e)
{
	if (pool_reap_due(e->pool) || atomic_load(&e->env.defer.pending) > DEFER_DUE) {
		struct brlock_held held = brlock_read(&e->upkeep);

		pool_reap(e->pool);
		defer_run(&e->env.defer);
		brlock_read_drop(&e->upkeep, held);
	}
	if (pool_pending(e->pool) || atomic_load(&e->merge.on) || atomic_load(&e->env.defer.pending))
		engine_due(e);
}

void engine_refill(struct kage_vm *vm, gfn_t start, uint64_t npages)
{
	struct kage_engine *e = vm->engine;
	struct brlock_held held = brlock_read(&e->upkeep);

	pool_reap(e->pool);
	brlock_read_drop(&e->upkeep, held);
	mm_refill(&vm->mm, start, gfn_add(start, npages));
}

static int step_merge(struct kage_engine *e, const struct kage_budget *b, struct kage_progress *p, bool *more)
{
	struct paced paced;
	int r;

	if (!(b->flags & KAGE_BUDGET_ADVISED))
		return merge_step(&e->merge, b->pages, b->usec, UINT64_MAX, &p->pages_scanned, &p->pages_merged, more);
	r = pace_step(&e->pace, &e->merge, b->pages, b->usec, &p->pages_scanned, &p->pages_merged, more, &paced);
	p->pages_budget = paced.budget;
	p->wait_usec = (paced.wait + 999) / 1000;
	return r;
}

/* A new reserve is populated: 128 MiB by default, 15 ms with huge pages, 300 without. So steps with a budget fill it in pieces. */
static void step_upkeep(struct kage_engine *e, const struct kage_budget *b)
{
	bool limited = b->flags & KAGE_BUDGET_ADVISED || b->pages || b->usec;
	uint64_t usec = b->usec ? MIN(b->usec, UPKEEP_USEC) : UPKEEP_USEC;
	struct brlock_held held = brlock_read(&e->upkeep);
	bool more = tenants_upkeep(&e->host, limited ? env_now(&e->env, KAGE_CLOCK_WALL) + usec * 1000 : 0);

	brlock_read_drop(&e->upkeep, held);
	if (more)
		engine_due(e);
}

static int step_work(struct kage_engine *e, const struct kage_budget *b, struct kage_progress *p)
{
	struct brlock_held held;
	bool more = false;
	int r;

	step_upkeep(e, b);
	r = step_merge(e, b, p, &more);
	held = brlock_read(&e->upkeep);
	p->more = more;
	p->frames_freed = pool_reap(e->pool);
	defer_run(&e->env.defer);
	p->passes = atomic_load(&e->merge.passes);
	if (r == 0)
		r = pool_refill(e->pool);
	brlock_read_drop(&e->upkeep, held);
	return r;
}

static int mirror_step(struct mm *mm, void *arg)
{
	if (mm->mirror)
		mm->mirror->ops->step(mm->mirror);
	return 0;
}

static int entered(struct mm *mm, void *arg)
{
	struct kage_vm *vm = mm->owner;
	struct shadow *s = vm ? atomic_load(&vm->shadow) : NULL;

	return s && shadow_entered(s) ? -EDEADLK : 0;
}

int engine_entered(struct kage_engine *e)
{
	return shadow_entered_any() ? host_each_mm(&e->host, entered, NULL) : 0;
}

int kage_engine_step(struct kage_engine *e, const struct kage_budget *budget, struct kage_progress *progress)
{
	struct kage_progress p = { .size = sizeof(p) };
	struct kage_budget b;
	uint64_t seen;
	bool urgent;
	ssize_t n;
	int r;

	if (!e)
		return -EINVAL;
	r = budget ? config_check(budget, sizeof(b), sizeof(b)) : 0;
	if (!r && progress)
		r = config_check(progress, sizeof(p), offsetof(struct kage_progress, wait_usec));
	if (r)
		return r;
	config_copy(&b, budget, sizeof(b));
	if (b.flags & ~(uint32_t)KAGE_BUDGET_ADVISED)
		return api_result(e, __func__, 0, 0, -EINVAL);
	r = engine_entered(e);
	if (r)
		return r;
	n = read(e->event, &seen, sizeof(seen));
	(void)n;
	atomic_store(&e->env.paced, (b.flags & KAGE_BUDGET_ADVISED) != 0);
	atomic_store(&e->due, false); /* after the read: what was told before it, this step does */
	r = step_work(e, &b, &p);
	if (atomic_load(&e->host.mirrors)) /* else there is no reason to wait for a family's clone */
		host_each_mm(&e->host, mirror_step, NULL);
	if (!p.wait_usec && (p.more || (atomic_load(&e->merge.on) && merge_waiting(&e->merge))))
		engine_due(e);
	if (!p.wait_usec && merge_urgent(&e->merge, &urgent))
		engine_due(e);
	if (r == 0 && progress) {
		p.size = progress->size;
		memcpy(progress, &p, MIN(p.size, sizeof(p)));
	}
	return r;
}

static bool tune_valid(const struct kage_tune *t)
{
	if (t->flags & ~(uint32_t)(KAGE_TUNE_MERGE | KAGE_TUNE_NO_BACKOFF) || t->no_zero_pages > 1 || t->max_sharing == 1)
		return false;
	if (t->backoff > BACKOFF_MOST)
		return false;
	return t->cpu_share <= SHARE_MAX && t->scan_msec <= SCAN_MSEC_MAX && (!t->max_pages || t->min_pages <= t->max_pages);
}

int kage_engine_tune(struct kage_engine *e, const struct kage_tune *tune)
{
	struct kage_tune t;
	uint32_t backoff;
	int r;

	if (!e || !tune)
		return -EINVAL;
	r = config_check(tune, sizeof(t), offsetof(struct kage_tune, cpu_share));
	if (r)
		return api_result(e, __func__, 0, 0, r);
	config_copy(&t, tune, sizeof(t));
	if (!tune_valid(&t))
		return api_result(e, __func__, 0, 0, -EINVAL);
	pace_tune(&e->pace, t.cpu_share, (uint64_t)t.scan_msec * 1000000, t.min_pages, t.max_pages, t.moved_pages);
	backoff = t.flags & KAGE_TUNE_NO_BACKOFF ? 0 : t.backoff ? t.backoff : BACKOFF_DEFAULT;
	merge_tune(&e->merge, t.flags & KAGE_TUNE_MERGE, t.no_zero_pages, t.max_sharing, backoff);
	engine_due(e);
	return KAGE_OK;
}

/* A sixteenth of what there may be at most: with little memory, little entropy. */
static uint32_t reserve_default(const struct kage_engine *e)
{
	uint64_t most = e->memory_limit ? e->memory_limit >> (PAGE_SHIFT + 4) : RESERVE_FRAMES_DEFAULT;

	return (uint32_t)MAX(MIN(most, (uint64_t)RESERVE_FRAMES_DEFAULT), (uint64_t)RESERVE_FRAMES_MIN);
}

static int domain_configure(struct kage_engine *e, uint32_t domain, const struct kage_domain_config *config)
{
	struct kage_domain_config c;
	int r = config ? config_check(config, sizeof(c), sizeof(c)) : -EINVAL;
	bool hardened;

	if (r)
		return r;
	config_copy(&c, config, sizeof(c));
	hardened = c.flags & KAGE_DOMAIN_HARDENED;
	if (domain > UINT16_MAX || c.flags & ~(uint32_t)(KAGE_DOMAIN_ZERO_SHARED | KAGE_DOMAIN_HARDENED) || c.reserved)
		return -EINVAL;
	if (hardened && c.flags & KAGE_DOMAIN_ZERO_SHARED)
		return -EINVAL;
	if (!c.reserve_frames && hardened)
		c.reserve_frames = reserve_default(e);
	if (hardened != (c.reserve_frames >= RESERVE_FRAMES_MIN && c.reserve_frames <= RESERVE_FRAMES_MAX) ||
	    (!hardened && c.reserve_frames))
		return -EINVAL;
	brlock_write(&e->upkeep);
	r = tenant_configure(&e->host, domain, c.flags, c.reserve_frames);
	brlock_write_drop(&e->upkeep);
	return r;
}

int kage_domain_configure(struct kage_engine *e, uint32_t domain, const struct kage_domain_config *config)
{
	return e ? api_result(e, __func__, 0, 0, domain_configure(e, domain, config)) : -EINVAL;
}

/* -- audit ------------------------------------------------------------------------ */

static void __attribute__((format(printf, 2, 3))) audit_line(struct audit *a, const char *fmt, ...)
{
	struct kage_audit *out = a->priv;
	char line[256];
	va_list ap;

	a->violations++;
	if (!out->report)
		return;
	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	out->report(out->opaque, line);
}

static int audit_secondary(struct mm *mm, struct audit *a)
{
	struct kage_vm *vm = mm->owner;
	struct shadow *s = vm ? atomic_load(&vm->shadow) : NULL;

	if (s)
		shadow_audit(s, a);
	return mm->mirror ? mm->mirror->ops->audit(mm->mirror, a) : 0;
}

int kage_engine_audit(struct kage_engine *e, struct kage_audit *audit)
{
	struct audit a = { .report = audit_line, .priv = audit };
	int r;

	if (!e || !audit)
		return -EINVAL;
	r = config_check(audit, sizeof(*audit), sizeof(*audit));
	if (r)
		return r;
	brlock_write(&e->merge.gate);
	brlock_write(&e->upkeep);
	r = host_audit(&e->host, &a, audit_secondary);
	brlock_write_drop(&e->upkeep);
	brlock_write_drop(&e->merge.gate);
	if (r)
		return r;
	a.violations += atomic_load(&e->env.corruptions);
	audit->checks = a.checks;
	audit->violations = a.violations;
	return a.violations ? -EUCLEAN : KAGE_OK;
}
