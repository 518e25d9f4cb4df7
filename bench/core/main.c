/* SPDX-License-Identifier: MIT */
/*
 * kage-bench-core: what the core engine costs.
 *
 *   kage-bench-core [--quick] [--json FILE] [suite...]
 *
 * Exit: 0; 1 if a row was void; 2 if the machine cannot run it or the options are wrong.
 */
#include <stdio.h>
#include <string.h>

#include "core.h"

static const struct suite {
	const char *name;
	void (*run)(const struct bench *b);
} suites[] = {
    {"translate", bench_translate}, {"clone", bench_clone},   {"fault", bench_cow},
    {"notify", bench_storm},	    {"memory", bench_memory},
};

static int usage(void)
{
	fputs("usage: kage-bench-core [--quick] [--json FILE] [suite...]\nsuites:", stderr);
	for (unsigned i = 0; i < LENGTH(suites); i++)
		fprintf(stderr, " %s", suites[i].name);
	fputc('\n', stderr);
	return 2;
}

static int find_suite(const char *name)
{
	for (unsigned i = 0; i < LENGTH(suites); i++)
		if (!strcmp(name, suites[i].name))
			return (int)i;
	return -1;
}

int main(int argc, char **argv)
{
	struct bench b = {.reps = 11};
	const char *json = NULL;
	unsigned wanted = 0;
	int bad;

	for (int i = 1; i < argc; i++) {
		int s = find_suite(argv[i]);

		if (s >= 0)
			wanted |= 1u << s;
		else if (!strcmp(argv[i], "--quick"))
			b.quick = true;
		else if (!strcmp(argv[i], "--json") && i + 1 < argc)
			json = argv[++i];
		else
			return usage();
	}
	if (b.quick) {
		b.reps = 5;
		b.shift = 2;
	}
	if (!report_open(json)) {
		perror(json);
		return 2;
	}
	for (unsigned i = 0; i < LENGTH(suites); i++)
		if (!wanted || wanted & 1u << i)
			suites[i].run(&b);
	bad = report_close();
	if (bad < 0)
		fputs("kage-bench-core: the JSON file could not be written\n", stderr);
	return bad < 0 ? 2 : bad > 0;
}
