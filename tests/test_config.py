"""Configuration: layers, types, suggestions, refusals (table G of the reliability notes)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from condgen import config, registry
from condgen.config import load, options_of, read_file, read_words, suggest
from condgen.errors import ConfigError

TOY = Path(__file__).parent / "toy_project"


@pytest.fixture(autouse=True)
def toy_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDGEN_PROJECT", str(TOY))


def toy(*words: str, files: tuple[Path, ...] = ()) -> config.Config:
    return load(["task=toy_task", *words], files)


def problems(*words: str, files: tuple[Path, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        toy(*words, files=files)
    return str(caught.value)


# layers


def test_layers_in_order(tmp_path: Path) -> None:
    assert toy("system.preset=tiny").train.steps == 2
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 11, batch_size: 5}\nsystem: {width: 7}\n")
    base = toy()
    assert (base.train.steps, base.train.batch_size, base.train.log_every) == (20, 4, 10)  # preset, system, train.yaml
    assert (base.data["rows"], base.train.sample_every) == (9, 5)  # data file, task file
    over = toy("train.steps=12", files=(file,))
    assert (over.train.steps, over.train.batch_size, over.system["width"]) == (12, 5, 7)
    assert [source for source, _ in over.origins["train.steps"]] == [
        "configs/train.yaml",
        "configs/task/toy_task.yaml",
        "configs/system/toy_regressor.yaml, preset small",
        str(file),
        "command line",
    ]


def test_groups_are_chosen_first_by_whoever_comes_last(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("system: {name: toy_pointer, width: 3}\n")
    assert toy(files=(file,)).system_name == "toy_pointer"
    assert toy("system=toy_regressor", files=(file,)).system_name == "toy_regressor"
    assert toy().preset == "small" and toy("system.preset=tiny").system["width"] == 2


def test_a_task_can_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("task: toy_task\n")
    assert load([], [file]).task == "toy_task"
    with pytest.raises(ConfigError, match=r"no task was chosen.*toy_task"):
        load([])


def test_saved_configuration_loads_to_the_same(tmp_path: Path) -> None:
    words = (
        "system.noise=1e-3",
        "system.levels=[1,2]",
        "optim.regression.lr=3e-4",
        "run.name='007'",
        "system.title='no'",
    )
    first = toy(*words)
    file = tmp_path / "config.yaml"
    file.write_text(first.to_yaml())
    second = load([], [file])
    assert second == first and second.tree == first.tree
    assert second.run.name == "007" and second.system["title"] == "no"  # text that looks like something else stays text
    assert second.optim["regression"].lr == 3e-4 and second.optim["regression"].betas == first.optim["default"].betas


def test_the_record_of_a_resumed_run_does_not_resume_again(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(toy("train.resume=latest").record())
    assert load([], [file]).launch.resume is None


def test_explain_names_the_file() -> None:
    text = toy("train.steps=3").explain("train.steps")
    assert text.splitlines()[0] == "train.steps = 3"
    assert text.splitlines()[-1].strip() == "command line: 3"
    assert "default" in toy().explain("system.norm")
    with pytest.raises(ConfigError, match=r"Did you mean 'system.width'"):
        toy().explain("system.widht")


# G1, G3


def test_unknown_keys_at_any_depth_and_all_at_once() -> None:
    text = problems(
        "train.batch_sise=3", "systm.widht=3", "optim.regression.lrr=1", "train.lr=1", "steps=3", "train.workers=1"
    )
    assert text.startswith("6 problems")
    for given, meant in (
        ("train.batch_sise", "train.batch_size"),
        ("systm.widht", "system.width"),
        ("optim.regression.lrr", "optim.regression.lr"),
        ("train.lr", "optim.default.lr"),
        ("steps", "train.steps"),
        ("train.workers", "data.workers"),
    ):
        assert f"unknown option {given!r} (command line). Did you mean {meant!r}?" in text


def test_an_unknown_key_names_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {stepz: 3}\n")
    assert f"unknown option 'train.stepz' ({file}). Did you mean 'train.steps'?" in problems(files=(file,))


# G2


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.steps=true", "expected int"),
        ("train.steps=1.5", "expected int"),
        ("train.steps=abc", "expected int"),
        ("train.steps=null", "expected int"),
        ("train.steps=-1", "at least 1"),
        ("train.steps=[1]", "expected int"),
        ("train.batch_size=0", "at least 1"),
        ("train.compile=1", "expected true or false"),
        ("train.compile=maybe", "expected true or false"),
        ("train.ema_decay=2", "from 0 to 1"),
        ("train.precision=fp8", "one of auto, fp32, bf16, fp16"),
        ("optim.default.lr=.nan", "must be a finite number"),
        ("optim.default.lr=-1", "at least 0"),
        ("optim.default.betas=[0.5]", "list of 2"),
        ("optim.default.betas=[0.5,7]", "from 0 to 1"),
        ("optim.default.name=adan", "one of adam"),
        ("optim.default=3", "optim.default"),
        ("system.noise=.inf", "must be a finite number"),
        ("system.width=99", "from 1 to 64"),
        ("system.norm=l3", "one of l1, l2"),
        ("system.scales=[1]", "list of 2: float, float"),
        ("system.scales=1", "list of 2"),
        ("system.levels=[1,x]", "list of int"),
        ("system.width={a: 1}", "expected int"),
        ("run.name=no", "Quote it"),
        ("data.ignore=[lable]", "one of label"),
        ("data.workers=-1", "at least 0"),
        ("eval.num_samples=1", "at least 2"),
    ],
)
def test_wrong_values_are_named(word: str, says: str) -> None:
    text = problems(word)
    assert word.partition("=")[0] in text and says in text and "1 problem" in text


def test_documented_conversions() -> None:
    made = toy("system.noise=1e-3", "system.width='8'", "system.bias=no", "system.warm=2", "system.scales=[1,2]")
    assert made.system["noise"] == 1e-3 and made.system["width"] == 8 and made.system["bias"] is False
    assert made.system["warm"] == 2.0 and isinstance(made.system["warm"], float)
    assert made.system["scales"] == (1.0, 2.0) and toy("system.warm=null").system["warm"] is None
    assert toy("train.resume=5").launch.resume == 5 and toy("train.resume=runs/x").launch.resume == "runs/x"


def test_missing_required_option_is_named() -> None:
    assert "system.width is missing: ToyPointer needs it (int)" in problems("system=toy_pointer")


# G4, G5


def test_unknown_names_get_suggestions_and_import_nothing() -> None:
    before = set(sys.modules)
    text = problems("system=toy_regresor", "data=toy_colors", "train.step=3")
    assert "Did you mean 'toy_regressor'?" in text and "Did you mean 'toy_colours'?" in text
    assert "Did you mean 'train.steps'?" in text  # and the rest is still checked
    loaded = {name for name in set(sys.modules) - before if name.startswith("condgen_project.")}
    assert not any("systems" in name or ".data." in name for name in loaded)


@pytest.mark.parametrize("name", ["os.system", "../x", "_target_", "condgen.systems.gan_cls", "toy_regressor.py", "''"])
@pytest.mark.parametrize("group", ["task", "system", "data"])
def test_names_are_never_paths(group: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no|no task was chosen"):
        load(["task=toy_task", f"{group}={name}"])


def test_target_is_just_an_unknown_key() -> None:
    assert "unknown option 'system._target_'" in problems("system._target_=os.system")


# G6, G7


@pytest.mark.parametrize(
    "text",
    [
        "train: {steps: 1}\ntrain: {steps: 2}\n",
        "train: !!python/object/apply:os.system ['true']\n",
        "run: {dir: !!python/object/apply:pathlib.Path ['x']}\n",
        "run: {dir: !!binary aGVsbG8=}\n",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{c}: &{c} [{','.join(['*' + b] * 9)}]\n" for b, c in zip("abcdefg", "bcdefgh", strict=True)),
        "run: {name: '${oc.env:CONDGEN_TEST_SECRET}'}\n",
        "run: {'${oc.env:CONDGEN_TEST_SECRET}': 1}\n",
        "run: {name: '${system.name}'}\n",
        "run: {name: '???'}\n",
        "1: 2\n",
        "- a\n",
        "[unclosed\n",
        "train: 5\n",
    ],
)
def test_files_that_are_more_than_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CONDGEN_TEST_SECRET", "s3cr3t")
    file = tmp_path / "evil.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        toy(files=(file,))
    assert "evil.yaml" in str(caught.value) and "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "run.name=${oc.env:CONDGEN_TEST_SECRET}",
        "run.name='x${oc.env:HOME}'",
        "run.name=!!python/object/apply:os.getcwd []",
        "run.name=[1",
        "run.name={a: 1, a: 2}",
        "a..b=1",
        "=1",
        "train.steps",
        "--steps=3",
        "train=5",
    ],
)
def test_words_that_are_more_than_values(word: str) -> None:
    with pytest.raises(ConfigError):
        toy(word)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_file(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xe9}\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_file(tmp_path / "latin.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (config.reading.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="bytes"):
        read_file(tmp_path / "huge.yaml")


def test_a_later_word_wins_and_groups_keep_their_options() -> None:
    tree = read_words(["system.width=3", "system=toy_regressor", "system.width=4"]).tree
    assert tree == {"system": {"width": 4, "name": "toy_regressor"}}


# G9


def test_options_without_effect_are_warned_about() -> None:
    made = toy("optim.default.name=sgd", "optim.default.betas=[0,0.9]", "optim.default.decay_every=3", "text.length=4")
    assert len(made.warnings) == 3
    assert "optim.default.betas (command line) has no effect: optim.default.name is sgd" in made.warnings
    assert toy("optim.default.schedule=step", "optim.default.decay_every=3").warnings == ()
    every = toy("optim.default.schedule=exponential", "optim.default.decay_factor=1", "optim.default.decay_every=3")
    assert len(every.warnings) == 1 and "exponential: every step" in every.warnings[0]


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("optim.default.alpha=0.9", "optim.default.name=rmsprop"),
        ("optim.default.momentum=0.9", "optim.default.name=sgd"),
        ("optim.regression.eps=1e-6", None),
        ("optim.default.decay_factor=0.1", "optim.default.schedule=step optim.default.decay_every=5"),
        ("optim.default.decay_factor=0.99", "optim.default.schedule=exponential"),
        ("optim.default.decay_start=3", "optim.default.schedule=linear"),
        ("train.best_is=min", "train.best=fid"),
        ("text.length=4", "text.tokens=true"),
    ],
)
def test_each_option_without_effect_and_what_gives_it_one(word: str, wanted: str | None) -> None:
    """G9: a warning that names the option, and none once the other value is set."""
    name = word.partition("=")[0]
    if wanted is None:  # has an effect as it is
        assert toy(word).warnings == ()
    else:
        assert [w.split()[0] for w in toy(word).warnings] == [name]
        assert toy(word, *wanted.split()).warnings == ()


# schemas


def test_a_resolved_file_repeats_values_without_warnings(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(toy().to_yaml())
    assert toy(files=(file,)).warnings == ()
    assert "text.length" in toy("text.length=7", files=(file,)).warnings[0]


def test_engine_refusals_become_configuration_errors() -> None:
    assert "ema_decay" in problems("train.ema_decay=1")  # within the closed bounds, refused by TrainOptions itself


def test_suggest_stays_silent_without_a_near_name() -> None:
    assert suggest("zzz", ["train.steps"]) == "" and suggest("train.stpes", ["train.steps"]) != ""


def test_shared_option_classes_have_no_positional_fields_without_default() -> None:
    for cls in (config.resolve.TextOptions, config.resolve.RunOptions, config.resolve.LaunchOptions):
        assert all(option.default is not config.schema.REQUIRED for option in options_of(cls).values())


# what is shipped

SHIPPED = Path(registry.PACKAGE).parent / "configs"


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_files_are_plain(file: Path) -> None:
    tree = read_file(file).tree
    if file.parent.name not in ("accelerate", "ladder"):
        assert tree["name"] == file.stem


@pytest.mark.parametrize("task", [p.stem for p in sorted(SHIPPED.glob("task/*.yaml"))])
def test_every_task_and_preset_loads(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONDGEN_PROJECT")
    monkeypatch.chdir(tmp_path)
    default = load([f"task={task}"])
    presets = read_file(SHIPPED / "system" / f"{default.system_name}.yaml").tree["presets"]
    for preset in presets:
        made = load([f"task={task}", f"system.preset={preset}"])
        file = tmp_path / f"{preset}.yaml"
        file.write_text(made.to_yaml())
        assert load([], [file]) == made
    for data in registry.names("data"):
        try:
            load([f"task={task}", f"data={data}", "data.root=somewhere"])
        except ConfigError as error:  # a layout may need more than its root, and says what
            assert "missing" in str(error) and "unknown" not in str(error)


def test_what_makes_a_clip_fit_the_task_holds_for_other_data_sets_that_do_not_say_it() -> None:
    def given(*words: str) -> tuple[int, bool, int]:
        data = load([*words, "data.root=clips"]).data
        return data["past"], data["overlap"], data["size"]

    assert given("task=frame2video", "data=clips") == (1, True, 64)
    assert given("task=frame2video", "data=clips", "data.past=2") == (2, True, 64)
    assert given("task=frames2video", "data=clips") == (4, False, 64)
    assert given("task=video", "data=clips") == (0, False, 64)
    assert given("task=frame2video", "data=moving_mnist") == (10, False, 64)  # its own file says it
