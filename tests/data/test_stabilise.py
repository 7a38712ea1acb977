"""Stabilising: known camera motions are found to a pixel, what moves in the scene stays, bad frames end a clip."""

import math

import pytest
import torch
import torch.nn.functional as F
from kornia.geometry.transform import warp_perspective

from condgen.data.stabilise import StabiliseOptions, StableClip, _homography, stabilise
from condgen.errors import ConfigError, DataError

SIDE = 176


def texture(side: int = 280, seed: int = 0) -> torch.Tensor:
    """float (3, side, side), 0..255, with detail of every size."""
    draw = torch.Generator().manual_seed(seed)
    octaves = [torch.rand(1, 3, k, k, generator=draw) * k**-0.3 for k in (8, 16, 32, 64, 128)]
    made = sum(F.interpolate(part, size=(side, side), mode="bicubic")[0] for part in octaves)
    return (made - made.min()) / (made.max() - made.min()) * 255


def camera(t: int, amplitude: float = 5.0) -> torch.Tensor:
    """From pixels of the texture to those of frame t: shakes, turns, drifts and tilts."""
    angle, (dx, dy) = 0.03 * math.sin(1.3 * t), (amplitude * math.sin(0.9 * t) + 0.4 * t, amplitude * math.cos(1.7 * t))
    rows = [[math.cos(angle), -math.sin(angle), dx], [math.sin(angle), math.cos(angle), dy], [2e-5 * math.sin(t), 0, 1]]
    middle, back = torch.eye(3).double(), torch.eye(3).double()
    middle[:2, 2], back[:2, 2] = -140.0, SIDE / 2
    return back @ torch.tensor(rows, dtype=torch.float64) @ middle


def shot(picture: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    seen = warp_perspective(picture[None], motion[None].float(), (SIDE, SIDE))[0]
    return seen.round().clamp(0, 255).to(torch.uint8)


def shaken(frames: int, **options: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    motions = [camera(t, **options) for t in range(frames)]
    return [shot(texture(), motion) for motion in motions], motions


def run(shots: list[torch.Tensor], **options: object) -> StableClip:
    return stabilise(shots[0], iter(shots[1:]), StabiliseOptions(**{"size": 64, "min_frames": 2, **options}))


def corner_error(clip: StableClip, motions: list[torch.Tensor]) -> float:
    corners = torch.tensor([[0, 0, 1], [SIDE, 0, 1], [0, SIDE, 1], [SIDE, SIDE, 1]]).T.double()
    worst = 0.0
    for found, motion in zip(clip.motions, motions):
        places = [m @ corners for m in (found, motions[0] @ motion.inverse())]
        worst = max(worst, float((places[0][:2] / places[0][2:] - places[1][:2] / places[1][2:]).norm(dim=0).max()))
    return worst


def change(frames: list[torch.Tensor], region: tuple[slice, ...] = ()) -> float:
    """Mean difference of neighbouring frames, grey levels."""
    stack = torch.stack(frames).float()[(slice(None), slice(None), *region)]
    return float((stack[1:] - stack[:-1]).abs().mean())


def test_a_shaking_camera_stands_still():
    frames, motions = shaken(16)
    clip = run(frames)
    assert not clip.problem and clip.next is None and len(clip.frames) == 16
    assert clip.frames[0].shape == (3, 64, 64) and clip.frames[0].dtype == torch.uint8
    assert corner_error(clip, motions) < 1.0
    shrunk = [F.interpolate(f[None].float(), size=(64, 64), mode="area")[0] for f in frames]
    assert change(clip.frames) < 0.1 * change(shrunk)
    # also against the first frame, so errors do not add up over the clip
    assert (clip.frames[-1].float() - clip.frames[0].float()).abs()[:, 16:-16, 16:-16].mean() < 0.1 * change(shrunk)
    assert 15 < clip.camera_moved() < 40
    again = run(frames)
    assert all(torch.equal(a, b) for a, b in zip(clip.frames, again.frames, strict=True))


def test_an_object_that_moves_does_not_move_the_camera():
    picture, motions, frames = texture(), [camera(t) for t in range(12)], []
    thing = texture(60, seed=5).flip(0)
    for t, motion in enumerate(motions):
        scene = picture.clone()
        scene[:, 130:190, 60 + 8 * t : 120 + 8 * t] = thing  # a tenth of the view, faster than the camera
        frames.append(shot(scene, motion))
    clip = run(frames)
    assert not clip.problem and corner_error(clip, motions) < 1.5
    still, moving = (slice(0, 16), slice(8, 56)), (slice(26, 38), slice(8, 56))
    assert change(clip.frames, still) < 2.0 < 8.0 < change(clip.frames, moving)


def test_what_the_camera_left_keeps_its_last_pixels():
    frames = [shot(texture(), torch.tensor([[1, 0, -20.0 - 8 * t], [0, 1, -40], [0, 0, 1]]).double()) for t in range(5)]
    clip = run(frames)
    last, before = clip.frames[-1], clip.frames[-2]
    # the camera went right by 32 of 128 pixels: the left quarter is no longer seen, and black nowhere
    assert torch.equal(last[:, :, :10], before[:, :, :10])
    assert (clip.frames[0].float() - last.float()).abs().mean() < 4
    # only whole pixels of the warp count: nothing is as dark as a blend with what lies outside
    assert last.min() >= clip.frames[0].min().item() - 12


def test_a_frame_without_a_match_ends_the_clip():
    frames, _ = shaken(12)
    cut = [*frames[:6], *(shot(texture(seed=9), camera(t)) for t in range(6))]
    clip = run(cut)
    assert len(clip.frames) == 6 and "10 are needed" in clip.problem
    assert clip.next is cut[6]  # the first frame of the other scene begins the next clip
    kept = run(cut, keep_before_failure=True)
    assert len(kept.frames) == 6 and not kept.problem
    assert run(cut, keep_before_failure=True, min_frames=7).problem
    plain = torch.full((3, SIDE, SIDE), 90, dtype=torch.uint8)
    assert "plain surface" in run([frames[0], plain]).problem
    assert "plain surface" in run([plain, frames[0]]).problem


def test_a_clip_ends_when_it_is_full_or_the_camera_has_turned_away():
    frames, _ = shaken(8)
    clip = run(frames, frames=5)
    assert len(clip.frames) == 5 and clip.next is frames[5] and not clip.problem
    assert run(frames[:3], min_frames=4).problem == "it has 3 frames; 4 are needed"
    picture = texture(700)
    away = [shot(picture, torch.tensor([[1, 0, -40.0 * t], [0, 1, -40], [0, 0, 1]]).double()) for t in range(8)]
    gone = run(away)
    assert len(gone.frames) == 5 and gone.next is away[5] and not gone.problem  # 200 of 176 pixels


def test_features_of_a_smaller_picture_find_the_same_motion():
    frames, motions = shaken(8)
    assert corner_error(run(frames, feature_side=132), motions) < 2.5


def test_the_motion_is_that_of_most_matches_and_not_a_compromise():
    """Within the published 5 pixels lie also the rims of what moves, and noise of compression."""
    draw = torch.Generator().manual_seed(0)
    places = torch.rand(200, 2, generator=draw) * 400
    shifted = places.clone()
    shifted[:90] += torch.tensor([2.5, 0.5]) + torch.rand(90, 2, generator=draw)
    shifted[90:] += 0.1 * torch.randn(110, 2, generator=draw)
    names = torch.eye(200)
    motion, problem = _homography((places, names), (shifted, names), StabiliseOptions())
    corners = torch.tensor([[0.0, 0, 1], [400, 0, 1], [0, 400, 1], [400, 400, 1]]).T.double()
    moved = motion @ corners
    assert not problem and (moved[:2] / moved[2:] - corners[:2]).norm(dim=0).max() < 0.4


def test_wrong_options_and_tiny_frames():
    for wrong in (
        {"size": 0}, {"frames": 1}, {"ratio": 1.0}, {"threshold": 0}, {"min_matches": 4}, {"feature_side": 5},
        {"threshold": math.nan}, {"features": 1},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            StabiliseOptions(**{"min_frames": 2, **wrong})
    with pytest.raises(DataError, match="too small"):
        run([torch.zeros(3, 16, 40, dtype=torch.uint8)] * 3)
