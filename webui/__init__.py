"""The web pages of the box.

``create_app`` makes the Flask application; ``python -m webui --data-dir DIR`` serves it. The web process queues work and queries the
store; it never loads a model. One package per page group; what they share is in the modules here and in ``server``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from appliance.core.settings import Settings

__all__ = ["create_app"]


def create_app(settings: Settings) -> Flask:
    """The application of one box; see :func:`webui.app.create_app`."""
    from webui import app  # here, so that gunicorn's master, which only starts processes, stays small

    return app.create_app(settings)
