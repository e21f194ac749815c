"""The tiny model as a policy."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest


@pytest.fixture
def model_of(tiny_llama: Any) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def acting() -> Iterator[Any]:
        yield tiny_llama

    return acting
