"""A clock for tests: time passes, people set it, and the machine restarts."""

from __future__ import annotations

from appliance.core.moments import Clock


class TestClock(Clock):
    """A clock that stands still until a test moves it."""

    __test__ = False

    def __init__(self, wall_s: float = 1.8e9) -> None:
        self.wall, self.uptime, self.start = wall_s, 100.0, 1
        super().__init__(lambda: self.wall, lambda: self.uptime, lambda: f"start-{self.start}")

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.wall += seconds
        self.uptime += seconds

    def set_by(self, seconds: float) -> None:
        """Set the wall clock forwards or backwards."""
        self.wall += seconds

    def restart(self) -> None:
        """Start the machine again; the time since its start begins anew."""
        self.start += 1
        self.uptime = 5.0
