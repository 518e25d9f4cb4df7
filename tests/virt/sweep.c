/* SPDX-License-Identifier: MIT */
/*
 * The folder that a connection to libvirt has for itself, and what runs that were killed left in others.
 *
 * A run's folder is ROOTS, the user's number, a hash of the folder that it writes to. In it:
 *	lock	held by flock(2) as long as the run lives; QEMU does not inherit it
 *	of	the folder that it writes to: without that nobody comes back to the root
 * RAM files of guests may lie in a folder of /dev/shm that is called as the root.
 *
 * invariants
 *	S1. Only who has a root's lock touches what uses the root. A root whose lock can be had belongs to no live
 *	    run: sweep() takes it while it looks, and a run that begins waits for that.
 *	S2. Only folders of this user count, and in them only what this user may end: /tmp is everybody's.
 *
 * Not the parent of a stray tells whose it is: QEMU daemonizes. Its arguments do, which name files of its root.
 */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <glob.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "virt.h"

/* -- folders ------------------------------------------------------------------------------------------ */

static bool own_folder(const char *path)
{
	struct stat st;

	return !lstat(path, &st) && S_ISDIR(st.st_mode) && st.st_uid == geteuid();
}

bool make_folder(const char *path)
{
	if ((!mkdir(path, 0700) || errno == EEXIST) && own_folder(path))
		return true;
	fprintf(stderr, "virt: %s cannot be made, or is not this user's folder\n", path);
	return false;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

void remove_tree(const char *path)
{
	if (own_folder(path))
		nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

void ram_folder(const char *root, char *path, size_t size)
{
	fill(path, size, "/dev/shm/%s", strrchr(root, '/') + 1);
}

/* -- the lock --------------------------------------------------------------------------------------------- */

/* Open as long as the lock is held; -1: somebody else has it. */
static int lock_root(const char *root)
{
	struct stat held, there;
	char path[PATH_MAX];
	int fd;

	fill(path, sizeof(path), "%s/lock", root);
	fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd >= 0 && (flock(fd, LOCK_EX | LOCK_NB) || fstat(fd, &held) || lstat(path, &there) ||
			held.st_ino != there.st_ino)) { /* who held it has removed the folder */
		close(fd);
		fd = -1;
	}
	return fd;
}

static bool write_owner(const struct paths *paths)
{
	char path[PATH_MAX];
	FILE *f;

	fill(path, sizeof(path), "%s/of", paths->root);
	f = fopen(path, "w");
	if (!f)
		return false;
	fputs(paths->out, f);
	return !fclose(f);
}

/* Until this process ends. */
bool take_root(const struct paths *paths)
{
	int fd = -1;

	for (unsigned tries = 0; tries < 100 && fd < 0; tries++) {
		if (tries) /* S1 */
			nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
		if (!make_folder(paths->root))
			return false;
		fd = lock_root(paths->root);
	}
	if (fd >= 0)
		return write_owner(paths);
	fprintf(stderr, "virt: another run of this leg is under way (%s/lock)\n", paths->root);
	return false;
}

/* -- QEMUs without a run ------------------------------------------------------------------------------- */

static bool is_stray(const char *pid, const char *prefix)
{
	char path[64], args[16384];
	const char *slash;
	ssize_t n;
	int fd;

	fill(path, sizeof(path), "/proc/%s/cmdline", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	n = fd < 0 ? -1 : read(fd, args, sizeof(args) - 1);
	if (fd >= 0)
		close(fd);
	if (n <= 0)
		return false;
	args[n] = 0;
	slash = strrchr(args, '/'); /* of the first argument: each ends with 0 */
	return !strncmp(slash ? slash + 1 : args, "qemu-system-", 12) && memmem(args, (size_t)n, prefix, strlen(prefix));
}

/* The path ends in /, so that no other root begins like this one. */
void kill_strays(const char *root)
{
	char prefix[PATH_MAX];
	struct dirent *e;
	DIR *proc = opendir("/proc");

	fill(prefix, sizeof(prefix), "%s/", root);
	while (proc && (e = readdir(proc)))
		if (isdigit((unsigned char)e->d_name[0]) && is_stray(e->d_name, prefix) &&
		    !kill(atoi(e->d_name), SIGKILL))
			printf("virt: QEMU %s was left over by an earlier run: killed\n", e->d_name);
	if (proc)
		closedir(proc);
}

/* -- all roots --------------------------------------------------------------------------------------------- */

/* True: the folder that the root is for has gone. */
static bool abandoned(const char *root)
{
	char path[PATH_MAX], out[PATH_MAX] = "";
	FILE *f;

	fill(path, sizeof(path), "%s/of", root);
	f = fopen(path, "r");
	if (!f)
		return false;
	if (!fgets(out, sizeof(out), f))
		out[0] = 0;
	out[strcspn(out, "\n")] = 0;
	fclose(f);
	return *out && access(out, F_OK) && errno == ENOENT;
}

static void sweep_one(const char *root)
{
	char ram[PATH_MAX];
	int fd = own_folder(root) ? lock_root(root) : -1;

	if (fd < 0)
		return;
	kill_strays(root);
	ram_folder(root, ram, sizeof(ram));
	remove_tree(ram);
	if (abandoned(root))
		remove_tree(root);
	close(fd);
}

/* What runs of this user left, from whatever build folder; not what belongs to a run that lives. */
void sweep(void)
{
	char pattern[64];
	glob_t found;

	fill(pattern, sizeof(pattern), ROOTS "%u-*", geteuid());
	if (glob(pattern, GLOB_NOSORT, NULL, &found))
		return;
	for (size_t i = 0; i < found.gl_pathc; i++)
		sweep_one(found.gl_pathv[i]);
	globfree(&found);
}
