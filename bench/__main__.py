"""`python -m bench [TABLE ...]`: the tables asked for; by default steps to startup, as `main` lists them.

`python -m bench families [--family NAME ...] [--method COLUMN ...]`, `python -m bench peft_suite PATH`,
`python -m bench catalogue [--write]`, `python -m bench methods [NAME ...]`, `python -m bench methods_quality [NAME
...]`, `python -m bench spoken_dates [--write]`, `python -m bench t_few --data DIR` and `python -m bench text_to_lora
[FOLDER]` are by themselves: their options come after them.
"""

from __future__ import annotations

import datetime
import importlib
import platform
import sys

import torch

TABLES = {
    "steps": ("steps", "table"),
    "accelerations": ("accelerations", "table"),
    "memory": ("memory", "table"),
    "concurrent": ("concurrent", "table"),
    "curve": ("concurrent", "curve"),
    "workers": ("concurrent", "workers"),
    "inference": ("inference", "table"),
    "decoding": ("decoding", "table"),
    "files": ("files", "table"),
    "startup": ("startup", "table"),
    "busy": ("busy", "table"),
    "quality": ("quality", "table"),
    "precision": ("precision", "table"),
    "gpu": ("gpu", "table"),
}

ALONE = ("families", "peft_suite", "catalogue", "methods", "methods_quality", "spoken_dates", "t_few", "text_to_lora")


def main() -> None:
    if sys.argv[1:2] in [[name] for name in ALONE]:
        importlib.import_module(f"bench.{sys.argv[1]}").table(sys.argv[2:])
        return
    wanted = sys.argv[1:] or ["steps", "memory", "concurrent", "curve", "inference", "files", "startup"]
    if strange := [name for name in wanted if name not in TABLES]:
        sys.exit(f"bench: found {strange[0]!r}, expected {', '.join(TABLES)}, {', '.join(ALONE[:-1])} or {ALONE[-1]}")
    print(
        f"{datetime.date.today()}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    )
    for name in wanted:
        module, function = TABLES[name]
        print(f"\n## {name}\n", flush=True)
        getattr(importlib.import_module(f"bench.{module}"), function)()


if __name__ == "__main__":
    main()
