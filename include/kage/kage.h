/* SPDX-License-Identifier: MIT */
/**
 * @file
 * libkage: guest memory for virtual machine monitors. Umbrella header.
 */
#ifndef KAGE_KAGE_H
#define KAGE_KAGE_H

#include <kage/types.h>
#include <kage/engine.h>
#include <kage/vm.h>
#include <kage/vcpu.h>
#include <kage/notifier.h>
#include <kage/dirty.h>
#include <kage/stats.h>
#if __has_include(<kage/kvm.h>) /* not where the library was built without it */
#include <kage/kvm.h>
#endif

KAGE_BEGIN

/** Version of the library at run time: major << 16 | minor << 8 | patch. */
KAGE_API uint32_t kage_version(void);

KAGE_END
#endif
