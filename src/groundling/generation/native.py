"""Decoding on a CPU in C++: `kernels/decode.cpp`, given a model's weights.

Invariant: logits depend on nothing but the sequence, to the last bit (see the kernel); with fp32 weights
they are those of the network within rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from groundling.errors import ConfigError
from groundling.generation.decoder import Chunk, check_tokens
from groundling.kernels.build import library
from groundling.model.formats import WEIGHT_FORMATS, WeightFormat, pack
from groundling.model.gpt2 import GPT2

MAX_ROWS = 256
"""Tokens read in one pass; longer prompts are read in several."""


class NativeDecoder:
    """A decoder that keeps its own packed copy of the matrices; all other weights may be the model's own.

    While it is open PyTorch is held to one thread, because its waiting threads would fight the kernel's for
    the cores. Raises `BuildError` if the kernel cannot be compiled.
    """

    def __init__(self, model: GPT2, n_window: int, n_slots: int, form: WeightFormat, n_threads: int) -> None:
        self._library = library("decode")
        self._library.groundling_open.restype = ctypes.c_void_p
        self._library.groundling_arranged.restype = ctypes.c_int64
        config = model.config
        self.n_window, self.n_slots = min(n_window, config.n_ctx), n_slots
        self._n_vocab = config.n_vocab
        self._lengths = [0] * n_slots
        self._max_rows = max(MAX_ROWS, n_slots)
        self._tensors = _tensors(model, form, self._library)  # the kernel reads them where they are
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self._tensors]
        n_layer, n_head, n_embd, n_vocab = config.n_layer, config.n_head, config.n_embd, config.n_vocab
        sizes = (n_layer, n_head, n_embd, n_vocab, self.n_window, n_slots, self._max_rows)
        self._network = ctypes.c_void_p(
            self._library.groundling_open(
                (ctypes.c_int64 * len(sizes))(*sizes),
                WEIGHT_FORMATS.index(form),
                n_threads,
                (ctypes.c_void_p * len(addresses))(*addresses),
            )
        )
        if not self._network:
            what = f"{n_slots} texts at a time with {n_threads} threads need more memory or threads than there are"
            raise ConfigError(f"{what}: ask for fewer, or for int8")
        self._logits = torch.empty(1, self._n_vocab)
        _hold_torch_threads()

    def length(self, slot: int) -> int:
        return self._lengths[slot]

    def rewind(self, slot: int, length: int) -> None:
        assert length <= self._lengths[slot]
        self._lengths[slot] = length
        if not any(self._lengths):  # the rows of a large batch, or of a long prompt, are not kept for nobody
            self._logits = torch.empty(1, self._n_vocab)

    def read(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        check_tokens(chunks, self._n_vocab)  # the kernel would read beside the table
        tokens, slots, positions, outputs = list[int](), list[int](), list[int](), list[int]()
        for slot, new, n_outputs in chunks:
            start, n = self._lengths[slot], len(new)
            assert start + n <= self.n_window
            self._lengths[slot] = start + n
            tokens += new
            slots += [slot] * n
            positions += range(start, start + n)
            outputs += range(len(tokens) - n_outputs, len(tokens))
        if len(self._logits) < len(outputs):
            self._logits = torch.empty(len(outputs), self._n_vocab)
        done = 0
        for first in range(0, len(tokens), self._max_rows):
            last = first + self._max_rows
            wanted = [row - first for row in outputs if first <= row < last]
            self._pass(tokens[first:last], slots[first:last], positions[first:last], wanted, done)
            done += len(wanted)
        return list(torch.split(self._logits[: len(outputs)], [chunk.n_outputs for chunk in chunks]))

    def _pass(
        self, tokens: list[int], slots: list[int], positions: list[int], outputs: list[int], n_before: int
    ) -> None:
        """One call of the kernel; its logits come after the first `n_before` rows of the buffer."""
        arrays = [np.array(values, dtype=np.int32) for values in (tokens, slots, positions, outputs)]
        addresses = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        logits = ctypes.c_void_p(self._logits.data_ptr() + n_before * self._n_vocab * self._logits.element_size())
        n_rows, n_outputs = ctypes.c_int64(len(tokens)), ctypes.c_int64(len(outputs))
        self._library.groundling_read(self._network, n_rows, *addresses[:3], n_outputs, addresses[3], logits)

    def close(self) -> None:
        if self._network:
            self._library.groundling_close(self._network)
            self._network = ctypes.c_void_p()
            _release_torch_threads()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_network"):
            self.close()


_torch_threads = [0, 0]
"""How many decoders are open, and PyTorch's threads before the first of them was."""


def _hold_torch_threads() -> None:
    if not _torch_threads[0]:
        _torch_threads[1] = torch.get_num_threads()
        torch.set_num_threads(1)
    _torch_threads[0] += 1


def _release_torch_threads() -> None:
    _torch_threads[0] -= 1
    if not _torch_threads[0]:
        torch.set_num_threads(_torch_threads[1])


def _tensors(model: GPT2, form: WeightFormat, kernel: ctypes.CDLL) -> list[Tensor | None]:
    """The model's tensors in the order of the kernel's `groundling_open`, matrices as it reads them."""

    def matrix(weight: Tensor) -> list[Tensor | None]:
        packed = pack(weight.detach(), form)
        rows, sizes = packed.weight.contiguous(), [ctypes.c_int64(size) for size in weight.shape]
        arranged = torch.empty(kernel.groundling_arranged(*sizes), dtype=rows.dtype)
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows, arranged)]
        kernel.groundling_arrange(WEIGHT_FORMATS.index(form), *sizes, *addresses)
        return [arranged, packed.scale]

    def linear(layer: nn.Linear) -> list[Tensor | None]:
        return [*matrix(layer.weight), plain(layer.bias)]

    def plain(tensor: Tensor) -> Tensor:
        return tensor.detach().float().contiguous()

    def norm(layer: nn.LayerNorm) -> list[Tensor | None]:
        return [plain(layer.weight), plain(layer.bias)]

    body = model.transformer
    tensors = [*matrix(model.head_weight), plain(body.wpe.weight), *norm(body.ln_f)]
    for block in body.h:
        tensors += [*norm(block.ln_1), *linear(block.attn.c_attn), *linear(block.attn.c_proj)]  # type: ignore[arg-type, union-attr]
        tensors += [*norm(block.ln_2), *linear(block.mlp.c_fc), *linear(block.mlp.c_proj)]  # type: ignore[arg-type, union-attr]
    return tensors
