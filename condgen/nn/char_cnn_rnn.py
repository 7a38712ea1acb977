"""Hybrid character CNN-RNN text encoders. Reed et al., CVPR 2016, arXiv:1605.05395 and ICML 2016, arXiv:1605.05396.

Two published shapes, checked against the released Torch code (`HybridCNN.lua`, `HybridCNNLong.lua`, `FixedRNN.lua`,
`FixedGRU.lua`):

    one-hot characters    201 x 70
    conv 4, pool 3/3      198 -> 66 x 384
    conv 4, pool 3/3       63 -> 21 x 512
    conv 4                 18 x cnn_width
    "cvpr":  pool 3/2       8 x 256, ReLU recurrence, Linear 256 -> 1024      1,814,144 parameters
    "icml":  no pool       18 x 512, gated recurrence, Linear 512 -> 1024     4,045,184 parameters

Both recurrences differ from torch.nn.RNN and torch.nn.GRU, in the first step above all, so they are written out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.errors import ConfigError, ShapeError

# '-' stands at two places. The released code numbers characters from left to right into a table, so the later
# place wins and column 36 is never set. Trained weights depend on it.
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
LENGTH = 201  # characters read; longer captions are cut
INIT_RANGE = 0.08
THRESHOLD = 1e-6  # Torch's nn.Threshold() after each convolution: x if x > 1e-6 else 0

_COLUMN = {character: index for index, character in enumerate(ALPHABET)}


def encode_characters(strings: Sequence[str], length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Strings -> one-hot float (B, length, 70) and mask bool (B, length), True = a character of the string.

    Text is lower-cased and accents are taken off; a character outside the alphabet keeps its place as a zero row.
    """
    columns = torch.full((len(strings), length), -1, dtype=torch.int64)
    mask = torch.zeros(len(strings), length, dtype=torch.bool)
    for row, string in enumerate(strings):
        plain = _plain(string)[:length]
        if plain:
            columns[row, : len(plain)] = torch.tensor([_COLUMN.get(c, -1) for c in plain])
            mask[row, : len(plain)] = True
    one_hot = F.one_hot(columns.clamp(min=0), len(ALPHABET)) * (columns >= 0)[..., None]
    return one_hot.to(torch.float32), mask


def _plain(string: str) -> str:
    spread = unicodedata.normalize("NFKD", string.lower())
    return "".join(c for c in spread if not unicodedata.combining(c))


class ReluRecurrence(nn.Module):
    """h_1 = relu(W x_1 + b), h_t = relu(W x_t + b + U h_{t-1} + c). (B, T, V) -> (B, T, V)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, width)
        self.hidden = nn.Linear(width, width)

    def forward(self, sequence: Tensor) -> Tensor:
        from_input = self.input(sequence)
        state = torch.relu(from_input[:, 0])
        states = [state]
        for step in range(1, sequence.shape[1]):
            state = torch.relu(from_input[:, step] + self.hidden(state))
            states.append(state)
        return torch.stack(states, dim=1)


class GatedRecurrence(nn.Module):
    """The released GRU: h_1 = tanh(W x_1 + b) without gates, then for t > 1

        u, r = sigmoid(W_u x + U_u h), sigmoid(W_r x + U_r h)        (with both biases)
        h_t = u * tanh(W x + b + U (r * h) + c) + (1 - u) * h

    torch.nn.GRU gates the first step, applies r after U, and swaps u with 1 - u. (B, T, V) -> (B, T, V).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_update, self.hidden_update = nn.Linear(width, width), nn.Linear(width, width)
        self.input_reset, self.hidden_reset = nn.Linear(width, width), nn.Linear(width, width)
        self.input, self.hidden = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, sequence: Tensor) -> Tensor:
        to_update, to_reset = self.input_update(sequence), self.input_reset(sequence)
        from_input = self.input(sequence)
        state = torch.tanh(from_input[:, 0])
        states = [state]
        for step in range(1, sequence.shape[1]):
            update = torch.sigmoid(to_update[:, step] + self.hidden_update(state))
            reset = torch.sigmoid(to_reset[:, step] + self.hidden_reset(state))
            candidate = torch.tanh(from_input[:, step] + self.hidden(reset * state))
            state = update * candidate + (1 - update) * state
            states.append(state)
        return torch.stack(states, dim=1)


class CharCnnRnn(nn.Module):
    """One-hot characters (B, L, 70) -> sentence vectors (B, embed_width).

    shape        "cvpr" (HybridCNN, 256 wide, ReLU recurrence) or "icml" (HybridCNNLong, 512 wide, gated recurrence)
    embed_width  width of the output; 1024 matches the GoogLeNet features of the papers
    average      mean over the steps of the gated recurrence (the released encoders), else its last step
    """

    def __init__(
        self,
        shape: Literal["cvpr", "icml"] = "icml",
        *,
        embed_width: int = 1024,
        cnn_width: int | None = None,
        dropout: float = 0.0,
        average: bool = True,
    ) -> None:
        super().__init__()
        if shape not in ("cvpr", "icml"):
            raise ConfigError(f"char-CNN-RNN shape {shape!r} does not exist; available: cvpr, icml")
        width = cnn_width or (256 if shape == "cvpr" else 512)
        self.shape, self.width, self.embed_width, self.average = shape, width, embed_width, average
        self.conv1 = nn.Conv1d(len(ALPHABET), 384, 4)
        self.conv2 = nn.Conv1d(384, 512, 4)
        self.conv3 = nn.Conv1d(512, width, 4)
        self.recurrence = ReluRecurrence(width) if shape == "cvpr" else GatedRecurrence(width)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, embed_width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -INIT_RANGE, INIT_RANGE)

    @property
    def steps(self) -> int:
        """Steps of the recurrence for 201 characters: 8 (cvpr) or 18 (icml)."""
        return self.count_steps(LENGTH)

    def count_steps(self, length: int) -> int:
        """Steps left of `length` characters; below 1 the text is too short for the valid convolutions."""
        left = ((length - 3) // 3 - 3) // 3 - 3
        return (left - 3) // 2 + 1 if self.shape == "cvpr" else left

    def hidden_states(self, characters: Tensor) -> Tensor:
        """One-hot characters (B, L, 70) -> states of the recurrence (B, steps, width)."""
        if characters.dim() != 3 or characters.shape[-1] != len(ALPHABET):
            raise ShapeError(f"characters have shape {tuple(characters.shape)}; expected (B, L, {len(ALPHABET)})")
        if self.count_steps(characters.shape[1]) < 1:
            raise ShapeError(f"{characters.shape[1]} characters are too few; pad with zero rows to {LENGTH}")
        x = F.max_pool1d(F.threshold(self.conv1(characters.mT), THRESHOLD, 0.0), 3, 3)  # 201 -> 198 -> 66
        x = F.max_pool1d(F.threshold(self.conv2(x), THRESHOLD, 0.0), 3, 3)  # 63 -> 21
        x = F.threshold(self.conv3(x), THRESHOLD, 0.0)  # 18
        if self.shape == "cvpr":
            x = F.max_pool1d(x, 3, 2)  # 8
        return self.recurrence(x.mT)

    def forward(self, characters: Tensor) -> Tensor:
        states = self.hidden_states(characters)
        # the ReLU recurrence is averaged in every release
        pooled = states.mean(1) if self.average or self.shape == "cvpr" else states[:, -1]
        return self.output(self.dropout(pooled))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, average: bool = True) -> CharCnnRnn:
        """Rebuilds a trained encoder from named tensors that hold one, under any prefix.

        Sizes are read from the tensors. Raises ConfigError when there is none, or more than one.
        """
        prefixes = [
            name.removesuffix("conv1.weight")
            for name, tensor in tensors.items()
            if name.endswith("conv1.weight") and tuple(tensor.shape) == (384, len(ALPHABET), 4)
        ]
        if len(prefixes) != 1:
            raise ConfigError(f"expected the tensors of one char-CNN-RNN encoder, found {len(prefixes)}")
        own = {k.removeprefix(prefixes[0]): v for k, v in tensors.items() if k.startswith(prefixes[0])}
        shape: Literal["cvpr", "icml"] = "icml" if "recurrence.input_update.weight" in own else "cvpr"
        try:
            embed_width, cnn_width = own["output.weight"].shape
            model = cls(shape, embed_width=embed_width, cnn_width=cnn_width, average=average)
            model.load_state_dict({name: own[name] for name in model.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise ConfigError(f"these are not the tensors of a char-CNN-RNN encoder: {error}") from error
        return model
