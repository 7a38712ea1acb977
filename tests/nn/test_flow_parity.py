"""Affine couplings, masks, squeeze and ActNorm against the library normflows (arXiv:2302.12014), where installed."""

import pytest
import torch
import torch.nn.functional as F

from condgen.nn.coupling import Area, Coupling, FlowNorm, Given, checkerboards
from condgen.nn.flow import MultiScaleFlow, reorder, restore

normflows = pytest.importorskip("normflows")


def coupling(kind, affine, norm="none"):
    torch.manual_seed(0)
    made = Coupling(4, kind, flip=False, width=8, blocks=2, norm=norm, net_norm="batch", affine=affine).double().eval()
    made.factor.data.normal_()
    return made


def maps(layer, area):
    """(s, t) of x exp(s) + t as functions of what the coupling keeps."""

    class Scale(torch.nn.Module):
        def forward(self, kept):
            return layer._scale_and_shift(kept, area, Given())[0]

    class Shift(torch.nn.Module):
        def forward(self, kept):
            s, t = layer._scale_and_shift(kept, area, Given())
            return t * s.exp() if layer.affine == "released" else t

    return Scale(), Shift()


@pytest.mark.parametrize("affine", ["released", "paper"])
@pytest.mark.parametrize("board", [0, 1])
def test_checkerboard_coupling(affine, board):
    layer, x = coupling("checkerboard", affine), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    area = checkerboards(x)[board]
    scale, shift = maps(layer, area)
    theirs = normflows.flows.MaskedAffineFlow((1 - area.mask[0]).expand(4, 6, 6), t=shift, s=scale)
    y, logdet = layer(x, area, Given())
    torch.testing.assert_close((y, logdet), theirs(x), atol=1e-10, rtol=1e-10)
    back, undone = theirs.inverse(y)
    torch.testing.assert_close((layer.inverse(y, area, Given()), -logdet), (back, undone), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("affine", ["released", "paper"])
def test_channel_coupling(affine):
    layer, x = coupling("channel", affine), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    area = Area(None, 36)
    scale, shift = maps(layer, area)

    class Both(torch.nn.Module):
        def forward(self, kept):  # normflows reads shift and scale from alternate channels
            return torch.stack([shift(kept), scale(kept)], dim=2).flatten(1, 2)

    theirs = normflows.flows.AffineCoupling(Both())
    (kept, moved), logdet = theirs([x[:, 2:], x[:, :2]])
    torch.testing.assert_close(layer(x, area, Given()), (torch.cat([moved, kept], 1), logdet), atol=1e-10, rtol=1e-10)


def test_squeeze():
    x = torch.randn(2, 3, 4, 6)
    theirs = normflows.flows.Squeeze()
    assert torch.equal(F.pixel_unshuffle(x, 2), theirs.inverse(x)[0])
    assert torch.equal(F.pixel_shuffle(restore(reorder(F.pixel_unshuffle(x, 2))), 2), x)


def test_actnorm_from_its_first_batch():
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64) * 2 + 1
    ours, theirs = FlowNorm(3, "actnorm").double(), normflows.flows.ActNorm((3, 1, 1)).double()
    z, logdet = ours(x, Area(None, 64), initialise=True)
    expected, theirs_logdet = theirs(x)
    torch.testing.assert_close(z, expected, atol=2e-3, rtol=0)  # they divide by n - 1 and have another epsilon
    torch.testing.assert_close(logdet, theirs_logdet, atol=0.05, rtol=0)
    theirs.s.data.copy_(ours.log_scale[None])
    theirs.t.data.copy_(ours.bias[None] * ours.log_scale.exp())
    torch.testing.assert_close(ours(x, Area(None, 64), initialise=False), theirs(x), atol=1e-10, rtol=1e-10)


def test_a_whole_scale_and_its_likelihood():
    """4 checkerboard couplings on a standard normal law, through their NormalizingFlow (which maps z to x)."""
    torch.manual_seed(0)
    flow = MultiScaleFlow(2, scales=1, width=8, blocks=1, norm="none").double()
    for layer in flow.spatial[0]:
        layer.factor.data.normal_()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    boards = checkerboards(x)
    layers = []
    for layer in flow.spatial[0]:
        area = boards[int(layer.flip)]
        scale, shift = maps(layer, area)
        layers.append(normflows.flows.MaskedAffineFlow((1 - area.mask[0]).expand(2, 4, 4), t=shift, s=scale))
    forward = [normflows.flows.base.Reverse(layer) for layer in reversed(layers)]
    theirs = normflows.NormalizingFlow(normflows.distributions.DiagGaussian((2, 4, 4), trainable=False), forward)
    z, logdet = flow(x)
    ours = torch.distributions.Normal(0, 1).log_prob(z).flatten(1).sum(1) + logdet
    torch.testing.assert_close(ours, theirs.double().log_prob(x), atol=1e-9, rtol=1e-9)
