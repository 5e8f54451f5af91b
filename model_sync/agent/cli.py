"""The command ``model-sync``, for technicians and for the services.

Exit codes: 0 done; 1 refused or not trusted; 2 usage or settings; 3 the library or the disk failed, and the next poll continues with
the received part; 4 waiting for a window, a budget or another process; 5 `report` sent nothing, because no server is set or the box is
not enrolled. Errors are caught once, in ``main``. Each command imports what it needs, so that ``check``, which the box calls before it
activates a model, starts fast.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from model_sync import messages
from model_sync.errors import ModelSyncError, SettingsError, exit_code

if TYPE_CHECKING:
    from model_sync.settings import SyncSettings

DEFAULT_CONFIG = Path("/var/lib/model-sync")
NOTHING_SENT = 5


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = parser().parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except ModelSyncError as error:
        print(messages.describe(error.code, error.message, error.hint, messages.choose_language()), file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print(messages.text("word.interrupted", messages.choose_language()), file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    top = argparse.ArgumentParser(prog="model-sync", description="Signed models for the box.")
    top.add_argument(
        "--config",
        type=Path,
        default=Path(os.environ.get("MODEL_SYNC_CONFIG", DEFAULT_CONFIG)),
        help="sync.toml or its directory (default: $MODEL_SYNC_CONFIG or %(default)s)",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        # Without a default, so that the option before the command is not overwritten.
        command.add_argument("--config", type=Path, default=argparse.SUPPRESS, help="the same as before the command")
        return command

    init = add("init", _init, "Create the agent's settings in its state directory, and copy the library's first root.json there.")
    init.add_argument("--state", type=Path, required=True, help="directory of the agent")
    init.add_argument("--exchange", type=Path, required=True, help="directory shared with the box")
    init.add_argument("--root", type=Path, required=True, help="the library's first root.json, received from the central team")
    init.add_argument("--box-id", required=True, help="the box's name in the fleet")
    init.add_argument("--url", action="append", default=[], help="base URL of the library; may be repeated, tried in order")
    init.add_argument("--ring", default="stable", help="rollout ring (default: %(default)s)")
    add("run", _run, "Poll the library again and again, until stopped.")
    add("pull", _pull, "Poll the library once and download what this box should have.")
    status = add("status", _status, "Show what runs, what is wanted, what is wrong, and what to do.")
    status.add_argument("--json", action="store_true", help="everything, as JSON")
    usb = add("import-usb", _import_usb, "Import what this box should have from a USB stick, without any network.")
    usb.add_argument("directory", type=Path, help="where the stick is mounted")
    check = add("check", _check, "Verify the metadata on this disk, offline, and print the facts as JSON; writes nothing.")
    check.add_argument("--exchange", type=Path, help="directory shared with the box (default: of the settings)")
    check.add_argument("--root", type=Path, help="the provisioned root.json (default: of the settings)")
    enrol = add("enrol", _enrol, "Get a device certificate for a one-time token.")
    enrol.add_argument("--token-file", type=Path, required=True, help="file with the token, or - for standard input")
    add("report", _report, "Send one signed status report now.")
    add("settings", _settings, "Print every setting with its meaning and its value here.")
    verify = add("verify", _verify, "Check a bundle: schema, every file's digest, operating points, golden cases.")
    verify.add_argument("bundle", type=Path, help="bundle directory")
    return top


def _load(arguments: argparse.Namespace) -> SyncSettings:
    from model_sync.settings import SyncSettings

    return SyncSettings.load(arguments.config)


def _init(arguments: argparse.Namespace) -> int:
    from model_sync import atomic_files
    from model_sync.settings import FILE_NAME, SyncSettings
    from model_sync.trust import metadata

    state = arguments.state.resolve()
    file = state / FILE_NAME
    if file.exists():
        raise SettingsError(f"{file} exists already", hint="edit it; a new one would forget which library this box trusts")
    root = metadata.read_root(arguments.root)
    version = metadata.load_newest_root(state / "none", root).version
    values = {
        "exchange_dir": str(arguments.exchange.resolve()), "root": "root.json", "box_id": arguments.box_id,
        "ring": arguments.ring, "urls": arguments.url,
    }  # fmt: skip
    SyncSettings.parse({"state_dir": state} | values, base=state)
    # JSON's strings and lists of strings are TOML's as well.
    text = "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
    try:
        atomic_files.write(state / "root.json", root)
        atomic_files.write(file, f"# `model-sync settings` prints every key with its meaning.\n{text}".encode())
        arguments.exchange.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{error.filename}: {error.strerror}", hint="run it as the account that owns these directories") from error
    print(f"{file} is created; this box trusts root version {version} of the library")
    print(f"next: `model-sync --config {state} {'pull' if arguments.url else 'import-usb STICK'}`")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from model_sync.agent import service

    service.run(_load(arguments))
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from model_sync.agent import cli_pull

    return cli_pull.pull(_load(arguments))


def _import_usb(arguments: argparse.Namespace) -> int:
    from model_sync.agent import cli_pull

    return cli_pull.import_usb(_load(arguments), arguments.directory)


def _status(arguments: argparse.Namespace) -> int:
    from model_sync.agent import cli_status

    return cli_status.show(_load(arguments), arguments.json)


def _check(arguments: argparse.Namespace) -> int:
    from model_sync.trust import offline_check

    if arguments.exchange is None or arguments.root is None:
        settings = _load(arguments)
        arguments.exchange = arguments.exchange or settings.exchange_dir
        arguments.root = arguments.root or settings.root
    return offline_check.print_check(arguments.exchange, arguments.root)


def _enrol(arguments: argparse.Namespace) -> int:
    from model_sync.agent import service

    settings = _load(arguments)
    try:
        token = sys.stdin.read() if str(arguments.token_file) == "-" else arguments.token_file.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{arguments.token_file}: {error}", hint="point to the file with the token of the central team") from error
    service.enrol(settings, token.strip())
    print(f"{settings.box_id} is enrolled")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from model_sync.agent import service

    sent = service.send_report(_load(arguments))
    if sent == "sent":
        print("reported")
        return 0
    print(messages.text(f"report.{sent}", messages.choose_language()), file=sys.stderr)
    return NOTHING_SENT


def _settings(arguments: argparse.Namespace) -> int:
    from model_sync.settings import SyncSettings

    try:
        here = _load(arguments).model_dump(mode="json")
    except SettingsError as error:
        here = {}
        print(f"# {error.message}\n")
    for name, field in SyncSettings.model_fields.items():
        default = "required" if field.is_required() else f"default {json.dumps(field.get_default(call_default_factory=True), default=str)}"
        print(f"# {field.description} ({default})")
        print(f"{name} = {json.dumps(here[name], ensure_ascii=False)}\n" if here.get(name) is not None else f"# {name} =\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from model_sync.bundle import ModelBundle

    print("\n".join(ModelBundle.load(arguments.bundle).describe()))
    return 0
