"""Imports point down only, and heavy libraries load on demand."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "condgen"

# lower layers first; a module may import its own layer (with the exceptions below) and those before it
BASE = "types records specs pixels errors registry rng options"
LAYERS = [BASE.split(), ["data"], ["nn", "losses"], ["conditions"], ["systems"], ["engine"], ["metrics"],
          ["task", "clip_task"], ["config", "build"], ["tasks"],
          ["pipeline", "cli", "commands", "__main__"]]  # fmt: skip
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tasks").glob("*.py"), *(ROOT / "tools").glob("*.py")])


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "tasks":
        return "tasks"
    return parts[1] if parts[0] == "condgen" and len(parts) > 1 else None


def imports(file: Path, *, typing_too: bool = False) -> Iterator[str]:
    """Every imported module with its dotted name, wherever in the file; not those for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typing_too:
            hidden |= {inner for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [name.name for name in node.names]
            if node.module == "condgen":
                yield from (f"condgen.{name}" for name in names)
            elif node.module is not None and node.module.startswith("condgen.") and node.module.count(".") == 1:
                yield from (f"{node.module}.{name}" for name in names)
            else:
                yield str(node.module)


def violations(module: str, imported: list[str]) -> list[str]:
    mine = layer_of(module)
    if mine is None or mine not in RANK:
        return [f"{module} stands in no layer"] if mine not in (None, "__init__") and module != "condgen" else []
    found = []
    for name in imported:
        theirs = layer_of(name)
        if theirs in RANK and RANK[theirs] > RANK[mine]:
            found.append(f"{module} imports {name}: {mine} stands below {theirs}")
        if mine == "systems" and theirs == "systems" and name.split(".")[2:3] not in ([], ["base"]):
            found.append(f"{module} imports {name}: systems never import each other")
    return found


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    assert violations(module_name(file), list(imports(file))) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("condgen.systems.a", "condgen.systems.b"),
        ("condgen.systems.a", "condgen.engine.trainer"),
        ("condgen.data.x", "condgen.systems.base"),
        ("condgen.types", "condgen.data.base"),
        ("condgen.engine.x", "condgen.build"),
        ("condgen.new_place", "condgen.types"),
        ("condgen.nn.matching", "condgen.systems.base"),
    ],
)
def test_the_rule_is_awake(module: str, imported: str) -> None:
    assert violations(module, [imported])


def users_of(library: str) -> set[str]:
    return {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == library for name in imports(file, typing_too=True))
    }


def test_one_place_knows_each_framework() -> None:
    assert users_of("accelerate") == {"engine/world.py"}
    assert {Path(name).parts[0] for name in users_of("omegaconf")} == {"config"}
    assert users_of("transformers") <= {"conditions/_text_models.py", "conditions/text_encoders.py"}


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_condgen_loads_no_heavy_library() -> None:
    loaded = loaded_by("import condgen")
    assert loaded.isdisjoint({"torchvision", "transformers", "kornia", "av", "accelerate", "omegaconf", "rich"})


def test_importing_the_interfaces_loads_torch_and_nothing_heavier() -> None:
    loaded = loaded_by("import condgen.types, condgen.systems.base, condgen.conditions.stack, condgen.data.base")
    assert loaded.isdisjoint({"torchvision", "transformers", "kornia", "av", "accelerate", "omegaconf"})


def test_help_needs_no_torch() -> None:
    loaded = loaded_by("import condgen.cli, contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n"
                       "    assert condgen.cli.main(['--help']) == 0")  # fmt: skip
    assert loaded.isdisjoint({"torch", "torchvision", "transformers", "accelerate", "omegaconf"})


def test_no_file_is_called_after_nothing() -> None:
    vague = {"utils", "helpers", "common", "misc", "util", "helper"}
    assert [str(file) for file in files() if file.stem in vague] == []
