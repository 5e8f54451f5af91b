"""The pages of the second factor: enter a code at the login, set one up with a QR code that is drawn on the box."""

from __future__ import annotations

from typing import Final

import segno
from flask import Blueprint, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_babel import gettext
from flask_login import current_user

from appliance.core.domain import utc_now
from appliance.core.errors import StoreError
from webui.auth.login_queue import password_check
from webui.context import current_box
from webui.formatting import format_time
from webui.messages import reason_hint, reason_text
from webui.server.confirmation import confirmed
from webui.server.security import safe_next

blueprint: Final = Blueprint("second_factor", __name__)


@blueprint.route("/second-factor", methods=["GET", "POST"])
def enter() -> ResponseReturnValue:
    """Complete a login by a code of the app, or by a recovery code."""
    if not current_user.session.needs_code:
        return redirect(url_for("worklist.show"))
    if request.method == "GET":
        return _code_page()
    with password_check(current_user.account.username):
        is_right = current_box().logins.complete(current_user.session, current_user.token, request.form.get("code", "")[:64])
    return redirect(safe_next(request.args.get("next"))) if is_right else (_code_page(has_failed=True), 401)


def _code_page(*, has_failed: bool = False) -> str:
    return render_template("second_factor.html", has_failed=has_failed, time=format_time(utc_now()))


@blueprint.route("/second-factor/set-up", methods=["GET", "POST"])
@confirmed("second_factor.set_up")
def set_up() -> ResponseReturnValue:
    """Show the secret as QR code and text; the first right code puts it into force and shows the recovery codes, once."""
    factors, account, session_id, error = current_box().logins.second_factors, current_user.account, current_user.session.id, ""
    if request.method == "POST":
        try:
            codes = factors.confirm(account, session_id, request.form.get("code", "")[:64])
            return render_template("recovery_codes.html", codes=codes)
        except StoreError as refusal:
            if refusal.code != "account.wrong_code":
                raise
            error = f"{reason_text(refusal.code)}{gettext('. ')}{reason_hint(refusal.code)}"
    secret = factors.begin(account, session_id)
    page = render_template(
        "second_factor_set_up.html",
        picture=segno.make(factors.address(account, secret), error="m").svg_data_uri(scale=5, border=4),
        secret=" ".join(secret[start : start + 4] for start in range(0, len(secret), 4)),
        error=error,
        is_required=factors.is_required(account),
        codes_left=factors.recovery_codes_left(account) if account.has_second_factor else None,
        time=format_time(utc_now()),
    )
    return page, 422 if error else 200
