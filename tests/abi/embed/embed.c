/* SPDX-License-Identifier: MIT */
/*
 * A C program that knows libkage by its headers and its pkg-config file alone.
 * A small workload: two guests of equal memory merge, a clone diverges, two
 * threads run vCPUs. The library adds no thread while it works, and nothing
 * of it is left at the end.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include <kage/kage.h>

#include "leak.h"

#define BYTES (8u << 20)
#define PAGES (BYTES / 4096)
#define ROUNDS 3

#define must(x)                                                                         \
	do {                                                                            \
		long long got_ = (long long)(x);                                        \
		if (got_ != 0) {                                                        \
			fprintf(stderr, "%s:%d: %s = %lld\n", __FILE__, __LINE__, #x, got_); \
			exit(1);                                                        \
		}                                                                       \
	} while (0)

static uint64_t content(uint64_t page, unsigned round)
{
	return page * 1000003 + 1 + round;
}

static struct kage_vm *guest(struct kage_engine *engine)
{
	struct kage_vm *vm;
	uint64_t page, word;

	must(kage_vm_create(engine, NULL, &vm));
	must(kage_vm_map(vm, KAGE_CFG(kage_region, .gpa = 1u << 20, .len = BYTES, .flags = KAGE_REGION_MERGEABLE)));
	for (page = 0; page < PAGES; page++) {
		word = content(page, 0);
		must(kage_vm_write(vm, (1u << 20) + page * 4096, &word, sizeof(word)));
	}
	return vm;
}

/* Its own vCPU on its own thread: paging off, so gva is gpa. */
static void *run(void *arg)
{
	struct kage_fault fault;
	struct kage_vcpu *vcpu;
	uint64_t page, word, mine;
	unsigned round;

	must(kage_vcpu_create((struct kage_vm *)arg, KAGE_CFG(kage_vcpu_config, .abi = KAGE_VCPU_ABI), &vcpu));
	for (round = 0; round < ROUNDS; round++)
		for (page = 0; page < PAGES; page++) {
			uint64_t gva = (1u << 20) + page * 4096;

			must(kage_vcpu_load(vcpu, gva, &word, sizeof(word), &fault));
			must(word != content(page, round));
			mine = word + 1;
			must(kage_vcpu_store(vcpu, gva, &mine, sizeof(mine), &fault));
			kage_vcpu_enter(vcpu);
			must(kage_vcpu_load(vcpu, gva, &word, sizeof(word), &fault));
			kage_vcpu_leave(vcpu);
			must(word != mine);
		}
	must(kage_vcpu_load(vcpu, 0, &word, sizeof(word), &fault) != KAGE_MMIO || fault.gpa != 0);
	kage_vcpu_destroy(vcpu);
	return NULL;
}

static void workload(const struct leak *before)
{
	struct kage_stats stats = { .size = sizeof(stats) };
	struct kage_progress progress = { .size = sizeof(progress) };
	struct kage_audit audit = { .size = sizeof(audit) };
	struct kage_engine *engine;
	struct kage_vm *a, *b, *clone;
	pthread_t thread[2];
	uint64_t word;

	must(kage_engine_create(NULL, &engine));
	must(leak_take().threads != before->threads);
	a = guest(engine);
	b = guest(engine);
	must(kage_engine_tune(engine, KAGE_CFG(kage_tune, .flags = KAGE_TUNE_MERGE)));
	must(kage_engine_step(engine, NULL, &progress));
	must(kage_engine_step(engine, NULL, &progress));
	must(kage_stats_get(engine, NULL, &stats));
	must(stats.ksm_pages_sharing != PAGES);
	must(stats.frames_used != PAGES);
	must(kage_vm_clone(a, NULL, &clone));
	must(leak_take().threads != before->threads);

	must(pthread_create(&thread[0], NULL, run, a));
	must(pthread_create(&thread[1], NULL, run, clone));
	must(pthread_join(thread[0], NULL));
	must(pthread_join(thread[1], NULL));
	must(kage_vm_read(b, 1u << 20, &word, sizeof(word)));
	must(word != content(0, 0));
	must(kage_vm_read(clone, 1u << 20, &word, sizeof(word)));
	must(word != content(0, ROUNDS));

	must(kage_engine_audit(engine, &audit));
	must(kage_engine_destroy(engine) == 0);
	must(kage_vm_destroy(a));
	must(kage_vm_destroy(b));
	must(kage_vm_destroy(clone));
	must(kage_engine_destroy(engine));
}

int main(void)
{
	struct leak before = leak_take();

	workload(&before);
	workload(&before);
	if (leak_check(&before))
		return 1;
	printf("C: version %u.%u, threads and descriptors as before\n", kage_version() >> 16,
	       kage_version() >> 8 & 255);
	return 0;
}
