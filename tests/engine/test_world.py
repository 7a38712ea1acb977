"""Choice of device and number format, memory layout, and agreement of one process with itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from condgen.engine import world as world_module
from condgen.engine.world import World, gains_from_bf16, to_floats
from condgen.errors import ConfigError
from condgen.types import Batch


@pytest.fixture
def started():
    worlds = []

    def start(**options):
        worlds.append(World.start(**options))
        return worlds[-1]

    yield start
    for world in worlds:
        world.close()


@pytest.mark.parametrize(
    ("amx", "avx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_takes_bf16_only_where_the_cpu_gains(started, monkeypatch, amx, avx, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    world = started(device="cpu")
    assert (world.precision, world.channels_last) == (expected, True)
    assert started(device="cpu", precision="fp32").precision == "fp32"


def test_a_torch_without_the_private_checks_means_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert gains_from_bf16(torch.device("cpu")) is False


def test_cuda_decides_by_native_support(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert not gains_from_bf16(torch.device("cuda"))
    assert asked == [False]


def test_denormals_are_flushed_while_training_on_a_cpu(started):
    """A saturated critic makes them, and they slow 3-D convolutions down by up to 15 times."""
    torch.set_flush_denormal(False)
    tiny = torch.tensor([1e-39])
    assert (tiny * 0.5).item() != 0
    world = started(device="cpu")
    assert (tiny * 0.5).item() == 0
    world.close()
    assert (tiny * 0.5).item() != 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "gpu"}, "there is no device named 'gpu'"),
        ({"device": "cpu", "precision": "fp61"}, "Did you mean 'fp16'"),
        ({"device": "cpu", "precision": "fp16"}, "needs a GPU"),
    ],
)
def test_impossible_choices_are_explained(started, given, message):
    with pytest.raises(ConfigError, match=message):
        started(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_cuda_without_a_gpu_is_explained(started):
    with pytest.raises(ConfigError, match="sees no GPU"):
        started(device="cuda")


def test_start_seeds_and_flushes_denormals(started):
    draws = []
    for seed in (1, 1, 2):
        started(device="cpu", seed=seed)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[1] != draws[2]
    assert float(torch.tensor([1e-39]) * 1.0) == 0


def test_place_sets_memory_formats_and_keeps_values():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Linear(2, 2))
    before = {n: p.clone() for n, p in module.named_parameters()}
    World().place(module)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    plain = World(channels_last=False).place(nn.Conv2d(3, 4, 3))
    assert plain.weight.is_contiguous()


def test_place_batch_gives_float_pixels_with_channels_innermost():
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    placed = World().place_batch(Batch(images)).target
    assert placed.dtype == torch.float32 and placed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(placed, images.float() / 127.5 - 1)
    clips = torch.randint(256, (2, 6, 3, 4, 5), dtype=torch.uint8)
    placed = World().place_batch(Batch(clips)).target
    torch.testing.assert_close(placed, clips.float() / 127.5 - 1)
    assert placed.transpose(1, 2).is_contiguous(memory_format=torch.channels_last_3d)


def test_autocast_and_scaler_follow_the_precision():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        world = World(precision=precision)
        with world.autocast():
            assert layer(x).dtype == kind
        assert world.scaler() is None


def test_one_process_agrees_with_itself():
    world = World()
    assert world.agree(True, False) == (True, False) and world.any(True) is True
    assert world.mean({"a": torch.tensor(2.5), "b": 3}) == {"a": 2.5, "b": 3.0}
    assert world.broadcast("x") == "x" and world.objects(1) == [1]
    rows = torch.arange(3)
    assert world.gather(rows) is rows
    module = nn.Linear(1, 1)
    assert world.wrap(module) is module
    world.barrier()


def test_seed_gives_what_torch_s_own_seeding_gives():
    World().seed(7, "a")
    first = torch.rand(3)
    torch.manual_seed(world_module.rng.derive(7, "a"))
    assert torch.equal(first, torch.rand(3))


def test_floats_keep_names_and_order():
    assert list(to_floats({"b": 1, "a": torch.tensor([2.0]), "c": 0.5}).items()) == [("b", 1.0), ("a", 2.0), ("c", 0.5)]
