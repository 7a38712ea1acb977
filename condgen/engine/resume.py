"""What a run needs to go on: tensors and facts into a checkpoint, and back."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import condgen
from condgen.engine import state
from condgen.engine.checkpoint import Checkpoint
from condgen.engine.ema import Ema
from condgen.engine.options import TrainOptions
from condgen.engine.phases import Runner
from condgen.engine.world import World
from condgen.errors import CheckpointError, DivergedError
from condgen.systems.base import Trainable

logger = logging.getLogger(__name__)

Groups = dict[str, dict[str, Tensor]]


class Snapshot:
    """The state of a training: system, averaged weights, every optimiser. Random states are not part of it.

    Groups: "system", "ema", "optim-<phase>" once that phase was updated, and "rank-<r>" for buffers in which
    process r differs from rank 0 (pools, running statistics that are not synchronised).
    """

    def __init__(
        self, system: Trainable, ema: Ema, runners: Sequence[Runner], options: TrainOptions, world: World
    ) -> None:
        self.system, self.ema, self.runners, self.options, self.world = system, ema, runners, options, world

    def capture(self) -> tuple[Groups, dict[str, Any]]:
        """(groups, facts) of this process. Tensors are the live ones: save them before anything changes."""
        groups: Groups = {"system": state.system_tensors(self.system), "ema": self.ema.tensors()}
        moments = {r.phase.name: state.optimizer_tensors(r.optimizer, r.parameters) for r in self.runners}
        groups.update((f"optim-{name}", held) for name, held in moments.items() if held)
        facts: dict[str, Any] = {
            "seed": self.options.seed,
            "batch_size": self.options.batch_size,
            "accumulate": self.options.accumulate,
            "world": self.world.world,
            "precision": self.world.precision,
            "threads": torch.get_num_threads(),
            "versions": {
                "torch": torch.__version__, "condgen": condgen.__version__, "python": platform.python_version()
            },
            "ema_updates": self.ema.updates,
            "optim_tensors": {name: len(held) for name, held in moments.items()},
            "param_groups": {
                r.phase.name: [{k: v for k, v in g.items() if k != "params"} for g in r.optimizer.param_groups]
                for r in self.runners
            },
            "scalers": {r.phase.name: r.scaler.state_dict() for r in self.runners if r.scaler is not None},
            "overflows": {r.phase.name: r.overflows for r in self.runners},
        }  # fmt: skip
        return groups, facts

    def buffers_per_rank(self) -> Groups:
        """ "rank-<r>" -> the buffers of process r that differ between processes; also checks that parameters agree.

        DivergedError if the processes no longer hold the same parameters.
        """
        if self.world.world == 1:
            return {}
        parameters = self.world.objects(state.digests(state.parameters_of(self.system)))
        for name, value in parameters[0].items():
            ranks = [rank for rank, held in enumerate(parameters) if held[name] != value]
            if ranks:
                raise DivergedError(
                    f"processes {ranks} hold other values of {name} than rank 0: the run is broken from some earlier "
                    "step on. Resume from the newest checkpoint; if it happens again, the system updates weights "
                    "outside its phases"
                )
        buffers = state.persistent_buffers(self.system)
        hashes = self.world.objects(state.digests(buffers))
        differ = [name for name in buffers if any(held[name] != hashes[0][name] for held in hashes)]
        own = self.world.objects({name: buffers[name].detach().cpu() for name in differ})
        return {f"rank-{rank}": held for rank, held in enumerate(own)} if differ else {}

    def restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Puts everything back and returns the state; strict. Warns where the run will not be bit-exact.

        CheckpointError when the checkpoint does not fit, or is newer than the last step asked for.
        """
        kept = checkpoint.state
        if checkpoint.step > self.options.steps:
            raise CheckpointError(
                f"{checkpoint.path} holds {checkpoint.step} steps and train.steps={self.options.steps}; "
                "raise train.steps to go on, or resume from an earlier step"
            )
        self._warn(kept)
        groups = set(checkpoint.groups)
        state.load_tensors("the weights", state.system_tensors(self.system), checkpoint.tensors("system"))
        self.ema.load(checkpoint.tensors("ema"))
        self.ema.updates = int(kept["ema_updates"])
        self._restore_optimizers(checkpoint, groups)
        mine = f"rank-{self.world.rank}"
        if mine in groups and kept["world"] == self.world.world:
            held = checkpoint.tensors(mine)
            buffers = state.persistent_buffers(self.system)
            state.load_tensors("the buffers", {name: buffers[name] for name in held if name in buffers}, held)
        return kept

    def expect_data(self, kept: Mapping[str, Any], fingerprint: str) -> None:
        """CheckpointError where the data changed since the checkpoint; a warning with train.allow_data_change.

        Every epoch would hold other rows, and scores before and after could not be compared.
        """
        before = kept.get("data")  # absent in older checkpoints
        if before is None or before == fingerprint:
            return
        if not self.options.allow_data_change:
            raise CheckpointError(
                f"the data changed since this checkpoint (fingerprint {before}, now {fingerprint}). Bring back the "
                "data and data.* options that the run was started with, or set train.allow_data_change=true"
            )
        if self.world.is_main:
            logger.warning("the data changed since this checkpoint (fingerprint %s, now %s)", before, fingerprint)

    def _restore_optimizers(self, checkpoint: Checkpoint, groups: set[str]) -> None:
        kept = checkpoint.state
        for runner in self.runners:
            name = runner.phase.name
            expected = kept["optim_tensors"].get(name)
            if expected is None:
                phases = ", ".join(kept["optim_tensors"])
                raise CheckpointError(f"the checkpoint knows no phase {name!r}; it was made with {phases}")
            held = checkpoint.tensors(f"optim-{name}") if f"optim-{name}" in groups else {}
            if len(held) != expected:
                raise CheckpointError(
                    f"the optimiser of phase {name!r} has {len(held)} tensors in the checkpoint; {expected} were saved"
                )
            state.load_optimizer(name, runner.optimizer, runner.parameters, runner.state_keys, held)
            runner.overflows = int(kept["overflows"].get(name, 0))
            if runner.scaler is not None and name in kept["scalers"]:
                runner.scaler.load_state_dict(kept["scalers"][name])

    def _warn(self, kept: dict[str, Any]) -> None:
        now = {
            "seed": self.options.seed,
            "batch_size": self.options.batch_size,
            "accumulate": self.options.accumulate,
            "world": self.world.world,
            "precision": self.world.precision,
            "threads": torch.get_num_threads(),
        }
        changed = [f"{name} {kept.get(name)} -> {value}" for name, value in now.items() if kept.get(name) != value]
        before = kept.get("versions", {}).get("torch")
        if before != torch.__version__:
            changed.append(f"torch {before} -> {torch.__version__}")
        if changed and self.world.is_main:
            logger.warning("this run is not bit-exact with the one it goes on from: %s", "; ".join(changed))
