"""The table of methods by families: models of different kinds through the same code, and what it makes of faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import families, zoo

from tanzaku.errors import TanzakuError
from tanzaku.methods.lora_layers import LoraDelta
from tanzaku.methods.prompt_tuning import PromptTuning
from tiers import in_families

# Model type -> columns that are refused; all others are ok.
KINDS: dict[str, set[str]] = {
    "qwen3_moe": {"BitFit"},  # biases that are added cannot be merged
    "deepseek_v3": {"BitFit"},
    "gpt_neo": {"BitFit", "prefix", "LLaMA-Adapter", "head"},  # attention of its own; a tied head cannot be merged
    "bamba": {"BitFit"},
    "distilbert": set(),
    "convnext": {"prompt", "P-tuning", "prefix", "LLaMA-Adapter"},
    "t5gemma": {"BitFit", "head"},
}


@in_families(("kind", "column"), [(kind, column) for kind in KINDS for column in families.COLUMNS])
@pytest.mark.filterwarnings("ignore:.*table of families names no layers")
def test_cells(kind: str, column: str) -> None:
    """Each method does all that the table asks of it, or says why not."""
    cell = families.Case(zoo.NAMES[kind]).cell(column)
    assert families.kind(cell) == ("r" if column in KINDS[kind] else "ok"), cell.found


@pytest.mark.parametrize(
    ("kind", "column", "mark"),
    [
        ("nllb-moe", "LoRA all-linear", "ok"),  # experts' choices are the rows' own
        ("dots3_note_text", "prompt", "ok"),  # a number of heads for each layer
        ("fsmt", "LoRA (default)", "ok"),  # tokens first, of which the model takes views
        ("inkling_text", "LLaMA-Adapter", "ok"),  # biases of attention that each row's tokens give
        ("inkling2_text", "prefix", "ok"),  # and sinks
        ("encoder-decoder", "prompt", "ok"),  # an encoder's own configuration says that it keeps no cache
        ("deepseek_v4", "prefix", "r"),  # columns are summed up by their number
        ("deepseek_v4", "prompt", "mix-r"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*table of families names no layers")
def test_architectures_of_their_own(kind: str, column: str, mark: str) -> None:
    cell = families.Case(zoo.NAMES[kind]).cell(column)
    assert cell.text.split(", ")[0] == mark, cell.found


PAGE = Path(__file__).parent.parent / "docs" / "families.md"


def table_of_the_docs() -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in PAGE.read_text("utf-8").splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 1 + len(families.COLUMNS) and row[0] in zoo.NAMES}


@pytest.mark.product
@pytest.mark.parametrize("name", table_of_the_docs())
@pytest.mark.filterwarnings("ignore")
def test_the_table_in_the_docs_holds(name: str) -> None:
    cells, _ = families.check(zoo.NAMES[name], list(families.COLUMNS))
    assert [cells[column].text if column in cells else "base" for column in families.COLUMNS] == table_of_the_docs()[
        name
    ]


def cell_of(column: str) -> families.Cell:
    return families.Case(zoo.NAMES["llama"]).cell(column)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a wrong function in the place of a right one, which it is given first."""

    def put(owner: Any, name: str, function: Any) -> None:
        right = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: function(right, *args, **kwargs))

    return put


def test_faults_have_their_marks(wrong: Any) -> None:
    """A method that merges to something else, has a parameter of no use, refuses, or fails is told by its mark."""
    wrong(LoraDelta, "merged", lambda right, *args: {"weight": right(*args)["weight"] * 1.1})
    assert list(cell_of("LoRA (default)").found) == ["MERGE"]

    def idle(right: Any, layer: Any, module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + layer.lora_B.weight.sum() * 0

    wrong(LoraDelta, "merged", lambda right, layer, module: {"weight": module.weight.detach().clone()})
    wrong(LoraDelta, "outputs", idle)
    wrong(LoraDelta, "batch_key", lambda right, *args: None)
    assert list(cell_of("LoRA (default)").found) == ["nograd"]

    def refuse(right: Any, *args: Any) -> None:
        raise TanzakuError("no place")

    wrong(PromptTuning, "build", refuse)
    assert cell_of("prompt").found == {"r": "no place"}
    wrong(PromptTuning, "build", lambda right, *args: 1 / 0)
    assert list(cell_of("prompt").found) == ["CRASH"]


def test_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Rows and columns that were asked for, each refusal with its reason and its place, and the sums."""
    file = tmp_path / "families.md"
    families.table(["--family", "gpt2", "vit", "--method", "prompt", "head", "--here", "--write", str(file)])
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == "| family | prompt | head |"
    assert "| gpt2 | ok | merge-r |" in lines and "| vit | r | ok |" in lines
    assert "| ok | 1 | 1 |" in lines and "| r | 1 | 1 |" in lines and "| other | 0 | 0 |" in lines
    assert any("reads no token ids" in line and line.endswith("(prompt: vit)") for line in lines)
    assert said.strip() in file.read_text() and file.read_text().startswith("# Every method on every family")
    with pytest.raises(SystemExit):
        families.table(["--family", "gpt5"])


def test_a_family_in_a_process_of_its_own() -> None:
    """A process that ends costs one row and not the table."""
    cells, notes = families.apart_from_here(zoo.NAMES["llama"], ["head"])
    assert cells["head"].text == "ok" and notes == {}
    cells, notes = families.apart_from_here(zoo.Subject("no-such-family"), ["head"])
    assert cells == {} and "base" in notes
