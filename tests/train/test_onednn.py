"""Which library multiplies: measured once on a machine, and the same in every process after that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models import tiny
from tanzaku.engine import onednn
from tanzaku.engine.acceleration import Common
from tanzaku.engine.onednn import OneDNN, PrepackedWeights, Speeds, Times
from tanzaku.engine.products import Directions
from tanzaku.models.families import Base

FAST, SLOW = Times(torch=3.0, onednn=2.0, prepacked=1.0), Times(torch=1.0, onednn=2.0, prepacked=3.0)


class Measurements:
    """In the measurement's place: says what it is told to, and counts how often it was asked."""

    def __init__(self) -> None:
        self.result, self.count = Speeds(FAST, SLOW), 0
        self.kinds: list[torch.dtype] = []

    def __call__(self, kind: torch.dtype) -> Speeds:
        self.kinds.append(kind)
        self.count += 1
        return self.result


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Measurements]:
    """A machine on which nothing was measured yet."""
    found = Measurements()
    monkeypatch.setattr(onednn, "measured", found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    onednn._speeds.cache_clear()
    yield found
    onednn._speeds.cache_clear()


def in_another_process() -> Speeds:
    """What a process that begins now would choose."""
    onednn._speeds.cache_clear()
    return onednn.speeds()


def test_it_is_measured_once_and_kept(measured: Measurements, tmp_path: Path) -> None:
    assert onednn.speeds() == onednn.speeds() == measured.result and measured.count == 1
    assert onednn.cache_file() == tmp_path / "cache" / "tanzaku" / "products.json"
    (key,) = json.loads(onednn.cache_file().read_text(encoding="utf-8"))
    assert onednn.processor() in key and torch.__version__ in key and "thread" in key
    measured.result = Speeds(SLOW, SLOW)  # a busy moment must not change how products round
    assert in_another_process() == Speeds(FAST, SLOW) and measured.count == 1
    assert [path.name for path in onednn.cache_file().parent.iterdir()] == ["products.json"]


def test_another_processor_another_torch_and_other_threads_are_measured_anew(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_another_process()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert onednn.speeds() == Speeds(FAST, SLOW) and measured.count == 2, "in one process, too"
    finally:
        torch.set_num_threads(threads)
    measured.result = Speeds(SLOW, FAST)
    for place, name in ((onednn, "processor"), (torch, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, (lambda: "Another") if name == "processor" else "9.9")
            assert in_another_process() == Speeds(SLOW, FAST)
    assert measured.count == 4
    assert in_another_process() == Speeds(FAST, SLOW) and measured.count == 4, "the first is kept beside them"
    assert len(json.loads(onednn.cache_file().read_text(encoding="utf-8"))) == 4


GOOD = {"torch": 1.0, "onednn": 2.0, "prepacked": 3.0}
DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"KEY": null}',
    b'{"KEY": {"forward": {}, "backward": {}}}',
    b'{"KEY": {"forward": GOOD}}',
    b'{"KEY": {"forward": GOOD, "backward": {"torch": 1.0, "onednn": 2.0}}}',
    b'{"KEY": {"forward": GOOD, "backward": {"torch": "1", "onednn": 2.0, "prepacked": 3.0}}}',
    b'{"KEY": {"forward": GOOD, "backward": {"torch": NaN, "onednn": 2.0, "prepacked": 3.0}}}',
    b'{"KEY": {"forward": GOOD, "backward": {"torch": -1.0, "onednn": 2.0, "prepacked": 3.0}}}',
    b'{"KEY": {"forward": GOOD, "backward": {"torch": 1.0, "onednn": 2.0, "prepacked": 3.0, "more": 4.0}}}',
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:70].decode("ascii", "replace"))
def test_a_damaged_file_is_measured_anew_and_mended(content: bytes, measured: Measurements) -> None:
    in_another_process()
    (key,) = json.loads(onednn.cache_file().read_text(encoding="utf-8"))
    content = content.replace(b"KEY", key.encode()).replace(b"GOOD", json.dumps(GOOD).encode())
    onednn.cache_file().write_bytes(content)
    assert in_another_process() == Speeds(FAST, SLOW) and measured.count == 2
    assert in_another_process() == Speeds(FAST, SLOW) and measured.count == 2


def test_where_nothing_can_be_written_each_process_measures(
    measured: Measurements, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the directory would be", encoding="ascii")
    for count in (1, 2):
        assert in_another_process() == Speeds(FAST, SLOW) and measured.count == count
        assert onednn.speeds() == Speeds(FAST, SLOW) and measured.count == count
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert in_another_process() == Speeds(FAST, SLOW) and measured.count == 3


def test_a_library_is_chosen_in_each_direction_and_by_a_margin() -> None:
    assert Speeds(FAST, SLOW).plain == Speeds(FAST, SLOW).prepacked == Directions(True, False)
    assert not Times(torch=1.0, onednn=0.96, prepacked=0.93).plain_pays
    assert Times(torch=1.0, onednn=0.94, prepacked=0.9).plain_pays
    assert not Times(torch=1.0, onednn=0.94, prepacked=0.9).prepacked_pays, "beside oneDNN without a copy"
    assert Times(torch=1.0, onednn=2.0, prepacked=0.9).prepacked_pays, "beside torch's default, which is faster"
    assert not Times(torch=1.0, onednn=2.0, prepacked=0.96).prepacked_pays


@pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")
def test_products_go_as_was_measured(measured: Measurements) -> None:
    shared = Common(Base.of(tiny("llama").requires_grad_(False)))
    products = shared.products
    weights = sum(module.weight.nbytes for module in products.layers)
    with OneDNN(shared), PrepackedWeights(shared) as copies:
        assert products.onednn == Directions(True, False)
        assert copies.take(8 * weights) == weights, "a copy for the one direction in which it pays"
        assert all(each.forward is not None and each.backward is None for each in products.copies.values())
        assert copies.free() == weights and not products.copies
    assert products.onednn == Directions(False, False)
    onednn._speeds.cache_clear()
    onednn.cache_file().unlink()
    measured.result = Speeds(SLOW, SLOW)
    with OneDNN(shared), PrepackedWeights(shared) as copies:
        assert not products.onednn and copies.take(8 * weights) == 0


def test_nothing_is_measured_for_a_model_that_has_no_use_for_it(measured: Measurements) -> None:
    shared = Common(Base.of(tiny("llama").half()))
    with OneDNN(shared) as found, PrepackedWeights(shared) as copies:
        assert not found.possible and copies.take(1e12) == 0
    assert measured.count == 0


@pytest.mark.skipif(not onednn.available(torch.bfloat16), reason="this processor has no products of half precision")
def test_products_of_half_precision_are_measured_by_themselves(measured: Measurements) -> None:
    shared = Common(Base.of(tiny("llama").bfloat16()))
    with OneDNN(shared):
        assert shared.products.onednn == Directions(True, False)
    assert measured.kinds == [torch.bfloat16]
    assert onednn.speeds() == Speeds(FAST, SLOW) and measured.kinds == [torch.bfloat16, torch.float32]
    assert len(json.loads(onednn.cache_file().read_text(encoding="utf-8"))) == 2


def test_what_was_measured_on_a_busy_machine_is_not_kept(measured: Measurements) -> None:
    measured.result = Speeds(SLOW, SLOW, steady=False)
    assert onednn.speeds() == onednn.speeds() == measured.result and measured.count == 1
    assert not onednn.cache_file().exists()
    measured.result = Speeds(FAST, SLOW)
    assert in_another_process() == Speeds(FAST, SLOW) and onednn.cache_file().exists()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_measurement_gives_times(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn.available(kind):
        pytest.skip("no oneDNN for products of this type here")
    monkeypatch.setattr(onednn, "_TOKENS", (2,))
    found = onednn.measured(kind)
    for times in (found.forward, found.backward):
        assert min(times.torch, times.onednn, times.prepacked) > 0
