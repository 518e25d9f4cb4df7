/* SPDX-License-Identifier: MIT */
/*
 * A guest as the demo gets it: a file with its RAM, a file with the registers
 * of its stopped CPU, and what sha256sum said of the first.
 *
 * The RAM file is what QEMU had mapped: a page that the guest never touched is
 * a hole, and stays untouched in the engine (demand zero); a page of zeroes
 * that is no hole cost its host a page, and is written like any other.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "demo.h"

/* Reads a small text file. */
static int read_text(const char *dir, unsigned number, const char *what, char *text, size_t room)
{
	char path[4096];
	ssize_t n;
	int fd, err = 0;

	if ((size_t)snprintf(path, sizeof(path), "%s/guest%u.%s", dir, number, what) >= sizeof(path))
		return -ENAMETOOLONG;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	n = read(fd, text, room - 1);
	if (n < 0)
		err = -errno;
	else
		text[n] = 0;
	close(fd);
	return err;
}

/* "cr3 0x1000", a register a line. */
static int parse_regs(const char *text, struct kage_x86_regs *regs)
{
	uint64_t *const value[] = { &regs->cr0, &regs->cr3, &regs->cr4, &regs->efer };
	static const char *const name[] = { "cr0 ", "cr3 ", "cr4 ", "efer " };

	*regs = (struct kage_x86_regs){ 0 };
	for (int i = 0; i < 4; i++) {
		const char *p = strstr(text, name[i]);

		if (!p)
			return -EBADMSG;
		*value[i] = strtoull(p + strlen(name[i]), NULL, 16);
	}
	return 0;
}

static int parse_digest(const char *text, uint8_t digest[SHA256_BYTES])
{
	for (int i = 0; i < SHA256_BYTES; i++) {
		unsigned byte;

		if (sscanf(text + 2 * i, "%2x", &byte) != 1)
			return -EBADMSG;
		digest[i] = (uint8_t)byte;
	}
	return 0;
}

static int open_ram(struct image *image, const char *dir)
{
	char path[4096];
	struct stat st;

	if ((size_t)snprintf(path, sizeof(path), "%s/guest%u.ram", dir, image->number) >= sizeof(path))
		return -ENAMETOOLONG;
	image->fd = open(path, O_RDONLY | O_CLOEXEC);
	if (image->fd < 0 || fstat(image->fd, &st))
		return -errno;
	image->bytes = (uint64_t)st.st_size;
	return image->bytes && image->bytes % DEMO_CHUNK == 0 ? 0 : -EBADMSG;
}

int image_open(struct image *image, const char *dir, unsigned number)
{
	char text[512];
	int err;

	*image = (struct image){ .number = number, .fd = -1 };
	err = read_text(dir, number, "regs", text, sizeof(text));
	if (!err)
		err = parse_regs(text, &image->regs);
	if (!err)
		err = read_text(dir, number, "sha256", text, sizeof(text));
	if (!err)
		err = parse_digest(text, image->sha256);
	if (!err)
		err = open_ram(image, dir);
	if (err)
		image_close(image);
	return err;
}

void image_close(struct image *image)
{
	if (image->fd >= 0)
		close(image->fd);
	image->fd = -1;
}

static int read_all(int fd, void *buf, size_t len, uint64_t offset)
{
	for (size_t done = 0; done < len;) {
		ssize_t n = pread(fd, (char *)buf + done, len - done, (off_t)(offset + done));

		if (n == 0 || (n < 0 && errno != EINTR))
			return n ? -errno : -ENODATA;
		if (n > 0)
			done += (size_t)n;
	}
	return 0;
}

static uint64_t count_zero(const uint8_t *chunk, size_t len)
{
	uint64_t zero = 0;

	for (size_t i = 0; i < len; i += KAGE_PAGE_SIZE)
		zero += !chunk[i] && !memcmp(chunk + i, chunk + i + 1, KAGE_PAGE_SIZE - 1);
	return zero;
}

static int load_run(struct image *image, struct kage_vm *vm, uint8_t *chunk, uint64_t start, uint64_t end)
{
	int err = 0;

	while (!err && start < end) {
		size_t len = end - start < DEMO_CHUNK ? end - start : DEMO_CHUNK;

		err = read_all(image->fd, chunk, len, start);
		if (!err)
			err = kage_vm_write(vm, start, chunk, len);
		image->pages_data += len >> KAGE_PAGE_SHIFT;
		image->pages_zero += count_zero(chunk, len);
		start += len;
	}
	return err;
}

int image_load(struct image *image, struct kage_vm *vm, void *chunk)
{
	/*
	 * 4 KiB entries: with large pages the host would populate what the guest
	 * never touched, and the fall in Pss would not compare with pages saved.
	 */
	int err = kage_vm_map(vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_ANON, .len = image->bytes,
					   .flags = KAGE_REGION_MERGEABLE | KAGE_REGION_NOHUGE));

	for (uint64_t at = 0; !err && at < image->bytes;) {
		off_t data = lseek(image->fd, (off_t)at, SEEK_DATA), hole;
		uint64_t start, end;

		if (data < 0)
			return errno == ENXIO ? 0 : -errno; /* ENXIO: a hole up to the end */
		hole = lseek(image->fd, data, SEEK_HOLE);
		if (hole < 0)
			return -errno;
		start = (uint64_t)data & ~(KAGE_PAGE_SIZE - 1);
		if (start < at)
			start = at;
		end = ((uint64_t)hole + KAGE_PAGE_SIZE - 1) & ~(KAGE_PAGE_SIZE - 1);
		err = load_run(image, vm, chunk, start, end);
		at = end;
		host_progress("loading guest %u: %.0f %%", image->number,
			      100.0 * (double)at / (double)image->bytes);
	}
	return err;
}

int image_page(const struct image *image, uint64_t page, void *buf)
{
	return read_all(image->fd, buf, KAGE_PAGE_SIZE, page << KAGE_PAGE_SHIFT);
}

int image_vcpu(const struct image *image, struct kage_vm *vm, struct kage_vcpu **out)
{
	struct kage_vcpu *vcpu;
	int err = kage_vcpu_create(vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .arch = KAGE_ARCH_X86,
						.features = KAGE_X86_NX | KAGE_X86_PAGE1GB | KAGE_X86_SMEP |
							    KAGE_X86_SMAP | KAGE_X86_PCID | KAGE_X86_LA57 |
							    KAGE_X86_PKU), &vcpu);

	if (err)
		return err;
	err = kage_vcpu_set_regs(vcpu, &image->regs, sizeof(image->regs));
	if (err) {
		kage_vcpu_destroy(vcpu);
		return err;
	}
	*out = vcpu;
	return 0;
}
