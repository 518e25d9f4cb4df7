/* SPDX-License-Identifier: MIT */
/*
 * Keeps a KVM virtual machine without anything in it until it is killed.
 *
 * The first VM of a kernel and the end of the last one switch KVM on and off on all CPUs, and patch the scheduler's
 * code (preempt_notifier_key). QEMU before 8.1 may translate code while another emulated CPU writes
 * to it and keep the old translation: that CPU is caught on the patch's breakpoint, for ever, with interrupts off.
 * While this runs the kernel has no first and no last VM.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	if (kvm < 0 || ioctl(kvm, KVM_CREATE_VM, 0) < 0) {
		perror("VIRT-TROUBLE /dev/kvm");
		return 1;
	}
	for (;;)
		pause();
}
