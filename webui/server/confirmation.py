"""Asks for the password again, and the second factor where there is one, before what is dangerous (R8)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

from flask import current_app, redirect, request, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user

from webui.context import current_box
from webui.server import problems

Arguments = ParamSpec("Arguments")
View = Callable[Arguments, ResponseReturnValue]


def confirmed(back: str) -> Callable[[View[Arguments]], View[Arguments]]:
    """Let a view run only where the password was typed within ``confirmation_s``; nothing is done before.

    Args:
        back: endpoint of the page whose button leads to this view; the person presses it once more after confirming.
    """

    def decorate(view: View[Arguments]) -> View[Arguments]:
        @functools.wraps(view)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> ResponseReturnValue:
            if current_user.session.confirmed_s <= current_box().settings.confirmation_s:
                return view(*args, **kwargs)
            if problems.wants_json():
                return problems.confirmation_required()
            given, map_of_pages = request.view_args or {}, current_app.url_map
            needed = {name: value for name, value in given.items() if map_of_pages.is_endpoint_expecting(back, name)}
            return redirect(url_for("auth.confirm", next=request.path if request.method == "GET" else url_for(back, **needed)))

        return checked

    return decorate
