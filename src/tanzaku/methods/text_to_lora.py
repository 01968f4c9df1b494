"""Text-to-LoRA: one network reads what a task is said to be, and writes LoRA for every matrix.

    z = h(N(W (d - mean)), layer, kind),  A = H_A z,  B = H_B z,  y' = y + (alpha / r) B A x,  H_B = 0 at first

d is a vector of the task's description; layer and kind, of the layer and of the kind of module, are vectors that are
learned; N is a layer norm, h a network of two layers, and each kind of module has its own H. Trained on rows of several
tasks at once, it writes for a task of which it has seen the description alone: see :func:`tanzaku.write_lora`.

Charakorn et al. 2025, arXiv 2506.06105, in its largest form (L), trained end to end on rows. Heads start as there at
what LoRA starts at, whatever they read. Its h has residual blocks and dropout, and more layers. What all descriptions
have in common is taken away here: of a decoder's states that is most.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.context import task_ids
from tanzaku.core.delta import in_full
from tanzaku.core.method import About, AdapterLayer, Attached, Method, Place, home, trainable
from tanzaku.core.shared import Shared, reached
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.targeted import TargetedInLayers
from tanzaku.errors import TanzakuError
from tanzaku.methods.descriptions import vectors_of
from tanzaku.methods.lora import LoRA
from tanzaku.methods.low_rank import LowRankDelta
from tanzaku.methods.parts import Norm, Projection
from tanzaku.models.families import Base, features, weight_of
from tanzaku.support.refs import Ref


class Kind(NamedTuple):
    """Modules that one head writes for: their path without the numbers in it, and their sizes."""

    path: str
    n_in: int
    n_out: int


class LoraWriter(Shared):
    """The network; `descriptions` (tasks, width), which nobody trains; and what it learns of layers and kinds.

    Args:
        modules: where LoRA is, by path.
    """

    place = "writer"
    descriptions: Tensor

    def __init__(self, how: TextToLora, descriptions: Tensor, modules: Sequence[tuple[str, nn.Module]], like: Tensor):
        super().__init__()
        size, self.r = how.embedding_dim, how.r
        told = [_told_apart(path, module) for path, module in modules]
        self.kinds, layers = [*dict.fromkeys(kind for kind, _ in told)], [*dict.fromkeys(layer for _, layer in told)]
        # Of each kind, the numbers of its modules, and of their layers.
        self.members = [[n for n, (kind, _) in enumerate(told) if kind == each] for each in self.kinds]
        self.depths = [[layers.index(told[n][1]) for n in members] for members in self.members]
        self.register_buffer("descriptions", descriptions)

        def drawn(t: Tensor) -> None:
            nn.init.normal_(t)

        self.read = Projection(descriptions.shape[1], size, like)
        self.norm = Norm(size, like)
        self.layer_vectors = trainable(len(layers), size, like=like, fill=drawn)
        self.kind_vectors = trainable(len(self.kinds), size, like=like, fill=drawn)
        self.hidden = Projection(3 * size, how.hidden_dim, like)
        self.out = Projection(how.hidden_dim, how.hidden_dim, like)
        self.heads = nn.ModuleList(
            Projection(how.hidden_dim, self.r * (kind.n_in + kind.n_out), like) for kind in self.kinds
        )
        if like.device.type != "meta":
            for part in (self.read, self.hidden, self.out):
                nn.init.xavier_uniform_(part.weight)
            for kind, head in zip(self.kinds, self.heads, strict=True):
                # A as LoRA's, by the bias alone; B, and all that z adds to either, is zero.
                bound = 1 / math.sqrt(kind.n_in)
                nn.init.uniform_(cast(Tensor, head.bias)[: self.r * kind.n_in], -bound, bound)

    def compute(self) -> list[tuple[Tensor, Tensor]]:
        return self.written(self.descriptions)

    def written(self, descriptions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of every module (A, B), (tasks, r, in) and (tasks, out, r), for descriptions (tasks, width)."""
        common = self.descriptions.mean(0) if len(self.descriptions) > 1 else 0
        tasks = self.norm(self.read(descriptions - common))
        out: dict[int, tuple[Tensor, Tensor]] = {}
        for number, (kind, head) in enumerate(zip(self.kinds, self.heads, strict=True)):
            layers = self.layer_vectors[self.depths[number]]
            places = torch.cat([layers, self.kind_vectors[number].expand_as(layers)], dim=-1)
            known = torch.cat([tasks[:, None].expand(-1, len(places), -1), places.expand(len(tasks), -1, -1)], dim=-1)
            z = F.silu(self.out(F.silu(self.hidden(known))))
            a, b = head(z).split([self.r * kind.n_in, self.r * kind.n_out], dim=-1)
            # All places at once: a gradient of each by itself would be one of all places, most of it zeros.
            parts = (a.unflatten(-1, (self.r, -1)).unbind(1), b.unflatten(-1, (-1, self.r)).unbind(1))
            out.update(zip(self.members[number], zip(*parts, strict=True), strict=True))
        return [out[number] for number in range(len(out))]


def _told_apart(path: str, module: nn.Module) -> tuple[Kind, str]:
    """The kind of a module, and its layer: by the numbers in its path, so that no two have both in common."""
    parts = path.split(".")
    kind = ".".join("*" if part.isdigit() else part for part in parts)
    return Kind(kind, *features(module, path)), ".".join(part for part in parts if part.isdigit())


class WrittenDelta(LowRankDelta):
    """LoRA at one matrix, which the network writes: for each row that of its task."""

    def __init__(self, writer: LoraWriter, number: int, scaling: float):
        super().__init__()
        self.writer, self.number, self.r, self.scaling = Ref(writer), number, writer.r, scaling

    @property
    def tasks(self) -> int:
        """How many the network knows."""
        return len(reached(self.writer).descriptions)

    def matrices(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        a, b = reached(self.writer).value()[self.number]
        return a[0], b[0]

    def _own(self) -> Tensor:
        return reached(self.writer).layer_vectors

    def outputs(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.tasks == 1:
            return super().outputs(module, x, y)
        a, b = reached(self.writer).value()[self.number]
        ids = task_ids(y, len(a))
        # Of all tasks, which is little: a row's own is what is left of it.
        own = (ids[:, None] == torch.arange(len(a), device=ids.device)).repeat_interleave(self.r, dim=1)

        def change(x: Tensor, y: Tensor) -> Tensor:
            h = F.linear(x.to(a.dtype), a.flatten(0, 1))
            h = h * own.view(len(own), *[1] * (h.dim() - 2), -1).to(h)
            return (y + F.linear(h, b.transpose(0, 1).flatten(1)) * self.scaling).to(y.dtype)

        return in_full(change, a, x, y)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        a, b = reached(self.writer).value()[self.number]
        return (a[0], b[0]) if len(a) == 1 else None

    def merged(self, module: nn.Module) -> dict[str, Tensor] | None:
        return super().merged(module) if self.tasks == 1 else None

    def batch_key(self, module: nn.Module) -> Hashable | None:
        return super().batch_key(module) if self.tasks == 1 else None


@dataclass
class TextToLora(TargetedInLayers):
    """A hypernetwork that writes LoRA for tasks of what is said of them.

    With more than one task, rows say theirs: `tz.route(model, entries, context={"task_ids": (rows,)})`. Of a
    classifier's head there is one for all tasks.

    Args:
        descriptions: what each task is, in the order of the task_ids: texts, of which the frozen base makes vectors as
            :func:`tanzaku.describe` does; or vectors, as of a sentence encoder, all of one width; or texts by the names
            that rows have for their tasks, whose order is the ids'. The vectors are kept in the file. None: vectors of
            embedding_dim numbers are drawn, which tell tasks apart, and nothing can be written for others.
        tokenizer_name_or_path: what reads texts; None: the tokenizer beside the base's own weights.
        num_tasks: how many tasks there are; None: as many as descriptions, or one.
        r: rank of the change. lora_alpha: it is scaled by lora_alpha / r.
        embedding_dim: of what becomes of a description, and of the vectors of layers and kinds. hidden_dim: of z.
        description_dim: of the vectors of descriptions, which say it themselves.
    """

    name = "text_to_lora"
    peft_type = "TEXT_TO_LORA"
    paper = "arXiv 2506.06105"
    summary = "LoRA that one network writes for each task, of a vector of its description"
    about = About(
        where="query and value projections (of mixers in state-space layers): y + (alpha / r) B A x",
        parameters="hidden_dim r (in + out) a kind of module, embedding_dim (layers + kinds), and three small layers",
        cost="as LoRA, of rank r * tasks where there are several; and writing all of it once a pass",
        choose="for many tasks that can be described, some of which have few rows or none, for tz.write_lora",
        limits="needs many unlike tasks before it does well on others; merges for one task alone",
    )
    in_peft = False
    by_default = False
    mergeable = True
    writes = True
    nonzero = ("lora_alpha",)
    learning_rate = 1e-4  # the paper's 2.5e-5 is of a z sixteen times as wide, of which each number moves B
    # As LoRA's ranks, and a decade around the rate.
    space = spaces(r=Choice((2, 4, 8, 16)), learning_rate=Range(3e-5, 1e-3, log=True))

    descriptions: list[str] | dict[str, str] | list[list[float]] | None = None
    tokenizer_name_or_path: str | None = None
    num_tasks: int | None = None
    r: int = 8
    lora_alpha: float = 8
    embedding_dim: int = 64
    hidden_dim: int = 128
    description_dim: int | None = None

    def row_data(self) -> Mapping[str, int]:
        return {"task_ids": self.num_tasks} if self.num_tasks is not None and self.num_tasks > 1 else {}

    def task_names(self) -> list[str] | None:
        return sorted(self.descriptions) if isinstance(self.descriptions, dict) else None

    def to_peft(self, config: dict[str, Any]) -> dict[str, Any]:
        config = super().to_peft(config)
        return config if self.of_texts else {**config, "descriptions": None}  # vectors are a tensor of the file

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        given = self.descriptions
        self.require(given is None or len(given) > 0, f"descriptions={given}", "one for each task")
        self.num_tasks = self.num_tasks if self.num_tasks is not None else 1 if given is None else len(given)
        for key in ("num_tasks", "r", "embedding_dim", "hidden_dim"):
            self.require(getattr(self, key) > 0, f"{key}={getattr(self, key)}", "1 or more")
        if given is not None:
            found = f"num_tasks={self.num_tasks} and {len(given)} descriptions"
            self.require(len(given) == self.num_tasks, found, "one for each task")
        modules = self.find_fitting(place.base)
        like = weight_of(modules[0][1])
        writer = LoraWriter(self, self._vectors(place.base, like), modules, like)
        yield "", writer
        for number, (path, _) in enumerate(modules):
            yield path, WrittenDelta(writer, number, self.lora_alpha / self.r)

    def written(
        self, adapter: Attached, description: Any, tokenizer: Any
    ) -> tuple[Method, dict[str, dict[str, Tensor]]]:
        here = f"write_lora: {adapter.name!r} was trained"
        if self.description_dim is None:
            expected = "expected TextToLora(descriptions=[...])"
            raise TanzakuError(f"{here} without descriptions, so it cannot read one; {expected}")
        if isinstance(description, str):
            if not self.of_texts:
                raise TanzakuError(f"{here} on vectors, and found a text; expected a vector of the same encoder")
            read = tokenizer or self.reader(adapter.base)
            description = vectors_of(adapter.base, read, [description])[0]
        vector = torch.as_tensor(description)
        if vector.shape != (self.description_dim,) or not vector.isfinite().all():
            found = f"{tuple(vector.shape)} numbers" if vector.isfinite().all() else "a number that is not finite"
            raise TanzakuError(f"{here} on ({self.description_dim},) numbers, and found {found}; expected the former")
        layers = {path: layer for path, layer in adapter.at() if isinstance(layer, WrittenDelta)}
        writer = reached(next(iter(layers.values())).writer)
        pairs = writer.written(vector.to(writer.descriptions)[None])
        tensors = {
            path: {"lora_A.weight": pairs[layer.number][0][0], "lora_B.weight": pairs[layer.number][1][0]}
            for path, layer in layers.items()
        }
        return LoRA(r=self.r, lora_alpha=self.lora_alpha), tensors

    @property
    def of_texts(self) -> bool:
        """Whether its descriptions are texts, which the base reads."""
        return bool(self._texts())

    def _texts(self) -> list[str]:
        """The descriptions that are texts, in the order of the tasks."""
        given = self.descriptions
        if isinstance(given, dict):
            return [given[name] for name in sorted(given)]
        return [each for each in given or () if isinstance(each, str)]

    def _vectors(self, base: Base, like: Tensor) -> Tensor:
        """(tasks, width)"""
        tasks, texts, device = cast(int, self.num_tasks), self._texts(), home(like)
        if texts:
            width = base.hidden_size
        elif self.descriptions is not None:
            rows = cast("list[list[float]]", self.descriptions)
            widths = sorted({len(row) for row in rows})
            self.require(len(widths) == 1 and widths[0] > 0, f"descriptions of {widths} numbers", "one width for all")
            finite = all(math.isfinite(number) for row in rows for number in row)
            self.require(finite, "descriptions with a number that is none or infinite", "finite numbers")
            width = widths[0]
        elif self.description_dim is None:
            return trainable(tasks, self.embedding_dim, like=like, fill=lambda t: nn.init.normal_(t)).detach()
        else:
            self.require(self._to_fill, f"description_dim={self.description_dim}, and no descriptions", "some")
            width = self.description_dim
        fits = self.description_dim in (None, width)
        self.require(fits, f"description_dim={self.description_dim} for vectors of {width} numbers", str(width))
        self.description_dim = width
        out = trainable(tasks, width, like=like).detach()
        if not self._to_fill and out.device.type != "meta":
            if texts:
                found = vectors_of(base, self.reader(base), texts)
                self.require(found.shape[1] == width, f"hidden states of {found.shape[1]} numbers", str(width))
            else:
                found = torch.tensor(self.descriptions)
            out.copy_(found)
        return out.to(device)

    def reader(self, base: Base) -> Any:
        """The tokenizer that reads descriptions.

        Raises:
            TanzakuError: there is none where the settings, or the base, say.
        """
        from transformers import AutoTokenizer

        where = self.tokenizer_name_or_path or getattr(base.model, "name_or_path", "")
        self.require(bool(where), "descriptions and no tokenizer", "tokenizer_name_or_path, or vectors of tz.describe")
        try:
            return AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TanzakuError(
                f"{self.name}: {where!r} gives no tokenizer: {reason}; expected tokenizer_name_or_path, or vectors of "
                "tz.describe"
            ) from None
