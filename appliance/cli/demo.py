"""``make demo``: a complete box on this machine, from an empty folder to a finding on the page."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from appliance.cli.terminal import say
from appliance.core.errors import ApplianceError
from appliance.core.process import Lock, die_with_parent, find_nginx, make_data_dir, stop_on_signal
from appliance.core.roles import Role
from appliance.core.settings import FILE_NAME, Settings
from appliance.lifecycle.model_control import activate, reference_bundle
from appliance.service.supervisor import Supervisor, web_address
from appliance.store.accounts import Accounts
from appliance.store.store import Store

USERNAME: Final = "demo"
_READY_S: Final = 60.0
_TICK_S: Final = 0.1
_NOTHING_ANALYSED: Final = 4  # exit code of `analyze --require-analysed`
_WEB_PORT: Final = 8080
_DICOM_PORT: Final = 11112


def run(data_dir: Path, samples: Path, own: Path | None, *, once: bool, lan: bool, new_password: bool) -> int:
    """Create the box, start it, print its addresses and analyse the scans: first those in ``own``, then those in ``samples``.

    Returns:
        The exit code of ``appliance analyze``.
    """
    stop = stop_on_signal()
    make_data_dir(data_dir)
    lock = _lock(data_dir.resolve())  # acquired first: the settings of a running box must not be overwritten
    settings = _configure(data_dir.resolve(), lan=lan)
    log = settings.data_dir / "box.log"
    supervisor = Supervisor(settings, log, lock=lock)
    code = 0
    try:
        password = _prepare(settings, new_password=new_password)
        supervisor.start()
        _wait_until_ready(supervisor, settings, stop)
        if not stop():
            _print_addresses(settings, password, log)
            code = _analyse_scans(supervisor, settings, [path for path in (own, samples) if path], stop)
        if not once and not stop():
            print(say("The box is running. Press Ctrl-C to stop it."), flush=True)
            supervisor.run(stop)
    finally:
        supervisor.stop()
    print(say("The box has stopped; its results stay in its data directory."), flush=True)
    return code


def _lock(data_dir: Path) -> Lock:
    """Acquire the supervisor's lock; raises ApplianceError ``box.busy`` with the address of the running box."""
    try:
        return Lock(data_dir, "supervisor")
    except ApplianceError as error:
        address = web_address(Settings.load(data_dir))
        where = f", at {address['scheme']}://127.0.0.1:{address['port']}/" if address else ""
        raise ApplianceError(error.code, f"the box is already running{where}") from error


def _configure(data_dir: Path, *, lan: bool) -> Settings:
    """Write ``box.toml`` of the demo, with the usual ports if they are free, else with any free ports."""
    host = "0.0.0.0" if lan else "127.0.0.1"  # noqa: S104 - a port may be free on one address and in use on another
    web_port, dicom_port = _free_port(_WEB_PORT, host), _free_port(_DICOM_PORT, host)
    lines = [f"web_port = {web_port}", f"dicom_port = {dicom_port}"]
    if lan:
        find_nginx()
        _self_signed(data_dir / "keys")
        lines += ['web_host = "0.0.0.0"', 'dicom_host = "0.0.0.0"', 'tls_certificate = "keys/web.crt"', 'tls_key = "keys/web.pem"']
    (data_dir / FILE_NAME).write_text("# Written by `make demo` at every start.\n" + "\n".join(lines) + "\n", "utf-8")
    return Settings.load(data_dir)


def _free_port(wanted: int, host: str) -> int:
    """Return the wanted port, or any free one if it is in use on that address."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ApplianceError("settings.invalid", "no free port on this machine")


def _prepare(settings: Settings, *, new_password: bool) -> str:
    """Activate the embedded model and create the account; returns its one-time password, or an empty text."""
    # The first finding must not wait for a measurement: the worker measures when it is idle.
    store = Store(settings.model_copy(update={"tune_at_activation": False}))
    activate(store, reference_bundle(), "demo")
    accounts = Accounts(store)
    account = accounts.find(USERNAME)
    password = ""
    if account is None:
        password = accounts.add(USERNAME, Role.CLINICIAN, "demo")
    elif new_password or account.must_change:
        password = accounts.issue_one_time_password(USERNAME, "demo")
    store.close()
    return password


def _wait_until_ready(supervisor: Supervisor, settings: Settings, stop: Callable[[], bool]) -> None:
    limit = time.monotonic() + _READY_S
    while not supervisor.ready():
        supervisor.tick()
        if stop():
            return
        if time.monotonic() > limit:
            raise ApplianceError("store.failed", "the box did not start", hint=f"Read {settings.data_dir / 'box.log'}.")
        time.sleep(0.05)


def _print_addresses(settings: Settings, password: str, log: Path) -> None:
    address = web_address(settings) or {"scheme": "http", "port": settings.web_port}
    host = "127.0.0.1" if settings.web_host != "0.0.0.0" else _lan_address()  # noqa: S104 - compared, not bound
    port_file = settings.data_dir / "run" / "dicom.port"
    port = port_file.read_text() if port_file.exists() else settings.dicom_port
    secret = (
        say("{password}   (one-time password)", password=password)
        if password
        else say("the password you set  (forgotten: make demo ARGS=--new-password)")
    )
    print("\n  " + say("Page      {address}", address=f"{address['scheme']}://{host}:{address['port']}/"))
    print("  " + say("Login     {username} / {secret}", username=USERNAME, secret=secret))
    print("  " + say("DICOM     AE title {title}, {host} port {port}", title=settings.ae_title, host=host, port=port))
    print("  " + say("Log       {path}", path=log))
    if settings.web_port != _WEB_PORT:
        print("  " + say("Note      port {usual} is in use; the page is at port {port} this time", usual=_WEB_PORT, port=settings.web_port))
    if settings.dicom_port != _DICOM_PORT:
        print(
            "  " + say("Note      port {usual} is in use; the DICOM port is {port} this time", usual=_DICOM_PORT, port=settings.dicom_port)
        )
    print(flush=True)


def _analyse_scans(supervisor: Supervisor, settings: Settings, folders: list[Path], stop: Callable[[], bool]) -> int:
    """Analyse folders of scans on the running box with ``appliance analyze``, which prints the findings.

    Returns:
        0; the exit code of ``analyze`` when something failed or nothing at all was analysed; 0 when asked to stop.
    """
    codes = []
    for folder in folders:
        print(say("Analysing the scans in {folder}:", folder=folder), flush=True)
        codes.append(_analyse_folder(supervisor, settings, folder, stop))
        if stop():
            return 0
    if all(code == _NOTHING_ANALYSED for code in codes):
        print(say("Nothing was found: no scan in these folders could be analysed."), flush=True)
        return _NOTHING_ANALYSED
    return max(code for code in codes if code != _NOTHING_ANALYSED)


def _analyse_folder(supervisor: Supervisor, settings: Settings, folder: Path, stop: Callable[[], bool]) -> int:
    """Analyse one folder while the supervisor runs; returns the exit code of ``appliance analyze``."""
    command = [sys.executable, "-m", "appliance", "analyze", str(folder), "--require-analysed", "--data-dir", str(settings.data_dir)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:  # own session: Ctrl-C reaches only this process, which ends the analysis
        while process.poll() is None:
            if stop():
                process.terminate()
                break
            supervisor.tick()
            time.sleep(_TICK_S)
    return process.returncode


def _lan_address() -> str:
    """Return the LAN address of this machine: the source address that the kernel would use (nothing is sent)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _self_signed(directory: Path) -> None:
    """Create a self-signed certificate for the names and addresses of this machine, valid for one year, unless there is one.

    One that ends within 30 days is replaced, and one that a kill left half written.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    from model_sync import atomic_files

    now = datetime.datetime.now(datetime.timezone.utc)
    if _is_usable(directory, now):
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, socket.gethostname()[:64])])
    names = [x509.DNSName("localhost"), x509.DNSName(socket.gethostname()), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    names.append(x509.IPAddress(ipaddress.ip_address(_lan_address())))
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
    )
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=365))
    certificate = builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(key, hashes.SHA256())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    atomic_files.write(directory / "web.pem", pem, mode=0o600)
    atomic_files.write(directory / "web.crt", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _is_usable(directory: Path, now: datetime.datetime) -> bool:
    from appliance.core.certificates import WARN_BEFORE, load_pair

    try:
        return load_pair(directory / "web.crt", directory / "web.pem").not_after - now > WARN_BEFORE
    except ApplianceError:  # absent, or torn
        return False
