"""Condition, Batch and specs: every operation is pure, keeps rows together, and moves geometry with pixels."""

import json
import math
import multiprocessing
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from condgen.conditions.stack import assign_forms
from condgen.data.base import collate
from condgen.errors import ConfigError, DataError, ShapeError
from condgen.types import (
    FIELDS,
    Batch,
    Boxes,
    BoxesSpec,
    Condition,
    ConditionSpec,
    Frames,
    FramesSpec,
    Image,
    ImageSpec,
    Keypoints,
    KeypointsSpec,
    LabelSpec,
    Sample,
    TargetSpec,
    Text,
    TextSpec,
)

SPEC = ConditionSpec(
    label=LabelSpec(5, ("a", "b", "c", "d", "e")),
    text=TextSpec(4, 3, 5, "char"),
    boxes=BoxesSpec(3, 4),
    keypoints=KeypointsSpec(4, ("nose", "tail", "left", "right"), ((2, 3),)),
    image=ImageSpec(3, 8, 8, mask=True),
    frames=FramesSpec(2, 3, 8, 8, actions=2),
    nullable=True,
)


def full(rows=4, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(rows, *shape, generator=g)

    def flags(n):
        return rand(n) < 0.7

    low = rand(3, 2) * 0.5
    valid, visible = flags(3), flags(4)
    return Condition(
        label=torch.randint(5, (rows,), generator=g),
        text=Text(rand(4), rand(5, 3), flags(5), tuple(f"row {i}" for i in range(rows))),
        boxes=Boxes(
            torch.cat([low, low + 0.2], -1) * valid[..., None], valid, torch.randint(4, (rows, 3), generator=g)
        ),
        keypoints=Keypoints(rand(4, 2) * visible[..., None], visible),
        image=Image(rand(3, 8, 8) * 2 - 1, (rand(1, 8, 8) < 0.5).float()),
        frames=Frames(rand(2, 3, 8, 8) * 2 - 1, flags(2), rand(2, 2)),
    )


def flat(condition):
    """Every tensor and string of a condition, by name."""
    out = {f"present.{n}": t for n, t in condition.present.items()}
    for name, value in condition.items():
        if isinstance(value, torch.Tensor):
            out[name] = value
            continue
        out |= {f"{name}.{key}": t for key, t in value.tensors()}
        if getattr(value, "strings", None) is not None:
            out[f"{name}.strings"] = value.strings
    return out


def assert_same(a, b, tolerance=0.0):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], tuple):
            assert a[name] == b[name], name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# construction


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"label": torch.zeros(2, 1, dtype=torch.int64)}, "label"),
        ({"label": torch.zeros(2)}, "label"),
        ({"label": torch.zeros(2, dtype=torch.int64), "text": Text(torch.zeros(3, 4))}, "rows"),
        ({"text": Text(torch.zeros(2))}, "text.pooled"),
        ({"text": Text(torch.zeros(2, 4, dtype=torch.int64))}, "text.pooled"),
        ({"text": Text(tokens=torch.zeros(2, 5, 4))}, "text.mask"),
        ({"text": Text(tokens=torch.zeros(2, 5, 4), mask=torch.zeros(2, 5))}, "text.mask"),
        ({"boxes": Boxes(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool))}, "boxes.xyxy"),
        ({"boxes": Boxes(torch.zeros(2, 3, 4), torch.zeros(2, 3))}, "boxes.valid"),
        ({"keypoints": Keypoints(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))}, "keypoints.xy"),
        ({"keypoints": Keypoints(torch.zeros(2, 3, 3), torch.zeros(2, 3, dtype=torch.bool))}, "keypoints.xy"),
        ({"image": Image(torch.zeros(3, 8, 8))}, "image.pixels"),
        ({"frames": Frames(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, dtype=torch.bool))}, "frames.pixels"),
        ({"frames": Frames(torch.zeros(2, 3, 3, 8, 8), torch.zeros(2, 3))}, "frames.mask"),
        ({"present": {"smell": torch.ones(2)}}, "smell"),
        # parts of one record that do not belong together
        ({"boxes": Boxes(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.bool))}, "boxes.valid"),
        ({"keypoints": Keypoints(torch.zeros(2, 3, 2), torch.zeros(3, 3, dtype=torch.bool))}, "keypoints.visible"),
        ({"frames": Frames(torch.zeros(2, 3, 3, 8, 8), torch.zeros(2, 2, dtype=torch.bool))}, "frames.mask"),
        ({"image": Image(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))}, "image.mask"),
        ({"text": Text(torch.zeros(2, 4), strings=("one",))}, "text.pooled"),
        ({"text": Text(torch.zeros(2, 4), torch.zeros(3, 5, 4), torch.zeros(3, 5, dtype=torch.bool))}, "text.tokens"),
        (
            {"label": torch.zeros(2, dtype=torch.int64), "present": {"label": torch.ones(3, dtype=torch.bool)}},
            "present",
        ),
        ({"label": torch.zeros(2, dtype=torch.int64), "present": {"label": torch.ones(2)}}, "present"),
    ],
)
def test_wrong_shapes_are_refused_by_name(fields, named):
    with pytest.raises(ShapeError, match=named):
        Condition(**fields)


@pytest.mark.parametrize(
    "record",
    [
        Boxes(torch.tensor([[[0.5, 0.5, 0.2, 0.9]]]), torch.tensor([[True]])),
        Boxes(torch.tensor([[[5.0, 5.0, 20.0, 90.0]]]), torch.tensor([[True]])),
        Boxes(torch.tensor([[[math.nan] * 4]]), torch.tensor([[False]])),
        Keypoints(torch.tensor([[[1.5, 0.5]]]), torch.tensor([[True]])),
        Image(torch.full((1, 3, 4, 4), 134.0)),
        Frames(torch.full((1, 1, 3, 4, 4), math.nan), torch.tensor([[True]])),
    ],
)
def test_values_out_of_range_are_refused(record):
    name = type(record).__name__.lower()
    with pytest.raises(ShapeError, match=name):
        Condition(**{name: record}).check_values()


def test_good_values_pass_and_padding_is_free():
    full().check_values()
    Condition(boxes=Boxes(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.bool))).check_values()


# moving and joining


def test_to_moves_every_tensor_and_casts_floats_only():
    condition = full().drop(0.5)
    moved = condition.to("meta", dtype=torch.bfloat16)
    for name, tensor in flat(moved).items():
        if isinstance(tensor, torch.Tensor):
            before = flat(condition)[name]
            assert tensor.device.type == "meta", name
            assert tensor.dtype == (torch.bfloat16 if before.is_floating_point() else before.dtype), name


@given(rows=st.lists(st.integers(-4, 3), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_index_takes_the_same_rows_of_every_field(rows):
    condition = full().drop(torch.arange(4) == 1, fields=["text"])
    taken = flat(condition.index(rows))
    for name, value in flat(condition).items():
        if isinstance(value, tuple):
            assert taken[name] == tuple(value[i] for i in rows)
        else:
            assert torch.equal(taken[name], value[rows]), name
    mask = torch.tensor([True, False, True, False])
    assert_same(condition.index(mask), condition.index([0, 2]))
    assert_same(condition.index(slice(1, 3)), condition.index([1, 2]))


@given(cut=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_cat_undoes_split(cut):
    condition = full(6)
    assert_same(Condition.cat([condition.index(slice(0, cut)), condition.index(slice(cut, 6))]), condition)


def test_cat_fills_missing_fields_with_null():
    whole, bare = full(2), Condition(label=torch.tensor([3, 4, 0]))
    joined = Condition.cat([whole, bare])
    assert len(joined) == 5 and "label" not in joined.present
    for name in FIELDS[1:]:
        assert joined.is_present(name).tolist() == [True, True, False, False, False], name
    assert_same(
        replace(joined.index([2, 3, 4]), present={}),
        replace(full(3).null_like(), label=bare.label, present={}),
    )


def test_cat_pads_tokens_to_the_longest():
    def text(length):
        return Condition(text=Text(tokens=torch.ones(1, length, 2), mask=torch.ones(1, length, dtype=torch.bool)))

    joined = Condition.cat([text(2), text(4)]).text
    assert joined.tokens.shape == (2, 4, 2) and joined.mask.sum(1).tolist() == [2, 4] and not joined.tokens[0, 2:].any()


def test_repeat_keeps_copies_together():
    assert_same(full(2).repeat(3), full(2).index([0, 0, 0, 1, 1, 1]))


def test_operations_do_not_change_their_input():
    condition, before = full(), full()
    other = full(seed=1)
    windows = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).expand(4, 4)
    condition.drop(0.5), condition.hflip([(0, 1)]), condition.crop_resize(windows), condition.null_like()
    condition.interpolate(other, 0.5, ["text", "keypoints"]), condition.mismatch(), Condition.cat([condition, other])
    assert_same(condition, before)


# null and guidance


def test_drop_all_is_null_and_drop_none_changes_nothing():
    condition = full()
    assert_same(condition.drop(1.0), condition.null_like())
    assert_same(replace(condition.drop(0.0), present={}), condition)
    assert all(condition.drop(0.0).is_present(name).all() for name in FIELDS)


def test_null_values_are_those_of_the_design():
    null = full().null_like()
    assert (null.label == -1).all() and null.text.strings == ("",) * 4
    nothing = (null.text.mask, null.boxes.valid, null.keypoints.visible, null.image.mask, null.frames.mask)
    assert not any(t.any() for t in (*nothing, null.image.pixels, null.text.pooled, null.frames.pixels))
    soft = Condition(label=torch.rand(2, 5)).null_like()
    assert not soft.label.any() and not soft.is_present("label").any()


def test_drop_frequency_and_independence():
    g = torch.Generator().manual_seed(0)
    n, p = 20_000, 0.2
    condition = Condition(label=torch.zeros(n, dtype=torch.int64), text=Text(torch.ones(n, 1)))
    dropped = condition.drop(p, generator=g)
    gone = torch.stack([~dropped.is_present("label"), ~dropped.is_present("text")]).double()
    sigma = math.sqrt(p * (1 - p) / n)
    assert (gone.mean(1) - p).abs().max() < 3 * sigma
    both = p * p
    assert abs(float(gone.prod(0).mean()) - both) < 3 * math.sqrt(both * (1 - both) / n)
    assert torch.equal(dropped.label == -1, gone[0].bool()) and torch.equal(
        dropped.text.pooled[:, 0] == 0, gone[1].bool()
    )


def test_drop_is_a_function_of_its_generator_and_adds_up():
    def once(condition, seed, **options):
        return condition.drop(0.5, generator=torch.Generator().manual_seed(seed), **options)

    assert_same(once(full(), 1), once(full(), 1))
    first = once(full(64), 1)
    second = once(first, 2)
    assert all((~first.is_present(n) <= ~second.is_present(n)).all() for n in FIELDS)  # once dropped, always dropped
    only = once(full(64), 1, fields=["label"])
    assert set(only.present) == {"label"}
    with pytest.raises(ShapeError, match="cannot drop frames"):
        Condition(label=torch.zeros(2, dtype=torch.int64)).drop(0.5, fields=["frames"])


# interpolation and mismatch


@given(beta=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_interpolate_is_linear(beta):
    a, b = full(), full(seed=1)
    mixed = a.interpolate(b, beta, ["text"])
    torch.testing.assert_close(mixed.text.pooled, beta * a.text.pooled + (1 - beta) * b.text.pooled)
    assert mixed.text.tokens is None and mixed.text.strings is None and torch.equal(mixed.label, a.label)


def test_interpolate_with_a_number_per_row():
    a, b = full(), full(seed=1)
    beta = torch.tensor([0.0, 1.0, 0.5, 0.25])
    mixed = a.interpolate(b, beta, ["text"]).text.pooled
    assert torch.equal(mixed[0], b.text.pooled[0]) and torch.allclose(mixed[1], a.text.pooled[1])


def test_interpolate_points_only_where_both_are_seen():
    a, b = full(), full(seed=1)
    mixed = a.interpolate(b, 0.5, ["keypoints"]).keypoints
    both = a.keypoints.visible & b.keypoints.visible
    torch.testing.assert_close(mixed.xy[both], (a.keypoints.xy[both] + b.keypoints.xy[both]) / 2)
    assert torch.equal(mixed.xy[~both], a.keypoints.xy[~both])


def test_interpolate_soft_labels_but_not_indices():
    a, b = Condition(label=torch.eye(3)), Condition(label=torch.eye(3).flip(0))
    assert a.interpolate(b, 0.5, ["label"]).label.sum(1).tolist() == [1, 1, 1]
    for name in ("label", "image", "frames", "boxes"):
        with pytest.raises(ShapeError, match=name):
            full().interpolate(full(seed=1), 0.5, [name])


def test_interpolate_with_a_lacking_partner_is_an_error():
    with pytest.raises(ShapeError, match="text"):
        full().interpolate(Condition(label=torch.zeros(4, dtype=torch.int64)), 0.5, ["text"])


def test_interpolate_never_broadcasts():
    with pytest.raises(ShapeError, match="4 rows with 1"):
        full().interpolate(full(1), 0.5, ["text"])


def test_interpolate_with_a_dropped_row_keeps_the_row():
    """A midpoint between a sentence and nothing is no sentence: such a row keeps its own value."""
    a, b = full(), full(seed=1).drop(torch.arange(4) == 2)
    mixed = a.interpolate(b, 0.5, ["text"])
    torch.testing.assert_close(mixed.text.pooled[2], a.text.pooled[2])
    torch.testing.assert_close(mixed.text.pooled[0], (a.text.pooled[0] + b.text.pooled[0]) / 2)
    gone = a.drop(torch.arange(4) == 1, fields=["text"]).interpolate(b, 0.5, ["text"])
    assert not gone.is_present("text")[1] and not gone.text.pooled[1].any()


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=24), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_mismatch_has_no_fixed_point_and_as_few_equal_labels_as_possible(labels, seed):
    label = torch.tensor(labels)
    order = Condition(label=label).mismatch(torch.Generator().manual_seed(seed))
    rows = torch.arange(len(labels))
    assert torch.equal(order.sort().values, rows) and not (order == rows).any()
    largest = int(torch.bincount(label).max())
    unavoidable = max(0, 2 * largest - len(labels))
    assert int((label[order] == label).sum()) == unavoidable


@given(size=st.integers(2, 40), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_mismatch_without_labels(size, seed):
    order = Condition(text=Text(torch.zeros(size, 1))).mismatch(torch.Generator().manual_seed(seed))
    assert torch.equal(order.sort().values, torch.arange(size)) and not (order == torch.arange(size)).any()


def test_mismatch_avoids_equal_sentences_and_ignores_unknown_labels():
    strings = ("a", "a", "b", "c")
    for seed in range(20):
        order = Condition(text=Text(strings=strings)).mismatch(torch.Generator().manual_seed(seed))
        assert all(strings[i] != strings[j] for i, j in enumerate(order.tolist()))
    unknown = Condition(label=torch.full((6,), -1)).mismatch()
    assert not (unknown == torch.arange(6)).any()
    with pytest.raises(ShapeError, match="at least 2"):
        Condition(label=torch.zeros(1, dtype=torch.int64)).mismatch()


def test_mismatch_is_not_always_the_same():
    orders = {tuple(full(6).mismatch(torch.Generator().manual_seed(s)).tolist()) for s in range(20)}
    assert len(orders) > 5


# geometry


@given(seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_hflip_twice_is_identity(seed):
    condition = full(seed=seed)
    assert_same(condition.hflip([(2, 3)]).hflip([(2, 3)]), condition, tolerance=1e-6)


def test_hflip_moves_marks_with_their_pixels():
    """A mark drawn in the pixels at a keypoint and in a box is still there after the flip."""
    pixels = -torch.ones(1, 1, 4, 8)
    pixels[0, 0, 1, 6] = 1
    xy = torch.tensor([[[6.5 / 8, 1.5 / 4], [0, 0]]])
    condition = Condition(
        image=Image(pixels),
        keypoints=Keypoints(xy, torch.tensor([[True, False]])),
        boxes=Boxes(torch.tensor([[[6 / 8, 1 / 4, 7 / 8, 2 / 4]]]), torch.tensor([[True]])),
    )
    flipped = condition.hflip([(0, 1)])
    assert flipped.image.pixels[0, 0, 1, 1] == 1
    assert flipped.keypoints.visible.tolist() == [[False, True]]  # the left part became the right part
    torch.testing.assert_close(flipped.keypoints.xy[0, 1], torch.tensor([1.5 / 8, 1.5 / 4]))
    torch.testing.assert_close(flipped.boxes.xyxy[0, 0], torch.tensor([1 / 8, 1 / 4, 2 / 8, 2 / 4]))
    flipped.check_values()


@given(x=st.floats(0, 0.5), y=st.floats(0, 0.5), span=st.floats(0.3, 0.5), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_crop_keeps_values_in_range_and_undoes_by_arithmetic(x, y, span, seed):
    condition = full(seed=seed)
    window = torch.tensor([x, y, x + span, y + span])
    cut = condition.crop_resize(window.expand(4, 4), (6, 6))
    cut.check_values()
    assert cut.image.pixels.shape == (4, 3, 6, 6) and cut.image.mask.shape == (4, 1, 6, 6)
    assert cut.frames.pixels.shape == (4, 2, 3, 6, 6)
    back = cut.keypoints.xy * span + window[:2]
    seen = cut.keypoints.visible
    torch.testing.assert_close(back[seen], condition.keypoints.xy[seen], atol=1e-5, rtol=1e-5)
    assert (cut.keypoints.visible <= condition.keypoints.visible).all()
    assert (cut.boxes.valid <= condition.boxes.valid).all()
    assert not cut.boxes.xyxy[~cut.boxes.valid].any() and not cut.keypoints.xy[~seen].any()


def test_crop_of_everything_is_identity():
    condition = full()
    assert_same(condition.crop_resize(torch.tensor([[0.0, 0, 1, 1]]).expand(4, 4)), condition, tolerance=1e-5)


def test_crop_moves_marks_with_their_pixels():
    pixels = -torch.ones(1, 1, 8, 8)
    pixels[0, 0, 5, 6] = 1
    points = Keypoints(torch.tensor([[[6.5 / 8, 5.5 / 8], [0.1, 0.1]]]), torch.tensor([[True, True]]))
    cut = Condition(image=Image(pixels), keypoints=points).crop_resize(torch.tensor([[0.5, 0.5, 1, 1]]), (4, 4))
    row, column = divmod(int(cut.image.pixels.flatten().argmax()), 4)
    assert (row, column) == (1, 2) and cut.keypoints.visible.tolist() == [[True, False]]
    torch.testing.assert_close(cut.keypoints.xy[0, 0], torch.tensor([2.5 / 4, 1.5 / 4]))


def test_crop_drops_boxes_with_little_left():
    boxes = Boxes(torch.tensor([[[0.0, 0, 0.5, 0.5], [0.35, 0.35, 0.85, 0.85]]]), torch.ones(1, 2, dtype=torch.bool))
    cut = Condition(boxes=boxes).crop_resize(torch.tensor([[0.4, 0.4, 1, 1]])).boxes
    assert cut.valid.tolist() == [[False, True]]  # 4 % and 81 % are left


# batches, samples, workers


def test_batch_as_float_converts_pixels_only():
    bytes_ = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    batch = Batch(bytes_, Condition(image=Image(bytes_), frames=Frames(bytes_[:, None], torch.tensor([[True]]))))
    out = batch.as_float()
    for pixels in (out.target, out.condition.image.pixels, out.condition.frames.pixels):
        assert pixels.dtype == torch.float32 and pixels.flatten().tolist() == [-1, 1]
    assert torch.equal(out.as_float().target, out.target)


def sample(row, lacking=()):
    condition = full(1, seed=row)
    count = row % 4
    values = {
        "label": row % 5,
        "caption": f"row {row}",
        "boxes": torch.tensor([[0.1, 0.1, 0.2 + 0.1 * i, 0.5] for i in range(count)]).view(-1, 4),
        "keypoints": condition.keypoints.xy[0],
        "image": condition.image.pixels[0],
        "frames": condition.frames.pixels[0],
    }
    parts = {
        "boxes": {"box_labels": torch.arange(count)},
        "keypoints": {"visible": condition.keypoints.visible[0]},
        "image": {"image_mask": condition.image.mask[0]},
        "frames": {"actions": condition.frames.actions[0]},
    }
    out = {}
    for name, value in values.items():
        if name not in lacking:
            out |= {name: value} | parts.get(name, {})
    return Sample(key=f"k{row}", target=torch.full((3, 8, 8), row, dtype=torch.uint8), **out)


def test_collate_keeps_each_row_and_masks_padding():
    samples = [sample(i) for i in range(4)]
    batch = collate(samples, SPEC)
    batch.condition.check_values()
    for row, one in enumerate(samples):
        c = batch.condition.index([row])
        assert int(c.label) == one.label and c.text.strings == (one.caption,)
        count = len(one.boxes)
        assert c.boxes.valid[0].tolist() == [True] * count + [False] * (3 - count)
        assert torch.equal(c.boxes.xyxy[0, :count], one.boxes) and not c.boxes.xyxy[0, count:].any()
        assert torch.equal(c.keypoints.xy[0], one.keypoints) and torch.equal(c.image.pixels[0], one.image)
        assert torch.equal(c.frames.actions[0], one.actions) and c.frames.mask.all()
    assert not batch.condition.present and batch.keys == ("k0", "k1", "k2", "k3")


@pytest.mark.parametrize("name", ["label", "caption", "boxes", "keypoints", "image", "frames"])
def test_collate_nulls_a_field_that_a_row_lacks(name):
    field = "text" if name == "caption" else name
    condition = collate([sample(1), sample(2, lacking=[name])], SPEC).condition
    assert condition.is_present(field).tolist() == [True, False]
    null = replace(condition.null_like().index([1]), present={})
    assert_same(Condition(**{field: getattr(condition.index([1]), field)}), Condition(**{field: getattr(null, field)}))


def test_collate_names_the_bad_row():
    with pytest.raises(DataError, match="row k2: label 9"):
        collate([sample(1), replace(sample(2), label=9)], SPEC)
    with pytest.raises(DataError, match="row k2: image"):
        collate([sample(1), replace(sample(2), image=torch.zeros(3, 9, 9))], SPEC)


class Rows(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Batch(torch.full((4, 3, 8, 8), index), full(4, seed=index).drop(0.5, generator=torch.Generator()))


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_conditions_pickle_across_workers(start):
    context = multiprocessing.get_context(start)
    loaded = DataLoader(Rows(), batch_size=None, num_workers=1, multiprocessing_context=context)
    for index, batch in enumerate(loaded):
        assert_same(batch.condition, Rows()[index].condition)


# specs


def test_spec_survives_json():
    again = ConditionSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert again == SPEC and hash(again) == hash(SPEC)
    assert ConditionSpec.from_dict(json.loads(json.dumps(ConditionSpec().to_dict()))) == ConditionSpec()
    part = SPEC.only(["boxes", "label"])
    assert part.given == ("label", "boxes") and ConditionSpec.from_dict(part.to_dict()) == part
    assert SPEC.without(["boxes"]).boxes is None and SPEC.flip_pairs == ((2, 3),)


def test_target_shapes():
    assert TargetSpec(3, 4, 5).shape == (3, 4, 5) and TargetSpec(3, 4, 5, frames=2).shape == (2, 3, 4, 5)


def test_forms_are_assigned_or_refused_by_name():
    assert assign_forms(SPEC, ("vector", "map"))["image"] == "vector"
    assert assign_forms(SPEC, ("map", "vector"))["image"] == "map"
    with pytest.raises(ConfigError, match=r"label.*data\.ignore=\[label\]"):
        assign_forms(SPEC.only(["label"]), ("temporal",))
