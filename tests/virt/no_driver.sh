#!/bin/sh
# SPDX-License-Identifier: MIT
# libvirt without its QEMU driver, a package of its own: a leg is skipped with the reason and the remedy.
#
#   no_driver.sh VIRT-LEG SOURCE PROGRAMS LEG
set -u

tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
said=$(LIBVIRT_DRIVER_DIR=$tmp "$1" "$2" "$3" "$tmp" "$4")
status=$?
case $status,$said in
77,SKIP:*"apt-get install"*) ;;
*) echo "FAIL: exit $status, wanted 77 and a remedy: $said"; exit 1 ;;
esac
