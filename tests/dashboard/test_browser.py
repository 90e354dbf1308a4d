"""The pages in a real Chromium, where there is one: they renew themselves, fit, and load nothing from elsewhere."""

from __future__ import annotations

import json
import shutil

import pytest

from foedus.dashboard import coordinator_app, serve, silo_app

from .homes import evaluation, federation, round_row, silo

TOKEN = "a-token-that-is-long-enough"


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests of this file."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def look(browser):
    """`look(url, width)` → a page, of which no console message and no foreign request is forgiven."""
    pages, faults = [], []

    def open_it(url: str, width: int = 1280, **how):
        page = browser.new_page(viewport={"width": width, "height": 900}, **how)
        page.set_default_timeout(60_000)  # milliseconds: other tests may keep this machine busy
        page.on("console", lambda said: faults.append(said.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: faults.append(asked.url) if not asked.url.startswith((url, "data:")) else None)
        page.goto(url)
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert faults == []


def test_a_round_appears_without_anybody_asking(tmp_path, look):
    home = federation(tmp_path / "home", perplexity=[90.0, 80.0, 75.0, 70.0])
    with serve(coordinator_app(home), "127.0.0.1:0") as served:
        page = look(served.url)
        assert page.inner_text("#run dd >> nth=0") == "4 of 6"
        with (home / "runs" / "notes" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(round_row(5, {"west": "no answer in 60 s"}, None, "")) + "\n")
            file.write(json.dumps(evaluation("federated", 5, 60.0)) + "\n")
        page.wait_for_selector("#run dd:has-text('5 of 6')")
        assert "A silo does not take part" in page.inner_text("#alarms")
        assert "Round 5 of 6" in page.text_content("#said")
        page.close()


def test_signing_in_and_rolling_back_work_from_the_keyboard(tmp_path, look, monkeypatch):
    from foedus.dashboard import view
    from foedus.dashboard.released import Version

    done: list[str] = []
    monkeypatch.setattr(view, "versions", lambda *_: (Version("notes", 1, "retired", "ab" * 32, returns=True),))
    app = coordinator_app(federation(tmp_path / "home"), token=TOKEN, rollback=lambda v: done.append(v) or "done")
    with serve(app, "127.0.0.1:0") as served:
        page = look(served.url)
        page.focus("#token")
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Roll back to this")
        page.focus("text=Roll back to this")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The rollback is done")
        page.close()
    assert done == ["notes@1"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_pages_fit_a_telephone_and_keep_their_contrast(tmp_path, look, scheme):
    homes = coordinator_app(federation(tmp_path / "f", slow="west")), silo_app(silo(tmp_path / "s"))
    for app in homes:
        with serve(app, "127.0.0.1:0") as served:
            page = look(served.url, 360, color_scheme=scheme, reduced_motion="reduce")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            assert page.evaluate("getComputedStyle(document.querySelector('.live i')).animationName") == "none"
            assert min(page.evaluate(CONTRASTS)) >= 4.5
            page.close()


def test_without_scripts_the_page_is_whole_and_renews_itself(tmp_path, look):
    with serve(coordinator_app(federation(tmp_path / "home")), "127.0.0.1:0") as served:
        page = look(served.url, java_script_enabled=False)
        assert "4 of 6" in page.inner_text("#run")
        assert 'http-equiv="refresh"' in page.content()


CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const x = c[i] / 255;
    return sum + weight * (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const c = rgb(getComputedStyle(node).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("p, dt, dd, th, td, a, h1, h2, h3, li, button, .word, .of")]
    .filter((node) => node.offsetParent && node.textContent.trim() && !node.classList.contains("skip"))
    .map((node) => {
      const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""
