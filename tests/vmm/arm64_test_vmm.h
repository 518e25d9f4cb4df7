/* SPDX-License-Identifier: MIT */
/* What test_vmm.c knows of arm64: the state that arm64_state.c has to carry, by the plain ioctls; faults; lines; time. */
#ifndef KAGE_TESTS_ARM64_TEST_VMM_H
#define KAGE_TESTS_ARM64_TEST_VMM_H

#include "arm64.h"

/* Translation fault of level 2, data abort at the same exception level (Arm ARM, ESR_EL1). */
static void check_fault(struct vmm *vmm, uint64_t gva)
{
	struct payload_fault fault;

	ok(vmm_read(vmm, PAYLOAD_FAULT, &fault, sizeof(fault)));
	is(fault.esr >> 26, 0x25);
	is(fault.esr & 0x3f, 0x06);
	is(fault.far, gva);
	ck_assert(fault.elr >= PAYLOAD_CODE && fault.elr < PAYLOAD_CODE + PAYLOAD_CODE_MAX);
}

/* -- the GIC ------------------------------------------------------------------------------ */

#define SPI_1	(32 + VMM_SERIAL_IRQ)
#define WORDS_3 12
#define WORDS_2 8

struct gic_word {
	uint32_t group;
	uint64_t attr;
	uint64_t other; /* a value that a new VM does not have */
	bool wide;
};

#define LEVEL_OF_SPI (VGIC_LEVEL_INFO_LINE_LEVEL << KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT | 32)
#define SYSREG(op0, op1, n, m, op2) (ARM64_SYS_REG(op0, op1, n, m, op2) & KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK)

/* vCPU 0 of version 3: distributor, redistributor, CPU interface. */
static const struct gic_word gic_3[WORDS_3] = {
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0, 0x12},			 /* GICD_CTLR: group 1 is on */
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0x104, 1u << (SPI_1 - 32)},	 /* ISENABLER */
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0x400 + 32, 0xa000},		 /* IPRIORITYR of SPI 1 */
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0xc00 + 8, 2u << 4},		 /* ICFGR: SPI 2 is an edge */
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0x304, 1u << 7},		 /* ISACTIVER */
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0x6000 + 8 * SPI_1 + 4, 0},	 /* IROUTER, its upper half */
	{KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, 0x10100, 0x0800ffff},	 /* ISENABLER0: the virtual timer */
	{KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, 0x10200, 1u << 3},		 /* ISPENDR0: an SGI */
	{KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, 0x10400, 0x80808080},	 /* IPRIORITYR */
	{KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG(3, 0, 4, 6, 0), 0xf0, true},	/* PMR */
	{KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG(3, 0, 12, 12, 7), 1, true},	/* IGRPEN1 */
	{KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, SYSREG(3, 0, 12, 12, 3), 4, true},	/* BPR1 */
};

static const struct gic_word gic_2[WORDS_2] = {
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0, 1},
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0x104, 1u << (SPI_1 - 32)},
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0x400 + 32, 0xa000},
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0xc00 + 8, 2u << 4},
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0x800 + 32, 0x0101},
	{KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0x100, 0x0800ffff},
	{KVM_DEV_ARM_VGIC_GRP_CPU_REGS, 0x04, 0xf0},
	{KVM_DEV_ARM_VGIC_GRP_CPU_REGS, 0x00, 1},
};

static uint64_t gic_get(struct vmm *vmm, uint32_t group, uint64_t attr, bool wide)
{
	uint64_t value = 0;
	struct kvm_device_attr a = {.group = group, .attr = attr, .addr = (uintptr_t)&value};

	ok(ioctl(vmm->gic, KVM_GET_DEVICE_ATTR, &a));
	return wide ? value : (uint32_t)value;
}

static void gic_set(struct vmm *vmm, const struct gic_word *word)
{
	struct kvm_device_attr a = {.group = word->group, .attr = word->attr, .addr = (uintptr_t)&word->other};

	ok(ioctl(vmm->gic, KVM_SET_DEVICE_ATTR, &a));
}

/* As its driver does, the interrupt is made one of levels: SPIs begin as edges. */
static bool serial_line(struct vmm *vmm)
{
	const struct gic_word levels = {KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0xc00 + 8, 0};

	ok(vmm_arch_ready(vmm));
	gic_set(vmm, &levels);
	if (vmm->gic_version == 2)
		return gic_get(vmm, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0x204, false) >> (SPI_1 - 32) & 1;
	return gic_get(vmm, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, LEVEL_OF_SPI, false) >> (SPI_1 - 32) & 1;
}

/* -- everything ----------------------------------------------------------------------------- */

#define REGS 1024

struct seen_state {
	unsigned n;
	uint64_t id[REGS];
	uint8_t reg[REGS][16];
	struct kvm_vcpu_events events;
	struct kvm_mp_state mp_state;
	uint64_t gic[WORDS_3];
	struct vmm_serial_state serial;
};

static void look_registers(int fd, struct seen_state *s)
{
	struct kvm_reg_list *list = calloc(1, sizeof(*list) + REGS * sizeof(list->reg[0]));
	uint64_t i;

	list->n = REGS;
	ok(ioctl(fd, KVM_GET_REG_LIST, list));
	for (i = 0; i < list->n; i++) {
		uint64_t id = list->reg[i];

		ck_assert_uint_le((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT, 4);
		if (id == KVM_REG_ARM_TIMER_CNT || id == KVM_REG_ARM_PTIMER_CNT) /* they count */
			continue;
		s->id[s->n] = id;
		ok(arm64_get(fd, id, s->reg[s->n++]));
	}
	free(list);
	ck_assert_uint_gt(s->n, 100);
}

static void look(struct vmm *vmm, struct seen_state *s, bool chips)
{
	const struct gic_word *word = vmm->gic_version == 3 ? gic_3 : gic_2;
	int fd = vmm->vcpu[0]->fd;
	unsigned i;

	memset(s, 0, sizeof(*s));
	ok(vmm_arch_ready(vmm));
	look_registers(fd, s);
	ok(ioctl(fd, KVM_GET_MP_STATE, &s->mp_state));
	if (ioctl(vmm->fd, KVM_CHECK_EXTENSION, KVM_CAP_VCPU_EVENTS) > 0)
		ok(ioctl(fd, KVM_GET_VCPU_EVENTS, &s->events));
	if (!chips)
		return;
	for (i = 0; i < (vmm->gic_version == 3 ? WORDS_3 : WORDS_2); i++)
		s->gic[i] = gic_get(vmm, word[i].group, word[i].attr, word[i].wide);
	vmm_serial_save(vmm->serial, &s->serial);
}

#define V7	   (KVM_REG_ARM64 | KVM_REG_SIZE_U128 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(fp_regs.vregs[7]))
#define TPIDR_EL1  ARM64_SYS_REG(3, 0, 13, 0, 4)
#define CONTEXTIDR ARM64_SYS_REG(3, 0, 13, 0, 1)

static const struct {
	uint64_t id, value;
} odd[] = {
	{ARM64_CORE(regs.regs[29]), 0x1234567890abcdef}, {ARM64_CORE(regs.sp), 0x7fff12345000},
	{ARM64_CORE(elr_el1), 0xffff000012345678}, {TPIDR_EL1, 0xffff00000badcafe}, {CONTEXTIDR, 0x4711},
	{KVM_REG_ARM_TIMER_CVAL, 0x123456789a}, {KVM_REG_ARM_TIMER_CTL, 2},
};

/* Values that a new VM does not have. */
static void disturb(struct vmm *vmm, bool chips)
{
	const struct gic_word *word = vmm->gic_version == 3 ? gic_3 : gic_2;
	struct vmm_serial_state serial;
	int fd = vmm->vcpu[0]->fd;
	uint8_t v[16];
	unsigned i;

	for (i = 0; i < sizeof(odd) / sizeof(odd[0]); i++)
		ok(arm64_set64(fd, odd[i].id, odd[i].value));
	memset(v, 0x5a, sizeof(v));
	ok(arm64_set(fd, V7, v));
	if (!chips)
		return;
	for (i = 0; i < (vmm->gic_version == 3 ? WORDS_3 : WORDS_2); i++)
		gic_set(vmm, &word[i]);
	vmm_serial_save(vmm->serial, &serial);
	serial.scr = 0x77;
	serial.count = 2;
	serial.fifo[0] = 'k';
	serial.fifo[1] = 'g';
	vmm_serial_restore(vmm->serial, &serial);
}

static const uint8_t *seen_reg(const struct seen_state *s, uint64_t id)
{
	unsigned i;

	for (i = 0; i < s->n; i++)
		if (s->id[i] == id)
			return s->reg[i];
	ck_abort_msg("register %lx is not listed", id);
}

static void is_disturbed(const struct seen_state *before, const struct seen_state *after, bool chips)
{
	uint64_t value;
	unsigned i;

	for (i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
		memcpy(&value, seen_reg(after, odd[i].id), 8);
		is(value, odd[i].value);
	}
	is(seen_reg(after, V7)[15], 0x5a);
	for (i = 0; chips && i < WORDS_2; i++)
		ck_assert_msg(before->gic[i] != after->gic[i] || i == 5, "GIC word %u did not change", i);
}

#define same(field) ck_assert_msg(!memcmp(&a->field, &b->field, sizeof(a->field)), "%s differs", #field)
static void same_state(const struct seen_state *a, const struct seen_state *b)
{
	unsigned i;

	is(a->n, b->n);
	for (i = 0; i < a->n; i++)
		ck_assert_msg(a->id[i] == b->id[i] && !memcmp(a->reg[i], b->reg[i], 16), "register %lx differs", a->id[i]);
	for (i = 0; i < WORDS_3; i++)
		ck_assert_msg(a->gic[i] == b->gic[i], "GIC word %u: %lx, %lx", i, a->gic[i], b->gic[i]);
	same(mp_state);
	same(events);
	same(serial);
}

/* -- time ------------------------------------------------------------------------------------- */

static uint64_t counter_of(struct vmm *vmm)
{
	uint64_t now;

	ok(arm64_get(vmm->vcpu[0]->fd, KVM_REG_ARM_TIMER_CNT, &now));
	return now;
}

/* The counter of whoever takes over a state is that of the first VM, however long that took. */
START_TEST(time_goes_on)
{
	struct vmm *from = make(2, &large), *to = make(0, NULL);
	uint64_t frequency, before, now, after;
	struct vmm_state *state;

	__asm__("mrs %0, cntfrq_el0" : "=r"(frequency));
	ok(vmm_state_save(from, &state));
	sleep_ms(1000);
	is(vmm_state_restore(to, state), 0);
	before = counter_of(from);
	now = counter_of(to);
	after = counter_of(from);
	ck_assert_msg(now + frequency / 2 > before && now < after + frequency / 2, "%lu is not between %lu and %lu", now,
		      before, after);
	vmm_state_destroy(state);
	vmm_destroy(to);
	vmm_destroy(from);
}
END_TEST

static void add_arch_tests(TCase *tc)
{
	tcase_add_test(tc, time_goes_on);
}

#endif
