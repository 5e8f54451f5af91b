"""Open the store of an existing box, for commands that must not create a new one by mistake."""

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
        ApplianceError: ``settings.missing``, ``settings.invalid``; ``box.none``: there is no box. Nothing is written in these cases.
    """
    settings = Settings.load(path)
    if not (settings.data_dir / DATABASE_NAME).is_file():
        raise ApplianceError("box.none", str(settings.data_dir))
    return Store(settings)
