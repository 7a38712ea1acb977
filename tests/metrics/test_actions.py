"""A discriminator's features for action recognition: both sides get one budget, and good features show."""

import pytest
import torch

from condgen.data.base import RowDataset
from condgen.errors import ConfigError, DataError
from condgen.metrics.actions import ActionNet, ActionOptions, accuracy, action_scores, load_clips, train_actions
from condgen.systems.acgan import AcGan
from condgen.systems.vgan import Vgan
from condgen.types import ConditionSpec, LabelSpec, Sample, TargetSpec

TARGET = TargetSpec(1, 8, 8, 4)


class Directions(RowDataset):
    """A dot that moves to the right (class 0) or to the left (class 1): no single frame tells them apart."""

    target, provides = TARGET, ConditionSpec(label=LabelSpec(2, ("right", "left")))

    def __init__(self, rows=24, offset=0, labels=True):
        self.rows, self.offset, self.labels = rows, offset, labels

    def __len__(self):
        return self.rows

    def key(self, index):
        return str(index)

    def sample(self, index, random):
        label, row = index % 2, (index // 2 + self.offset) % 7
        clip = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
        for t in range(4):
            at = 2 * (t if label == 0 else 3 - t)
            clip[t, :, row : row + 2, at : at + 2] = 255
        return Sample(str(index), clip, label=label if self.labels else None)


def system(seed=0):
    torch.manual_seed(seed)
    return Vgan(condition=ConditionSpec(), target=TARGET, generator_width=2, discriminator_width=8)


def test_motion_is_learned_and_systems_are_left_alone():
    one = system()
    before = {n: t.clone() for n, t in one.state_dict().items()}
    options = ActionOptions(steps=40, batch_size=16, lr=2e-3)
    torch.manual_seed(0)
    net = ActionNet(one, TARGET.shape, 2, 0.5)
    clips, labels = load_clips(Directions())
    train_actions(net, clips, labels, options)
    assert accuracy(net, *load_clips(Directions(14))) > 0.9
    assert all(torch.equal(t, before[n]) for n, t in one.state_dict().items())


def test_scores_compare_with_random_weights_under_the_same_budget():
    said = []
    options = ActionOptions(steps=3, batch_size=8, share=0.5)
    scores = action_scores(
        system(0), system(0), Directions(), Directions(10), about={"data": "toy"}, options=options, say=said.append
    )
    value, chance = scores
    assert value.value == value.floor  # equal weights, equal budget
    assert chance.value == 0.5 and len(said) == 2
    assert "labelled=12" in value.signature and "n=10" in value.signature and "steps=3" in value.signature


def test_what_cannot_be_used_is_said():
    with pytest.raises(DataError, match="clips with a label"):
        load_clips(Directions(labels=False))
    pictures = AcGan(
        condition=ConditionSpec(),
        target=TargetSpec(3, 16, 16),
        conditioning="none",
        generator_width=0.02,
        discriminator_width=0.15,
    )
    with pytest.raises(ConfigError, match="no features"):
        ActionNet(pictures, (3, 16, 16), 2, 0.5)
