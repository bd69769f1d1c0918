"""Push a family of adapters: the base first, then the adapters, which refer to its commit."""

from dataclasses import replace

from fusedvlm.hub_cards.hub_client import Hub
from fusedvlm.hub_cards.release.adapter_release import UNKNOWN_COMMIT, AdapterFamily

from .push_repository import Pushed, plan, plan_offline, push


def plan_adapters(family: AdapterFamily, hub: Hub, *, overwrite: bool = False) -> tuple[list[Pushed], str | None]:
    """What `push_adapters` would do; see `plan`. A base that is not on the Hub yet counts as an unknown commit."""
    rows, reason = plan([family.base], hub, overwrite=overwrite)
    if reason is not None:
        return rows + plan_offline(family.releases(UNKNOWN_COMMIT), hub), reason
    more, reason = plan(family.releases(rows[0].commit or UNKNOWN_COMMIT), hub, overwrite=overwrite)
    return rows + more, reason


def push_adapters(
    family: AdapterFamily, hub: Hub, *, public: bool = False, overwrite: bool = False, create_pr: bool = False
) -> list[Pushed]:
    """Push the base, pin the adapters to its commit, push them; make all public only when all are verified.

    Raises:
        ValueError, PushError: as `push`.
    """
    if create_pr:
        raise ValueError("Adapters cannot be proposed: they refer to a commit that their base does not have yet.")
    rows = push([family.base], hub, overwrite=overwrite)
    adapters = family.releases(rows[0].commit)
    rows += push(adapters, hub, overwrite=overwrite)
    if public:
        seen = push([family.base, *adapters], hub, public=True, overwrite=overwrite)
        rows = [replace(row, private=later.private) for row, later in zip(rows, seen, strict=True)]
    return rows
