"""The report in a real browser, headless Chromium through Playwright; skipped without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.rows import read_rows
from posttrain.report.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium"),
]
DRAWN = "() => [...document.querySelectorAll('.plot')].every((p) => p.querySelector('svg'))"
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page_file(grpo_run: Path, timelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of GRPO in which one completion is markup."""
    run = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(grpo_run, run)
    audio = read_rows(timelines / "train.jsonl")[0].audio
    lines = (run / "rollouts.jsonl").read_text().splitlines()
    hostile = json.loads(lines[0]) | {
        "completion": f"{HOSTILE} at <t>1.5-2.0</t>", "reward": 0.123, "step": 2,
        "group_id": "hostile", "audio": audio,
    }  # fmt: skip
    (run / "rollouts.jsonl").write_text("\n".join([*lines, json.dumps(hostile)]) + "\n")
    return write_report(run)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"],
        )
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page, and everything that went wrong in it: console errors, requests to a network."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url),
    )
    page.goto(page_file.as_uri())
    yield page, wrong
    page.close()


def test_a_clip_plays_and_a_cited_time_is_heard(opened: tuple[Any, list[str]]) -> None:
    page, wrong = opened
    page.fill("#words", "document.title")
    assert page.inner_text("#count").startswith("1 of ")
    page.wait_for_function("() => document.querySelector('#detail audio').readyState >= 2")
    page.evaluate("document.querySelector('#detail audio').play()")
    page.wait_for_function("() => document.querySelector('#detail audio').currentTime > 0.3")
    page.evaluate("document.querySelector('#detail audio').pause()")
    cited = page.locator("#detail .cite").first
    assert cited.inner_text() == "<t>1.5-2.0</t>"
    position = page.evaluate(
        """() => { const audio = document.querySelector('#detail audio');
                   document.querySelector('#detail .cite').click(); return audio.currentTime; }"""
    )
    assert abs(position - 1.5) <= 0.1
    page.wait_for_function("() => document.querySelector('#detail audio').paused")
    assert 1.9 <= page.evaluate("document.querySelector('#detail audio').currentTime") <= 2.6
    assert wrong == []


def test_text_of_a_model_is_text(opened: tuple[Any, list[str]]) -> None:
    page, wrong = opened
    page.fill("#words", "document.title")
    assert HOSTILE in page.inner_text("#detail")
    assert page.title() != "owned" and page.locator("#detail img, #detail script").count() == 0
    assert wrong == []


def test_filters_and_order(opened: tuple[Any, list[str]]) -> None:
    page, wrong = opened
    everything = int(page.inner_text("#count").split(" of ")[1])
    page.select_option("#order", "worst")
    shown = [float(t.split(",")[0]) for t in page.locator("#list button").all_inner_texts()
             if "no score" not in t]  # fmt: skip
    assert shown == sorted(shown) and len(shown) > 3
    page.select_option("#step", "2")
    page.fill("#least", "0.12")
    page.fill("#most", "0.13")
    assert page.inner_text("#count") == f"1 of {everything}"
    page.select_option("#term", "format")
    page.fill("#least", "")
    page.fill("#most", "")
    page.select_option("#kind", "truncated")
    page.select_option("#collection", index=1)
    assert int(page.inner_text("#count").split(" of ")[1]) == 8, "held-out answers, two sources"
    page.wait_for_function(DRAWN)
    assert page.locator(".plot").count() > 5
    assert wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(browser: Any, page_file: Path, scheme: str, width: int) -> None:
    """No horizontal scroll; contrast, names, roles and order as axe checks them."""
    from axe_core_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.goto(page_file.as_uri())
    page.wait_for_function(DRAWN)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page)["violations"]
    problems = [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found]
    page.close()
    assert problems == []


def test_everything_can_be_reached_by_keyboard(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    page.fill("#words", "document.title")
    page.locator("#words").focus()
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate("document.activeElement.className || document.activeElement.tagName")
        )
        if "cite" in str(page.evaluate("document.activeElement.className")):
            page.keyboard.press("Enter")
            break
    assert any("cite" in str(name) for name in seen), seen
    page.wait_for_function("() => document.querySelector('#detail audio').currentTime >= 1.45")
