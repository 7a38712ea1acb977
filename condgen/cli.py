"""The `condgen` command: finds the sub-command, turns errors into one readable message and an exit code.

Exit codes: 0 done, 1 unexpected, 2 configuration, 3 data, 4 diverged, 75 stopped by a signal with a checkpoint.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence

from condgen import __version__, registry
from condgen.errors import CondgenError

GRACE_SECONDS = 3.0

COMMANDS = {  # word -> (module of condgen.commands, what it does)
    "train": ("train", "train a system: condgen train task=text2image"),
    "sample": ("sample", "draw samples from a run: condgen sample runs/NAME --text 'a red fox'"),
    "translate": ("translate", "translate pictures: condgen translate runs/NAME photos/ -o out/"),
    "animate": ("animate", "clips from pictures: condgen animate runs/NAME photo.png -o clip.mp4"),
    "actions": ("actions", "action recognition from a run's discriminator: condgen actions runs/NAME"),
    "evaluate": ("evaluate", "score a run: condgen evaluate runs/NAME"),
    "compare": ("compare", "scores of several runs in one table: condgen compare runs/A runs/B"),
    "report": ("report", "write report.html of a run again: condgen report runs/NAME"),
    "list": ("listing", "what exists and what fits together"),
    "prepare": ("prepare", "make data ready: condgen prepare stabilise videos/ clips/"),
    "check-data": ("check_data", "read every row and say what is wrong: condgen check-data data=folder data.root=DIR"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; never raises for what a user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"condgen {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(f"error: {registry.unknown('command', words[0], list(COMMANDS))}", file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(f"condgen.commands.{COMMANDS[words[0]][0]}")
        code = int(command.main(words[1:]))
        sys.stdout.flush()
        return _last(code)
    except CondgenError as error:
        _report(error)
        return _last(error.exit_code)
    except BrokenPipeError:  # `condgen list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as wanted:  # argparse
        return wanted.code if isinstance(wanted.code, int) else 2
    except Exception:
        traceback.print_exc()
        print("error: this is a defect of condgen; the lines above say where", file=sys.stderr)
        return 1


def overview() -> str:
    """The text of `condgen --help`: commands, and what exists, from files alone."""
    lines = [f"condgen {__version__}: conditional image and video synthesis", "", "usage: condgen COMMAND ...", ""]
    lines += [f"  {word:<11} {what}" for word, (_, what) in COMMANDS.items()]
    for title, kind in (
        ("tasks", "tasks"),
        ("systems", "systems"),
        ("data sets", "data"),
        ("conditions", "conditions"),
    ):
        lines += ["", f"{title}:"]
        lines += [f"  {name:<18} {registry.summary(kind, name)}" for name in registry.names(kind)]
    return "\n".join([*lines, "", "`condgen COMMAND --help` says more; docs/usage.md explains configuration."])


def _last(code: int) -> int:
    """A launcher ends every process when the first one fails; the others wait until that one has said why."""
    if code and os.environ.get("RANK", "0") != "0":
        time.sleep(GRACE_SECONDS)
    return code


def _report(error: CondgenError) -> None:
    """One message. With several processes each has its own stderr, so that only the first repeats what all know."""
    rank = os.environ.get("RANK", "0")
    if error.exit_code in (2, 75) and rank != "0":
        return
    if os.environ.get("CONDGEN_TRACEBACK") == "1":
        traceback.print_exc()
    who = f" (process {rank})" if rank != "0" else ""
    print(f"error{who}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
