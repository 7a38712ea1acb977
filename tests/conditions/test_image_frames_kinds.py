"""Pictures and histories: resizing, masks, patches, time."""

from dataclasses import replace

import pytest
import torch

from condgen.conditions.frames import FrameHistory
from condgen.conditions.image import ImageMap, resize
from condgen.errors import DataError
from condgen.types import Condition, Frames, FramesSpec, Image, ImageSpec


def picture(size=(16, 16), rows=2, mask=None):
    g = torch.Generator().manual_seed(1)
    return Condition(image=Image(torch.rand(rows, 3, *size, generator=g) * 2 - 1, mask))


def test_area_resize_is_the_mean_and_nearest_invents_no_value():
    x = picture().image.pixels
    small = resize(x, (4, 4))
    torch.testing.assert_close(small[0, 0, 0, 0], x[0, 0, :4, :4].mean())
    ids = torch.randint(0, 5, (1, 1, 13, 13)).float() / 5
    assert set(resize(ids, (5, 7), "nearest").flatten().tolist()) <= set(ids.flatten().tolist())
    torch.testing.assert_close(resize(x, (5, 7)).mean(), x.mean(), atol=0.05, rtol=0)
    assert resize(x, (24, 24)).shape[-2:] == (24, 24) and resize(x, (16, 16)) is x


def test_a_checkerboard_does_not_alias():
    board = ((torch.arange(17)[:, None] + torch.arange(17)) % 2 * 2 - 1).float()[None, None]
    assert resize(board, (8, 8)).abs().max() < 0.35


def test_map_at_its_own_size_is_the_picture():
    condition = picture()
    assert torch.equal(ImageMap(ImageSpec(3, 16, 16), "map")(condition, (16, 16)).value, condition.image.pixels)


def test_uint8_pixels_read_like_floats():
    kind = ImageMap(ImageSpec(3, 16, 16), "map")
    bytes_ = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    same = Condition(image=Image(bytes_.float() / 127.5 - 1))
    torch.testing.assert_close(kind(Condition(image=Image(bytes_)), (8, 8)).value, kind(same, (8, 8)).value)


def test_mask_is_the_last_channel_and_hides_pixels():
    mask = torch.ones(2, 1, 16, 16)
    mask[:, :, :8] = 0
    out = ImageMap(ImageSpec(3, 16, 16, mask=True), "map")(picture(mask=mask), (16, 16)).value
    assert torch.equal(out[:, 3:], mask) and not out[:, :3, :8].any() and out[:, :3, 8:].all()
    whole = ImageMap(ImageSpec(3, 16, 16, mask=True), "map")(picture(), (16, 16)).value
    assert whole[:, 3].min() == 1  # no mask: everything is given
    with pytest.raises(DataError, match="not built for"):
        ImageMap(ImageSpec(3, 16, 16), "map")(picture(mask=mask), (16, 16))


def test_patches_outside_the_mask_are_not_tokens():
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, :8, :8] = 1
    feature = ImageMap(ImageSpec(3, 16, 16, mask=True), "sequence", patch=8)(picture(mask=mask))
    assert feature.mask.tolist() == [[True, False, False, False]] * 2


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (40, 24)])
@pytest.mark.parametrize("form", ["vector", "sequence"])
def test_any_picture_size_works(form, size):
    feature = ImageMap(ImageSpec(3, 16, 16), form, width=6)(picture(size))
    assert torch.isfinite(feature.value).all() and feature.value.shape[-1] == 6


def history(t=3, mask=None):
    g = torch.Generator().manual_seed(2)
    mask = torch.ones(2, t, dtype=torch.bool) if mask is None else mask
    return Condition(
        frames=Frames(torch.rand(2, t, 3, 16, 16, generator=g) * 2 - 1, mask, torch.rand(2, t, 2, generator=g))
    )


SPEC = FramesSpec(3, 3, 16, 16, actions=2)


def test_temporal_holds_frames_and_action_planes():
    condition = history(mask=torch.tensor([[True, True, False], [True, False, False]]))
    feature = FrameHistory(SPEC, "temporal")(condition)
    frames = condition.frames
    assert torch.equal(feature.value[0, 0, :3], frames.pixels[0, 0]) and not feature.value[0, 2].any()
    assert torch.equal(feature.value[0, 1, 3:], frames.actions[0, 1][:, None, None].expand(2, 16, 16))
    assert torch.equal(feature.mask, frames.mask)


def test_map_stacks_frames_actions_and_masks():
    condition = history(mask=torch.tensor([[True, True, False]] * 2))
    out = FrameHistory(SPEC, "map")(condition, (8, 8)).value.unflatten(1, (3, 6))
    torch.testing.assert_close(out[:, 0, :3], resize(condition.frames.pixels[:, 0], (8, 8)))
    assert out[:, :2, 5].min() == 1 and not out[:, 2].any()
    with pytest.raises(DataError, match="frames is 2"):
        FrameHistory(SPEC, "map")(history(2), (8, 8))


@pytest.mark.parametrize("form", ["vector", "sequence"])
def test_the_order_of_frames_matters(form):
    torch.manual_seed(0)
    kind, condition = FrameHistory(SPEC, form, width=6), history()
    back = Condition(frames=replace(condition.frames, actions=condition.frames.actions.flip(1)))
    assert not torch.allclose(kind(condition).value, kind(back).value)
