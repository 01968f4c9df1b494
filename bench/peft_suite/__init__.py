"""HF PEFT's own tests of our methods, run with HF PEFT and then with `tanzaku.compat.peft` in its place.

    python -m bench peft_suite PATH [--keep FOLDER] [--files NAME,...]

PATH is HF PEFT's source distribution (peft-VERSION.tar.gz) or a checkout. Nothing of it is kept in this repository: the
tests are read from there, the Hub is a folder of tiny random models made for the run, and what counts is which of the
tests that HF PEFT passes in this place Tanzaku passes, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Pair = tuple[dict[str, Any], dict[str, Any] | None]  # what a test did with HF PEFT, and with Tanzaku

# Files with tests of our methods; those left out are of other methods, of a GPU, or of other libraries' models.
FILES = (
    "test_adaption_prompt",
    "test_auto",
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_helpers",
    "test_hub_features",
    "test_initialization",
    "test_lora_variants",
    "test_low_level_api",
    "test_mapping",
    "test_other",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_torch_compile",
    "test_tuners_utils",
    "test_vision_models",
)
OURS = "tanzaku.compat.peft"
EACH, FILE = 120, 3600  # seconds for a test, and for a file of them


def table(arguments: list[str]) -> None:
    """Print the Markdown tables."""
    parser = argparse.ArgumentParser(prog="python -m bench peft_suite", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="peft-VERSION.tar.gz, or a checkout")
    parser.add_argument("--keep", type=Path, help="a folder for the records; what is there is not run again")
    parser.add_argument("--files", default="", help="only these of the files, with commas between")
    parser.add_argument("--again", action="store_true", help="run Tanzaku's part again, though its records are kept")
    given = parser.parse_args(arguments)
    files = [name for name in FILES if not given.files or name in given.files.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        keep = given.keep or Path(temporary)
        keep.mkdir(parents=True, exist_ok=True)
        suite = Suite(given.path, Path(temporary), keep.resolve())
        runs: dict[str, list[Pair]] = {}
        for name in files:
            theirs = suite.run(name, "peft")
            passed = [each for each in theirs.values() if each["outcome"] == "passed"]
            ours = suite.run(name, OURS, [each["test"] for each in passed], again=given.again)
            runs[name] = [(each, ours.get(each["test"])) for each in passed]
            good = sum(1 for _, own in runs[name] if own is not None and own["outcome"] == "passed")
            print(f"{name}: {good} of {len(passed)}", file=sys.stderr, flush=True)
        show(runs)


class Suite:
    """The tests, unpacked beside a Hub of tiny models."""

    def __init__(self, path: Path, folder: Path, keep: Path):
        self.folder, self.keep = folder / "suite", keep
        tests = self.folder / "tests"
        if path.is_dir():
            shutil.copytree(path / "tests", tests, ignore=shutil.ignore_patterns("conftest.py"))
        else:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
            shutil.copytree(next(folder.glob("*/tests")), tests)
        (tests / "__init__.py").touch()
        self.hub = keep / "hub"
        if not self.hub.exists():
            beside = keep / "hub-unfinished"
            shutil.rmtree(beside, ignore_errors=True)
            self._python(["-m", "bench.peft_suite.hub", str(beside)], HF_HUB_CACHE=str(beside)).check_returncode()
            beside.rename(self.hub)

    def run(
        self, name: str, library: str, only: list[str] | None = None, again: bool = False
    ) -> dict[str, dict[str, Any]]:
        """What each test of a file did with a library."""
        record = self.keep / f"{name}.{library.partition('.')[0]}.jsonl"
        done = record.with_suffix(".done")
        if again:
            done.unlink(missing_ok=True)
        if not done.exists():
            record.unlink(missing_ok=True)
            record.touch()
            names = self.keep / "only.txt"
            names.write_text("\n".join(only or []), encoding="utf-8")
            self._pytest(
                name,
                record,
                {"PEFT_SUITE_LIBRARY": library, **({"PEFT_SUITE_ONLY": str(names)} if only is not None else {})},
            )
            done.touch()
        lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        return {line["test"]: line for line in lines}

    def _pytest(self, name: str, record: Path, more: dict[str, str]) -> None:
        flags = ["-q", "-p", "no:cacheprovider", "-p", "bench.peft_suite.plugin", "--rootdir", "."]
        flags += [f"--timeout={EACH}", "--tb=no", "--no-header", "-o", "addopts=", "-W", "ignore"]
        done = self._python(
            ["-m", "pytest", *flags, f"tests/{name}.py"],
            **more,
            HF_HUB_CACHE=str(self.hub),
            PEFT_SUITE_RECORD=str(record),
            cwd=str(self.folder),
        )
        if done.returncode not in (0, 1, 2, 5):  # 2: a file that cannot be collected, which the record says
            sys.exit(f"peft_suite: pytest ended with {done.returncode} in {name}")

    def _python(self, arguments: list[str], cwd: str | None = None, **more: str) -> subprocess.CompletedProcess[bytes]:
        here = Path(__file__).parent.parent.parent
        path = os.pathsep.join([cwd or "", str(here), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more, "PYTHONPATH": path}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        output = subprocess.DEVNULL if cwd else None
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd or here, env=environment, timeout=FILE, stdout=output
        )


def show(runs: Mapping[str, list[Pair]]) -> None:
    """Print how many of the tests that PEFT passes Tanzaku passes, too, and why it fails the others."""
    print(
        f"HF PEFT's tests of our methods ({len([1 for pairs in runs.values() for _ in pairs])} that it passes here)\n"
    )
    by_file: dict[str, list[str]] = {name: [cause(own) for _, own in pairs] for name, pairs in runs.items()}
    by_method: dict[str, list[str]] = {}
    for pairs in runs.values():
        for theirs, own in pairs:
            by_method.setdefault(theirs["method"], []).append(cause(own))
    for title, rows in (("file", by_file), ("method", dict(sorted(by_method.items())))):
        print(f"| {title} | PEFT passes | ask for what Tanzaku says it has not | of the rest Tanzaku passes | |")
        print("|---|---|---|---|---|")
        whole = [each for causes in by_file.values() for each in causes]
        for name, causes in [*rows.items(), ("all", whole)]:
            lacking, good = causes.count(LACKING), causes.count(PASSED)
            rest = len(causes) - lacking
            print(f"| {name} | {len(causes)} | {lacking} | {good} of {rest} | {good / rest if rest else 1:.0%} |")
        print()
    print("| why a test fails | tests | the commonest |")
    print("|---|---|---|")
    why: dict[str, Counter[str]] = {}
    for pairs in runs.values():
        for _, own in pairs:
            if (kind := cause(own)) != PASSED:
                why.setdefault(kind, Counter())[_brief(own)] += 1
    for kind, texts in sorted(why.items(), key=lambda each: -sum(each[1].values())):
        most = "; ".join(f"{text} ({count})" for text, count in texts.most_common(3))
        print(f"| {kind} | {sum(texts.values())} | {most} |")


PASSED, LACKING = "passed", "asks for what Tanzaku says it has not"
# docs/compat.md names these.
_NOT_SUPPORTED = re.compile(
    r"not supported|expected a linear layer, Conv1D|expected a matrix"
    r"|mixed=True|no change of weights|attention interface|adapters are whole"
)
_NOT_THERE = re.compile(
    r"Config|Mixed|hotswap|inject_adapter|convert_to_lora|convert_to_model|Dora|loftq|Conv3d|Conv1d|\.variants\.|Monteclora"
    r"|tuners\.(?!lora|ia3|adalora|prompt_tuning|p_tuning|prefix_tuning|adaption_prompt|tuners_utils)|optimizers"
    r"|preprocess|initialize_lora|weight_conversion|ParamWrapper|TrainableTokens|quantization"
)
_MISSING = re.compile(r"no attribute '(\w+)'|unexpected keyword argument '(\w+)'|has no '(\w+)'|has no setting '(\w+)'")


def cause(own: dict[str, Any] | None) -> str:
    """Why Tanzaku fails a test that PEFT passes, by its error."""
    if own is None:
        return "did not end in its time"
    if own["outcome"] != "failed":
        return PASSED if own["outcome"] == "passed" else "not collected or skipped"
    text, kinds, error = own.get("text", ""), own.get("kinds", []), own.get("error", "")
    asked = [name for name in own.get("asked", []) if not name.rpartition(".")[2].startswith("_")]
    if error == "NotHere" or own.get("asked"):
        if not asked:
            return "looks into PEFT's private names"
        return LACKING if any(_NOT_THERE.search(name) for name in asked) else "a name that is missing"
    if _NOT_SUPPORTED.search(text):
        return LACKING
    missing = _MISSING.search(text)
    if missing and {"AttributeError", "TypeError", "ImportError"} & set(kinds):
        name = next(group for group in missing.groups() if group)
        return "looks into PEFT's private names" if name.startswith("_") else "a name that is missing"
    if "DID NOT" in text or "Regex pattern did not match" in text:
        return "another error, warning or text of it"
    if "TanzakuError" in kinds:
        return "refused, where PEFT takes it"
    return "another value" if error in ("AssertionError", "Failed") else "crash"


def _brief(own: dict[str, Any] | None) -> str:
    text = (own or {}).get("text", "").partition("\n")[0] or (own or {}).get("error", "")
    return re.sub(r"0x[0-9a-f]+|/tmp/\S+|`", "...", text)[:90].replace("|", "/")
