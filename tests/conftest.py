"""For all tests: offline, one thread unless OMP_NUM_THREADS says otherwise, quiet."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch
import transformers

from rounding import OtherRounding

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests marked product: every method on every family")


@pytest.fixture(autouse=bool(os.environ.get("TANZAKU_TEST_ROUNDING")))
def _other_rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def compile(*args: object, **kwargs: object) -> NoReturn:
        pytest.skip("compiled code sees no modes of dispatch")

    monkeypatch.setattr(torch, "compile", compile)
    with OtherRounding(int(os.environ["TANZAKU_TEST_ROUNDING"])):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all") or config.getoption("-m") or any("::" in arg for arg in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("product")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("product")]
