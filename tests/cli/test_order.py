"""Labels with an order, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from cli_kit import ROWS, Tanzaku, assert_refused, results_of, write_tsv

ORDER = ["harsh", "mild", "balmy"]


def test_an_order_in_a_recipe_or_in_flags(work: Path, tanzaku: Tanzaku) -> None:
    """Which ids, files, tables and predictions have; a resumed run has it, too."""
    for split, before in (("train", ""), ("valid", "the "), ("test", "a ")):
        rows = [(before + text, "balmy" if "spring" in text else label) for text, label in ROWS]
        write_tsv(work / f"{split}.tsv", rows)
    recipe = (work / "recipe.yaml").read_text(encoding="utf-8")
    flags = ["train", "recipe.yaml", "--task", "ordinal", "--out", "run"]
    assert_refused(tanzaku(*flags), "labels balmy, harsh, mild, which are no numbers", "--order")
    named = [word for name in ORDER for word in ("--order", name)]
    assert_refused(tanzaku(*flags, *named[:2]), "--order: found harsh, expected two labels or more")
    said = tanzaku(*flags, *named)
    assert said.code == 0, said.err
    assert "labels harsh < mild < balmy" in said.out
    listed = recipe.replace("data: {", "data: {order: [harsh, mild, balmy], ")
    (work / "recipe.yaml").write_text(f"task: ordinal\n{listed}", encoding="utf-8")
    said = tanzaku("compare", "recipe.yaml", "--method", "lora", "--method", "ia3", "--seeds", "2", "--out", "both")
    assert said.code == 0, said.err
    results = results_of(work / "both")
    assert results["data"]["task"]["labels"] == ORDER and results["design"]["metric"] == "kappa"
    assert tanzaku("compare", "--resume", "--out", "both").code == 0
    said = tanzaku("merge", "run/adapters/lora", "--out", "merged")
    assert said.code == 0, said.err
    config = json.loads((work / "merged/config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {str(at): name for at, name in enumerate(ORDER)}
    assert config["problem_type"] == "single_label_classification"
    said = tanzaku("predict", "run/adapters/lora", "--data", "test.tsv")
    assert said.out.splitlines()[0].split("\t")[2:] == ["predicted", *(f"p_{name}" for name in ORDER)]
