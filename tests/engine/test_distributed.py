"""Two processes over gloo: equal to one with the double batch, resumed exactly, and stopped by one another.

Both processes run every scenario once (distributed_child.py); the tests read what they wrote.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_child import SGD
from engine_toys import StopAfter, ToyGan, ToyShared, everything, make_system, make_trainer, metrics
from safetensors.torch import load_file

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]
ROOT = Path(__file__).parents[2]


def start(folder, script, count=2, **env):
    """Starts `count` connected processes; returns (exit codes, output of each)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'engine'}", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "CONDGEN_TIMEOUT_SECONDS": "20", "CUDA_VISIBLE_DEVICES": "", **env,
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, *script, str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        out = [child.communicate(timeout=100)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], out


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    codes, out = start(folder, [str(Path(__file__).with_name("distributed_child.py"))])
    assert codes == [0, 0], "\n".join(out)[-6000:]
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(("name", "kind", "accumulate"), [("match", ToyGan, 2), ("match_shared", ToyShared, 1)])
def test_two_processes_equal_one_with_the_double_batch(ran, tmp_path, name, kind, accumulate):
    """Batch norm included. Tolerance 2e-6: sums are taken in another order, nothing else may differ."""
    folder, seen = ran
    alone = make_trainer(
        tmp_path, make_system(kind, dropout=0.0), optim=SGD, steps=4, batch_size=8, accumulate=accumulate,
        condition_drop=0.3, log_every=1,
    )  # fmt: skip
    before = everything(alone)
    alone.train(stop=StopAfter(99))
    together = load_file(folder / name / "end.safetensors")
    for key, value in everything(alone).items():
        if "mean_loss" not in key:  # a hand-written average of each process's own losses
            torch.testing.assert_close(together[key], value, rtol=0, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
    moved = (before["system/generator.0.weight"] - together["system/generator.0.weight"]).abs().max()
    assert float(moved) > 1e-3  # training did something
    assert all(part[name]["same_on_all"] for part in seen)
    for a, b in zip(seen[0][name]["metrics"], metrics(alone), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("name", ["resume", "resume_unsynchronised"])
def test_two_processes_resume_bit_for_bit_after_one_was_asked_to_stop(ran, name):
    for part in (parts[name] for parts in ran[1]):
        assert part["step"] == 9 and "stopped at step 9" in part["stopped"]
        assert part["differences"] == [] and part["metrics_equal"]


def test_without_synchronisation_the_mean_statistics_are_saved_and_each_process_keeps_its_own(ran):
    assert ran[1][0]["resume"]["statistics_differ"] is False
    part = ran[1][0]["resume_unsynchronised"]
    assert part["statistics_differ"] is True
    mean = torch.tensor(part["own_statistics"]).mean(0)
    torch.testing.assert_close(torch.tensor(part["saved_statistics"]), mean)


def test_a_nan_on_one_process_stops_all_with_one_message(ran):
    parts = [seen["nan"] for seen in ran[1]]
    assert [part["error"] for part in parts] == ["DivergedError"] * 2
    assert parts[0]["message"] == parts[1]["message"] and "phase 'generator' at step 3" in parts[0]["message"]
    crash = json.loads((ran[0] / "nan" / "crash" / "step-00000003.json").read_text())
    assert [p["rank"] for p in crash["processes"]] == [0, 1]
    assert crash["processes"][0]["loss"] != "nan" and crash["processes"][1]["loss"] == "nan"


def test_a_phase_skipped_on_one_process_is_skipped_on_all(ran):
    assert [seen["none"] for seen in ran[1]] == [{"updates": 2.0, "same": True}] * 2


def test_processes_that_drifted_apart_are_found_at_the_next_checkpoint(ran):
    for part in (seen["drift"] for seen in ran[1]):
        assert part["error"] == "DivergedError" and "discriminator.0.bias" in part["message"]
        assert part["steps"] == []


def test_batch_norm_over_processes_equals_batch_norm_over_the_joined_batch(ran):
    """Tolerance relative to the largest second derivative, which sums 120 terms of magnitude `scale`."""
    for part in (seen["sync_norm"] for seen in ran[1]):
        bounds = {"second": 1e-5 * part["scale"], "weight": 1e-4 * part["scale"], "bias": 1e-4 * part["scale"]}
        for name, worst in part["worst"].items():
            assert worst < bounds.get(name, 2e-5), (name, worst, part["scale"])


def test_processes_agree_gather_and_average(ran):
    for part in (seen["agreement"] for seen in ran[1]):
        assert part == {
            "agree": [True, False], "mean": {"a": 0.5, "b": 5.0}, "gather": [[0, 0], [1, 1], [1, 1]],
            "broadcast": "from 0", "flag": False,
        }  # fmt: skip
