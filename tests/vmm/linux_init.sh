#!/bin/busybox sh
# SPDX-License-Identifier: MIT
# /init of the guest that test_linux.c boots and clones; the conversation is described there.
/bin/busybox mkdir -p /proc /sys /dev /data
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=64m tmpfs /data
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo

identity=$(sed -n 's/.*kage\.identity=\(0x[0-9a-f]*\).*/\1/p' /proc/cmdline)
digest() { sha256sum "$1" | cut -c1-64; }

dd if=/dev/urandom of=/data/common bs=1M count=6 2>/dev/null
common=$(digest /data/common)

# A reader of what was there before the clone for each CPU, about half of the time.
watch() {
	while [ ! -e /data/off ]; do
		[ "$(digest /data/common)" = "$common" ] || echo "KAGE-BAD common"
		sleep 0.3
	done
}
for _ in $(seq "$(nproc)"); do watch & done

mib=$(awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
echo "KAGE-READY cpus $(nproc) mib $mib common $common"
while read -r command; do
	case $command in
	go)
		id=$(devmem "$identity" 64)
		generation=$(devmem $((identity + 16)) 64)
		yes "I am guest $id of $common" | dd of=/data/own bs=64k count=64 iflag=fullblock 2>/dev/null
		echo "KAGE-PROOF id $id generation $generation common $(digest /data/common) own $(digest /data/own)"
		;;
	off)
		touch /data/off
		poweroff -f
		;;
	esac
done
echo "KAGE-BAD the console ended"
