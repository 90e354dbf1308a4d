"""The page in a real browser, where FOEDUS_BROWSER_TESTS=1 asks for it; otherwise by the rules of `pages.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from foedus.report import write_report

from .pages import Page

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000",
    "--allow-file-access-from-files", "--enable-logging=stderr",
)  # fmt: skip
FRAME = """<!doctype html><title>frame</title><iframe src="report.html" width="{width}" height="900"></iframe><script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {{
  const inner = frame.contentDocument;
  document.title = [inner.documentElement.scrollWidth, inner.querySelectorAll("thead button").length].join(" ");
}});
</script>"""


@pytest.fixture
def look(tmp_path: Path) -> Callable[[Path, int], tuple[int, int]]:
    """`look(report, width)` → (how wide the page is at that window width, how many buttons its script made)."""
    if os.environ.get("FOEDUS_BROWSER_TESTS") != "1":
        return _by_the_rules
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.fail("FOEDUS_BROWSER_TESTS=1 needs Chromium, and none is on the path: apt-get install chromium")

    def open_it(report: Path, width: int) -> tuple[int, int]:
        frame = report.with_name("frame.html")
        frame.write_text(FRAME.format(width=width))
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr
        wide, buttons = done.stdout.split("<title>")[1].split("</title>")[0].split()
        return int(wide), int(buttons)

    return open_it


def _by_the_rules(report: Path, width: int) -> tuple[int, int]:
    page = Page(report.read_text(encoding="utf-8"))
    assert page.faults == []
    return width, sum(len(head.all("th")) for head in page.root.all("thead"))


@pytest.mark.parametrize("silos", [5, 100])
def test_the_page_fits_its_window_and_its_script_runs(make_run, look, silos):
    report = write_report(make_run(silos=silos, rounds=3, alone=silos < 100, failures=[(2, "sci.med", "a" * 300)]))
    for width in (390, 1280):
        wide, buttons = look(report, width)
        assert wide <= width
        assert buttons > 20


@pytest.mark.parametrize("simulated", [False, True])
def test_a_private_page_with_an_audit_fits_its_window(private, look, simulated):
    folder, _ = private(simulated=simulated)
    (folder / "audit.json").write_text('{"format": 1}')
    (folder / "audit.html").write_text("<!doctype html>")
    report = write_report(folder)
    for width in (390, 1280):
        wide, buttons = look(report, width)
        assert wide <= width
        assert buttons > 20
