"""Captions from strangers: normalised to one clean line or dropped, never a crash (RELIABILITY D10)."""

import pytest

from condgen.data._captions import clean
from condgen.data._manifest import MAX_CAPTION


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a red fox", "a red fox"),
        ("  a\tred \r\n fox ", "a red fox"),
        ("a\0red\x1bfox\u2028x", "a red fox x"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u05e9\u05dc\u05d5\u05dd \U0001f98a", "\u05e9\u05dc\u05d5\u05dd \U0001f98a"),
        ("\ud800x", "x"),
        (" \n\0 ", ""),
        ("", ""),
        ("x" * MAX_CAPTION, "x" * MAX_CAPTION),
        ("x" * 100_000, ""),
    ],
)
def test_clean(given: str, expected: str) -> None:
    assert clean(given) == expected
    assert clean(clean(given)) == clean(given)
