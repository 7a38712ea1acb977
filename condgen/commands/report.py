"""`condgen report RUN`: curves, samples and scores of a run in one html file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from condgen.commands import arguments


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("report", "Write report.html of a run again.")
    parser.add_argument("run", help="a run folder, such as runs/NAME")
    given = parser.parse_args(words)
    from condgen.engine.report import write_report
    from condgen.engine.run import RunFolder

    print(write_report(RunFolder.open(Path(given.run))))
    return 0
