"""A kernel's own code and data: out of a bzImage or a vmlinux.

The layout of a bzImage is that of Linux' Documentation/arch/x86/boot.rst (setup_sects, payload_offset, payload_length); that of
vmlinux is ELF's. Both may be damaged or forged: whatever makes no sense is an ImageError.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmexit.errors import VmexitError

KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map: the kernel's image lies in the gigabyte behind it."""
LINKED_AT = 0xFFFF_FFFF_8100_0000
"""Where _text is linked on x86-64: __START_KERNEL_map plus CONFIG_PHYSICAL_START, which no distribution changes."""
_MOST_PACKED = 256 << 20
_MOST = 1 << 30

_ELF_HEADER = struct.Struct("<16xHHIQQQIHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1
_X86_64 = 62
_LZ4_LEGACY_BLOCK = 8 << 20


class ImageError(VmexitError):
    """A file that is no kernel image that can be read here; the text says why."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the kernel's address space: ``size`` bytes at ``address`` that lie at ``offset`` of the data."""

    address: int
    offset: int
    size: int


@dataclass(frozen=True)
class Image:
    """The kernel as its linker laid it out, or as it lies in a guest's memory."""

    data: bytes
    parts: Sequence[Part]

    def read(self, address: int, length: int) -> bytes:
        """What lies there; less than asked for, or nothing, where the image ends."""
        for part in self.parts:
            if part.address <= address < part.address + part.size:
                start = address - part.address
                return self.data[part.offset + start : part.offset + min(start + length, part.size)]
        return b""

    def address_of(self, offset: int) -> int | None:
        """Which address the byte at that offset of the data has; None: it has none."""
        for part in self.parts:
            if part.offset <= offset < part.offset + part.size:
                return part.address + offset - part.offset
        return None


def read_image(path: Path) -> Image:
    """The kernel in a bzImage or vmlinux. Raises ImageError."""
    return parse_image(read_file(path))


def read_file(path: Path) -> bytes:
    """A file that may be a kernel. Raises ImageError."""
    try:
        if path.stat().st_size > _MOST:
            raise ImageError(f"{path} is too big for a kernel")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}") from None


def parse_image(content: bytes) -> Image:
    """The kernel in the content of a bzImage or vmlinux. Raises ImageError."""
    if content[:4] == b"\x7fELF":
        return _parse_elf(content)
    if content[0x202:0x206] == b"HdrS":
        return _parse_elf(unpack(_payload(content)))
    raise ImageError("this is neither a bzImage nor a vmlinux")


def _payload(content: bytes) -> bytes:
    """The packed vmlinux of a bzImage."""
    if len(content) < 0x260:
        raise ImageError("this bzImage is cut off")
    sectors = content[0x1F1] or 4
    (version,) = struct.unpack_from("<H", content, 0x206)
    if version < 0x208:
        raise ImageError("this bzImage is of a boot protocol before 2.08, which does not say where the kernel in it is")
    offset, length = struct.unpack_from("<II", content, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = content[start : start + length]
    if not length or len(payload) < length:
        raise ImageError("this bzImage is cut off")
    return payload


def unpack(payload: bytes) -> bytes:
    """The vmlinux in a bzImage's payload, whose last 4 bytes are its length (arch/x86/boot/compressed/Makefile)."""
    if payload[:4] == b"\x7fELF":
        return payload
    if len(payload) < 8 or len(payload) > _MOST_PACKED:
        raise ImageError("this bzImage is damaged")
    (size,) = struct.unpack("<I", payload[-4:])
    if not 0 < size <= _MOST:
        raise ImageError("this bzImage is damaged: the length of its kernel makes no sense")
    packed = payload[:-4]
    try:
        unpacked = _unpack(packed, payload, size)
    except (zlib.error, lzma.LZMAError, ValueError, RuntimeError, EOFError) as error:
        raise ImageError(f"the kernel in this bzImage cannot be unpacked: {error}") from None
    if len(unpacked) != size:
        raise ImageError(f"the kernel in this bzImage is damaged: {len(unpacked)} bytes instead of {size}")
    return unpacked


def _unpack(packed: bytes, payload: bytes, size: int) -> bytes:
    if packed[:4] == b"\x02\x21\x4c\x18":
        return _unpack_lz4(packed, size)
    if packed[:2] == b"\x1f\x8b":
        # gzip writes the length itself, so the payload has no length of its own behind it.
        return zlib.decompressobj(31).decompress(payload, size)
    if packed[:6] == b"\xfd7zXZ\0":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(packed, size)
    if packed[:3] == b"\x5d\0\0":
        return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(packed, size)
    if packed[:4] == b"\x28\xb5\x2f\xfd":
        return _unpack_zstd(packed, size)
    raise ImageError("this kernel is compressed in a way that is not known here (known: LZ4, XZ, LZMA, gzip, Zstandard)")


def _unpack_lz4(packed: bytes, size: int) -> bytes:
    """The legacy format: after the magic number blocks of 8 MB, each with its packed length before it."""
    import lz4.block

    blocks, at, done = [], 4, 0
    while done < size:
        if at + 4 > len(packed):
            raise ImageError("the kernel in this bzImage is cut off")
        (length,) = struct.unpack_from("<I", packed, at)
        try:
            block = lz4.block.decompress(packed[at + 4 : at + 4 + length], uncompressed_size=min(_LZ4_LEGACY_BLOCK, size - done))
        except lz4.block.LZ4BlockError as error:
            raise ImageError(f"the kernel in this bzImage cannot be unpacked: {error}") from None
        if not block:
            raise ImageError("the kernel in this bzImage is damaged")
        blocks.append(block)
        done += len(block)
        at += 4 + length
    return b"".join(blocks)


def _unpack_zstd(packed: bytes, size: int) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise ImageError("this kernel is compressed with Zstandard: pip install zstandard") from None
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(packed) as reader:
            return bytes(reader.read(size))
    except zstandard.ZstdError as error:
        raise ImageError(f"the kernel in this bzImage cannot be unpacked: {error}") from None


def _parse_elf(content: bytes) -> Image:
    if content[4:6] != b"\x02\x01":
        raise ImageError("this kernel is not of 64 bits; only x86-64 is known here")
    try:
        _, machine, _, _, segments, _, _, _, size, count = _ELF_HEADER.unpack_from(content)
        if machine != _X86_64:
            raise ImageError("this kernel is not for x86-64")
        if size != _SEGMENT.size or count > 64 or segments + count * size > len(content):
            raise ImageError("this vmlinux is damaged")
        table = [_SEGMENT.unpack_from(content, segments + index * size) for index in range(count)]
    except struct.error:
        raise ImageError("this vmlinux is cut off") from None
    # The per-CPU template is linked at 0 up to Linux 6.14; nothing is looked for in it.
    parts = [
        Part(address, offset, min(filed, len(content) - offset))
        for kind, _, offset, address, _, filed, _, _ in table
        if kind == _PT_LOAD and address >> 63 and offset < len(content)
    ]
    if not parts:
        raise ImageError("there is no kernel in this ELF file")
    return Image(content, parts)
