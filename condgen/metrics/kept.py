"""Small judges on disk: `<stem>.safetensors` and `<stem>.json` with its hash, in a folder that appears at once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from condgen.errors import CheckpointError

Judge = TypeVar("Judge", bound=nn.Module)


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


def _bytes(network: nn.Module) -> bytes:
    return save_tensors({n: t.detach().cpu().contiguous() for n, t in sorted(network.state_dict().items())})
