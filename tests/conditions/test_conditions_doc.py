"""The table in docs/conditions.md is what the code does."""

from pathlib import Path

import torch

from condgen import registry
from condgen.conditions.stack import kind_class
from condgen.types import FIELDS, Condition

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conditions.md"
START, END = "<!-- table: written by tests/conditions/test_conditions_doc.py -->", "<!-- end of table -->"
LETTERS = {
    "vector": "(B, {w})",
    "map": "(B, {w}, h, w)",
    "sequence": "(B, {l}, {w})",
    "temporal": "(B, {l}, {w}, H, W)",
}


def null_of(name, spec, form, condition, nullable):
    kind = kind_class(name)(getattr(spec, name), form, nullable=nullable).eval()
    if getattr(kind, "null", None) is not None:
        torch.nn.init.ones_(kind.null)
    feature = kind(condition.null_like(), (8, 8))
    what = "learned" if feature.value.any() else "zeros"
    if feature.mask is not None:
        what += f", {int(feature.mask[0].sum())} of {feature.mask.shape[1]} given"
    return what


def table(spec, condition):
    rows = [
        "| field | form | shape | with `width=7` | parameters | null | null where nullable |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (n for n in FIELDS if n in registry.names("conditions")):
        one = Condition(**{name: getattr(condition, name)})
        for form in kind_class(name).forms:
            shapes = []
            for width in (None, 7):
                kind = kind_class(name)(getattr(spec, name), form, width=width)
                length = kind(one, (8, 8)).value.shape[1]
                shapes.append(LETTERS[form].format(w=kind.width, l=length))
                count = sum(p.numel() for p in kind.parameters())
                if width is None:
                    learned = "learned" if count else "none"
            nulls = [null_of(name, spec, form, one, nullable) for nullable in (False, True)]
            rows.append(f"| `{name}` | {form} | {shapes[0]} | {shapes[1]} | {learned} | {nulls[0]} | {nulls[1]} |")
    return "\n".join(rows)


def test_the_table_is_in_sync(full_spec, make):
    expected = table(full_spec, make(2))
    page = PAGE.read_text(encoding="utf-8")
    written = page.split(START)[1].split(END)[0].strip()
    assert written == expected, f"docs/conditions.md differs from the code; its table should be\n\n{expected}\n"


def test_every_form_name_and_encoder_is_explained():
    from condgen.conditions.base import FORMS
    from condgen.conditions.text_encoders import NAMES

    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{word}`" in page for word in (*FORMS, *NAMES, *FIELDS))
