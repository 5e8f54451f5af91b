"""The command ``model-library sign``: show what is to be signed, ask, and sign; in the library, or one file on another machine."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from securesystemslib.signer import Signer
from tuf.api.metadata import TOP_LEVEL_ROLE_NAMES, TargetFile

from model_sync import atomic_files, messages
from model_sync.errors import PublishError, SettingsError
from model_sync.library import console
from model_sync.library import text as library_text
from model_sync.library.commands import open_library, print_state
from model_sync.library.files import CONFIG_NAME, read_metadata
from model_sync.library.keys import load_holder, load_signer
from model_sync.library.library import Library, add_signature
from model_sync.library.roles import ROLE_FIELD, AnyMetadata, delegated


def sign(arguments: Namespace) -> None:
    """Show and sign what waits: in the library, or one file on another machine."""
    passphrase_source = console.require_passphrase(
        console.find_passphrase(arguments.passphrase_file, console.PASSPHRASE_ENV), console.PASSPHRASE_ENV
    )
    what, only = arguments.what, None
    if what.is_file() and (what.parent.parent / CONFIG_NAME).is_file() and what.parent.name == "staged":
        what, only = what.parent.parent, what.name.removesuffix(".json")
    if not what.is_file() and not what.is_dir():
        raise SettingsError(f"{what} is not there", code="library.usage")
    if what.is_dir():
        arguments.library = what
        library = open_library(arguments)
    signer = load_signer(arguments.key, passphrase_source, load_holder(arguments.public_key).key if arguments.public_key else None)
    if what.is_dir():
        _sign_waiting(library, signer, only, arguments.yes)
    else:
        _sign_file(what, signer, arguments.against, arguments.yes)


def _sign_waiting(library: Library, signer: Signer, only: str | None, yes: bool) -> None:
    keyid = signer.public_key.keyid
    mine = [role for role in library.staged_roles() if keyid in library.keys(role) and only in (None, role)]
    fresh = [role for role in mine if (md := library.staged(role)) is not None and keyid not in md.signatures]
    if mine and not fresh:
        raise PublishError(f"{', '.join(mine)} has this key's signature already", code="library.unsigned")
    if not fresh:
        raise PublishError("nothing waits for a signature of this key", code="library.unsigned")
    read = _target_reader(library.files.staged / "targets", library.files.public / "targets")
    for role in fresh:
        md = library.staged(role)
        if md is None:
            continue  # already published with the signature of its delegator
        shown = library_text.describe(
            role, md, library.published(role), library.files.config().name, read,
            published=library.published, language=messages.choose_language(),
        )  # fmt: skip
        print("\n".join(shown))
        console.confirm(f"sign {role} as {library.files.config().name(keyid)}?", yes)
        print_state(library, library.sign(role, signer, shown=md))


def _sign_file(file: Path, signer: Signer, against: Path | None, yes: bool) -> None:
    if against is not None and not any((against / "metadata").glob("*.root.json")):
        hint = "copy the folder `public` of the library to this machine, and name that copy"
        raise SettingsError(f"{against} is no copy of the library's public folder", hint=hint, code="library.usage")
    md = read_metadata(file)
    role = str(md.signed.unrecognized_fields.get(ROLE_FIELD, file.name.removesuffix(".json")))
    folders = [file.parent / "targets", *([against / "targets"] if against is not None else [])]
    shown = library_text.describe(
        role, md, _version_before(role, md, against), lambda keyid: keyid[:8], _target_reader(*folders),
        published=lambda other: _newest(other, against), language=messages.choose_language(),
    )  # fmt: skip
    print("\n".join(shown))
    console.confirm(f"sign {role} with the key {signer.public_key.keyid[:8]}?", yes)
    add_signature(md, signer)
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as stream:  # not `atomic_files.write`: a FAT stick stores no permissions
        stream.write(md.to_bytes())
        atomic_files.flush(stream)
    part.replace(file)
    print(f"{file} is signed; bring it back: `model-library merge LIB {file.name}`")


def _version_before(role: str, md: AnyMetadata, against: Path | None) -> AnyMetadata | None:
    """Return the newest version in a copy of the public folder that is older than the one to sign."""
    if against is None:
        return None
    folder = against / "metadata"
    tops = sorted(folder.glob("*.targets.json"), key=lambda path: int(path.name.split(".")[0]))
    if role not in TOP_LEVEL_ROLE_NAMES and tops and role not in delegated(read_metadata(tops[-1]).signed):
        return None  # a model line that is added again: its new key holders have to see all of it
    paths = (folder / f"{version}.{role}.json" for version in range(md.signed.version - 1, 0, -1))
    return next((read_metadata(path) for path in paths if path.is_file()), None)


def _newest(role: str, against: Path | None) -> AnyMetadata | None:
    """Return the newest version of a role in a copy of the public folder."""
    paths = list((against / "metadata").glob(f"*.{role}.json")) if against is not None else []
    numbered = [(int(path.name.split(".")[0]), path) for path in paths if path.name.split(".")[0].isdecimal()]
    return read_metadata(max(numbered)[1]) if numbered else None


def _target_reader(*folders: Path) -> Callable[[TargetFile], bytes | None]:
    def read(target: TargetFile) -> bytes | None:
        paths = [folder / target.get_prefixed_paths()[0] for folder in folders]
        contents = (path.read_bytes() for path in paths if path.is_file() and path.stat().st_size == target.length)
        return next((raw for raw in contents if hashlib.sha256(raw).hexdigest() == target.hashes["sha256"]), None)

    return read
