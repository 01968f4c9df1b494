"""Seeds and torch's own generators: draws that share nothing, and that nobody else notices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def seed_of(*parts: int | str) -> int:
    """A seed for what these parts name, such as the order of rows in one epoch; the same on every machine.

    A sum would not do: the second epoch of seed 0 would be the first of seed 1.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(seed: int | None, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Within the block, torch draws from `seed` on the CPU and on these devices; None: as it does anyhow.

    Afterwards every generator is as it was, and those of other devices were not touched: torch.manual_seed would seed
    all GPUs, also some time later where CUDA has not been used yet.
    """
    generators = [] if seed is None else [torch.default_generator, *_generators_of({*devices})]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed or 0)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators_of(devices: Iterable[torch.device]) -> Iterator[torch.Generator]:
    for device in devices:
        if device.type == "cuda":
            yield torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        elif device.type == "mps":
            yield torch.mps._get_default_mps_generator()
