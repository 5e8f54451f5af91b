"""``packaging/make_accounts.sh``: two accounts that share the exchange directory and nothing else, in a private copy of /etc."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

_SCRIPT = ROOT / "packaging" / "make_accounts.sh"
# What the two do with their directories, as the box and the agent write them: a report 0640 with the directory's group, documents 0644.
_CHECKS = """
set -eu
umask 022
cp /etc/passwd /etc/group /etc/shadow /etc/gshadow /etc/login.defs "$1"
mount --bind "$1" /etc
mount -t tmpfs -o mode=755 tmpfs /srv
sh {script} /srv/clinic/box /srv/clinic/exchange /srv/agent
before=$(sort /etc/passwd /etc/group)
sh {script} /srv/clinic/box /srv/clinic/exchange /srv/agent
[ "$before" = "$(sort /etc/passwd /etc/group)" ]
as() {{ name=$1; shift; setpriv --reuid="$name" --regid="$name" --init-groups -- "$@"; }}
as clinicbox sh -c 'umask 077; echo 1 > /srv/clinic/box/box.sqlite3; echo 2 > /srv/clinic/exchange/new; chmod 640 /srv/clinic/exchange/new'
as clinicbox mv /srv/clinic/exchange/new /srv/clinic/exchange/box-report.json
as model-sync sh -c 'echo 3 > /srv/agent/key; cd /srv/clinic/exchange; mkdir documents; echo 4 > documents/root.json'
[ "$(as model-sync cat /srv/clinic/exchange/box-report.json)" = 2 ]
[ "$(as clinicbox cat /srv/clinic/exchange/documents/root.json)" = 4 ]
refused() {{ if as "$@" 2>/dev/null; then echo "not refused: $*" >&2; exit 1; fi; }}
refused model-sync cat /srv/clinic/box/box.sqlite3
refused model-sync ls /srv/clinic/box
refused clinicbox cat /srv/agent/key
refused nobody cat /srv/clinic/exchange/box-report.json
refused nobody ls /srv/clinic/exchange
grep -q '^clinicbox:.*/nologin$' /etc/passwd
grep -q '^model-sync:.*/nologin$' /etc/passwd
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="making accounts needs root")
def test_two_accounts_share_the_exchange_directory_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir(mode=0o755)
    script = _CHECKS.format(script=_SCRIPT)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path / "etc")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clinicbox: /srv/clinic/box" in done.stdout


def test_another_account_is_told_to_use_root() -> None:
    command = ["sh", str(_SCRIPT)]
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", _SCRIPT.read_text(), "sh"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "as root" in done.stderr
