"""Likelihood systems and scores on two connected processes: the same as on one with the double batch.

Both processes run likelihood_child.py once; the tests read what they wrote and repeat it alone.
"""

from __future__ import annotations

import json

import likelihood_child as child
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distributed import start

from condgen import cli
from condgen.engine.world import World

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihoods")
    codes, out = start(folder, [child.__file__], CONDGEN_CACHE=str(folder / "cache"))
    assert codes == [0, 0], "\n".join(out)[-6000:]
    return folder


@pytest.mark.parametrize("case", child.CASES)
def test_two_processes_train_like_one_with_the_double_batch(ran, tmp_path, case):
    """Sums are taken in another order, nothing else may differ."""
    before = {n: t.detach() for n, t in child.made(case).named_parameters()}
    alone, together = child.trained(tmp_path, case, World(), 8), load_file(ran / f"{case}.safetensors")
    assert alone.keys() == together.keys()
    worst = {n: float((together[n].double() - t.double()).abs().max()) for n, t in alone.items() if t.numel()}
    moved = max(float((alone[f"system/{n}"] - t).abs().max()) for n, t in before.items())
    assert moved > 1e-3
    assert max(worst.values()) < 1e-4, sorted(worst.items(), key=lambda pair: -pair[1])[:4]


@pytest.mark.parametrize("case", child.STARTS)
def test_the_first_batch_is_that_of_all_processes(ran, case):
    alone, together = child.started(case, 0, 1), load_file(ran / f"{case}-start.safetensors")
    start_values = child.made(case).state_dict()
    changed = [n for n, t in alone.items() if not torch.equal(t, start_values[n])]
    assert len(changed) > 10
    half = child.started(case, 0, 2)  # without the other process
    assert max(float((half[n].float() - alone[n].float()).abs().max()) for n in changed) > 1e-2
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", child.SCORED)
def test_scores_are_those_of_one_process(ran, tmp_path, monkeypatch, case):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(child.quality, "extractor", child.quality.extractor)  # put back what judge() replaces
    child.judge()
    alone = child.scored(case, None)
    first, second = (json.loads((ran / f"rank-{rank}.json").read_text())[case] for rank in (0, 1))
    assert first == second
    assert {"bpd", "fid", "kid", "is", "precision", "recall", "density", "coverage", "memorised", "parzen"} <= {*alone}
    for name, values in alone.items():
        for mine, theirs in zip(values, first[name], strict=True):
            assert theirs == (
                mine if mine is None or isinstance(mine, str) else pytest.approx(mine, rel=1e-5, abs=1e-6)
            )


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["task=unconditional", "system=vae", "system.sample_mode=noisy", "eval.importance=3", "eval.extractor=own"],
    ["task=class2image", "system=pixelcnn", "eval.per_class=true", "eval.extractor=pixels"],
], ids=lambda words: words[1])  # fmt: skip
def test_the_command_writes_the_same_scores(tmp_path, monkeypatch, words):
    """condgen evaluate RUN, from the pictures on disk to RUN/eval, each time with an empty cache."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (62, 16, 16, 3), dtype=np.uint8), np.arange(62) % 2
    np.savez("mine.npz", x_train=x[:42], y_train=y[:42], x_test=x[42:], y_test=y[42:])
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path / "cache-0"))
    chosen = [
        *words, "data=npz", "data.root=mine.npz", "data.size=16", "system.preset=tiny", "train.steps=2",
        "train.sample_every=0", "eval.num_samples=17", "eval.metrics=[all]",
        "eval.force_fid=true", "train.device=cpu", "train.precision=fp32", "run.dir=.", "run.name=run",
    ]  # fmt: skip
    assert cli.main(["train", *chosen]) == 0
    for file in (tmp_path / "run" / "eval").glob("*.json"):
        file.unlink()
    held = []
    for count in (1, 2):
        script = ["-m", "condgen", "evaluate"]
        codes, out = start(tmp_path / "run", script, count=count, CONDGEN_CACHE=str(tmp_path / f"cache-{count}"))
        assert codes == [0] * count, "\n".join(out)[-6000:]
        (file,) = (tmp_path / "run" / "eval").glob("*.json")
        held.append({one["name"]: one for one in json.loads(file.read_text())["scores"]})
        file.unlink()
    alone, together = held
    assert alone.keys() == together.keys() and len(alone) > 10
    for name, one in alone.items():
        for field, value in one.items():
            expected = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
            assert together[name][field] == expected, (name, field)
