#!/bin/sh
# SPDX-License-Identifier: MIT
# Joins the objects of a static library into one and makes hidden symbols local,
# so that a program that links libkage.a statically sees only the public API.
# usage: localize.sh LD OBJCOPY AR IN.a OUT.a
set -e
tmp="$5.o"
"$1" -r --whole-archive "$4" -o "$tmp"
"$2" --localize-hidden "$tmp"
rm -f "$5"
"$3" crs "$5" "$tmp"
rm -f "$tmp"
