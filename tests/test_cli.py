"""Commands end to end on the toy project: exit codes, what is printed, what is left on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from condgen import cli
from condgen.commands import finish, launcher
from condgen.commands import train as train_command
from condgen.commands.sample import boxes
from condgen.commands.tables import table
from condgen.errors import CheckpointError, ConfigError, DataError, Stopped

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests" / "toy_project"
NAME = "toy_task-toy_regressor-toy_colours"


@pytest.fixture(autouse=True)
def toy_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("CONDGEN_PROJECT", str(TOY))
    monkeypatch.setattr(sys, "argv", ["condgen"])
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setattr(launcher, "_tool", lambda name, module: [name])  # condgen need not be installed to be tested
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_flush_denormal(False)  # training on a CPU switches it on; other tests want exact floats


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDGEN_PROJECT", str(TOY))
        assert cli.main(["train", "task=toy_task", "train.steps=2", f"run.dir={root}", "--quiet"]) == 0
    return root / NAME


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(list(words)) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out + err


# train


def test_train_leaves_a_complete_run_folder(run: Path) -> None:
    names = """config.yaml command.txt environment.json status.json metrics.jsonl log.txt system.json report.html
        export/config.json export/model.safetensors checkpoints/step-00000002"""
    assert [name for name in names.split() if not (run / name).exists()] == []
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("done", 0, 2)
    (scores,) = (run / "eval").glob("*.json")
    found = json.loads(scores.read_text())
    assert found["step"] == 2 and found["scores"][0]["name"] == "rows"
    assert found["attribution"] == "Toy colours, made for tests"


def test_train_says_what_to_do_next(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "train", "task=toy_task", "train.steps=1")
    assert f"condgen sample runs/{NAME} --label" in text and "rows" in text and "floor" in text
    assert f"condgen evaluate runs/{NAME}" in text and f"train.resume=runs/{NAME}" in text
    assert text.splitlines()[-1] == f"condgen: exit=0 reason=done run=runs/{NAME}"


def test_a_taken_name_gets_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        said(capsys, "train", "task=toy_task", "train.steps=1", "run.name=mine", "--quiet")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine", "mine-2"]


def test_resume_by_folder_latest_step_and_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train", "task=toy_task", "--quiet")
    said(capsys, *words, "train.steps=2", "train.resume=latest")  # nothing there yet: starts
    for steps, resume in (
        (3, "latest"),
        (4, f"runs/{NAME}"),
        (5, "4"),
        (6, f"runs/{NAME}/checkpoints/step-00000005"),
    ):
        said(capsys, *words, f"train.steps={steps}", f"train.resume={resume}")
    assert [path.name for path in Path("runs").iterdir()] == [NAME]
    lines = [json.loads(line)["step"] for line in (Path("runs") / NAME / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines)) and lines[-1] == 6
    assert "resume: null" in (Path("runs") / NAME / "config.yaml").read_text()
    text = said(capsys, *words, "train.resume=77", code=2)
    assert "no checkpoint of step 77" in text and "5" in text
    assert "not a run folder" in said(capsys, *words, f"train.resume={TOY}", code=2)


def test_a_refused_resume_leaves_the_run_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "train", "task=toy_task", "train.steps=4", "--quiet")
    before = {name: (Path("runs") / NAME / name).read_text() for name in ("config.yaml", "command.txt", "system.json")}
    for word in ("train.steps=2", "system.width=9"):
        said(capsys, "train", f"train.resume=runs/{NAME}", word, code=2)
        assert before == {name: (Path("runs") / NAME / name).read_text() for name in before}
    text = said(capsys, "train", f"train.resume=runs/{NAME}", "train.steps=5")
    assert "warning" not in text and "train.steps=10" in text


def test_resume_from_a_folder_brings_its_configuration(run: Path) -> None:
    made = train_command.load([f"train.resume={run}", "train.log_every=3"], [])
    assert made.task == "toy_task" and made.train.log_every == 3
    assert train_command.load([f"train.resume={run}/checkpoints/step-00000002"], []).train.steps == 2


def test_a_resumed_run_says_which_options_changed(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "train", "task=toy_task", "train.steps=1")
    text = said(capsys, "train", f"train.resume=runs/{NAME}", "train.steps=2", "optim.default.lr=1e-5")
    (line,) = [line for line in text.splitlines() if "changed since" in line]
    assert "train.steps 1 -> 2" in line and "optim.default.lr" in line and "-> 1e-05" in line
    assert "changed since" not in said(capsys, "train", f"train.resume=runs/{NAME}")


def test_mistakes_leave_no_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "train", "task=toy_task", "train.batch_sise=3", code=2)
    assert "Did you mean 'train.batch_size'?" in text
    assert "data.root" in said(capsys, "train", "task=toy_task", "data.root=missing", code=3)
    assert "needs keypoints" in said(capsys, "train", "task=toy_task", "system=toy_pointer", "system.width=1", code=2)
    assert "unrecognized" in said(capsys, "train", "--frobnicate", code=2)
    assert not Path("runs").exists()


def test_divergence_is_code_4_and_keeps_the_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from condgen.engine.trainer import Trainer
    from condgen.errors import DivergedError

    def fail(self: Trainer, resume: object = None, stop: object = None) -> None:
        raise DivergedError("loss is nan at step 3")

    monkeypatch.setattr(Trainer, "train", fail)
    text = said(capsys, "train", "task=toy_task", code=4)
    assert "loss is nan" in text and f'resume="condgen train train.resume=runs/{NAME}"' in text
    assert json.loads((Path("runs") / NAME / "status.json").read_text())["code"] == 4


def test_a_defect_is_code_1_with_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from condgen.engine.trainer import Trainer

    monkeypatch.setattr(Trainer, "train", lambda *given: 1 // 0)
    assert cli.main(["train", "task=toy_task"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert json.loads((Path("runs") / NAME / "status.json").read_text())["state"] == "failed"


def test_dry_run_shows_sizes_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "train", "task=toy_task", "--dry-run")
    assert "body" in text and "59" in text and "regression" in text and "MiB" in text and "20 steps" in text
    assert not Path("runs").exists()


def test_print_config_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    printed = said(capsys, "train", "task=toy_task", "--print-config", "train.steps=3")
    Path("mine.yaml").write_text(printed)
    assert said(capsys, "train", "--config", "mine.yaml", "--print-config") == printed
    assert "preset small" in said(capsys, "train", "task=toy_task", "--explain", "system.width")
    assert not Path("runs").exists()


def test_traceback_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDGEN_TRACEBACK", "1")
    assert cli.main(["train", "task=nothing"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_only_the_first_process_repeats_what_all_know(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "GRACE_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "1")
    assert said(capsys, "train", "task=nothing", code=2) == ""
    assert "(process 1)" in said(capsys, "check-data", "data=toy_colours", "data.root=missing", code=3)


# sample


def test_sample_grid_and_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sample", str(run), "--label", "red", "--label", "2", "--num", "3", "--seed", "1")
    said(capsys, *words, "-o", "grid.png", "--separate", "out")
    assert Path("grid.png").stat().st_size > 0
    lines = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["red"] * 3 + ["blue"] * 3
    said(capsys, *words, "--separate", "again", "--batch-size", "2")
    assert [line["sha256"] for line in lines] == [
        json.loads(line)["sha256"] for line in Path("again/samples.jsonl").read_text().splitlines()
    ]


def test_sample_from_lines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.jsonl").write_text('{"label": "red"}\n\n{"label": 1}\n')
    assert "samples.png" in said(capsys, "sample", str(run), "--from", "c.jsonl", "--num", "1")
    for text, says in (
        ('{"lable": 1}', "Did you mean 'label'"),
        ("[1]", "line 1"),
        ("{", "not JSON"),
        ("", "no condition"),
    ):
        Path("bad.jsonl").write_text(text)
        assert says in said(capsys, "sample", str(run), "--from", "bad.jsonl", code=3)
    assert "--from gives every field" in said(capsys, "sample", str(run), "--from", "c.jsonl", "--label", "1", code=2)


def test_sample_refusals(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "would ignore text" in said(capsys, "sample", str(run), "--text", "hi", code=2)
    assert "no label named 'purple'" in said(capsys, "sample", str(run), "--label", "purple", code=2)
    assert "no option 'temperature'" in said(capsys, "sample", str(run), "--label", "1", "temperature=2", code=2)
    assert ".png" in said(capsys, "sample", str(run), "--label", "1", "-o", "grid.exe", code=2)
    assert "cannot read" in said(capsys, "sample", str(run), "--keypoints", "absent.json", code=3)
    assert said(capsys, "sample", "absent/run", "--label", "1", code=2)


def test_boxes_are_four_numbers() -> None:
    assert boxes("0,0,0.5,1; 0.5,0,1,1") == [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]
    for text in ("", "1,2,3", "a,b,c,d", "1,2,3,4,5"):
        with pytest.raises(ConfigError, match="four numbers"):
            boxes(text)


# evaluate, report, list, check-data


def test_evaluate_adds_scores_and_never_replaces(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set((run / "eval").glob("*.json"))
    text = said(capsys, "evaluate", str(run), "eval.num_samples=5")
    assert "rows|n=5" in text and len(set((run / "eval").glob("*.json")) - before) == 1
    assert "no checkpoint of step 9" in said(capsys, "evaluate", str(run), "--step", "9", code=2)
    assert "change what was trained" in said(capsys, "evaluate", str(run), "system.width=3", code=2)
    assert "change what was trained" in said(capsys, "evaluate", str(run), "data=openmoji", code=2)
    assert "not a run folder" in said(capsys, "evaluate", "absent", code=2)


def test_evaluate_refuses_weights_that_do_not_fit(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    config = (run / "config.yaml").read_text()
    (tmp_path / "copy" / "config.yaml").write_text(config.replace("width: 8", "width: 9"))
    assert "instead of" in said(capsys, "evaluate", str(tmp_path / "copy"), code=2)


def test_report_is_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert "report.html" in said(capsys, "report", str(run)) and (run / "report.html").is_file()


def test_list_shows_what_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(capsys, "list")
    assert "text and one of boxes, keypoints" in text
    for word in (
        "toy_task",
        "toy_regressor",
        "tiny, small",
        "gan_cls",
        "toy_colours",
        "label, text",
        "depends on data.root",
    ):
        assert word in text
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "broken.py").write_text('"""Broken."""\nimport does_not_exist\n')
    monkeypatch.setenv("CONDGEN_PROJECT", str(tmp_path))
    text = said(capsys, "list")
    assert "broken" in text and "cannot be loaded: ModuleNotFoundError" in text and "gan_cls" in text


def test_check_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert "6 of 6 rows read" in said(capsys, "check-data", "data=toy_colours", "data.rows=6")
    assert "3 of 6 rows read" in said(capsys, "check-data", "data=toy_colours", "data.rows=6", "--limit", "3")
    assert "Did you mean 'data.rows'" in said(capsys, "check-data", "data=toy_colours", "data.rws=6", code=2)
    assert "data=NAME" in said(capsys, "check-data", code=2)
    assert "at least 1" in said(capsys, "check-data", "data=toy_colours", "--limit", "0", code=2)


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--help")
    for word in (*cli.COMMANDS, "toy_task", "gan_cls", "openmoji"):
        assert word in text
    assert "Did you mean 'train'?" in said(capsys, "trian", code=2)
    for command in cli.COMMANDS:
        assert "usage" in said(capsys, command, "--help")


# parts


def test_errors_of_the_first_process_reach_all() -> None:
    class Pair:
        """The second of two processes; the first one failed."""

        is_main = False

        def broadcast(self, value: object) -> object:
            return (None, CheckpointError("gone")) if isinstance(value, tuple) else DataError("broken")

    with pytest.raises(CheckpointError, match="gone"):
        train_command.agreed(Pair(), lambda: None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="broken"):
        train_command.main_first(Pair(), lambda: None)  # type: ignore[arg-type]


def test_a_signal_after_the_last_step_stops_at_once() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), finish.signals_raise():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_printed_commands_start_the_way_this_one_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    here = tmp_path / ".venv" / "bin"
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["condgen", "train", "task=x"])
    assert launcher.words("sample") == [".venv/bin/python", "-m", "condgen", "sample"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "tools" / "train.py"), "task=x"])
    assert launcher.words("sample") == [".venv/bin/python", "tools/sample.py"]
    assert launcher.words("train", processes=2)[-2:] == ["--nproc-per-node=2", "tools/train.py"]
    assert launcher.typed() == [".venv/bin/python", "tools/train.py", "task=x"]
    here.mkdir(parents=True)
    for name in ("python", "condgen"):
        (here / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(here))
    assert launcher.typed() == ["python", "tools/train.py", "task=x"]
    monkeypatch.setattr(sys, "argv", [str(here / "condgen"), "train", "task=x"])
    assert launcher.typed() == ["condgen", "train", "task=x"]


def test_tables_line_up() -> None:
    assert table(("a", "long"), [("xx", 1)]) == "a   long\n--  ----\nxx  1"


# child processes


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CONDGEN_PROJECT": str(TOY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.faults
def test_sigterm_ends_with_75_and_the_run_goes_on(tmp_path: Path) -> None:
    words = ("-m", "condgen", "train", "task=toy_task", "train.steps=1000000", "train.log_every=1")
    child = start(*words, cwd=tmp_path)
    metrics = tmp_path / "runs" / NAME / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 75, out
    assert f'train.resume=runs/{NAME}"' in out.splitlines()[-1] and "exit=75" in out
    status = json.loads((metrics.parent / "status.json").read_text())
    assert (status["state"], status["code"]) == ("stopped", 75) and status["step"] > 0
    again = start(
        "-m", "condgen", "train", f"train.resume=runs/{NAME}", f"train.steps={status['step'] + 2}", cwd=tmp_path
    )
    assert "exit=0" in again.communicate(timeout=60)[0] and again.returncode == 0


@pytest.mark.slow
def test_two_processes_through_accelerate_launch(tmp_path: Path) -> None:
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs" / "accelerate" / "cpu_2proc.yaml"),
    ]
    words = [str(ROOT / "tools" / "train.py"), "task=toy_task", "train.steps=4"]
    child = start(*launch, *words, cwd=tmp_path)
    out, _ = child.communicate(timeout=110)
    assert child.returncode == 0 and out.count("condgen: exit=0") == 1, out
    run = tmp_path / "runs" / NAME
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [NAME]
    scored = start(*launch, str(ROOT / "tools" / "evaluate.py"), str(run), cwd=tmp_path)
    assert "rows" in scored.communicate(timeout=110)[0] and scored.returncode == 0
    assert len(list((run / "eval").glob("*.json"))) == 2
