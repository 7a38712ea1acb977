"""A clip network of the user's own: what it learns, that it is kept, and that FVD by it sees motion."""

import pytest
import torch

from condgen.data.base import RowDataset
from condgen.errors import CheckpointError, DataError, ShapeError
from condgen.metrics import own_clips, video
from condgen.metrics.extractors import extractor
from condgen.metrics.own_clips import ClipOptions, disturbed, orders, own_clip_network, reordered
from condgen.types import ConditionSpec, LabelSpec, Sample, TargetSpec

SMALL = ClipOptions(steps=60, width=8, size=16, batch_size=32)


class Balls(RowDataset):
    """A square on its way from left to right in the upper half, its colour its class."""

    def __init__(self, rows=48, labels=False, frames=5, channels=3):
        self.rows, self.labels = rows, labels
        self.target = TargetSpec(channels, 16, 16, frames)
        self.provides = ConditionSpec(label=LabelSpec(2) if labels else None)

    def __len__(self):
        return self.rows

    def key(self, index):
        return f"ball{index}"

    def sample(self, index, random):
        frames, channels = self.target.frames, self.target.channels
        clip = torch.randint(30, self.target.shape, generator=torch.Generator().manual_seed(index)).to(torch.uint8)
        top = 1 + index % 4
        for t in range(frames):
            left = 1 + t * 10 // max(frames - 1, 1)
            clip[t, index % 2 * (channels - 1), top : top + 4, left : left + 4] = 255
        return Sample(self.key(index), clip, label=index % 2 if self.labels else None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(own_clips, "ClipOptions", lambda **given: ClipOptions(**given) if given else SMALL)
    return tmp_path


def stacked(data):
    return torch.stack([data.sample(i, None).target for i in range(len(data))]) / 127.5 - 1


def test_what_is_done_to_a_clip_can_be_told():
    clips, draws = stacked(Balls(64, frames=4)), torch.Generator().manual_seed(0)
    made, done = disturbed(clips, draws)
    assert made.shape == clips.shape and set(done.tolist()) == set(range(12))
    for one, true, what in zip(made, clips, done.tolist(), strict=True):
        back = one.rot90(-(what % 4), (2, 3))
        order = [next((s for s in range(4) if torch.equal(frame, true[s])), None) for frame in back]
        assert None not in order
        kind = orders(4)[what // 4]
        assert (order == [0, 1, 2, 3]) == (kind == "as it is") and (len(set(order)) == 1) == (kind == "still")
        assert kind != "shuffled" or (sorted(order) == [0, 1, 2, 3] and order != [3, 2, 1, 0])
    assert orders(1) == ("as it is",) and orders(2) == ("as it is", "still")
    assert torch.equal(reordered(clips[0], "as it is", draws), clips[0])


@pytest.mark.parametrize("labels", [False, True])
def test_it_is_trained_once_and_knows_its_clips(cache, capsys, labels):
    data = Balls(labels=labels)
    made = own_clip_network(data, cache / "classifiers", about={"data": "balls"})
    assert "training the clips on 48 real clips" in capsys.readouterr().out
    assert (made.what, made.classes) == (("classes", 2) if labels else ("order", 12))
    again = own_clip_network(data, cache / "classifiers", about={"data": "balls"})
    assert capsys.readouterr().out == "" and again.fingerprint == made.fingerprint
    clips = stacked(Balls(32))
    wanted = torch.arange(32) % 2
    if not labels:
        clips, wanted = disturbed(clips, torch.Generator().manual_seed(5))
    with torch.no_grad():
        right = (made(clips).argmax(1) == wanted).float().mean()
    assert right > (0.9 if labels else 0.4)  # chance: 0.5 and 0.083
    other = own_clip_network(Balls(40, labels=labels), cache / "classifiers", about={"data": "balls"})
    assert other.fingerprint != made.fingerprint


def test_fvd_by_it_sees_motion_alone_and_says_which_network_it_was(cache, capsys):
    data, about = Balls(), {"data": "balls#1", "split": "test"}
    network = video.clip_extractor("own", train=data, about={"data": "balls"})
    real, other = stacked(Balls(24)), stacked(Balls(48))[24:]
    mixed = other[:, torch.tensor([2, 0, 4, 1, 3])]
    good, bad = (video.fvd_scores(x, real, other, network=network, about=about)[0] for x in (other, mixed))
    assert good.value < bad.value and good.value < good.floor
    for part in ("ext=own-order#", "resize=bilinear-antialias-16", "literature=no", "frames=5", "size=16x16", "ref=24"):
        assert part in good.signature
    (place,) = (cache / "classifiers").glob("clips-*")
    brought = video.clip_extractor(f"own:{place}")
    assert brought.fields == network.fields and torch.equal(brought.features(real), network.features(real))
    with pytest.raises(CheckpointError, match="no readable clips"):
        video.clip_extractor(f"own:{cache}")
    with pytest.raises(ShapeError, match="1 channels"):
        brought.features(real[:, :, :1])
    # an extractor is any callable, whose name the caller vouches for
    mine = video.ClipExtractor(lambda clips: clips.mean((3, 4)).flatten(1), {"ext": "mine#v1"})
    assert "ext=mine#v1" in video.fvd_scores(other, real, other, network=mine, about=about)[0].signature


def test_a_picture_network_of_your_own_comes_from_middle_frames(cache, monkeypatch):
    from condgen.metrics import own
    from condgen.metrics.classifier import ClassifierOptions

    monkeypatch.setattr(own, "ClassifierOptions", lambda: ClassifierOptions(steps=5, width=4, size=16))
    data = own_clips.MiddleFrames(Balls(labels=True))
    assert torch.equal(data.sample(3, None).target, Balls().sample(3, None).target[2]) and data.target.frames == 0
    assert extractor("own", train=data, about={"data": "balls"}).name == "own-classes"


def test_clips_that_cannot_be_read_are_said(cache):
    class Broken(Balls):
        def sample(self, index, random):
            raise DataError("no")

    with pytest.raises(DataError, match="48 rows 48 could not be read"):
        own_clip_network(Broken(), cache / "x", about={})
