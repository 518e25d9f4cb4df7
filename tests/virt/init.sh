#!/bin/busybox sh
# SPDX-License-Identifier: MIT
# /init of a machine of the virt suite. What the harness reads begins with VIRT- (result.c).
# Each test is a session of its own: Check ends by killing its process group. /leg says what to do, one a line:
#   module NAME PARAMETER...           insmod
#   background PROGRAM                 runs until the end
#   test NAME SECONDS COMMAND...       COMMAND may begin with VARIABLE=value
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
# Limits of Check's cases do not have emulation in mind.
export PATH=/bin LD_LIBRARY_PATH=/lib CK_TIMEOUT_MULTIPLIER=20
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmpfs /tmp
tty=/dev/$(sed -n 's/.*console=\([a-zA-Z0-9]*\).*/\1/p' /proc/cmdline)
exec </dev/null >"$tty" 2>&1
cd /tmp || poweroff -f

sed -n 's/^module //p' /leg | while read -r name parameters; do
	# shellcheck disable=SC2086
	insmod "/modules/$name.ko" $parameters || echo "VIRT-TROUBLE insmod $name"
done
for program in $(sed -n 's/^background //p' /leg); do $program & done
# How KVM came up: parameters of the module, or what it said when it was built in.
mode=$(dmesg | sed -n 's/.*kvm \[1\]: \(.* mode initialized\).*/\1/p' | tail -n 1)
for file in /sys/module/kvm_amd/parameters/npt; do
	[ ! -e $file ] || mode="npt=$(cat $file)"
done
echo "VIRT-KERNEL $(uname -r), $(nproc) CPUs, KVM: $mode"

grep '^test ' /leg | while read -r _ name seconds command; do
	echo "VIRT-BEGIN $name"
	begin=$(cut -d. -f1 /proc/uptime)
	# shellcheck disable=SC2086
	setsid timeout -k 5 "$seconds" env $command </dev/null
	status=$?
	echo "VIRT-END $name status $status seconds $(($(cut -d. -f1 /proc/uptime) - begin))"
done
dmesg | grep -E 'BUG|WARNING|Oops|Out of memory' | sed 's/^/VIRT-TROUBLE /'
echo "VIRT-DONE"
poweroff -f
