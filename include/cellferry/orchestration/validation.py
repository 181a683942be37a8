"""The first task of a run: everything that can be wrong with the input is said at once.

Nothing is changed before all of it was accepted.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cellferry.errors import InvalidInput
from cellferry.model import State
from cellferry.orchestration.params import ORGANIZATIONS_PER_RUN, MoveRequest

if TYPE_CHECKING:
    from datetime import datetime

    from cellferry.migration import Context
    from cellferry.model import Migration, Organization

#: A clean-up run waits for the end of a TTL for up to this many seconds.
LONGEST_WAIT_S = 600.0

log = logging.getLogger(__name__)

_PART = re.compile(r"(?P<base>.+)\.part-(?P<part>\d+)-of-(?P<parts>\d+)")


def check_move_request(
    context: Context, request: MoveRequest, dag_run: str
) -> list[dict[str, str]]:
    """Return the organizations of `request`, each with its id and slug, in the given order.

    An organization that this very run has moved already is accepted, so that a run which is
    cleared as a whole goes on where it was. A run that takes the rest of a long list begins hours
    later: there one that lives in the destination by now is left out, and one that moves elsewhere
    fails in its own lane, so that it stops no others.

    Raises:
        InvalidInput: an organization or cell is unknown, an organization is named twice, lives in
            the destination already, or is moving elsewhere. All faults are named.
    """
    context.settings.cell(request.destination, context.connections)
    faults: list[str] = []
    found: dict[str, Organization] = {}
    named: dict[str, str] = {}
    for name in request.organizations:
        try:
            organization = context.topology.organization(name)
        except InvalidInput as error:
            faults.append(f"{error.message} ({error.hint})" if error.hint else error.message)
            continue
        if organization.id in found:
            faults.append(f"{name!r} and {named[organization.id]!r} are the same organization")
            continue
        fault = _misplaced(context, organization, request.destination, dag_run)
        if fault and takes_rest(dag_run):
            if context.topology.live_migration(organization.id) is None:
                log.warning("left out: %s", fault)
                continue
        elif fault:
            faults.append(fault)
        found[organization.id] = organization
        named[organization.id] = name
    if faults:
        raise InvalidInput(
            f"{len(faults)} of {len(request.organizations)} organizations cannot be taken: "
            + "; ".join(faults),
            hint="correct the list and trigger a new run",
        )
    return [{"id": one.id, "slug": one.slug} for one in found.values()]


def _misplaced(
    context: Context, organization: Organization, destination: str, dag_run: str
) -> str | None:
    """Return why `organization` cannot move to `destination`, or None."""
    if started_by(context, organization, destination, dag_run) is not None:
        return None
    live = context.topology.live_migration(organization.id)
    if live is not None and live.destination != destination:
        return (
            f"{organization.slug} is already moving from {live.source} to {live.destination} "
            f"(migration {live.id}, {live.state})"
        )
    if live is None and context.topology.route(organization.id).cell == destination:
        return f"{organization.slug} lives in {destination} already"
    return None


def started_by(
    context: Context, organization: Organization, destination: str, dag_run: str
) -> int | None:
    """Return the migration of `organization` to `destination` that `dag_run` works on, if any."""
    migrations: Sequence[Migration] = context.topology.migrations(org=organization.id)
    for migration in migrations:  # newest first
        if migration.destination != destination or migration.state in (
            State.ABORTED,
            State.ROLLED_BACK,
        ):
            continue
        if any(entry.dag_run == dag_run for entry in context.topology.audit(migration.id)):
            return migration.id
    return None


def migrations_of(
    context: Context, organizations: Sequence[Mapping[str, str]], destination: str
) -> dict[str, Migration | None]:
    """Return the migration that this DAG run works on, for each organization's id."""
    found: dict[str, Migration | None] = {}
    for one in organizations:
        organization = context.topology.organization(one["id"])
        number = started_by(context, organization, destination, str(context.actor.dag_run))
        found[one["id"]] = None if number is None else context.topology.migration(number)
    return found


def split(
    organizations: Sequence[Mapping[str, str]], params: Mapping[str, Any], run_id: str
) -> tuple[list[Mapping[str, str]], dict[str, Any]]:
    """Return this run's organizations, and the request for the run that takes the rest.

    That run splits again, if need be. Its name follows from this run's, so that a retry starts it
    once. The request is empty when nothing is left.
    """
    size = ORGANIZATIONS_PER_RUN
    first, rest = list(organizations[:size]), organizations[size:]
    if not rest:
        return first, {}
    base, part, parts = run_id, 1, 1 + -(-len(rest) // size)
    if found := _PART.fullmatch(run_id):
        base, part, parts = found["base"], int(found["part"]), int(found["parts"])
    return first, {
        "run_id": f"{run_name(base)}.part-{part + 1}-of-{parts}",
        "conf": {**params, "organizations": [one["id"] for one in rest]},
    }


def wave(run_id: str) -> str:
    """Return the name of the wave that a run is part of: of the first run, where it was split."""
    found = _PART.fullmatch(run_id)
    return found["base"] if found else run_id


def takes_rest(run_id: str) -> bool:
    """Whether a run was started by another one, for the rest of its list."""
    return _PART.fullmatch(run_id) is not None


def run_name(text: str) -> str:
    """Return `text` as Airflow allows it in a run's name."""
    return re.sub(r"[^A-Za-z0-9_.~:+-]", "_", text)


def check_clean_up(context: Context, migrations: Sequence[int]) -> list[dict[str, Any]]:
    """Return the migrations that still need a clean-up, each with its organization.

    Raises:
        InvalidInput: one is unknown, or its organization has not moved yet. All are named.
    """
    faults: list[str] = []
    needed: list[dict[str, Any]] = []
    for number in migrations:
        try:
            migration = context.topology.migration(number)
        except InvalidInput as error:
            faults.append(error.message)
            continue
        rolled_back = migration.state is State.ROLLED_BACK
        if migration.state is State.COMPLETED or (
            rolled_back and not context.topology.live_resources(number)
        ):
            continue
        if not rolled_back and migration.state not in (State.RETAINED, State.CLEANING):
            faults.append(
                f"migration {number} of {migration.organization.slug} is {migration.state}"
            )
            continue
        needed.append(
            {
                "id": migration.organization.id,
                "slug": migration.organization.slug,
                "migration": number,
            }
        )
    if faults:
        raise InvalidInput(
            f"{len(faults)} of {len(migrations)} migrations cannot be cleaned up: "
            + "; ".join(faults),
            hint="only migrations that are retained or rolled back have a copy to delete",
        )
    return needed


def leave_for_later(
    context: Context, needed: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the migrations whose TTL is over or nearly, and the request for a run for the others.

    Clean-up runs go one at a time: one that waited for days would keep all others waiting. The
    request is empty when nothing is left.
    """
    now = context.topology.now()
    until = {
        one["migration"]: context.topology.migration(one["migration"]).ttl_until for one in needed
    }
    later = {
        number: moment
        for number, moment in until.items()
        if moment is not None and (moment - now).total_seconds() > LONGEST_WAIT_S
    }
    if not later:
        return list(needed), {}
    request = clean_up_run("clean_up", later)
    # With the moment in its name: a run that is too early must not start itself.
    request["run_id"] += f"__{max(later.values()):%Y-%m-%dT%H.%M.%S}"
    return [one for one in needed if one["migration"] not in later], request


def clean_up_run(name: str, until: Mapping[int, datetime]) -> dict[str, Any]:
    """Return the request for the clean-up run of migrations, when the last of their TTLs is over.

    Its name follows from what is in it, so that a retry starts it once.

    Args:
        until: the end of each migration's TTL.
    """
    numbers = sorted(until)
    digest = hashlib.sha256(repr(numbers).encode()).hexdigest()[:12]
    return {
        "run_id": f"{name}__{numbers[0]}-{numbers[-1]}__{digest}",
        "conf": {"migrations": numbers},
        "run_after": max(until.values()).isoformat(),
    }
