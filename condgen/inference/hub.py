"""Export folders on the Hugging Face Hub: fetched as JSON and safetensors only, pushed with a model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile
from typing import Any

from condgen.errors import CheckpointError
from condgen.inference.export import CONFIG, WEIGHTS, ExportInfo, is_export, read_config, read_export
from condgen.inference.prompt import HOW

ALLOWED = ("*.json", "*.safetensors")
CARD, PICTURE = "README.md", "samples.png"


def fetch_export(repo: str, revision: str | None = None) -> Path:
    """The local copy of a Hub repository's export. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(ALLOWED)))
    except Exception as error:  # the client raises many kinds: no network, no such repository, no access
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"there is no folder {repo} here, and it could not be fetched from the Hugging Face Hub{at}: "
            f"{type(error).__name__}: {error}"
        ) from error


def push_to_hub(
    path: Path | str, repo: str, *, private: bool = True, revision: str | None = None, message: str = ""
) -> str:
    """Uploads the export of a run (or an export folder) with a model card; returns the commit's address.

    The export is verified first. A README.md in the export folder is used as the card, otherwise one is written
    from the run. Needs a login (`hf auth login`).
    """
    from huggingface_hub import HfApi

    path = Path(path)
    export = path / "export" if is_export(path / "export") else path
    info, _ = read_export(export)
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as staged:
        folder = Path(staged)
        for name in (CONFIG, WEIGHTS):
            copyfile(export / name, folder / name)
        picture = newest_picture(path)
        if picture is not None:
            copyfile(picture, folder / PICTURE)
        own = export / CARD
        card = own.read_text(encoding="utf-8") if own.is_file() else model_card(info, repo, path, picture is not None)
        (folder / CARD).write_text(card, encoding="utf-8")
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message or f"condgen: step {info.step}"
        )
    return str(done)


def newest_picture(run: Path) -> Path | None:
    """The newest grid of samples of a run, if there is one."""
    found = sorted((run / "samples").glob("*.png")) if (run / "samples").is_dir() else []
    return found[-1] if found else None


def model_card(info: ExportInfo, repo: str, run: Path | None = None, picture: bool = False) -> str:
    """Markdown with what a reader needs: what it makes, from what, how to use it, how it scored, whose data."""
    tags = ["condgen", info.system, *([info.task] if info.task else []), *info.condition.given]
    parts = [
        "---\nlibrary_name: condgen\n" + "tags:\n" + "".join(f"- {json.dumps(tag)}\n" for tag in tags) + "---\n",
        f"# {repo.split('/')[-1]}\n",
        f"A `{info.system}` generator trained with condgen {info.version} for {info.step:,} steps. "
        f"It makes {_size(info)} from {_fields(info)}.\n",
    ]
    if picture:
        parts.append(f"![samples]({PICTURE})\n")
    call = ", ".join(HOW[name] for name in info.condition.given)
    call = f"{call}, seed=0" if call else "seed=0"
    parts.append(
        "## Use\n\n```python\nimport condgen\n\n"
        f'pipe = condgen.load("{repo}")\npipe({call}).images[0].save("sample.png")\n```\n'
    )
    rows = list(_facts(info))
    parts.append("## Facts\n\n| | |\n| --- | --- |\n" + "".join(f"| {k} | {v} |\n" for k, v in rows))
    scores = list(_scores(run)) if run is not None else []
    if scores:
        table = "".join(f"| {name} | {value} | `{signature}` |\n" for name, value, signature in scores)
        parts.append("## Scores\n\n| score | value | signature |\n| --- | --- | --- |\n" + table)
    if info.attribution:
        parts.append(f"## Data\n\n{_plain(info.attribution)}\n")
    return "\n".join(parts)


def _size(info: ExportInfo) -> str:
    target = info.target
    size = f"{target.width} x {target.height}"
    return f"clips of {target.frames} frames of {size}" if target.frames else f"pictures of {size}"


def _fields(info: ExportInfo) -> str:
    return ", ".join(info.condition.given) or "noise alone"


def _facts(info: ExportInfo) -> Iterator[tuple[str, str]]:
    yield "system", f"`{info.system}`"
    yield "options", _plain(", ".join(f"{k}={v}" for k, v in info.options.items())) or "defaults"
    if info.data.get("name"):
        yield "data set", _plain(str(info.data["name"]))
    if info.text.get("encoder"):
        yield "text encoder", _plain(f"{info.text['encoder']} ({info.text.get('fingerprint', 'no fingerprint')})")
    names = info.label_names
    if names:
        yield "labels", _plain(", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else ""))
    yield "weights", "exponential moving average, safetensors"


def _scores(run: Path) -> Iterator[tuple[str, str, str]]:
    """(name, value, signature) from RUN/eval/*.json; files of another shape are left out."""
    for path in sorted((run / "eval").glob("*.json")):
        try:
            data: Any = read_config(path)
        except CheckpointError:
            continue
        for score in data.get("scores", [data]):
            if isinstance(score, dict) and isinstance(score.get("value"), int | float) and score.get("name"):
                yield _plain(str(score["name"])), f"{score['value']:.4g}", _plain(str(score.get("signature", "")))


def _plain(text: str) -> str:
    """One line that cannot break out of a table cell."""
    return " ".join(text.split()).replace("|", "/").replace("`", "'")
