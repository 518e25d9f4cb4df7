/* SPDX-License-Identifier: MIT */
/*
 * Payload guests, the VMM's side: image, entry, ports, mailboxes. payload.h
 * has the layout and the protocol.
 *
 * The page tables are ordinary 4-level tables in guest memory, of the same shape on x86 and (with 4 KiB
 * granules) arm64, with accessed and dirty bits set: so whoever walks them (KVM_TRANSLATE,
 * kage_vcpu_translate()) finds gva = gpa and changes nothing.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "payload.h"

#define PAGE ((uint64_t)4096)
#define MIB  ((uint64_t)1 << 20)
#define GIB  ((uint64_t)1 << 30)

static_assert(sizeof(struct payload_mailbox) <= 4096, "a mailbox is a page");
static_assert(PAYLOAD_MAILBOX + VMM_VCPUS * 4096 <= PAYLOAD_STACK, "mailboxes end before the stacks");
static_assert(PAYLOAD_STACK + VMM_VCPUS * 4096 <= PAYLOAD_TSS, "stacks end before the TSS");

static uint64_t divide_up(uint64_t n, uint64_t by)
{
	return (n + by - 1) / by;
}

static uint64_t directories(const struct payload_config *config)
{
	return divide_up(config->map, GIB);
}

static uint64_t leaf_tables(const struct payload_config *config)
{
	return config->small_pages ? divide_up(config->map, 2 * MIB) : 0;
}

static uint64_t image_end(const struct payload_config *config)
{
	return PAYLOAD_TABLES + (directories(config) + leaf_tables(config)) * PAGE;
}

uint64_t payload_free(const struct payload_config *config)
{
	return divide_up(image_end(config), 2 * MIB) * 2 * MIB;
}

/* n entries that point to pages in a row. */
static void fill(char *image, uint64_t table, uint64_t n, uint64_t first, uint64_t step, uint64_t bits)
{
	uint64_t i, *entry = (uint64_t *)(image + table);

	for (i = 0; i < n; i++)
		entry[i] = (first + i * step) | bits;
}

static void make_tables(char *image, const struct payload_config *config)
{
	const struct payload_entries *e = &payload_entries;
	uint64_t dirs = directories(config), large = divide_up(config->map, 2 * MIB);
	uint64_t leaves = PAYLOAD_TABLES + dirs * PAGE;

	fill(image, PAYLOAD_PML4, 1, PAYLOAD_PDPT, 0, e->table);
	fill(image, PAYLOAD_PDPT, dirs, PAYLOAD_TABLES, PAGE, e->table);
	if (!config->small_pages) {
		fill(image, PAYLOAD_TABLES, large, 0, 2 * MIB, e->large);
		return;
	}
	fill(image, PAYLOAD_TABLES, large, leaves, PAGE, e->table);
	fill(image, leaves, divide_up(config->map, PAGE), 0, PAGE, e->page);
}

void *payload_image(const struct payload_config *config, size_t *len)
{
	size_t code = __stop_vmm_guest - __start_vmm_guest;
	char *image;

	if (!config->map || directories(config) > 512 || code > PAYLOAD_CODE_MAX)
		return NULL;
	image = calloc(1, image_end(config));
	if (image == NULL)
		return NULL;
	memcpy(image + PAYLOAD_CODE, __start_vmm_guest, code);
	make_tables(image, config);
	payload_arch_image(image);
	*len = image_end(config);
	return image;
}

/* -- ports ------------------------------------------------------------------------------------ */

static int access_port(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size, bool write)
{
	struct payload_port *port = opaque;
	uint32_t value = 0;

	if (!write) {
		value = (uint32_t)atomic_load(&port->last) + 1;
		memcpy(data, &value, size < 4 ? size : 4);
		return VMM_CONTINUE;
	}
	memcpy(&value, data, size < 4 ? size : 4);
	if (offset == PAYLOAD_PORT_VALUE - PAYLOAD_PORT_DONE) {
		atomic_fetch_add(&port->values, 1);
		atomic_fetch_add(&port->sum, value);
		atomic_store(&port->last, value);
		return VMM_CONTINUE;
	}
	atomic_fetch_add(offset ? &port->stop : &port->done, 1);
	return VMM_STOP;
}

static void *clone_port(void *opaque, struct vmm *parent)
{
	const struct payload_port *port = opaque;
	struct payload_port *copy = calloc(1, sizeof(*copy));

	if (copy == NULL)
		return NULL;
	copy->values = port->values;
	copy->sum = port->sum;
	copy->last = port->last;
	copy->done = port->done;
	copy->stop = port->stop;
	return copy;
}

static int add_port(struct vmm *vmm)
{
	struct payload_port *port = calloc(1, sizeof(*port));
	struct vmm_device device = {PAYLOAD_SPACE, PAYLOAD_PORTS + PAYLOAD_PORT_DONE, 12, access_port, clone_port, free, port};
	int r;

	if (port == NULL)
		return -ENOMEM;
	r = vmm_add_device(vmm, &device);
	if (r < 0)
		free(port);
	return r;
}

struct payload_port *payload_port(struct vmm *vmm)
{
	unsigned i;

	for (i = 0; i < vmm->devices; i++)
		if (vmm->device[i].access == access_port)
			return vmm->device[i].opaque;
	return NULL;
}

/* -- loading ------------------------------------------------------------------------------------ */

/* Pages of zeroes are left alone: memory that nobody wrote stays untouched. */
static int write_image(struct vmm *vmm, const char *image, size_t len)
{
	static const char zeroes[4096];
	size_t i;
	int r;

	for (i = 0; i < len; i += PAGE) {
		if (!memcmp(image + i, zeroes, PAGE))
			continue;
		r = vmm_write(vmm, i, image + i, PAGE);
		if (r < 0)
			return r;
	}
	return 0;
}

static int enter(struct vmm *vmm)
{
	struct payload_mailbox empty = {0};
	struct vmm_entry entry;
	unsigned i;
	int r;

	for (i = 0; i < vmm->vcpus; i++) {
		entry = payload_entry(i);
		r = payload_put(vmm, i, &empty);
		if (r == 0)
			r = vmm_vcpu_enter(vmm->vcpu[i], &entry);
		if (r < 0)
			return r;
	}
	return 0;
}

int payload_load(struct vmm *vmm, const struct payload_config *config)
{
	size_t len = 0;
	char *image = payload_image(config, &len);
	int r;

	if (image == NULL)
		return -EINVAL;
	r = write_image(vmm, image, len);
	free(image);
	if (r == 0)
		r = add_port(vmm);
	if (r == 0)
		r = vmm_identify(vmm, NULL);
	return r < 0 ? r : enter(vmm);
}

/* -- mailboxes ------------------------------------------------------------------------------------ */

int payload_get(struct vmm *vmm, unsigned index, struct payload_mailbox *mailbox)
{
	return vmm_read(vmm, PAYLOAD_MAILBOX + index * PAGE, mailbox, sizeof(*mailbox));
}

int payload_put(struct vmm *vmm, unsigned index, const struct payload_mailbox *mailbox)
{
	struct payload_mailbox with_index = *mailbox;

	with_index.index = index;
	return vmm_write(vmm, PAYLOAD_MAILBOX + index * PAGE, &with_index, sizeof(with_index));
}

int payload_poke_at(struct vmm *vmm, unsigned index, size_t offset, uint64_t value)
{
	return vmm_write(vmm, PAYLOAD_MAILBOX + index * PAGE + offset, &value, sizeof(value));
}

uint64_t payload_peek_at(struct vmm *vmm, unsigned index, size_t offset)
{
	uint64_t value = 0;

	return vmm_read(vmm, PAYLOAD_MAILBOX + index * PAGE + offset, &value, sizeof(value)) ? ~(uint64_t)0 : value;
}

int payload_go(struct vmm *vmm, unsigned index)
{
	return payload_poke(vmm, index, go, payload_peek(vmm, index, done) + 1);
}

/* The thread ended by a report, and not for another reason. */
static int reported(const struct vmm_vcpu *vcpu)
{
	if (vcpu->result == VMM_STOP && vcpu->reason == PAYLOAD_EXIT)
		return 0;
	return vcpu->result < 0 ? vcpu->result : -EIO;
}

int payload_round(struct vmm *vmm, unsigned index, int timeout_ms)
{
	struct vmm_vcpu *vcpu = vmm->vcpu[index];
	int r = payload_go(vmm, index);

	if (r == 0)
		r = vmm_vcpu_start(vcpu);
	if (r == 0)
		r = vmm_vcpu_wait(vcpu, timeout_ms);
	if (r == 0)
		r = reported(vcpu);
	return r == 0 && payload_peek(vmm, index, done) != payload_peek(vmm, index, go) ? -EIO : r;
}

int payload_stop(struct vmm *vmm, int timeout_ms)
{
	unsigned i;
	int r;

	for (i = 0; i < vmm->vcpus; i++) {
		r = payload_poke(vmm, i, stop, 1);
		if (r < 0)
			return r;
	}
	r = vmm_wait(vmm, timeout_ms);
	for (i = 0; r == 0 && i < vmm->vcpus; i++)
		r = reported(vmm->vcpu[i]);
	return r;
}

/* -- what STAMP left ---------------------------------------------------------------------------------- */

static bool stamps_differ(const uint64_t *page, uint64_t gfn, const struct payload_stamp_log *log, uint64_t words)
{
	uint64_t i;

	for (i = 0; i < 512; i += 512 / words)
		if (page[i] != (log->generation ? guest_stamp(gfn, log->generation, log->id, i) : 0))
			return true;
	return false;
}

int64_t payload_check_stamps(struct vmm *vmm, unsigned index)
{
	struct payload_mailbox mb;
	struct payload_stamp_log log;
	uint64_t page[512], i;
	int64_t wrong = 0;
	int r = payload_get(vmm, index, &mb);

	for (i = 0; r == 0 && i < mb.pages; i++) {
		r = vmm_read(vmm, mb.log + i * sizeof(log), &log, sizeof(log));
		if (r == 0)
			r = vmm_read(vmm, mb.base + i * PAGE, page, sizeof(page));
		if (r == 0)
			wrong += stamps_differ(page, mb.base / PAGE + i, &log, mb.words);
	}
	return r ? r : wrong;
}
