"""Fixtures: a shared server for tests that leave it as they found it, and a maker of private ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from windrose import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model with default settings."""
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    assert server.stop() == 0


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Server]]:
    """Starts private servers with flags of their own; stops what still runs."""
    servers: list[Server] = []

    def start(*flags: str, **options: object) -> Server:
        servers.append(Server(tmp_path / f"log-{len(servers)}", *flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
