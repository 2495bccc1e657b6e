# SPDX-License-Identifier: Apache-2.0
"""A served backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovd.demo.bodies import Limits
from ovd.demo.hosts import AllowedHosts
from ovd.label_studio.app import BackendGate, build_app
from tests.label_studio.test_backend import Ask, backend, served


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    server, ask = served(
        BackendGate(build_app(backend()), names=AllowedHosts.of("127.0.0.1"), limits=Limits(request=200_000))
    )
    yield ask
    server.close()
