"""Hooks that Airflow loads in every component: settings that its configuration cannot say."""

from __future__ import annotations


def loopback() -> str:
    """Host name of the local fleet's components: `[core] hostname_callable` names it.

    Nothing of the local fleet is reachable from elsewhere, and no name service is asked.
    """
    return "127.0.0.1"
