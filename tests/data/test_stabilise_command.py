"""`condgen prepare stabilise`: layouts in and out, what is quarantined, never replaced, and goes on after a stop."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from condgen.cli import main
from condgen.data import stabilise
from condgen.data.clips import Clips
from condgen.data.video import probe, read_frames
from condgen.show.clips import write_clip

SHORT = ["--size", "32", "--frames", "4", "--min-frames", "3", "--skip", "1", "--features", "200"]


def walk(frames: int, seed: int = 0) -> torch.Tensor:
    """uint8 (frames, 3, 64, 72): a camera that jumps by whole pixels over a texture."""
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.rand(1, 3, k, k, generator=draw) * k**-0.3 for k in (8, 16, 32)]
    wide = sum(F.interpolate(part, size=(100, 100), mode="bicubic")[0] for part in parts)
    wide = ((wide - wide.min()) / (wide.max() - wide.min()) * 255).round().to(torch.uint8)
    places = [(10 + 3 * (t % 3), 8 + 2 * (t % 2)) for t in range(frames)]
    return torch.stack([wide[:, y : y + 64, x : x + 72] for x, y in places])


def run(source: Path, out: Path, *more: str) -> int:
    return main(["prepare", "stabilise", str(source), str(out), *SHORT, *more])


def records(out: Path) -> dict[str, dict]:
    lines = map(json.loads, (out / "stabilise.jsonl").read_text().splitlines())
    return {line["source"]: line for line in lines}


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def videos(tmp_path) -> Path:
    """Two classes; a video, a folder of frames, a caption, and what cannot be used."""
    root = tmp_path / "in"
    write_clip(root / "beach" / "a.avi", walk(10), fps=12)
    (root / "beach" / "a.txt").write_text("waves come in\n")
    write_clip(root / "golf" / "frames", walk(5, seed=1))
    write_clip(root / "golf" / "cut.mp4", walk(12, seed=2))
    whole = (root / "golf" / "cut.mp4").read_bytes()
    (root / "golf" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "golf" / "list.mp4").write_text("#EXTM3U\nhttp://example.com/a.ts\n")
    write_clip(root / "golf" / "plain.avi", torch.full((6, 3, 64, 72), 90, dtype=torch.uint8))
    write_clip(root / "golf" / "short.avi", walk(3, seed=3))
    return root


def test_a_tree_of_videos_becomes_clips_that_stand_still(videos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(videos, out, "--format", "avi") == 3
    said = capsys.readouterr()
    assert "3 clips of 6 videos" in said.out and "4 videos quarantined" in said.out
    for name, reason in (("cut.mp4", "cut short"), ("list.mp4", "playlist"), ("plain.avi", "plain surface"),
                         ("short.avi", "2 frames; 3 are needed")):  # fmt: skip
        line = next(line for line in said.err.splitlines() if name in line)
        assert line.startswith("quarantined: golf/") and reason in line
    assert [f for f in files(out) if not f.startswith("stabilise")] == [
        "beach/a-000001.avi", "beach/a-000001.txt", "beach/a-000005.avi", "beach/a-000005.txt",
        "golf/frames-000001.avi",
    ]  # fmt: skip
    assert records(out)["beach/a.avi"]["discarded"] == ["frame 9: it has 1 frames; 3 are needed"]
    assert probe(out / "beach/a-000001.avi").fps == pytest.approx(12)
    made = torch.stack(list(read_frames(out / "beach/a-000001.avi"))).float()
    assert made.shape == (4, 3, 32, 32)
    raw = walk(5)[1:].float()
    assert (made[1:] - made[:-1]).abs().mean() < 0.15 * (raw[1:] - raw[:-1]).abs().mean()
    data = Clips(root=str(out), size=32, split="all", frames=4)
    assert len(data) == 3 and data.label_names == ("beach", "golf") and data.captions() == ["waves come in"]
    assert data.sample(0, None).target.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("form", ["mp4", "webm", "gif", "png", "jpeg"])
def test_every_form_is_read_by_clips(tmp_path, form):
    write_clip(tmp_path / "in" / "a.b.avi", walk(5))
    assert run(tmp_path / "in", tmp_path / "out", "--format", form) == 0
    data = Clips(root=str(tmp_path / "out"), size=32, split="all", frames=4)
    assert len(data) == 1 and data.provides.given == ()
    shown = data.sample(0, None).target.float()
    exact = walk(5)[1, :, 0:64, 4:68].float()
    near = F.interpolate(exact[None], size=(32, 32), mode="bilinear", antialias=True)[0]
    assert (shown[0] - near).abs().mean() < (1 if form == "png" else 12)


@pytest.mark.parametrize("form", ["avi", "png"])
def test_each_clip_takes_the_actions_of_its_frames(tmp_path, capsys, form):
    root, told = tmp_path / "in", np.arange(20, dtype=np.float32).reshape(10, 2)
    write_clip(root / "a.avi", walk(10))
    np.save(root / "a.actions.npy", told)
    write_clip(root / "few.avi", walk(5))
    np.save(root / "few.actions.npy", told[:4])
    assert run(root, tmp_path / "out", "--format", form) == 3
    assert "few.actions.npy has 4 rows; its clip has 5 frames or more" in capsys.readouterr().err
    assert records(tmp_path / "out")["few.avi"]["clips"] == []
    data = Clips(root=str(tmp_path / "out"), size=32, split="all", past=2, frames=2, window="first", actions="past")
    assert len(data) == 2
    for row, start in enumerate((1, 5)):
        np.testing.assert_array_equal(data.sample(row, None).actions, told[start : start + 2])


def test_one_video_and_one_folder_of_frames(tmp_path):
    video = write_clip(tmp_path / "a.avi", walk(5))
    assert run(video, tmp_path / "one", "--lossless") == 0
    assert files(tmp_path / "one") == ["a-000001.mp4", "stabilise.json", "stabilise.jsonl"]
    write_clip(tmp_path / "frames", walk(5))
    assert run(tmp_path / "frames", tmp_path / "two") == 0
    assert "frames-000001.mp4" in files(tmp_path / "two")
    assert probe(tmp_path / "two" / "frames-000001.mp4").fps == 8


def test_split_folders_and_a_manifest_go_along(tmp_path):
    root = tmp_path / "in"
    write_clip(root / "train" / "a.avi", walk(9))
    write_clip(root / "train" / "a.gif", walk(5))
    write_clip(root / "test" / "x" / "c.avi", walk(5))
    rows = [{"file_name": "a.avi", "text": "one", "label": "wave"}, {"file_name": "a.gif", "label": "golf"}]
    (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(root, tmp_path / "out") == 0
    data = Clips(root=str(tmp_path / "out"), size=32, split="train", frames=4)
    assert [data.key(i) for i in range(3)] == [f"train/{n}" for n in
                                              ("a.avi-000001.mp4", "a.avi-000005.mp4", "a.gif-000001.mp4")]  # fmt: skip
    row = data.sample(0, None)
    assert row.caption == "one" and data.label_names == ("golf", "wave", "x") and row.label == 1
    assert Clips(root=str(tmp_path / "out"), size=32, split="test", frames=4).key(0) == "test/x/c-000001.mp4"


def test_started_again_it_goes_on_and_replaces_nothing(videos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    tried = []
    real = stabilise.stabilise

    def counted(first, rest, options):
        tried.append(1)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return real(first, rest, options)

    monkeypatch.setattr(stabilise, "stabilise", counted)
    assert run(videos, out) == 130
    assert [f for f in files(out) if "a-" in f] == ["beach/a-000001.mp4", "beach/a-000001.txt"]
    before = (out / "beach/a-000001.mp4").stat().st_mtime_ns
    monkeypatch.setattr(stabilise, "stabilise", real)
    assert run(videos, out) == 3
    assert (out / "beach/a-000001.mp4").stat().st_mtime_ns == before
    assert records(out)["beach/a.avi"]["clips"] == ["beach/a-000001.mp4", "beach/a-000005.mp4"]
    tried.clear()
    monkeypatch.setattr(stabilise, "stabilise", counted)
    capsys.readouterr()
    assert run(videos, out) == 3 and not tried  # also what is quarantined is not tried again ...
    assert "(6 done before)" in capsys.readouterr().out
    write_clip(videos / "golf" / "short.avi", walk(5, seed=3))  # ... unless the file is another one
    monkeypatch.setattr(stabilise, "stabilise", real)
    (out / "beach/a-000005.mp4").unlink()
    assert run(videos, out) == 3
    assert {"golf/short-000001.mp4", "beach/a-000005.mp4"} <= set(files(out))
    (out / "stabilise.jsonl").open("a").write('{"source": "golf/sh')  # a crash in the middle of a line
    assert run(videos, out) == 3


def test_a_stop_while_writing_leaves_nothing_half_written(tmp_path, monkeypatch):
    write_clip(tmp_path / "in" / "a.avi", walk(5))
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert run(tmp_path / "in", tmp_path / "out", "--format", "avi") == 130
    monkeypatch.undo()
    out = tmp_path / "out"
    assert not [f for f in files(out) if "a-" in f]
    assert run(tmp_path / "in", out, "--format", "avi") == 0 and "a-000001.avi" in files(out)


def test_folders_that_are_not_its_own_are_refused(videos, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    assert run(videos, tmp_path / "mine") == 2 and "was not begun by this command" in capsys.readouterr().err
    assert files(tmp_path / "mine") == ["notes.txt"]
    assert run(videos / "beach", tmp_path / "out") == 0
    assert run(videos / "beach", tmp_path / "out", "--ratio", "0.6") == 2
    assert "give another folder" in capsys.readouterr().err
    inner = videos / "stable"  # OUT below IN: its clips are no sources
    assert run(videos / "beach", videos / "beach" / "stable") == 0
    assert run(videos / "beach", videos / "beach" / "stable") == 0
    assert not inner.exists() and len(records(videos / "beach" / "stable")) == 1


def test_words_that_make_no_sense(tmp_path, capsys):
    assert main(["prepare"]) == 2 and main(["prepare", "--help"]) == 0
    assert "stabilise" in capsys.readouterr().out
    assert main(["prepare", "stabilize"]) == 2 and "stabilise" in capsys.readouterr().err
    assert run(tmp_path / "none", tmp_path / "out") == 3 and "there is no" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "out") == 3 and not (tmp_path / "out").exists()
    for wrong in (["--skip", "-1"], ["--lossless", "--format", "gif"], ["--ratio", "1"], ["--fps", "nan"]):
        assert run(tmp_path / "empty", tmp_path / "out", *wrong) == 2


def test_a_real_clip_with_a_cut(tmp_path):
    root = Path(os.environ.get("CONDGEN_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    file = root / "videos" / "raw" / "nasa.mp4"
    if not file.is_file():
        pytest.skip("shared clips are not beside this checkout")
    words = ["--frames", "9", "--min-frames", "4", "--skip", "190", "--size", "64", "--features", "500"]
    frames = [frame for frame in read_frames(file, start=190, stop=215)]
    write_clip(tmp_path / "in" / "part.avi", frames)
    assert main(["prepare", "stabilise", str(tmp_path / "in"), str(tmp_path / "out"), *words, "--skip", "0"]) == 0
    record = records(tmp_path / "out")["part.avi"]
    # the film cuts to another scene at frame 202, which is 12 here: a clip ends there and the next one begins
    assert record["clips"][:2] == ["part-000000.mp4", "part-000012.mp4"]
    assert record["discarded"][0].startswith("frame 9: 0 good matches") and record["moved"][1] > 2
