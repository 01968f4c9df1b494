"""PEFT's ways to show LoRA data that it starts from: EVA's, CorDA's and LoRA-GA's, on :func:`tanzaku.calibrate`.

EVA sees rows once the adapter is there. CorDA and LoRA-GA see them before, by a function that runs the bare model: what
they find is kept with the base until an adapter is made of the same configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from tanzaku.compat.peft.config import LoraConfig
from tanzaku.compat.peft.owner import Owner
from tanzaku.compat.peft.targets import fit
from tanzaku.core.adapter import Adapter
from tanzaku.core.attach import activate, attach, detach
from tanzaku.core.calibration import calibrate
from tanzaku.core.passes import Passes
from tanzaku.errors import TanzakuError
from tanzaku.methods.lora_layers import StartedDelta
from tanzaku.methods.lora_starts import Gradient
from tanzaku.models import tree

_NAME, _KEPT = "peft-start", "_tanzaku_starts"
_SHOWN_BY = {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}


def _refuse(where: str, what: str) -> NoReturn:
    raise TanzakuError(f"{where}: found {what}, which is not supported; leave it out, or use tanzaku.calibrate")


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """A batch through the model."""
    return model(**inputs)


def initialize_lora_eva_weights(
    model: Owner,
    dataloader: Iterable[Mapping[str, Tensor]] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = None,
    prepare_layer_inputs_fn: Callable[..., Any] | None = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Let an adapter with init_lora_weights="eva" see batches, and start from their principal components.

    Padding, and what labels mask, is left out. Parameters may be others afterwards: make optimizers later.

    Args:
        dataloader: of inputs by the names of the model's `forward`.
        gather_distributed_inputs, show_progress_bar: have no effect.

    Raises:
        TanzakuError: another adapter than one of EVA, functions of the program's own, or too few rows.
    """
    where = "initialize_lora_eva_weights"
    if not isinstance(model, Owner):
        raise TanzakuError(f"{where}: model must be a PeftModel; found {type(model).__name__}")
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        raise TanzakuError(f"`{where}` can only be used with `init_lora_weights='eva'`; {adapter_name!r} has another")
    if eva_state_dict is not None or forward_fn is not forward_fn_dict:
        _refuse(where, "eva_state_dict or forward_fn")
    if prepare_model_inputs_fn is not None or prepare_layer_inputs_fn is not None:
        _refuse(where, "functions that prepare inputs")
    if dataloader is None:
        raise TanzakuError(f"{where}: dataloader is required")
    base = model.get_base_model()
    device = next(tree.parameters(base)).device
    settings = config.settings()["eva_config"] or {}
    if settings.get("label_mask_value", -100) != -100:
        _refuse(where, f"label_mask_value={settings['label_mask_value']}")
    left_out = () if settings.get("use_label_mask", True) else ("labels",)
    batches = ({k: v.to(device) for k, v in batch.items() if k not in left_out} for batch in dataloader)
    calibrate(base, adapter_name, batches)
    cast(Any, model)._note(model._manager.get(adapter_name), config)


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Run the bare model, in evaluation mode, and keep where CorDA starts for the adapter to come.

    Args:
        run_model: runs `model` on some rows.

    Raises:
        TanzakuError: another configuration than CorDA's, another `hooked_model`, or no pass.
    """
    if hooked_model is not None and hooked_model is not model:
        _refuse("preprocess_corda", "another hooked_model")
    if run_model is None:
        raise TanzakuError("preprocess_corda: run_model must be specified; files of covariances are not read")
    model.eval()

    def run(adapter: Adapter) -> Tensor:
        cast(Any, run_model)()
        return torch.zeros(())

    _keep(model, lora_config, "corda", run)


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Run the bare model forward and backward, in training mode, and keep where LoRA-GA starts for the adapter to come.

    Args:
        train_step: runs `model` on some rows and calls `backward()` of losses.

    Raises:
        TanzakuError: another configuration than LoRA-GA's, a `cache_file`, or no gradient.
    """
    if cache_file is not None:
        _refuse("preprocess_loraga", "cache_file")

    def run(adapter: Adapter) -> Tensor:
        layers = {path: layer for path, layer in adapter.at() if isinstance(layer, StartedDelta)}
        passes = dict.fromkeys(layers, 0)

        def count(path: str, *_: Any) -> None:
            passes[path] += 1

        hooks = [model.get_submodule(path).register_forward_hook(partial(count, path)) for path in layers]
        try:
            with torch.enable_grad():
                train_step()
        finally:
            for hook in hooks:
                hook.remove()
        # The program's own backward passes have left their sum, of which the mean is a gradient of this.
        loss = torch.zeros(())
        for path, layer in layers.items():
            probe = cast(Gradient, layer.watch).probe
            if probe is not None and probe.grad is not None:
                loss = loss + (probe * probe.grad / passes[path]).sum().cpu()
        return loss

    was = model.training
    model.train()
    try:
        _keep(model, lora_config, "lora_ga", run)
    finally:
        model.train(was)


def _keep(model: nn.Module, config: LoraConfig, init: str, run: Callable[[Adapter], Tensor]) -> None:
    if not isinstance(config, LoraConfig) or config.init_lora_weights != init:
        raise TanzakuError(f"{_SHOWN_BY[init]}: expected a LoraConfig with init_lora_weights={init!r}")
    mine = copy.deepcopy(config)
    fit(mine, model)
    with _as_it_was(model):
        adapter = attach(model, mine.built(), _NAME, seed=0)
        try:
            activate(model, _NAME)
            adapter.method.calibrate(adapter, Passes([partial(run, adapter)]))
            layers = {path: layer for path, layer in adapter.at() if isinstance(layer, StartedDelta)}
            found = {p: (s.start_A.weight.clone(), s.start_B.weight.clone(), s.scaling) for p, s in layers.items()}
        finally:
            activate(model, None)
            detach(model, _NAME)
    model.__dict__.setdefault(_KEPT, {})[init] = found


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Within the block the base is frozen."""
    flags = [(parameter, parameter.requires_grad) for parameter in tree.parameters(model)]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.no_grad()
def begin(adapter: Adapter) -> None:
    """Let a new adapter start where the data said, if it starts from data that was shown before.

    Raises:
        TanzakuError: none was shown, or to an adapter of other modules or sizes.
    """
    init = str(getattr(adapter.method, "init_lora_weights", None))
    if init not in _SHOWN_BY:
        return
    kept = adapter.base.model.__dict__.get(_KEPT, {}).get(init)
    if kept is None:
        raise TanzakuError(f"init_lora_weights={init!r} starts from data: {_SHOWN_BY[init]}() comes first")
    for path, layer in adapter.at():
        if isinstance(layer, StartedDelta):
            a, b, scaling = kept.get(path, (None, None, None))
            if a is None or a.shape != layer.lora_A.weight.shape or scaling != layer.scaling:
                raise TanzakuError(f"{path}: {_SHOWN_BY[init]}() was called with other settings than these")
            layer.begin(a, b)
            layer.watch = None
