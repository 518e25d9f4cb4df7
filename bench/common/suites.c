/* SPDX-License-Identifier: MIT */
/* The command line of a benchmark program, and what its options do to the rows. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "common.h"

static int usage(const struct suite *suites, unsigned n)
{
	fprintf(stderr,
		"usage: %s [--quick | --smoke] [--json FILE | --rows FILE] [suite...]\nsuites:",
		program_invocation_short_name);
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

static struct bench form_of(bool quick, bool smoke)
{
	if (smoke)
		return (struct bench){.smoke = true, .quick = true, .reps = 1, .shift = 7};
	if (quick)
		return (struct bench){.quick = true, .reps = 3, .shift = 2};
	return (struct bench){.reps = 11};
}

int suites_run(int argc, char **argv, const struct suite *suites, unsigned n)
{
	bool quick = false, smoke = false, append = false;
	const char *json = NULL;
	struct bench b;
	unsigned wanted = 0;
	int bad;

	for (int i = 1; i < argc; i++) {
		int s = find_suite(suites, n, argv[i]);

		if (s >= 0)
			wanted |= 1u << s;
		else if (!strcmp(argv[i], "--quick"))
			quick = true;
		else if (!strcmp(argv[i], "--smoke"))
			smoke = true;
		else if ((!strcmp(argv[i], "--json") || !strcmp(argv[i], "--rows")) && i + 1 < argc && !json)
			append = argv[i][2] == 'r', json = argv[++i];
		else
			return usage(suites, n);
	}
	b = form_of(quick, smoke);
	if (!report_open(json, append)) {
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
