"""What is kept of kernels between sessions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.guest.linux.fake_linux import BANNER, make_image, make_vmlinux
from vmexit.guest.linux.cache import Cache
from vmexit.guest.linux.image import parse_image
from vmexit.guest.linux.profile import Profile, profile_of


@pytest.fixture(scope="module")
def profile() -> Profile:
    """Of the made-up kernel."""
    return profile_of(parse_image(make_vmlinux(bytes(make_image()))))


def test_what_was_kept_is_there_again(cache: Cache, profile: Profile) -> None:
    assert cache.load("key") is None and list(cache.known()) == []
    cache.keep("key", profile)
    again = cache.load("key")
    assert again is not None
    assert again.banner == profile.banner == BANNER
    assert list(again.symbols) == list(profile.symbols)
    assert again.offsets == profile.offsets and again.offsets["task_struct.comm"] == 0xC0
    assert again.btf.offset("module", "name") == 0x18
    assert [(known.key, known.banner, known.banner_at) for known in cache.known()] == [
        ("key", BANNER, profile.symbols.find("linux_banner"))
    ]
    assert sorted(path.name for path in cache.folder.iterdir()) == ["key.json", "key.npz"]
    assert cache.folder.stat().st_mode & 0o077 == 0


def test_the_last_one_used_comes_first(cache: Cache, profile: Profile) -> None:
    import os

    for age, key in enumerate(("new", "old", "older")):
        cache.keep(key, profile)
        os.utime(cache.folder / f"{key}.json", (1000 - age, 1000 - age))
    assert [known.key for known in cache.known()] == ["new", "old", "older"]
    cache.load("older")
    assert [known.key for known in cache.known()] == ["older", "new", "old"]


@pytest.mark.parametrize("suffix", ["json", "npz"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff" * 100, b'{"format": 2, "banner": 5, "banner_at": "x"}'])
def test_damaged_files_are_as_good_as_none(cache: Cache, profile: Profile, suffix: str, content: bytes) -> None:
    cache.keep("key", profile)
    (cache.folder / f"key.{suffix}").write_bytes(content)
    assert cache.load("key") is None
    assert len(list(cache.known())) == (suffix == "npz")


def test_a_cut_or_changed_table_is_none(cache: Cache, profile: Profile) -> None:
    cache.keep("key", profile)
    path = cache.folder / "key.npz"
    content = path.read_bytes()
    for damaged in (content[:-100], content[: len(content) // 2], content[:5000] + b"\xff\xfe\xfd" + content[5003:]):
        path.write_bytes(damaged)
        assert cache.load("key") is None


def test_pickles_are_not_read(cache: Cache, profile: Profile) -> None:
    """They could execute anything."""
    import numpy as np

    cache.keep("key", profile)
    with (cache.folder / "key.npz").open("wb") as file:
        np.savez(file, addresses=np.array([object()], dtype=object))
    assert cache.load("key") is None


def test_another_format_is_none(cache: Cache, profile: Profile) -> None:
    cache.keep("key", profile)
    path = cache.folder / "key.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    assert cache.load("key") is None and list(cache.known()) == []


def test_a_folder_that_cannot_be_written(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    cache.keep("key", profile)
    assert cache.load("key") is None and list(cache.known()) == []


def test_the_users_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().folder == tmp_path / "vmexit" / "linux"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().folder == tmp_path / ".cache" / "vmexit" / "linux"


def test_symbols_that_were_kept_are_found_without_a_look_at_all_names(cache: Cache, profile: Profile) -> None:
    cache.keep("key", profile)
    again = cache.load("key")
    assert again is not None
    assert [column.tolist() for column in again.symbols.names.index] == [
        column.tolist() for column in profile.symbols.names.index
    ]
    assert all(again.symbols.find(symbol.name) is not None for symbol in profile.symbols)


@pytest.mark.parametrize("name", ["addresses", "names", "kinds", "hashes", "order"])
def test_tables_that_do_not_belong_together(cache: Cache, profile: Profile, name: str) -> None:
    import numpy as np

    cache.keep("key", profile)
    path = cache.folder / "key.npz"
    with np.load(path) as arrays:
        kept = dict(arrays)
    for changed in (kept[name][:-1], kept[name][::-1] if name == "addresses" else kept[name][:0]):
        with path.open("wb") as file:
            np.savez(file, **{**kept, name: changed})
        assert cache.load("key") is None
    del kept[name]
    with path.open("wb") as file:
        np.savez(file, **kept)
    assert cache.load("key") is None
