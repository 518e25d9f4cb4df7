/* SPDX-License-Identifier: MIT */
/*
 * Kage beside guests that are not its own: Linux under libvirt and QEMU, whose RAM it maps as foreign memory.
 *
 *	virt-beside SOURCE OUT ARCH
 *
 * SOURCE is Kage's source folder, ARCH x86_64 or aarch64. In OUT: the kernel, the initramfs and the guests' consoles.
 * Shows, and checks, for three guests: linux_banner is found through their page tables, suspended and running; how
 * much of them is the same; what they change. One line a check; exit 0, 1, or 77 with "SKIP: reason and remedy".
 */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "beside.h"

static const struct arch archs[] = {
	{ .machine = { .arch = "x86_64", .debian = "amd64", .emulator = "qemu-system-x86_64",
		       .package = "qemu-system-x86", .type = "pc", .console = "ttyS0", .features = "<acpi/><apic/>" },
	  .cpu = "qemu64", .more = " pti=on", .ram = "pc.ram", .ram_gpa = 0, .kage = KAGE_ARCH_X86 },
	{ .machine = { .arch = "aarch64", .debian = "arm64", .emulator = "qemu-system-aarch64",
		       .package = "qemu-system-arm", .type = "virt", .console = "ttyAMA0",
		       .features = "<gic version='3'/>" },
	  .cpu = "cortex-a72", .more = " nokaslr", .ram = "mach-virt.ram", .ram_gpa = 0x40000000, .kage = KAGE_ARCH_ARM64 },
};

static const struct arch *arch;
static struct paths paths = { .sysroot = "" };
static struct guest guests[GUESTS];

bool check(bool good, const char *format, ...)
{
	va_list ap;

	fputs(good ? "  ok    " : "  FAIL  ", stdout);
	va_start(ap, format);
	vprintf(format, ap);
	va_end(ap);
	putchar('\n');
	return good;
}

/* -- the engine ------------------------------------------------------------------------------------------------ */

static void report(void *opaque, const char *line)
{
	printf("  audit: %s\n", line);
}

static bool close_engine(struct kage_engine *engine)
{
	struct kage_audit audit = { .size = sizeof(audit), .report = report };
	int err = kage_engine_audit(engine, &audit);
	bool good = check(!err && audit.checks, "the engine's audit after all this: %" PRIu64 " checks", audit.checks);

	for (unsigned i = 0; i < GUESTS; i++)
		good &= !kage_vm_destroy(guests[i].vm);
	return check(good & !kage_engine_destroy(engine), "the engine goes, the guests do not notice");
}

static bool show(void)
{
	struct kage_engine *engine;
	bool good = true;

	if (kage_engine_create(NULL, &engine))
		return check(false, "no engine");
	for (unsigned i = 0; i < GUESTS; i++)
		good = good && guest_wait(&guests[i], 0) && guest_map(&guests[i], engine);
	for (unsigned i = 0; good && i < GUESTS; i++)
		good = walk_show(&guests[i], &paths);
	good = good && same_show(guests, &paths);
	for (unsigned i = 0; good && i < GUESTS; i++)
		good = change_show(&guests[i]);
	good &= close_engine(engine);
	for (unsigned i = 0; good && i < GUESTS; i++)
		good = guest_wait(&guests[i], guests[i].round + 1);
	return good;
}

/* -- the domains ------------------------------------------------------------------------------------------------ */

/* Guests' RAM, where it is not written to a disk if there is room: a container's /dev/shm may be small. */
static void choose_ram_folder(void)
{
	struct statvfs st;
	bool room = !access("/dev/shm", W_OK) && !statvfs("/dev/shm", &st) &&
		    (uint64_t)st.f_bavail * st.f_frsize >> 20 >= (GUESTS + 2) * MIB;

	if (room)
		ram_folder(paths.root, paths.ram, sizeof(paths.ram));
	else
		fill(paths.ram, sizeof(paths.ram), "%s/ram", paths.root);
}

/* RAM files go with their domains, but not when everybody was killed. */
static bool make_ram_folder(void)
{
	remove_tree(paths.ram);
	if (!mkdir(paths.ram, 0700))
		return true;
	fprintf(stderr, "beside: %s: %s\n", paths.ram, strerror(errno));
	return false;
}

static bool run(void)
{
	bool good = true;

	for (unsigned i = 0; good && i < GUESTS; i++) {
		guests[i] = (struct guest){ .arch = arch, .number = i + 1 };
		good = guest_start(&guests[i], &paths);
	}
	good = good && show();
	for (unsigned i = 0; i < GUESTS; i++)
		guest_stop(&guests[i]);
	return good;
}

static int work(void)
{
	const char *reason = domain_missing(&arch->machine);
	int status;

	if (reason) {
		printf("SKIP: %s\n", reason);
		return SKIPPED;
	}
	/* The root's lock first: whoever has it may remove the folder. */
	status = domain_open(&paths);
	if (status == PASSED)
		status = fetch(&paths, arch->machine.debian, RELEASE);
	if (status == PASSED)
		status = initramfs_plain(&paths, "tests/virt/beside_init.sh", "initramfs") && make_ram_folder() && run() ?
				 PASSED : FAILED;
	domain_close();
	remove_tree(paths.ram);
	return status;
}

/* -- the command line ------------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
	char name[64];

	setvbuf(stdout, NULL, _IOLBF, 0);
	for (size_t i = 0; argc == 4 && i < sizeof(archs) / sizeof(archs[0]); i++)
		if (!strcmp(argv[3], archs[i].machine.arch))
			arch = &archs[i];
	if (!arch) {
		fprintf(stderr, "usage: virt-beside SOURCE OUT x86_64|aarch64\n");
		return 2;
	}
	paths.source = argv[1];
	fill(name, sizeof(name), "beside-%s", arch->machine.arch);
	if (!make_paths(&paths, argv[2], name, arch->machine.debian, RELEASE))
		return FAILED;
	choose_ram_folder();
	return supervised(work, paths.root);
}
