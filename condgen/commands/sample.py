"""`condgen sample RUN`: pictures for what was asked, as one grid or as separate files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condgen import config as configuration
from condgen.commands import arguments
from condgen.config.schema import Option, convert, options_of_call, suggest
from condgen.errors import ConfigError, DataError
from condgen.systems.base import HasCompletion
from condgen.types import FIELDS

if TYPE_CHECKING:
    from condgen.pipeline import Pipeline, Samples

PICTURES = (".png", ".jpg", ".webp")
POINTS = ".json"
CLIPS = (".mp4", ".webm", ".gif")
CLIP_FPS = 8.0  # of samples; walks have 12

EPILOG = """\
examples:
  condgen sample runs/NAME --text "a red fox" --text "a blue car" --num 8 --seed 0 -o grid.png
  condgen sample runs/NAME --label animals-nature --boxes 0.1,0.1,0.6,0.6
  condgen sample runs/VIDEO --num 4 -o clips.mp4 --streams
  condgen sample runs/VPN --frames 0.png 1.png -o clips.mp4 temperature=0.9 length=20
  condgen sample runs/NAME --from conditions.jsonl --separate out/
  condgen sample runs/NAME --arithmetic "Coat - Shirt + Dress" -o sum.png
  condgen sample runs/NAME --arithmetic "s12,s40,s7 - s3 + s9"
  condgen sample runs/NAME --walk "Sandal .. Bag .. Sandal" --num 4 -o walk.mp4
  condgen sample KEYPOINT_RUN --text "a red fox" --keypoints some.json --num 4 -o points.json

A flag that is repeated gives one row of the grid each; a flag given once serves every row. Each line of
conditions.jsonl is an object with some of: text, label, boxes, keypoints, image, frames.
"""


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("sample", "Draw samples from a trained run.", EPILOG)
    parser.add_argument("run", help="a run folder, an export folder, or owner/name on the Hugging Face Hub")
    parser.add_argument("words", nargs="*", default=[], metavar="key=value", help="options of the system's sampler")
    parser.add_argument("--text", action="append", help="a sentence")
    parser.add_argument("--label", action="append", help="a class, by number or name")
    parser.add_argument("--boxes", action="append", metavar="X0,Y0,X1,Y1[;...]", help="boxes in [0, 1]")
    parser.add_argument("--keypoints", action="append", metavar="FILE", help='json: {"name": [x, y]} or [[x, y], ...]')
    parser.add_argument("--image", action="append", metavar="FILE", help="a source picture")
    parser.add_argument("--frames", nargs="+", metavar="FILE", help="past frames in order")
    parser.add_argument("--actions", metavar="FILE", help=".npy (entries, A): what goes with --frames")
    parser.add_argument("--from", dest="source", metavar="FILE", help="conditions, one json object a line")
    parser.add_argument("--style", action="append", metavar="FILE", help="a picture whose style is kept")
    parser.add_argument(
        "--arithmetic", metavar="'A - B + C'", help="labels, sample numbers (s12 or s12,s40,s7) or picture files"
    )
    parser.add_argument("--walk", metavar="'A .. B'", help="from one of them to the next; also cat@s3 .. dog@s7")
    parser.add_argument("--steps", type=int, help="of a walk, from stop to stop (8; 24 in a clip)")
    parser.add_argument("--fps", type=float, help="of a clip (8; a walk 12)")
    parser.add_argument("--streams", action="store_true", help="also foreground, mask and background, each in its file")
    parser.add_argument("--num", type=int, help="samples per row (8; 1 with --style; 9 sums; 1 walk)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures (0)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", metavar="FILE", help="the grid (samples.png); clips also .mp4 .webm .gif")
    parser.add_argument("--separate", metavar="FOLDER", help="one file per sample, and samples.jsonl")
    given = parser.parse_intermixed_args(words)

    out = Path(given.out or "samples.png")
    is_clip = given.arithmetic is None and out.suffix.lower() in CLIPS
    if out.suffix.lower() not in (*PICTURES, POINTS) and not is_clip:
        more = f"; clips and walks also {', '.join(CLIPS)}" if given.arithmetic is None else ""
        raise ConfigError(f"-o {out}: give a picture file that ends with {', '.join(PICTURES)}{more}")
    check_latent_flags(given, is_clip=is_clip)

    import condgen

    conditions = asked(given)
    pipe = condgen.load(given.run, device=given.device)
    if is_clip and given.walk is None and not pipe.info.target.frames:
        raise ConfigError(f"-o {out}: {given.run} makes pictures; give a file that ends with {', '.join(PICTURES)}")
    if isinstance(pipe.system, HasCompletion) and given.arithmetic is None and given.walk is None:
        return complete(pipe, given, conditions, out)
    if out.suffix.lower() == POINTS:
        raise ConfigError(f"-o {out}: only a run of keypoint_gan writes points; give {', '.join(PICTURES)}")
    if given.arithmetic is not None or given.walk is not None:
        return through_noise(pipe, given, conditions, out, is_clip=is_clip)
    options = sampler_options(type(pipe.system), given.words)
    num = given.num if given.num is not None else (1 if given.style else 8)
    style = given.style[0] if given.style and len(given.style) == 1 else given.style
    samples = pipe(**conditions, style=style, num=num, seed=given.seed, batch_size=given.batch_size, **options)
    trained = pipe.info.target.frames
    if samples.is_video and samples.pixels.shape[1] > trained:
        print(f"{samples.pixels.shape[1]} frames by rolling forward: the run was trained for {trained}, errors add up")
    if given.separate:
        paths = samples.save(given.separate)
        print(f"{len(paths)} samples and samples.jsonl in {given.separate}")
    if given.out or not given.separate:
        save_grid(samples, out, given.fps)
    if given.streams:
        for name, part in streams_of(pipe, samples, given.batch_size).items():
            save_grid(part, out.with_name(f"{out.stem}-{name}{out.suffix}"), given.fps)
    return 0


def save_grid(samples: Samples, out: Path, fps: float | None) -> None:
    """As a picture, or as a clip by the suffix."""
    if out.suffix.lower() not in CLIPS:
        written(out, lambda: samples.grid().save(out))
        return
    from condgen.show.clips import write_clip

    written(out, lambda: write_clip(out, samples.clip_grid(), fps=fps or CLIP_FPS, comment=samples.attribution))


def streams_of(pipe: Pipeline, samples: Samples, batch_size: int) -> dict[str, Samples]:
    """The parts that the samples were put together from, by name. Raises ConfigError for systems without."""
    from condgen.inference.sample import sample_streams
    from condgen.systems.base import HasStreams

    if not isinstance(pipe.system, HasStreams):
        raise ConfigError(f"{pipe.info.system} makes its samples in one piece; leave --streams out")
    parts = sample_streams(
        pipe.system, samples.conditions, seed=samples.seeds[0], ids=samples.ids, batch_size=batch_size,
        precision=pipe.precision,
    )  # fmt: skip
    return {name: replace(samples, pixels=part) for name, part in parts.items() if name != "video"}


def complete(pipe: Pipeline, given: argparse.Namespace, conditions: dict[str, Any], out: Path) -> int:
    """Keypoints as JSON for --keypoints of another run, and their layouts as a picture."""
    if given.style or given.separate:
        raise ConfigError("--style and --separate are for pictures; completed keypoints all go into one .json file")
    options = sampler_options(type(pipe.system), given.words, call="complete")
    made = pipe.complete(
        **conditions, num=1 if given.num is None else given.num, seed=given.seed, batch_size=given.batch_size, **options
    )  # fmt: skip
    points = out.with_suffix(POINTS)
    written(points, lambda: made.save(points))
    if out != points:
        written(out, lambda: made.grid().save(out))
    return 0


def check_latent_flags(given: argparse.Namespace, *, is_clip: bool) -> None:
    """Raises ConfigError for flags that a sum or a walk would ignore, or that need one."""
    asked_for = [name for name in ("arithmetic", "walk") if getattr(given, name) is not None]
    if len(asked_for) > 1:
        raise ConfigError("--arithmetic and --walk are two different pictures; ask for one at a time")
    if given.steps is not None and given.walk is None:
        raise ConfigError("--steps belongs to --walk")
    if given.fps is not None and not is_clip:
        raise ConfigError("--fps belongs to -o FILE.mp4 or another clip, of a run that makes clips or of --walk")
    if not asked_for:
        return
    for name, value in (
        ("separate", given.separate), ("style", given.style), ("from", given.source), ("streams", given.streams),
    ):  # fmt: skip
        if value:
            raise ConfigError(f"--{asked_for[0]} does not take --{name}")
    if given.words:
        raise ConfigError(f"--{asked_for[0]} decodes noise and takes no option of the sampler: {given.words[0]}")


def through_noise(
    pipe: Pipeline, given: argparse.Namespace, conditions: Mapping[str, Any], out: Path, *, is_clip: bool
) -> int:
    """--arithmetic and --walk: a picture, or the clip of a walk."""
    from condgen.commands.latents import arithmetic, walk

    rest: dict[str, Any] = {"seed": given.seed, "batch_size": given.batch_size}
    if given.num is not None:
        rest["num"] = given.num
    if given.arithmetic is not None:
        shown = arithmetic(pipe, given.arithmetic, conditions, **rest)
    else:
        steps = given.steps if given.steps is not None else (24 if is_clip else 8)
        shown = walk(pipe, given.walk, conditions, steps=steps, **rest)
    for line in shown.said:
        print(line)
    if is_clip:
        from condgen.show.clips import write_clip

        fps = 12 if given.fps is None else given.fps
        written(out, lambda: write_clip(out, shown.frames(), fps=fps, comment=shown.attribution))
    else:
        written(out, lambda: shown.grid().save(out))
    return 0


def written(out: Path, write: Callable[[], object]) -> None:
    """Writes `out` and prints its name. Raises ConfigError where the disk refuses."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another place with -o") from error
    print(out)


def asked(given: argparse.Namespace) -> dict[str, Any]:
    """Field -> one value, or a list of them, one per row."""
    out: dict[str, list[Any]] = {}
    for name in ("text", "label", "image"):
        out[name] = list(getattr(given, name) or [])
    out["boxes"] = [boxes(text) for text in given.boxes or []]
    out["keypoints"] = [_json(Path(path)) for path in given.keypoints or []]
    out["frames"] = arguments.with_actions([given.frames] if given.frames else [], given.actions)
    out["label"] = [int(value) if value.lstrip("-").isdigit() else value for value in out["label"]]
    found = {name: values for name, values in out.items() if values}
    if not given.source:
        return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
    if found:
        raise ConfigError(f"--from gives every field; leave out --{', --'.join(found)}")
    return from_lines(Path(given.source))


def boxes(text: str) -> list[list[float]]:
    """ "0,0,0.5,1;0.5,0,1,1" -> two boxes."""
    try:
        found = [[float(part) for part in one.split(",")] for one in text.split(";") if one.strip()]
    except ValueError:
        found = []
    if not found or any(len(box) != 4 for box in found):
        raise ConfigError(f"--boxes {text!r}: give four numbers in [0, 1], such as 0.1,0.1,0.6,0.6; boxes end with ';'")
    return found


def from_lines(path: Path) -> dict[str, Any]:
    """A jsonl file -> field -> list with one entry per line, None where a line leaves the field out."""
    rows = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        row = _parsed(line, f"{path}, line {number}")
        if not isinstance(row, Mapping) or not row:
            raise DataError(f'{path}, line {number}: expected an object such as {{"text": "a red fox"}}')
        for name in row:
            if name not in FIELDS:
                raise DataError(f"{path}, line {number}: unknown field {name!r}.{suggest(name, FIELDS)}")
        rows.append({name: _beside(path, name, value) for name, value in row.items()})
    if not rows:
        raise DataError(f"{path} holds no condition")
    return {name: [row.get(name) for row in rows] for name in FIELDS if any(name in row for row in rows)}


def _beside(source: Path, name: str, value: Any) -> Any:
    """Picture files are named relative to the file that lists them."""
    if name == "image" and isinstance(value, str):
        return str(source.parent / value)
    if name == "frames" and isinstance(value, Mapping):
        return {**value, "pixels": _beside(source, name, value.get("pixels"))}
    return [str(source.parent / one) for one in value] if name == "frames" and isinstance(value, list) else value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _json(path: Path) -> Any:
    return _parsed(_text(path), str(path))


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not JSON: {error}") from None


def sampler_options(system: type, words: Sequence[str], *, call: str = "sample") -> dict[str, Any]:
    """`key=value` words as keyword options of the system's `sample` (or `complete`), checked against its signature."""
    known: dict[str, Option] = options_of_call(getattr(system, call), without=("random",))
    out = {}
    for name, value in configuration.read_words(words).tree.items():
        if name not in known:
            options = ", ".join(known) or "none"
            raise ConfigError(
                f"the sampler of this system has no option {name!r}.{suggest(name, known)} It has: {options}"
            )
        out[name] = convert(name, value, known[name])
    return out
