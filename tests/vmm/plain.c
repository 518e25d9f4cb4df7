/* SPDX-License-Identifier: MIT */
/*
 * Guest memory as most small VMMs have it: anonymous memory of the process, one
 * slot a region. For tests and comparisons; a clone is a whole copy.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "vmm.h"

struct plain {
	struct vmm_ram ram;
	int vmfd; /* -1: not attached */
	char *at[VMM_REGIONS];
};

static struct plain *plain_of(struct vmm_ram *ram)
{
	return (struct plain *)((char *)ram - offsetof(struct plain, ram));
}

static int set_slot(struct plain *plain, unsigned i, uint64_t len)
{
	struct kvm_userspace_memory_region slot = {.slot = i, .guest_phys_addr = plain->ram.region[i].gpa,
						   .memory_size = len, .userspace_addr = (uintptr_t)plain->at[i]};

	return ioctl(plain->vmfd, KVM_SET_USER_MEMORY_REGION, &slot) < 0 ? -errno : 0;
}

static int detach(struct vmm_ram *ram)
{
	struct plain *plain = plain_of(ram);
	unsigned i;

	for (i = 0; i < ram->regions && plain->vmfd >= 0; i++)
		set_slot(plain, i, 0);
	plain->vmfd = -1;
	return 0;
}

static int attach(struct vmm_ram *ram, struct vmm *vmm)
{
	struct plain *plain = plain_of(ram);
	unsigned i;
	int r = 0;

	plain->vmfd = vmm->fd;
	for (i = 0; i < ram->regions && r == 0; i++)
		r = set_slot(plain, i, ram->region[i].len);
	if (r < 0)
		detach(ram);
	return r;
}

static void *ptr(struct vmm_ram *ram, uint64_t gpa, size_t len)
{
	struct plain *plain = plain_of(ram);
	unsigned i;

	for (i = 0; i < ram->regions; i++) {
		const struct vmm_region *region = &ram->region[i];

		if (gpa >= region->gpa && gpa - region->gpa < region->len && len <= region->len - (gpa - region->gpa))
			return plain->at[i] + (gpa - region->gpa);
	}
	return NULL;
}

static int plain_read(struct vmm_ram *ram, uint64_t gpa, void *buf, size_t len)
{
	const void *from = ptr(ram, gpa, len);

	if (from == NULL)
		return -EFAULT;
	memcpy(buf, from, len);
	return 0;
}

static int plain_write(struct vmm_ram *ram, uint64_t gpa, const void *buf, size_t len)
{
	void *to = ptr(ram, gpa, len);

	if (to == NULL)
		return -EFAULT;
	memcpy(to, buf, len);
	return 0;
}

static void destroy(struct vmm_ram *ram)
{
	struct plain *plain = plain_of(ram);
	unsigned i;

	for (i = 0; i < ram->regions; i++)
		if (plain->at[i] != NULL)
			munmap(plain->at[i], ram->region[i].len);
	free(plain);
}

static int copy_all(struct vmm_ram *ram, struct vmm_ram **copy)
{
	unsigned i;
	int r = vmm_ram_plain(ram->region, ram->regions, copy);

	for (i = 0; r == 0 && i < ram->regions; i++)
		memcpy(plain_of(*copy)->at[i], plain_of(ram)->at[i], ram->region[i].len);
	return r;
}

static const struct vmm_ram_ops plain_ops = {
	.attach = attach, .detach = detach, .clone = copy_all, .destroy = destroy,
	.read = plain_read, .write = plain_write, .ptr = ptr,
};

int vmm_ram_plain(const struct vmm_region *region, unsigned n, struct vmm_ram **out)
{
	struct plain *plain = calloc(1, sizeof(*plain));
	unsigned i;

	if (plain == NULL)
		return -ENOMEM;
	plain->ram.ops = &plain_ops;
	plain->vmfd = -1;
	for (i = 0; i < n && i < VMM_REGIONS; i++) {
		void *at = mmap(NULL, region[i].len, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (at == MAP_FAILED) {
			destroy(&plain->ram);
			return -ENOMEM;
		}
		plain->at[i] = at;
		plain->ram.region[i] = region[i];
		plain->ram.regions++;
	}
	*out = &plain->ram;
	return 0;
}
