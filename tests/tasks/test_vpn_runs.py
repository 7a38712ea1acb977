"""Runs of vpn with the commands that a user types: nats a frame and bits among the scores, clips of any length."""

import json
import math

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


def train(out, name, *more):
    return main([
        "train", "task=frames2video", "system=vpn", "system.preset=tiny", "data=moving_mnist", "data.size=8",
        "data.frames=3", "data.past=2", "data.rows=12", "data.digits=1", "data.workers=0", "data.ignore=[]",
        "train.device=cpu", "train.steps=2", "train.batch_size=4", "train.sample_every=1", "eval.extractor=pixels",
        "eval.num_samples=6", "eval.grid_rows=2", f"run.dir={out}", f"run.name={name}", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert train(out, "grey", "system.output=sigmoid") == 0
    assert train(out, "levels", "data.overlap=true") == 0
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
