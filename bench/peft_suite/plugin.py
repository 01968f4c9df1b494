"""What pytest is given beside HF PEFT's tests: the library under test as `peft`, and a record of what each test did.

Read from the environment: PEFT_SUITE_LIBRARY ("peft" or "tanzaku.compat.peft"), PEFT_SUITE_RECORD (a file of lines of
JSON), PEFT_SUITE_ONLY (a file of names of tests; without it all of our methods').
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIBRARY = os.environ.get("PEFT_SUITE_LIBRARY", "peft")
OURS = ("LoraConfig", "AdaLoraConfig", "PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig", "IA3Config")
OURS = (*OURS, "AdaptionPromptConfig")
METHODS = {
    "AdaLoraConfig": "AdaLoRA",
    "AdaptionPromptConfig": "LLaMA-Adapter",
    "IA3Config": "(IA)3",
    "LoraConfig": "LoRA",
    "PrefixTuningConfig": "prefix tuning",
    "PromptEncoderConfig": "P-tuning",
    "PromptTuningConfig": "prompt tuning",
}


class NotHere(Exception):
    """A test asked for a name that the library under test does not have."""


class _Absent(type):
    """The class of what stands for a missing name: it can be imported, and asked about, but not used."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not _running:  # a module of tests is read: what it makes for tests of other methods is not used
            return super().__call__()
        _asked.add(cls.__qualname__)
        raise NotHere(f"{cls.__qualname__} is not there")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return absent(f"{cls.__qualname__}.{name}")

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


_asked: set[str] = set()
_running: list[str] = []


def absent(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(name.rpartition(".")[2], (), {"__qualname__": name})


class _Shim(types.ModuleType):
    """`peft` or a module of it: the library's own names, and a stand-in for each that is missing."""

    def __init__(self, name: str, real: types.ModuleType | None):
        super().__init__(name)
        self.__dict__.update(_real=real, _missing={}, __path__=[])

    def __getattr__(self, name: str) -> Any:
        real, missing = self.__dict__["_real"], self.__dict__["_missing"]
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        if name in missing:
            return missing[name]
        try:
            if real is None:
                raise ImportError(name)
            return getattr(real, name)
        except (ImportError, AttributeError):
            missing[name] = absent(f"{self.__name__}.{name}")
            return missing[name]

    def __setattr__(self, name: str, value: Any) -> None:
        real = self.__dict__.get("_real")
        if isinstance(value, _Shim) or real is None or name.startswith("__"):
            super().__setattr__(name, value)
        else:
            setattr(real, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_real"], name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "peft":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        try:
            real = importlib.import_module(f"{LIBRARY}{spec.name.removeprefix('peft')}")
        except ImportError:
            real = None
        return _Shim(spec.name, real)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _stub(name: str, **attributes: Any) -> None:
    """A module that is not installed, and that the tests import but those selected do not use."""
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update({"__version__": "0.0.0", "__getattr__": absent, **attributes})
        sys.modules[name] = module


class _Parameterized:
    """As much of the package `parameterized` as the tests use."""

    @staticmethod
    def expand(cases: Any, **_: Any) -> Any:
        cases = [case if isinstance(case, tuple | list) else (case,) for case in cases]

        def mark(function: Any) -> Any:
            import inspect

            names = [p for p in inspect.signature(function).parameters if p != "self"][: len(cases[0])]
            values = [case if len(names) > 1 else case[0] for case in cases]
            return pytest.mark.parametrize(names if len(names) > 1 else names[0], values)(function)

        return mark


def pytest_configure(config: pytest.Config) -> None:
    for mark in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", mark)
    _stub("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    _stub("parameterized", parameterized=_Parameterized)
    if LIBRARY != "peft":
        # Before anything asks for `peft`; transformers finds HF PEFT where it is installed, as programs do.
        importlib.import_module(LIBRARY)
        for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())
    import datasets

    datasets.load_dataset = _dataset
    utilities = importlib.import_module("tests.testing_utils")

    @contextlib.contextmanager
    def offline(model_id: str) -> Iterator[None]:
        yield

    utilities.hub_online_once = offline  # it would look for a network


def _dataset(name: str, *_: Any, **__: Any) -> Any:
    """A few rows of the shape of the data sets that the tests load."""
    import datasets
    import numpy

    if "cats" in name:
        from PIL import Image

        noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
        return {"test": {"image": [Image.fromarray(noise)]}}
    quotes = [f"w{i} w{i + 1} be the change" for i in range(64)]
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"quote": quotes})})


# -- which tests


def _config_of(item: pytest.Item) -> type | None:
    """The class of configuration that a test is run with."""
    for value in _values(getattr(getattr(item, "callspec", None), "params", {})):
        kind = value if isinstance(value, type) else type(value)
        if kind.__name__.endswith("Config") and (isinstance(value, _Absent) or hasattr(kind, "peft_type")):
            return kind
        if kind.__name__.endswith("Config") and "peft" in kind.__module__:
            return kind
    return None


def _values(params: Any) -> Iterator[Any]:
    for value in params.values() if isinstance(params, dict) else params:
        if isinstance(value, dict | list | tuple):
            yield from _values(value)
        else:
            yield value


_OTHERS = re.compile(
    r"(?i)(?<![a-z])(adamss|arrow|beft|bdlora|boft|c3a|cartridge|corda|cpt|deft|delora|dora|eva|fourierft|frod|glora|"
    r"gralora|hira|hra|kasa|kappa\w*|lily|ln_?tuning|loha|lokr|lora_?ga|lorafa|loraplus|miss|monteclora\w*|multitask\w*|"
    r"oft|osf|peanut|poly|psoft|pvera|randlora|riemannian|road|shadow\w*|shira|supertuning|tinylora|tiny_?lora|"
    r"trainable_?tokens?\w*|unilora|vblora|velora|vera|waveft|xlora)(?![a-z])"
)
# Parts of LoRA and not methods of their own: their tests count.
_PARTS = re.compile(r"(?i)dora|corda|eva|kasa|velora|lora_?ga|monteclora|bdlora|arrow|trainable_?token")


def ours(item: pytest.Item) -> bool:
    """Whether a test is of our methods."""
    kind = _config_of(item)
    if kind is not None:
        return kind.__name__ in OURS
    text = re.sub(r"([a-z])([A-Z])", r"\1_\2", item.nodeid.partition("::")[2].partition("[")[0])
    text = text.replace("_", " ")
    found = [name for name in _OTHERS.findall(text.replace(" ", "_").replace("_", " ")) if not _PARTS.fullmatch(name)]
    return not found


def method(item: pytest.Item) -> str:
    kind = _config_of(item)
    if kind is not None and kind.__name__ in METHODS:
        return METHODS[kind.__name__]
    text = item.nodeid.lower()
    for word, name in (
        ("adalora", "AdaLoRA"),
        ("adaption", "LLaMA-Adapter"),
        ("ia3", "(IA)3"),
        ("prefix", "prefix tuning"),
        ("prompt_tuning", "prompt tuning"),
        ("prompttuning", "prompt tuning"),
        ("prompt_encoder", "P-tuning"),
        ("lora", "LoRA"),
    ):
        if word in text:
            return name
    return "of no one method"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = os.environ.get("PEFT_SUITE_ONLY")
    wanted = set(Path(only).read_text(encoding="utf-8").splitlines()) if only else None
    kept = [item for item in items if (item.nodeid in wanted if wanted is not None else ours(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


# -- what they did


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _running.append(item.nodeid)
    yield
    _running.pop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if call.when == "setup":
        _asked.clear()
    if report.when != "call" and report.passed:
        return
    error = call.excinfo
    line = {
        "test": item.nodeid,
        "method": method(item),
        "outcome": report.outcome,
        "seconds": round(call.duration, 3),
        "asked": sorted(_asked),
    }
    if error is not None and report.outcome == "failed":
        line["error"] = error.type.__name__
        line["kinds"] = [kind.__name__ for kind in error.type.__mro__]
        line["text"] = str(error.value)[:500]
        line["at"] = str(error.traceback[-1].path.name) + f":{error.traceback[-1].lineno + 1}"
    with Path(os.environ["PEFT_SUITE_RECORD"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        with Path(os.environ["PEFT_SUITE_RECORD"]).open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"test": report.nodeid, "outcome": "uncollected", "text": str(report.longrepr)[-500:]})
                + "\n"
            )
