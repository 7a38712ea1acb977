"""`condgen compare RUN RUN ...`: one table of the scores of several runs, or why they cannot stand in one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from condgen.commands import arguments
from condgen.commands.tables import number, table
from condgen.errors import ConfigError
from condgen.metrics.score import Score
from condgen.metrics.signature import METRIC, Signature, comparable, parse

EPILOG = """\
examples:
  condgen compare runs/A runs/B
  condgen compare runs/A runs/B -o table.md          or table.csv
  condgen compare runs/A/eval/step-00000500-20260101T000000.json runs/B --only fid,kid
  condgen compare runs/A-0 runs/A-1 --ignore seed    the same protocol with another seed

A run stands for its newest evaluation. Scores whose signatures differ are refused, with the fields that differ (exit
code 2): such numbers are different quantities. --ignore takes the fields that you accept to differ.
"""
FORMATS = (".md", ".csv")


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of a run said: scores by name, in their order."""

    name: str
    path: Path
    step: int
    scores: Mapping[str, Score]


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("compare", "Scores of several runs in one table, if they can be compared.", EPILOG)
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_JSON", help="run folders, or files of RUN/eval")
    parser.add_argument("--ignore", default="", metavar="FIELDS", help="signature fields that may differ: seed,condgen")
    parser.add_argument("--only", default="", metavar="SCORES", help="these scores alone: fid,kid")
    parser.add_argument("-o", "--out", metavar="FILE", help="write the table as FILE.md or FILE.csv")
    given = parser.parse_args(words)
    if len(given.runs) < 2:
        raise ConfigError("compare needs at least two runs")
    out = None if given.out is None else Path(given.out)
    if out is not None and out.suffix.lower() not in FORMATS:
        raise ConfigError(f"-o {out}: give a file that ends with {' or '.join(FORMATS)}")
    found = [read_evaluation(Path(run)) for run in given.runs]
    names = chosen(found, listed(given.only))
    require_alike(found, names, ignore=listed(given.ignore))
    headers, rows = cells(found, names)
    print(table(headers, rows))
    for one in names:
        held = next(e.scores[one] for e in found if one in e.scores)
        print(f"{one} ({'higher' if held.higher_is_better else 'lower'} is better): {held.signature}")
    if out is not None:
        write(out, to_csv(found, names) if out.suffix.lower() == ".csv" else markdown(headers, rows))
    return 0


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def read_evaluation(path: Path) -> Evaluation:
    """The newest evaluation of a run folder, or a file of its eval folder. ConfigError for anything else."""
    file = path
    if path.is_dir():
        held = sorted((path / "eval").glob("*.json"), key=lambda f: (f.stat().st_mtime, f.name))
        if not held:
            raise ConfigError(f"{path} has no evaluation; `condgen evaluate {path}` makes one")
        file = held[-1]
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        scores = {one["name"]: Score.from_dict(one) for one in record["scores"]}
        for one in scores.values():
            parse(one.signature)
        step = int(record["step"])
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; give a run folder or a file of RUN/eval") from None
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{file} is no evaluation of condgen: {error!r}") from None
    inside = file.parent.name == "eval"
    return Evaluation(file.parent.parent.name if inside else file.stem, file, step, scores)


def chosen(found: Sequence[Evaluation], only: Sequence[str]) -> list[str]:
    """Names of the scores to show: those of `only`, or all, in the order in which they appear."""
    every = list(dict.fromkeys(name for one in found for name in one.scores))
    absent = [name for name in only if name not in every]
    if absent:
        raise ConfigError(f"no run has a score {absent[0]!r}; there are {', '.join(every) or 'none'}")
    return list(only) or every


def require_alike(found: Sequence[Evaluation], names: Sequence[str], *, ignore: Sequence[str] = ()) -> None:
    """Raises ConfigError that lists every differing field of every score, with its values run by run."""
    known = {field for one in found for s in one.scores.values() for field in parse(s.signature).fields}
    strange = [field for field in ignore if field not in known]
    if strange:
        raise ConfigError(f"--ignore {strange[0]}: no signature has such a field; they have {', '.join(sorted(known))}")
    problems = []
    for name in names:
        having = [one for one in found if name in one.scores]
        texts = [one.scores[name].signature for one in having]
        fields = dict.fromkeys(f for text in texts[1:] for f in comparable(texts[0], text, ignore=ignore))
        for field in fields:
            values = [f"{_value(parse(text), field)} ({one.name})" for one, text in zip(having, texts, strict=True)]
            problems.append(f"  {name}: {field}: {' against '.join(values)}")
    if problems:
        raise ConfigError(
            "these scores cannot be compared, because their protocols differ:\n" + "\n".join(problems) +
            "\nEvaluate all runs with the same settings, leave scores out with --only, or accept fields with --ignore"
        )  # fmt: skip


def _value(held: Signature, field: str) -> str:
    return held.metric if field == METRIC else held.fields.get(field, "absent")


def cells(found: Sequence[Evaluation], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headers and one row a run: value +- error, "-" where a run lacks a score; last the ceilings, then the floors."""
    rows = [[one.name, str(one.step), *(_cell(one.scores.get(name)) for name in names)] for one in found]
    for end in ("ceiling", "floor"):
        held = [next((getattr(e.scores[name], end) for e in found if name in e.scores), None) for name in names]
        rows.append([f"({end} of the first)", "", *map(number, held)])
    return ["run", "step", *names], rows


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return number(score.value) + ("" if score.error is None else f" +- {score.error:.2g}")


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def to_csv(found: Sequence[Evaluation], names: Sequence[str]) -> str:
    """One line a score of a run, with everything that is known of it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "step", "score", "value", "error", "floor", "ceiling", "higher_is_better", "signature"])
    for one in found:
        for name in names:
            if name in one.scores:
                s = one.scores[name]
                ends = [s.value, s.error, s.floor, s.ceiling]
                values = ["" if v is None else repr(v) for v in ends]
                writer.writerow([one.name, one.step, name, *values, s.higher_is_better, s.signature])
    return out.getvalue()


def write(out: Path, text: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another place with -o") from error
    print(out)
