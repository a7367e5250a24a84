#!/bin/sh
# Installs the service and the cases for systemd, which runs next: see init.sh.
tree=/opt/dtrace-exporter
units=/etc/systemd/system

# Nothing but what is tested.
rm -rf $units/*.wants
ln -sf /dev/null $units/getty.target
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
ln -sf multi-user.target $units/default.target
mkdir -p $units/multi-user.target.wants

cat >/usr/local/bin/dtrace-exporter <<END
#!/usr/bin/python3 -I
import sys
sys.path.insert(0, "$tree/src")
from dtrace_exporter.cli import main
sys.exit(main())
END
chmod 755 /usr/local/bin/dtrace-exporter
mkdir -p /etc/dtrace-exporter /etc/wireguard
echo 'root:*:20000:0:99999:7:::' >/etc/shadow
echo secret >/etc/wireguard/key
cp $tree/config/dtrace_exporter.yml /etc/dtrace-exporter/
cp $tree/systemd/dtrace-exporter.default /etc/default/dtrace-exporter
cp $tree/systemd/*.service $tree/systemd/*.socket $units/
ln -s ../dtrace-exporter.service $units/multi-user.target.wants/

# As the emulation is slow, a case would wait for the watchdog for minutes.
mkdir $units/dtrace-exporter.service.d
printf '[Service]\nWatchdogSec=15s\nRestartSec=1s\n' >$units/dtrace-exporter.service.d/soon.conf

cat >$units/cases.service <<END
[Unit]
SuccessAction=poweroff-immediate
FailureAction=poweroff-immediate
[Service]
Type=oneshot
ExecStart=/init
END
ln -s ../cases.service $units/multi-user.target.wants/
