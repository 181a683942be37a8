"""Evidence packs: for each migration what was planned, what happened, and how one can tell.

A pack is a directory with `evidence.json` (schema `cellferry-evidence/1`), its JSON Schema, the
page `evidence.html` made from it, and `manifest.json`, which has the SHA-256 of each. The hash of
the manifest is in the topology's audit.
"""

from cellferry.evidence.check import Check, Outcome, check_pack
from cellferry.evidence.pack import Pack, export_pack, is_kept

__all__ = ["Check", "Outcome", "Pack", "check_pack", "export_pack", "is_kept"]
