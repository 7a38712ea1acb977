"""Using a trained system: `condgen.load(path)` and what it returns.

    pipe = condgen.load("runs/NAME")
    pipe(text="a red fox", seed=0).images[0].save("fox.png")

No data set, tracker, GPU or network is needed. A run folder, an export folder or a name on the Hub will do.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from condgen import registry
from condgen.errors import CheckpointError, ConfigError
from condgen.inference import prompt
from condgen.inference.completed import Completed
from condgen.inference.export import CONFIG, ExportInfo, is_export, make_system, read_config, read_export
from condgen.inference.result import Samples
from condgen.inference.sample import PRECISIONS, checked, sample_rows, sampling
from condgen.rng import RowRandom
from condgen.systems.base import HasCompletion, HasLatent, System
from condgen.types import Condition, ConditionSpec, Text, TextSpec

if TYPE_CHECKING:
    from condgen.conditions.text_encoders import TextEncoder

__all__ = ["Pipeline", "Samples", "choose_device", "find_weights", "load"]

logger = logging.getLogger(__name__)

SYSTEM = "system.json"  # RUN/system.json: an ExportInfo, written when training starts


def load(
    path: Path | str,
    *,
    device: str = "auto",
    precision: str = "fp32",
    revision: str | None = None,
    encoder: TextEncoder | None = None,
    check_encoder: bool = True,
) -> Pipeline:
    """A trained system, ready to sample.

    path           a run folder (its export, or its newest checkpoint when there is no export yet), an export
                   folder, RUN/checkpoints/step-N or RUN/checkpoints/best, or "owner/name" on the Hugging Face
                   Hub when no such path exists here
    device         "auto" = a GPU if there is one, otherwise the CPU
    precision      "fp32" = reproducible; "bf16" = faster where the hardware has it; "fp16" = on a GPU
    revision       branch, tag or commit on the Hub
    encoder        a text encoder to use in place of the one that the export names
    check_encoder  False: warn, instead of stopping, when the text encoder is not the one of the training
    Raises CheckpointError and ConfigError.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose {' or '.join(PRECISIONS)}")
    folder = Path(path).expanduser()
    # runs/typo is a local path: it must not go to the network
    if not folder.exists() and not folder.parent.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)):
        from condgen.inference.hub import fetch_export

        folder = fetch_export(str(path), revision)
    found = find_weights(folder)
    _refuse_own_code(found.info.system, folder)
    system = make_system(found.info, found.tensors, found.source, whole=found.whole).to(choose_device(device))
    return Pipeline(
        found.info, system, precision=precision, source=found.source, encoder=encoder, check_encoder=check_encoder
    )


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:1", "mps" -> a device that exists. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here ({error}); try device='auto'") from error
    return device


class Found(NamedTuple):
    """A described system and its weights; whole: also those that sampling does not need."""

    info: ExportInfo
    tensors: dict[str, Tensor]
    source: str
    whole: bool


def find_weights(folder: Path) -> Found:
    """What a run folder or an export folder holds. Raises CheckpointError."""
    if folder.parent.name == "checkpoints":
        return _from_checkpoint(folder.parent.parent, folder.name)
    if not folder.is_dir():
        raise CheckpointError(f"there is no run or export folder at {folder}; give runs/NAME or owner/name on the Hub")
    for export in (folder / "export", folder):
        if is_export(export):
            return Found(*read_export(export), str(export), whole=False)
    if (folder / "checkpoints").is_dir():
        return _from_checkpoint(folder)
    if (folder / CONFIG).is_file():
        read_export(folder)  # says what is missing
    raise CheckpointError(f"{folder} holds neither an export nor checkpoints; give the folder of a training run")


def _from_checkpoint(run: Path, name: str = "latest") -> Found:
    """Averaged weights of a checkpoint: "latest" (the newest valid one), "best" or step-N."""
    from condgen.engine.checkpoint import CheckpointStore

    store = CheckpointStore(run / "checkpoints")
    if name == "latest":
        checkpoint = store.latest()
    else:
        digits = name.removeprefix("step-")
        best = store.best() if name == "best" else None
        if best is None and not digits.isdigit():
            raise CheckpointError(
                f"{store.folder / name} is no checkpoint; there are steps {store.steps()}"
                + ("; best needs train.best=METRIC while training" if name == "best" else "")
            )
        checkpoint = store.load(int(digits) if best is None else best["step"])
    if checkpoint is None:
        raise CheckpointError(f"{run} has no export and no valid checkpoint yet; train it first")
    if not (run / SYSTEM).is_file():
        raise CheckpointError(
            f"{run} has no export and no {SYSTEM} that describes its system; finish or resume the run"
        )
    info = ExportInfo.from_dict(read_config(run / SYSTEM), str(run / SYSTEM))
    info = replace(info, step=checkpoint.step)
    merged = checkpoint.tensors("system")
    averaged = "ema" in checkpoint.groups
    if averaged:
        merged |= checkpoint.tensors("ema")
    source = f"{checkpoint.path} ({'averaged' if averaged else 'raw'} weights of step {checkpoint.step})"
    if name == "latest":
        logger.warning("%s has no export yet; using %s", run, source)
    return Found(info, merged, source, whole=True)


def _refuse_own_code(system: str, folder: Path) -> None:
    """A project folder's systems are code. They may not come with the weights that somebody sent."""
    code = registry.path("systems", system).resolve()
    if is_export(folder) and code.is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{folder} brings its own code ({code.name}), which is not run; "
            "change to another folder, and copy the system into your project if you trust it"
        )


@dataclass
class Pipeline:
    """A loaded system. Call it with what you want to see."""

    info: ExportInfo
    system: System
    precision: str = "fp32"
    source: str = ""
    encoder: TextEncoder | None = None
    check_encoder: bool = True
    _encoder_checked: bool = field(default=False, repr=False)

    @property
    def spec(self) -> ConditionSpec:
        return self.info.condition

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.info.label_names

    def __repr__(self) -> str:
        asks = ", ".join(prompt.HOW[name] for name in self.spec.given) or "no condition"
        size = "x".join(map(str, self.info.target.shape))
        return f"<condgen pipeline: {self.info.system} -> {size}; takes {asks}; from {self.source}>"

    def __call__(
        self,
        *,
        text: str | Sequence[str | None] | None = None,
        label: Any = None,
        boxes: Any = None,
        keypoints: Any = None,
        image: Any = None,
        frames: Any = None,
        condition: Condition | None = None,
        style: Any = None,
        num: int | None = None,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> Samples:
        """Samples of every prompt: `num` each, ordered prompt by prompt.

        Fields take one value or a list (see `condgen.inference.prompt`); labels also by name. `condition` gives
        rows as a record instead. A field that the system was not trained with is an error, and so is a missing
        one unless it was trained with fields left out.

        num    samples per prompt (1)
        seed, ids   sample ids are 0..num-1 within every prompt, or `ids`; the same (condition, seed, id) gives
               the same picture whatever num, batch_size and the other prompts are
        style  a picture (or one per prompt) whose style is kept, for systems that can encode pictures
        options     keyword options of the system's sampler
        Raises ConfigError, DataError and ShapeError.
        """
        values = {"text": text, "label": label, "boxes": boxes, "keypoints": keypoints, "image": image}
        given = {k: v for k, v in {**values, "frames": frames}.items() if v is not None}
        if not isinstance(self.system, System):
            raise ConfigError(f"{self.info.system} completes keypoints and makes no pictures; call .complete(...)")
        drawn = list(ids) if ids is not None else list(range(1 if num is None else num))
        if not drawn or (num is not None and num != len(drawn)):
            raise ConfigError(f"num={num} with {len(drawn)} ids; ask for at least one sample, with one id each")
        prompts = self.encode(self.condition(given, condition))
        if style is not None:
            prompts, styles = self._styles(prompts, style)
            if len(drawn) > 1:
                raise ConfigError("style fixes the noise, so every sample would be the same; leave num and ids out")
        count = max(len(prompts), 1) if style is None else len(styles)
        rows = prompts.repeat(len(drawn)) if len(prompts) else prompts
        row_ids = drawn * count
        if style is not None:
            pixels = self._restyle(rows, styles, batch_size)
        else:
            pixels = sample_rows(
                self.system, rows, seed=seed, ids=row_ids, batch_size=batch_size, precision=self.precision, **options
            )
        seeds = (seed,) * len(row_ids)
        return Samples(pixels, rows, seeds, tuple(row_ids), count, self.label_names, self.info.attribution)

    def complete(
        self,
        *,
        text: str | Sequence[str] | None = None,
        keypoints: Any = None,
        num: int = 1,
        seed: int = 0,
        threshold: float = 0.5,
        batch_size: int = 256,
        **more: Any,
    ) -> Completed:
        """All keypoints from a sentence and some of them, `num` completions per prompt; for `keypoint_gan`.

        keypoints   as in a call, with None or nothing for points to be drawn; left out = all of them
        threshold   of a drawn point's visibility, above which it counts as visible
        more        other condition fields of the training
        Completion i of (seed, condition) is the same whatever num and batch_size are. Raises ConfigError.
        """
        if not isinstance(self.system, HasCompletion):
            raise ConfigError(f"{self.info.system} does not complete keypoints; load a run of keypoint_gan")
        if num < 1 or batch_size < 1:
            raise ConfigError(f"num={num}, batch_size={batch_size}: both must be at least 1")
        given = {**more, "text": text, "keypoints": {} if keypoints is None else keypoints}
        prompts = self.encode(self.condition({k: v for k, v in given.items() if v is not None}))
        rows, ids = prompts.repeat(num), list(range(num)) * len(prompts)
        parts = []
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            with sampling(self.system, self.precision) as device:
                random = RowRandom(seed, ids[part], device)
                done = self.system.complete(rows.index(part).to(device), random=random, threshold=threshold)
            parts.append(Condition(keypoints=done).to("cpu"))
        made = Condition.cat(parts).keypoints
        assert made is not None and self.spec.keypoints is not None
        return Completed(made, rows, len(prompts), self.spec.keypoints.names, self.info.attribution)

    def condition(self, values: Mapping[str, Any], condition: Condition | None = None) -> Condition:
        """One row per prompt, checked against what the system was trained with; text not yet encoded."""
        requires = self.system.requires
        if condition is None:
            prompt.check_fields(self.spec, list(values), requires, self.info.system)
            if not self.spec.given:
                return Condition()
            return prompt.build_condition(self.spec, values, label_names=self.label_names, required=requires)
        if values:
            raise ConfigError(f"give either condition= or {', '.join(values)}, not both")
        prompt.check_fields(self.spec, condition.given, requires, self.info.system)
        missing = self.spec.only([n for n in self.spec.given if n not in condition.given])
        if not missing.given or not len(condition):
            return condition
        nothing = prompt.build_condition(missing, {}).repeat(len(condition))
        absent: dict[str, Any] = dict(nothing.items())
        return replace(condition, **absent, present={**condition.present, **nothing.present})

    # text

    def encode(self, condition: Condition) -> Condition:
        """Strings become embeddings; embeddings that are there already stay, and absent text needs no encoder."""
        text, spec = condition.text, self.spec.text
        if text is None or spec is None or text.pooled is not None or text.tokens is not None:
            return condition
        present = condition.is_present("text").tolist()
        assert text.strings is not None
        wanted = list(dict.fromkeys(s for s, given in zip(text.strings, present, strict=True) if given))
        encoded = _no_text(spec, 1)  # row 0: what absent text holds
        if wanted:
            encoded = _join(encoded, self.text_encoder().encode(wanted), spec)
        at = torch.tensor([1 + wanted.index(s) if g else 0 for s, g in zip(text.strings, present, strict=True)])
        return replace(condition, text=replace(encoded.index(at), strings=text.strings))

    def text_encoder(self) -> TextEncoder:
        """The encoder of the training, loaded on first use and compared with the stored fingerprint."""
        stated = self.info.text
        if self.encoder is None:
            from condgen.conditions.text_encoders import text_encoder

            spec = self.spec.text
            name = stated.get("encoder") or (spec.encoder if spec is not None else "")
            if not name:
                raise ConfigError(f"{self.source} names no text encoder; pass condgen.load(..., encoder=...)")
            self.encoder = text_encoder(
                str(name),
                tokens=bool(stated.get("tokens", False)),
                length=int(stated.get("length") or 0),
                revision=stated.get("revision"),
            )
        if not self._encoder_checked:
            self._compare(self.encoder)
            self._encoder_checked = True
        return self.encoder

    def _compare(self, encoder: TextEncoder) -> None:
        spec, stated = self.spec.text, str(self.info.text.get("fingerprint") or "")
        assert spec is not None
        for form in ("pooled", "tokens"):
            wants, has = getattr(spec, form), getattr(encoder.spec, form)
            if wants and wants != has:
                raise ConfigError(
                    f"the system takes {form} text of width {wants}; the encoder {encoder.name} gives {has}"
                )
        if stated and encoder.fingerprint != stated:
            message = (
                f"the text encoder {encoder.name} here is not the one of the training "
                f"(fingerprint {encoder.fingerprint}, trained with {stated}); sentences would mean something else"
            )
            if self.check_encoder:
                raise ConfigError(f"{message}. Install the same version, or load with check_encoder=False")
            logger.warning(message)

    # style

    def _styles(self, prompts: Condition, style: Any) -> tuple[Condition, Tensor]:
        """(prompts, one style picture per prompt)."""
        if not isinstance(self.system, HasLatent):
            raise ConfigError(f"{self.info.system} cannot encode pictures, so it takes no style; use a system that can")
        target = self.info.target
        many = list(style) if isinstance(style, list | tuple) else [style]
        size = (target.height, target.width)
        if target.frames:
            raise ConfigError("style works for systems that make pictures, not clips")
        pixels = torch.stack([prompt.read_picture(s, target.channels, size) for s in many])
        count = max(len(prompts), 1)
        if len(many) not in (1, count) and count != 1:
            raise ConfigError(f"{len(many)} styles for {count} prompts; give one, or one per prompt")
        if len(many) > count:
            prompts = prompts.repeat(len(many)) if len(prompts) else prompts
        return prompts, pixels.expand(max(count, len(many)), -1, -1, -1)

    def _restyle(self, rows: Condition, styles: Tensor, batch_size: int) -> Tensor:
        system, out = self.system, []
        assert isinstance(system, HasLatent)
        for start in range(0, len(styles), batch_size):
            part = slice(start, start + batch_size)
            with sampling(self.system, self.precision) as device:
                asked = (rows.index(part) if len(rows) else rows).to(device)
                latent = system.encode(styles[part].to(device), asked)
                made = system.decode(latent, asked)
            out.append(checked(made, (len(styles[part]), *self.info.target.shape)))
        return torch.cat(out)


def _no_text(spec: TextSpec, rows: int) -> Text:
    return Text(
        pooled=torch.zeros(rows, spec.pooled) if spec.pooled else None,
        tokens=torch.zeros(rows, spec.length, spec.tokens) if spec.tokens else None,
        mask=torch.zeros(rows, spec.length, dtype=torch.bool) if spec.tokens else None,
    )


def _join(nothing: Text, encoded: Text, spec: TextSpec) -> Text:
    """Rows of `nothing`, then the encoded ones, in the forms that the system was built for."""
    forms = Text(
        pooled=encoded.pooled if spec.pooled else None,
        tokens=encoded.tokens if spec.tokens else None,
        mask=encoded.mask if spec.tokens else None,
    )
    joined = Condition.cat([Condition(text=nothing), Condition(text=forms)]).text
    assert joined is not None
    return joined
