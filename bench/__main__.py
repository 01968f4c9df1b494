"""`python -m bench [steps] [startup] [quality]`: print the tables asked for, steps and startup by default."""

from __future__ import annotations

import datetime
import platform
import sys

import torch


def main() -> None:
    wanted = sys.argv[1:] or ["steps", "startup"]
    print(
        f"{datetime.date.today()}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    )
    for name in wanted:
        if name == "steps":
            from bench.steps import table
        elif name == "startup":
            from bench.startup import table
        elif name == "quality":
            from bench.quality import table
        else:
            sys.exit(f"bench: found {name!r}, expected steps, startup or quality")
        print(f"\n## {name}\n", flush=True)
        table()


if __name__ == "__main__":
    main()
