/* SPDX-License-Identifier: MIT */
/* The command line of a benchmark program. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "common.h"

static int usage(const struct suite *suites, unsigned n)
{
	fprintf(stderr,
		"usage: %s [--quick | --smoke] [--json FILE] [suite...]\nsuites:", program_invocation_short_name);
	for (unsigned i = 0; i < n; i++)
		fprintf(stderr, " %s", suites[i].name);
	fputc('\n', stderr);
	return 2;
}

static int find_suite(const struct suite *suites, unsigned n, const char *name)
{
	for (unsigned i = 0; i < n; i++)
		if (!strcmp(name, suites[i].name))
			return (int)i;
	return -1;
}

int suites_run(int argc, char **argv, const struct suite *suites, unsigned n)
{
	struct bench b = {.reps = 11};
	const char *json = NULL;
	unsigned wanted = 0;
	int bad;

	for (int i = 1; i < argc; i++) {
		int s = find_suite(suites, n, argv[i]);

		if (s >= 0)
			wanted |= 1u << s;
		else if (!strcmp(argv[i], "--quick"))
			b.quick = true;
		else if (!strcmp(argv[i], "--smoke"))
			b.quick = b.smoke = true;
		else if (!strcmp(argv[i], "--json") && i + 1 < argc)
			json = argv[++i];
		else
			return usage(suites, n);
	}
	if (b.quick) {
		b.reps = b.smoke ? 1 : 5;
		b.shift = b.smoke ? 7 : 2;
	}
	if (!report_open(json)) {
		perror(json);
		return 2;
	}
	for (unsigned i = 0; i < n; i++)
		if (!wanted || wanted & 1u << i)
			suites[i].run(&b);
	bad = report_close();
	if (bad < 0)
		fprintf(stderr, "%s: the JSON file could not be written\n", program_invocation_short_name);
	return bad < 0 ? 2 : bad > 0;
}
