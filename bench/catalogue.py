"""The table of methods: as a file of the package, which `tanzaku methods` prints, and as docs/methods.md.

`python -m bench catalogue` prints the document, `--write` writes both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tanzaku
from tanzaku.core.method import Method
from tanzaku.core.space import Choice, Range
from tanzaku.methods import METHODS

FILE = Path(tanzaku.__file__).parent / "methods" / "methods.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "methods.md"

HEAD = """# Methods

Made by `python -m bench catalogue --write` of what each method's file says; a test holds it current. Parameters are
those of one adapter without a head. "By default" is what `tanzaku compare` trains where a recipe names no methods. All
of them train side by side in one batch on one frozen model, but for full fine-tuning. Where HF PEFT has the method,
tests hold it to PEFT's logits from the same weights, and to files that either reads (tests/interop).

| method | what it is | merges | in HF PEFT | by default | learning rate | paper |
|---|---|---|---|---|---|---|
"""


# By HF PEFT's names; a test holds that it has no other that is missing here.
LEFT_OUT = {
    "ADAMSS": "clusters each weight's singular vectors, and shares its budget out as it trains; large, and not done",
    "FROD": "decomposes all layers' weights together, and keeps a rotation of its own beside them; large, and not done",
    "LILY": "mixes its experts by a mean over all tokens of a batch: a row would depend on its neighbours",
    "OSF": "trains the weight's own singular vectors, as many numbers as full fine-tuning",
    "SHADOW": "a second, smaller model that runs beside the base",
}
TAIL = """
## Left out

Methods that HF PEFT has and that are not here, with the reason:

"""


def content() -> str:
    """What stands in the package's file, of the registry."""
    methods = [
        {
            "name": method.name,
            "class": method.__name__,
            "by_default": method.by_default,
            "peft_type": method.peft_type,
            "mergeable": method.mergeable,
            "learning_rate": method.learning_rate,
            "paper": method.paper,
            "summary": method.summary,
            "settings": method().settings(),
        }
        for method in METHODS.values()
    ]
    return json.dumps(methods, indent=2, ensure_ascii=False) + "\n"


def document() -> str:
    """What stands in docs/methods.md."""
    return HEAD + "".join(map(_row, METHODS.values())) + "".join(map(_section, METHODS.values())) + TAIL + _left_out()


def _left_out() -> str:
    return "".join(f"- {name}: {reason}\n" for name, reason in LEFT_OUT.items())


def _row(method: type[Method]) -> str:
    cells = (
        f"[`{method.name}`](#{method.name})",
        method.summary,
        "yes" if method.mergeable else "no",
        f"`{method.peft_type}`" if method.in_peft else "-",
        "yes" if method.by_default else "no",
        f"{method.learning_rate:g}",
        method.paper,
    )
    return f"| {' | '.join(cells)} |\n"


def _section(method: type[Method]) -> str:
    about = method.about
    lines = {
        "Where": about.where,
        "Parameters": about.parameters,
        "Cost of a step": about.cost,
        "Choose it": about.choose,
        "Limits": about.limits,
    }
    if method.space:
        lines["A search draws"] = ", ".join(f"`{key}` {_in_words(space)}" for key, space in method.space.items())
    return f"\n## {method.name}\n\n" + "".join(f"- {title}: {text}\n" for title, text in lines.items())


def _in_words(space: Choice | Range) -> str:
    if isinstance(space, Choice):
        return f"of {', '.join(map(str, space.values))}"
    return f"from {space.low:g} to {space.high:g}" + (", spread over orders of magnitude" if space.log else "")


def table(arguments: Sequence[str]) -> None:
    """Print the document, or with `--write` write both files."""
    if list(arguments) == ["--write"]:
        FILE.write_text(content(), encoding="utf-8")
        DOCUMENT.write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")
