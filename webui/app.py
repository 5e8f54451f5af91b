"""The Flask application of one box, put together."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from flask import Flask, url_for
from werkzeug.routing import IntegerConverter, Map

from appliance.core.settings import Settings
from appliance.store.store import Store
from appliance.store.study_summary import RECALLED
from appliance.store.worklist import Worklist
from webui import api, auth, events, pages, problems, security, texts, tus, uploads, urgent
from webui.box import Box
from webui.doorkeeper import Doorkeeper
from webui.finalise import Finaliser
from webui.images import ImageCache
from webui.parts import Parts

logger = logging.getLogger(__name__)


def create_app(settings: Settings) -> Flask:
    """The application of one box.

    Complete uploads that a former process left are brought in at once.

    Raises:
        StoreError: the data directory or its database cannot be used.
        RuntimeError: the Chinese texts are not compiled.
    """
    app = Flask(__name__, static_folder="static", template_folder="templates")
    _check_texts(Path(app.root_path))
    store = Store(settings)
    worklist = Worklist(store)
    parts = Parts(settings, store.check_space)
    box = Box(
        settings, store, worklist, Doorkeeper(store), parts, Finaliser(store, parts),
        events.Feed(worklist, settings.web_threads), ImageCache(store),
    )  # fmt: skip
    app.extensions["box"] = box
    app.url_map.converters["int"] = IdConverter
    app.json.ensure_ascii = False  # type: ignore[attr-defined]  # the default provider has it, the base class does not
    problems.init_app(app)
    auth.login_manager.session_protection = None  # sessions live and end on the server (appliance.store.accounts)
    auth.login_manager.init_app(app)
    security.init_app(app, settings)
    texts.init_app(app)
    uploads.init_app(app)
    for blueprint in (auth.blueprint, pages.blueprint, uploads.blueprint, tus.blueprint, events.blueprint, api.blueprint, urgent.blueprint):
        app.register_blueprint(blueprint)
    app.jinja_env.globals.update(asset=_asset_of(app), patient_roles=security.PATIENT_ROLES, recalled_codes=RECALLED)
    app.jinja_env.filters["asked_by"] = urgent.origin_text
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    if pending := box.finaliser.recover():
        logger.info("uploads resumed", extra={"count": pending})
    return app


class IdConverter(IntegerConverter):
    """The number of a row in an address; one that no row can have is no address (404)."""

    def __init__(self, url_map: Map) -> None:
        super().__init__(url_map, max=security.MAX_ID)


def _asset_of(app: Flask) -> Any:
    """Addresses of static files that change with the file, so that no browser shows yesterday's script."""
    static = Path(app.static_folder or "")

    def asset(name: str) -> str:
        try:
            version = int(os.stat(static / name).st_mtime)
        except FileNotFoundError:
            version = 0
        return url_for("static", filename=name, v=version)

    return asset


def _check_texts(root: Path) -> None:
    """A box in a Chinese clinic that silently speaks English would be a bad surprise."""
    if not (root / "translations" / "zh" / "LC_MESSAGES" / "messages.mo").is_file():
        raise RuntimeError("the Chinese texts are not compiled: run `make texts`")
