/* SPDX-License-Identifier: MIT */
/* What test_vmm.c knows of x86: the state that x86_state.c has to carry, by the plain ioctls; page tables; lines. */
#ifndef KAGE_TESTS_X86_TEST_VMM_H
#define KAGE_TESTS_X86_TEST_VMM_H

/* A triple fault says nothing of itself. */
static void check_fault(struct vmm *vmm, uint64_t gva)
{
}

START_TEST(translate)
{
	struct vmm *vmm = make(1, _i ? &small : &large);
	const uint64_t good[] = {0, PAYLOAD_CODE + 5, PAYLOAD_TABLES, 2 * MIB + 123, RAM - 1, RAM + 99, MAP - 1};
	struct kvm_translation tr;
	unsigned i;

	for (i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		memset(&tr, 0, sizeof(tr));
		tr.linear_address = good[i];
		ok(ioctl(vmm->vcpu[0]->fd, KVM_TRANSLATE, &tr));
		ck_assert_msg(tr.valid, "gva %lx", good[i]);
		is(tr.physical_address, good[i]);
	}
	tr.linear_address = MAP;
	ok(ioctl(vmm->vcpu[0]->fd, KVM_TRANSLATE, &tr));
	is(tr.valid, 0);
	vmm_destroy(vmm);
}
END_TEST

static void add_arch_tests(TCase *tc)
{
	tcase_add_loop_test(tc, translate, 0, 2);
}

/* Pin 4 of the IOAPIC, and of the PIC. */
static bool serial_line(struct vmm *vmm)
{
	struct kvm_irqchip chip = {.chip_id = 0};

	ok(ioctl(vmm->fd, KVM_GET_IRQCHIP, &chip));
	return chip.chip.pic.last_irr & 0x10;
}

#define MSR_STAR	   0xc0000081
#define MSR_KERNEL_GS_BASE 0xc0000102

struct msrs {
	struct kvm_msrs head;
	struct kvm_msr_entry entry[2];
};

struct seen_state {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_fpu fpu;
	struct kvm_xsave xsave;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debugregs;
	struct kvm_mp_state mp_state;
	struct kvm_vcpu_events events;
	struct kvm_lapic_state lapic;
	struct kvm_irqchip chip[3];
	struct kvm_pit_state2 pit;
	struct msrs msrs;
	struct vmm_serial_state serial;
};

static void look(struct vmm *vmm, struct seen_state *s, bool chips)
{
	int fd = vmm->vcpu[0]->fd;
	unsigned i;

	memset(s, 0, sizeof(*s));
	ok(ioctl(fd, KVM_GET_REGS, &s->regs));
	ok(ioctl(fd, KVM_GET_SREGS, &s->sregs));
	ok(ioctl(fd, KVM_GET_FPU, &s->fpu));
	ok(ioctl(fd, KVM_GET_DEBUGREGS, &s->debugregs));
	ok(ioctl(fd, KVM_GET_VCPU_EVENTS, &s->events));
	ok(ioctl(fd, KVM_GET_MP_STATE, &s->mp_state));
	if (ioctl(vmm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE) > 0)
		ok(ioctl(fd, KVM_GET_XSAVE, &s->xsave));
	if (ioctl(vmm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XCRS) > 0)
		ok(ioctl(fd, KVM_GET_XCRS, &s->xcrs));
	s->msrs.head.nmsrs = 2;
	s->msrs.entry[0].index = MSR_STAR;
	s->msrs.entry[1].index = MSR_KERNEL_GS_BASE;
	ck_assert_int_eq(ioctl(fd, KVM_GET_MSRS, &s->msrs), 2);
	if (!chips)
		return;
	ok(ioctl(fd, KVM_GET_LAPIC, &s->lapic));
	ok(ioctl(vmm->fd, KVM_GET_PIT2, &s->pit));
	for (i = 0; i < 3; i++) {
		s->chip[i].chip_id = i;
		ok(ioctl(vmm->fd, KVM_GET_IRQCHIP, &s->chip[i]));
	}
	vmm_serial_save(vmm->serial, &s->serial);
	for (i = 0; i < 3; i++)
		s->pit.channels[i].count_load_time = 0; /* host time */
}

/* KVM_SET_FPU alone does not mark the registers as in use, so KVM_GET_XSAVE would not give them. */
static void disturb_fpu(struct vmm *vmm, struct seen_state *s)
{
	const unsigned xmm7 = (160 + 7 * 16) / 4, xstate_bv = 512 / 4; /* XSAVE area: SDM volume 1, 13.4 */
	int fd = vmm->vcpu[0]->fd;

	if (ioctl(vmm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE) > 0) {
		s->xsave.region[xstate_bv] |= 3;
		s->xsave.region[0] = 0x27f; /* FCW */
		memset(&s->xsave.region[xmm7], 0x5a, 16);
		ok(ioctl(fd, KVM_SET_XSAVE, &s->xsave));
		return;
	}
	memset(s->fpu.xmm[7], 0x5a, sizeof(s->fpu.xmm[7]));
	s->fpu.fcw = 0x27f;
	ok(ioctl(fd, KVM_SET_FPU, &s->fpu));
}

/* Values that a new VM does not have. */
static void disturb(struct vmm *vmm, bool chips)
{
	struct seen_state s;
	int fd = vmm->vcpu[0]->fd;

	look(vmm, &s, chips);
	s.regs.r15 = 0x1234567890abcdef;
	s.debugregs.db[1] = 0x112233;
	s.msrs.entry[0].data = 0x0023001000000000;
	s.msrs.entry[1].data = 0x7fff12345000;
	s.events.nmi.masked = 1;
	ok(ioctl(fd, KVM_SET_REGS, &s.regs));
	disturb_fpu(vmm, &s);
	ok(ioctl(fd, KVM_SET_DEBUGREGS, &s.debugregs));
	ck_assert_int_eq(ioctl(fd, KVM_SET_MSRS, &s.msrs), 2);
	ok(ioctl(fd, KVM_SET_VCPU_EVENTS, &s.events));
	if (!chips)
		return;
	s.lapic.regs[0x80] = 0x30;  /* the task priority, also part of sregs */
	s.lapic.regs[0x350] = 0x42; /* the vector of LINT0 */
	s.chip[2].chip.ioapic.redirtbl[5].fields.vector = 0x71;
	s.chip[0].chip.pic.imr = 0xa5;
	s.pit.channels[2].count = 4321;
	s.serial.scr = 0x77;
	s.serial.count = 2;
	s.serial.fifo[0] = 'k';
	s.serial.fifo[1] = 'g';
	ok(ioctl(fd, KVM_SET_LAPIC, &s.lapic));
	ok(ioctl(vmm->fd, KVM_SET_IRQCHIP, &s.chip[2]));
	ok(ioctl(vmm->fd, KVM_SET_IRQCHIP, &s.chip[0]));
	ok(ioctl(vmm->fd, KVM_SET_PIT2, &s.pit));
	vmm_serial_restore(vmm->serial, &s.serial);
}

#define same(field) ck_assert_msg(!memcmp(&a->field, &b->field, sizeof(a->field)), "%s differs", #field)
static void same_state(const struct seen_state *a, const struct seen_state *b)
{
	same(regs);
	same(sregs);
	same(fpu);
	same(xsave);
	same(xcrs);
	same(debugregs);
	same(mp_state);
	same(events);
	same(lapic);
	same(chip);
	same(pit);
	same(msrs);
	same(serial);
}

static void is_disturbed(const struct seen_state *before, const struct seen_state *after, bool chips)
{
	is(after->regs.r15, 0x1234567890abcdef);
	is(after->fpu.xmm[7][3], 0x5a);
	is(after->fpu.fcw, 0x27f);
	is(after->msrs.entry[1].data, 0x7fff12345000);
	is(after->debugregs.db[1], 0x112233);
	ck_assert(!chips || memcmp(&before->lapic, &after->lapic, sizeof(before->lapic)));
	ck_assert(!chips || memcmp(&before->chip, &after->chip, sizeof(before->chip)));
}

#endif
