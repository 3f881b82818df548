"""How a request and its answer travel over the socket: DeviceIoControl's arguments, in a row.

A request is its code, the size of its structure, the room that there is for an answer (three UINT32, little-endian), then the
structure. An answer is a status and a size (two UINT32), then so many bytes.
"""

from __future__ import annotations

import struct

REQUEST = struct.Struct("<III")
ANSWER = struct.Struct("<II")

MOST_INPUT = 1 << 20
"""Bytes of one request's structure and what follows it."""


def request(code: int, data: bytes, room: int) -> bytes:
    """The bytes of a request."""
    return REQUEST.pack(code, len(data), room) + data


def answer(status: int, data: bytes = b"") -> bytes:
    """The bytes of an answer."""
    return ANSWER.pack(status, len(data)) + data
