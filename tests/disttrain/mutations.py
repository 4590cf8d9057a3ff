"""Bad input made from good: bytes flipped, cut, put in and swapped, and values of JSON that are something else."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

# What may stand in place of any value.
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, float("inf"), float("nan"), "", "x", "NaN",
    "../../x", "/etc/passwd", "x" * 10_000, "\udcff", [], [[]], [None], {}, {"": None}, {"x": {"y": []}}, [1, "a", {}],
]  # fmt: skip


def mutated_bytes(raw: bytes, chance: random.Random) -> bytes:
    """`raw` with one injury."""
    length = len(raw)
    place, size = chance.randrange(length + 1), chance.choice([1, 2, 8, 64, 4096])
    match chance.randrange(8):
        case 0:
            place = chance.randrange(length) if length else 0
            return raw[:place] + bytes([raw[place] ^ 1 << chance.randrange(8)]) + raw[place + 1 :] if length else b"\0"
        case 1:
            return raw[:place]
        case 2:
            return raw[:place] + raw[place + size :]
        case 3:
            return raw[:place] + chance.randbytes(size) + raw[place:]
        case 4:
            other = chance.randrange(length + 1)
            one, two = sorted((place, other))
            return raw[:one] + raw[two : two + size] + raw[one + size : two] + raw[one : one + size] + raw[two + size :]
        case 5:
            return raw[:place] + bytes(min(size, length - place)) + raw[place + size :]
        case 6:
            return raw + raw[:size]
        case _:
            return chance.choice([b"", b"\0", b"{}", b"[" * 100_000, b"\xff\xfe", chance.randbytes(256)])


def mutated_json(value: Any, chance: random.Random) -> Any:
    """A copy of `value` in which one value, somewhere, is another, missing, or has another name."""
    copy = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in list(keys):
            places.append((node, key))
            walk(node[key])

    walk(copy)
    # By depth first, so that the few keys at the top are hit as often as the many numbers further down.
    top = [(node, key) for node, key in places if node is copy]
    node, key = chance.choice(chance.choice([top, places]))
    match chance.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[chance.choice(["", "x", "../../x", "/etc/passwd"])] = node.pop(key)
        case 2 if isinstance(node[key], list | str):
            node[key] = node[key][: len(node[key]) // 2]
        case 3 if isinstance(node[key], list):
            node[key] = node[key] + node[key]
        case _:
            node[key] = chance.choice(HOSTILE)
    return copy


def mutated_safetensors(raw: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header says something else, or has another length than it says."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if chance.randrange(4) == 0:
        wrong = chance.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + raw[8:]
    text = json.dumps(mutated_json(header, chance) if header else HOSTILE[-1]).encode()
    return struct.pack("<Q", len(text)) + text + data


Mutation = Callable[[bytes, random.Random], bytes]
