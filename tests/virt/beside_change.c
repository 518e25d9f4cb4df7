/* SPDX-License-Identifier: MIT */
/*
 * What a guest changes between two passes over its memory.
 *
 * A pass takes a digest of every page. First beside the running guest: the page that it says it wrote meanwhile is
 * among those that changed, no quiet one is. Then between two suspensions, where copies of the RAM file tell
 * exactly which pages changed; and within one, where none may.
 *
 * A round that the guest has announced when a pass ends may have been written before it, and so may the next one:
 * it is written first and announced then. The one after that is written after the pass.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "beside.h"

#define PAGES ((uint64_t)MIB * 256)

static bool pass(const struct guest *g, struct kage_digest *digest)
{
	int r = kage_page_digest(g->vm, g->arch->ram_gpa, g->bytes, digest);

	return !r || check(false, "%s: a pass over its memory: outcome %d", g->name, r);
}

static bool changed(const struct guest *g, const struct kage_digest *a, const struct kage_digest *b, uint64_t gpa)
{
	uint64_t i = (gpa - g->arch->ram_gpa) / KAGE_PAGE_SIZE;

	return i < PAGES && memcmp(&a[i], &b[i], sizeof(*a));
}

static unsigned count(const struct kage_digest *a, const struct kage_digest *b)
{
	unsigned n = 0;

	for (uint64_t i = 0; i < PAGES; i++)
		n += memcmp(&a[i], &b[i], sizeof(*a)) != 0;
	return n;
}

/* The page holds lines of what the guest said, or of a later round's text of the same page. */
static bool holds(const struct guest *g, const struct page *page)
{
	char bytes[KAGE_PAGE_SIZE], want[sizeof(page->text) + 1];
	size_t len = (size_t)snprintf(want, sizeof(want), "%s\n", page->text);

	if (kage_vm_read(g->vm, page->gpa, bytes, sizeof(bytes)))
		return false;
	for (size_t i = 0; i < sizeof(bytes); i++)
		if (bytes[i] != want[i % len])
			return false;
	return true;
}

static bool quiet_ones(const struct guest *g, const struct kage_digest *a, const struct kage_digest *b,
		       const char *when)
{
	unsigned quiet = 0, held = 0;

	for (unsigned i = 0; i < g->quiets; i++) {
		quiet += !changed(g, a, b, g->quiet[i].gpa);
		held += holds(g, &g->quiet[i]);
	}
	return check(g->quiets == QUIET && quiet == QUIET && held == QUIET,
		     "%s, %s: %u of %u quiet pages are unchanged, %u hold their pattern", g->name, when, quiet, QUIET,
		     held);
}

static bool beside_running(struct guest *g, struct kage_digest *a, struct kage_digest *b)
{
	const struct page *page;
	unsigned from;

	if (!pass(g, a))
		return false;
	guest_listen(g);
	from = g->round;
	if (!guest_wait(g, from + 2) || !pass(g, b))
		return false;
	page = &g->turn[(from + 2) % TURN];
	return check(page->round >= from + 2 && changed(g, a, b, page->gpa),
		     "%s, running: between two passes it wrote \"%s\" to gpa %" PRIx64
		     ", which is one of %u changed pages", g->name, page->text, page->gpa, count(a, b)) &
	       quiet_ones(g, a, b, "running");
}

static bool copy_ram(const struct guest *g, char *to)
{
	for (uint64_t at = 0; at < g->bytes;) {
		ssize_t n = pread(g->fd, to + at, g->bytes - at, (off_t)at);

		if (n <= 0)
			return check(false, "%s: its RAM cannot be read", g->name);
		at += (uint64_t)n;
	}
	return true;
}

/* What it has just written holds what it said; both passes and a comparison of two copies name the same pages. */
static bool compare(const struct guest *g, const struct kage_digest *a, const struct kage_digest *b, const char *was,
		    const char *is, unsigned from)
{
	unsigned wrong = 0, really = 0;
	bool named = true, held = true;

	for (uint64_t i = 0; i < PAGES; i++) {
		bool other = memcmp(was + i * KAGE_PAGE_SIZE, is + i * KAGE_PAGE_SIZE, KAGE_PAGE_SIZE) != 0;

		really += other;
		wrong += other != (memcmp(&a[i], &b[i], sizeof(*a)) != 0);
	}
	/* The last round may be followed by one that is written and not announced, but on another page. */
	for (unsigned round = from + 2; round <= g->round; round++) {
		const struct page *page = &g->turn[round % TURN];

		named &= changed(g, a, b, page->gpa);
		held &= page->round != round || round + TURN - 1 <= g->round || holds(g, page);
	}
	return check(!wrong && really && named && held,
		     "%s, suspended: the %u pages that changed are those that differ in copies of its RAM "
		     "(%u are not); rounds %u to %u are among them", g->name, really, wrong, from + 2, g->round);
}

static bool between_suspensions(struct guest *g, struct kage_digest *a, struct kage_digest *b, char *was, char *is)
{
	unsigned from;
	bool good;

	if (!guest_suspend(g) || !pass(g, a) || !pass(g, b) || !copy_ram(g, was))
		return false;
	good = check(count(a, b) == 0, "%s, suspended: of %" PRIu64 " pages none changes", g->name, PAGES);
	guest_listen(g);
	from = g->round;
	if (!guest_resume(g) || !guest_wait(g, from + 2) || !guest_suspend(g) || !pass(g, b) || !copy_ram(g, is))
		return false;
	guest_listen(g);
	good &= compare(g, a, b, was, is, from);
	good &= quiet_ones(g, a, b, "suspended");
	return guest_resume(g) && guest_wait(g, g->round + 1) && good;
}

bool change_show(struct guest *g)
{
	struct kage_digest *a = calloc(PAGES, sizeof(*a)), *b = calloc(PAGES, sizeof(*b));
	char *was = malloc(g->bytes), *is = malloc(g->bytes);
	bool good = a && b && was && is && beside_running(g, a, b) && between_suspensions(g, a, b, was, is);

	free(a);
	free(b);
	free(was);
	free(is);
	return good;
}
