/* SPDX-License-Identifier: MIT */
/*
 * System registers of an arm64 guest, from QEMU's gdb stub.
 *
 * QEMU's monitor prints an arm64 CPU's general registers and PSTATE, but none of EL1's system registers (7.2).
 * Its gdb stub has them: in the description system-registers.xml, each with a number for the packet `p`. The
 * stub is started, and stopped, by the monitor's command `gdbserver`. A connection stops the machine; here
 * it is suspended already, and stays so when the connection is closed.
 *
 * Packets are $TEXT#SUM, SUM two hexadecimal digits; the receiver answers + (GDB manual, "Remote Protocol"). Texts
 * that come here hold no escapes or run lengths but those of XML, which has no characters that need them.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "beside.h"

#define SECONDS 60	/* for one answer */
#define PIECE	0x700	/* bytes of XML that are asked for at a time; the stub may send fewer */

static FILE *gdb_connect(const char *path)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	struct timeval limit = { .tv_sec = SECONDS };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	FILE *f = NULL;

	if (strlen(path) < sizeof(addr.sun_path) && fd >= 0) {
		strcpy(addr.sun_path, path);
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
		if (!connect(fd, (struct sockaddr *)&addr, sizeof(addr)))
			f = fdopen(fd, "r");
	}
	if (!f && fd >= 0)
		close(fd);
	return f;
}

static bool gdb_send(FILE *f, const char *text)
{
	char packet[256];
	unsigned sum = 0;
	size_t len;

	for (const char *c = text; *c; c++)
		sum += (unsigned char)*c;
	fill(packet, sizeof(packet), "$%s#%02x", text, sum & 0xff);
	len = strlen(packet);
	return send(fileno(f), packet, len, MSG_NOSIGNAL) == (ssize_t)len;
}

/* One packet's text. Acknowledgements before it are passed over. */
static bool gdb_receive(FILE *f, char *text, size_t size)
{
	size_t len = 0;
	int c;

	while ((c = getc(f)) != '$')
		if (c == EOF)
			return false;
	while ((c = getc(f)) != '#' && c != EOF && len + 1 < size)
		text[len++] = (char)c;
	text[len] = 0;
	return c == '#' && getc(f) != EOF && getc(f) != EOF && send(fileno(f), "+", 1, MSG_NOSIGNAL) == 1;
}

static bool gdb_ask(FILE *f, char *answer, size_t size, const char *format, ...)
{
	char text[128];
	va_list ap;

	va_start(ap, format);
	vsnprintf(text, sizeof(text), format, ap);
	va_end(ap);
	return gdb_send(f, text) && gdb_receive(f, answer, size);
}

/* A document of the target's description. To be freed. */
static char *gdb_document(FILE *f, const char *name)
{
	char answer[PIECE + 64], *text = NULL;
	size_t size;
	FILE *to = open_memstream(&text, &size);
	unsigned at = 0;
	bool good;

	if (!to)
		return NULL;
	do {
		good = gdb_ask(f, answer, sizeof(answer), "qXfer:features:read:%s:%x,%x", name, at, PIECE) &&
		       (*answer == 'm' || *answer == 'l');
		if (good)
			at += (unsigned)fprintf(to, "%s", answer + 1);
	} while (good && *answer == 'm');
	if (!fclose(to) && good)
		return text;
	free(text);
	return NULL;
}

/* Registers come in the target's byte order: little endian. */
static bool gdb_register(FILE *f, unsigned number, uint64_t *value)
{
	char answer[64];
	unsigned byte;

	if (!gdb_ask(f, answer, sizeof(answer), "p%x", number) || strlen(answer) % 2 || strlen(answer) > 16)
		return false;
	*value = 0;
	for (unsigned i = 0; answer[2 * i]; i++) {
		if (sscanf(answer + 2 * i, "%2x", &byte) != 1)
			return false;
		*value |= (uint64_t)byte << 8 * i;
	}
	return true;
}

/* By name, through its number in the description. */
static bool named_register(FILE *f, const char *xml, const char *name, uint64_t *value)
{
	char pattern[64];
	const char *at;
	unsigned number;

	fill(pattern, sizeof(pattern), "<reg name=\"%s\"", name);
	at = strstr(xml, pattern);
	at = at ? strstr(at, "regnum=\"") : NULL;
	return at && sscanf(at, "regnum=\"%u\"", &number) == 1 && gdb_register(f, number, value);
}

#define CPSR 33 /* x0 to x30, sp, pc, cpsr: aarch64-core.xml has no numbers, they count from 0 */

static bool read_registers(FILE *f, struct kage_arm64_regs *regs)
{
	char answer[4096], *xml = NULL;
	bool good;

	/* The stub answers for CPU 0 once it has been asked for its description. */
	good = gdb_ask(f, answer, sizeof(answer), "qSupported:xmlRegisters=aarch64") &&
	       gdb_ask(f, answer, sizeof(answer), "qXfer:features:read:target.xml:0,%x", PIECE) &&
	       (xml = gdb_document(f, "system-registers.xml")) != NULL &&
	       (named_register(f, xml, "SCTLR_EL1", &regs->sctlr) || named_register(f, xml, "SCTLR", &regs->sctlr)) &&
	       named_register(f, xml, "TCR_EL1", &regs->tcr) && named_register(f, xml, "TTBR0_EL1", &regs->ttbr0) &&
	       named_register(f, xml, "TTBR1_EL1", &regs->ttbr1) && gdb_register(f, CPSR, &regs->pstate);
	free(xml);
	return good;
}

bool gdb_arm64_registers(const struct guest *g, const char *socket_path, struct kage_arm64_regs *regs)
{
	char *answer = guest_monitor(g, "gdbserver unix:%s,server=on,wait=off", socket_path);
	FILE *f = answer ? gdb_connect(socket_path) : NULL;
	bool good = f && read_registers(f, regs);

	free(answer);
	if (f)
		fclose(f);
	free(guest_monitor(g, "gdbserver none"));
	unlink(socket_path);
	return good;
}
