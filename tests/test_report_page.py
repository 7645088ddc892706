"""The report in a real browser: it works by mouse and keys, on a phone, in the dark and on paper, alone.

Headless Chromium opens the file (Debian: chromium, chromium-driver). Every test ends with two questions: did
a request leave the page, and did anything complain in its console. A control shows that both would be seen.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from featherweight.outcome import Result
from featherweight.report import render
from sample_results import bare_result, full_result, hostile_result, missed_result

pytest.importorskip("selenium", reason="needs selenium, of the extra dev")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromium-driver, of Debian"),
]
PHONE = (375, 800)

CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a)];
const light = (colour) => {
  const [r, g, b] = colour.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  const chain = [];
  for (let one = element; one; one = one.parentElement) {
    chain.unshift(parse(getComputedStyle(one).backgroundColor));
  }
  return chain.reduce((below, own) => over(own, below), [255, 255, 255]);
};
const poor = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  const apart = element.closest('script, style, noscript, svg, .sr, .skip, [hidden]');
  if (!walker.currentNode.textContent.trim() || apart || !element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const below = behind(element);
  const [a, b] = [light(over(parse(style.color), below)), light(below)];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  if (ratio < (large ? 3 : 4.5)) poor.push([element.className, walker.currentNode.textContent.trim(), ratio]);
}
return poor;
"""


class Page:
    """A browser with one report in it."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver, self.folder = driver, folder
        self.urls: list[str] = []
        self.complaints: list[str] = []

    def open(self, result: Result | str) -> None:
        """A report, or a page of the test's own."""
        file = self.folder / "report.html"
        file.write_text(result if isinstance(result, str) else render(result), encoding="utf-8")
        self.driver.get(file.as_uri())
        self.seen()
        if not isinstance(result, str) and result.trials:
            self.until(lambda: self.all("#plot svg .mark-symbol path"))

    def seen(self) -> None:
        """Take up what the browser logged."""
        for entry in self.driver.get_log("performance"):  # type: ignore[no-untyped-call]
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.urls.append(message["params"]["request"]["url"])
        for entry in self.driver.get_log("browser"):  # type: ignore[no-untyped-call]
            if entry["level"] in ("SEVERE", "WARNING"):
                self.complaints.append(entry["message"])

    def until(self, true: Any) -> Any:
        return WebDriverWait(self.driver, 60, poll_frequency=0.1).until(lambda _: true())

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.one(selector).get_property("textContent")).strip()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def tell(self, command: str, **told: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, told)

    def media(self, kind: str = "", scheme: str = "light") -> None:
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},  # what is clicked must not be on its way
        ]
        self.tell("Emulation.setEmulatedMedia", media=kind, features=features)

    def size(self, width: int, height: int) -> None:
        told = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", **told)

    def point(self, trial: str) -> WebElement:
        """A mark of the plot; that of the ring around it has no recipe."""
        return self.one(f"#plot svg path[aria-label*='Trial: {trial};'][aria-label*='Recipe']")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    assert BROWSER is not None
    options.binary_location = BROWSER
    for flag in (
        *("headless=new", "no-first-run", "disable-gpu", "disable-dev-shm-usage", "disable-extensions"),
        *(
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            "force-device-scale-factor=1",
        ),
        *("host-resolver-rules=MAP * ~NOTFOUND", "window-size=1200,900"),
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
        *(["no-sandbox"] if os.geteuid() == 0 else []),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, tmp_path: Path) -> Iterator[Page]:
    """A page that must stay by itself and silent."""
    shown = Page(browser, tmp_path)
    shown.size(1200, 900)
    shown.media()
    yield shown
    shown.seen()
    file = (tmp_path / "report.html").as_uri()
    own = (file, "data:", "chrome://")  # the browser's first tab may still be loading its own parts
    assert [url for url in shown.urls if not url.startswith(own)] == []
    assert shown.complaints == []


def test_the_watch_sees_requests_and_complaints(browser: webdriver.Chrome, tmp_path: Path) -> None:
    watched = Page(browser, tmp_path)
    watched.open("<script>console.error('hear me'); fetch('http://127.0.0.1:9/away').catch(() => 0)</script>")
    watched.until(lambda: watched.seen() or "http://127.0.0.1:9/away" in watched.urls)
    assert any("hear me" in complaint for complaint in watched.complaints)


class TestPlot:
    def test_each_tab_draws_its_points(self, page: Page) -> None:
        page.open(full_result())
        plots = json.loads(page.text("#plots"))
        words = set()
        for tab, plot in zip(page.all(".tabs button"), plots, strict=True):
            tab.click()
            page.until(lambda plot=plot: page.text("#plot-words") == plot["words"])
            assert [one.get_attribute("aria-pressed") for one in page.all(".tabs button")].count("true") == 1
            assert tab.get_attribute("aria-pressed") == "true"
            assert page.one("#plot").get_attribute("aria-label") == plot["words"]
            page.until(
                lambda plot=plot: len(page.all("#plot svg path[aria-label*='Recipe']")) == len(plot["points"])
            )
            words.add(plot["words"])
        assert len(words) == 4

    def test_hovering_shows_the_recipe(self, page: Page) -> None:
        page.open(full_result())
        mark = page.point("3")
        page.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", mark)
        ActionChains(page.driver).move_to_element(mark).perform()
        page.until(lambda: "visible" in (page.one("#vg-tooltip-element").get_attribute("class") or ""))
        told = page.one("#vg-tooltip-element").text
        assert "fold → quantize(weights: int8, range: mse, where: exclude head)" in told
        assert "0.25 points" in told
        assert "297 KB" in told

    def test_a_click_picks_the_trial_and_leads_to_its_row(self, page: Page) -> None:
        page.open(full_result())
        mark = page.point("3")
        page.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", mark)
        ActionChains(page.driver).move_to_element(mark).click().perform()
        page.until(lambda: page.text("#picked").startswith("Trial 3, chosen: fold → quantize"))
        assert [row.get_attribute("id") for row in page.all("tr.marked")] == ["trial-3"]
        link = page.one("#picked a")
        page.run("arguments[0].scrollIntoView({block: 'center'})", link)
        link.click()
        page.until(lambda: page.run("return location.hash") == "#trial-3")

    def test_keys_go_through_every_point(self, page: Page) -> None:
        page.open(full_result())
        expected = [point["words"] for point in json.loads(page.text("#plots"))[0]["points"]]
        button = page.one(".browse button[data-go='1']")
        page.run("arguments[0].focus()", button)
        seen = []
        for _ in expected:
            ActionChains(page.driver).send_keys(Keys.ARROW_RIGHT).perform()
            seen.append(page.text("#picked").removesuffix("Show it in the table").strip())
        assert seen == expected
        ActionChains(page.driver).send_keys(Keys.ARROW_LEFT).perform()
        assert page.text("#picked").startswith(expected[-2])
        assert page.one("#picked").get_attribute("aria-live") == "polite"

    def test_what_is_picked_stays_picked_on_another_tab(self, page: Page) -> None:
        page.open(full_result())
        page.one(".browse button[data-go='1']").click()
        before = page.text("#picked")
        page.all(".tabs button")[1].click()
        page.until(lambda: page.text("#plot-words").startswith("Quality and size"))
        page.until(lambda: page.text("#picked") == before)


class TestTables:
    def test_sort_up_and_down_by_mouse_and_keys(self, page: Page) -> None:
        page.open(full_result())
        head = next(one for one in page.all("#trials th") if one.text.startswith("Size"))
        column = page.run("return arguments[0].cellIndex", head)
        rows = "[...document.querySelectorAll('#trials tbody tr')]"
        cells = f"return {rows}.map(row => row.cells[arguments[0]].dataset.sort)"
        head.find_element(By.TAG_NAME, "button").click()
        up = page.run(cells, column)
        known = [float(value) for value in up if value]
        assert known == sorted(known)
        assert len(known) > 5
        assert up[-1] == ""  # what nothing measured is last
        assert head.get_attribute("aria-sort") == "ascending"
        page.run("arguments[0].querySelector('button').focus()", head)
        ActionChains(page.driver).send_keys(Keys.ENTER).perform()
        down = [float(value) for value in page.run(cells, column) if value]
        assert down == sorted(known, reverse=True)
        assert head.get_attribute("aria-sort") == "descending"

    def test_every_head_sorts(self, page: Page) -> None:
        page.open(full_result())
        heads = page.all("table.sortable thead th:has(button)")
        assert len(heads) > 20
        for head in heads:
            page.run("arguments[0].querySelector('button').click()", head)
            assert head.get_attribute("aria-sort") == "ascending"

    def test_links_of_dropped_trials_lead_to_their_rows(self, page: Page) -> None:
        page.open(full_result())
        for link in page.all("#dropped tbody a"):
            target = str(link.get_attribute("href")).rpartition("#")[2]
            assert page.all(f"#{target}"), target


class TestWaterfall:
    def test_bars_join_from_step_to_step(self, page: Page) -> None:
        page.open(full_result())
        columns = page.run(
            """return [1, 2, 3].map(column => [...document.querySelectorAll('.fall tbody tr')].map(row => {
                 const bar = row.cells[column].querySelector('.track span');
                 if (!bar) return null;
                 const box = bar.getBoundingClientRect(), track = bar.parentElement.getBoundingClientRect();
                 return [bar.className, box.left - track.left, box.right - track.left, track.width];
               }))"""
        )
        sizes = columns[1]
        assert [bar[0] for bar in sizes] == ["total", "better", "better", "better", "total"]
        for before, after in pairwise(sizes[1:-1]):
            assert after[2] == pytest.approx(before[1], abs=2.5)  # each begins where the last one ended
        assert sizes[0][2] == pytest.approx(sizes[0][3], abs=1)
        assert sizes[-1][2] == pytest.approx(sizes[0][3] * 297_000 / 1_093_412, abs=2.5)
        assert columns[2][2] is None  # a simulated step has no latency
        assert "simulated" in page.text(".fall tr.simulated")
        assert "256 examples" in page.text(".fall tr.simulated")


class TestForAll:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast_is_enough(self, page: Page, scheme: str) -> None:
        page.media(scheme=scheme)
        page.open(missed_result())
        assert page.run(CONTRAST) == []
        dark = page.run("return getComputedStyle(document.body).backgroundColor") != "rgb(246, 247, 249)"
        assert dark == (scheme == "dark")

    def test_fits_a_phone(self, page: Page) -> None:
        page.size(*PHONE)
        page.open(full_result())
        assert page.run("return document.scrollingElement.scrollWidth") <= PHONE[0]
        assert page.run(CONTRAST) == []
        small = page.run(
            """return [...document.querySelectorAll('.tabs button, .browse button')]
                 .map(b => b.getBoundingClientRect()).filter(b => b.height < 24 || b.width < 24).length"""
        )
        assert small == 0  # WCAG 2.2, 2.5.8: targets of 24 pixels

    def test_what_can_be_used_has_a_name(self, page: Page) -> None:
        page.open(full_result())
        tree = page.tell("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "link", "image", "img", "table", "region", "navigation"}
        named = [node for node in tree if not node.get("ignored") and node["role"]["value"] in roles]
        assert len(named) > 40
        assert [node for node in named if not node.get("name", {}).get("value")] == []

    def test_the_first_key_skips_to_the_verdict(self, page: Page) -> None:
        page.open(full_result())
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        assert page.run("return document.activeElement.className") == "skip"
        ActionChains(page.driver).send_keys(Keys.ENTER).perform()
        assert page.run("return location.hash") == "#verdict"

    def test_links_of_the_sections_lead_somewhere(self, page: Page) -> None:
        page.open(full_result())
        links = page.all("nav a")
        assert len(links) > 10
        for link in links:
            page.run("arguments[0].click()", link)
            target = page.run("return location.hash")
            assert page.all(f"section{target}"), target

    def test_prints_whole(self, page: Page) -> None:
        page.open(full_result())
        page.media("print")
        hidden = "nav, .tabs, .browse, .skip"
        assert not any(one.is_displayed() for one in page.all(hidden))
        cut = page.run(
            """return [...document.querySelectorAll('.scroll')]
                 .filter(one => one.scrollHeight > one.clientHeight + 2)
                 .filter(one => getComputedStyle(one).overflowY !== 'visible')
                 .length"""
        )
        assert cut == 0
        printed = page.tell("Page.printToPDF", printBackground=False)
        assert len(printed["data"]) > 10_000


@pytest.mark.parametrize("make", [bare_result, missed_result, hostile_result])
def test_any_result_opens_in_peace(page: Page, make: Any) -> None:
    page.open(make())
    assert page.all("section")
    assert page.run("return document.querySelectorAll('img, iframe, object').length") == 0
