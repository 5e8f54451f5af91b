"""``appliance tls status`` and the status page: what they say of the certificates, in both languages."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.certificates import Certificate, find_problems
from appliance.core.settings import Settings
from appliance.core.tls_status import tls_statuses
from tests.support.certificates import make_authority, make_pair
from tests.support.processes import run_here
from webui import create_app
from webui.admin.box_health import health_verdict
from webui.server import proxy

NAME = "clinicbox.county.example"


def report(settings: Settings, language: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit code and the words of ``appliance tls status``."""
    from appliance.cli.main import main

    monkeypatch.setenv("LC_ALL", {"zh": "zh_CN.UTF-8", "en": "C"}[language])
    done = run_here(main, "tls", "status", "--data-dir", str(settings.data_dir))
    return done.returncode, done.stdout


@pytest.fixture
def box(tmp_path: Path) -> Settings:
    """A box whose page is on the network, and DICOM over TLS."""
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "box.toml").write_text(
        f'web_host = "0.0.0.0"\nweb_hostname = "{NAME}"\ntls_certificate = "../web.crt"\ntls_key = "../web.key"\n'
        'tls_authority = "../ca.crt"\n'
        "dicom_tls_port = 2762\nweb_port = 0\ndicom_port = 0\ndisk_reserve_bytes = 0\n"
    )
    return Settings.load(tmp_path / "box")


def test_names_end_and_trust(box: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = make_authority(tmp_path / "ca.crt")
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", [NAME, "192.168.1.20"], authority=authority, days=100.5)
    code, text = report(box, "en", monkeypatch)
    assert code == 0
    for part in ("page, DICOM receiver", f"{NAME}, 192.168.1.20", "Clinic CA", "days left: 100", "trusted by the authority"):
        assert part in text
    assert "hint" not in text
    code, text = report(box, "zh", monkeypatch)
    for part in ("网页", "DICOM 接收程序", "剩余 100 天", "受本机所设证书机构信任"):
        assert part in text
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", [NAME])
    assert "self-signed" in report(box, "en", monkeypatch)[1]
    assert "自签名" in report(box, "zh", monkeypatch)[1]
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", [NAME], authority=make_authority(tmp_path / "other.crt", "Other CA"))
    assert "does not know" in report(box, "en", monkeypatch)[1]


def test_without_a_certificate_it_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.data_dir.mkdir()
    assert "no certificate" in report(settings, "en", monkeypatch)[1]
    assert "没有证书" in report(settings, "zh", monkeypatch)[1]


@pytest.mark.parametrize(
    ("damage", "code", "exit_code", "en", "zh"),
    [
        ("expired", "tls.expired", 1, "has expired", "已过期"), ("soon", "tls.expires_soon", 0, "within 30 days", "30 天内到期"),
        ("future", "tls.not_yet_valid", 0, "not valid yet", "尚未生效"), ("name", "tls.other_name", 0, "another name", "不是本设备的名称"),
        ("key", "tls.key_mismatch", 1, "another certificate", "属于另一张证书"),
        ("half", "tls.unreadable", 1, "missing, damaged", "不存在、已损坏"), ("weak", "tls.refused", 1, "OpenSSL refuses", "OpenSSL 拒绝"),
        ("cut", "tls.unreadable", 1, "missing, damaged", "不存在、已损坏"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_on_the_page_and_by_the_command(
    box: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, code: str, exit_code: int, en: str, zh: str
) -> None:
    authority = make_authority(tmp_path / "ca.crt")
    days = {"expired": -2.0, "soon": 20.5, "future": 300.0}.get(damage, 365.0)
    names = ["other.example"] if damage == "name" else [NAME]
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", names, authority=authority, days=days)
    now = datetime.now(timezone.utc)
    if damage == "key":
        make_pair(tmp_path / "new.crt", tmp_path / "web.key", names, authority=authority)
    elif damage == "weak":
        make_pair(tmp_path / "web.crt", tmp_path / "web.key", names, is_weak=True)
    elif damage == "half":
        (tmp_path / "web.key").unlink()
    elif damage == "cut":
        (tmp_path / "web.crt").write_text((tmp_path / "web.crt").read_text()[:300])
    elif damage == "future":
        now -= timedelta(days=30)  # a clock that is wrong
        [status] = tls_statuses(box, now)
        assert [problem.code for problem in status.problems] == [code]
        return
    [status] = tls_statuses(box, now)
    assert [problem.code for problem in status.problems] == [code]
    assert report(box, "en", monkeypatch)[0] == exit_code
    for language, part in (("en", en), ("zh", zh)):
        text = report(box, language, monkeypatch)[1]
        assert part in text
        assert {"en": "hint: ", "zh": "提示"}[language] in text
    for language, part in (("en", en), ("zh", zh)):
        [line] = lines_of_the_status_page(box, language)
        assert part in line
        assert {"en": "Certificate", "zh": "证书"}[language] in line


def lines_of_the_status_page(box: Settings, language: str) -> list[str]:
    """What the first card of the status page says of certificates; without a login, whose cookie needs TLS."""
    app = create_app(box)
    with app.test_request_context("/health", headers={"Cookie": f"lang={language}"}):
        items = health_verdict(box, [], False, False)["items"]
    app.extensions["box"].stop()
    app.extensions["box"].store.close()
    return [item.text for item in items if item.code.startswith("tls.")]


@pytest.mark.parametrize("damage", ["missing", "damaged", "directory"])
def test_an_authority_that_cannot_be_read_is_a_line_and_stops_nothing(
    box: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", [NAME])
    if damage == "damaged":
        (tmp_path / "ca.crt").write_text("no certificate")
    elif damage == "directory":
        (tmp_path / "ca.crt").mkdir()
    for language, part in (("en", "authority is missing, damaged"), ("zh", "证书机构的证书不存在、已损坏")):
        [line] = lines_of_the_status_page(box, language)
        assert part in line
        code, text = report(box, language, monkeypatch)
        assert code == 1
        assert part in text
    assert "Strict-Transport-Security" not in proxy.render(box, 8443)


def test_a_certificate_that_is_well_is_no_line_on_the_status_page(box: Settings, tmp_path: Path) -> None:
    make_pair(tmp_path / "web.crt", tmp_path / "web.key", [NAME], authority=make_authority(tmp_path / "ca.crt"))
    assert lines_of_the_status_page(box, "en") == []


@pytest.mark.parametrize(
    ("names", "host", "is_covered"),
    [
        (("a.example",), "A.example.", True), (("*.example",), "a.example", True), (("*.example",), "a.b.example", False),
        (("*.example",), "example", False), (("10.0.0.1",), "10.0.0.1", True), (("*.0.0.1",), "10.0.0.1", False), ((), "a", False),
    ],
)  # fmt: skip
def test_names_that_a_certificate_covers(names: tuple[str, ...], host: str, is_covered: bool) -> None:
    day = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert Certificate(names, "ca", day, day, False).covers(host) == is_covered


@given(
    st.datetimes(datetime(1971, 1, 1), datetime(2090, 1, 1), timezones=st.just(timezone.utc)),
    st.timedeltas(timedelta(days=-800), timedelta(days=800)),
)
def test_at_any_time_one_word_at_most_is_said_about_the_end(now: datetime, left: timedelta) -> None:
    """A clock a year ahead or back leads to a report, never to an error."""
    end = now + left
    certificate = Certificate((NAME,), "ca", end - timedelta(days=365), end, False)
    codes = [problem.code for problem in find_problems(certificate, (NAME,), now)]
    assert len(codes) <= 1
    assert (codes == ["tls.expired"]) == (left <= timedelta(0))
    assert (certificate.days_left(now) < 0) == (left < timedelta(0))
