"""One of several processes of test_distributed.py: runs every scenario and writes what it saw as JSON and tensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from engine_toys import StopAfter, ToyGan, ToyShared, differences, everything, make_system, make_trainer, metrics
from safetensors.torch import save_file
from torch import nn

from condgen.engine import state
from condgen.engine.optim import OptimOptions
from condgen.engine.world import World
from condgen.errors import CondgenError, Stopped
from condgen.nn.sync_norm import SyncBatchNorm, convert

SGD = {"default": OptimOptions(name="sgd", lr=0.05, momentum=0.9)}


def match(folder, world, kind):
    """Training whose end must equal that of one process with the double batch: noise, rows, batch norm, gradients."""
    trainer = make_trainer(
        folder, make_system(kind, dropout=0.0), world=world, optim=SGD, steps=4, condition_drop=0.3, log_every=1,
        accumulate=1 if kind is ToyShared else 2,
    )  # fmt: skip
    trainer.train(stop=StopAfter(99))
    found = everything(trainer)
    if world.is_main:
        save_file({n: t.contiguous() for n, t in found.items()}, folder / "end.safetensors")
    hashes = world.objects(state.digests({n: t for n, t in found.items() if "mean_loss" not in n}))
    return {"same_on_all": all(h == hashes[0] for h in hashes), "metrics": metrics(trainer) if world.is_main else []}


def resume(folder, world, sync):
    """20 steps against 9 + 11, with dropout; without synchronisation every process keeps its own statistics."""
    options = {"world": world, "sync_batchnorm": sync}
    whole = make_trainer(folder / "whole", **options)
    whole.train(stop=StopAfter(99))
    first = make_trainer(folder / "parts", **options)
    try:
        # every process asks its own flag: only the last one asks at all
        first.train(stop=StopAfter(9 if world.rank else 99))
        stopped = None
    except Stopped as error:
        stopped = str(error)
    checkpoint = first.store.latest()
    second = make_trainer(folder / "parts", **options)
    second.train(checkpoint, stop=StopAfter(99))
    statistics = world.objects(whole.system.generator[1].running_mean.tolist())
    return {
        "stopped": stopped,
        "step": checkpoint.step,
        "differences": differences(everything(whole), everything(second)),
        "metrics_equal": metrics(whole) == metrics(second),
        "statistics_differ": statistics[0] != statistics[1],
        "saved_statistics": checkpoint.tensors("system")["generator.1.running_mean"].tolist(),
        "own_statistics": [
            held["generator.1.running_mean"].tolist()
            for rank in range(world.world)
            if "generator.1.running_mean" in (held := checkpoint.tensors(f"rank-{rank}"))
        ],
    }


def fails(folder, world, on_loss=None, prepare=None, **options):
    """The error of a run in which only the last process misbehaves."""
    system = make_system()
    trainer = make_trainer(folder, system, world=world, **options)
    if world.rank:
        system.on_loss = on_loss
        if prepare is not None:
            prepare(trainer)
    try:
        trainer.train(stop=StopAfter(99))
    except CondgenError as error:
        return {"error": type(error).__name__, "message": str(error), "steps": trainer.store.steps()}
    return {"error": None, "steps": trainer.store.steps()}


def nan_on_one(folder, world):
    calls = []

    def on_loss(phase, batch, losses):
        calls.append(phase)
        return {**losses, "loss": losses["loss"] * float("nan")} if len(calls) == 6 else losses

    return fails(folder, world, on_loss)


def drift(folder, world):
    def prepare(trainer):
        with torch.no_grad():
            trainer.system.discriminator[0].bias[0] += 1e-3

    return fails(folder, world, prepare=prepare, checkpoint_every=2)


def none_on_one(folder, world):
    """The generator's loss is None on the last process at step 2 only: nobody updates it then."""
    system = make_system()
    calls = []

    def on_loss(phase, batch, losses):
        calls.append(phase)
        return None if world.rank and phase == "generator" and calls.count("generator") == 2 else losses

    system.on_loss = on_loss
    trainer = make_trainer(folder, system, world=world, steps=3, accumulate=1)
    trainer.train(stop=StopAfter(99))
    weight = trainer.system.generator[0].weight
    return {
        "updates": float(trainer.runners[1].optimizer.state[weight]["step"]),
        "same": len({json.dumps(h) for h in world.objects(state.digests(dict(trainer.system.named_parameters())))})
        == 1,
    }


def sync_norm(folder, world):
    """Forward, first and second derivative, running statistics against BatchNorm on the joined batch."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 5, dtype=torch.float32) * 3 + 10
    plain = nn.BatchNorm2d(3)
    nn.init.normal_(plain.weight)
    tied = nn.ModuleList([plain, nn.Sequential(plain), nn.BatchNorm1d(2), nn.BatchNorm3d(2)])
    twin = nn.BatchNorm2d(3)
    twin.load_state_dict(plain.state_dict())
    keys = list(tied.state_dict())
    convert(tied)
    mine = tied[0]
    assert isinstance(mine, SyncBatchNorm) and tied[1][0] is mine and list(tied.state_dict()) == keys
    share = x[4:] if world.rank else x[:4]  # uneven shares
    worst = {}

    def note(name, a, b):
        worst[name] = float((a - b).detach().abs().max())

    def passes(norm, value):
        value = value.clone().requires_grad_(True)
        out = norm(value)
        (gradient,) = torch.autograd.grad((out**3).sum(), value, create_graph=True)
        ((gradient**2).sum() + out.sin().sum()).backward()
        return out, gradient, value.grad, norm.weight.grad, norm.bias.grad

    rows = slice(4, 6) if world.rank else slice(0, 4)
    got, expected = passes(mine, share), passes(twin, x)
    for name, a, b in zip(("out", "gradient", "second"), got[:3], expected[:3], strict=True):
        note(name, a, b[rows])
    for name, a, b in zip(("weight", "bias"), got[3:], expected[3:], strict=True):
        note(name, world.average(a) * world.world, b)
    note("mean", mine.running_mean, twin.running_mean)
    note("var", mine.running_var, twin.running_var)
    mine.eval(), twin.eval()
    note("eval", mine(x), twin(x))
    return {"worst": worst, "scale": float(expected[2].abs().max())}


def agreement(folder, world):
    rows = torch.full((1 + world.rank, 2), float(world.rank))
    values = {"a": torch.tensor(float(world.rank)), **({"b": 5.0} if world.rank else {})}
    return {
        "agree": world.agree(world.rank == 1, False),
        "mean": world.mean(values),
        "gather": world.gather(rows).tolist(),
        "broadcast": world.broadcast(f"from {world.rank}"),
        "flag": world.any(False),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    world = World.start(device="cpu", precision="fp32", seed=0)
    scenarios = {
        "agreement": lambda at: agreement(at, world),
        "sync_norm": lambda at: sync_norm(at, world),
        "match": lambda at: match(at, world, ToyGan),
        "match_shared": lambda at: match(at, world, ToyShared),
        "resume": lambda at: resume(at, world, True),
        "resume_unsynchronised": lambda at: resume(at, world, False),
        "nan": lambda at: nan_on_one(at, world),
        "none": lambda at: none_on_one(at, world),
        "drift": lambda at: drift(at, world),
    }
    out = {name: run(folder / name) for name, run in scenarios.items()}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(out))
    world.close()


if __name__ == "__main__":
    main()
