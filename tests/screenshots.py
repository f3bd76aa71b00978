"""Pictures of a page as a reader sees it, wide and narrow, light and dark.

    python tests/screenshots.py reports/multiasset.html OUTDIR

writes OUTDIR/multiasset-1280-light.png and so on, each of the whole page, and prints the size of the page at each width. Needs Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = (1280, 390)
TALLEST = 16_000  # pixels of a picture; a longer page is cut into several
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-quic", "--allow-file-access-from-files", "--force-device-scale-factor=1", "--virtual-time-budget=4000")
# A window has a minimum width that is more than a phone's; a frame inside it has not. The script tells the size of the page, and by how much its widest part sticks out.
FRAME = """<!doctype html><html style="color-scheme:{scheme}"><body style="margin:0;background:{ground}"><iframe id="f" src="{url}" style="border:0;display:block;width:{width}px;height:{height}px;margin-top:-{skip}px"></iframe>
<pre id="size"></pre><script>f.onload = () => {{ const d = f.contentDocument.documentElement; size.textContent = `size=${{d.scrollWidth}}x${{d.scrollHeight}}` }}</script></body></html>"""


def chromium() -> str | None:
    """The browser, or None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _browse(folder: Path, page: Path, width: int, height: int, dark: bool, skip: int, window: int, *action: str) -> str:
    wrapper = folder / "frame.html"
    wrapper.write_text(FRAME.format(url=page.resolve().as_uri(), width=width, height=height, skip=skip, scheme="dark" if dark else "light", ground="#444" if dark else "#bbb"))
    binary = chromium()
    if binary is None:
        raise SystemExit("screenshots: no Chromium found; install it, or look at the page yourself")
    command = [binary, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(500, width)},{window}", *action, wrapper.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout


def size(
    page: Path,
    width: int,           # of the reader's window, pixels
) -> tuple[int, int]:     # width and height that the page takes; a width above the window's means that it scrolls sideways
    """The size of a page in a window."""
    with tempfile.TemporaryDirectory() as folder:
        dom = _browse(Path(folder), page, width, 800, False, 0, 900, "--dump-dom")
    found = re.search(r"size=(\d+)x(\d+)", dom)
    if found is None:
        raise SystemExit(f"screenshots: Chromium did not lay out {page}")
    return int(found[1]), int(found[2])


def shoot(page: Path, width: int, height: int, dark: bool, out: Path) -> list[Path]:
    """Pictures of the whole page, one for each 16,000 pixels of it."""
    from PIL import Image

    written = []
    for part, skip in enumerate(range(0, height, TALLEST)):
        rest = min(TALLEST, height - skip)
        target = out.with_name(out.name + (f"-{part + 1}" if height > TALLEST else "") + ".png")
        with tempfile.TemporaryDirectory() as folder:
            _browse(Path(folder), page, width, height, dark, skip, rest, f"--screenshot={target}")
        with Image.open(target) as picture:
            picture.crop((0, 0, width, rest)).save(target)
        written.append(target)
    return written


def main(page: Path, folder: Path) -> None:
    """All pictures of a page."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        wide, high = size(page, width)
        print(f"{page.name} at {width}: {wide} × {high}" + (" – sticks out" if wide > width else ""))
        for dark in (False, True):
            for written in shoot(page, width, high, dark, folder / f"{page.stem}-{width}-{'dark' if dark else 'light'}"):
                print(f"  {written}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
