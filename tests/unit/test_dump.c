/* SPDX-License-Identifier: MIT */
/*
 * pt/dump.c: runs, effective permissions, labels, both outputs. JSON goes
 * through a small strict reader here: what it accepts is JSON.
 */
#include <check.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>

#include "pt/entry.h"

static uint64_t tables[8][512];
static char out[65536];
static size_t out_len;
static int put_budget; /* pieces until `put` fails; negative: never */

static void setup(void)
{
	memset(tables, 0, sizeof(tables));
	memset(out, 0, sizeof(out));
	out_len = 0;
	put_budget = -1;
}

/* Table n lives at "physical" (n + 1) << 12. */
static void *map(void *arg, uint64_t addr)
{
	ck_assert_ptr_eq(arg, tables);
	ck_assert_uint_lt((addr >> 12) - 1, ARRAY_SIZE(tables));
	return tables[(addr >> 12) - 1];
}

static int put(void *arg, const char *text, size_t len)
{
	ck_assert_ptr_eq(arg, out);
	if (put_budget == 0)
		return -EPIPE;
	put_budget -= put_budget > 0;
	ck_assert_uint_lt(out_len + len, sizeof(out));
	memcpy(out + out_len, text, len);
	out_len += len;
	return 0;
}

/* -- a strict reader: returns the byte after a value, or NULL ------------- */

static const char *json_value(const char *s);

static const char *json_space(const char *s)
{
	return s + strspn(s, " \t\r\n");
}

static const char *json_string(const char *s)
{
	if (*s++ != '"')
		return NULL;
	for (; *s != '"'; s++) {
		if ((unsigned char)*s < 0x20)
			return NULL;
		if (*s == '\\' && *++s == 'u')
			for (int i = 0; i < 4; i++)
				if (!isxdigit((unsigned char)*++s))
					return NULL;
	}
	return s + 1;
}

static const char *json_list(const char *s, char close, bool keys)
{
	s = json_space(s + 1);
	if (*s == close)
		return s + 1;
	for (;;) {
		if (keys) {
			s = json_string(json_space(s));
			if (!s || *(s = json_space(s)) != ':')
				return NULL;
			s++;
		}
		s = json_value(s);
		if (!s)
			return NULL;
		s = json_space(s);
		if (*s == close)
			return s + 1;
		if (*s++ != ',')
			return NULL;
	}
}

static const char *json_value(const char *s)
{
	static const char *const words[] = { "true", "false", "null" };
	char *end;

	s = json_space(s);
	if (*s == '{')
		return json_list(s, '}', true);
	if (*s == '[')
		return json_list(s, ']', false);
	if (*s == '"')
		return json_string(s);
	for (unsigned i = 0; i < ARRAY_SIZE(words); i++)
		if (strncmp(s, words[i], strlen(words[i])) == 0)
			return s + strlen(words[i]);
	if (!isdigit((unsigned char)*s) && *s != '-')
		return NULL;
	strtod(s, &end);
	return end;
}

static bool is_json(const char *s)
{
	s = json_value(s);
	return s && *json_space(s) == 0;
}

/* -- a table with some of everything -------------------------------------- */

static void build(void)
{
	tables[0][0] = entry_table(PFN(2), ENTRY_W);
	tables[0][1] = entry_leaf(PFN(0x600), ENTRY_W); /* a block */
	tables[0][2] = entry_table(PFN(3), 0);          /* clones clear W above */
	for (unsigned i = 0; i < 4; i++)
		tables[1][i] = entry_leaf(PFN(0x100 + i), ENTRY_W | (i & 1 ? ENTRY_D | ENTRY_A : 0));
	tables[1][4] = entry_leaf(PFN(0x104), 0);        /* contiguous, fewer permissions */
	tables[1][5] = entry_leaf(PFN(0x200), 0);        /* not contiguous */
	tables[1][6] = ENTRY_SWAP | 77ull << PAGE_SHIFT;
	tables[1][7] = ENTRY_SWAP | 99ull << PAGE_SHIFT;
	tables[1][8] = ENTRY_POISON;
	tables[2][0] = entry_leaf(PFN(0x300), ENTRY_W);
	tables[2][1] = entry_leaf(PFN_ZERO, ENTRY_SPECIAL);
}

static const char *label(void *arg, uint64_t entry, unsigned level)
{
	ck_assert_ptr_eq(arg, tables);
	if (entry_is_leaf(entry) && pfn_eq(entry_pfn(entry), PFN_ZERO))
		return "zero \"\\\n";
	return level ? "block" : NULL;
}

static struct pt_dump dump_of(bool json)
{
	return (struct pt_dump){ .walk = { .format = &pt_kage[0], .root = 0x1000, .root_level = 1, .map = map,
					   .arg = tables },
				 .json = json, .put = put, .put_arg = out, .label = label };
}

static unsigned count(const char *needle)
{
	unsigned n = 0;

	for (const char *s = out; (s = strstr(s, needle)); s++)
		n++;
	return n;
}

START_TEST(text)
{
	struct pt_dump d = dump_of(false);

	build();
	ck_assert_int_eq(pt_dump(&d, 0, 1 << 30), 0);
	ck_assert_uint_eq(count("\n"), 8 + 1); /* the zero label has one of its own */
	ck_assert_ptr_nonnull(
		strstr(out, "0x0000000000000000-0x0000000000004000 page         0x0000000100000 rwx user"
			    " key 0 level 0 entries 4 accessed 2 dirty 2\n"));
	ck_assert_ptr_nonnull(
		strstr(out, "0x0000000000004000-0x0000000000005000 page         0x0000000104000 r-x"));
	ck_assert_ptr_nonnull(strstr(out, "0x0000000000006000-0x0000000000008000 swap         -"));
	ck_assert_ptr_nonnull(strstr(out, "0x0000000000008000-0x0000000000009000 poison"));
	ck_assert_ptr_nonnull(
		strstr(out, "0x0000000000200000-0x0000000000400000 page         0x0000000600000 rwx user"
			    " key 0 level 1 entries 1 accessed 0 dirty 0 block\n"));
	/* W is the AND along the path */
	ck_assert_ptr_nonnull(
		strstr(out, "0x0000000000400000-0x0000000000401000 page         0x0000000300000 r-x"));
}
END_TEST

START_TEST(part_of_a_block)
{
	struct pt_dump d = dump_of(false);

	build();
	ck_assert_int_eq(pt_dump(&d, 0x203000, 0x205000), 0);
	ck_assert_uint_eq(count("\n"), 1);
	ck_assert_ptr_nonnull(
		strstr(out, "0x0000000000203000-0x0000000000205000 page         0x0000000603000"));
}
END_TEST

START_TEST(json)
{
	struct pt_dump d = dump_of(true);

	build();
	ck_assert_int_eq(pt_dump(&d, 0, 1 << 30), 0);
	ck_assert_msg(is_json(out), "not JSON:\n%s", out);
	ck_assert_uint_eq(count("{"), 8);
	ck_assert_uint_eq(count("\"state\":\"page\""), 6);
	ck_assert_uint_eq(count("\"label\":\"zero \\\"\\\\\\u000a\""), 1);
	ck_assert_uint_eq(count("{\"start\":\"0x0000000000006000\",\"end\":\"0x0000000000008000\",\"state\":"
				"\"swap\",\"addr\":null"),
			  1);
}
END_TEST

START_TEST(json_of_nothing)
{
	struct pt_dump d = dump_of(true);

	ck_assert_int_eq(pt_dump(&d, 0, 1 << 30), 0);
	ck_assert(is_json(out));
	ck_assert(!is_json("[{]") && !is_json("[1,]") && !is_json("{\"a\" 1}") &&
		  is_json("{\"a\":[1,null]}"));
}
END_TEST

START_TEST(guest_tables_to_the_top)
{
	static const struct pt_params params = { .phys_bits = 46, .nx = true, .page1g = true };
	struct pt_dump d = dump_of(true);

	d.walk.format = &pt_x86_4;
	d.walk.root_level = 3;
	d.walk.params = &params;
	d.label = NULL;
	tables[0][511] = 0x2000 | 7; /* user and writable here */
	tables[1][511] = 0x40000000 | 0x183; /* a global 1 GiB page, supervisor's */
	ck_assert_int_eq(pt_dump(&d, 4096, 0), 0);
	ck_assert(is_json(out));
	ck_assert_uint_eq(count("{"), 1);
	ck_assert_uint_eq(count("\"start\":\"0xffffffffc0000000\",\"end\":\"0x10000000000000000\""), 1);
	ck_assert_uint_eq(count("\"perm\":\"rwx\",\"user\":false,\"global\":true"), 1);
}
END_TEST

/* Wherever `put` fails, its error comes back and nothing is put after it. */
START_TEST(put_fails)
{
	for (int as_json = 0; as_json < 2; as_json++) {
		struct pt_dump d = dump_of(as_json);
		int pieces = 0, r;

		do {
			setup();
			build();
			put_budget = pieces++;
			r = pt_dump(&d, 0, 1 << 30);
			ck_assert(r == 0 || r == -EPIPE);
		} while (r);
		ck_assert_int_gt(pieces, 8);
	}
}
END_TEST

int main(void)
{
	Suite *s = suite_create("dump");
	TCase *t = tcase_create("dump");
	SRunner *r;
	int failed;

	tcase_add_checked_fixture(t, setup, NULL);
	tcase_add_test(t, text);
	tcase_add_test(t, part_of_a_block);
	tcase_add_test(t, json);
	tcase_add_test(t, json_of_nothing);
	tcase_add_test(t, guest_tables_to_the_top);
	tcase_add_test(t, put_fails);
	suite_add_tcase(s, t);
	r = srunner_create(s);
	srunner_set_fork_status(r, CK_NOFORK);
	srunner_run_all(r, CK_NORMAL);
	failed = srunner_ntests_failed(r);
	srunner_free(r);
	return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
