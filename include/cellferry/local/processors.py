"""What a machine's host withholds of its processors, where the machine is a virtual one."""

from __future__ import annotations

from typing import Any


def withheld_share(before: Any, after: Any) -> float:
    """Return which share of the time that processes could have run the host gave to others.

    Args:
        before: what `psutil.cpu_times()` said at the beginning, in seconds.
        after: what it says now.

    Returns:
        0 to 1; 0 where the system does not say (`steal` of proc(5), Linux).
    """
    spent = {name: getattr(after, name) - getattr(before, name) for name in before._fields}
    used = sum(spent.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    withheld = spent.get("steal", 0.0)
    return float(withheld / (used + withheld)) if withheld > 0 else 0.0
