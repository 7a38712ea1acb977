"""`condgen sample --arithmetic` and `--walk` on a small export: what is summed, what is held, what is refused."""

import pytest
import torch
from PIL import Image

import condgen
from condgen import registry
from condgen.commands import latents, sample
from condgen.engine.export import ExportInfo, write_export
from condgen.engine.sample import sample_rows
from condgen.errors import ConfigError, DataError
from condgen.pixels import pixels_to_uint8
from condgen.systems.base import System
from condgen.types import Condition, ConditionSpec, LabelSpec, TargetSpec, Text, TextSpec

NAMES = ("Sandal", "T-shirt/top", "Ankle boot")
LABEL = ConditionSpec(label=LabelSpec(3, NAMES))
TARGET = TargetSpec(3, 16, 16)


class Words:
    """Four numbers per sentence."""

    name, spec, fingerprint = "stub", TextSpec(pooled=4), "f00"

    def encode(self, strings):
        return Text(pooled=torch.tensor([[float(ord(c)) / 99 for c in s[:4].ljust(4)] for s in strings]))


@pytest.fixture
def load(tmp_path):
    def load(spec=LABEL, name="acgan", **options):
        torch.manual_seed(0)
        system = registry.load("systems", name, System)(condition=spec, target=TARGET, **options)
        for module in system.generator.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.ConvTranspose2d):
                torch.nn.init.normal_(module.weight, std=0.1)
        text = {"encoder": "stub", "fingerprint": "f00"} if spec.text else {}
        data = {"label_names": list(NAMES) if spec.label else [], "attribution": "by us"}
        write_export(tmp_path / "run", system, {}, ExportInfo(name, spec, TARGET, options, text=text, data=data))
        return condgen.load(tmp_path / "run", device="cpu", encoder=Words() if spec.text else None)

    return load


TINY = {"generator_width": 0.1, "discriminator_width": 0.1, "noise_dim": 6}


def decoded(pipe, z, weights=None):
    with torch.no_grad():
        condition = Condition() if weights is None else Condition(label=torch.tensor(weights).expand(len(z), -1))
        return pipe.system.eval().decode(z, condition)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_labels_are_summed_in_the_condition_with_the_noise_of_the_samples(load):
    pipe = load(**TINY)
    shown = latents.arithmetic(pipe, "Sandal - t-shirt/top + 2", {}, num=4, seed=7)
    close(shown.pictures[0], sample_rows(pipe.system, Condition(label=torch.zeros(4).long()), seed=7, ids=range(4)))
    z = torch.stack([torch.randn(6, generator=s) for s in condgen.rng.RowRandom(7, range(4)).streams])
    close(shown.result, decoded(pipe, z, [1.0, -1.0, 1.0]))
    assert shown.captions == ("Sandal", "- t-shirt/top", "+ 2", "= Sandal - t-shirt/top + 2")
    close(latents.arithmetic(pipe, "Sandal + 2", {}, num=4, seed=7).result, decoded(pipe, z, [0.5, 0.0, 0.5]))


def test_samples_are_summed_in_their_mean_noise(load):
    pipe = load(ConditionSpec(), conditioning="none", architecture="dcgan", **TINY)
    shown = latents.arithmetic(pipe, "s1,s2,s3 - s4 + s5", {}, seed=7)
    z = dict(zip(range(1, 6), pipe.system.draw(condgen.rng.RowRandom(7, range(1, 6))), strict=True))
    expected = (z[1] + z[2] + z[3]) / 3 - z[4] + z[5]
    close(shown.result[:1], decoded(pipe, expected[None]))
    assert len(shown.result) == 9 and (shown.result[1:] - shown.result[:1]).abs().amax((1, 2, 3)).min() > 1e-4
    close(shown.pictures[0, 1:4], sample_rows(pipe.system, Condition(), seed=7, ids=[1, 2, 3]))  # beside their mean
    assert shown.pictures[0, 4:].eq(1).all() and shown.pictures.shape[:2] == (4, 9)


def test_samples_of_a_labelled_system_need_their_label(load):
    pipe = load(**TINY)
    shown = latents.arithmetic(pipe, "s1 - s2 + s3", {"label": "Sandal"}, num=2)
    z = pipe.system.draw(condgen.rng.RowRandom(0, [1, 2, 3]))
    close(shown.result[:1], decoded(pipe, (z[0] - z[1] + z[2])[None], [1.0, 0.0, 0.0]))
    with pytest.raises(ConfigError, match="needs label"):
        latents.arithmetic(pipe, "s1 - s2 + s3", {})


def test_sums_of_uniform_noise_stay_where_g_was_trained(load):
    pipe = load(ConditionSpec(), conditioning="none", architecture="dcgan", noise="uniform", **TINY)
    shown = latents.arithmetic(pipe, "s1 - s4 + s5", {}, num=1)
    z = pipe.system.draw(condgen.rng.RowRandom(0, [1, 4, 5]))
    assert (z[0] - z[1] + z[2]).abs().max() > 1
    close(shown.result, decoded(pipe, (z[0] - z[1] + z[2]).clamp(-1, 1)[None]))


def test_a_picture_is_a_term_by_projection(load, tmp_path):
    pipe = load(**TINY)
    made = pipe(label="Sandal", num=2, seed=3)
    made.images[0].save(tmp_path / "a.png")
    shown = latents.arithmetic(pipe, f"{tmp_path / 'a.png'} + {tmp_path / 'a.png'}", {"label": "Sandal"}, num=1)
    close(shown.pictures[0, 0], pixels_to_uint8(made.pixels[0]).float() / 127.5 - 1)
    near = (shown.result[0] - made.pixels[0]).square().mean().sqrt()
    assert near < 0.3 * (made.pixels[1] - made.pixels[0]).square().mean().sqrt()
    assert "projected in 300 steps, error" in shown.said[0]
    with pytest.raises(DataError, match=r"no\.png"):
        latents.arithmetic(pipe, "no.png + no.png", {"label": "Sandal"})


def test_a_walk_between_labels_holds_the_noise_and_meets_both_classes(load):
    pipe = load(**TINY)
    shown = latents.walk(pipe, "Sandal .. Ankle boot", {}, num=2, seed=7, steps=4)
    assert shown.pictures.shape == (2, 5, 3, 16, 16)
    for label, t in ((0, 0), (2, 4)):
        alone = sample_rows(pipe.system, Condition(label=torch.full((2,), label)), seed=7, ids=[0, 1])
        close(shown.pictures[:, t], alone)
    z = pipe.system.draw(condgen.rng.RowRandom(7, [1]))
    close(shown.pictures[1, 1], decoded(pipe, z, [0.75, 0.0, 0.25])[0])
    assert shown.columns == ("Sandal", " ", " ", " ", "Ankle boot")


def test_a_walk_between_samples_goes_on_the_sphere_for_normal_noise_alone(load):
    for noise in ("normal", "uniform"):
        pipe = load(noise=noise, **TINY)
        shown = latents.walk(pipe, "s1 .. s2", {"label": "Sandal"}, steps=2)
        a, b = pipe.system.draw(condgen.rng.RowRandom(0, [1, 2]))
        half = (a + b) / 2
        if noise == "normal":
            half = (a / a.norm() + b / b.norm()) / (a / a.norm() + b / b.norm()).norm() * (a.norm() + b.norm()) / 2
        close(shown.pictures[0, 1], decoded(pipe, half[None], [1.0, 0.0, 0.0])[0])


def test_label_and_noise_may_move_together(load):
    pipe = load(**TINY)
    shown = latents.walk(pipe, "Sandal@s3 .. Ankle boot@s7", {}, steps=3)
    close(shown.pictures[0, 0], sample_rows(pipe.system, Condition(label=torch.tensor([0])), seed=0, ids=[3])[0])
    close(shown.pictures[0, 3], sample_rows(pipe.system, Condition(label=torch.tensor([2])), seed=0, ids=[7])[0])
    with pytest.raises(ConfigError, match="leave --num out"):
        latents.walk(pipe, "s3 .. s7", {"label": 0}, num=2)


def test_sentences_have_sums_and_walks_too(load):
    spec = ConditionSpec(text=TextSpec(pooled=4, encoder="stub"))
    pipe = load(spec, "gan_cls", generator_width=8, discriminator_width=8, noise_dim=6, condition_dim=4)
    shown = latents.walk(pipe, "a red fox .. an owl", {}, num=1, steps=2)
    mixed = Words().encode(["a red fox", "an owl"]).pooled.mean(0, keepdim=True)
    with torch.no_grad():
        z = pipe.system.draw(condgen.rng.RowRandom(0, [0]))
        close(shown.pictures[0, 1:2], pipe.system.eval().decode(z, Condition(text=Text(pooled=mixed))))


def test_systems_without_a_decoder_say_so(load, monkeypatch):
    pipe = load(**TINY)
    monkeypatch.delattr(type(pipe.system), "draw")
    with pytest.raises(ConfigError, match="no noise that one could add"):
        latents.walk(pipe, "s1 .. s2", {"label": 0})


def test_the_command_writes_pictures_and_clips(load, tmp_path, capsys):
    load(**TINY)
    run = str(tmp_path / "run")
    for words in (["--arithmetic", "Sandal - 1 + 2"], ["--walk", "Sandal .. 1", "--num", "3", "--steps", "2"]):
        assert sample.main([run, *words, "-o", str(tmp_path / "out.png"), "--device", "cpu"]) == 0
        with Image.open(tmp_path / "out.png") as made:
            assert min(made.size) > 200
    assert str(tmp_path / "out.png") in capsys.readouterr().out
    words = ["--walk", "Sandal .. 1 .. Sandal", "--steps", "3", "--fps", "10", "--device", "cpu"]
    assert sample.main([run, *words, "-o", str(tmp_path / "walk.gif")]) == 0
    with Image.open(tmp_path / "walk.gif") as clip:
        assert clip.n_frames == 7 and clip.size == (256, 256)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--walk", "0 .. 1", "--arithmetic", "0 - 1 + 2"], "one at a time"),
        (["--steps", "3"], "belongs to --walk"),
        (["--walk", "0 .. 1", "--fps", "3"], "belongs to -o FILE.mp4"),
        (["--walk", "0 .. 1", "--separate", "out"], "does not take --separate"),
        (["--walk", "0 .. 1", "shift=1"], "no option of the sampler"),
        (["--walk", "0 .. 1", "-o", "a.txt"], "clips and walks also"),
        (["--arithmetic", "0 - 1 + 2", "-o", "a.mp4"], "picture file"),
        (["--arithmetic", "0 - 1"], "direction"),
        (["--arithmetic", "Sandal - Sandel + 1"], "Sandel"),
        (["--arithmetic", "0 - 1 + 2", "--label", "0"], "no label or sentence left"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(load, tmp_path, words, says):
    load(**TINY)
    with pytest.raises(ConfigError, match=says):
        sample.main([str(tmp_path / "run"), *words, "--device", "cpu"])
