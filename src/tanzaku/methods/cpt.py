"""Context-aware prompt tuning: examples in front of the text, whose embedded tokens may move a little.

    input = [e(c_1) + d_1 ... e(c_n) + d_n, e(x_1) ... e(x_T)],  d trained, |d_i| <= radius of c_i's kind

The context c is a few examples with their answers. What an answer's token says stays as it is; those of the examples'
inputs and of the format around them move within a ball. A language model also learns the answers in the context, as the
rows' own: the later an example, the more it may count.

Blau et al. 2024, arXiv 2410.17222.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanzaku.core.manager import manager_of
from tanzaku.core.method import About, AdapterLayer, Attached, Place, TokenLayer, trainable
from tanzaku.core.space import Range, spaces
from tanzaku.core.tokens import check_entrance, without_cache
from tanzaku.methods.prompt_tuning import PromptLearning
from tanzaku.models.families import Base, weight_of

_KINDS = 4  # of an example's tokens, by the type's remainder: 1 and 3 format, 2 input, 0 the answer


class Context(TokenLayer):
    """Embedded tokens of a context, and what each is moved by.

    Args:
        start: (tokens, width) as they are embedded.
        radius: (tokens,) how far each may move; 0 for those that stay.
    """

    def __init__(self, start: Tensor, radius: Tensor):
        super().__init__()
        n, width = start.shape
        self.num_virtual_tokens = n
        self.embedding = nn.Embedding(n, width, _weight=start, _freeze=True)
        self.delta_embedding = nn.Embedding(n, width, _weight=torch.zeros_like(start))
        self.register_buffer("radius", radius.to(start.device)[:, None], persistent=False)

    radius: Tensor

    @torch.no_grad()
    def within(self) -> Tensor:
        """The nearest moves within the balls, (tokens, width)."""
        moved = self.delta_embedding.weight
        length = moved.norm(dim=1, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
        nearest: Tensor = moved * (self.radius / length).clamp(max=1)
        return nearest

    @torch.no_grad()
    def project(self) -> None:
        """Bring the moves back into the balls."""
        self.delta_embedding.weight.copy_(self.within())

    def vectors(self) -> Tensor:
        # Projected gradient descent: the gradient is that at the projected point, and none of a token that stays.
        moved: Tensor = self.delta_embedding.weight * (self.radius > 0)
        return self.embedding.weight + moved + (self.within() - moved).detach()

    def export(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.vectors().detach()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        # As in HF PEFT, a file has where the tokens were moved to, and training goes on from there.
        with torch.no_grad():
            self.embedding.weight.copy_(tensors["prompt_embeddings"])
            self.delta_embedding.weight.zero_()


@dataclass
class CPT(PromptLearning):
    """Context-aware prompt tuning. :meth:`from_examples` makes the settings of texts.

    In front of a causal language model the answers of the context are learnt, too (:meth:`penalty`). A model with
    another head has nothing to say them with: there it is prompt tuning that starts from the context and stays near it.

    Args:
        cpt_token_ids: the context's tokens. num_virtual_tokens is their number, and need not be said.
        cpt_tokens_type_mask: what each is: of example i, from 0, 4 i + 1 stands for the format before the input and
            4 i + 2 for the input, 4 i + 3 for the format before the answer and 4 i + 4 for the answer; 0 stays as an
            answer does, and is not learnt. None: all are format.
        cpt_mask: of as many numbers. HF PEFT's files have it, where nothing reads it either.
        opt_weighted_loss_type: "decay" multiplies what the last answer of the context counts by opt_loss_decay_factor,
            the one before by its square, and so on; with "none" each counts as a row does.
        opt_projection_epsilon, opt_projection_format_epsilon: how far tokens of an input and of the format may move,
            by length, where vectors have 2048 numbers; with fewer or more, times the root of their share.
        tokenizer_name_or_path: which tokenizer the ids are of, for whoever reads the file.
    """

    name = "cpt"
    peft_type = "CPT"
    paper = "arXiv 2410.17222"
    summary = "examples in front of the text, whose vectors are moved a little"
    about = About(
        where="vectors in front of the text at the embedding, from examples",
        parameters="width a token of the context",
        cost="rows are longer by the context; a language model reads the context once more a step",
        choose="with few rows, where examples in the prompt already help",
        limits="wants a context; its answers are learnt by causal language models alone; does not merge",
    )
    by_default = False
    lengthens_rows = True
    learning_rate = 1e-4  # HF PEFT's example.
    # A ball of radius 0.1 is left after some 20 steps of AdamW by 1e-4, at any width. PEFT's example has 0.2 and 0.1.
    space = spaces(
        opt_projection_epsilon=Range(1e-2, 1.0, log=True),
        learning_rate=Range(1e-5, 1e-2, log=True),
    )

    num_virtual_tokens: int = 0
    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        # Before it is built, too: what a row takes in memory depends on it.
        if self.num_virtual_tokens == 0 and isinstance(self.cpt_token_ids, list):
            self.num_virtual_tokens = len(self.cpt_token_ids)

    @classmethod
    def from_examples(cls, examples: Sequence[Sequence[str]], tokenizer: Any, **settings: Any) -> CPT:
        """Settings for a context of texts.

        Args:
            examples: of each four texts, as format, input, format and answer: ("Poem: ", poem, " Season: ", "autumn").
            tokenizer: the model's own, which reads them one by one, without special tokens.
            settings: the others.

        Raises:
            TanzakuError: an example of other than four texts.
        """
        ids: list[int] = []
        types: list[int] = []
        for number, texts in enumerate(examples):
            found = texts if isinstance(texts, str) else list(texts)
            if isinstance(texts, str) or len(found) != _KINDS:
                cls().require(False, f"example {found!r}", "four texts: format, input, format, answer")
            for kind, text in enumerate(found, 1):
                read = list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
                ids += read
                types += [_KINDS * number + kind] * len(read)
        return cls(cpt_token_ids=ids, cpt_mask=[1] * len(ids), cpt_tokens_type_mask=types, **settings)

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        check_entrance(base)
        ids = self.cpt_token_ids or []
        self.require(bool(ids), "no cpt_token_ids", "the tokens of a context, as CPT.from_examples has them")
        n = self.num_virtual_tokens
        self.require(
            n == len(ids), f"num_virtual_tokens={n} with {len(ids)} cpt_token_ids", f"{len(ids)}, or none said"
        )
        self.check(base)
        size = base.vocab_size
        self.require(
            all(0 <= each < size for each in ids), f"cpt_token_ids from {min(ids)} to {max(ids)}", f"0 to {size - 1}"
        )
        self.token_dim = base.embedding_size
        self.cpt_mask = [1] * n if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = [1] * n if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        for key in ("cpt_mask", "cpt_tokens_type_mask"):
            found = len(getattr(self, key))
            self.require(found == n, f"{found} numbers in {key}", f"{n}, one for each of cpt_token_ids")
        radius = self._radius(self.token_dim)
        table = base.embedding
        start = trainable(n, self.token_dim, like=weight_of(table)).detach()
        if not start.is_meta:
            with torch.no_grad():
                start.copy_(table(torch.tensor(ids, device=start.device)))
        yield "", Context(start, radius)

    def _radius(self, width: int) -> Tensor:
        """(tokens,) how far each may move."""
        types = cast("list[int]", self.cpt_tokens_type_mask)
        self.require(min(types) >= 0, f"{min(types)} in cpt_tokens_type_mask", "0 or more")
        for key in ("opt_projection_epsilon", "opt_projection_format_epsilon"):
            self.require(getattr(self, key) >= 0, f"{key}={getattr(self, key)}", "0 or more")
        of_format, of_input = self.opt_projection_format_epsilon, self.opt_projection_epsilon
        far = [(0.0, of_format, of_input, of_format)[each % _KINDS] for each in types]
        if not self._to_fill:
            self.require(max(far) > 0, "a context of which no token may move", "tokens of types 1 to 3, and a radius")
        return torch.tensor(far) * math.sqrt(width / 2048)

    def answers(self) -> list[tuple[float, list[int]]]:
        """Of each answer in the context, what it counts and where its tokens are, but for the context's first token,
        which nothing foretells."""
        at: dict[int, list[int]] = {}
        for place, kind in enumerate(self.cpt_tokens_type_mask or []):
            if place and kind and kind % _KINDS == 0:
                at.setdefault(kind, []).append(place)
        factor = self.opt_loss_decay_factor if self.opt_weighted_loss_type == "decay" else 1.0
        return [(factor**back, at[kind]) for back, kind in enumerate(sorted(at, reverse=True), 1)]

    def penalty(self, adapter: Attached) -> Tensor | None:
        """The weighted sum of the losses of the context's answers, where the model is a causal language model.

        No token of the context sees the text behind it: so one pass of the context alone has the loss that it has
        before every row. Each answer's is the mean over its tokens. With the mean loss of rows whose answers have as
        many tokens, this is HF PEFT's loss but for a constant factor.
        """
        answers = self.answers()
        base = adapter.base
        if not answers or not any(weight for weight, _ in answers) or not says_next_tokens(base):
            return None
        layer = next(layer for _, layer in adapter.at() if isinstance(layer, Context))
        with manager_of(base.model).without(adapter.name, layer):
            vectors = layer.vectors()[None].to(weight_of(base.embedding).dtype)
            scores = base.model(inputs_embeds=vectors, **without_cache(base)).logits[0, :-1]
        ids = torch.tensor(self.cpt_token_ids, device=scores.device)
        losses = F.cross_entropy(scores.float(), ids[1:], reduction="none")
        return torch.stack([weight * losses[[each - 1 for each in at]].mean() for weight, at in answers]).sum()

    def after_step(self, adapter: Attached, step: int) -> None:
        for _, layer in adapter.at():
            if isinstance(layer, Context):
                layer.project()


def says_next_tokens(base: Base) -> bool:
    """Whether a model is a causal language model: no token of its sees a later one, and each foretells the next."""
    causal = not base.encoder_decoder and any(getattr(m, "is_causal", False) is True for _, m in base.attention())
    return causal and type(base.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
