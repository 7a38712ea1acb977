"""condgen compare: tables of like scores, refusal of unlike ones."""

import csv
import json

import pytest

from condgen import cli
from condgen.metrics.score import Score
from condgen.metrics.signature import signature


def evaluation(folder, name, *, value=1.0, step=5, metric="kid", stamp="0", **fields):
    place = folder / name / "eval"
    place.mkdir(parents=True, exist_ok=True)
    given = {"ext": "pixels#1", "n": 16, "seed": 0, **fields}
    score = Score(metric, value, floor=9.0, ceiling=0.5, error=0.25, signature=signature(metric, **given),
                  higher_is_better=False, note="read this")  # fmt: skip
    file = place / f"step-{step:08d}-{stamp}.json"
    held = json.loads(file.read_text())["scores"] if file.exists() else []
    file.write_text(json.dumps({"step": step, "eval": {}, "scores": [*held, score.to_dict()]}))
    return file


def run(capsys, *words):
    code = cli.main(["compare", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_like_scores_stand_in_one_table(tmp_path, capsys):
    one = evaluation(tmp_path, "a", value=1.5)
    evaluation(tmp_path, "b", value=2.5)
    evaluation(tmp_path, "b", value=7.0, metric="fid")
    code, out, err = run(capsys, one, tmp_path / "b", "-o", tmp_path / "out" / "table.md")
    assert code == 0 and err == ""
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[0] == "| run | step | kid | fid |"
    assert lines[2:4] == ["| a | 5 | 1.5 +- 0.25 | - |", "| b | 5 | 2.5 +- 0.25 | 7 +- 0.25 |"]
    assert "kid (lower is better): kid|ext=pixels#1" in out
    assert run(capsys, one, tmp_path / "b", "-o", tmp_path / "t.csv")[0] == 0
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [(r["run"], r["score"], r["value"], r["ceiling"]) for r in rows] == [
        ("a", "kid", "1.5", "0.5"), ("b", "kid", "2.5", "0.5"), ("b", "fid", "7.0", "0.5"),
    ]  # fmt: skip


def test_unlike_signatures_are_refused_with_every_field_and_value(tmp_path, capsys):
    evaluation(tmp_path, "a")
    evaluation(tmp_path, "b", seed=1, n=32)
    evaluation(tmp_path, "c", forced="yes")
    code, out, err = run(capsys, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert code == 2 and out == ""
    assert "kid: n: 16 (a) against 32 (b) against 16 (c)" in err
    assert "kid: seed: 0 (a) against 1 (b)" in err and "kid: forced: absent (a)" in err and "ext" not in err
    assert run(capsys, tmp_path / "a", tmp_path / "b", "--ignore", "seed")[0] == 2
    assert run(capsys, tmp_path / "a", tmp_path / "b", "--ignore", "seed,n")[0] == 0
    code, _, err = run(capsys, tmp_path / "a", tmp_path / "b", "--ignore", "sede")
    assert code == 2 and "no signature has such a field" in err


def test_only_some_scores(tmp_path, capsys):
    for name, n in (("a", 1), ("b", 2)):
        evaluation(tmp_path, name)
        evaluation(tmp_path, name, metric="bpd", k=n)
    assert run(capsys, tmp_path / "a", tmp_path / "b")[0] == 2
    code, out, _ = run(capsys, tmp_path / "a", tmp_path / "b", "--only", "kid")
    assert code == 0 and "bpd" not in out
    assert "no run has a score 'fid'" in run(capsys, tmp_path / "a", tmp_path / "b", "--only", "fid")[2]


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"step": 1}', '{"step": 1, "scores": [{"name": "kid", "value": 1}]}']
)
def test_what_is_no_evaluation_is_refused(tmp_path, capsys, text):
    good = evaluation(tmp_path, "a")
    (tmp_path / "bad.json").write_text(text)
    code, _, err = run(capsys, good, tmp_path / "bad.json")
    assert code == 2 and "is no evaluation" in err
    (tmp_path / "empty").mkdir()
    assert "condgen evaluate" in run(capsys, good, tmp_path / "empty")[2]
    assert "cannot read" in run(capsys, good, tmp_path / "none.json")[2]
    assert "at least two" in run(capsys, good)[2]
    assert ".md or .csv" in run(capsys, good, good, "-o", "x.txt")[2]
