"""The joint embedding losses: hand-computed values, gradients by finite differences, symmetry."""

import math

import pytest
import torch
import torch.nn.functional as F

from condgen.errors import ShapeError
from condgen.losses.joint_embedding import in_batch_accuracy, info_nce, structured_joint_embedding


def pair(rows=5, dim=4, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=draws, dtype=torch.float64).requires_grad_() for _ in range(2)]


def by_hand(v, t, margin):
    size, total = len(v), 0.0
    for i in range(size):
        for j in range(size):
            if i != j:
                own, wrong = (v[i] @ t[i]).item(), (v[i] @ t[j]).item()
                total += max(0.0, margin + wrong - own)  # this image, a wrong text
                total += max(0.0, margin + (v[j] @ t[i]).item() - own)  # this text, a wrong image
    return total / size**2


@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_sje_is_the_published_sum(margin):
    v, t = pair()
    assert structured_joint_embedding(v, t, margin=margin).item() == pytest.approx(by_hand(v, t, margin), abs=1e-12)


@pytest.mark.parametrize("loss", [structured_joint_embedding, info_nce])
def test_gradients_by_finite_differences(loss):
    v, t = pair()
    assert torch.autograd.gradcheck(loss, (v, t), eps=1e-6, atol=1e-6)
    ignore = torch.zeros(5, 5, dtype=torch.bool)
    ignore[0, 3] = ignore[3, 0] = True
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, ignore=ignore), (v, t), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [structured_joint_embedding, info_nce])
def test_exchanging_images_and_texts_or_rows_changes_nothing(loss):
    v, t = pair()
    value = loss(v, t)
    torch.testing.assert_close(loss(t, v), value, rtol=0, atol=1e-12)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(loss(v[order], t[order]), value, rtol=0, atol=1e-12)
    assert loss(v, t[order]).item() != pytest.approx(value.item())


def test_the_ends_of_the_scale():
    far = torch.eye(4) * 10
    assert structured_joint_embedding(far, far) == 0
    # nothing learned: every hinge is the margin
    blind = torch.zeros(4, 3)
    assert float(structured_joint_embedding(blind, blind)) == pytest.approx(2 * 12 / 16)
    same = F.normalize(torch.ones(8, 3), dim=1)
    assert float(info_nce(same, same)) == pytest.approx(math.log(8), rel=1e-6)
    assert float(info_nce(far, far, scale=50.0)) == pytest.approx(0, abs=1e-6)
    assert in_batch_accuracy(far, far) == 1 and in_batch_accuracy(far, far.flip(0)) == 0


def test_ignored_pairs_have_no_influence_and_own_pairs_always_count():
    v, t = pair()
    everything = torch.ones(5, 5, dtype=torch.bool)
    assert structured_joint_embedding(v, t, ignore=everything) == 0
    assert float(info_nce(v, t, ignore=everything).detach()) == pytest.approx(0, abs=1e-12)
    only = torch.zeros(5, 5, dtype=torch.bool)
    only[1, 2] = True
    assert structured_joint_embedding(v, t, ignore=only) < structured_joint_embedding(v, t)


def test_unequal_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"\(3, 4\) and texts \(3, 5\)"):
        structured_joint_embedding(torch.zeros(3, 4), torch.zeros(3, 5))
