#!/bin/busybox sh
# SPDX-License-Identifier: MIT
# /init of the outer machine of nested.sh: its KVM is SVM as QEMU emulates it. Runs what /runs lists, one a line:
#   NPT NAME OPTIONS-OF-vmm-linux KERNEL
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin LD_LIBRARY_PATH=/lib
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
exec </dev/null >/dev/ttyS0 2>&1

insmod /modules/irqbypass.ko
insmod /modules/kvm.ko
echo "OUTER kernel $(uname -r), $(nproc) CPUs, up $(cut -d' ' -f1 /proc/uptime)"
loaded=
while read -r npt name options; do
	if [ "$npt" != "$loaded" ]; then
		[ -z "$loaded" ] || rmmod kvm_amd
		insmod /modules/kvm-amd.ko npt="$npt" || break
		loaded=$npt
	fi
	begin=$(cut -d. -f1 /proc/uptime)
	# shellcheck disable=SC2086
	timeout 400 /vmm-linux $options /inner.cpio.gz
	echo "OUTER-RESULT $name status $? seconds $(($(cut -d. -f1 /proc/uptime) - begin)) npt $(cat /sys/module/kvm_amd/parameters/npt)"
done </runs
dmesg | grep -E 'BUG|WARNING|Oops|Out of memory' | sed 's/^/OUTER-BAD /'
echo "OUTER-DONE"
poweroff -f
