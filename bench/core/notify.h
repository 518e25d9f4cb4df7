/* SPDX-License-Identifier: MIT */
/*
 * The parts of kage-bench-notify, which knows the engine's inside.
 *
 *   notify.c    a change's round without, with one and with 16 listeners; main()
 *   shootdown.c a change while a vCPU runs
 *   storm.c     retries while unrelated ranges change
 *   global.c    makes kage-bench-notify-global of the same code: the storm's peer
 */
#ifndef KAGE_BENCH_NOTIFY_H
#define KAGE_BENCH_NOTIFY_H

#include "core.h"

void shootdown_rows(const struct bench *b);
void storm_rows(const struct bench *b);
/* kage-bench-notify-global --storm FAULTS STORMING: one run, its result on standard output. */
int storm_main(int argc, char **argv);

#endif
