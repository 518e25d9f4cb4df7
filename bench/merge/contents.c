/* SPDX-License-Identifier: MIT */
/*
 * Contents by key. Words of a page go up in equal steps from one that its key
 * decides, so different pages differ in their first word: the best case for
 * whoever compares pages, which is ksmd with every node of its trees. Or contents are
 * the RAM files of real guests: what is a hole there is never touched.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "merge.h"

#define WORDS (PAGE / 8)
#define STEP  0x9e3779b97f4a7c15u

void page_fill(void *page, uint64_t key)
{
	uint64_t *w = page, first = mix(key + 1);

	for (uint64_t i = 0; i < WORDS; i++)
		w[i] = first + i * STEP;
}

static bool page_is(const void *page, uint64_t key)
{
	const uint64_t *w = page;
	uint64_t first = mix(key + 1), wrong = 0;

	for (uint64_t i = 0; i < WORDS; i++)
		wrong |= w[i] ^ (first + i * STEP);
	return wrong == 0;
}

static uint64_t key_unique(const struct contents *c, unsigned guest, uint64_t page)
{
	return c->seed + guest * c->pages + page;
}

static uint64_t key_equal(const struct contents *c, unsigned guest, uint64_t page)
{
	return c->seed + page;
}

static bool is_copy(const struct contents *c, uint64_t page)
{
	return mix(mix(page) + c->seed) % 4 == 0;
}

static uint64_t key_scattered(const struct contents *c, unsigned guest, uint64_t page)
{
	uint64_t of = page;

	for (uint64_t i = 1; is_copy(c, of); i++)
		of = mix(page * 64 + i) % c->pages;
	return c->seed + of;
}

struct contents contents_unique(unsigned guests, uint64_t bytes)
{
	return (struct contents){.guests = guests,
				 .pages = bytes / PAGE,
				 .seed = 1u << 30,
				 .key = key_unique,
				 .distinct = guests * (bytes / PAGE)};
}

struct contents contents_equal(unsigned guests, uint64_t bytes)
{
	return (struct contents){.guests = guests,
				 .pages = bytes / PAGE,
				 .seed = 1u << 30,
				 .key = key_equal,
				 .distinct = bytes / PAGE};
}

struct contents contents_scattered(uint64_t bytes)
{
	struct contents c = {.guests = 1, .pages = bytes / PAGE, .seed = 1u << 30, .key = key_scattered};

	for (uint64_t page = 0; page < c.pages; page++)
		c.distinct += !is_copy(&c, page);
	return c;
}

/* Marks what is no hole of the file. */
static void find_present(struct contents *c, unsigned guest, int fd)
{
	uint64_t *map = must_map(calloc(c->pages / 64 + 1, sizeof(*map)), "memory");
	off_t end, at = lseek(fd, 0, SEEK_DATA);

	for (; at >= 0; at = lseek(fd, end, SEEK_DATA)) {
		end = lseek(fd, at, SEEK_HOLE);
		for (uint64_t page = (uint64_t)at / PAGE; page * PAGE < (uint64_t)end; page++) {
			c->touched[guest] += !(map[page / 64] >> page % 64 & 1);
			map[page / 64] |= (uint64_t)1 << page % 64;
		}
	}
	c->present[guest] = map;
}

static int open_image(struct contents *c, const char *dir, unsigned guest)
{
	char path[4096];
	struct stat st;
	void *p;
	int fd;

	snprintf(path, sizeof(path), "%s/guest%u.ram", dir, guest + 1);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st))
		return -errno;
	if (!c->pages)
		c->pages = (uint64_t)st.st_size / PAGE;
	p = mmap(NULL, c->pages * PAGE, PROT_READ, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED || (uint64_t)st.st_size != c->pages * PAGE || !c->pages) {
		close(fd);
		return p == MAP_FAILED ? -errno : -EBADMSG;
	}
	c->image[guest] = p;
	find_present(c, guest, fd);
	close(fd);
	return 0;
}

int contents_images(struct contents *c, const char *dir, unsigned guests)
{
	int r = 0;

	*c = (struct contents){.flags = KAGE_REGION_NOHUGE};
	for (; r == 0 && c->guests < guests; c->guests += r == 0)
		r = open_image(c, dir, c->guests);
	if (r)
		contents_free(c);
	return r;
}

void contents_free(struct contents *c)
{
	for (unsigned g = 0; g < GUESTS_MAX; g++) {
		if (c->image[g])
			munmap((void *)(uintptr_t)c->image[g], c->pages * PAGE);
		free(c->present[g]);
	}
	free(c->overlay);
	*c = (struct contents){0};
}

bool contents_page(const struct contents *c, unsigned guest, uint64_t page, void *buf)
{
	if (c->key)
		page_fill(buf, c->key(c, guest, page));
	else if (c->present[guest][page / 64] >> page % 64 & 1)
		memcpy(buf, c->image[guest] + page * PAGE, PAGE);
	else
		return false;
	return true;
}

bool contents_is(const struct contents *c, unsigned guest, uint64_t page, const void *found)
{
	if (c->key)
		return page_is(found, c->key(c, guest, page));
	return !memcmp(found, c->image[guest] + page * PAGE, PAGE); /* a hole reads as zeroes */
}

void trace_add(struct trace *t, double wall, double cpu, uint64_t saved)
{
	if (t->n == t->room) {
		t->room = t->room ? 2 * t->room : 256;
		t->sample = must_map(realloc(t->sample, t->room * sizeof(*t->sample)), "memory");
	}
	t->sample[t->n++] = (struct sample){wall, cpu, saved};
}

void trace_free(struct trace *t)
{
	free(t->sample);
	*t = (struct trace){0};
}

const struct sample *trace_reach(const struct trace *t, double target)
{
	unsigned i = 0;

	while (i + 1 < t->n && (double)t->sample[i].saved < target)
		i++;
	return &t->sample[i];
}

const struct sample *trace_at(const struct trace *t, double cpu)
{
	unsigned i = 0;

	while (i + 1 < t->n && t->sample[i + 1].cpu <= cpu)
		i++;
	return &t->sample[i];
}
