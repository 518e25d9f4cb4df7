/* SPDX-License-Identifier: MIT */
/*
 * A 16550A as far as drivers look at it: transmission is instant, reception
 * has a FIFO, interrupts follow IER and MCR.OUT2, and the loop mode by which
 * Linux finds out that a port is real. Registers: PC16550D data sheet, National
 * Semiconductor, 1995, section 8.
 *
 * invariants
 *	S1. The level of the interrupt line is a function of the registers and is set
 *	    after every change of them, so a port is its registers and nothing else.
 *
 * locks
 *	serial->lock: the registers, and the order in which the line changes. serial_out
 *	is called without it: guests let one vCPU at a time write to a port.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vmm.h"

enum {
	IER_RX = 1, IER_THRE = 2,
	IIR_NONE = 1, IIR_THRE = 2, IIR_RX = 4, IIR_FIFOS = 0xc0,
	FCR_ENABLE = 1, FCR_CLEAR_RX = 2,
	LCR_DLAB = 0x80,
	MCR_DTR = 1, MCR_RTS = 2, MCR_OUT1 = 4, MCR_OUT2 = 8, MCR_LOOP = 0x10,
	LSR_READY = 1, LSR_EMPTY = 0x60,
	MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80,
};

struct vmm_serial {
	struct vmm *vmm;
	pthread_mutex_t lock;
	struct vmm_serial_state s;
};

static uint8_t pending(const struct vmm_serial_state *s)
{
	if ((s->ier & IER_RX) && s->count)
		return IIR_RX;
	if ((s->ier & IER_THRE) && s->thr_empty_pending)
		return IIR_THRE;
	return IIR_NONE;
}

static void push(struct vmm_serial_state *s, uint8_t byte)
{
	if (s->count == VMM_SERIAL_FIFO)
		return;
	s->fifo[(s->first + s->count++) % VMM_SERIAL_FIFO] = byte;
}

static uint8_t pop(struct vmm_serial_state *s)
{
	uint8_t byte;

	if (!s->count)
		return 0;
	byte = s->fifo[s->first];
	s->first = (s->first + 1) % VMM_SERIAL_FIFO;
	s->count--;
	return byte;
}

static uint8_t modem_status(const struct vmm_serial_state *s)
{
	if (!(s->mcr & MCR_LOOP))
		return MSR_CTS | MSR_DSR | MSR_DCD;
	return (s->mcr & MCR_RTS ? MSR_CTS : 0) | (s->mcr & MCR_DTR ? MSR_DSR : 0) |
	       (s->mcr & MCR_OUT1 ? MSR_RI : 0) | (s->mcr & MCR_OUT2 ? MSR_DCD : 0);
}

static uint8_t identification(struct vmm_serial_state *s)
{
	uint8_t iir = pending(s);

	if (iir == IIR_THRE)
		s->thr_empty_pending = 0;
	return iir | (s->fcr & FCR_ENABLE ? IIR_FIFOS : 0);
}

static uint8_t get(struct vmm_serial_state *s, unsigned reg)
{
	switch (reg) {
	case 0:
		return s->lcr & LCR_DLAB ? s->dll : pop(s);
	case 1:
		return s->lcr & LCR_DLAB ? s->dlm : s->ier;
	case 2:
		return identification(s);
	case 3:
		return s->lcr;
	case 4:
		return s->mcr;
	case 5:
		return LSR_EMPTY | (s->count ? LSR_READY : 0);
	case 6:
		return modem_status(s);
	default:
		return s->scr;
	}
}

/* Returns true if the byte goes out. */
static bool transmit(struct vmm_serial_state *s, uint8_t value)
{
	s->thr_empty_pending = 1;
	if (s->mcr & MCR_LOOP)
		push(s, value);
	return !(s->mcr & MCR_LOOP);
}

static bool put(struct vmm_serial_state *s, unsigned reg, uint8_t value)
{
	if (reg == 0 && !(s->lcr & LCR_DLAB))
		return transmit(s, value);
	if (reg == 0)
		s->dll = value;
	else if (reg == 1 && (s->lcr & LCR_DLAB))
		s->dlm = value;
	else if (reg == 1) {
		if (~s->ier & value & IER_THRE) /* switching it on while the transmitter is empty interrupts */
			s->thr_empty_pending = 1;
		s->ier = value & 0xf;
	} else if (reg == 2) {
		s->fcr = value;
		if (value & FCR_CLEAR_RX)
			s->count = 0;
	} else if (reg == 3)
		s->lcr = value;
	else if (reg == 4)
		s->mcr = value & 0x1f;
	else if (reg == 7)
		s->scr = value;
	return false;
}

/* S1. Without chips in the kernel there is no line, and nobody to tell. */
static void set_line_locked(struct vmm_serial *serial)
{
	const struct vmm_serial_state *s = &serial->s;

	vmm_irq(serial->vmm, VMM_SERIAL_IRQ,
		pending(s) != IIR_NONE && (s->mcr & (MCR_OUT2 | MCR_LOOP)) == MCR_OUT2);
}

static int access_port(struct vmm_vcpu *vcpu, void *opaque, uint64_t offset, void *data, unsigned size, bool write)
{
	struct vmm_serial *serial = opaque;
	const struct vmm_config *config = &vcpu->vmm->config;
	uint8_t *byte = data;
	bool out = false;

	if (!write)
		memset(data, 0xff, size);
	pthread_mutex_lock(&serial->lock);
	if (write)
		out = put(&serial->s, offset, *byte);
	else
		*byte = get(&serial->s, offset);
	set_line_locked(serial);
	pthread_mutex_unlock(&serial->lock);
	if (out && config->serial_out != NULL)
		config->serial_out(config->opaque, byte, 1);
	return VMM_CONTINUE;
}

int vmm_serial_create(struct vmm *vmm, struct vmm_serial **out)
{
	struct vmm_serial *serial = calloc(1, sizeof(*serial));
	struct vmm_device device = {VMM_SERIAL_SPACE, VMM_SERIAL_BASE, 8, access_port, NULL, NULL, serial};
	int r;

	if (serial == NULL)
		return -ENOMEM;
	serial->vmm = vmm;
	pthread_mutex_init(&serial->lock, NULL);
	r = vmm_add_device(vmm, &device);
	if (r < 0) {
		vmm_serial_destroy(serial);
		return r;
	}
	*out = serial;
	return 0;
}

void vmm_serial_destroy(struct vmm_serial *serial)
{
	if (serial == NULL)
		return;
	pthread_mutex_destroy(&serial->lock);
	free(serial);
}

size_t vmm_serial_input(struct vmm_serial *serial, const void *bytes, size_t n)
{
	const uint8_t *byte = bytes;
	size_t i;

	pthread_mutex_lock(&serial->lock);
	for (i = 0; i < n && serial->s.count < VMM_SERIAL_FIFO; i++)
		push(&serial->s, byte[i]);
	set_line_locked(serial);
	pthread_mutex_unlock(&serial->lock);
	return i;
}

void vmm_serial_save(struct vmm_serial *serial, struct vmm_serial_state *state)
{
	pthread_mutex_lock(&serial->lock);
	*state = serial->s;
	pthread_mutex_unlock(&serial->lock);
}

/* The line's level is part of the chips' state. */
void vmm_serial_restore(struct vmm_serial *serial, const struct vmm_serial_state *state)
{
	pthread_mutex_lock(&serial->lock);
	serial->s = *state;
	pthread_mutex_unlock(&serial->lock);
}
