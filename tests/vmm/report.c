/* SPDX-License-Identifier: MIT */
/*
 * What the vCPUs of a VM are doing: for a guest that does not do what it should.
 *
 * Twice, a second apart: state and counters of each vCPU, and for each thread of this process the CPU time
 * and where it sleeps in the kernel, without waiting for anybody. Then the registers, for which the
 * VM is parked: if that does not end, what was said before says which thread does not come.
 */
#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "arch.h"

static void first_line(const char *tid, const char *name, char *line, size_t len)
{
	char path[64];
	FILE *f;

	line[0] = 0;
	snprintf(path, sizeof(path), "/proc/self/task/%.16s/%s", tid, name);
	f = fopen(path, "r");
	if (f == NULL)
		return;
	if (fgets(line, (int)len, f) == NULL)
		line[0] = 0;
	line[strcspn(line, "\n")] = 0;
	fclose(f);
}

/* State, user and system time: fields 3, 14 and 15 of proc(5)'s stat, after the name in brackets. */
static void thread(const char *tid)
{
	char stat[512], wchan[64], call[128], *after;
	unsigned long user = 0, system = 0;
	char state = '?';

	first_line(tid, "stat", stat, sizeof(stat));
	first_line(tid, "wchan", wchan, sizeof(wchan));
	first_line(tid, "syscall", call, sizeof(call));
	after = strrchr(stat, ')');
	if (after != NULL)
		sscanf(after, ") %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &state, &user, &system);
	printf("report: thread %s: %c, %lu + %lu ticks, in %s, system call %s\n", tid, state, user, system, wchan, call);
}

static void threads(void)
{
	DIR *dir = opendir("/proc/self/task");
	struct dirent *d;

	while (dir != NULL && (d = readdir(dir)) != NULL)
		if (d->d_name[0] != '.')
			thread(d->d_name);
	if (dir != NULL)
		closedir(dir);
}

static void vcpus(const struct vmm *vmm)
{
	unsigned i;

	printf("report: %u parks, %u pauses\n", vmm->parks, vmm->pauses);
	for (i = 0; i < vmm->vcpus; i++) {
		const struct vmm_vcpu *v = vmm->vcpu[i];

		printf("report: vCPU %u: state %d, %" PRIu64 " exits, the last %u; %" PRIu64 " failed, %" PRIu64 " kicks, immediate_exit %u%s%s\n",
		       i, v->state, atomic_load(&v->exits), v->run->exit_reason, atomic_load(&v->failed), atomic_load(&v->kicks),
		       v->run->immediate_exit, v->stop ? ", to stop" : "", v->stopping ? ", stopping" : "");
	}
}

void vmm_report(struct vmm *vmm)
{
	struct timespec second = {.tv_sec = 1};
	unsigned i;

	vcpus(vmm);
	threads();
	nanosleep(&second, NULL);
	vcpus(vmm);
	threads();
	if (vmm_park(vmm) < 0)
		return;
	for (i = 0; i < vmm->vcpus; i++)
		vmm_arch_report(vmm->vcpu[i]);
	vmm_unpark(vmm);
}
