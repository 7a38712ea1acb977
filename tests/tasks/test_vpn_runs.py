"""Runs of vpn with the commands that a user types: nats a frame and bits among the scores, clips of any length."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import condgen
from condgen.cli import main
from condgen.data.moving_mnist import MovingMnist
from condgen.data.video import read_frames
from condgen.metrics.signature import parse


@pytest.fixture(autouse=True)
def exact_floats():
    yield
    torch.set_flush_denormal(False)  # training on a CPU switches it on; other tests want exact floats


DIGITS = ("data=moving_mnist", "data.frames=3", "data.past=2", "data.rows=12", "data.digits=1")


def train(out, name, *more):
    return main([
        "train", "task=frames2video", "system=vpn", "system.preset=tiny", "data.size=8", "data.workers=0",
        "data.ignore=[]",
        "train.device=cpu", "train.steps=2", "train.batch_size=4", "train.sample_every=1", "eval.extractor=pixels",
        "eval.num_samples=6", "eval.grid_rows=2", f"run.dir={out}", f"run.name={name}", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert train(out, "grey", *DIGITS, "system.output=sigmoid") == 0
    assert train(out, "levels", *DIGITS, "data.overlap=true") == 0
    return out


def scores(run):
    newest = max((run / "eval").glob("step-*.json"), key=lambda file: file.stat().st_mtime_ns)
    return {s["name"]: s for s in json.loads(newest.read_text())["scores"]}


def test_grey_levels_are_scored_in_nats_a_frame_between_a_constant_and_their_own_entropy(runs):
    found = scores(runs / "grey")
    whole = found["nats_per_frame"]
    assert whole["ceiling"] < whole["value"] and whole["ceiling"] < whole["floor"] < 64 * math.log(2) + 1e-9
    assert not whole["higher_is_better"] and "bpd" not in found
    assert {f"nats_per_frame/t={t}" for t in range(3)} <= set(found)
    for end in ("value", "ceiling"):
        assert sum(found[f"nats_per_frame/t={t}"][end] for t in range(3)) / 3 == pytest.approx(whole[end])
    fields = parse(whole["signature"]).fields
    assert fields["kind"] == "cross-entropy of grey levels" and fields["floor"] == "mean-grey-level"
    assert (fields["n"], fields["frames"], fields["split"], fields["given"]) == ("6", "3", "test", "0")
    assert fields["data"] == parse(found["psnr"]["signature"]).fields["data"]


def test_a_likelihood_is_scored_in_bits_too_without_the_frames_that_are_given_again(runs):
    found = scores(runs / "levels")
    whole, bits = found["nats_per_frame"], found["bpd"]
    assert whole["ceiling"] is None and parse(whole["signature"]).fields["given"] == "2"
    assert whole["value"] == pytest.approx(found["nats_per_frame/t=2"]["value"])
    assert bits["value"] == pytest.approx(whole["value"] / 64 / math.log(2))
    fields = parse(bits["signature"]).fields
    assert (fields["likelihood"], fields["dims"], fields["pixels"]) == ("exact", "64", "8 bit")
    assert bits["floor"] < 8  # the histogram of training clips, which are mostly black


def test_held_out_nats_are_watched_in_training(runs):
    lines = [json.loads(line) for line in (runs / "grey" / "metrics.jsonl").read_text().splitlines()]
    watched = [line["nats_per_frame"] for line in lines if "nats_per_frame" in line]
    assert len(watched) >= 2 and all(0 < v < 64 for v in watched)


def test_more_clips_than_samples_are_read_a_batch_at_a_time(runs, monkeypatch):
    seen = []
    plain = MovingMnist.sample
    monkeypatch.setattr(MovingMnist, "sample", lambda self, i, r: seen.append((self.split, i)) or plain(self, i, r))
    words = ["eval.num_samples=4", "eval.likelihood_clips=11", "eval.batch_size=3"]
    assert main(["evaluate", str(runs / "grey"), *words]) == 0
    found = scores(runs / "grey")
    assert parse(found["nats_per_frame"]["signature"]).fields["n"] == "11"
    assert parse(found["psnr"]["signature"]).fields["n"] == "4"
    read = [i for split, i in seen if split == "test"]
    assert len(read) == 4 + 11 and len(set(read[4:])) == 11  # those of the samples, then each once
    assert read[4:8] == read[:4]  # the same rows first


@pytest.fixture
def photos(tmp_path):
    for level in range(4):
        Image.effect_noise((8, 8), 40 + 20 * level).save(tmp_path / f"{level}.png")
    return [str(tmp_path / f"{level}.png") for level in range(4)]


def played(file):
    return torch.stack(list(read_frames(file)))


def test_animate_rolls_many_photos_forward_and_takes_options_of_the_sampler(runs, photos, tmp_path, capsys):
    run = str(runs / "levels")
    assert main(["animate", run, *photos[:2], "-o", str(tmp_path / "short"), "--lossless"]) == 0
    assert "rolling" not in capsys.readouterr().out
    assert main(["animate", run, *photos[:2], "-o", str(tmp_path / "long"), "--lossless", "--frames", "5"]) == 0
    assert "5 frames by rolling forward: the run was trained for 3, errors add up" in capsys.readouterr().out
    for name in ("0.mp4", "1.mp4"):
        long = played(tmp_path / "long" / name)
        assert len(long) == 5 and torch.equal(long[:3], played(tmp_path / "short" / name))
    several = ["--past", *photos[:2], "--past", *photos[2:], "--lossless", "--frames", "4", "temperature=0"]
    for seed in ("1", "2"):  # without noise the seed says nothing
        assert main(["animate", run, *several, "--seed", seed, "-o", str(tmp_path / f"likeliest-{seed}")]) == 0
    for name in ("1.mp4", "3.mp4"):
        assert torch.equal(played(tmp_path / "likeliest-1" / name), played(tmp_path / "likeliest-2" / name))
    for wrong, says in (
        ("heat=1", "no option 'heat'"),
        ("length=9", "--frames 9"),
        ("temperature=-1", "not be negative"),
    ):
        assert main(["animate", run, photos[0], wrong, "-o", str(tmp_path / "x.mp4")]) in (2, 3), wrong
        assert says in capsys.readouterr().err


def test_sample_takes_temperature_and_length(runs, photos, tmp_path, capsys):
    run, out = str(runs / "grey"), tmp_path / "c.gif"
    words = ["--frames", *photos[:2], "--num", "2", "-o", str(out)]
    assert main(["sample", run, *words, "temperature=1", "length=6"]) == 0
    assert "6 frames by rolling forward" in capsys.readouterr().out and len(played(out)) == 8  # the given ones first
    pipe = condgen.load(run)
    made = pipe(frames=photos[:2], num=3, temperature=1.0, length=5)
    assert made.pixels.shape == (3, 5, 1, 8, 8) and set(made.pixels.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(made.pixels[:, :3], pipe(frames=photos[:2], num=3, temperature=1.0).pixels)


# actions


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A run on clips of a square that goes where the action of the frame before it says, known for frames to come."""
    out, random = tmp_path_factory.mktemp("pushed"), np.random.default_rng(0)
    for row in range(24):
        clip, moves, at = np.zeros((8, 1, 8, 8), np.uint8), random.integers(0, 2, 8) * 2 - 1, 3
        for t in range(8):
            clip[t, 0, 2:6, at : at + 2] = 255
            at = min(max(at + int(moves[t]), 0), 6)
        np.save(out / f"c{row}.npy", clip)
        np.save(out / f"c{row}.actions.npy", moves[:, None].astype(np.float32))
    words = [
        "data=clips", f"data.root={out}", "data.channels=1", "data.actions=future", "system.future_actions=true",
        "data.past=2", "data.frames=2", "data.holdout=0.3", "train.steps=60", "train.sample_every=60",
        "optim.default.lr=0.01", "system.output=sigmoid", "system.width=8", "train.batch_size=8",
        "optim.default.clip_norm=1", "eval.watched=0", "eval.num_samples=4",
    ]  # fmt: skip
    assert train(out / "runs", "pushed", *words) == 0
    return out / "runs" / "pushed"


def test_other_actions_move_the_output(pushed, tmp_path, capsys):
    pipe = condgen.load(pushed)
    start = torch.full((2, 1, 8, 8), -1.0)
    start[:, :, 2:6, 3:5] = 1
    told = {side: [[side]] * 4 for side in (-1.0, 1.0)}
    names = {-1.0: "left", 1.0: "right"}
    made = {side: pipe(frames={"pixels": list(start), "actions": told[side]}).pixels[0] for side in told}
    assert (made[-1.0] - made[1.0]).abs().mean() > 0.02
    columns = torch.arange(8.0)
    place = {side: ((clip[0] + 1).sum((0, 1)) * columns).sum() / (clip[0] + 1).sum() for side, clip in made.items()}
    assert place[-1.0] < place[1.0]  # and to the side that the action says
    for t, name in enumerate(("0.png", "1.png")):
        Image.fromarray(((start[t, 0].numpy() + 1) * 127.5).astype(np.uint8)).save(tmp_path / name)
    files = [str(tmp_path / name) for name in ("0.png", "1.png")]
    for side in told:
        np.save(tmp_path / f"{side}.npy", np.array(told[side]))
        words = ["--past", *files, "--actions", str(tmp_path / f"{side}.npy"), "--lossless"]
        assert main(["animate", str(pushed), *words, "-o", str(tmp_path / names[side])]) == 0
    left, right = (played(tmp_path / name / "1.mp4") for name in names.values())
    assert len(left) == 2 and not torch.equal(left, right)
    words = ["--frames", *files, "--actions", str(tmp_path / "1.0.npy"), "--num", "1", "-o", str(tmp_path / "s.gif")]
    assert main(["sample", str(pushed), *words]) == 0
    capsys.readouterr()
    known = str(tmp_path / "1.0.npy")
    for words, says in (
        (["--past", *files], "also needs actions"),
        (["--past", *files, "--actions", files[0]], "not an array"),
        (["--past", *files, "--actions", known, "--frames", "4"], "actions for 2"),
    ):
        assert main(["animate", str(pushed), *words, "-o", str(tmp_path / "x.mp4")]) in (2, 3)
        assert says in capsys.readouterr().err
    np.save(tmp_path / "few.npy", np.zeros((3, 1)))
    assert main(["animate", str(pushed), "--past", *files, "--actions", str(tmp_path / "few.npy"), "-o", "x.mp4"]) == 2
    assert "(4, 1), a row for each" in capsys.readouterr().err
