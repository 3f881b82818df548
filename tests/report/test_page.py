"""The page of a recording in a real browser: what it shows, in light and dark, wide and narrow, by mouse and by keys."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.report.browser import Browser, browser
from tests.report.traps import boot, of_process, record, records_of, trap
from vmexit.link.rings import Records
from vmexit.report import page as pages
from vmexit.report.digest import Digest
from vmexit.report.fileformat import CALLER_GUESSED

MSRS = (0x6E0, 0xC000_0100, 0xC000_0080, 0x48, 0x12345)
SIZES = ((1360, 900), (700, 900), (360, 780))


@pytest.fixture(scope="module")
def seen() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


Open = Callable[..., Browser]


@pytest.fixture
def show(seen: Browser, tmp_path: Path, digest_of: Callable[[Path], Digest]) -> Iterator[Open]:
    """Opens the page of a recording; nothing goes wrong in it until the test is over."""

    def opens(path: Path, width: int = 1360, height: int = 900, *, dark: bool = False) -> Browser:
        out = tmp_path / "page.html"
        out.write_text(pages.page(digest_of(path)), encoding="utf-8")
        seen.look(width, height, dark=dark)
        seen.open(out)
        return seen

    seen.errors.clear()
    seen.requests.clear()
    yield opens
    assert seen.value("document.getElementById('failure').hidden")
    assert seen.errors == [] and seen.requests == []


def cells(page: Browser, section: str) -> list[list[str]]:
    """The rows of a section's table, as text."""
    rows = f"[...document.querySelectorAll('#{section} tbody tr')]"
    return list(page.value(f"{rows}.map((row) => [...row.cells].map((cell) => cell.innerText.replace(/\\s+/g, ' ').trim()))"))


def text(page: Browser, name: str) -> str:
    return str(page.value(f"document.getElementById('{name}').innerText")).replace("\n", " ")


def choose(page: Browser, name: str, label: str) -> None:
    """Chooses an entry of a list, by what stands there."""
    page.value(f"""(() => {{
        const list = document.getElementById('{name}');
        list.value = [...list.options].find((option) => option.text === {json.dumps(label)}).value;
        list.dispatchEvent(new Event('change'));
    }})()""")


def busy(count: int) -> Records:
    """Traps of some processes on three cores."""
    source = random.Random(5)
    rows = []
    for place in range(count):
        msr = source.choice(MSRS)
        value = source.choice((0x500, 0xD01)) if msr == 0xC000_0080 else source.getrandbits(32)
        access = 2 if source.random() < 0.2 else 1
        rows.append(trap(msr, value, vcpu=place % 3, access=access, stage=access, **of_process(source.choice((1, 77, 4242)))))
    return records_of(rows)


NAMES = {1: "init", 77: "<script>alert(1)</script>"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records]:
    """A recording whose traps are in the page one by one."""
    traps = busy(1500)
    return record(tmp_path_factory.mktemp("small") / "small.rec", traps, name_of=lambda pid, tid: NAMES.get(pid)), traps


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records]:
    """One with more traps than a page has room for."""
    traps = np.tile(busy(3000), 20)
    traps["sequence"] = np.arange(len(traps))
    traps["time_ns"] = traps["time_ns"][0] + traps["sequence"] * np.uint64(1000)
    return record(tmp_path_factory.mktemp("large") / "large.rec", traps, lost=7), traps


def test_a_boot(show: Open, tmp_path: Path) -> None:
    """Names, counts, and every change decoded."""
    page = show(record(tmp_path / "boot.rec", boot()))
    assert page.value("document.title") == "boot.rec: MSR accesses"
    assert text(page, "file") == "boot.rec" and text(page, "about").startswith("QEMU 7.2.22, 2 cores")
    assert text(page, "figures").split() == "traps 9 long 8 µs cores 2 MSRs 3 changes 3 lost 0".split()
    assert text(page, "shown") == "9 of 9 traps" and text(page, "notes") == ""
    assert cells(page, "msrs") == [
        ["EFER", "c0000080", "4", "0", "2", "0-1", "0xd01 SCE LME LMA NXE"],
        ["LSTAR", "c0000082", "2", "0", "0", "0-1", "0xffffffff82000080"],
        ["MISC_ENABLE", "1a0", "2", "1", "1", "0", "0x9 FAST_STRINGS TM1"],
    ]
    assert [row[1:] for row in cells(page, "changes")] == [
        ["0", "EFER", "first 0x500 LME LMA"],
        ["0", "EFER", "0x500 → 0xd01 +SCE +NXE"],
        ["1", "EFER", "first 0x500 LME LMA"],
        ["0", "LSTAR", "first 0xffffffff82000080"],
        ["1", "LSTAR", "first 0xffffffff82000080"],
        ["0", "MISC_ENABLE", "0x1 → 0x9 +TM1"],
        ["1", "EFER", "0x500 → 0xd01 +SCE +NXE"],
    ]
    assert cells(page, "traps")[6] == [
        "0.000006",
        "0",
        "wrmsr pre",
        "MISC_ENABLE",
        "0000000000002222",
        "ffffffff81000000",
        "short-circuited",
    ]
    assert "Unknown" in text(page, "processes") and page.value("document.getElementById('by-process').disabled")
    assert cells(page, "events") == [["0: !msrwrite", "9"]]


_FAINT = """(() => {
    // What has less contrast to what is behind it than WCAG 2 wants of texts of this size.
    const linear = (part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
    const light = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(linear);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    for (const one of document.querySelectorAll('td, th, p, label span, h1, h2, dt, dd, .chip')) {
        let ground = one;
        while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
        const lights = [light(getComputedStyle(one).color), light(getComputedStyle(ground).backgroundColor)];
        const contrast = (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
        if (contrast < 4.5) found.push([contrast, one.outerHTML]);
    }
    return found;
})()"""


def test_a_caller_stands_beside_the_place(show: Open, tmp_path: Path) -> None:
    here, from_there = 0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_8200_0000
    several = records_of([trap(0x10, 1, caller=1), trap(0x10, 2, caller=1, flags=CALLER_GUESSED, rip=5), trap(0x10, 3)])
    path = record(
        tmp_path / "r",
        several,
        callers_of=lambda records: np.where(records["caller"] == 1, np.uint64(from_there), np.uint64(0)),
        place_of=lambda rip: {here: "<b>write</b>+0x4 [kernel]", from_there: "caller+0x1 [kernel]"}.get(rip, ""),
    )
    assert [row[5] for row in cells(show(path), "traps")] == [
        "<b>write</b>+0x4 [kernel] <- caller+0x1 [kernel]",
        "0000000000000005 <- ? caller+0x1 [kernel]",
        "<b>write</b>+0x4 [kernel]",
    ]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_size_and_taste(show: Open, small: tuple[Path, Records], width: int, height: int, dark: bool) -> None:
    """Nothing is wider than the window, text can be told from what is behind it, and the timeline is drawn."""
    page = show(small[0], width, height, dark=dark)
    assert page.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll, .skip, #tip, script'))"
    assert (
        page.value(f"{wide}.filter((one) => one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML)")
        == []
    )
    colours = "((style) => [style.backgroundColor, style.color])(getComputedStyle(document.body))"
    ground, ink = (sum(map(int, colour.strip("rgb()").split(","))) for colour in page.value(colours))
    assert (ground < 120 and ink > 500) if dark else (ground > 600 and ink < 200)
    assert page.value(_FAINT) == []
    drawn = """(() => { const canvas = document.getElementById('canvas'), all = new Set();
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        for (let i = 0; i < data.length; i += 4)
            if (data[i + 3] === 255) all.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
        return all.size; })()"""
    assert page.value(drawn) >= 5  # the MSRs' colours
    assert len(page.picture()) > 10_000


def sums(traps: Records, **wanted: int) -> Counter[int]:
    """How many traps there are of each MSR, of those with these fields."""
    for name, value in wanted.items():
        traps = traps[traps[name] == value]
    return Counter(traps["msr"].tolist())


def counts_by_msr(page: Browser) -> Counter[int]:
    """What the table of MSRs says, writes and reads together."""
    return Counter({int(row[1], 16): sum(int(part.replace(",", "")) for part in row[2:4]) for row in cells(page, "msrs")})


@pytest.mark.parametrize("which", ["small", "large"])
def test_filters(show: Open, which: str, request: pytest.FixtureRequest) -> None:
    """Each by itself and together; the counts are right, also where traps are counted by parts of the time."""
    path, traps = request.getfixturevalue(which)
    page = show(path)
    assert counts_by_msr(page) == sums(traps)
    assert sum(int(row[1].replace(",", "")) for row in cells(page, "processes")) == len(traps)
    if which == "small":
        assert {row[0] for row in cells(page, "processes")} == {"1 init", "77 <script>alert(1)</script>", "4242"}
    choose(page, "by-core", "core 1")
    assert counts_by_msr(page) == sums(traps, vcpu=1)
    process = next(row[0] for row in cells(page, "processes") if row[0].startswith("77"))
    choose(page, "by-process", process)
    assert counts_by_msr(page) == sums(traps, vcpu=1, process=77)
    choose(page, "by-access", "reads")
    assert counts_by_msr(page) == sums(traps, vcpu=1, process=77, access=2)
    total = sums(traps, vcpu=1, process=77, access=2).total()
    assert text(page, "shown") == f"{total:,} of {len(traps):,} traps"
    assert cells(page, "changes") == []
    choose(page, "by-msr", "EFER (c0000080)")
    assert text(page, "shown").startswith(f"{sums(traps, vcpu=1, process=77, access=2)[0xC000_0080]:,} of")
    page.value("document.getElementById('reset').click()")
    assert counts_by_msr(page) == sums(traps) and text(page, "shown") == f"{len(traps):,} of {len(traps):,} traps"
    page.value("document.getElementById('find').focus()")
    page.press(*"0x123")
    assert set(counts_by_msr(page)) == {0x12345}


@pytest.mark.parametrize("which", ["small", "large"])
def test_a_part_of_the_time(show: Open, which: str, request: pytest.FixtureRequest) -> None:
    """Zoomed by the mouse, by buttons and by keys: the tables count what is in view, neither more nor less."""
    path, traps = request.getfixturevalue(which)
    page = show(path)
    box = page.value("(({x, y, width}) => [x, y, width])(document.getElementById('canvas').getBoundingClientRect())")
    page.drag((box[0] + box[2] * 0.4, box[1] + 20), (box[0] + box[2] * 0.7, box[1] + 40))
    page.settle()
    first, _, last, *_ = text(page, "window").replace(" s", "").split()
    start = int(traps["time_ns"][0])
    times = traps["time_ns"].astype(np.int64) - start
    within = traps[(times >= round(float(first) * 1e9) - 500) & (times < round(float(last) * 1e9) - 500)]
    assert 0.15 * len(traps) < len(within) < 0.5 * len(traps)
    # The window is shown to a microsecond, which is how far the traps are apart.
    assert abs(counts_by_msr(page).total() - len(within)) <= 2
    assert sum(int(row[1].replace(",", "")) for row in cells(page, "processes")) == counts_by_msr(page).total()
    page.value("document.getElementById('canvas').focus()")
    page.press("0")
    assert counts_by_msr(page) == sums(traps)
    page.press("+", "+")
    zoomed = counts_by_msr(page).total()
    assert 0.2 * len(traps) < zoomed < 0.4 * len(traps)
    page.press("ArrowRight")
    assert text(page, "shown") == f"{counts_by_msr(page).total():,} of {len(traps):,} traps"
    page.value("document.getElementById('wider').click()")
    assert counts_by_msr(page).total() > zoomed
    page.value("document.getElementById('whole').click()")
    assert text(page, "shown").startswith(f"{len(traps):,} of")


def test_what_is_under_the_pointer(show: Open, tmp_path: Path) -> None:
    page = show(record(tmp_path / "r", records_of([trap(0xC000_0080, 1), *(trap(0x10, 1) for _ in range(9))])))
    box = page.value("(({x, y}) => [x, y])(document.getElementById('canvas').getBoundingClientRect())")
    page.move(box[0] + 67, box[1] + 20)
    page.settle()
    assert text(page, "tip").startswith("core 0, 0.000000 s") and "EFER 1" in text(page, "tip")


def test_by_keys_alone(show: Open, small: tuple[Path, Records]) -> None:
    """Everything that can be clicked can be reached with Tab and pressed; what was pressed keeps the focus."""
    page = show(small[0])
    reached = set()
    for _ in range(40):
        page.press("Tab")
        reached.add(page.value("document.activeElement.id || document.activeElement.tagName"))
    assert {"find", "by-msr", "by-core", "by-process", "canvas", "closer", "BUTTON", "DIV"} <= reached
    page.value("document.querySelector('#msrs tbody button').focus()")
    name = page.value("document.activeElement.innerText")
    of_first = counts_by_msr(page)[int(cells(page, "msrs")[0][1], 16)]
    page.press("Enter")
    assert page.value("document.activeElement.innerText") == name
    assert page.value("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert text(page, "shown") == f"{of_first:,} of 1,500 traps"
    page.press("Enter")
    assert text(page, "shown") == "1,500 of 1,500 traps"


def test_tables_can_be_sorted(show: Open, small: tuple[Path, Records]) -> None:
    page = show(small[0])
    heading = "[...document.querySelectorAll('#msrs th')].find((one) => one.innerText.trim().startsWith('MSR'))"
    for direction, backwards in (("ascending", False), ("descending", True)):
        page.value(f"{heading}.querySelector('button').click()")
        assert page.value(f"{heading}.getAttribute('aria-sort')") == direction
        addresses = [int(row[1], 16) for row in cells(page, "msrs")]
        assert addresses == sorted(addresses, reverse=backwards)
    assert page.value("document.querySelectorAll('#msrs [aria-sort]').length") == 1


def test_long_tables_show_more(show: Open, small: tuple[Path, Records]) -> None:
    page = show(small[0])
    rows = "document.querySelectorAll('#traps tbody tr').length"
    assert page.value(rows) == 60
    for shown in (240, 960, 1500):
        page.value("document.querySelector('#traps .more').click()")
        assert page.value(rows) == shown
    assert page.value("document.querySelector('#traps .more').hidden")


def test_more_traps_than_a_page_can_hold(show: Open, large: tuple[Path, Records]) -> None:
    """What is sampled and what is counted by parts of the time is said; the page stays small."""
    path, traps = large
    page = show(path)
    assert f"{len(traps):,} traps are too many to have each in this page: they are counted in parts of " in text(page, "notes")
    assert "the list of traps has every 15th" in text(page, "notes") and "Every 15th of all 60,000." in text(page, "traps")
    assert "7 records lost" in text(page, "notes") and "left out are" in text(page, "notes")
    assert page.value("document.querySelectorAll('#figures .bad').length") == 1
    assert page.value("document.getElementById('data').text.length") < 3_000_000


def test_nothing_was_recorded(show: Open, tmp_path: Path) -> None:
    page = show(record(tmp_path / "r", end=None))
    assert text(page, "shown") == "0 of 0 traps" and "No MSR was accessed here." in text(page, "msrs")
    assert "it was cut off, or its recorder was killed" in text(page, "notes")


def test_texts_stay_texts(tmp_path: Path, show: Open) -> None:
    """Names and command lines can be anything; no element is made of them, and no script is ended."""
    evil = "</script><img src=x onerror=alert(1)><!--"
    info = {"events": {"0": {"text": evil}}, "machine": {"name": evil}, "symbols": {"ffffffff81000000": evil}}
    page = show(record(tmp_path / "<b>r", boot(), info=info))
    assert text(page, "file") == "<b>r" and page.value("document.images.length") == 0
    assert text(page, "about").startswith(evil) and cells(page, "events")[0][0] == f"0: {evil}"
    assert cells(page, "traps")[0][5] == evil


def test_it_needs_nothing_else(tmp_path: Path, digest_of: Callable[[Path], Digest]) -> None:
    """Without any browser: one file, nothing to load, and everything of the recording's in the data alone."""
    text = pages.page(digest_of(record(tmp_path / "r", boot())))
    assert "default-src 'none'" in text and text.count("<script") == 2
    assert not {"http:", "https:", "//cdn", "@import", "url("} & set(text.split()) and "https://" not in text
    assert all(f"%{name}%" not in text for name in ("title", "css", "js", "data"))
