"""Paired scores: known values, floors that mean what they say, input recovery that notices a shuffled source."""

import math

import pytest
import torch

from condgen.errors import ShapeError
from condgen.metrics.paired import edge_agreement, l1, paired_scores, psnr, shuffled, ssim


def boxes(rows=8, side=24):
    """White boxes at different places on black, (rows, 1, side, side)."""
    out = -torch.ones(rows, 1, side, side)
    for i in range(rows):
        top, left = 2 + (5 * i) % 11, 2 + (7 * i) % 11
        out[i, :, top : top + 8, left : left + 9] = 1
    return out


def test_known_values():
    real = torch.zeros(2, 3, 16, 16)
    off = real + 0.5
    torch.testing.assert_close(l1(off, real), torch.full((2,), 0.5))
    torch.testing.assert_close(psnr(off, real), torch.full((2,), 10 * math.log10(4 / 0.25)))
    assert (psnr(real, real) == 100).all()
    torch.testing.assert_close(ssim(real, real), torch.ones(2))
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (ssim(noise, real + 0.9) < 0.5).all()


def test_edges_agree_whatever_the_colours_and_a_flat_picture_shows_none():
    source = boxes()
    coloured = source * torch.tensor([-0.5, 0.2, -0.9])[:, None, None]
    assert (edge_agreement(coloured, source) > 0.99).all()
    assert (edge_agreement(torch.zeros_like(source), source) == 0).all()
    assert (edge_agreement(source, source[shuffled(8, 0)]) < 0.7).all()


def test_shuffling_moves_every_row():
    for rows in (2, 3, 8):
        order = shuffled(rows, 1)
        assert sorted(order.tolist()) == list(range(rows)) and (order != torch.arange(rows)).all()


def test_floors_and_ceilings():
    source = boxes()
    real = source * torch.tensor([0.9, 0.5, 0.7])[:, None, None]
    found = {s.name: s for s in paired_scores(real, real, source, real, about={"data": "x", "split": "test"})}
    assert found["l1"].value == 0 and found["ssim"].value == pytest.approx(1)
    copied = source.expand(-1, 3, -1, -1)
    assert found["l1"].floor == pytest.approx(float(l1(copied, real).mean()))
    assert found["psnr"].floor == pytest.approx(float(psnr(copied, real).mean()))
    mean = real.mean(0, keepdim=True).expand_as(real)
    assert found["l1/mean-image"].value == pytest.approx(float(l1(mean, real).mean()))
    recovery = found["input_recovery"]
    assert recovery.value == recovery.ceiling > 0.99 > 0.7 > recovery.floor


def test_the_copied_source_counts_in_its_better_polarity():
    source = boxes()
    found = paired_scores(source, source, -source, source, about={"data": "x", "split": "test"})
    assert found[0].name == "l1" and found[0].floor == 0


def test_shapes_must_agree():
    with pytest.raises(ShapeError, match="sources"):
        paired_scores(boxes(), boxes(), boxes(side=12), boxes(), about={})
