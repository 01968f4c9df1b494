"""HF PEFT as the oracle: its adapters on copies of tiny models, and what both sides say of one batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tanzaku as tz
from models import VOCAB, batch, tiny

CONFIGS: dict[str, type[peft.PeftConfig]] = {
    "lora": peft.LoraConfig,
    "adalora": peft.AdaLoraConfig,
    "prompt_tuning": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "prefix_tuning": peft.PrefixTuningConfig,
    "cartridge": peft.CartridgeConfig,
    "ia3": peft.IA3Config,
    "llama_adapter": peft.AdaptionPromptConfig,
    "ln_tuning": peft.LNTuningConfig,
    "trainable_tokens": peft.TrainableTokensConfig,
    "loha": peft.LoHaConfig,
    "lokr": peft.LoKrConfig,
    "vera": peft.VeraConfig,
    "pvera": peft.PveraConfig,
    "oft": peft.OFTConfig,
    "hra": peft.HRAConfig,
    "fourierft": peft.FourierFTConfig,
    "c3a": peft.C3AConfig,
    "boft": peft.BOFTConfig,
    "miss": peft.MissConfig,
    "shira": peft.ShiraConfig,
    "hira": peft.HiraConfig,
    "randlora": peft.RandLoraConfig,
    "road": peft.RoadConfig,
    "waveft": peft.WaveFTConfig,
    "gralora": peft.GraloraConfig,
    "delora": peft.DeloraConfig,
    "vblora": peft.VBLoRAConfig,
    "tinylora": peft.TinyLoraConfig,
    "psoft": peft.PsoftConfig,
    "unilora": peft.UniLoraConfig,
    "supertuning": peft.SupertuningConfig,
    "peanut": peft.PeanutConfig,
    "deft": peft.DeftConfig,
    "beft": peft.BeftConfig,
    "glora": peft.GloraConfig,
}

# One plain choice of settings a method; PEFT asks AdaLoRA for the number of steps, and LLaMA-Adapter for its sizes.
PLAIN: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "adalora": {"init_r": 2, "target_r": 1, "total_step": 10},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 24},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "cartridge": {"num_virtual_tokens": 3},
    "ia3": {},
    "llama_adapter": {"adapter_layers": 1, "adapter_len": 4},
    "ln_tuning": {},
    "trainable_tokens": {"token_indices": [*range(3, VOCAB, 2)]},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "vera": {"r": 6},
    "pvera": {"r": 6},
    "oft": {"oft_block_size": 8},
    "hra": {"r": 4},
    "fourierft": {"n_frequency": 40},
    "c3a": {"block_size": 8},
    "boft": {},
    "miss": {"r": 4},
    "shira": {"r": 2},
    "hira": {"r": 2},
    "randlora": {"r": 8, "randlora_alpha": 8},
    "road": {"group_size": 8},
    "waveft": {"n_frequency": 40, "scaling": 5.0},  # PEFT's 25 makes much of a rounding in a tiny model
    "gralora": {"r": 4, "alpha": 4},
    "delora": {"r": 2},
    "vblora": {"r": 2, "vector_length": 8, "num_vectors": 6, "init_vector_bank_bound": 1.0},
    "tinylora": {"u": 3},
    "psoft": {"r": 4},
    "unilora": {"r": 2, "theta_d_length": 16, "init_weights": False},
    "supertuning": {"sparsity": 0.9},
    "peanut": {"r": 4},
    "deft": {"r": 2},
    "beft": {},
    "glora": {"r": 2},
}
SOFT_PROMPTS = ("prompt_tuning", "p_tuning")
PREFIXES = ("prefix_tuning", "cartridge")
PROMPT_LEARNING = (*SOFT_PROMPTS, *PREFIXES)
NO_CONV1D = (
    *("loha", "lokr", "oft", "hra", "c3a", "boft", "miss", "shira", "road", "delora"),
    *("psoft", "supertuning", "peanut", "beft", "glora"),
)
SHARED = ("vblora_vector_bank", "tinylora_v", "unilora_theta_d")


def in_reach(kind: str, name: str) -> bool:
    """Whether PEFT has the method on a family: some know no Conv1D, and LLaMA-Adapter only some attention."""
    if name == "llama_adapter":
        return kind in ("llama", "mistral", "gpt2")
    if name == "ln_tuning" and kind in ("bert", "opt", "roberta"):
        return False  # PEFT has no default targets there
    return kind != "gpt2" or name not in NO_CONV1D


def task_of(model: PreTrainedModel) -> str | None:
    """PEFT's name of the model's task."""
    kind = type(model).__name__
    for end, task in {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }.items():
        if kind.endswith(end):
            return task
    if kind.endswith("ForImageClassification"):
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def config(model: PreTrainedModel, name: str, settings: dict[str, Any]) -> peft.PeftConfig:
    """PEFT's configuration of a method: the same names, with the same values."""
    return CONFIGS[name](**copy.deepcopy(settings), task_type=task_of(model))


def method(name: str, settings: dict[str, Any]) -> tz.Method:
    return tz.METHODS[name].from_settings(copy.deepcopy(settings))


def in_peft(model: PreTrainedModel, name: str, settings: dict[str, Any]) -> peft.PeftModel:
    """A PEFT adapter on its own copy of `model`; what it trains is moved away from where it starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config(model, name, settings)).eval()
    scatter([p for p in wrapped.parameters() if p.requires_grad])
    return wrapped


@torch.no_grad()
def scatter(parameters: list[nn.Parameter], scale: float = 0.2, seed: int = 1) -> None:
    """Add noise, so that nothing is at zero or at one, where a wrong formula could hide."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def both(
    kind: str, head: str, name: str, folder: Path, settings: dict[str, Any] | None = None, **overrides: Any
) -> tuple[PreTrainedModel, peft.PeftModel]:
    """A base with an adapter active, and PEFT's model that the adapter came from, through a file in `folder`."""
    base = tiny(kind, head, **overrides)
    theirs = in_peft(base, name, PLAIN[name] if settings is None else settings)
    theirs.save_pretrained(folder)
    tz.load(base, folder, "a")
    tz.activate(base, "a")
    return base, theirs


def whole_rows(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch without padding, and the mask that says so."""
    made = batch(model, padding=None)
    return {**made, "attention_mask": torch.ones_like(made["input_ids"])}


def reopened(model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """What PEFT reads from `folder`, on its own copy of `model`."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def inputs(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """A padded batch, but for soft prompts on classifiers: there PEFT pools at the padding."""
    whole = name in SOFT_PROMPTS and task_of(model) == "SEQ_CLS"
    return whole_rows(model) if whole else batch(model, padding="right")


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Logits, a language model's at its rows' own tokens: PEFT's has more of them, and at padding any will do."""
    out: Tensor = model(**given).logits
    if out.dim() == 3 and "decoder_input_ids" not in given:
        out = out[:, -given["input_ids"].shape[1] :][given["attention_mask"].bool()]
    return out


def loss_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """A loss that both sides compute alike: every logit counts, with a weight of its own."""
    out = logits(model, given)
    weights = torch.linspace(-1, 1, out.shape[-1]).roll(1)
    return (out.float().log_softmax(-1) * weights).mean()


def train(model: PreTrainedModel, adapter: tz.Adapter, given: dict[str, Tensor], steps: int = 2) -> None:
    """A few steps of AdamW as Tanzaku's own loop takes them: the first opens gates that start at zero."""
    tz.activate(model, adapter.name)
    trained = [p for _, p in adapter.trained()]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    adapter.method.prepare(adapter, steps)
    for step in range(1, steps + 1):
        loss = loss_of(model, given)
        penalty = adapter.method.penalty(adapter)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        adapter.method.after_step(adapter, step)
        optimizer.zero_grad()


def our_name(name: str) -> str:
    """A parameter's name in Tanzaku, from its name in a PEFT model."""
    for piece in ("base_model.model.", "base_model.", "prompt_encoder.default.", "modules_to_save.default."):
        name = name.replace(piece, "")
    name = name.replace(".default", "")
    # What layers share has there the name of the first of them.
    shared = next(
        (each for each in ("vblora_vector_bank", "tinylora_v", "unilora_theta_d") if f".{each}" in name), None
    )
    return name if shared is None else name[name.index(shared) :]


def trained_in_peft(model: peft.PeftModel) -> dict[str, nn.Parameter]:
    """What PEFT trains, by Tanzaku's names."""
    return {our_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def trained_in_tanzaku(adapter: tz.Adapter) -> dict[str, nn.Parameter]:
    """What Tanzaku trains, by name. A whole prompt lies at the model, or at its first attention layer."""
    named = dict(adapter.trained())
    if adapter.method.name == "prompt_tuning":
        named["embedding.weight"] = named.pop("prompt_embeddings")
    if adapter.method.name == "prefix_tuning":
        site = f"{adapter.paths[0]}."
        named = {name.removeprefix(site): p for name, p in named.items()}
    return named


@torch.no_grad()
def copy_trained(adapter: tz.Adapter, model: peft.PeftModel) -> None:
    """Give PEFT's adapter the weights of Tanzaku's. Neither may train what the other does not."""
    ours, theirs = trained_in_tanzaku(adapter), trained_in_peft(model)
    assert ours.keys() == theirs.keys()
    for key, parameter in theirs.items():
        parameter.copy_(ours[key])
