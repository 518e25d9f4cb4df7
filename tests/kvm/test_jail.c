/* SPDX-License-Identifier: MIT */
/*
 * A VMM in a jail: what Kage needs of the kernel once a guest is to be attached.
 *
 * Engine, threads and descriptors come first; then a seccomp filter kills the
 * process at any system call that the section "System calls" of backends/README.md does not
 * list for the policy; then one guest is attached, run, merged, cloned, verified and
 * destroyed. The filter is made of the text of that section, so the text cannot go stale.
 *
 * structures
 *	rule		one system call, or one request of ioctl(2), of the section's tables
 *	scenario	a column of the first table: what is asked of the backend
 *	cell		a KVM VM with one vCPU, and that vCPU's thread
 *	member		a thread of the VMM, and whether it is inside of the library just now
 *	report		what the jailed process tells the test: memory that both share
 *
 * invariants
 *	J1. In the jail nothing is opened, no thread of the VMM's begins, and what the engine allocates comes
 *	    from `arena`: a call made inside of the library is Kage's own, not the C library's.
 *	J2. A recording run has the same steps as a jailed one. There every system call waits for a supervisor
 *	    thread, which notes it and lets it go on: Kage's, if the thread is inside of
 *	    the library or is one that Kage started, else the VMM's.
 *	J3. Recorded calls are listed, and what is listed with "yes" is recorded. So is the second table.
 *
 * locks
 *	cell.lock: its fields. Not held during a call of the library.
 *	arena_lock: inside of the engine's locks.
 *
 * Why not SIGSYS and a handler: threads of the C library begin and end with all signals blocked, and a
 * blocked SIGSYS kills. Why not ptrace(2): it needs a right that jailed test machines often lack.
 */
#include "kvm_test.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#ifndef USERFAULTFD_IOC_NEW /* Linux 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFDIO_POISON /* Linux 6.6 */
#define UFFDIO_POISON _IOWR(0xAA, 0x08, struct uffdio_zeropage)
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL /* Linux 6.1 */
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif
/* Linux 6.7: the argument is 12 words. */
#define SCAN_REQUEST _IOWR('f', 16, uint64_t[12])

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED true
#elif defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#else
#define SANITIZED false
#endif

#define KICK	    (SIGRTMIN + 2)
#define RAM	    (16 * MIB)
#define RING_BYTES  65536
#define FILE_GPA    (64 * MIB)
#define TRAP_GPA    (96 * MIB)
#define EQUAL_PAGES 64
#define STAMP_PAGES 64

/* -- names -------------------------------------------------------------------- */

struct name {
	const char *text;
	unsigned long value;
};

#define CALL(x)	   {#x, __NR_##x}
#define REQUEST(x) {#x, (uint32_t)(x)}

static const struct name calls[] = {
	CALL(brk), CALL(clock_gettime), CALL(clock_nanosleep), CALL(clone), CALL(clone3), CALL(close),
	CALL(dup3), CALL(eventfd2), CALL(exit), CALL(exit_group), CALL(fallocate), CALL(fcntl), CALL(fstat),
	CALL(fstatfs), CALL(ftruncate), CALL(futex), CALL(getpid), CALL(getrandom), CALL(gettid),
	CALL(ioctl), CALL(lseek), CALL(madvise), CALL(membarrier), CALL(memfd_create), CALL(mincore),
	CALL(mmap), CALL(mprotect), CALL(mremap), CALL(munmap), CALL(nanosleep), CALL(newfstatat),
	CALL(openat), CALL(poll), CALL(ppoll), CALL(pread64), CALL(prctl), CALL(preadv), CALL(prlimit64),
	CALL(pwrite64), CALL(pwritev), CALL(read), CALL(restart_syscall), CALL(rseq), CALL(rt_sigprocmask),
	CALL(rt_sigreturn), CALL(sched_getaffinity), CALL(sched_yield), CALL(set_robust_list),
	CALL(sysinfo), CALL(tgkill), CALL(userfaultfd), CALL(write),
};

static const struct name requests[] = {
	REQUEST(KVM_CHECK_EXTENSION), REQUEST(KVM_CLEAR_DIRTY_LOG), REQUEST(KVM_CREATE_VCPU),
	REQUEST(KVM_CREATE_VM), REQUEST(KVM_ENABLE_CAP), REQUEST(KVM_GET_API_VERSION),
	REQUEST(KVM_GET_DIRTY_LOG), REQUEST(KVM_GET_REGS), REQUEST(KVM_GET_SREGS), REQUEST(KVM_GET_SREGS2),
	REQUEST(KVM_GET_XSAVE),
	REQUEST(KVM_MEMORY_ENCRYPT_OP), REQUEST(KVM_RESET_DIRTY_RINGS), REQUEST(KVM_RUN),
	REQUEST(KVM_SET_CPUID2), REQUEST(KVM_SET_MP_STATE), REQUEST(KVM_SET_REGS), REQUEST(KVM_SET_SREGS),
	REQUEST(KVM_SET_USER_MEMORY_REGION), {"PAGEMAP_SCAN", SCAN_REQUEST}, REQUEST(UFFDIO_API),
	REQUEST(UFFDIO_CONTINUE), REQUEST(UFFDIO_COPY), REQUEST(UFFDIO_POISON), REQUEST(UFFDIO_REGISTER),
	REQUEST(UFFDIO_UNREGISTER), REQUEST(UFFDIO_WAKE), REQUEST(UFFDIO_WRITEPROTECT),
	REQUEST(UFFDIO_ZEROPAGE), REQUEST(USERFAULTFD_IOC_NEW),
};

static bool lookup(const struct name *names, size_t n, const char *text, size_t len, unsigned long *value)
{
	for (size_t i = 0; i < n; i++) {
		if (strlen(names[i].text) == len && !memcmp(names[i].text, text, len)) {
			*value = names[i].value;
			return true;
		}
	}
	return false;
}

static const char *name_of(const struct name *names, size_t n, unsigned long value)
{
	static char number[32];

	for (size_t i = 0; i < n; i++)
		if (names[i].value == value)
			return names[i].text;
	snprintf(number, sizeof(number), "%#lx", value);
	return number;
}

/* -- the tables ------------------------------------------------------------------ */

enum column { NATIVE, EXACT, NO_UFFD, COLUMNS };
enum need { NO, MAY, YES };

struct rule {
	unsigned long nr, request;  /* request: of ioctl only */
	bool vmm;		    /* of the second table */
	enum need need[COLUMNS];
};

static struct rule rule[256];
static unsigned rules;

static bool is_call(const struct rule *r, unsigned long nr, unsigned long request)
{
	return r->nr == nr && (nr != __NR_ioctl || r->request == request);
}

static void rule_print(const struct rule *r)
{
	printf("%s", name_of(calls, COUNT(calls), r->nr));
	if (r->nr == __NR_ioctl)
		printf(" %s", name_of(requests, COUNT(requests), r->request));
}

static const char *cell_text(const char *line, unsigned n, size_t *len)
{
	const char *end;

	for (unsigned i = 0; i <= n; i++) {
		line = strchr(line, '|');
		if (line == NULL)
			return NULL;
		line++;
	}
	end = strchr(line, '|');
	*len = end ? (size_t)(end - line) : 0;
	return end ? line : NULL;
}

static bool need_of(const char *line, unsigned n, enum need *need)
{
	size_t len = 0;
	const char *at = cell_text(line, n, &len);
	char text[8] = "";

	if (at == NULL || sscanf(at, "%7s", text) != 1)
		return false;
	*need = !strcmp(text, "yes") ? YES : !strcmp(text, "may") ? MAY : NO;
	return *need != NO || !strcmp(text, "-");
}

/* The words in back quotes of a row's first cell: calls, or `ioctl` and requests. */
static bool row_names(const char *line, const struct rule *like)
{
	size_t len = 0;
	const char *at = cell_text(line, 0, &len), *end = at + len, *word;
	bool request = false;

	for (; at < end; at = word + 1) {
		struct rule *r = &rule[rules];

		at = memchr(at, '`', (size_t)(end - at));
		word = at ? memchr(at + 1, '`', (size_t)(end - at - 1)) : NULL;
		if (word == NULL)
			return true;
		at++;
		*r = *like;
		r->nr = __NR_ioctl;
		if (word - at == 5 && !memcmp(at, "ioctl", 5)) {
			request = true;
			continue;
		}
		if (rules + 1 == COUNT(rule) ||
		    !(request ? lookup(requests, COUNT(requests), at, (size_t)(word - at), &r->request)
			      : lookup(calls, COUNT(calls), at, (size_t)(word - at), &r->nr)))
			return false;
		rules++;
	}
	return true;
}

/* A row of the first table has three cells of needs, one of the second has one for all. */
static bool row(const char *line, bool vmm)
{
	struct rule like = {.vmm = vmm};

	for (unsigned i = 0; i < COLUMNS; i++)
		if (!need_of(line, vmm ? 1 : i + 1, &like.need[i]))
			return false;
	return row_names(line, &like);
}

/* Reads the section. Returns NULL, or the line that is wrong. */
static const char *parse(FILE *f)
{
	static char line[1024];
	unsigned tables = 0;
	bool section = false;

	while (fgets(line, sizeof(line), f)) {
		if (line[0] == '#')
			section = !strcmp(line, "### System calls\n");
		if (!section || line[0] != '|' || !strncmp(line, "|---", 4))
			continue;
		if (!strncmp(line, "| system call", 13))
			tables++;
		else if (tables == 0 || tables > 2 || !row(line, tables == 2))
			return line;
	}
	return tables == 2 ? NULL : "there are not two tables";
}

/* -- the report and the threads ---------------------------------------------------- */

struct seen {
	unsigned long nr, request;
	unsigned kage, vmm; /* times */
};

struct report {
	char why[256]; /* what failed */
	char step[64];
	bool done;
	unsigned n;
	struct seen seen[256];
};

static struct report *report;

struct member {
	_Atomic pid_t tid;
	_Atomic bool inside;
};

enum { MAIN, VCPU_0, VCPU_1, SERVER, MEMBERS };
static struct member member[MEMBERS];
static __thread struct member *me;

static void join_in(unsigned i)
{
	me = &member[i];
	atomic_store(&me->tid, (pid_t)syscall(SYS_gettid));
}

/* A call of the library. */
#define kage(call)                                   \
	({                                           \
		int kage_result_;                    \
		atomic_store(&me->inside, true);     \
		kage_result_ = (call);               \
		atomic_store(&me->inside, false);    \
		kage_result_;                        \
	})

#define must(condition)                                              \
	do {                                                         \
		if (!(condition))                                    \
			die(__LINE__, #condition, -1);              \
	} while (0)
#define works(call)                                                  \
	do {                                                         \
		int works_result_ = kage(call);                      \
		if (works_result_ != 0)                              \
			die(__LINE__, #call, works_result_);        \
	} while (0)

static _Noreturn void die(int line, const char *what, int r)
{
	snprintf(report->why, sizeof(report->why), "line %d: %s: %d (errno %d)", line, what, r, errno);
	_exit(1);
}

static void engine_line(void *opaque, int level, const char *line)
{
	if (level == KAGE_LOG_ERROR && !report->why[0])
		snprintf(report->why, sizeof(report->why), "the engine logged: %s", line);
}

static void audit_fails(void *opaque, const char *line)
{
	snprintf(report->why, sizeof(report->why), "audit: %s", line);
}

/* -- memory for the engine -------------------------------------------------------- */

#define ARENA (256 * MIB)

static pthread_mutex_t arena_lock = PTHREAD_MUTEX_INITIALIZER;
static char *arena;
static size_t arena_used;
static void *arena_spare[40]; /* by the logarithm of the size; linked by their first word */

static unsigned arena_class(size_t bytes)
{
	unsigned class = 6;

	while (((size_t)1 << class) < bytes)
		class++;
	return class;
}

static void *arena_alloc(void *opaque, size_t bytes)
{
	unsigned class = arena_class(bytes);
	void *p;

	pthread_mutex_lock(&arena_lock);
	p = arena_spare[class];
	if (p != NULL) {
		arena_spare[class] = *(void **)p;
	} else if (arena_used + ((size_t)1 << class) <= ARENA) {
		p = arena + arena_used;
		arena_used += (size_t)1 << class;
	}
	pthread_mutex_unlock(&arena_lock);
	return p ? memset(p, 0, bytes) : NULL;
}

static void arena_free(void *opaque, void *p, size_t bytes)
{
	unsigned class = arena_class(bytes);

	pthread_mutex_lock(&arena_lock);
	*(void **)p = arena_spare[class];
	arena_spare[class] = p;
	pthread_mutex_unlock(&arena_lock);
}

/* -- virtual machines ----------------------------------------------------------------- */

struct cell {
	struct kage_vm *vm;
	struct kage_kvm *kvm;
	int fd, vcpu;
	struct kvm_run *run;
	struct vmm_ram ram; /* what `vmm` reads and writes: for the functions of payload.h */
	struct vmm vmm;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	unsigned holds;	 /* not 0: the vCPU does not run */
	bool running;	 /* may be in KVM_RUN */
	unsigned stops;	 /* reports at PAYLOAD_PORT_STOP */
	bool serve;	 /* `server` serves its traps */
};

static struct cell cell[2];

static struct kage_vm *vm_behind(struct vmm_ram *ram)
{
	return ((struct cell *)((char *)ram - offsetof(struct cell, ram)))->vm;
}

static int ram_read(struct vmm_ram *ram, uint64_t gpa, void *buf, size_t len)
{
	return kage(kage_vm_read(vm_behind(ram), gpa, buf, len));
}

static int ram_write(struct vmm_ram *ram, uint64_t gpa, const void *buf, size_t len)
{
	return kage(kage_vm_write(vm_behind(ram), gpa, buf, len));
}

static const struct vmm_ram_ops ram_ops = {.read = ram_read, .write = ram_write};

/* Registers are whole: waits until the vCPU may run. */
static void rest(struct cell *c)
{
	pthread_mutex_lock(&c->lock);
	c->running = false;
	pthread_cond_broadcast(&c->changed);
	while (c->holds)
		pthread_cond_wait(&c->changed, &c->lock);
	c->running = true;
	__atomic_store_n(&c->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&c->lock);
}

/* The next call waits for locks of the engine, whose owner may hold this vCPU: not running meanwhile. */
static void step_out(struct cell *c)
{
	pthread_mutex_lock(&c->lock);
	c->running = false;
	pthread_cond_broadcast(&c->changed);
	pthread_mutex_unlock(&c->lock);
}

static void exited(struct cell *c)
{
	if (c->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL) {
		step_out(c);
		works(kage_kvm_sync_dirty(c->kvm));
		rest(c);
		return;
	}
	if (c->run->exit_reason != KVM_EXIT_IO || c->run->io.port != PAYLOAD_PORT_STOP)
		die(__LINE__, "exit", (int)c->run->exit_reason);
	pthread_mutex_lock(&c->lock);
	c->stops++;
	pthread_cond_broadcast(&c->changed);
	pthread_mutex_unlock(&c->lock);
}

static void failed(struct cell *c, int err)
{
	step_out(c);
	must(kage(kage_kvm_run_failed(c->kvm, c->vcpu, c->run, err)) == KAGE_RETRY);
}

static void *vcpu_main(void *arg)
{
	struct cell *c = arg;

	join_in(VCPU_0 + (unsigned)(c - cell));
	for (rest(c);;) {
		if (ioctl(c->vcpu, KVM_RUN, NULL) == 0) {
			exited(c);
			continue;
		}
		if (errno != EINTR)
			failed(c, errno);
		rest(c);
	}
	return NULL;
}

static void hold(struct cell *c)
{
	pthread_mutex_lock(&c->lock);
	c->holds++;
	if (c->running) {
		__atomic_store_n(&c->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		pthread_kill(c->thread, KICK);
	}
	while (c->running)
		pthread_cond_wait(&c->changed, &c->lock);
	pthread_mutex_unlock(&c->lock);
}

static void release(struct cell *c)
{
	pthread_mutex_lock(&c->lock);
	c->holds--;
	pthread_cond_broadcast(&c->changed);
	pthread_mutex_unlock(&c->lock);
}

/* Callbacks of the library: not inside of it. A thread of Kage's is no member. */
static int pause_cell(void *opaque)
{
	bool was = me != NULL && atomic_exchange(&me->inside, false);

	hold(opaque);
	if (was)
		atomic_store(&me->inside, true);
	return 0;
}

static void resume_cell(void *opaque)
{
	bool was = me != NULL && atomic_exchange(&me->inside, false);

	release(opaque);
	if (was)
		atomic_store(&me->inside, true);
}

/* Serves the traps of cell 1, where they are not the helper's. */
static void *server_main(void *arg)
{
	struct cell *c = &cell[1];
	int r;

	join_in(SERVER);
	for (;;) {
		pthread_mutex_lock(&c->lock);
		while (!c->serve)
			pthread_cond_wait(&c->changed, &c->lock);
		pthread_mutex_unlock(&c->lock);
		r = kage(kage_kvm_trap_run(c->kvm, 20));
		must(r >= 0 || r == -ENOENT);
		if (r >= 0)
			continue;
		pthread_mutex_lock(&c->lock);
		c->serve = false;
		pthread_cond_broadcast(&c->changed);
		pthread_mutex_unlock(&c->lock);
	}
	return NULL;
}

/* -- before the jail --------------------------------------------------------------------- */

struct scenario {
	const char *name;
	uint32_t policy, masked;
	enum column column;
};

static const struct scenario scenario[] = {
	{"native", KAGE_KVM_NATIVE, 0, NATIVE},
	{"exact", KAGE_KVM_EXACT, 0, EXACT},
	{"native without userfaultfd", KAGE_KVM_NATIVE, 1u << KAGE_KVM_USERFAULTFD, NO_UFFD},
};

/* What is opened before the jail and handed in. */
static struct {
	int kvm, pagemap, maps, uffd, dump, file;
	int run_len;
	struct kvm_cpuid2 *cpuid;
	char *image;
	size_t image_len;
	uint32_t manual; /* what KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 can be given */
	uint32_t ring;	 /* which capability makes dirty rings; 0: none */
} given;

static void kicked(int sig)
{
}

/* The capability that gives rings of RING_BYTES, or 0. */
static uint32_t ring_cap(int kvm)
{
#if defined(__aarch64__)
	return 0; /* not used there, by design */
#endif
	if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL) >= RING_BYTES)
		return KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
	if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING) >= RING_BYTES)
		return KVM_CAP_DIRTY_LOG_RING;
	return 0;
}

static void open_all(const struct scenario *s)
{
	const struct payload_config small = {.map = 16 * MIB, .small_pages = true};
	const struct sigaction sa = {.sa_handler = kicked};
	const struct rlimit none = {0, 0};
	unsigned n = 256;

	setrlimit(RLIMIT_CORE, &none);
	sigaction(KICK, &sa, NULL);
	given.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	given.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	given.maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	given.uffd = s->masked ? -1 : open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	given.dump = memfd_create("dump", MFD_CLOEXEC);
	given.file = memfd_create("file", MFD_CLOEXEC);
	must(given.kvm >= 0 && given.pagemap >= 0 && given.maps >= 0 && (s->masked || given.uffd >= 0));
	must(given.dump >= 0 && given.file >= 0 && ftruncate(given.file, 2 * MIB) == 0);
	given.run_len = ioctl(given.kvm, KVM_GET_VCPU_MMAP_SIZE, NULL);
	given.manual = (uint32_t)ioctl(given.kvm, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	given.ring = ring_cap(given.kvm);
	given.cpuid = calloc(1, sizeof(*given.cpuid) + n * sizeof(given.cpuid->entries[0]));
	must(given.run_len > 0 && given.cpuid != NULL);
	given.cpuid->nent = n;
	must(ioctl(given.kvm, KVM_GET_SUPPORTED_CPUID, given.cpuid) == 0);
	given.image = payload_image(&small, &given.image_len);
	must(given.image != NULL);
}

static void make_engine(void)
{
	const struct kage_alloc alloc = {arena_alloc, arena_free, NULL};

	arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	must(arena != MAP_FAILED);
	works(kage_engine_create(KAGE_CFG(kage_engine_config, .backing = KAGE_BACKING_MEMFD,
					  .log = engine_line, .alloc = alloc), &engine));
}

static void start_threads(void)
{
	pthread_t server;

	for (unsigned i = 0; i < COUNT(cell); i++) {
		struct cell *c = &cell[i];

		c->ram.ops = &ram_ops;
		c->vmm.ram = &c->ram;
		c->vmm.vcpus = 1;
		c->holds = 1;
		pthread_mutex_init(&c->lock, NULL);
		pthread_cond_init(&c->changed, NULL);
		must(pthread_create(&c->thread, NULL, vcpu_main, c) == 0);
	}
	must(pthread_create(&server, NULL, server_main, NULL) == 0);
	while (!member[VCPU_0].tid || !member[VCPU_1].tid || !member[SERVER].tid)
		sleep_ms(1);
}

/* -- in the jail --------------------------------------------------------------------------- */

static void step(const char *name)
{
	snprintf(report->step, sizeof(report->step), "%s", name);
}

static void sane(void)
{
	struct kage_audit a = {.size = sizeof(a), .report = audit_fails};

	works(kage_engine_audit(engine, &a));
	must(!report->why[0]);
}

/* Cell 0 has a dirty log, cell 1 rings. */
static void make_vm(struct cell *c)
{
	struct kvm_enable_cap log = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args[0] = given.manual & 1};
	struct kvm_enable_cap ring = {.cap = given.ring, .args[0] = RING_BYTES};
	bool rings = c == &cell[1] && given.ring;
	void *run;

	c->fd = ioctl(given.kvm, KVM_CREATE_VM, 0);
	must(c->fd >= 0);
	must(ioctl(c->fd, KVM_ENABLE_CAP, rings ? &ring : &log) == 0 || (!rings && !given.manual));
	c->vcpu = ioctl(c->fd, KVM_CREATE_VCPU, 0);
	must(c->vcpu >= 0 && ioctl(c->vcpu, KVM_SET_CPUID2, given.cpuid) == 0);
	run = mmap(NULL, (size_t)given.run_len, PROT_READ | PROT_WRITE, MAP_SHARED, c->vcpu, 0);
	must(run != MAP_FAILED);
	c->run = run;
}

static void attach_cell(struct cell *c, const struct scenario *s)
{
	struct kage_kvm_config config = {
		.size = sizeof(config), .policy = s->policy, .feature_mask = mask | s->masked,
		.flags = KAGE_KVM_NO_OPEN | KAGE_KVM_PAGEMAP_FD | KAGE_KVM_MAPS_FD |
			 (s->masked ? 0 : KAGE_KVM_UFFD_FD),
		.pagemap_fd = given.pagemap, .maps_fd = given.maps, .uffd_fd = given.uffd,
		.pause = pause_cell, .resume = resume_cell, .opaque = c,
		.dirty_ring_bytes = c == &cell[1] && given.ring ? RING_BYTES : 0,
	};
	struct kage_kvm_info info = {.size = sizeof(info)};

	works(kage_kvm_attach(c->vm, c->fd, &config, &c->kvm));
	works(kage_kvm_info(c->kvm, &info));
	must(info.policy == s->policy);
	must(info.feature[KAGE_KVM_USERFAULTFD].used == !s->masked);
	if (config.dirty_ring_bytes)
		works(kage_kvm_add_vcpu(c->kvm, c->vcpu));
}

static void load(struct cell *c)
{
	static const char zeroes[4096];
	struct vmm_identity identity = {.id = 1, .seed = 11};
	struct payload_mailbox mb = {.program = PAYLOAD_STAMP, .base = 4 * MIB, .pages = STAMP_PAGES,
				     .words = 8, .log = 5 * MIB, .seed = 1};
	struct vmm_entry entry = payload_entry(0);
	struct vmm_vcpu vcpu = {.fd = c->vcpu};

	for (size_t at = 0; at < given.image_len; at += PAGE)
		if (memcmp(given.image + at, zeroes, PAGE))
			works(kage_vm_write(c->vm, at, given.image + at, PAGE));
	works(kage_vm_write(c->vm, PAYLOAD_IDENTITY, &identity, sizeof(identity)));
	must(payload_put(&c->vmm, 0, &mb) == 0);
	must(vmm_vcpu_enter(&vcpu, &entry) == 0);
}

/* The guest has stamped `n` pages more. */
static void goes_on(struct cell *c, uint64_t n)
{
	uint64_t until = payload_peek(&c->vmm, 0, count) + n;

	for (unsigned ms = 0; payload_peek(&c->vmm, 0, count) < until; ms++) {
		must(ms < 20000);
		sleep_ms(1);
	}
}

static void dirty(struct cell *c)
{
	static uint64_t bitmap[RAM / PAGE / 64];
	struct kage_dirty *log = NULL;

	works(kage_dirty_open(c->vm, KAGE_CFG(kage_dirty_config, .flags = KAGE_DIRTY_FINE), &log));
	goes_on(c, 200);
	must(kage(kage_dirty_collect(log, 0, RAM, bitmap, sizeof(bitmap))) > 0);
	goes_on(c, 200);
	must(kage(kage_dirty_collect(log, 0, RAM, bitmap, sizeof(bitmap))) > 0);
	kage((kage_dirty_close(log), 0));
}

/* Pages of equal contents, merged while the guest runs; then one is written through the window. */
static void merge(struct cell *c, const struct scenario *s)
{
	const uint64_t gpa = 8 * MIB;
	uint64_t merged = 0, word = 0;
	char page[4096];
	volatile uint64_t *window;

	memset(page, 0x5a, sizeof(page));
	for (unsigned i = 0; i < EQUAL_PAGES; i++)
		works(kage_vm_write(c->vm, gpa + i * PAGE, page, sizeof(page)));
	works(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)));
	for (unsigned i = 0; i < 32 && merged < EQUAL_PAGES - 1; i++) {
		struct kage_progress p = {.size = sizeof(p)};

		works(kage_engine_step(engine, NULL, &p));
		merged += p.pages_merged;
	}
	must(merged >= EQUAL_PAGES - 1);
	works(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = 0)));
	window = kage_kvm_window(c->kvm, gpa, 2 * PAGE);
	must(window != NULL && window[512] == 0x5a5a5a5a5a5a5a5a);
	window[0] = 1;
	works(kage_vm_mark_dirty(c->vm, gpa, 8));
	works(kage_vm_read(c->vm, gpa, &word, sizeof(word)));
	must(word == 1 && window[512] == 0x5a5a5a5a5a5a5a5a);
}

static void copy_registers(struct cell *from, struct cell *to)
{
	struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
	struct kvm_sregs sregs;
	struct kvm_regs regs;

	must(ioctl(from->vcpu, KVM_GET_SREGS, &sregs) == 0 && ioctl(from->vcpu, KVM_GET_REGS, &regs) == 0);
	must(ioctl(to->vcpu, KVM_SET_SREGS, &sregs) == 0 && ioctl(to->vcpu, KVM_SET_REGS, &regs) == 0);
	/* Without chips in the kernel there may be one state only. */
	ioctl(to->vcpu, KVM_SET_MP_STATE, &runnable);
}

/* Even pages have contents, odd ones stay zero. */
static int touch(void *opaque, uint64_t gpa, void *page)
{
	if (!(gpa / PAGE % 2))
		memset(page, 0x33, PAGE);
	return 0;
}

static void serve(struct cell *c)
{
	must(kage(kage_kvm_trap_fd(c->kvm)) >= 0);
	pthread_mutex_lock(&c->lock);
	c->serve = true;
	pthread_cond_broadcast(&c->changed);
	pthread_mutex_unlock(&c->lock);
}

static void clone_cell(struct cell *parent, struct cell *child, const struct scenario *s)
{
	struct vmm_identity identity = {.id = 2, .parent = 1, .generation = 1, .seed = 22};

	make_vm(child);
	hold(parent);
	works(kage_vm_clone(parent->vm, NULL, &child->vm));
	copy_registers(parent, child);
	release(parent);
	if (!s->masked)
		works(kage_vm_map(child->vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_TRAP, .gpa = TRAP_GPA,
						      .len = 2 * MIB, .touch = touch)));
	attach_cell(child, s);
	works(kage_vm_write(child->vm, PAYLOAD_IDENTITY, &identity, sizeof(identity)));
	if (s->policy == KAGE_KVM_EXACT)
		serve(child);
	release(child);
	goes_on(child, 200);
	goes_on(parent, 200);
}

/* Changes of the guest's memory. It stands while protection changes: KVM cannot cut a slot in place. */
static void change(struct cell *c)
{
	const uint64_t gpa = 8 * MIB;
	uint64_t word = 1;
	struct iovec iov[4];
	unsigned n = COUNT(iov);

	works(kage_vm_advise(c->vm, gpa, 16 * PAGE, KAGE_ADVICE_DISCARD));
	works(kage_vm_read(c->vm, gpa, &word, sizeof(word)));
	must(word == 0);
	works(kage_vm_advise(c->vm, gpa, 4 * PAGE, KAGE_ADVICE_WILLNEED));
	hold(c);
	works(kage_vm_protect(c->vm, gpa, 4 * PAGE, KAGE_READ));
	must(kage(kage_vm_write(c->vm, gpa, &word, sizeof(word))) == KAGE_MMIO);
	works(kage_vm_protect(c->vm, gpa, 4 * PAGE, KAGE_READ | KAGE_WRITE | KAGE_EXEC));
	release(c);
	works(kage_vm_pin(c->vm, gpa, 8 * PAGE, 0, iov, &n));
	must(n >= 1);
	memset(iov[0].iov_base, 7, iov[0].iov_len);
	works(kage_vm_mark_dirty(c->vm, gpa, 8 * PAGE));
	works(kage_vm_unpin(c->vm, gpa, 8 * PAGE));
}

static void file(struct cell *c)
{
	uint64_t word = 3;

	works(kage_vm_map(c->vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_FILE, .flags = KAGE_REGION_FD,
					  .gpa = FILE_GPA, .len = 2 * MIB, .fd = given.file)));
	works(kage_vm_write(c->vm, FILE_GPA, &word, sizeof(word)));
	works(kage_vm_read(c->vm, FILE_GPA + PAGE, &word, sizeof(word)));
	must(word == 0);
	works(kage_vm_unmap(c->vm, FILE_GPA, 2 * MIB));
}

/* Touched through the VMM's window, which waits for the server. */
static void trapped(struct cell *c)
{
	volatile uint64_t *window;

	serve(c);
	window = kage_kvm_window(c->kvm, TRAP_GPA, 2 * MIB);
	must(window != NULL);
	must(window[0] == 0x3333333333333333 && window[512] == 0);
	window[3 * 512] = 5;
	window[4 * 512] = 5;
	must(window[4 * 512 + 1] == 0x3333333333333333);
	works(kage_vm_mark_dirty(c->vm, TRAP_GPA, 2 * MIB));
}

static void translate(struct cell *c)
{
	struct kage_vcpu *vcpu;
	struct kage_fault fault = {0};

	hold(c);
	works(kage_vcpu_create(c->vm, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &vcpu));
	works(kage_kvm_load_regs(vcpu, c->vcpu));
	works(kage_vcpu_translate(vcpu, 4 * MIB + 5, KAGE_READ, &fault));
	must(fault.gpa == 4 * MIB + 5);
	kage((kage_vcpu_destroy(vcpu), 0));
	release(c);
}

static void look(struct cell *c)
{
	static uint8_t class[RAM / PAGE];
	struct kage_stats stats = {.size = sizeof(stats)};

	works(kage_stats_get(engine, c->vm, &stats));
	works(kage_stats_get(engine, NULL, &stats));
	works(kage_page_map(c->vm, 0, RAM, class));
	works(kage_dump(c->vm, KAGE_DUMP_PRIMARY, KAGE_DUMP_TEXT, given.dump));
	works(kage_dump(c->vm, KAGE_DUMP_REGIONS, KAGE_DUMP_JSON, given.dump));
	works(kage_dump(c->vm, KAGE_DUMP_MIRROR, KAGE_DUMP_TEXT, given.dump));
	sane();
}

static void reconcile(struct cell *c)
{
	must(kage(kage_kvm_reconcile(c->kvm, 0)) >= 0);
	must(kage(kage_kvm_reconcile(c->kvm, KAGE_KVM_ADOPT)) >= 0);
	works(kage_engine_step(engine, NULL, NULL));
}

/* The guest stops, and both sides verify what it wrote. */
static void verify(struct cell *c)
{
	struct payload_mailbox mb;

	must(payload_poke(&c->vmm, 0, stop, 1) == 0);
	pthread_mutex_lock(&c->lock);
	while (!c->stops)
		pthread_cond_wait(&c->changed, &c->lock);
	pthread_mutex_unlock(&c->lock);
	hold(c);
	must(payload_get(&c->vmm, 0, &mb) == 0);
	must(mb.errors == 0 && mb.audited == STAMP_PAGES && mb.count > 0);
	must(payload_check_stamps(&c->vmm, 0) == 0);
	must(c == &cell[0] || mb.reseeded == 1);
}

static void free_cell(struct cell *c)
{
	works(kage_kvm_detach(c->kvm));
	must(munmap(c->run, (size_t)given.run_len) == 0);
	must(close(c->vcpu) == 0 && close(c->fd) == 0);
	works(kage_vm_destroy(c->vm));
}

static void give_up_traps(struct cell *c)
{
	works(kage_kvm_trap_abandon(c->kvm));
	pthread_mutex_lock(&c->lock);
	while (c->serve)
		pthread_cond_wait(&c->changed, &c->lock);
	pthread_mutex_unlock(&c->lock);
}

/* The life of a guest and of its clone. */
static void life(const struct scenario *s)
{
	bool exact = s->policy == KAGE_KVM_EXACT;
	struct cell *a = &cell[0], *b = &cell[1];

	step("create and attach");
	make_vm(a);
	works(kage_vm_create(engine, NULL, &a->vm));
	works(kage_vm_map(a->vm, KAGE_CFG(kage_region, .flags = KAGE_REGION_MERGEABLE, .len = RAM)));
	attach_cell(a, s);
	if (exact)
		works(kage_kvm_helper_start(a->kvm));
	step("run");
	load(a);
	release(a);
	goes_on(a, 200);
	step("dirty log");
	dirty(a);
	step("merge");
	merge(a, s);
	step("clone");
	clone_cell(a, b, s);
	dirty(b);
	step("change");
	change(a);
	change(b);
	file(b);
	if (!s->masked)
		trapped(b);
	step("reconcile");
	reconcile(a);
	reconcile(b);
	step("policy");
	if (exact) {
		works(kage_kvm_set_policy(a->kvm, KAGE_KVM_NATIVE));
		goes_on(a, 200);
		works(kage_kvm_set_policy(a->kvm, KAGE_KVM_EXACT));
	}
	step("look");
	translate(b);
	look(a);
	look(b);
	step("verify");
	goes_on(a, 200);
	goes_on(b, 200);
	verify(a);
	verify(b);
	step("destroy");
	if (exact)
		works(kage_kvm_helper_stop(a->kvm));
	if (!s->masked)
		give_up_traps(b);
	free_cell(a);
	sane();
	free_cell(b);
	works(kage_engine_step(engine, NULL, NULL));
	works(kage_engine_destroy(engine));
	must(!report->why[0]);
}

/* -- filters --------------------------------------------------------------------------------- */

struct program {
	struct sock_filter code[1024];
	unsigned n;
};

static void emit(struct program *p, uint16_t code, uint8_t jt, uint8_t jf, uint32_t k)
{
	p->code[p->n++] = (struct sock_filter){code, jt, jf, k};
}

static void load_word(struct program *p, size_t offset)
{
	emit(p, BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)offset);
}

/* If the word is `value`: `action`. */
static void on(struct program *p, unsigned long value, uint32_t action)
{
	emit(p, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, (uint32_t)value);
	emit(p, BPF_RET | BPF_K, 0, 0, action);
}

static void begin(struct program *p)
{
	p->n = 0;
	load_word(p, offsetof(struct seccomp_data, arch));
	emit(p, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, AUDIT_ARCH_X86_64);
	emit(p, BPF_RET | BPF_K, 0, 0, SECCOMP_RET_KILL_PROCESS);
	load_word(p, offsetof(struct seccomp_data, nr));
}

static bool allowed(unsigned i, const struct scenario *s, int except)
{
	return (int)i != except && rule[i].need[s->column] != NO;
}

/* Everything that is listed for the scenario, but rule `except` (-1: none). */
static void program_kill(struct program *p, const struct scenario *s, int except)
{
	begin(p);
	for (unsigned i = 0; i < rules; i++)
		if (rule[i].nr != __NR_ioctl && allowed(i, s, except))
			on(p, rule[i].nr, SECCOMP_RET_ALLOW);
	emit(p, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, __NR_ioctl);
	emit(p, BPF_RET | BPF_K, 0, 0, SECCOMP_RET_KILL_PROCESS);
	load_word(p, offsetof(struct seccomp_data, args[1])); /* the low half: what the kernel looks at */
	for (unsigned i = 0; i < rules; i++)
		if (rule[i].nr == __NR_ioctl && allowed(i, s, except))
			on(p, rule[i].request, SECCOMP_RET_ALLOW);
	emit(p, BPF_RET | BPF_K, 0, 0, SECCOMP_RET_KILL_PROCESS);
}

/* Everything waits for the supervisor, but what a signal that comes meanwhile would spoil. */
static void program_ask(struct program *p)
{
	begin(p);
	on(p, __NR_rt_sigreturn, SECCOMP_RET_ALLOW);
	on(p, __NR_exit, SECCOMP_RET_ALLOW);
	on(p, __NR_exit_group, SECCOMP_RET_ALLOW);
	emit(p, BPF_RET | BPF_K, 0, 0, SECCOMP_RET_USER_NOTIF);
}

static int install(const struct program *p, unsigned flags)
{
	const struct sock_fprog prog = {(unsigned short)p->n, (struct sock_filter *)p->code};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return -1;
	return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &prog);
}

/* -- the supervisor ---------------------------------------------------------------------------- */

static _Atomic int listener = -1;
static _Atomic bool recording;

static bool of_kage(pid_t tid)
{
	for (unsigned i = 0; i < MEMBERS; i++)
		if (atomic_load(&member[i].tid) == tid)
			return atomic_load(&member[i].inside);
	return true;
}

static void note(const struct seccomp_notif *n)
{
	unsigned long nr = (unsigned long)n->data.nr;
	unsigned long request = nr == __NR_ioctl ? (uint32_t)n->data.args[1] : 0;
	unsigned i = 0;

	while (i < report->n && (report->seen[i].nr != nr || report->seen[i].request != request))
		i++;
	if (i == COUNT(report->seen))
		return;
	if (i == report->n)
		report->seen[report->n++] = (struct seen){nr, request, 0, 0};
	if (of_kage((pid_t)n->pid))
		report->seen[i].kage++;
	else
		report->seen[i].vmm++;
}

static void *supervisor_main(void *arg)
{
	struct seccomp_notif n;
	struct seccomp_notif_resp resp;

	while (atomic_load(&listener) < 0)
		sleep_ms(1);
	for (;;) {
		memset(&n, 0, sizeof(n));
		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &n) != 0)
			continue; /* EINTR, or a signal took the call back */
		if (atomic_load(&recording))
			note(&n);
		resp = (struct seccomp_notif_resp){.id = n.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
		ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &resp);
	}
	return NULL;
}

/* -- the jailed process --------------------------------------------------------------------------- */

#define NO_LISTENER 77

static _Noreturn void jailed(const struct scenario *s, int except)
{
	static struct program p;

	join_in(MAIN);
	open_all(s);
	make_engine();
	start_threads();
	program_kill(&p, s, except);
	must(install(&p, SECCOMP_FILTER_FLAG_TSYNC) == 0);
	life(s);
	report->done = true;
	_exit(0);
}

static _Noreturn void recorded(const struct scenario *s)
{
	static struct program p;
	pthread_t supervisor;
	int fd;

	join_in(MAIN);
	open_all(s);
	make_engine();
	must(pthread_create(&supervisor, NULL, supervisor_main, NULL) == 0);
	program_ask(&p);
	fd = install(&p, SECCOMP_FILTER_FLAG_NEW_LISTENER);
	if (fd < 0)
		_exit(NO_LISTENER);
	atomic_store(&listener, fd);
	start_threads();
	atomic_store(&recording, true);
	life(s);
	atomic_store(&recording, false);
	report->done = true;
	_exit(0);
}

static int in_child(const struct scenario *s, bool record, int except)
{
	int status;
	pid_t pid;

	memset(report, 0, sizeof(*report));
	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		if (record)
			recorded(s);
		jailed(s, except);
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	return status;
}

/* -- tests ---------------------------------------------------------------------------------------- */

static const char *impossible(const struct scenario *s)
{
	const uint32_t kill = SECCOMP_RET_KILL_PROCESS;

	if (SANITIZED)
		return "a sanitizer's run time makes system calls of its own";
	if (syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &kill))
		return "there is no seccomp(2), or it is forbidden";
	if (!has(KAGE_KVM_PAGEMAP))
		return "there is no /proc/self/pagemap";
	if (!s->masked && access("/dev/userfaultfd", R_OK | W_OK))
		return "/dev/userfaultfd cannot be opened";
	if (!s->masked && !can_exact())
		return "userfaultfd lacks something";
	return NULL;
}

/* What the tables list is what a host with all features does. */
static bool all_features(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	bool rings = ring_cap(kvm) != 0;

	close(kvm);
	return rings && can_exact() && has(KAGE_KVM_PAGEMAP_SCAN) && has(KAGE_KVM_DIRTY_LOG) &&
	       has(KAGE_KVM_READONLY_SLOT);
}

static void check_done(const struct scenario *s, int status)
{
	bool refused = WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS;

	ck_assert_msg(!refused, "%s: step \"%s\": a call that backends/README.md does not list", s->name,
		      report->step);
	ck_assert_msg(status == 0 && report->done, "%s: step \"%s\": status %#x, %s", s->name, report->step,
		      status, report->why);
}

START_TEST(lives_in_the_jail)
{
	const struct scenario *s = &scenario[_i];
	const char *why = impossible(s);

	need(why == NULL, why);
	check_done(s, in_child(s, false, -1));
}
END_TEST

/* J3, for one call and one table. Returns whether they agree. */
static bool agree(const struct scenario *s, bool vmm, unsigned long nr, unsigned long request, unsigned times)
{
	const struct rule call = {.nr = nr, .request = request};
	enum need listed = NO;

	for (unsigned i = 0; i < rules; i++)
		if (rule[i].vmm == vmm && is_call(&rule[i], nr, request))
			listed = rule[i].need[s->column];
	if (times ? listed != NO : listed != YES)
		return true;
	printf("%s: %s: ", s->name, vmm ? "the VMM" : "Kage");
	rule_print(&call);
	printf(times ? " is called (%u times) and not listed\n" : " is listed and not called\n", times);
	return false;
}

static unsigned times_seen(const struct rule *r, bool vmm)
{
	for (unsigned i = 0; i < report->n; i++)
		if (is_call(r, report->seen[i].nr, report->seen[i].request))
			return vmm ? report->seen[i].vmm : report->seen[i].kage;
	return 0;
}

/* What program_ask() lets pass. */
static bool unseen(unsigned long nr)
{
	return nr == __NR_rt_sigreturn || nr == __NR_exit || nr == __NR_exit_group;
}

START_TEST(lists_are_exact)
{
	const struct scenario *s = &scenario[_i];
	const char *why = impossible(s);
	unsigned wrong = 0;
	int status;

	need(why == NULL, why);
	need(all_features(), "the tables say what happens where all features are there");
	status = in_child(s, true, -1);
	need(!WIFEXITED(status) || WEXITSTATUS(status) != NO_LISTENER, "no listener for seccomp can be had");
	check_done(s, status);
	for (unsigned i = 0; i < report->n; i++) {
		const struct seen *n = &report->seen[i];

		wrong += n->kage && !agree(s, false, n->nr, n->request, n->kage);
		wrong += n->vmm && !agree(s, true, n->nr, n->request, n->vmm);
	}
	for (unsigned i = 0; i < rules; i++)
		if (!unseen(rule[i].nr) && !times_seen(&rule[i], rule[i].vmm))
			wrong += !agree(s, rule[i].vmm, rule[i].nr, rule[i].request, 0);
	fflush(stdout);
	ck_assert_msg(wrong == 0, "%u entries of backends/README.md are wrong", wrong);
}
END_TEST

/* Whether a call is listed twice: then the other entry allows it still. */
static bool twice(unsigned i)
{
	for (unsigned j = 0; j < rules; j++)
		if (j != i && is_call(&rule[j], rule[i].nr, rule[i].request))
			return true;
	return false;
}

/* A jail that lacks one listed call is too small. */
START_TEST(nothing_can_be_left_out)
{
	const struct scenario *s = &scenario[_i];
	const char *why = impossible(s);

	need(why == NULL, why);
	need(all_features(), "the tables say what happens where all features are there");
	for (unsigned i = 0; i < rules; i++) {
		int status;

		if (rule[i].vmm || rule[i].need[s->column] != YES || twice(i))
			continue;
		status = in_child(s, false, (int)i);
		if (WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS)
			continue;
		rule_print(&rule[i]);
		fflush(stdout);
		ck_abort_msg("%s: lives without it: status %#x, %s", s->name, status, report->why);
	}
}
END_TEST

int main(int argc, char **argv)
{
	FILE *f = argc > 1 ? fopen(argv[1], "r") : NULL;
	Suite *suite = suite_create("jail");
	const char *wrong;

	skip_without_kvm();
	if (f == NULL) {
		fprintf(stderr, "usage: kvm-jail backends/README.md\n");
		return EXIT_FAILURE;
	}
	wrong = parse(f);
	fclose(f);
	if (wrong != NULL) {
		fprintf(stderr, "backends/README.md, System calls: %s\n", wrong);
		return EXIT_FAILURE;
	}
	report = mmap(NULL, sizeof(*report), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (report == MAP_FAILED)
		return EXIT_FAILURE;
	probe();
	add_test(suite, lives_in_the_jail, COUNT(scenario));
	add_test(suite, lists_are_exact, COUNT(scenario));
	add_test(suite, nothing_can_be_left_out, COUNT(scenario));
	return run(suite);
}
