"""A box with an active model, without running the self-test for every test: a real activation, done once per process, is copied.

The first call for a bundle activates it on a box of its own; later calls copy that box's database and model files into the test's
store. Tests of activation itself use ``appliance.lifecycle.model_control.activate``.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from appliance.core.settings import Settings
from appliance.lifecycle import model_control
from appliance.store.store import Store
from tests.support.box_database import raw_connection

_templates: dict[str, Path] = {}
_ANY_BOX = {"data_dir", "web_port", "dicom_port"}


def activate(store: Store, bundle: Path, actor: str = "test") -> str:
    """Make a bundle the active model of its line; returns its digest. A store that is not empty gets a real activation.

    Args:
        store: the test's store.
        bundle: the bundle's directory.
        actor: who is written into the audit.
    """
    if store.database.one("SELECT 1 FROM audit UNION SELECT 1 FROM models") is not None:
        return model_control.activate(store, bundle, actor)
    template = _template(store, bundle, actor)
    _copy(template, store, bundle)
    return hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


def _template(store: Store, bundle: Path, actor: str) -> Path:
    """The data directory of a box on which this bundle was activated with the same settings."""
    settings: dict[str, Any] = store.settings.model_dump(exclude=_ANY_BOX)
    key = hashlib.sha256(repr((sorted(settings.items()), actor, (bundle / "manifest.json").read_bytes())).encode()).hexdigest()
    if key not in _templates:
        if not _templates:
            atexit.register(lambda: [shutil.rmtree(path, ignore_errors=True) for path in _templates.values()])
        directory = Path(tempfile.mkdtemp(prefix="activated-"))
        made = Store(store.settings.model_copy(update={"data_dir": directory}))
        try:
            model_control.activate(made, bundle, actor)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            made.close()
        _templates[key] = directory
    return _templates[key]


def _copy(template: Path, store: Store, bundle: Path) -> None:
    """Give a fresh store the content of a template: database, sealed with the store's own key, and model files."""
    shutil.copytree(template / "models", store.settings.data_dir / "models", dirs_exist_ok=True)
    connection = store.database.connection()
    with closing(raw_connection(template)) as source:
        source.backup(connection)
    connection.execute("DELETE FROM meta WHERE key GLOB 'key_ids:*'")  # they name the keys of the template's box
    connection.execute("UPDATE activations SET origin = ?", (str(bundle.resolve()),))
    connection.execute("UPDATE meta SET value = audit_seal('key') WHERE key = 'audit_key_check'")
    connection.execute(
        "INSERT OR REPLACE INTO meta SELECT 'audit_head', audit_seal(seq || ' ' || digest) FROM audit ORDER BY seq DESC LIMIT 1"
    )


def reference_box(directory: Path) -> Path:
    """A data directory in which the embedded reference model is active, as ``appliance analyze`` leaves one; returns it."""
    settings = Settings.parse({"data_dir": directory, "tune_at_activation": False})
    with closing(Store(settings)) as store:
        activate(store, model_control.reference_bundle(), "cli")
    return directory
