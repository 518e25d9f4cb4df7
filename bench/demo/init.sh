#!/bin/busybox sh
# SPDX-License-Identifier: MIT
# /init of the demo's guests. Fills a tmpfs with data that all guests have and
# with data of this guest alone, says so on the serial console, and sleeps.
/bin/busybox mkdir -p /proc /sys /dev /data
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=96m tmpfs /data
exec </dev/console >/dev/ttyS0 2>&1

n=$(sed -n 's/.*kage\.guest=\([0-9]*\).*/\1/p' /proc/cmdline)

# the same in every guest
for i in 1 2 3 4; do cp /bin/busybox /data/busybox.$i; done
seq 1 400000 >/data/common.txt
dd if=/dev/zero of=/data/zero bs=1M count=4 2>/dev/null

# this guest's own
dd if=/dev/urandom of=/data/own.random bs=1M count=$((4 + n)) 2>/dev/null
awk -v n="$n" 'BEGIN { for (i = 0; i < 100000; i++) print "guest", n, "line", i }' >/data/own.txt
dd if=/dev/urandom of=/data/gone bs=1M count=3 2>/dev/null
rm /data/gone

sync
echo "KAGE-DEMO-READY $n"
while :; do sleep 1000; done
