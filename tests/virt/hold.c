/* SPDX-License-Identifier: MIT */
/*
 * Keeps two KVM virtual machines that never run until it is killed.
 *
 * KVM switches parts of itself on and off by patching the kernel's code (static keys): itself on all CPUs and the
 * scheduler's preempt_notifier_key with the first VM and the end of the last one; on x86 apic_sw_disabled while there is
 * a vCPU whose APIC its guest has not enabled yet, so for each new vCPU once, and kvm_has_noapic_vcpu with vCPUs
 * without one. QEMU before 8.1 may translate code while another emulated CPU writes to it and keep the old translation.
 * That CPU is then caught on the patch's breakpoint, which is no longer there, for ever. (-d int shows it: exception 3
 * from one address of kvm.ko without end.) While this runs none of these keys becomes zero, and nothing is patched.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int hold(int kvm, int chips)
{
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);

	if (vm < 0 || (chips && ioctl(vm, KVM_CREATE_IRQCHIP, NULL) < 0))
		return -errno;
	return ioctl(vm, KVM_CREATE_VCPU, 0) < 0 ? -errno : 0;
}

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	if (kvm < 0 || hold(kvm, 1) < 0 || hold(kvm, 0) < 0) {
		perror("VIRT-TROUBLE /dev/kvm");
		return 1;
	}
	for (;;)
		pause();
}
