"""task=text2image on the folders that people have: small, without a test split, with rows that cannot be read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from condgen import config, registry
from condgen.build import Built, build
from condgen.errors import DataError, DivergedError


def made(root: Path, *words: str, rows: int = 8) -> Built:
    lines = []
    for i in range(rows):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(root / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"thing {i}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    given = ("task=text2image", "system.preset=tiny", "data=folder", f"data.root={root}", "data.size=16")
    return build(config.load([*given, "text.encoder=hash_bow", "text.cache=memory", *words]))


def test_a_small_folder_is_held_out_from_too(tmp_path: Path) -> None:
    built = made(tmp_path, rows=4)
    assert (len(built.train_data), len(built.test_data)) == (3, 1)


def test_nothing_to_score_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eval.split=train"):
        made(tmp_path, "data.holdout=0")
    assert len(made(tmp_path, "data.holdout=0", "eval.split=train").test_data) == 8


def test_rows_that_cannot_be_read_are_left_out_of_grids_and_scores(tmp_path: Path) -> None:
    rows_of = registry.module("tasks", "text2image").rows_of
    built = made(tmp_path, "data.holdout=0", "eval.split=train")
    condition, pixels, captions = rows_of(built, built.train_data, 10, seed=0)
    assert len(condition) == len(pixels) == 10 and captions[:2] == captions[8:]
    broken, missing = captions[0].split()[1], captions[1].split()[1]
    (tmp_path / f"{broken}.png").write_bytes(b"no picture")
    (tmp_path / f"{missing}.png").unlink()
    again = build(built.config)
    _, rest, others = rows_of(again, again.train_data, 6, seed=0)
    assert others == captions[2:8] and torch.equal(rest, pixels[2:8])
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match="check-data"):
        rows_of(again, build(built.config).train_data, 6, seed=0)


def test_a_stream_has_its_grid_and_its_sensitivity(tmp_path: Path) -> None:
    """Rows without numbers: the first of the stream are shown and probed, so a dead condition stops a run."""
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "train-000.tar", "w") as archive:
        for i in range(24):
            picture = io.BytesIO()
            Image.new("RGB", (20, 20), (i * 10, 0, 0)).save(picture, "PNG")
            for name, data in ((f"{i:03d}.png", picture.getvalue()), (f"{i:03d}.txt", f"thing {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    words = ["task=text2image", "system.preset=tiny", "data=webdataset_shards", f"data.root={tmp_path}", "data.size=16"]
    built = build(config.load([*words, "text.encoder=hash_bow", "text.cache=memory"]))
    assert not built.can_score
    drawn: list[Image.Image] = []
    log = SimpleNamespace(media=lambda step, name, picture: drawn.append(picture))
    grid, sensitivity = built.task.hooks(built, None, log)  # type: ignore[arg-type]
    grid.run(built.system.eval(), 0)
    assert drawn[0].height > 8 * 96  # eight captions
    assert sensitivity.run(built.system, 0)["sensitivity/text"] > 0


def test_a_run_whose_output_ignores_its_condition_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = made(tmp_path)
    monkeypatch.setattr(built.system, "sample", lambda condition, *, random: random.randn(3, 16, 16).tanh())
    sensitivity = next(h for h in built.task.hooks(built, None, None) if h.name == "sensitivity")  # type: ignore[arg-type]
    with pytest.raises(DivergedError, match="does not depend on text"):
        sensitivity.run(built.system, 1)
