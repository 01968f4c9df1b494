"""Choice: how rows are read, what a score is, and T-Few's losses by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tanzaku as tz
from close import RUN, assert_close
from models import VOCAB, tiny
from tanzaku.errors import TanzakuError
from tanzaku.tasks.answer_choices import ChoiceSettings
from tanzaku.tasks.choice import RankClassification
from tanzaku.tasks.data import Table
from tanzaku.tasks.losses import log_otherwise
from tanzaku.tasks.prepare import open_tables
from tanzaku.tasks.task import DECODED, Example, Split, TaskData
from tanzaku.train.results import Job
from tanzaku.train.scheduler import train_jobs
from tanzaku.train.settings import TrainSettings

TEXT = ["is the warm rain of spring mild? yes", "is a cold wind of winter mild? no", "maybe neutral Answer: water"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts one token before a text and one behind it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: Any = {"special_tokens": ["<pad>", "<s>", "</s>"], "initial_alphabet": alphabet}
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, **options))
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def table(rows: list[dict[str, Any]], source: str = "rows") -> Table:
    return Table({key: [row.get(key) for row in rows] for key in rows[0]}, source)


def learnt(rows: list[dict[str, Any]], **settings: Any) -> tuple[RankClassification, ChoiceSettings]:
    data = ChoiceSettings(train="rows", **settings)
    return RankClassification.learn({"train": table(rows)}, data), data


def answers(rows: list[dict[str, Any]], **settings: Any) -> list[str]:
    return RankClassification.targets(table(rows), ChoiceSettings(train="rows", **settings))


# -- what is lost


def scored(
    example_of: dict[str, list[float]], right: str, task: RankClassification
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss and the records of one row, whose choices' tokens have these probabilities."""
    names = tuple(example_of)
    own = [{"input_ids": [5, 6, *range(10, 10 + len(example_of[name]))]} for name in names]
    example = Example(own[0], right, about=names, others=own[1:], shared=2)
    batch = task.collate([example], 0)

    def losses(goals: torch.Tensor) -> tuple[torch.Tensor, None]:
        costs = torch.zeros(goals.shape)
        for row, chances in zip(costs, example_of.values(), strict=True):
            row[1 : 1 + len(chances)] = -torch.tensor(chances).log()  # the prompt's last token foretells the first
        assert ((goals != -100) == (costs != 0)).all()
        return costs, None

    outputs: Any = SimpleNamespace(losses=losses)
    return task.score(outputs, batch), task.records(outputs, batch)


# Probabilities of the tokens of three choices, of which the first is right.
CHANCES = {"a": [1 / 2, 1 / 4], "b": [1 / 8], "c": [1 / 2, 1 / 2, 1 / 4]}
LN2 = 0.693147181
BY_HAND = {
    # The mean over the right choice's two tokens: (ln 2 + ln 4) / 2 = 1.5 ln 2.
    "lm": 1.5 * LN2,
    # The mean over the four tokens of the wrong ones, of which 1 - p is 7/8, 1/2, 1/2 and 3/4:
    # (ln 8/7 + ln 2 + ln 2 + ln 4/3) / 4 = (0.133531393 + 2 * 0.693147181 + 0.287682072) / 4.
    "unlikelihood": 1.807507827 / 4,
    # Mean log probabilities are -1.5 ln 2, -3 ln 2 and -(1 + 1 + 2) / 3 ln 2, so their exponentials 2^-1.5 =
    # 0.353553391, 2^-3 = 0.125 and 2^(-4/3) = 0.396850263, of sum 0.875403654: ln (0.875403654 / 0.353553391).
    "length_normalised": 0.906650726,
}


@pytest.mark.parametrize("loss", BY_HAND)
def test_each_loss_by_hand(loss: Any) -> None:
    found, records = scored(CHANCES, "a", RankClassification(losses=(loss,)))
    assert found.item() == pytest.approx(BY_HAND[loss], rel=1e-6)
    assert records["loss"][0] == pytest.approx(BY_HAND[loss], rel=1e-6)


def test_losses_are_added_up() -> None:
    assert scored(CHANCES, "a", RankClassification())[0].item() == pytest.approx(sum(BY_HAND.values()), rel=1e-6)


def test_scores_by_hand() -> None:
    """By their sums -3, -3 and -4 times ln 2; by their means -1.5, -3 and -4/3, of which the last is the best."""
    sums = scored(CHANCES, "a", RankClassification(length_normalised=False))[1]
    assert sums["scores"][0].tolist() == pytest.approx([-3 * LN2, -3 * LN2, -4 * LN2])
    means = scored(CHANCES, "a", RankClassification())[1]
    assert means["scores"][0].tolist() == pytest.approx([-1.5 * LN2, -3 * LN2, -4 / 3 * LN2])
    task = RankClassification()
    [prediction] = task.predictions(means)
    said = task.answer(prediction)
    assert said["predicted"] == "c" and said["confidence"] == pytest.approx(0.396850263 / 0.875403654, abs=1e-6)
    assert task.figures(means)["accuracy"] == 0 and task.figures(sums)["accuracy"] == 1


def test_unlikelihood_of_tokens_that_are_sure_or_impossible() -> None:
    """log(1 - p) to the precision of -log p, which has numbers that 1 - p rounds to 1 or to 0; and its slope."""
    chances = torch.tensor([1e-30, 1e-9, 0.3, 0.5, 0.7], dtype=torch.float64)
    costs = torch.cat([-chances.log(), torch.tensor([1e-9, 1e-30], dtype=torch.float64)]).requires_grad_()
    expected = [-1e-30, -1e-9, math.log(0.7), math.log(0.5), math.log(0.3), math.log(1e-9), math.log(1e-30)]
    found = log_otherwise(costs)
    assert found.tolist() == pytest.approx(expected, rel=1e-8)
    slope = torch.autograd.grad(found.sum(), costs)[0]
    assert_close(slope, 1 / costs.detach().expm1())
    sure = torch.zeros(3, requires_grad=True)
    log_otherwise(sure).sum().backward()
    assert sure.grad is not None and sure.grad.isfinite().all()


def test_rows_of_unlike_many_choices_are_each_by_itself() -> None:
    """In one batch and one by one."""
    model, task = tiny("llama", "lm"), RankClassification()
    examples = []
    for size, begin in ((2, 3), (4, 5), (3, 1)):
        names = tuple("abcd"[:size])
        own = [{"input_ids": [*range(10, 10 + begin), *range(20 + at, 22 + 2 * at)]} for at in range(size)]
        examples.append(Example(own[0], names[-1], about=names, others=own[1:], shared=begin))

    def found(some: list[Example]) -> tuple[torch.Tensor, Any]:
        batch = task.collate(some, 0)
        with torch.no_grad():
            outputs = task.run(model, {**batch.inputs, "use_cache": False})
            return task.score(outputs, batch), task.records(outputs, batch)

    together, records = found(examples)
    assert [len(row) for row in records["scores"]] == [2, 4, 3]
    for at, example in enumerate(examples):
        alone, own = found([example])
        assert_close(together[at : at + 1], alone)
        assert_close(torch.tensor(records["scores"][at]), torch.tensor(own["scores"][0]))


# -- encoder-decoders


def few(number: int, seed: int = 0) -> Split:
    """Rows of two or three answers, of which the first is right after an even token."""
    generator, examples = torch.Generator().manual_seed(seed), []
    for at in range(number):
        asked = torch.randint(3, VOCAB, (3 + at % 4,), generator=generator).tolist()
        answers = ([7, 9, 2], [11, 2], [7, 5, 13, 2])[: 2 + at % 2]
        own = [{"input_ids": [*asked, 2], DECODED: answer} for answer in answers]
        names = tuple("abc"[: len(own)])
        examples.append(Example(own[0], names[asked[0] % 2], about=names, others=own[1:]))
    return Split("rows", examples, [""] * number, 0, "rows")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_scores_by_its_own_logits(kind: str) -> None:
    model, task, split = tiny(kind, "lm"), RankClassification(encoder_decoder=True), few(5)
    batch = task.collate(split.examples, 0)
    with torch.no_grad():
        outputs = task.run(model, {**batch.inputs, "use_cache": False})
        sums, records = task.score(outputs, batch), task.records(outputs, batch)
        for at, example in enumerate(split.examples):
            means, wrong, right = [], [], example.about.index(example.target)
            for number, row in enumerate(example.rows):
                labels = torch.tensor([row[DECODED]])
                logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits
                own = logits.log_softmax(-1).gather(2, labels[..., None])[0, :, 0]
                means.append(own.mean())
                wrong += [] if number == right else [-(1 - own.exp()).log()]
            means_ = torch.stack(means)
            expected = -means_[right] + torch.cat(wrong).mean() - means_.log_softmax(0)[right]
            assert_close(sums[at], expected)
            assert_close(torch.tensor(records["scores"][at], dtype=torch.float32), means_)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_jobs_of_an_encoder_decoder_end_among_others_as_alone(kind: str, tmp_path: Any) -> None:
    data = TaskData(few(9), few(5, 1), None, RankClassification(encoder_decoder=True), 0)

    def weights(jobs: list[Job], out: Any) -> dict[str, torch.Tensor]:
        results = train_jobs(tiny(kind, "lm"), data, jobs, out=out, workers=1)
        assert [(each.status, each.error) for each in results] == [("done", None)] * len(jobs)
        return load_file(out / "adapters" / "a" / "adapter_model.safetensors")

    def job(name: str, method: tz.Method, size: int = 2) -> Job:
        return Job(name, method, TrainSettings(epochs=2, learning_rate=0.01, batch_size=size, seed=size))

    alone = weights([job("a", tz.LoRA(r=2, lora_dropout=0.3))], tmp_path / "alone")
    beside = [job("b", tz.PromptTuning(num_virtual_tokens=3)), job("c", tz.IA3(), 1)]
    among = weights([job("a", tz.LoRA(r=2, lora_dropout=0.3)), *beside], tmp_path / "among")
    for key, value in alone.items():
        assert_close(among[key], value, 4 * RUN, at=key)


def test_an_encoder_reads_the_prompt_and_a_decoder_the_answer(tokenizer: Any) -> None:
    rows = [{"prompt": "is the warm rain of spring mild? ", "label": 0}]
    [example] = encoded(tokenizer, rows, choices=[" yes", "no"], encoder_decoder=True).examples
    read = [(tokenizer.decode(row["input_ids"]), tokenizer.decode(row[DECODED])) for row in example.rows]
    assert read == [("<s>is the warm rain of spring mild?</s>", f"<s>{word}</s>") for word in ("yes", "no")]
    split = encoded(tokenizer, rows, 5, choices=[" yes", "no"], encoder_decoder=True)
    short = tokenizer.decode(split.examples[0].inputs["input_ids"])
    assert split.truncated == 1 and short.startswith("<s>") and short.endswith("mild?</s>")


# -- where choices and answers stand

CHOICES = ["yes", "maybe", "no"]
OF_ALL: Any = {"choices": CHOICES}
SAME = {
    "a list": ({}, OF_ALL, 2, "no"),
    "a text": ({}, OF_ALL, "no", "no"),
    "a number as text": ({}, OF_ALL, "2", "no"),
    "bars": ({}, {"choices": "yes ||| maybe ||| no"}, 2, "no"),
    "a column": ({"choices": CHOICES}, {}, 2, "no"),
    "a column with another name": ({"options": CHOICES}, {"choices": "options"}, 2, "no"),
    "a column of JSON": ({"choices": json.dumps(CHOICES)}, {}, "2", "no"),
    "with their labels": ({"choices": {"text": CHOICES, "label": ["A", "B", "C"]}}, {}, "C", "no"),
    "columns by their names": ({f"choice{at}": each for at, each in enumerate(CHOICES)}, {}, 2, "no"),
    "columns": ({"x": "yes", "y": "no"}, {"choice_columns": ["x", "y"]}, 1, "no"),
    "a template": ({"x": "yes", "y": "no"}, {"choices": "{{ x }} ||| {{ y }}"}, 1, "no"),
    "a mapping": ({}, {"choices": {"entailment": "yes", "contradiction": "no"}}, "contradiction", "contradiction"),
    "a mapping of numbers": ({}, {"choices": {1: "yes", 0: "no"}}, 0, "0"),
    "a mapping of numbers to themselves": ({}, {"choices": {1: "1", 2: "2", 3: "3"}}, 1, "1"),
    "numbers to choose from": ({"choices": ["3", "1", "2"]}, {}, "2", "2"),
    "a number of one of these": ({"choices": ["3", "1", "2"]}, {}, 2, "2"),
    "numbers in a list": ({"choices": [30, 10]}, {}, 0, "30"),
}


@pytest.mark.parametrize("case", SAME)
def test_where_choices_and_answers_stand(case: str) -> None:
    more, settings, label, expected = SAME[case]
    assert answers([{"prompt": "is it?", "label": label, **more}], **settings) == [expected]


def test_bars_in_a_cell_divide_nothing() -> None:
    rows = [{"prompt": "is it?", "a": ["x ||| y", "z"], "label": 1}]
    assert answers(rows, choices="{{ a|join('|||') }}") == ["z"]


def test_an_answer_may_be_called_so() -> None:
    assert answers([{"prompt": "is it?", "answer": 0}], **OF_ALL) == ["yes"]
    assert answers([{"prompt": "is it?", "key": 1}], label="key", **OF_ALL) == ["maybe"]


PROMPTSOURCE = "{{ text }} Is it mild? ||| {{ answer_choices[label] }}"
BLOCK = "{% if text %}{{ text }} Is it mild? ||| {{ answer_choices[label] }}{% endif %}"


@pytest.mark.parametrize("template", [PROMPTSOURCE, BLOCK])
def test_the_shape_of_promptsource(template: str, tokenizer: Any) -> None:
    """What stands behind the bars is the answer, and white space at the ends is none of either's. A cell with bars in
    it divides nothing."""
    rows = [{"text": "  a cold | wind ||| of winter", "label": 1}]
    task, data = learnt(rows, template=template, choices="yes ||| no")
    split = task.encode(table(rows), "train", tokenizer, 100, data)
    assert split.texts == ["a cold | wind ||| of winter Is it mild?"]
    assert [example.target for example in split.examples] == ["no"]
    assert read(tokenizer, split.examples[0]) == [(split.texts[0], " yes"), (split.texts[0], " no")]


def test_a_prompt_needs_nothing_of_its_answer() -> None:
    task, _ = learnt([{"text": "a cold wind", "label": 1}], template=PROMPTSOURCE, choices="yes ||| no")
    assert task.reads == ("text",)
    [row] = task.asked.questions(table([{"text": "warm rain"}]), None)
    assert row.prompt == "warm rain Is it mild?" and row.answer is None


# -- tokens


def read(tokenizer: Any, example: Example) -> list[tuple[str, str]]:
    """Prompt and choice of each row of a pass, without the token at the beginning."""
    begin = example.shared
    assert all(row["input_ids"][0] == 1 and 2 not in row["input_ids"] for row in example.rows)
    own = [row["input_ids"] for row in example.rows]
    return [(tokenizer.decode(ids[1:begin]), tokenizer.decode(ids[begin:])) for ids in own]


def encoded(tokenizer: Any, rows: list[dict[str, Any]], max_length: int = 100, **settings: Any) -> Any:
    task, data = learnt(rows, **settings)
    return task.encode(table(rows), "train", tokenizer, max_length, data)


def test_a_space_at_the_end_of_a_prompt_is_read_with_its_choices(tokenizer: Any) -> None:
    rows = [{"question": "is it mild?", "label": "no"}]
    template = "{{ question }}\nAnswer: "
    [example] = encoded(tokenizer, rows, template=template, choices=["yes", "no"]).examples
    assert read(tokenizer, example) == [("is it mild?\nAnswer:", " yes"), ("is it mild?\nAnswer:", " no")]
    assert len({tuple(row["input_ids"][: example.shared]) for row in example.rows}) == 1, "one prompt for all"
    [plain] = encoded(tokenizer, [{"prompt": "is it mild?\nAnswer:", "label": 1}], choices=[" yes", " no"]).examples
    assert plain.rows == example.rows


def test_no_token_reaches_from_a_prompt_into_a_choice(tokenizer: Any) -> None:
    """Some of them are one token together."""
    assert len(tokenizer("is", add_special_tokens=False)["input_ids"]) == 1
    [example] = encoded(tokenizer, [{"prompt": "i", "label": 0}], choices=["s", "no"]).examples
    assert read(tokenizer, example) == [("i", "s"), ("i", "no")]


def test_a_long_prompt_loses_its_beginning(tokenizer: Any) -> None:
    rows = [{"prompt": "is the warm rain of spring mild?", "label": 0}, {"prompt": "mild?", "label": 1}]
    split = encoded(tokenizer, rows, 5, choices=[" yes", " no"])
    assert split.truncated == 1
    prompt, choice = read(tokenizer, split.examples[0])[0]
    assert "is the warm rain of spring mild?".endswith(prompt) and choice == " yes" and split.examples[0].length == 5
    with pytest.raises(TanzakuError, match=r"rows row 1 has a choice of 1 tokens, and max_length 2 .* --max-length 3"):
        encoded(tokenizer, rows, 2, choices=[" yes", " no"])


def test_the_task_is_kept(tokenizer: Any) -> None:
    rows = [{"x": "is it?", "y": "yes", "z": "no", "label": 0}]
    for settings in ({"choices": "{{ y }} ||| {{ z }}"}, {"choice_columns": ["y", "z"]}, {"choices": ["yes", "no"]}):
        task, _ = learnt(rows, template="{{ x }} so", losses=["lm"], length_normalised=False, **settings)
        about = json.loads(json.dumps(task.to_json()))
        assert RankClassification.from_json(about, "") == task
        for key in about.keys() - {"template", "choices"}:
            with pytest.raises(TanzakuError, match=r"there: .*expected"):
                RankClassification.from_json({**about, key: 7}, "there: ")


# -- bad input

ROW = {"prompt": "is it?", "label": 0}
BAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "one choice": ([ROW], {"choices": ["yes"]}, "there is one, 'yes'; expected two or more"),
    "one choice in a row": (
        [{**ROW, "choices": ["a", "b"]}, {**ROW, "choices": ["a"]}],
        {},
        "rows row 2: there is one",
    ),
    "an answer outside": (
        [ROW, {**ROW, "label": 3}],
        OF_ALL,
        "rows row 2: column 'label' is '3', which is none of the",
    ),
    "a word outside": ([{**ROW, "label": "mayb"}], OF_ALL, "did you mean 'maybe'"),
    "no answer": ([{**ROW, "label": None}], OF_ALL, "rows row 1: column 'label' has no answer"),
    "no label": ([{"prompt": "is it?"}], OF_ALL, "rows has no column 'label'"),
    "duplicates": ([{**ROW, "choices": ["a", "b", "a "]}], {}, "rows row 1: 'a' is there twice"),
    "duplicates of all": ([ROW], {"choices": ["a", "b", "a"]}, "choices of all rows: 'a' is there twice"),
    "an empty one": ([{**ROW, "choices": ["a", " "]}], {}, "rows row 1: number 1 (from 0) is empty"),
    "an empty cell": ([{**ROW, "choice0": "a", "choice1": None}], {}, "rows row 1: number 1 (from 0) is empty"),
    "a column that is not there": ([ROW], {"template": "{{ questoin }}", **OF_ALL}, "the template reads 'questoin'"),
    "another column": ([ROW], {"choices": "{{ x }} ||| {{ y }}"}, "the template of choices reads 'x'"),
    "no choices": ([ROW], {}, "rows has no column 'choices'"),
    "no prompt": ([{"label": 0}], OF_ALL, "rows has no column 'prompt'"),
    "an empty prompt": ([ROW, {**ROW, "prompt": " "}], OF_ALL, "rows row 2: column 'prompt' gives no text"),
    "an empty template": ([{**ROW, "x": ""}], {"template": "{{ x }} ", **OF_ALL}, "rows row 1: the template gives no"),
    "no list": ([{**ROW, "choices": "a, b"}], {}, "rows row 1: column 'choices' is 'a, b', expected a list"),
    "no Jinja": ([ROW], {"template": "{{ prompt", **OF_ALL}, "the template has a mistake in line 1"),
    "no filter": ([ROW], {"template": "{{ prompt | shout }}", **OF_ALL}, "No filter named 'shout'"),
    "no number": ([ROW], {"template": "{{ prompt / 2 }}", **OF_ALL}, "rows row 1: the template cannot be filled in"),
    "an outside": ([ROW], {"template": "{{ prompt.__class__.mro() }}", **OF_ALL}, "unsafe"),
    "three parts": ([ROW], {"template": "{{ prompt }} ||| x ||| y", **OF_ALL}, "gives 3 parts between |||, expected 2"),
    "a number that may be a text": (
        [{**ROW, "label": 1}],
        {"choices": ["1", "2", "3"]},
        "may be the choice '1' or number 1",
    ),
    "labels of other choices": (
        [{**ROW, "choices": {"text": ["a", "b"], "label": ["A", "A"]}, "label": "A"}],
        {},
        "has the labels ['A', 'A'] for 2 texts",
    ),
    "a product": ([ROW], {"template": "{{ 'x' * 10 }}", **OF_ALL}, "has a product or a power"),
    "a large number": ([ROW], {"template": "{{ prompt.ljust(100000) }}", **OF_ALL}, "has a number above 10,000"),
    "loops": (
        [ROW],
        {"template": "{% for i in prompt %}{% for j in prompt %}{{ j }}{% endfor %}{% endfor %}", **OF_ALL},
        "has a loop within a loop",
    ),
    "both": ([ROW], {"choice_columns": ["x", "y"], **OF_ALL}, "give one of the two"),
    "a loss twice": ([ROW], {"losses": ["lm", "lm"], **OF_ALL}, "losses has 'lm' twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_told_in_one_line(case: str) -> None:
    rows, settings, message = BAD[case]
    with pytest.raises(TanzakuError) as caught:
        learnt(rows, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_yes_that_yaml_reads_as_true() -> None:
    with pytest.raises(ValueError, match="in quotes"):
        ChoiceSettings(train="rows", choices=[True, False])


def test_the_other_kind_of_model_is_told() -> None:
    configs = [SimpleNamespace(is_encoder_decoder=each, model_type="it") for each in (False, True)]
    for own, config in zip((True, False), configs, strict=True):
        with pytest.raises(TanzakuError, match=r"the model \(it\) is (no|an) encoder-decoder; .*--encoder-decoder"):
            RankClassification(encoder_decoder=own).check_model(config)


def test_tables_are_opened(tmp_path: Any) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,choice0,choice1,label\nis it?,yes,no,1\n", encoding="utf-8")
    read = open_tables(RankClassification, ChoiceSettings(train=str(path), prompt="question"))
    assert read.task.reads == ("question", "choice0", "choice1")
