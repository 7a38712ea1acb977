"""The examples of CONTRIBUTING.md are files that work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from condgen import cli

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project folder with the files of the page, and the toy task to give them a purpose."""
    blocks = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert {name.split("/")[0] for name in blocks} == {"systems", "data", "conditions", "configs"}
    toy = ROOT / "tests" / "toy_project"
    blocks["tasks/toy_task.py"] = (toy / "tasks" / "toy_task.py").read_text(encoding="utf-8")
    for name, text in blocks.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setenv("CONDGEN_PROJECT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.set_flush_denormal(False)  # training on a CPU switches it on; other tests want exact floats


def test_the_examples_train_together(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["task=toy_task", "system=flat_colour", "data=stripes", "system.preset=tiny", "data.ignore=[text]"]
    assert cli.main(["train", *words, "run.name=mine"]) == 0
    assert "exit=0" in capsys.readouterr().out
    info = json.loads((project / "runs" / "mine" / "export" / "config.json").read_text())
    assert info["system"] == "flat_colour" and info["data"]["label_names"] == ["lying", "standing"]
    assert cli.main(["sample", "runs/mine", "--label", "standing", "-o", "grid.png"]) == 0
    assert cli.main(["check-data", "data=stripes", "data.rows=4"]) == 0


def test_the_condition_kind_of_the_page_is_the_one_in_use(project: Path) -> None:
    from condgen.conditions.stack import kind_class

    assert kind_class("label").__name__ == "CyclicLabel"
