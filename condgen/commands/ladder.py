"""`condgen evaluate --ladder FILE`: trains and scores every row of a comparison, then writes its table and its plot.

What is trained and scored already is left alone, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condgen import config as configuration
from condgen import registry
from condgen.commands import train
from condgen.commands.compare import Evaluation, markdown, read_evaluation, require_alike, write
from condgen.commands.tables import number, table
from condgen.config import Config
from condgen.config.tree import flatten, listed, shown
from condgen.errors import CondgenError, ConfigError, Stopped
from condgen.metrics.signature import parse

if TYPE_CHECKING:
    from condgen.show.scatter import Point

KEYS = ("words", "seeds", "rows", "scores", "ignore", "plot")
FREE = ("eval.", "run.", "train.resume", "train.device", "train.trackers", "train.keep", "data.workers", "text.cache")
PLOTS = (("bpd", "fid"), ("bpd", "kid"), ("kid", "precision"))  # the first pair that two rows have is drawn


@dataclass(frozen=True)
class Ladder:
    """A file of configs/ladder: every row is trained once a seed, with the common words before its own.

    words    key=value words that all rows share; a list, or one text as it would stand on the command line
    seeds    of training (train.seed); the scores are drawn with eval.seed, the same for all
    scores   columns of the table; () = every score that some row has
    ignore   signature fields in which rows may differ, such as the kind of likelihood; each becomes a column
    plot     two scores, x and y; () = bits per dimension against FID, or KID where there is no FID
    rows     name -> words
    """

    name: str
    rows: Mapping[str, tuple[str, ...]]
    words: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    scores: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    plot: tuple[str, ...] = ()


@dataclass
class Entry:
    """One row with one seed, and what is left to do: train, resume, score, or done. words: its configuration."""

    row: str
    seed: int
    path: Path
    words: list[str]
    config: Config = field(repr=False)
    state: str = "train"


def main(given: argparse.Namespace, words: Sequence[str]) -> int:
    """`given`: ladder, folder, dry_run. `words` come after those of the file, for every row."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a ladder runs in one process; train its rows on several by `condgen train`, see --dry-run")
    ladder = read_ladder(given.ladder)
    folder = Path(given.folder or f"runs/ladder-{ladder.name}")
    entries = plan(ladder, folder, words)
    print(table(("row", "seed", "what", "run"), [(e.row, e.seed, e.state, e.path) for e in entries]))
    if given.dry_run:
        for one in entries:
            if one.state in ("train", "resume"):
                print(f"{one.row}: {shlex.join(['condgen', 'train', *one.words])}")
        return 0
    failed = 0
    for one in entries:
        code = bring_up(one)
        if code == Stopped.exit_code:
            return code
        if code:
            print(f"{one.row}, seed {one.seed}: failed with exit code {code}; the other rows go on")
            failed = failed or code
    write_tables(ladder, folder, [one for one in entries if one.state == "done"])
    return failed


def read_ladder(file: str) -> Ladder:
    """A yaml file, or the name of one in configs/ladder. ConfigError says which key is wrong."""
    path = Path(file) if file.endswith((".yaml", ".yml")) else registry.path("configs/ladder", file, ".yaml")
    tree = configuration.read_file(path).tree
    for key in tree:
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key {key!r}; a ladder has {', '.join(KEYS)}")
    given = tree.get("rows")
    if not isinstance(given, list) or not given or not all(isinstance(row, dict) and "name" in row for row in given):
        raise ConfigError(f"{path}: rows must be a list such as '- {{name: VAE, words: [system=vae]}}'")
    rows = {str(row["name"]): _list(row.get("words"), f"{path}, row {row['name']}") for row in given}
    if len({_slug(name) for name in rows}) < len(given):
        raise ConfigError(f"{path}: two rows have the same name, or names that make the same folder")
    seeds = tree.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"{path}: seeds = {shown(seeds)}; give a list of whole numbers, such as [0, 1, 2]")
    lists = {key: _list(tree.get(key), f"{path}, {key}") for key in ("words", "scores", "ignore", "plot")}
    if lists["plot"] and len(lists["plot"]) != 2:
        raise ConfigError(f"{path}: plot takes two scores, such as [bpd, fid]")
    return Ladder(path.stem, rows, seeds=tuple(seeds), **lists)


def _list(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(shlex.split(value))
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{where}: expected a list of words, not {shown(value)}")
    return tuple(value)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.replace("+", " plus ")).strip("-.") or "row"


def _words(ladder: Ladder, folder: Path, row: str, seed: int, extra: Sequence[str]) -> list[str]:
    name = f"{_slug(row)}-seed{seed}"
    return [
        *ladder.words, *ladder.rows[row], *extra, f"train.seed={seed}", f"run.dir={folder}", f"run.name={name}",
    ]  # fmt: skip


def plan(ladder: Ladder, folder: Path, extra: Sequence[str] = ()) -> list[Entry]:
    """Every row with every seed and what is left to do. ConfigError for a run that was trained with other options."""
    entries = []
    for row in ladder.rows:
        for seed in ladder.seeds:
            words = _words(ladder, folder, row, seed, extra)
            try:
                config = configuration.load(words)
            except ConfigError as error:
                raise ConfigError(f"row {row!r}: {error}") from error
            one = Entry(row, seed, folder / f"{_slug(row)}-seed{seed}", words, config)
            one.state = state_of(one)
            entries.append(one)
    return entries


def state_of(one: Entry) -> str:
    """train, resume, score or done."""
    from condgen.engine.run import RunFolder

    if not (one.path / "config.yaml").is_file():
        if one.path.exists() and any(one.path.iterdir()):
            raise ConfigError(f"{one.path} is in the way: it is no run folder; move it or take another --folder")
        return "train"
    before = dict(flatten(configuration.read_file(one.path / "config.yaml").tree))
    after = dict(flatten(listed(one.config.tree)))
    names = [n for n in dict.fromkeys((*before, *after)) if before.get(n) != after.get(n) and not n.startswith(FREE)]
    status = RunFolder(one.path).read_status() or {}
    longer = one.config.train.steps > (before.get("train.steps") or 0)
    if changed := [n for n in names if n != "train.steps" or not longer]:
        listing = "; ".join(f"{n} {shown(before.get(n))} -> {shown(after.get(n))}" for n in changed)
        raise ConfigError(
            f"row {one.row!r}: {one.path} was trained with other options: {listing}. "
            "Rename the row, take another --folder, or remove that run"
        )
    if status.get("state") != "done" or int(status.get("step", 0)) < one.config.train.steps:
        return "resume"
    return "done" if scored(one) is not None else "score"


def scored(one: Entry) -> Evaluation | None:
    """The newest evaluation of the last step with the protocol of the ladder."""
    wanted = json.loads(json.dumps(listed(one.config.tree["eval"])))
    for file in sorted((one.path / "eval").glob("*.json"), key=lambda f: (f.stat().st_mtime, f.name), reverse=True):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["eval"] == wanted and record["step"] >= one.config.train.steps:
                return read_evaluation(file)
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            continue  # cut short by a crash: scored again
    return None


def bring_up(one: Entry) -> int:
    """Trains and scores one entry as far as it needs that. Returns the exit code of what failed, or 0."""
    from condgen.commands.evaluate import score_run

    try:
        if one.state in ("train", "resume"):
            print(f"\n{one.row}, seed {one.seed}: {one.state}", flush=True)
            words = [*one.words, *([f"train.resume={one.path}"] if one.state == "resume" else [])]
            if one.state == "train" and one.path.is_dir():
                one.path.rmdir()  # empty, left by a crash; a new run would be numbered
            code = train.train(configuration.load(words), quiet=True)
            if code:
                return code
            one.state = "done" if scored(one) is not None else "score"
        if one.state == "score":
            print(f"\n{one.row}, seed {one.seed}: score", flush=True)
            score_run(one.config, one.path)
            one.state = "done"
    except CondgenError as error:
        print(f"{one.row}, seed {one.seed}: {error}")
        return error.exit_code
    return 0


# the table


@dataclass(frozen=True)
class Mean:
    """Mean over the seeds and their standard deviation (None with one seed)."""

    value: float
    spread: float | None
    count: int

    def __str__(self) -> str:
        return number(self.value) + ("" if self.spread is None else f" +- {self.spread:.2g}")


def means(evaluations: Sequence[Evaluation], name: str) -> Mean | None:
    values = [one.scores[name].value for one in evaluations if name in one.scores]
    if not values:
        return None
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def write_tables(ladder: Ladder, folder: Path, entries: Sequence[Entry]) -> None:
    """ladder.md, ladder.csv and ladder.png in `folder`. ConfigError where rows were scored by different protocols."""
    held: dict[str, list[tuple[int, Evaluation]]] = {}
    for one in entries:
        if (found := scored(one)) is not None:
            held.setdefault(one.row, []).append((one.seed, found))
    if not held:
        raise ConfigError(f"{folder}: no row is trained and scored, so there is no table")
    rows = {row: [evaluation for _, evaluation in found] for row, found in held.items()}
    every = [evaluation for found in rows.values() for evaluation in found]
    names = list(ladder.scores) or list(dict.fromkeys(name for one in every for name in one.scores))
    known = {f for one in every for s in one.scores.values() for f in parse(s.signature).fields}
    ignored = [f for f in ladder.ignore if f in known]
    require_alike(every, names, ignore=ignored)
    headers = ["model", "seeds", *names, *ignored]
    body = [
        [
            row, str(len(found)), *("-" if (m := means(found, name)) is None else str(m) for name in names),
            *(_values(found, f) for f in ignored),
        ]
        for row, found in rows.items()
    ]  # fmt: skip
    print("\n" + table(headers, body))
    notes = []
    for name in names:
        score = next((e.scores[name] for e in every if name in e.scores), None)
        if score is not None:
            better = "higher" if score.higher_is_better else "lower"
            ends = f"floor {number(score.floor)}, ceiling {number(score.ceiling)} (of the first run)"
            notes.append(f"- `{name}`, {better} is better; {ends}: `{score.signature}`")
    about = "Means over the seeds; +- is their standard deviation." if len(ladder.seeds) > 1 else "One seed."
    write(folder / "ladder.md", f"# {ladder.name}\n\n{markdown(headers, body)}\n{about}\n\n" + "\n".join(notes) + "\n")
    write(folder / "ladder.csv", to_csv(held, rows, names))
    drawn = plotted(ladder, rows)
    if drawn is None:
        print("no plot: no two scores are known of any row" + f" ({' and '.join(ladder.plot)})" * bool(ladder.plot))
        return
    from condgen.show.scatter import scatter

    (x, y), points = drawn
    scatter(points, x_label=x, y_label=y).save(folder / "ladder.png")
    print(folder / "ladder.png")


def _values(found: Sequence[Evaluation], name: str) -> str:
    """What the signatures of a row say under an ignored field."""
    values = [parse(s.signature).fields.get(name) for one in found for s in one.scores.values()]
    return ", ".join(dict.fromkeys(v for v in values if v is not None)) or "-"


def to_csv(
    held: Mapping[str, Sequence[tuple[int, Evaluation]]], rows: Mapping[str, Sequence[Evaluation]], names: Sequence[str]
) -> str:
    """A line a row, seed and score, and one of the mean, whose error is the standard deviation over seeds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "seed", "score", "value", "error", "floor", "ceiling", "higher_is_better", "signature"])
    for row, found in held.items():
        for name in names:
            for seed, one in found:
                if name in one.scores:
                    s = one.scores[name]
                    ends = ["" if v is None else repr(v) for v in (s.value, s.error, s.floor, s.ceiling)]
                    writer.writerow([row, seed, name, *ends, s.higher_is_better, s.signature])
            mean = means(rows[row], name)
            if mean is not None:
                spread = "" if mean.spread is None else repr(mean.spread)
                writer.writerow([row, "mean", name, repr(mean.value), spread, "", "", "", ""])
    return out.getvalue()


def plotted(ladder: Ladder, rows: Mapping[str, Sequence[Evaluation]]) -> tuple[tuple[str, str], list[Point]] | None:
    """The two scores to draw and a point a row that has both."""
    from condgen.show.scatter import Point

    pairs = [(ladder.plot[0], ladder.plot[1])] if ladder.plot else list(PLOTS)
    best: tuple[tuple[str, str], list[Point]] | None = None
    for x, y in pairs:
        points = []
        for row, found in rows.items():
            a, b = means(found, x), means(found, y)
            if a is not None and b is not None:
                points.append(Point(row, a.value, b.value, a.spread or 0.0, b.spread or 0.0))
        if points and (best is None or len(points) > len(best[1])):
            best = ((x, y), points)
    return best
