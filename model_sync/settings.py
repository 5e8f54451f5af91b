"""The settings of the sync agent: one TOML file with typed keys; an unknown key is an error.

The agent runs as its own account, which cannot read patient data; it shares only ``exchange_dir`` with the box.
"""

from __future__ import annotations

import re
import sys
from datetime import datetime, time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from model_sync.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "sync.toml"
INTERACTIVE_ATTEMPTS = 6
INTERACTIVE_BACKOFF_S = 10.0
_WINDOW = re.compile(r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")
_PATHS = ("state_dir", "exchange_dir", "root", "ca_certificate")


class SyncSettings(BaseModel):
    """All settings with their defaults; durations and sizes carry their unit in the name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state_dir: Path = Field(description="The agent's own directory: trust state, parts, keys.")
    exchange_dir: Path = Field(description="Directory shared with the box: bundles and status there, activation results back.")
    root: Path = Field(description="The library's first root.json, as it was provisioned: the start of all trust.")
    box_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="The box's name in the fleet; never that of a patient.")
    ring: str = Field("stable", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="Rollout ring of this box.")
    lines: list[str] = Field(default_factory=list, description="Model lines to follow; empty follows every line of the ring.")
    urls: list[str] = Field(default_factory=list, description="Base URLs of the library, tried in order.")
    ca_certificate: Path | None = Field(None, description="PEM of the authority that signed the library's TLS certificate.")
    report_url: str | None = Field(None, description="Base URL of `model-library serve` for enrolment and reports; None sends none.")
    report_interval_s: float = Field(3600.0, gt=0, description="Longest silence between two status reports.")
    poll_interval_s: float = Field(900.0, gt=0, description="Mean time between two polls of the library.")
    poll_jitter: float = Field(0.2, ge=0, le=1, description="Share of the interval by which each poll is moved at random.")
    rate_limit_bytes_per_s: float | None = Field(None, gt=0, description="Bandwidth limit of the agent; None sets no limit.")
    windows: list[str] = Field(default_factory=list, description="Local times in which bundles are fetched (22:00-06:00); empty: always.")
    day_budget_bytes: int | None = Field(None, gt=0, description="Most bytes received in one day; None does not count.")
    attempts: int = Field(20, ge=1, description="Attempts in a row that receive nothing before a poll ends; `pull` makes 6 at most.")
    backoff_s: float = Field(1.0, ge=0, description="First pause after a failed attempt; doubles, with jitter, up to max_backoff_s.")
    max_backoff_s: float = Field(300.0, ge=0, description="Longest pause between two attempts; 10 s at most in `pull`.")
    connect_timeout_s: float = Field(10.0, gt=0, description="Longest wait for a connection.")
    read_timeout_s: float = Field(30.0, gt=0, description="Longest silence on an open connection.")
    min_speed_bytes_per_s: float = Field(512.0, ge=0, description="An attempt slower than this over min_speed_window_s is given up.")
    min_speed_window_s: float = Field(30.0, gt=0, description="Time over which the speed is measured.")
    disk_reserve_bytes: int = Field(512 * 2**20, ge=0, description="Free disk space that a download never takes.")

    @field_validator("windows")
    @classmethod
    def _windows_are_times(cls, windows: list[str]) -> list[str]:
        for window in windows:
            if not _WINDOW.match(window) or window[:5] == window[6:]:
                raise ValueError(f"{window!r} is no window such as 22:00-06:00")
        return windows

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> SyncSettings:
        """Read one TOML file, or the ``sync.toml`` of a directory; relative paths in it are relative to the file.

        Raises:
            SettingsError: the file is missing, no TOML, or has an unknown key or a bad value.
        """
        # Absolute, so that the state directory does not depend on the working directory.
        path = path.absolute()
        file = path / FILE_NAME if path.is_dir() else path
        try:
            values = tomllib.loads(file.read_text("utf-8"))
        except OSError as error:
            raise SettingsError(f"{file}: {error.strerror}", hint="create it with `model-sync init`, or give --config") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{file}: {error}") from error
        return cls.parse({"state_dir": file.parent} | values | overrides, base=file.parent)

    @classmethod
    def parse(cls, values: dict[str, Any], base: Path | None = None) -> SyncSettings:
        """Validate plain values; raise SettingsError that names each wrong key."""
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise SettingsError(what) from error
        root = (base or Path.cwd()).resolve()
        return settings.model_copy(update={name: root / value for name in _PATHS if (value := getattr(settings, name)) is not None})

    def for_interactive_use(self) -> SyncSettings:
        """Return a copy for a command that a person waits for: it gives up after a minute, not after half an hour."""
        attempts, longest_s = min(self.attempts, INTERACTIVE_ATTEMPTS), min(self.max_backoff_s, INTERACTIVE_BACKOFF_S)
        return self.model_copy(update={"attempts": attempts, "max_backoff_s": longest_s})

    def in_window(self, local: datetime) -> bool:
        """Return whether bundles may be fetched at a local time; a window that ends before it begins spans midnight."""
        return not self.windows or any(_within(window, local.time()) for window in self.windows)


def _within(window: str, now: time) -> bool:
    begin, end = (time.fromisoformat(part) for part in window.split("-"))
    return begin <= now < end if begin < end else now >= begin or now < end
