"""Nats a frame: the bound that no model is below, and what it is compared with."""

import math
import os
from pathlib import Path

import pytest
import torch
from test_vpn import clips, history, tiny

from condgen.data.moving_mnist import MovingMnist
from condgen.errors import ConfigError, DataError, DivergedError, ShapeError
from condgen.losses.likelihood import bernoulli_log_prob, grey_entropy
from condgen.metrics.frame_nats import nats_per_frame
from condgen.pixels import pixels_to_float
from condgen.types import Condition

DATA = Path(os.environ.get("CONDGEN_DATA", Path(__file__).resolve().parents[3] / "shared/data"))


def grey():
    return tiny(output="sigmoid", channels=1)


def test_a_score_is_the_mean_over_frames_and_rows_in_any_batches():
    system, target = grey(), clips(5, channels=1).float()
    with torch.no_grad():
        nats = system.frame_nats(target, history(5, channels=1))
    for size in (2, 5):
        whole, first, last = nats_per_frame(system, target, history(5, channels=1), batch_size=size)
        assert whole.value == pytest.approx(nats.mean().item(), rel=1e-6)
        assert (first.value, last.value) == pytest.approx(nats.mean(0).tolist(), rel=1e-6)
        assert whole.error == pytest.approx(nats.mean(1).std().item() / math.sqrt(5), rel=1e-4)
    assert whole.ceiling == pytest.approx(grey_entropy(target.double()).sum((2, 3, 4)).mean().item(), rel=1e-6)
    mean = (target.double().mean() + 1) / 2
    assert whole.floor == pytest.approx(-16 * (mean * mean.log() + (1 - mean) * (1 - mean).log()).item(), rel=1e-6)
    assert [s.name for s in (whole, first, last)] == ["nats_per_frame", "nats_per_frame@1", "nats_per_frame@2"]
    assert "kind=cross-entropy of grey levels|known=all before" in whole.signature and not whole.higher_is_better


def test_a_likelihood_has_no_ceiling_and_its_floor_is_uniform():
    score = nats_per_frame(tiny(), clips().float(), history())[0]
    assert score.ceiling is None and score.floor == pytest.approx(48 * math.log(256))
    assert "kind=likelihood" in score.signature


def test_the_least_value_is_allowed_and_nothing_below_it(monkeypatch):
    system, target = grey(), clips(channels=1).float()

    def perfect(clip, condition, less=0.0):
        logits = torch.logit((clip.double() + 1) / 2, eps=1e-12)
        return -bernoulli_log_prob(logits, clip.double()).sum((2, 3, 4)) - less

    monkeypatch.setattr(system, "frame_nats", perfect)
    score = nats_per_frame(system, target, history(channels=1))[0]
    assert score.value == pytest.approx(score.ceiling, rel=1e-6)
    monkeypatch.setattr(system, "frame_nats", lambda clip, condition: perfect(clip, condition, less=0.01))
    with pytest.raises(DivergedError, match="impossible"):
        nats_per_frame(system, target, history(channels=1))
    monkeypatch.setattr(system, "frame_nats", lambda clip, condition: torch.full(clip.shape[:2], math.nan))
    with pytest.raises(DivergedError, match="NaN"):
        nats_per_frame(system, target, history(channels=1))


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ConfigError, match="frame_nats"):
        nats_per_frame(torch.nn.Identity(), clips().float())
    with pytest.raises(ShapeError, match="conditions"):
        nats_per_frame(tiny(), clips().float(), history(3))
    with pytest.raises(ShapeError, match="grey levels"):
        nats_per_frame(tiny(), clips().float() * 0.7, history())
    with pytest.raises(DataError, match="at least 1"):
        nats_per_frame(tiny(), clips()[:0].float(), Condition())


def test_the_entropy_of_moving_mnist_is_the_published_floor():
    """86.3 on the published file; 86.18 +- 0.15 over the 10,000 test clips made here."""
    if not (DATA / "mnist/mnist.npz").is_file():
        pytest.skip("needs mnist.npz under CONDGEN_DATA")
    data = MovingMnist(root=str(DATA / "mnist"), split="test", rows=400)
    pixels = torch.stack([data.sample(i, None).target for i in range(400)])
    floor = grey_entropy(pixels_to_float(pixels)).sum((2, 3, 4)).mean().item()
    assert floor == pytest.approx(86.5, abs=1.5)
