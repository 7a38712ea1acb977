"""class2image from its configuration to its scores, on a file of made-up pictures."""

import numpy as np
import pytest
import torch

from condgen import config
from condgen.build import build
from condgen.engine.log import Log
from condgen.engine.run import RunFolder
from condgen.engine.world import World
from condgen.errors import ConfigError
from tasks.class2image import listed

LABELS = ["class_accuracy", "cas", "ms_ssim", "ms_ssim/0", "ms_ssim/1", "ms_ssim/2"]
TAIL = ["sensitivity/label", "sensitivity/label/null"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = draw.integers(0, 100, (60, 16, 16, 3), dtype=np.uint8)
    x[np.arange(60), :, :, y] += 120  # class k has channel k bright
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=x[:42], y_train=y[:42], x_test=x[42:], y_test=y[42:])
    return path


def built(file, *words):
    chosen = [
        "task=class2image", "data=npz", f"data.root={file}", "data.size=16", "data.ignore=[]", "system.preset=tiny",
        "eval.num_samples=24", "eval.classifier_steps=60", "eval.extractor=pixels", *words,
    ]  # fmt: skip
    return build(config.load(chosen))


class Perfect(torch.nn.Module):
    """Answers each row with real pictures of its class, or of the next class."""

    def __init__(self, data, shift=0):
        super().__init__()
        self.sample_fields = {}
        self.anchor, self.target_spec, self.shift = torch.nn.Parameter(torch.zeros(1)), data.target, shift
        rows = [data.sample(i, None) for i in range(len(data))]
        self.of = {k: [r.target.float() / 127.5 - 1 for r in rows if r.label == k] for k in range(3)}

    def sample(self, condition, *, random):
        picks = random.randint(14).tolist()
        labels = ((condition.label + self.shift) % 3).tolist()
        return torch.stack([self.of[k][i] for k, i in zip(labels, picks, strict=True)])


def test_scores_of_real_pictures_reach_their_ceilings_and_of_wrong_classes_do_not(file):
    made, world = built(file), World()
    scores = {s.name: s for s in made.task.score(Perfect(made.train_data), made, world, made.config.eval)}
    assert list(scores)[:6] == LABELS and "kid" in scores
    assert scores["class_accuracy"].value > 0.9 and scores["cas"].value > 0.9
    assert scores["class_accuracy"].floor < 0.7 and scores["class_accuracy"].ceiling > 0.9
    assert scores["ms_ssim"].value < 0.9
    wrong = {s.name: s for s in made.task.score(Perfect(made.train_data, 1), made, world, made.config.eval)}
    assert wrong["class_accuracy"].value < 0.1 and wrong["cas"].value < 0.1
    assert wrong["kid"].value == pytest.approx(scores["kid"].value, abs=0.1)  # the pictures themselves are as good


def test_a_system_is_scored_and_shown(file, tmp_path):
    made = built(file)
    scores = made.task.score(made.system, made, World(), made.config.eval)
    assert [s.name for s in scores] == [*LABELS, "kid", *TAIL]
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    hooks = {h.name: h for h in made.task.hooks(made, run, Log(run, quiet=True))}
    assert hooks["sensitivity"].run(made.system.eval(), 1)["sensitivity/label"] > 0
    hooks["grid"].run(made.system, 1)
    assert len(list(run.path.rglob("*grid.png"))) == 1


def test_without_a_class_only_the_pictures_are_scored(file, tmp_path):
    made = built(file, "data.ignore=[label]", "system.conditioning=none", "system.architecture=dcgan")
    scores = made.task.score(made.system, made, World(), made.config.eval)
    assert [s.name for s in scores] == ["kid"]
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (grid,) = made.task.hooks(made, run, Log(run, quiet=True))
    grid.run(made.system.eval(), 1)


def test_an_unconditional_system_refuses_labels_before_training(file):
    with pytest.raises(ConfigError, match=r"data\.ignore=\[label\]"):
        built(file, "system.conditioning=none")
    assert built(file, "system.conditioning=auxiliary").system.classes == 3
    with pytest.raises(ConfigError):
        built(file, "system.conditioning=auxilary")


def test_a_group_of_classes_is_an_option(file):
    made = built(file, "data.classes=[2,0]")
    assert made.spec.label.num_classes == 2 and made.spec.label.names == ("2", "0")
    scores = made.task.score(made.system, made, World(), made.config.eval)
    assert all("|labels=2,0|" in s.signature for s in scores if not s.name.startswith("sensitivity"))


def test_many_classes_are_listed_by_their_ends_and_a_hash():
    names = [f"n{i}" for i in range(30)]
    assert listed(names[:3]) == "n0,n1,n2" and listed(["a|b\nc"]) == "a/b c"
    assert listed(names).startswith("n0..n29(30)#") and listed(names) != listed(["n0", *names[2:], "n1", "n29"][:30])


def test_scores_of_each_class_come_from_fifty_pictures_a_side(file):
    with np.load(file) as held:
        more = {name: np.concatenate([held[name]] * 12) for name in held.files}
    np.savez(file, **more)
    for word, expected in (("true", ["kid", "kid/0", "kid/1", "kid/2"]), ("false", ["kid"])):
        made = built(file, "eval.num_samples=210", f"eval.per_class={word}", "eval.cas=false", "system.preset=tiny")
        scores = made.task.score(made.system, made, World(), made.config.eval)
        assert [s.name for s in scores if s.name.startswith("kid")] == expected
