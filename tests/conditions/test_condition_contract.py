"""The contract of conditions/base.py, over every kind x form x width x nullable; new kind files are picked up."""

from dataclasses import replace

import pytest
import torch

from condgen import registry
from condgen.conditions.base import FORMS
from condgen.conditions.stack import ConditionStack, kind_class
from condgen.errors import ConfigError, DataError
from condgen.types import FIELDS, Condition

SIZE = (8, 8)
CASES = [
    pytest.param(name, form, width, nullable, id=f"{name}-{form}-{width}-{'nullable' if nullable else 'plain'}")
    for name in registry.names("conditions")
    for form in kind_class(name).forms
    for width in (None, 7)
    for nullable in (False, True)
]
FORM_CASES = [
    pytest.param(name, form, id=f"{name}-{form}")
    for name in registry.names("conditions")
    for form in kind_class(name).forms
]
over_cases = pytest.mark.parametrize(("name", "form", "width", "nullable"), CASES)
over_forms = pytest.mark.parametrize(("name", "form"), FORM_CASES)


@pytest.fixture
def build(full_spec):
    def build(name, form, width=None, nullable=False, **options):
        torch.manual_seed(0)
        kind = kind_class(name)(getattr(full_spec, name), form, width=width, nullable=nullable, **options).eval()
        null = getattr(kind, "null", None)
        if null is not None:
            torch.nn.init.normal_(null)  # a trained null, which differs from zeros
        return kind

    return build


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.value, b.value, rtol=tolerance, atol=tolerance)
    assert (a.mask is None) == (b.mask is None)
    if a.mask is not None:
        assert torch.equal(a.mask, b.mask)


def only(condition, name):
    """The condition with this field alone, so that nothing else can be read."""
    present = {name: condition.present[name]} if name in condition.present else {}
    return Condition(**{name: getattr(condition, name)}, present=present)


def test_every_field_has_a_kind():
    assert set(registry.names("conditions")) == set(FIELDS)
    assert all(kind_class(name).field == name and set(kind_class(name).forms) <= set(FORMS) for name in FIELDS)


@over_cases
def test_shape_is_what_width_promises(name, form, width, nullable, build, make):
    kind = build(name, form, width, nullable)
    feature = kind(only(make(3), name), SIZE)
    assert width is None or kind.width == width
    value = feature.value
    assert torch.isfinite(value).all()
    expected = {
        "vector": (3, kind.width),
        "map": (3, kind.width, *SIZE),
        "sequence": (3, value.shape[1], kind.width),
        "temporal": (3, value.shape[1], kind.width, *value.shape[3:]),
    }[form]
    assert value.shape == expected
    if form in ("sequence", "temporal"):
        assert feature.mask is not None and feature.mask.shape == value.shape[:2] and feature.mask.dtype == torch.bool
    else:
        assert feature.mask is None


@over_cases
def test_null_equals_dropped_rows_and_leaves_the_others(name, form, width, nullable, build, make):
    kind, condition = build(name, form, width, nullable), only(make(4), name)
    dropped = condition.drop(torch.tensor([True, False, True, False]))
    whole, part, null = kind(condition, SIZE), kind(dropped, SIZE), kind(condition.null_like(), SIZE)
    torch.testing.assert_close(part.value[[0, 2]], null.value[[0, 2]])
    torch.testing.assert_close(part.value[[1, 3]], whole.value[[1, 3]])
    bare = replace(condition.null_like(), present={})  # a null value counts as absent without being declared so
    same(kind(bare, SIZE), null)
    if form == "map" or not nullable:
        assert not null.value.any()
    else:
        assert null.value.any()
    if form == "sequence":
        assert torch.equal(null.mask.sum(1), torch.full((4,), int(nullable)))  # one null token survives
    if form == "temporal":
        assert not null.mask.any()


@over_cases
def test_absent_rows_may_hold_anything(name, form, width, nullable, build, make):
    kind, condition = build(name, form, width, nullable), only(make(3), name)
    present = {name: torch.tensor([True, False, True])}
    clean = kind(replace(condition, present=present), SIZE)
    value = getattr(condition, name)
    if isinstance(value, torch.Tensor):
        spoiled = value.index_fill(0, torch.tensor([1]), 4)
    else:
        spoiled = value.map(lambda t: t.index_fill(0, torch.tensor([1]), float("nan")) if t.is_floating_point() else t)
    same(kind(Condition(**{name: spoiled}, present=present), SIZE), clean)


def spoil_padding(condition):
    """Garbage wherever a mask says that nothing stands there."""
    nan = float("nan")
    text, boxes, points, image, frames = (getattr(condition, n) for n in FIELDS[1:])
    return replace(
        condition,
        text=replace(text, tokens=text.tokens.masked_fill(~text.mask[..., None], nan)),
        boxes=replace(
            boxes,
            xyxy=boxes.xyxy.masked_fill(~boxes.valid[..., None], nan),
            label=boxes.label.masked_fill(~boxes.valid, 10**6),
        ),
        keypoints=replace(points, xy=points.xy.masked_fill(~points.visible[..., None], nan)),
        image=replace(image, pixels=image.pixels.masked_fill(image.mask == 0, nan)),
        frames=replace(
            frames,
            pixels=frames.pixels.masked_fill(~frames.mask[:, :, None, None, None], nan),
            actions=frames.actions.masked_fill(~frames.mask[..., None], nan),
        ),
    )


@over_cases
def test_padding_content_never_matters(name, form, width, nullable, build, make):
    kind, condition = build(name, form, width, nullable), make(4)
    same(kind(only(spoil_padding(condition), name), SIZE), kind(only(condition, name), SIZE))


@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize(
    ("name", "form"),
    [(n, f) for n in ("text", "boxes", "frames") for f in kind_class(n).forms if (n, f) != ("frames", "map")],
)
def test_more_padding_changes_nothing(name, form, nullable, build, make):
    kind, condition = build(name, form, None, nullable), only(make(3), name)
    record = getattr(condition, name)

    def grow(key, t):
        if key == "pooled":
            return t
        return torch.cat([t, torch.zeros_like(t[:, :2])], dim=1)

    longer = Condition(**{name: replace(record, **{k: grow(k, t) for k, t in record.tensors()})})
    before, after = kind(condition, SIZE), kind(longer, SIZE)
    if after.mask is None:
        torch.testing.assert_close(after.value, before.value)
    else:
        length = before.mask.shape[1]
        torch.testing.assert_close(after.value[:, :length], before.value)
        assert torch.equal(after.mask[:, :length], before.mask) and not after.mask[:, length:].any()


@over_cases
def test_rows_are_independent(name, form, width, nullable, build, make):
    """Permuting the batch permutes the output; a batch of one and a split batch give the same rows."""
    kind, condition = build(name, form, width, nullable), only(make(5), name).drop(torch.arange(5) == 3)
    whole = kind(condition, SIZE)
    order = torch.tensor([4, 2, 0, 3, 1])
    torch.testing.assert_close(kind(condition.index(order), SIZE).value, whole.value[order], rtol=1e-5, atol=1e-5)
    for row in range(5):
        one = kind(condition.index([row]), SIZE)
        torch.testing.assert_close(one.value[0], whole.value[row], rtol=1e-5, atol=1e-5)


@over_cases
def test_bfloat16_stays_within_a_hundredth(name, form, width, nullable, build, make):
    kind, condition = build(name, form, width, nullable), only(make(4), name)
    full = kind(condition, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        half = kind(condition, SIZE)
    torch.testing.assert_close(half.value.float(), full.value, rtol=1e-2, atol=1e-2)


FLOATS = {"text": "pooled", "boxes": "xyxy", "keypoints": "xy", "image": "pixels", "frames": "pixels"}


@over_forms
def test_output_is_sensitive_to_its_field(name, form, build, make):
    options = {"render": "gaussian"} if (name, form) == ("keypoints", "map") else {}
    kind, condition = build(name, form, 7, True, **options), only(make(3), name)
    if name == "label":
        leaf = torch.rand(3, 5, requires_grad=True)
        condition = Condition(label=leaf)
    else:
        key = "tokens" if (name, form) == ("text", "sequence") else FLOATS[name]
        leaf = getattr(getattr(condition, name), key).clone().requires_grad_()
        condition = Condition(**{name: replace(getattr(condition, name), **{key: leaf})})
    kind(condition, SIZE).value.square().sum().backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
    assert (leaf.grad.flatten(1).abs().sum(1) > 0).all(), "a row's value has no influence"


@over_forms
def test_every_parameter_is_reached(name, form, build, make):
    kind = build(name, form, 7, True)
    condition = only(make(4), name).drop(torch.arange(4) == 0)  # given rows and a null row
    kind(condition, SIZE).value.square().sum().backward()
    for parameter_name, parameter in kind.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name


@over_forms
def test_fully_null_batch_is_differentiable(name, form, build, make):
    kind = build(name, form, 7, True)
    value = kind(only(make(2), name).null_like(), SIZE).value
    value.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in kind.parameters())


def test_unconsumed_fields_get_no_gradient(full_spec, make):
    condition = make(2)
    pixels = condition.image.pixels.clone().requires_grad_()
    pooled = condition.text.pooled.clone().requires_grad_()
    condition = replace(
        condition, image=replace(condition.image, pixels=pixels), text=replace(condition.text, pooled=pooled)
    )
    ConditionStack(full_spec, {"text": "vector"})(condition).vector.sum().backward()
    assert pooled.grad is not None and pixels.grad is None


@over_forms
def test_an_unknown_form_is_refused(name, form, full_spec):
    with pytest.raises(ValueError, match=name):
        kind_class(name)(getattr(full_spec, name), "hologram")


WRONG = {
    "label": lambda c: replace(c, label=torch.zeros(len(c), 9)),
    "text": lambda c: replace(c, text=replace(c.text, pooled=torch.ones(len(c), 9), tokens=torch.ones(len(c), 6, 9))),
    "boxes": lambda c: replace(c, boxes=replace(c.boxes, label=None)),
    "keypoints": lambda c: replace(c, keypoints=c.keypoints.map(lambda t: t[:, :2])),
    "image": lambda c: replace(c, image=replace(c.image, pixels=c.image.pixels[:, :1])),
    "frames": lambda c: replace(c, frames=replace(c.frames, actions=c.frames.actions[..., :1])),
}


@over_cases
def test_wrong_sizes_raise_and_name_the_field(name, form, width, nullable, build, make):
    with pytest.raises(DataError, match=name):
        build(name, form, width, nullable)(WRONG[name](make(2)), SIZE)


@pytest.mark.parametrize("name", [n for n in FIELDS if "map" in kind_class(n).forms])
def test_a_map_without_a_size_raises(name, build, make):
    with pytest.raises(DataError, match="size="):
        build(name, "map")(make(2))


def test_stack_widths_are_what_comes_out(full_spec, make):
    forms = {
        "label": "vector",
        "text": "vector",
        "boxes": "map",
        "image": "map",
        "frames": "temporal",
        "keypoints": "sequence",
    }
    stack = ConditionStack(replace(full_spec, nullable=True), forms, {"text": 9})
    out = stack(make(3), SIZE)
    assert out.vector.shape == (3, stack.widths["vector"]) == (3, 5 + 9)
    assert out.map.shape == (3, stack.widths["map"], *SIZE) and stack.widths["map"] == 5 + 4
    assert out.sequence.shape[2] == stack.widths["sequence"] and out.temporal.shape[2] == stack.widths["temporal"]


def test_sequences_join_with_their_masks(full_spec, make):
    names = [n for n in FIELDS if "sequence" in kind_class(n).forms]
    stack = ConditionStack(full_spec, dict.fromkeys(names, "sequence"), dict.fromkeys(names, 7))
    out = stack(make(2))
    assert out.sequence.shape[:2] == out.sequence_mask.shape and out.sequence.shape[2] == 7
    assert not out.sequence[~out.sequence_mask].any()
    with pytest.raises(ConfigError, match="one width"):
        ConditionStack(full_spec, {"text": "sequence", "label": "sequence"})


def test_stack_refuses_a_missing_field_and_a_foreign_device(full_spec, make):
    stack = ConditionStack(full_spec, {"text": "vector"}, {"text": 4})
    with pytest.raises(DataError, match="text"):
        stack(Condition(label=torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(DataError, match="text is on meta"):
        stack(make(2).to("meta"))
