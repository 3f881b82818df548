"""Takes a picture of a recording's page: `python -m tests.report.picture RECORDING PNG`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.report.browser import browser
from vmexit.report.digest import Digest
from vmexit.report.page import page
from vmexit.report.reader import RecordingFile

WIDTH, HEIGHT = 1200, 760


def main() -> None:
    """Writes the picture."""
    recording, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder, RecordingFile(recording) as file, browser() as opened:
        html = Path(folder, "page.html")
        html.write_text(page(Digest(file)), encoding="utf-8")
        opened.look(WIDTH, HEIGHT)
        opened.open(html)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(opened.picture())


if __name__ == "__main__":
    main()
