/* SPDX-License-Identifier: MIT */
/*
 * Finds linux_banner by its address, through the guest's own page tables.
 *
 * Registers come from QEMU while the domain is suspended in its kernel. Then a soft vCPU walks with them: first
 * suspended, where QEMU's own walk (monitor: gva2gpa) is asked about the same addresses, then while the guest
 * runs, with tables that do not go away: arm64's TTBR1 is the kernel's for good; on x86-64 CR3 is a process's, so the
 * kernel's own first table, init_top_pgt, takes its place, found through the first walk.
 *
 * The address of linux_banner has this boot's random base in it. On x86-64 the guest's kallsyms have it. Debian's
 * arm64 kernel lists functions only (no CONFIG_KALLSYMS_ALL): there it is the place in the kernel's Image, counted
 * from its first byte, which is mapped 2 MiB aligned and less than 2 MiB before _stext
 * (Documentation/arm64/booting.rst; arch/arm64/kernel/vmlinux.lds.S).
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "beside.h"

#define TRIES	  20 /* to find the CPU in the kernel */
#define ADDRESSES 96 /* compared with QEMU's walk */

/* -- registers ------------------------------------------------------------------------------------------------ */

/* The value after "NAME=" or "NAME =" in what `info registers` prints. */
static bool find_register(const char *text, const char *name, uint64_t *value)
{
	size_t len = strlen(name);

	for (const char *at = text; (at = strstr(at, name)); at += len) {
		const char *v = at + len;

		v += *v == ' ';
		if ((at != text && isalnum((unsigned char)at[-1])) || *v != '=')
			continue;
		*value = strtoull(v + 1, NULL, 16);
		return true;
	}
	return false;
}

static bool x86_registers(const char *text, struct kage_x86_regs *regs)
{
	uint64_t cpl = 3;

	*regs = (struct kage_x86_regs){ 0 };
	return find_register(text, "CR0", &regs->cr0) && find_register(text, "CR3", &regs->cr3) &&
	       find_register(text, "CR4", &regs->cr4) && find_register(text, "EFER", &regs->efer) &&
	       find_register(text, "CPL", &cpl) && cpl == 0;
}

static bool arm64_registers(const struct guest *g, const struct paths *paths, struct kage_arm64_regs *regs)
{
	char path[PATH_MAX];

	fill(path, sizeof(path), "%s/gdb.%u", paths->root, g->number);
	return gdb_arm64_registers(g, path, regs) && (regs->pstate >> 2 & 3) == 1;
}

/* -- a vCPU with these registers ------------------------------------------------------------------------------- */

/* CPUs as libvirt's XML says: qemu64, cortex-a72 (TRM: 44 bits of physical address, 16-bit ASIDs, 4K and 64K). */
static struct kage_vcpu *make_vcpu(const struct guest *g, const union regs *regs)
{
	bool x86 = g->arch->kage == KAGE_ARCH_X86;
	struct kage_vcpu *vcpu = NULL;
	int err = kage_vcpu_create(g->vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI, .arch = g->arch->kage,
						   .phys_bits = x86 ? 40 : 44,
						   .features = x86 ? KAGE_X86_NX :
								     KAGE_ARM64_ASID16 | KAGE_ARM64_GRAN64), &vcpu);

	if (!err)
		err = x86 ? kage_vcpu_set_regs(vcpu, &regs->x86, sizeof(regs->x86)) :
			    kage_vcpu_set_regs(vcpu, &regs->arm64, sizeof(regs->arm64));
	/* Nobody tells Kage what the guest writes to its tables: as with a CPU, a flush makes it look again. */
	if (!err)
		err = kage_vcpu_flush(vcpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ALL));
	if (!err)
		return vcpu;
	kage_vcpu_destroy(vcpu);
	check(false, "%s: a vCPU with its registers: %s", g->name, strerror(-err));
	return NULL;
}

/* -- suspending -------------------------------------------------------------------------------------------------- */

/*
 * In the kernel, and on tables that have it: with page-table isolation the first and the last instructions of the
 * kernel run on the user's.
 */
static bool in_kernel(const struct guest *g, const struct paths *paths, const char *text, union regs *regs)
{
	struct kage_fault fault;
	struct kage_vcpu *vcpu;
	bool good;

	if (g->arch->kage == KAGE_ARCH_X86 ? !x86_registers(text, &regs->x86) :
					     !arm64_registers(g, paths, &regs->arm64))
		return false;
	vcpu = make_vcpu(g, regs);
	good = vcpu && kage_vcpu_translate(vcpu, g->stext, 0, &fault) == KAGE_OK;
	kage_vcpu_destroy(vcpu);
	return good;
}

/* Suspends the guest where its kernel runs. *text: `info registers`, to be freed. */
static bool stop_in_kernel(struct guest *g, const struct paths *paths, union regs *regs, char **text)
{
	for (unsigned i = 0; i < TRIES; i++) {
		if (!guest_suspend(g))
			return false;
		*text = guest_monitor(g, "info registers");
		if (*text && in_kernel(g, paths, *text, regs))
			return true;
		free(*text);
		if (!guest_resume(g))
			return false;
		usleep(20000);
	}
	*text = NULL;
	return check(false, "%s was not found in its kernel, or has no registers", g->name);
}

/* -- linux_banner ---------------------------------------------------------------------------------------------- */

/* Where the text is in a file; 0: it is not, or the file is no arm64 Image. */
static uint64_t find_in_image(const char *path, const char *text, size_t len)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	const char *image = MAP_FAILED, *at = NULL;

	if (fd >= 0 && !fstat(fd, &st))
		image = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (fd >= 0)
		close(fd);
	if (image == MAP_FAILED)
		return 0;
	if (st.st_size > 64 && !memcmp(image + 56, "ARM\x64", 4))
		at = memmem(image, (size_t)st.st_size, text, len);
	munmap((void *)image, (size_t)st.st_size);
	return at ? (uint64_t)(at - image) : 0;
}

static uint64_t banner_address(const struct guest *g, const struct paths *paths, const char *text, size_t len)
{
	char path[PATH_MAX];
	uint64_t at;

	if (g->arch->kage == KAGE_ARCH_X86)
		return g->linux_banner;
	fill(path, sizeof(path), "%s/vmlinuz", paths->boot);
	at = find_in_image(path, text, len);
	return at ? (g->stext & ~(((uint64_t)2 << 20) - 1)) + at : 0;
}

static bool banner_reads(const struct guest *g, struct kage_vcpu *vcpu, uint64_t gva, const char *text, size_t len)
{
	char found[sizeof(g->version) + 2];
	struct kage_fault fault = { 0 };
	int r = kage_vcpu_load(vcpu, gva, found, len, &fault);

	if (!r && !memcmp(found, text, len))
		return true;
	return check(false, "%s: linux_banner at %" PRIx64 ": outcome %d, vector %x, error %x: %.*s", g->name, gva, r,
		     fault.vector, fault.error, r ? 0 : (int)strnlen(found, len), found);
}

/* The kernel's constants are not to be written, and no business of user mode. */
static bool banner_is_guarded(const struct guest *g, const union regs *regs, uint64_t gva)
{
	union regs user = *regs;
	struct kage_fault w = { 0 }, u = { 0 };
	struct kage_vcpu *vcpu = make_vcpu(g, regs);
	bool x86 = g->arch->kage == KAGE_ARCH_X86, good;

	if (!vcpu)
		return false;
	good = kage_vcpu_translate(vcpu, gva, KAGE_WRITE, &w) == KAGE_GUEST_FAULT;
	kage_vcpu_destroy(vcpu);
	if (x86)
		user.x86.cpl = 3;
	else
		user.arm64.pstate &= ~(uint64_t)0xf;
	vcpu = make_vcpu(g, &user);
	if (!vcpu)
		return false;
	good &= kage_vcpu_translate(vcpu, gva, KAGE_READ, &u) == KAGE_GUEST_FAULT;
	kage_vcpu_destroy(vcpu);
	/* #PF: P and W, P and U. Data aborts from EL1 and EL0, permission faults (FSC 0b0011xx), the first a write. */
	if (x86)
		good &= w.vector == 14 && w.error == 3 && u.vector == 14 && u.error == 5;
	else
		good &= w.vector == 0x25 && (w.error & 0x7c) == 0x4c && u.vector == 0x24 && (u.error & 0x7c) == 0x0c;
	return check(good, "%s: its page may not be written (vector %x, error %x) or be read in user mode (%x, %x)",
		     g->name, w.vector, w.error, u.vector, u.error);
}

/* -- against QEMU's walk ----------------------------------------------------------------------------------------- */

/* Of 47 or 48 bits, as these CPUs have them. QEMU's gva2gpa does not look at the others. */
static bool is_address(const struct guest *g, uint64_t gva)
{
	unsigned bits = g->arch->kage == KAGE_ARCH_X86 ? 47 : 48;

	return gva >> bits == 0 || gva >> bits == UINT64_MAX >> bits;
}

/* What the registers hold looks like addresses often enough; then the kernel's text, data and beyond. */
static unsigned gather(const struct guest *g, const char *text, uint64_t *gva)
{
	unsigned n = 0;

	for (const char *at = text; *at && n < ADDRESSES / 2; at += strspn(at, "0123456789abcdef")) {
		size_t len;

		at += strcspn(at, "0123456789abcdef");
		len = strspn(at, "0123456789abcdef");
		gva[n] = strtoull(at, NULL, 16);
		n += len == 16 && is_address(g, gva[n]);
	}
	for (uint64_t i = 0; n < ADDRESSES; i++)
		gva[n++] = g->stext + i * 0x81238;
	return n;
}

/* An arm64 page whose access flag is not set: a fault (0b0010xx) for a CPU, and not for QEMU's walk for debuggers. */
static bool is_old(const struct guest *g, const struct kage_fault *fault)
{
	return g->arch->kage == KAGE_ARCH_ARM64 && (fault->error & 0x3c) == 0x08;
}

static bool agrees(const struct guest *g, struct kage_vcpu *vcpu, uint64_t gva, unsigned *mapped)
{
	char *answer = guest_monitor(g, "gva2gpa 0x%" PRIx64, gva);
	struct kage_fault fault = { 0 };
	int r = kage_vcpu_translate(vcpu, gva, 0, &fault);
	bool there = r == KAGE_OK || r == KAGE_MMIO, good;

	if (!answer)
		return false;
	if (!strncmp(answer, "gpa: ", 5))
		good = there ? strtoull(answer + 5, NULL, 0) == fault.gpa : r == KAGE_GUEST_FAULT && is_old(g, &fault);
	else
		good = !strncmp(answer, "Unmapped", 8) && r == KAGE_GUEST_FAULT;
	*mapped += there;
	if (!good)
		check(false, "%s: gva %" PRIx64 ": outcome %d, gpa %" PRIx64 ", error %x, level %u; QEMU says %s", g->name,
		      gva, r, fault.gpa, fault.error, fault.level, answer);
	free(answer);
	return good;
}

static bool agree(const struct guest *g, struct kage_vcpu *vcpu, const char *text)
{
	uint64_t gva[ADDRESSES];
	unsigned n = gather(g, text, gva), mapped = 0, same = 0;

	for (unsigned i = 0; i < n; i++)
		same += agrees(g, vcpu, gva[i], &mapped);
	return check(same == n && mapped > n / 4 && mapped < n,
		     "%s: %u of %u addresses translate as in QEMU's own walk; %u are mapped", g->name, same, n, mapped);
}

/* -- in order ---------------------------------------------------------------------------------------------------- */

static bool walk_suspended(struct guest *g, union regs *regs, const char *text, uint64_t gva, const char *banner,
			   size_t len)
{
	struct kage_vcpu *vcpu = make_vcpu(g, regs);
	struct kage_fault fault = { 0 };
	bool good;

	if (!vcpu)
		return false;
	good = banner_reads(g, vcpu, gva, banner, len) && !kage_vcpu_translate(vcpu, gva, KAGE_READ, &fault) &&
	       check(true, "%s, suspended: linux_banner: gva %" PRIx64 " -> gpa %" PRIx64
		     " (entry of level %u): %.24s...", g->name, gva, fault.gpa, fault.level, banner);
	good &= agree(g, vcpu, text);
	if (g->arch->kage == KAGE_ARCH_X86) {
		good &= kage_vcpu_translate(vcpu, g->init_top_pgt, 0, &fault) == KAGE_OK;
		regs->x86.cr3 = fault.gpa;
	}
	kage_vcpu_destroy(vcpu);
	return good && banner_is_guarded(g, regs, gva);
}

static bool walk_running(struct guest *g, const union regs *regs, uint64_t gva, const char *banner, size_t len)
{
	struct kage_vcpu *vcpu = make_vcpu(g, regs);
	bool good = vcpu != NULL;
	unsigned before;

	guest_listen(g);
	before = g->round;
	for (unsigned i = 0; good && i < 3; i++) {
		good = guest_wait(g, before + i) && banner_reads(g, vcpu, gva, banner, len) &&
		       !kage_vcpu_flush(vcpu, KAGE_CFG(kage_flush, .kind = KAGE_FLUSH_ALL));
		kage_vcpu_leave(vcpu);
	}
	kage_vcpu_destroy(vcpu);
	return check(good, "%s, running: the same, three times between its rounds %u and %u", g->name, before,
		     g->round);
}

bool walk_show(struct guest *g, const struct paths *paths)
{
	char banner[sizeof(g->version) + 2], *text;
	size_t len = (size_t)snprintf(banner, sizeof(banner), "%s\n", g->version) + 1;
	uint64_t gva = banner_address(g, paths, banner, len);
	union regs regs = { 0 };
	bool good;

	if (!check(gva && strlen(g->version) > 40, "%s: the kernel's version and symbols", g->name) ||
	    !stop_in_kernel(g, paths, &regs, &text))
		return false;
	good = walk_suspended(g, &regs, text, gva, banner, len);
	free(text);
	return guest_resume(g) && good && walk_running(g, &regs, gva, banner, len);
}
