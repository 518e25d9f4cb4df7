/* SPDX-License-Identifier: MIT */
/*
 * The guests: transient domains whose RAM is a shared file, their monitors and their consoles.
 *
 * libvirt passes the monitor's human commands on (virDomainQemuMonitorCommand), and marks such a domain as tainted,
 * which is fine here. RAM files lie in the folder that qemu.conf names (memory_backing_dir).
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <libvirt/libvirt-qemu.h>
#include <libvirt/virterror.h>

#include "beside.h"

#define SILENCE 240 /* seconds, many times what a guest needs for anything */

static bool complain(const struct guest *g, const char *what)
{
	fprintf(stderr, "beside: %s: %s: %s\n", g->name, what, virGetLastErrorMessage());
	return false;
}

/* -- starting and stopping ------------------------------------------------------------------------------------ */

/* To be freed. */
static char *make_xml(const struct guest *g, const struct paths *paths)
{
	const struct machine *m = &g->arch->machine;
	char *text = NULL;
	size_t size;
	FILE *f = open_memstream(&text, &size);

	if (!f)
		return NULL;
	fprintf(f,
		"<domain type='qemu'><name>%s</name><memory unit='MiB'>%d</memory><vcpu>1</vcpu>"
		"<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"
		"<os><type arch='%s' machine='%s'>hvm</type><kernel>%s/vmlinuz</kernel><initrd>%s/initramfs</initrd>"
		"<cmdline>console=%s quiet panic=-1 kage.guest=%u%s</cmdline></os><features>%s</features>"
		"<cpu mode='custom' match='exact' check='none'><model fallback='forbid'>%s</model></cpu>",
		g->name, MIB, m->arch, m->type, paths->boot, paths->out, m->console, g->number,
		g->number == 2 ? g->arch->more : "", m->features, g->arch->cpu);
	fprintf(f,
		"<on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash><devices>"
		"<serial type='file'><source path='%s'/></serial>"
		"<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>", g->console);
	return fclose(f) ? NULL : text;
}

bool guest_start(struct guest *g, const struct paths *paths)
{
	char *xml;

	fill(g->name, sizeof(g->name), "kage-beside-%s-%u", g->arch->machine.arch, g->number);
	fill(g->console, sizeof(g->console), "%s/console.%u", paths->out, g->number);
	g->fd = -1;
	unlink(g->console);
	xml = make_xml(g, paths);
	g->domain = xml ? virDomainCreateXML(domain_connection(), xml, 0) : NULL;
	free(xml);
	return g->domain ? true : complain(g, "cannot be started");
}

void guest_stop(struct guest *g)
{
	if (g->domain) {
		virDomainDestroy(g->domain);
		virDomainFree(g->domain);
	}
	g->domain = NULL;
	if (g->fd > 0)
		close(g->fd);
	g->fd = -1;
}

bool guest_suspend(struct guest *g)
{
	return virDomainSuspend(g->domain) ? complain(g, "cannot be suspended") : true;
}

bool guest_resume(struct guest *g)
{
	return virDomainResume(g->domain) ? complain(g, "cannot be resumed") : true;
}

char *guest_monitor(const struct guest *g, const char *format, ...)
{
	char command[256], *answer = NULL;
	va_list ap;

	va_start(ap, format);
	vsnprintf(command, sizeof(command), format, ap);
	va_end(ap);
	if (!virDomainQemuMonitorCommand(g->domain, command, &answer, VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP))
		return answer;
	complain(g, command);
	return NULL;
}

/* -- the console ---------------------------------------------------------------------------------------------- */

/* "GPA TEXT" */
static bool parse_page(struct page *page, const char *line)
{
	char *end;

	page->gpa = strtoull(line, &end, 16);
	if (end == line || *end != ' ' || page->gpa & (KAGE_PAGE_SIZE - 1))
		return false;
	fill(page->text, sizeof(page->text), "%s", end + 1);
	return true;
}

static void hear_symbol(struct guest *g, const char *line)
{
	char name[64];
	uint64_t at;

	if (sscanf(line, "%lx %63s", &at, name) != 2)
		return;
	if (!strcmp(name, "_stext"))
		g->stext = at;
	else if (!strcmp(name, "linux_banner"))
		g->linux_banner = at;
	else if (!strcmp(name, "init_top_pgt"))
		g->init_top_pgt = at;
}

static void hear_write(struct guest *g, const char *line)
{
	struct page page;
	const char *round;

	if (!parse_page(&page, line) || !(round = strstr(page.text, " round ")))
		return;
	page.round = (unsigned)atoi(round + 7);
	g->turn[page.round % TURN] = page;
	g->round = page.round;
}

static void hear(struct guest *g, char *line)
{
	line[strcspn(line, "\r\n")] = 0;
	if (!strncmp(line, "KAGE-VERSION ", 13))
		fill(g->version, sizeof(g->version), "%s", line + 13);
	else if (!strncmp(line, "KAGE-SYMBOL ", 12))
		hear_symbol(g, line + 12);
	else if (!strncmp(line, "KAGE-QUIET ", 11) && g->quiets < QUIET)
		g->quiets += parse_page(&g->quiet[g->quiets], line + 11);
	else if (!strncmp(line, "KAGE-WRITE ", 11))
		hear_write(g, line + 11);
	else if (!strcmp(line, "KAGE-READY"))
		g->ready = true;
}

void guest_listen(struct guest *g)
{
	FILE *f = fopen(g->console, "r");
	char line[1024];

	if (!f)
		return;
	fseek(f, g->heard, SEEK_SET);
	while (fgets(line, sizeof(line), f) && strchr(line, '\n')) {
		g->heard = ftell(f);
		hear(g, line);
	}
	fclose(f);
}

static void show_console(const struct guest *g)
{
	FILE *f = fopen(g->console, "r");
	char line[1024];

	printf("  its console, %s:\n", g->console);
	while (f && fgets(line, sizeof(line), f))
		printf("  | %s", line);
	putchar('\n');
	if (f)
		fclose(f);
}

static time_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec;
}

bool guest_wait(struct guest *g, unsigned round)
{
	time_t until = now() + SILENCE;
	long heard = g->heard;

	while (guest_listen(g), !g->ready || g->round < round) {
		if (virDomainIsActive(g->domain) != 1 || now() > until) {
			check(false, "%s %s", g->name, now() > until ? "is silent" : "is gone");
			show_console(g);
			return false;
		}
		if (g->heard != heard)
			until = now() + SILENCE;
		heard = g->heard;
		usleep(50000);
	}
	return true;
}

/* -- its memory ------------------------------------------------------------------------------------------------- */

/* QEMU itself says where its RAM is. */
static bool find_ram(struct guest *g)
{
	static const char key[] = "\"return\":\"";
	char command[256], *answer = NULL;
	const char *at;

	fill(command, sizeof(command), "{\"execute\":\"qom-get\",\"arguments\":{\"path\":\"/objects/%s\","
	     "\"property\":\"mem-path\"}}", g->arch->ram);
	if (virDomainQemuMonitorCommand(g->domain, command, &answer, 0))
		return complain(g, "where is its RAM");
	at = strstr(answer, key);
	if (at)
		fill(g->ram, sizeof(g->ram), "%.*s", (int)strcspn(at + sizeof(key) - 1, "\""), at + sizeof(key) - 1);
	free(answer);
	return at != NULL;
}

bool guest_map(struct guest *g, struct kage_engine *engine)
{
	struct stat st;
	int err;

	if (!find_ram(g))
		return false;
	g->fd = open(g->ram, O_RDONLY | O_CLOEXEC);
	if (g->fd < 0 || fstat(g->fd, &st)) {
		fprintf(stderr, "beside: %s: %s\n", g->ram, strerror(errno));
		return false;
	}
	g->bytes = (uint64_t)st.st_size;
	err = kage_vm_create(engine, NULL, &g->vm);
	if (!err)
		err = kage_vm_map(g->vm, KAGE_CFG(kage_region, .kind = KAGE_REGION_FOREIGN, .flags = KAGE_REGION_FD,
						  .prot = KAGE_READ | KAGE_EXEC, .gpa = g->arch->ram_gpa,
						  .len = g->bytes, .fd = g->fd));
	return check(!err && g->bytes == (uint64_t)MIB << 20,
		     "%s runs; its RAM is foreign memory of Kage's: %" PRIu64 " MiB at %" PRIx64 ", %s", g->name,
		     g->bytes >> 20, g->arch->ram_gpa, g->ram);
}
