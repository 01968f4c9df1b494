"""What starting costs: importing the library after torch and transformers, and the command line's help."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

_AFTER = (
    "import torch, transformers, time; from transformers import AutoModelForSequenceClassification; t = time.time()"
)
_USE = {
    "import tanzaku": "import tanzaku",
    "import tanzaku, all of its public names": "import tanzaku; [getattr(tanzaku, name) for name in tanzaku.__all__]",
    "import peft": "import peft",
}


def table(rounds: int = 5) -> None:
    """Print the Markdown table, medians of `rounds`."""
    print("| what | seconds |")
    print("|---|---|")
    for name, code in _USE.items():
        program = f"{_AFTER}; {code}; print(time.time() - t)"
        values = [float(_run(sys.executable, "-c", program).split()[-1]) for _ in range(rounds)]
        print(f"| {name}, after torch and transformers | {sorted(values)[rounds // 2]:.2f} |", flush=True)
    values = []
    for _ in range(rounds):
        began = time.time()
        _run(str(Path(sys.executable).with_name("tanzaku")), "--help")
        values.append(time.time() - began)
    print(f"| tanzaku --help, the whole process | {sorted(values)[rounds // 2]:.2f} |")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
