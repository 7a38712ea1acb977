"""unconditional from its configuration to its scores, whatever condition the data carry."""

import json

import numpy as np
import pytest
import torch

from condgen import cli, config
from condgen.build import build
from condgen.engine.log import Log
from condgen.engine.run import RunFolder
from condgen.engine.world import World
from condgen.errors import ConfigError
from condgen.metrics.signature import parse
from condgen.types import Condition

SETS = [
    "kid", "precision", "recall", "density", "coverage", "nearer_than_real", "memorised", "nearer_than_real/pixels",
    "memorised/pixels",
]  # fmt: skip
FIELDS = ["label", "text", "boxes", "keypoints", "image", "frames"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8), np.arange(60) % 3
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=x[:42], y_train=y[:42], x_test=x[42:], y_test=y[42:])
    return path


def built(file, *words):
    chosen = [
        "task=unconditional", "data=npz", f"data.root={file}", "data.size=16", "system.preset=tiny",
        "eval.num_samples=16", "eval.extractor=pixels", "eval.watched=6", "eval.grid_rows=2", *words,
    ]  # fmt: skip
    return build(config.load(chosen))


def hooks_of(made, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return {h.name: h for h in made.task.hooks(made, run, Log(run, quiet=True))}, run


def test_every_field_is_left_out_whatever_the_data_set(file):
    """Without a word of the user about data.ignore, with the task's own data set and with another."""
    assert list(config.load(["task=unconditional"]).data_options.ignore) == FIELDS
    for data in ("npz", "torchvision_sets", "folder", "coco"):
        chosen = config.load(["task=unconditional", f"data={data}", "data.root=/none"])
        assert list(chosen.data_options.ignore) == FIELDS
    made = built(file)
    assert made.spec.given == () and made.train_data.provides.label is not None
    assert built(file, "data.ignore=[]").spec.given == ("label",)


def test_the_default_is_offline_and_small():
    chosen = config.load(["task=unconditional"])
    assert (chosen.system_name, chosen.data_name, chosen.data["size"]) == ("vae", "openmoji", 32)


def test_scores_and_hooks_without_a_condition(file, tmp_path):
    made = built(file)
    hooks, run = hooks_of(made, tmp_path)
    assert list(hooks) == ["grid", "reconstructions", "bits"]
    made.system.eval()
    for name in ("grid", "reconstructions"):
        hooks[name].run(made.system, 1)
        assert len(list(run.path.rglob(f"*{name}.png"))) == 1
    logged = hooks["bits"].run(made.system, 1)["bits_per_dim"]
    scores = {s.name: s for s in made.task.score(made.system, made, World(), made.config.eval)}
    assert list(scores) == ["bpd", *SETS]
    bpd = scores["bpd"]
    assert bpd.value == pytest.approx(logged, abs=1) and bpd.floor == pytest.approx(8, abs=0.3)
    fields = parse(bpd.signature).fields
    assert (fields["n"], fields["draws"], fields["split"]) == ("16", "1", "test")
    assert fields["data"].startswith("npz#") and fields["likelihood"] == "lower bound (ELBO)"


def test_more_draws_are_an_option(file):
    made = built(file, "eval.importance=5")
    one, five = (
        next(s for s in m.task.score(made.system, m, World(), m.config.eval) if s.name == "bpd")
        for m in (built(file), made)
    )
    assert five.value < one.value and parse(five.signature).fields["draws"] == "5"


def test_scores_of_sets_are_an_option_and_small_fids_have_to_be_forced(file):
    def names(*words):
        made = built(file, *words)
        return {s.name: s for s in made.task.score(made.system, made, World(), made.config.eval)}

    plain = names("eval.metrics=[kid,fid]")
    assert list(plain) == ["bpd", "kid"] and "no FID of 16 pictures" in plain["kid"].note
    forced = names("eval.metrics=[fid]", "eval.force_fid=true")
    assert list(forced) == ["bpd", "fid"] and parse(forced["fid"].signature).fields["forced"] == "below 2048"
    every = names("eval.metrics=[all]")
    assert list(every) == ["bpd", *SETS, "ms_ssim/any", "parzen"] and "Theis" in every["parzen"].note
    looked = names("eval.metrics=[memorisation]", "eval.train_rows=20")["memorised"]
    assert parse(looked.signature).fields["train"] == "20" and looked.picture.size[0] > 100


def test_with_a_condition(file, tmp_path):
    made = built(file, "data.ignore=[]")
    hooks, _ = hooks_of(made, tmp_path)
    made.system.eval()
    assert list(hooks) == ["grid", "reconstructions", "bits", "sensitivity"]
    for hook in hooks.values():
        hook.run(made.system, 1)
    scores = [s.name for s in made.task.score(made.system, made, World(), made.config.eval)]
    assert scores == ["bpd", *SETS, "sensitivity/label", "sensitivity/label/null"]


def test_a_binary_model_is_scored_on_binary_pictures_and_a_cross_entropy_not_at_all(file):
    words = ("system.law=bernoulli", "system.binarise=dynamic")
    made = built(file, *words)
    bpd = next(s for s in made.task.score(made.system, made, World(), made.config.eval) if s.name == "bpd")
    assert parse(bpd.signature).fields["pixels"] == "binarised by dynamic" and bpd.floor == pytest.approx(1, abs=0.01)
    made = built(file, "system.law=bernoulli")
    assert [s.name for s in made.task.score(made.system, made, World(), made.config.eval)] == SETS


def test_scores_of_means_and_of_draws_do_not_compare_and_bits_do(file, tmp_path, capsys):
    paths = []
    for mode in ("mean", "noisy"):
        made = built(file, f"system.sample_mode={mode}", "eval.metrics=[kid,prdc]", "data.ignore=[]")
        scores = made.task.score(made.system, made, World(), made.config.eval)
        paths.append(tmp_path / f"{mode}.json")
        paths[-1].write_text(json.dumps({"step": 1, "scores": [s.to_dict() for s in scores]}))
        for one in scores:
            assert parse(one.signature).fields.get("sample_mode") == (None if one.name == "bpd" else mode), one.name
    assert cli.main(["compare", *map(str, paths)]) == 2
    assert "kid: sample_mode: mean (mean) against noisy (noisy)" in capsys.readouterr().err
    assert cli.main(["compare", *map(str, paths), "--only", "bpd"]) == 0
    assert cli.main(["compare", *map(str, paths), "--ignore", "sample_mode"]) == 0


def test_a_generator_without_likelihood_or_encoder(file, tmp_path):
    words = ("system=acgan", "system.preset=tiny", "system.conditioning=none", "system.architecture=dcgan")
    made = built(file, *words)
    hooks, _ = hooks_of(made, tmp_path)
    assert list(hooks) == ["grid"]
    hooks["grid"].run(made.system.eval(), 1)
    assert [s.name for s in made.task.score(made.system, made, World(), made.config.eval)] == SETS


def test_a_system_that_needs_a_condition_says_so(file):
    with pytest.raises(ConfigError, match="needs"):
        built(file, "system=pix2pix", "system.preset=tiny")


def test_a_perfect_copier_reaches_the_ceiling_of_kid(file):
    made = built(file)

    class Copies(torch.nn.Module):
        def __init__(self, data):
            super().__init__()
            self.sample_fields = {}
            self.anchor, self.target_spec = torch.nn.Parameter(torch.zeros(1)), data.target
            self.rows = torch.stack([data.sample(i, None).target for i in range(len(data))]).float() / 127.5 - 1

        def sample(self, condition, *, random):
            assert condition == Condition()
            return self.rows[random.randint(len(self.rows))]

    scores = made.task.score(Copies(made.train_data), made, World(), made.config.eval)
    assert [s.name for s in scores] == SETS and abs(scores[0].value - scores[0].ceiling) < 0.2
    memorised = next(s for s in scores if s.name == "memorised/pixels")
    assert memorised.value == memorised.floor == 1 and memorised.ceiling < 0.3
