"""The caption cache: embeds once, survives damage, two processes, and a folder it cannot write."""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from condgen.conditions._text_base import TextEncoder, digest
from condgen.conditions.text_encoders import CachedEncoder, text_encoder
from condgen.errors import DataError
from condgen.types import Condition, Text, TextSpec


class Counting(TextEncoder):
    """Embeds a caption as a function of its letters and counts what it is asked."""

    def __init__(self, tokens=False, scale=1.0, version=1):
        self.name, self.asked, self.scale, self.version = "counting", [], scale, version
        self.spec = TextSpec(pooled=3, tokens=2 if tokens else 0, length=4 if tokens else 0, encoder="counting")

    @property
    def fingerprint(self):
        return digest("counting", self.version, self.spec.tokens)

    def encode_captions(self, captions):
        self.asked.extend(captions)
        pooled = torch.tensor([[len(c), sum(map(ord, c)) % 97, 1 / 3] for c in captions]).view(-1, 3) * self.scale
        if not self.spec.tokens:
            return Text(pooled)
        mask = torch.tensor([[i < min(4, len(c)) for i in range(4)] for c in captions]).view(-1, 4)
        return Text(pooled, pooled[:, :1, None].expand(-1, 4, 2) * mask[..., None], mask)


def attach(cache, *strings, present=None):
    present = {} if present is None else {"text": torch.tensor(present)}
    return cache.attach(Condition(text=Text(strings=strings), present=present)).text


def test_each_caption_is_embedded_once(tmp_path):
    encoder = Counting()
    cache = CachedEncoder(encoder, tmp_path)
    cache.fill(["a fox", "a plane\na fox", " a  fox "])
    assert sorted(encoder.asked) == ["a fox", "a plane"]
    for _ in range(3):
        attach(cache, "a fox", "a plane")
    assert len(encoder.asked) == 2 and len(cache) == 2


@pytest.mark.parametrize("tokens", [False, True])
def test_disk_gives_bit_equal_values_without_the_encoder(tmp_path, tokens):
    first = CachedEncoder(Counting(tokens), tmp_path)
    strings = ("a fox", "", "a plane\na fox", "\ud83e x")
    first.fill(strings)
    encoder = Counting(tokens)
    one, two = attach(first, *strings), attach(CachedEncoder(encoder, tmp_path), *strings)
    assert not encoder.asked
    for (name, a), (_, b) in zip(one.tensors(), two.tensors(), strict=True):
        assert torch.equal(a, b), name
    direct = Counting(tokens).encode(strings)
    torch.testing.assert_close(one.pooled, direct.pooled, rtol=1e-3, atol=1e-3)
    if tokens:
        assert torch.equal(one.mask, direct.mask)
        torch.testing.assert_close(one.tokens, direct.tokens, rtol=1e-3, atol=1e-3)
        assert one.mask[1].sum() == 0  # an empty caption keeps no token here


def test_values_beyond_float16_are_kept(tmp_path):
    CachedEncoder(Counting(scale=1e5), tmp_path).fill(["a fox"])
    encoder = Counting(scale=1e5)
    again = attach(CachedEncoder(encoder, tmp_path), "a fox")
    assert torch.equal(again.pooled, Counting(scale=1e5).encode(["a fox"]).pooled) and not encoder.asked


def test_another_fingerprint_is_another_cache(tmp_path):
    CachedEncoder(Counting(), tmp_path).fill(["a fox"])
    changed = Counting(version=2)
    CachedEncoder(changed, tmp_path).fill(["a fox"])
    assert changed.asked == ["a fox"] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_shard_is_rebuilt_with_a_warning(tmp_path, damage):
    CachedEncoder(Counting(), tmp_path).fill(["a fox"])
    (shard,) = tmp_path.glob("*/*.captions")
    data = bytearray(shard.read_bytes())
    data[-3] ^= 0x40
    shard.write_bytes({"truncate": bytes(data[:-9]), "flip": bytes(data), "empty": b"", "text": b"hello"}[damage])
    encoder = Counting()
    with pytest.warns(UserWarning, match="damaged"):
        again = CachedEncoder(encoder, tmp_path)
        again.fill(["a fox"])
    assert encoder.asked == ["a fox"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = Counting()
        CachedEncoder(third, tmp_path).fill(["a fox"])
    assert not third.asked


def test_an_interrupted_write_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    cache = CachedEncoder(Counting(), tmp_path)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("condgen.conditions._text_cache.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(["a fox"])
    assert not [path for path in tmp_path.glob("*/*") if path.is_file()]


def test_a_folder_that_cannot_be_written_only_warns(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    encoder = Counting()
    cache = CachedEncoder(encoder, blocked)
    with pytest.warns(UserWarning, match="memory only"):
        cache.fill(["a fox"])
    assert attach(cache, "a fox").pooled[0, 0] == 5 and len(encoder.asked) == 1


def test_absent_rows_become_null(tmp_path):
    text = attach(CachedEncoder(Counting(True), tmp_path), "a fox", "a plane", present=[True, False])
    assert text.pooled[0].any() and not text.pooled[1].any() and not text.tokens[1].any() and not text.mask[1].any()
    assert text.strings == ("a fox", "")


def test_attach_leaves_other_conditions_alone(tmp_path):
    cache = CachedEncoder(Counting(), tmp_path)
    label, ready = Condition(label=torch.zeros(2, dtype=torch.int64)), Condition(text=Text(torch.ones(2, 3)))
    assert cache.attach(label) is label and cache.attach(ready) is ready
    with pytest.raises(DataError, match="neither"):
        cache.attach(Condition(text=Text()))


def test_captions_met_late_reach_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("condgen.conditions._text_cache.SHARD_CAPTIONS", 3)
    cache = CachedEncoder(Counting(), tmp_path)
    for caption in ("a", "b", "c", "d"):
        attach(cache, caption)
    encoder = Counting()
    CachedEncoder(encoder, tmp_path).fill(["a", "b", "c"])
    assert not encoder.asked
    cache.flush()
    CachedEncoder(encoder, tmp_path).fill(["d"])
    assert not encoder.asked


def test_progress_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("condgen.conditions._text_cache.SHARD_CAPTIONS", 2)
    told = []
    CachedEncoder(Counting(), tmp_path).fill(["a", "b", "c"], progress=lambda *done: told.append(done))
    assert told == [(2, 3), (3, 3)]


def test_cheap_encoders_use_no_disk(tmp_path):
    cache = CachedEncoder(text_encoder("hash_bow"), tmp_path)
    cache.fill(["a fox"])
    assert attach(cache, "a fox").pooled.any() and not list(tmp_path.iterdir())


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDGEN_CACHE", str(tmp_path))
    assert CachedEncoder(Counting()).folder.parent == tmp_path / "text"
    monkeypatch.delenv("CONDGEN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CachedEncoder(Counting()).folder.parent == tmp_path / ".cache" / "condgen" / "text"


def test_threads_may_share_a_folder(tmp_path):
    """Eight writers of overlapping captions: every shard stays whole."""

    def work(first):
        CachedEncoder(Counting(True), tmp_path).fill([f"caption {i}" for i in range(first, first + 20)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(0, 40, 5)))
    encoder = Counting(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CachedEncoder(encoder, tmp_path).fill([f"caption {i}" for i in range(55)])
    assert not encoder.asked and not list(tmp_path.glob("*/.writing-*"))


@pytest.mark.faults
def test_two_processes_may_share_a_folder(tmp_path):
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_text_cache import Counting, CachedEncoder\n"
        "for n in range(9): CachedEncoder(Counting(True), sys.argv[1]).fill([f'caption {i}' for i in range(5 * n)])\n"
    )
    here = str(Path(__file__).parent)
    argv = [sys.executable, "-W", "error::UserWarning", "-c", program, str(tmp_path), here, *sys.path]
    children = [subprocess.Popen(argv) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    encoder = Counting(True)
    CachedEncoder(encoder, tmp_path).fill([f"caption {i}" for i in range(40)])
    assert not encoder.asked
