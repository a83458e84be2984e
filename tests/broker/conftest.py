from __future__ import annotations

from collections.abc import Iterator

import pytest

from split_broker.broker import GRACE, Broker
from wiretap import Setting


@pytest.fixture
def broker(setting: Setting) -> Iterator[Broker]:
    """A broker of the module's fleet, which knows who is alive."""
    with setting.broker() as running:
        running._started -= GRACE
        yield running
