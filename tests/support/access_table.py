"""The route x role matrix as a page of the docs: ``python -m tests.support.access_table > docs/access.md``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from flask import Flask

from appliance.core.roles import Role
from appliance.core.settings import Settings
from webui.app import create_app
from webui.server.access import ACCESS, OPEN_ENDPOINTS, SCOPES

_HEAD = """# Who may use which page

Made from `webui/server/access.py` by `python -m tests.support.access_table`; a test compares it. What is not listed is for nobody.
A program with an API token may use only the addresses of the token's scopes, and of them those that its account may use.
"""


def access_table(app: Flask) -> str:
    """The page: one line per address and method, with the roles that may use it."""
    titles = [str(role).replace("_", " ") for role in Role]
    lines = [_HEAD, f"| address | methods | {' | '.join(titles)} | scope of tokens |", f"|---|---|{'---|' * len(titles)}---|"]
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: (rule.rule, sorted(rule.methods or ()))):
        methods = ", ".join(sorted((rule.methods or set()) - {"OPTIONS"} - ({"HEAD"} if "GET" in (rule.methods or ()) else set())))
        if rule.endpoint in OPEN_ENDPOINTS:
            marks = ["without login"] * len(titles)
        else:
            marks = ["yes" if role in ACCESS.get(rule.endpoint, ()) else "" for role in Role]
        scopes = ", ".join(str(scope) for scope, endpoints in SCOPES.items() if rule.endpoint in endpoints)
        lines.append(f"| `{rule.rule}` | {methods or 'OPTIONS'} | {' | '.join(marks)} | {scopes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page."""
    with tempfile.TemporaryDirectory() as directory:
        app = create_app(Settings.load(Path(directory)))
        print(access_table(app), end="")
        app.extensions["box"].stop()
        app.extensions["box"].store.close()


if __name__ == "__main__":
    main()
