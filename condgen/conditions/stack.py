"""`ConditionStack`: all fields of a condition -> the forms that one network consumes.

Each network owns its own stack, so generator and discriminator never share a trained parameter and every
phase trains disjoint parameters (the papers project the condition separately in G and D as well).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from condgen import registry
from condgen.conditions.base import FORMS, ConditionKind, Feature, Forms
from condgen.errors import ConfigError, ShapeError
from condgen.types import Condition, ConditionSpec, device_of


def kind_class(field: str) -> type[ConditionKind]:
    """The ConditionKind in `conditions/<field>.py`."""
    return registry.load("conditions", field, ConditionKind)


def assign_forms(spec: ConditionSpec, consumes: Sequence[str]) -> dict[str, str]:
    """field -> the form it will enter as: the first of `consumes` that its kind can produce.

    Raises ConfigError naming the field that fits none of them.
    """
    out = {}
    for name in spec.given:
        forms = kind_class(name).forms
        chosen = next((form for form in consumes if form in forms), None)
        if chosen is None:
            raise ConfigError(
                f"the condition {name!r} can be given as {', '.join(forms)}, but the system takes only "
                f"{', '.join(consumes) or 'no condition'}. Choose another system or set data.ignore=[{name}]"
            )
        out[name] = chosen
    return out


class ConditionStack(nn.Module):
    """Encodes and concatenates the fields of `spec` into Forms.

    forms     field -> form; see `assign_forms`
    widths    field -> width of a learned projection; fields left out keep their natural width
    """

    def __init__(self, spec: ConditionSpec, forms: Mapping[str, str], widths: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.kinds = nn.ModuleDict()
        for name, field_spec in spec.items():
            if name in forms:
                width = (widths or {}).get(name)
                self.kinds[name] = kind_class(name)(field_spec, forms[name], width=width, nullable=spec.nullable)
        self.widths = {form: sum(k.width for k in self._of(form)) for form in FORMS}
        sequences = list(self._of("sequence"))
        if len({kind.width for kind in sequences}) > 1:
            raise ConfigError(
                "conditions that enter as one sequence need one width; got "
                + ", ".join(f"{kind.field}={kind.width}" for kind in sequences)
            )
        self.widths["sequence"] = sequences[0].width if sequences else 0

    def _of(self, form: str) -> list[ConditionKind]:
        return [kind for kind in self.kinds.values() if isinstance(kind, ConditionKind) and kind.form == form]

    def forward(self, condition: Condition, size: tuple[int, int] | None = None) -> Forms:
        """`size` (h, w): the resolution of map features, required where any field enters as a map."""
        for name in self.kinds:
            if getattr(condition, name) is None:
                given = ", ".join(condition.given) or "nothing"
                raise ShapeError(f"this system was built for {name}, which the condition lacks; it holds {given}")
            self._check_device(name, device_of(getattr(condition, name)))
        features: dict[str, list[Feature]] = {form: [] for form in FORMS}
        for kind in self.kinds.values():
            features[kind.form].append(kind(condition, size))  # type: ignore[index]
        sequence, sequence_mask = _join(features["sequence"], dim=1)
        temporal, temporal_mask = _join(features["temporal"], dim=2)
        return Forms(
            vector=_cat(features["vector"]),
            map=_cat(features["map"]),
            sequence=sequence,
            sequence_mask=sequence_mask,
            temporal=temporal,
            temporal_mask=temporal_mask,
        )

    def _check_device(self, name: str, device: torch.device) -> None:
        here = next((parameter.device for parameter in self.parameters()), device)
        if here != device:
            raise ShapeError(
                f"the condition's {name} is on {device}, the system on {here}; use condition.to({str(here)!r})"
            )


def _cat(features: list[Feature]) -> Tensor | None:
    return torch.cat([f.value for f in features], dim=1) if features else None


def _join(features: list[Feature], dim: int) -> tuple[Tensor | None, Tensor | None]:
    """Sequences join along tokens; temporal features along channels, given where any of them is."""
    if not features:
        return None, None
    value = torch.cat([f.value for f in features], dim=dim)
    masks = [f.mask for f in features if f.mask is not None]
    if dim == 1:
        return value, torch.cat(masks, dim=1)
    return value, torch.stack(masks).any(0)
