"""Networks of the user's own data, Inception's and EfficientNet's heads, the download and its failure."""

import urllib.error

import pytest
import torch
from metric_stubs import Squares

from condgen.errors import ConfigError
from condgen.metrics import own
from condgen.metrics.classifier import ClassifierOptions
from condgen.metrics.extractors import extractor
from condgen.types import ConditionSpec, LabelSpec

SMALL = ClassifierOptions(steps=60, width=8, size=16, batch_size=32)


class Labelled(Squares):
    def __init__(self, rows=64):
        super().__init__(rows)
        self.provides = ConditionSpec(label=LabelSpec(num_classes=4))

    def sample(self, index, random):
        from dataclasses import replace

        return replace(super().sample(index, random), label=index % 16 // 4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(own, "ClassifierOptions", lambda: SMALL)
    return tmp_path


def test_without_labels_it_learns_turns_and_is_kept(cache, capsys):
    data = Squares(64)
    made = own.own_classifier(data, cache / "classifiers", about={"data": "squares"}, options=SMALL)
    assert "training the turns" in capsys.readouterr().out and made.classes == 4
    images = torch.stack([data.sample(i, None).target for i in range(64)])
    turned, by = own.turned(images)
    assert torch.equal(turned[64 + 3], images[3].rot90(1, (1, 2))) and by[64 * 3].item() == 3
    again = own.own_classifier(data, cache / "classifiers", about={"data": "squares"}, options=SMALL)
    assert capsys.readouterr().out == "" and again.fingerprint == made.fingerprint


def test_own_extractor_and_its_head(cache):
    data = Labelled(64)
    own.own_classifier(data, cache / "classifiers", about={"data": "d"})
    made = extractor("own", train=data, about={"data": "d"})
    images = torch.stack([data.sample(i, None).target for i in range(32)])
    found = made.features(images)
    logits = made.logits(found)
    assert made.name == "own-classes" and logits.shape == (32, 4) and not made.comparable_with_literature
    judge = own.own_classifier(data, cache / "classifiers", about={"data": "d"})
    assert torch.equal(logits.argmax(1), judge.predict(images))
    with pytest.raises(ConfigError, match="trained on the training split"):
        extractor("own")
    with pytest.raises(ConfigError, match="no classifier's head"):
        extractor("pixels").logits(found)


def test_inception_offline_says_what_to_do(cache, monkeypatch):
    pytest.importorskip("torch_fidelity")
    asked = []

    def offline(address, file, hash_prefix):
        asked.append((address, hash_prefix))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ConfigError, match=r"no route to host.*inception:FILE"):
        extractor("inception")
    assert asked[0][1] == "6726825d" and asked[0][0].startswith("https://github.com/toshas/torch-fidelity/")
    file = cache / "hub" / "checkpoints" / asked[0][0].rpartition("/")[2]
    file.write_text("not weights")
    with pytest.raises(ConfigError, match="is not an Inception"):
        extractor("inception")
