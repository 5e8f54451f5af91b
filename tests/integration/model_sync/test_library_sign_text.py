"""What `model-library sign` shows: everything that changes for patients against the version in the field, in both languages."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_sync.bundle import Manifest
from model_sync.library import publish
from model_sync.library.clinical_difference import Version, describe_difference
from model_sync.library.roles import AnyMetadata
from model_sync.library.signing import _target_reader
from model_sync.library.text import describe
from model_sync.messages import Language
from tests.support.binding_gate import write_gate
from tests.support.library_site import Site, make_site, reference_bundle, tiny_bundle

LINE = "cxr-pneumonia"


def picture(brightness: int) -> bytes:
    """A golden file of one image."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pixels=np.full((8, 8), brightness, np.uint8), probability=np.zeros((1, 1), np.float32))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    bundle = tiny_bundle(tmp_path_factory.mktemp("base"), "0.2.0")
    document: dict[str, Any] = json.loads((bundle / "manifest.json").read_text("utf-8"))
    document["golden"][0]["expected"]["pneumonia"] = 0.3
    document["input_check"] = json.loads((reference_bundle() / "manifest.json").read_text("utf-8"))["input_check"]
    return document


def version_of(document: dict[str, Any], pictures: dict[str, int] | None = None) -> Version:
    shown = {"golden/a.npz": 10, "golden/b.npz": 20} if pictures is None else pictures
    files = {name: picture(brightness) for name, brightness in shown.items()}
    return Version(Manifest.parse(json.dumps(document).encode()), files.get)


def point(document: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = document["operating_points"][0]
    return entry


def second_label(document: dict[str, Any]) -> None:
    document["labels"].append({**document["labels"][0], "name": "effusion", "title": {"zh": "胸腔积液", "en": "Effusion"}})
    document["operating_points"].append(point(document) | {"label": "effusion"})
    document["reference_scores"].append(document["reference_scores"][0] | {"label": "effusion"})
    for case in document["golden"]:
        case["expected"]["effusion"] = 0.5


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = point(document)["groups"]
    return entries


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], dict[str, str]]] = {
    "a threshold": (
        lambda d: point(d).update(threshold=0.9),
        {"en": "! Pneumonia: threshold: 0.6208 → 0.9", "zh": "! 肺炎: 阈值: 0.6208 → 0.9"},
    ),
    "a golden case that changes sides by the threshold": (
        lambda d: point(d).update(threshold=0.2),
        {"en": "golden case a, pneumonia: 0.300 (below 0.6208) → 0.300 (above 0.2) (CHANGES SIDES)", "zh": "标准病例 a, pneumonia"},
    ),
    "sensitivity": (
        lambda d: point(d)["sensitivity"].update(value=0.96),
        {"en": "! Pneumonia: sensitivity: 95.2% (92.9%-96.8%) → 96.0% (92.9%-96.8%)", "zh": "! 肺炎: 灵敏度: 95.2% (92.9%-96.8%) → 96.0%"},
    ),
    "specificity": (
        lambda d: point(d)["specificity"].update(high=0.97),
        {"en": "! Pneumonia: specificity: 91.3% (86.7%-94.4%) → 91.3% (86.7%-97.0%)", "zh": "! 肺炎: 特异度"},
    ),
    "the evaluation set": (
        lambda d: point(d).update(measured_on="other"),
        {"en": "! Pneumonia: measured on: ", "zh": "! 肺炎: 测定数据: "},
    ),
    "the reference scores of the drift alarm": (
        lambda d: d["reference_scores"][0]["counts"].append(d["reference_scores"][0]["counts"].pop() + 1),
        {"en": "! reference_scores: ", "zh": "! reference_scores: "},
    ),
    "AUC of a source": (
        lambda d: point(d)["per_source"][1].update(auc=0.9),
        {"en": "(mirror ozanguldali/final-covid-chestxray, full size): AUC 0.9975, ", "zh": "→ AUC 0.9000, "},
    ),
    "a source that is gone": (
        lambda d: point(d)["per_source"].pop(),
        {"en": "- Pneumonia: source ml-workgroup/", "zh": "- 肺炎: 来源 ml-workgroup/"},
    ),
    "the sensitivity of a group": (
        lambda d: groups(d)[0]["sensitivity"].update(value=0.99, high=0.995),
        {"en": "! Pneumonia: children of 1 to 5 years: sensitivity 96.3% (94.0%-97.8%), ", "zh": "! 肺炎: 1–5 岁儿童: 灵敏度 96.3%"},
    ),
    "the new sensitivity of a group": (
        lambda d: groups(d)[0]["sensitivity"].update(value=0.99, high=0.995),
        {"en": "→ sensitivity 99.0% (94.0%-99.5%), ", "zh": "→ 灵敏度 99.0% (94.0%-99.5%)"},
    ),
    "the number of a group": (
        lambda d: groups(d)[1].update(n_positive=93),
        {"en": "! Pneumonia: adults of 18 to 120 years: ", "zh": "! 肺炎: 18–120 岁成人: "},
    ),
    "the sources of a group": (
        lambda d: groups(d)[1]["sources"].pop(),
        {"en": "! Pneumonia: adults of 18 to 120 years: ", "zh": "! 肺炎: 18–120 岁成人: "},
    ),
    "the ages of a group": (
        lambda d: groups(d)[1].update(min_years=16.0),
        {"en": "+ Pneumonia: adults of 16 to 120 years: ", "zh": "+ 肺炎: 16–120 岁成人: "},
    ),
    "a group that is gone": (
        lambda d: groups(d).pop(),
        {"en": "- Pneumonia: adults of 18 to 120 years: sensitivity 90.2%", "zh": "- 肺炎: 18–120 岁成人: 灵敏度 90.2%"},
    ),
    "a group that lost a class": (
        lambda d: groups(d)[1].update(n_negative=0, specificity=None),
        {"en": "specificity –, 92 with and 0 without the finding", "zh": "特异度 –"},
    ),
    "the network of the input check": (
        lambda d: d["input_check"].update(sha256="ab" * 32),
        {"en": "! input_check.sha256: ", "zh": "! input_check.sha256: "},
    ),
    "the limit of the input check": (
        lambda d: d["input_check"].update(min_upright=0.01),
        {"en": "! input_check.min_upright: 0.5 → 0.01", "zh": "! input_check.min_upright: 0.5 → 0.01"},
    ),
    "a label": (second_label, {"en": "+ label: Effusion (effusion, SCT", "zh": "+ 标签: 胸腔积液 (effusion, SCT"}),
    "the title of a label": (
        lambda d: d["labels"][0]["title"].update(en="Opacity", zh="致密影"),
        {"en": "! label: Pneumonia (pneumonia, SCT 233604007 Pneumonia) → Opacity (pneumonia", "zh": "! 标签: 肺炎"},
    ),
    "a score of a golden case": (
        lambda d: d["golden"][0].update(expected={"pneumonia": 0.7}),
        {"en": "! golden case a, pneumonia: 0.300 (below 0.6208) → 0.700 (above 0.6208) (CHANGES SIDES)", "zh": "(越过阈值)"},
    ),
    "a golden case that is gone": (lambda d: d["golden"].pop(), {"en": "- golden case b", "zh": "- 标准病例 b"}),
    "the tolerance of a golden case": (
        lambda d: d["golden"][0].update(tolerance={"fp32": 0.5}),
        {"en": "! tolerance of the golden case a: fp32=0.002 → fp32=0.5", "zh": "! 标准病例的容差 a: fp32=0.002 → fp32=0.5"},
    ),
    "the modalities": (
        lambda d: d["applies_to"].update(modality=["CR"]),
        {"en": "! applies to modality: CR; DX; RG → CR", "zh": "! 适用于 modality: CR; DX; RG → CR"},
    ),
    "the ages": (
        lambda d: d["applies_to"]["age"].update(max_years=90.0),
        {"en": "! applies to age.max_years: 5 → 90", "zh": "! 适用于 age.max_years: 5 → 90"},
    ),
    "the input pipeline": (
        lambda d: d["input"]["pipeline"][1].update(default="minmax"),
        {"en": "voi default=percentile > monochrome2", "zh": "! 输入处理流程: "},
    ),
    "the intended use in Chinese": (
        lambda d: d["intended_use"].update(zh="用于筛查"),
        {"en": "! intended use (zh): 仅用于演示", "zh": "! 预期用途 (zh): 仅用于演示"},
    ),
    "the intended use in English": (lambda d: d["intended_use"].update(en="Screening"), {"en": "→ Screening", "zh": "→ Screening"}),
    "the weights": (lambda d: d["variants"][0].update(sha256="ab" * 32), {"en": "weights abababababab", "zh": "权重 abababababab"}),
    "a runtime that is excluded": (
        lambda d: d["variants"][0].update(not_on=["openvino"]),
        {"en": "; not on openvino", "zh": "; 不用于 openvino"},
    ),
    "the limits of the trial": (
        lambda d: d.update(watch={"trial_cases": 5}),
        {"en": "! watch.trial_cases: 200 → 5", "zh": "! watch.trial_cases: 200 → 5"},
    ),
    "the registration": (
        lambda d: d["registration"].update(number="NMPA 1"),
        {"en": "! registration.number: – → NMPA 1", "zh": "! registration.number: – → NMPA 1"},
    ),
    "the kind of change": (
        lambda d: d.update(change_kind="data"),
        {"en": "! change_kind: algorithm → data", "zh": "! change_kind: algorithm → data"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", CHANGES)
def test_every_kind_of_change_is_shown(base: dict[str, Any], name: str, language: Language) -> None:
    changed = copy.deepcopy(base) | {"version": "0.3.0"}
    change, expected = CHANGES[name]
    change(changed)
    lines = describe_difference(version_of(changed), version_of(base), language)
    assert any(expected[language] in line for line in lines), "\n".join(lines)
    assert "0.2.0" in lines[0]
    assert lines == describe_difference(version_of(changed), version_of(base), language)
    assert not any(re.search(r"\bmore$|\.\.\.$|…", line) for line in lines)


@pytest.mark.parametrize(("language", "words"), [("en", "nothing changes in the manifest"), ("zh", "清单没有变化")])
def test_a_version_that_changes_nothing_says_so(base: dict[str, Any], language: Language, words: str) -> None:
    lines = describe_difference(version_of(base | {"version": "0.3.0"}), version_of(base), language)
    assert len(lines) == 2
    assert words in lines[1]


@pytest.mark.parametrize(("language", "words"), [("en", "first version"), ("zh", "首个版本")])
def test_of_a_first_version_everything_is_shown(base: dict[str, Any], language: Language, words: str) -> None:
    lines = describe_difference(version_of(base), None, language)
    assert words in lines[0]
    text = "\n".join(lines)
    for part in (
        "0.6208",
        "95.2%",
        "0.8711",
        "CR; DX; RG",
        "voi default=percentile",
        base["intended_use"]["zh"],
        base["intended_use"]["en"],
        {"en": "children of 1 to 5 years", "zh": "1–5 岁儿童"}[language],
        {"en": "adults of 18 to 120 years", "zh": "18–120 岁成人"}[language],
    ):
        assert part in text
    assert all(line.startswith("  + ") for line in lines[1:])


def test_another_image_under_the_same_name_is_no_changed_score(base: dict[str, Any]) -> None:
    old, new = version_of(base), version_of(base | {"version": "0.3.0"}, {"golden/a.npz": 11, "golden/b.npz": 20})
    (line,) = [line for line in describe_difference(new, old, "en") if "golden" in line]
    assert "golden case a, pneumonia: another image under the same name" in line
    changed = copy.deepcopy(base) | {"version": "0.3.0"}
    changed["golden"][1]["expected"]["pneumonia"] = 0.9
    unread = describe_difference(version_of(changed, {}), old, "en")
    assert any("golden case b" in line and "not known whether the image is the same" in line for line in unread)


# --- in a library -------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path / "lib")


def shown(site: Site, role: str, md: AnyMetadata | None, language: Language = "en") -> str:
    assert md is not None
    library = site.library
    read = _target_reader(library.files.staged / "targets", library.files.public / "targets")
    return "\n".join(describe(role, md, library.published(role), str, read, published=library.published, language=language))


def with_threshold(bundle: Path, threshold: float) -> Path:
    path = bundle / "manifest.json"
    document = json.loads(path.read_text("utf-8"))
    point(document).update(threshold=threshold)
    path.write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    write_gate(bundle)
    return bundle


def test_a_new_version_is_compared_with_the_one_that_rollouts_name(site: Site, tmp_path: Path) -> None:
    for version, threshold in (("0.1.0", 0.3), ("0.2.0", 0.4)):
        site.publish(with_threshold(tiny_bundle(tmp_path, version), threshold), deltas=False)
    site.rollout("stable", LINE, "0.1.0")
    publish.publish(site.by_hand(), with_threshold(tiny_bundle(tmp_path, "0.3.0"), 0.9), deltas=False)
    text = shown(site, LINE, site.library.staged(LINE))
    assert f"What changes for patients with {LINE} 0.3.0" in text
    assert "compared with 0.1.0" in text
    assert "! Pneumonia: threshold: 0.3 → 0.9" in text
    chinese = shown(site, LINE, site.library.staged(LINE), "zh")
    assert "与正在使用的版本 0.1.0 相比" in chinese
    assert "! 肺炎: 阈值: 0.3 → 0.9" in chinese


def test_without_a_rollout_the_newest_usable_version_counts_and_a_first_one_has_none(site: Site, tmp_path: Path) -> None:
    library = site.by_hand()
    publish.publish(library, tiny_bundle(tmp_path, "0.1.0"), deltas=False)
    assert "first version, compared with nothing" in shown(site, LINE, library.staged(LINE))
    site.sign_all()
    site.publish(tiny_bundle(tmp_path, "0.2.0", seed=1), deltas=False)
    site.withdraw(LINE, "0.2.0")
    publish.publish(site.by_hand(), with_threshold(tiny_bundle(tmp_path, "0.3.0"), 0.9), deltas=False)
    text = shown(site, LINE, site.library.staged(LINE))
    assert "compared with 0.1.0" in text
    assert "threshold: 0.6208 → 0.9" in text


def test_a_rollout_shows_what_changes_for_the_patients_of_its_ring(site: Site, tmp_path: Path) -> None:
    for version, threshold in (("0.1.0", 0.3), ("0.2.0", 0.4)):
        site.publish(with_threshold(tiny_bundle(tmp_path, version), threshold), deltas=False)
    site.rollout("stable", LINE, "0.1.0")
    before = site.library.published("rollout")
    site.rollout("stable", LINE, "0.2.0")
    after = site.library.published("rollout")
    assert before is not None
    assert after is not None
    library = site.library
    read = _target_reader(library.files.public / "targets")
    text = "\n".join(describe("rollout", after, before, str, read, published=library.published))
    assert "! Pneumonia: threshold: 0.3 → 0.4" in text


def test_every_file_of_a_large_version_is_listed(site: Site, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, "0.1.0")
    document = json.loads((bundle / "manifest.json").read_text("utf-8"))
    for number in range(30):
        (bundle / f"note{number:02d}.txt").write_text(str(number))
        document["documents"].append({"file": f"note{number:02d}.txt", "sha256": hashlib.sha256(str(number).encode()).hexdigest()})
    (bundle / "manifest.json").write_text(json.dumps(document), "utf-8")
    library = site.by_hand()
    publish.publish(library, bundle, deltas=False)
    text = shown(site, LINE, library.staged(LINE))
    assert all(f"note{number:02d}.txt" in text for number in range(30))
    assert " more" not in text


def test_what_is_not_at_hand_is_named(site: Site, tmp_path: Path) -> None:
    site.publish(tiny_bundle(tmp_path, "0.1.0"), deltas=False)
    library = site.by_hand()
    publish.publish(library, tiny_bundle(tmp_path, "0.2.0", seed=1), deltas=False)
    md = library.staged(LINE)
    assert md is not None
    read = _target_reader(library.files.staged / "targets", library.files.public / "targets")
    text = "\n".join(describe(LINE, md, library.published(LINE), str, lambda t: None if "manifest" in t.path else read(t), language="zh"))
    assert "此处没有版本 0.2.0 的文件" in text
