/* SPDX-License-Identifier: MIT */
/*
 * A small virtual machine monitor on KVM: one VM, its vCPU threads, a serial
 * port, and its own live clones. Guest memory is not its business: it comes
 * from outside as a struct vmm_ram (ram.c: Kage's, plain.c: mmap).
 *
 * structures
 *	vmm		a VM descriptor, vCPUs, devices, the memory it was given
 *	vmm_vcpu	a vCPU descriptor, its kvm_run and its thread
 *	vmm_device	a range of ports or of guest physical addresses that the VMM answers
 *	vmm_ram		what answers all other guest physical addresses
 *	vmm_state	everything of a VM that is not memory, in this process's memory
 *
 * invariants
 *	V1. A vCPU's registers and what else KVM keeps of it are read and written by
 *	    others only while it is IDLE, PARKED or STOPPED.
 *	V2. A thread becomes PARKED only where KVM_RUN failed (EINTR, EFAULT) or
 *	    returned a full dirty ring. So every port or MMIO access that it exited for
 *	    before is completed (the next KVM_RUN does that, before it looks at
 *	    immediate_exit) and the registers are whole.
 *	V3. run->immediate_exit is set by who wants a thread out, before the signal, and
 *	    cleared only by the thread itself, under `lock`, when nobody wants it out. So
 *	    no kick is lost between the last look and KVM_RUN.
 *	V4. A thread that ends, however it ends, is STOPPED before it is gone. So nobody
 *	    waits for a dead one.
 *	V5. A vCPU's thread that waits for a lock of the memory's owner is not RUNNING: OUTSIDE
 *	    in vmm_read() and vmm_write(), PARKED in run_failed and dirty_full. So the
 *	    owner may hold that lock when it calls vmm_pause().
 *
 * locks
 *	vmm.lock: parks, pauses, states and stop flags. Nothing is called with it held.
 *
 * Why two ways to stop the guest: for its memory to stand still (vmm_pause) a
 * vCPU's thread may be in the middle of a device's access; for its state to be
 * taken (vmm_park) it may not.
 */
#ifndef KAGE_TESTS_VMM_H
#define KAGE_TESTS_VMM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <linux/kvm.h>

struct kvm_cpuid2; /* of x86 */
struct vmm;
struct vmm_vcpu;
struct vmm_ram;
struct vmm_state;
struct vmm_serial;

/* All functions that return int: 0 or -errno, if their comment says nothing else. */

/* -- memory, from outside -------------------------------------------------------------- */

#define VMM_REGIONS 4

struct vmm_region {
	uint64_t gpa, len;
};

struct vmm_ram_ops {
	/* Makes the memory slots of vmm->fd. Before vCPUs exist. */
	int (*attach)(struct vmm_ram *ram, struct vmm *vmm);
	/* Undoes attach; vCPUs do not run any more, vmm->fd is open. */
	int (*detach)(struct vmm_ram *ram);
	/* Copies the memory; the copy is not attached. vCPUs are parked. */
	int (*clone)(struct vmm_ram *ram, struct vmm_ram **copy);
	/* Frees it; it is not attached. */
	void (*destroy)(struct vmm_ram *ram);
	int (*read)(struct vmm_ram *ram, uint64_t gpa, void *buf, size_t len);
	int (*write)(struct vmm_ram *ram, uint64_t gpa, const void *buf, size_t len);
	/* The rest may be NULL. */
	/* Where this process sees [gpa, gpa + len), or NULL. */
	void *(*ptr)(struct vmm_ram *ram, uint64_t gpa, size_t len);
	/* A vCPU has been created. */
	int (*vcpu_added)(struct vmm_ram *ram, int vcpufd);
	/* KVM_RUN returned -1 with errno err, on the vCPU's thread. 0: run again; -errno: not the memory's fault. */
	int (*run_failed)(struct vmm_ram *ram, int vcpufd, const struct kvm_run *run, int err);
	/* KVM_EXIT_DIRTY_RING_FULL. */
	int (*dirty_full)(struct vmm_ram *ram);
};

/* Embedded in what implements it. */
struct vmm_ram {
	const struct vmm_ram_ops *ops;
	unsigned regions;                 /* ascending, no overlap */
	struct vmm_region region[VMM_REGIONS];
};

/*
 * Bytes of memory as PC hardware lays them out: a hole from 3 to 4 GiB. Returns the number of regions (1 or 2).
 * The arm64 machine has its devices in the same hole.
 */
unsigned vmm_pc_layout(uint64_t len, struct vmm_region region[VMM_REGIONS]);
/* plain.c: anonymous memory of this process; clones are copies made by memcpy. */
int vmm_ram_plain(const struct vmm_region *region, unsigned n, struct vmm_ram **out);

struct kage_engine;
struct kage_vm;
struct kage_kvm;
struct kage_kvm_config;
/*
 * ram.c: a guest of a Kage engine. The regions are mapped MERGEABLE into a new
 * guest. `config` may be NULL; pause, resume and opaque are filled in at attach
 * (they pause the VMM's vCPUs), the rest is copied to clones too.
 */
int vmm_ram_kage(struct kage_engine *engine, const struct vmm_region *region, unsigned n,
		 const struct kage_kvm_config *config, struct vmm_ram **out);
struct kage_vm *vmm_ram_kage_vm(struct vmm_ram *ram);
struct kage_kvm *vmm_ram_kage_kvm(struct vmm_ram *ram); /* NULL while it is not attached */

/* -- devices ---------------------------------------------------------------------------- */

enum vmm_result {
	VMM_CONTINUE = 0,
	VMM_STOP = 1, /* this vCPU's thread ends after the access is completed; vmm_vcpu_start() lets it go on */
};

enum vmm_space {
	VMM_PIO = 0,  /* x86 */
	VMM_MMIO = 1,
};

struct vmm_device {
	enum vmm_space space;
	uint64_t base, len;
	/* One access of 1, 2, 4 or 8 bytes at base + offset, on the vCPU's thread. Returns enum vmm_result or -errno. */
	int (*access)(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size, bool write);
	/* The opaque of a clone's device, vCPUs parked. NULL: the same one. Returns NULL if there is no memory. */
	void *(*clone)(void *opaque, struct vmm *parent);
	/* The VM goes. May be NULL. */
	void (*destroy)(void *opaque);
	void *opaque;
};

#define VMM_DEVICES 16

/* Before vCPUs run. -ENOSPC: VMM_DEVICES are there. Where nothing answers, reads are all ones. */
int vmm_add_device(struct vmm *vmm, const struct vmm_device *device);

/* Interrupt line `gsi` of the in-kernel chips; arm64: the number of an SPI. -ENXIO without VMM_IRQCHIP. Any thread. */
int vmm_irq(struct vmm *vmm, unsigned gsi, bool level);

/* -- the VM --------------------------------------------------------------------------------- */

enum vmm_flags {
	VMM_IRQCHIP = 1u << 0, /* in-kernel PICs, IOAPIC, LAPICs and PIT, TSS address set; arm64: GICv3, or GICv2 */
	VMM_SERIAL = 1u << 1,  /* a 16550 at VMM_SERIAL_BASE */
};

struct vmm_config {
	uint32_t flags;
	uint32_t dirty_ring_bytes;  /* not 0: KVM_CAP_DIRTY_LOG_RING(_ACQ_REL) is enabled with rings of this size */
	struct vmm_ram *ram;        /* given to the VM, if vmm_create() succeeds; NULL: the caller sets slots itself */
	uint64_t identity;          /* gpa of a struct vmm_identity that clones are given anew; 0: none */
	/* What the serial port sends. Any vCPU's thread. NULL: dropped. */
	void (*serial_out)(void *opaque, const void *bytes, size_t n);
	/*
	 * Every exit that no device takes and that is not HLT with VMM_IRQCHIP, on the vCPU's thread.
	 * Returns enum vmm_result or -errno. NULL: ports and MMIO read all ones, else the vCPU stops.
	 */
	int (*exit)(struct vmm_vcpu *vcpu, struct kvm_run *run, void *opaque);
	/* x86: changes the CPUID (what KVM supports, with this vCPU's APIC id) before it is set. NULL: taken as it is. */
	void (*cpuid)(struct kvm_cpuid2 *cpuid, unsigned index, void *opaque);
	void *opaque;
};

/* What a clone is told about itself, at config.identity, before it runs. */
struct vmm_identity {
	uint64_t id;         /* never the same twice in a process; a guest that sees it change reseeds */
	uint64_t parent;     /* its parent's id */
	uint64_t generation; /* of clones: its parent's + 1 */
	uint64_t seed;       /* random */
};

enum vmm_vcpu_state {
	VMM_IDLE = 0,    /* has no thread yet */
	VMM_RUNNING = 1, /* may be in KVM_RUN */
	VMM_OUTSIDE = 2, /* not in KVM_RUN, and not there before pauses are 0; perhaps in the middle of an access */
	VMM_PARKED = 3,  /* the same, and its registers are whole */
	VMM_STOPPED = 4, /* its thread ended; `result` says why */
};

struct vmm_vcpu {
	struct vmm *vmm;
	unsigned index;           /* 0 .. , the APIC id too; KVM makes arm64's MPIDR of it */
	int fd;
	struct kvm_run *run;
	size_t run_len;
	pthread_t thread;
	bool joinable;            /* thread is one that nobody joined */
	enum vmm_vcpu_state state;
	bool stop;                /* somebody wants the thread to end */
	bool stopping;            /* its own: VMM_STOP was returned, ends at the next EINTR */
	unsigned own_pauses;      /* vmm_pause() calls of its own thread that are open */
	int result;               /* STOPPED: 0, VMM_STOP, or -errno */
	uint32_t reason;          /* STOPPED: the last exit reason that was not an interruption */
	_Atomic uint64_t exits;   /* KVM_RUN returns other than EINTR */
	_Atomic uint64_t failed;  /* of them: -1 that run_failed put right */
	_Atomic uint64_t kicks;   /* EINTR */
};

#define VMM_VCPUS 64

struct vmm {
	int kvm, fd;
	struct vmm_config config;
	struct vmm_ram *ram;
	struct vmm_serial *serial;  /* VMM_SERIAL */
	struct vmm_device device[VMM_DEVICES];
	unsigned devices;
	struct vmm_vcpu *vcpu[VMM_VCPUS];
	unsigned vcpus;
	pthread_mutex_t lock;
	pthread_cond_t changed;     /* a vCPU's state, or parks or pauses became 0 */
	unsigned parks, pauses;     /* calls that are open */
	struct kvm_cpuid2 *cpuid;   /* x86: what KVM supports */
	int gic;                    /* arm64: descriptor of the GIC, -1: none */
	uint32_t gic_version;       /* arm64: 2 or 3 */
	bool gic_ready;             /* arm64: it knows its vCPUs */
	struct vmm_identity identity; /* the last one that vmm_identify() made */
};

/* Whether this machine can run a VM: NULL, or why not (static). */
const char *vmm_missing(void);

/*
 * Creates a VM and attaches config->ram to it. Installs, once for the process,
 * a handler that does nothing for the kick signal (SIGRTMIN + 2).
 */
int vmm_create(const struct vmm_config *config, struct vmm **out);
/* Stops the vCPUs, closes everything, destroys the memory. NULL is fine. Not on a vCPU's thread. */
void vmm_destroy(struct vmm *vmm);

/*
 * Adds a vCPU; it is created as KVM resets it (vCPU 0 runnable, others wait for SIPI or PSCI CPU_ON if VMM_IRQCHIP).
 * arm64: -EBUSY if it has VMM_IRQCHIP and a vCPU was started before.
 */
int vmm_add_vcpu(struct vmm *vmm, struct vmm_vcpu **out);

/* Gives an IDLE or STOPPED vCPU a thread (parked while parks are open). -EBUSY: it has one. */
int vmm_vcpu_start(struct vmm_vcpu *vcpu);
/* Ends its thread and waits for that. Fine if it has none. -EDEADLK on its own thread. */
int vmm_vcpu_stop(struct vmm_vcpu *vcpu);
/* All of them. */
int vmm_start(struct vmm *vmm);
void vmm_stop(struct vmm *vmm);
/* Waits until vCPU's thread ended by itself (or timeout_ms passed: -ETIMEDOUT; -1: for ever). */
int vmm_vcpu_wait(struct vmm_vcpu *vcpu, int timeout_ms);
int vmm_wait(struct vmm *vmm, int timeout_ms);

/*
 * vmm_park() returns when no vCPU is RUNNING or OUTSIDE, and none will be before as many
 * vmm_unpark(). Nests. Returns -EDEADLK on a vCPU's thread.
 */
int vmm_park(struct vmm *vmm);
void vmm_unpark(struct vmm *vmm);
/*
 * vmm_pause() returns when no vCPU is RUNNING: the guest writes no memory before as many
 * vmm_unpause(), from the same thread. Nests. On a vCPU's thread (a callback) it
 * stops the others, and this one goes on in its callback.
 */
void vmm_pause(struct vmm *vmm);
void vmm_unpause(struct vmm *vmm);
/* Makes a vCPU leave KVM_RUN once. */
void vmm_vcpu_kick(struct vmm_vcpu *vcpu);
/* The vCPU whose thread this is, or NULL. */
struct vmm_vcpu *vmm_vcpu_self(void);

/* Guest memory, through vmm->ram. -ENXIO: the VM has none. */
int vmm_read(struct vmm *vmm, uint64_t gpa, void *buf, size_t len);
int vmm_write(struct vmm *vmm, uint64_t gpa, const void *buf, size_t len);
void *vmm_ptr(struct vmm *vmm, uint64_t gpa, size_t len); /* NULL: use the two above */

/*
 * report.c: what threads and vCPUs are doing, as lines on stdout, for a guest that stands still. Parks the VM for a
 * part of it. Not on a vCPU's thread.
 */
void vmm_report(struct vmm *vmm);

/* What vcpu.c does with a kvm_run after KVM_RUN returned 0. Returns enum vmm_result or -errno. */
int vmm_dispatch(struct vmm_vcpu *vcpu);

/* -- registers ---------------------------------------------------------------------------- */

#if defined(__x86_64__)
struct vmm_entry {
	uint64_t rip, rsp, rflags;   /* rflags 0: 2, and 3002 for CPL 3 */
	uint64_t cr3;
	uint64_t rdi, rsi;
	unsigned cpl;                /* 0 or 3; 3 with IOPL 3, where KVM keeps it */
	uint64_t cr0, cr4, efer;     /* 0: 80050033, a0, d01 */
	uint64_t gdt, idt;           /* bases; the limits are those of a page if a base is set */
	uint64_t tss;                /* base of the task state segment, whose bitmap allows ports to CPL 3 */
	uint32_t tss_limit;          /* 0: 67, no bitmap */
	uint16_t cs, ss, ds;         /* selectors; 0: 0x10, 0x18, 0x18 for CPL 0, 0x33, 0x2b, 0x2b for CPL 3 */
};
#else
struct vmm_entry {
	uint64_t pc, sp;             /* sp: SP_EL1 */
	uint64_t x0, x1, x2, x3;
	uint64_t pstate;             /* 0: EL1 with its own stack, D, A, I and F masked */
	uint64_t sctlr;              /* of EL1; 0: as KVM resets it, MMU and caches off */
	uint64_t ttbr0, tcr, mair, vbar;
};
#endif
/*
 * x86: 64-bit mode with flat segments. arm64: EL1, 64 bits. Interrupts off, MP state runnable. The vCPU is
 * not RUNNING.
 */
int vmm_vcpu_enter(struct vmm_vcpu *vcpu, const struct vmm_entry *entry);

/* -- serial.c: a 16550 ----------------------------------------------------------------------- */

#if defined(__x86_64__)
#define VMM_SERIAL_SPACE VMM_PIO
#define VMM_SERIAL_BASE	 0x3f8
#define VMM_SERIAL_IRQ	 4
#else
#define VMM_SERIAL_SPACE VMM_MMIO
#define VMM_SERIAL_BASE	 0xfd000000
#define VMM_SERIAL_IRQ	 1 /* SPI */
#endif

int vmm_serial_create(struct vmm *vmm, struct vmm_serial **out);
void vmm_serial_destroy(struct vmm_serial *serial);
/* Bytes for the guest to read. Returns how many the FIFO took. Any thread. */
size_t vmm_serial_input(struct vmm_serial *serial, const void *bytes, size_t n);

/* -- state.c, x86_state.c, arm64_state.c: everything but memory ---------------------------------------------------- */

/* Takes the state of a VM; parked. What KVM cannot give is left out and counted. */
int vmm_state_save(struct vmm *vmm, struct vmm_state **out);
/*
 * Puts it into a new VM of the same flags that has no vCPU yet: makes vCPUs, none is started. Returns how many
 * registers and parts could not be set, or -errno.
 */
int vmm_state_restore(struct vmm *vmm, const struct vmm_state *state);
void vmm_state_destroy(struct vmm_state *state);
/* How many registers and parts of what this KVM has could not be read. */
unsigned vmm_state_skipped(const struct vmm_state *state);
/* Whether vCPU `index` had a thread. */
bool vmm_state_started(const struct vmm_state *state, unsigned index);

struct vmm_clone_times {
	uint64_t parked_ns;  /* how long the parent stood, from asking it to park to letting it go on */
	uint64_t park_ns;    /* of that: until all vCPUs were parked */
	uint64_t memory_ns;  /* of that: ram->ops->clone */
	uint64_t state_ns;   /* of that: vmm_state_save */
	uint64_t child_ns;   /* after the parent went on: until the child's vCPUs were started or ready */
};

struct vmm_clone_config {
	bool paused;                    /* vCPUs of the child are not started: the caller does that */
	/* Of the child, if not NULL; the rest of its config is the parent's. */
	void (*serial_out)(void *opaque, const void *bytes, size_t n);
	int (*exit)(struct vmm_vcpu *vcpu, struct kvm_run *run, void *opaque);
	void *opaque;
	struct vmm_clone_times *times;  /* filled in, if not NULL */
};
/*
 * Clones a running VM. The parent stands while its state is taken and its
 * memory cloned; the child's VM is made after that. vCPUs that were started in
 * the parent are started in the child. `config` may be NULL. -EDEADLK on a vCPU's thread.
 */
int vmm_clone(struct vmm *parent, const struct vmm_clone_config *config, struct vmm **child);
/* Writes a fresh identity at config.identity, if there is one; before the vCPUs run. `parent` may be NULL. */
int vmm_identify(struct vmm *vmm, const struct vmm_identity *parent);

/* -- between the files ---------------------------------------------------------------------------- */

void vmm_install_kick(void);
/* vmm_add_vcpu(); x86: with a given CPUID; NULL: what KVM supports, changed by config.cpuid. */
int vmm_make_vcpu(struct vmm *vmm, const struct kvm_cpuid2 *cpuid, struct vmm_vcpu **out);

/* What a 16550 knows, for the state. */
#define VMM_SERIAL_FIFO 64
struct vmm_serial_state {
	uint8_t ier, fcr, lcr, mcr, scr, dll, dlm;
	uint8_t thr_empty_pending; /* the "transmitter is empty" interrupt was not yet seen by IIR */
	uint8_t first, count;      /* of fifo */
	uint8_t fifo[VMM_SERIAL_FIFO];
};
void vmm_serial_save(struct vmm_serial *serial, struct vmm_serial_state *state);
void vmm_serial_restore(struct vmm_serial *serial, const struct vmm_serial_state *state);

/* -- boot.h: direct boot of Linux ------------------------------------------------------------------- */

/*
 * Loads a kernel (bzImage or vmlinux; arm64: Image), initrd (may be NULL) and command line into the memory of a VM with
 * one vCPU or more that are IDLE, and sets vCPU 0 to its entry.
 */
int vmm_boot_linux(struct vmm *vmm, const char *kernel, const char *initrd, const char *cmdline);

#endif
