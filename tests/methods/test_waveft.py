"""WaveFT: Daubechies' filters, the inverse of one level, and how many coefficients a matrix has."""

from __future__ import annotations

import math

import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet
from peft.tuners.waveft.waverec2d import waverec2d

import tanzaku as tz
from close import assert_close
from models import tiny
from tanzaku.core.manager import manager_of
from tanzaku.methods.waveft import WaveletDelta, filters, inverse_wavelet


@pytest.mark.parametrize("moments", range(1, 11))
def test_filters_are_orthogonal_and_daubechies(moments: int) -> None:
    low, high = filters(moments)
    shifts = [low[2 * k :] @ low[: len(low) - 2 * k] for k in range(moments)]
    assert shifts == pytest.approx([1.0] + [0.0] * (moments - 1), abs=1e-9) and abs(low @ high) < 1e-12
    assert low.tolist() == pytest.approx(list(Wavelet(f"db{moments}").rec_lo), abs=1e-10)


@pytest.mark.parametrize("moments", [1, 2, 4])
@pytest.mark.parametrize("size", [(8, 8), (16, 10), (7, 12), (9, 5)])
def test_the_transform_is_pefts(size: tuple[int, int], moments: int) -> None:
    coefficients = torch.randn(size)
    padded = torch.zeros([(n + 2 * moments - 1) // 2 * 2 for n in size])
    start = [(wide - n) // 2 for wide, n in zip(padded.shape, size, strict=True)]
    padded[start[0] : start[0] + size[0], start[1] : start[1] + size[1]] = coefficients
    (a, h), (v, d) = (half.chunk(2, 1) for half in padded.chunk(2, 0))
    whole = waverec2d((a, (h, v, d)), f"db{moments}")
    start = [(there - n) // 2 for there, n in zip(whole.shape, size, strict=True)]
    expected = whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
    assert_close(inverse_wavelet(coefficients, moments), expected)


def numbers(method: tz.WaveFT) -> dict[str, int]:
    model = tiny("llama")
    tz.attach(model, method, "x", seed=0)
    found = manager_of(model).get("x").at()
    return {path: len(layer.waveft_spectrum) for path, layer in found if isinstance(layer, WaveletDelta)}


def test_proportional_parameters_go_by_size() -> None:
    found = numbers(tz.WaveFT(n_frequency=30, proportional_parameters=True))
    assert {path.rpartition(".")[2]: n for path, n in found.items()} == {"q_proj": 40, "v_proj": 20}
    assert math.isclose(sum(found.values()), 30 * len(found), abs_tol=len(found))


def test_mistakes() -> None:
    with pytest.raises(tz.TanzakuError, match="wavelet_family='sym4', expected one of haar, db1"):
        numbers(tz.WaveFT(n_frequency=30, wavelet_family="sym4"))
