/* SPDX-License-Identifier: MIT */
/*
 * Direct boot: images as files, and what is the same for all architectures.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "boot.h"

/* -- files --------------------------------------------------------------------------- */

int boot_map_file(const char *path, struct boot_blob *out)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), err = 0;
	void *p = MAP_FAILED;
	struct stat st;

	if (fd < 0)
		return -errno;
	if (fstat(fd, &st))
		err = -errno;
	else if (!S_ISREG(st.st_mode))
		err = -EINVAL;
	else if (!st.st_size)
		err = -ENODATA;
	else if ((p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED)
		err = -errno;
	close(fd);
	if (!err)
		*out = (struct boot_blob){ .data = p, .len = (size_t)st.st_size };
	return err;
}

void boot_unmap_file(struct boot_blob *blob)
{
	if (blob->data)
		munmap((void *)blob->data, blob->len);
	*blob = (struct boot_blob){ 0 };
}

/* -- the VM -------------------------------------------------------------------------- */

static int refuse(const char **why, int err, const char *text)
{
	*why = text;
	return err;
}

static int map_files(const char *kernel, const char *initrd, struct boot_config *config, const char **why)
{
	int err = boot_map_file(kernel, &config->kernel);

	if (err)
		return refuse(why, err, "cannot read the kernel");
	if (initrd && (err = boot_map_file(initrd, &config->initrd)))
		return refuse(why, err, "cannot read the initramfs");
	return 0;
}

int vmm_boot_linux(struct vmm *vmm, const char *kernel, const char *initrd, const char *cmdline)
{
	struct boot_config config = { .cmdline = cmdline, .cpus = vmm->vcpus };
	const char *why = "";
	int err;

	if (!vmm->ram || !vmm->vcpus)
		return -EINVAL;
	err = map_files(kernel, initrd, &config, &why);
	if (!err)
		err = boot_vm(vmm, &config, &why);
	boot_unmap_file(&config.kernel);
	boot_unmap_file(&config.initrd);
	if (err)
		fprintf(stderr, "vmm: cannot boot %s: %s: %s\n", kernel, why, strerror(-err));
	return err;
}
