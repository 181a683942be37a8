"""A short run of what `python -m tests.fault.alternations` does."""

from __future__ import annotations

from fault.alternations import alternate


def test_an_organization_goes_there_and_back_under_load_and_nothing_is_lost() -> None:
    outcome = alternate(3, rows=1_500, writes_per_s=120, durable=False)
    assert outcome.ok, "\n".join(outcome.lines())
    assert {name: len(found) for name, found in outcome.pauses.items()} == {
        "cutover": 3,
        "switchback": 3,
    }
    assert all(seconds > 0 for found in outcome.pauses.values() for seconds in found), (
        "nobody wrote at a flip: the test shows nothing"
    )
