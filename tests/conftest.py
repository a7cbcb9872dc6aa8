"""What a test registers is gone with it, so that tests pass in any order."""

from collections.abc import Iterator

import pytest

from spla_backend.algorithm import feature_maps, selectors


@pytest.fixture(autouse=True)
def _as_registered() -> Iterator[None]:
    tables = selectors.REGISTERED, feature_maps.REGISTERED
    before = [dict(table) for table in tables]
    yield
    for table, registered in zip(tables, before, strict=True):
        table.clear()
        table.update(registered)
