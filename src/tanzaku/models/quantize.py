"""The one reader of weights: what a module's weight is in full precision, quantised or not, and the plain module that
holds it.

A hook sees what goes in and out of a module, so adapters run over any format. Only merging, and methods that are a
function of the weight itself, read it.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tanzaku.errors import TanzakuError

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What transformers sets on a model that it loads quantised. The last has what read the packed weights, which would be
# undone in saving; without it transformers takes the model's own conversions.
_TRACES = (
    "hf_quantizer",
    "is_quantized",
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_weight_conversions",
)
_READABLE = ("bitsandbytes_4bit", "bitsandbytes_8bit", "torchao")


def plain(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers as they are. torchao's call themselves floating-point, too."""
    return tensor.dtype in _PLAIN and not _torchao(tensor)


def quantised(module: nn.Module) -> bool:
    """Whether the module has a weight that is stored in another form than plain floating-point numbers."""
    weight = module._parameters.get("weight")
    return weight is not None and not plain(weight)


def full_weight(module: nn.Module, path: str = "") -> Tensor:
    """The module's weight, in its own layout, in fp32 (fp64 stays), also where it is offloaded just now.

    Reads nn.Linear, Conv1D, nn.Embedding and nn.Conv2d of any floating-point type, bitsandbytes' Linear4bit and
    Linear8bitLt, and torchao's tensors in any of them. What is read from a quantised weight is what the base computes
    with.

    Raises:
        TanzakuError: a format that is none of these; the message names it.
    """
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_meta or (kept := elsewhere(module, "weight")) is None:
        return _full_weight(module, getattr(module, "weight", None), path)
    if plain(weight):
        return _full_weight(module, kept[0].to(kept[1]), path)
    # What goes with a quantised weight comes with it only where the module runs.
    with importlib.import_module("accelerate.utils").align_module_device(module):
        return _full_weight(module, module.weight, path)


def elsewhere(module: nn.Module, name: str) -> tuple[Tensor, Any] | None:
    """A tensor that accelerate keeps elsewhere while the module does not run, and the device that it goes to."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "offload", False) and name in each.weights_map:
            return each.weights_map[name], each.execution_device
    return None


def _full_weight(module: nn.Module, weight: Any, path: str) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TanzakuError(
            f"{path or 'a module'} is a {type(module).__name__} without a weight to read; expected a linear layer, an "
            "embedding or a convolution, plain or quantised by bitsandbytes or torchao"
        )
    kind = type(weight).__name__
    if plain(weight):
        out = weight.detach()
    elif _torchao(weight):
        out = cast(Any, weight.detach()).dequantize()
    elif kind == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        out = _four_bit(weight.data, cast(Any, weight).quant_state)
    elif kind == "Int8Params" and (scale := _scale(module)) is not None:
        out = importlib.import_module("bitsandbytes.functional").int8_vectorwise_dequant(
            weight.data, scale.to(weight.device)
        )
    else:
        raise TanzakuError(
            f"{path or 'a module'} is a {type(module).__name__} whose weight is a {kind} of {weight.dtype}, which has "
            "no reader; expected plain floating-point numbers, bitsandbytes or torchao: load the base unquantised"
        )
    return out if out.dtype == torch.float64 else out.float()


def stored_weight(model: nn.Module, path: str) -> Tensor:
    """The weight of the module at `path` as the model's checkpoint has it, on the CPU: before it was quantised.

    Raises:
        TanzakuError: no safetensors of a checkpoint on this machine has it.
    """
    name, prefix = getattr(getattr(model, "config", None), "_name_or_path", ""), getattr(model, "base_model_prefix", "")
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    cached = partial(_cached, name, revision)
    files = (cached("model.safetensors"), cached("model.safetensors.index.json"))
    wanted = [f"{path}.weight", f"{prefix}.{path}.weight", f"{path}.weight".removeprefix(f"{prefix}.")]
    try:
        if files[0] is None and files[1] is not None:
            where = json.loads(files[1].read_bytes())["weight_map"]
            file = next((cached(where[key]) for key in wanted if key in where), None)
        else:
            file = files[0]
        if file is not None:
            with safe_open(file, "pt") as tensors:
                found = next((key for key in wanted if key in tensors.keys()), None)  # noqa: SIM118 (it is no mapping)
                if found is not None:
                    return cast(Tensor, tensors.get_tensor(found)).float()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TanzakuError(f"the checkpoint of {name} is damaged: {str(error).splitlines()[0]}") from None
    raise TanzakuError(
        f"the weight of {path} before quantisation was found in no safetensors of {name or 'a model without a name'}; "
        "expected its checkpoint on this machine"
    )


def _cached(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a checkpoint, in its directory or in the Hub's cache."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None  # a directory that is gone, and no name on the Hub
    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def plain_module(module: nn.Module, dtype: torch.dtype, path: str = "") -> nn.Module:
    """A module that computes the same with a plain weight of type `dtype`. The given one stays as it is."""
    weight = nn.Parameter(full_weight(module, path).to(dtype), requires_grad=False)
    if _torchao(cast(Tensor, module.weight)):
        new = copy.copy(module)
        new._parameters = dict(module._parameters)
        new.__dict__.pop("extra_repr", None)  # torchao's, bound to the module it was put on
    else:
        linear = cast(nn.Linear, module)
        with torch.device("meta"):
            new = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new._parameters["bias"] = linear.bias
        new.train(module.training)
    new._parameters["weight"] = weight
    return new


def drop_traces(model: nn.Module) -> Callable[[], None]:
    """Let a model whose modules are all plain again say so, for save_pretrained; returns what takes that back."""
    config = getattr(model, "config", None)
    # A composite model's parts have the marks too.
    owners = [(m, t) for m in model.modules() for t in _TRACES if t in m.__dict__]
    owners += [(c, "quantization_config") for c in (config,) if c is not None and "quantization_config" in c.__dict__]
    before = [(owner, trace, owner.__dict__.pop(trace)) for owner, trace in owners]

    def back() -> None:
        for owner, trace, value in before:
            owner.__dict__[trace] = value

    return back


def check_readable(model: nn.Module) -> None:
    """Raise an error that names the format where transformers has quantised the model in one without a reader."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = quantizer.quantization_config.quant_method
    name = str(getattr(method, "value", method))
    if name == "bitsandbytes" or name in _READABLE:
        return
    raise TanzakuError(
        f"this {type(model).__name__} is quantised by {name}, which has no reader; expected bitsandbytes or torchao: "
        "load the base unquantised"
    )


def _torchao(tensor: Tensor) -> bool:
    return type(tensor).__module__.startswith("torchao.")


def _four_bit(data: Tensor, state: Any) -> Tensor:
    """The values of a 4-bit weight."""
    functions = importlib.import_module("bitsandbytes.functional")
    if not getattr(state, "packing_format_for_cpu", False):
        return cast(Tensor, functions.dequantize_4bit(data, state))
    # Laid out anew for a CPU's kernel, with a scale a block as (blocks, out). bitsandbytes can lay back the codes, but
    # not the scales.
    scale = state.absmax.t().float().repeat_interleave(state.blocksize, dim=1)
    codes = functions._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))[0].view(torch.uint8).flatten()
    values = state.code.float()[torch.stack([codes >> 4, codes & 15], dim=1).long()]
    return cast(Tensor, values.view(state.shape) * scale)


def _scale(module: nn.Module) -> Tensor | None:
    """The row scales of an 8-bit layer: with the weight until the first forward pass, then in the layer's state."""
    found = getattr(module.weight, "SCB", None)
    return cast("Tensor | None", found if found is not None else getattr(getattr(module, "state", None), "SCB", None))
