/* SPDX-License-Identifier: MIT */
/*
 * The least of ACPI with which Linux finds its CPUs, its interrupt controllers
 * and the switch: RSDP, XSDT, FADT, FACS, MADT, and a DSDT that has only \_S5
 * (ACPI specification 6.5, chapters 4 and 5).
 *
 * Not "hardware reduced": Linux would then do without the PIC and the PIT that
 * KVM emulates, and ISA interrupts like the serial port's would not exist. So
 * there is a PM1 block (struct acpi_pm), always in ACPI mode (SMI_CMD is 0). Wake
 * events, PM timer and GPEs do not exist. The reset register is one port more.
 *
 * No interrupt source override for the timer: KVM's default routing connects
 * its PIT to pin 0 of the I/O APIC, as ISA interrupts are connected by default.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "x86_boot.h"

#define PM1_EVENT   0 /* status, enable: 2 bytes each */
#define PM1_CONTROL 4
#define PM_RESET    6
#define PM_RESET_VALUE 0x01

#define CONTROL_SCI_EN (1u << 0)
#define CONTROL_TYPE(c) (((c) >> 10) & 7u)
#define CONTROL_SLP_EN (1u << 13)
#define TYPE_S5	       5u

#define BOOT_ARCH_LEGACY  (1u << 0) /* user-visible devices on the ISA bus */
#define BOOT_ARCH_NO_VGA  (1u << 2)
#define BOOT_ARCH_NO_ASPM (1u << 4)
#define BOOT_ARCH_NO_RTC  (1u << 5)
#define FADT_WBINVD	  (1u << 0)
#define FADT_PWR_BUTTON	  (1u << 4) /* no fixed power button, nor ... */
#define FADT_SLP_BUTTON	  (1u << 5)
#define FADT_RESET	  (1u << 10)

struct header {
	char signature[4];
	uint32_t length;
	uint8_t revision, checksum;
	char oem[6], oem_table[8];
	uint32_t oem_revision;
	char creator[4];
	uint32_t creator_revision;
} __attribute__((packed));

struct address {
	uint8_t space, bits, offset, access; /* space 1: ports */
	uint64_t address;
} __attribute__((packed));

struct rsdp {
	char signature[8];
	uint8_t checksum;
	char oem[6];
	uint8_t revision;
	uint32_t rsdt, length;
	uint64_t xsdt;
	uint8_t checksum_all, reserved[3];
} __attribute__((packed));

struct xsdt {
	struct header h;
	uint64_t table[2];
} __attribute__((packed));

struct fadt {
	struct header h;
	uint32_t facs, dsdt;
	uint8_t reserved0, profile;
	uint16_t sci_irq;
	uint32_t smi_cmd;
	uint8_t acpi_enable, acpi_disable, s4bios, pstate;
	uint32_t pm1a_event, pm1b_event, pm1a_control, pm1b_control, pm2_control, pm_timer, gpe0, gpe1;
	uint8_t pm1_event_len, pm1_control_len, pm2_control_len, pm_timer_len, gpe0_len, gpe1_len, gpe1_base;
	uint8_t cst;
	uint16_t c2_latency, c3_latency, flush_size, flush_stride;
	uint8_t duty_offset, duty_width, day_alarm, month_alarm, century;
	uint16_t boot_arch;
	uint8_t reserved1;
	uint32_t flags;
	struct address reset_register;
	uint8_t reset_value;
	uint16_t arm_boot_arch;
	uint8_t minor;
	uint64_t x_facs, x_dsdt;
	struct address x_pm1a_event, x_pm1b_event, x_pm1a_control, x_pm1b_control, x_pm2_control, x_pm_timer;
	struct address x_gpe0, x_gpe1, sleep_control, sleep_status;
	uint64_t hypervisor;
} __attribute__((packed));

struct facs {
	char signature[4];
	uint32_t length, hardware_signature, waking_vector, global_lock, flags;
	uint64_t x_waking_vector;
	uint8_t version, reserved[31];
} __attribute__((packed));

struct madt {
	struct header h;
	uint32_t lapic, flags; /* bit 0: there are two 8259 */
} __attribute__((packed));

struct madt_cpu {
	uint8_t type, length, uid, apic;
	uint32_t flags; /* bit 0: enabled */
} __attribute__((packed));

struct madt_ioapic {
	uint8_t type, length, id, reserved;
	uint32_t address, gsi;
} __attribute__((packed));

struct madt_override {
	uint8_t type, length, bus, irq;
	uint32_t gsi;
	uint16_t flags; /* 0x0d: active high, level */
} __attribute__((packed));

static_assert(sizeof(struct header) == 36 && sizeof(struct rsdp) == 36 && sizeof(struct facs) == 64 &&
	      sizeof(struct fadt) == 276 && sizeof(struct madt) == 44, "sizes of the specification");

/* Name (\_S5, Package () { 5, 5, 0, 0 }): SLP_TYPa, SLP_TYPb, reserved. */
static const uint8_t s5[] = { 0x08, '_', 'S', '5', '_', 0x12, 0x08, 0x04, 0x0a, TYPE_S5, 0x0a, TYPE_S5, 0, 0 };

/* -- tables ------------------------------------------------------------------------------- */

/* Where the next table goes. `used` beyond `size`: it did not fit. */
struct writer {
	uint8_t *buf;
	size_t size, used;
};

static uint8_t sum_of(const void *bytes, size_t len)
{
	uint8_t sum = 0;

	for (size_t i = 0; i < len; i++)
		sum = (uint8_t)(sum + ((const uint8_t *)bytes)[i]);
	return sum;
}

static void append(struct writer *w, const void *data, size_t len)
{
	if (w->used + len <= w->size)
		memcpy(w->buf + w->used, data, len);
	w->used += len;
}

/* Begins a table on a 64-byte boundary, as the FACS must lie. Returns its guest physical address. */
static uint64_t begin_table(struct writer *w)
{
	w->used = (w->used + 63) & ~(size_t)63;
	return BOOT_ACPI + w->used;
}

static struct header make_header(const char *signature, size_t len, uint8_t revision)
{
	struct header h = { .length = (uint32_t)len, .revision = revision, .oem_revision = 1, .creator_revision = 1 };

	memcpy(h.signature, signature, 4);
	memcpy(h.oem, "KAGE  ", 6);
	memcpy(h.oem_table, "KAGEVMM ", 8);
	memcpy(h.creator, "KAGE", 4);
	return h;
}

/* The table that began at `gpa` has all its bytes: makes them add up to 0. */
static void end_table(struct writer *w, uint64_t gpa)
{
	uint8_t *table = w->buf + (gpa - BOOT_ACPI);

	if (w->used <= w->size)
		table[offsetof(struct header, checksum)] =
			(uint8_t)-sum_of(table, w->used - (size_t)(gpa - BOOT_ACPI));
}

static uint64_t add_dsdt(struct writer *w)
{
	struct header h = make_header("DSDT", sizeof(h) + sizeof(s5), 2);
	uint64_t gpa = begin_table(w);

	append(w, &h, sizeof(h));
	append(w, s5, sizeof(s5));
	end_table(w, gpa);
	return gpa;
}

static uint64_t add_facs(struct writer *w)
{
	struct facs f = { .signature = { 'F', 'A', 'C', 'S' }, .length = sizeof(f), .version = 2 };
	uint64_t gpa = begin_table(w);

	append(w, &f, sizeof(f));
	return gpa;
}

static struct address port(uint16_t number, uint8_t bytes)
{
	/* access size: 1 byte, 2 word, 3 double word */
	return (struct address){ .space = 1, .bits = (uint8_t)(bytes * 8), .access = bytes == 4 ? 3 : bytes,
				 .address = number };
}

static uint64_t add_fadt(struct writer *w, uint64_t facs, uint64_t dsdt)
{
	struct fadt f = { .h = make_header("FACP", sizeof(f), 6), .minor = 5 };
	uint64_t gpa = begin_table(w);

	f.facs = (uint32_t)facs;
	f.x_dsdt = f.dsdt = (uint32_t)dsdt;
	f.sci_irq = BOOT_SCI_IRQ;
	f.pm1a_event = BOOT_PM_PORT + PM1_EVENT;
	f.pm1a_control = BOOT_PM_PORT + PM1_CONTROL;
	f.pm1_event_len = 4;
	f.pm1_control_len = 2;
	f.c2_latency = 0xffff; /* no C2, no C3 */
	f.c3_latency = 0xffff;
	f.boot_arch = BOOT_ARCH_LEGACY | BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_ASPM | BOOT_ARCH_NO_RTC;
	f.flags = FADT_WBINVD | FADT_PWR_BUTTON | FADT_SLP_BUTTON | FADT_RESET;
	f.reset_register = port(BOOT_PM_PORT + PM_RESET, 1);
	f.reset_value = PM_RESET_VALUE;
	f.x_pm1a_event = port(BOOT_PM_PORT + PM1_EVENT, 4);
	f.x_pm1a_control = port(BOOT_PM_PORT + PM1_CONTROL, 2);
	append(w, &f, sizeof(f));
	end_table(w, gpa);
	return gpa;
}

static uint64_t add_madt(struct writer *w, unsigned cpus)
{
	struct madt_override sci = { 2, sizeof(sci), 0, BOOT_SCI_IRQ, BOOT_SCI_IRQ, 0x0d };
	struct madt_ioapic ioapic = { 1, sizeof(ioapic), 0, 0, BOOT_IOAPIC_ADDR, 0 };
	struct madt m = { .lapic = BOOT_LAPIC_ADDR, .flags = 1 };
	uint64_t gpa = begin_table(w);

	m.h = make_header("APIC", sizeof(m) + cpus * sizeof(struct madt_cpu) + sizeof(ioapic) + sizeof(sci), 5);
	append(w, &m, sizeof(m));
	for (unsigned i = 0; i < cpus; i++)
		append(w, &(struct madt_cpu){ 0, sizeof(struct madt_cpu), (uint8_t)i, (uint8_t)i, 1 },
		       sizeof(struct madt_cpu));
	append(w, &ioapic, sizeof(ioapic));
	append(w, &sci, sizeof(sci));
	end_table(w, gpa);
	return gpa;
}

static uint64_t add_xsdt(struct writer *w, uint64_t fadt, uint64_t madt)
{
	struct xsdt x = { .h = make_header("XSDT", sizeof(x), 1), .table = { fadt, madt } };
	uint64_t gpa = begin_table(w);

	append(w, &x, sizeof(x));
	end_table(w, gpa);
	return gpa;
}

int acpi_build(unsigned cpus, uint8_t *buf, size_t len)
{
	struct rsdp r = { .revision = 2, .length = sizeof(r) };
	struct writer w = { .buf = buf, .size = len, .used = sizeof(r) };
	uint64_t facs, dsdt, fadt, madt;

	if (!cpus || cpus > BOOT_CPUS_MAX)
		return -EINVAL;
	memset(buf, 0, len);
	facs = add_facs(&w);
	dsdt = add_dsdt(&w);
	fadt = add_fadt(&w, facs, dsdt);
	madt = add_madt(&w, cpus);
	r.xsdt = add_xsdt(&w, fadt, madt);
	if (w.used > w.size)
		return -ENOSPC;
	memcpy(r.signature, "RSD PTR ", 8);
	memcpy(r.oem, "KAGE  ", 6);
	r.checksum = (uint8_t)-sum_of(&r, offsetof(struct rsdp, length)); /* what revision 1 had */
	r.checksum_all = (uint8_t)-sum_of(&r, sizeof(r));
	memcpy(buf, &r, sizeof(r));
	return (int)w.used;
}

/* -- registers ------------------------------------------------------------------------------ */

/* SLP_EN is write-only. Of the sleep types there is only S5. */
static void write_control(struct acpi_pm *pm, uint16_t value)
{
	pm->control = (uint16_t)((value & ~CONTROL_SLP_EN) | CONTROL_SCI_EN);
	if ((value & CONTROL_SLP_EN) && CONTROL_TYPE(value) == TYPE_S5)
		pm->off = 1;
}

/* The registers as bytes, so that any access size at any offset means what it means on a bus. */
void acpi_pm_io(struct acpi_pm *pm, unsigned offset, bool write, void *data, unsigned size)
{
	uint16_t word[3] = { pm->status, pm->enable, (uint16_t)(pm->control | CONTROL_SCI_EN) };
	uint8_t byte[BOOT_PM_PORTS], clear[2] = { 0, 0 };

	memcpy(byte, word, sizeof(word));
	byte[PM_RESET] = 0;
	if (!write)
		memset(data, 0xff, size);
	if (offset >= BOOT_PM_PORTS)
		return;
	if (size > BOOT_PM_PORTS - offset)
		size = BOOT_PM_PORTS - offset;
	if (!write) {
		memcpy(data, byte + offset, size);
		return;
	}
	memcpy(byte + offset, data, size);
	if (offset < 2) /* status bits are cleared by ones */
		memcpy(clear + offset, byte + offset, size < 2 - offset ? size : 2 - offset);
	memcpy(word, byte, sizeof(word));
	pm->status &= (uint16_t) ~(clear[0] | clear[1] << 8);
	pm->enable = word[1];
	if (offset < PM_RESET && offset + size > PM1_CONTROL)
		write_control(pm, word[2]);
	if (offset + size > PM_RESET && byte[PM_RESET] == PM_RESET_VALUE)
		pm->reset = 1;
}

static int pm_access(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size, bool write)
{
	struct acpi_pm *pm = opaque;

	acpi_pm_io(pm, (unsigned)offset, write, data, size);
	return pm->off || pm->reset ? VMM_STOP : VMM_CONTINUE;
}

static void *pm_clone(void *opaque, struct vmm *child)
{
	struct acpi_pm *pm = malloc(sizeof(*pm));

	if (pm)
		*pm = *(struct acpi_pm *)opaque;
	return pm;
}

int acpi_pm_add(struct vmm *vmm)
{
	struct vmm_device device = { .space = VMM_PIO,
				     .base = BOOT_PM_PORT,
				     .len = BOOT_PM_PORTS,
				     .access = pm_access,
				     .clone = pm_clone,
				     .destroy = free };
	int err;

	device.opaque = calloc(1, sizeof(struct acpi_pm));
	if (!device.opaque)
		return -ENOMEM;
	err = vmm_add_device(vmm, &device);
	if (err)
		free(device.opaque);
	return err;
}
