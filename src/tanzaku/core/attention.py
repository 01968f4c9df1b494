"""The attention site: what stands in transformers' attention interface for each implementation that it wraps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tanzaku.core.in_force import Current, InForce, Plan, joined
from tanzaku.core.method import AttentionCall
from tanzaku.errors import TanzakuError
from tanzaku.models.families.prompt_call import catch
from tanzaku.models.families.trace import PREFIX

PACKING = "_tanzaku_packing"  # gives attention its rows back where a batch holds single tokens (see engine/packing.py)
ATTEND = "_tanzaku_attend"
_Result = tuple[Tensor, Tensor | None]


def register(own: str) -> None:
    """Register a wrapper of the attention function `own` and its mask twin, once."""
    name = PREFIX + own
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, own))
    if own in ALL_MASK_ATTENTION_FUNCTIONS and name not in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])


def _attention(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    catch(key, value)
    # Read so that compiled code guards what is not there, too: layers share their code.
    packing, site = getattr(module, PACKING, None), getattr(module, ATTEND, None)
    base = _function(own, module)
    hook = None if site is None else site.now()
    if packing is not None and packing.holds(query):
        return cast(_Result, packing.attend(own, base, hook, module, query, key, value, options))
    if hook is None:
        return cast(_Result, base(module, query, key, value, attention_mask, **options))
    return cast(_Result, hook(AttentionCall(module, query, key, value, attention_mask, options, base, own)))


def _function(own: str, module: nn.Module) -> Callable[..., Any]:
    if own != "eager":
        known = cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS[own])
        return partial(_by_its_name, own, known) if "flash" in own else known
    # Eager attention is each model's own function, named alike in every modelling file.
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise TanzakuError(f"{type(module).__name__} has no eager attention function; load the model with sdpa")
    return cast(Callable[..., Any], function)


def _by_its_name(own: str, function: Callable[..., Any], module: nn.Module, *args: Any, **options: Any) -> Any:
    """Flash attention, which looks for its kernel by the name that the layer's settings have."""
    settings = _Instead(cast(Any, module).config, _attn_implementation=own)
    return function(_Instead(module, config=settings), *args, **options)


class _Instead:
    """An object as it is, but for some attributes."""

    def __init__(self, of: Any, **attributes: Any):
        self._of = of
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


class AttentionSite:
    """What stands at an attention layer that some adapter changes."""

    def __init__(self, sites: Current, path: str):
        self.sites, self.path = sites, path

    def now(self) -> AttentionHook | None:
        """What is in force there."""
        force = self.sites.in_force()
        plan = None if force is None else force.attention.get(self.path)
        return None if force is None or plan is None else AttentionHook(force, plan, self.path)


class AttentionHook(NamedTuple):
    """What the routed adapters do at one attention layer."""

    force: InForce
    plan: Plan
    path: str

    def __call__(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        return self.force.attend(self.path, self.plan, call)

    def parts(self, rows: int) -> list[tuple[int | None, slice]]:
        """(stack number, some of its rows) in the batch's order; None: neighbours whose attention nothing changes."""
        groups = []
        for number, at in self.force.route.groups(rows):
            if isinstance(at, tuple):  # scattered rows: each by itself
                groups += [(number, slice(row, row + 1)) for row in at]
            else:
                groups.append((number, at or slice(0, rows)))
        groups.sort(key=lambda group: group[1].start)
        return [(number if self.plan[number] else None, at) for number, at in joined(groups, self.plan)]

    def changed(self, number: int, call: AttentionCall) -> Tensor:
        """The result for rows of one stack, whose adapter layers change it."""
        return self.force.changed(self.plan, number, call)
