/* SPDX-License-Identifier: MIT */
/*
 * kage-bench-merge: merging against the running kernel's ksmd.
 *
 *   kage-bench-merge [--quick] [--alone | --smoke] [--case NAME] [--json FILE] [suite...]
 *
 * --alone: without ksmd. --smoke: that, with a few MiB and one repetition, to see that
 * rows work. --case: only the rows of one case. Exit: 0; 1 if a row was
 * void; 2 if the machine cannot run it or the options are wrong.
 */
#include <string.h>

#include "merge.h"

struct form form;

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
		else
			argv[n++] = argv[i];
	}
	argv[n] = NULL;
	return n;
}

int main(int argc, char **argv)
{
	static const struct suite suites[] = {
	    {"scan", bench_scan},
	    {"full", bench_full},
	    {"scattered", bench_scattered},
	    {"steady", bench_steady},
	};
	int status;

	argc = own_options(argc, argv);
	if (!form.alone)
		no_ksm = ksm_open();
	status = suites_run(argc, argv, suites, LENGTH(suites));
	ksm_close();
	return status;
}
