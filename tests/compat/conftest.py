"""For these tests: without PEFT's advice, and with the tests' helpers on the path."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def without_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft(\.|$)")
        warnings.filterwarnings("ignore", message=r".* holds no .*score\.weight")
        yield
