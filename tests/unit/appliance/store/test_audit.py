"""The audit finds whatever was cut off, wiped, edited or replaced, keeps the evidence, and never accuses a box at work (R9, R10)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from appliance.cli.main import main
from appliance.core.errors import StoreError
from appliance.core.settings import Settings
from appliance.store import audit
from appliance.store.audit import APPLICATION_ACTIVITY, Head
from appliance.store.audit_anchors import ANCHORS_NAME, CONFIRMED_NAME
from appliance.store.database import Database
from appliance.store.keys import AUDIT_KEY
from appliance.store.store import DATABASE_NAME, Store, replace_audit_key
from tests.support.audit_damage import FIRST, LAST, damage_entries
from tests.support.box_database import copy_database, raw_connection
from tests.support.old_database import old_database


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    made = Store(settings)
    yield made
    made.close()


def write(store: Store, count: int = 1) -> None:
    with store.database.transaction() as tx:
        for number in range(count):
            Database.audit(tx, APPLICATION_ACTIVITY, "t", "E", f"x:{number}")


def damage(path: Path, *statements: str) -> None:
    """Change the database as somebody does who has the file and ignores its rules."""
    with closing(raw_connection(path.parent)) as raw:
        raw.execute("DROP TRIGGER IF EXISTS audit_no_update")
        raw.execute("DROP TRIGGER IF EXISTS audit_no_delete")
        for statement in statements:
            raw.execute(statement)


def problems(store: Store) -> list[str]:
    return [problem.text for problem in store.database.anchors().verify().problems]


def test_r10_a_cut_end_is_found_and_still_found_after_the_next_entry(store: Store) -> None:
    write(store, 40)
    damage(store.database.path, "DELETE FROM audit WHERE seq > 10")
    assert problems(store) == ["the end after entry 10"]
    write(store)
    for _ in range(2):
        missing, recorded = problems(store)
        assert missing == "entries 11 to 40 are missing"
        assert recorded.startswith("entry 41, of ")
        write(store, 3)
    with pytest.raises(StoreError, match=r"audit\.broken.*entries 11 to 40 are missing"):
        store.database.verify_audit()


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM audit", "DELETE FROM meta WHERE key = 'audit_head'"],
        ["DELETE FROM audit"],
        ["DELETE FROM meta WHERE key = 'audit_head'"],
        ["UPDATE meta SET value = '3 ' || substr(value, 3) WHERE key = 'audit_head'", "DELETE FROM audit WHERE seq > 3"],
        ["DELETE FROM audit WHERE seq = 5"],
        ["UPDATE audit SET entry = replace(entry, 'x:2', 'x:9')"],
        ["UPDATE audit SET seq = seq + 100 WHERE seq = 5"],
        ["UPDATE audit SET entry = 'no JSON' WHERE seq = 2"],
    ],
)
def test_r10_every_wipe_and_edit_is_found_before_and_after_the_next_entries(store: Store, statements: list[str]) -> None:
    write(store, 5)
    damage(store.database.path, *statements)
    assert problems(store)
    write(store, 3)
    assert problems(store)


def test_r10_a_wipe_before_the_first_anchor_leaves_the_key_and_is_found(settings: Settings) -> None:
    with closing(Store(settings)) as store:
        assert store.database.verify_audit() == 0
        write(store, 3)
        store.database.anchors().take()
    for name in (DATABASE_NAME, f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm"):
        (settings.data_dir / name).unlink(missing_ok=True)
    with closing(Store(settings)) as empty:
        assert problems(empty) == [
            "audit.anchors has been shortened or replaced", "entry 3, of which there is an anchor, is missing"
        ]  # fmt: skip


def test_r10_an_older_copy_of_the_database_is_found_by_the_anchors(settings: Settings, tmp_path: Path) -> None:
    with closing(Store(settings)) as store:
        write(store, 3)
        assert store.database.anchors().take()
        copy_database(settings.data_dir, tmp_path / "old")
        write(store, 700)
        assert store.database.anchors().take()
    for name in (f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm"):
        (settings.data_dir / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "old", settings.data_dir / DATABASE_NAME)
    with closing(Store(settings)) as old:
        assert problems(old) == ["entry 703, of which there is an anchor, is missing"]
        write(old, 1300)
        assert problems(old) == ["entry 703 differs from an anchor"]
        assert old.database.anchors().take()
        assert problems(old) == ["entry 703 differs from an anchor"]


def test_r10_a_head_that_the_centre_confirmed_is_compared_too(settings: Settings, tmp_path: Path) -> None:
    def confirm(head: Head) -> None:
        (tmp_path / CONFIRMED_NAME).write_text(f'{{"entries": {head.seq}, "digest": "{head.digest}"}}')

    with closing(Store(settings.model_copy(update={"exchange_dir": tmp_path}))) as store:
        write(store, 5)
        confirm(audit.head(store.database.connection()))
        assert problems(store) == []
        confirm(Head(5, "a" * 64))
        assert problems(store) == ["entry 5 differs from an anchor"]
        confirm(Head(9, "a" * 64))
        assert problems(store) == ["entry 9, of which there is an anchor, is missing"]
        seen = store.database.anchors().acknowledge("security", "case 10")
        assert [item.text for item in seen] == ["entry 9, of which there is an anchor, is missing"]
        assert problems(store) == []


@pytest.mark.parametrize("change", ["delete", "empty", "shorten", "edit"])
def test_r10_anchors_that_were_deleted_shortened_or_edited_are_found(store: Store, change: str) -> None:
    anchors = store.database.anchors()
    for _ in range(3):
        write(store, 501)
        assert anchors.take()
    assert not anchors.take()
    lines = anchors.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    if change == "delete":
        anchors.path.unlink()
    else:
        text = {"empty": b"", "shorten": lines[0], "edit": b"".join(lines).replace(b" 501 ", b" 502 ")}[change]
        anchors.path.write_bytes(text)
    assert problems(store)
    write(store, 501)
    assert anchors.take()
    write(store, 501)
    assert anchors.take()
    assert problems(store)


def test_r10_a_power_cut_while_an_anchor_is_written_is_no_break(store: Store) -> None:
    anchors = store.database.anchors()
    write(store, 501)
    anchors.take()
    with anchors.path.open("ab") as file:
        file.write(b"2026-01-01T00:0")
    assert problems(store) == []
    write(store, 501)
    assert anchors.take()
    assert problems(store) == []
    assert [anchor.head.seq for anchor in anchors.read()] == [501, 1002]


@pytest.mark.parametrize("content", [None, b"", b"short", b"k" * 32], ids=["deleted", "empty", "damaged", "replaced"])
def test_r10_a_lost_emptied_or_replaced_key_is_refused_and_never_remade(settings: Settings, content: bytes | None) -> None:
    with closing(Store(settings)) as store:
        write(store, 2)
    path = settings.data_dir / "keys" / AUDIT_KEY
    right = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(StoreError) as refused:
            Store(settings)
        assert refused.value.code == ("key.wrong" if content == b"k" * 32 else "key.missing")
        assert refused.value.detail.startswith(AUDIT_KEY)
    assert (path.read_bytes() if path.exists() else None) == content
    path.write_bytes(right)
    with closing(Store(settings)) as store:
        assert store.database.verify_audit() == 2


def test_r10_the_key_of_an_older_box_without_entries_is_refused_too(settings: Settings) -> None:
    Store(settings).close()
    (settings.data_dir / "keys" / AUDIT_KEY).unlink()
    with pytest.raises(StoreError, match=r"key\.missing"):
        Store(settings)


def test_r10_an_administrator_acknowledges_a_break_once_and_the_next_one_is_found_again(store: Store) -> None:
    write(store, 20)
    store.database.anchors().take()
    damage(store.database.path, "DELETE FROM audit WHERE seq > 15", "UPDATE audit SET entry = replace(entry, 'x:3', 'x:4')")
    seen = store.database.anchors().acknowledge("security", "disk exchanged, case 7")
    assert [item.text.split(",")[0] for item in seen] == ["entry 4 was changed", "entries 16 to 20 are missing", "entry 21", "entry 20"]
    assert store.database.verify_audit() == 18  # 15, the break, that it was looked at, the acknowledgement
    last = store.database.query("SELECT entry FROM audit ORDER BY seq DESC LIMIT 1")[0]["entry"]
    assert "disk exchanged, case 7" in last
    write(store)
    assert store.database.verify_audit() == 19
    assert store.database.anchors().acknowledge("security", "nothing") == []
    damage(store.database.path, "UPDATE audit SET entry = replace(entry, 'x:4', 'x:5') WHERE seq = 4")
    assert problems(store) == ["entry 4 was changed"]


def test_r10_an_entry_that_somebody_forges_acknowledges_nothing(store: Store) -> None:
    write(store, 5)
    damage(store.database.path, "UPDATE audit SET entry = replace(entry, 'x:3', 'x:4')")
    (found,) = store.database.anchors().verify().problems
    with closing(raw_connection(store.settings.data_dir)) as raw:
        (digest,) = raw.execute("SELECT digest FROM audit WHERE seq = 5").fetchone()
        fields = {"at": "2026-01-01T00:00:00.000+00:00", "event": "110113", "meaning": "Security Alert", "actor": "x", "action": "U"}
        detail = {"acknowledged": [found.identity]}
        entry = json.dumps(fields | {"seq": 6, "object": "audit", "outcome": 4, "detail": detail}, sort_keys=True)
        raw.execute("INSERT INTO audit VALUES (6, ?, ?)", (entry, audit.chain(digest, entry)))
    assert problems(store) == ["the end after entry 6"]
    write(store)
    assert problems(store)[0].startswith("entry 7, of ")


def test_r10_a_lost_key_is_replaced_by_a_person_on_record(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Store(settings)) as store:
        write(store, 600)
        store.database.anchors().take()
    box = ["--data-dir", str(settings.data_dir)]
    assert main(["audit", "new-key", "--reason", "case 8", *box]) == 2  # the key is whole
    (settings.data_dir / "keys" / AUDIT_KEY).write_bytes(b"")
    assert main(["audit", "verify", *box]) == 1
    assert main(["audit", "acknowledge", "--reason", "case 8", *box]) == 1
    assert main(["audit", "new-key", "--reason", " ", *box]) == 2
    assert main(["audit", "new-key", "--reason", "case 8", *box]) == 0
    assert main(["audit", "verify", *box]) == 1
    assert "audit.key_replaced" in capsys.readouterr().err
    assert main(["audit", "acknowledge", "--reason", "case 8", *box]) == 0
    assert main(["audit", "verify", *box]) == 0
    with closing(Store(settings)) as store:
        write(store, 600)
        assert store.database.anchors().take()
        assert store.database.verify_audit() > 1200


def test_r10_damaged_entries_are_found_shown_and_exported_and_stop_nothing(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Store(settings)) as store:
        write(store, LAST + 1)
    damage_entries(settings.data_dir)
    box = ["--data-dir", str(settings.data_dir)]
    changed = [f"entry {number} was changed" for number in range(FIRST, LAST + 1)]
    assert main(["audit", "verify", *box]) == 1
    assert capsys.readouterr().err.splitlines()[: len(changed)] == changed
    for action, count in (("show", LAST + 2), ("export", LAST + 3)):
        assert main(["audit", action, *box]) == 1
        shown = capsys.readouterr()
        assert len(shown.out.splitlines()) == count
        assert re.findall(r"entry (\d+) cannot be read", shown.err) == [str(number) for number in range(FIRST, LAST + 1)]
    with closing(Store(settings)) as store:
        write(store)
        assert problems(store) == changed
        store.database.anchors().acknowledge("security", "case 11")
        assert problems(store) == []


def test_r10_a_damaged_entry_whose_digests_were_made_to_fit_is_found(store: Store) -> None:
    write(store, 1)
    digest = audit.digest_at(store.database.connection(), 1)
    with closing(raw_connection(store.settings.data_dir)) as raw:
        raw.execute("INSERT INTO audit VALUES (2, 'no JSON', ?)", (audit.chain(digest, "no JSON"),))
    assert problems(store) == ["entry 2 cannot be read", "the end after entry 2"]


@pytest.mark.parametrize("column", ["digest", "value"])
def test_r10_a_last_digest_or_sealed_head_that_is_no_text_stops_no_entry(store: Store, column: str) -> None:
    write(store, 3)
    statements = {
        "digest": "UPDATE audit SET digest = CAST(x'ff' AS TEXT) WHERE seq = 3",
        "value": "UPDATE meta SET value = CAST(x'ff' AS TEXT) WHERE key = 'audit_head'",
    }
    damage(store.database.path, statements[column])
    assert problems(store)
    write(store, 3)
    assert numbers(store) == list(range(1, 8))
    assert problems(store)


PAGE = 4096


def damage_page(path: Path, number: int) -> bytes:
    """Replace a page of the database by random bytes; returns the whole content from before."""
    whole = path.read_bytes()
    path.write_bytes(whole[: number * PAGE] + secrets.token_bytes(PAGE) + whole[(number + 1) * PAGE :])
    return whole


def test_r10_a_damaged_database_is_an_error_with_a_hint_in_every_command(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Store(settings)) as store:
        write(store, 400)
    (settings.data_dir / "box.toml").write_text('audit_syslog = "127.0.0.1:9"\n')
    path = settings.data_dir / DATABASE_NAME
    codes = set()
    for number in range(0, path.stat().st_size // PAGE, 11):
        whole = damage_page(path, number)
        for action in (["verify"], ["show"], ["export"], ["status"], ["acknowledge", "--reason", "case 12"]):
            codes.add(main(["audit", *action, "--data-dir", str(settings.data_dir)]))
            error = capsys.readouterr().err
            assert not error or "leave the disk as it is" in error
        for name in (f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm"):
            (settings.data_dir / name).unlink(missing_ok=True)
        path.write_bytes(whole)
    assert codes == {0, 1}


@pytest.mark.parametrize("role", ["serve", "worker", "web"])
def test_r10_a_program_does_not_start_on_a_damaged_database_and_says_what_to_do(settings: Settings, role: str) -> None:
    Store(settings).close()
    damage_page(settings.data_dir / DATABASE_NAME, 1)
    command = ["-m", "webui"] if role == "web" else ["-m", "appliance", role]
    done = subprocess.run(
        [sys.executable, *command, "--data-dir", str(settings.data_dir)], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"LANG": "en_US.UTF-8", "LANGUAGE": "en"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "leave the disk as it is and call the central team" in done.stderr
    assert "Traceback" not in done.stderr


def numbers(store: Store) -> list[int]:
    return [row["seq"] for row in store.database.query("SELECT seq FROM audit ORDER BY seq")]


@pytest.mark.parametrize("known_by", ["head", "anchors", "centre"])
@pytest.mark.parametrize("is_key_lost", [True, False], ids=["new_key", "same_key"])
def test_r10_no_number_is_used_twice_after_a_cut_end(settings: Settings, tmp_path: Path, known_by: str, is_key_lost: bool) -> None:
    settings = settings.model_copy(update={"exchange_dir": tmp_path})
    with closing(Store(settings)) as store:
        write(store, 40)
        if known_by == "anchors":
            assert store.database.anchors().take()
        if known_by == "centre":
            head = audit.head(store.database.connection())
            (tmp_path / CONFIRMED_NAME).write_text(f'{{"entries": {head.seq}, "digest": "{head.digest}"}}')
    lose_head = [] if known_by == "head" else ["DELETE FROM meta WHERE key = 'audit_head'"]
    damage(settings.data_dir / DATABASE_NAME, "DELETE FROM audit WHERE seq > 10", *lose_head)
    if is_key_lost:
        (settings.data_dir / "keys" / AUDIT_KEY).unlink()
        replace_audit_key(settings, "cli:root", "case 9")
    with closing(Store(settings)) as store:
        write(store, 3)
        assert numbers(store)[:12] == [*range(1, 11), 41, 42]
        assert "entries 11 to 40 are missing" in problems(store)


def test_r10_a_number_that_no_box_reaches_does_not_end_the_audit(settings: Settings) -> None:
    with closing(Store(settings)) as store:
        write(store, 3)
    (settings.data_dir / ANCHORS_NAME).write_text(f"2026-01-01T00:00:00.000+00:00 9223372036854775807 {'a' * 64} {'b' * 16} {'c' * 64}\n")
    damage(settings.data_dir / DATABASE_NAME, "UPDATE meta SET value = '9223372036854775807 ' || value WHERE key = 'audit_head'")
    with closing(Store(settings)) as store:
        write(store, 3)
        assert numbers(store) == list(range(1, 8))
        assert store.database.anchors().take()
        assert problems(store)


_WRITE = """
import sys
from pathlib import Path
from typing import Any
from appliance.core.settings import Settings
from appliance.store.audit import APPLICATION_ACTIVITY
from appliance.store.keys import AUDIT_KEY
from appliance.store.store import Store
store = Store(Settings.load(Path(sys.argv[1])))
print("ready", flush=True)
while True:
    store.record(APPLICATION_ACTIVITY, "t", "E", "x")
    store.database.anchors().take()
"""


def test_r10_verify_on_a_busy_box_never_cries_tampering(store: Store, settings: Settings) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", _WRITE, str(settings.data_dir)], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        counts = [store.database.verify_audit() for _ in range(60)]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert store.database.verify_audit() >= counts[-1]


def test_r10_the_audit_of_an_older_version_is_taken_over(settings: Settings) -> None:
    """Migration 12: the key of the audit is known from then on."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    for rows in (0, 2):
        path = settings.data_dir / DATABASE_NAME
        raw = old_database(path, 11)
        raw.row_factory = sqlite3.Row
        with raw:
            if rows:
                raw.execute("INSERT INTO meta VALUES ('audit_head', audit_seal(?))", (f"0 {audit.GENESIS}",))
            for _ in range(rows):
                audit.append(raw, APPLICATION_ACTIVITY, "t", "E", "x", 0)
        raw.close()
        with closing(Store(settings)) as store:
            assert store.database.verify_audit() >= rows
            write(store)
            store.database.verify_audit()
        for name in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
            name.unlink(missing_ok=True)


CHANGES = st.sampled_from(
    [
        "DELETE FROM audit WHERE seq > {n}", "DELETE FROM audit WHERE seq = {n}", "UPDATE audit SET digest = entry WHERE seq = {n}",
        "UPDATE audit SET entry = entry || ' ' WHERE seq = {n}", "UPDATE audit SET entry = replace(entry, 't', 'u') WHERE seq >= {n}",
        "UPDATE meta SET value = '{n} ' || value WHERE key = 'audit_head'", "DELETE FROM meta WHERE key = 'audit_head'",
    ]
)  # fmt: skip


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CHANGES, st.integers(1, 7), st.integers(0, 2)), min_size=1, max_size=3))
def test_r10_whatever_is_changed_in_whatever_order_stays_found(settings: Settings, changes: list[tuple[str, int, int]]) -> None:
    shutil.rmtree(settings.data_dir, ignore_errors=True)
    with closing(Store(settings)) as store:
        write(store, 8)
        for statement, number, entries in changes:
            damage(store.database.path, statement.format(n=number))
            assert problems(store)
            write(store, entries)
            assert problems(store)


def test_problems_keep_the_names_by_which_they_were_acknowledged_and_have_both_languages() -> None:
    """The identities are those that version 0.1.0 computed: what was acknowledged then stays acknowledged."""
    known: dict[str, tuple[dict[str, Any], str]] = {
        "audit.entries_missing": ({"first": 3, "last": 7}, "entries 3 to 7 are missing"),
        "audit.entry_changed": ({"seq": 3}, "entry 3 was changed"),
        "audit.entry_unreadable": ({"seq": 3}, "entry 3 cannot be read"),
        "audit.entry_differs": ({"seq": 3}, "entry 3 differs from an anchor"),
        "audit.end_changed": ({"seq": 3}, "the end after entry 3"),
        "audit.anchored_entry_missing": ({"seq": 3}, "entry 3, of which there is an anchor, is missing"),
        "audit.break_recorded": ({"seq": 3, "at": "x", "code": "audit.broken"}, "entry 3, of x, records a break (audit.broken)"),
        "audit.anchor_changed": ({"number": 3, "name": "audit.anchors"}, "line 3 of audit.anchors was changed"),
        "audit.anchors_shortened": ({"name": "audit.anchors"}, "audit.anchors has been shortened or replaced"),
    }
    for code, (values, english) in known.items():
        found = audit.problem(code, "a", "b", **values)
        assert found.text == english
        assert found.identity == hashlib.sha256(f"{english}\na\nb".encode()).hexdigest()[:32]
        assert re.search(r"[\u4e00-\u9fff]", found.describe("zh"))


@pytest.fixture(scope="module")
def anchored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, bytes]]:
    """A box with four anchors, and the bytes of their file."""
    with closing(Store(Settings.parse({"data_dir": tmp_path_factory.mktemp("anchored") / "box"}))) as store:
        for _ in range(4):
            write(store, 501)
            assert store.database.anchors().take()
        yield store, store.database.anchors().path.read_bytes()


def zero_key_and_number(lines: list[list[bytes]], at: int, _other: int) -> None:
    lines[at][1], lines[at][3] = b"0", b"0" * 16


def foreign_key(lines: list[list[bytes]], at: int, field: int) -> None:
    lines[at][3] = b"0" * 16
    lines[at][1 + field % 2] = b"7" * len(lines[at][1 + field % 2])


def remove_line(lines: list[list[bytes]], at: int, _other: int) -> None:
    del lines[at]


def repeat_line(lines: list[list[bytes]], at: int, other: int) -> None:
    lines.insert(other % 4, lines[at])
    if lines[: len(lines) - 1] == lines[1:]:
        del lines[0]


def spoil_field(lines: list[list[bytes]], at: int, other: int) -> None:
    lines[at][other] = [b"", b"9" * 5000, b"\xff", b"2026-01-01", b"-1"][(at + other) % 5]


def pad_number(lines: list[list[bytes]], at: int, _other: int) -> None:
    lines[at][1] = b"0" + lines[at][1]


EDITS = [zero_key_and_number, foreign_key, remove_line, repeat_line, spoil_field, pad_number]


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(EDITS), st.integers(0, 3), st.integers(0, 4), st.booleans())
def test_r10_whatever_is_changed_in_the_anchors_is_found(
    anchored: tuple[Store, bytes], edit: Callable[[list[list[bytes]], int, int], None], at: int, other: int, is_unknown: bool
) -> None:
    store, whole = anchored
    path = store.database.anchors().path
    lines = [line.split(b" ") for line in whole.splitlines()]
    edit(lines, at, other)
    path.write_bytes(b"".join(b" ".join(line) + b"\n" for line in lines))
    (known,) = store.database.query("SELECT value FROM meta WHERE key = 'audit_anchors'")
    if is_unknown:
        damage(store.database.path, "DELETE FROM meta WHERE key = 'audit_anchors'")
    try:
        assert problems(store)
    finally:
        path.write_bytes(whole)
        with store.database.transaction() as tx:
            tx.execute("INSERT OR REPLACE INTO meta VALUES ('audit_anchors', ?)", (known["value"],))
    assert problems(store) == []


@pytest.mark.parametrize("edit", EDITS)
def test_r10_what_was_changed_in_the_anchors_stays_found_after_the_next_anchor(
    store: Store, edit: Callable[[list[list[bytes]], int, int], None]
) -> None:
    anchors = store.database.anchors()
    for _ in range(4):
        write(store, 501)
        assert anchors.take()
    lines = [line.split(b" ") for line in anchors.path.read_bytes().splitlines()]
    edit(lines, 3, 1)
    anchors.path.write_bytes(b"".join(b" ".join(line) + b"\n" for line in lines))
    write(store, 501)
    assert anchors.take()
    assert problems(store)


@pytest.mark.parametrize("at", range(3))
def test_r10_the_mac_of_an_anchor_is_checked_though_its_key_and_number_say_otherwise(anchored: tuple[Store, bytes], at: int) -> None:
    store, whole = anchored
    path = store.database.anchors().path
    lines = [line.split(b" ") for line in whole.splitlines()]
    zero_key_and_number(lines, at, 0)
    path.write_bytes(b"".join(b" ".join(line) + b"\n" for line in lines))
    found = problems(store)
    path.write_bytes(whole)
    assert found[0] == f"line {at + 1} of audit.anchors was changed"


def test_r10_a_line_of_a_key_that_was_replaced_is_accepted_only_before_the_lines_of_the_present_one(settings: Settings) -> None:
    with closing(Store(settings)) as store:
        write(store, 600)
        store.database.anchors().take()
    (settings.data_dir / "keys" / AUDIT_KEY).unlink()
    replace_audit_key(settings, "cli:root", "case 9")
    with closing(Store(settings)) as store:
        anchors = store.database.anchors()
        anchors.acknowledge("security", "case 9")
        assert problems(store) == []
        write(store, 600)
        assert anchors.take()
        assert problems(store) == []
        first, second = anchors.path.read_bytes().splitlines(keepends=True)
        anchors.path.write_bytes(first + second.replace(second.split()[3], b"0" * 16))
        assert problems(store)[0] == "line 2 of audit.anchors was changed"
        anchors.path.write_bytes(first + second + first)
        assert problems(store) == ["line 3 of audit.anchors was changed"]


@pytest.mark.parametrize(("count", "is_whole"), [(1, True), (2, True), (0, False), (3, False)])
def test_r10_what_an_earlier_version_knew_of_the_anchors_is_accepted(store: Store, count: int, is_whole: bool) -> None:
    """It sealed the number of lines with the MAC of the last one; the digest of all of them takes its place with the next anchor."""
    anchors = store.database.anchors()
    for _ in range(2):
        write(store, 501)
        assert anchors.take()
    lines = anchors.read()
    mac = lines[count - 1].mac if 0 < count <= len(lines) else "ab" * 32
    with store.database.transaction() as tx:
        tx.execute("INSERT OR REPLACE INTO meta VALUES ('audit_anchors', audit_seal(?))", (f"{count} {mac}",))
    assert (problems(store) == []) == is_whole
    write(store, 501)
    assert anchors.take()
    assert (problems(store) == []) == is_whole
