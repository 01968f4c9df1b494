"""For tests that run HF PEFT beside Tanzaku."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def without_advice() -> Iterator[None]:
    """PEFT warns at nearly every step; Tanzaku warns of PEFT's files without a head, which one test is about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft(\.|$)")
        warnings.filterwarnings("ignore", message=r".* holds no .*score\.weight")
        yield
