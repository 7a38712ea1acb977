"""Names become files, files become classes, and nothing else becomes anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from condgen import registry
from condgen.errors import ConfigError
from condgen.systems.base import Trainable

TOY = Path(__file__).parent / "toy_project"
SYSTEM = '''"""{doc}"""

from condgen.systems.base import System


class {name}(System):
    def phases(self):
        return []

    def sample(self, condition, *, random):
        raise ValueError
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONDGEN_PROJECT", str(tmp_path))
    (tmp_path / "systems").mkdir()
    return tmp_path


def write(folder: Path, name: str, text: str | None = None) -> None:
    (folder / "systems" / f"{name}.py").write_text(text or SYSTEM.format(doc=name, name="Mine"))


def test_a_users_file_is_found_beside_the_shipped_ones(project: Path) -> None:
    write(project, "mine")
    assert {"mine", "gan_cls"} <= set(registry.names("systems"))
    assert registry.load("systems", "mine", Trainable).__name__ == "Mine"
    assert registry.summary("systems", "mine") == "mine"


def test_a_users_file_hides_a_shipped_one_of_the_same_name(project: Path) -> None:
    write(project, "gan_cls")
    assert registry.load("systems", "gan_cls", Trainable).__name__ == "Mine"


def test_support_files_and_private_files_are_no_entries(project: Path) -> None:
    for name in ("_parts", "Upper", "two-words"):
        write(project, name)
    listed = registry.names("systems")
    assert not {"_parts", "Upper", "two-words", "base"} & set(listed)
    assert "text_encoders" not in registry.names("conditions")
    assert not {"base", "decode", "checks", "archive"} & set(registry.names("data"))


def test_listing_and_summaries_import_nothing(project: Path) -> None:
    write(project, "broken", '"""A broken one."""\nimport does_not_exist\n')
    before = set(sys.modules)
    assert "broken" in registry.names("systems") and registry.summary("systems", "broken") == "A broken one."
    assert not {name for name in set(sys.modules) - before if "broken" in name}


def test_a_broken_file_breaks_only_itself(project: Path) -> None:
    write(project, "broken", "import does_not_exist\n")
    write(project, "mine")
    with pytest.raises(ModuleNotFoundError):
        registry.load("systems", "broken", Trainable)
    assert not any(name.endswith(".broken") for name in sys.modules)  # a second try sees the same error
    assert registry.load("systems", "mine", Trainable).__name__ == "Mine"


def test_exactly_one_class(project: Path) -> None:
    write(project, "empty", '"""Nothing."""\nfrom condgen.systems.base import System\n')
    write(project, "two", SYSTEM.format(doc="two", name="One") + "\n\nclass Two(One):\n    pass\n")
    for name, says in (("empty", "it defines none"), ("two", "One, Two")):
        with pytest.raises(ConfigError, match=says):
            registry.load("systems", name, Trainable)


@pytest.mark.parametrize("name", ["", "..", "../systems/mine", "a.b", "/etc/passwd", "os.system", "mine.py", "Mine"])
def test_names_are_plain_words(project: Path, name: str) -> None:
    write(project, "mine")
    with pytest.raises(ConfigError, match="there is no systems named"):
        registry.path("systems", name)


def test_suggestion_and_full_list(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'gan_cls'\? Available: .*gan_cls"):
        registry.path("systems", "gan_clss")


@pytest.mark.parametrize("kind", ["systems", "data", "conditions", "tasks"])
def test_everything_shipped_has_a_summary(kind: str) -> None:
    for name in registry.names(kind):
        assert registry.summary(kind, name), f"{kind}/{name}.py has no docstring"


def test_every_data_set_and_system_has_its_yaml() -> None:
    for kind, group in (("systems", "system"), ("data", "data"), ("tasks", "task")):
        assert set(registry.names(kind)) == set(registry.names(f"configs/{group}", ".yaml"))
