/* SPDX-License-Identifier: MIT */
/* Steps of an engine: until it has taken its memory back, until nothing more merges. */
#include "common.h"

double steps_settle(struct kage_engine *e)
{
	struct kage_progress p = {.size = sizeof(p), .more = 1};
	double ns = cpu_ns();

	while (p.more || p.frames_freed) {
		p.more = 0;
		p.frames_freed = 0;
		must(kage_engine_step(e, NULL, &p), "step");
	}
	return cpu_ns() - ns;
}

double steps_merge(struct kage_engine *e)
{
	double ns = cpu_ns();
	uint64_t merged = 1;

	must(kage_engine_tune(e, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)), "tune");
	for (unsigned pass = 0; pass < 3 || merged; pass++) {
		struct kage_progress p = {.size = sizeof(p)};

		must(kage_engine_step(e, NULL, &p), "merging");
		merged = p.pages_merged;
	}
	must(kage_engine_tune(e, KAGE_CFG(kage_tune, .flags = 0)), "tune");
	return cpu_ns() - ns;
}
