/* SPDX-License-Identifier: MIT */
/*
 * A QMP client for a shell script: kage-demo-qmp SOCKET COMMAND...
 *
 * Each COMMAND is a QMP command without arguments ("stop", "cont", "quit"), or
 * "hmp:LINE", a line for the human monitor, whose answer is printed.
 *
 * QEMU sends one JSON object a line and puts its only interesting key first,
 * so a message is told from another by its first key: QMP for the greeting,
 * "return" or "error" for the answer, anything else is an event. The only
 * value ever decoded is the string that the human monitor answers with, hence
 * no JSON parser. Protocol: docs/interop/qmp-spec.txt in QEMU.
 *
 * Exit: 0, 1 if QEMU answered with an error or went away, 2 for bad usage.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define TIMEOUT_S 30

static FILE *qmp_connect(const char *path)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	struct timeval limit = { .tv_sec = TIMEOUT_S };
	FILE *f;
	int fd;

	if (strlen(path) >= sizeof(addr.sun_path)) {
		errno = ENAMETOOLONG;
		return NULL;
	}
	strcpy(addr.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return NULL;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) || !(f = fdopen(fd, "r"))) {
		close(fd);
		return NULL;
	}
	return f;
}

static int qmp_send(FILE *f, const char *message)
{
	size_t left = strlen(message);

	while (left) {
		ssize_t n = send(fileno(f), message, left, MSG_NOSIGNAL);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0) {
			message += n;
			left -= (size_t)n;
		}
	}
	return 0;
}

/* True if the object's first key is `key`; `*value` is where its value begins. */
static int first_key(const char *line, const char *key, const char **value)
{
	size_t len = strlen(key);

	line += strspn(line, " {");
	if (*line != '"' || strncmp(line + 1, key, len) || line[len + 1] != '"')
		return 0;
	*value = line + len + 2 + strspn(line + len + 2, ": ");
	return 1;
}

/* Decodes a JSON string of ASCII text to stdout; carriage returns are dropped. */
static void print_string(const char *s)
{
	if (*s++ != '"')
		return;
	for (; *s && *s != '"'; s++) {
		if (*s != '\\') {
			putchar(*s);
			continue;
		}
		s++;
		if (*s == 'n')
			putchar('\n');
		else if (*s == 't')
			putchar('\t');
		else if (*s && *s != 'r')
			putchar(*s);
		if (!*s)
			return;
	}
}

/* Reads messages up to one whose first key is `key`. */
static int qmp_expect(FILE *f, const char *key, int print)
{
	char *line = NULL;
	size_t room = 0;
	int err = -EPIPE;

	while (err == -EPIPE && getline(&line, &room, f) > 0) {
		const char *value;

		if (first_key(line, "error", &value)) {
			fprintf(stderr, "qmp: %s", line);
			err = -EPROTO;
		} else if (first_key(line, key, &value)) {
			if (print)
				print_string(value);
			err = 0;
		}
	}
	free(line);
	return err;
}

static int qmp_command(FILE *f, const char *command)
{
	char message[1024];
	int human = !strncmp(command, "hmp:", 4);
	int n, err;

	if (human)
		n = snprintf(
			message, sizeof(message),
			"{\"execute\":\"human-monitor-command\",\"arguments\":{\"command-line\":\"%s\"}}\n",
			command + 4);
	else
		n = snprintf(message, sizeof(message), "{\"execute\":\"%s\"}\n", command);
	if (n < 0 || (size_t)n >= sizeof(message) || strpbrk(command, "\"\\"))
		return -EINVAL;
	err = qmp_send(f, message);
	return err ? err : qmp_expect(f, "return", human);
}

int main(int argc, char **argv)
{
	FILE *f;
	int err;

	if (argc < 3) {
		fprintf(stderr, "usage: %s SOCKET COMMAND|hmp:LINE ...\n", argv[0]);
		return 2;
	}
	f = qmp_connect(argv[1]);
	if (!f) {
		fprintf(stderr, "qmp: %s: %s\n", argv[1], strerror(errno));
		return 1;
	}
	err = qmp_expect(f, "QMP", 0);
	if (!err)
		err = qmp_command(f, "qmp_capabilities");
	for (int i = 2; !err && i < argc; i++)
		err = qmp_command(f, argv[i]);
	if (err)
		fprintf(stderr, "qmp: %s: %s\n", argv[1], strerror(-err));
	fclose(f);
	return err ? 1 : 0;
}
