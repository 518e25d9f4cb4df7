/* SPDX-License-Identifier: MIT */
/* What the backend reads from a vCPU of x86-64, for test_slots.c; and walks against KVM_TRANSLATE. */
#ifndef KAGE_TESTS_X86_SLOTS_REGS_H
#define KAGE_TESTS_X86_SLOTS_REGS_H

struct cpu_facts {
	unsigned phys_bits;
	bool page1g, pku;
	uint64_t cr4; /* SMEP and SMAP, if there are any */
};

static struct cpu_facts cpu_facts(void)
{
	struct kvm_cpuid2 *c = calloc(1, sizeof(*c) + 256 * sizeof(c->entries[0]));
	struct cpu_facts f = {.phys_bits = 36};

	c->nent = 256;
	ck_assert_int_eq(ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, c), 0);
	for (unsigned i = 0; i < c->nent; i++) {
		if (c->entries[i].function == 0x80000008)
			f.phys_bits = c->entries[i].eax & 0xff;
		if (c->entries[i].function == 0x80000001)
			f.page1g = c->entries[i].edx >> 26 & 1;
		if (c->entries[i].function == 7 && c->entries[i].index == 0) {
			f.pku = c->entries[i].ecx >> 3 & 1;
			f.cr4 = (c->entries[i].ebx >> 7 & 1) << 20 | (c->entries[i].ebx >> 20 & 1) << 21;
		}
	}
	free(c);
	return f;
}

static void regs_accepted(struct vm *vm, struct kage_vcpu *vcpu)
{
	struct kage_x86_regs regs;
	struct kvm_sregs s;
	struct kvm_regs g;

	ck_assert_int_eq(ioctl(vm->cpu, KVM_GET_SREGS, &s), 0);
	ck_assert_int_eq(ioctl(vm->cpu, KVM_GET_REGS, &g), 0);
	ck_assert_int_eq(arch_vcpu_regs(vm->cpu, &regs), 0);
	ck_assert_uint_eq(regs.cr0, s.cr0);
	ck_assert_uint_eq(regs.cr3, s.cr3);
	ck_assert_uint_eq(regs.cr4, s.cr4);
	ck_assert_uint_eq(regs.efer, s.efer);
	ck_assert_uint_eq(regs.rflags, g.rflags);
	ck_assert_int_eq(kage_vcpu_set_regs(vcpu, &regs, sizeof(regs)), KAGE_OK);
}

static void pkru_is_read(struct vm *vm, struct kage_vcpu *vcpu)
{
	struct kvm_xsave xsave;
	struct kage_x86_regs regs;
	struct kvm_sregs s;
	uint64_t present;
	uint32_t pkru = 0x55555554;

	ck_assert_int_eq(ioctl(vm->cpu, KVM_GET_SREGS, &s), 0);
	s.cr4 |= 1 << 22;
	ck_assert_int_eq(ioctl(vm->cpu, KVM_SET_SREGS, &s), 0);
	ck_assert_int_eq(ioctl(vm->cpu, KVM_GET_XSAVE, &xsave), 0);
	memcpy(&present, (char *)&xsave + 512, 8);
	present |= 1 << 9;
	memcpy((char *)&xsave + 512, &present, 8);
	memcpy((char *)&xsave + 0xa80, &pkru, 4); /* where Intel's CPUs have it */
	ck_assert_int_eq(ioctl(vm->cpu, KVM_SET_XSAVE, &xsave), 0);
	ck_assert_int_eq(arch_vcpu_regs(vm->cpu, &regs), 0);
	ck_assert_uint_eq(regs.pkru, pkru);
	ck_assert_int_eq(kage_vcpu_set_regs(vcpu, &regs, sizeof(regs)), KAGE_OK);
}

START_TEST(registers_are_read)
{
	struct kage_vcpu_config config = {.size = sizeof(config),
					  .features = KAGE_X86_NX | KAGE_X86_PAGE1GB | KAGE_X86_SMEP |
						      KAGE_X86_SMAP | KAGE_X86_PCID | KAGE_X86_LA57 |
						      KAGE_X86_PKU};
	struct kage_engine *engine;
	struct kage_x86_regs regs;
	struct kage_vcpu *vcpu;
	struct kage_vm *guest;
	struct kvm_sregs s;
	struct vm vm;
	uint64_t gpa = DATA << 12;

	vm_start(&vm, 0, 0);
	ck_assert_int_eq(vm_add(&vm, DATA, 1), 0);
	ck_assert_int_eq(kage_engine_create(NULL, &engine), KAGE_OK);
	ck_assert_int_eq(kage_vm_create(engine, NULL, &guest), KAGE_OK);
	ck_assert_int_eq(kage_vcpu_create(guest, &config, &vcpu), KAGE_OK);
	for (int ran = 0; ran < 2; ran++) { /* as set, and after the guest has run */
		regs_accepted(&vm, vcpu);
		ck_assert_int_eq(arch_vcpu_regs(vm.cpu, &regs), 0);
		ck_assert_uint_eq(regs.cr0, CR0_GUEST);
		ck_assert_uint_eq(regs.cr3, AT_TABLES);
		ck_assert_uint_eq(regs.cr4, CR4_GUEST);
		ck_assert_uint_eq(regs.efer, EFER_GUEST);
		ck_assert_uint_eq(regs.cpl, 3);
		ck_assert_uint_eq(regs.pkru, 0);
		vm_write(&vm, &gpa, 1, 5, NULL, NULL);
	}
	vm_load(&vm, payload_list, payload_list_end, (struct args){0});
	ck_assert_int_eq(ioctl(vm.cpu, KVM_GET_SREGS, &s), 0);
	s.cs.dpl = s.ss.dpl = 0;
	s.cs.selector = 0x10;
	s.ss.selector = 0x18;
	s.cr4 |= cpu_facts().cr4;
	s.cr3 = 0x123000;
	ck_assert_int_eq(ioctl(vm.cpu, KVM_SET_SREGS, &s), 0);
	ck_assert_int_eq(ioctl(vm.cpu, KVM_SET_REGS, &(struct kvm_regs){.rflags = 1 << 18 | 2}), 0);
	regs_accepted(&vm, vcpu);
	ck_assert_int_eq(arch_vcpu_regs(vm.cpu, &regs), 0);
	ck_assert_uint_eq(regs.cpl, 0);
	ck_assert_uint_eq(regs.cr3, 0x123000);
	ck_assert(regs.rflags & 1 << 18);
	if (cpu_facts().pku)
		pkru_is_read(&vm, vcpu);
	else
		printf("skipped: this CPU has no protection keys\n");
	s.cr0 = 0x10; /* paging off, as after a reset */
	s.efer = 0;
	s.cr4 = 0;
	s.cs.l = 0;
	ck_assert_int_eq(ioctl(vm.cpu, KVM_SET_SREGS, &s), 0);
	regs_accepted(&vm, vcpu);
	ck_assert_int_eq(arch_vcpu_regs(-1, &regs), -EBADF);
	kage_vcpu_destroy(vcpu);
	ck_assert_int_eq(kage_vm_destroy(guest), KAGE_OK);
	ck_assert_int_eq(kage_engine_destroy(engine), KAGE_OK);
	vm_stop(&vm);
}
END_TEST

#define TREE_PAGES 1024

struct tree {
	struct vm *vm;
	struct rng rng;
	uint64_t next; /* page of DATA for the next table */
	struct cpu_facts cpu;
};

/* One of eight, so that addresses share tables. */
static uint64_t tree_gva(struct tree *t)
{
	uint64_t gva = rng_next(&t->rng) & 0xfff;

	for (unsigned level = 0; level < 4; level++)
		gva |= (rng_below(&t->rng, 8) * 73 & 511) << (12 + 9 * level);
	return gva >> 47 & 1 ? gva | 0xffff000000000000 : gva;
}

/* An entry of `level`: a table, a page large or small, nothing, something reserved, a table where no memory
 * is. */
static uint64_t tree_entry(struct tree *t, unsigned level)
{
	uint64_t flags = 1 | (rng_next(&t->rng) & 0x66), page = rng_next(&t->rng) & 0xfffffff000;

	switch (rng_below(&t->rng, 20)) {
	case 0:
		return page | (flags & ~(uint64_t)1);
	case 1:
		return page | flags | (t->cpu.phys_bits < 52 ? (uint64_t)1 << 51 : 0);
	case 2:
		return page | flags |
		       0x80; /* large: at a level that has none, or with low address bits, reserved */
	case 3:
		return 0x3f00000000 | flags;
	case 4:
		return (page & ~(uint64_t)0x3fffffff) | flags | 0x80 | (uint64_t)1 << 63;
	case 5:
		return (page & ~(uint64_t)0x3fffffff) | flags | 0x1080; /* bit 12 is PAT */
	default:
		break;
	}
	if (level == 0)
		return page | flags | (rng_next(&t->rng) & 0x180);
	if (t->next == TREE_PAGES)
		return 0;
	return (DATA + t->next++) << 12 | flags;
}

static int tree_read(void *arg, uint64_t gpa, unsigned bytes, uint64_t *entry)
{
	struct tree *t = arg;

	if (gpa >> 12 < DATA || gpa >> 12 >= DATA + TREE_PAGES)
		return -EFAULT;
	*entry = __atomic_load_n(vm_word(t->vm, gpa), __ATOMIC_RELAXED);
	return 0;
}

/* Fills in what the walk of gva misses. */
static void tree_grow(struct tree *t, uint64_t gva)
{
	uint64_t table = DATA << 12;

	for (unsigned level = 3;; level--) {
		uint64_t *e = vm_word(t->vm, table + (gva >> (12 + 9 * level) & 511) * 8);

		if (!*e)
			*e = tree_entry(t, level);
		table = *e & 0xffffff000;
		if (!level || !(*e & 1) || (*e & 0x80) || table >> 12 < DATA ||
		    table >> 12 >= DATA + TREE_PAGES)
			return;
	}
}

START_TEST(kage_translates_as_kvm_does)
{
	struct tree t = {.rng = rng_seed((uint64_t)_i), .next = 1, .cpu = cpu_facts()};
	unsigned valid = 0, invalid = 0, large = 0;
	struct kage_x86_regs regs;
	struct kvm_sregs s;
	struct vm vm;

	vm_start(&vm, 0, 0);
	ck_assert_int_eq(vm_add(&vm, DATA, TREE_PAGES), 0);
	t.vm = &vm;
	ck_assert_int_eq(ioctl(vm.cpu, KVM_GET_SREGS, &s), 0);
	s.cr3 = DATA << 12;
	if (_i % 2)
		s.efer &= ~(uint64_t)0x800; /* without NXE bit 63 is reserved */
	ck_assert_int_eq(ioctl(vm.cpu, KVM_SET_SREGS, &s), 0);
	ck_assert_int_eq(arch_vcpu_regs(vm.cpu, &regs), 0);
	for (unsigned i = 0; i < 1000; i++) {
		struct pt_params p = {
		    .phys_bits = (uint8_t)t.cpu.phys_bits, .nx = regs.efer >> 11 & 1, .page1g = t.cpu.page1g};
		struct kvm_translation tr = {.linear_address = tree_gva(&t)};
		struct pt_guest_path path;

		tree_grow(&t, tr.linear_address);
		ck_assert_int_eq(
		    pt_guest_walk(&pt_x86_4, &p, regs.cr3, tr.linear_address, tree_read, &t, &path), 0);
		ck_assert_int_eq(ioctl(vm.cpu, KVM_TRANSLATE, &tr), 0);
		ck_assert_msg(tr.valid == (path.state == PT_LEAF),
			      "gva %#llx: KVM %u, kage state %u at level %u, entry %#lx", tr.linear_address,
			      tr.valid, path.state, path.level, path.step[path.level].entry);
		if (tr.valid)
			ck_assert_uint_eq(tr.physical_address, path.gpa);
		valid += tr.valid;
		invalid += !tr.valid;
		large += tr.valid && path.level > 0;
	}
	ck_assert_uint_gt(valid, 100);
	ck_assert_uint_gt(invalid, 100);
	ck_assert_uint_gt(large, 10);
	vm_stop(&vm);
}
END_TEST

static void add_register_tests(TCase *tc)
{
	tcase_add_test(tc, registers_are_read);
	tcase_add_loop_test(tc, kage_translates_as_kvm_does, 0, 4);
}

#endif
