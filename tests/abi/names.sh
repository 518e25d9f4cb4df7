#!/bin/sh
# SPDX-License-Identifier: MIT
# Prints the names of all functions that the installed headers export, sorted.
# usage: names.sh INCLUDE_DIR   (tests/abi/symbols.txt is its output, checked in)
set -eu
cd "$1/kage"
sed -n 's/^KAGE_API [^(]*[ *]\(kage_[a-z0-9_]*\)(.*/\1/p' -- *.h | LC_ALL=C sort -u
