"""Generation: what is learnt of a row, held to TRL, and losses in chunks, held to those of all logits."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

import tanzaku as tz
from close import GRADIENT, assert_close
from models import tiny
from tanzaku.engine import text_head as heads
from tanzaku.engine.text_head import text_head
from tanzaku.errors import TanzakuError
from tanzaku.support.targets import IGNORED
from tanzaku.tasks.data import Table
from tanzaku.tasks.generation import Generation, GenerationSettings

trl = pytest.importorskip("trl")
STOCK = Path(trl.__file__).parent / "chat_templates"
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
TEXT = ["the warm rain of spring", "a cold wind of winter", "user assistant system model think", "Say it again. Yes!"]


def tokenizer_of(template: str | None = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = sorted({*re.findall(r"<\|?\w+\|?>", template or "")} - {*SPECIAL})
    options: Any = {"special_tokens": [*SPECIAL, *marks], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, **options))
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def settings(**columns: Any) -> GenerationSettings:
    return GenerationSettings(train="rows", **columns)


def encoded(rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 400, **data: Any) -> Any:
    table = Table({key: [row.get(key) for row in rows] for key in rows[0]}, "rows")
    own = settings(**data)
    task = Generation.learn({"train": table}, own).told_by(tokenizer)
    return task, task.encode(table, "train", tokenizer, max_length, own)


PAIRS = [
    {"prompt": "the warm", "completion": " rain of spring"},
    {"prompt": "a cold wind", "completion": " of winter"},
    {"prompt": "Say it again.", "completion": " Yes!"},
]
CHATS = [
    [
        {"role": "user", "content": "the warm rain"},
        {"role": "assistant", "content": "of spring"},
        {"role": "user", "content": "a cold wind"},
        {"role": "assistant", "content": "of winter"},
    ],
    [{"role": "user", "content": "Say it again."}, {"role": "assistant", "content": "Yes!"}],
]


# -- beside TRL


def of_trl(rows: list[dict[str, Any]], tokenizer: Any, model: Any, **config: Any) -> tuple[Any, Any, Any]:
    """Ids and what is learnt of each row, and the loss of all of them as one batch, of which gradients are taken."""
    import datasets

    args = trl.SFTConfig(
        output_dir="/tmp/unused", per_device_train_batch_size=len(rows), report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, **config,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    kept = list(trainer.train_dataset)
    batch = trainer.data_collator(kept)
    loss = model.train()(**{key: value for key, value in batch.items() if torch.is_tensor(value)}).loss
    return batch["input_ids"], batch["labels"], loss


def ours(task: Any, split: Any, model: Any) -> tuple[Any, Any, Any]:
    batch = task.collate(split.examples, 0)
    labels = torch.full_like(batch.inputs["input_ids"], IGNORED)
    labels[:, 1:] = batch.targets["goals"][:, :-1]
    loss = task.score(task.run(model, {**batch.inputs, "use_cache": False}), batch).sum()
    return batch.inputs["input_ids"], labels, loss / sum(example.weight for example in split.examples)


@pytest.mark.parametrize("shape", ["pairs", "chats", "text"])
def test_rows_losses_and_gradients_are_those_of_trl(shape: str) -> None:
    if shape == "pairs":
        tokenizer, rows, theirs = tokenizer_of(), PAIRS, PAIRS
    elif shape == "text":
        tokenizer = tokenizer_of()
        rows = theirs = [{"text": text} for text in TEXT]
    else:
        tokenizer = tokenizer_of((STOCK / "qwen2_5.jinja").read_text(encoding="utf-8"))
        rows = [{"messages": chat[-2:]} for chat in CHATS]
        theirs = [{"prompt": chat[-2:-1], "completion": chat[-1:]} for chat in CHATS]
    model = tiny("llama", "lm", vocab_size=len(tokenizer))
    ids, labels, loss = of_trl(theirs, tokenizer, model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    task, split = encoded(rows, tokenizer)
    own = ours(task, split, model.eval())
    assert own[0].tolist() == ids.tolist() and own[1][:, 1:].tolist() == labels[:, 1:].tolist()
    assert_close(own[2], loss)
    assert_close(torch.autograd.grad(own[2], weight)[0], gradient, GRADIENT)


def learnt(tokenizer: Any, example: Any) -> str:
    """The text of the tokens that are learnt, with a broken bar between parts."""
    out, before = "", False
    for token, label in zip(example.inputs["input_ids"], example.about.labels, strict=True):
        if label != IGNORED:
            out += ("" if before or not out else "¦") + tokenizer.decode([token])
        before = label != IGNORED
    return out


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "gemma", "phi3", "glm4moe"])
def test_stock_templates_that_mark_nothing(name: str) -> None:
    """Their mask of what assistants say is empty; rendered prefixes tell, as TRL's own templates with marks do."""
    stock = (STOCK / f"{name}.jinja").read_text(encoding="utf-8")
    assert "generation %" not in stock
    tokenizer = tokenizer_of(stock)
    _, split = encoded([{"messages": chat} for chat in CHATS], tokenizer)
    marked = (STOCK / f"{name}_training.jinja").read_text(encoding="utf-8")
    for chat, example in zip(CHATS, split.examples, strict=True):
        options: Any = {"return_dict": True, "return_assistant_tokens_mask": True, "chat_template": marked}
        theirs = tokenizer.apply_chat_template(chat, **options)
        said = tokenizer.decode([t for t, m in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if m])
        own, said = ("".join(text.split()) for text in (learnt(tokenizer, example).replace("¦", ""), said))
        # An answer before the last whose thoughts the stock template leaves out is not learnt without them.
        assert own == said or (name == "qwen3" and said.endswith(own) and "winter" in own)
        assert example.weight == sum(label != IGNORED for label in example.about.labels[1:])


def test_the_end_of_each_turn_is_learnt() -> None:
    tokenizer = tokenizer_of((STOCK / "qwen2_5.jinja").read_text(encoding="utf-8"))
    _, split = encoded([{"messages": chat} for chat in CHATS], tokenizer)
    parts = learnt(tokenizer, split.examples[0])
    assert parts == "of spring<|im_end|>\n¦of winter<|im_end|>\n"
    task, split = encoded(PAIRS, tokenizer_of())
    assert learnt(tokenizer_of(), split.examples[0]) == " rain of spring</s>"
    assert [task.truth(example) for example in split.examples] == ["rain of spring", "of winter", "Yes!"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": CHATS[1]}],
        [{"conversations": [{"from": "human", "value": "Say it again."}, {"from": "gpt", "value": "Yes!"}]}],
        [{"instruction": "Say it", "input": "again.", "output": "Yes!"}],
        [{"instruction": "Say it again.", "output": "Yes!"}],
        [{"messages": '[{"role": "user", "content": "Say it again."}, {"role": "assistant", "content": "Yes!"}]'}],
    ],
    ids=["messages", "sharegpt", "alpaca", "alpaca without input", "as JSON"],
)
def test_shapes_of_conversations(rows: list[dict[str, Any]]) -> None:
    tokenizer = tokenizer_of((STOCK / "qwen2_5.jinja").read_text(encoding="utf-8"))
    task, split = encoded(rows, tokenizer)
    [example] = split.examples
    assert learnt(tokenizer, example) == "Yes!<|im_end|>\n"
    asked = tokenizer.decode(task.prompt(example))
    assert asked.endswith("<|im_start|>assistant\n") and "again." in asked
    columns = Table({key: [row[key] for row in rows] for key in rows[0] if key != "output"}, "rows")
    [alone] = task.encode(columns, "data", tokenizer, 400).examples
    assert list(alone.inputs["input_ids"]) == list(task.prompt(example)), "as it was learnt, it is asked"


def test_plain_text_is_learnt_whole() -> None:
    tokenizer = tokenizer_of()
    task, split = encoded([{"text": "the warm rain"}], tokenizer)
    [example] = split.examples
    assert learnt(tokenizer, example) == "the warm rain</s>"
    assert example.weight == example.length - 1, "nothing foretells the first token"
    assert not task.writes and [metric.name for metric in task.metrics] == ["loss", "perplexity", "token_accuracy"]


BAD = {
    "no template": ([{"messages": CHATS[1]}], "has no chat template"),
    "role": ([{"messages": [{"role": "usr", "content": "a"}]}], "did you mean 'user'"),
    "nobody answers": ([{"messages": CHATS[1][:1]}], "no message of the assistant"),
    "not messages": ([{"messages": 3}], "is a int, expected a list of messages"),
    "no completion": ([{"prompt": "a", "completion": ""}], "column 'completion' has no text"),
    "columns": ([{"prompts": "a", "completion": "b"}], "did you mean 'prompts'?); say so with --prompt"),
    "long": (PAIRS, "3 of 3 rows of rows have more than 4 tokens, the first 1 with"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case: str) -> None:
    rows, says = BAD[case]
    template = None if case == "no template" else (STOCK / "qwen2_5.jinja").read_text(encoding="utf-8")
    with pytest.raises(TanzakuError) as caught:
        encoded(rows, tokenizer_of(template), max_length=4 if case == "long" else 400)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_long_rows_are_cut_where_that_is_asked_for() -> None:
    tokenizer = tokenizer_of()
    _, whole = encoded(PAIRS, tokenizer)
    most = max(example.length for example in whole.examples)
    _, split = encoded(PAIRS, tokenizer, most - 1, too_long="cut")
    assert split.truncated == sum(example.length == most for example in whole.examples)
    assert max(example.length for example in split.examples) == most - 1


def test_a_template_that_hides_the_answer() -> None:
    tokenizer = tokenizer_of("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(TanzakuError, match="does not show the assistant's last message 'Yes!'"):
        encoded([{"messages": CHATS[1]}], tokenizer)


# -- losses in chunks


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("at", ["q_proj", "head"])
def test_losses_in_chunks_are_those_of_all_logits(kind: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two adapters and a bare one; also with an adapter at the head itself, by its rows."""
    model = tiny(kind, "lm")
    output = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
    inside = {"gpt2": ["c_attn"]}.get(kind, ["q_proj"])
    targets = inside if at == "q_proj" else [*inside, output]
    for seed, name in enumerate("ab"):
        tz.attach(model, tz.LoRA(r=2, target_modules=targets, init_lora_weights=False), name, seed=seed)
    ids = torch.randint(3, 120, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    goals = ids.roll(-1, 1).masked_fill(mask == 0, IGNORED)
    goals[:, -1], goals[0, :4], goals[1, 4] = IGNORED, IGNORED, IGNORED
    trained = [p for name, p in model.named_parameters() if "lora" in name]
    widths: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[:-1].numel()))
    monkeypatch.setattr(heads, "_BYTES", 4 * 128 * 5)
    with tz.route(model, ["a", "b", None, "a"]):
        for p in trained:
            p.requires_grad_()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = cross_entropy(logits.transpose(1, 2), goals, ignore_index=IGNORED, reduction="none")
        gradients = torch.autograd.grad((expected.sum(1) * torch.arange(1, 5)).sum(), trained)
        widths.clear()
        losses, right = (
            text_head(model).run({"input_ids": ids, "attention_mask": mask, "use_cache": False}).losses(goals)
        )
        found = torch.autograd.grad((losses.sum(1) * torch.arange(1, 5)).sum(), trained)
    assert_close(losses, expected)
    assert right.tolist() == ((logits.argmax(-1) == goals) & (goals != IGNORED)).tolist()
    assert_close(list(found), list(gradients), GRADIENT)
    assert any(g.any() for g in found) and max(widths) <= 5


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(TanzakuError, match="in BertForMaskedLM tokens see what stands behind"):
        text_head(tiny("bert", "lm"))


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_trains_the_head_too(tied: bool) -> None:
    model = tiny("llama", "lm", tie_word_embeddings=tied)
    adapter = tz.attach(model, tz.Full(), "full")
    with torch.no_grad():
        for _, p in adapter.trained():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    ids = torch.randint(3, 120, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    goals = ids.roll(-1, 1)
    goals[:, -1] = IGNORED
    trained = [p for _, p in adapter.trained()]
    with tz.route(model, ["full"]):
        logits = model(**inputs).logits
        expected = cross_entropy(logits.transpose(1, 2), goals, ignore_index=IGNORED, reduction="none")
        gradients = torch.autograd.grad(expected.sum(), trained)
        losses, _ = text_head(model).run(inputs).losses(goals)
        found = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
    assert_close(losses, expected)
    assert_close(
        [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained, strict=True)],
        list(gradients),
        GRADIENT,
    )


@pytest.mark.parametrize(
    ("prompt", "completion"), [("the cold ", "wind of"), ("the war", "m rain"), ("a cold", " wind")]
)
def test_no_token_reaches_from_a_prompt_into_what_is_learnt(prompt: str, completion: str) -> None:
    """And a row is asked with the tokens that `predict` gives its prompt."""
    tokenizer = tokenizer_of()
    task, split = encoded([{"prompt": prompt, "completion": completion}], tokenizer)
    [example] = split.examples
    assert learnt(tokenizer, example) == f"{completion}</s>"
    [alone] = task.encode(Table({"prompt": [prompt]}, "rows"), "data", tokenizer, 400).examples
    assert list(task.prompt(example)) == list(task.prompt(alone)) == list(alone.inputs["input_ids"])
    assert tokenizer.decode(example.inputs["input_ids"]) == f"{prompt}{completion}</s>"


def test_a_completion_that_ends_by_itself() -> None:
    """It is learnt as one that does not, and what is written is compared with it without the mark."""
    tokenizer = tokenizer_of()
    (one, first), (two, second) = (
        encoded([{"prompt": "a cold", "completion": text}], tokenizer) for text in (" wind", " wind</s>")
    )
    assert first.examples == second.examples
    assert one.truth(first.examples[0]) == two.truth(second.examples[0]) == "wind"


def test_what_stands_before_a_conversation_is_not_learnt() -> None:
    tokenizer = tokenizer_of((STOCK / "qwen2_5.jinja").read_text(encoding="utf-8"))
    greeting = [{"role": "assistant", "content": "spring"}, *CHATS[1]]
    _, split = encoded([{"messages": greeting}], tokenizer)
    assert learnt(tokenizer, split.examples[0]) == "Yes!<|im_end|>\n"


def test_a_row_that_is_cut_is_asked_whole() -> None:
    tokenizer = tokenizer_of((STOCK / "qwen2_5.jinja").read_text(encoding="utf-8"))
    task, whole = encoded([{"messages": chat} for chat in CHATS], tokenizer)
    longest = whole.examples[0]
    _, cut = encoded([{"messages": chat} for chat in CHATS], tokenizer, longest.length - 12, too_long="cut")
    assert cut.truncated == 1 and cut.examples[0].length == longest.length - 12
    assert list(task.prompt(cut.examples[0]))[-9:] == list(task.prompt(longest))[-9:]


def test_a_column_that_no_row_fills_tells_nothing_of_the_shape() -> None:
    rows = [{"messages": None, "instruction": "", **row} for row in PAIRS]
    task, split = encoded(rows, tokenizer_of())
    assert task.shape == "pairs" and learnt(tokenizer_of(), split.examples[0]) == " rain of spring</s>"
    rows = [{"messages": None, "conversations": CHATS[1]}]
    task, _ = encoded(rows, tokenizer_of((STOCK / "qwen2_5.jinja").read_text(encoding="utf-8")))
    assert (task.shape, task.reads) == ("chat", ("conversations",))
    with pytest.raises(TanzakuError, match="rows row 1: column 'messages' has no messages"):
        encoded([{"messages": None}], tokenizer_of())


def test_references_that_are_never_written_whole_are_told_of() -> None:
    tokenizer = tokenizer_of()
    task, split = encoded(PAIRS, tokenizer, max_new_tokens=3)
    sizes = [len(tokenizer(row["completion"].strip())["input_ids"]) for row in PAIRS]
    longer, most = sum(size > 3 for size in sizes), max(sizes)
    assert 0 < longer < 3 < most
    [line] = task.remarks(split)
    assert (
        line.startswith(f"{longer} of 3 references of rows have more than 3 tokens")
        and f"--max-new-tokens {most}" in line
    )
    task, split = encoded(PAIRS, tokenizer, max_new_tokens=most)
    assert task.remarks(split) == []
    task, split = encoded([{"text": "the warm rain of spring"}], tokenizer, max_new_tokens=1)
    assert task.remarks(split) == []


def test_columns_that_may_be_missing() -> None:
    tokenizer = tokenizer_of((STOCK / "qwen2_5.jinja").read_text(encoding="utf-8"))
    task, _ = encoded([{"instruction": "Say it", "input": "again.", "output": "Yes!"}], tokenizer)
    assert task.needs == ("instruction",)
    [example] = task.encode(Table({"instruction": ["Say it"]}, "rows"), "data", tokenizer, 400).examples
    assert "Say it<|im_end|>" in tokenizer.decode(example.inputs["input_ids"])


def test_nothing_of_a_pass_is_kept() -> None:
    """A step that runs out of memory is tried again with half of its rows, and needs what the first one had."""
    model = tiny("llama", "lm")
    kept: list[weakref.ref[torch.Tensor]] = []
    model.model.norm.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    ids = torch.randint(3, 120, (2, 7))
    hidden = text_head(model).run({"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})
    hidden.losses(ids)[0].sum().backward()
    del hidden
    assert kept and not any(ref() is not None for ref in kept)


@pytest.mark.parametrize("mark", [False, True])
def test_a_held_text_is_cut_into_windows(mark: bool) -> None:
    """All of it, in order; each window begins as any text does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer, text = tokenizer_of(), "\n".join(TEXT)
    if mark:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    task, _ = encoded(PAIRS, tokenizer)
    split = task.probe(text, tokenizer, 6)
    windows = [list(example.inputs["input_ids"]) for example in split.examples]
    assert all(len(window) == 6 for window in windows[:-1]) and all(
        (window[0] == tokenizer.bos_token_id) == mark for window in windows
    )
    assert tokenizer.decode([token for window in windows for token in window[mark:]]) == text
    assert [example.weight for example in split.examples] == [len(window) - 1 for window in windows]
    assert task.probe(text, tokenizer, 1) is None
