"""Resuming, order of work, refusals and errors of the trainer."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
import traceback

import pytest
import torch
from engine_toys import (
    CLASSES,
    StopAfter,
    ToyData,
    ToyGan,
    ToyShared,
    differences,
    everything,
    make_system,
    make_trainer,
    metrics,
)  # fmt: skip
from torch import nn

from condgen.engine import checkpoint as checkpoint_module
from condgen.engine import phases as phases_module
from condgen.engine import resume as resume_module
from condgen.engine import state
from condgen.engine.clock import Clock
from condgen.engine.ema import Ema
from condgen.engine.optim import OptimOptions
from condgen.engine.trainer import Hook, Outcome
from condgen.engine.world import World
from condgen.errors import CheckpointError, ConfigError, DataError, DivergedError, Stopped
from condgen.rng import RowRandom, StepRandom
from condgen.systems.base import Phase
from condgen.types import Condition, TargetSpec


def stopped(folder, at, **options):
    """A run in `folder` that was asked to stop after `at` steps; returns its checkpoint."""
    trainer = make_trainer(folder, **options)
    with pytest.raises(Stopped):
        trainer.train(stop=StopAfter(at))
    return trainer.store.latest()


def resumed(folder, checkpoint, **options):
    trainer = make_trainer(folder, **options)
    assert trainer.train(checkpoint, stop=StopAfter(99)) == Outcome(20, "done")
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of 20 steps: (tensors, metrics)."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    assert trainer.train(stop=StopAfter(99)) == Outcome(20, "done")
    return everything(trainer), metrics(trainer)


# resume


# 13 rows at batch 4: the epoch ends inside step 4 (index 3) and step 13 ends exactly on an epoch
@pytest.mark.parametrize("at", [0, 1, 3, 9, 13, 19])
def test_stopping_and_going_on_equals_never_stopping(tmp_path, whole, at):
    checkpoint = stopped(tmp_path, at)
    assert checkpoint.step == at
    trainer = resumed(tmp_path, checkpoint)
    assert differences(everything(trainer), whole[0]) == []
    assert metrics(trainer) == whole[1]


def test_workers_change_nothing(tmp_path, whole):
    trainer = resumed(tmp_path, stopped(tmp_path, 9, workers=2), workers=2)
    assert differences(everything(trainer), whole[0]) == []
    assert metrics(trainer) == whole[1]


def test_resuming_twice_and_at_the_end(tmp_path, whole):
    stopped(tmp_path, 5)
    trainer = make_trainer(tmp_path)
    with pytest.raises(Stopped):
        trainer.train(trainer.store.latest(), stop=StopAfter(6))
    assert trainer.store.latest().step == 11
    trainer = resumed(tmp_path, trainer.store.latest())
    assert differences(everything(trainer), whole[0]) == []
    again = resumed(tmp_path, trainer.store.latest())
    assert differences(everything(again), whole[0]) == []
    assert metrics(again) == whole[1]


def test_metrics_after_the_checkpoint_are_forgotten(tmp_path, whole):
    trainer = make_trainer(tmp_path, checkpoint_every=7)
    trainer.train(stop=StopAfter(99))
    resumed(tmp_path, trainer.store.load(14))
    assert metrics(trainer) == whole[1]


def drop_optimizers(monkeypatch, keep=None):
    real = state.load_optimizer

    def load(phase, *rest):
        if phase == keep:
            real(phase, *rest)

    monkeypatch.setattr(state, "load_optimizer", load)


def drop_buffers(monkeypatch):
    real = resume_module.Snapshot.restore

    def restore(self, checkpoint):
        fresh = {n: b.clone() for n, b in self.system.named_buffers()}
        kept = real(self, checkpoint)
        for name, buffer in self.system.named_buffers():
            buffer.copy_(fresh[name])
        return kept

    monkeypatch.setattr(resume_module.Snapshot, "restore", restore)


def forget_updates(monkeypatch):
    real = Ema.load

    def load(self, tensors):
        real(self, tensors)
        monkeypatch.setattr(Ema, "updates", property(lambda s: 0, lambda s, v: None), raising=False)

    monkeypatch.setattr(Ema, "load", load)


MUTATIONS = {
    "no optimiser": drop_optimizers,
    "only the first optimiser": lambda m: drop_optimizers(m, keep="discriminator"),
    "only the second optimiser": lambda m: drop_optimizers(m, keep="generator"),
    "no averaged weights": lambda m: m.setattr(Ema, "load", lambda self, tensors: None),
    "no count of averages": forget_updates,
    "no reseeding": lambda m: m.setattr(World, "seed", lambda self, *parts: None),
    "no buffers": drop_buffers,
    "one step too far": 1,
    "one step too few": -1,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_resume_test_is_awake(tmp_path, whole, monkeypatch, name):
    checkpoint = stopped(tmp_path, 9)
    change = MUTATIONS[name]
    if isinstance(change, int):
        checkpoint = dataclasses.replace(checkpoint, step=checkpoint.step + change)
    else:
        change(monkeypatch)
    trainer = resumed(tmp_path, checkpoint)
    assert differences(everything(trainer), whole[0]) != []


def test_moments_come_back_in_the_layout_of_their_weight(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train(stop=StopAfter(99))
    other = make_trainer(tmp_path)
    other.train(trainer.store.latest(), stop=StopAfter(99))
    weight = other.system.discriminator[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert other.runners[0].optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def test_looking_at_a_run_does_not_change_it(tmp_path, whole):
    seen = []

    def look(system, step):
        seen.append((step, system.training, float(torch.rand(()))))
        label = torch.arange(2) % CLASSES
        system.sample(Condition(label=label), random=RowRandom(0, [0, 1]))
        return {"score": step / 2}

    trainer = make_trainer(tmp_path, hooks=[Hook("look", 3, look)], log_every=7)
    trainer.train(stop=StopAfter(99))
    assert [step for step, _, _ in seen] == [3, 6, 9, 12, 15, 18, 20]
    assert not any(training for _, training, _ in seen)
    assert trainer.system.training and trainer.system.generator[3].training
    assert differences(everything(trainer), whole[0]) == []
    scores = {line["step"]: line["score"] for line in metrics(trainer) if "score" in line}
    assert scores[18] == 9.0
    losses = {line["step"]: line for line in metrics(trainer) if "generator/loss" in line}
    assert sorted(losses) == [1, 7, 14, 20]
    assert losses[20] == next(line for line in whole[1] if line["step"] == 20)


def test_hooks_see_averaged_weights(tmp_path):
    held = []
    trainer = make_trainer(
        tmp_path, steps=3, ema_decay=0.9, hooks=[Hook("h", 3, lambda s, n: held.append(s.generator[0].weight.clone()))]
    )
    trainer.train(stop=StopAfter(99))
    assert torch.equal(held[0], trainer.ema.tensors()["generator.0.weight"])
    assert not torch.equal(held[0], trainer.system.generator[0].weight)


def test_one_step_can_be_replayed_alone(tmp_path):
    """R9: everything random is a function of the step, so the losses of step 10 come out again without step 11."""
    trainer = make_trainer(tmp_path / "whole", log_every=1)
    trainer.train(stop=StopAfter(99))
    checkpoint = stopped(tmp_path / "part", 9)
    again = make_trainer(tmp_path / "again", log_every=1)
    with pytest.raises(Stopped):
        again.train(checkpoint, stop=StopAfter(1))
    (line,) = metrics(again)
    assert line == next(held for held in metrics(trainer) if held["step"] == 10)


# order of work


def test_two_micro_batches_equal_a_double_batch(tmp_path):
    """Rows, noise, dropped conditions and gradients; batch norm and dropout would see other batches."""
    options = {"dropout": 0.0, "norm": False, "phases": ({"repeats": 2}, {})}
    sgd = {"default": OptimOptions(name="sgd", lr=0.05)}
    ends = []
    for name, extra in (("a", {"batch_size": 4, "accumulate": 2}), ("b", {"batch_size": 8})):
        trainer = make_trainer(
            tmp_path / name, make_system(**options), optim=sgd, steps=6, condition_drop=0.4, log_every=1, **extra
        )
        trainer.train(stop=StopAfter(99))
        ends.append((everything(trainer), metrics(trainer)))
    for name, value in ends[0][0].items():
        if "mean_loss" not in name:  # written once per forward pass
            torch.testing.assert_close(value, ends[1][0][name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_phases_run_when_due_on_the_right_batches(tmp_path):
    system = make_system(phases=({"repeats": 2, "start": 1}, {"every": 2, "stop": 4}))
    calls = []
    system.on_loss = lambda phase, batch, losses: (calls.append((phase, batch.keys)), losses)[1]
    trainer = make_trainer(tmp_path, system, steps=5)
    trainer.train(stop=StopAfter(99))
    g, d = "generator", "discriminator"
    assert [phase for phase, _ in calls] == [g, d, d, d, d, g, d, d, d, d]
    number = [trainer.data[n].batch.keys for n in range(10)]
    # two batch numbers a step; the first repeat and other phases use the first of them
    expected = [0, 2, 3, 4, 5, 4, 6, 7, 8, 9]
    assert [keys for _, keys in calls] == [number[n] for n in expected]


def test_shared_work_is_done_once_per_batch_and_trains_the_generator(tmp_path):
    system = make_system(ToyShared, phases=({"repeats": 2}, {}))
    made = []
    real = system.fake
    system.fake = lambda batch, random: (made.append(batch.keys), real(batch, random))[1]
    trainer = make_trainer(tmp_path, system, steps=4, accumulate=2)
    before = everything(trainer)
    trainer.train(stop=StopAfter(99))
    assert len(made) == 4 * 2 * 2  # steps, micro-batches, repeats; the generator phase reuses
    changed = differences(before, everything(trainer))
    assert "system/generator.0.weight" in changed and "system/discriminator.0.weight" in changed


@pytest.mark.parametrize("kind", [ToyGan, ToyShared])
def test_no_gradient_reaches_what_a_phase_does_not_train(tmp_path, kind):
    system = make_system(kind)
    hits, now = set(), []
    real = system.fake

    def fake(batch, random):  # a leaky system: the fake batch of the critic's phase keeps its graph
        with torch.enable_grad():
            return real(batch, random)

    if kind is ToyGan:
        system.fake = fake
    for name, parameter in system.named_parameters():
        parameter.register_hook(lambda grad, n=name: hits.add((now[-1], n.split(".")[0])))
        parameter.register_post_accumulate_grad_hook(lambda p, n=name: hits.add((now[-1], f"{n.split('.')[0]}.grad")))
    system.on_loss = lambda phase, batch, losses: (now.append(phase), losses)[1]
    trainer = make_trainer(tmp_path, system, steps=3)
    trainer.train(stop=StopAfter(99))
    g, d = "generator", "discriminator"
    assert {(p, n) for p, n in hits if n.endswith(".grad")} == {(d, f"{d}.grad"), (g, f"{g}.grad")}
    assert all(p.grad is None for p in system.parameters())
    assert all(p.requires_grad for p in system.parameters())


def test_a_skipped_phase_changes_nothing_of_its_own(tmp_path):
    system = make_system()
    system.on_loss = lambda phase, batch, losses: None if phase == "generator" else losses
    trainer = make_trainer(tmp_path, system, steps=3)
    before = everything(trainer)
    trainer.train(stop=StopAfter(99))
    changed = differences(before, everything(trainer))
    assert not any("generator" in n and "running" not in n and "num_batches" not in n for n in changed)
    assert "system/discriminator.0.weight" in changed


def test_dropped_conditions_are_the_same_for_all_phases_and_as_many_as_asked(tmp_path):
    system = make_system()
    labels = {"discriminator": [], "generator": []}
    system.on_loss = lambda phase, batch, losses: (labels[phase].append(batch.condition.label.clone()), losses)[1]
    make_trainer(tmp_path, system, steps=100, condition_drop=0.3, log_every=100).train(stop=StopAfter(999))
    assert all(torch.equal(a, b) for a, b in zip(labels["discriminator"], labels["generator"], strict=True))
    share = float((torch.cat(labels["generator"]) == -1).float().mean())
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


def test_noise_of_micro_batches_are_slices_of_one_draw():
    whole = StepRandom(1, "step", rows=12)
    parts = [StepRandom(1, "step", rows=4, offset=o, total=12) for o in (0, 4, 8)]
    assert torch.equal(whole.randn(2, 3), torch.cat([p.randn(2, 3) for p in parts]))
    assert torch.equal(whole.randint(9), torch.cat([p.randint(9) for p in parts]))
    ranks = [StepRandom(1, "step", rows=4, rank=r, world=3) for r in range(3)]
    assert torch.equal(StepRandom(1, "step", rows=12).rand(5), torch.cat([r.rand(5) for r in ranks]))
    assert len({float(torch.rand((), generator=p.local)) for p in parts}) == 3


# numbers that are not finite


class Explode(torch.autograd.Function):
    """Finite forward, infinite backward."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


FAULTS = {
    "nan": lambda loss: loss * float("nan"),
    "inf": lambda loss: loss + float("inf"),
    "gradient": lambda loss: Explode.apply(loss),
}


def faulty(phase, kind, when):
    """A system whose loss of `phase` breaks on the calls in `when` (counted per phase)."""
    system = make_system()
    count = {"discriminator": 0, "generator": 0}

    def on_loss(name, batch, losses):
        count[name] += 1
        hit = name == phase and count[name] in when
        return {**losses, "loss": FAULTS[kind](losses["loss"])} if hit else losses

    system.on_loss = on_loss
    return system


@pytest.mark.parametrize("phase", ["discriminator", "generator"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_number_that_is_not_finite_stops_before_the_update(tmp_path, phase, kind):
    trainer = make_trainer(tmp_path, faulty(phase, kind, {3}))
    runner = next(r for r in trainer.runners if r.phase.name == phase)
    held = {}
    real = runner.update

    def update(*arguments):
        held.clear()
        held.update(everything(trainer))
        return real(*arguments)

    runner.update = update
    with pytest.raises(DivergedError, match=f"phase '{phase}' at step 3") as error:
        trainer.train(stop=StopAfter(99))
    changed = differences(held, everything(trainer))
    assert not [n for n in changed if "running" not in n and "num_batches" not in n and "mean_loss" not in n]
    assert ("gradient of " in str(error.value)) == (kind != "inf")  # an infinite sum still has finite gradients
    crash = json.loads((tmp_path / "crash" / "step-00000003.json").read_text())
    assert crash["phase"] == phase and crash["processes"][0]["keys"] == list(trainer.data[2].batch.keys)


def test_skipping_leaves_everything_untouched_and_goes_on(tmp_path):
    """Weights, moments, running statistics and hand-written buffers after the refused update are those before it."""
    trainer = make_trainer(tmp_path, faulty("discriminator", "nan", {3}), steps=5, on_nonfinite="skip")
    real, pairs = trainer._update, []

    def update(runner, data, repeat):
        before = everything(trainer)
        result = real(runner, data, repeat)
        if result.status == "nonfinite":
            pairs.append((data.step, before, everything(trainer)))
        return result

    trainer._update = update
    assert trainer.train(stop=StopAfter(99)).step == 5
    assert [step for step, _, _ in pairs] == [2]
    assert differences(*pairs[0][1:]) == []
    assert trainer.ema.updates == 4
    moments = trainer.runners[0].optimizer.state[trainer.system.discriminator[0].weight]
    assert float(moments["step"]) == 4
    assert all(torch.isfinite(t).all() for t in everything(trainer).values())


def test_skipping_gives_up_after_ten_in_a_row(tmp_path):
    trainer = make_trainer(tmp_path, faulty("generator", "nan", set(range(4, 99))), on_nonfinite="skip")
    with pytest.raises(DivergedError, match="step 13"):
        trainer.train(stop=StopAfter(99))


def scaled(monkeypatch, scale):
    monkeypatch.setattr(World, "scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4))


def test_loss_scaling_changes_nothing_and_survives_a_resume(tmp_path, whole, monkeypatch):
    """fp16 needs a GPU; the scaler itself works anywhere, and powers of two are exact."""
    scaled(monkeypatch, 2.0**10)
    trainer = resumed(tmp_path, stopped(tmp_path, 9))
    assert [r.scaler.get_scale() for r in trainer.runners] == [2.0**15] * 2  # doubled every 4 of 20 updates
    assert differences(everything(trainer), whole[0]) == []


def test_gradients_that_overflow_lower_the_scale_and_only_endless_ones_stop(tmp_path, monkeypatch):
    scaled(monkeypatch, 2.0**10)
    trainer = make_trainer(tmp_path, faulty("generator", "gradient", {2, 3}), steps=5)
    trainer.train(stop=StopAfter(99))
    assert trainer.runners[1].scaler.get_scale() == 2.0**8
    weight = trainer.system.generator[0].weight
    assert float(trainer.runners[1].optimizer.state[weight]["step"]) == 3
    endless = make_trainer(tmp_path / "b", faulty("generator", "gradient", range(99)), steps=40)
    with pytest.raises(DivergedError, match="step 25"):
        endless.train(stop=StopAfter(99))
    lost = make_trainer(tmp_path / "c", faulty("generator", "nan", {2}))
    with pytest.raises(DivergedError, match="step 2"):
        lost.train(stop=StopAfter(99))


def test_out_of_memory_names_phase_shape_and_a_way_out(tmp_path):
    system = make_system()

    def on_loss(phase, batch, losses):
        if phase == "generator":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return losses

    system.on_loss = on_loss
    trainer = make_trainer(tmp_path, system)
    with pytest.raises(ConfigError, match=r"(?s)'generator'.*\(4, 3, 4, 4\).*batch_size"):
        trainer.train(stop=StopAfter(99))
    assert trainer.store.steps() == []


def test_running_out_of_real_memory_is_explained_too(tmp_path):
    """On a CPU torch raises a plain RuntimeError; the run must not save what it half did."""
    system = make_system()
    system.on_loss = lambda phase, batch, losses: torch.empty(2**56)
    trainer = make_trainer(tmp_path, system, checkpoint_every=1)
    with pytest.raises(ConfigError, match=r"out of memory in phase 'discriminator' at step 1.*batch_size"):
        trainer.train(stop=StopAfter(99))
    assert trainer.store.steps() == [] and ConfigError.exit_code != 0


def test_a_loss_that_stays_exactly_zero_is_warned_about_once(tmp_path, monkeypatch, caplog):
    """N5: a critic that wins or loses completely has no gradient, and nothing else would say so."""
    monkeypatch.setattr(phases_module, "ZEROS_IN_A_ROW", 4)
    system = make_system()
    calls = []

    def on_loss(phase, batch, losses):
        calls.append(phase)
        dead = phase == "discriminator" and len(calls) // 2 not in (3, 4)  # alive again for two steps
        return {**losses, "loss": losses["loss"] * 0} if dead else losses

    system.on_loss = on_loss
    with caplog.at_level("WARNING", "condgen"):
        make_trainer(tmp_path, system, steps=12).train(stop=StopAfter(99))
    found = [r.getMessage() for r in caplog.records if "exactly 0" in r.getMessage()]
    assert len(found) == 1 and "'discriminator' at step 9" in found[0]


# stopping and saving


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path):
    def kick(system, step):
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(tmp_path, hooks=[Hook("kick", 4, kick)])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="step 4 of 20"):
        trainer.train()
    assert trainer.store.latest().step == 4 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("point", ["first-file", "manifest", "renamed"])
def test_a_signal_in_the_middle_of_a_save_lets_it_finish(tmp_path, monkeypatch, point):
    """S2."""
    kick = {point: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    monkeypatch.setattr(checkpoint_module, "faultpoint", lambda name: kick.pop(name, lambda: None)())
    trainer = make_trainer(tmp_path, checkpoint_every=4)
    with pytest.raises(Stopped, match="step 4 of 20"):
        trainer.train()
    assert trainer.store.latest().step == 4 and kick == {}


def test_clipping_limits_the_update_to_the_norm(tmp_path):
    optim = {"default": OptimOptions(name="sgd", lr=1.0, clip_norm=1e-3)}
    trainer = make_trainer(tmp_path, optim=optim, steps=1, log_every=1)
    before = everything(trainer)
    trainer.train(stop=StopAfter(99))
    after = everything(trainer)
    names = [f"system/{n}" for n in trainer.runners[0].parameters]
    moved = torch.cat([(after[n] - before[n]).flatten() for n in names]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)
    assert metrics(trainer)[0]["discriminator/grad_norm"] > 1e-2  # what was logged is the norm before clipping


def test_time_limit_and_timed_checkpoints(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, time_limit_seconds=1e-9)
    assert trainer.train(stop=StopAfter(99)) == Outcome(0, "time limit")
    assert trainer.store.steps() == [0]
    monkeypatch.setattr(Clock, "since_save", lambda self: 99.0)
    trainer = make_trainer(tmp_path / "b", steps=3, checkpoint_seconds=60)
    trainer.train(stop=StopAfter(99))
    assert trainer.store.steps()[-2:] == [2, 3]


def test_a_failed_save_is_an_error_and_keeps_the_old(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, checkpoint_every=4)
    real = trainer.store.save

    def save(step, tensors, facts):
        if step == 8:
            raise CheckpointError("the disk is full")
        return real(step, tensors, facts)

    monkeypatch.setattr(trainer.store, "save", save)
    with pytest.raises(CheckpointError, match="disk is full"):
        trainer.train(stop=StopAfter(99))
    assert trainer.store.steps() == [4]


def test_bad_rows_are_written_down_once_and_too_many_end_the_run(tmp_path):
    trainer = make_trainer(tmp_path, data=ToyData(bad=(5,)), steps=9)
    trainer.train(stop=StopAfter(99))
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["row-5"]
    broken = make_trainer(tmp_path / "b", data=ToyData(rows=150, bad=range(10, 148)), steps=200)
    with pytest.raises(DataError, match="of 150 rows cannot be used"):
        broken.train(stop=StopAfter(999))


class Deadly(ToyData):
    """Kills the process that loads its row 7."""

    def sample(self, index, random):
        if index == 7 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index, random)


@pytest.mark.faults
@pytest.mark.timeout(30)
def test_a_loader_process_that_is_killed_is_a_data_error_and_the_run_can_go_on(tmp_path):
    trainer = make_trainer(tmp_path, data=Deadly(), workers=2, checkpoint_every=1)
    with pytest.raises(DataError, match=r"process that loads data died at step \d+ .*data\.workers=0"):
        trainer.train(stop=StopAfter(99))
    again = make_trainer(tmp_path, data=Deadly())
    assert again.train(again.store.latest(), stop=StopAfter(99)) == Outcome(20, "done")


def test_a_dead_loader_that_is_noticed_outside_the_loader_is_a_data_error_too(tmp_path):
    """torch raises it from its SIGCHLD handler, wherever the main thread happens to be."""

    def noticed(system, step):
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed.")

    trainer = make_trainer(tmp_path, hooks=[Hook("any", 3, noticed)])
    with pytest.raises(DataError, match=r"process that loads data died at step \d+ .*data\.workers=0"):
        trainer.train(stop=StopAfter(99))


class Hanging(ToyData):
    """The process that loads row 7 never comes back."""

    def sample(self, index, random):
        if index == 7 and torch.utils.data.get_worker_info() is not None:
            time.sleep(8)  # longer than the wait; the loader then joins it
        return super().sample(index, random)


@pytest.mark.faults
@pytest.mark.timeout(30)
def test_a_loader_process_that_hangs_is_a_data_error_that_names_its_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDGEN_TIMEOUT_SECONDS", "3")
    trainer = make_trainer(tmp_path, data=Hanging(), workers=2)
    with pytest.raises(DataError, match=r"gave nothing for 3 s at step \d .*row-7.*CONDGEN_TIMEOUT_SECONDS"):
        trainer.train(stop=StopAfter(99))


class Broken(ToyData):
    def sample(self, index, random):
        return 1 / (index - 7)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unexpected_error_of_a_row_names_the_row(tmp_path, workers):
    """W3: with the traceback, from the training process and from a worker."""
    with pytest.raises(Exception) as caught:  # sample() of any other row gives a float: an AttributeError
        make_trainer(tmp_path, data=Broken(), workers=workers).train(stop=StopAfter(99))
    text = "".join(traceback.format_exception(caught.value))
    assert re.search(r"while reading row row-\d+ of Broken", text)


# construction


def phases_of(system, *phases):
    system.phases = lambda: phases
    return system


def test_phases_must_own_disjoint_known_and_all_parameters(tmp_path):
    s = make_system()
    d = Phase("discriminator", s.discriminator_loss, ("discriminator",))
    g = Phase("generator", s.generator_loss, ("generator",))
    for phases, message in (
        ((d, dataclasses.replace(g, trains=("generator", "discriminator"))), "both train discriminator"),
        ((d, dataclasses.replace(g, trains=("generater",))), "Did you mean 'generator'"),
        ((d,), r"no phase trains generator\.0\.weight"),
        ((d, dataclasses.replace(g, trains=())), "nothing to train"),
        ((d, dataclasses.replace(g, name="discriminator")), "two phases"),
        ((d, dataclasses.replace(g, every=0)), "every and repeats"),
        ((), "at least one phase"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_trainer(tmp_path, phases_of(s, *phases))
    with pytest.raises(ConfigError, match="no phase named 'critic'"):
        make_trainer(tmp_path, make_system(), optim={"critic": OptimOptions()})


def test_frozen_parameters_belong_to_nobody_and_stay(tmp_path):
    system = make_system()
    system.generator[0].requires_grad_(False)
    trainer = make_trainer(tmp_path, system, steps=3)
    before = everything(trainer)
    trainer.train(stop=StopAfter(99))
    changed = differences(before, everything(trainer))
    assert "system/generator.0.weight" not in changed and "system/generator.4.weight" in changed
    assert not system.generator[0].weight.requires_grad


def test_losses_that_cannot_be_trained_are_explained(tmp_path):
    for wrong, message in (
        (lambda losses: {"loss": losses["loss"].detach()}, "does not depend on what it trains"),
        (lambda losses: {"value": losses["loss"]}, "must return"),
        (lambda losses: {"loss": losses["loss"].expand(3)}, "must return"),
    ):
        system = make_system()
        system.on_loss = lambda phase, batch, losses, w=wrong: w(losses)
        with pytest.raises(ConfigError, match=message):
            make_trainer(tmp_path, system).train(stop=StopAfter(99))


def test_data_and_options_must_agree(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.data.batch_size = 5
    with pytest.raises(ConfigError, match="batch_size=5"):
        trainer.train(stop=StopAfter(99))


def test_a_checkpoint_that_does_not_fit_is_explained(tmp_path, caplog):
    checkpoint = stopped(tmp_path, 9)
    for folder, options, message in (
        ("wide", {"system": make_system(width=16)}, r"of another shape: generator\.0\.weight \(8, 7\) here \(16, 7\)"),
        ("sgd", {"optim": {"default": OptimOptions(name="sgd", momentum=0.5)}}, "this optimiser keeps"),
        ("short", {"steps": 8}, "raise train.steps"),
    ):
        with pytest.raises(CheckpointError, match=message):
            make_trainer(tmp_path / folder, **options).train(checkpoint, stop=StopAfter(99))
    renamed = make_system()
    renamed.phases = lambda: [dataclasses.replace(p, name=p.name[:4]) for p in ToyGan.phases(renamed)]
    with pytest.raises(CheckpointError, match="knows no phase 'disc'"):
        make_trainer(tmp_path / "renamed", renamed, optim={"default": OptimOptions()}).train(
            checkpoint, stop=StopAfter(99)
        )
    with caplog.at_level("WARNING", "condgen"):
        make_trainer(tmp_path / "other", seed=4, batch_size=5).train(checkpoint, stop=StopAfter(99))
    assert "not bit-exact" in caplog.text and "seed 3 -> 4; batch_size 4 -> 5" in caplog.text


@pytest.mark.parametrize("name", ["seed", "batch_size", "accumulate", "world", "precision", "threads", "torch"])
def test_whatever_makes_a_resume_inexact_is_named(tmp_path, caplog, name):
    """L5: it loads, and the log says which fact differs and how."""
    checkpoint = stopped(tmp_path, 9)
    state = checkpoint.state
    if name == "torch":
        changed = {**state, "versions": {**state["versions"], "torch": "1.0"}}
    else:
        changed = {**state, name: "before"}
    with caplog.at_level("WARNING", "condgen"):
        resumed(tmp_path, dataclasses.replace(checkpoint, state=changed))
    shown = {"torch": "torch 1.0 -> "}.get(name, f"{name} before -> ")
    (line,) = [r.getMessage() for r in caplog.records if "not bit-exact" in r.getMessage()]
    assert shown in line and ";" not in line


def test_what_does_not_matter_to_a_resume_may_differ(tmp_path, caplog):
    """L4: the learning rate, the number of steps and how often is logged."""
    checkpoint = stopped(tmp_path, 9)
    trainer = make_trainer(tmp_path, steps=12, log_every=1, optim={"default": OptimOptions(lr=1e-4)})
    with caplog.at_level("WARNING", "condgen"):
        assert trainer.train(checkpoint, stop=StopAfter(99)).step == 12
    assert "bit-exact" not in caplog.text
    assert metrics(trainer)[-1]["generator/lr"] == 1e-4


def test_data_that_changed_are_refused_unless_allowed(tmp_path, caplog):
    """D16."""
    checkpoint = stopped(tmp_path, 9)
    with pytest.raises(CheckpointError, match=r"data changed.*train\.allow_data_change=true"):
        make_trainer(tmp_path, data=ToyData(rows=14)).train(checkpoint, stop=StopAfter(99))
    trainer = make_trainer(tmp_path, data=ToyData(rows=14), allow_data_change=True)
    with caplog.at_level("WARNING", "condgen"):
        assert trainer.train(checkpoint, stop=StopAfter(99)).step == 20
    assert "the data changed" in caplog.text


def test_data_of_another_size_than_the_system_are_refused(tmp_path):
    """H2, H5: one channel would broadcast to three, and a clip of another length would train on the wrong thing."""
    for target in (TargetSpec(1, 4, 4), TargetSpec(3, 4, 4, frames=2)):
        data = ToyData()
        data.target = target
        with pytest.raises(ConfigError, match="the data give TargetSpec"):
            make_trainer(tmp_path, data=data)


def test_bf16_trains_with_float32_weights(tmp_path):
    trainer = make_trainer(tmp_path, world=World(precision="bf16"), steps=3)
    seen = []
    trainer.system.discriminator[0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    trainer.train(stop=StopAfter(99))
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.system.parameters())


def test_compile_touches_only_what_the_system_lists(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    make_trainer(tmp_path, compile=True)
    assert compiled == []
    system = make_system()
    system.compilable = ("generator",)
    make_trainer(tmp_path, system, compile=True)
    assert compiled == [system.generator]


# the best checkpoint


@pytest.mark.parametrize(("best_is", "expected"), [("max", 8), ("min", 12)])
def test_the_best_checkpoint_survives_retention(tmp_path, best_is, expected):
    values = {4: 0.5, 8: 0.9, 12: 0.1, 16: 0.4, 20: 0.3}
    hook = Hook("validation", 4, lambda system, step: {"quality": values[step]})
    trainer = make_trainer(tmp_path, hooks=[hook], checkpoint_every=4, best="quality", best_is=best_is)
    trainer.train(stop=StopAfter(99))
    assert trainer.store.best()["step"] == expected
    assert trainer.store.load(expected).step == expected  # older than the two that are kept anyway
    assert trainer.store.steps()[-1] == 20


def test_a_number_that_no_hook_logs_marks_nothing(tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_every=4, best="quality")
    trainer.train(stop=StopAfter(99))
    assert trainer.store.best() is None
