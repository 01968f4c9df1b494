"""P-tuning v2, cartridges and multitask prompts: what each has beside prefix and prompt tuning."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tanzaku as tz
from close import assert_close
from interop.oracle import logits, reopened, scatter, whole_rows
from models import batch, tiny

# -- P-tuning v2


@pytest.mark.parametrize(("kind", "head"), [("bert", "cls"), ("llama", "cls"), ("gpt2", "lm")])
def test_peft_reads_its_files_as_prefix_tuning(kind, head, tmp_path):
    model = tiny(kind, head)
    given = batch(model)
    scatter([p for _, p in tz.attach(model, tz.PTuningV2(num_virtual_tokens=3), "a", seed=0).trained()])
    tz.activate(model, "a")
    expected = logits(model, given)
    tz.save(model, "a", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    assert tz.load(model, tmp_path, "b").method.name == "p_tuning_v2"
    tz.detach(model)
    assert_close(logits(reopened(model, tmp_path), given), expected)
    (tmp_path / "tanzaku.json").unlink()
    assert tz.load(model, tmp_path, "c").method.name == "prefix_tuning"


def test_deep_prompts_are_written_by_no_network():
    with pytest.raises(tz.TanzakuError, match="p_tuning_v2: found prefix_projection, expected prefix_tuning"):
        tz.attach(tiny("bert"), tz.PTuningV2(prefix_projection=True), "a")


# -- cartridges


def test_the_first_tokens_are_held_and_saved(tmp_path):
    model = tiny("llama", "lm")
    adapter = tz.attach(model, tz.Cartridge(num_virtual_tokens=5, num_frozen_tokens=2), "a", seed=0)
    assert [(name.rpartition(".")[2], len(p)) for name, p in adapter.trained()] == [("trainable_embedding", 3)]
    tz.save(model, "a", tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert len(whole) == 5
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    known = set(peft.CartridgeConfig.__dataclass_fields__)
    assert config["num_frozen_tokens"] == 2 and config.keys() <= {*known, "modules_to_save"}
    theirs = reopened(model, tmp_path)
    assert len(theirs.prompt_encoder["default"].frozen_embedding) == 2
    again = tz.load(model, tmp_path, "b")
    assert torch.equal(dict(again.named_parameters())["frozen_embedding"], whole[:2])


@torch.no_grad()
def test_a_text_of_as_many_tokens_is_that_text(monkeypatch):
    """Rows go on from its keys and values as from the text itself; of a longer one the first tokens count."""
    monkeypatch.setattr("tanzaku.methods.cartridge.text_ids", lambda *_: [5, 6, 7, 8, 9])
    model = tiny("llama", "lm")
    given = whole_rows(model)["input_ids"]
    text = {"prefix_init_text": "a text", "tokenizer_name_or_path": "some"}
    tz.attach(model, tz.Cartridge(num_virtual_tokens=4, **text), "a", seed=0)
    before = torch.tensor([[5, 6, 7, 8]]).expand(len(given), -1)
    expected = model(input_ids=torch.cat([before, given], 1)).logits[:, 4:]
    with tz.route(model, ["a"] * len(given)):
        assert_close(model(input_ids=given).logits, expected)
    with pytest.raises(tz.TanzakuError, match="a text of 5 tokens for num_virtual_tokens=6, expected a text at least"):
        tz.attach(model, tz.Cartridge(num_virtual_tokens=6, **text), "b")


@pytest.mark.parametrize("wrong", [{"num_frozen_tokens": 5}, {"num_frozen_tokens": -1}, {"prefix_projection": True}])
def test_what_cartridges_refuse(wrong):
    with pytest.raises(tz.TanzakuError, match=r"cartridge: found .*, expected (0 to 4|prefix_tuning)"):
        tz.attach(tiny("llama"), tz.Cartridge(num_virtual_tokens=5, **wrong), "a")


# -- multitask prompts

MULTI = {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2}


def test_each_row_has_its_task_s_prompt_as_in_peft(tmp_path):
    """Files both ways; beside other rows as alone."""
    model = tiny("llama", "lm")
    given, tasks = whole_rows(model), torch.tensor([2, 0, 1, 2])
    config = peft.MultitaskPromptTuningConfig(**MULTI, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    scatter([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(**given, task_ids=tasks).logits[:, 3:]
    tz.load(model, tmp_path / "theirs", "a")
    with tz.route(model, ["a"] * 4, context={"task_ids": tasks}):
        assert_close(model(**given).logits, expected)
    tz.attach(model, tz.PromptTuning(num_virtual_tokens=5), "longer", seed=0)
    with tz.route(model, ["a", None, "longer", "a"], context={"task_ids": tasks}):
        mixed = model(**given).logits
    assert_close(mixed[[0, 3]], expected[[0, 3]])
    for row, entry in ((1, None), (2, "longer")):
        with tz.route(model, [entry]):
            assert_close(mixed[row], model(**{key: t[row : row + 1] for key, t in given.items()}).logits[0])
    tz.save(model, "a", tmp_path / "ours")
    tz.detach(model)
    assert_close(reopened(model, tmp_path / "ours")(**given, task_ids=tasks).logits[:, 3:], expected)


def test_tasks_must_be_known():
    model = tiny("llama", "lm")
    tz.attach(model, tz.MultitaskPromptTuning(**MULTI), "a", seed=0)
    given = whole_rows(model)
    for context, match in (
        ({}, "an adapter reads 'task_ids' of each row"),
        ({"task_ids": torch.tensor([0, 1, 2, 3])}, r"found \[0, 1, 2, 3\], expected 0 to 2"),
        ({"task_ids": torch.zeros(4)}, r"expected a whole number for each row"),
    ):
        with pytest.raises(tz.TanzakuError, match=match), tz.route(model, ["a"] * 4, context=context):
            model(**given)


def test_a_prompt_starts_from_source_tasks(tmp_path):
    """From their average, from one of them, or from what they share, as in PEFT."""
    model = tiny("llama", "lm")
    scatter([p for _, p in tz.attach(model, tz.MultitaskPromptTuning(**MULTI), "source", seed=0).trained()])
    tz.save(model, "source", tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    own = load_file(path)
    for kind in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"):
        settings = {
            **MULTI,
            "num_tasks": 1,
            "prompt_tuning_init": kind,
            "prompt_tuning_init_state_dict_path": path,
            "prompt_tuning_init_task": 1,
        }
        found = dict(tz.attach(model, tz.MultitaskPromptTuning(**settings), kind, seed=0).named_parameters())
        theirs = peft.get_peft_model(
            copy.deepcopy(model), peft.MultitaskPromptTuningConfig(**settings, task_type="CAUSAL_LM")
        ).prompt_encoder["default"]
        assert_close(found["prompt_embeddings"], theirs.embedding.weight)
        same = kind != "ONLY_SOURCE_SHARED"  # there the tasks' own parts are drawn
        for name in ("prefix_task_cols", "prefix_task_rows"):
            assert torch.equal(found[name], getattr(theirs, name)) == same
    settings = {**settings, "prompt_tuning_init": "EXACT_SOURCE_TASK"}
    wrongs = [({"prompt_tuning_init_task": 3}, "0 to 2"), ({"num_virtual_tokens": 4}, r"\(4, 32\)")]
    wrongs += [({"prompt_tuning_init_state_dict_path": None}, "the safetensors of the source")]
    save_file({"prompt_embeddings": own["prompt_embeddings"]}, tmp_path / "part.safetensors")
    wrongs += [({"prompt_tuning_init_state_dict_path": str(tmp_path / "part.safetensors")}, "an adapter of multitask")]
    for wrong, match in wrongs:
        with pytest.raises(tz.TanzakuError, match=f"expected {match}"):
            tz.attach(model, tz.MultitaskPromptTuning(**{**settings, **wrong}), "wrong")
