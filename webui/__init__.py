"""The pages of the box: what a clinician, and nobody else on the network, sees of it.

``create_app`` makes the Flask application; ``python -m webui --data-dir DIR`` serves it. The web process queues work and reads
results; it never loads a model.
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
