"""Kernel images: what is packed in each way, and what is damaged."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.linux.fake_linux import BANNER, RODATA, make_bzimage, make_image, make_vmlinux
from vmexit.guest.linux.image import LINKED_AT, Image, ImageError, Part, parse_image, read_image, unpack

VMLINUX = make_vmlinux(bytes(make_image()))
LENGTH = struct.pack("<I", len(VMLINUX))


def lz4_legacy(data: bytes) -> bytes:
    """As ``lz4 -l`` writes it."""
    blocks = [lz4.block.compress(data[at : at + (8 << 20)], store_size=False) for at in range(0, len(data), 8 << 20)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks) + LENGTH


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "xz": lambda data: lzma.compress(data, preset=0) + LENGTH,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=0) + LENGTH,
    "lz4": lz4_legacy,
}


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_a_bzimage_of_each_kind(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(make_bzimage(VMLINUX, pack))
    image = read_image(path)
    assert image.data == VMLINUX
    assert image.read(LINKED_AT + RODATA, len(BANNER)) == BANNER


def test_zstandard() -> None:
    zstandard = pytest.importorskip("zstandard", reason="the package zstandard is not installed")
    packed = zstandard.ZstdCompressor().compress(VMLINUX)
    assert parse_image(make_bzimage(VMLINUX, lambda _: packed + LENGTH)).data == VMLINUX
    with pytest.raises(ImageError, match=r"is damaged|cannot be unpacked"):
        unpack(packed[:100] + bytes(1000) + LENGTH)


def test_several_blocks_of_lz4() -> None:
    data = b"\x7fELF" + bytes(range(256)) * (20 << 12)
    assert len(data) > 2 * (8 << 20)
    assert unpack(lz4_legacy(data)[:-4] + struct.pack("<I", len(data))) == data


def test_addresses() -> None:
    image = Image(bytes(range(100)), [Part(0x1000, 10, 20), Part(0x2000, 30, 5)])
    assert image.read(0x1002, 3) == bytes([12, 13, 14])
    assert image.read(0x1012, 8) == bytes([28, 29])
    assert image.read(0x1014, 8) == image.read(0xFFF, 8) == b""
    assert (image.address_of(9), image.address_of(10), image.address_of(34), image.address_of(35)) == (None, 0x1000, 0x2004, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a bzImage nor a vmlinux"),
        (b"#!/bin/sh\n" * 100, "neither a bzImage nor a vmlinux"),
        (b"\x7fELF\x01\x01".ljust(100, b"\0"), "not of 64 bits"),
        (b"\x7fELF\x02\x01", "cut off"),
        (VMLINUX[:18] + b"\xb7\0" + VMLINUX[20:100], "not for x86-64"),
        (VMLINUX[:90], "damaged"),
        (VMLINUX[:64] + bytes(56), "no kernel in this ELF file"),
        (VMLINUX[:120], "no kernel in this ELF file"),
        (bytes(0x202) + b"HdrS\x0f\x02", "cut off"),
        (bytes(0x202) + b"HdrS\x07\x02" + bytes(1000), "before 2.08"),
        (make_bzimage(VMLINUX, PACKERS["gzip"])[:5000], "cut off"),
        (make_bzimage(VMLINUX, lambda _: b"BZh9" + bytes(100) + LENGTH), "compressed in a way that is not known"),
        (make_bzimage(VMLINUX, lambda _: b"\x02\x21\x4c\x18" + bytes(100)), "makes no sense"),
        (make_bzimage(VMLINUX, lambda _: b"\x02\x21\x4c\x18\x04\0\0\0abcd" + LENGTH), "cannot be unpacked"),
        (make_bzimage(VMLINUX, lambda data: lz4_legacy(data)[:6000] + LENGTH), "cannot be unpacked"),
        (make_bzimage(VMLINUX, lambda data: lzma.compress(data, preset=0)[:-40] + LENGTH), "instead of"),
    ],
)
def test_what_is_no_kernel_gets_one_clear_line(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as raised:
        parse_image(content)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "nothing")


SMALL = {name: pack(VMLINUX[:300]) for name, pack in PACKERS.items() if name != "plain"}


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(SMALL)), at=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_damaged_images_are_refused_or_read(name: str, at: int, value: int, cut: int) -> None:
    payload = bytearray(SMALL[name])[: len(SMALL[name]) - cut % 40]
    payload[at % len(payload)] = value
    with contextlib.suppress(ImageError):
        parse_image(make_bzimage(b"", lambda _: bytes(payload)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 119), st.integers(0, 255))
def test_damaged_headers_are_refused_or_read(noise: bytes, at: int, value: int) -> None:
    content = bytearray(VMLINUX[:120] + noise)
    content[at] = value
    try:
        image = parse_image(bytes(content))
    except ImageError:
        return
    assert all(len(image.read(part.address, 1 << 20)) <= len(content) for part in image.parts)
