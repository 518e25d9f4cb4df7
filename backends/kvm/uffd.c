/* SPDX-License-Identifier: MIT */
/*
 * The ioctls of userfaultfd(2).
 *
 * Those that fill pages (struct fill) stop at the first page that they cannot
 * do and report how far they came; -EAGAIN with progress means only that. fill_range()
 * goes on from there, and steps over pages that are there already: another handler was
 * quicker, and whoever waits for such a page is woken. Not so for zeroes: there the
 * marker of a protected page that is not there counts as a page, and who waits
 * would only trap again.
 *
 * Locks: none.
 *
 * Source: userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst.
 */
#include <unistd.h>

#include "frame/pool.h"
#include "uffd.h"

#define FEATURES_WP ((uint64_t)(UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM))
#define FEATURES_EVENTS                                                                                      \
	((uint64_t)(UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE))

int uffd_handshake(int fd, uint64_t ask, uint64_t *known)
{
	struct uffdio_api api = {.api = UFFD_API, .features = ask};

	if (ioctl(fd, UFFDIO_API, &api) != 0)
		return -errno;
	if (known)
		*known = api.features;
	return 0;
}

static uint64_t wanted(const struct features *f, bool events)
{
	uint64_t want = UFFD_FEATURE_MISSING_SHMEM;

	if (feature_used(f, KAGE_KVM_UFFD_WP))
		want |= FEATURES_WP;
	if (feature_used(f, KAGE_KVM_UFFD_MINOR))
		want |= UFFD_FEATURE_MINOR_SHMEM;
	if (events)
		want |= FEATURES_EVENTS | UFFD_FEATURE_EVENT_FORK;
	return want & f->uffd_features;
}

int uffd_open(struct uffd *u, const struct features *f, bool events)
{
	uint64_t want = wanted(f, events);
	int err, fd;

	*u = (struct uffd){.fd = -1};
	if (!feature_used(f, KAGE_KVM_USERFAULTFD))
		return -EOPNOTSUPP;
	fd = features_uffd_new(f);
	if (fd < 0)
		return fd;
	err = uffd_handshake(fd, want, NULL);
	if (err == -EPERM && (want & UFFD_FEATURE_EVENT_FORK)) {
		want &= ~(
		    uint64_t)UFFD_FEATURE_EVENT_FORK; /* a failed handshake leaves the descriptor as it was */
		err = uffd_handshake(fd, want, NULL);
	}
	if (err) {
		close(fd);
		return err;
	}
	u->fd = fd;
	u->features = want;
	return 0;
}

void uffd_close(struct uffd *u)
{
	if (u->fd >= 0)
		close(u->fd);
	*u = (struct uffd){.fd = -1};
}

static struct uffdio_range range_of(const void *addr, size_t len)
{
	kage_assert((uintptr_t)addr % host_page_size() == 0 && len % host_page_size() == 0);
	return (struct uffdio_range){.start = (uintptr_t)addr, .len = len};
}

int uffd_register(const struct uffd *u, void *addr, size_t len, uint64_t mode)
{
	struct uffdio_register arg = {.range = range_of(addr, len), .mode = mode};

	return ioctl(u->fd, UFFDIO_REGISTER, &arg) == 0 ? 0 : -errno;
}

int uffd_unregister(const struct uffd *u, void *addr, size_t len)
{
	struct uffdio_range arg = range_of(addr, len);

	return ioctl(u->fd, UFFDIO_UNREGISTER, &arg) == 0 ? 0 : -errno;
}

/* Before Linux 6.4 the range has to lie in one mapping, and -ENOENT says that it does not: in halves then. */
static int write_protect(const struct uffd *u, char *addr, size_t len, uint64_t mode)
{
	struct uffdio_writeprotect arg = {.range = range_of(addr, len), .mode = mode};
	size_t half = ALIGN_DOWN(len / 2, host_page_size());
	int r = ioctl(u->fd, UFFDIO_WRITEPROTECT, &arg) == 0 ? 0 : -errno;

	if (r != -ENOENT || !half)
		return r;
	r = write_protect(u, addr, half, mode);
	return r ? r : write_protect(u, addr + half, len - half, mode);
}

int uffd_protect(const struct uffd *u, void *addr, size_t len)
{
	return write_protect(u, addr, len, UFFDIO_WRITEPROTECT_MODE_WP);
}

int uffd_unprotect(const struct uffd *u, void *addr, size_t len)
{
	return write_protect(u, addr, len, 0);
}

int uffd_wake(const struct uffd *u, void *addr, size_t len)
{
	struct uffdio_range arg = range_of(addr, len);

	return ioctl(u->fd, UFFDIO_WAKE, &arg) == 0 ? 0 : -errno;
}

/* -- filling pages ----------------------------------------------------------- */

struct fill {
	const struct uffd *u;
	const char *from; /* of a copy */
	uint64_t mode;
	bool step_over; /* what exists is done */
	/* Returns what the kernel says: bytes done or -errno. */
	int64_t (*call)(const struct fill *fill, char *addr, size_t len);
};

static int64_t call_continue(const struct fill *fill, char *addr, size_t len)
{
	struct uffdio_continue arg = {.range = range_of(addr, len), .mode = fill->mode};

	if (ioctl(fill->u->fd, UFFDIO_CONTINUE, &arg) == 0)
		return (int64_t)len;
	return arg.mapped > 0 && errno == EAGAIN ? arg.mapped : -errno;
}

static int64_t call_zeropage(const struct fill *fill, char *addr, size_t len)
{
	struct uffdio_zeropage arg = {.range = range_of(addr, len), .mode = fill->mode};

	if (ioctl(fill->u->fd, UFFDIO_ZEROPAGE, &arg) == 0)
		return (int64_t)len;
	return arg.zeropage > 0 && errno == EAGAIN ? arg.zeropage : -errno;
}

static int64_t call_copy(const struct fill *fill, char *addr, size_t len)
{
	struct uffdio_copy arg = {
	    .dst = (uintptr_t)addr, .src = (uintptr_t)fill->from, .len = len, .mode = fill->mode};

	if (ioctl(fill->u->fd, UFFDIO_COPY, &arg) == 0)
		return (int64_t)len;
	return arg.copy > 0 && errno == EAGAIN ? arg.copy : -errno;
}

static int64_t fill_range(struct fill fill, char *addr, size_t len)
{
	size_t done = 0;

	while (done < len) {
		int64_t n = fill.call(&fill, addr + done, len - done);

		if (n == -EEXIST && fill.step_over) {
			n = (int64_t)host_page_size();
			uffd_wake(fill.u, addr + done, (size_t)n);
		}
		if (n < 0)
			return done ? (int64_t)done : n;
		done += (size_t)n;
		if (fill.from)
			fill.from += n;
	}
	return (int64_t)done;
}

int64_t uffd_continue(const struct uffd *u, void *addr, size_t len, bool wp)
{
	struct fill fill = {
	    .u = u, .call = call_continue, .step_over = true, .mode = wp ? UFFDIO_CONTINUE_MODE_WP : 0};

	return fill_range(fill, addr, len);
}

int64_t uffd_zeropage(const struct uffd *u, void *addr, size_t len)
{
	struct fill fill = {.u = u, .call = call_zeropage};

	return fill_range(fill, addr, len);
}

int64_t uffd_copy(const struct uffd *u, void *addr, const void *from, size_t len, bool wp)
{
	struct fill fill = {
	    .u = u, .from = from, .call = call_copy, .step_over = true, .mode = wp ? UFFDIO_COPY_MODE_WP : 0};

	return fill_range(fill, addr, len);
}

int uffd_read(const struct uffd *u, struct uffd_msg *msg, unsigned n)
{
	ssize_t got;

	do
		got = read(u->fd, msg, n * sizeof(*msg));
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return errno == EAGAIN ? 0 : -errno;
	return (int)((size_t)got / sizeof(*msg));
}
