"""Spectral normalisation as SN-GAN has it (Miyato et al. 2018, arXiv:1802.05957): one power iteration a step."""

import pytest
import torch
from torch import nn

from condgen.nn.cqf_nets import Discriminator
from condgen.nn.initialise import add_spectral_norm


def normed(layer):
    torch.manual_seed(0)
    body = nn.Sequential(layer)
    add_spectral_norm(body)
    return body.double()


def largest(weight):
    """Of the matrix with one row an output channel, as published also for convolutions."""
    return torch.linalg.svdvals(weight.detach().flatten(1).double())[0].item()


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Conv2d(3, 6, 3), nn.Conv2d(4, 8, 4, 2, 1)], ids=str)
def test_the_weight_has_norm_one_after_many_steps_and_one_step_at_a_time(layer):
    body, raw = normed(layer), layer.weight.detach().clone()
    shape = (2, raw.shape[1], 6, 6) if raw.dim() == 4 else (2, raw.shape[1])
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(200):
        body(x)
    body.eval()
    assert largest(body[0].weight) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(body[0].weight * largest(raw), raw.double(), atol=1e-4, rtol=1e-3)


def test_evaluation_iterates_no_further_and_checkpoints_keep_the_vector():
    body, other = normed(nn.Linear(5, 7)), normed(nn.Linear(5, 7))
    x = torch.randn(2, 5, dtype=torch.float64)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    body.eval()(x)
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())
    body.train()(x)
    moved = [key for key, value in body.state_dict().items() if not torch.equal(value, before[key])]
    assert moved and all(key.endswith(("_u", "_v")) for key in moved)
    other.load_state_dict(body.state_dict())
    torch.testing.assert_close(other.eval()(x), body.eval()(x), atol=0, rtol=0)


def test_the_gradient_is_the_published_one():
    """(G - <G, W / s> u v^T) / s at the exact singular vectors: the direction of the largest one is damped."""
    body = normed(nn.Linear(4, 6))
    x, pull = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    for _ in range(500):
        body(x)
    body.eval()  # keeps u and v where they are
    (body(x) * pull).sum().backward()
    raw = body[0].parametrizations.weight.original
    u, s, v = torch.linalg.svd(raw.detach(), full_matrices=False)
    plain = pull.T @ x
    expected = (plain - (plain * raw.detach() / s[0]).sum() * torch.outer(u[:, 0], v[0])) / s[0]
    torch.testing.assert_close(raw.grad, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("residual", [False, True])
def test_every_layer_of_the_discriminator_of_cqf_is_normed(residual):
    net = Discriminator((3, 16, 16), 3, width=4, residual=residual, large=False)
    for _ in range(200):
        net(torch.rand(2, 3, 16, 16), torch.rand(2, 3))
    layers = [m for m in net.eval().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) > 5 and net.match in layers
    assert all(largest(layer.weight) == pytest.approx(1, abs=2e-3) for layer in layers)
