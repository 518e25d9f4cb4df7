/* SPDX-License-Identifier: MIT */
/*
 * The guest's flush instructions.
 *
 * TLB entries never outlive the shadow entries they came from, and those of
 * watched tables follow every write at once. What is left for a flush is to
 * re-read the tables that are out of sync; contexts keep their ids. Where a flush
 * is for all vCPUs (arm64), what the others still do by translations that are gone
 * ends before it returns: the guest may give the page away next.
 *
 * Locks: none held; the shadow MMU takes its own.
 */
#include "vcpu.h"

static int flush_page(struct kage_vcpu *v, uint64_t gva)
{
	gva = untagged(v, gva);
	shadow_sync_page(&v->cpu, gva);
	tlb_drop_page(v, gva);
	return KAGE_OK;
}

/* A timeout leaves tables out of sync that could have been watched again: no harm. */
static int flush_all(struct kage_vcpu *v)
{
	shadow_sync_all(v->cpu.shadow);
	return KAGE_OK;
}

int kage_vcpu_flush(struct kage_vcpu *v, const struct kage_flush *flush)
{
	struct kage_flush f;
	uint64_t win;
	int r;

	if (!v || !flush)
		return -EINVAL;
	r = config_check(flush, sizeof(f), sizeof(f));
	if (r)
		return r;
	config_copy(&f, flush, sizeof(f));
	win = slow_begin(v);
	switch (f.kind) {
	case KAGE_FLUSH_ALL:
		r = flush_all(v);
		break;
	case KAGE_FLUSH_PAGE:
		r = flush_page(v, f.gva);
		break;
	case KAGE_FLUSH_ASID:
		r = v->arch->asid_valid(v, f.asid) ? flush_all(v) : -EINVAL;
		break;
	case KAGE_FLUSH_PAGE_ASID:
		r = v->arch->asid_valid(v, f.asid) ? flush_page(v, f.gva) : -EINVAL;
		break;
	case KAGE_FLUSH_CR3:
		r = v->arch->flush_cr3 ? v->arch->flush_cr3(v, f.value) : -EINVAL;
		break;
	default:
		r = -EINVAL;
		break;
	}
	if (!r && v->arch->broadcasts)
		r = shadow_broadcast(v->cpu.shadow);
	slow_end(v, win);
	return r;
}
