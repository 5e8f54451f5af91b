"""What changes for patients between two versions of a model, in words, before a signature approves the newer one.

Every field of the manifest that differs is shown: those that a clinician acts on in words of their own, every other by its name. Nothing
is left out or shortened, and the same two versions always give the same text.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import semver
from tuf.api.metadata import TargetFile, Targets

from model_sync import messages
from model_sync.bundle import MANIFEST_NAME, Interval, Manifest, OperatingPoint
from model_sync.messages import Language
from model_sync.trust.documents import LineIndex, Rollout, file_path, older

Read = Callable[[TargetFile], "bytes | None"]

# Shown in words of their own, or as digests among the files of the version.
_OWN_WORDS: Final = frozenset({"version", "labels", "operating_points", "golden", "intended_use", "input", "variants", "documents"})
_NONE: Final = "–"


@dataclass(frozen=True)
class Version:
    """One version of a model, as far as it is readable here.

    Attributes:
        manifest: of the version.
        read: returns the verified bytes of a file of the bundle, None where it is not at hand.
    """

    manifest: Manifest
    read: Callable[[str], bytes | None]


def read_version(targets: Targets | None, line: str, version: str, read: Read) -> Version | None:
    """Return a version that a role lists; None where it does not, or where its manifest is not at hand.

    Args:
        targets: of the role of the model line.
        line: the model line.
        version: the version.
        read: returns the verified bytes of a target, None where the file is missing.
    """

    def read_file(file: str) -> bytes | None:
        target = targets.targets.get(file_path(line, version, file)) if targets is not None else None
        return read(target) if target is not None else None

    raw = read_file(MANIFEST_NAME)
    return Version(Manifest.parse(raw), read_file) if raw is not None else None


def versions_in_field(index: LineIndex, older_than: str, rollouts: Sequence[Rollout]) -> list[str]:
    """Return the versions that boxes run before a new one comes: those of the rollouts, or else the newest that boxes may run.

    Args:
        index: of the model line.
        older_than: the new version.
        rollouts: the public ones, of every ring.
    """
    usable = [item.version for item in index.versions if index.refusal(item.version) is None and older(item.version, older_than)]
    usable.sort(key=semver.Version.parse)
    named = {rollout.lines[index.line].version for rollout in rollouts if index.line in rollout.lines}
    return [version for version in usable if version in named] or usable[-1:]


def describe_difference(new: Version, old: Version | None, language: Language) -> list[str]:
    """Return what a new version changes for patients, as lines of text; without an old version all of the new one is shown.

    Args:
        new: the version to be signed.
        old: the version in the field.
        language: of the text.
    """
    words = _Words(language)
    before = old.manifest if old is not None else None
    lines = [words("sign.compared", old=before.version, new=new.manifest.version) if before else words("sign.first")]
    lines += _labels(new.manifest, before, words)
    for point in new.manifest.operating_points:
        lines += _operating_point(new.manifest, point, _point(before, point.label), words)
    gone = [point for point in before.operating_points if _point(new.manifest, point.label) is None] if before else []
    lines += [f"- {point.label}: {words('sign.threshold')}: {point.threshold:g}" for point in gone]
    lines += _golden(new, old, words)
    lines += _texts(new.manifest, before, words)
    lines += _pipeline(new.manifest, before, words)
    lines += _variants(new.manifest, before, words)
    lines += _other_fields(new.manifest, before, words)
    if before is not None and len(lines) == 1:
        lines.append(words("sign.same"))
    return [lines[0], *(f"  {line}" for line in lines[1:])]


class _Words:
    """Texts of this module in one language."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def __call__(self, code: str, **values: object) -> str:
        return messages.text(code, self.language, **values)

    def pick(self, text: Any) -> str:
        """Return a bilingual text of the manifest in this language."""
        return str(getattr(text, self.language))

    def change(self, what: str, old: str | None, new: str | None) -> str:
        """Return a line for a value that is new, gone or another one."""
        if old is None:
            return f"+ {what}: {new}"
        if new is None:
            return f"- {what}: {old}"
        return f"! {what}: {old} → {new}"


def _point(manifest: Manifest | None, label: str) -> OperatingPoint | None:
    return next((point for point in manifest.operating_points if point.label == label), None) if manifest else None


def _labels(new: Manifest, old: Manifest | None, words: _Words) -> list[str]:
    before = {label.name: label for label in old.labels} if old else {}
    after = {label.name: label for label in new.labels}

    def text(label: Any) -> str:
        return f"{words.pick(label.title)} ({label.name}, {label.code.scheme} {label.code.value} {label.code.meaning})"

    lines = [f"+ {words('sign.label.added')}: {text(label)}" for name, label in after.items() if name not in before]
    lines += [f"- {words('sign.label.removed')}: {text(label)}" for name, label in before.items() if name not in after]
    lines += [
        words.change(words("sign.label.changed"), text(before[name]), text(label))
        for name, label in after.items()
        if name in before and before[name] != label
    ]
    common = [name for name in after if name in before]
    if common != [name for name in before if name in after]:
        lines.append(words.change(words("sign.label.order"), ", ".join(before), ", ".join(after)))
    return lines


def _interval(value: Interval | None) -> str:
    return f"{value.value:.1%} ({value.low:.1%}-{value.high:.1%})" if value is not None else _NONE


def _operating_point(manifest: Manifest, new: OperatingPoint, old: OperatingPoint | None, words: _Words) -> list[str]:
    """Return the changes of one label: threshold, accuracy, data, each source, each group."""
    title = words.pick(manifest.label(new.label).title)
    values: list[tuple[str, str | None, str]] = [
        (words("sign.threshold"), f"{old.threshold:g}" if old else None, f"{new.threshold:g}"),
        (words("sign.sensitivity"), _interval(old.sensitivity) if old else None, _interval(new.sensitivity)),
        (words("sign.specificity"), _interval(old.specificity) if old else None, _interval(new.specificity)),
        (words("sign.measured_on"), old.measured_on if old else None, new.measured_on),
    ]
    lines = [words.change(f"{title}: {what}", before, after) for what, before, after in values if before != after]
    before_sources = {source.source: _source(source, words) for source in old.per_source} if old else {}
    after_sources = {source.source: _source(source, words) for source in new.per_source}
    lines += _pairs(f"{title}: {words('sign.source')}", before_sources, after_sources, words)
    groups = [{_group_name(group, words): _group(group, words) for group in point.groups} if point else {} for point in (old, new)]
    return lines + _pairs(f"{title}:", groups[0], groups[1], words)


def _source(source: Any, words: _Words) -> str:
    auc = _NONE if source.auc is None else f"{source.auc:.4f}"
    return f"AUC {auc}, {_measured(source, words)}"


def _group_name(group: Any, words: _Words) -> str:
    return words(f"sign.group.{group.population}", youngest=f"{group.min_years:g}", oldest=f"{group.max_years:g}")


def _group(group: Any, words: _Words) -> str:
    return f"{_measured(group, words)}; {', '.join(group.sources)}"


def _measured(measure: Any, words: _Words) -> str:
    cases = words("sign.cases", positive=measure.n_positive, negative=measure.n_negative)
    sensitivity, specificity = _interval(measure.sensitivity), _interval(measure.specificity)
    return f"{words('sign.sensitivity')} {sensitivity}, {words('sign.specificity')} {specificity}, {cases}"


def _pairs(what: str, old: Mapping[str, str], new: Mapping[str, str], words: _Words) -> list[str]:
    """Return a line for each name whose text is new, gone or another one."""
    names = [*new, *(name for name in old if name not in new)]
    return [words.change(f"{what} {name}", old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _golden(new: Version, old: Version | None, words: _Words) -> list[str]:
    """Return the golden cases that are new, gone, of another picture, or whose known score is another one."""
    before = {case.input: case for case in old.manifest.golden} if old else {}
    lines = []
    for case in new.manifest.golden:
        name, earlier = case.input.rsplit("/", 1)[-1].removesuffix(".npz"), before.pop(case.input, None)
        same = earlier is not None and old is not None and _same_picture(new.read(case.input), old.read(earlier.input))
        for label, score in case.expected.items():
            shown, threshold = f"{score:.3f} ({_side(score, _point(new.manifest, label), words)})", _point(new.manifest, label)
            what = f"{words('sign.golden')} {name}, {label}"
            if earlier is None or label not in earlier.expected or old is None:
                lines.append(f"+ {what}: {shown}")
                continue
            was = earlier.expected[label]
            earlier_text = f"{was:.3f} ({_side(was, _point(old.manifest, label), words)})"
            if same is False:
                lines.append(f"! {what}: {words('sign.golden.other')}: {earlier_text} → {shown}")
            elif (crosses := _crosses(was, score, old, threshold, label)) or was != score:
                doubt = f" [{words('sign.golden.unread')}]" if same is None else ""
                crossed = f" ({words('sign.golden.crossed')})" if crosses else ""
                lines.append(f"! {what}: {earlier_text} → {shown}{crossed}{doubt}")
        if earlier is not None and earlier.tolerance != case.tolerance:
            lines.append(words.change(f"{words('sign.golden.tolerance')} {name}", _flat(earlier.tolerance), _flat(case.tolerance)))
    gone = [case.rsplit("/", 1)[-1].removesuffix(".npz") for case in before]
    return lines + [f"- {words('sign.golden')} {name}" for name in gone]


def _side(score: float, point: OperatingPoint | None, words: _Words) -> str:
    if point is None:
        return words("sign.no_threshold")
    return words("sign.above" if score >= point.threshold else "sign.below", threshold=f"{point.threshold:g}")


def _crosses(was: float, now: float, old: Version, point: OperatingPoint | None, label: str) -> bool:
    before = _point(old.manifest, label)
    return before is not None and point is not None and (was >= before.threshold) != (now >= point.threshold)


def _same_picture(new: bytes | None, old: bytes | None) -> bool | None:
    """Return whether two golden files hold the same image; None where one of them is not at hand or cannot be read."""
    digests = [_picture_digest(raw) for raw in (new, old)]
    return None if None in digests else digests[0] == digests[1]


def _picture_digest(raw: bytes | None) -> str | None:
    if raw is None:
        return None
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            pixels = arrays["pixels" if "pixels" in arrays else "values"]
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile):
        return None
    return hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def _texts(new: Manifest, old: Manifest | None, words: _Words) -> list[str]:
    """Return the intended use in both languages: signers answer for each of them."""
    lines = []
    for language in messages.LANGUAGES:
        before = getattr(old.intended_use, language) if old else None
        after = getattr(new.intended_use, language)
        if before != after:
            lines.append(words.change(f"{words('sign.intended_use')} ({language})", before, after))
    return lines


def _pipeline(new: Manifest, old: Manifest | None, words: _Words) -> list[str]:
    def steps(manifest: Manifest) -> str:
        values = manifest.input.model_dump(mode="json", by_alias=True)
        texts = []
        for step in values.pop("pipeline"):
            name = step.pop("step")
            texts.append(" ".join([name, *(f"{field}={_flat(value)}" for field, value in step.items())]))
        return f"{_flat(values)}; " + " > ".join(texts)

    before, after = steps(old) if old else None, steps(new)
    return [words.change(words("sign.pipeline"), before, after)] if before != after else []


def _variants(new: Manifest, old: Manifest | None, words: _Words) -> list[str]:
    def texts(manifest: Manifest | None) -> dict[str, str]:
        variants = manifest.variants if manifest else []
        return {
            " ".join(filter(None, (item.precision, item.activations))): f"{item.recipe}; {words('sign.weights')} {item.sha256[:12]}"
            + (f"; {words('sign.not_on')} {', '.join(item.not_on)}" if item.not_on else "")
            for item in variants
        }

    return _pairs(words("sign.variant"), texts(old), texts(new), words)


def _other_fields(new: Manifest, old: Manifest | None, words: _Words) -> list[str]:
    """Return every other field of the manifest that differs, by its path; applies_to in words."""

    def leaves(manifest: Manifest | None) -> dict[str, str]:
        values = manifest.model_dump(mode="json", by_alias=True, exclude=set(_OWN_WORDS)) if manifest else {}
        return _leaves(values)

    before, after = leaves(old), leaves(new)
    lines = []
    for path in [*after, *(path for path in before if path not in after)]:
        if before.get(path) != after.get(path):
            what = f"{words('sign.applies_to')} {path.removeprefix('applies_to.')}" if path.startswith("applies_to.") else path
            lines.append(words.change(what, before.get(path), after.get(path)))
    return lines


def _leaves(value: Any, path: str = "") -> dict[str, str]:
    """Return the values of a JSON object by their dotted path; a list is one value."""
    if isinstance(value, dict):
        return {name: text for key, item in value.items() for name, text in _leaves(item, f"{path}.{key}" if path else str(key)).items()}
    return {path: _flat(value)}


def _flat(value: Any) -> str:
    """Return a value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_flat(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_flat, value)) or _NONE
    return _NONE if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)
