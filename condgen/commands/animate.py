"""`condgen animate RUN PICTURE ... -o clip.mp4`: a clip that goes on from each picture."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condgen.commands import arguments
from condgen.commands.sample import sampler_options, written
from condgen.errors import ConfigError, DataError

if TYPE_CHECKING:
    from condgen.pipeline import Pipeline

CLIPS = (".mp4", ".webm", ".gif", ".avi")
OPTION = re.compile(r"[a-z_]+=")

EPILOG = """\
examples:
  condgen animate runs/NAME photo.png -o clip.mp4 --frames 32 --seed 0
  condgen animate runs/NAME photos/*.jpg -o clips/             one clip each, names kept
  condgen animate runs/NAME a.png b.png -o both.gif            side by side: each picture, and its clip
  condgen animate runs/NAME photo.png -o clip.mp4 --streams    also clip-foreground.mp4, -mask, -background
  condgen animate runs/NAME --past 0.png 1.png 2.png 3.png -o next.mp4
  condgen animate runs/VPN photo.png -o clip.mp4 temperature=0   options of the system's sampler: no noise

For runs that take an image or past frames and make clips. Pictures are stretched to the trained size. A run that takes
several past frames gets the picture repeated, as if nothing had moved, unless --past gives them. More frames than the
run was trained for are made by rolling forward: vpn goes on with what it remembers; with others the newest frames
become the next condition, and nothing older is remembered. Either way errors add up. OUT without a suffix is a folder;
with several pictures, a file shows them all.
"""


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("animate", "Clips from pictures with a trained run.", EPILOG)
    parser.add_argument("run", help="a run folder, an export folder, or owner/name on the Hugging Face Hub")
    parser.add_argument(
        "pictures",
        nargs="*",
        metavar="PICTURE",
        help="picture files, or quoted globs; key=value is an option of the sampler",
    )
    parser.add_argument("--past", nargs="+", action="append", metavar="FILE", help="past frames in order, of one clip")
    parser.add_argument("--actions", metavar="FILE", help=".npy (entries, A): of every clip, for runs that take them")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="a clip (.mp4 .webm .gif .avi), or a folder")
    parser.add_argument("--frames", type=int, default=0, help="of the clip (0 = as trained)")
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--text", help="a sentence, for runs that take one")
    parser.add_argument("--label", help="a class, by number or name, for runs that take one")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same clips (0)")
    parser.add_argument("--streams", action="store_true", help="also foreground, mask and background as clips")
    parser.add_argument(
        "--lossless", action="store_true", help="every pixel comes back; .mp4 then plays in few players"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto")
    given = parser.parse_intermixed_args(words)
    out = Path(given.out)
    if out.suffix and out.suffix.lower() not in CLIPS:
        raise ConfigError(f"-o {out}: give a clip that ends with {', '.join(CLIPS)}, or a folder without a suffix")
    options = [word for word in given.pictures if OPTION.match(word) and not os.path.exists(word)]
    sources, names = read_sources([word for word in given.pictures if word not in options], given.past or [])

    import condgen

    pipe = condgen.load(given.run, device=given.device, precision=given.precision)
    given.options = sampler_options(type(pipe.system), options)
    if "length" in given.options:
        raise ConfigError(f"length={given.options['length']}: say --frames {given.options['length']}")
    field = source_field(pipe, given.run)
    values: dict[str, Any] = {field: sources}
    label = given.label
    if label is not None:
        values["label"] = int(label) if label.lstrip("-").isdigit() else label
    if given.text is not None:
        values["text"] = given.text
    return make(pipe, values, names, out, given)


def read_sources(pictures: Sequence[str], past: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[str]]:
    """Lists of files, one list a clip, and the name of each clip. Raises ConfigError and DataError."""
    found: list[str] = []
    for word in pictures:
        matched = sorted(glob.glob(word)) if glob.has_magic(word) and not os.path.exists(word) else [word]
        found += matched or [word]
    if not found and not past:
        raise ConfigError("give one picture at least, or --past with the frames of one clip")
    sources = [[file] for file in found] + [list(files) for files in past]
    for file in (file for files in sources for file in files):
        if not os.path.isfile(file):
            raise DataError(f"there is no picture {file}")
    names, taken = [], set()
    for files in sources:
        stem, name, count = Path(files[-1]).stem, Path(files[-1]).stem, 1
        while name in taken:
            count += 1
            name = f"{stem}-{count}"
        taken.add(name)
        names.append(name)
    return sources, names


def source_field(pipe: Pipeline, run: str) -> str:
    """ "frames" or "image": what the clip goes on from. Raises ConfigError."""
    if not pipe.info.target.frames:
        raise ConfigError(f"{run} makes pictures; animate needs a run that makes clips, such as task=frame2video")
    for field in ("frames", "image"):
        if field in pipe.spec.given:
            return field
    takes = ", ".join(pipe.spec.given) or "no condition"
    raise ConfigError(f"{run} takes {takes}; animate needs a run that takes frames or an image. Use `condgen sample`")


def make(pipe: Pipeline, values: dict[str, Any], names: Sequence[str], out: Path, given: Any) -> int:
    from condgen.inference.animate import animate
    from condgen.inference.sample import sample_streams
    from condgen.systems.base import HasStreams

    field = "frames" if "frames" in values else "image"
    past = pipe.spec.frames.frames if pipe.spec.frames is not None else 1
    for files in values[field]:
        if len(files) > past:
            raise ConfigError(f"{len(files)} past frames; this run takes {past}")
        if given.actions is None:
            files[:0] = files[:1] * (past - len(files))  # a picture that has stood still so far
    if field == "image":
        values["image"] = [files[-1] for files in values["image"]]
    else:
        values["frames"] = arguments.with_actions(values["frames"], given.actions)
    asked = pipe.encode(pipe.condition(values))
    trained = pipe.info.target.frames
    frames = given.frames or trained
    overlap = field == "image" or bool(pipe.info.data.get("overlap"))
    clips = animate(
        pipe.system, asked, frames, overlap=overlap, seed=given.seed, batch_size=given.batch_size,
        precision=given.precision, **given.options,
    )  # fmt: skip
    if frames > trained:
        print(f"{frames} frames by rolling forward: the run was trained for {trained}, errors add up")
    write(pipe, clips, asked, names, out, given)
    if given.streams:
        if not isinstance(pipe.system, HasStreams):
            raise ConfigError(f"{pipe.info.system} makes its clips in one piece; leave --streams out")
        if frames > trained:
            raise ConfigError(f"--streams shows one trained length; leave --frames out (or give at most {trained})")
        parts = sample_streams(
            pipe.system, asked, seed=given.seed, ids=list(range(len(names))), batch_size=given.batch_size,
            precision=given.precision,
        )  # fmt: skip
        for name, part in parts.items():
            if name != "video":
                beside = out.with_name(f"{out.stem}-{name}{out.suffix}")
                write(pipe, part[:, :frames], asked, names, beside, given)
    return 0


def write(pipe: Pipeline, clips: Any, asked: Any, names: Sequence[str], out: Path, given: Any) -> None:
    """One clip as it is; several side by side in one file, or each in a folder of its own name."""
    from condgen.show.clips import grid_clip, write_clip

    options: dict[str, Any] = {"fps": given.fps, "lossless": given.lossless, "comment": pipe.info.attribution}
    if not out.suffix:
        for name, clip in zip(names, clips, strict=True):
            file = out / f"{name}.mp4"
            written(file, lambda file=file, clip=clip: write_clip(file, clip, **options))  # type: ignore[misc]
    elif len(clips) == 1:
        written(out, lambda: write_clip(out, clips[0], **options))
    else:
        grid = grid_clip(clips, asked, attribution=pipe.info.attribution, label_names=pipe.label_names)
        written(out, lambda: write_clip(out, grid, **options))
