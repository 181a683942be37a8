"""One error tree.

::

    CellferryError
    ├── TransientError            try again; Airflow retries with back-off
    │   ├── Unreachable           a server did not answer
    │   ├── DrainTimeout          a writer held the organization past the deadline; source serves
    │   ├── NotConverging         rounds do not get small enough for the pause budget
    │   └── OutcomeUnknown        a commit's outcome is unknown; ask before doing anything
    └── PermanentError            trying again changes nothing; a person must act
        ├── InvalidInput          a value from a person; names value, place and remedy
        │   └── UnsupportedSchema   the data map cannot handle a table
        ├── Blocked               plan found blockers
        ├── NotPrepared           the cell lacks gates, roles or ACLs
        ├── AccessDenied          wrong password or missing privilege
        ├── LeaseLost             another controller took over (invariant 4, hazard 1)
        ├── WrongState            the step does not fit the migration's state
        ├── VerificationFailed    both sides differ
        ├── AuthorityViolation    somebody wrote where they had no authority
        ├── Breached              after the cutover a check of soak failed for too long
        └── Stopped               a person paused or halted the migration
            ├── Paused
            └── Halted

Errors for applications are in `cellferry.routing`.
"""

from __future__ import annotations


class CellferryError(Exception):
    """Base of all errors. Carries what the operator needs.

    Args:
        message: what happened, in plain words, with the offending value.
        hint: what to do about it.
        organization: id or slug, if the error concerns one.
        step: the step that raised it (`copy`, `cutover`, …).
        where: cell, store, table or file.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        organization: str | None = None,
        step: str | None = None,
        where: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.organization = organization
        self.step = step
        self.where = where

    def __str__(self) -> str:
        place = ", ".join(
            part
            for part in (
                f"organization {self.organization}" if self.organization else None,
                f"step {self.step}" if self.step else None,
                self.where,
            )
            if part
        )
        text = f"{self.message} [{place}]" if place else self.message
        return f"{text} Remedy: {self.hint}" if self.hint else text


class TransientError(CellferryError):
    """Trying again may help."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class Unreachable(TransientError):
    """A server did not answer."""


class DrainTimeout(TransientError):
    """Writers in flight did not end within the deadline; the source serves on."""


class NotConverging(TransientError):
    """The organization changes faster than rounds can follow within the pause budget."""


class OutcomeUnknown(TransientError):
    """A commit was sent and its outcome is unknown. Never a reason to thaw."""


class PermanentError(CellferryError):
    """Trying again changes nothing."""


class InvalidInput(PermanentError):
    """A value from a person is wrong."""

    exit_code = 2


class UnsupportedSchema(InvalidInput):
    """The data map cannot handle a table; names the table, the reason and the remedy."""


class Blocked(PermanentError):
    """Plan found blockers."""


class NotPrepared(PermanentError):
    """A cell lacks what `prepare_cell` installs."""


class AccessDenied(PermanentError):
    """Wrong password or missing privilege."""


class LeaseLost(PermanentError):
    """Another controller took the migration over; this one must do no more."""


class WrongState(PermanentError):
    """The step does not fit the state of the migration."""


class VerificationFailed(PermanentError):
    """Source and destination differ."""


class AuthorityViolation(PermanentError):
    """Data was written in a cell that had no authority for it."""


class Breached(PermanentError):
    """An organization is not as well at its new cell as it was before; the migration is halted."""


class Stopped(PermanentError):
    """A person stopped the migration."""


class Paused(Stopped):
    """The migration is paused; resume it and run the step again."""


class Halted(Stopped):
    """A sticky halt is set; only a person clears it."""
