"""A ladder: rows are trained once, done ones are left alone, changed ones refused, and the table says what happened."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from condgen import cli
from condgen.commands import ladder as ladders
from condgen.commands import train
from condgen.engine.scatter import Point, scatter
from condgen.errors import ConfigError, DataError

ROWS = """\
words: >-
  task=unconditional system=vae system.preset=tiny data=npz data.size=16 train.steps=2 train.batch_size=4
  train.sample_every=0 train.device=cpu eval.num_samples=12 eval.extractor=pixels eval.metrics=[kid,prdc]
  eval.watched=0 eval.grid_rows=1 eval.grid_columns=1 train.precision=fp32
seeds: [0, 1]
scores: [bpd, kid]
rows:
  - {name: VAE, words: ["data.root=FILE"]}
  - {name: "VAE + beta", words: ["data.root=FILE", "system.beta=0.5"]}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "mine.npz", x_train=x[:24], y_train=y[:24], x_test=x[24:], y_test=y[24:])
    (tmp_path / "mine.yaml").write_text(ROWS.replace("FILE", str(tmp_path / "mine.npz")))
    return tmp_path / "mine.yaml"


def states(file, *extra):
    held = ladders.read_ladder(str(file))
    return [one.state for one in ladders.plan(held, file.parent / "runs" / "ladder-mine", extra)]


def test_from_nothing_to_a_table_and_again(file, capsys, monkeypatch):
    folder = file.parent / "runs" / "ladder-mine"
    assert cli.main(["evaluate", "--ladder", str(file), "--dry-run"]) == 0
    assert not folder.exists() and capsys.readouterr().out.count("condgen train task=unconditional") == 4

    trained = []
    real = train.train
    monkeypatch.setattr(train, "train", lambda config, **more: trained.append(config.run.name) or real(config, **more))
    assert cli.main(["evaluate", "--ladder", str(file)]) == 0
    assert trained == ["VAE-seed0", "VAE-seed1", "VAE-plus-beta-seed0", "VAE-plus-beta-seed1"]
    text = (folder / "ladder.md").read_text()
    assert "| model | seeds | bpd | kid |" in text and "| VAE + beta | 2 | " in text and " +- " in text
    rows = list(csv.DictReader((folder / "ladder.csv").open()))
    each = [float(r["value"]) for r in rows if r["row"] == "VAE" and r["score"] == "bpd" and r["seed"] != "mean"]
    mean = next(r for r in rows if r["row"] == "VAE" and r["score"] == "bpd" and r["seed"] == "mean")
    assert len(each) == 2 and float(mean["value"]) == pytest.approx(np.mean(each))
    assert float(mean["error"]) == pytest.approx(np.std(each, ddof=1))
    assert Image.open(folder / "ladder.png").size == (960, 640)

    trained.clear()
    assert states(file) == ["done"] * 4
    (folder / "ladder.md").unlink()
    assert cli.main(["evaluate", "--ladder", str(file)]) == 0
    assert trained == [] and (folder / "ladder.md").is_file()

    # a lost evaluation is made again, another protocol is scored, more steps are trained; other options are refused
    for found in (folder / "VAE-seed1" / "eval").glob("*.json"):
        found.write_text("{")
    assert states(file) == ["done", "score", "done", "done"]
    assert states(file, "eval.num_samples=14") == ["score"] * 4
    assert states(file, "train.steps=3") == ["resume"] * 4
    with pytest.raises(ConfigError, match=r"row 'VAE'.*other options: optim.default.lr"):
        states(file, "optim.default.lr=0.5")
    with pytest.raises(ConfigError, match="train.steps"):
        states(file, "train.steps=1")
    status = folder / "VAE-seed0" / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "stopped", "step": 1}))
    assert states(file)[0] == "resume"
    assert cli.main(["evaluate", "--ladder", str(file)]) == 0
    assert trained == ["VAE-seed0"] and states(file) == ["done"] * 4


def test_a_row_that_fails_leaves_the_others(file, monkeypatch, capsys):
    file.write_text(file.read_text().replace("seeds: [0, 1]", "seeds: [0]"))
    real = train.train
    monkeypatch.setattr(
        train, "train", lambda config, **more: 4 if config.run.name == "VAE-seed0" else real(config, **more)
    )
    assert cli.main(["evaluate", "--ladder", str(file)]) == 4
    text = (file.parent / "runs" / "ladder-mine" / "ladder.md").read_text()
    assert "VAE + beta" in text and "| VAE |" not in text
    assert "VAE, seed 0: failed with exit code 4" in capsys.readouterr().out


def test_unlike_protocols_are_refused_unless_the_file_accepts_them(file, capsys):
    text = file.read_text().replace("seeds: [0, 1]", "seeds: [0]")
    file.write_text(text.replace('"system.beta=0.5"', '"eval.importance=2"'))
    assert cli.main(["evaluate", "--ladder", str(file)]) == 2
    assert "bpd: draws: 1 (VAE-seed0) against 2 (VAE-plus-beta-seed0)" in capsys.readouterr().err
    file.write_text(file.read_text() + "ignore: [draws, dequantisation]\n")
    assert cli.main(["evaluate", "--ladder", str(file)]) == 0
    text = (file.parent / "runs" / "ladder-mine" / "ladder.md").read_text()
    assert "| model | seeds | bpd | kid | draws | dequantisation |" in text and text.count("| 2 | ") == 1


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("seeds: [0, 1]", "seeds: 3", "whole numbers"),
        ("seeds: [0, 1]", "sedes: [0]", "unknown key 'sedes'"),
        ("rows:", "plot: [bpd]\nrows:", "two scores"),
        ('name: "VAE + beta"', "name: VAE", "same name"),
        ('"system.beta=0.5"', '"system.bteta=0.5"', "(?s)row 'VAE \\+ beta'.*bteta"),
    ],
)
def test_mistakes_in_the_file(file, old, new, match):
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=match):
        states(file)


def test_flags_that_do_not_fit_are_refused(file, capsys):
    for words in (["runs/x", "--dry-run"], ["runs/x", "--folder", "y"], ["--ladder", str(file), "--best"], []):
        assert cli.main(["evaluate", *words]) == 2
    assert cli.main(["evaluate", "--ladder", "none"]) == 2
    assert "Available" in capsys.readouterr().err


def test_a_scatter_places_its_points():
    names = ["low left", "high right"]
    image = scatter([Point(names[0], 3.0, 20.0, 0.1, 2.0), Point(names[1], 4.0, 90.0)], x_label="bpd", y_label="fid")
    seen = np.asarray(image)
    for colour, left in (((0x25, 0x63, 0xA8), True), ((0xC2, 0x41, 0x0C), False)):
        rows, columns = np.nonzero((seen == colour).all(2))
        assert (np.median(columns) < 480) == left and (np.median(rows) > 320) == left
    with pytest.raises(DataError):
        scatter([Point("x", float("nan"), 1)], x_label="a", y_label="b")
