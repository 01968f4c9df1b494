"""What a checkpoint does not bring (a task's head, a pooler, cross-attention) is trained, saved, and comes back."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import tanzaku as tz
from close import assert_close, close
from models import NEEDED, attach, config_of, lively
from tanzaku.core.weights import copied_in
from tanzaku.methods import METHODS
from tanzaku.models import tree
from tanzaku.models.heads import heads_of
from tanzaku.storage.store import META
from tiers import costly

TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SOUND = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [16],
    "conv_kernel": [8],
    "conv_stride": [4],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 1,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "tdnn_dim": [16, 16],
    "tdnn_kernel": [3, 3],
    "tdnn_dilation": [1, 1],
    "xvector_output_dim": 16,
    "classifier_proj_size": 16,
}
PIXELS = {**TEXT, "image_size": 32, "patch_size": 8}
SEGFORMER = {
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
PERCEIVER = {**TEXT, "d_model": 32, "num_latents": 4, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 1}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}


def ids(rows: int, *shape: int) -> dict[str, Tensor]:
    found = torch.randint(5, 100, (rows, *shape, 7), generator=torch.Generator().manual_seed(1))
    found[..., -1] = 2  # the end of a text, which some pool
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


def choices(rows: int) -> dict[str, Tensor]:
    return ids(rows, 2)


def pixels(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def sound(rows: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(rows, 400, generator=torch.Generator().manual_seed(1))}


@dataclass
class Task:
    """A class for a task, the class of the checkpoint that it is loaded from, and the paths of what that one lacks."""

    kind: str
    auto: str
    of: str
    parts: list[str]
    settings: dict[str, Any] = field(default_factory=lambda: TEXT)
    inputs: Callable[[int], dict[str, Tensor]] = ids
    targets: Any = "all-linear"
    more: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.kind, **{**self.settings, **self.more})
        model = getattr(transformers, self.of).from_config(config)
        lively(model)
        model.save_pretrained(folder)

    def load(self, folder: Path, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        labels = 2 if "Question" in self.auto else 3
        return getattr(transformers, self.auto).from_pretrained(folder, num_labels=labels).eval()


MLM = "AutoModelForMaskedLM"
TASKS = {
    "bert": Task("bert", "AutoModelForSequenceClassification", MLM, ["bert.pooler", "classifier"]),
    "bert-tokens": Task("bert", "AutoModelForTokenClassification", MLM, ["classifier"]),
    "bert-questions": Task("bert", "AutoModelForQuestionAnswering", MLM, ["qa_outputs"]),
    "bert-choices": Task(
        "bert", "AutoModelForMultipleChoice", MLM, ["bert.pooler", "classifier"], inputs=choices, more={"num_labels": 2}
    ),
    "bert-next": Task("bert", "AutoModelForNextSentencePrediction", MLM, ["bert.pooler", "cls"]),
    "bert-pooled": Task("bert", "AutoModelForSequenceClassification", "AutoModel", ["classifier"]),
    "deberta": Task(
        "deberta-v2", "AutoModelForSequenceClassification", MLM, ["pooler", "classifier"], more=DISENTANGLED
    ),
    "distilbert": Task(
        "distilbert",
        "AutoModelForSequenceClassification",
        MLM,
        ["pre_classifier", "classifier"],
        {"vocab_size": 120, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "electra-choices": Task(
        "electra", "AutoModelForMultipleChoice", "AutoModel", ["sequence_summary", "classifier"], inputs=choices
    ),
    "modernbert": Task("modernbert", "AutoModelForSequenceClassification", "AutoModel", ["head", "classifier"]),
    "flaubert": Task(
        "flaubert",
        "AutoModelForSequenceClassification",
        "AutoModel",
        ["sequence_summary"],
        {"n_words": 120, "vocab_size": 120, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 0},
    ),
    "perceiver": Task("perceiver", "AutoModelForSequenceClassification", MLM, ["perceiver.decoder"], PERCEIVER),
    "llama": Task("llama", "AutoModelForSequenceClassification", "AutoModelForCausalLM", ["score"]),
    "llama-tokens": Task("llama", "AutoModelForTokenClassification", "AutoModelForCausalLM", ["score"]),
    "llama-questions": Task("llama", "AutoModelForQuestionAnswering", "AutoModel", ["qa_outputs"]),
    "t5-tokens": Task(
        "t5",
        "AutoModelForTokenClassification",
        "AutoModelForSeq2SeqLM",
        ["classifier"],
        {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "vit": Task("vit", "AutoModelForImageClassification", "AutoModel", ["classifier"], PIXELS, pixels),
    "wav2vec2": Task(
        "wav2vec2", "AutoModelForAudioClassification", "AutoModel", ["projector", "classifier"], SOUND, sound
    ),
    "wav2vec2-frames": Task(
        "wav2vec2", "AutoModelForAudioFrameClassification", "AutoModel", ["classifier"], SOUND, sound
    ),
    "wav2vec2-speakers": Task(
        "wav2vec2",
        "AutoModelForAudioXVector",
        "AutoModel",
        ["projector", "tdnn.0", "tdnn.1", "feature_extractor", "classifier", "objective"],
        SOUND,
        sound,
    ),
    "wav2vec2-letters": Task("wav2vec2", "AutoModelForCTC", "AutoModel", ["lm_head"], SOUND, sound),
    "yolos": Task(
        "yolos",
        "AutoModelForObjectDetection",
        "AutoModel",
        ["class_labels_classifier", "bbox_predictor"],
        {**PIXELS, "image_size": [32, 32], "num_detection_tokens": 3},
        pixels,
    ),
    "segformer": Task("segformer", "AutoModelForSemanticSegmentation", "AutoModel", ["decode_head"], SEGFORMER, pixels),
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def numbers(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All that a model computes of each row."""
    out = model(**inputs)
    rows = len(next(iter(inputs.values())))
    found = [value for value in out.values() if isinstance(value, Tensor) and value.dim() and len(value) % rows == 0]
    assert found
    return found


def differing(one: nn.Module, other: nn.Module) -> set[str]:
    """Names of the parameters that two loads of one checkpoint draw differently."""
    theirs = dict(tree.named_parameters(other, remove_duplicate=False))
    return {n for n, p in tree.named_parameters(one, remove_duplicate=False) if not torch.equal(p, theirs[n])}


@torch.no_grad()
def stirred(adapter: tz.Adapter) -> tz.Adapter:
    generator = torch.Generator().manual_seed(3)
    for _, parameter in adapter.trained():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


@torch.no_grad()
def assert_comes_back(task: Task, method: tz.Method, tmp_path: Path) -> None:
    """Saved and loaded into another load of the same checkpoint, an adapter computes the same numbers."""
    task.write(tmp_path / "base")
    first, second = task.load(tmp_path / "base", 1), task.load(tmp_path / "base", 2)
    random, inputs = differing(first, second), task.inputs(4)
    assert random, "both loads are alike, so nothing is tested"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapter = stirred(attach(first, method, "a", seed=0))
    assert random <= copied_in(adapter.at())
    with tz.route(first, ["a"]):
        expected = numbers(first, inputs)
    tz.save(first, "a", tmp_path / "a")
    loaded = tz.load(second, tmp_path / "a", "b")
    assert [n for n, _ in loaded.trained()] == [n for n, _ in adapter.trained()] or method.name == "p_tuning"
    with tz.route(second, ["b"]):
        found = numbers(second, inputs)
    bare = numbers(second, inputs)
    assert any(not close(a, b) for a, b in zip(bare, expected, strict=True))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    if method.shares_batch:
        with tz.route(second, ["b", None] * 2):
            mixed = numbers(second, inputs)
        for a, b, c in zip(mixed, expected, bare, strict=True):
            times = len(a) // 4
            rows = torch.tensor([True, False] * 2).repeat_interleave(times)
            assert_close(a[rows], b[rows])
            assert_close(a[~rows], c[~rows])


@each_task
def test_a_fresh_part_is_saved_and_comes_back(task, tmp_path):
    assert_comes_back(task, tz.LoRA(r=2, target_modules=task.targets), tmp_path)


@each_task
def test_exactly_the_fresh_parts_are_trained(task, tmp_path):
    """No more is copied than transformers says that the checkpoint lacks."""
    task.write(tmp_path)
    torch.manual_seed(1)
    model, info = getattr(transformers, task.auto).from_pretrained(tmp_path, num_labels=2, output_loading_info=True)
    parts = heads_of(model)
    assert sorted(part.path for part in parts) == sorted(task.parts)
    assert {name for part in parts for name in part.parameters} == info["missing_keys"] & {
        name for name, _ in model.named_parameters()
    }
    adapter = tz.attach(model, tz.LoRA(r=2, target_modules=task.targets), "a", seed=0)
    trained = {name for name, _ in adapter.trained() if ".lora_" not in name}
    assert trained == {name for part in parts for name in part.parameters}
    assert not any(
        path == p or path.startswith(f"{p}.")
        for p in task.parts
        for path, s in adapter.at()
        if s.export() and "lora_A.weight" in s.export()
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "adalora": {"init_r": 3, "target_r": 2},
    "ia3": {},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "p_tuning_v2": {"num_virtual_tokens": 3},
    "cartridge": {"num_virtual_tokens": 3},
    "multitask_prompt_tuning": {"num_virtual_tokens": 3},
    **NEEDED,
    "bottleneck": {},
    "compacter": {"reduction_factor": 4},
    "reft": {"dropout": 0.0},
    "ln_tuning": {},
    "full": {},
    "head": {},
}


# A head is the same to all methods that do not train it by themselves: these have each, and the others one.
EACH = [(task, name) for task in ("bert", "bert-tokens", "llama-questions", "llama") for name in METHODS]
NEAR = [(task, name) for task, name in EACH if task == "bert" or METHODS[name].by_default]


@pytest.mark.parametrize(("task", "name"), costly(NEAR, [each for each in EACH if each not in NEAR]))
def test_with_every_method(task, name, tmp_path):
    assert_comes_back(TASKS[task], METHODS[name].from_settings(SETTINGS.get(name, {})), tmp_path)


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "llama_adapter"])
@pytest.mark.parametrize("task", ["bert", "deberta", "bert-questions"])
def test_what_is_not_trained_is_saved_all_the_same(task, name, tmp_path):
    """`modules_to_save=[]` trains no head; without it the adapter could not be used again."""
    if (task, name) == ("deberta", "llama_adapter"):
        pytest.skip("its attention goes past transformers' interface")
    task = TASKS[task]
    settings = SETTINGS[name] | ({"target_modules": "all-linear"} if name == "lora" else {})
    method = METHODS[name].from_settings({**settings, "modules_to_save": []})
    assert_comes_back(task, method, tmp_path)
    model = task.load(tmp_path / "base", 1)
    adapter = attach(model, method, "a", seed=0)
    assert not [n for n, _ in adapter.trained() for p in task.parts if n.startswith(f"{p}.")]


# -- the base that a file is loaded into


@torch.no_grad()
def test_a_file_says_what_the_adapter_has_copies_of(tmp_path):
    """It is loaded alike where the pooler came with the checkpoint, or where nothing can be told of it."""
    task = TASKS["bert"]
    task.write(tmp_path / "base")
    first, second = task.load(tmp_path / "base", 1), task.load(tmp_path / "base", 2)
    inputs = task.inputs(3)
    stirred(tz.attach(first, tz.LoRA(r=2), "a", seed=0))
    tz.attach(first, tz.LoRA(r=2, target_modules="all-linear", modules_to_save=[]), "b", seed=0)
    expected = {}
    for name in "ab":
        with tz.route(first, [name] * 3):
            expected[name] = first(**inputs).logits
        tz.save(first, name, tmp_path / name)
    second.save_pretrained(tmp_path / "whole")
    whole = task.load(tmp_path / "whole", 3)
    assert [part.path for part in heads_of(whole)] == ["classifier"]
    for model in (whole, copy.deepcopy(second)):
        for name in "ab":
            adapter = tz.load(model, tmp_path / name, name)
            assert {"bert.pooler", "classifier"} <= {path for path, _ in adapter.at()}
            assert any(n.startswith("bert.pooler") for n, _ in adapter.trained()) == (name == "a")
            with tz.route(model, [name] * 3):
                assert_close(model(**inputs).logits, expected[name])
            tz.save(model, name, tmp_path / "again")
            about = [json.loads((tmp_path / each / META).read_text())["copies"] for each in (name, "again")]
            assert about[0] == about[1]


@torch.no_grad()
def test_an_adapter_of_a_base_with_another_pooler_is_refused(tmp_path):
    TASKS["bert-pooled"].write(tmp_path / "pooled")
    TASKS["bert"].write(tmp_path / "base")
    model = TASKS["bert"].load(tmp_path / "pooled", 1)
    tz.attach(model, tz.LoRA(r=2), "a", seed=0)
    tz.save(model, "a", tmp_path / "a")
    with pytest.raises(tz.TanzakuError, match="other weights"):
        tz.load(TASKS["bert"].load(tmp_path / "base", 1), tmp_path / "a", "a")


def test_a_classifier_that_came_with_the_checkpoint_is_trained_anew(tmp_path):
    """As in PEFT; its pooler and the like stay the base's."""
    for task in (TASKS["bert"], TASKS["deberta"], TASKS["distilbert"], TASKS["modernbert"], TASKS["bert-questions"]):
        task.write(tmp_path / "base")
        task.load(tmp_path / "base", 1).save_pretrained(tmp_path / "whole")
        model = task.load(tmp_path / "whole", 2)
        assert [part.path for part in heads_of(model)] == task.parts[-1:]


# -- what is no head


@pytest.mark.parametrize(("kind", "of"), [("llama", "AutoModel"), ("bert", "AutoModel"), ("gpt2", "AutoModel")])
def test_a_language_models_head_is_none_and_its_random_one_is_told(kind, of, tmp_path):
    """It is as large as the vocabulary, and PEFT does not train it."""
    auto = "AutoModelForMaskedLM" if kind == "bert" else "AutoModelForCausalLM"
    config = config_of(kind, tie_word_embeddings=False)
    getattr(transformers, of).from_config(config).save_pretrained(tmp_path / "headless")
    model = getattr(transformers, auto).from_pretrained(tmp_path / "headless")
    assert heads_of(model) == []
    with pytest.warns(UserWarning, match=r"were drawn at random.*modules_to_save"):
        adapter = tz.attach(model, tz.LoRA(r=2), "a", seed=0)
    assert not copied_in(adapter.at())
    model.save_pretrained(tmp_path / "whole")
    model = getattr(transformers, auto).from_pretrained(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tz.attach(model, tz.LoRA(r=2), "a", seed=0)
    named = getattr(transformers, auto).from_pretrained(tmp_path / "headless")
    head = "cls" if kind == "bert" else "lm_head"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert copied_in(tz.attach(named, tz.LoRA(r=2, modules_to_save=[head]), "a", seed=0).at())


def test_a_copy_of_a_model_has_no_marks_which_is_told(tmp_path):
    task = TASKS["bert"]
    task.write(tmp_path)
    model = copy.deepcopy(task.load(tmp_path, 1))
    with pytest.warns(UserWarning, match=r"cannot be told whether its checkpoint had bert\.pooler.*modules_to_save"):
        tz.attach(model, tz.LoRA(r=2), "a", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tz.attach(model, tz.LoRA(r=2, modules_to_save=["pooler"]), "b", seed=0)
        tz.attach(getattr(transformers, task.auto).from_config(config_of("bert")), tz.LoRA(r=2), "c", seed=0)


def test_new_tokens_are_no_fresh_parts(tmp_path):
    transformers.AutoModelForCausalLM.from_config(config_of("llama")).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not copied_in(tz.attach(model, tz.LoRA(r=2), "a", seed=0).at())


# -- parts in the middle, and parameters of no module


@torch.no_grad()
def test_cross_attention_that_two_checkpoints_lack(tmp_path):
    """An encoder and a decoder that were pretrained apart: what joins them is drawn at random."""
    for name in ("bert", "gpt2"):
        transformers.AutoModel.from_config(config_of(name)).save_pretrained(tmp_path / name)

    def joined(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        paths = (str(tmp_path / "bert"), str(tmp_path / "gpt2"))
        return transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(*paths).eval()

    first, second = joined(1), joined(2)
    inputs = {**ids(2), "decoder_input_ids": ids(2)["input_ids"]}
    adapter = stirred(tz.attach(first, tz.LoRA(r=2, target_modules=["c_fc"]), "a", seed=0))
    assert differing(first, second) <= copied_in(adapter.at())
    assert any("crossattention" in path for path, _ in adapter.at())
    with tz.route(first, ["a"] * 2):
        expected = first(**inputs, use_cache=False).logits
    tz.save(first, "a", tmp_path / "a")
    tz.load(second, tmp_path / "a", "a")
    bare = second(**inputs, use_cache=False).logits
    with tz.route(second, ["a", None]):
        mixed = second(**inputs, use_cache=False).logits
    assert_close(mixed[0], expected[0])
    assert_close(mixed[1], bare[1])
    with tz.route(second, ["a", None]), pytest.raises(tz.TanzakuError, match="route it alone"):
        second(**inputs, use_cache=True)


@torch.no_grad()
def test_parameters_of_the_model_itself(tmp_path):
    """A weighted sum of layers: its weights lie in no module, so that rows cannot have their own."""
    task = copy.deepcopy(TASKS["wav2vec2"])
    task.more = {"use_weighted_layer_sum": True}
    task.write(tmp_path / "base")
    first, second = task.load(tmp_path / "base", 1), task.load(tmp_path / "base", 2)
    # transformers draws nothing for these where a checkpoint lacks them: they are whatever memory held.
    for model in (first, second):
        model.layer_weights.copy_(torch.linspace(0.5, 1.5, len(model.layer_weights)))
    inputs = task.inputs(2)
    stirred(tz.attach(first, tz.LoRA(r=2, target_modules=["q_proj"]), "a", seed=0))
    tz.activate(first, "a")
    expected = first(**inputs).logits
    tz.save(first, "a", tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "TANZAKU_LORA"
    tz.load(second, tmp_path / "a", "a")
    tz.activate(second, "a")
    assert_close(second(**inputs).logits, expected)
    tz.activate(second, None)
    with pytest.raises(tz.TanzakuError, match=r"layer_weights .* cannot share a batch"), tz.route(second, ["a", None]):
        pass


@torch.no_grad()
def test_fresh_parts_that_are_tied_stay_tied(tmp_path):
    """Detection heads that every layer of a decoder has, one of them named twice."""

    class Model(transformers.PreTrainedModel):
        config_class = transformers.BertConfig
        base_model_prefix = "model"
        _tied_weights_keys = {"head.weight": "model.last.weight", "head.bias": "model.last.bias"}  # noqa: RUF012

        def __init__(self, config: Any):
            super().__init__(config)
            self.model = nn.Module()
            self.model.first = nn.Linear(4, 4)
            self.model.last = nn.Linear(4, 3)
            self.head = nn.Linear(4, 3)
            self.post_init()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.model.first(x)) + self.model.last(x)

    config = transformers.BertConfig(tie_word_embeddings=True)
    Model(config).save_pretrained(tmp_path / "base")
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "base" / "model.safetensors")
    keep = {key: value for key, value in state.items() if "first" in key}
    save_file(keep, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    first, second = (Model.from_pretrained(tmp_path / "base") for _ in range(2))
    assert first.head.weight is first.model.last.weight
    adapter = stirred(tz.attach(first, tz.LoRA(r=2, target_modules=["first"]), "a", seed=0))
    assert len([n for n, _ in adapter.trained()]) == 4
    x = torch.randn(2, 4)
    with tz.route(first, ["a"] * 2):
        expected = first(x)
    tz.save(first, "a", tmp_path / "a")
    loaded = tz.load(second, tmp_path / "a", "a")
    assert len([n for n, _ in loaded.trained()]) == 4
    with tz.route(second, ["a"] * 2):
        assert_close(second(x), expected)
    bare = second(x)
    with tz.route(second, [None, "a"]):
        assert_close(second(x), torch.stack([bare[0], expected[1]]))
