"""Captions as they come from files and people -> clean single-line strings that every tokeniser accepts."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from condgen.errors import DataError

MAX_CHARACTERS = 2000  # of one caption; the longest encoder here reads 256 tokens
_MAX_RAW = 4 * MAX_CHARACTERS  # cut before the slow steps, so that a 100 kB caption costs no more than a long one


def clean_caption(caption: str) -> str:
    """One caption as every encoder reads it.

    Unpaired surrogates (what is left of invalid UTF-8) become U+FFFD; NUL and other control characters become
    spaces; the text is put in Unicode form NFC; runs of white space become one space; the ends are stripped; at
    most 2,000 characters are kept. Emoji and right-to-left text stay as they are, in logical order. The result may
    be empty: encoders give empty captions a fixed, finite embedding.
    """
    if not isinstance(caption, str):
        raise DataError(f"a caption must be a string; got {type(caption).__name__}. Decode bytes as UTF-8 first")
    text = caption[:_MAX_RAW].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    text = unicodedata.normalize("NFC", text)
    return re.sub(r"\s+", " ", text).strip()[:MAX_CHARACTERS].rstrip()


@lru_cache(maxsize=1 << 16)
def split_captions(string: str) -> tuple[str, ...]:
    """The captions of one row, which newlines separate, each cleaned; ("",) when nothing is left."""
    if not isinstance(string, str):
        raise DataError(f"a caption must be a string; got {type(string).__name__}. Decode bytes as UTF-8 first")
    cleaned = (clean_caption(part) for part in re.split(r"[\r\n]+", string))
    return tuple(part for part in cleaned if part) or ("",)
