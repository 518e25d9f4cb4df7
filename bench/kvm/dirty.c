/* SPDX-License-Identifier: MIT */
/*
 * Dirty logging of a running guest: what its first write to a page after a harvest
 * costs it, and the harvest. Kage opens a log of single pages, for which its slots are
 * logged by KVM; the peer has one slot with KVM_MEM_LOG_DIRTY_PAGES, reads the log itself and clears it, which protects
 * the pages anew: the VMM has asked for KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Documentation/virt/kvm/api.rst).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm.h"

struct dirty {
	struct subject *ours, *peer;
	struct kage_dirty *log;
	uint64_t *bitmap;
	uint64_t pages, round;
	struct series harvest, peer_harvest;
};

/* CPU ns of the guest; it writes to each page. */
static double write_all(const struct dirty *d, struct subject *s, uint64_t seed)
{
	struct guest_args args = {.program = GUEST_TOUCH,
				  .base = s->base,
				  .pages = d->pages,
				  .stride = 1,
				  .mode = GUEST_WRITE,
				  .seed = seed};
	double ns = subject_round(s, &args);

	return args.count == d->pages ? ns : -1;
}

static bool written(const struct dirty *d, struct subject *s, uint64_t seed)
{
	bool ok = true;

	for (uint64_t i = 0; i < d->pages; i += i % 7 + 1)
		ok &= subject_word(s, s->base + i * PAGE) == guest_word(guest_key(i, 0), seed);
	return ok;
}

/* Each page of the row is in the bitmap. */
static bool all_dirty(const struct dirty *d, const struct subject *s)
{
	uint64_t first = s->base / PAGE, missing = 0;

	for (uint64_t i = first; i < first + d->pages; i++)
		missing += !(d->bitmap[i / 64] >> i % 64 & 1);
	return missing == 0;
}

/* The last harvest found nothing. */
static bool none_dirty(const struct dirty *d)
{
	for (uint64_t i = 0; i < d->ours->bytes / PAGE / 64; i++)
		if (d->bitmap[i])
			return false;
	return true;
}

static double collect(struct dirty *d)
{
	double ns = cpu_ns();
	int r = kage_dirty_collect(d->log, 0, d->ours->bytes, d->bitmap, d->ours->bytes / PAGE / 8);

	ns = cpu_ns() - ns;
	must(r < 0 ? r : 0, "collect");
	return ns;
}

static double get_log(struct dirty *d)
{
	struct kvm_dirty_log get = {.dirty_bitmap = d->bitmap};
	struct kvm_clear_dirty_log clear = {.num_pages = (uint32_t)(d->peer->bytes / PAGE), .dirty_bitmap = d->bitmap};
	double ns = cpu_ns();

	must(ioctl(d->peer->vmm->fd, KVM_GET_DIRTY_LOG, &get) ? -errno : 0, "KVM_GET_DIRTY_LOG");
	must(ioctl(d->peer->vmm->fd, KVM_CLEAR_DIRTY_LOG, &clear) ? -errno : 0, "KVM_CLEAR_DIRTY_LOG");
	return cpu_ns() - ns;
}

static double sample_ours(void *arg)
{
	struct dirty *d = arg;
	uint64_t seed = ++d->round;
	double ns, harvest;
	bool ok;

	collect(d);
	collect(d);
	ok = none_dirty(d);
	ns = write_all(d, d->ours, seed);
	harvest = collect(d);
	ok &= ns > 0 && all_dirty(d, d->ours) && written(d, d->ours, seed);
	series_add(&d->harvest, harvest / 1000);
	return ok ? ns / (double)d->pages : -1;
}

static double sample_plain(void *arg)
{
	struct dirty *d = arg;
	uint64_t seed = ++d->round;
	double ns, harvest;
	bool ok;

	get_log(d);
	get_log(d);
	ok = none_dirty(d);
	ns = write_all(d, d->peer, seed);
	harvest = get_log(d);
	ok &= ns > 0 && all_dirty(d, d->peer) && written(d, d->peer, seed);
	series_add(&d->peer_harvest, harvest / 1000);
	return ok ? ns / (double)d->pages : -1;
}

static void log_slot(struct subject *s)
{
	void *at = vmm_ptr(s->vmm, 0, s->bytes);
	struct kvm_userspace_memory_region slot = {
	    .flags = KVM_MEM_LOG_DIRTY_PAGES, .memory_size = s->bytes, .userspace_addr = (uintptr_t)at};

	must(at ? 0 : -EFAULT, "guest memory");
	must(ioctl(s->vmm->fd, KVM_SET_USER_MEMORY_REGION, &slot) ? -errno : 0, "KVM slot");
}

static void dirty_rows(const struct bench *b, struct dirty *d)
{
	struct turns t = take_turns(b, sample_ours, d, sample_plain, d);
	struct row row = {.suite = "kvm",
			  .name = "dirty-write",
			  .unit = "ns",
			  .peer = "the same guest on a plain memfd, KVM's dirty log"};

	row_note(&row, "a guest's first write to each of %lu pages after a harvest", (unsigned long)d->pages);
	report_turns(&row, &t);
	row = (struct row){.suite = "kvm",
			   .name = "dirty-harvest",
			   .unit = "us",
			   .peer = "KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG",
			   .isvoid = !t.ok,
			   .value = series_median(&d->harvest),
			   .spread = series_spread(&d->harvest),
			   .peer_value = series_median(&d->peer_harvest)};
	row_note(&row, "CPU of kage_dirty_collect() then: KVM's log, and a bitmap of our own");
	report_row(&row);
}

void bench_dirty(const struct bench *b)
{
	uint64_t set = (32 * MIB) >> (b->shift ? 1 : 0), bytes = set + 16 * MIB;
	struct dirty d = {
	    .pages = set / PAGE, .ours = subject_kage(bytes), .peer = subject_plain(RAM_SHARED, bytes)};

	d.bitmap = must_map(calloc(bytes / PAGE / 64, 8), "memory");
	log_slot(d.peer);
	must(kage_dirty_open(subject_vm(d.ours), KAGE_CFG(kage_dirty_config, .flags = KAGE_DIRTY_FINE),
			     &d.log),
	     "log");
	dirty_rows(b, &d);
	kage_dirty_close(d.log);
	subject_destroy(d.ours);
	subject_destroy(d.peer);
	free(d.bitmap);
}
