#!/bin/sh
# Installs the files of a Linux package from an unpacked release: install.sh ROOT PREFIX UNITS
# The program and the libraries of vendor/ go to ROOT/PREFIX, systemd's units to ROOT/UNITS, and the files
# that the operator changes to ROOT/etc.
set -eu
root=$1 prefix=$2 units=$3
umask 022
share=$root$prefix/share/dtrace-exporter
mkdir -p "$share" "$root$prefix/bin" "$root$prefix/share/man/man8" "$root$units" \
    "$root/etc/default" "$root/etc/dtrace-exporter"

cp -RL src/dtrace_exporter vendor/* "$share/"
find "$share" -name __pycache__ -prune -exec rm -r {} +
# Files for other systems, and files that are installed elsewhere.
for other in doc man smf systemd; do
    rm -r "$share/dtrace_exporter/share/$other"
done
sed "s|@PREFIX@|$prefix|" packages/launcher >"$root$prefix/bin/dtrace-exporter"
chmod 755 "$root$prefix/bin/dtrace-exporter"

cp man/dtrace-exporter.8 "$root$prefix/share/man/man8/"
for unit in dtrace-exporter.service dtrace-exporter.socket; do
    sed "s|/usr/local/bin/|$prefix/bin/|" "systemd/$unit" >"$root$units/$unit"
done
cp systemd/dtrace-exporter.default "$root/etc/default/dtrace-exporter"
cp config/dtrace_exporter.yml "$root/etc/dtrace-exporter/"
