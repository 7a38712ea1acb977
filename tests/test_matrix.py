"""Every generator with every condition, alone and in pairs: the table in docs/conditions.md is the result.

A cell is "yes" after: built, one optimiser step of each phase, sampled, exported, loaded, the same sample again, and a
sample that moves with every field. Otherwise it holds the reason that a user would read.

Run this file to rewrite the table: python tests/test_matrix.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_contract as contract
import torch

from condgen.build import match
from condgen.engine.export import ExportInfo, make_system, read_export, write_export
from condgen.errors import ConfigError, ShapeError
from condgen.metrics.sensitivity import condition_sensitivity
from condgen.rng import RowRandom
from condgen.systems.base import System
from condgen.types import Condition, ConditionSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "conditions.md"
START, END = "<!-- matrix: written by tests/test_matrix.py -->", "<!-- end of matrix -->"
PAIRS = [
    ("label", "text"), ("label", "image"), ("label", "keypoints"), ("text", "boxes"), ("text", "keypoints"),
    ("text", "image"), ("boxes", "keypoints"), ("image", "frames"),
]  # fmt: skip
ROWS = [(), *[(field,) for field in contract.SPECS], *PAIRS]
GENERATORS = sorted(name for name, cls in contract.classes().items() if issubclass(cls, System))


def refusal(name: str, fields: tuple[str, ...]) -> str | None:
    """What a user who gives these fields is told before the first step; None = they are taken."""
    config = SimpleNamespace(
        data_options=SimpleNamespace(ignore=()), train=SimpleNamespace(condition_drop=0.0), task="this",
        system_name=name, data_name="given",
    )  # fmt: skip
    provided = ConditionSpec(**{field: contract.SPECS[field] for field in fields})
    try:
        match(config, contract.classes()[name], SimpleNamespace(conditions=()), provided)
        contract.build(name, fields)
    except (ConfigError, ShapeError) as error:
        return str(error)
    return None


def proven(name: str, fields: tuple[str, ...], folder: Path) -> None:
    """Everything that "yes" stands for."""
    system, data = contract.build(name, fields), contract.batch(name, fields)
    for phase in system.phases():
        trained = [p for n, p in system.named_parameters() if n.split(".")[0] in phase.trains]
        optimizer = torch.optim.Adam(trained, 1e-3)
        losses = phase.loss(data, contract.random())
        if losses is None:
            continue
        losses["loss"].backward()
        optimizer.step()
        system.zero_grad()
    assert isinstance(system, System)
    drawn = draw(system, fields)
    options = contract.tiny_options(name)
    info = ExportInfo(name, condition=system.condition_spec, target=system.target_spec, options=options)
    write_export(folder, system, {}, info)
    known, tensors = read_export(folder)
    assert torch.equal(draw(make_system(known, tensors, "the matrix"), fields), drawn)
    if fields:
        for measured in condition_sensitivity(system, contract.condition(fields)):
            assert measured.swap, f"{name} ignores {measured.field}"


def draw(system: System, fields: tuple[str, ...]) -> torch.Tensor:
    asked = contract.condition(fields) if fields else Condition()
    with torch.no_grad():
        return system.eval().sample(asked, random=RowRandom(5, range(contract.ROWS)))


def table() -> str:
    """Rows are conditions, columns are systems; reasons are numbered below."""
    notes: list[str] = []
    lines = [f"| condition | {' | '.join(f'`{n}`' for n in GENERATORS)} |", "| --- " * (len(GENERATORS) + 1) + "|"]
    for fields in ROWS:
        cells = [cell(name, fields, notes) for name in GENERATORS]
        lines.append(f"| {' + '.join(fields) or 'none'} | {' | '.join(cells)} |")
    numbered = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *numbered])


def cell(name: str, fields: tuple[str, ...], notes: list[str]) -> str:
    why = refusal(name, fields)
    if why is None:
        return "yes"
    cls = contract.classes()[name]
    full = tuple(field for field in contract.SPECS if field in contract.needed(cls, fields))
    if fields and full != fields:
        why = refusal(name, full)
        if why is None:
            return "with " + ", ".join(field for field in full if field not in fields)
    short = why.split(". ")[0].split(";")[0].split(", and this data set")[0]
    if short not in notes:
        notes.append(short)
    return f"no {notes.index(short) + 1}"


CASES = [(name, fields) for name in GENERATORS for fields in ROWS if refusal(name, fields) is None]


@pytest.mark.parametrize(("name", "fields"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v) or "none")
def test_a_cell_that_says_yes_is_true(name, fields, tmp_path):
    proven(name, fields, tmp_path / "export")


def test_the_table_is_what_the_code_does():
    written = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0].strip()
    assert written == table(), "run: python tests/test_matrix.py"


def rewrite() -> None:
    for name, fields in CASES:
        with tempfile.TemporaryDirectory() as folder:
            proven(name, fields, Path(folder) / "export")
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    rewrite()
    sys.exit(0)
