"""The demo page, in a real browser without a window, in front of a real server."""

import base64
import contextlib
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
import requests
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from test_serve import PHOTO, Service

from edgelab.models import example_image, models_dir
from edgelab.paths import PACKAGE

STAGES = ["decode", "resize, normalise", "infer", "softmax, labels", "queue, network"]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service("signs", "--workers=1", "--queue=0", "--max-bytes=1000000")
    yield service
    assert service.stop() == 0
    assert "Traceback" not in "".join(service.log), "".join(service.log)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    found = chromium.find()
    if found is None:
        why = "needs chromium and chromium-driver; `python tests/chromium.py` says how to get them"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for each in (
        "--headless=new", "--disable-dev-shm-usage", "--window-size=1100,900",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        # Offline, but for this machine: no name but localhost has an address.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(each)
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # else Chromium's own sandbox stays on
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Driver(found[1]))
    yield driver
    driver.quit()


@pytest.fixture
def page(service: Service, browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """The page, just loaded; nothing of it may have been refused by its own policy."""
    browser.get(service.url)
    until(browser, lambda: text(browser, "state") == "No picture yet.")
    logged(browser)
    yield browser
    refused = [each for each in logged(browser) if "Content Security Policy" in each]
    assert not refused


def logged(browser: webdriver.Chrome) -> list[str]:
    """What came to the browser's console since the last call."""
    entries = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [each["message"] for each in entries]


def until(browser: webdriver.Chrome, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, 20, 0.05).until(lambda _: condition())


def text(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def choose(browser: webdriver.Chrome, path: Path) -> None:
    browser.find_element(By.ID, "file").send_keys(str(path))


def rows(browser: webdriver.Chrome, table: str) -> list[tuple[str, float, float]]:
    """Name, width of the bar in pixels and number of each row."""
    found = []
    for each in browser.find_elements(By.CSS_SELECTOR, f"#{table} tbody tr"):
        bar = each.find_element(By.CSS_SELECTOR, ".bar").size["width"]
        number = each.find_element(By.CSS_SELECTOR, "td:last-child").text.split()[0]
        found.append((each.find_element(By.TAG_NAME, "th").text, bar, float(number)))
    return found


def assert_answered(browser: webdriver.Chrome) -> None:
    until(browser, lambda: text(browser, "state").startswith("signs sees: stop, "))
    assert text(browser, "error") == ""
    assert text(browser, "label") == "stop"
    labels = rows(browser, "labels")
    assert len(labels) == 5
    assert labels[0][0] == "stop"
    assert labels[0][2] > 50
    assert sum(each[2] for each in labels) <= 100.3  # rounded, five of 32
    widest = browser.find_element(By.CSS_SELECTOR, "#labels tbody td").size["width"]
    for _, width, percent in labels:
        assert width == pytest.approx(max(2, widest * percent / 100), abs=2)
    stages = rows(browser, "stages")
    assert [name for name, _, _ in stages] == STAGES
    assert all(number > 0 for _, _, number in stages)
    longest = max(stages, key=lambda each: each[2])
    for _, width, number in stages:
        assert width == pytest.approx(max(2, longest[1] * number / longest[2]), abs=2)


def assert_fails(browser: webdriver.Chrome, words: str) -> None:
    until(browser, lambda: words in text(browser, "error"))
    assert text(browser, "state") == "No answer."
    assert not browser.find_element(By.ID, "answer").is_displayed()


def test_a_chosen_picture_gets_its_label_and_bars(page: webdriver.Chrome) -> None:
    choose(page, example_image())
    assert_answered(page)
    preview = page.find_element(By.ID, "preview")
    assert preview.get_attribute("naturalWidth") != "0"
    assert preview.get_attribute("alt") == f"The picture {example_image().name}"
    page.find_element(By.ID, "again").click()
    assert_answered(page)


def test_a_dropped_picture_gets_its_label(page: webdriver.Chrome) -> None:
    """Dropped by the browser's own machinery, as a hand would do it."""
    place = page.find_element(By.ID, "drop").rect
    what = {
        "x": place["x"] + 20, "y": place["y"] + 20,
        "data": {"items": [], "files": [str(example_image())], "dragOperationsMask": 1},
    }  # fmt: skip
    for kind in ("dragEnter", "dragOver", "drop"):
        page.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, **what})
    assert_answered(page)


def test_what_is_no_picture_is_told_and_the_next_one_works(
    page: webdriver.Chrome, tmp_path: Path
) -> None:
    for name, data in (("broken.jpg", PHOTO[:900]), ("letter.txt", b"Dear server")):
        (tmp_path / name).write_bytes(data)
        choose(page, tmp_path / name)
        assert_fails(page, "This is not a picture that can be read: ")
    until(page, lambda: not page.find_element(By.ID, "preview").is_displayed())
    choose(page, example_image())
    assert_answered(page)


def test_a_picture_that_is_too_large_is_told(page: webdriver.Chrome, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(PHOTO + bytes(1_000_000))
    choose(page, tmp_path / "large.jpg")
    assert_fails(page, "too large: a request may have 1,000,000 bytes at most")


def test_a_busy_server_is_told_and_later_it_works(page: webdriver.Chrome, service: Service) -> None:
    """Others keep the one worker busy, and there is no queue."""
    file = io.BytesIO()
    Image.effect_noise((1200, 1200), 60).convert("RGB").save(file, "JPEG")
    assert len(file.getvalue()) < 1_000_000
    enough = threading.Event()

    def ask() -> None:
        with requests.Session() as session:
            while not enough.is_set():
                session.post(
                    f"{service.url}/v2/models/signs/infer", file.getvalue(),
                    headers={"Content-Type": "image/jpeg"}, timeout=20,
                )  # fmt: skip

    others = [threading.Thread(target=ask) for _ in range(4)]
    for other in others:
        other.start()
    try:
        choose(page, example_image())

        def told() -> bool:
            state = until(page, lambda: s if (s := text(page, "state")) != "Classifying …" else "")
            if state == "No answer.":
                return True
            page.find_element(By.ID, "again").click()  # it found a gap
            return False

        until(page, told)
        assert_fails(page, "The server is busy. Try again in 1 s.")
    finally:
        enough.set()
        for other in others:
            other.join()
    page.find_element(By.ID, "again").click()
    assert_answered(page)


def test_it_works_by_keyboard_and_says_what_it_is(page: webdriver.Chrome) -> None:
    keys = ActionChains(page)
    keys.send_keys(Keys.TAB).perform()
    focused = page.switch_to.active_element
    assert focused.get_attribute("id") == "file"
    assert focused.accessible_name.startswith("Choose a picture")
    outline = page.find_element(By.ID, "drop").value_of_css_property("outline-style")
    assert outline == "solid"
    assert page.find_element(By.ID, "state").aria_role == "status"  # both are read out aloud
    assert page.find_element(By.ID, "error").aria_role == "alert"
    choose(page, example_image())
    assert_answered(page)
    page.execute_script("document.getElementById('file').focus()")
    keys.send_keys(Keys.TAB).perform()
    assert page.switch_to.active_element.get_attribute("id") == "again"
    keys.send_keys(Keys.ENTER).perform()
    assert_answered(page)
    names = [each.accessible_name for each in page.find_elements(By.TAG_NAME, "table")]
    assert names == ["How probable", "Where the time went"]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("dark", 360)])
def test_it_is_readable(page: webdriver.Chrome, scheme: str, width: int, tmp_path: Path) -> None:
    """Contrast as WCAG AA asks for, nothing wider than the window; with a screenshot."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        choose(page, example_image())
        assert_answered(page)
        for name in ("body", "h1", ".soft", ".drop strong", "#label", "#stages td:last-child"):
            assert contrast(page, name) >= 4.5, name
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        whole = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        picture = Image.open(io.BytesIO(base64.b64decode(whole["data"]))).convert("L")
        page_colour = picture.getpixel((2, 2))
        assert isinstance(page_colour, int)
        assert (page_colour > 200) is (scheme == "light")
        folder = Path(os.environ.get("EDGELAB_SCREENSHOTS", tmp_path))
        (folder / f"demo-{scheme}-{width}.png").write_bytes(base64.b64decode(whole["data"]))
        (tmp_path / "x.txt").write_bytes(b"x")
        choose(page, tmp_path / "x.txt")
        assert_fails(page, "not a picture")
        assert contrast(page, "#error") >= 4.5
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(browser: webdriver.Chrome, selector: str) -> float:
    """The ratio of WCAG 2.2 between an element's text and what is behind it."""
    element = browser.find_element(By.CSS_SELECTOR, selector)
    colours = browser.execute_script(
        "let e = arguments[0]; const ink = getComputedStyle(e).color; let back;"
        "do { back = getComputedStyle(e).backgroundColor; e = e.parentElement; }"
        "while (back === 'rgba(0, 0, 0, 0)' && e); return [ink, back];",
        element,
    )

    def luminance(colour: str) -> float:
        parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_a_token_opens_it_and_each_model_can_be_chosen(browser: webdriver.Chrome) -> None:
    twin = f"twin={models_dir() / 'signs' / 'signs.onnx'}"
    service = Service("signs", twin, token="a token")
    try:
        browser.get(service.url)
        until(browser, lambda: "wants a token" in text(browser, "error"))
        field = browser.find_element(By.ID, "token")
        field.send_keys("wrong", Keys.ENTER)
        until(browser, lambda: "wants a token" in text(browser, "error"))
        assert not browser.find_element(By.ID, "models").is_displayed()
        field.clear()
        field.send_keys("a token", Keys.ENTER)
        until(browser, lambda: browser.find_element(By.ID, "models").is_displayed())
        assert not field.is_displayed()
        choose(browser, example_image())
        assert_answered(browser)
        browser.find_element(By.CSS_SELECTOR, "#model option:nth-child(2)").click()
        until(browser, lambda: text(browser, "state").startswith("twin sees: stop"))
    finally:
        assert service.stop() == 0
    browser.find_element(By.ID, "again").click()  # nobody is there any more
    assert_fails(browser, "The connection broke.")


# --- without a browser ----------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere_and_may_not() -> None:
    page = (PACKAGE / "demo.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bstyle=|\bon[a-z]+=", page)
    assert re.findall(r'\b(?:src|href)="([^"]*)"', page) == ["data:,"]


def test_its_headers_allow_what_it_holds_and_no_more(service: Service) -> None:
    answer = requests.get(service.url, timeout=9)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/html")
    policy = dict(
        each.split(" ", 1) for each in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (held,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.S)
        wanted = base64.b64encode(hashlib.sha256(held.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{wanted}'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_stage_times_come_as_server_timing_too(service: Service) -> None:
    headers = {"Content-Type": "image/jpeg"}
    answer = requests.post(
        f"{service.url}/v2/models/signs/infer", PHOTO, headers=headers, timeout=9
    )
    told = dict(each.split(";dur=") for each in answer.headers["Server-Timing"].split(", "))
    assert list(told) == ["decode", "preprocess", "infer", "postprocess"]
    for stage, ms in told.items():
        assert float(ms) == pytest.approx(answer.json()[f"{stage}_ms"], abs=1e-3)


def test_chromium_is_told_how_to_get_for_who_may_not_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with contextlib.suppress(AttributeError):  # Windows has no users of this kind
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium.find() is None
    chromium.main()
    assert "chromium-driver" in capsys.readouterr().out
