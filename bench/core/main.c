/* SPDX-License-Identifier: MIT */
/*
 * kage-bench-core: what the core engine costs.
 *
 *   kage-bench-core [--quick] [--json FILE] [suite...]
 *
 * Exit: 0; 1 if a row was void; 2 if the machine cannot run it or the options are wrong.
 */
#include <string.h>

#include "core.h"

static void bench_fault(const struct bench *b)
{
	bench_touch(b);
	bench_cow(b);
	bench_threads(b);
	bench_map(b);
}

int main(int argc, char **argv)
{
	static const struct suite suites[] = {
	    {"translate", bench_translate}, {"clone", bench_clone},   {"fault", bench_fault},
	    {"dirty", bench_dirty},	    {"memory", bench_memory}, {"scale", bench_scale},
	};

	if (argc > 1 && !strcmp(argv[1], "--twin"))
		return twin_main(argc, argv);
	return suites_run(argc, argv, suites, LENGTH(suites));
}
