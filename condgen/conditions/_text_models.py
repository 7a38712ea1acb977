"""Text encoders from transformers: a local folder or a Hub repository with safetensors weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.conditions._text_base import TextEncoder, digest, file_digest
from condgen.errors import ConfigError, DataError
from condgen.types import Text, TextSpec

DEFAULT_TOKENS = 64
MOST_TOKENS = 512
ROWS = 64  # captions per forward pass
CLIP_TYPES = ("clip", "clip_text_model")
READ = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # never a pickle, never Python


class TransformersEncoder(TextEncoder):
    """A frozen transformers text model.

    `pooling` says what `pooled` is:
      mean          mean of the last hidden states over real tokens
      cls           the first hidden state (only where the folder's sentence-transformers files ask for it)
      projection    CLIP's text embedding
    followed by L2 normalisation where the folder's modules.json asks for it. A BERT-style pooler layer is not used:
    most checkpoints leave it untrained. Tokens are the last hidden states, with the special tokens.

    The weights are loaded at the first caption that needs them, so a run whose captions are cached never loads them.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        tokens: bool = False,
        length: int = 0,
        device: torch.device | str = "cpu",
        revision: str | None = None,
    ) -> None:
        from transformers import AutoConfig

        self.name, self.folder, self.device, self.revision = name, folder, torch.device(device), revision
        self._check_files()
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{folder} does not describe a model that transformers knows: {error}") from error
        text = config.get_text_config()
        self.is_clip = config.model_type in CLIP_TYPES
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.pooling, self.normalise, most = self._pooling_files()
        positions = getattr(text, "max_position_embeddings", None) or MOST_TOKENS
        self.max_tokens = min(most or MOST_TOKENS, positions)
        width = int(text.hidden_size)
        pooled = width
        if self.is_clip:
            self.pooling, self.normalise = "projection", False
            pooled = int(getattr(text, "projection_dim", None) or config.projection_dim)
        self.spec = TextSpec(
            pooled=pooled,
            tokens=width if tokens else 0,
            length=min(length or DEFAULT_TOKENS, self.max_tokens) if tokens else 0,
            encoder=name,
        )

    def _check_files(self) -> None:
        if not (self.folder / "config.json").is_file():
            raise ConfigError(f"{self.folder} has no config.json; text.encoder needs a folder that transformers saved")
        if not list(self.folder.glob("*.safetensors")):
            raise ConfigError(
                f"{self.folder} has no *.safetensors weights, and other formats can run code when they are read. "
                "Save the model again with save_pretrained(), or choose text.encoder=minilm"
            )

    def _pooling_files(self) -> tuple[str, bool, int | None]:
        """(pooling, normalise, most tokens) as the sentence-transformers files of the folder say; else mean, no."""
        listing = self.folder / "modules.json"
        if not listing.is_file():
            return "mean", False, None
        modules = _read_json(listing)
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        beyond = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
        if beyond:
            raise ConfigError(f"{self.folder} uses {', '.join(beyond)}, which condgen does not read; choose another")
        pooling = "mean"
        for module, kind in zip(modules, kinds, strict=True):
            if kind == "Pooling":
                asked = _read_json(self.folder / module["path"] / "config.json")
                on = [key for key, value in asked.items() if key.startswith("pooling_mode") and value is True]
                known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
                if len(on) != 1 or on[0] not in known:
                    raise ConfigError(f"{self.folder} pools with {on}; condgen reads mean and cls pooling")
                pooling = known[on[0]]
        limits = self.folder / "sentence_bert_config.json"
        most = _read_json(limits).get("max_seq_length") if limits.is_file() else None
        return pooling, "Normalize" in kinds, most

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every file that is read, the pooling and the lengths."""
        files = sorted(path for pattern in READ for path in self.folder.glob(pattern) if path.is_file())
        hashes = [(path.name, file_digest(path)) for path in files]
        return digest("transformers", 1, hashes, self.pooling, self.normalise, self.max_tokens, self.spec.length)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """(tokeniser, model), loaded from the folder alone: no network, no remote code, no pickle."""
        import transformers
        from transformers.utils import logging

        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        kind: Any = transformers.CLIPTextModelWithProjection if self.is_clip else transformers.AutoModel
        if self.is_clip:
            del local["trust_remote_code"]  # a library class never runs remote code and refuses the option
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            tokeniser = transformers.AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
            model, report = kind.from_pretrained(
                self.folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ConfigError(f"the text encoder {self.name} cannot be loaded from {self.folder}: {error}") from error
        finally:
            if bar:
                logging.enable_progress_bar()
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
        if missing:
            raise ConfigError(f"{self.folder} lacks weights of the model it describes, such as {missing[:3]}")
        if tokeniser.pad_token is None:
            tokeniser.pad_token = tokeniser.eos_token
        tokeniser.padding_side = tokeniser.truncation_side = "right"
        if self.is_encoder_decoder:
            model = model.get_encoder()
        return tokeniser, model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Text:
        length = self.spec.length
        pooled = torch.zeros(len(captions), self.spec.pooled)
        tokens = torch.zeros(len(captions), length, self.spec.tokens)
        masks = torch.zeros(len(captions), length, dtype=torch.bool)
        order = sorted(range(len(captions)), key=lambda row: len(captions[row]))  # near lengths: little padding
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            vectors, states, mask = self._forward([captions[row] for row in rows])
            pooled[rows] = vectors
            if length:
                most = min(length, states.shape[1])
                real = mask[:, :most]
                full = torch.zeros(len(rows), length, self.spec.tokens)
                full[:, :most] = states[:, :most] * real[..., None]
                tokens[rows] = full
                masks[rows] = F.pad(real, (0, length - most))
        if not bool(torch.isfinite(pooled).all() and torch.isfinite(tokens).all()):
            raise DataError(f"the text encoder {self.name} gave NaN or inf; its weights are damaged or not for text")
        return Text(pooled, tokens, masks) if length else Text(pooled)

    def _forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(pooled (b, D), last hidden states (b, l, D), mask (b, l)) on the CPU."""
        tokeniser, model = self._loaded
        batch = tokeniser(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        mask = batch["attention_mask"].bool()
        if mask.shape[1] == 0:  # a tokeniser without special tokens, and only empty captions
            zeros = torch.zeros(len(captions), 0, max(self.spec.tokens, 1))
            return torch.zeros(len(captions), self.spec.pooled), zeros, mask
        output = model(**batch.to(self.device))
        states = output.last_hidden_state
        weight = mask.to(states.device, states.dtype)[..., None]
        if self.pooling == "projection":
            pooled = output.text_embeds
        elif self.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = (states * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        pooled = F.normalize(pooled, dim=1) if self.normalise else pooled
        return pooled.float().cpu(), states.float().cpu(), mask


def hub_folder(repository: str, revision: str | None) -> Path:
    """Downloads (or finds in the local cache) the files of a Hub repository that are read; its folder is the commit."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*READ, "1_Pooling/*"],
            ignore_patterns=["onnx/*", "openvino/*", "*training_args*"],
        )
    except Exception as error:  # the Hub client raises a dozen unrelated classes when it cannot get a file
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"the text encoder {repository}{at} is not on this computer and could not be downloaded ({error}). "
            f"Try again with a network, download it elsewhere with `hf download {repository}` and give that folder "
            "as text.encoder, or use text.encoder=minilm, which needs no network"
        ) from error
    return Path(found)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
