"""The pages in a browser: the viewer scrolls, tables sort and filter, nothing is complained of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.project.folder import ProjectFolder
from segfit.project.watch import WatchServer
from segfit.report.data import ReportData
from segfit.report.page import render

pytestmark = pytest.mark.browser

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if _BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def _open(browser: Any, address: str) -> tuple[Any, list[str]]:
    """Return a page, and what the browser complains of."""
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.set_default_timeout(120_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    return page, complaints


@pytest.fixture(scope="module")
def opened(browser: Any, complete: ReportData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str]]:
    """The complete report, opened from its file."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(complete), encoding="utf-8")
    page, complaints = _open(browser, path.as_uri())
    page.wait_for_selector("#viewer[data-case]")
    return page, complaints


def _caption(page: Any, number: int) -> str:
    return str(page.locator(".pane figcaption").nth(number).inner_text())


def _slice(page: Any, number: int) -> int:
    return int(_caption(page, number).split("·")[1].split("of")[0])


def _picture(page: Any, number: int = 0) -> list[int]:
    code = f"""() => {{
        const shown = document.querySelectorAll("#viewer canvas")[{number}], copy = document.createElement("canvas");
        [copy.width, copy.height] = [shown.width, shown.height];
        const context = copy.getContext("2d", {{ willReadFrequently: true }});
        context.drawImage(shown, 0, 0);
        return [...context.getImageData(0, 0, copy.width, copy.height).data];
    }}"""
    return list(page.evaluate(code))


def test_slices_scroll_by_wheel_keys_and_slider(opened: tuple[Any, list[str]]) -> None:
    page, complaints = opened
    canvas = page.locator("#viewer canvas").first
    canvas.click()
    before, at = _picture(page), _slice(page, 0)
    page.mouse.wheel(0, 120)
    page.wait_for_function(f"!document.querySelector('.pane figcaption').textContent.includes('{at} of')")
    assert _slice(page, 0) == at - 1  # the feet come below the head
    assert _picture(page) != before
    canvas.press("ArrowUp")
    assert _slice(page, 0) == at
    assert _picture(page) == before
    page.locator(".pane input").nth(1).fill("0")
    assert _slice(page, 1) == 50
    assert complaints == []


def test_a_click_moves_the_other_planes(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    canvas = page.locator("#viewer canvas").first
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.5, "y": box["height"] * 0.3})
    first = _slice(page, 1), _slice(page, 2)
    canvas.click(position={"x": box["width"] * 0.4, "y": box["height"] * 0.6})
    assert _slice(page, 1) < first[0]  # further down is further back
    assert _slice(page, 2) > first[1]  # further left is further to the patient's right


def test_layers_window_and_zoom_change_the_picture(opened: tuple[Any, list[str]]) -> None:
    page, complaints = opened
    canvas = page.locator("#viewer canvas").first
    canvas.focus()
    seen = [_picture(page)]
    for key in ("f", "d", "r", "p", "+", "0"):
        canvas.press(key)
        seen.append(_picture(page))
    assert all(one != other for one, other in pairwise(seen))
    assert page.locator('[data-layer="reference"]').get_attribute("aria-pressed") == "false"
    page.locator('[data-range="high"]').fill("100")
    brighter = np.array(_picture(page))
    assert brighter.mean() > np.array(seen[-1]).mean()
    page.locator('[data-do="reset"]').click()
    for key in ("f", "d", "r", "p"):
        canvas.press(key)
    assert complaints == []


def test_a_name_opens_its_case_and_a_head_sorts(opened: tuple[Any, list[str]]) -> None:
    page, complaints = opened
    table = page.locator('table[data-table="cross-validation"]')
    table.locator("a[data-case]", has_text="017").click()
    page.wait_for_selector('#viewer[data-case="hippocampus_<017>"]')
    head = table.locator("th", has_text="Mean Dice").last
    for way in ("ascending", "descending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == way
        means = [float(text) for text in table.locator("tbody td:nth-child(4)").all_inner_texts()]
        assert means == sorted(means, reverse=way == "descending")
    assert complaints == []


def test_rows_are_filtered_and_saved(opened: tuple[Any, list[str]]) -> None:
    page, complaints = opened
    bar = page.locator('.table-bar[data-of="cross-validation"]')
    bar.locator("input").fill("hippocampus_101")
    with page.expect_download() as download:
        bar.locator("button").click()
    rows = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert rows == ["Case,Fold,Mean Dice,Anterior,Posterior", "hippocampus_101,1,0.871,0.871,–"]
    bar.locator("input").fill("")
    assert complaints == []


@pytest.mark.parametrize("width", [400, 1000, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out(opened: tuple[Any, list[str]], width: int, scheme: str) -> None:
    page, _ = opened
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = page.evaluate("[...document.querySelectorAll('#viewer canvas')].map((canvas) => canvas.width)")
    assert len(set(sizes)) == 1


def test_the_button_of_the_live_page_asks_to_stop(browser: Any, server: WatchServer, folder: ProjectFolder) -> None:
    page, complaints = _open(browser, server.address)
    assert page.locator("#live .plot").count() == 3
    page.on("dialog", lambda dialog: dialog.accept())
    with page.expect_response(lambda answer: answer.url == f"{server.address}stop") as answered:
        page.locator("#stop").click()
    assert answered.value.ok
    assert folder.stop.exists()
    assert complaints == []
