"""Programs that present an API token instead of a login (RFC 6750): no cookie, no page, no CSRF token, and nothing beyond their scopes."""

from __future__ import annotations

from typing import Final

from flask import Flask, Request, abort, request
from flask_login import UserMixin

from appliance.store.api_tokens import ApiToken
from appliance.store.logins import TooManyAttemptsError
from webui.context import current_box

_MAX_TOKEN_CHARS: Final = 256


class TokenUser(UserMixin):  # type: ignore[misc]  # flask_login has no types
    """The program behind a request, and the account in whose name it acts."""

    emergency_s: Final = 0.0

    def __init__(self, api_token: ApiToken) -> None:
        self.api_token = api_token
        self.account = api_token.account


def init_app(app: Flask) -> None:
    """Let an application know programs, beside the sessions of people."""
    app.login_manager.request_loader(load_program)  # type: ignore[attr-defined]  # set by flask_login


def has_bearer() -> bool:
    """Whether this request presents a token; then nothing else says who it is."""
    return _presented(request) is not None


def load_program(given: Request) -> TokenUser | None:
    """The program of a request; None where its token is not valid, or it has none."""
    token = _presented(given)
    if token is None:
        return None
    try:
        found = current_box().api_tokens.present(token, given.remote_addr or "")
    except TooManyAttemptsError:
        abort(429)
    return TokenUser(found) if found else None


def _presented(given: Request) -> str | None:
    """The token of ``Authorization: Bearer``, an empty text where it is malformed; None where the request has no such header."""
    scheme, _, token = given.headers.get("Authorization", "").strip().partition(" ")
    if scheme.lower() != "bearer":
        return None
    token = token.strip()
    return token if token.isascii() and len(token) <= _MAX_TOKEN_CHARS else ""
