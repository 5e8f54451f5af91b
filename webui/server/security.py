"""Checks before every request (host name, size, session, role; deny by default) and the security headers of every answer."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, Final
from urllib.parse import quote, urlsplit

from flask import Flask, Response, abort, g, redirect, request, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user
from flask_wtf.csrf import CSRFProtect

from appliance.core.settings import Settings
from appliance.store.audit import NODE_AUTHENTICATION, SECURITY_ALERT, USE_OF_RESTRICTED_FUNCTION
from appliance.store.keys import Keys
from webui.context import current_box
from webui.server import access, bearer, problems

# Never 'unsafe-eval' and no inline script or style; 'wasm-unsafe-eval' is for the viewer's own modules.
CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'self'", "script-src 'self' 'wasm-unsafe-eval'", "style-src 'self'", "img-src 'self' blob: data:",
        "worker-src 'self' blob:", "connect-src 'self'", "object-src 'none'", "base-uri 'none'", "frame-ancestors 'none'",
        "form-action 'self'",
    )
)  # fmt: skip

# What every answer carries, a file that nginx serves included.
HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}  # fmt: skip

FORM_BYTES: Final = 64 << 10
_BATCH_BYTES: Final = 1 << 20
TUS_CHUNK_BYTES: Final = 64 << 20
# The largest row number of SQLite.
MAX_ID: Final = 2**63 - 1


class _CsrfProtect(CSRFProtect):  # type: ignore[misc]  # flask_wtf has no types
    """The check of the CSRF token, which a program with an API token does not need: no other site can make a browser send that header."""

    def protect(self, *args: Any, **options: Any) -> None:
        """Check the token of a request that a browser's cookie identifies."""
        if not bearer.has_bearer():
            super().protect(*args, **options)


csrf: Final = _CsrfProtect()


def init_app(app: Flask, settings: Settings) -> None:
    """Install the checks before every request and the headers after it."""
    app.config.update(
        SECRET_KEY=Keys(settings.data_dir).load_web_key(),
        SESSION_COOKIE_NAME="clinicbox",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Strict",
        SESSION_COOKIE_SECURE=settings.tls_certificate is not None,
        WTF_CSRF_TIME_LIMIT=None,  # as long as the session: an upload page stays open for hours
        WTF_CSRF_SSL_STRICT=False,  # pages send no Referer at all
        MAX_CONTENT_LENGTH=FORM_BYTES,
    )
    app.before_request(_check_request)
    csrf.init_app(app)
    bearer.init_app(app)
    app.after_request(_add_headers)


def parse_id(text: str | None) -> int | None:
    """A row's id from an address or form; None when it is absent or no id."""
    value = text or ""
    return int(value) if value.isascii() and value.isdigit() and len(value) <= len(str(MAX_ID)) and int(value) <= MAX_ID else None


def safe_next(target: str | None) -> str:
    """Where to go after a login: a path of this box, never another site; the first page when in doubt."""
    home = url_for("worklist.show")  # which leads everybody to the page of their role
    if not target or not target.startswith("/") or target.startswith("//") or "\\" in target or not target.isprintable():
        return home
    parts = urlsplit(target)
    return target if not parts.scheme and not parts.netloc else home


def _check_request() -> ResponseReturnValue | None:
    """Deny by default: host name, size, API token or else session, own password, role, in this order."""
    if not _is_own_host(request.host, current_box().settings):
        g.refused = "web.host"
        abort(400)
    g.background = request.headers.get("X-Background") == "1"
    request.max_content_length = _largest_body()
    endpoint = request.endpoint or ""
    if bearer.has_bearer():
        return _check_program(endpoint)
    if endpoint in access.OPEN_ENDPOINTS:
        return None
    if not current_user.is_authenticated:
        return _ask_to_log_in()
    account, step = current_user.account, outstanding_step()
    may_confirm = step == "second_factor.set_up"  # which asks for the password again after a while
    if step and endpoint not in (step, "auth.logout", "auth.confirm" if may_confirm else step):
        return problems.login_incomplete(access.STEPS[step]) if problems.wants_json() else redirect(url_for(step))
    if endpoint and not access.may_use(account.role, endpoint, is_emergency=current_user.emergency_s > 0):
        if endpoint == "worklist.show" and request.method == "GET":
            return redirect(url_for(access.HOME[account.role]))
        abort(403)
    return None


def _check_program(endpoint: str) -> ResponseReturnValue | None:
    """Deny by default: a token that is not valid, and every endpoint that its scopes and its account's role do not open."""
    if not current_user.is_authenticated:
        _record_refusal("web.token", "", NODE_AUTHENTICATION)
        return problems.token_refused()
    token = current_user.api_token
    if endpoint and not access.token_may_use(token.scopes, token.account.role, endpoint):
        _record_refusal("web.token_scope", token.account.username, USE_OF_RESTRICTED_FUNCTION, token=token.id)
        return problems.scope_refused()
    return None


def _record_refusal(code: str, username: str, kind: dict[str, Any], **detail: Any) -> None:
    """Write it to the audit, bounded like the refusals of strangers: a program repeats its mistakes all day."""
    named = {"in_name_of": username} if username else {}
    particulars: dict[str, Any] = {"endpoint": request.endpoint or "", "method": request.method[:16]} | named | detail | kind
    current_box().store.refusals.record("", request.remote_addr or "", code, SECURITY_ALERT, **particulars)


def outstanding_step() -> str:
    """The page by which the current user still has to complete the login; empty where it is complete."""
    session = current_user.session
    if session.needs_code:
        return "second_factor.enter"
    if session.account.must_change:
        return "auth.password"
    return "second_factor.set_up" if current_box().logins.second_factors.is_required(session.account) else ""


def _ask_to_log_in() -> ResponseReturnValue:
    if problems.wants_json() or request.headers.get("X-Background") or request.method not in ("GET", "HEAD"):
        abort(401)
    wanted = request.path if request.endpoint else ""
    return redirect(url_for("auth.login") + (f"?next={quote(wanted)}" if wanted not in ("", "/") else ""))


def _largest_body() -> int:
    """The largest body, in bytes, that this endpoint reads."""
    settings = current_box().settings
    if request.endpoint == "upload.multipart":
        return settings.max_archive_bytes if getattr(current_user, "is_authenticated", False) else 0
    if request.endpoint == "upload.close":
        return _BATCH_BYTES
    return TUS_CHUNK_BYTES if (request.endpoint or "").startswith("tus.") else FORM_BYTES


def _is_own_host(host: str, settings: Settings) -> bool:
    """Whether a Host header names this box: a foreign name that resolves to this address (DNS rebinding) is refused."""
    name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        own = socket.gethostname().lower()
        named = {settings.web_host.lower(), settings.web_hostname.lower()}
        return name in {"localhost", own, own.partition(".")[0], f"{own.partition('.')[0]}.local"} | named
    return True


def _add_headers(response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    if request.endpoint == "image_api.frame" and response.headers.get("ETag"):
        # Pixels without a name may stay, so that a film is not sent again; the browser asks before each use, with its session (ADR 0033).
        response.headers["Cache-Control"] = "private, no-cache"
    elif request.endpoint != "static":
        # Several people use one PC: no patient data may stay in its cache.
        response.headers["Cache-Control"] = "no-store"
    return response
