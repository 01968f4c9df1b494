"""P-tuning: virtual tokens written by a small network.

    p = MLP(u)  or  p = MLP(BiLSTM(u)),  u in R^{n x h} and the network trained together

Once trained, only the vectors p are needed, and only they are saved, as in PEFT.

Liu et al. 2021, arXiv 2103.10385.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tanzaku.core.method import About, AdapterLayer, Place, TokenLayer, home
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.core.tokens import check_entrance
from tanzaku.methods.prompt_tuning import PromptLayer, PromptLearning
from tanzaku.models.families import weight_of
from tanzaku.support.refs import Ref


class EncodedPrompt(TokenLayer):
    """A prompt encoder: n input vectors and the network that turns them into virtual tokens."""

    def __init__(self, model: nn.Module, tokens: int, hidden: int, width: int, layers: int, dropout: float, kind: str):
        super().__init__()
        self.model = Ref(model)  # the encoder trains when the model does
        self.num_virtual_tokens = tokens
        self.embedding = nn.Embedding(tokens, hidden)
        self.lstm_head: nn.LSTM | None = None
        if kind == "LSTM":
            self.lstm_head = nn.LSTM(hidden, width, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(width * 2, width * 2), nn.ReLU(), nn.Linear(width * 2, hidden))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(hidden, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, hidden),
            )

    def vectors(self) -> Tensor:
        model = self.model()
        return self._encode(self.training if model is None else model.training)

    def _encode(self, training: bool) -> Tensor:
        x = self.embedding.weight
        if self.lstm_head is not None:
            x = self.lstm_head.train(training)(x[None])[0][0]
        encoded: Tensor = self.mlp_head(x)
        return encoded

    def export(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"prompt_embeddings": self._encode(training=False)}


@dataclass
class PTuning(PromptLearning):
    """P-tuning.

    Args:
        num_virtual_tokens: how many vectors are prepended.
        encoder_reparameterization_type: "MLP" or "LSTM". encoder_hidden_size: the network's width (None: the model's).
        encoder_num_layers, encoder_dropout: of the LSTM; the MLP always has two hidden layers.
    """

    name = "p_tuning"
    peft_type = "P_TUNING"
    paper = "arXiv 2103.10385"
    summary = "virtual tokens written by a small network"
    about = About(
        where="as prompt tuning, the vectors written by a small network in training",
        parameters="that network, while it trains; num_virtual_tokens * width in the file",
        cost="rows are longer by num_virtual_tokens",
        choose="where prompt tuning learns too slowly",
        limits="does not merge",
    )
    learning_rate = 1e-3  # HF PEFT's example of sequence classification.
    # PEFT's guide has 20 tokens at 1e-3; the network's weights take smaller steps than the vectors of a prompt.
    space = spaces(num_virtual_tokens=Choice((5, 10, 20, 50)), learning_rate=Range(1e-4, 5e-2, log=True))
    lengthens_rows = True

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        base = place.base
        check_entrance(base)
        self.check(base)
        kind = self.encoder_reparameterization_type.upper().rsplit(".", 1)[-1]
        self.require(kind in ("MLP", "LSTM"), f"encoder_reparameterization_type={kind!r}", "'MLP' or 'LSTM'")
        hidden = self.token_dim = base.embedding_size
        self.encoder_hidden_size = hidden if self.encoder_hidden_size is None else self.encoder_hidden_size
        self.require(self.encoder_hidden_size > 0, f"encoder_hidden_size={self.encoder_hidden_size}", "1 or more")
        self.require(self.encoder_num_layers > 0, f"encoder_num_layers={self.encoder_num_layers}", "1 or more")
        like = weight_of(base.embedding)
        if self.inference_mode:
            yield (
                "",
                PromptLayer(nn.Parameter(torch.zeros(self.num_virtual_tokens, hidden, device=home(like)))),
            )
            return
        with torch.device(home(like)):
            yield (
                "",
                EncodedPrompt(
                    base.model,
                    self.num_virtual_tokens,
                    hidden,
                    self.encoder_hidden_size,
                    self.encoder_num_layers,
                    self.encoder_dropout,
                    kind,
                ),
            )
