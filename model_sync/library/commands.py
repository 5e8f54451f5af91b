"""The commands of ``model-library``: ask for passphrases, show what is to be signed, and print the result."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from datetime import datetime, timezone
from pathlib import Path

from securesystemslib.signer import Key
from tuf.api.metadata import Root

from model_sync.bundle import MANIFEST_NAME, ModelBundle
from model_sync.errors import PublishError, SettingsError
from model_sync.library import check as library_check
from model_sync.library import console, rollouts, usb_export
from model_sync.library import publish as publishing
from model_sync.library import text as library_text
from model_sync.library.barred_rollouts import advise, find_barred, not_proposed
from model_sync.library.files import CONFIG_NAME, Expiry, LibraryFiles
from model_sync.library.keys import Holder, generate, load_holder, load_signer, public_path, write_public
from model_sync.library.library import Library
from model_sync.library.roles import ONLINE, RoleState
from model_sync.trust.documents import ROLLOUT_ROLE, FailureBudget


def key_new(arguments: Namespace) -> None:
    """Create an encrypted key file."""
    secret = console.new_secret(
        arguments.passphrase_file or console.file_from_environment(console.PASSPHRASE_ENV), f"new passphrase for {arguments.file.name}"
    )
    key = generate(arguments.file, secret, arguments.name)
    print(f"{arguments.file}: keep it secret, and keep a second copy; its passphrase decrypts it")
    print(f"{public_path(arguments.file)}: give this to the library (key id {key.keyid[:8]})")


def key_token(arguments: Namespace) -> None:
    """Write the public part of a token's key to a file."""
    signer = load_signer(
        arguments.uri,
        console.require_passphrase(console.find_passphrase(arguments.passphrase_file, console.PASSPHRASE_ENV), console.PASSPHRASE_ENV),
    )
    write_public(arguments.file, signer.public_key, arguments.name)
    print(f"{arguments.file}: give this to the library (key id {signer.public_key.keyid[:8]})")


def init(arguments: Namespace) -> None:
    """Create a library and its online keys."""
    root = [load_holder(path) for path in arguments.key]
    targets = [load_holder(path) for path in arguments.targets_key or arguments.key]
    if (arguments.library / CONFIG_NAME).exists() and Library(arguments.library).published(Root.type) is not None:
        raise PublishError(f"{arguments.library} is a library already; nothing was changed", code="library.exists")
    expiry = _expiry(arguments.expiry)
    files = LibraryFiles(arguments.library)
    passphrase_source = console.find_passphrase(arguments.online_passphrase_file, console.ONLINE_ENV)
    secret = console.new_secret(
        arguments.online_passphrase_file or console.file_from_environment(console.ONLINE_ENV), "new passphrase for the online keys"
    )
    files.create()
    online = {role: _online_key(files.online / f"{role}.pem", secret) for role in ONLINE}
    holders = {holder.key.keyid: holder.name for holder in (*root, *targets)}
    Library.init(
        arguments.library,
        [holder.key for holder in root],
        [holder.key for holder in targets],
        snapshot_key=online["snapshot"],
        timestamp_key=online["timestamp"],
        threshold=arguments.threshold,
        expiry=expiry,
        holders={**holders, **{key.keyid: f"{role} (online)" for role, key in online.items()}},
        passphrase=passphrase_source,
    )
    print(f"{arguments.library} is created; root and targets wait for {arguments.threshold} signatures each")
    print(f"next: `model-library sign {arguments.library} --key KEY.pem`, once for each holder")


def _online_key(path: Path, secret: str) -> Key:
    if path.exists():  # a repeated init after a kill: the passphrase has to be the same
        return load_signer(path, lambda _what: secret, load_holder(path).key).public_key
    return generate(path, secret, path.stem)


def _expiry(items: list[str]) -> Expiry:
    try:
        return Expiry.model_validate(dict(item.partition("=")[::2] for item in items))
    except ValueError as error:
        hint = f"ROLE=DAYS up to 3650, with ROLE one of {', '.join(Expiry.model_fields)}"
        raise SettingsError(f"--expiry {' '.join(items)}: not a role and days", hint=hint, code="library.usage") from error


def add_line(arguments: Namespace) -> None:
    """Add a model line."""
    library = open_library(arguments)
    holders = _load_and_name_holders(library, arguments.key)
    print_state(library, library.add_line(arguments.name, [holder.key for holder in holders], arguments.threshold))


def end_line(arguments: Namespace) -> None:
    """End a model line."""
    library = open_library(arguments)
    state = rollouts.end_line(library, arguments.name)
    print_state(library, state)
    print("\n".join(library_text.END_LINE_NOTES).replace("LINE", arguments.name))
    if state.role == ROLLOUT_ROLE:
        print(f"next: when rollout is public without it, run `model-library end-line {arguments.library} {arguments.name}` again")


def rollout_keys(arguments: Namespace) -> None:
    """Set the keys of the rollout role."""
    library = open_library(arguments)
    holders = _load_and_name_holders(library, arguments.key)
    print_state(library, library.set_rollout_keys([holder.key for holder in holders], arguments.threshold))


def rotate_key(arguments: Namespace) -> None:
    """Replace a key."""
    if arguments.old is None and arguments.new is None and arguments.threshold is None:
        raise SettingsError("nothing to rotate", hint="give --old, --new, or both", code="library.usage")
    library = open_library(arguments)
    new = _load_and_name_holders(library, [arguments.new])[0].key if arguments.new is not None else None
    old = _keyid(library, arguments.role, arguments.old) if arguments.old is not None else None
    library.rotate_key(arguments.role, old, new, threshold=arguments.threshold)
    print_state(library, library.state(arguments.role))


def _load_and_name_holders(library: Library, paths: list[Path]) -> list[Holder]:
    holders = [load_holder(path) for path in paths]
    library.name_holders({holder.key.keyid: holder.name for holder in holders})
    return holders


def _keyid(library: Library, role: str, text: str) -> str:
    name = library.files.config().name
    keyids = [keyid for keyid in library.keys(role) if text == name(keyid) or (len(text) >= 8 and keyid.startswith(text))]
    if len(keyids) != 1:
        known = ", ".join(f"{name(keyid)} ({keyid[:8]})" for keyid in library.keys(role)) or "none"
        raise SettingsError(
            f"{text!r} names {'no key' if not keyids else 'several keys'} of {role}", hint=f"its keys are {known}", code="library.keys"
        )
    return keyids[0]


def publish(arguments: Namespace) -> None:
    """Publish a bundle."""
    library = open_library(arguments)
    state = publishing.publish(
        library,
        arguments.bundle,
        deltas=not arguments.no_deltas,
        minimum_version=arguments.minimum_version,
        on_progress=console.ProgressPrinter().report,
    )
    print_state(library, state)


def rollout(arguments: Namespace) -> None:
    """Roll a version out to a ring."""
    library = open_library(arguments)
    try:
        budget = FailureBudget(max_fraction=arguments.max_failures, min_boxes=arguments.min_failures)
    except ValueError as error:
        raise SettingsError("--max-failures is 0 to 1, --min-failures at least 1", code="library.usage") from error
    state = rollouts.rollout(
        library,
        arguments.ring,
        arguments.line,
        arguments.version,
        arguments.percent,
        arguments.start,
        arguments.duration_h,
        budget,
        arguments.paused,
    )
    print_state(library, state)


def withdraw(arguments: Namespace) -> None:
    """Withdraw a version."""
    library = open_library(arguments)
    print_state(library, publishing.withdraw(library, arguments.line, arguments.version, arguments.reason))
    _print_barred_rollouts(library, arguments)


def minimum(arguments: Namespace) -> None:
    """Raise the minimum version."""
    library = open_library(arguments)
    print_state(library, publishing.set_minimum(library, arguments.line, arguments.version))
    _print_barred_rollouts(library, arguments)


def _print_barred_rollouts(library: Library, arguments: Namespace) -> None:
    """Print the rollouts of a model line that name a barred version, what boxes do, and the command for another version."""
    barred = [step for step in find_barred(library) if step.line == arguments.line]
    results = arguments.field_results(arguments) if barred else None
    advice = [advise(library, step, results) for step in barred if step.is_newest]
    lines = [*dict.fromkeys(step.describe() for step in barred), *not_proposed(advice), *(f"next: {item.step}" for item in advice)]
    print("\n".join(lines).replace(" LIB", f" {library.files.directory}"), end="\n" if lines else "")


def merge(arguments: Namespace) -> None:
    """Merge signatures from other machines."""
    library = open_library(arguments)
    for file in arguments.file:
        print_state(library, library.merge(file))


def renew(arguments: Namespace) -> None:
    """Stage a role again."""
    library = open_library(arguments)
    print_state(library, library.renew(arguments.role))


def discard(arguments: Namespace) -> None:
    """Delete what waits for signatures."""
    library = open_library(arguments)
    waiting = ", ".join(library.staged_roles()) or "nothing"
    console.confirm(f"delete {waiting} with the signatures collected so far?", arguments.yes)
    library.discard()
    print(f"deleted: {waiting}")


def refresh_timestamp(arguments: Namespace) -> None:
    """Sign a new timestamp."""
    library = open_library(arguments)
    timestamp = library.refresh_timestamp()
    print(f"timestamp version {timestamp.version} is public, valid until {timestamp.expires:%Y-%m-%d %H:%M} UTC")


def status(arguments: Namespace) -> int:
    """Print the state; return 1 when something has expired."""
    state = Library.open_library(arguments.library).status(arguments.field_results(arguments))
    text = json.dumps(state, ensure_ascii=False, indent=2) if arguments.json else "\n".join(library_text.status_lines(state))
    print(text.replace(" LIB", f" {arguments.library}") if not arguments.json else text)
    return int(any(entry["days_left"] is not None and entry["days_left"] <= 0 for entry in state["roles"].values()))


def verify(arguments: Namespace) -> int:
    """Check a library or a bundle."""
    directory = arguments.directory
    if (directory / MANIFEST_NAME).is_file() or not ((directory / "public").is_dir() or (directory / "metadata").is_dir()):
        print("\n".join(ModelBundle.load(directory).describe()))
        return 0
    public = directory / "public" if (directory / "public").is_dir() else directory
    steps = console.ProgressPrinter()
    result = library_check.verify(public, datetime.now(timezone.utc), lambda done, total: steps.report("reading", done, total))
    for text in result.notes:
        print(f"note: {text}")
    for text in result.problems:
        print(f"problem: {text}", file=sys.stderr)
    if not result.is_clean:
        print(f"hint: {public} is not what was signed: restore it from a backup", file=sys.stderr)
        return 1
    until = f", valid until {result.valid_until:%Y-%m-%d %H:%M} UTC" if result.valid_until is not None else ""
    print(f"{public}: intact; {result.targets} files, {result.bytes / 2**20:.1f} MiB, every signature and hash is right{until}")
    return 0


def export_usb(arguments: Namespace) -> None:
    """Write a USB stick."""
    library = Library.open_library(arguments.library)
    steps = console.ProgressPrinter()
    with library.files.locked():  # a publication meanwhile would leave metadata of two states on the stick
        done = usb_export.export(
            library.files.public,
            arguments.directory,
            arguments.line,
            arguments.version,
            on_progress=lambda now, total: steps.report("writing", now, total),
        )
    size = f"{done.bytes / 2**20:.1f} MiB"
    print(f"{arguments.directory / usb_export.FOLDER}: {done.files} files written and read back, {size}; {done.removed} old ones removed")
    for line, versions in done.versions.items():
        print(f"  {line}: {', '.join(versions) or 'no version'}")
    print(f"  boxes accept it until {done.valid_until:%Y-%m-%d %H:%M} UTC")


def open_library(arguments: Namespace) -> Library:
    """Open the library of a command, with its online keys if there is a passphrase."""
    file = getattr(arguments, "online_passphrase_file", None)
    return Library.open_library(arguments.library, console.find_passphrase(file, console.ONLINE_ENV))


def print_state(library: Library, state: RoleState) -> None:
    """Print the state of a role and the next step."""
    if state.published:
        print(f"{state.role} version {state.version} is public ({', '.join(state.signed)})")
    else:
        print(
            f"{state.role} version {state.version} waits: {state.have} of {state.need} signatures ({', '.join(state.signed) or 'none yet'})"
        )
    waiting = [role for role in library.staged_roles() if role != state.role]
    if waiting:
        print(f"also waiting: {', '.join(waiting)}")
    if not state.published or waiting:
        place = str(library.files.directory)
        steps = [step.replace(" LIB", f" {place}", 1) for step in library.status()["next"] if "model-library sign LIB" in step]
        for step in steps or [f"`model-library status {place}` says what is missing"]:
            print(f"next: {step}")
