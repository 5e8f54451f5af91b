#!/bin/sh
# Make the accounts of the box and of the sync agent, their group, and the directories with the right owners. Run as root; again changes nothing.
#   make_accounts.sh [BOX] [EXCHANGE] [AGENT]     default: /var/lib/clinic/box /var/lib/clinic/exchange /var/lib/model-sync
# clinicbox runs `appliance serve`: worker, receiver, web process and nginx. model-sync runs `model-sync run` and cannot read patient data.
# Both are in the group clinic-exchange: each reads and writes the exchange directory, nobody else enters it.
set -eu

box=${1:-/var/lib/clinic/box} exchange=${2:-/var/lib/clinic/exchange} agent=${3:-/var/lib/model-sync}
[ "$(id -u)" = 0 ] || { echo "Run it as root: sudo sh packaging/make_accounts.sh" >&2; exit 1; }

exists() { grep -q "^$2:" "/etc/$1"; }

exists group clinic-exchange || groupadd --system clinic-exchange
for account in "clinicbox:$box" "model-sync:$agent"; do
    name=${account%%:*}
    exists passwd "$name" || useradd --system --user-group --no-create-home --home-dir "${account#*:}" --shell /usr/sbin/nologin "$name"
    usermod --append --groups clinic-exchange "$name"
done
# The group of the TPM, by which the box seals its keys; without it they are in an owner-only file.
if exists group tss; then usermod --append --groups tss clinicbox; fi
umask 022
mkdir -p "$(dirname "$box")" "$(dirname "$exchange")" "$(dirname "$agent")"
install -d -m 0700 -o clinicbox -g clinicbox "$box"
install -d -m 0700 -o model-sync -g model-sync "$agent"
# setgid: what either of them writes belongs to the group of both.
install -d -m 2770 -o model-sync -g clinic-exchange "$exchange"
echo "clinicbox: $box    model-sync: $agent    both: $exchange"
