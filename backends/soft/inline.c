/* SPDX-License-Identifier: MIT */
/*
 * The exported copies of the functions that kage/vcpu.h defines inline, for
 * callers that cannot or do not inline C. gnu_inline definitions never give a
 * symbol; here they are ordinary definitions.
 */
#include <kage/types.h>

#undef KAGE_INLINE
#define KAGE_INLINE KAGE_API
#include <kage/vcpu.h>
