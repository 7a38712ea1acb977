"""What the paper claims about place, and that the networks are the published ones."""

from dataclasses import replace

import pytest
import torch

from condgen.errors import ConfigError, ShapeError
from condgen.rng import RowRandom, StepRandom
from condgen.systems.gawwn import Gawwn
from condgen.types import (
    Batch,
    Boxes,
    BoxesSpec,
    Condition,
    ConditionSpec,
    Keypoints,
    KeypointsSpec,
    LabelSpec,
    TargetSpec,
    Text,
    TextSpec,
)

TEXT = TextSpec(pooled=7)
BOX = ConditionSpec(text=TEXT, boxes=BoxesSpec(2))
POINTS = ConditionSpec(text=TEXT, keypoints=KeypointsSpec(3))


def tiny(spec=BOX, side=32, **options):
    torch.manual_seed(0)
    options = {"generator_width": 4, "discriminator_width": 4, "noise_dim": 5, "condition_dim": 6, **options}
    return Gawwn(condition=spec, target=TargetSpec(3, side, side), **options)


def condition(rows=4, **changed):
    generator = torch.Generator().manual_seed(1)
    low = torch.rand(rows, 2, 2, generator=generator) * 0.5
    fields = {
        "text": Text(torch.randn(rows, 7, generator=generator), strings=tuple(f"caption {i}" for i in range(rows))),
        "boxes": Boxes(torch.cat([low, low + 0.4], dim=2), torch.ones(rows, 2, dtype=torch.bool)),
        "keypoints": Keypoints(torch.rand(rows, 3, 2, generator=generator), torch.ones(rows, 3, dtype=torch.bool)),
    }
    return Condition(**{**fields, **changed})


def one_box(*corners, rows=1):
    return Boxes(torch.tensor([[list(corners)]] * rows, dtype=torch.float32), torch.ones(rows, 1, dtype=torch.bool))


def batch(rows=4, side=32):
    pixels = torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return Batch(pixels, condition(rows))


def draws(rows=4):
    return StepRandom(0, rows=rows)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("field", "generator", "discriminator"),
    [
        ({"boxes": BoxesSpec(1)}, 73_545_699, 16_763_137),
        ({"keypoints": KeypointsSpec(15)}, 26_471_043, 14_667_905),
    ],
)
def test_published_parameter_counts(field, generator, discriminator):
    with torch.device("meta"):
        system = Gawwn(condition=ConditionSpec(text=TextSpec(1024), **field), target=TargetSpec(3, 128, 128))
    assert count(system.generator) == generator
    assert count(system.discriminator) == discriminator


def test_the_networks_for_people_are_the_released_ones():
    """main_mhp.lua: no batch norm on the gated code and a residual block more in G; ELU and a dropout in D."""
    spec = ConditionSpec(text=TextSpec(1024), keypoints=KeypointsSpec(17))
    with torch.device("meta"):
        system = Gawwn(condition=spec, target=TargetSpec(3, 128, 128), variant="mpii")
    assert count(system.generator) == 27_288_451 and count(system.discriminator) == 14_668_417
    kinds = [type(m).__name__ for m in system.discriminator.modules()]
    assert "LeakyReLU" not in kinds and kinds.count("Dropout") == 1 and kinds.count("ELU") > 8
    with pytest.raises(ConfigError, match="networks for keypoints"):
        tiny(BOX, variant="mpii")


@pytest.mark.parametrize("side", [16, 64, 128])
def test_the_networks_for_people_train_and_sample(side):
    system = tiny(POINTS, side, variant="mpii")
    for phase in system.phases():
        assert torch.isfinite(phase.loss(batch(side=side), draws())["loss"])
    assert system.sample(condition(), random=draws()).shape == (4, 3, side, side)


def test_the_critic_of_people_rests_while_it_knows_every_fake_and_says_so_in_its_state():
    system = tiny(POINTS, variant="mpii", critic_norm="none")
    bias = system.discriminator.net.head[-1].bias
    with torch.no_grad():
        bias.fill_(-9.0)  # D(fake) is about 0
    assert system.discriminator_loss(batch(), draws()) is not None
    assert float(system.state_dict()["fake_score"]) == pytest.approx(0.495, abs=1e-3)  # 0.99 x 0.5
    with torch.no_grad():
        system.fake_score.fill_(0.2005)
    assert system.discriminator_loss(batch(), draws()) is not None
    assert system.discriminator_loss(batch(), draws()) is None and float(system.fake_score) < 0.198
    with torch.no_grad():
        bias.fill_(9.0)
    before = float(system.fake_score)
    system.generator_loss(batch(), draws())  # G's passes count too, so that D wakes up again
    assert float(system.fake_score) == pytest.approx(0.99 * before + 0.01, abs=1e-4)
    assert "fake_score" not in tiny(POINTS).state_dict()


@pytest.mark.parametrize("spec", [BOX, POINTS])
@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_every_side_trains_and_samples(spec, side):
    system = tiny(spec, side)
    for phase in system.phases():
        assert torch.isfinite(phase.loss(batch(side=side), draws())["loss"])
    assert system.sample(condition(), random=draws()).shape == (4, 3, side, side)
    place = system.generator.place(condition())
    assert spec is BOX or place[0].shape == (4, 3, min(16, side // 2), min(16, side // 2))


def test_the_local_path_paints_only_inside_the_box():
    """Before the joint convolutions, values and gradients outside the box are exactly zero."""
    net = tiny(ConditionSpec(text=TEXT, boxes=BoxesSpec(1))).generator.net.eval()
    boxes, valid = torch.tensor([[[0.25, 0.5, 0.75, 1.0]]]), torch.ones(1, 1, dtype=torch.bool)
    words = torch.randn(1, 16).requires_grad_()
    drawn = net.draw_local(torch.randn(1, 1, 5), words, boxes, valid)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[8:16, 4:12] = True
    assert drawn[..., ~inside].abs().max() == 0 and drawn[..., inside].abs().max() > 0
    (outer,) = torch.autograd.grad(drawn[..., ~inside].sum(), words, retain_graph=True)
    (inner,) = torch.autograd.grad(drawn[..., inside].sum(), words)
    assert outer.abs().max() == 0 and inner.abs().max() > 0


def test_moving_the_box_moves_what_the_local_path_drew():
    net = tiny(ConditionSpec(text=TEXT, boxes=BoxesSpec(1))).generator.net.eval()
    noise, words, valid = torch.randn(1, 1, 5), torch.randn(1, 16), torch.ones(1, 1, dtype=torch.bool)
    there, here = (
        net.draw_local(noise, words, torch.tensor([[corners]]), valid)
        for corners in ([0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 0.75])
    )
    torch.testing.assert_close(here[..., 4:12, 8:], there[..., :8, :8], atol=1e-5, rtol=0)


def test_moving_the_box_moves_where_the_words_reach_in_pixels():
    """With the scene held still, a change of the thing changes pixels around its box, wherever the box is."""
    net = tiny(ConditionSpec(text=TEXT, boxes=BoxesSpec(1))).generator.net.eval()
    valid, noise = torch.ones(1, 1, dtype=torch.bool), torch.randn(1, 1, 5)
    first, other = torch.randn(1, 16), torch.randn(1, 16)
    scene = torch.zeros(1, 8, 16, 16)
    for corners, quarter in (([0.0, 0.0, 0.25, 0.25], (0, 0)), ([0.75, 0.75, 1.0, 1.0], (1, 1))):
        boxes = torch.tensor([[corners]])
        drawn = [net.join(scene, net.draw_local(noise, words, boxes, valid)) for words in (first, other)]
        moved = (drawn[0] - drawn[1]).abs().sum((0, 1)).unflatten(0, (2, 16)).unflatten(2, (2, 16)).sum((1, 3))
        assert moved[quarter] > 0 and moved.sum() == moved[quarter]


def test_the_critics_crop_sees_only_the_box_and_the_box_gets_a_gradient():
    net = tiny(ConditionSpec(text=TEXT, boxes=BoxesSpec(1))).discriminator.net.eval()
    boxes, valid = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]], requires_grad=True), torch.ones(1, 1, dtype=torch.bool)
    features, words = torch.randn(1, 8, 16, 16), torch.randn(1, 6)
    base = net.region(features, words, boxes, valid)
    away, inside = features.clone(), features.clone()
    away[..., :6, :6] += 1  # a 3x3 convolution and half a blended cell away from the box
    inside[..., 12, 12] += 1
    assert torch.equal(net.region(away, words, boxes, valid), base)
    assert not torch.equal(net.region(inside, words, boxes, valid), base)
    (gradient,) = torch.autograd.grad(base.sum(), boxes)
    assert (gradient != 0).all()


def test_the_released_text_map_knows_no_place_and_the_pasted_one_does():
    words, features = torch.randn(1, 6), torch.randn(1, 8, 16, 16)
    valid = torch.ones(1, 1, dtype=torch.bool)
    first, second = torch.tensor([[[0.1, 0.1, 0.4, 0.4]]]), torch.tensor([[[0.5, 0.3, 0.9, 0.8]]])
    for text_map, same in (("crop", True), ("paste", False)):
        net = tiny(ConditionSpec(text=TEXT, boxes=BoxesSpec(1)), text_map=text_map).discriminator.net.eval()
        outs = [net.whole(net.scene(features), words, boxes, valid) for boxes in (first, second)]
        assert torch.allclose(*outs, atol=1e-6) == same


@pytest.mark.parametrize("spec", [BOX, POINTS])
def test_what_is_not_given_is_as_if_it_were_absent(spec):
    """Garbage in an invisible point or an invalid box changes nothing; a box that is not present draws nothing."""
    system = tiny(spec).eval()
    asked = condition()
    hidden = torch.tensor([True, False, True])
    visible = asked.keypoints.visible & hidden
    valid = asked.boxes.valid & hidden[:2]
    pairs = [
        (Keypoints(torch.where(visible[..., None], asked.keypoints.xy, fill), visible), Boxes(
            torch.where(valid[..., None], asked.boxes.xyxy, fill), valid))
        for fill in (torch.tensor(0.0), torch.tensor(0.77))
    ]  # fmt: skip
    one, two = (replace(asked, keypoints=points, boxes=boxes) for points, boxes in pairs)
    for make in (
        lambda c: system.sample(c, random=RowRandom(0, range(4))),
        lambda c: system.train().discriminator(batch().target, c),  # batch norm lifts the small first weights
    ):
        assert torch.equal(make(one), make(two))
        assert not torch.equal(make(one), make(asked))
        gone = asked.drop(torch.ones(4, dtype=torch.bool), ["boxes", "keypoints"])
        assert torch.isfinite(make(gone)).all()


def test_a_second_box_that_is_null_leaves_the_first_as_it_was():
    valid = torch.tensor([[True, False]] * 4)
    asked = condition()
    two = replace(asked, boxes=Boxes(asked.boxes.xyxy, valid))
    net = tiny().generator.net.eval()
    words, noise = torch.randn(4, 16), torch.randn(4, 2, 5)
    both = net.draw_local(noise, words, two.boxes.xyxy, valid)
    alone = net.draw_local(noise[:, :1], words, two.boxes.xyxy[:, :1], valid[:, :1])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mismatch", ["other", "released"])
@pytest.mark.parametrize(("spec", "where"), [(BOX, "boxes"), (POINTS, "keypoints")])
def test_wrong_pairs_have_other_words_in_the_same_place(spec, where, mismatch):
    system, asked = tiny(spec, mismatch=mismatch), condition(6)
    asked = replace(asked, present={"text": torch.arange(6) > 2, where: torch.arange(6) > 0})
    wrong = system.with_other_words(asked, draws(6))
    assert getattr(wrong, where) is getattr(asked, where) and wrong.present[where] is asked.present[where]
    order = [asked.text.strings.index(s) for s in wrong.text.strings]
    assert sorted(order) == list(range(6)) and wrong.present["text"].tolist() == [i > 2 for i in order]
    if mismatch == "other":
        assert all(i != at for i, at in enumerate(order))
    else:
        drawn = [system.with_other_words(asked, StepRandom(i, rows=6)).text.strings for i in range(20)]
        assert any(s == mine for row in drawn for s, mine in zip(row, asked.text.strings, strict=True))


def test_mismatch_weight_splits_the_fakes():
    losses = tiny(mismatch_weight=0.25).discriminator_loss(batch(), draws())
    expected = losses["real"] + 0.25 * losses["wrong"] + 0.75 * losses["fake"]
    torch.testing.assert_close(losses["loss"], expected)
    assert "wrong" not in tiny(mismatch_weight=0.0).discriminator_loss(batch(), draws())


def test_layout_follows_the_data_and_says_what_is_missing():
    assert tiny(BOX).layout == "box" and tiny(POINTS).layout == "keypoints"
    both = replace(BOX, keypoints=KeypointsSpec(3))
    assert tiny(both, layout="keypoints").layout == "keypoints"
    for spec, layout, says in (
        (both, "auto", "choose system.layout=box or system.layout=keypoints"),
        (BOX, "keypoints", "layout=keypoints needs keypoints; the data give text, boxes"),
        (ConditionSpec(text=TEXT), "auto", "needs boxes or keypoints"),
        (ConditionSpec(boxes=BoxesSpec(1)), "auto", "needs text"),
    ):
        with pytest.raises(ConfigError, match=says):
            tiny(spec, layout=layout)


def test_a_further_condition_joins_the_words():
    spec = replace(BOX, label=LabelSpec(3))
    asked = condition(label=torch.tensor([0, 1, 2, 0]))
    system = tiny(spec).eval()
    one, two = (
        system.sample(replace(asked, label=torch.tensor(label)), random=RowRandom(0, range(4)))
        for label in ([0, 1, 2, 0], [1, 2, 0, 1])
    )
    assert not torch.allclose(one, two)


def test_augmentation_moves_the_box_with_the_pixels():
    system, seen = tiny(diffaugment=("translation",)), []
    system.discriminator.forward = lambda pixels, c: seen.append(c) or torch.zeros(len(pixels), requires_grad=True)
    system.generator_loss(batch(), draws())
    assert not torch.equal(seen[0].boxes.xyxy, condition().boxes.xyxy)


@pytest.mark.parametrize("target", [TargetSpec(3, 48, 48), TargetSpec(3, 64, 32), TargetSpec(3, 64, 64, frames=4)])
def test_impossible_targets_are_refused(target):
    with pytest.raises(ShapeError, match="square images of 16, 32, 64"):
        Gawwn(condition=BOX, target=target)


def test_a_condition_without_the_place_is_refused():
    with pytest.raises(ShapeError, match="built for boxes"):
        tiny().generator(torch.randn(4, 2, 5), condition(boxes=None))


def test_the_critic_without_batch_norm_has_none_and_scores_rows_alone():
    for spec in (BOX, POINTS):
        system, data = tiny(spec, critic_norm="none"), batch()
        assert not [m for m in system.discriminator.modules() if "BatchNorm" in type(m).__name__]
        assert [m for m in system.generator.modules() if "BatchNorm" in type(m).__name__]
        alone = torch.cat([system.discriminator(data.target[[i]], data.condition.index([i])) for i in range(4)])
        torch.testing.assert_close(system.discriminator(data.target, data.condition), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_short_training_draws_in_the_box():
    """Check (g6) in the small: dark squares on white; where samples are dark is where the box is."""
    system = tiny(
        ConditionSpec(text=TEXT, boxes=BoxesSpec(1)), 16,
        generator_width=8, discriminator_width=8, loss="hinge", noise_dim=2, spectral_norm=True, critic_norm="none",
    )  # fmt: skip
    optimizers = [torch.optim.Adam(getattr(system, p.name).parameters(), 1e-3, (0.5, 0.99)) for p in system.phases()]
    sides = torch.tensor([4, 6, 8])

    def rows(random, count=16):
        side = sides[torch.randint(3, (count,), generator=random)]
        low = (torch.rand(count, 2, generator=random) * (17 - side[:, None])).floor()
        xyxy = torch.cat([low, low + side[:, None]], dim=1)
        at = torch.arange(16)
        x, y = ((at >= xyxy[:, i, None]) & (at < xyxy[:, i + 2, None]) for i in (0, 1))
        inside = y[:, None, :, None] & x[:, None, None, :]
        asked = condition(count, boxes=Boxes(xyxy[:, None] / 16, torch.ones(count, 1, dtype=torch.bool)))
        return Batch(1.0 - 1.8 * inside.float().expand(-1, 3, -1, -1), asked), inside

    for step in range(100):
        random = StepRandom("squares", step, rows=16)
        data, _ = rows(random.local)
        for phase, optimizer in zip(system.phases(), optimizers, strict=True):
            system.requires_grad_(False)
            getattr(system, phase.name).requires_grad_(True)
            optimizer.zero_grad()
            phase.loss(data, random)["loss"].backward()
            optimizer.step()
    data, inside = rows(torch.Generator().manual_seed(99), 32)
    with torch.no_grad():
        dark = system.eval().sample(data.condition, random=RowRandom(0, range(32))).mean(1, keepdim=True) < 0.1
    overlap = [(dark & mask).sum() / (dark | mask).sum() for mask in (inside, inside.roll(1, 0))]
    assert overlap[0] > 0.5 and overlap[0] > overlap[1] + 0.25
