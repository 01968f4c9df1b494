"""Virtual tokens and prefixes of a wrapped model, and what a causal language model learns of them."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from tanzaku.compat.peft.config import CPTConfig
from tanzaku.compat.peft.wrapped import Wrapped
from tanzaku.core import layout
from tanzaku.core.method import TokenLayer
from tanzaku.errors import TanzakuError
from tanzaku.methods.cpt import Context
from tanzaku.methods.prefix_tuning import PrefixLayer


class Prompting(Wrapped):
    """A wrapped model whose adapters may have virtual tokens."""

    reads_on: ClassVar[bool] = False  # whether each token foretells the next one

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """What makes the virtual tokens or the prefix, by adapter."""
        found = self._prompts()
        if found is None:
            raise AttributeError(f"{type(self).__name__} has no prompt_encoder: no adapter of it has virtual tokens")
        return found

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """The numbers of the virtual tokens, by adapter."""
        prompts = {n: cast(Any, c) for n, c in self.peft_config.items() if c.is_prompt_learning}
        return {n: torch.arange(c.num_virtual_tokens * (c.num_transformer_submodules or 1)) for n, c in prompts.items()}

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The vectors of a prompt, or a prefix's keys and values in one row a virtual token, as files have them."""
        exported = [
            tensors["prompt_embeddings"]
            for _, layer in self._manager.get(adapter_name).at()
            if "prompt_embeddings" in (tensors := layer.export())
        ]
        if not exported:
            raise TanzakuError(f"{adapter_name!r} has no virtual tokens")
        return exported[0].detach().cpu()

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The active prompt for so many rows: (rows, tokens, hidden), or for a prefix a cache of keys and values."""
        adapter_layers = [layer for _, layer in self._manager.get(self.active_adapters[0]).at()]
        for layer in adapter_layers:
            if isinstance(layer, TokenLayer):
                return layer.vectors().expand(batch_size, -1, -1)
        layers = [layer for layer in adapter_layers if isinstance(layer, PrefixLayer)]
        if not layers:
            raise TanzakuError(f"{self.active_adapters[0]!r} has no virtual tokens")
        pairs = [tuple(x.expand(batch_size, -1, -1, -1) for x in layer.keys_values()) for layer in layers]
        return DynamicCache(pairs)

    def _prompt_to_learn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayer | None:
        """The virtual tokens of the active adapter, where their last one is to say a text's first token."""
        if not self.reads_on or self._adapters_disabled or len(self.active_adapters) != 1:
            return None
        given = self._by_name(args, kwargs)
        if given.get("labels") is None or given.get("past_key_values") is not None:
            return None
        layers = [
            layer for _, layer in self._manager.get(self.active_adapters[0]).at() if isinstance(layer, TokenLayer)
        ]
        return layers[0] if layers else None

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = inspect.signature(self.get_base_model().forward).parameters
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _learn(self, prompt: TokenLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A pass of a causal language model with labels: as in PEFT, the loss has also the first token, which only a
        virtual one foretells. So they are in the rows that the base is given. Logits are those of the row's own tokens.
        """
        base: Any = self.get_base_model()
        given = self._by_name(args, kwargs)
        if given.pop("position_ids", None) is not None:
            warnings.warn("position_ids have no effect with virtual tokens: text is numbered behind them", stacklevel=3)
        ids, own, mask = (given.pop(key, None) for key in ("input_ids", "inputs_embeds", "attention_mask"))
        own = base.get_input_embeddings()(ids) if own is None else own
        rows, length = own.shape[:2]
        if isinstance(prompt, Context):
            prompt.project()  # as in PEFT, where a program's own loop has no other place for it
        vectors = prompt.vectors().to(own.dtype)
        n = len(vectors)
        # Virtual tokens stand before a row's first token also where padding is on the left.
        lay = layout.in_front([n] * rows, mask, length, own.device)
        given["inputs_embeds"] = lay.join(vectors.expand(rows, -1, -1), own)
        if mask is not None:
            given["attention_mask"] = lay.join(mask.new_ones(rows, n), mask)
        labels = given["labels"] = lay.join(given["labels"].new_full((rows, n), -100), given["labels"])
        kinds = given.pop("input_type_mask", None)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = lay.join(ids.new_zeros(rows, n), given["token_type_ids"])
        with self._manager.without(self.active_adapters[0], prompt):
            out = base(**given)
        if isinstance(prompt, Context):
            kinds = labels.new_full((rows, length), 4) if kinds is None else kinds.to(labels)
            out.loss = self._with_answers(out.logits, labels, kinds, lay)
        if getattr(out, "logits", None) is not None:
            out.logits = out.logits[:, n:] if lay.back is None else layout.take(out.logits, lay.back)
        return self._with_penalty(out)

    def _with_answers(self, logits: Tensor, labels: Tensor, kinds: Tensor, lay: layout.Layout) -> Tensor:
        """The loss of CPT, over the answers in the context and the rows' own labels: the mean of what each token's
        counts.

        Args:
            labels: (rows, columns), of the context all -100. kinds: (rows, length), the rows' own `input_type_mask`.
        """
        config = cast(CPTConfig, self.active_peft_config)
        of_context = labels.new_tensor(config.cpt_tokens_type_mask).expand(len(labels), -1)
        ids = labels.new_tensor(config.cpt_token_ids).expand_as(of_context)
        # The context stands in the first columns of all rows, where nothing foretells its own first token.
        labels = torch.cat([ids, labels[:, ids.shape[1] :]], dim=1)[:, 1:]
        types = lay.join(of_context, kinds + (kinds > 0) * of_context.max())[:, 1:]
        answer = (types > 0) & (types % 4 == 0)
        labels = labels.masked_fill(~answer, -100)
        weights = torch.ones_like(labels, dtype=torch.float32)
        if config.opt_weighted_loss_type == "decay":
            for row, kind in enumerate(types):
                for back, each in enumerate(reversed(kind[answer[row]].unique().tolist())):
                    weights[row, kind == each] = config.opt_loss_decay_factor**back
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
        return (losses * weights)[labels != -100].mean()
