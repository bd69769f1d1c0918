"""Push a family of adapters: the base first, then the adapters, which refer to its commit."""

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
    """Push the base, pin the adapters to its commit, push them; main branches and readers follow when all are tagged.

    Raises:
        ValueError, PushError: as `push`.
    """
    if create_pr:
        raise ValueError("Adapters cannot be proposed: they refer to a commit that their base does not have yet.")
    return push([family.base], hub, public=public, overwrite=overwrite, dependents=family.releases)
