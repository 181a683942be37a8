"""Reading YAML that people write: plain values only, and each key once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


def read(text: str) -> Any:
    """Return the values in `text`; None for an empty one.

    Raises:
        yaml.YAMLError: it is not YAML, or a mapping has a key twice: YAML itself would forget the
            first without a word.
    """
    return yaml.load(text, Loader=_OneOfEach)  # noqa: S506 - a SafeLoader: it builds plain values


class _OneOfEach(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value!r} is given twice, again in line {line}")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)
