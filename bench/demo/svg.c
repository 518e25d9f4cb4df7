/* SPDX-License-Identifier: MIT */
/*
 * The picture of the frames: a panel for each guest, a cell for each page,
 * rows of 256 pages (1 MiB), the colour how the page is held.
 *
 * One <path> for each class and panel, one subpath for each run of like pages
 * in a row: a rectangle element for each page would make the file 20 times as
 * large.
 */
#include <errno.h>
#include <stdio.h>
#include "demo.h"

#define ROW 256 /* pages */
#define CELL 1.5
#define GAP 28
#define TOP 92

struct class {
	uint8_t class;
	const char *name, *colour;
};

/* Colours that stay apart for colour-blind eyes too (Okabe and Ito's palette). */
static const struct class classes[] = {
	{ KAGE_PAGE_HOME, "home (private, never moved)", "#0072b2" },
	{ KAGE_PAGE_MERGED, "shared by merging", "#e69f00" },
	{ KAGE_PAGE_CLONE, "shared with clones", "#009e73" },
	{ KAGE_PAGE_ZERO, "the zero frame", "#f0e442" },
	{ KAGE_PAGE_PRIVATE, "private copy (COW break)", "#d55e00" },
	{ KAGE_PAGE_UNTOUCHED, "untouched", "#e4e4e4" },
};
#define NCLASSES (sizeof(classes) / sizeof(classes[0]))

static uint64_t count(const struct panel *p, uint8_t class)
{
	uint64_t n = 0;

	for (uint64_t i = 0; i < p->pages; i++)
		n += p->map[i] == class;
	return n;
}

static void put_class(FILE *f, const struct panel *p, const struct class *c)
{
	fprintf(f, "<path fill=\"%s\" d=\"", c->colour);
	for (uint64_t i = 0; i < p->pages;) {
		uint64_t end = i;

		while (end < p->pages && p->map[end] == c->class && (end == i || end % ROW))
			end++;
		if (end == i) {
			i++;
			continue;
		}
		fprintf(f, "M%u %uh%uv1h-%uz", (unsigned)(i % ROW), (unsigned)(i / ROW), (unsigned)(end - i),
			(unsigned)(end - i));
		i = end;
	}
	fprintf(f, "\"/>\n");
}

static void put_panel(FILE *f, const struct panel *p, double x, double y)
{
	double at = x;

	fprintf(f, "<text x=\"%.0f\" y=\"%.0f\" font-weight=\"bold\">%s</text>\n", x, y - 22, p->title);
	for (unsigned i = 0; i < NCLASSES; i++) {
		uint64_t n = count(p, classes[i].class);

		if (!n)
			continue;
		fprintf(f, "<rect x=\"%.0f\" y=\"%.0f\" width=\"8\" height=\"8\" fill=\"%s\"/>", at, y - 15,
			classes[i].colour);
		fprintf(f, "<text x=\"%.0f\" y=\"%.0f\" font-size=\"10\">%.1f MiB</text>\n", at + 11, y - 7,
			DEMO_MIB(n));
		at += 68;
	}
	fprintf(f, "<g transform=\"translate(%.0f %.0f) scale(%.1f)\">\n", x, y, CELL);
	for (unsigned i = 0; i < NCLASSES; i++)
		if (count(p, classes[i].class))
			put_class(f, p, &classes[i]);
	fprintf(f, "</g>\n");
}

static void put_text(FILE *f, const char *text)
{
	for (; *text; text++)
		if (*text == '<' || *text == '&')
			fprintf(f, "&#%d;", *text);
		else
			putc(*text, f);
}

static void put_legend(FILE *f, const char *title)
{
	double x = GAP;

	fprintf(f, "<text x=\"%d\" y=\"26\" font-size=\"16\" font-weight=\"bold\">", GAP);
	put_text(f, title);
	fputs("</text>\n", f);
	for (unsigned i = 0; i < NCLASSES; i++) {
		fprintf(f, "<rect x=\"%.0f\" y=\"38\" width=\"12\" height=\"12\" fill=\"%s\"/>", x,
			classes[i].colour);
		fprintf(f, "<text x=\"%.0f\" y=\"48\">%s</text>\n", x + 17, classes[i].name);
		x += 40 + 6.6 * (double)snprintf(NULL, 0, "%s", classes[i].name);
	}
}

int svg_write(const char *path, const char *title, const struct panel *panels, unsigned n, unsigned columns)
{
	uint64_t pages = 0;
	double width, height;
	FILE *f = fopen(path, "w");
	int err;

	if (!f)
		return -errno;
	for (unsigned i = 0; i < n; i++)
		pages = panels[i].pages > pages ? panels[i].pages : pages;
	width = ROW * CELL + GAP;
	height = (double)((pages + ROW - 1) / ROW) * CELL + 60;
	fprintf(f,
		"<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" "
		"font-family=\"sans-serif\" font-size=\"12\" stroke=\"none\" "
		"shape-rendering=\"crispEdges\">\n"
		"<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
		GAP + columns * width, TOP + (n + columns - 1) / columns * height);
	put_legend(f, title);
	for (unsigned i = 0; i < n; i++)
		put_panel(f, &panels[i], GAP + i % columns * width, TOP + i / columns * height);
	fprintf(f, "</svg>\n");
	err = ferror(f) ? -EIO : 0;
	return fclose(f) ? -errno : err;
}
