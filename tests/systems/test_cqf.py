"""The system `condgen.systems.cqf`: rows of the ladder, who learns from what, warm-ups, the bound under a decoder that
rests, published sizes, and the ladder file."""

import math

import pytest
import torch

from condgen import config as configuration
from condgen.commands.ladder import read_ladder
from condgen.data.base import BatchDataset, RowDataset
from condgen.engine.log import Log
from condgen.engine.phases import Runner, owned
from condgen.engine.run import RunFolder
from condgen.engine.trainer import OptimOptions, Trainer, TrainOptions
from condgen.engine.world import World
from condgen.errors import CheckpointError, ConfigError, ShapeError
from condgen.metrics.likelihood import bits_per_dim, has_bits
from condgen.nn import cqf_nets
from condgen.rng import RowRandom, StepRandom
from condgen.systems.base import HasLatent, HasLikelihood, Phase
from condgen.systems.cqf import Cqf
from condgen.types import Batch, Condition, ConditionSpec, LabelSpec, Sample, TargetSpec

NONE = Condition()
ROWS = {
    "VAE": {"quality": False, "flow": False},
    "VAE-F": {"quality": False},
    "CQ": {"flow": False},
    "CQ-F": {},
    "GAN": {"coverage": False, "flow": False, "bound_start": 5},
}
FURTHER = [
    {"residual": True},
    {"iaf": True},
    {"large_discriminator": True},
    {"two_scales": True},
    {"residual": True, "iaf": True, "large_discriminator": True, "two_scales": True},
]


def made(channels=1, side=8, labels=0, **options):
    torch.manual_seed(0)
    small = {"width": 4, "discriminator_width": 4, "latent_dim": 3, "flow_width": 4, "flow_blocks": 1, "iaf_width": 8}
    spec = ConditionSpec(label=LabelSpec(labels)) if labels else ConditionSpec()
    return Cqf(condition=spec, target=TargetSpec(channels, side, side), **{**small, **options})


def batch(rows=4, channels=1, side=8, labels=0):
    pixels = torch.randint(0, 256, (rows, channels, side, side), generator=torch.Generator().manual_seed(3))
    return Batch(pixels / 127.5 - 1, Condition(label=torch.arange(rows) % labels) if labels else NONE)


def phase(system, name):
    return next(p for p in system.phases() if p.name == name)


def loss(system, name, data, seed=0, **place):
    system.zero_grad()
    return phase(system, name).loss(data, StepRandom(seed, name, rows=len(data), **place))


def moved(module):
    """Whether gradient has reached it."""
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def count(module):
    return sum(p.numel() for p in module.parameters())


# the ladder


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("labels", [0, 3])
@pytest.mark.parametrize("further", FURTHER, ids="+".join)
def test_every_row_trains_samples_and_has_a_likelihood(row, labels, further):
    if row in ("VAE", "CQ", "GAN"):
        further = {key: value for key, value in further.items() if key != "two_scales"}
    system, data = made(3, 16, labels, **ROWS[row], **further), batch(4, 3, 16, labels)
    owned(system, system.phases())
    for each in system.phases():
        found = loss(system, each.name, data)
        found["loss"].backward()
        assert all(torch.isfinite(value) for value in found.values())
        for name in each.trains:
            assert moved(system.get_submodule(name)), f"{each.name} does not reach {name}"
    assert isinstance(system, HasLikelihood) and isinstance(system, HasLatent)
    system.eval()
    with torch.no_grad():
        for mode in ("mean", "noisy"):
            drawn = system.sample(data.condition, random=RowRandom(0, range(4)), sample_mode=mode)
            assert drawn.shape == data.target.shape and drawn.abs().max() <= 1
        nats = system.log_prob(data.target, data.condition, random=RowRandom(0, range(4)))
        assert nats.shape == (4,) and nats.dtype == torch.float32 and bool((nats < 0).all())
        latent = system.encode(data.target, data.condition)
        assert system.decode(latent, data.condition).shape == data.target.shape


def test_the_rows_have_the_losses_of_the_table():
    data = batch()
    for row, options in ROWS.items():
        system = made(**options)
        found = loss(system, "generator", data)
        assert ("elbo_bits" in found) == (row != "GAN"), row
        assert ("quality" in found) == (row in ("CQ", "CQ-F", "GAN")), row
        assert (system.flow.body is not None) == (row in ("VAE-F", "CQ-F")), row
        assert ("discriminator" in {p.name for p in system.phases()}) == (row in ("CQ", "CQ-F", "GAN")), row
        assert system.likelihood == ("lower bound (frozen decoder)" if row == "GAN" else "lower bound (ELBO)")
        assert system.dequantisation == "uniform"


def test_parameter_counts_of_the_published_networks():
    """SN-GAN's CNN, its generator with norm after the linear layer (1,024 more), and its ResNet."""
    for residual, generator, discriminator in ((False, 3_812_355 + 1_024, 2_935_873), (True, 4_276_739, 1_053_825)):
        size = {"shape": (3, 32, 32), "given": 0, "width": 64, "residual": residual}
        assert count(cqf_nets.decoder(latent=128, outputs=3, **size)) == generator
        assert count(cqf_nets.Discriminator(large=False, **size)) == discriminator
    stl = {"shape": (3, 48, 48), "given": 0, "width": 64, "residual": False}
    assert count(cqf_nets.decoder(latent=128, outputs=3, **stl)) == 5_133_315 + 1_024
    assert count(cqf_nets.Discriminator(large=False, **stl)) == 2_946_113


@pytest.mark.parametrize("residual", [False, True])
def test_a_large_discriminator_has_twice_the_maps(residual):
    small, large = (
        cqf_nets.Discriminator((3, 32, 32), 0, width=8, residual=residual, large=large) for large in (False, True)
    )
    assert large.head.in_features == 2 * small.head.in_features
    blocks = [sum(isinstance(m, cqf_nets.Block) for m in net.modules()) for net in (small, large)]
    assert blocks == ([4, 6] if residual else [0, 0])


@pytest.mark.parametrize("side", [16, 28, 32, 48, 64])
@pytest.mark.parametrize("residual", [False, True])
def test_sizes(side, residual):
    system, data = made(1, side, width=2, discriminator_width=2, residual=residual, two_scales=True), batch(1, 1, side)
    for each in system.phases():
        assert torch.isfinite(loss(system, each.name, data)["loss"])


# who learns from what


def test_quality_teaches_decoder_and_flow_and_never_the_encoder():
    system, data = made(scale="learned"), batch()
    before = loss(system, "generator", data)
    before["quality"].backward()
    assert moved(system.decoder) and moved(system.flow)
    assert not moved(system.encoder) and not moved(system.observation)
    loss(system, "generator", data)["elbo_bits"].backward()
    for name in ("encoder", "decoder", "flow", "observation"):
        assert moved(system.get_submodule(name)), name
    assert "discriminator" not in phase(system, "generator").trains
    noisy = made(sample_mode="noisy", scale="learned")
    loss(noisy, "generator", data)["quality"].backward()
    assert moved(noisy.observation)  # what is judged carries the noise


def test_d_learns_from_detached_samples_and_from_dequantised_pictures(monkeypatch):
    system, data = made(), batch()
    seen = []
    judge = system.discriminator.forward
    monkeypatch.setattr(
        system.discriminator, "forward", lambda pixels, condition: seen.append(pixels) or judge(pixels, condition)
    )
    loss(system, "discriminator", data)["loss"].backward()
    assert moved(system.discriminator) and not moved(system.decoder) and not moved(system.flow)
    real, fake = seen
    level = (real + 1) * 128
    offset = level - ((data.target + 1) * 127.5).round()
    assert float(offset.min()) >= -1e-3 and float(offset.max()) <= 1 + 1e-3 and float(offset.std()) > 0.2
    assert not fake.requires_grad


def test_the_sum_is_weighed_or_literal():
    data = batch()
    for options, weight in (({"quality_weight": 0.3}, 0.3), ({"literal_sum": True}, 1 / (64 * math.log(2)))):
        found = loss(made(**options), "generator", data)
        torch.testing.assert_close(found["loss"], found["elbo_bits"] + weight * found["quality"])
    nats = found["distortion"] + found["kl"] + found["quality"]
    torch.testing.assert_close(found["loss"] * 64 * math.log(2), nats)
    gan = loss(made(**ROWS["GAN"]), "generator", data)
    torch.testing.assert_close(gan["loss"], gan["quality"])


def test_discriminator_and_quality_start_late_and_together():
    system, data = made(quality_start=2), batch()
    assert phase(system, "discriminator").start == 2
    assert ["quality" in loss(system, "generator", data) for _ in range(4)] == [False, False, True, True]
    assert phase(made(discriminator_steps=5), "discriminator").repeats == 5


def test_the_weight_of_the_kl_rises_with_updates_and_survives_a_checkpoint():
    data = batch()

    def weight(system, **place):
        found = {k: v.item() for k, v in loss(system, "generator", data, **place).items()}
        return (found["loss"] * 64 * math.log(2) - found["distortion"]) / found["kl"]

    system = made(quality=False, kl_warmup=4)
    assert [weight(system) for _ in range(3)] == pytest.approx([0.25, 0.5, 0.75], abs=0.02)
    other = made(quality=False, kl_warmup=4)
    other.load_state_dict(system.state_dict())
    assert weight(other) == pytest.approx(1, abs=0.02)
    assert weight(other.eval()) == pytest.approx(1, abs=0.02)
    parts = made(quality=False, kl_warmup=4)
    for rank in (0, 1):  # two micro-batches on each of two processes: one update
        parts.updates.zero_()
        for micro in (0, 1):
            place = {"rank": rank, "world": 2, "offset": (2 * micro + rank) * 4, "total": 16}
            assert weight(parts, **place) == pytest.approx(0.25, abs=0.02)
        assert int(parts.updates) == 1


def test_free_bits_leave_small_elements_alone():
    found = loss(made(quality=False, free_bits=50.0), "generator", batch())
    nats = float(found["loss"]) * 64 * math.log(2) - float(found["distortion"])
    assert nats == pytest.approx(3 * 50, rel=1e-3)


def test_the_sample_mode_decides_about_noise():
    system = made(initial_scale=1.0).eval()
    with torch.no_grad():
        mean, again, noisy = (
            system.sample(NONE, random=RowRandom(0, [0, 1]), sample_mode=mode) for mode in ("mean", "mean", "noisy")
        )
        assert torch.equal(mean, again) and (noisy - mean).abs().mean() > 0.05
        z = RowRandom(0, [0, 1]).randn(3)
        assert torch.equal(system.decode(z, NONE), mean)
        assert torch.equal(
            made(initial_scale=1.0, sample_mode="noisy").eval().sample(NONE, random=RowRandom(0, [0, 1])), noisy
        )


@pytest.mark.parametrize("further", [{}, {"iaf": True, "two_scales": True}, {"flow": False, "scale": "learned"}])
def test_likelihoods_stay_in_float32_under_bf16(further):
    system, data = made(3, 16, **further).eval(), batch(4, 3, 16)
    with torch.no_grad():
        exact = system.log_prob(data.target, NONE, random=RowRandom(0, range(4)))
        with torch.autocast("cpu", torch.bfloat16):
            half = system.log_prob(data.target, NONE, random=RowRandom(0, range(4)))
            found = loss(system, "generator", data)
    assert half.dtype == torch.float32 and found["loss"].dtype == torch.float32
    bits = (half - exact).abs() / (768 * math.log(2))
    assert float(bits.max()) < 0.03
    assert not torch.equal(half, half.bfloat16().float())  # sums have not passed a short format


def test_the_condition_reaches_all_three_networks():
    system, data = made(labels=3).eval(), batch(4, labels=3)
    other = Condition(label=(data.condition.label + 1) % 3)
    with torch.no_grad():
        z = torch.randn(4, 3)
        assert not torch.allclose(system.decode(z, data.condition), system.decode(z, other))
        assert not torch.allclose(system.encode(data.target, data.condition), system.encode(data.target, other))
        one, two = system.discriminator(data.target, data.condition), system.discriminator(data.target, other)
        assert not torch.allclose(one, two)


# the bound of a GAN


class Pictures(RowDataset):
    """Bright and dark squares."""

    def __init__(self):
        self.provides, self.target = ConditionSpec(), TargetSpec(1, 8, 8)
        self.pixels = torch.where(torch.arange(12)[:, None, None, None] % 2 == 0, 40, 210).expand(12, 1, 8, 8)

    def __len__(self):
        return 12

    def key(self, index):
        return str(index)

    def sample(self, index, random):
        return Sample(str(index), self.pixels[index].to(torch.uint8))


def trainer(folder, steps, **options):
    folder.mkdir(exist_ok=True)
    run = RunFolder(folder)
    rows = BatchDataset(Pictures(), ConditionSpec(), batch_size=4, seed=1)
    gan = made(coverage=False, flow=False, **options)
    chosen = TrainOptions(steps=steps, batch_size=4, seed=1, checkpoint_every=0, ema_decay=0.0)
    optim = {"default": OptimOptions(lr=1e-2)}
    return Trainer(gan, rows, lambda b: b, optim, chosen, World(), run, Log(run, quiet=True))


def copies(module):
    return [p.detach().clone() for p in module.parameters()]


def same(before, module):
    return all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_finished_gan_goes_on_with_an_encoder_alone(tmp_path):
    first = trainer(tmp_path / "gan", 4)
    encoder = copies(first.system.encoder)
    first.train()
    assert same(encoder, first.system.encoder)
    assert not has_bits(first.system)
    with pytest.raises(ConfigError, match="bound_start"):
        first.system.log_prob(batch().target, NONE, random=RowRandom(0, range(4)))
    decoder, judge = copies(first.system.decoder), copies(first.system.discriminator)
    scale = first.system.observation.log_scale.detach().clone()

    second = trainer(tmp_path / "gan", 40, bound_start=4)
    data = batch().target
    second.train(first.store.latest())
    assert same(decoder, second.system.decoder) and same(judge, second.system.discriminator)
    assert not same(encoder, second.system.encoder)
    assert not torch.equal(scale, second.system.observation.log_scale)
    assert second.system.likelihood == "lower bound (frozen decoder)"
    pixels = torch.stack([Pictures().pixels[i] for i in range(12)]).to(torch.uint8)
    untrained = trainer(tmp_path / "none", 40, bound_start=4).system
    untrained.load_state_dict(first.system.state_dict())
    assert bits_per_dim(second.system, pixels).value < bits_per_dim(untrained, pixels).value - 0.1
    assert math.isfinite(float(second.system.log_prob(data, NONE, random=RowRandom(0, range(4))).sum()))


def test_one_run_does_the_same(tmp_path):
    whole = trainer(tmp_path / "whole", 6, bound_start=4)
    whole.train()
    alone = trainer(tmp_path / "alone", 4)
    alone.train()
    assert same(copies(whole.system.decoder), alone.system.decoder)


def test_a_run_without_the_option_may_not_lose_what_it_learned(tmp_path):
    first = trainer(tmp_path / "gan", 4)
    first.train()
    other = trainer(tmp_path / "gan", 8, latent_dim=5)
    with pytest.raises(CheckpointError, match="of another shape"):
        other.train(first.store.latest())


def test_schedules_run_over_the_steps_of_their_phase():
    def rate(start, stop, step):
        named = Phase("p", lambda batch, random: None, trains=("body",), start=start, stop=stop)
        module = torch.nn.Module()
        module.body = torch.nn.Linear(1, 1)
        parameters = {n: p for n, p in module.named_parameters()}
        optim = OptimOptions(lr=1.0, schedule="linear")
        return Runner(module, named, parameters, optim, TrainOptions(steps=100), World())._rate(step)

    assert rate(0, None, 50) == pytest.approx(0.5)
    assert (rate(0, 50, 0), rate(0, 50, 25)) == (1, pytest.approx(0.5))
    assert (rate(60, None, 60), rate(60, None, 80)) == (1, pytest.approx(0.5))
    assert rate(0, 500, 50) == pytest.approx(0.5)


# what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coverage": False, "quality": False}, "nothing is learned"),
        ({"coverage": False}, "flow=true needs"),
        ({"coverage": False, "flow": False, "scale": "predicted"}, "scale=predicted"),
        ({"coverage": False, "flow": False, "scale": "fixed"}, "scale=fixed"),
        ({"coverage": False, "flow": False, "quality_start": 3}, "quality_start"),
        ({"bound_start": 3}, "bound_start is for the GAN"),
    ],
)
def test_switches_that_contradict_each_other(options, words):
    with pytest.raises(ConfigError, match=words):
        made(**options)


@pytest.mark.parametrize("side", [15, 17, 70])
def test_sides_that_cannot_be_halved_are_refused(side):
    with pytest.raises(ShapeError, match=r"data\.size"):
        made(side=side)


def test_clips_are_refused():
    with pytest.raises(ShapeError, match="frames"):
        Cqf(condition=ConditionSpec(), target=TargetSpec(1, 16, 16, frames=4))


# the ladder file


@pytest.mark.parametrize("name", ["cqf", "cqf_paper"])
def test_every_row_of_the_ladder_files_is_a_configuration_and_a_system(name):
    ladder = read_ladder(name)
    assert list(ladder.rows)[:5] == list(ROWS)
    steps = set()
    for row, words in ladder.rows.items():
        read = configuration.load([*ladder.words, *words])
        assert read.task == "unconditional"
        sizes = {"width": 2, "discriminator_width": 2, "flow_width": 2, "latent_dim": 2, "iaf_width": 4}
        system = Cqf(condition=ConditionSpec(), target=TargetSpec(1, 16, 16), **{**read.system, **sizes})
        expected = made(**ROWS[row.split(" ")[0]])
        assert (system.coverage, system.quality) == (expected.coverage, expected.quality), row
        assert (system.flow.body is None) == (expected.flow.body is None), row
        assert has_bits(system), row
        steps.add(read.system["bound_start"] or read.train.steps)
    assert len(steps) == 1  # equal budgets
