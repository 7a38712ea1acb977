"""Arguments that several commands share: `key=value` words, --config, --print-config, --explain."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condgen import config
from condgen.config import Config
from condgen.errors import ConfigError, DataError


def parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"condgen {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_configuration(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "words", nargs="*", default=[], metavar="key=value", help="task=, system=, data= choose; dotted keys set"
    )
    to.add_argument("--config", action="append", default=[], metavar="FILE", help="yaml read before the words")
    to.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    to.add_argument("--explain", metavar="KEY", help="say which file set KEY (such as train.steps, or optim) and stop")


def with_actions(clips: Sequence[Sequence[str]], file: str | None) -> list[Any]:
    """Past frames of clips as a prompt takes them, each with the actions of the array `file` (entries, A)."""
    if file is None:
        return [list(clip) for clip in clips]
    import numpy as np

    try:
        told = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"--actions {file}: not an array of numbers: {error}") from None
    return [{"pixels": list(clip), "actions": told} for clip in clips]


def shown(loaded: Config, arguments: argparse.Namespace) -> bool:
    """Does what --print-config or --explain asks; whether one of them was given."""
    if arguments.print_config:
        print(loaded.to_yaml(), end="")
    elif arguments.explain:
        print(loaded.explain(arguments.explain))
    return bool(arguments.print_config or arguments.explain)


def load_run(folder: str | Path, words: Sequence[str] = ()) -> Config:
    """The configuration of a finished run, with words over it."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder (it has no config.yaml); give a folder such as runs/NAME")
    return config.load(words, [path])
