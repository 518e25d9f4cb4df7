/* SPDX-License-Identifier: MIT */
/*
 * Pictures, by gnuplot: one run of each side of two equal guests of 512 MiB, and
 * the histogram of a guest's writes. Data and script stay beside them in the folder:
 *
 *	merge-saved.svg    saved memory over wall time
 *	merge-cpu.svg      CPU time over wall time
 *	merge-work.svg     saved memory over CPU time
 *	merge-latency.svg  how long writes take meanwhile
 */
#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "merge.h"

extern char **environ;

static FILE *create(const char *name)
{
	char path[4096];
	FILE *f;

	if (mkdir(form.plots, 0777) && errno != EEXIST)
		must(-errno, form.plots);
	snprintf(path, sizeof(path), "%s/%s", form.plots, name);
	f = fopen(path, "we");
	must(f ? 0 : -errno, path);
	return f;
}

/* Seconds, seconds of CPU, MiB. */
static void put_trace(FILE *f, const struct trace *t, const char *title)
{
	double last = -1;

	fprintf(f, "\"%s\"\n", title);
	for (unsigned i = 0; i < t->n; i++) {
		const struct sample *s = &t->sample[i];

		/* a thousand points or so */
		if (i && i + 1 < t->n && s->wall - last < t->sample[t->n - 1].wall / 1000)
			continue;
		fprintf(f, "%.6f %.6f %.3f\n", s->wall / 1e9, s->cpu / 1e9, (double)s->saved / 256);
		last = s->wall;
	}
	fputs("\n\n", f);
}

/* Microseconds, share of all writes. */
static void put_histogram(FILE *f, const struct histogram *h, const char *title)
{
	fprintf(f, "\"%s\"\n", title);
	for (unsigned i = 0; i < HIST_BUCKETS; i++)
		fprintf(f, "%.4f %.8f\n", histogram_edge(i) / 1e3,
			h->total ? (double)h->count[i] / (double)h->total : 0);
	fputs("\n\n", f);
}

static bool put_runs(bool *ok)
{
	struct contents c = contents_equal(2, size_of_case(512 * MIB));
	FILE *f = create("merge-time.dat");
	struct theirs t;
	struct ours o;
	struct run r;

	ours_create(&o, &c);
	ours_merge(&o, &r);
	ours_check(&o, &r);
	ours_destroy(&o);
	*ok &= r.ok;
	put_trace(f, &r.trace, "Kage");
	trace_free(&r.trace);
	if (!form.alone) {
		theirs_create(&t, &c);
		theirs_merge(&t, 0, &r);
		theirs_check(&t, &r);
		theirs_destroy(&t);
		*ok &= r.ok;
		put_trace(f, &r.trace, "ksmd");
		trace_free(&r.trace);
	}
	return fclose(f) == 0;
}

static bool put_latencies(bool *ok)
{
	struct contents c = contents_equal(2, size_of_case(512 * MIB));
	struct histogram ours = {0}, peer = {0};
	FILE *f = create("merge-latency.dat");

	*ok &= latency_measure(&c, &ours, &peer);
	put_histogram(f, &ours, "Kage");
	if (peer.total)
		put_histogram(f, &peer, "ksmd");
	return fclose(f) == 0;
}

static bool put_script(void)
{
	FILE *f = create("merge.gp");

	fputs("set terminal svg size 720,420 dynamic background rgb 'white'\n"
	      "set grid\nset key bottom right\nset style data lines\n",
	      f);
	fprintf(f, "last = %d\n", form.alone ? 0 : 1);
	fputs("set output 'merge-saved.svg'\n"
	      "set title 'Two guests of 512 MiB with equal contents: memory saved'\n"
	      "set xlabel 'seconds'\nset ylabel 'MiB'\n"
	      "plot for [i=0:last] 'merge-time.dat' index i using 1:3 title columnheader(1) linewidth 2\n"
	      "set output 'merge-cpu.svg'\n"
	      "set title 'The same: CPU time of whoever merges'\n"
	      "set ylabel 'seconds of CPU'\n"
	      "plot for [i=0:last] 'merge-time.dat' index i using 1:2 title columnheader(1) linewidth 2\n"
	      "set output 'merge-work.svg'\n"
	      "set title 'The same: memory saved by CPU time'\n"
	      "set xlabel 'seconds of CPU'\nset ylabel 'MiB'\n"
	      "plot for [i=0:last] 'merge-time.dat' index i using 2:3 title columnheader(1) linewidth 2\n"
	      "set output 'merge-latency.svg'\n"
	      "set title \"A guest's writes while it is merged\"\n"
	      "set xlabel 'microseconds (wall)'\nset ylabel 'share of writes'\n"
	      "set logscale xy\nset key top right\nset yrange [1e-6:1]\n"
	      "plot for [i=0:last] 'merge-latency.dat' index i using 1:($2 > 0 ? $2 : 1e-9) title "
	      "columnheader(1) "
	      "with histeps linewidth 2\n",
	      f);
	return fclose(f) == 0;
}

static bool run_gnuplot(void)
{
	char script[] = "merge.gp", *argv[] = {(char[]){"gnuplot"}, script, NULL};
	int status = 0;
	pid_t pid;

	if (chdir(form.plots) || posix_spawnp(&pid, "gnuplot", NULL, NULL, argv, environ))
		return false;
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void bench_plots(const struct bench *b)
{
	const char *why = form.alone ? NULL : no_ksm ? no_ksm : ksm_alone();
	bool ok = true;

	if (!form.plots)
		return;
	if (why) {
		printf("plots: none: %s\n", why);
		return;
	}
	if (!put_runs(&ok) || !put_latencies(&ok) || !put_script())
		printf("plots: %s cannot be written\n", form.plots);
	else if (!ok)
		printf("plots: none: a check failed\n");
	else if (!run_gnuplot())
		printf("plots: gnuplot failed or is missing; %s/merge.gp is there\n", form.plots);
	else
		printf("plots: %s/merge-*.svg\n", form.plots);
}
