#!/bin/sh
# SPDX-License-Identifier: MIT
# Boots Linux on Kage's memory under KVM, where KVM may be had for nothing: inside QEMU.
#
#   nested.sh VMM-LINUX [OUTDIR]      the program of test_linux.c; default build/nested
#
# QEMU's emulation (TCG) of an AMD CPU has SVM with nested paging, so Debian's cloud kernel in it
# offers a real /dev/kvm. In there vmm-linux boots the same kernel once more, clones it
# while it runs, and checks what the guests say. This script then checks the digests
# that the guests printed: each is of a text made from the identity of that guest.
#
# Last line: PASS, FAIL or SKIP with a reason; exit 0, 1, 77. Environment:
#   KAGE_NESTED_RUNS     names of the runs, default clone elf large shadow; plain is a control
#   KAGE_NESTED_TIMEOUT  seconds for everything, default 600
#   KAGE_LINUX_BOOT      1: on this machine's own /dev/kvm instead, if that is any good
#
# This machine's KVM is not used without being asked, as a KVM without hardware
# assistance (one that emulates the guest's kernel mode) needs minutes to boot Linux or cannot.
set -u

[ $# -ge 1 ] || { echo "usage: nested.sh VMM-LINUX [OUTDIR]" >&2; exit 2; }
vmm=$1
out=${2:-build/nested}
here=$(cd "$(dirname "$0")" && pwd)
runs=${KAGE_NESTED_RUNS:-clone elf large shadow}
limit=${KAGE_NESTED_TIMEOUT:-600}
tmp=
qemu=

skip() { echo "SKIP: $*"; exit 77; }
fail() { echo "FAIL: $*"; exit 1; }
cleanup() {
	[ -z "$qemu" ] || { kill "$qemu" 2>/dev/null; wait "$qemu"; }
	[ -z "$tmp" ] || rm -rf "$tmp"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

# The package that linux-image-cloud-amd64 depends on, unpacked and not installed.
fetch_kernel() {
	[ -f "$out/kernel/release" ] && return
	pkg=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
		sed -n 's/^ *Depends: *\(linux-image-[^ ]*\)$/\1/p' | head -n 1)
	[ -n "$pkg" ] || skip "apt knows no linux-image-cloud-amd64"
	rm -rf "$out/kernel"
	mkdir -p "$out/kernel"
	(cd "$out/kernel" && apt-get -qq download "$pkg") >"$out/kernel/log" 2>&1 || skip "cannot download $pkg"
	dpkg-deb -x "$out"/kernel/*.deb "$out/kernel/root" || fail "dpkg-deb -x"
	rm "$out"/kernel/*.deb
	basename "$out"/kernel/root/boot/vmlinuz-* | sed 's/^vmlinuz-//' >"$tmp/release"
	mv "$tmp/release" "$out/kernel/release" # last: it says that the rest is there
}

number() { od -An -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# vmlinux, out of a bzImage: payload_offset and payload_length of the setup header; a length follows an lz4 stream.
unpack_vmlinux() {
	at=$((($(number "$1" $((0x1f1)) 1) + 1) * 512 + $(number "$1" $((0x248)) 4)))
	len=$(number "$1" $((0x24c)) 4)
	tail -c +$((at + 1)) "$1" | head -c $((len - 4)) >"$tmp/payload"
	case $(od -An -t x1 -N 4 "$tmp/payload" | tr -d ' ') in
	02214c18) tool=lz4 ;;
	1f8b*) tool=gzip ;;
	fd377a58) tool=xz ;;
	28b52ffd) tool=zstd ;;
	*) return 1 ;;
	esac
	command -v $tool >/dev/null 2>&1 || return 1
	$tool -dc <"$tmp/payload" >"$2" 2>"$tmp/unpack.log" || return 1
}

make_inner() {
	mkdir -p "$tmp/inner/bin" &&
		cp "$(command -v busybox)" "$tmp/inner/bin/busybox" &&
		cp "$here/linux_init.sh" "$tmp/inner/init" &&
		chmod 755 "$tmp/inner/init" &&
		(cd "$tmp/inner" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$tmp/inner.cpio.gz" ||
		fail "cannot make the inner initramfs"
}

# The program; its libraries in /lib (nested_init.sh names it), the loader where the program looks for it.
copy_program() {
	mkdir -p "$tmp/outer/lib"
	cp "$1" "$tmp/outer/vmm-linux"
	ldd "$1" 2>/dev/null | sed -n 's/.*=> *\(\/[^ ]*\).*/\1/p' | while read -r lib; do
		cp -L "$lib" "$tmp/outer/lib/"
	done
	ldd "$1" 2>/dev/null | sed -n 's/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p' | while read -r lib; do
		mkdir -p "$tmp/outer$(dirname "$lib")"
		cp -L "$lib" "$tmp/outer$lib"
	done
}

add_run() {
	case $1 in
	clone) echo "1 clone --mib 128 --cpus 2 --clones 2 --merge --timeout 150 /vmlinuz" ;;
	elf)
		[ -f "$tmp/outer/vmlinux" ] && echo "1 elf --mib 128 --cpus 1 --clones 1 /vmlinux" ||
			echo "nested.sh: run elf left out: no tool to unpack the kernel" >&2
		;;
	large) echo "1 large --mib 3584 --cpus 3 --clones 1 /vmlinuz" ;;
	plain) echo "1 plain --plain --mib 128 --cpus 2 --clones 1 /vmlinuz" ;;
	shadow) echo "0 shadow --mib 128 --cpus 2 --clones 1 --timeout 150 /vmlinuz" ;;
	*) fail "no run is called $1" ;;
	esac
}

make_outer() {
	mkdir -p "$tmp/outer/bin" "$tmp/outer/modules"
	cp "$(command -v busybox)" "$tmp/outer/bin/busybox"
	cp "$here/nested_init.sh" "$tmp/outer/init"
	chmod 755 "$tmp/outer/init"
	for m in virt/lib/irqbypass arch/x86/kvm/kvm arch/x86/kvm/kvm-amd; do
		cp "$out/kernel/root/lib/modules/$release/kernel/$m.ko" "$tmp/outer/modules/" ||
			skip "the kernel package has no $m.ko"
	done
	cp "$vmlinuz" "$tmp/outer/vmlinuz"
	unpack_vmlinux "$vmlinuz" "$tmp/outer/vmlinux" || rm -f "$tmp/outer/vmlinux"
	cp "$tmp/inner.cpio.gz" "$tmp/outer/"
	copy_program "$vmm"
	for r in $runs; do add_run "$r"; done >"$tmp/outer/runs"
	(cd "$tmp/outer" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$tmp/outer.cpio.gz" ||
		fail "cannot make the outer initramfs"
}

# No warning of qemu64: TCG has all that it names.
run_qemu() {
	timeout "$limit" qemu-system-x86_64 -nodefaults -display none -accel tcg -machine pc -cpu qemu64,+svm,+npt \
		-smp 2 -m 1280M -serial "file:$out/console" -kernel "$vmlinuz" -initrd "$tmp/outer.cpio.gz" \
		-append "console=ttyS0 quiet panic=-1" -no-reboot </dev/null >"$tmp/qemu.log" 2>&1 &
	qemu=$!
	wait "$qemu"
	status=$?
	qemu=
	tr -d '\r' <"$out/console" >"$tmp/console"
	cat "$tmp/console"
	[ $status = 0 ] || fail "QEMU ended with $status (after $limit s it is stopped): $(cat "$tmp/qemu.log")"
}

# What each guest wrote is a function of its identity and of its family's random data, and nobody else's.
check_digests() {
	checked=0
	sed -n 's/.*KAGE-PROOF id \(0x[0-9A-F]*\) .* common \([0-9a-f]*\) own \([0-9a-f]*\)$/\1 \2 \3/p' "$1" |
		sort -u >"$tmp/proofs"
	while read -r id common own; do
		want=$(yes "I am guest $id of $common" | head -c $((4 << 20)) | sha256sum | cut -c1-64)
		[ "$want" = "$own" ] || fail "guest $id wrote something else: $own, not $want"
		checked=$((checked + 1))
	done <"$tmp/proofs"
	[ $checked -gt 0 ] || fail "no guest has proved anything"
}

on_host() {
	[ -w /dev/kvm ] || skip "there is no /dev/kvm that can be opened"
	kernel=$vmlinuz
	if ! grep -qwE 'vmx|svm' /proc/cpuinfo; then
		echo "nested.sh: no vmx or svm in /proc/cpuinfo: this KVM emulates, expect minutes"
		unpack_vmlinux "$vmlinuz" "$tmp/vmlinux" || skip "no tool to unpack the kernel; this KVM needs vmlinux"
		kernel=$tmp/vmlinux
	fi
	timeout "$limit" "$vmm" --mib 256 --cpus 1 --clones 1 --timeout "$limit" "$kernel" "$tmp/inner.cpio.gz" >"$tmp/console" 2>&1
	status=$?
	tr -d '\r' <"$tmp/console"
	[ $status != 77 ] || skip "$(sed -n 's/^SKIP: //p' "$tmp/console")"
	[ $status = 0 ] || fail "vmm-linux ended with $status"
	check_digests "$tmp/console"
	echo "PASS: Linux booted on this machine's KVM and was cloned; $checked guests proved who they are"
	exit 0
}

[ -x "$vmm" ] || skip "$vmm is not built"
[ "$(uname -m)" = x86_64 ] || skip "needs an x86-64 machine's vmm-linux"
for tool in busybox cpio apt-get dpkg-deb sha256sum qemu-system-x86_64 timeout; do
	command -v $tool >/dev/null 2>&1 || skip "$tool is missing"
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
tmp=$(mktemp -d "${TMPDIR:-/tmp}/kage-nested.XXXXXX") || exit 1
fetch_kernel
release=$(cat "$out/kernel/release")
vmlinuz=$out/kernel/root/boot/vmlinuz-$release
make_inner
[ "${KAGE_LINUX_BOOT:-}" != 1 ] || on_host
make_outer
begin=$(date +%s)
run_qemu
grep -q '^OUTER-DONE' "$tmp/console" || fail "the outer machine did not come to its end"
! grep -q '^OUTER-BAD' "$tmp/console" || fail "the outer kernel complained: $(grep -m 1 '^OUTER-BAD' "$tmp/console")"
wanted=$(wc -l <"$tmp/outer/runs")
passed=$(grep -c '^OUTER-RESULT .* status 0 ' "$tmp/console")
grep '^OUTER-RESULT' "$tmp/console"
[ "$passed" = "$wanted" ] && [ "$wanted" -gt 0 ] || fail "$passed of $wanted runs passed"
check_digests "$tmp/console"
echo "PASS: $passed runs in $(($(date +%s) - begin)) s; $checked guests proved who they are; kernel $release, $(qemu-system-x86_64 --version | sed -n '1s/ (.*//p')"
