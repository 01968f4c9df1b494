"""`python -m bench [steps] [memory] [startup] [quality]`: the tables asked for, all but quality by default."""

from __future__ import annotations

import datetime
import platform
import sys

import torch


def main() -> None:
    wanted = sys.argv[1:] or ["steps", "memory", "startup"]
    print(
        f"{datetime.date.today()}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    )
    for name in wanted:
        if name == "steps":
            from bench.steps import table
        elif name == "memory":
            from bench.memory import table
        elif name == "startup":
            from bench.startup import table
        elif name == "quality":
            from bench.quality import table
        else:
            sys.exit(f"bench: found {name!r}, expected steps, memory, startup or quality")
        print(f"\n## {name}\n", flush=True)
        table()


if __name__ == "__main__":
    main()
