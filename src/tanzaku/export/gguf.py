"""Writing GGUF files that llama.cpp and Ollama run: a LoRA adapter beside its base, or a whole plain model.

Tensors are written one after another, so that memory holds one converted tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tanzaku.core.delta import WeightDelta
from tanzaku.core.manager import manager_of
from tanzaku.errors import TanzakuError
from tanzaku.export.architectures import Architecture, architecture_of
from tanzaku.export.vocabulary import write_vocabulary
from tanzaku.files.writing import written_beside
from tanzaku.models import tree

OUTTYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_HALF_MAX = 65504.0  # of float16


@dataclass
class _Entry:
    """A tensor of the file: computed when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], Tensor]


def export_adapter(model: nn.Module, name: str, path: str | Path, *, outtype: str = "f16") -> Path:
    """Write the LoRA adapter `name` as a GGUF that llama.cpp lays over a GGUF of the same base.

    The scale of each layer (rank_pattern, alpha_pattern, rslora) is folded into B where it is not lora_alpha / r.

    Args:
        model: a causal language model that the adapter is attached to.
        outtype: "f32", "f16", "bf16" or "q8_0" (rows of no multiple of 32 are kept as f16).

    Raises:
        TanzakuError: the method is no LoRA, the adapter has weights of its own that llama.cpp has no place for (a head,
            biases, whole modules), or the model is of a family that is not exported.
    """
    _check_outtype(outtype)
    adapter = manager_of(model).get(name)
    arch = _causal(model, name)
    config = cast(Any, model).config
    alpha = float(getattr(adapter.method, "lora_alpha", 0.0))
    tied = _tied(model)
    names = _Names(arch, config)
    entries = []
    for site, layer in adapter.at():
        pair = layer.factors() if isinstance(layer, WeightDelta) else None
        if pair is None or pair[0].dim() > 2:
            raise TanzakuError(
                f"{name!r} ({adapter.method.name}) has a {type(layer).__name__} at {site or 'the model'}, and a GGUF "
                f"adapter holds plain LoRA alone; {_instead(adapter.method.mergeable)}"
            )
        (a, b), scaling = pair, float(cast(Any, layer).scaling)
        target = names.of(f"{site}.weight")
        if target == "token_embd.weight" or target == "output.weight":
            if tied:
                raise TanzakuError(
                    f"{name!r} changes {site}, whose weight is input and output embedding at once; llama.cpp applies "
                    "an adapter to both or none, so leave the embeddings out of target_modules"
                )
            if target == "token_embd.weight":
                a = a.t()  # llama.cpp looks rows of A up
        rank = b.shape[1]
        usual = alpha / rank if alpha else 1.0  # what llama.cpp multiplies by
        fold = scaling / usual
        b = b.detach() if fold == 1 else b.detach() * fold
        b = arch.tensor(config, site, b)
        for letter, tensor in (("a", a.detach()), ("b", b)):
            entries.append(_entry(f"{target}.lora_{letter}", tensor, outtype))

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(name)

    return _write(Path(path), arch, entries, outtype, describe)


def export_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str | Path, *, outtype: str = "f16", name: str = "model"
) -> Path:
    """Write a whole causal language model with its tokenizer as a GGUF; merge an adapter first to have it inside.

    Args:
        outtype: of matrices: "f32", "f16", "bf16" or "q8_0" (rows of no multiple of 32 are kept as f16). Vectors are
            f32, as llama.cpp wants them.
        name: what programs show.

    Raises:
        TanzakuError: a family or a tokenizer that is not exported, quantised weights, or values beyond float16's range.
    """
    _check_outtype(outtype)
    arch = _causal(model, name)
    config = cast(Any, model).config
    names = _Names(arch, config)
    entries = []
    for key, parameter in tree.named_parameters(model):
        if not parameter.is_floating_point():
            raise TanzakuError(
                f"{key} is quantised ({parameter.dtype}); load the model in float16 or float32 to export it"
            )
        module = model.get_submodule(key.rpartition(".")[0])

        def read(key: str = key, parameter: Tensor = parameter, module: nn.Module = module) -> Tensor:
            straight = parameter.detach()
            if type(module).__name__ == "Conv1D" and straight.dim() == 2:
                straight = straight.t()
            return arch.tensor(config, key, straight)

        shape = tuple(parameter.shape)
        shape = shape[::-1] if type(module).__name__ == "Conv1D" else shape
        target = names.of(key)
        # Positions are added, not multiplied, which llama.cpp does in f32 alone.
        kind = GGMLQuantizationType.F32 if target == "position_embd.weight" else _kind(shape, outtype)
        entries.append(_Entry(target, shape, kind, read))
    entries += [_entry(key, tensor, "f32") for key, tensor in arch.extra(config)]
    rows = cast(Any, model).get_input_embeddings().weight.shape[0]

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        arch.write(writer, config)
        writer.add_vocab_size(rows)
        write_vocabulary(writer, tokenizer, rows)

    return _write(Path(path), arch, entries, outtype, describe)


class _Names:
    """llama.cpp's names of a model's tensors."""

    def __init__(self, arch: Architecture, config: Any):
        self.kind = config.model_type
        self.map = gguf.get_tensor_name_map(arch.arch, config.num_hidden_layers)

    def of(self, key: str) -> str:
        found = self.map.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise TanzakuError(f"llama.cpp has no tensor for {key} of a {self.kind!r} model, so it cannot be exported")
        return str(found)


def _check_outtype(outtype: str) -> None:
    if outtype not in OUTTYPES:
        raise TanzakuError(f"outtype is {outtype!r}, expected {', '.join(OUTTYPES)}")


def _causal(model: nn.Module, name: str) -> Architecture:
    kind = type(model).__name__
    if not kind.endswith(("ForCausalLM", "LMHeadModel")):
        classifier = "Classification" in kind
        raise TanzakuError(
            f"{name!r} sits on a {kind}, and llama.cpp "
            + ("has no classification head for it: use tanzaku predict" if classifier else "runs it in no such form")
            + "; expected a causal language model"
        )
    return architecture_of(cast(Any, model).config)


def _instead(mergeable: bool) -> str:
    return "export it merged (--merged)" if mergeable else "it is no change of weights either, so it cannot be exported"


def _tied(model: nn.Module) -> bool:
    into, out = cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()
    return out is not None and into.weight is out.weight


# -- tensors


def _entry(name: str, tensor: Tensor, outtype: str) -> _Entry:
    return _Entry(name, tuple(tensor.shape), _kind(tuple(tensor.shape), outtype), lambda: tensor)


def _kind(shape: tuple[int, ...], outtype: str) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    kind = OUTTYPES[outtype][0]
    fits = shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else GGMLQuantizationType.F16


def _values(entry: _Entry) -> np.ndarray[Any, Any]:
    tensor = entry.read().to("cpu", torch.float32)
    if entry.kind == GGMLQuantizationType.F16 and tensor.abs().max() > _HALF_MAX:
        raise TanzakuError(f"{entry.name} holds values beyond float16's range; expected --outtype bf16 or f32")
    values = tensor.contiguous().numpy()
    return cast("np.ndarray[Any, Any]", gguf.quants.quantize(values, entry.kind))


def _write(
    path: Path, arch: Architecture, entries: list[_Entry], outtype: str, describe: Callable[[GGUFWriter], None]
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        writer = GGUFWriter(beside, arch.name)
        try:
            describe(writer)
            writer.add_file_type(OUTTYPES[outtype][1])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for entry in entries:
                size = int(np.prod(gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)))
                writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=entry.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                writer.write_tensor_data(_values(entry))
        finally:
            writer.close()
    return path
