#!/bin/busybox sh
# SPDX-License-Identifier: MIT
# /init of the guests of virt-beside: says on the console where things lie, then writes to a page now and then.
#
#   KAGE-VERSION TEXT          /proc/version: what linux_banner holds
#   KAGE-SYMBOL ADDRESS NAME   from /proc/kallsyms, so with the kernel's randomised base in it
#   KAGE-QUIET GPA TEXT        a page that holds lines of TEXT and is not written any more
#   KAGE-READY
#   KAGE-WRITE GPA TEXT        a page that has just been filled with lines of TEXT, "... round N"
#
# The pages are the unused part of a sleeping process's stack: written through /proc/PID/mem, found in the
# guest's physical memory by /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst). Nobody swaps here.
/bin/busybox mkdir -p /proc /dev
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1

guest=$(sed -n 's/.*kage\.guest=\([0-9]*\).*/\1/p' /proc/cmdline)

# gpa of page N of the stack, in hexadecimal
gpa() {
	entry=$(dd if="/proc/$pid/pagemap" bs=8 skip=$((first + $1)) count=1 2>/dev/null | od -An -t x8 | tr -d ' ')
	printf '%x' $(((0x$entry & (1 << 55) - 1) << 12))
}

# put WHAT N TEXT: fills page N, says so
put() {
	yes "$3" | head -c 4096 | dd of="/proc/$pid/mem" bs=4096 seek=$((first + $2)) conv=notrunc 2>/dev/null
	echo "KAGE-$1 $(gpa "$2") $3"
}

sed 's/^/KAGE-VERSION /' /proc/version
sed -n 's/^\([0-9a-f]*\) [A-Za-z] \(linux_banner\|_stext\|init_top_pgt\)$/KAGE-SYMBOL \1 \2/p' /proc/kallsyms
sleep 1000000 &
pid=$!
sleep 1
first=$((0x$(sed -n 's/^\([0-9a-f]*\)-.*\[stack\]$/\1/p' "/proc/$pid/maps") >> 12))
for page in 1 2 3 4 5 6 7 8 9 10 11 12; do
	put QUIET $page "guest $guest quiet page $page"
done
echo "KAGE-READY"
round=0
while :; do
	round=$((round + 1))
	put WRITE $((13 + round % 8)) "guest $guest round $round"
	sleep 0.2
done
