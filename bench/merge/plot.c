/* SPDX-License-Identifier: MIT */
/*
 * Pictures, by gnuplot, of the last repetition of two rows, full-2x512m and
 * write-latency. Data and script stay beside them in the folder:
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

static struct trace kept[2]; /* Kage's, ksmd's */
static struct histogram kept_latency[2];

void plot_keep_run(bool peer, const struct trace *t)
{
	struct trace *to = &kept[peer];

	if (!form.plots)
		return;
	trace_free(to);
	for (unsigned i = 0; i < t->n; i++)
		trace_add(to, t->sample[i].wall, t->sample[i].cpu, t->sample[i].saved);
}

void plot_keep_latency(const struct histogram *ours, const struct histogram *peer)
{
	kept_latency[0] = *ours;
	kept_latency[1] = *peer;
}

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

static bool put_data(void)
{
	static const char *const title[] = {"Kage", "ksmd"};
	FILE *runs = create("merge-time.dat"), *latencies = create("merge-latency.dat");
	bool ok;

	for (unsigned i = 0; i < 2 && kept[i].n; i++)
		put_trace(runs, &kept[i], title[i]);
	for (unsigned i = 0; i < 2 && kept_latency[i].total; i++)
		put_histogram(latencies, &kept_latency[i], title[i]);
	ok = fclose(runs) == 0;
	return fclose(latencies) == 0 && ok;
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
	if (!form.plots)
		return;
	if (!kept[0].n || !kept_latency[0].total)
		printf("plots: none: they are made of the rows full-2x512m and write-latency\n");
	else if (!put_data() || !put_script())
		printf("plots: %s cannot be written\n", form.plots);
	else if (!run_gnuplot())
		printf("plots: gnuplot failed or is missing; %s/merge.gp is there\n", form.plots);
	else
		printf("plots: %s/merge-*.svg\n", form.plots);
	trace_free(&kept[0]);
	trace_free(&kept[1]);
}
