"""P-tuning v2: deep prompts, that is learned keys and values at every attention layer, and no network that writes them.

    attention(q, [p_k; k], [p_v; v]),  p_k and p_v of each layer trained directly

It is prefix tuning as its authors use it for understanding: on models of all sizes, encoders above all, with a
classifier's own head, a prompt whose length depends on the task, and no reparameterisation by default. Its files are
those of prefix tuning, which HF PEFT reads.

Liu et al. 2021, arXiv 2110.07602.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tanzaku.core.method import About, AdapterLayer, Place
from tanzaku.core.space import Choice, Range, spaces
from tanzaku.methods.prefix_tuning import PrefixTuning


@dataclass
class PTuningV2(PrefixTuning):
    """Deep prompts.

    Args:
        num_virtual_tokens: their length at each layer: short for simple classification, longer for tagging.
        init_weights, prefix_init_text, tokenizer_name_or_path: see `PrefixTuning`.
    """

    name = "p_tuning_v2"
    paper = "arXiv 2110.07602"
    summary = "deep prompts at every layer, trained directly"
    about = About(
        where="keys and values in front of every attention layer",
        parameters="2 * layers * num_virtual_tokens * key width",
        cost="attention over num_virtual_tokens more keys",
        choose="for classification and tagging by encoders of any size",
        limits="not for layers without attention; does not merge",
    )
    by_default = False
    learning_rate = 7e-3  # In the middle of the authors' scripts for SuperGLUE, 5e-3 to 2e-2.
    # The paper: lengths below 20 for simple classification and about 100 for tagging; the scripts' rates and around.
    space = spaces(num_virtual_tokens=Choice((5, 20, 50, 100)), learning_rate=Range(1e-3, 3e-2, log=True))

    num_virtual_tokens: int = 20

    def build(self, place: Place) -> Iterator[tuple[str, AdapterLayer]]:
        self.require(not self.prefix_projection, "prefix_projection", "prefix_tuning, which has it")
        yield from super().build(place)
