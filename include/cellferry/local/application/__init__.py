"""A sample application like a small GitLab: schema, seeds, writers, their ledger, the checker.

It stands where a real product would: its writers know cells only through `cellferry.routing`,
and the checker (`checker`) shares no code with the mover.
"""

from cellferry.local.application.checker import Checked
from cellferry.local.application.sample import Application
from cellferry.local.application.writers import Traffic

__all__ = ["Application", "Checked", "Traffic"]
