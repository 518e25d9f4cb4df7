/* SPDX-License-Identifier: MIT */
/*
 * kage-bench-merge: merging against the running kernel's ksmd.
 *
 *   kage-bench-merge [--quick] [--alone | --smoke] [--case NAME] [--guests DIR] [--plots DIR] [--json FILE]
 * [suite...]
 *
 * --alone: without ksmd. --smoke: that, with a few MiB and one repetition, to see that
 * rows work. --case: only the rows of one case. --guests: where guestN.ram are.
 * --plots: where pictures go. Exit: 0; 1 if a row was
 * void; 2 if the machine cannot run it or the options are wrong.
 */
#include <string.h>

#include "merge.h"

struct form form;

#ifndef BENCH_KVM
void bench_merge_kvm(const struct bench *b)
{
	static const char *const names[] = {"kvm",	     "kvm-guest-merging", "kvm-guest-merging-advised", "kvm-guest-passes", "kvm-guest-passes-advised",
					    "cow-break-kvm", "kvm-guest-loss",	  NULL};

	if (!skip_case(names))
		skip_because(names, "built without the VMM of tests/vmm (x86-64, KVM headers, -Dtests=true)");
}
#endif

/* Takes this program's own options out of argv. */
static int own_options(int argc, char **argv)
{
	int n = 1;

	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--smoke"))
			form.smoke = form.alone = true;
		else if (!strcmp(argv[i], "--alone"))
			form.alone = true;
		else if (!strcmp(argv[i], "--case") && i + 1 < argc)
			form.only = argv[++i];
		else if (!strcmp(argv[i], "--plots") && i + 1 < argc)
			form.plots = argv[++i];
		else if (!strcmp(argv[i], "--guests") && i + 1 < argc)
			form.guests = argv[++i];
		else {
			form.quick |= !strcmp(argv[i], "--quick");
			argv[n++] = argv[i];
		}
	}
	argv[n] = NULL;
	return n;
}

int main(int argc, char **argv)
{
	static const struct suite suites[] = {
	    {"scan", bench_scan},     {"scattered", bench_scattered}, {"full", bench_full},
	    {"steady", bench_steady}, {"demo", bench_demo},	  {"cow", bench_cow},
	    {"kvm", bench_merge_kvm}, {"latency", bench_latency}, {"plots", bench_plots},
	};
	int status;

	argc = own_options(argc, argv);
	if (!form.alone)
		no_ksm = ksm_open();
	status = suites_run(argc, argv, suites, LENGTH(suites));
	ksm_close();
	return status;
}
