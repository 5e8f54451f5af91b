"""Texts about a library: its status as a table, and the exact content that a signature approves."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from tuf.api.metadata import Root, Targets

from model_sync import messages
from model_sync.library.clinical_difference import Read, describe_difference, read_version, versions_in_field
from model_sync.library.roles import AnyMetadata, delegated
from model_sync.messages import Language
from model_sync.trust.documents import ROLLOUT_ROLE, LineIndex, Rollout

Name = Callable[[str], str]
Published = Callable[[str], "AnyMetadata | None"]
END_LINE_NOTES = (
    "boxes keep the model of LINE that they have, and get no new version of it; it cannot be withdrawn any more",
    "to stop its use, add the model line again (`model-library add-line`), and withdraw its versions before you end it",
)


def status_lines(status: dict[str, Any]) -> list[str]:
    """Return the status as lines: roles, models, rings, warnings, and what to do next."""
    rows = [("ROLE", "PUBLIC", "WAITING", "SIGNATURES", "EXPIRES", "KEYS")]
    for role, entry in status["roles"].items():
        waiting = "" if entry["staged"] is None else f"v{entry['staged']}"
        keys = ", ".join(key["name"] for key in entry["keys"])
        public = "-" if entry["published"] is None else f"v{entry['published']}"
        rows.append((role, public, waiting, f"{entry['have']} of {entry['need']}", _days(entry), keys))
    lines = _table(rows)
    if status["lines"]:
        models = [("LINE", "VERSIONS", "MINIMUM", "WITHDRAWN", "DELTAS")]
        for line, entry in status["lines"].items():
            versions = ", ".join(f"{v} (waiting)" if v in entry["waiting"] else v for v in entry["versions"]) or "-"
            models.append((line, versions, entry["minimum_version"], ", ".join(entry["withdrawn"]) or "-", str(entry["deltas"])))
        lines += ["", *_table(models)]
    if status["rings"]:
        rings = [("RING", "LINE", "TAKES", "BOXES", "FROM", "OVER", "")]
        for ring, steps in status["rings"].items():
            for line, step in steps.items():
                over = f"{step['duration_h']:g} h" if step["duration_h"] else "at once"
                paused = "PAUSED" if step["paused"] else ""
                rings.append((ring, line, step["version"], f"{step['percent']:g} %", step["start"][:16], over, paused))
        lines += ["", *_table(rings)]
    lines += ["", *(f"WARNING: {text}" for text in status["warnings"])] if status["warnings"] else []
    return [*lines, "", *(f"next: {text}" for text in status["next"] or ["nothing to do"])]


def _days(entry: dict[str, Any]) -> str:
    if entry["days_left"] is None:
        return "-"
    if entry["days_left"] <= 0:
        return "EXPIRED"
    return f"in {entry['days_left']:.1f} days{' (!)' if entry['due'] else ''}"


def _table(rows: list[Any]) -> list[str]:
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _width(text: str) -> int:
    """Return the width of a text on a terminal: a Chinese character takes two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def describe(
    role: str,
    new: AnyMetadata,
    old: AnyMetadata | None,
    name: Name,
    read: Read,
    *,
    published: Published = lambda _role: None,
    language: Language = "en",
) -> list[str]:
    """Return what a signature on ``new`` would approve, as lines of text; all of it, however long.

    Args:
        role: the role that ``new`` names.
        new: the metadata to sign.
        old: the public version to compare with; None shows everything.
        name: returns the key holder of a key id.
        read: returns the verified bytes of a small target, or None when the file is missing.
        published: returns the public version of another role: the rollouts say what is in the field, the model lines what it contains.
        language: of what changes for patients.
    """
    signed = new.signed
    before = old.signed if old is not None else None
    first = f"{role} version {signed.version}"
    first += f", after version {before.version}" if before is not None else ", compared with nothing: everything in it is shown"
    lines = [first, f"  valid until {signed.expires:%Y-%m-%d %H:%M} UTC"]
    if isinstance(signed, Root):
        for each in sorted(signed.roles):
            lines += _keys(each, signed.roles[each], before.roles[each] if before is not None else None, name)
    if isinstance(signed, Targets):
        old_roles, new_roles = delegated(before), delegated(signed)
        for each in sorted(new_roles):
            lines += _keys(each, new_roles[each], old_roles.get(each), name)
            if each not in old_roles or old_roles[each].paths != new_roles[each].paths:
                lines.append(f"  {'!' if each in old_roles else '+'} {each} may sign: {', '.join(new_roles[each].paths or [])}")
        lines += [f"  - role {each} has no delegation any more" for each in sorted(old_roles.keys() - new_roles.keys())]
        lines += _documents(signed, before, read)
        lines += _clinical(signed, before, read, published, language)
        lines += _targets(signed, before)
    if len(lines) == 2:
        lines.append("  nothing else changes: it is only valid for longer" if old is not None else "  it is still empty")
    return lines


def _documents(new: Targets, old: Targets | None, read: Read) -> list[str]:
    """Return the changes of indexes and rollouts, on which boxes act."""
    lines = []
    for path, target in sorted(new.targets.items()):
        before = old.targets.get(path) if old is not None else None
        kind: Any = LineIndex if path.endswith("/line.json") else Rollout if path.startswith("rollout/") else None
        if kind is None or (before is not None and before.hashes == target.hashes):
            continue
        raw, raw_before = read(target), read(before) if before is not None else None
        if raw is None or (before is not None and raw_before is None):
            lines.append(f"  ? {path} is missing, so its changes cannot be shown: copy the complete staged folder, and give --against")
            continue
        parsed = kind.parse(raw)
        parsed_before = kind.parse(raw_before) if raw_before is not None else None
        lines += (_index if kind is LineIndex else _rollout)(parsed, parsed_before)
    return lines


def _index(new: LineIndex, old: LineIndex | None) -> list[str]:
    have = {release.version: release.digest for release in old.versions} if old is not None else {}
    gone = {item.version for item in old.withdrawn} if old is not None else set()
    lines = [f"  + version {r.version}: manifest sha256 {r.digest[:16]}" for r in new.versions if have.get(r.version) != r.digest]
    lines += [f"  - version {version} is gone" for version in have if new.release(version) is None]
    lines += [f"  ! WITHDRAWN {item.version}: {item.reason}" for item in new.withdrawn if item.version not in gone]
    lines += [f"  ! {version} is NO LONGER withdrawn" for version in sorted(gone - {item.version for item in new.withdrawn})]
    if old is None or old.minimum_version != new.minimum_version:
        lines.append(f"  ! minimum: boxes take no version older than {new.minimum_version}; one that they run already goes on")
    return lines


def _rollout(new: Rollout, old: Rollout | None) -> list[str]:
    lines = []
    for line, step in sorted(new.lines.items()):
        if old is None or old.lines.get(line) != step:
            over = f"over {step.duration_h:g} h" if step.duration_h else "at once"
            budget = f"stop at {step.failure_budget.max_fraction:.0%} failures from {step.failure_budget.min_boxes} boxes on"
            what = f"{line} {step.version} to {step.percent:g} % of boxes from {step.start:%Y-%m-%d %H:%M} UTC {over}; {budget}"
            lines.append(f"  ! ring {new.ring}: {what}{'; PAUSED' if step.paused else ''}")
    lines += [f"  - ring {new.ring}: {line} has no rollout any more" for line in (old.lines.keys() - new.lines.keys() if old else ())]
    return lines


def _keys(role: str, new: Any, old: Any | None, name: Name) -> list[str]:
    have = set(old.keyids) if old is not None else set()
    lines = [f"  + key of {role}: {name(keyid)} ({keyid[:8]})" for keyid in new.keyids if keyid not in have]
    lines += [f"  - key of {role}: {name(keyid)} ({keyid[:8]})" for keyid in sorted(have - set(new.keyids))]
    if old is None or old.threshold != new.threshold:
        lines.append(f"  {'+' if old is None else '!'} {role} needs {new.threshold} of {len(new.keyids)} signatures")
    return lines


def _targets(new: Targets, old: Targets | None) -> list[str]:
    have = old.targets if old is not None else {}
    added = [target for path, target in new.targets.items() if path not in have]
    changed = [target for path, target in new.targets.items() if path in have and have[path].hashes != target.hashes]
    gone = sorted(have.keys() - new.targets.keys())
    lines = _listed("+", [f"{target.path}  {target.length:,} bytes  sha256 {target.hashes['sha256'][:12]}" for target in added])
    lines += _listed("!", [f"{target.path} is another file now: sha256 {target.hashes['sha256'][:12]}" for target in changed])
    return lines + _listed("-", [f"{path} is no target any more" for path in gone])


def _listed(mark: str, lines: list[str]) -> list[str]:
    return [f"  {mark} {line}" for line in sorted(lines)]


def _clinical(new: Targets, old: Targets | None, read: Read, published: Published, language: Language) -> list[str]:
    """Return what changes for patients: of each new version against those in the field, of each rollout against the one before."""
    lines: list[str] = []
    for path, document in sorted(_changed(new, old, read).items()):
        parsed, before = document
        if path.endswith("/line.json"):
            index = LineIndex.parse(parsed)
            known = {item.digest for item in LineIndex.parse(before).versions} if before is not None else set()
            for release in (item for item in index.versions if item.digest not in known):
                bases: Sequence[str | None] = versions_in_field(index, release.version, _rollouts(published, read)) or [None]
                for base in bases:
                    lines += _compare(index.line, (new, release.version), (new, base), read, language)
        else:
            rollout = Rollout.parse(parsed)
            earlier = Rollout.parse(before) if before is not None else None
            for line, step in sorted(rollout.lines.items()):
                was = earlier.lines[line].version if earlier is not None and line in earlier.lines else None
                if was != step.version:
                    targets = _targets_of(published(line))
                    lines += _compare(line, (targets, step.version), (targets, was), read, language)
    return lines


def _changed(new: Targets, old: Targets | None, read: Read) -> dict[str, tuple[bytes, bytes | None]]:
    """Return the bytes of the changed indexes and rollouts, now and before; what is missing was named already."""
    changed = {}
    for path, target in new.targets.items():
        before = old.targets.get(path) if old is not None else None
        is_document = path.endswith("/line.json") or path.startswith("rollout/")
        if is_document and (before is None or before.hashes != target.hashes) and (raw := read(target)) is not None:
            changed[path] = (raw, read(before) if before is not None else None)
    return changed


def _rollouts(published: Published, read: Read) -> list[Rollout]:
    targets = _targets_of(published(ROLLOUT_ROLE))
    raws = [read(target) for _, target in sorted(targets.targets.items())] if targets is not None else []
    return [Rollout.parse(raw) for raw in raws if raw is not None]


def _targets_of(md: AnyMetadata | None) -> Targets | None:
    return md.signed if md is not None and isinstance(md.signed, Targets) else None


def _compare(
    line: str, new: tuple[Targets | None, str], old: tuple[Targets | None, str | None], read: Read, language: Language
) -> list[str]:
    """Return the comparison of two versions; all of the new one where the old one is not at hand, and which files are missing."""
    heading = messages.text("sign.heading", language, line=line, version=new[1])
    version = read_version(new[0], line, new[1], read)
    base = read_version(old[0], line, old[1], read) if old[1] is not None else None
    if version is None:
        return [f"  {heading}", f"    ? {messages.text('sign.absent', language, version=new[1])}"]
    lines = describe_difference(version, base, language)
    if old[1] is not None and base is None:
        lines = [f"? {messages.text('sign.absent', language, version=old[1])}", *lines[1:]]
    return [f"  {heading}", *(f"    {text}" for text in lines)]
