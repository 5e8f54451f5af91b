"""What all pages of one web process share: the settings, the store and the queries over it, the accounts and logins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flask import current_app

from appliance.core.settings import Settings
from appliance.store.accounts import Accounts
from appliance.store.api_tokens import ApiTokens
from appliance.store.emergency_access import EmergencyAccesses
from appliance.store.logins import Logins
from appliance.store.store import Store
from appliance.store.worklist import Worklist


@dataclass
class BoxContext:
    """The shared parts, made once by ``create_app``.

    Attributes:
        on_stop: called when the process ends, for page groups that run work beside the requests.
    """

    settings: Settings
    store: Store
    worklist: Worklist
    accounts: Accounts
    logins: Logins
    emergencies: EmergencyAccesses
    api_tokens: ApiTokens
    on_stop: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def open(cls, settings: Settings) -> BoxContext:
        """Open the store of a box; raises StoreError when it cannot be used."""
        store = Store(settings)
        accounts = Accounts(store)
        logins, emergencies = Logins(store, accounts), EmergencyAccesses(store, accounts)
        return cls(settings, store, Worklist(store), accounts, logins, emergencies, ApiTokens(store, accounts))

    def stop(self) -> None:
        """Stop the work beside the requests; what is unfinished stays on the disk and continues at the next start."""
        for stop in self.on_stop:
            stop()
        self.store.refusals.flush()


def current_box() -> BoxContext:
    """The box of the application that serves this request."""
    box: BoxContext = current_app.extensions["box"]
    return box
