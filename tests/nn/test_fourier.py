"""Fourier features of coordinates."""

import math

import torch

from condgen.nn.fourier import fourier_features, fourier_width


def test_features_are_the_octaves_of_each_coordinate():
    x = torch.tensor([[0.3, 0.7]])
    expected = [0.3, 0.7]
    for wave in (math.sin, math.cos):
        expected += [wave(2**k * math.pi * v) for v in (0.3, 0.7) for k in range(5)]
    out = fourier_features(x, 5)
    torch.testing.assert_close(out[0], torch.tensor(expected), rtol=0, atol=1e-5)
    assert out.shape[-1] == fourier_width(2, 5)


def test_half_precision_input_is_computed_in_float32():
    x = torch.tensor([[0.3]], dtype=torch.bfloat16)
    out = fourier_features(x, 6)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, fourier_features(x.float(), 6))
