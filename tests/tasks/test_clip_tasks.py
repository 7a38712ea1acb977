"""Clips from training to scores, samples, reports and animations, with the commands that a user types."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

import condgen
from condgen.cli import main
from condgen.data.video import read_frames
from condgen.inference.export import read_export
from condgen.metrics import own, own_clips
from condgen.metrics.classifier import ClassifierOptions
from condgen.metrics.own_clips import ClipOptions


@pytest.fixture(autouse=True)
def exact_floats():
    yield
    torch.set_flush_denormal(False)  # training on a CPU switches it on; other tests want exact floats


def train(out, task, *more):
    return main([
        "train", f"task={task}", "system.preset=tiny", "data.size=16", "data.frames=4", "data.groups=[food-drink]",
        "data.workers=0", "train.device=cpu", "train.steps=2", "train.batch_size=4", "train.sample_every=1",
        "eval.extractor=pixels", "eval.num_samples=6", "eval.grid_rows=2", f"run.dir={out}", f"run.name={task}", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of each task; ema 0 and a larger start so that samples are not grey."""
    out = tmp_path_factory.mktemp("runs")
    for task in ("video", "frame2video", "frames2video"):
        assert train(out, task) == 0
    return out


def scores(run):
    (file,) = (run / "eval").glob("step-*.json")
    return {s["name"]: s for s in json.loads(file.read_text())["scores"]}


def test_clips_are_scored_by_what_they_were_asked(runs):
    plain, one, several = (scores(runs / name) for name in ("video", "frame2video", "frames2video"))
    assert {"motion_energy", "kvd"} <= set(plain) and "psnr" not in plain
    for found in (one, several):
        assert {"psnr", "ssim", "perceptual", "mask_auc", "mask_iou", "sensitivity/frames", "kvd"} <= set(found)
        assert {f"psnr/t={t}" for t in range(4)} <= set(found)
    # the given frame, which the clip starts with, is copied without error and stays out of the mean
    assert one["psnr/t=0"]["floor"] == 100 and "given=1" in one["psnr"]["signature"]
    for found, first in ((one, 1), (several, 0)):
        for end in ("value", "floor"):
            steps = [found[f"psnr/t={t}"][end] for t in range(first, 4)]
            assert found["psnr"][end] == pytest.approx(sum(steps) / len(steps), rel=1e-4)
    assert several["psnr/t=0"]["floor"] < 100 and "given=0" in several["psnr"]["signature"]


def test_a_clip_from_a_frame_begins_near_it_and_goes_away_from_it(runs):
    plain, one, several = (scores(runs / name) for name in ("video", "frame2video", "frames2video"))
    first, away = one["first_frame_l1"], one["motion_from_given"]
    assert first["ceiling"] == 0 < first["floor"] and not first["higher_is_better"]
    assert away["floor"] == 0 < away["ceiling"] and one["motion_energy"]["ceiling"] > 0 == one["motion_energy"]["floor"]
    assert "given=1" in first["signature"] and "past=1" in first["signature"]
    assert one["sensitivity/frames"]["floor"] == 0 and one["sensitivity/frames"]["value"] > 0
    for found in (plain, several):  # nothing is given again
        assert not {"first_frame_l1", "motion_from_given"} & set(found)


def test_both_networks_can_be_of_the_users_own(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(own_clips, "ClipOptions", lambda **given: ClipOptions(**(given or {"steps": 3, "width": 4})))
    monkeypatch.setattr(own, "ClassifierOptions", lambda: ClassifierOptions(steps=3, width=4))
    run = tmp_path / "run"
    shutil.copytree(runs / "frames2video", run)
    shutil.rmtree(run / "eval")
    assert main(["evaluate", str(run), "eval.extractor=own", "eval.fvd=own"]) == 0
    found = scores(run)
    assert "ext=own-classes#" in found["kvd"]["signature"] and "ext=own-" in found["perceptual"]["signature"]
    assert found["kvd"]["signature"].count("|frames=4|size=16x16|") == 1 and "|past=" in found["kvd"]["signature"]
    assert main(["evaluate", str(run), "eval.fvd=i3d"]) == 2
    assert "eval.fvd" in capsys.readouterr().err


def test_the_run_folder_has_sheets_and_clips_and_the_report_plays_them(runs):
    run = runs / "frame2video"
    for step in (1, 2):
        sheet, clip = (run / "samples" / f"step-{step:08d}-clips.{suffix}" for suffix in ("png", "gif"))
        assert Image.open(sheet).width > 4 * 96
        assert len(list(read_frames(clip))) == 5  # the given frame, then the clip
    assert (run / "report.html").read_text().count("data:image/gif;base64") == 2


def test_sample_writes_clips_and_their_streams(runs, tmp_path, capsys):
    out = tmp_path / "c.mp4"
    assert main(["sample", str(runs / "video"), "--num", "3", "-o", str(out), "--streams", "--fps", "5"]) == 0
    made = [tmp_path / f"c{name}.mp4" for name in ("", "-foreground", "-mask", "-background")]
    assert [len(list(read_frames(file))) for file in made] == [4, 4, 4, 4]
    assert capsys.readouterr().out.split() == [str(file) for file in made]
    still = list(read_frames(made[3]))
    assert (still[0].float() - still[3].float())[:, 60:].abs().mean() < 1  # below the title the background stands still
    assert main(["sample", str(runs / "video"), "--num", "3", "-o", str(tmp_path / "c.png")]) == 0
    assert Image.open(tmp_path / "c.png").width > 4 * 96
    assert main(["sample", str(runs / "video"), "--num", "2", "--separate", str(tmp_path / "each")]) == 0
    assert len(list((tmp_path / "each").glob("*.png"))) == 2


def test_a_pipeline_gives_clips_that_do_not_depend_on_the_batch(runs):
    pipe = condgen.load(runs / "video")
    many, one = pipe(num=3, seed=1), pipe(ids=[2], seed=1)
    assert many.is_video and many.pixels.shape == (3, 4, 3, 16, 16) and len(many.clips[0]) == 4
    torch.testing.assert_close(many.pixels[2:], one.pixels, atol=1e-6, rtol=0)
    frames = list(many.clip_grid())
    assert len(frames) == 4 and frames[0].dtype == torch.uint8 and frames[0].shape[0] == 3


@pytest.fixture
def photos(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in "ab"]


def test_animate_goes_on_from_photos(runs, photos, tmp_path, capsys):
    run, out = str(runs / "frame2video"), tmp_path / "one.avi"
    assert main(["animate", run, photos[0], "-o", str(out), "--frames", "9", "--seed", "3"]) == 0
    assert "9 frames by rolling forward: the run was trained for 4" in capsys.readouterr().out
    long = torch.stack(list(read_frames(out)))
    assert long.shape == (9, 3, 16, 16)
    assert main(["animate", run, *photos, "-o", str(tmp_path / "each"), "--lossless", "--seed", "3"]) == 0
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == ["a.mp4", "b.mp4"]
    assert torch.equal(torch.stack(list(read_frames(tmp_path / "each" / "a.mp4"))), long[:4])
    assert main(["animate", run, *photos, "-o", str(tmp_path / "both.gif"), "--streams"]) == 0
    assert len(list(read_frames(tmp_path / "both.gif"))) == 5
    assert len(list(read_frames(tmp_path / "both-mask.gif"))) == 4  # one channel: the given frame is no mask
    assert main(["animate", str(runs / "frames2video"), "--past", *photos, *photos, "-o", str(tmp_path / "p.mp4")]) == 0
    assert main(["animate", str(runs / "frames2video"), photos[0], "-o", str(tmp_path / "q.mp4"), "--frames", "6"]) == 0
    assert len(list(read_frames(tmp_path / "q.mp4"))) == 6


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["video", "A", "-o", "x.mp4"], 2, "needs a run that takes frames or an image"),
        (["frame2video", "nowhere.png", "-o", "x.mp4"], 3, "no picture nowhere.png"),
        (["frame2video", "A", "-o", "x.png"], 2, "a clip that ends with"),
        (["frame2video", "-o", "x.mp4"], 2, "one picture at least"),
        (["frame2video", "--past", "A", "A", "-o", "x.mp4"], 2, "2 past frames; this run takes 1"),
        (["frame2video", "A", "-o", "x.mp4", "--frames", "9", "--streams"], 2, "one trained length"),
    ],
)
def test_animate_says_what_is_wrong(runs, photos, tmp_path, capsys, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    given = ["animate", str(runs / words[0]), *[photos[0] if w == "A" else w for w in words[1:]]]
    assert main(given) == code
    assert re.search(message, capsys.readouterr().err)


def test_a_discriminator_is_fine_tuned_for_actions(runs, capsys):
    words = [
        "actions",
        str(runs / "frame2video"),
        "--steps",
        "2",
        "--batch-size",
        "4",
        "data.groups=[food-drink,activities]",
    ]
    assert main(words) == 0
    assert "fine-tuned:" in capsys.readouterr().out
    (file,) = (runs / "frame2video" / "eval").glob("actions-*.json")
    assert [s["name"] for s in json.loads(file.read_text())["scores"]] == ["action_accuracy", "action_accuracy/chance"]
    assert main([*words, "data.size=32"]) == 2
    assert "set data.size and data.frames" in capsys.readouterr().err


def test_clips_and_pictures_do_not_mix(runs, tmp_path, capsys):
    assert (
        train(tmp_path, "video", "data=openmoji", "data.frames=0", "data.ignore=[label,text,boxes,keypoints,image]")
        == 3
    )
    assert "vgan makes clips" in capsys.readouterr().err
    assert read_export(runs / "frame2video" / "export")[0].data["overlap"] is True
    assert read_export(runs / "frames2video" / "export")[0].data["overlap"] is False
