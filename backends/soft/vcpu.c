/* SPDX-License-Identifier: MIT */
/*
 * Life and registers of a soft vCPU.
 *
 * Invariants:
 *  U1  a vCPU that exists is counted in vm->vcpus and attached to the shadow.
 *  U2  registers change only with the window closed; after it the shadow's root
 *      and the TLB's context belong to them.
 *
 * Locks: none held here; see vcpu.h.
 */
#include "vcpu.h"

#define FEATURES_KNOWN	  0x7fu
#define FEATURES_DEFAULT  (KAGE_X86_NX | KAGE_X86_PAGE1GB | KAGE_X86_SMEP | KAGE_X86_SMAP | KAGE_X86_PCID)
#define PHYS_BITS_DEFAULT 46
#define TLB_BITS_DEFAULT  14

static int fill_defaults(struct kage_vcpu_config *c)
{
	if (c->abi && c->abi != KAGE_VCPU_ABI)
		return -ENOEXEC;
	if (c->arch && c->arch != KAGE_ARCH_X86)
		return -EOPNOTSUPP;
	if (!c->features)
		c->features = FEATURES_DEFAULT;
	if (!c->phys_bits)
		c->phys_bits = PHYS_BITS_DEFAULT;
	if (!c->tlb_bits)
		c->tlb_bits = TLB_BITS_DEFAULT;
	if ((c->features & ~FEATURES_KNOWN) || c->phys_bits < 36 || c->phys_bits > 52 || c->tlb_bits < 9 ||
	    c->tlb_bits > 20)
		return -EINVAL;
	return 0;
}

static int vcpu_init(struct kage_vcpu *v, struct kage_vm *vm, const struct kage_vcpu_config *c,
		     struct shadow *s)
{
	int r;

	v->vm = vm;
	v->features = c->features;
	v->phys_bits = c->phys_bits;
	v->code_written = c->code_written;
	v->opaque = c->opaque;
	v->fast = shadow_fast_windows(s);
	v->cpu.ops = c->code_written ? &soft_ops_code : &soft_ops;
	v->cpu.win = &v->head.win;
	v->cpu.wanted = &v->head.wanted;
	r = tlb_init(v, c->tlb_bits);
	if (r)
		return r;
	tlb_select(v, &(struct shadow_mode){0});
	return shadow_attach(s, &v->cpu);
}

static int vcpu_create(struct kage_vm *vm, const struct kage_vcpu_config *config, struct kage_vcpu **out)
{
	struct kage_vcpu_config c = {.size = sizeof(c)};
	struct kage_vcpu *v;
	struct shadow *s;
	int r;

	if (!out)
		return -EINVAL;
	r = config ? config_check(config, sizeof(c), sizeof(c)) : 0;
	if (!r && config)
		config_copy(&c, config, sizeof(c));
	if (!r)
		r = fill_defaults(&c);
	if (!r)
		r = shadow_get(&vm->mm, &vm->shadow, &vm->shadow_lock, &s);
	if (r)
		return r;
	v = env_alloc(vm->mm.host->env, sizeof(*v));
	if (!v)
		return -ENOMEM;
	r = vcpu_init(v, vm, &c, s);
	if (r) {
		tlb_finish(v);
		env_free(vm->mm.host->env, v, sizeof(*v));
		return r;
	}
	atomic_fetch_add(&vm->vcpus, 1);
	*out = v;
	return KAGE_OK;
}

int kage_vcpu_create(struct kage_vm *vm, const struct kage_vcpu_config *config, struct kage_vcpu **out)
{
	return vm ? api_result(vm->engine, __func__, 0, 0, vcpu_create(vm, config, out)) : -EINVAL;
}

void kage_vcpu_destroy(struct kage_vcpu *v)
{
	struct kage_vm *vm;

	if (!v)
		return;
	vm = v->vm;
	shadow_detach(&v->cpu);
	tlb_finish(v);
	env_free(vm->mm.host->env, v, sizeof(*v));
	atomic_fetch_sub(&vm->vcpus, 1);
}

void vcpu_switch(struct kage_vcpu *v)
{
	struct shadow_mode mode = x86_mode_of(v);

	shadow_set_mode(&v->cpu, &mode);
	tlb_select(v, &mode);
}

static int set_x86_regs(struct kage_vcpu *v, const struct kage_x86_regs *new)
{
	struct kage_x86_regs regs = *new;
	bool noflush = regs.cr3 & CR3_NOFLUSH;
	uint64_t win;
	int r = x86_check_regs(v, &regs);

	if (r)
		return r;
	regs.cr3 &= ~CR3_NOFLUSH;
	regs.rflags &= RFLAGS_AC;
	win = slow_begin(v);
	if (x86_flushes(&v->regs, &regs, noflush))
		shadow_sync_all(v->cpu.shadow);
	v->regs = regs;
	vcpu_switch(v);
	slow_end(v, win);
	return KAGE_OK;
}

int kage_vcpu_set_regs(struct kage_vcpu *v, const void *arch_regs, size_t size)
{
	if (!v || !arch_regs || size != sizeof(struct kage_x86_regs))
		return -EINVAL;
	return set_x86_regs(v, arch_regs);
}

int kage_vcpu_layout(struct kage_tlb_layout *layout)
{
	struct kage_tlb_layout known = {
	    .size = sizeof(known),
	    .abi = KAGE_VCPU_ABI,
	    .win_offset = offsetof(struct kage_vcpu_head, win),
	    .ctx_offset = offsetof(struct kage_vcpu_head, ctx),
	    .wanted_offset = offsetof(struct kage_vcpu_head, wanted),
	    .tlb_offset = offsetof(struct kage_vcpu_head, tlb),
	    .mask_offset = offsetof(struct kage_vcpu_head, mask),
	    .index_shift = KAGE_TLB_SHIFT,
	    .entry_size = sizeof(struct kage_tlb_entry),
	    .tag_offset = offsetof(struct kage_tlb_entry, tag),
	    .addend_offset = offsetof(struct kage_tlb_entry, addend),
	};
	int r;

	if (!layout)
		return -EINVAL;
	r = config_check(layout, sizeof(known), sizeof(known));
	if (r)
		return r;
	known.size = layout->size;
	*layout = known;
	return KAGE_OK;
}
