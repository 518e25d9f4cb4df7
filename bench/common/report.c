/* SPDX-License-Identifier: MIT */
/* One line of the table, and one object of the JSON array, for each row. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common.h"

static FILE *json;
static bool array; /* or an object a line */
static bool first_object;
static int voids;
static const char *last_suite;

bool report_open(const char *path, bool append)
{
	if (path) {
		json = fopen(path, append ? "ae" : "we");
		if (!json)
			return false;
		fseek(json, 0, SEEK_END);
		first_object = ftell(json) == 0;
		array = !append;
		if (array)
			fputs("[", json);
		else if (!first_object)
			return true;
	}
	printf("%-40s %11s %9s %-6s %11s %7s  %-24s %s\n", "case", "value", "+/-", "unit", "peer", "ratio",
	       "goal", "note");
	return true;
}

void row_note(struct row *row, const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	vsnprintf(row->note, sizeof(row->note), format, ap);
	va_end(ap);
}

void report_turns(struct row *row, const struct turns *t)
{
	row->value = series_median(&t->ours);
	row->spread = series_spread(&t->ours);
	if (row->peer)
		row->peer_value = series_median(&t->peer);
	row->isvoid |= !t->ok;
	report_row(row);
}

/* Writes "goal reached?" in words; empty without a goal. */
static void goal_text(const struct row *r, char *buf, size_t bytes)
{
	bool met = false;

	buf[0] = 0;
	switch (r->goal) {
	case GOAL_NONE:
		return;
	case GOAL_MOST:
		met = r->value <= r->limit;
		snprintf(buf, bytes, "<= %g %s", r->limit, r->unit);
		break;
	case GOAL_EXTRA:
		met = r->value - r->peer_value <= r->limit;
		snprintf(buf, bytes, "%+.2f, <= +%g", r->value - r->peer_value, r->limit);
		break;
	case GOAL_TIMES:
		met = r->value <= r->limit * r->peer_value;
		snprintf(buf, bytes, "%.2fx, <= %gx", r->value / r->peer_value, r->limit);
		break;
	case GOAL_RATIO:
		met = r->peer_value >= r->limit * r->value;
		snprintf(buf, bytes, ">= %gx", r->limit);
		break;
	case GOAL_SHARE:
		met = r->value >= r->limit * r->peer_value;
		snprintf(buf, bytes, "%.2fx, >= %gx", r->peer_value > 0 ? r->value / r->peer_value : 0, r->limit);
		break;
	}
	strncat(buf, met ? " met" : " MISSED", bytes - strlen(buf) - 1);
}

static void json_string(const char *key, const char *s)
{
	fprintf(json, "\"%s\":", key);
	if (!s) {
		fputs("null", json);
		return;
	}
	fputc('"', json);
	for (; *s; s++) {
		if (*s == '"' || *s == '\\')
			fputc('\\', json);
		if ((unsigned char)*s >= ' ')
			fputc(*s, json);
	}
	fputc('"', json);
}

static void json_number(const char *key, double v, bool there)
{
	if (there)
		fprintf(json, "\"%s\":%.6g", key, v);
	else
		fprintf(json, "\"%s\":null", key);
}

/* `missing`: why there are no numbers, or NULL. */
static void json_row(const struct row *r, double ratio, const char *goal, const char *missing)
{
	char note[420];
	bool peer = r->peer && !missing;

	snprintf(note, sizeof(note), "%s%s%s%s%s", missing ? missing : "", *goal ? "goal " : "", goal,
		 *goal && *r->note ? "; " : "", r->note);
	if (array)
		fputs(first_object ? "\n" : ",\n", json);
	first_object = false;
	fputc('{', json);
	json_string("suite", r->suite);
	fputc(',', json);
	json_string("case", r->name);
	fputc(',', json);
	json_number("value", r->value, !missing);
	fputc(',', json);
	json_string("unit", r->unit);
	fputc(',', json);
	json_number("spread", r->spread, !missing);
	fputc(',', json);
	json_string("peer", r->peer);
	fputc(',', json);
	json_number("peer_value", r->peer_value, peer);
	fputc(',', json);
	json_number("ratio", ratio, peer && ratio > 0);
	fputc(',', json);
	json_string("note", note);
	fputs(array ? "}" : "}\n", json);
	fflush(json);
}

static void begin_row(const struct row *r, char name[64])
{
	snprintf(name, 64, "%s/%s", r->suite, r->name);
	if (last_suite ? strcmp(last_suite, r->suite) : json && !array && !first_object)
		putchar('\n');
	last_suite = r->suite;
}

void report_skip(const struct row *r)
{
	char name[64];

	begin_row(r, name);
	printf("%-40s %11s %9s %-6s %s\n", name, "skipped", "", r->unit, r->note);
	fflush(stdout);
	if (json)
		json_row(r, 0, "", "skipped: ");
}

void report_row(const struct row *r)
{
	double better = r->more ? r->value : r->peer_value, worse = r->more ? r->peer_value : r->value;
	double ratio = worse > 0 ? better / worse : 0;
	char goal[64], name[64], peer[24] = "-", times[16] = "-";

	goal_text(r, goal, sizeof(goal));
	begin_row(r, name);
	if (r->peer) {
		snprintf(peer, sizeof(peer), "%.6g", r->peer_value);
		if (ratio > 0)
			snprintf(times, sizeof(times), "%.2f", ratio);
	}
	if (r->isvoid)
		printf("%-40s %11s %9s %-6s %11s %7s  %-24s %s\n", name, "void", "", r->unit, "", "",
		       "check failed", r->note);
	else
		printf("%-40s %11.6g %9.3g %-6s %11s %7s  %-24s %s%s\n", name, r->value, r->spread, r->unit,
		       peer, times, goal, r->peer ? "peer: " : "", r->peer ? r->peer : "");
	if (!r->isvoid && *r->note)
		printf("%-40s   %s\n", "", r->note);
	fflush(stdout);
	voids += r->isvoid;
	if (json)
		json_row(r, ratio, r->isvoid ? "" : goal, r->isvoid ? "void: check failed; " : NULL);
}

int report_close(void)
{
	bool bad = false;

	if (json) {
		fputs(array ? "\n]\n" : "", json);
		bad = ferror(json) != 0;
		bad |= fclose(json) != 0;
		json = NULL;
	}
	return bad ? -1 : voids;
}
