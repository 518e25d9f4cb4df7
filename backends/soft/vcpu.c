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

#define TLB_BITS_DEFAULT 14

static const struct soft_arch *arch_of(uint32_t arch)
{
	switch (arch) {
	case 0:
	case KAGE_ARCH_X86:
		return &soft_x86;
	case KAGE_ARCH_ARM64:
		return &soft_arm64;
	default:
		return NULL;
	}
}

static int fill_defaults(struct kage_vcpu_config *c)
{
	const struct soft_arch *arch = arch_of(c->arch);

	if (c->abi && c->abi != KAGE_VCPU_ABI)
		return -ENOEXEC;
	if (!arch)
		return -EOPNOTSUPP;
	if (!c->features)
		c->features = arch->features_default;
	if (!c->phys_bits)
		c->phys_bits = arch->phys_bits_default;
	if (!c->tlb_bits)
		c->tlb_bits = TLB_BITS_DEFAULT;
	if ((c->features & ~arch->features_known) || !arch->phys_bits_valid(c->phys_bits, c->features) ||
	    c->tlb_bits < 9 || c->tlb_bits > 20)
		return -EINVAL;
	return 0;
}

static int vcpu_init(struct kage_vcpu *v, struct kage_vm *vm, const struct kage_vcpu_config *c,
		     struct shadow *s)
{
	int r;

	v->vm = vm;
	v->arch = arch_of(c->arch);
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
	tlb_select(v, &(struct pt_guest){0});
	r = shadow_attach(s, &v->cpu);
	if (!r)
		vcpu_switch(v);
	return r;
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
	struct pt_guest mode = v->arch->mode(v);

	shadow_set_mode(&v->cpu, &mode);
	tlb_select(v, &mode);
}

/* Of any architecture; older programs know less of it, newer ones more. */
union arch_regs {
	struct kage_x86_regs x86;
	struct kage_arm64_regs arm64;
};

int kage_vcpu_set_regs(struct kage_vcpu *v, const void *arch_regs, size_t size)
{
	union arch_regs regs = {0};
	const char *bytes = arch_regs;
	uint64_t win;
	int r;

	if (!v || !arch_regs || size < v->arch->regs_least)
		return -EINVAL;
	for (size_t i = v->arch->regs_size; i < size; i++)
		if (bytes[i])
			return -E2BIG;
	memcpy(&regs, arch_regs, MIN(size, v->arch->regs_size));
	win = slow_begin(v);
	r = v->arch->set_regs(v, &regs);
	slow_end(v, win);
	return r;
}

int kage_vcpu_get_regs(const struct kage_vcpu *v, void *arch_regs, size_t size)
{
	union arch_regs regs = {0};

	if (!v || !arch_regs || size < v->arch->regs_least)
		return -EINVAL;
	v->arch->get_regs(v, &regs);
	memset(arch_regs, 0, size);
	memcpy(arch_regs, &regs, MIN(size, v->arch->regs_size));
	return KAGE_OK;
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
