"""Sequence to sequence: losses of many families held to transformers' own, targets as tokenizers encode them, and what
is written begins as it was learnt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LEDConfig,
    LEDForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    NllbTokenizer,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import tanzaku as tz
from close import GRADIENT, assert_close
from models import lively, tiny
from tanzaku.engine import text_head as heads
from tanzaku.engine.text_head import text_head
from tanzaku.errors import TanzakuError
from tanzaku.support.targets import IGNORED
from tanzaku.tasks.data import Table
from tanzaku.tasks.decoding import decode
from tanzaku.tasks.generation import Generation
from tanzaku.tasks.sampling import Decoding
from tanzaku.tasks.seq2seq import Seq2Seq, Seq2SeqSettings, shifted
from tanzaku.tasks.task import DECODED, Example, without_long
from tanzaku.tasks.written import Row

_T5: dict[str, Any] = {
    **{"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    **{"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
}
_BART: dict[str, Any] = {
    **{f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 48))},
    **{"vocab_size": 128, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
_NEAR = {**_BART, "max_position_embeddings": 64}
_LED = {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "t5, tied and scaled": (T5ForConditionalGeneration, lambda: T5Config(**_T5)),
    "t5 1.1": (
        T5ForConditionalGeneration,
        lambda: T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "mt5": (MT5ForConditionalGeneration, lambda: MT5Config(**_T5)),
    "umt5": (UMT5ForConditionalGeneration, lambda: UMT5Config(**_T5)),
    "longt5": (LongT5ForConditionalGeneration, lambda: LongT5Config(**_T5)),
    "bart": (BartForConditionalGeneration, lambda: BartConfig(**_NEAR)),
    "mbart": (MBartForConditionalGeneration, lambda: MBartConfig(**_NEAR)),
    "marian": (MarianMTModel, lambda: MarianConfig(**_NEAR)),
    "pegasus": (PegasusForConditionalGeneration, lambda: PegasusConfig(**_NEAR)),
    "blenderbot": (BlenderbotForConditionalGeneration, lambda: BlenderbotConfig(**_NEAR)),
    "m2m100": (M2M100ForConditionalGeneration, lambda: M2M100Config(**_NEAR)),
    "led": (LEDForConditionalGeneration, lambda: LEDConfig(**_BART, **_LED)),
}


def made(kind: str) -> Any:
    cls, config = FAMILIES[kind][0], FAMILIES[kind][1]()
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        lively(model)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model.eval()


def example(source: int, target: int, seed: int) -> Example:
    ids = torch.randint(3, 120, (source + target,), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [*ids[source:-1], 2]
    return Example({"input_ids": ids[:source], DECODED: labels}, "x", float(target), about=Row(ids[:source], labels))


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_and_gradients_are_those_of_the_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what each does behind its decoder, for rows of two adapters and a bare one, a few tokens at a time."""
    model, task = made(kind), Seq2Seq()
    targets = ["q", "v"] if "t5" in kind else ["q_proj", "v_proj"]
    for seed, name in enumerate("ab"):
        method = tz.LoRA(r=2, target_modules=targets, init_lora_weights=False)
        tz.attach(model, method, name, seed=seed)
    examples = [example(9, 4, 0), example(4, 7, 1), example(6, 1, 2)]
    batch = task.collate(examples, 0)
    labels = batch.targets["goals"]
    assert (labels == IGNORED).any() and labels.shape == batch.inputs[DECODED].shape
    trained = [p for name, p in model.named_parameters() if "lora" in name]
    monkeypatch.setattr(heads, "_BYTES", 4 * 128 * 5)
    with tz.route(model, ["a", None, "b"]):
        for p in trained:
            p.requires_grad_()
        expected = model(**batch.inputs).loss
        wanted = torch.autograd.grad(expected, trained)
        outputs = task.run(model, {**batch.inputs, "use_cache": False})
        sums = task.score(outputs, batch)
        found = torch.autograd.grad(sums.sum() / sum(each.weight for each in examples), trained)
        right = task.records(outputs, batch)["right"]
        likeliest = model(**batch.inputs).logits.argmax(-1)
    assert_close(sums.sum() / 12, expected)
    assert_close(list(found), list(wanted), GRADIENT)
    assert any(g.any() for g in wanted)
    assert right.tolist() == (likeliest == labels).sum(1).tolist()


@pytest.mark.parametrize("kind", ["t5, tied and scaled", "t5 1.1", "bart"])
@pytest.mark.parametrize("at", ["head", "all weights"])
def test_what_is_trained_behind_the_decoder(kind: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter at the head beside a bare row, and full fine-tuning, of heads that are the embedding, too."""
    model, task = made(kind), Seq2Seq()
    head = tz.LoRA(r=2, target_modules=["lm_head"], init_lora_weights=False)
    adapter = tz.attach(model, tz.Full() if at == "all weights" else head, "a", seed=1)
    trained = [p for _, p in adapter.trained()]
    with torch.no_grad():
        for p in trained:
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    examples = [example(9, 4, 0), example(4, 7, 1)]
    batch = task.collate(examples, 0)
    monkeypatch.setattr(heads, "_BYTES", 4 * 128 * 5)
    with tz.route(model, ["a", "a" if at == "all weights" else None]):
        expected = model(**batch.inputs).loss
        wanted = torch.autograd.grad(expected, trained, allow_unused=True)
        sums = task.score(task.run(model, {**batch.inputs, "use_cache": False}), batch)
        found = torch.autograd.grad(sums.sum() / 11, trained, allow_unused=True)
    assert_close(sums.sum() / 11, expected)
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None or b is not None]
    assert pairs and all(a is not None and b is not None for a, b in pairs)
    assert_close([a for a, _ in pairs], [b for _, b in pairs], GRADIENT)


def test_scores_of_another_make_are_refused() -> None:
    heads_of = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    sizes = {"hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    model = ProphetNetForConditionalGeneration(ProphetNetConfig(vocab_size=64, **heads_of, **sizes, **layers))
    with pytest.raises(TanzakuError, match=r"ProphetNet.* makes its scores of more than its decoder's hidden states"):
        text_head(model)
    part = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = (BertConfig(**part), BertConfig(**part, is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*parts))
    with pytest.raises(TanzakuError, match=r"does not say what its decoder reads .*decoder_start_token_id"):
        shifted(model, torch.tensor([[5, 6]]))


def test_each_kind_of_model_names_the_task_for_it() -> None:
    with pytest.raises(TanzakuError, match=r"\(llama\) is no encoder-decoder.*use task: generation"):
        Seq2Seq().check_model(tiny("llama", "lm").config)
    with pytest.raises(TanzakuError, match=r"\(t5\) is an encoder-decoder.*use task: seq2seq"):
        Generation("pairs", {"prompt": "prompt"}).check_model(tiny("t5", "lm").config)


# -- rows

ROWS = [
    {"source": "warm rain", "target": "cold wind"},
    {"source": "warm rain wind cold", "target": "rain"},
    {"source": "cold", "target": "wind rain warm"},
]
WORDS = ["warm", "cold", "rain", "wind", "say", "it"]
PIECES: Any = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
LETTERS: Any = [("▁", -3.0), *((letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz")]


def words() -> PreTrainedTokenizerFast:
    """A tokenizer that ends nothing by itself."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*special.values(), *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def encoded(tokenizer: Any, rows: Any = ROWS, max_length: int = 40, **data: Any) -> Any:
    table = Table({key: [row.get(key) for row in rows] for key in rows[0]}, "rows")
    settings = Seq2SeqSettings(train="rows", **data)
    task = Seq2Seq.learn({"train": table}, settings).told_by(tokenizer)
    return task, task.encode(table, "train", tokenizer, max_length, settings)


def test_a_row_as_tokenizers_have_it() -> None:
    """What a script of transformers makes of it: a source behind its prefix, and a target that ends."""
    tokenizer = T5Tokenizer(vocab=[*PIECES, *LETTERS])
    task, split = encoded(tokenizer, source_prefix="say it ")
    theirs = tokenizer([f"say it {row['source']}" for row in ROWS], text_target=[row["target"] for row in ROWS])
    assert [list(each.inputs["input_ids"]) for each in split.examples] == theirs["input_ids"]
    assert [list(each.inputs[DECODED]) for each in split.examples] == theirs["labels"]
    assert all(labels[-1] == tokenizer.eos_token_id for labels in theirs["labels"])
    assert [each.weight for each in split.examples] == [float(len(labels)) for labels in theirs["labels"]]
    assert split.texts == [row["source"] for row in ROWS], "a report shows what stands in the file"
    assert task.learnt(split.examples[0]) == [False] * len(theirs["input_ids"][0]) + [True] * len(theirs["labels"][0])
    [alone, *_] = task.encode(Table({"source": ["warm rain"]}, "rows"), "data", tokenizer, 40).examples
    assert alone.inputs == {"input_ids": theirs["input_ids"][0]} and alone.target is None


def test_a_target_ends_where_a_tokenizer_ends_nothing() -> None:
    tokenizer = words()
    _, split = encoded(tokenizer)
    ends = [tokenizer.convert_ids_to_tokens(each.inputs[DECODED]) for each in split.examples]
    assert ends == [["cold", "wind", "</s>"], ["rain", "</s>"], ["wind", "rain", "warm", "</s>"]]
    _, cut = encoded(tokenizer, max_target_length=3, too_long="cut", max_length=2)
    assert cut.truncated == 2
    assert [len(each.inputs[DECODED]) for each in cut.examples] == [3, 2, 3]
    assert all(each.inputs[DECODED][-1] == tokenizer.eos_token_id for each in cut.examples)
    assert max(each.length for each in cut.examples) == 2


def test_rows_of_which_source_or_target_is_too_long_can_be_left_out() -> None:
    tokenizer = words()
    _, whole = encoded(tokenizer)
    sizes = [(each.length, len(each.inputs[DECODED])) for each in whole.examples]
    for source, target in ((2, 3), (40, 3), (2, 40)):
        _, split = encoded(tokenizer, max_target_length=target, too_long="drop", max_length=source)
        kept = [row for row, (long, wide) in enumerate(sizes) if long <= source and wide <= target]
        assert 0 < len(kept) < len(sizes)
        left = without_long(split)
        assert left.kept == kept and left.dropped == len(sizes) - len(kept)
        assert left.examples == [whole.examples[row] for row in kept]
    _, split = encoded(tokenizer, max_target_length=2, too_long="drop", max_length=1)
    with pytest.raises(TanzakuError, match=r"have more than 1 tokens, or 2 of a target, .*; allow more"):
        without_long(split)


MARKED = {
    "mbart": (MBartTokenizer, "en_XX", "ro_RO"),
    "mbart50": (MBart50Tokenizer, "en_XX", "ro_RO"),
    "nllb": (NllbTokenizer, "eng_Latn", "fra_Latn"),
}


def marking(kind: str) -> Any:
    if kind == "nllb":
        return NllbTokenizer(vocab={piece: at for at, (piece, _) in enumerate([*PIECES, *LETTERS])}, merges=[])
    return MARKED[kind][0](vocab=[*PIECES, *LETTERS])


@pytest.mark.parametrize("kind", MARKED)
def test_languages_of_sources_and_targets(kind: str) -> None:
    """What is written begins with what stood before the target in training, by the model's own shift."""
    tokenizer, (_, source, target) = marking(kind), MARKED[kind]
    task, split = encoded(tokenizer, source_lang=source, target_lang=target)
    other = marking(kind)
    other.src_lang, other.tgt_lang = source, target
    theirs = other([row["source"] for row in ROWS], text_target=[row["target"] for row in ROWS])
    assert [list(each.inputs["input_ids"]) for each in split.examples] == theirs["input_ids"]
    assert [list(each.inputs[DECODED]) for each in split.examples] == theirs["labels"]
    config = MBartConfig(**{**_NEAR, "vocab_size": len(tokenizer), "pad_token_id": 1})
    model = MBartForConditionalGeneration(config).eval()
    lively(model)
    mark, end = tokenizer.convert_tokens_to_ids(target), tokenizer.eos_token_id
    begins = list(task.begins(model))
    assert begins == ([mark] if kind == "mbart" else [end, mark])
    read = shifted(model, torch.tensor([split.examples[0].inputs[DECODED]]))[0].tolist()
    assert read[: len(begins)] == begins
    prompts = [task.prompt(each) for each in split.examples[:2]]
    settings = Decoding(max_new_tokens=4)
    for each in decode(model, {None: prompts}, settings, 1, begins=begins, tokenizer=tokenizer):
        ids = [*begins]
        for token in each.tokens:  # without a cache
            logits = model(
                input_ids=torch.tensor([prompts[each.row]]), decoder_input_ids=torch.tensor([ids]), use_cache=False
            ).logits
            assert int(logits[0, -1].argmax()) == token
            ids.append(token)
    for wrong, says in (
        ({}, f"{type(tokenizer).__name__} marks texts with their language; give --source-lang and --target-lang"),
        ({"source_lang": source, "target_lang": "xx_YY"}, "knows no language 'xx_YY'"),
    ):
        with pytest.raises(TanzakuError, match=re.escape(says)):
            encoded(marking(kind), **wrong)
    with pytest.raises(TanzakuError, match="marks no languages, found target_lang 'ro_RO'"):
        encoded(words(), target_lang="ro_RO")


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no target": (
        [{"source": "warm", "targets": "cold"}],
        {},
        "did you mean 'targets'?); its columns are source, targets; say which it is with --target",
    ),
    "no source": ([{"ja": "warm", "target": "cold"}], {}, "rows has no column 'source'"),
    "empty source": ([ROWS[0], {"source": " ", "target": "cold"}], {}, "rows row 2: column 'source' has no text"),
    "empty target": ([{"source": "warm", "target": ""}], {}, "rows row 1: column 'target' has no text"),
    "a number": ([{"source": "warm", "target": 3}], {}, "column 'target' is 3 (int), expected text"),
    "long sources": (
        ROWS,
        {"max_length": 3},
        "1 of 3 rows of rows have more than 3 tokens, the first 2 with 4: use --max-length 4",
    ),
    "long targets": (
        ROWS,
        {"max_target_length": 2},
        "2 of 3 rows of rows have more than 2 tokens of the target, the first 1 with 3: use --max-target-length 4",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case: str) -> None:
    rows, data, says = BAD[case]
    with pytest.raises(TanzakuError) as caught:
        encoded(words(), rows, **data)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_with_a_rule_for_each_side(tmp_path: Path) -> None:
    """Marian's cuts targets by another model than sources."""
    spm = pytest.importorskip("sentencepiece")
    pieces = ["</s>", "<unk>", "<pad>"]
    for side, text in (("source", "warm rain\ncold wind\na warm wind\n"), ("target", "wind cold\nxyz uvw\nrain uvw\n")):
        (tmp_path / f"{side}.txt").write_text(text * 20, encoding="utf-8")
        options = {"vocab_size": 25, "hard_vocab_limit": False, "minloglevel": 2}
        spm.SentencePieceTrainer.train(input=f"{tmp_path / side}.txt", model_prefix=f"{tmp_path / side}", **options)
        cutter = spm.SentencePieceProcessor(model_file=f"{tmp_path / side}.model")
        pieces += [cutter.id_to_piece(at) for at in range(cutter.get_piece_size())]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: at for at, piece in enumerate(dict.fromkeys(pieces))}))
    files = {f"{side}_spm": f"{tmp_path / side}.model" for side in ("source", "target")}
    tokenizer = MarianTokenizer(vocab=f"{tmp_path / 'vocab.json'}", source_lang="en", target_lang="de", **files)
    rows = [{"source": "warm rain", "target": "wind cold"}, {"source": "cold", "target": "xyz uvw"}]
    _, split = encoded(tokenizer, rows)
    sides = [[row[key] for row in rows] for key in ("source", "target")]
    theirs = tokenizer(sides[0], text_target=sides[1])
    assert [list(each.inputs["input_ids"]) for each in split.examples] == theirs["input_ids"]
    assert [list(each.inputs[DECODED]) for each in split.examples] == theirs["labels"]
    assert theirs["labels"] != tokenizer(sides[1])["input_ids"]
