/* SPDX-License-Identifier: MIT */
/*
 * The guest as the public API knows it: its primary MMU and, from the first
 * vCPU on, its shadow MMU.
 *
 * `shadow` is set under shadow_lock by shadow_get() and cleared when the mm
 * releases its listeners; `vcpus` and `logs` count what keeps the guest from being
 * destroyed.
 */
#ifndef KAGE_API_VM_H
#define KAGE_API_VM_H

#include "mm/mm.h"

struct shadow;

struct kage_vm {
	struct kage_engine *engine;
	struct mm mm;
	struct shadow *_Atomic shadow;
	struct lock shadow_lock;
	_Atomic uint32_t vcpus;
	_Atomic uint32_t logs; /* dirty logs that the embedder opened */
};

#endif
