"""The agent's settings: typed, an unknown key is an error, and windows that go over midnight."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from model_sync.errors import SettingsError
from model_sync.settings import SyncSettings

MINIMAL = 'exchange_dir = "../exchange"\nroot = "root.json"\nbox_id = "box-1"\nurls = ["http://127.0.0.1:1"]\n'


def load(tmp_path: Path, text: str) -> SyncSettings:
    (tmp_path / "sync.toml").write_text(text)
    return SyncSettings.load(tmp_path)


def test_paths_are_relative_to_the_file_and_the_state_lies_beside_it(tmp_path: Path) -> None:
    settings = load(tmp_path, MINIMAL)
    assert settings.state_dir == tmp_path
    assert settings.root == tmp_path / "root.json"
    assert settings.exchange_dir.resolve() == tmp_path.parent / "exchange"


@pytest.mark.parametrize(
    "text",
    [
        "", "nonsense", MINIMAL + "unknown = 1\n", MINIMAL + 'windows = ["25:00-06:00"]\n', MINIMAL + 'windows = ["06:00-06:00"]\n',
        MINIMAL.replace("box-1", "../box"), MINIMAL + "attempts = 0\n",
    ],
)  # fmt: skip
def test_a_wrong_file_names_what_is_wrong(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text)
    assert caught.value.hint


def test_a_missing_file_says_how_to_lay_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="model-sync init"):
        SyncSettings.load(tmp_path / "none.toml")


def test_a_window_may_go_over_midnight(tmp_path: Path) -> None:
    settings = load(tmp_path, MINIMAL + 'windows = ["22:00-06:00", "12:00-13:00"]\n')
    inside = [datetime(2026, 1, 1, hour, minute) for hour, minute in ((22, 0), (3, 0), (5, 59), (12, 30))]
    outside = [datetime(2026, 1, 1, hour, minute) for hour, minute in ((6, 0), (13, 0), (21, 59))]
    assert all(map(settings.in_window, inside))
    assert not any(map(settings.in_window, outside))
    assert load(tmp_path, MINIMAL).in_window(datetime(2026, 1, 1, 15))
