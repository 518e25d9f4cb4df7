/* SPDX-License-Identifier: MIT */
/*
 * arm64: the interrupt controller that KVM emulates, and its state.
 *
 * structures
 *	item		one register as KVM numbers it: group and attribute of the device, size, value
 *	arm64_gic_state	items in the order in which they are restored
 *
 * invariants
 *	K1. What is saved and in which order it is restored is one list (list_v3(), list_v2()): the version of
 *	    the emulation (IIDR) first, then GICD_CTLR, which makes routes accessible, and each interrupt's
 *	    settings before its state.
 *	K2. It is restored into a fresh GIC: registers of the set-bits kind (ISENABLER, ISACTIVER) need no clearing.
 *	K3. No LPIs: without an ITS there are none, so there are no tables in guest memory.
 *
 * Sources: Linux, Documentation/virt/kvm/devices/arm-vgic-v3.rst, arm-vgic.rst; Arm GIC Architecture
 * Specification (IHI 0069) chapter 12, and (IHI 0048) chapter 4 for version 2.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "arm64.h"

#define OWN  32u /* interrupts of each CPU */
#define ALL  (OWN + ARM64_SPIS)
#define ICC(op0, op1, n, m, op2) (ARM64_SYS_REG(op0, op1, n, m, op2) & KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK)

enum {
	CTLR = 0, IIDR = 8, GICR_WAKER = 0x14, IGROUPR = 0x80, ISENABLER = 0x100, ISPENDR = 0x200, ISACTIVER = 0x300,
	IPRIORITYR = 0x400, ITARGETSR = 0x800, ICFGR = 0xc00, SPENDSGIR = 0xf20, IROUTER = 0x6000,
	GICR_SGI = 0x10000, /* the second frame of a redistributor */
	LEVEL_LINE = VGIC_LEVEL_INFO_LINE_LEVEL << KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT,
};

struct item {
	uint32_t group;
	bool optional; /* not every implementation has it */
	bool have;
	bool wide; /* 64 bits */
	uint64_t attr, value;
};

struct arm64_gic_state {
	uint32_t version;
	size_t items, room;
	struct item *item;
};

/* -- the device --------------------------------------------------------------------------- */

static int set_attr(int fd, uint32_t group, uint64_t attr, const void *value)
{
	struct kvm_device_attr a = {.group = group, .attr = attr, .addr = (uintptr_t)value};

	return ioctl(fd, KVM_SET_DEVICE_ATTR, &a) < 0 ? -errno : 0;
}

static int get_attr(int fd, uint32_t group, uint64_t attr, void *value)
{
	struct kvm_device_attr a = {.group = group, .attr = attr, .addr = (uintptr_t)value};

	return ioctl(fd, KVM_GET_DEVICE_ATTR, &a) < 0 ? -errno : 0;
}

static int create(struct vmm *vmm, uint32_t type)
{
	struct kvm_create_device device = {.type = type};

	return ioctl(vmm->fd, KVM_CREATE_DEVICE, &device) < 0 ? -errno : (int)device.fd;
}

int arm64_gic_create(struct vmm *vmm)
{
	const uint64_t dist = ARM64_GICD, redist = ARM64_GICR, cpu = ARM64_GICC;
	const uint32_t irqs = ALL;
	int r;

	vmm->gic_version = 3;
	vmm->gic = create(vmm, KVM_DEV_TYPE_ARM_VGIC_V3);
	if (vmm->gic < 0) {
		vmm->gic_version = 2;
		vmm->gic = create(vmm, KVM_DEV_TYPE_ARM_VGIC_V2);
	}
	if (vmm->gic < 0)
		return vmm->gic;
	r = set_attr(vmm->gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &irqs);
	if (r == 0 && vmm->gic_version == 3) {
		r = set_attr(vmm->gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST, &dist);
		return r ? r : set_attr(vmm->gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_REDIST, &redist);
	}
	if (r == 0)
		r = set_attr(vmm->gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V2_ADDR_TYPE_DIST, &dist);
	return r ? r : set_attr(vmm->gic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V2_ADDR_TYPE_CPU, &cpu);
}

int arm64_gic_init(struct vmm *vmm)
{
	int r = 0;

	if (!vmm->gic_ready)
		r = set_attr(vmm->gic, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, NULL);
	if (r == 0)
		vmm->gic_ready = true;
	return r;
}

/* -- what there is to save ------------------------------------------------------------------ */

static int add(struct arm64_gic_state *s, struct item item)
{
	if (s->items == s->room) {
		size_t room = s->room ? 2 * s->room : 256;
		struct item *more = realloc(s->item, room * sizeof(*more));

		if (more == NULL)
			return -ENOMEM;
		s->item = more;
		s->room = room;
	}
	s->item[s->items++] = item;
	return 0;
}

/* Registers of 32 bits in a row. */
static int add_words(struct arm64_gic_state *s, uint32_t group, uint64_t attr, unsigned n)
{
	unsigned i;
	int r = 0;

	for (i = 0; i < n && r == 0; i++)
		r = add(s, (struct item){.group = group, .attr = attr + 4 * i});
	return r;
}

/* Interrupts first .. end, `bits` of each in the registers at `offset`. */
static int add_field(struct arm64_gic_state *s, uint32_t group, uint64_t base, unsigned offset, unsigned bits,
		     unsigned first, unsigned end)
{
	return add_words(s, group, base + offset + first * bits / 8, (end - first) * bits / 32);
}

static int add_interrupts(struct arm64_gic_state *s, uint32_t group, uint64_t base, unsigned first, unsigned end)
{
	static const struct {
		unsigned offset, bits;
	} field[] = {{IGROUPR, 1}, {IPRIORITYR, 8}, {ICFGR, 2}, {ISENABLER, 1}, {ISPENDR, 1}, {ISACTIVER, 1}};
	unsigned i;
	int r = 0;

	for (i = 0; i < sizeof(field) / sizeof(field[0]) && r == 0; i++)
		r = add_field(s, group, base, field[i].offset, field[i].bits, first, end);
	return r;
}

/* The affinity of a vCPU, as attributes name it. */
static int affinity(const struct vmm_vcpu *vcpu, uint64_t *out)
{
	uint64_t mpidr;
	int r = arm64_get(vcpu->fd, ARM64_MPIDR, &mpidr);

	*out = r ? 0 : ((mpidr & 0xffffff) | (mpidr >> 32 & 0xff) << 24) << 32;
	return r;
}

static int list_redist(struct arm64_gic_state *s, uint64_t cpu)
{
	const uint32_t group = KVM_DEV_ARM_VGIC_GRP_REDIST_REGS;
	int r = add_words(s, group, cpu | CTLR, 1);

	if (r == 0)
		r = add_words(s, group, cpu | GICR_WAKER, 1);
	if (r == 0)
		r = add_interrupts(s, group, cpu | GICR_SGI, 0, OWN);
	return r ? r : add(s, (struct item){.group = KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, .attr = cpu | LEVEL_LINE});
}

static int list_interface(struct arm64_gic_state *s, uint64_t cpu)
{
	static const struct {
		uint64_t id;
		bool optional; /* more priorities than 32 */
	} reg[] = {
		{ICC(3, 0, 12, 12, 5)}, /* SRE */
		{ICC(3, 0, 12, 12, 4)}, /* CTLR */
		{ICC(3, 0, 12, 12, 6)}, {ICC(3, 0, 12, 12, 7)}, /* IGRPEN0, 1 */
		{ICC(3, 0, 4, 6, 0)},				 /* PMR */
		{ICC(3, 0, 12, 8, 3)}, {ICC(3, 0, 12, 12, 3)},	 /* BPR0, 1 */
		{ICC(3, 0, 12, 8, 4)}, {ICC(3, 0, 12, 9, 0)},	 /* AP0R0, AP1R0 */
		{ICC(3, 0, 12, 8, 5), true}, {ICC(3, 0, 12, 8, 6), true}, {ICC(3, 0, 12, 8, 7), true},
		{ICC(3, 0, 12, 9, 1), true}, {ICC(3, 0, 12, 9, 2), true}, {ICC(3, 0, 12, 9, 3), true},
	};
	unsigned i;
	int r = 0;

	for (i = 0; i < sizeof(reg) / sizeof(reg[0]) && r == 0; i++)
		r = add(s, (struct item){.group = KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, .attr = cpu | reg[i].id,
					 .wide = true, .optional = reg[i].optional});
	return r;
}

static int list_v3(struct vmm *vmm, struct arm64_gic_state *s)
{
	const uint32_t group = KVM_DEV_ARM_VGIC_GRP_DIST_REGS;
	int (*const each[])(struct arm64_gic_state *, uint64_t) = {list_redist, list_interface};
	int r = add_words(s, group, IIDR, 1);
	unsigned i, pass;
	uint64_t cpu;

	if (r == 0)
		r = add_words(s, group, CTLR, 1);
	for (pass = 0; pass < 2 && r == 0; pass++) {
		for (i = 0; i < vmm->vcpus && r == 0; i++) {
			r = affinity(vmm->vcpu[i], &cpu);
			if (r == 0)
				r = each[pass](s, cpu);
		}
		if (r || pass)
			break;
		r = add_words(s, group, IROUTER + 8 * OWN, 2 * ARM64_SPIS);
		if (r == 0)
			r = add_interrupts(s, group, 0, OWN, ALL);
		for (i = OWN; i < ALL && r == 0; i += 32)
			r = add(s, (struct item){.group = KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, .attr = LEVEL_LINE | i});
	}
	return r;
}

static int list_v2(struct vmm *vmm, struct arm64_gic_state *s)
{
	const uint32_t dist = KVM_DEV_ARM_VGIC_GRP_DIST_REGS, interface = KVM_DEV_ARM_VGIC_GRP_CPU_REGS;
	static const unsigned reg[] = {0x00, 0x04, 0x08, 0x1c, 0xd0}; /* CTLR, PMR, BPR, ABPR, APR0 */
	int r = add_words(s, dist, IIDR, 1);
	unsigned i, n;

	if (r == 0)
		r = add_words(s, dist, CTLR, 1);
	if (r == 0)
		r = add_words(s, dist, ITARGETSR + OWN, ARM64_SPIS / 4);
	if (r == 0)
		r = add_interrupts(s, dist, 0, OWN, ALL);
	for (i = 0; i < vmm->vcpus && r == 0; i++) {
		uint64_t cpu = (uint64_t)i << KVM_DEV_ARM_VGIC_CPUID_SHIFT;

		r = add_interrupts(s, dist, cpu, 0, OWN);
		if (r == 0)
			r = add_words(s, dist, cpu | SPENDSGIR, 4);
		for (n = 0; n < sizeof(reg) / sizeof(reg[0]) && r == 0; n++)
			r = add_words(s, interface, cpu | reg[n], 1);
	}
	return r;
}

/* -- save and restore ------------------------------------------------------------------------ */

static int read_item(int gic, struct item *item)
{
	uint32_t narrow = 0;
	int r = get_attr(gic, item->group, item->attr, item->wide ? (void *)&item->value : &narrow);

	if (r && item->optional)
		return 0;
	item->have = r == 0;
	if (!item->wide)
		item->value = narrow;
	return r;
}

static int write_item(int gic, const struct item *item)
{
	uint32_t narrow = (uint32_t)item->value;

	return item->have ? set_attr(gic, item->group, item->attr, item->wide ? (const void *)&item->value : &narrow) : 0;
}

int arm64_gic_save(struct vmm *vmm, struct arm64_gic_state **out)
{
	struct arm64_gic_state *s = calloc(1, sizeof(*s));
	size_t i;
	int r;

	if (s == NULL)
		return -ENOMEM;
	s->version = vmm->gic_version;
	r = arm64_gic_init(vmm);
	if (r == 0)
		r = s->version == 3 ? list_v3(vmm, s) : list_v2(vmm, s);
	for (i = 0; i < s->items && r == 0; i++)
		r = read_item(vmm->gic, &s->item[i]);
	if (r) {
		arm64_gic_free(s);
		return r;
	}
	*out = s;
	return 0;
}

int arm64_gic_restore(struct vmm *vmm, const struct arm64_gic_state *s)
{
	int r = s->version == vmm->gic_version ? arm64_gic_init(vmm) : -EINVAL;
	size_t i;

	for (i = 0; i < s->items && r == 0; i++)
		r = write_item(vmm->gic, &s->item[i]);
	return r;
}

void arm64_gic_free(struct arm64_gic_state *s)
{
	if (s == NULL)
		return;
	free(s->item);
	free(s);
}
