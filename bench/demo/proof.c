/* SPDX-License-Identifier: MIT */
/*
 * The proof that every guest reads its own bytes and no others.
 *
 * A guest's whole memory is read through kage_vm_read() and hashed. An
 * original must give the digest that sha256sum(1) gave for its RAM file. In a
 * clone each page that it wrote must be the file's page with exactly the
 * clone's stamp in it; then the file's page is hashed in its place, so the
 * digest must be the file's again, which covers all other pages.
 *
 * The digests come from outside: this program hashes what the engine returns,
 * sha256sum hashed what QEMU left. A few threads, because 103 guests have
 * 16 GiB to hash; each claim belongs to one thread.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "demo.h"

#define MAX_THREADS 8
#define CHUNK_PAGES (DEMO_CHUNK >> KAGE_PAGE_SHIFT)

struct proof {
	struct claim *claims;
	unsigned n;
	unsigned next; /* atomic */
	unsigned done; /* atomic */
	uint8_t *buffers;
};

struct worker {
	struct proof *proof;
	uint8_t *chunk;
	pthread_t thread;
};

/* Checks a page that the clone wrote and puts the file's page in its place. */
static int check_written(const struct claim *claim, uint64_t page, uint8_t *bytes)
{
	uint8_t want[KAGE_PAGE_SIZE], original[KAGE_PAGE_SIZE], stamp[STAMP_BYTES];
	unsigned at = clones_stamp(claim->clone, page, stamp);
	int err = image_page(claim->image, page, original);

	if (err)
		return err;
	memcpy(want, original, sizeof(want));
	memcpy(want + at, stamp, STAMP_BYTES);
	if (memcmp(bytes, want, sizeof(want)))
		return -EILSEQ;
	memcpy(bytes, original, sizeof(original));
	return 0;
}

static int check_chunk(const struct claim *claim, uint64_t first, uint8_t *chunk)
{
	int err = 0;

	for (unsigned k = 0; claim->clones && !err && k < claim->clones->writes; k++) {
		uint64_t page = clones_page(claim->clones, claim->clone, k);

		if (page >= first && page - first < CHUNK_PAGES)
			err = check_written(claim, page, chunk + ((page - first) << KAGE_PAGE_SHIFT));
	}
	return err;
}

static int check_claim(const struct claim *claim, uint8_t *chunk)
{
	uint8_t digest[SHA256_BYTES];
	struct sha256 sha;

	sha256_init(&sha);
	for (uint64_t at = 0; at < claim->image->bytes; at += DEMO_CHUNK) {
		int err = kage_vm_read(claim->vm, at, chunk, DEMO_CHUNK);

		if (!err)
			err = check_chunk(claim, at >> KAGE_PAGE_SHIFT, chunk);
		if (err)
			return err > 0 ? -EFAULT : err;
		sha256_update(&sha, chunk, DEMO_CHUNK);
	}
	sha256_finish(&sha, digest);
	return memcmp(digest, claim->image->sha256, sizeof(digest)) ? -EBADMSG : 0;
}

static void *work(void *arg)
{
	struct worker *w = arg;
	struct proof *p = w->proof;
	unsigned i;

	while ((i = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->n) {
		p->claims[i].result = check_claim(&p->claims[i], w->chunk);
		__atomic_fetch_add(&p->done, 1, __ATOMIC_RELEASE);
	}
	return NULL;
}

int proof_run(struct claim *claims, unsigned n)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned threads = cpus < 1 ? 1 : cpus > MAX_THREADS ? MAX_THREADS : (unsigned)cpus;
	struct proof p = { .claims = claims, .n = n };
	struct worker w[MAX_THREADS];
	unsigned started = 0;
	int failed = 0, err = 0;

	p.buffers = malloc((size_t)threads * DEMO_CHUNK);
	if (!p.buffers)
		return -ENOMEM;
	for (; !err && started < threads; started += !err) {
		w[started] = (struct worker){ &p, p.buffers + (size_t)started * DEMO_CHUNK, 0 };
		err = pthread_create(&w[started].thread, NULL, work, &w[started]);
	}
	while (started && __atomic_load_n(&p.done, __ATOMIC_ACQUIRE) < n) {
		usleep(20000);
		host_progress("sha256 of %u guests: %u done", n, __atomic_load_n(&p.done, __ATOMIC_ACQUIRE));
	}
	for (unsigned i = 0; i < started; i++)
		pthread_join(w[i].thread, NULL);
	free(p.buffers);
	if (!started)
		return -err;
	for (unsigned i = 0; i < n; i++)
		failed += claims[i].result != 0;
	return failed;
}
