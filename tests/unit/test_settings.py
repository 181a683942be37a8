"""Faults of `cells.yaml` and of the connections: each is named with its place and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cellferry import settings
from cellferry.errors import InvalidInput

STORES: dict[str, Any] = {
    "postgres": {"connection": "one-postgres", "admin_connection": "one-postgres-admin"},
    "redis": {"connection": "one-redis", "key_prefix": "org:{$organization}:"},
}
GOOD: dict[str, Any] = {"cells": {"one": {"stores": STORES}}}
URL = "postgresql://mover:secret@host:5432/db"


def stored(kind: str, **options: Any) -> str:
    stores = {**STORES, kind: {**STORES[kind], **options}}
    return json.dumps({"cells": {"one": {"stores": stores}}})


FAULTS = {
    "empty": ("", "is empty"),
    "a list": ("- a", "holds a list"),
    "not YAML": ("cells: {", "is not YAML"),
    "no cells": ("cells: {}", "cells: "),
    "unknown key": (
        json.dumps({**GOOD, "celss": 1}),
        "celss: there is no such setting, did you mean 'cells'?",
    ),
    "unknown key of a cell": (
        json.dumps({"cells": {"one": {"stores": STORES, "regon": "eu"}}}),
        "cells.one.regon: there is no such setting, did you mean 'region'?",
    ),
    "unknown option": (
        stored("postgres", capacty_bytes=5),
        (
            "cells.one.stores.postgres.capacty_bytes: there is no such option, "
            "did you mean 'capacity_bytes'?"
        ),
    ),
    "option of another store": (
        stored("redis", capacity_bytes=5),
        "cells.one.stores.redis.capacity_bytes: there is no such option",
    ),
    "wrong type": (
        stored("postgres", capacity_bytes="lots"),
        "cells.one.stores.postgres.capacity_bytes: 'lots' is not a whole number of bytes",
    ),
    "no connection": (
        json.dumps({"cells": {"one": {"stores": {"postgres": {}}}}}),
        "cells.one.stores.postgres.connection: Field required",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_file_is_named_with_its_place(tmp_path: Path, fault: str) -> None:
    content, says = FAULTS[fault]
    file = tmp_path / "cells.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput) as refused:
        settings.load(file)
    assert says in refused.value.message
    assert str(file) in refused.value.message
    assert refused.value.hint
    assert "Value error" not in refused.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file") as refused:
        settings.load(tmp_path / "cells.yaml")
    assert "CELLFERRY_CONFIG" in str(refused.value.hint)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        settings.load(tmp_path)


def test_a_good_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "cells.yaml"
    file.write_text(json.dumps(GOOD), encoding="utf-8")
    cell = settings.load(file).cell("one", lambda _: URL)
    assert cell.stores["postgres"].admin_url == URL


@pytest.mark.parametrize("missing", ["one-redis", "one-postgres-admin"])
def test_a_connection_that_nobody_defines_is_named(missing: str) -> None:
    made = settings.Settings.model_validate(GOOD)
    with pytest.raises(InvalidInput, match=f"connection '{missing}' is not defined") as refused:
        made.cell("one", lambda name: None if name == missing else URL)
    assert settings.variable(missing) in str(refused.value.hint)


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "postgresql://h/db",
        "postgresql:///db",
        "postgresql://u:p%40ss@[::1]:5432/db",
        "postgresql://u:a:b@h1:1,h2:2/db?sslmode=require",
        "redis://:secret@h:6379/0",
        "host=h password=p@ss dbname=db",
    ],
)
def test_a_plain_url_is_taken_as_it_is(url: str) -> None:
    assert settings.resolve("name", lambda _: url) == url


@pytest.mark.parametrize("password", ["p@secret", "p/secret", "p#secret", "p?secret", "12?secret"])
def test_a_password_that_breaks_the_url_is_not_shown(password: str) -> None:
    with pytest.raises(InvalidInput, match="the URL of connection 'name'") as refused:
        settings.resolve("name", lambda _: f"postgresql://u:{password}@h:5432/db")
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


def connections(path: Path, content: str, mode: int = 0o600) -> settings.ConnectionSource:
    path.write_text(content, encoding="utf-8")
    path.chmod(mode)
    return settings.from_environment({"CELLFERRY_CONNECTIONS": str(path)})


def test_a_file_of_connections_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "connections"
    with pytest.raises(InvalidInput, match="others may read it") as refused:
        connections(path, f"name: {URL}", 0o640)
    assert refused.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize("content", ["- secret", "name: [secret", "name: {a: secret}", "name: 5"])
def test_a_broken_file_of_connections_is_refused_without_its_content(
    tmp_path: Path, content: str
) -> None:
    with pytest.raises(InvalidInput, match="is not a file of connections") as refused:
        connections(tmp_path / "connections", content)
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_missing_file_of_connections_is_named() -> None:
    with pytest.raises(InvalidInput, match="names no file: /nowhere/at-all"):
        settings.from_environment({"CELLFERRY_CONNECTIONS": "/nowhere/at-all"})


def test_a_file_of_connections_is_read(tmp_path: Path) -> None:
    assert connections(tmp_path / "connections", f"name: {URL}")("name") == URL
