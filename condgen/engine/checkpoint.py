"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a lost run.

    checkpoints/
      step-00001200/   system.safetensors  ema.safetensors  optim-<phase>.safetensors  state.json  manifest.json
      best.json        which step scored best; retention keeps that folder
      set-aside/       checkpoints of a timeline that was abandoned, or damaged ones; never read, never deleted
      .tmp-00001300-<pid>/   a write in progress          .del-...   a removal in progress

A folder is written under a temporary name beside its place, every file is forced to the disk, the manifest
(byte counts and sha256 of every file) comes last, and only then the folder gets its name. Older checkpoints
are retired after that. Reading goes the other way: nothing is used that does not match its manifest.
Hashes prove integrity, not authorship: load only checkpoints whose origin you trust.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from condgen.disk import DISK_FULL, from_json, is_alive, replace_file, sync_folder, to_json, write_file
from condgen.engine.manifest import (
    MANIFEST,
    SCHEMA,
    STATE,
    STEP,
    SUFFIX,
    Checkpoint,
    Damaged,
    first,
    listed_bytes,
    read_checkpoint,
    seal,
)
from condgen.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointStore", "faultpoint", "load_strict", "read_checkpoint"]

logger = logging.getLogger(__name__)

BEST, SET_ASIDE = "best.json", "set-aside"
FAULT_EXIT = 86  # exit code of a process ended by `faultpoint`
_TEMP = re.compile(r"\.tmp-(?:\d+|probe)-(\d+)")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_STARTED = time.time()
_faults: Counter[str] = Counter()


def faultpoint(name: str) -> None:
    """Ends the process here, as a power cut would, when CONDGEN_FAULT is `name` or `name:n` (the nth time)."""
    wanted, _, nth = os.environ.get("CONDGEN_FAULT", "").partition(":")
    if wanted == name:
        _faults[name] += 1
        if _faults[name] >= int(nth or 1):
            os._exit(FAULT_EXIT)


class CheckpointStore:
    """The checkpoints of one run.

    keep        newest checkpoints to keep, at least 2: a second good one covers silent damage of the newest
    keep_every  also keep every step that is a multiple of this
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int | None = None) -> None:
        if keep < 2:
            raise CheckpointError(f"keep={keep} checkpoints; keep at least 2, so that one damaged file loses nothing")
        if keep_every is not None and keep_every < 1:
            raise CheckpointError(f"keep_every={keep_every}; give a number of steps >= 1, or None")
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every
        self._ready = False

    # reading

    def steps(self) -> list[int]:
        """Steps that have a folder, oldest first; nothing is verified."""
        if not self.folder.is_dir():
            return []
        found = [
            (match, entry) for entry in os.scandir(self.folder) if (match := STEP.fullmatch(entry.name)) is not None
        ]
        return sorted(int(match[1]) for match, entry in found if entry.is_dir(follow_symlinks=False))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None only if there are none at all.

        Damaged ones are skipped with a warning. Raises CheckpointError if every one is damaged (starting again
        from nothing would hide it), or if the newest was written by a newer condgen.
        """
        skipped: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = read_checkpoint(self._place(step))
            except Damaged as error:
                skipped.append(str(error))
                continue
            for reason in skipped:
                logger.warning("skipped a damaged checkpoint: %s; using step %d", reason, step)
            return found
        if skipped:
            raise CheckpointError("no checkpoint can be used. " + ". ".join(skipped))
        return None

    def load(self, step: int) -> Checkpoint:
        """Exactly this step. Raises CheckpointError with the steps that exist; never falls back to another one."""
        others = [other for other in self.steps() if other != step]
        listed = f"steps in {self.folder}: {', '.join(map(str, others)) or 'no others'}"
        if not self._place(step).is_dir():
            raise CheckpointError(f"there is no checkpoint of step {step}; {listed}")
        try:
            return read_checkpoint(self._place(step))
        except Damaged as error:
            raise CheckpointError(f"{error}; {listed}") from error

    def best(self) -> dict[str, Any] | None:
        """{"step", "metric", "value", "higher_is_better"} of the best checkpoint, or None."""
        try:
            found = from_json((self.folder / BEST).read_bytes())
            return found if isinstance(found.get("step"), int) and self._place(found["step"]).is_dir() else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as error:
            logger.warning("ignored %s: %s", self.folder / BEST, error)
            return None

    # writing

    def prepare(self) -> None:
        """Makes the folder, proves that it can be written, and clears what dead processes left. `save` calls it.

        Call it before the first step, so that a folder which cannot be written is an error at once.
        """
        if self._ready:
            return
        probe = self.folder / f".tmp-probe-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints to {self.folder}: {error.strerror}. "
                "Choose another run.dir, or change what is there"
            ) from error
        for entry in self.folder.iterdir():
            match = _TEMP.fullmatch(entry.name)
            if match and _is_stale(entry, int(match[1])):
                logger.info("removing %s, left by a run that died while saving", entry.name)
                shutil.rmtree(entry, ignore_errors=True)
        self._ready = True

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint, then retires old ones; returns its folder.

        tensors: group -> name -> tensor of any dtype and device. state: JSON values. After any failure the
        earlier checkpoints are untouched and nothing half-written is left. Raises CheckpointError.
        """
        self.prepare()
        target = self._free_place(step)
        needed = self._check_space(target, tensors)
        temp = self.folder / f".tmp-{step:08d}-{os.getpid()}"
        try:
            shutil.rmtree(temp, ignore_errors=True)  # our own pid: what an earlier container with the same pid left
            temp.mkdir()
            _write_folder(temp, step, tensors, state)
            faultpoint("synced")
            os.rename(temp, target)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temp, ignore_errors=True)
            raise self._write_error(error, target, needed) from error
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        faultpoint("renamed")
        self._retire()
        return target

    def rewind(self, step: int) -> None:
        """Moves checkpoints newer than `step` to set-aside/: a run that goes on from `step` makes its own."""
        for other in self.steps():
            if other > step:
                self._set_aside(other, f"the run goes on from step {step}")

    def mark_best(self, step: int, metric: str, value: float, higher_is_better: bool) -> bool:
        """Points best.json at `step` if `value` beats what it holds for the same metric; True if it did.

        best.json is a pointer, not a copy: retention keeps the folder that it names.
        """
        if step not in self.steps():
            raise CheckpointError(f"step {step} has no checkpoint to mark as best; steps: {self.steps()}")
        held = self.best()
        if value != value:
            return False
        if held is not None and held.get("metric") == metric and held.get("higher_is_better") == higher_is_better:
            better = value > held["value"] if higher_is_better else value < held["value"]
            if not better:
                return False
        record = {"step": step, "metric": metric, "value": float(value), "higher_is_better": higher_is_better}
        replace_file(self.folder / BEST, to_json(record, indent=1))
        return True

    # parts

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _free_place(self, step: int) -> Path:
        """The folder for `step`, after newer and damaged ones have been set aside; an existing one is an error."""
        if step < 0:
            raise CheckpointError(f"cannot save step {step}; steps count from 0")
        self.rewind(step)
        target = self._place(step)
        if target.is_symlink():
            raise CheckpointError(f"{target} is a symbolic link; checkpoints are not written through links")
        if os.path.lexists(target):
            try:
                read_checkpoint(target)
            except CheckpointError as error:
                self._set_aside(step, str(error))
            else:
                raise CheckpointError(
                    f"{target} exists and is never overwritten. To repeat this step, resume from an earlier one: "
                    "newer checkpoints are then set aside"
                )
        return target

    def _set_aside(self, step: int, why: str) -> None:
        held, place = self.best(), self._place(step)
        aside = self.folder / SET_ASIDE
        aside.mkdir(exist_ok=True)
        number, name = 1, place.name
        while os.path.lexists(aside / name):
            number += 1
            name = f"{place.name}-{number}"
        os.rename(place, aside / name)
        if held is not None and held["step"] == step:
            (self.folder / BEST).unlink(missing_ok=True)
        logger.warning("moved the checkpoint of step %d to %s/%s: %s", step, SET_ASIDE, name, why)

    def _check_space(self, target: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
        size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        steps = self.steps()
        last = listed_bytes(self._place(steps[-1])) if steps else 0
        needed = 2 * max(size, last)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"no room for {target}: {needed:,} bytes are needed (twice a checkpoint) and {free:,} are free. "
                "Free some space, lower train.keep, or choose another run.dir; earlier checkpoints are untouched"
            )
        return needed

    def _write_error(self, error: OSError, target: Path, needed: int) -> CheckpointError:
        free = shutil.disk_usage(self.folder).free
        what = "the disk is full" if error.errno in DISK_FULL else error.strerror or str(error)
        return CheckpointError(
            f"could not write {target}: {what} ({needed:,} bytes needed, {free:,} free). "
            "Earlier checkpoints are untouched"
        )

    def _retire(self) -> None:
        """Removes what retention does not keep. A failure is a warning: it is tried again after the next save."""
        steps = self.steps()
        sound = [step for step in steps if listed_bytes(self._place(step))]
        held = self.best()
        kept = set(sound[-self.keep :])
        kept |= {step for step in sound if self.keep_every and step % self.keep_every == 0}
        kept |= {held["step"]} if held else set()
        oldest = min(sound[-self.keep :], default=0)
        try:
            for step in steps:
                if step not in kept and step < oldest:
                    os.rename(self._place(step), self.folder / f".del-{step:08d}-{time.time_ns()}")
                    faultpoint("retiring")
            for entry in self.folder.glob(".del-*"):
                shutil.rmtree(entry)
        except OSError as error:
            logger.warning("could not remove an old checkpoint (%s); it will be tried again", error)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str, hint: str = "") -> None:
    """Loads `tensors` into `module`; every key and shape must fit, in both directions.

    what: names the module in the error ("system"). hint: appended to it, such as the configuration fields that
    differ. Raises CheckpointError naming the first five missing, unexpected and wrong-shape keys.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if missing or unexpected or shapes:
        found = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes}
        told = "; ".join(f"{title} ({len(names)}): {first(names)}" for title, names in found.items() if names)
        raise CheckpointError(
            f"the checkpoint does not fit the {what}: {told}. "
            f"Build it with the configuration of that run (its config.yaml){'. ' + hint if hint else ''}"
        )
    module.load_state_dict(dict(tensors), strict=True)


# writing one folder


def _write_folder(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    files: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}

    def put(name: str, data: bytes) -> None:
        write_file(folder / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        faultpoint("first-file" if len(files) == 1 else "file")

    for group, values in tensors.items():
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"{group!r} cannot name a file; use letters, digits, '_', '.' and '-'")
        unique, tied = _unshare(group, values)
        try:
            data = safetensors.torch.save(unique)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"cannot store the tensors of {group}: {error}") from error
        put(group + SUFFIX, data)
        groups[group] = {"file": group + SUFFIX, "tied": tied}
    try:
        put(STATE, to_json(dict(state), indent=1))
    except ValueError as error:
        raise CheckpointError(f"cannot store the state: {error}. Tensors belong in a group") from error
    write_file(folder / MANIFEST, seal({"schema": SCHEMA, "step": step, "files": files, "groups": groups}))
    faultpoint("manifest")
    sync_folder(folder)


def _unshare(group: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """CPU tensors that share no memory, and name -> kept name for those that were the very same tensor."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    same: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{group}.{name} is a {type(value).__name__}; groups hold tensors, state the rest")
        where = (value.device, value.untyped_storage().data_ptr(), value.storage_offset())
        key = (*where, tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in same:
            tied[name] = same[key]
            continue
        same[key] = name
        plain = value.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()  # a view of something already kept
        storages.add(plain.untyped_storage().data_ptr())
        kept[name] = plain
    return kept, tied


def _is_stale(temp: Path, pid: int) -> bool:
    if pid == os.getpid():  # in a container every run may have the same pid: then only its age tells
        return temp.stat().st_mtime < _STARTED
    return not is_alive(pid)
