"""`condgen prepare WHAT ...`: makes data ready for training."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from condgen import registry

PREPARATIONS = {  # word -> (module of condgen.commands, what it does)
    "stabilise": ("stabilise", "videos of a moving camera -> clips of a still one, for data=clips"),
}


def main(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {word:<11} {what}" for word, (_, what) in PREPARATIONS.items()]
        print(
            "\n".join(["usage: condgen prepare WHAT ...", "", *lines, "", "`condgen prepare WHAT --help` says more."])
        )
        return 0 if words else 2
    if words[0] not in PREPARATIONS:
        print(f"error: {registry.unknown('preparation', words[0], list(PREPARATIONS))}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"condgen.commands.{PREPARATIONS[words[0]][0]}").main(words[1:]))
