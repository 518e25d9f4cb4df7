/* SPDX-License-Identifier: MIT */
/*
 * How much of the guests is the same: Kage's census against split, sha256sum and sort over the RAM files.
 */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "beside.h"

/* The script's answer. */
static bool ask_coreutils(const struct guest *guests, const struct paths *paths, struct kage_census *c)
{
	char command[PATH_MAX];
	FILE *f;
	int n;

	fill(command, sizeof(command), "sh '%s/tests/virt/beside_same.sh' '%s' '%s' '%s' '%s'", paths->source,
	     paths->ram, guests[0].ram, guests[1].ram, guests[2].ram);
	fflush(stdout);
	f = popen(command, "re");
	if (!f)
		return false;
	n = fscanf(f, "%" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64, &c->pages, &c->distinct, &c->zero, &c->common);
	return pclose(f) == 0 && n == 4;
}

static uint64_t blocks(const struct guest *guests)
{
	uint64_t sum = 0;
	struct stat st;

	for (unsigned i = 0; i < GUESTS; i++)
		if (!fstat(guests[i].fd, &st))
			sum += (uint64_t)st.st_blocks;
	return sum;
}

static bool compare(const struct guest *guests, const struct paths *paths)
{
	struct kage_census kage = { .size = sizeof(kage) }, files = { 0 };
	struct kage_vm *vms[GUESTS];
	uint64_t before = blocks(guests);
	int err;

	for (unsigned i = 0; i < GUESTS; i++)
		vms[i] = guests[i].vm;
	err = kage_census_take(vms, GUESTS, &kage);
	if (!check(!err && blocks(guests) == before && !kage.skipped,
		   "a census of %u suspended guests, which gave none of them memory (%" PRIu64 " of %u MiB are there)",
		   GUESTS, before / 2048, GUESTS * MIB) ||
	    !check(ask_coreutils(guests, paths, &files), "coreutils over the same files"))
		return false;
	return check(kage.pages == files.pages && kage.distinct == files.distinct && kage.zero == files.zero &&
			     kage.common == files.common && kage.pages == GUESTS * (uint64_t)MIB * 256,
		     "of %" PRIu64 " pages %" PRIu64 " are distinct (split, sha256sum, sort -u: %" PRIu64 " of %" PRIu64
		     "); %" PRIu64 " zero (%" PRIu64 "), %" PRIu64 " in more than one guest (%" PRIu64 ")",
		     kage.pages, kage.distinct, files.distinct, files.pages, kage.zero, files.zero, kage.common,
		     files.common) &
	       check(kage.distinct < kage.pages && kage.common > kage.zero,
		     "%.1f %% of the memory is there more than once",
		     100.0 - 100.0 * (double)kage.distinct / (double)kage.pages);
}

bool same_show(struct guest *guests, const struct paths *paths)
{
	bool good = true;

	for (unsigned i = 0; i < GUESTS; i++)
		good &= guest_suspend(&guests[i]);
	good = good && compare(guests, paths);
	for (unsigned i = 0; i < GUESTS; i++)
		good &= guest_resume(&guests[i]);
	return good;
}
