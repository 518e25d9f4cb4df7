/* SPDX-License-Identifier: MIT */
/*
 * bzImage: boot sector and setup header, real-mode code that is not used here,
 * then the protected-mode part, which holds the 64-bit entry at +0x200 and the
 * compressed kernel (Linux Documentation/arch/x86/boot.rst).
 *
 * It is loaded where it prefers to be (pref_address, where it needs no
 * relocation), and gets init_size bytes from there: it unpacks itself in place.
 */
#include <errno.h>
#include <string.h>

#include "x86_boot.h"

#define HEADER_AT    0x1f1u
#define HEADER_MAGIC 0x53726448u /* "HdrS" */
#define PROTOCOL_MIN 0x020cu	 /* the first with xloadflags */
#define SECTOR	     512u
#define ENTRY_64     0x200u
/* The header ends where the jump in front of it goes: 0x202 + the byte at 0x201. */
#define JUMP_AT	     0x201u
#define HEADER_LEAST (0x264u - HEADER_AT) /* through init_size */

static int refuse(const char **why, int err, const char *text)
{
	*why = text;
	return err;
}

bool bzimage_is(struct boot_blob image)
{
	struct setup_header h;

	if (image.len < HEADER_AT + sizeof(h))
		return false;
	memcpy(&h, (const char *)image.data + HEADER_AT, sizeof(h));
	return h.boot_flag == 0xaa55 && h.header == HEADER_MAGIC;
}

/* Only as much as this kernel's header has: what follows it is code. */
static int copy_header(struct boot_blob image, struct setup_header *h)
{
	const uint8_t *bytes = image.data;
	size_t len = 0x202u + bytes[JUMP_AT] - HEADER_AT;

	if (len < HEADER_LEAST)
		return -ENOEXEC;
	memset(h, 0, sizeof(*h));
	memcpy(h, bytes + HEADER_AT, len < sizeof(*h) ? len : sizeof(*h));
	return 0;
}

static int check_header(const struct setup_header *h, const char **why)
{
	if (h->version < PROTOCOL_MIN)
		return refuse(why, -EOPNOTSUPP, "boot protocol older than 2.12 (Linux 3.8)");
	if (!(h->loadflags & LOADED_HIGH))
		return refuse(why, -EOPNOTSUPP, "a zImage, which wants to be below 1 MiB");
	if (!(h->xloadflags & XLF_KERNEL_64))
		return refuse(why, -EOPNOTSUPP, "the kernel has no 64-bit entry");
	if (h->pref_address < BOOT_MIB || h->pref_address >= BOOT_HOLE)
		return refuse(why, -ENOEXEC, "pref_address is not between 1 MiB and 3 GiB");
	return 0;
}

int bzimage_parse(struct boot_blob image, struct boot_image *out, const char **why)
{
	struct setup_header *h = &out->header;
	size_t setup, len;
	int err;

	if (!bzimage_is(image))
		return refuse(why, -ENOEXEC, "no bzImage header");
	if (copy_header(image, h))
		return refuse(why, -ENOEXEC, "the setup header is cut short");
	err = check_header(h, why);
	if (err)
		return err;
	setup = ((h->setup_sects ? h->setup_sects : 4u) + 1u) * SECTOR;
	if (image.len <= setup + ENTRY_64)
		return refuse(why, -ENOEXEC, "the image ends before the kernel begins");
	len = image.len - setup;
	if (h->syssize && (uint64_t)h->syssize * 16 > len + 15)
		return refuse(why, -ENOEXEC, "the image is truncated");
	out->segment[0] = (struct boot_segment){ h->pref_address, len, (const char *)image.data + setup };
	out->segments = 1;
	out->start = h->pref_address;
	out->end = out->start + (len > h->init_size ? len : h->init_size);
	out->entry = out->start + ENTRY_64;
	out->initrd_last = h->initrd_addr_max;
	out->cmdline_max = h->cmdline_size;
	return 0;
}
