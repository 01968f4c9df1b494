"""report.html: right without a script, quiet on the network, deaf to what rows and names try, and fit to be used.

What a browser does is asked of a real one, which `make test` installs.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sample import sample
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import tanzaku.compare.report
from tanzaku.compare.report import render, write_report
from tanzaku.errors import TanzakuError
from tanzaku.recipe.yaml import parse_yaml

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
STYLE = Path(tanzaku.compare.report.__file__).with_name("report.css").read_text(encoding="utf-8")
CAGE = [
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<!--<script>",
    "{{7*7}}{% raw %}",
    "<b>b</b>&lt;i\"'`",
    "<a href='https://example.com/'>link</a>",
    "line\u2028paragraph\u2029end",
    "🎋👩\u200d👩\u200d👧 emoji",
    "\u202eright to left שלום\u202c",
    "nul\x00bell\x07escape\x1b[31mdelete\x7f\x85",
    "lone \ud800 surrogate",
    "%{x}<br>$\\alpha$",
    "]]>${window.pwned=1}",
    "javascript:window.pwned=1",
]


# -- the page as text


class Page(HTMLParser):
    """A page's tags, and the texts of its scripts and of elements with an id."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open = dict(attributes).get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        self.texts[self.open] = self.texts.get(self.open, "") + data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def renamed(value: Any, names: dict[str, str]) -> Any:
    """A copy with other texts for some, keys as well."""
    if isinstance(value, dict):
        return {renamed(key, names): renamed(entry, names) for key, entry in value.items()}
    if isinstance(value, list):
        return [renamed(entry, names) for entry in value]
    return names.get(value, value) if isinstance(value, str) else value


def caged(words: list[str]) -> dict[str, Any]:
    """A comparison in which all that is other people's is one of those words, which try to get out."""
    results = sample(rows=60, labels=("0", "1", "2"), repeats=1, epochs=2)
    entries = results["candidates"]
    names = {entry["name"]: f"{at}{word}" for at, (entry, word) in enumerate(zip(entries, words, strict=False))}
    names |= dict(zip(("0", "1", "2"), words, strict=False))
    others = ("lora", "r", "llm-jp/llm-jp-3-1.8b", "poems/train.tsv", "x86_64", "stopped", "all", "torch")
    results = renamed(results, names | dict(zip(others, words, strict=False)))
    results["rows"]["texts"][: len(words)] = words
    results["verdict"]["sentences"] = words
    for entry, word in zip(results["candidates"], words, strict=False):
        entry |= {"error": word, "note": word, "adapter": word, "origin": word, "status": word}
    return results | {"status": words[0]}


def test_one_file_that_refers_to_nothing() -> None:
    page = Page(render(sample(rows=20)))
    for tag, attributes in page.tags:
        assert "src" not in attributes and "srcset" not in attributes and "action" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; ") and "http" not in policy
    assert "unsafe" not in policy.split("script-src")[1]


def test_what_others_wrote_is_text_in_html_and_in_json() -> None:
    page = Page(render(caged(CAGE)))
    tame = Page(render(caged([f"word {at}" for at in range(len(CAGE))])))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in tame.tags]
    assert [set(attributes) for _, attributes in page.tags] == [set(attributes) for _, attributes in tame.tags]
    texts = [row["text"] for row in json.loads(page.texts["data"])["rows"]["texts"][: len(CAGE)]]
    assert texts[:9] == CAGE[:9]
    assert texts[9:11] == ["nul␀bell␇escape␛[31mdelete␡\ufffd", "lone \ufffd surrogate"]


def test_the_recipe_can_be_run_again() -> None:
    results = sample(rows=5)
    results["recipe"]["train"]["learning_rate"] = 1e-5
    results["recipe"]["data"]["train"] = "春のデータ: #1.tsv"
    assert parse_yaml(Page(render(results)).texts["recipe"], "the report") == results["recipe"]


def test_it_is_written_beside_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(sample(rows=5), path)
    before = path.read_text(encoding="utf-8")
    seen = []

    def full(self: Path, text: str, **_: Any) -> int:
        seen.append(self.name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(TanzakuError, match=r"cannot write .*report\.html: No space left on device"):
        write_report(sample(rows=6), path)
    assert seen == [".report.html.partial"] and path.read_text(encoding="utf-8") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_results_are_left_as_they_were() -> None:
    results = sample(rows=20)
    before = json.dumps(results)
    render(results)
    assert json.dumps(results) == before


def data(results: dict[str, Any]) -> Any:
    return json.loads(Page(render(results)).texts["data"])


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_pareto_front_is_what_nothing_beats_for_less(metric: str) -> None:
    results = sample(candidates=8, rows=5)
    better = (lambda a, b: a < b) if metric == "loss" else (lambda a, b: a > b)
    results["design"]["metric"] = metric
    found = data(results)
    for cost in ("trainable_parameters", "peak_memory_bytes", "seconds"):
        entries = found["candidates"]
        expected = [
            at
            for at, entry in enumerate(entries)
            if not any(other[cost] <= entry[cost] and better(other["mean"], entry["mean"]) for other in entries)
        ]
        front = found["costs"][cost]["front"]
        assert sorted(front) == expected
        assert [entries[at][cost] for at in front] == sorted(entries[at][cost] for at in front)


def test_a_mean_curve_goes_as_far_as_all_finished_runs() -> None:
    results = sample(candidates=1, rows=5, folds=3, repeats=1, epochs=4)
    jobs = [job for job in results["jobs"] if job["stage"] == "measure"]
    for job, losses in zip(jobs, ([4.0, 3.0, 2.0, 1.0], [2.0, 1.0], [9.0]), strict=True):
        job["epochs"] = [epoch | {"train_loss": loss} for epoch, loss in zip(job["epochs"], losses, strict=False)]
    jobs[2]["status"] = "failed"
    (curve,) = data(results)["curves"]
    assert curve["mean"]["train_loss"] == [3.0, 2.0]
    assert [run["train_loss"] for run in curve["runs"]] == [[4.0, 3.0, 2.0, 1.0], [2.0, 1.0], [9.0]]


def test_failed_candidates_come_last_and_say_why() -> None:
    text = render(sample(rows=5))
    table = text[text.index('<table class="ranking">') : text.index("</table>")]
    rows = table.split("<tr")[2:]
    assert len(rows) == 9 and "<b>failed</b>: " in rows[-1] and "more than memory_limit 4 GiB" in rows[-1]
    assert "runs alone" in rows[-1] and ">full<" in rows[-1]
    assert not any("failed" in row for row in rows[:-1])


@pytest.mark.parametrize("status, words", [("running", "still running"), ("interrupted", "was interrupted")])
def test_what_is_not_done_says_so(status: str, words: str) -> None:
    assert words in render(sample(rows=5) | {"status": status})
    assert words not in render(sample(rows=5))


def test_colours_can_be_read_and_told_apart() -> None:
    colours = {
        name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLE)
    }
    for theme in (0, 1):
        grounds = [colours[name][theme] for name in ("paper", "sheet", "wash")]
        for name in ("ink", "quiet", "accent", "wrong"):
            assert all(contrast(colours[name][theme], ground) >= 4.5 for ground in grounds), (name, theme)
        hues = [colours[f"hue-{number}"][theme] for number in range(8)]
        assert all(contrast(hue, grounds[0]) >= 3 for hue in hues)
        for one, other in itertools.combinations(hues, 2):
            for eye in EYES:
                assert math.dist(seen_by(eye, one), seen_by(eye, other)) > 0.08, (one, other, eye)


# Machado, Oliveira and Fernandes 2009: what normal eyes, protanopes and deuteranopes see of linear RGB.
EYES = [
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
]


def linear(colour: str) -> list[float]:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    weights = (0.2126, 0.7152, 0.0722)
    low, high = sorted(sum(w * part for w, part in zip(weights, linear(c), strict=True)) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def seen_by(eye: tuple[tuple[float, ...], ...], colour: str) -> list[float]:
    """In OKLab, where distances are those that are seen."""
    rgb = [min(max(part, 0.0), 1.0) for part in product(eye, linear(colour))]
    return product(OKLAB[1], [part ** (1 / 3) for part in product(OKLAB[0], rgb)])


def product(matrix: tuple[tuple[float, ...], ...], vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


OKLAB = (
    ((0.412221, 0.536333, 0.051446), (0.211903, 0.680700, 0.107397), (0.088302, 0.281719, 0.629979)),
    ((0.210454, 0.793618, -0.004072), (1.977998, -2.428592, 0.450594), (0.025904, 0.782772, -0.808676)),
)


# -- the page in a browser

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver on the path: see .ci/chromium"
)


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    switches = ["headless=new", "no-sandbox", "no-first-run", "disable-gpu", "disable-quic", "disable-sync"]
    for switch in (*switches, "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


Show = Callable[..., Chrome]


@pytest.fixture
def show(chrome: Chrome, tmp_path: Path) -> Iterator[Show]:
    """Opens the report of some results. At the end nothing has been logged, and nothing asked of a network."""
    chrome.get("about:blank")
    for log in ("browser", "performance"):
        chrome.get_log(log)

    def opened(results: dict[str, Any], width: int = 1280, scheme: str = "light", script: bool = True) -> Chrome:
        path = tmp_path / "report.html"
        write_report(results, path)
        emulate(chrome, scheme)
        resize(chrome, width)
        chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        chrome.get(path.as_uri())
        return chrome

    yield opened
    chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert chrome.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith((tmp_path.as_uri(), "data:")) for url in asked), asked


def emulate(page: Chrome, scheme: str, media: str = "") -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [feature]})


def resize(page: Chrome, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def run(page: Chrome, script: str, *arguments: Any) -> Any:
    return page.execute_script(f"return {script}", *arguments)


def texts_of(page: Chrome, selector: str) -> list[str]:
    found: list[str] = run(page, "[...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)
    return found


def press(page: Chrome, selector: str) -> None:
    element = page.find_element(By.CSS_SELECTOR, selector)
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def traces(page: Chrome) -> dict[str, int]:
    """How many lines or points with something drawn each figure has."""
    counted: dict[str, int] = run(
        page,
        """Object.fromEntries([...document.querySelectorAll(".plot")].map(plot => [plot.id,
        plot.matches(".js-plotly-plot") ? [...plot.querySelectorAll("svg .scatterlayer .trace")]
        .filter(trace => trace.querySelector("path")).length : -1]))""",
    )
    return counted


def overflows(page: Chrome) -> Any:
    """What sticks out to the right of the page and is not in a box of its own that scrolls."""
    return run(
        page,
        """[...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest(".scroll, pre, .hidden, svg, .skip")).map(e => e.outerHTML.slice(0, 80))
        .concat(document.documentElement.scrollWidth > innerWidth ? ["the page"] : [])""",
    )


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn(show: Show, scheme: str) -> None:
    page = show(sample(rows=30), scheme=scheme)
    # Eight points and the front; eight means and eight lines of runs; what was kept, ran to the end and was stopped.
    assert traces(page) == {"plot-cost": 9, "plot-training": 16, "plot-validation": 16, "plot-search-0": 3}
    named = texts_of(page, "#plot-cost .textpoint text")
    assert {"lora-s04-r16", "head"} <= set(named)
    assert overflows(page) == []


@needs_browser
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_of_others_runs(show: Show, width: int) -> None:
    page = show(caged(CAGE), width)
    for button in page.find_elements(By.CSS_SELECTOR, "[data-switch] button"):
        page.execute_script("arguments[0].click()", button)
    assert run(page, "window.pwned") is None
    assert run(page, "document.querySelectorAll('script').length") == 3
    assert run(page, "document.querySelectorAll('img, main a, svg a, b b').length") == 0
    press(page, "[data-value=all]")
    shown = texts_of(page, "#predictions .text")
    assert shown[:9] == CAGE[:9] and shown[9].startswith("nul␀bell␇")
    assert texts_of(page, ".sentence")[:9] == CAGE[:9]
    assert page.title == f"Tanzaku: {CAGE[2]}"
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in texts_of(page, ".ranking th bdi")]
    drawn = texts_of(page, "#plot-cost .textpoint text")
    assert drawn and set(drawn) <= set(names)
    assert width < 1280 or f"4{CAGE[4]}" in drawn
    assert overflows(page) == []


@needs_browser
def test_rows_are_filtered_searched_and_paged(show: Show) -> None:
    results = sample(rows=3000, repeats=1, epochs=2)
    results["rows"]["texts"][1234] = "ＡＢＣ銀河鉄道"
    rows = results["rows"]
    said = [[row.index(max(row)) for row in own] for own in rows["predictions"].values()]
    disagree = sum(len(set(row)) > 1 for row in zip(*said, strict=True))
    wrong = sum(any(own != label for own in row) for label, *row in zip(rows["targets"], *said, strict=True))
    assert 0 < disagree < wrong < 3000

    page = show(results)
    assert texts_of(page, "#page") == ["1 to 25 of 3000 rows"]
    assert len(texts_of(page, "#predictions tbody tr")) == 25
    press(page, "[data-value=disagree]")
    assert texts_of(page, "#page") == [f"1 to 25 of {disagree} rows"]
    press(page, "[data-value=wrong]")
    assert texts_of(page, "#page") == [f"1 to 25 of {wrong} rows"]
    crosses = run(page, "[...document.querySelectorAll('#predictions tr')].slice(1).map(r => /✗/.test(r.textContent))")
    assert all(crosses)
    press(page, "[data-value=all]")
    press(page, "#next")
    assert texts_of(page, "#predictions tbody td:first-child")[0] == "26"
    page.find_element(By.ID, "search-text").send_keys("abc銀河")
    assert texts_of(page, "#page") == ["1 to 1 of 1 rows"]
    assert texts_of(page, "#predictions tbody td:first-child") == ["1235"]
    page.find_element(By.ID, "search-text").send_keys("nothing like it")
    assert texts_of(page, "#page") == ["no row fits"] and texts_of(page, "#predictions tbody tr") == []


@needs_browser
def test_a_row_tells_what_each_finalist_said(show: Show) -> None:
    results = sample(rows=3, labels=("春", "war", "third"))
    first = next(iter(results["rows"]["predictions"]))
    results["rows"]["targets"][0] = 0
    for name, row in zip(results["rows"]["predictions"], ([0.1, 0.7, 0.2], [0.9, 0.1, 0.0], None), strict=False):
        results["rows"]["predictions"][name][0] = row
    results["rows"]["texts"][0] = "春の灯"
    page = show(results)
    cells = texts_of(page, "#predictions tbody tr:first-child td")
    assert cells[:6] == ["1", "春の灯", "春", "✗ war 0.70", "春 0.90", "–"]
    assert texts_of(page, "#predictions thead th")[3].strip() == first
    assert texts_of(page, "#predictions tbody tr:first-child [lang=ja]") == ["春の灯", "春", "春"]


@needs_browser
def test_texts_stand_side_by_side_and_the_best_or_the_worst_come_first(show: Show) -> None:
    results = texts()
    own = results["rows"]
    one, other = own["figures"].values()
    page = show(results)
    heads = [head.strip() for head in texts_of(page, "#predictions thead th")]
    assert heads == ["row", "text", "truth", "the base, not trained", *own["predictions"]]
    mean = [(a + b) / 2 if b is not None else a for a, b in zip(one, other, strict=True)]
    apart = [abs(a - b) if b is not None else 0.0 for a, b in zip(one, other, strict=True)]
    rows = range(len(mean))
    expected = {
        "best": sorted(rows, key=lambda row: -mean[row]),
        "worst": sorted(rows, key=lambda row: mean[row]),
        "apart": sorted(rows, key=lambda row: -apart[row]),
        "file": list(rows),
    }
    first = expected["best"][0]
    cells = texts_of(page, "#predictions tbody tr:first-child td")
    says = [f"✗ {name} says\n{first} {figure[first]:.2f}" for name, figure in own["figures"].items()]
    assert cells == [str(first + 1), f"prompt {first}", f"target {first}", f"✗ base of {first} 0.25", *says]
    for order in ("worst", "apart", "file", "best"):
        press(page, f"[data-switch=order] [data-value={order}]")
        shown = [int(text) - 1 for text in texts_of(page, "#predictions tbody td:first-child")]
        assert shown == expected[order][: len(shown)], order
    assert "perplexity of 23.10 on the held text" in texts_of(page, "#ranking")[0]


@needs_browser
def test_no_order_is_offered_where_a_row_alone_has_no_figure(show: Show) -> None:
    page = show(sample(rows=5, repeats=1, epochs=2))
    assert texts_of(page, "[data-switch=order]") == []
    assert texts_of(page, "#predictions tbody td:first-child") == ["1", "2", "3", "4", "5"]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(show: Show, scheme: str) -> None:
    page = show(sample(rows=5, repeats=1, epochs=2), scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('#plot-cost .xtick text')).fill"
    grounds = ["rgb(252, 251, 247)", "rgb(22, 25, 23)"]
    inks = ["rgb(95, 100, 89)", "rgb(165, 170, 159)"]
    names = ["Dark theme", "Light theme"]
    now = int(scheme == "dark")
    for _ in range(3):
        assert (run(page, ground), run(page, ink)) == (grounds[now], inks[now])
        assert texts_of(page, "#theme") == [names[now]]
        press(page, "#theme")
        now = 1 - now


@needs_browser
def test_switches_and_the_legend_change_the_figures(show: Show) -> None:
    page = show(sample(rows=5, repeats=2, folds=2))
    title = "document.querySelector(arguments[0] + ' .xtitle').textContent"
    front = "[...document.querySelectorAll('[data-cost]')].filter(e => !e.hidden).map(e => e.dataset.cost)"
    for cost, words in (("peak_memory_bytes", "MiB"), ("seconds", "seconds")):
        press(page, f"[data-value={cost}]")
        assert run(page, title, "#plot-cost") == words and run(page, front) == [cost]
        assert texts_of(page, "[data-switch=cost] [aria-pressed=true]") == ["memory" if words == "MiB" else "time"]
    press(page, "[data-switch=search-0] [data-value=r]")
    assert run(page, title, "#plot-search-0") == "r"
    ticks = texts_of(page, "#plot-validation .ytick")
    press(page, "[data-switch=metric] [data-value=loss]")
    assert texts_of(page, "#plot-validation .ytick") != ticks
    press(page, "[data-candidate='0']")
    assert traces(page)["plot-training"] == 14
    press(page, "[data-candidate=none]")
    assert traces(page)["plot-training"] == 0
    press(page, "[data-candidate='3']")
    assert (traces(page)["plot-training"], traces(page)["plot-validation"]) == (2, 2)
    press(page, "[data-candidate=all]")
    assert traces(page)["plot-training"] == 16


@needs_browser
def test_a_keyboard_reaches_everything(show: Show) -> None:
    page = show(sample(rows=30, repeats=1, epochs=2))
    wanted = run(
        page,
        """[...document.querySelectorAll("a, button:enabled, input, summary, .scroll, pre")]
        .filter(e => e.checkVisibility()).length""",
    )
    reached = []
    for _ in range(wanted):
        ActionChains(page).send_keys(Keys.TAB).perform()
        name, seen = run(
            page,
            """[document.activeElement.outerHTML.slice(0, 160),
            getComputedStyle(document.activeElement).outlineStyle !== "none"]""",
        )
        assert seen, f"the focus is not seen on {name}"
        reached.append(name)
    assert 'class="skip"' in reached[0] and 'id="theme"' in reached[1]
    assert len(set(reached)) > wanted - 3  # the two copy buttons and the like may read the same
    for control in ('data-value="wrong"', 'id="search-text"', 'id="next"', 'data-copy="recipe"', "<summary>"):
        assert any(control in name for name in reached), control
    page.find_element(By.CSS_SELECTOR, "[data-value=disagree]").send_keys(Keys.ENTER)
    assert run(page, "document.activeElement.getAttribute('aria-pressed')") == "true"


@needs_browser
def test_everything_has_a_name_and_headings_are_in_order(show: Show) -> None:
    page = show(sample(rows=30, repeats=1, epochs=2))
    levels = run(page, "[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert run(page, "[...document.querySelectorAll('button')].every(e => e.textContent.trim())")
    assert run(page, "[...document.querySelectorAll('input')].every(e => e.labels.length)")
    assert run(
        page,
        """[...document.querySelectorAll("[role=region], [role=group], [role=img], pre")].every(e =>
        e.getAttribute("aria-label") || document.getElementById(e.getAttribute("aria-labelledby")))""",
    )
    assert run(page, "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == run(
        page, "document.querySelectorAll('[id]').length"
    )


@needs_browser
def test_copy_takes_the_recipe(show: Show) -> None:
    page = show(sample(rows=5, repeats=1, epochs=2))
    press(page, "[data-copy=recipe]")
    assert texts_of(page, "[data-copy=recipe]")[0] in ("copied", "selected")
    assert run(page, "getSelection().toString()").startswith("model: llm-jp/llm-jp-3-1.8b\ntask:")


@needs_browser
def test_without_scripts_the_verdict_and_the_ranking_stand(show: Show) -> None:
    page = show(sample(rows=30, repeats=1, epochs=2), script=False)
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})  # to ask it; what is drawn stays
    assert run(page, "document.querySelector('.sentence').checkVisibility()")
    assert run(page, "document.querySelectorAll('.ranking .whisker').length") == 8
    assert run(page, "[...document.querySelectorAll('[data-cost]')].every(e => e.checkVisibility())")
    assert run(page, "[...document.querySelectorAll('.needs-js, .plot')].every(e => !e.checkVisibility())")
    assert "switched off" in texts_of(page, "main noscript p")[0]


@needs_browser
def test_print_is_light_and_fits_the_sheet(show: Show) -> None:
    page = show(sample(rows=30, repeats=1, epochs=2), scheme="dark")
    resize(page, 720)
    wide = "document.querySelector('#plot-cost .main-svg').clientWidth"
    WebDriverWait(page, 10).until(lambda page: run(page, wide) <= 720)
    emulate(page, "dark", "print")
    ink = "getComputedStyle(document.querySelector('#plot-cost .xtick text')).fill"
    WebDriverWait(page, 10).until(lambda page: run(page, ink) == "rgb(95, 100, 89)")
    assert run(page, "getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert run(page, "document.querySelector('details table').checkVisibility()")


def bare(**changes: Any) -> dict[str, Any]:
    """A comparison of which nothing is known yet, but for some things."""
    empty = dict.fromkeys(sample(rows=1, candidates=1), None)
    return empty | {"tanzaku": "0.2.0", "command": "compare", "status": "running"} | changes


def nulls() -> dict[str, Any]:
    """Candidates that did nothing yet, or of which nothing is a number."""
    results = sample(candidates=4, rows=10, repeats=1)
    keep = ("name", "method", "origin", "method_settings", "train_settings", "status", "finalist", "scores")
    for candidate in results["candidates"]:
        candidate |= {key: None for key in candidate if key not in keep}
    for job in results["jobs"]:
        job["epochs"] = [epoch | {"train_loss": None, "valid": {}} for epoch in job["epochs"]]
    for trial in results["search"][0]["trials"]:
        trial["value"] = None
    for pair in results["comparisons"]:
        pair |= dict.fromkeys(("difference", "interval", "p", "p_adjusted"))
    for rows in results["rows"]["predictions"].values():
        rows[0], rows[1] = None, [None, None]
    return results


def wide() -> dict[str, Any]:
    """Very long names, labels and texts, with and without a place to break."""
    results = sample(rows=12, labels=("l" * 90, "長" * 90, "many words " * 9), repeats=1, epochs=2)
    names = {entry["name"]: f"{entry['name']}_{'x' * 200}" for entry in results["candidates"]}
    results = renamed(results, names | {"llm-jp/llm-jp-3-1.8b": "/" + "deep/" * 60 + "d" * 200})
    results["rows"]["texts"][:3] = ["無" * 5000, "w" * 5000, "many words " * 500]
    for entry in results["candidates"]:
        entry |= {"note": "n" * 300, "error": "e" * 500, "adapter": f"adapters/{entry['name']}"}
    return results


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return sample(rows=10, repeats=1, epochs=2, **changes) | dict.fromkeys(keys)


def by(metric: str) -> dict[str, Any]:
    """Ranked by another metric."""
    results = sample(rows=10, repeats=1, epochs=2)
    results["design"]["metric"] = metric
    for entry in results["candidates"]:
        if entry["scores"]:
            entry["mean"] = sum(entry["scores"][metric]) / len(entry["scores"][metric])
            entry["interval"] = [entry["mean"] * 0.99, entry["mean"] * 1.01]
    return results


def untested() -> dict[str, Any]:
    """One split, no test rows: the finalists' predictions are of the validation rows."""
    results = without("search", "comparisons", candidates=2, folds=1)
    results["rows"]["split"] = "valid"
    results["design"] |= {"kind": "split", "folds": None, "memory_limit_bytes": None}
    for entry in results["candidates"]:
        entry |= {"test": None, "test_intervals": None, "interval": None}
    return results


def texts(rows: int = 30) -> dict[str, Any]:
    """Of text that is written: two candidates and the base, ranked by chrF."""
    results = sample(candidates=2, rows=rows, repeats=1, epochs=2) | {"search": None, "forgetting": None}
    results["recipe"] |= {"task": "generation"}
    results["data"]["task"] = {"shape": "pairs", "read": {"prompt": "prompt"}, "max_new_tokens": 8, "writing": "latin"}
    results["design"]["metric"] = "chrf"
    for entry in results["candidates"]:
        entry |= {"test": {"chrf": 0.5, "exact_match": 0.1, "perplexity": 3.0}, "test_intervals": {}}
        entry |= {"scores": {"chrf": entry["scores"]["accuracy"]}, "confusion": None, "held_perplexity": 24.0}
    for job in results["jobs"]:
        for epoch in job["epochs"]:
            epoch["valid"] = {"loss": epoch["valid"]["loss"], "chrf": epoch["valid"]["accuracy"]}
    own = results["rows"]
    own["texts"] = [f"prompt {row}" for row in range(rows)]
    own["targets"] = [f"target {row}" for row in range(rows)]
    names = [entry["name"] for entry in results["candidates"]]
    own["predictions"] = {
        name: [{"text": f"{name} says\n{row}", "loss": 1.0, "right": 1} for row in range(rows)] for name in names
    }
    # The first is good at later rows, the second at every third.
    own["figures"] = dict(
        zip(names, ([row / rows for row in range(rows)], [float(row % 3 == 0) for row in range(rows)]), strict=True)
    )
    own["figures"][names[1]][6] = None
    own["base"] = [{"text": f"base of {row}", "loss": 2.0, "right": 0} for row in range(rows)]
    own["base_figures"] = [0.25] * rows
    results["forgetting"] = {"text": "bundled", "tokens": 765, "base": 23.1}
    return results


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "texts": texts,
    "nothing": bare,
    "no candidates": lambda: bare(candidates=[], jobs=[], search=[], comparisons=[], rows=None),
    "nulls": nulls,
    "one candidate": lambda: without("search", "comparisons", candidates=1, folds=1),
    "all alike": lambda: sample(candidates=3, rows=4, epochs=1) | {"comparisons": []},
    "no test rows": untested,
    "no rows to judge by": lambda: without("search", "comparisons", "rows", "verdict", "design"),
    "forty candidates": lambda: sample(candidates=40, rows=20, repeats=1, epochs=3),
    "seven labels": lambda: without(labels=("a b", "<b>", "'\"", "", "猫", "🎋", "\u202e")),
    "forty labels": lambda: without(labels=tuple(f"label {at}" for at in range(40))),
    "long": wide,
    "by loss": lambda: by("loss"),
    "by ROC-AUC": lambda: by("roc_auc"),
}


@needs_browser
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_shape_of_comparison_is_shown(show: Show, variant: str) -> None:
    results = VARIANTS[variant]()
    page = show(results)
    assert overflows(page) == []
    assert texts_of(page, "h1") and texts_of(page, ".sentence")
    assert len(texts_of(page, ".ranking tbody tr")) == len(results["candidates"] or [])
    drawn = traces(page)
    assert all(count >= (variant != "nulls") for count in drawn.values()), drawn
    assert ("plot-cost" in drawn) == any(entry["mean"] is not None for entry in results["candidates"] or [])
    resize(page, 360)
    WebDriverWait(page, 10).until(lambda page: not overflows(page), "a phone has to scroll sideways")
    assert traces(page) == drawn
