"""Scores of clips: their ends, their order in time, and that each notices what it is for."""

import pytest
import torch

from condgen.errors import ConfigError, DataError, ShapeError
from condgen.metrics import video
from condgen.metrics.extractors import extractor
from condgen.metrics.paired import psnr
from condgen.metrics.signature import comparable

ABOUT = {"data": "toy#1", "split": "test"}


def moving(rows=6, frames=5, side=16, seed=0):
    """A bright square that moves to the right on a dark ground, and where it is."""
    clips, truth = torch.full((rows, frames, 3, side, side), -0.9), torch.zeros(rows, frames, 1, side, side)
    starts = torch.randint(
        0, side - 4 - 2 * frames + 1, (rows, 2), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    for row, (top, left) in enumerate(starts):
        for t in range(frames):
            window = (slice(top, top + 4), slice(left + 2 * t, left + 2 * t + 4))
            clips[row, t][:, *window], truth[row, t][:, *window] = 0.9, 1.0
    return clips, truth


def by_name(scores):
    return {s.name: s for s in scores}


def test_each_step_is_compared_with_its_own_truth():
    real, _ = moving()
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    fake = real + noise * torch.linspace(0, 1, 5)[:, None, None, None] * 0.2
    found = video.curves(fake, real, extractor("pixels"))
    assert set(found) == {"psnr", "ssim", "perceptual"} and all(v.shape == (6, 5) for v in found.values())
    for name, falls in (("psnr", True), ("ssim", True), ("perceptual", False)):
        mean = found[name].mean(0)
        assert (mean.diff() < 0 if falls else mean.diff() > 0).all(), name
    torch.testing.assert_close(found["psnr"][2, 3], psnr(fake[2, 3][None], real[2, 3][None])[0])


def test_the_floor_of_a_curve_is_the_last_frame_repeated():
    real, _ = moving()
    scores = by_name(video.curve_scores(real, real, real[:, 0], network=extractor("pixels"), about=ABOUT))
    assert scores["ssim"].value == pytest.approx(1) and scores["ssim"].floor < 0.99
    assert scores["psnr/t=0"].floor == 100  # the copy is right at its own time
    floors = [scores[f"psnr/t={t}"].floor for t in range(1, 5)]
    assert max(floors) < 30
    assert not scores["perceptual"].higher_is_better and "floor=copied-last-frame" in scores["perceptual"].signature
    assert "ext=pixels#1" in scores["perceptual"].signature and "ext=" not in scores["psnr"].signature
    long = torch.zeros(2, 40, 3, 8, 8)
    names = [s.name for s in video.curve_scores(long, long, long[:, 0], network=extractor("pixels"), about=ABOUT)]
    steps = [n for n in names if n.startswith("psnr/")]
    assert len(steps) == 16 and steps[0] == "psnr/t=0" and steps[-1] == "psnr/t=39"


def test_curves_are_the_same_in_blocks(monkeypatch):
    real, _ = moving(rows=7)
    whole = video.curves(real.flip(1), real, extractor("pixels"))
    monkeypatch.setattr(video, "BLOCK", 3)
    parts = video.curves(real.flip(1), real, extractor("pixels"))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_what_starts_with_a_frame_is_near_to_it_at_first_and_away_from_it_later():
    """The fifth check of the VGAN dossier, and the two ways to fail it."""
    real, _ = moving(frames=5)
    copied = real[:, :1].expand_as(real)
    elsewhere = real.roll(1, 0)

    def check(fake, **more):
        found = by_name(video.given_scores(fake, real, 1, about=ABOUT, **more))
        return found["first_frame_l1"], found["motion_from_given"]

    first, away = check(real)
    assert first.value == 0 == first.ceiling < first.floor and not first.higher_is_better
    assert away.floor == 0 < away.value == pytest.approx(away.ceiling)
    assert check(copied)[0].value == 0 and check(copied)[1].value == 0  # copies: the second score notices
    assert check(elsewhere)[0].value > 0.05 and check(elsewhere)[1].value > 0  # the wrong clip: the first one does
    assert check(real * 0 + real[:, :1] + 0.25)[0].value == pytest.approx(0.25)
    far = (real[:, 1:] - real[:, :1]).abs().mean()
    assert (
        away.value == pytest.approx(float(far))
        and "given=1" in away.signature
        and "floor=other-clips" in first.signature
    )
    two = by_name(video.given_scores(real, real, 2, about=ABOUT))
    assert two["motion_from_given"].value == pytest.approx(float((real[:, 2:] - real[:, 1:2]).abs().mean()))
    assert video.given_scores(real[:1], real[:1], 1, about=ABOUT)[0].floor is None
    with pytest.raises(ShapeError, match="fewer than all"):
        video.given_scores(real, real, 5, about=ABOUT)


def test_curves_refuse_what_would_broadcast():
    with pytest.raises(ShapeError, match="both"):
        video.curves(torch.zeros(2, 5, 3, 8, 8), torch.zeros(2, 1, 3, 8, 8))


def test_a_still_clip_has_no_motion_and_faster_ones_have_more():
    real, _ = moving()
    still = real[:, :1].expand_as(real)
    score = video.motion_scores(still, real, about=ABOUT)[0]
    assert score.value == 0 and score.ceiling > 0
    assert (video.motion_energy(real[:, ::2]) > video.motion_energy(real)).all()
    torch.testing.assert_close(video.motion_energy(real), (real[:, 1:] - real[:, :-1]).abs().mean((1, 2, 3, 4)))
    with pytest.raises(ShapeError, match="at least 2 frames"):
        video.motion_energy(real[:, :1])


@pytest.mark.parametrize("rounded", [False, True])
def test_auc_counts_pairs_and_halves_ties(rounded):
    g = torch.Generator().manual_seed(3)
    values, truth = torch.rand(40, generator=g), torch.rand(40, generator=g) < 0.3
    values = (values * 4).round() if rounded else values
    pairs = values[truth][:, None] - values[~truth][None]
    assert video.auc(values, truth) == pytest.approx(
        float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean()), abs=1e-12
    )
    assert video.auc(torch.zeros(40), truth) == 0.5
    assert video.auc(truth.float(), truth) == 1 and video.auc(-truth.float(), truth) == 0
    with pytest.raises(DataError, match="inside and outside"):
        video.auc(values, torch.ones_like(truth))


def test_masks_are_scored_between_those_of_other_clips_and_the_truth():
    _, truth = moving()
    scores = by_name(video.mask_scores(truth * 0.8, truth, about=ABOUT))
    assert scores["mask_auc"].value == 1 and scores["mask_iou"].value == 1
    assert scores["mask_auc"].floor < 0.9 and scores["mask_iou"].floor < 0.7
    assert video.iou(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool)).item() == 1
    assert video.iou(
        torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[True, False, True, False]])
    ).item() == pytest.approx(1 / 3)
    named = video.mask_scores(truth, truth, about=ABOUT, of="first")
    assert [s.name for s in named] == ["mask_auc/first", "mask_iou/first"]
    assert comparable(named[0].signature, scores["mask_auc"].signature)


def test_moving_pixels_are_those_of_what_moves():
    clips, truth = moving(frames=5)
    found = video.moving_pixels(clips)
    assert found.shape == truth.shape
    # with steps of half its width the square covers no pixel for half of five frames
    assert torch.equal(found, truth)
    assert not video.moving_pixels(clips[:, :1].expand_as(clips)).any()


# FVD


def test_fvd_rises_with_what_is_wrong_and_sees_motion_alone():
    real, _ = moving(rows=12, seed=0)
    other, _ = moving(rows=12, seed=1)
    network = video.clip_extractor("frames", pictures="pixels")
    good = video.fvd_scores(other, real, other, network=network, about=ABOUT)[0]
    mixed = other[:, torch.tensor([2, 0, 4, 1, 3])]  # the same frames in another order
    bad = video.fvd_scores(mixed, real, other, network=network, about=ABOUT)[0]
    assert good.name == "kvd" and good.ceiling == good.value < bad.value < bad.floor
    for part in ("ext=frames-mean+steps:pixels#1", "frames=5", "size=16x16", "n=12", "ref=12", "literature=no"):
        assert part in good.signature
    with pytest.raises(DataError, match="at least 4 clips"):
        video.fvd_scores(real[:3], real, other, network=network, about=ABOUT)


def test_fvd_itself_needs_256_clips_and_is_the_frechet_distance():
    clips = torch.randn(256, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).tanh()
    network = video.ClipExtractor(lambda x: x.mean((2, 3, 4)), {"ext": "mean"})
    scores = by_name(video.fvd_scores(clips + 0.5, clips, clips, network=network, about=ABOUT))
    assert scores["fvd"].value == pytest.approx(0.5, abs=1e-3)  # a shift of 0.5 in each of two features
    assert scores["fvd"].ceiling == pytest.approx(0, abs=1e-6)
    assert "fvd" not in by_name(video.fvd_scores(clips[:255], clips, clips, network=network, about=ABOUT))


def test_a_network_of_your_own_gets_what_i3d_takes(tmp_path):
    class Seen(torch.nn.Module):
        def forward(self, clips):
            return torch.stack(
                [clips.mean((1, 2, 3, 4)), clips.amax((1, 2, 3, 4)), clips.new_full((len(clips),), clips.shape[-1])], 1
            )

    file = tmp_path / "net.pt"
    torch.jit.script(Seen()).save(file)
    network = video.clip_extractor(f"torchscript:{file}")
    made = network.features(torch.full((3, 4, 1, 8, 12), 0.25))
    torch.testing.assert_close(made, torch.tensor([[0.25, 0.25, 224.0]]).expand(3, 3))
    assert network.fields["ext"].startswith("torchscript#") and network.fields["resize"] == "bilinear-224"
    assert video.resized(torch.zeros(2, 4, 1, 8, 12), 224).shape == (2, 3, 4, 224, 224)
    with pytest.raises(ConfigError, match="no file"):
        video.clip_extractor("torchscript:nowhere.pt")
    with pytest.raises(ConfigError, match="unknown eval.fvd 'efficientnet_lite0'|efficientnet_lite0"):
        video.clip_extractor("efficientnet_lite0")  # a network of pictures
    with pytest.raises(ConfigError, match="training split"):
        video.clip_extractor("own")
    with pytest.raises(DataError, match="not \\(B, d\\)"):
        video.ClipExtractor(lambda x: x, {"ext": "bad"}).features(torch.zeros(2, 2, 3, 4, 4))
