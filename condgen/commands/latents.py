"""Sums and walks with a loaded system: what `condgen sample --arithmetic` and `--walk` show.

Sums of samples or pictures are sums of noise, as Radford et al. 2015 (arXiv:1511.06434, section 6.3.2) have them:
each term is the mean noise of its samples (three are steadier than one), and the result stands beside eight
neighbours at +-0.25. Sums of labels are sums in the condition, with the same noise in each column: what a class means
lies in its condition and not in the noise, whose mean over the samples of any class is that of the prior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PilImage
from torch import Tensor

from condgen.errors import ConfigError
from condgen.inference import latent, prompt
from condgen.inference.sample import checked, sampling
from condgen.inference.terms import Term, parse_sum, parse_walk
from condgen.pipeline import Pipeline
from condgen.show.drawing import draw_grid
from condgen.show.pictures import enlarge, to_rgb
from condgen.systems.base import HasDecoder
from condgen.types import Condition, Text

NAMED = ("label", "text")  # fields whose values have a sum and a midpoint
FRAME = 256  # px of the longer side of a video frame, at least


@dataclass(frozen=True)
class Shown:
    """Rows of pictures (rows, columns, C, H, W) with what each row is, and lines to print.

    result   (n, C, H, W) of a sum; of a walk the clips are the rows
    """

    pictures: Tensor
    captions: tuple[str, ...]
    result: Tensor
    said: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    attribution: str = ""

    def grid(self, **options: Any) -> PilImage.Image:
        names = Condition(text=Text(strings=self.captions)) if any(self.captions) else None
        given: dict[str, Any] = {"column_names": self.columns or (" ",), "attribution": self.attribution, **options}
        return draw_grid(self.pictures, names, **given)

    def frames(self) -> list[Tensor]:
        """Walks: one uint8 (3, H, W) picture a time step, rows side by side, enlarged by whole numbers."""
        least = max(96, FRAME // len(self.pictures))
        return [
            _sheet([enlarge(to_rgb(row[t]), least) for row in self.pictures]) for t in range(self.pictures.shape[1])
        ]


def arithmetic(
    pipe: Pipeline, text: str, given: Mapping[str, Any], *, num: int = 9, seed: int = 0, batch_size: int = 16
) -> Shown:
    """ "A - B + C": one row of pictures a term, then the result. See the head of this file for what is summed.

    given   the fields of the condition that `text` does not name, one value each
    num     labels: noises, one a column; samples and pictures: the result and num - 1 neighbours
    """
    decoder(pipe)
    if num < 1:
        raise ConfigError(f"--num {num}: give at least 1")
    terms = parse_sum(text, pipe.label_names)
    signs = [term.sign for term in terms]
    latent.weighted_sum(torch.zeros(len(signs)), signs)  # says at once what is wrong with the signs
    shown = [Path(term.text).name if term.kind == "picture" else term.text for term in terms]
    captions = [("- " if t.sign < 0 else "+ " if i else "") + shown[i] for i, t in enumerate(terms)]
    captions.append("= " + " ".join(captions))
    said: tuple[str, ...] = ()
    if terms[0].kind == "named":
        z = latent.draw(decoder(pipe), range(num), seed=seed)
        stops = named(pipe, terms, given)
        total = sum(signs)
        weights = torch.cat([torch.eye(len(terms)), torch.tensor([[sign / total for sign in signs]])])
        asked = blend(stops, weights).repeat(num)
        rows = decode(pipe, z.repeat(len(weights), 1), asked, batch_size).unflatten(0, (len(weights), num))
        result = rows[-1]
    else:
        condition = pipe.encode(pipe.condition(given))
        if len(condition) > 1:
            raise ConfigError("--arithmetic over samples or pictures takes one condition; give each field once")
        found = [noise_of(pipe, term, condition, seed=seed) for term in terms]
        said = tuple(one.said for one in found if one.said)
        sum_z = latent.weighted_sum(torch.stack([one.mean for one in found]), signs)
        around = latent.neighbours(sum_z, num, seed=seed)
        if decoder(pipe).noise == "uniform":
            around = around.clamp(-1, 1)  # G knows no noise beyond
        result = decode(pipe, around, condition, batch_size)
        each = [torch.cat([one.beside, decode(pipe, one.latents, condition, batch_size)]) for one in found]
        rows = _padded([*each, result])
    return Shown(rows, tuple(captions), result, said, attribution=pipe.info.attribution)


def walk(
    pipe: Pipeline, text: str, given: Mapping[str, Any], *, num: int = 1, seed: int = 0, steps: int = 8,
    batch_size: int = 16,
) -> Shown:  # fmt: skip
    """ "A .. B .. C": from stop to stop in `steps` steps. One row for each of `num` noises.

    Labels and sentences go in straight lines between their conditions with the noise held, samples and pictures on
    the sphere (normal noise) or in straight lines (uniform noise) with the condition held; "cat@s3 .. dog@s7" does
    both.
    """
    decoder(pipe)
    if num < 1:
        raise ConfigError(f"--num {num}: give at least 1")
    stops = parse_walk(text, pipe.label_names)
    own_noise = bool(stops[0].ids) or stops[0].kind == "picture"
    if own_noise and num > 1:
        raise ConfigError(f"--walk {text!r} names its noise, so every row would be the same; leave --num out")
    weights = latent.path(torch.eye(len(stops)), steps, noise="uniform")
    said: tuple[str, ...] = ()
    if stops[0].kind == "named":
        asked = blend(named(pipe, stops, given), weights)
    else:
        condition = pipe.encode(pipe.condition(given))
        if len(condition) > 1:
            raise ConfigError("--walk between samples or pictures takes one condition; give each field once")
        asked = condition.repeat(len(weights)) if len(condition) else condition
    if own_noise:
        one = asked.index([0]) if len(asked) else asked
        found = [noise_of(pipe, stop, one, seed=seed) for stop in stops]
        said = tuple(f.said for f in found if f.said)
        z = latent.path(torch.stack([f.mean for f in found]), steps, noise=decoder(pipe).noise)
    else:
        z = latent.draw(decoder(pipe), range(num), seed=seed).repeat_interleave(len(weights), dim=0)
        asked = asked.index(torch.arange(len(weights)).repeat(num))
    clips = decode(pipe, z, asked, batch_size).unflatten(0, (num, len(weights)))
    marks = [stops[t // steps].text if t % steps == 0 else " " for t in range(len(weights))]
    return Shown(clips, ("",) * num, clips[0], said, tuple(marks), pipe.info.attribution)


def decoder(pipe: Pipeline) -> HasDecoder:
    """The system, if it makes pictures of noise that can be added and walked through. Raises ConfigError."""
    if not isinstance(pipe.system, HasDecoder) or pipe.info.target.frames:
        raise ConfigError(
            f"{pipe.info.system} has no noise that one could add or walk through; systems with `draw` and `decode` "
            "have (acgan, gan_cls)"
        )
    return pipe.system


def named(pipe: Pipeline, terms: Sequence[Term], given: Mapping[str, Any]) -> Condition:
    """One row a term, the field that `terms` name as soft label or sentence vector. Raises ConfigError."""
    open_fields = [name for name in NAMED if getattr(pipe.spec, name) is not None and name not in given]
    if not open_fields:
        raise ConfigError(
            f"{terms[0].text!r} is no sample number (s12) or picture file, and this system has no label or sentence "
            "left to name; leave --label or --text out, or use samples"
        )
    if len(open_fields) > 1:
        raise ConfigError("terms could be labels or sentences here; give the other one with --label or --text")
    (name,) = open_fields
    values: list[Any] = [term.text for term in terms]
    if name == "label":
        values = [int(v) if v.isdigit() and v not in pipe.label_names else v for v in values]
    condition = pipe.encode(pipe.condition({**given, name: values}))
    if len(condition) != len(terms):
        raise ConfigError("give each other field of the condition once")
    if name == "label" and condition.label is not None:
        assert pipe.spec.label is not None
        return replace(condition, label=F.one_hot(condition.label, pipe.spec.label.num_classes).float())
    text = condition.text
    assert text is not None and pipe.spec.text is not None
    if text.pooled is None or pipe.spec.text.tokens:
        raise ConfigError("sentences as lists of words have no sum; only systems that take one vector a sentence do")
    return condition


def blend(stops: Condition, weights: Tensor) -> Condition:
    """Rows weights (R, S) @ stops (S rows): soft labels and sentence vectors are mixed, other fields are row 0's."""
    out = stops.index(torch.zeros(len(weights), dtype=torch.int64))
    if stops.label is not None and stops.label.is_floating_point():
        out = replace(out, label=weights @ stops.label)
    if stops.text is not None and stops.text.pooled is not None:
        out = replace(out, text=Text(pooled=weights @ stops.text.pooled))
    return out


class Noise(NamedTuple):
    """Of a term: what is summed (Z,), what is shown (n, Z), the source picture (0 or 1, C, H, W), a line to print."""

    mean: Tensor
    latents: Tensor
    beside: Tensor
    said: str = ""


def noise_of(pipe: Pipeline, term: Term, condition: Condition, *, seed: int) -> Noise:
    """The noise of a term: the mean of its samples' draws (shown with each of them), or a picture's projection."""
    target = pipe.info.target
    none = torch.empty(0, *target.shape)
    if term.kind != "picture":
        each = latent.draw(decoder(pipe), term.ids, seed=seed)
        mean = each.mean(0)
        return Noise(mean, torch.cat([mean[None], each]) if len(each) > 1 else each, none)
    source = prompt.read_picture(term.text, target.channels, (target.height, target.width))[None]
    found = latent.project(pipe.system, source, condition, seed=seed)
    said = (
        f"{term.text}: projected in {latent.PROJECTION_STEPS} steps, error {float(found.error[0]):.3f} "
        "(root mean square, pixels in [-1, 1]); what follows starts from what the system can draw of it"
    )
    return Noise(found.latent[0], found.latent, source, said)


def decode(pipe: Pipeline, z: Tensor, condition: Condition, batch_size: int) -> Tensor:
    """Noise (n, Z) -> float32 (n, C, H, W) on the CPU; a condition of one row serves all."""
    system, out = decoder(pipe), []
    if len(condition) == 1:
        condition = condition.repeat(len(z))
    for part in (slice(start, start + batch_size) for start in range(0, len(z), batch_size)):
        with sampling(pipe.system, pipe.precision) as device:
            asked = condition.index(range(*part.indices(len(z)))) if len(condition) else condition
            made = system.decode(z[part].to(device), asked.to(device))
        out.append(checked(made, (len(z[part]), *pipe.info.target.shape)))
    return torch.cat(out)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different length, filled with white."""
    wide = max(map(len, rows))
    return torch.stack([torch.cat([r, torch.ones(wide - len(r), *r.shape[1:])]) for r in rows])


def _sheet(pictures: Sequence[PilImage.Image]) -> Tensor:
    """A near-square field of equal pictures -> uint8 (3, H, W)."""
    wide = int(np.ceil(len(pictures) ** 0.5))
    width, height = pictures[0].size
    sheet = PilImage.new("RGB", (wide * width, -(-len(pictures) // wide) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % wide * width, i // wide * height))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
