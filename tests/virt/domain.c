/* SPDX-License-Identifier: MIT */
/*
 * Transient domains of libvirt's QEMU driver, inside of this process: qemu:///embed?root=DIR, no daemon.
 *
 * structures
 *	conn, domain	the connection; the machine that runs
 *	stopped		what the event loop's thread says: the domain has gone, and why
 *
 * invariants
 *	D1. The order is fork (supervise.c), virInitialize, default event loop, its thread, open, callback, create
 *	    paused, resume. The thread never ends: the loop has no end that could be waited for.
 *	D2. One process a root (sweep.c): whoever has its lock may destroy whatever else uses the root.
 *	D3. A power-off arrives as SHUTDOWN, then STOPPED; only STOPPED counts. A reset is a stop too (on_reboot).
 *
 * The console is a file that QEMU writes, because a pty's contents are lost with its reader. The driver has
 * a folder of its own with a short name in /tmp: the path of QEMU's monitor socket must fit into
 * sockaddr_un. QEMU runs as the user who runs this: with another one that cannot open /dev/kvm the driver would
 * probe QEMU anew at every start, for most of a minute.
 */
#include <limits.h>
#include <pthread.h>
#include <pwd.h>
#include <grp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

#include "virt.h"

static virConnectPtr conn;

static struct {
	pthread_mutex_t lock;
	pthread_cond_t change;
	bool gone;
	int detail; /* virDomainEventStoppedDetailType */
} stopped = { .lock = PTHREAD_MUTEX_INITIALIZER, .change = PTHREAD_COND_INITIALIZER };

/* -- what must be there ----------------------------------------------------------------------------- */

static bool in_path(const char *program)
{
	char path[PATH_MAX];
	const char *at = getenv("PATH");

	while (at && *at) {
		size_t len = strcspn(at, ":");

		fill(path, sizeof(path), "%.*s/%s", (int)len, at, program);
		if (!access(path, X_OK))
			return true;
		at += len + (at[len] == ':');
	}
	return false;
}

/* The reason and the remedy; NULL if nothing is missing. */
const char *domain_missing(const struct machine *machine)
{
	static char text[256];

	if (!in_path(machine->emulator)) {
		fill(text, sizeof(text), "%s is missing; as root: apt-get install %s", machine->emulator, machine->package);
		return text;
	}
	/* The driver looks both up before it reads qemu.conf. */
	if (geteuid() == 0 && (!getpwnam("libvirt-qemu") || !getgrnam("libvirt-qemu")))
		return "there is no user or no group libvirt-qemu; apt-get install libvirt-daemon-system makes them";
	return NULL;
}

/* -- the root ----------------------------------------------------------------------------------------- */

static bool write_config(const char *root, const char *ram)
{
	char path[PATH_MAX];
	FILE *f;

	fill(path, sizeof(path), "%s/etc", root);
	if (!make_folder(path))
		return false;
	fill(path, sizeof(path), "%s/etc/qemu.conf", root);
	f = fopen(path, "w");
	if (!f)
		return false;
	fputs("stdio_handler = \"file\"\n"
	      "security_driver = \"none\"\n"
	      "dynamic_ownership = 0\n"
	      "namespaces = []\n"
	      "cgroup_controllers = []\n", f);
	if (geteuid() == 0)
		fputs("user = \"root\"\ngroup = \"root\"\n", f);
	if (*ram)
		fprintf(f, "memory_backing_dir = \"%s\"\n", ram);
	return !fclose(f);
}

static void destroy_leftovers(void)
{
	virDomainPtr *list = NULL;
	int n = virConnectListAllDomains(conn, &list, 0);

	for (int i = 0; i < n; i++) {
		printf("virt: domain %s was left over by an earlier run: destroyed\n", virDomainGetName(list[i]));
		virDomainDestroy(list[i]);
		virDomainFree(list[i]);
	}
	free(list);
}

/* -- the connection -------------------------------------------------------------------------------------- */

static void *event_loop(void *unused)
{
	while (!virEventRunDefaultImpl())
		;
	return NULL;
}

static int on_event(virConnectPtr c, virDomainPtr domain, int event, int detail, void *opaque)
{
	if (event != VIR_DOMAIN_EVENT_STOPPED)
		return 0;
	pthread_mutex_lock(&stopped.lock);
	stopped.gone = true;
	stopped.detail = detail;
	pthread_cond_broadcast(&stopped.change);
	pthread_mutex_unlock(&stopped.lock);
	return 0;
}

static void on_error(void *opaque, virErrorPtr error)
{
}

static bool complain(const char *what)
{
	fprintf(stderr, "virt: %s: %s\n", what, virGetLastErrorMessage());
	return false;
}

/* The library is there, and its QEMU driver is a package of its own. */
static int no_connection(const char *uri)
{
	const virError *e = virGetLastError();

	if (e && (e->code == VIR_ERR_NO_CONNECT || e->code == VIR_ERR_CONFIG_UNSUPPORTED)) {
		printf("SKIP: libvirt has no QEMU driver (%s); as root: apt-get install libvirt-daemon-driver-qemu\n",
		       virGetLastErrorMessage());
		return SKIPPED;
	}
	complain(uri);
	return FAILED;
}

/* PASSED, FAILED, or SKIPPED, which says why. */
int domain_open(const struct paths *paths)
{
	pthread_t thread;
	char uri[PATH_MAX];

	if (!take_root(paths) || !write_config(paths->root, paths->ram))
		return FAILED;
	virSetErrorFunc(NULL, on_error);
	setenv("LIBVIRT_DEBUG", "4", 0); /* errors only */
	if (virInitialize() || virEventRegisterDefaultImpl() || pthread_create(&thread, NULL, event_loop, NULL))
		return complain("libvirt"), FAILED;
	pthread_detach(thread);
	fill(uri, sizeof(uri), "qemu:///embed?root=%s", paths->root);
	conn = virConnectOpen(uri);
	if (!conn)
		return no_connection(uri);
	destroy_leftovers();
	kill_strays(paths->root);
	sweep();
	if (virConnectDomainEventRegisterAny(conn, NULL, VIR_DOMAIN_EVENT_ID_LIFECYCLE,
					     VIR_DOMAIN_EVENT_CALLBACK(on_event), NULL, NULL) < 0)
		return complain("events"), FAILED;
	return PASSED;
}

virConnectPtr domain_connection(void)
{
	return conn;
}

void domain_close(void)
{
	if (conn)
		virConnectClose(conn);
	conn = NULL;
}

/* -- a machine ---------------------------------------------------------------------------------------------- */

static void put_cpu(FILE *f, const char *cpu)
{
	size_t len = strcspn(cpu, " ");

	fprintf(f, "<cpu mode='custom' match='exact' check='none'><model fallback='forbid'>%.*s</model>", (int)len, cpu);
	for (const char *at = cpu + len; *(at += strspn(at, " ")); at += len) {
		len = strcspn(at, " ");
		fprintf(f, "<feature policy='%s' name='%.*s'/>", *at == '-' ? "disable" : "require", (int)len - 1,
			at + 1);
	}
	fputs("</cpu>", f);
}

/* To be freed. */
static char *make_xml(const struct leg *leg, const struct paths *paths)
{
	const struct machine *m = leg->machine;
	char *text = NULL;
	size_t size;
	FILE *f = open_memstream(&text, &size);

	if (!f)
		return NULL;
	fprintf(f,
		"<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
		"<name>kage-%s</name><memory unit='MiB'>%u</memory><vcpu>2</vcpu>"
		"<memoryBacking><nosharepages/></memoryBacking>" /* nothing for the host's ksmd, which benchmarks measure */
		"<os><type arch='%s' machine='%s'>hvm</type><kernel>%s/vmlinuz</kernel>"
		"<initrd>%s/initramfs</initrd><cmdline>console=%s quiet panic=-1 %s</cmdline></os><features>%s</features>",
		leg->name, leg->mib, m->arch, m->type, paths->boot, paths->out, m->console,
		leg->cmdline ? leg->cmdline : "", m->features);
	put_cpu(f, leg->cpu);
	fprintf(f,
		"<on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash><devices>"
		"<serial type='file'><source path='%s/console'/></serial>"
		"<controller type='usb' model='none'/><memballoon model='none'/></devices>%s</domain>",
		paths->out, m->qemu);
	return fclose(f) ? NULL : text;
}

static virDomainPtr start(const struct leg *leg, const struct paths *paths)
{
	char *xml = make_xml(leg, paths);
	virDomainPtr domain;

	stopped.gone = false;
	domain = xml ? virDomainCreateXML(conn, xml, VIR_DOMAIN_START_PAUSED) : NULL;
	free(xml);
	if (!domain) {
		complain("the domain cannot be created");
		return NULL;
	}
	if (virDomainResume(domain)) {
		complain("the domain cannot be started");
		virDomainDestroy(domain);
		virDomainFree(domain);
		return NULL;
	}
	return domain;
}

static bool gone_within(unsigned ms)
{
	struct timespec until;
	bool gone;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += (long)ms * 1000000;
	until.tv_sec += until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	pthread_mutex_lock(&stopped.lock);
	while (!stopped.gone && !pthread_cond_timedwait(&stopped.change, &stopped.lock, &until))
		;
	gone = stopped.gone;
	pthread_mutex_unlock(&stopped.lock);
	return gone;
}

static time_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec;
}

/* Until it has gone by itself, or was silent for longer than the watcher allows. */
static enum ended wait_for_end(virDomainPtr domain, const struct watch *watch)
{
	time_t until = now() + watch->look(watch->opaque);
	unsigned allowed;

	while (!gone_within(250)) {
		allowed = watch->look(watch->opaque);
		if (allowed)
			until = now() + allowed;
		if (now() > until || allowed == WATCH_ENOUGH) {
			virDomainDestroy(domain);
			gone_within(20000);
			watch->look(watch->opaque);
			return ENDED_STUCK;
		}
	}
	watch->look(watch->opaque);
	return stopped.detail == VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN ? ENDED_OFF : ENDED_CRASHED;
}

/* What QEMU itself had to say. */
static void show_log(const struct leg *leg, const struct paths *paths)
{
	char path[PATH_MAX], line[1024];
	FILE *f;

	fill(path, sizeof(path), "%s/log/qemu/kage-%s.log", paths->root, leg->name);
	f = fopen(path, "r");
	while (f && fgets(line, sizeof(line), f))
		if (strlen(line) < 300) /* not the command line */
			printf("  qemu| %s", line);
	if (f)
		fclose(f);
}

enum ended domain_run(const struct leg *leg, const struct paths *paths, const struct watch *watch)
{
	virDomainPtr domain = start(leg, paths);
	enum ended ended = ENDED_NEVER;

	if (domain) {
		ended = wait_for_end(domain, watch);
		virDomainFree(domain);
	}
	if (ended == ENDED_CRASHED || ended == ENDED_NEVER)
		show_log(leg, paths);
	return ended;
}
