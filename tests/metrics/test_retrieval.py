"""R-precision: perfect and blind evaluators hit 1 and 1/k, and the trained evaluator is reusable and trustworthy."""

import json

import pytest
import torch
import torch.nn.functional as F
from metric_stubs import Squares, TokensOnly, Words

from condgen.errors import CheckpointError, ConfigError, DataError, ShapeError
from condgen.metrics.evaluator import (
    Evaluator,
    EvaluatorOptions,
    cached_evaluator,
    load_pairs,
    pooled_text,
    train_evaluator,
)
from condgen.metrics.fit import augment
from condgen.metrics.retrieval import candidate_rows, r_precision, retrieval_scores, strangers
from condgen.metrics.signature import comparable, parse
from condgen.pixels import pixels_to_float

SMALL = EvaluatorOptions(steps=60, batch_size=32, dim=16, width=8, size=16, hidden=32, dropout=0.1, lr=5e-3)


def vectors(count, seed=0):
    return F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


def names(count):
    return [f"thing {i}" for i in range(count)]


@pytest.mark.parametrize("k", [2, 10, 100])
def test_perfect_blind_and_random_evaluators(k):
    captions, texts = names(600), vectors(600)
    rows = candidate_rows(captions, k)
    assert r_precision(texts, texts, rows).mean() == 1
    blind = torch.ones(600, 16) / 4
    assert r_precision(blind, blind, rows).mean() == pytest.approx(1 / k)
    assert r_precision(blind, texts * 0, rows).mean() == pytest.approx(1 / k)
    hits = r_precision(vectors(600, seed=1), texts, rows)
    assert abs(float(hits.mean()) - 1 / k) < 4 * (1 / k * (1 - 1 / k) / 600) ** 0.5
    worst = r_precision(-texts, texts, rows)
    assert worst.mean() == 0


def test_candidates_are_distinct_other_captions_and_depend_on_seed_and_row_alone():
    captions = [f"thing {i % 20}" for i in range(60)]
    rows = candidate_rows(captions, 10, seed=3)
    for i, row in enumerate(rows.tolist()):
        assert row[0] == i
        assert len({captions[j] for j in row}) == 10
    assert torch.equal(rows, candidate_rows(captions, 10, seed=3))
    assert not torch.equal(rows, candidate_rows(captions, 10, seed=4))
    everyone = candidate_rows(captions, 20)
    assert all(len({captions[j] for j in row}) == 20 for row in everyone.tolist())
    with pytest.raises(DataError, match="there are 20"):
        candidate_rows(captions, 21)


def test_every_other_caption_is_equally_likely_a_candidate():
    captions = names(12)
    drawn = torch.stack([torch.bincount(candidate_rows(captions, 4, seed=s)[5, 1:], minlength=12) for s in range(600)])
    counts = drawn.sum(0)
    assert counts[5] == 0
    expected = 600 * 3 / 11
    assert ((counts[counts > 0] - expected).abs() < 5 * expected**0.5).all() and (counts > 0).sum() == 11


def test_strangers_have_other_captions():
    captions = [f"thing {i % 3}" for i in range(30)]
    other = strangers(captions, seed=1)
    assert all(captions[i] != captions[j] for i, j in enumerate(other.tolist()))
    assert strangers(["a", "a"]).tolist() == [1, 0]


@pytest.fixture(scope="module")
def judge():
    return train_evaluator(Squares(256), Words(), seed=1, options=SMALL)


def scores(judge, fake, real, captions, **kwargs):
    pooled = pooled_text(Words(), captions)
    return retrieval_scores(judge, fake, real, captions, pooled, about={"data": "squares#0"}, **kwargs)


def test_scores_lie_between_a_shuffled_floor_and_a_real_ceiling(judge):
    data = Squares(320)
    test = [data.sample(i, None) for i in range(256, 320)]
    real, captions = torch.stack([row.target for row in test]), [row.caption for row in test]
    (real_score,) = scores(judge, real, real, captions, candidates=(10,))
    assert real_score.value == real_score.ceiling > 0.9
    assert real_score.floor < 0.3
    noise = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (noise_score,) = scores(judge, noise, real, captions, candidates=(10, 100))
    assert noise_score.value < 0.35 and noise_score.ceiling == real_score.ceiling
    assert noise_score.error > 0 and noise_score.name == "rprec@10"
    fields = parse(noise_score.signature).fields
    assert fields["cand"] == "10" and fields["n"] == "64" and fields["evaluator"] == judge.fingerprint
    assert comparable(real_score.signature, noise_score.signature) == []
    with pytest.raises(ShapeError, match="same number"):
        scores(judge, real[:5], real, captions)
    assert scores(judge, real, real, captions, candidates=(50,)) == []  # more than there are captions


def test_embeddings_do_not_depend_on_batching_or_on_invisible_float_detail(judge):
    pictures = torch.stack([Squares(64).sample(i, None).target for i in range(20)])
    whole = judge.embed_images(pictures)
    torch.testing.assert_close(judge.embed_images(pictures, batch_size=3), whole, rtol=0, atol=1e-5)
    as_float = pixels_to_float(pictures) + 1e-4
    torch.testing.assert_close(judge.embed_images(as_float), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(20))
    judge.train()  # someone's training mode must neither change the numbers nor be lost
    try:
        torch.testing.assert_close(judge.embed_images(pictures), whole, rtol=0, atol=1e-6)
        words = pooled_text(Words(), ["red top left", "blue top left"])
        assert judge.training
        one = judge.embed_text(words)
        judge.eval()
        torch.testing.assert_close(judge.embed_text(words), one)
    finally:
        judge.eval()
    with pytest.raises(ShapeError):
        judge.embed_images(pictures[:, :1])
    with pytest.raises(ShapeError):
        judge.embed_text(torch.zeros(3, 7))


def test_training_leaves_the_global_random_state_alone_and_is_reproducible():
    quick = EvaluatorOptions(steps=3, batch_size=8, dim=8, width=4, size=16, hidden=8)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = train_evaluator(Squares(16), Words(), seed=2, options=quick)
    assert torch.equal(torch.rand(3), expected)
    assert one.fingerprint == train_evaluator(Squares(16), Words(), seed=2, options=quick).fingerprint
    assert one.fingerprint != train_evaluator(Squares(16), Words(), seed=3, options=quick).fingerprint


def test_cache_is_reused_keyed_by_its_settings_and_repaired_when_damaged(tmp_path):
    quick = EvaluatorOptions(steps=2, batch_size=8, dim=8, width=4, size=16, hidden=8)
    said = []

    def get(data, about, options=quick):
        return cached_evaluator(data, Words(), tmp_path, about=about, options=options, say=said.append)

    about = {"data": "squares", "split": "train", "text": "words#1"}
    first = get(Squares(16), about)
    assert len(said) == 1 and get(Squares(16), about).fingerprint == first.fingerprint and len(said) == 1
    get(Squares(17), about)
    get(Squares(16), {**about, "split": "all"})
    get(Squares(16), about, EvaluatorOptions(steps=3, batch_size=8, dim=8, width=4, size=16, hidden=8))
    assert len(said) == 4 and len(list(tmp_path.glob("evaluator-*"))) == 4
    for folder in tmp_path.glob("evaluator-*"):
        weights = folder / "evaluator.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
        with pytest.raises(CheckpointError, match="sha256"):
            Evaluator.load(folder)
    assert get(Squares(16), about).fingerprint == first.fingerprint
    assert "sha256" in said[4] and len(said) == 6
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(CheckpointError, match="no readable evaluator"):
        Evaluator.load(tmp_path / "nothing")


def test_the_cache_says_what_it_holds(tmp_path):
    quick = EvaluatorOptions(steps=1, batch_size=8, dim=8, width=4, size=16, hidden=8)
    cached_evaluator(Squares(16), Words(), tmp_path, about={"data": "squares"}, options=quick)
    (folder,) = tmp_path.iterdir()
    about = json.loads((folder / "evaluator.json").read_text())["about"]
    assert about["data"] == "squares" and about["data_fingerprint"] == Squares(16).fingerprint


def test_unusable_data_and_encoders_are_refused():
    with pytest.raises(DataError, match="with captions"):
        load_pairs(Squares(16, captioned=False), 16)
    with pytest.raises(DataError, match="16 could not be read"):
        load_pairs(Squares(16, bad=range(16)), 16)
    images, captions = load_pairs(Squares(16, bad=(3,)), 8)
    assert images.shape == (15, 3, 8, 8) and images.dtype == torch.uint8 and len(captions) == 15
    with pytest.raises(ConfigError, match="minilm"):
        pooled_text(TokensOnly(), ["a", "b"])
    with pytest.raises(ConfigError, match="tower of size 20"):
        Evaluator(EvaluatorOptions(size=20), channels=3, text_dim=4)


def test_augmentation_moves_pictures_without_mirroring_them():
    picture = torch.full((64, 3, 16, 16), -1.0)
    picture[:, :, :, 10:] = 1.0
    out = augment(picture, torch.Generator().manual_seed(0))
    assert out.shape == picture.shape and out.abs().max() <= 1
    bright = (out[:, 0] > 0).float()
    assert (bright[:, :, -3:].mean((1, 2)) > 0.5).all() and (bright[:, :, :4].mean((1, 2)) < 0.5).all()
    assert len(set(bright.sum((1, 2)).tolist())) > 10  # each picture in its own way
    assert torch.equal(out, augment(picture, torch.Generator().manual_seed(0)))
