"""Tensors as bytes: a safetensors file written piece by piece, so that nothing is copied in memory to be written.

The format: the length of the header as 8 bytes, the header as JSON ({name: dtype, shape, data_offsets}), then the data.
https://github.com/huggingface/safetensors describes it. What the library's own writer writes must be read once
more for its SHA-256, and before 0.8 it turns every tensor into `bytes` first, a second copy of the whole.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from disttrain.distributed.sharded import is_sharded, local
from disttrain.errors import ConfigurationError

Tensors = Mapping[str, torch.Tensor]

_NAMES = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in _NAMES.items()}
"""The types that a file may hold, by the format's names."""


def safetensors_pieces(
    tensors: Tensors, outlines: Tensors | None = None, metadata: Mapping[str, str] | None = None
) -> Iterator[memoryview]:
    """The bytes of a safetensors file that holds `tensors`, in order: its header, then tensor by tensor.

    `outlines` has the shapes and types of those that it is to hold, if `tensors` are not all to be in memory at a time.
    Raises ConfigurationError for a tensor of a type that the format does not have.
    """
    # As the library orders them: large elements first, so that each tensor begins where its type may.
    held = tensors if outlines is None else outlines
    ordered = sorted(held.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise ConfigurationError(f"the tensor '{name}' is {tensor.dtype}, which a checkpoint cannot hold.")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for name, _ in ordered:
        yield as_bytes(tensors[name])


def shared_names(tensors: Tensors) -> dict[str, str]:
    """Of names for one and the same tensor all but the first, each with the first: weights that are tied."""
    first: dict[tuple[object, ...], str] = {}
    shared = {}
    for name, tensor in tensors.items():
        if tensor.layout == torch.strided and tensor.numel():
            place = (tensor.device, _address(tensor), tensor.dtype, tensor.shape, tensor.stride())
            if place in first:
                shared[name] = first[place]
            else:
                first[place] = name
    return shared


def _address(tensor: torch.Tensor) -> int:
    if not is_sharded(tensor):
        return tensor.data_ptr()
    mine = local(tensor)  # which may be empty, without an address; but it has memory, and all ranks must find the same
    return int(mine.untyped_storage().data_ptr() + mine.storage_offset() * mine.element_size())


def why_not_held(value: object) -> str | None:
    """Why a checkpoint cannot hold this value of a state, for a message ("is sparse"); None if it can."""
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}"
    if value.layout != torch.strided:
        return "is sparse"
    return None if value.dtype in _NAMES else f"is {value.dtype}"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements in row-major order, as they are in memory; copied only if they are not so on this machine's CPU."""
    return tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().data
