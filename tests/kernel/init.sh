#!/bin/sh
# First process of a guest: sets the machine up, then runs the cases or a shell.
tree=/opt/dtrace-exporter
export PYTHONPATH=$tree/src:$tree/tests/kernel PYTHONUNBUFFERED=1
cases() {
    cd $tree/tests/kernel/cases || exit
    stty -F /dev/ttyS1 raw -echo
    python3 -m pytest -c /dev/null --rootdir=. -o python_files='*.py' -p no:cacheprovider \
        -p lab.report --color=no -ra "@$tree/selection" >/dev/console 2>&1
}
if [ "$$" != 1 ]; then
    # systemd runs us, see cases/systemd.py.
    cases
    exit
fi
if [ -e /usr/lib/systemd/systemd ]; then
    sh $tree/tests/kernel/systemd.sh
    # Services get a root of their own, which cannot be turned round the root of all.
    mkdir /above
    mount --rbind / /above
    cd /above || exit
    mount --move . /
    exec chroot . /usr/lib/systemd/systemd
fi
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir -p /run/netns
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
ip link set lo up

case $(cat /proc/cmdline) in
*mode=shell*)
    cd $tree/tests/kernel/cases
    setsid -c bash -i </dev/ttyS0 >/dev/ttyS0 2>&1
    ;;
*mode=bench*)
    # The selection is a module of bench/guest; it prints its results on the second port.
    stty -F /dev/ttyS1 raw -echo
    cd $tree/bench/guest
    python3 -m "$(cat $tree/selection)" 2>/dev/console >/dev/ttyS1
    ;;
*)
    cases
    ;;
esac
echo o >/proc/sysrq-trigger
sleep 60
