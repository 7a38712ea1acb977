"""Inverse autoregressive flows: triangular Jacobians, their determinants, and going back."""

import pytest
import torch

from condgen.nn import iaf
from condgen.nn.iaf import Autoregressive, Iaf
from condgen.nn.latent import draw_posterior

CASES = [
    ((5,), [7], False),
    ((5,), [16, 3], False),
    ((1,), [4], False),
    ((3, 2, 3), [9, 6], True),
    ((2, 3, 2), [2], True),
]


def flow_of(shape, hidden, spatial, steps=2, context=3):
    torch.manual_seed(0)
    flow = Iaf(shape[0], context, hidden, steps=steps, spatial=spatial).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    z = torch.randn(2, *shape, dtype=torch.float64)
    return flow, z, torch.randn(2, context, *shape[1:], dtype=torch.float64)


def jacobian(fn, z):
    """d fn(z) / d z of the first row, (N, N)."""
    found = torch.autograd.functional.jacobian(lambda x: fn(x.view(1, *z.shape[1:])).flatten(), z[:1].flatten())
    return found


@pytest.mark.parametrize(("shape", "hidden", "spatial"), CASES)
def test_log_det_equals_autograd_in_float64(shape, hidden, spatial):
    flow, z, context = flow_of(shape, hidden, spatial)
    full = jacobian(lambda x: flow(x, context[:1])[0], z)
    _, log_keep = flow(z, context)
    assert float(torch.linalg.slogdet(full)[1]) == pytest.approx(log_keep[0].sum().item(), abs=1e-8)


def order_of(shape, spatial, reverse):
    """Flat indices of z in the order of the flow: raster positions, channels inside."""
    index = torch.arange(torch.Size(shape).numel()).view(shape)
    index = index.permute(1, 2, 0).flatten() if spatial else index
    return index.flip(0) if reverse else index


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shape", "hidden", "spatial"), CASES)
def test_outputs_depend_on_earlier_elements_alone(shape, hidden, spatial, reverse):
    torch.manual_seed(1)
    net = Autoregressive(shape[0], 3, hidden, spatial=spatial, reverse=reverse).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    z, context = torch.randn(1, *shape, dtype=torch.float64), torch.randn(1, 3, *shape[1:], dtype=torch.float64)
    order = order_of(shape, spatial, reverse)
    for part in (0, 1):
        full = jacobian(lambda x, part=part: net(x, context)[part], z)[order][:, order]
        assert not full.triu().any()
        if shape[0] > 1 and min(hidden) >= shape[0]:
            assert full[-1].any() and (full.abs().sum(1)[1:] > 0).all()  # and everything but the first does depend


def test_dense_where_nothing_forbids_it():
    """Every earlier channel of the position and the whole row before it is seen: no blind spot within the kernel."""
    torch.manual_seed(0)
    net = Autoregressive(3, 0, [9], spatial=True).double()
    for parameter in net.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1)
    order = order_of((3, 3, 3), True, False)
    full = jacobian(lambda x: net(x, None)[0], torch.randn(1, 3, 3, 3, dtype=torch.float64))[order][:, order]
    assert torch.equal(full[12:15, :12] != 0, torch.ones(3, 12, dtype=torch.bool))  # the middle position
    assert torch.equal(full[12:15, 12:15] != 0, torch.ones(3, 3).tril(-1).bool())


@pytest.mark.parametrize(("shape", "hidden", "spatial"), CASES)
def test_going_back_returns_where_it_came_from(shape, hidden, spatial):
    flow, z, context = flow_of(shape, hidden, spatial)
    again = flow.inverse(flow(z, context)[0], context)
    torch.testing.assert_close(again, z, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("shape", "hidden", "spatial"), CASES)
def test_the_context_reaches_every_element(shape, hidden, spatial):
    flow, z, context = flow_of(shape, hidden, spatial, steps=1)
    moved = flow(z, context + 1)[0] - flow(z, context)[0]
    silent = int((moved[0] == 0).sum())
    assert silent == 0 or min(hidden) < shape[0]


def test_golden_step(monkeypatch):
    """Two elements with m = (.3, .3 + .5 z0) and s = (1, 1 - .4 z0), as in the dossier of checks."""
    flow = Iaf(2, 0, [2], steps=1).double()

    class Fixed(torch.nn.Module):
        def forward(self, z, context):
            first = z[:, :1]
            one = torch.ones_like(first)
            return torch.cat([0.3 * one, 0.3 + 0.5 * first], 1), torch.cat([one, 1 - 0.4 * first], 1)

    flow.nets = torch.nn.ModuleList([Fixed()])
    monkeypatch.setattr(iaf, "FORGET_BIAS", 0.0)
    eps, mean, log_std = (torch.tensor([pair], dtype=torch.float64) for pair in ([0.5, -1], [0.1, 0.2], [-0.3, 0.2]))
    drawn = draw_posterior(mean, log_std, eps, 0.0, 0.0, flow)
    expected = torch.tensor([[0.42457904, -0.54274707]], dtype=torch.float64)
    torch.testing.assert_close(drawn.latent, expected, atol=1e-8, rtol=0)
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(expected).sum()
    assert float(drawn.ratio.sum() + log_prior) == pytest.approx(-1.6821693235, abs=1e-7)


def test_an_open_gate_leaves_the_gaussian_and_its_kl():
    """s -> 1: the flow is the identity, and the sampled ratio averages to the closed form."""
    torch.manual_seed(0)
    flow = Iaf(3, 0, [4], steps=2).double()
    for net in flow.nets:
        net.gate.weight.data.zero_()
        net.gate.bias.data.fill_(60)
    mean, log_std = torch.randn(2, 1, 3, dtype=torch.float64).mul(0.5).expand(2, 40000, 3)
    noise = torch.randn(40000, 3, dtype=torch.float64)
    plain, through = (draw_posterior(mean, log_std, noise, 0.2, -0.1, f) for f in (None, flow))
    torch.testing.assert_close(through.latent, plain.latent)
    torch.testing.assert_close(through.ratio, plain.ratio)
    torch.testing.assert_close(through.ratio.mean(0), plain.kl[0], atol=0.02, rtol=0)


def test_kl_of_a_flow_by_importance_sampling():
    """E_q exp(ln p - ln q) = 1 holds only if ln q is the density of what was drawn."""
    flow, _, _ = flow_of((2,), [8], False)
    mean, log_std = torch.zeros(200000, 2, dtype=torch.float64), torch.full((200000, 2), 0.3, dtype=torch.float64)
    noise = torch.randn(200000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    context = torch.full((1, 3), 0.1, dtype=torch.float64)
    small = flow(mean[:1], context)[0][0]
    drawn = draw_posterior(mean, log_std, noise, small.detach(), -1.0, flow, context.expand(200000, 3))
    assert float(torch.exp(-drawn.ratio.sum(1)).mean().detach()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("shape", "spatial"), [((4,), False), ((2, 2, 2), True)])
def test_the_order_is_reversed_from_step_to_step(shape, spatial):
    """So the first element, which one step leaves to itself, hears the last one in the second step."""
    for steps in (1, 2):
        torch.manual_seed(0)
        flow = Iaf(shape[0], 0, [8], steps=steps, spatial=spatial).double()
        z = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(flow(z)[0].flatten()[0], z)
        heard = slope.flatten()[1:] != 0
        assert heard.any() == heard[-1] == (steps == 2)
