/* SPDX-License-Identifier: MIT */
/*
 * kage-bench-kvm: what Kage's memory costs a guest of KVM.
 *
 *   kage-bench-kvm [--quick] [--json FILE] [suite...]
 *
 * Exit: 0; 1 if a row was void; 2 if the machine cannot run it or the options are wrong; 77 without KVM.
 */
#include <stdio.h>

#include "kvm.h"

int main(int argc, char **argv)
{
	static const struct suite suites[] = {
	    {"steady", bench_steady},
	    {"cow", bench_cow},
	    {"pause", bench_pause},
	    {"clones", bench_clones},
	    {"dirty", bench_dirty},
	    {"scale", bench_scale},
	};
	const char *missing = vmm_missing();

	if (missing) {
		printf("SKIP: %s\n", missing);
		return 77;
	}
	return suites_run(argc, argv, suites, LENGTH(suites));
}
