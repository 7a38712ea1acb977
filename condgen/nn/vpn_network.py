"""A video pixel network as a whole: the codes of frames, their state over time, the decoder of each frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from condgen.nn.causal import run
from condgen.nn.vpn import ConvLstm, Encoder, IndependentDecoder, Kind, State
from condgen.nn.vpn_decoder import MaskedDecoder, TwoStackDecoder

DecoderKind = Literal["masked", "two-stack", "independent"]


@dataclass(frozen=True)
class Told:
    """A condition as the network reads it.

    vector (B, V) or None; past (B, P, C + A, H, W), P may be 0; given (B, P) True = the LSTM takes this step;
    actions (B, N, A) of the target's frames, N = 0: none are known
    """

    vector: Tensor | None
    past: Tensor
    given: Tensor
    actions: Tensor


def each(vector: Tensor | None, count: int) -> Tensor | None:
    """(B, V) -> (count B, V): the vector of every frame. Frames of a clip lie one after the other, all clips at once:
    a slice of time is then one piece of memory, and its gradient is put back without filling the others."""
    return None if vector is None else vector.repeat(count, 1)


class VpnNetwork(nn.Module):
    """Clip (B, T, C, H, W) in [-1, 1] -> parameters (B, T, P, H, W), all frames at once; see `condgen.systems.vpn`.

    shape     (C, H, W) of a frame; actions, vector: widths, 0 = none
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        actions: int,
        vector: int,
        decoder: DecoderKind,
        outputs: int,
        kind: Kind,
        width: int,
        encoder_blocks: int,
        decoder_blocks: int,
        dilated: bool,
        hidden: int,
        save_memory: bool,
    ) -> None:
        super().__init__()
        self.independent, self.save_memory = decoder == "independent", save_memory
        self.frame, self.actions = shape, actions
        self.encoder = Encoder(
            shape[0] + actions, width=width, blocks=encoder_blocks, kind=kind, dilated=dilated, vector=vector,
            save_memory=save_memory,
        )  # fmt: skip
        self.lstm = ConvLstm(2 * width, hidden)
        self.decoder: IndependentDecoder | MaskedDecoder | TwoStackDecoder
        if decoder == "independent":
            self.decoder = IndependentDecoder(
                outputs, width=width, blocks=decoder_blocks, kind=kind, vector=vector, maps=hidden,
                save_memory=save_memory,
            )  # fmt: skip
        else:
            chosen = MaskedDecoder if decoder == "masked" else TwoStackDecoder
            self.decoder = chosen(
                shape[0], outputs, width=width, blocks=decoder_blocks, kind=kind, vector=vector, maps=hidden,
                save_memory=save_memory,
            )  # fmt: skip

    def forward(self, clip: Tensor, told: Told) -> Tensor:
        count = clip.shape[1]
        contexts = torch.cat(self._contexts(clip, told))
        made: Tensor = self.decoder(clip.transpose(0, 1).flatten(0, 1), each(told.vector, count), [contexts])
        return made.unflatten(0, (count, -1)).transpose(0, 1)

    # over time: a state after frame n is the context of frame n + 1

    def start(self, told: Told) -> State | None:
        """The state after the past frames; None where there are none."""
        state: State | None = None
        for n in range(told.past.shape[1]):
            state = self._step(self.encoder(told.past[:, n], told.vector), state, told.given[:, n])
        return state

    def follow(self, frame: Tensor, told: Told, t: int, state: State | None) -> State:
        """The state after target frame t (B, C, H, W)."""
        return self._step(self.encoder(self._with_action(frame, told, t), told.vector), state, None)

    def context(self, told: Told, state: State | None) -> Tensor:
        """(B, hidden, H, W) of the next frame."""
        if state is not None:
            return state[0]
        return told.past.new_zeros(len(told.past), self.lstm.hidden, *self.frame[1:])

    def _contexts(self, clip: Tensor, told: Told) -> list[Tensor]:
        """Of every frame of a clip, each without knowing that frame: the last one is not encoded at all."""
        known = [self._with_action(clip[:, t], told, t) for t in range(clip.shape[1] - 1)]
        frames = [*told.past.unbind(1), *known]
        past, count = told.past.shape[1], len(frames)
        state: State | None = None
        found = [] if past else [self.context(told, None)]
        if not count:
            return found
        codes = self.encoder(torch.cat(frames), each(told.vector, count)).chunk(count)
        for n, code in enumerate(codes):
            state = self._step(code, state, told.given[:, n] if n < past else None)
            if n >= past - 1:
                found.append(state[0])
        return found

    def _step(self, code: Tensor, state: State | None, given: Tensor | None) -> State:
        new: State
        if state is None:
            new = run(lambda x: self.lstm(x, None), (code,), self.save_memory)
        else:
            new = run(lambda x, h, cell: self.lstm(x, (h, cell)), (code, *state), self.save_memory)
        if given is None or (given.device.type == "cpu" and bool(given.all())):  # elsewhere asking costs more
            return new
        keep = given[:, None, None, None]
        before = (torch.zeros_like(new[0]), torch.zeros_like(new[1])) if state is None else state
        return torch.where(keep, new[0], before[0]), torch.where(keep, new[1], before[1])

    def _with_action(self, frame: Tensor, told: Told, t: int) -> Tensor:
        """(B, C + A, H, W)."""
        if not self.actions:
            return frame
        action = told.actions[:, t] if told.actions.shape[1] else frame.new_zeros(len(frame), self.actions)
        return torch.cat([frame, action[..., None, None].expand(-1, -1, *frame.shape[-2:])], 1)
