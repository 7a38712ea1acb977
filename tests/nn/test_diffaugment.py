"""The augmentation moves the condition with the pixels, is differentiable and leaves nothing else."""

import pytest
import torch

from condgen.nn.diffaugment import POLICIES, diffaugment, translate
from condgen.rng import StepRandom
from condgen.types import Boxes, Condition, Image, Keypoints

SIDE = 32


def marked(rows: int = 8):
    """A bright pixel per row, and its position as keypoint, box and source image."""
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(6, SIDE - 6, (rows, 2), generator=generator)
    pixels = torch.full((rows, 3, SIDE, SIDE), -1.0)
    for row, (x, y) in enumerate(at.tolist()):
        pixels[row, :, y, x] = 1.0
    centre = (at.float() + 0.5) / SIDE
    boxes = torch.cat([at.float() / SIDE, (at.float() + 1) / SIDE], dim=1)[:, None]
    condition = Condition(
        keypoints=Keypoints(centre[:, None], torch.ones(rows, 1, dtype=torch.bool)),
        boxes=Boxes(boxes, torch.ones(rows, 1, dtype=torch.bool)),
        image=Image(pixels.clone()),
    )
    return pixels, condition


def test_translation_moves_every_spatial_field_with_the_pixels():
    pixels, condition = marked()
    moved, after = diffaugment(pixels, condition, StepRandom(3, rows=8), ("translation",))
    assert not torch.equal(moved, pixels)
    for row in range(8):
        y, x = (moved[row, 0] == 1).nonzero()[0].tolist()
        torch.testing.assert_close(after.keypoints.xy[row, 0] * SIDE, torch.tensor([x + 0.5, y + 0.5]))
        torch.testing.assert_close(after.boxes.xyxy[row, 0] * SIDE, torch.tensor([x, y, x + 1.0, y + 1.0]))
        assert after.image.pixels[row, 0, y, x] == 1


def test_translate_fills_with_zero_and_shifts_right_and_down():
    pixels = torch.arange(9.0).view(1, 1, 3, 3) + 1
    out = translate(pixels, torch.tensor([[1, 0]]))
    assert out[0, 0].tolist() == [[0, 1, 2], [0, 4, 5], [0, 7, 8]]
    assert translate(pixels, torch.tensor([[0, -1]]))[0, 0].tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]


def test_cutout_hides_at_most_a_quarter_and_colour_keeps_the_shape():
    pixels, condition = marked()
    cut, _ = diffaugment(torch.ones_like(pixels), condition, StepRandom(1, rows=8), ("cutout",))
    hidden = (cut == 0).float().mean((1, 2, 3))
    assert (hidden > 0).all() and (hidden <= 0.25).all()
    coloured, after = diffaugment(pixels, condition, StepRandom(1, rows=8), ("color",))
    assert coloured.shape == pixels.shape and after is condition


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_flow_to_the_pixels(policy):
    pixels = torch.rand(4, 3, 16, 16, requires_grad=True)
    out, _ = diffaugment(pixels, Condition(), StepRandom(0, rows=4), (policy,))
    out.square().sum().backward()
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()


def test_more_rows_than_the_data_batch_get_draws_of_their_own():
    out, _ = diffaugment(torch.ones(6, 3, 16, 16), Condition(), StepRandom(0, rows=4), ("cutout",))
    assert len({tuple(row.flatten().tolist()) for row in out}) == 6
