/* SPDX-License-Identifier: MIT */
/*
 * Direct boot: lays out Image, device tree and initramfs in guest memory. See arm64_boot.h for the layout
 * and B1 to B4. A plan is made first and written afterwards.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "arm64.h"
#include "arm64_boot.h"
#include "arm64_fdt.h"

#define PAGE	    ((uint64_t)4096)
#define IMAGE_MAGIC 0x644d5241u /* "ARM" and 0x64 */
#define BIG_ENDIAN_KERNEL 1u

#define GIC 1u /* phandle */
#define SPI 0u
#define PPI 1u
#define LEVEL_HIGH 4u

/* booting.rst: "Call the kernel image". */
struct image_header {
	uint32_t code[2];
	uint64_t text_offset, image_size, flags, reserved[3];
	uint32_t magic, reserved5;
};

static_assert(sizeof(struct image_header) == 64, "as booting.rst has it");

struct plan {
	struct boot_entry entry;
	uint64_t end; /* of what the Image asks for */
	uint64_t low_end;
	int tree_len;
	uint64_t tree[BOOT_TREE_MAX / 8];
};

static int refuse(const char **why, int err, const char *text)
{
	*why = text;
	return err;
}

/* -- the tree ---------------------------------------------------------------------------- */

static void add_memory(struct fdt *fdt, const struct vmm_ram *ram)
{
	uint64_t reg[2 * VMM_REGIONS];

	for (unsigned i = 0; i < ram->regions; i++) {
		uint64_t skip = i ? 0 : BOOT_BASE;

		reg[2 * i] = ram->region[i].gpa + skip;
		reg[2 * i + 1] = ram->region[i].len - skip;
	}
	fdt_node(fdt, "memory@200000");
	fdt_text(fdt, "device_type", "memory");
	fdt_u64s(fdt, "reg", reg, 2 * ram->regions);
	fdt_node_end(fdt);
}

static void add_cpus(struct fdt *fdt, const struct boot_machine *machine, unsigned cpus)
{
	char name[16];

	fdt_node(fdt, "cpus");
	fdt_u32(fdt, "#address-cells", 1);
	fdt_u32(fdt, "#size-cells", 0);
	for (unsigned i = 0; i < cpus; i++) {
		uint32_t affinity = machine->mpidr[i] & 0xffffff;

		snprintf(name, sizeof(name), "cpu@%x", affinity);
		fdt_node(fdt, name);
		fdt_text(fdt, "device_type", "cpu");
		fdt_text(fdt, "compatible", "arm,armv8");
		fdt_u32(fdt, "reg", affinity);
		fdt_text(fdt, "enable-method", "psci");
		fdt_node_end(fdt);
	}
	fdt_node_end(fdt);
	fdt_node(fdt, "psci");
	fdt_prop(fdt, "compatible", "arm,psci-1.0\0arm,psci-0.2", sizeof("arm,psci-1.0\0arm,psci-0.2"));
	fdt_text(fdt, "method", "hvc");
	fdt_node_end(fdt);
}

static void add_gic(struct fdt *fdt, const struct boot_machine *machine, unsigned cpus)
{
	const uint64_t v3[] = { ARM64_GICD, ARM64_GICD_LEN, ARM64_GICR, (uint64_t)cpus * ARM64_GICR_ONE };
	const uint64_t v2[] = { ARM64_GICD, 0x1000, ARM64_GICC, ARM64_GICC_LEN };

	fdt_node(fdt, "interrupt-controller@fe000000");
	fdt_text(fdt, "compatible", machine->gic_version == 3 ? "arm,gic-v3" : "arm,cortex-a15-gic");
	fdt_u32(fdt, "#interrupt-cells", 3);
	fdt_u32(fdt, "#address-cells", 0);
	fdt_prop(fdt, "interrupt-controller", NULL, 0);
	fdt_u64s(fdt, "reg", machine->gic_version == 3 ? v3 : v2, 4);
	fdt_u32(fdt, "phandle", GIC);
	fdt_node_end(fdt);
}

/* Secure, non-secure, virtual, hypervisor; GICv2 also wants to hear which CPUs. */
static void add_timer(struct fdt *fdt, const struct boot_machine *machine, unsigned cpus)
{
	uint32_t mask = machine->gic_version == 3 ? 0 : ((1u << (cpus < 8 ? cpus : 8)) - 1) << 8;
	const uint32_t irqs[] = { PPI, 13, LEVEL_HIGH | mask, PPI, 14, LEVEL_HIGH | mask,
				  PPI, 11, LEVEL_HIGH | mask, PPI, 10, LEVEL_HIGH | mask };

	fdt_node(fdt, "timer");
	fdt_text(fdt, "compatible", "arm,armv8-timer");
	fdt_cells(fdt, "interrupts", irqs, 12);
	fdt_prop(fdt, "always-on", NULL, 0);
	fdt_node_end(fdt);
}

static void add_serial(struct fdt *fdt)
{
	const uint64_t reg[] = { VMM_SERIAL_BASE, 8 };
	const uint32_t irq[] = { SPI, VMM_SERIAL_IRQ, LEVEL_HIGH };

	fdt_node(fdt, "serial@fd000000");
	fdt_text(fdt, "compatible", "ns16550a");
	fdt_u64s(fdt, "reg", reg, 2);
	fdt_u32(fdt, "clock-frequency", 1843200);
	fdt_cells(fdt, "interrupts", irq, 3);
	fdt_node_end(fdt);
}

static void add_chosen(struct fdt *fdt, const struct boot_config *config, const struct boot_machine *machine,
		       uint64_t initrd)
{
	fdt_node(fdt, "chosen");
	fdt_text(fdt, "bootargs", config->cmdline ? config->cmdline : "");
	fdt_text(fdt, "stdout-path", "/serial@fd000000");
	if (config->initrd.len) {
		fdt_u64(fdt, "linux,initrd-start", initrd);
		fdt_u64(fdt, "linux,initrd-end", initrd + config->initrd.len);
	}
	fdt_prop(fdt, "kaslr-seed", machine->seed, 8);
	fdt_prop(fdt, "rng-seed", machine->seed + 8, sizeof(machine->seed) - 8);
	fdt_node_end(fdt);
}

int boot_tree(const struct vmm_ram *ram, const struct boot_config *config, const struct boot_machine *machine,
	      uint64_t initrd, void *buf, size_t room)
{
	struct fdt fdt;

	fdt_begin(&fdt, buf, room);
	fdt_text(&fdt, "compatible", "linux,dummy-virt");
	fdt_text(&fdt, "model", "kage-vmm");
	fdt_u32(&fdt, "#address-cells", 2);
	fdt_u32(&fdt, "#size-cells", 2);
	fdt_u32(&fdt, "interrupt-parent", GIC);
	add_chosen(&fdt, config, machine, initrd);
	add_memory(&fdt, ram);
	add_cpus(&fdt, machine, config->cpus);
	add_gic(&fdt, machine, config->cpus);
	add_timer(&fdt, machine, config->cpus);
	add_serial(&fdt);
	return fdt_finish(&fdt);
}

/* -- the plan ---------------------------------------------------------------------------- */

static int place_image(struct plan *plan, struct boot_blob kernel, const char **why)
{
	struct image_header h;
	uint64_t size;

	if (kernel.len < sizeof(h))
		return refuse(why, -ENOEXEC, "no arm64 Image: too short");
	memcpy(&h, kernel.data, sizeof(h));
	if (le32toh(h.magic) != IMAGE_MAGIC)
		return refuse(why, -ENOEXEC, "no arm64 Image (is it compressed?)");
	if (le64toh(h.flags) & BIG_ENDIAN_KERNEL)
		return refuse(why, -EOPNOTSUPP, "a big-endian kernel");
	size = le64toh(h.image_size);
	if (!size)
		return refuse(why, -EOPNOTSUPP, "the Image does not say how large it is (Linux before 3.17)");
	if (le64toh(h.text_offset) >= BOOT_ALIGN || size > BOOT_HOLE || size < kernel.len)
		return refuse(why, -ENOEXEC, "a broken Image: text_offset or image_size");
	plan->entry.kernel = plan->entry.pc = BOOT_BASE + le64toh(h.text_offset);
	plan->entry.kernel_len = kernel.len;
	plan->end = plan->entry.pc + size;
	return 0;
}

/* B3 */
static int place_rest(struct plan *plan, size_t initrd, const char **why)
{
	uint64_t tree = (plan->end + BOOT_ALIGN - 1) / BOOT_ALIGN * BOOT_ALIGN;

	if (tree + BOOT_TREE_MAX > plan->low_end)
		return refuse(why, -ENOSPC, "RAM is too small for the kernel");
	plan->entry.tree = tree;
	if (!initrd)
		return 0;
	if (initrd > plan->low_end)
		return refuse(why, -ENOSPC, "RAM is too small for the initramfs");
	plan->entry.initrd = (plan->low_end - initrd) / PAGE * PAGE;
	return plan->entry.initrd < tree + BOOT_TREE_MAX ?
		       refuse(why, -ENOSPC, "RAM is too small for kernel and initramfs") : 0;
}

/* As vmm_pc_layout() does it. */
static bool is_laid_out(const struct vmm_ram *ram)
{
	if (!ram->regions || ram->region[0].gpa || ram->region[0].len <= BOOT_BASE || ram->region[0].len > BOOT_HOLE)
		return false;
	for (unsigned i = 0; i < ram->regions; i++)
		if ((ram->region[i].gpa | ram->region[i].len) % PAGE || (i && ram->region[i].gpa < BOOT_HIGH))
			return false;
	return true;
}

static int make_plan(struct vmm_ram *ram, const struct boot_config *config, const struct boot_machine *machine,
		     struct plan *plan, const char **why)
{
	int err;

	if (!is_laid_out(ram))
		return refuse(why, -EINVAL, "RAM must begin at 0, be more than 2 MiB, and leave out 3 to 4 GiB");
	if (!config->cpus || config->cpus > VMM_VCPUS)
		return refuse(why, -EINVAL, "1 to 64 CPUs");
	if (config->cmdline && strlen(config->cmdline) >= BOOT_CMDLINE_MAX)
		return refuse(why, -E2BIG, "the command line is longer than the kernel takes");
	plan->low_end = ram->region[0].len;
	err = place_image(plan, config->kernel, why);
	if (!err)
		err = place_rest(plan, config->initrd.len, why);
	if (err)
		return err;
	plan->tree_len = boot_tree(ram, config, machine, plan->entry.initrd, plan->tree, sizeof(plan->tree));
	return plan->tree_len < 0 ? refuse(why, plan->tree_len, "the device tree is too large") : 0;
}

/* -- writing ------------------------------------------------------------------------------- */

static int write_plan(struct vmm_ram *ram, const struct boot_config *config, const struct plan *plan,
		      const char **why)
{
	const struct {
		uint64_t gpa;
		const void *data;
		size_t len;
	} part[] = { { plan->entry.kernel, config->kernel.data, config->kernel.len },
		     { plan->entry.tree, plan->tree, (size_t)plan->tree_len },
		     { plan->entry.initrd, config->initrd.data, config->initrd.len } };

	for (unsigned i = 0; i < 3; i++) {
		int err = part[i].len ? ram->ops->write(ram, part[i].gpa, part[i].data, part[i].len) : 0;

		if (err)
			return refuse(why, err, "cannot write guest memory");
	}
	return 0;
}

int boot_load(struct vmm_ram *ram, const struct boot_config *config, const struct boot_machine *machine,
	      struct boot_entry *out, const char **why)
{
	struct plan *plan = calloc(1, sizeof(*plan));
	int err;

	*why = "";
	if (!plan)
		return refuse(why, -ENOMEM, "out of memory");
	err = make_plan(ram, config, machine, plan, why);
	if (!err)
		err = write_plan(ram, config, plan, why);
	if (!err)
		*out = plan->entry;
	free(plan);
	return err;
}

/* -- the VM ---------------------------------------------------------------------------------- */

static int describe(struct vmm *vmm, struct boot_machine *machine)
{
	int err = 0;

	machine->gic_version = vmm->gic_version;
	for (unsigned i = 0; i < vmm->vcpus && !err; i++)
		err = arm64_get(vmm->vcpu[i]->fd, ARM64_MPIDR, &machine->mpidr[i]);
	if (!err && getrandom(machine->seed, sizeof(machine->seed), 0) != sizeof(machine->seed))
		err = -EIO;
	return err;
}

/* booting.rst: the MMU off, x0 the tree, x1 to x3 zero. */
int boot_vm(struct vmm *vmm, const struct boot_config *config, const char **why)
{
	struct boot_machine machine = { 0 };
	struct boot_entry entry;
	int err;

	if (vmm->gic < 0)
		return refuse(why, -EINVAL, "the VM has no interrupt controller");
	err = describe(vmm, &machine);
	if (err)
		return refuse(why, err, "cannot ask for the vCPUs' numbers");
	err = boot_load(vmm->ram, config, &machine, &entry, why);
	if (err)
		return err;
	err = vmm_vcpu_enter(vmm->vcpu[0], &(struct vmm_entry){ .pc = entry.pc, .x0 = entry.tree });
	return err ? refuse(why, err, "cannot set the vCPUs") : 0;
}
