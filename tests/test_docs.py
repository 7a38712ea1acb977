"""docs/overview.md has every file, in its own words; README shows what the code does.

Run this file to rewrite the overview: python tests/test_docs.py
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS_UP = [
    "types", "records", "specs", "pixels", "errors", "registry", "rng", "options", "task", "clip_task", "build",
    "pipeline", "cli",
]  # fmt: skip
SECTIONS = {
    "condgen": "The package, from the records up",
    "condgen/data": "data: bytes -> Batch; never sees a network",
    "condgen/nn": "nn: shared network parts",
    "condgen/losses": "losses: pure functions of tensors",
    "condgen/conditions": "conditions: one file per condition kind",
    "condgen/systems": "systems: one file per generator family",
    "condgen/engine": "engine: training, checkpoints, run folder, sampling, export",
    "condgen/metrics": "metrics: tensors in, numbers and signatures out",
    "condgen/config": "config: yaml and key=value words -> one checked Config",
    "condgen/commands": "commands: one file per sub-command",
    "tasks": "tasks: one file per user intent",
    "benchmarks": "benchmarks: speed, as ratios of one run",
}
HEAD = """# Overview

One paragraph a file: its own first words. `python tests/test_docs.py` rewrites this page, and the test keeps it true.
An import only ever points down the layers (`tests/test_imports.py`).
"""


def overview() -> str:
    lines = [HEAD]
    for folder, title in SECTIONS.items():
        lines += [f"## {title}", ""]
        files = sorted((ROOT / folder).glob("*.py"))
        if folder == "condgen":
            order = {name: at for at, name in enumerate(RECORDS_UP)}
            files.sort(key=lambda f: order.get(f.stem, len(order)))
        for file in files:
            doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            if doc and (file.name != "__init__.py" or folder == "condgen"):
                lines.append(f"- **`{folder}/{file.name}`** {' '.join(doc.split(chr(10) * 2)[0].split())}")
        lines.append("")
    return "\n".join(lines)


def test_overview_is_current():
    assert (ROOT / "docs/overview.md").read_text(encoding="utf-8") == overview()


def test_every_module_says_what_it_is():
    silent = [
        str(file.relative_to(ROOT))
        for folder in SECTIONS
        for file in (ROOT / folder).glob("*.py")
        if file.stat().st_size and not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_files_that_the_documents_name_exist():
    missing = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert not missing


def test_tests_that_the_documents_name_exist():
    missing, known, found = [], {}, 0
    for page in (ROOT / "docs").glob("*.md"):
        for file, test in re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
            found += 1
            path = ROOT / "tests" / file
            if file not in known:
                nodes = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
                known[file] = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
            if test not in known[file]:
                missing.append(f"{page.name}: {file}::{test}")
    assert not missing and found > 100


def test_every_row_of_the_reliability_tables_is_answered():
    rows = {"C": 17, "L": 7, "R": 9, "S": 6, "N": 7, "W": 7, "D": 18, "G": 11, "H": 5, "I": 5}
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    answered = set()
    for letter, low, high in re.findall(r"^\| ([A-Z])(\d+)(?:-[A-Z](\d+))? \|", text, flags=re.M):
        answered |= {f"{letter}{n}" for n in range(int(low), int(high or low) + 1)}
    assert answered == {f"{letter}{n}" for letter, count in rows.items() for n in range(1, count + 1)}


if __name__ == "__main__":
    (ROOT / "docs/overview.md").write_text(overview(), encoding="utf-8")
