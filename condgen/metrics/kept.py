"""Small judges on disk: `<stem>.safetensors` and `<stem>.json` with its hash, in a folder that appears at once.

Also features of pictures that are scored again and again: one file a set, named by what is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from condgen.errors import CheckpointError

Judge = TypeVar("Judge", bound=nn.Module)
MOST_SETS = 24  # of features; the oldest goes when one more is kept


def write(folder: Path, stem: str, network: nn.Module, about: Mapping[str, Any]) -> None:
    """Weights and `about` (JSON); a folder that is there already is replaced."""
    weights = _bytes(network)
    text = json.dumps({**about, "sha256": hashlib.sha256(weights).hexdigest()}, indent=1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{stem}-") as made:
        inside = Path(made) / "ready"
        inside.mkdir()
        (inside / f"{stem}.safetensors").write_bytes(weights)
        (inside / f"{stem}.json").write_text(text, encoding="utf-8")
        if folder.exists():
            os.replace(folder, Path(made) / "old")
        os.replace(inside, folder)


def read(folder: Path, stem: str, make: Callable[[Mapping[str, Any]], Judge]) -> tuple[Judge, dict[str, Any]]:
    """The network that `make` builds from what was written as `about`, with its weights; and `about`.

    Raises CheckpointError for missing, damaged or unfit files.
    """
    try:
        about = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        weights = (folder / f"{stem}.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() != about["sha256"]:
            raise CheckpointError(f"{folder}: the weights do not match their sha256; delete the folder to retrain")
        network = make(about)
        network.load_state_dict(load_tensors(weights))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder} holds no readable {stem} ({error}); delete it to retrain") from error
    return network, about


def fingerprint(network: nn.Module) -> str:
    """Hash of every weight: two judges with the same one give the same numbers."""
    return hashlib.sha256(_bytes(network)).hexdigest()[:12]


def name_of(pictures: Tensor, network: str) -> str:
    """What the features of uint8 pictures under a network are called: no other pictures or network have this name."""
    digest = hashlib.sha256(f"{network}|{tuple(pictures.shape)}|".encode())
    for part in pictures.split(1024):
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def read_features(folder: Path, name: str, count: int) -> Tensor | None:
    """Features (count, d) kept under this name; None where there are none, or damaged ones."""
    with suppress(OSError, SafetensorError, ValueError, KeyError):
        held = load_tensors((folder / f"{name}.safetensors").read_bytes())["features"]
        if held.dim() == 2 and len(held) == count and bool(torch.isfinite(held).all()):
            return held
    return None


def write_features(folder: Path, name: str, features: Tensor) -> None:
    """Keeps features (N, d). A disk that is full or closed keeps nothing, and nothing else happens."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".features-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save_tensors({"features": features.contiguous()}))
            os.replace(temporary, folder / f"{name}.safetensors")
        finally:
            Path(temporary).unlink(missing_ok=True)
        held = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        for path in held[:-MOST_SETS]:
            path.unlink(missing_ok=True)


def _bytes(network: nn.Module) -> bytes:
    return save_tensors({n: t.detach().cpu().contiguous() for n, t in sorted(network.state_dict().items())})
