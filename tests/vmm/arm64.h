/* SPDX-License-Identifier: MIT */
/*
 * What the arm64 files of the VMM share: registers by number, the GIC, the machine's map.
 *
 * The machine has its devices where vmm_pc_layout() leaves memory out:
 *	c000 0000	ports of payloads (payload.h)
 *	fd00 0000	serial port
 *	fe00 0000	GIC distributor; GICv2: CPU interfaces at fe01 0000
 *	fe10 0000	GICv3: redistributors, 128 KiB for each vCPU
 */
#ifndef KAGE_TESTS_VMM_ARM64_H
#define KAGE_TESTS_VMM_ARM64_H

#include "arch.h"

#define ARM64_GICD     0xfe000000u
#define ARM64_GICD_LEN 0x10000u
#define ARM64_GICC     0xfe010000u
#define ARM64_GICC_LEN 0x2000u
#define ARM64_GICR     0xfe100000u
#define ARM64_GICR_ONE 0x20000u /* two frames of 64 KiB */
#define ARM64_SPIS     32u	/* interrupts beside the 32 of each vCPU's own */

#define ARM64_CORE(field) (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(field))
#define ARM64_MPIDR	  ARM64_SYS_REG(3, 0, 0, 0, 5)

/* A register of a vCPU that is not RUNNING. The buffer is of the register's size. */
int arm64_get(int vcpufd, uint64_t id, void *value);
int arm64_set(int vcpufd, uint64_t id, const void *value);
int arm64_set64(int vcpufd, uint64_t id, uint64_t value);

/* -- arm64_gic.c ------------------------------------------------------------------------ */

/* Creates the one of the two that this KVM has, GICv3 first: vmm->gic, vmm->gic_version. No vCPU exists. */
int arm64_gic_create(struct vmm *vmm);
/* All vCPUs exist, none has run. */
int arm64_gic_init(struct vmm *vmm);

struct arm64_gic_state;
/* vCPUs are parked. -errno. */
int arm64_gic_save(struct vmm *vmm, struct arm64_gic_state **out);
/* Into a GIC of the same version, after arm64_gic_init(). -errno. */
int arm64_gic_restore(struct vmm *vmm, const struct arm64_gic_state *state);
void arm64_gic_free(struct arm64_gic_state *state);

#endif
