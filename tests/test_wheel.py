"""A wheel works outside the checkout: tasks and configs travel in it, under a name that cannot collide."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed without its dependencies into an empty folder."""
    pytest.importorskip("hatchling")
    out, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w", str(out)]
    subprocess.run(build, check=True, timeout=110)
    (wheel,) = out.glob("condgen-*.whl")
    with zipfile.ZipFile(wheel) as held:
        names = held.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("condgen")} == set()
    assert {"condgen/py.typed", "condgen/_shipped/configs/train.yaml", "condgen/_shipped/tasks/text2image.py"} <= set(
        names
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, timeout=110)
    return target


def run(installed: Path, cwd: Path, *words: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CONDGEN_PROJECT")}
    done = subprocess.run(
        [sys.executable, "-m", "condgen", *words],
        cwd=cwd, env={**environment, "PYTHONPATH": str(installed)}, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_list_and_configuration(installed: Path, tmp_path: Path) -> None:
    assert "text2image" in run(installed, tmp_path, "--help")
    assert "gan_cls" in run(installed, tmp_path, "list")
    printed = run(installed, tmp_path, "train", "task=text2image", "--print-config")
    assert "name: gan_cls" in printed and "name: openmoji" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_project_of_ones_own_trains_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    for name in ("systems", "data", "tasks", "configs"):
        (tmp_path / name).symlink_to(ROOT / "tests" / "toy_project" / name)
    out = run(installed, tmp_path, "train", "task=toy_task", "train.steps=2")
    assert "condgen: exit=0" in out
    assert (tmp_path / "runs" / "toy_task-toy_regressor-toy_colours" / "export" / "model.safetensors").is_file()
