"""`condgen check-data`: reads a data set as training would and says what is wrong with it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from condgen import config as configuration
from condgen import registry
from condgen.commands import arguments
from condgen.errors import ConfigError, DataError

EPILOG = """\
examples:
  condgen check-data data=openmoji
  condgen check-data data=folder data.root=my_pictures --limit 1000
"""


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("check-data", "Read every row of a data set and say what is wrong.", EPILOG)
    parser.add_argument("words", nargs="*", default=[], metavar="key=value", help="data=NAME and data.* options")
    parser.add_argument("--split", default="train", help="train (the default), val or test")
    parser.add_argument("--against", default="test", help="a split that must not share rows with it (test); none = off")
    parser.add_argument("--limit", type=int, help="rows to read; the default is all")
    given = parser.parse_intermixed_args(words)
    if given.limit is not None and given.limit < 1:
        raise ConfigError(f"--limit {given.limit}: give a number of rows, at least 1")
    name, options = configuration.load_data(given.words)

    from condgen.data.base import DataSource, RowDataset
    from condgen.data.checks import check

    cls: Any = registry.load("data", name, DataSource)
    if not issubclass(cls, RowDataset):
        raise ConfigError(f"{name} is a stream and is checked while it is read; check-data needs rows by number")
    other = None
    if given.against not in (given.split, "none"):
        with contextlib.suppress(DataError, ConfigError):  # a layout without that split has nothing to compare
            other = cls(split=given.against, **options)
    report = check(cls(split=given.split, **options), given.limit, other=other, name=f"{name}, {given.split}")
    print(report)
    return report.exit_code
