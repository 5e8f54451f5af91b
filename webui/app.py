"""The Flask application of one box: makes the shared parts and registers the page groups."""

from __future__ import annotations

from pathlib import Path

from flask import Flask
from werkzeug.routing import IntegerConverter, Map

from appliance.core.settings import Settings
from webui import formatting
from webui.accounts import emergency_pages
from webui.accounts import pages as accounts_pages
from webui.admin import audit_pages
from webui.admin import pages as admin_pages
from webui.auth import pages as auth_pages
from webui.auth import second_factor_pages
from webui.context import BoxContext
from webui.server import access_log, page_frame, problems, security, static_files
from webui.study import frame_cache, image_api, results_api
from webui.study import pages as study_pages
from webui.upload import pages as upload_pages
from webui.upload import service, tus
from webui.worklist import pages as worklist_pages
from webui.worklist import urgency

_PAGE_GROUPS = (
    auth_pages, second_factor_pages, worklist_pages, urgency, study_pages, image_api, results_api, upload_pages, tus, admin_pages,
    accounts_pages, emergency_pages, audit_pages,
)  # fmt: skip


def create_app(settings: Settings) -> Flask:
    """The application of one box.

    Complete uploads that a former process left are ingested at once.

    Raises:
        StoreError: the data directory or its database cannot be used.
        RuntimeError: the Chinese texts are not compiled.
    """
    app = Flask(__name__, static_folder="static", template_folder="templates")
    _check_translations(Path(app.root_path))
    box = BoxContext.open(settings)
    app.extensions["box"] = box
    app.url_map.converters["int"] = IdConverter
    app.json.ensure_ascii = False  # type: ignore[attr-defined]  # the default provider has it, the base class does not
    problems.init_app(app)
    auth_pages.init_app(app)
    security.init_app(app, settings)
    formatting.init_app(app)
    page_frame.init_app(app)
    access_log.init_app(app)
    frame_cache.init_app(app, box.store)
    service.init_app(app, box)
    for group in _PAGE_GROUPS:
        app.register_blueprint(group.blueprint)
    static_files.init_app(app)
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    return app


class IdConverter(IntegerConverter):
    """A row's number in an address; a number that no row can have matches no address (404)."""

    def __init__(self, url_map: Map) -> None:
        super().__init__(url_map, max=security.MAX_ID)


def _check_translations(root: Path) -> None:
    """Refuse to start without the Chinese texts, instead of showing English ones in a Chinese clinic."""
    if not (root / "translations" / "zh" / "LC_MESSAGES" / "messages.mo").is_file():
        raise RuntimeError("the Chinese texts are not compiled: run `make texts`")
