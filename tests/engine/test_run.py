"""The run folder: names, never overwriting, records, and file names made from any text."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from condgen.engine.run import RunFolder, png_bytes, slug
from condgen.errors import ConfigError


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "runs", "a")


def test_a_taken_name_gets_a_number(tmp_path):
    made = [RunFolder.create(tmp_path / "deep" / "runs", None, "text2image").name for _ in range(3)]
    assert made == ["text2image", "text2image-2", "text2image-3"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "x" * 200, "a\0b"])
def test_names_that_are_not_folder_names_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"run\.name"):
        RunFolder.create(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make a run folder"):
        RunFolder.create(tmp_path / "file" / "runs", "a")


def test_open_lists_the_runs_beside_it(run):
    run.write_config("a: 1\n")
    assert RunFolder.open(run.path).path == run.path
    with pytest.raises(ConfigError, match=r"b does not exist; runs in .*: a$"):
        RunFolder.open(run.path.parent / "b")
    (run.path.parent / "c").mkdir()
    with pytest.raises(ConfigError, match="not a run folder"):
        RunFolder.open(run.path.parent / "c")


def test_an_earlier_configuration_is_kept(run):
    for text in ("a: 1\n", "a: 1\n", "a: 2\n", "a: 3\n"):
        run.write_config(text)
    files = {path.name: path.read_text() for path in run.path.glob("*.yaml")}
    assert files == {"config.yaml": "a: 3\n", "config-1.yaml": "a: 1\n", "config-2.yaml": "a: 2\n"}


def test_command_can_be_pasted_and_grows(run):
    run.write_command(["condgen", "train", "data.root=my data"])
    run.write_command(["condgen", "train", "train.resume=latest"])
    assert (
        run.path / "command.txt"
    ).read_text() == "condgen train 'data.root=my data'\ncondgen train train.resume=latest\n"


def test_environment_has_versions_and_no_environment_variable(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2-hunter2")
    run.write_environment(world_size=2, device="cpu")
    text = (run.path / "environment.json").read_text()
    found = json.loads(text)
    assert {"condgen", "torch", "safetensors"} <= set(found["packages"])
    assert found["world_size"] == 2 and found["device"] == "cpu" and found["threads"] >= 1
    assert "hunter2" not in text and os.environ["PATH"] not in text and str(run.path) not in text


def test_status_is_replaced_whole(run):
    assert run.read_status() is None
    run.status("running", 0, "", 0)
    run.status("stopped", 75, "SIGTERM", 12)
    found = run.read_status()
    assert (found["state"], found["code"], found["reason"], found["step"]) == ("stopped", 75, "SIGTERM", 12)
    assert not list(run.path.glob(".status*"))
    with pytest.raises(ValueError, match="allowed are running, done, failed, stopped"):
        run.status("sleeping", 0, "", 0)


def test_a_status_that_cannot_be_written_does_not_hide_the_error_that_caused_it(run, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("condgen.engine.run.replace_file", full)
    run.status("failed", 1, "disk", 3)
    assert "No space left" in caplog.text


def test_quarantine_and_crash_records(run):
    run.quarantine("row-1", "truncated\nimage")
    run.quarantine("row-2", "empty caption")
    lines = (run.path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["row-1", "row-2"]
    path = run.write_crash(1234, {"phase": "generator", "keys": ["a"], "loss": float("nan")})
    assert path.name == "step-00001234.json" and json.loads(path.read_text())["phase"] == "generator"


def test_folders_appear_when_asked_for(run):
    assert [path.name for path in run.path.iterdir()] == []
    assert run.samples.is_dir() and run.export.is_dir() and run.evals.name == "eval" and run.crash.is_dir()


# file names from text


@given(st.text(max_size=600))
@settings(max_examples=200, deadline=None)
def test_a_slug_is_a_safe_file_name_for_any_text(text):
    name = slug(text)
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and 10 <= len(name) <= 49
    assert not name.startswith("-") and os.path.basename(name) == name and slug(text) == name


@pytest.mark.parametrize("text", ["../../etc/passwd", "a" * 500, "a\0b", "", "...", "CON", "赤い狐", "\ud800"])
def test_hostile_captions_stay_inside_the_folder(tmp_path, text):
    path = tmp_path / f"{slug(text)}.png"
    path.write_bytes(b"")
    assert path.resolve().parent == tmp_path.resolve()


def test_slugs_stay_readable_and_tell_texts_apart():
    assert slug("A red fox!").startswith("a-red-fox-") and slug("Café").startswith("cafe-")
    assert len({slug(text) for text in ("a red fox", "a red fox!", "A red fox", "赤い狐", "青い狐")}) == 5


def test_saved_pictures_carry_no_metadata():
    image = Image.new("RGB", (4, 4), "red")
    image.info |= {"comment": "secret", "dpi": (72, 72), "icc_profile": b"x" * 10}
    image.getexif()[0x010E] = "secret place"
    note = PngImagePlugin.PngInfo()
    note.add_text("caption", "secret")
    import io

    carrier = io.BytesIO()
    image.save(carrier, "PNG", pnginfo=note, exif=image.getexif())
    loaded = Image.open(carrier, formats=("PNG",))
    assert loaded.info
    for source in (image, loaded):
        data = png_bytes(source)
        found = Image.open(io.BytesIO(data), formats=("PNG",))
        assert found.info == {} and not dict(found.getexif()) and b"secret" not in data
        assert found.getpixel((1, 1)) == (255, 0, 0)
    assert loaded.info, "the caller's picture is not changed"
