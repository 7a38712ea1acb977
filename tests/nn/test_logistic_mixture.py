"""Discretised logistics: known values, masses that sum to one at every scale, draws that follow them."""

import itertools

import pytest
import torch

from condgen.errors import ShapeError
from condgen.losses.logistic_mixture import (
    logistic_log_mass,
    mixture_log_prob,
    mixture_noise,
    mixture_sample,
    parameter_count,
    quantise,
)
from condgen.pixels import pixels_to_float

GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize(
    ("mean", "log_scale", "expected"),
    [
        (0.1, -2.0, (-8.09928882, -10.91861048, -4.35789574, -6.37244240, -6.62250478)),
        (-0.7, -5.0, (-43.94193534, -43.15220701, -104.26350782, -188.07329178, -251.72035809)),
        (0.0, 0.5, (-1.04017076, -6.82361000, -6.73441261, -6.76400221, -1.04017076)),
    ],
)
def test_known_values(mean, log_scale, expected):
    mean, log_scale = torch.tensor([mean, log_scale], dtype=torch.float64)
    got = logistic_log_mass(GRID[[0, 1, 128, 200, 255]], mean, log_scale)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


def test_known_value_of_a_mixture_of_two_over_rgb():
    means, scales, coefficients = torch.tensor(
        [[[0.1, -0.2, 0.3], [-0.5, 0.4, 0]], [[-2, -1, -3], [-1.5, -2.5, -2]], [[0.5, -1, 0.2], [0, 1, -0.3]]],
        dtype=torch.float64,
    )
    rest = torch.stack([means, scales, coefficients]).permute(2, 0, 1).reshape(-1)  # colour, part, component
    parameters = torch.cat([torch.tensor([0.3, 0.7], dtype=torch.float64).log(), rest])
    pixel = GRID[[120, 30, 255]]
    got = mixture_log_prob(parameters.view(1, -1, 1, 1), pixel.view(1, 3, 1, 1))
    assert got.item() == pytest.approx(-27.26898190, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_256_masses_sum_to_one_and_gradients_are_finite_at_extreme_scales(dtype):
    scales = torch.tensor([-7.0, -6.5, -5, -2, 0, 3, 20, 60, 300], dtype=dtype)
    means = torch.tensor([-40.0, -2, -1, -0.31, 0, 0.5, 1, 2, 40], dtype=dtype)
    mean, scale = (t.reshape(-1, 1).clone().requires_grad_() for t in torch.meshgrid(means, scales, indexing="ij"))
    log_mass = logistic_log_mass(GRID.to(dtype), mean, scale)
    assert torch.isfinite(log_mass).all()
    error = 1e-12 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(log_mass.double().exp().sum(1), torch.ones(81).double(), atol=error, rtol=0)
    log_mass.sum().backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(scale.grad).all()


def test_the_released_formula_does_not_sum_to_one_and_agrees_where_masses_are_large():
    parameters = torch.zeros(256, 3, 1).double()
    parameters[:, 2] = -7.0
    parameters[:, 1] = 0.3 / 255
    exact, released = (
        mixture_log_prob(parameters, GRID.view(256, 1, 1), released=how).exp().sum().item() for how in (False, True)
    )
    assert exact == pytest.approx(1, abs=1e-12) and abs(released - 1) > 1e-9
    parameters[:, 2] = -1.0
    one, two = (mixture_log_prob(parameters, GRID.view(256, 1, 1), released=how) for how in (False, True))
    torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


def test_all_colours_together_have_mass_one():
    parameters = torch.randn(1, 30, 1, generator=torch.Generator().manual_seed(0)).double() * 2
    colours = torch.tensor(list(itertools.product([-1, -1 / 3, 1 / 3, 1], repeat=3))).double()
    total = mixture_log_prob(parameters.expand(64, -1, -1), colours.unsqueeze(2), values=4).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("colours", [1, 3])
def test_draws_are_distributed_as_the_masses_say(colours):
    random, values, many = torch.Generator().manual_seed(0), 4, 100_000
    parameters = torch.randn(1, parameter_count(3, colours), generator=random).double()
    rest = parameters[:, 3:].unflatten(1, (colours, -1, 3))
    rest[:, :, 1] = -1.5
    rest[:, :, 2:] = 1.0  # green and blue hang on what was drawn before them
    grid = torch.linspace(-1, 1, values).double()
    every = torch.tensor(list(itertools.product(grid.tolist(), repeat=colours))).double()
    expected = mixture_log_prob(parameters[:, :, None].expand(len(every), -1, -1), every[..., None], values=values)
    uniform = torch.rand(many, 3 + colours, generator=random).double()
    drawn = mixture_sample(parameters.expand(many, -1), *mixture_noise(uniform, 3), values=values)
    place = ((drawn + 1) * (values - 1) / 2).round().long()
    code = (place * values ** torch.arange(colours - 1, -1, -1)).sum(1)
    share = torch.bincount(code, minlength=len(every)).double() / many
    expected = expected[:, 0].exp()
    assert ((share - expected).abs() < 5 * (expected / many).sqrt() + 5 / many).all()
    torch.testing.assert_close(drawn, grid[place])


def test_a_low_temperature_keeps_to_the_likeliest_component_and_its_mean():
    parameters = torch.tensor([[0.0, 1.0, -0.5, 0.4, 0.0, 0.0]]).expand(64, -1)
    noise = mixture_noise(torch.rand(64, 3, generator=torch.Generator().manual_seed(0)), 2)
    assert (mixture_sample(parameters, *noise, temperature=1e-4) - 0.4).abs().max() < 0.01
    assert mixture_sample(parameters, *noise).std() > 0.3


def test_rounding_gives_exactly_the_pixels_of_uint8():
    pixels = pixels_to_float(torch.arange(256, dtype=torch.uint8))
    assert torch.equal(quantise(pixels), pixels)
    assert torch.equal(quantise(pixels + 0.4 / 127.5), pixels)


def test_two_colours_are_refused():
    with pytest.raises(ShapeError, match="likelihood=softmax"):
        parameter_count(10, 2)
