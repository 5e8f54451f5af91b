"""A box that is there already: opened by the commands that look at one or change it, which never lay a new one by mistake."""

from __future__ import annotations

from pathlib import Path

from appliance.core.errors import ApplianceError
from appliance.core.settings import Settings
from appliance.store.store import DATABASE_NAME, Store


def open_box(path: Path) -> Store:
    """Open the store of a box.

    Args:
        path: its data directory, or a settings file that names it.

    Raises:
        ApplianceError: ``settings.missing``, ``settings.invalid``; ``box.none``: no box was ever laid there. Nothing is written then.
    """
    settings = Settings.load(path)
    if not (settings.data_dir / DATABASE_NAME).is_file():
        raise ApplianceError("box.none", str(settings.data_dir))
    return Store(settings)
