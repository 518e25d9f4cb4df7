/* SPDX-License-Identifier: MIT */
/*
 * Hardened domains: what becomes of the quiet pages of a group there. See hardened.c.
 */
#ifndef KAGE_MERGE_HARDENED_H
#define KAGE_MERGE_HARDENED_H

#include "merge/run.h"

/* Looks at all of s->todo and fuses what can be: out of its guest's reach, with its equals or alone. */
void hardened_group(struct scanner *s);

#endif
