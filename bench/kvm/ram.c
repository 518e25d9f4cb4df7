/* SPDX-License-Identifier: MIT */
/* Guest memory of the peers: one mapping, one slot, no library. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvm.h"

#define ALIGN (2 * MIB)

struct peer_ram {
	struct vmm_ram ram;
	enum ram_kind kind;
	int vmfd, fd; /* -1: none */
	char *at, *file;
	uint64_t bytes;
};

static struct peer_ram *peer_of(struct vmm_ram *ram)
{
	return (struct peer_ram *)((char *)ram - offsetof(struct peer_ram, ram));
}

static int set_slot(struct peer_ram *p, uint64_t len)
{
	struct kvm_userspace_memory_region slot = {.memory_size = len, .userspace_addr = (uintptr_t)p->at};

	return ioctl(p->vmfd, KVM_SET_USER_MEMORY_REGION, &slot) < 0 ? -errno : 0;
}

static int attach(struct vmm_ram *ram, struct vmm *vmm)
{
	struct peer_ram *p = peer_of(ram);

	p->vmfd = vmm->fd;
	return set_slot(p, p->bytes);
}

static int detach(struct vmm_ram *ram)
{
	return set_slot(peer_of(ram), 0);
}

static void destroy(struct vmm_ram *ram)
{
	struct peer_ram *p = peer_of(ram);

	munmap(p->at, p->bytes);
	if (p->file)
		munmap(p->file, p->bytes);
	if (p->fd >= 0)
		close(p->fd);
	free(p);
}

static void *ptr(struct vmm_ram *ram, uint64_t gpa, size_t len)
{
	struct peer_ram *p = peer_of(ram);

	return gpa < p->bytes && len <= p->bytes - gpa ? p->at + gpa : NULL;
}

static int ram_read(struct vmm_ram *ram, uint64_t gpa, void *buf, size_t len)
{
	const void *from = ptr(ram, gpa, len);

	if (!from)
		return -EFAULT;
	memcpy(buf, from, len);
	return 0;
}

static int ram_write(struct vmm_ram *ram, uint64_t gpa, const void *buf, size_t len)
{
	void *to = ptr(ram, gpa, len);

	if (!to)
		return -EFAULT;
	memcpy(to, buf, len);
	return 0;
}

static int no_clone(struct vmm_ram *ram, struct vmm_ram **copy)
{
	return -EOPNOTSUPP;
}

static const struct vmm_ram_ops peer_ops = {
    .attach = attach,
    .detach = detach,
    .clone = no_clone,
    .destroy = destroy,
    .read = ram_read,
    .write = ram_write,
    .ptr = ptr,
};

/* Address space that large pages fit into. */
static char *reserve(uint64_t bytes)
{
	char *p = must_map(
	    mmap(NULL, bytes + ALIGN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), "mmap");
	uintptr_t skip = -(uintptr_t)p & (ALIGN - 1);

	if (skip)
		munmap(p, skip);
	if (skip != ALIGN)
		munmap(p + skip + bytes, ALIGN - skip);
	return p + skip;
}

static void map(struct peer_ram *p)
{
	bool shared = p->kind == RAM_SHARED, file = p->fd >= 0;
	int flags =
	    MAP_FIXED | MAP_NORESERVE | (shared ? MAP_SHARED : MAP_PRIVATE) | (file ? 0 : MAP_ANONYMOUS);

	must_map(mmap(p->at, p->bytes, PROT_READ | PROT_WRITE, flags, p->fd, 0), "mmap");
	must(madvise(p->at, p->bytes, p->kind == RAM_HUGE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) ? -errno : 0,
	     "madvise");
}

struct vmm_ram *ram_create(enum ram_kind kind, uint64_t bytes)
{
	struct peer_ram *p = must_map(calloc(1, sizeof(*p)), "memory");

	*p = (struct peer_ram){.ram = {.ops = &peer_ops, .regions = 1, .region = {{.gpa = 0, .len = bytes}}},
			       .kind = kind,
			       .vmfd = -1,
			       .fd = -1,
			       .bytes = bytes};
	if (kind == RAM_SHARED || kind == RAM_PRIVATE) {
		p->fd = memfd_create("kage-bench", MFD_CLOEXEC);
		must(p->fd < 0 || ftruncate(p->fd, (off_t)bytes) ? -errno : 0, "memfd");
	}
	if (kind == RAM_PRIVATE)
		p->file = must_map(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, p->fd, 0), "mmap");
	p->at = reserve(bytes);
	map(p);
	return &p->ram;
}

void ram_renew(struct vmm_ram *ram)
{
	map(peer_of(ram));
}

char *ram_file(struct vmm_ram *ram)
{
	return peer_of(ram)->file;
}

void ram_settle(struct vmm_ram *ram)
{
	struct peer_ram *p = peer_of(ram);

	memcpy(p->file, p->at, p->bytes);
	map(p);
}
