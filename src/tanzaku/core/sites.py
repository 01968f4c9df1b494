"""The three sites of a frozen model: which hooks a route needs there, added and taken away.

Modules are reached by forward (pre-)hooks, attention by transformers' attention interface, virtual tokens by the
backbone's inputs. Nothing in the model is replaced.

A hook is added when a route first needs it and stays until the last adapter goes. It holds no module, no adapter and no
route: it asks, each time it runs, what is in force where it runs. So routes of several threads do not meet, a
copy of the model follows its own adapters, and code that was compiled for one route is guarded against another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from tanzaku.core import dropout
from tanzaku.core.attention import ATTEND, AttentionSite, register
from tanzaku.core.first_pass import FIRST_PASS, first_pass
from tanzaku.core.hooks import Entrance, HeadSite, ModuleSite, SplitSite, TokenSite, WeightSite
from tanzaku.core.in_force import Current, InForce
from tanzaku.core.places import note
from tanzaku.core.positions import parameters
from tanzaku.core.rows import Places
from tanzaku.core.shared import Shared
from tanzaku.core.survey import may_not_run, survey
from tanzaku.errors import TanzakuError, listed
from tanzaku.models import tree
from tanzaku.models.families import Base
from tanzaku.models.families.trace import PREFIX


def guard_hooks(config: Any) -> None:
    """Have compiled code guard that a module has no hooks: layers share their code, and some have hooks while others
    have none. Torch's settings are each thread's own, so what all threads begin with is set, where torch has that."""
    try:
        config._config["skip_nnmodule_hook_guards"].default = False
    except (AttributeError, LookupError, TypeError):  # private: another torch may keep its settings otherwise
        config.skip_nnmodule_hook_guards = False


guard_hooks(torch._dynamo.config)

# Ids of the parameters whose gradients each DDP shares between processes.
_shared: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


class Sites(Current):
    """The hooks of one model, and what is in force in it."""

    def __init__(self, base: Base):
        super().__init__(base)
        self.weights: dict[str, WeightSite] = {}
        self._kept: dict[tuple[str, ...], list[RemovableHandle]] = {}

    def ensure(self, force: InForce) -> None:
        """Hang the hooks that a route needs and that are not there yet."""
        with self._lock:
            kept = self._kept
            wanted = [
                *(("before", path, "forward_pre", ModuleSite, "before") for path in force.before),
                *(("after", path, "forward", ModuleSite, "after") for path in force.after),
            ]
            fresh = False
            for key, path, kind, site, method in wanted:
                module = self.base.model.get_submodule(path)
                if not self._attached((key, path), module):
                    fresh = True
                    kept[key, path] = [_register(module, kind, getattr(site(self, path), method), with_kwargs=True)]
            for path in force.weights:
                if not self._attached(("weights", path), self.base.model.get_submodule(path)):
                    fresh = True
                    self.weights[path] = WeightSite(self, path)
                    kept["weights", path] = self.weights[path].attach()
            for path in force.attention:
                if ("attention", path) not in kept:
                    fresh = True
                    self._hang_attention(path)
                    kept["attention", path] = []
            if ("processes",) not in kept and dist.is_available() and dist.is_initialized():
                fresh = True
                kept[("processes",)] = [_register(self.base.model, "forward_pre", self._check_shared)]
            if ("head",) not in kept and (own := self._own_head(force)) is not None:
                fresh, head = True, HeadSite(self, own)
                kept[("head",)] = [
                    _register(self.base.model, "forward_pre", head.enter),
                    _register(self.base.model.get_submodule(own), "forward_pre", head.runs),
                    _register(self.base.model, "forward", head.leave),
                ]
            if force.places is not None:
                fresh |= self._attach_splits(force.places)
            if (force.attention or force.shared) and ("entrance",) not in kept:
                # Before virtual tokens are put there: what layers share may look at the ids and at the cache itself.
                options = {"with_kwargs": True, "prepend": True}
                kept[("entrance",)] = [_register(self.base.entrance, "forward_pre", self._enter, **options)]
            if force.shared and self.base.encoder_decoder and ("encoder",) not in kept:
                kept[("encoder",)] = [_register(self.base.encoder, "forward_pre", self._refresh, with_kwargs=True)]
            if force.tokens is not None:
                paths = {id(module): path for path, module in tree.named_modules(self.base.model)}
                for module, kind, function in force.tokens.hooks():
                    place = (paths[id(module)], kind, function.__name__)
                    force.token_hooks.add(place)
                    if place not in kept:
                        fresh = True
                        # A pass that fails ends, too.
                        options = {"always_call": True} if kind == "forward" else {}
                        kept[place] = [_register(module, kind, TokenSite(self, *place), with_kwargs=True, **options)]
            if force.reads_places:
                fresh |= self._attach_places()
            if fresh:
                forget_compiled()

    def _own_head(self, force: InForce) -> str | None:
        """The path of the model's output embedding, if a route has something there and the model runs it."""
        model = self.base.model
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        paths = [path for path in {**force.before, **force.after, **force.weights} if path]
        found = next((path for path in paths if model.get_submodule(path) is head), None)
        idle = found is not None and may_not_run(model, found) and survey(self.base).never_runs(self.base, found)
        return None if idle else found

    def _attached(self, key: tuple[str, ...], module: nn.Module) -> bool:
        """Whether a hook is there, and still at the module that has its path: somebody may have put another there."""
        kept = self._kept.get(key)
        if kept and not (kept[0].id in module._forward_hooks or kept[0].id in module._forward_pre_hooks):
            for handle in self._kept.pop(key):
                handle.remove()
        return key in self._kept

    def _attach_splits(self, places: Places) -> bool:
        """Attach what a batch of several adapters needs to know its rows."""
        fresh = ("batch",) not in self._kept
        if fresh:
            entrance, model = Entrance(self, self.ensure), self.base.model
            self._kept[("batch",)] = [
                _register(model, "forward_pre", entrance, with_kwargs=True, prepend=True),
                _register(model, "forward", entrance.leave, always_call=True),
            ]
        for path in places.around:
            if ("split", path) not in self._kept:
                fresh, site, module = True, SplitSite(self, path), self.base.model.get_submodule(path)
                self._kept["split", path] = [
                    _register(module, "forward_pre", site.enter, with_kwargs=True),
                    _register(module, "forward", site.leave, with_kwargs=True, always_call=True, prepend=True),
                ]
        return fresh

    def _attach_places(self) -> bool:
        """Attach what notes where tokens stand, behind what puts virtual tokens there."""
        place = ("places", str(sum(len(key) == 3 for key in self._kept)))
        if place in self._kept:
            return False
        before = [key for key in self._kept if key[0] == place[0] and len(key) == 2]
        entrances = [self.base.entrance, *([self.base.encoder] if self.base.encoder_decoder else [])]
        self._kept[place] = [_register(m, "forward_pre", self._place, with_kwargs=True) for m in entrances]
        for handle in (handle for key in before for handle in self._kept.pop(key)):
            handle.remove()
        return True

    def _place(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where a stack of layers is entered: what tells which tokens are a row's own."""
        force = self.in_force()
        if force is None or not force.reads_places:
            return
        self.base.check_whole()
        # In an encoder-decoder virtual tokens are the encoder's.
        none = self.base.encoder_decoder and module is self.base.entrance
        note(module, args, kwargs, (0,) * len(force.virtual) if none else force.virtual)

    def off(self) -> None:
        """Remove every hook."""
        self.active = None
        self.put(None)
        for handle in (handle for handles in self._kept.values() for handle in handles):
            handle.remove()
        for module in tree.modules(self.base.model):
            if module.__dict__.pop(ATTEND, None) is not None:
                config = cast(Any, module.config)
                own = str(config._attn_implementation).removeprefix(PREFIX)
                config._attn_implementation_internal = own
        self._kept, self.weights = {}, {}
        forget_compiled()

    def _hang_attention(self, path: str) -> None:
        module = self.base.model.get_submodule(path)
        if getattr(module, "config", None) is None:
            raise TanzakuError(
                f"{path} of {type(self.base.model).__name__} does not go through transformers' attention interface"
            )
        module.__dict__[ATTEND] = AttentionSite(self, path)

    def _check_shared(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Under DDP, which shares the gradients of what required them when it was made, and of nothing else."""
        force, around = self.in_force(), DistributedDataParallel._active_ddp_module
        if force is None or around is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if around not in _shared:
            buckets = around.reducer._get_zeros_like_grad_buckets()
            _shared[around] = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
        shared = _shared[around]
        for names, stack in zip(force.route.stacks, force.stacks, strict=True):
            if any(p.requires_grad and id(p) not in shared for _, layer in stack for p in layer.parameters()):
                raise TanzakuError(
                    f"DistributedDataParallel was made while {listed(names)} was not active, so processes would not "
                    "share its gradients: activate it, then wrap the model again"
                )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the backbone's entrance: what a pass needs before its first layer."""
        force = self.in_force()
        if force is None:
            return
        for path in force.attention if self.base.whole else ():
            # Whoever sets another implementation, also in between, gets it from behind ours.
            config = cast(Any, self.base.model.get_submodule(path).config)
            own = (config._attn_implementation or "eager").removeprefix(PREFIX)
            register(own)
            if config._attn_implementation != PREFIX + own:
                config._attn_implementation_internal = PREFIX + own
        self._refresh(module, args, kwargs)

    def _refresh(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute what layers of an adapter share, before the first of them."""
        force = self.in_force()
        if force is None or not force.shared:
            return
        given = {**dict(zip(parameters(module), args, strict=False)), **kwargs}
        first = [layer for layer in force.shared if layer.reads_first_pass]
        if first:
            self._read_first(module, given, force, first)
        for layer in force.shared:
            if not layer.reads_first_pass:
                layer.refresh(given)

    def _read_first(self, module: nn.Module, given: dict[str, Any], force: InForce, layers: list[Shared]) -> None:
        """Let the bare base run, for those who read what it makes of the text. What is drawn there is drawn in vain
        for the rows of all others."""
        mark = dropout.mark()
        decodes = self.base.encoder_decoder and module is self.base.entrance
        wider = force.tokens.widened(module, given) if decodes and force.tokens is not None else None
        found = first_pass(module, given if wider is None else wider)
        for number, stack in enumerate(force.stacks):
            if not any(layer is each for layer in layers for _, each in stack):
                dropout.rewind(mark, number)
        for layer in layers:
            mark = dropout.mark()
            layer.refresh({**given, FIRST_PASS: found})
            for number, stack in enumerate(force.stacks):
                if not any(layer is each for _, each in stack):
                    dropout.rewind(mark, number)


def _register(module: nn.Module, kind: str, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
    return cast(RemovableHandle, getattr(module, f"register_{kind}_hook")(hook, **options))


def forget_compiled() -> None:
    """Compiled code guards what it reads, and not which hooks there are: it is compiled again."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()
