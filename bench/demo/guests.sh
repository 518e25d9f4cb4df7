#!/bin/sh
# SPDX-License-Identifier: MIT
# Makes the guests of the demo: guests.sh BINDIR OUTDIR
#
# BINDIR holds kage-demo-qmp and kage-demo-synthetic. In OUTDIR it leaves, for N = 1, 2, 3 (and more, see below),
#   guestN.ram     guest physical memory from address 0 (below 3 GiB the PC's RAM is flat)
#   guestN.regs    cr0, cr3, cr4, efer of CPU 0 while it is stopped in the kernel
#   guestN.sha256  sha256sum of guestN.ram, taken while the guest was stopped
#   how            one line: what the guests are; begins with "qemu" or "synthetic"
#
# The guests are Debian's cloud kernel under QEMU TCG, or, where there is no QEMU or
# no kernel to be had, synthetic images; then it says so loudly. Guests that do not come up are
# an error. Environment:
#   KAGE_DEMO_SYNTHETIC  1: synthetic without trying; never: fail instead
#   KAGE_DEMO_MIB        size of a guest, default 160
#   KAGE_DEMO_GUESTS     how many, 3 to 9, default 3: those from the fourth on are as the first is
set -u

bin=$1
out=$2
here=$(cd "$(dirname "$0")" && pwd)
mib=${KAGE_DEMO_MIB:-160}
mode=${KAGE_DEMO_SYNTHETIC:-}
count=${KAGE_DEMO_GUESTS:-3}
all=$(seq "$count")
limit=120 # seconds until a guest must be ready
tmp=

say() { printf '  %s\n' "$*"; }
now() { date +%s%N; }
since() { echo $((($(now) - $1) / 1000000)); }

# The QEMUs are this script's own children: nothing of them outlives it.
stop_all() {
	for i in $all; do
		eval "pid=\${pid$i:-}"
		[ -n "$pid" ] || continue
		kill "$pid" 2>/dev/null
		wait "$pid"
		eval "pid$i="
	done
}
cleanup() {
	stop_all
	[ -n "$tmp" ] && rm -rf "$tmp"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

synthetic() {
	reason=$1
	stop_all
	rm -f "$out"/guest*
	if [ "$mode" = never ]; then
		echo "guests.sh: no real guests ($reason) and KAGE_DEMO_SYNTHETIC=never" >&2
		exit 1
	fi
	echo
	echo "  **********************************************************************"
	echo "  SYNTHETIC: no QEMU/kernel to be had: $reason"
	echo "  What follows runs on generated images, not on the memory of real guests."
	echo "  **********************************************************************"
	echo
	"$bin/kage-demo-synthetic" "$out" "$mib" || exit 1
	for i in 1 2 3; do
		sha256sum <"$out/guest$i.ram" | cut -d' ' -f1 >"$out/guest$i.sha256" || exit 1
	done
	echo "synthetic: $reason" >"$out/how"
	exit 0
}

fail() {
	echo "guests.sh: $*" >&2
	exit 1
}

# The kernel of the package that linux-image-cloud-amd64 depends on, unpacked and not installed.
fetch_kernel() {
	meta=linux-image-cloud-amd64
	[ -f "$kernel/vmlinuz" ] && return 0
	pkg=$(apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-[^ ]*\)$/\1/p' | head -n 1)
	if [ -z "$pkg" ] && [ "$(id -u)" = 0 ]; then
		apt-get -qq update >/dev/null 2>&1
		pkg=$(apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-[^ ]*\)$/\1/p' | head -n 1)
	fi
	[ -n "$pkg" ] || { why="apt knows no $meta"; return 1; }
	say "fetching $pkg"
	rm -rf "$kernel"
	mkdir -p "$kernel"
	if ! (cd "$kernel" && apt-get -qq download "$pkg") >"$kernel/log" 2>&1; then
		[ "$(id -u)" = 0 ] && apt-get -qq update >>"$kernel/log" 2>&1
		(cd "$kernel" && apt-get -qq download "$pkg") >>"$kernel/log" 2>&1 ||
			{ why="apt-get download $pkg failed, see $kernel/log"; return 1; }
	fi
	dpkg-deb -x "$kernel"/*.deb "$kernel/root" 2>>"$kernel/log" ||
		{ why="dpkg-deb -x failed, see $kernel/log"; return 1; }
	set -- "$kernel"/root/boot/vmlinuz-*
	[ -f "$1" ] || { why="$pkg has no boot/vmlinuz"; return 1; }
	basename "$1" | sed 's/^vmlinuz-//' >"$kernel/release"
	mv "$1" "$kernel/vmlinuz"
	rm -rf "$kernel/root" "$kernel"/*.deb
}

make_initramfs() {
	busybox=$(command -v busybox)
	mkdir -p "$tmp/root/bin" &&
		cp "$busybox" "$tmp/root/bin/busybox" &&
		cp "$here/init.sh" "$tmp/root/init" &&
		chmod 755 "$tmp/root/init" "$tmp/root/bin/busybox" &&
		(cd "$tmp/root" && find . | cpio -o -H newc) >"$tmp/initrd" 2>"$tmp/cpio.log" ||
		{ why="cannot make an initramfs: $(tail -n 1 "$tmp/cpio.log")"; return 1; }
}

# Three kinds of address space: plain; kernel page-table isolation; five levels.
start_guest() {
	cpu=max,la57=off
	extra=
	[ "$1" = 2 ] && extra=pti=on
	[ "$1" = 3 ] && cpu=max
	qemu-system-x86_64 -nodefaults -display none -accel tcg -cpu $cpu -smp 1 -m "${mib}M" \
		-object "memory-backend-file,id=ram,size=${mib}M,mem-path=$out/guest$1.ram,share=on" \
		-machine pc,memory-backend=ram -serial "file:$tmp/console$1" \
		-qmp "unix:$tmp/qmp$1,server=on,wait=off" -kernel "$kernel/vmlinuz" -initrd "$tmp/initrd" \
		-append "console=ttyS0 quiet panic=-1 kage.guest=$1 $extra" -no-reboot \
		</dev/null >"$tmp/qemu$1" 2>&1 &
	eval "pid$1=$!"
}

wait_ready() {
	eval "pid=\$pid$1"
	while ! grep -q "KAGE-DEMO-READY $1" "$tmp/console$1" 2>/dev/null; do
		kill -0 "$pid" 2>/dev/null ||
			{ why="guest $1 died (too little memory?): $(cat "$tmp/qemu$1" "$tmp/console$1" 2>/dev/null | tail -n 3)"; return 1; }
		[ "$(since "$t0")" -lt $((limit * 1000)) ] || { why="guest $1 was not ready in $limit s"; return 1; }
		sleep 0.1
	done
	say "guest $1 ready after $(since "$t0") ms"
}

# Stops it inside the kernel: CR3 of user mode may not map the kernel's text.
stop_guest() {
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		"$bin/kage-demo-qmp" "$tmp/qmp$1" stop "hmp:info registers" >"$tmp/info$1" ||
			{ why="QMP of guest $1 failed"; return 1; }
		grep -q 'CPL=0' "$tmp/info$1" && return 0
		"$bin/kage-demo-qmp" "$tmp/qmp$1" cont || { why="QMP of guest $1 failed"; return 1; }
		sleep 0.2
	done
	why="guest $1 was never found in its kernel"
	return 1
}

take_guest() {
	for r in CR0 CR3 CR4 EFER; do
		v=$(tr ' ' '\n' <"$tmp/info$1" | sed -n "s/^$r *=\([0-9a-f][0-9a-f]*\).*/\1/p" | head -n 1)
		[ -n "$v" ] || { why="no $r from guest $1"; return 1; }
		echo "$(echo $r | tr '[:upper:]' '[:lower:]') 0x$v"
	done >"$out/guest$1.regs"
	sha256sum <"$out/guest$1.ram" | cut -d' ' -f1 >"$out/guest$1.sha256"
	eval "pid=\$pid$1"
	"$bin/kage-demo-qmp" "$tmp/qmp$1" quit || kill "$pid" 2>/dev/null
	wait "$pid"
	eval "pid$1="
	say "guest $1 stopped: $(tr '\n' ' ' <"$out/guest$1.regs")sha256 $(cut -c1-12 "$out/guest$1.sha256")..."
}

mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
kernel=$out/kernel
rm -f "$out"/guest* "$out/how"
why=

[ "$mode" = 1 ] && synthetic "KAGE_DEMO_SYNTHETIC=1 asks for it"
for tool in qemu-system-x86_64 busybox cpio apt-get dpkg-deb sha256sum; do
	command -v $tool >/dev/null 2>&1 || synthetic "$tool is missing"
done
# Short: a Unix socket's path has at most 107 bytes.
tmp=$(mktemp -d "${TMPDIR:-/tmp}/kage-demo.XXXXXX") || exit 1
fetch_kernel && make_initramfs || synthetic "$why"
release=$(cat "$kernel/release")

say "booting $count guests of $mib MiB, Debian kernel $release, QEMU TCG"
t0=$(now)
for i in $all; do start_guest $i; done
for i in $all; do
	wait_ready $i && stop_guest $i && take_guest $i || fail "$why"
done
echo "qemu: $count Debian guests, kernel $release, $(qemu-system-x86_64 --version | sed -n '1s/ (.*//p')" >"$out/how"
