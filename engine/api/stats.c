/* SPDX-License-Identifier: MIT */
/*
 * The public calls of kage/stats.h.
 */
#include <stdlib.h>
#include <unistd.h>

#include <kage/stats.h>
#include "api/engine.h"
#include "api/vm.h"
#include "mm/mirror.h"
#include "obs/obs.h"
#include "shadow/shadow.h"

static void add_shadow(struct kage_vm *vm, struct kage_stats *s)
{
	struct shadow *shadow = atomic_load(&vm->shadow);

	if (shadow)
		shadow_stats(shadow, s);
}

static int add_shadow_of(struct mm *mm, void *arg)
{
	if (mm->owner)
		add_shadow(mm->owner, arg);
	return 0;
}

/* Figures are told after what the host kernel has broken is known. */
static int reconcile(struct mm *mm, void *arg)
{
	int64_t r = mm->mirror ? mm->mirror->ops->reconcile(mm->mirror, false) : 0;

	return r < 0 ? (int)r : 0;
}

/* The mirror stays where it is meanwhile. */
static int reconcile_one(struct mm *mm)
{
	struct brlock_held held = brlock_read(&mm->family->lock);
	int r = reconcile(mm, NULL);

	brlock_read_drop(&mm->family->lock, held);
	return r;
}

/* walk: what is held is counted too. */
static int get(struct kage_engine *e, struct kage_vm *vm, bool walk, struct kage_stats *stats)
{
	struct kage_stats s = { 0 };
	struct brlock_held held;
	int r;

	if (!e || !stats || (vm && vm->engine != e))
		return -EINVAL;
	r = config_check(stats, sizeof(s), offsetof(struct kage_stats, pages_host_private));
	if (!r && walk)
		r = vm ? reconcile_one(&vm->mm) : host_each_mm(&e->host, reconcile, NULL);
	if (r)
		return r;
	if (vm) {
		obs_guest(&vm->mm, &e->merge, walk, &s);
		add_shadow(vm, &s);
	} else {
		s.ksm_bytes = merge_bytes(&e->merge);
		held = brlock_read(&e->upkeep); /* reserves of hardened domains stay where they are */
		obs_engine(&e->host, &e->merge, walk, &s);
		brlock_read_drop(&e->upkeep, held);
		host_each_mm(&e->host, add_shadow_of, &s);
	}
	s.size = stats->size;
	memcpy(stats, &s, MIN(s.size, sizeof(s)));
	return KAGE_OK;
}

int kage_stats_get(struct kage_engine *e, struct kage_vm *vm, struct kage_stats *stats)
{
	return get(e, vm, true, stats);
}

int kage_counters_get(struct kage_engine *e, struct kage_vm *vm, struct kage_stats *stats)
{
	return get(e, vm, false, stats);
}

/* A range of whole pages, and not empty. */
static bool pages_valid(uint64_t gpa, uint64_t len)
{
	return len && !((gpa | len) & (PAGE_SIZE - 1)) && gpa < (uint64_t)1 << KAGE_GPA_BITS &&
	       len <= ((uint64_t)1 << KAGE_GPA_BITS) - gpa;
}

int kage_page_map(struct kage_vm *vm, uint64_t gpa, uint64_t len, uint8_t *map)
{
	if (!vm || !map || !pages_valid(gpa, len))
		return -EINVAL;
	reconcile_one(&vm->mm);
	obs_page_map(&vm->mm, GFN(gpa >> PAGE_SHIFT), len >> PAGE_SHIFT, map);
	return KAGE_OK;
}

int kage_page_digest(struct kage_vm *vm, uint64_t gpa, uint64_t len, struct kage_digest *digest)
{
	int r = KAGE_OK;

	if (!vm || !digest || !pages_valid(gpa, len))
		return -EINVAL;
	for (uint64_t i = 0; r == KAGE_OK && i < len >> PAGE_SHIFT; i++)
		r = obs_digest(&vm->mm, vm->engine->merge.salt, GFN((gpa >> PAGE_SHIFT) + i), &digest[i]);
	return r;
}

/* Guests of one engine, each once. */
static bool guests_valid(struct kage_vm *const *vms, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		if (!vms[i] || vms[i]->engine != vms[0]->engine)
			return false;
		for (unsigned j = 0; j < i; j++)
			if (vms[j] == vms[i])
				return false;
	}
	return count > 0;
}

/* From env_alloc(). NULL: no memory. */
static struct mm **mms_of(struct kage_vm *const *vms, unsigned count)
{
	struct mm **mms = env_alloc(&vms[0]->engine->env, count * sizeof(*mms));

	for (unsigned i = 0; mms && i < count; i++)
		mms[i] = &vms[i]->mm;
	return mms;
}

int kage_share_take(struct kage_vm *const *vms, unsigned count, struct kage_share *shares)
{
	struct kage_share *out;
	struct mm **mms;
	struct env *env;
	int r;

	if (!vms || !shares || !guests_valid(vms, count))
		return -EINVAL;
	env = &vms[0]->engine->env;
	mms = mms_of(vms, count);
	out = env_alloc(env, count * sizeof(*out));
	r = mms && out ? host_each_mm(&vms[0]->engine->host, reconcile, NULL) : -ENOMEM;
	if (r == 0)
		r = obs_shares(mms, count, out);
	if (r == 0)
		memcpy(shares, out, count * sizeof(*out));
	env_free(env, out, count * sizeof(*out));
	env_free(env, mms, count * sizeof(*mms));
	return r;
}

int kage_census_take(struct kage_vm *const *vms, unsigned count, struct kage_census *census)
{
	struct kage_census c = { 0 };
	struct mm **mms;
	int r;

	if (!vms || !census || !guests_valid(vms, count))
		return -EINVAL;
	r = config_check(census, sizeof(c), sizeof(c));
	if (r)
		return r;
	mms = mms_of(vms, count);
	if (!mms)
		return -ENOMEM;
	r = obs_census(mms, count, vms[0]->engine->merge.salt, &c);
	env_free(&vms[0]->engine->env, mms, count * sizeof(*mms));
	if (r == 0) {
		c.size = census->size;
		*census = c;
	}
	return r;
}

/* -- dumps: collected in memory first, written when no lock or read section is held ------------ */

struct text {
	struct env *env;
	char *buf;
	size_t len, room;
};

static int text_put(void *arg, const char *piece, size_t len)
{
	struct text *t = arg;

	if (t->len + len > t->room) {
		size_t room = MAX(2 * t->room, ALIGN_UP(t->len + len, PAGE_SIZE));
		char *buf = env_alloc(t->env, room);

		if (!buf)
			return -ENOMEM;
		if (t->len)
			memcpy(buf, t->buf, t->len);
		env_free(t->env, t->buf, t->room);
		t->buf = buf;
		t->room = room;
	}
	memcpy(t->buf + t->len, piece, len);
	t->len += len;
	return 0;
}

static int text_write(const struct text *t, int fd)
{
	for (size_t done = 0; done < t->len;) {
		ssize_t n = write(fd, t->buf + done, t->len - done);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0)
			done += n;
	}
	return 0;
}

static int dump_mirror(struct mm *mm, bool json, struct text *t)
{
	struct brlock_held held = brlock_read(&mm->family->lock);
	int r = mm->mirror ? mm->mirror->ops->dump(mm->mirror, json, text_put, t) : -ENOENT;

	brlock_read_drop(&mm->family->lock, held);
	return r;
}

static int dump_text(struct kage_vm *vm, enum kage_dump_what what, bool json, struct text *t)
{
	struct shadow *s = atomic_load(&vm->shadow);

	switch (what) {
	case KAGE_DUMP_PRIMARY:
		return obs_dump_primary(&vm->mm, json, text_put, t);
	case KAGE_DUMP_MIRROR:
		return dump_mirror(&vm->mm, json, t);
	case KAGE_DUMP_REGIONS:
		return obs_dump_regions(&vm->mm, json, text_put, t);
	case KAGE_DUMP_SHADOW:
		return s ? shadow_dump(s, json, text_put, t) : -ENOENT;
	case KAGE_DUMP_GUEST:
		return s ? shadow_dump_guest(s, json, text_put, t) : -ENOENT;
	}
	return -EINVAL;
}

int kage_dump(struct kage_vm *vm, enum kage_dump_what what, enum kage_dump_format format, int fd)
{
	struct text t = { 0 };
	int r;

	if (!vm || format > KAGE_DUMP_JSON)
		return -EINVAL;
	t.env = &vm->engine->env;
	r = dump_text(vm, what, format == KAGE_DUMP_JSON, &t);
	if (r == 0)
		r = text_write(&t, fd);
	env_free(t.env, t.buf, t.room);
	return r;
}
