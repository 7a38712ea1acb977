"""Conditions of the wrong rank, width, dtype, batch size or device are refused by name (table H of the reliability
notes): torch would broadcast most of them in silence."""

from dataclasses import replace

import pytest
import torch

from condgen.conditions.stack import ConditionStack, kind_class
from condgen.errors import ConfigError, DataError
from condgen.types import FIELDS, BoxesSpec, Frames

SIZE = (8, 8)


def part(name, **changes):
    """Changes tensors of one field; each value is a function of the tensor that stands there."""
    return lambda c: replace(
        c,
        **{name: replace(getattr(c, name), **{key: fn(getattr(getattr(c, name), key)) for key, fn in changes.items()})},
    )


# (field, fault) -> what breaks it, and what the message must say besides the field
FAULTS = {
    ("label", "rank"): (lambda c: replace(c, label=c.label[:, None]), r"shape \(3, 1\)"),
    ("label", "width"): (lambda c: replace(c, label=torch.zeros(len(c), 9)), "9 .* 5"),
    ("label", "value"): (lambda c: replace(c, label=c.label + 5), r"out of range.*0\.\.4"),
    ("label", "dtype"): (lambda c: replace(c, label=c.label.int()), "torch.int32.*int64"),
    ("label", "batch"): (lambda c: replace(c, label=c.label[:1]), "'label': 1.*'text': 3"),
    ("text", "rank"): (part("text", pooled=lambda t: t[:, None]), r"\(3, 1, 12\); expected 2"),
    ("text", "width"): (part("text", pooled=lambda t: t[:, :1]), "is 1 .* 12"),
    ("text", "dtype"): (part("text", pooled=lambda t: t.long()), "torch.int64; expected a floating"),
    ("text", "mask dtype"): (part("text", mask=lambda t: t.float()), "torch.float32; expected torch.bool"),
    ("text", "batch"): (part("text", pooled=lambda t: t[:1]), r"\(1, 12\).*must start \(3,\)"),
    ("boxes", "rank"): (part("boxes", xyxy=lambda t: t[0]), r"\(3, 4\); expected 3"),
    ("boxes", "width"): (part("boxes", xyxy=lambda t: t[..., :1]), "last size must be 4"),
    ("boxes", "dtype"): (part("boxes", xyxy=lambda t: t.long()), "torch.int64; expected a floating"),
    ("boxes", "flag dtype"): (part("boxes", valid=lambda t: t.long()), "torch.int64; expected torch.bool"),
    ("boxes", "batch"): (part("boxes", valid=lambda t: t[:1]), r"must start \(3, 3\)"),
    ("keypoints", "rank"): (part("keypoints", xy=lambda t: t[..., 0]), r"\(3, 4\); expected 3"),
    ("keypoints", "width"): (part("keypoints", xy=lambda t: t[:, :1], visible=lambda t: t[:, :1]), "is 1 .* 4"),
    ("keypoints", "dtype"): (part("keypoints", visible=lambda t: t.float()), "torch.float32; expected torch.bool"),
    ("keypoints", "batch"): (part("keypoints", xy=lambda t: t[:1]), "'keypoints': 1"),
    ("image", "rank"): (part("image", pixels=lambda t: t[0]), r"\(3, 16, 16\); expected 4"),
    ("image", "width"): (part("image", pixels=lambda t: t[:, :1]), "channels is 1 .* 3"),
    ("image", "mask width"): (part("image", mask=lambda t: t.expand(-1, 3, -1, -1)), r"must start \(3, 1, 16, 16\)"),
    ("image", "batch"): (part("image", pixels=lambda t: t[:1], mask=lambda t: t[:1]), "'image': 1"),
    ("frames", "rank"): (part("frames", pixels=lambda t: t[:, 0]), r"\(3, 3, 16, 16\); expected 5"),
    ("frames", "width"): (part("frames", pixels=lambda t: t[:, :, :1]), "channels is 1 .* 3"),
    ("frames", "dtype"): (part("frames", mask=lambda t: t.float()), "torch.float32; expected torch.bool"),
    ("frames", "actions width"): (part("frames", actions=lambda t: t[..., :1]), "width 1; .* 2"),
    ("frames", "batch"): (part("frames", actions=lambda t: t[:1]), r"must start \(3, 3\)"),
}


def stack_of(spec, form="vector"):
    names = [n for n in FIELDS if form in kind_class(n).forms]
    torch.manual_seed(0)
    return ConditionStack(spec, dict.fromkeys(names, form))


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_wrong_condition_is_refused_with_what_was_expected(name, fault, full_spec, make):
    """H1. Refused where the record is made or where the stack reads it."""
    spoil, says = FAULTS[name, fault]
    stack = stack_of(full_spec)
    stack(make(3))  # it is the fault that is refused
    with pytest.raises(DataError, match=says) as caught:
        stack(spoil(make(3)))
    assert name.removesuffix("s") in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_a_condition_on_another_device_is_refused(name, full_spec, make):
    moved = getattr(make(3).to("meta"), name)
    with pytest.raises(DataError, match=rf"{name} is on meta, the system on cpu; use condition\.to"):
        stack_of(full_spec)(replace(make(3), **{name: moved}))


def test_the_table_has_every_condition():
    for fault in ("rank", "width", "dtype", "batch"):
        missing = set(FIELDS) - {n for n, f in FAULTS if f == fault}
        assert missing <= ({"image"} if fault == "dtype" else set())  # a picture may be uint8 or float


# clips


def history(frames):
    return Frames(torch.zeros(2, frames, 3, 16, 16), torch.ones(2, frames, dtype=torch.bool), torch.zeros(2, frames, 2))


@pytest.mark.parametrize("form", kind_class("frames").forms)
def test_a_history_of_one_frame_works(form, full_spec, make):
    """H5."""
    spec = replace(full_spec.frames, frames=1)
    torch.manual_seed(0)
    kind = kind_class("frames")(spec, form)
    out = kind(replace(make(2), frames=history(1)), SIZE).value
    assert out.shape[0] == 2 and torch.isfinite(out).all()


def test_a_history_of_another_length_is_refused_where_it_would_change_the_channels(full_spec, make):
    """H5. As a map the frames are channels; the other forms read any number of frames."""
    kind = kind_class("frames")(full_spec.frames, "map")
    for frames in (1, 4):
        with pytest.raises(DataError, match=f"number of frames is {frames} .* 3"):
            kind(replace(make(2), frames=history(frames)), SIZE)


def test_boxes_without_any_box_are_legal(full_spec, make):
    """D12: no box at all."""
    boxes = make(2).boxes
    none = replace(boxes, xyxy=boxes.xyxy[:, :0], valid=boxes.valid[:, :0], label=boxes.label[:, :0])
    for form in kind_class("boxes").forms:
        kind = kind_class("boxes")(BoxesSpec(3, 4), form, nullable=True)
        assert torch.isfinite(kind(replace(make(2), boxes=none), SIZE).value).all()
    with pytest.raises(ConfigError):
        stack_of(full_spec, "sequence")  # and forms of other widths do not join by accident
