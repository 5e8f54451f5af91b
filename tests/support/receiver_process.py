"""The DICOM receiver of a box as a process, for tests over real sockets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from appliance.core.settings import Settings


@contextmanager
def receiver(settings: Settings, **more: object) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A receiver process with further settings; its port and the process."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    lines = f"dicom_port = 0\ndisk_reserve_bytes = {settings.disk_reserve_bytes}\nmax_upload_bytes = {settings.max_upload_bytes}\n"
    lines += "".join(f"{name} = {json.dumps(value)}\n" for name, value in more.items())
    (settings.data_dir / "box.toml").write_text(lines)
    marker = settings.data_dir / "run" / "dicom.port"
    marker.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "appliance", "receive", "--data-dir", str(settings.data_dir)])
    try:
        for _ in range(300):
            if marker.exists() and marker.read_text():
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield int(marker.read_text()), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
