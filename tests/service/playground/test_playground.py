"""The page in a real browser: Debian's Chromium, driven by Playwright, on loopback only.

Screenshots of what was seen are kept in `build/screenshots`.
"""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect, sync_playwright

from tests.conftest import Server
from tests.fake_worker import FakeWorker
from tests.real_server import RealServer

CHROMIUM = shutil.which("chromium")
SHOTS = Path(__file__).parents[3] / "build" / "screenshots"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 60_000  # milliseconds; a busy machine is slow, a right page still gets there

START = Callable[..., Server]
OPEN = Callable[..., Page]

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Debian's chromium is not installed: apt-get install chromium"
)


# What is served, without a browser.


def test_everything_comes_from_here(server: Server) -> None:
    answer = server.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    for file in files("service.playground").iterdir():
        if not file.name.startswith("__"):
            text = file.read_text()
            assert server.http.get(f"/playground/{file.name}").text == text
            addresses = set(re.findall(r"https?://[^\"'\s)>]+", text))
            assert addresses <= {"http://www.w3.org/2000/svg"}, f"{file.name} names {addresses}"
            assert not re.search(r"\son\w+=|\sstyle=", text), f"{file.name} has inline code"
    assert server.http.get("/playground/__init__.py").status_code == 404


# In the browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--force-color-profile=srgb"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OPEN]:
    """Opens pages; none may complain on its console or fail in its code."""
    complaints: list[str] = []
    contexts = []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce"} | options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error(e.blockedURI));"
            "window.shift = 0; new PerformanceObserver((list) => {"
            "  for (const { hadRecentInput, value } of list.getEntries())"
            "    if (!hadRecentInput) window.shift += value;"
            "}).observe({ type: 'layout-shift', buffered: true });"
        )
        page.goto(url)
        expect(page.locator("#preview")).to_have_attribute("src", re.compile("blob:"))
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Chromium notes each refusal of the server on the console, which the page does not do.
    assert [said for said in complaints if "Failed to load resource" not in said] == []


@pytest.fixture(scope="module")
def service() -> Iterator[RealServer]:
    """The service as `make serve` starts it, with the default model."""
    with RealServer("--enable-attack-demo") as server:
        yield server


def ready(page: Page) -> Page:
    expect(page.locator("#health")).to_have_class(re.compile(r"\bup\b"), timeout=PATIENCE)
    return page


def classify(page: Page) -> None:
    page.click("#classify")
    expect(page.locator("#defended-bars .first")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#stop")).to_be_hidden(timeout=PATIENCE)


def attack(page: Page) -> None:
    page.click("#attack-go")
    expect(page.locator("#scrub")).to_be_enabled(timeout=PATIENCE)


def keep(page: Page, name: str, **options: Any) -> Path:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", **options)
    return SHOTS / f"{name}.png"


def keep_for_readme(page: Page) -> None:
    """From the verdict on the attack to the scores below it; `make picture` copies it."""
    top = page.locator("#attack-verdict").bounding_box()
    end = page.locator("#attack-defended-bars").bounding_box()
    assert top
    assert end
    across, down = page.evaluate("[scrollX, scrollY]")
    y = top["y"] + down - 16
    box = {"x": top["x"] + across - 24, "y": y, "width": top["width"] + 48}
    box["height"] = end["y"] + end["height"] + down + 52 - y
    kept = keep(page, "playground", full_page=True, clip=box)
    with Image.open(kept) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(kept, optimize=True)
    assert kept.stat().st_size < 300_000


def assert_accessible(page: Page) -> None:
    found = Axe().run(page).response["violations"]
    grave = [
        f"{one['id']} ({one['impact']}): {[node['target'] for node in one['nodes']]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert grave == []


def assert_fits(page: Page) -> None:
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen


@needs_chromium
def test_an_attack_and_its_defense_are_seen_and_can_be_asked_again(
    service: RealServer, open_page: OPEN, tmp_path: Path
) -> None:
    page = ready(open_page(service.url))
    classify(page)
    expect(page.locator("#verdict")).to_contain_text("say")
    expect(page.locator("#fact-spent")).to_contain_text("16 views")
    expect(page.locator("#view-list img")).to_have_count(16)
    assert page.locator("#view-list .is-kept").count() >= 1
    page.fill("#attack-steps", "6")
    attack(page)
    expect(page.locator("#track-plain .held, #track-plain .flipped")).to_have_count(7)
    expect(page.locator("#attack-verdict")).to_contain_text("the defense says")
    expect(page.locator("#gain")).to_contain_text("amplified")
    assert page.evaluate("window.shift") < 0.05
    assert_accessible(page)
    keep(page, "desktop", full_page=True)
    keep_for_readme(page)

    # The last step's label of undefended CLIP, which draws nothing, is the API's for the file.
    with page.expect_download() as caught:
        page.click("#download")
    caught.value.save_as(tmp_path / "attacked.png")
    with Image.open(tmp_path / "attacked.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
    command = page.inner_text("#curl")
    assert f"{service.url}/v1/classify" in command
    labels = re.findall(r"labels=([^']+)'", command)
    with (tmp_path / "attacked.png").open("rb") as file:
        form = {"labels": json.dumps(labels), "method": "plain"}
        answer = service.http.post("/v1/classify", data=form, files={"image": file}).json()
    shown = page.locator("#attack-plain-bars .first .name").inner_text()
    assert answer["labels"][0]["label"] == shown

    # Back to the clean picture.
    page.locator("#scrub").press("Home")
    expect(page.locator("#scrub-out")).to_have_text("0")
    expect(page.locator("#gain")).to_have_text("none yet")


@needs_chromium
def test_an_attacker_who_knows_the_defense_can_aim_at_a_label(
    service: RealServer, open_page: OPEN
) -> None:
    page = ready(open_page(service.url, color_scheme="dark"))
    page.check("#adaptive")
    page.focus("#goal")
    page.select_option("#goal", "lemon")
    page.fill("#attack-steps", "2")
    page.fill("#epsilon", "2")
    expect(page.locator("#epsilon-out")).to_have_text("2/255")
    attack(page)
    expect(page.locator("#attack-message")).to_contain_text("who knows the defense")
    assert_accessible(page)
    keep(page, "dark", full_page=True)


@needs_chromium
def test_most_of_the_drawn_examples_get_their_label(service: RealServer, open_page: OPEN) -> None:
    page = ready(open_page(service.url, viewport=PHONE, has_touch=True, is_mobile=True))
    page.evaluate("document.querySelector('#options').open = true")
    page.select_option("#method", "ensemble")
    right = []
    for button in page.locator("#examples button").all():
        button.click()
        name = button.get_attribute("value")
        expect(page.locator("#preview")).to_have_attribute("alt", f"Drawing of a {name}")
        page.evaluate("document.querySelector('#defended-bars').replaceChildren()")
        classify(page)
        right.append(page.locator("#defended-bars .first .name").inner_text() == name)
    assert len(right) == 6
    assert sum(right) >= 4
    assert_fits(page)
    expect(page.locator("label[for=camera]")).to_be_visible()
    assert_accessible(page)
    keep(page, "phone", full_page=True)


@needs_chromium
def test_a_file_is_classified_by_the_keyboard_alone(
    start: START, open_page: OPEN, photo: bytes
) -> None:
    worker = FakeWorker()
    page = ready(open_page(start(worker).url))
    page.set_input_files("#file", {"name": "c.jpg", "mimeType": "image/jpeg", "buffer": photo})
    label = page.locator("#label")
    label.focus()
    for _ in range(8):
        label.press("Backspace")
    expect(page.locator("#chips li")).to_have_count(0)
    page.keyboard.type("cat, dog,cat")
    page.keyboard.press("Enter")
    expect(page.locator("#chips li")).to_have_text(["cat×", "dog×"])
    page.focus("#classify")
    page.keyboard.press("Enter")
    expect(page.locator("#defended-bars .first .name")).to_have_text("cat")
    assert worker.batches[-1][0].labels == ("cat", "dog")
    assert worker.batches[-1][0].image.shape[:2] == (300, 451)
    expect(page.locator("#attack-off")).to_be_visible()
    expect(page.locator("#attack-go")).to_be_hidden()
    # Focus can be seen.
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@needs_chromium
def test_what_the_server_refuses_is_said_in_its_words(start: START, open_page: OPEN) -> None:
    server = start(max_labels=3)
    page = ready(open_page(server.url))
    page.click("#classify")
    message = page.locator("#message")
    expect(message).to_have_text("There are 8 labels; the limit is 3.")
    broken: FilePayload = {
        "name": "x.png",
        "mimeType": "image/png",
        "buffer": b"\x89PNG\r\n\x1a\nbroken",
    }
    for _ in range(5):
        page.locator("#chips button").first.click()
    page.set_input_files("#file", broken)
    expect(message).to_contain_text("x.png is not a picture. The server reads JPEG, PNG,")
    page.click("#classify")
    expect(message).to_have_text("Choose a picture first.")
    page.click("#examples button >> nth=0")
    page.locator("#chips button").first.click()
    page.locator("#chips button").first.click()
    page.click("#classify")
    expect(message).to_have_text("Give at least two labels.")
    assert_accessible(page)
    page.click("#presets button >> nth=0")
    page.route("**/v1/classify", lambda route: route.abort())
    page.click("#classify")
    expect(message).to_have_text("The server cannot be reached. Is it still running?")
    keep(page, "refusal")


@needs_chromium
def test_a_full_queue_is_waited_for(start: START, open_page: OPEN, photo: bytes) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker, max_queue_size=1)
    server.call(worker.be_ready)
    page = ready(open_page(server.url))
    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(2) as pool:

        def ask() -> int:
            form = {"labels": "a,b"}
            return client.post("/v1/classify", data=form, files={"image": photo}).status_code

        # One is being worked on and one waits, so the queue is full.
        first = pool.submit(ask)
        server.wait(lambda: len(worker.batches) == 1)
        second = pool.submit(ask)
        server.wait(lambda: server.app.state.engine.queue_depth == 1)
        page.click("#classify")
        expect(page.locator("#message")).to_have_text(
            re.compile(r"The queue is full\. Trying again in \d+ s\.")
        )
        keep(page, "waiting")
        worker.automatic = True
        server.call(worker.finish)
        assert (first.result(), second.result()) == (200, 200)
    expect(page.locator("#defended-bars .first")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#message")).to_have_text("")


@needs_chromium
def test_slow_work_can_be_watched_and_stopped(start: START, open_page: OPEN) -> None:
    worker = FakeWorker(automatic=False)
    server = start(worker)
    server.call(worker.be_ready)
    page = ready(open_page(server.url))
    page.click("#classify")
    expect(page.locator("#message")).to_have_text(re.compile(r"Still working: \d+ s\."))
    page.click("#stop")
    expect(page.locator("#message")).to_have_text("Stopped.")
    server.wait(lambda: worker.cancelled)


@needs_chromium
def test_a_key_is_asked_for_and_kept_nowhere(start: START, open_page: OPEN) -> None:
    server = start(api_keys="sesame", open_routes="pages")
    page = open_page(server.url)
    dialog = page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    assert_accessible(page)
    keep(page, "key")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-note")).to_contain_text("A valid API key is needed.")
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    ready(page)
    classify(page)
    kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    assert kept == [0, 0, ""]
    assert "sesame" not in page.content()
    page.reload()
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#health-text")).to_have_text("A valid API key is needed.")


@needs_chromium
def test_the_live_panel_follows_the_metrics(start: START, open_page: OPEN) -> None:
    page = ready(open_page(start().url))
    expect(page.locator("#tiles .tile")).to_have_count(4)
    classify(page)
    expect(page.locator("#tiles .tile").nth(3)).to_contain_text("0 of 2")
    page.wait_for_timeout(100)
    assert page.evaluate("window.shift") < 0.05


@needs_chromium
def test_pictures_can_be_dropped_and_pasted(start: START, open_page: OPEN, photo: bytes) -> None:
    page = ready(open_page(start().url))
    small = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(small, "PNG")
    hand_over = """([kind, bytes]) => {
        const file = new File([new Uint8Array(bytes)], `${kind}.png`, { type: "image/png" });
        const data = new DataTransfer();
        data.items.add(file);
        const event = kind === "drop"
            ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
        document.querySelector("#drop").dispatchEvent(event);
    }"""
    for kind in ("drop", "paste"):
        page.evaluate(hand_over, [kind, list(small.getvalue())])
        expect(page.locator("#preview")).to_have_attribute("alt", f"Your picture {kind}.png")
    classify(page)


@needs_chromium
def test_another_picture_or_label_clears_the_answers(service: RealServer, open_page: OPEN) -> None:
    page = ready(open_page(service.url))
    answers = page.locator("#answer"), page.locator("#attack-result")
    for answer in answers:
        expect(answer).to_be_hidden()
    expect(page.locator("#curl")).to_contain_text("-F image=@goldfish.png")
    page.fill("#attack-steps", "2")
    another: FilePayload = {"name": "my cat.png", "mimeType": "image/png", "buffer": b"\x89PNG"}
    changes: list[Callable[[], None]] = [
        lambda: page.click("#examples button >> nth=1"),
        lambda: page.click("#presets button >> nth=1"),
        lambda: page.set_input_files("#file", another),
    ]
    for change in changes:
        classify(page)
        attack(page)
        expect(page.locator("#curl")).to_contain_text("-F image=@attacked.png")
        change()
        for answer in answers:
            expect(answer).to_be_hidden()
        expect(page.locator("#curl")).not_to_contain_text("attacked.png")
    expect(page.locator("#preview")).not_to_have_attribute("src", re.compile("."))


@needs_chromium
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_answer_is_on_the_screen(
    start: START, open_page: OPEN, viewport: dict[str, int]
) -> None:
    page = ready(open_page(start().url, viewport=viewport))
    assert not page.evaluate("document.querySelector('#options').open")
    assert page.evaluate("document.body.scrollHeight") < 4 * viewport["height"]
    classify(page)
    for seen in ("#verdict", "#plain-bars .first", "#defended-bars .first"):
        expect(page.locator(seen)).to_be_in_viewport(ratio=1)


@needs_chromium
def test_what_the_server_lowers_is_shown_as_what_ran(start: START, open_page: OPEN) -> None:
    page = ready(open_page(start(max_views=24, enable_attack_demo=True).url))
    page.evaluate("document.querySelector('#options').open = true")
    page.fill("#views", "1000")
    page.press("#views", "Tab")
    expect(page.locator("#views")).to_have_value("24")

    scores = [{"label": "goldfish", "score": 0.75}, {"label": "dog", "score": 0.25}]
    stage = {"steps": 2, "undefended": scores, "defended": scores, "image": dot()}
    lines = [json.dumps({"stage": stage | {"step": step}}) for step in range(3)]
    end = {"answer": {"defense": {"suspected": False}}, "threat": "transfer", "epsilon": 4}
    body = "\n".join([*lines, json.dumps(end), ""])
    page.route("**/demo/attack", lambda route: route.fulfill(status=200, body=body))
    attack(page)
    expect(page.locator("#attack-steps-out")).to_have_text("2")
    expect(page.locator("#epsilon-out")).to_have_text("4/255")
    expect(page.locator("#track-plain span")).to_have_count(3)


def dot() -> str:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@needs_chromium
def test_the_page_refuses_what_the_server_would(
    start: START, open_page: OPEN, photo: bytes
) -> None:
    asked = {"candidate_labels": ["cat", "dog"], "defense": {"method": "plain"}}
    asked["image"] = base64.b64encode(photo).decode()
    limit = len(json.dumps(asked, separators=(",", ":")))
    for less, sent in ((0, True), (1, False)):
        server = start(max_body_bytes=limit - less)
        page = ready(open_page(server.url))
        for _ in range(8):
            page.locator("#chips button").first.click()
        page.fill("#label", "cat,dog")
        page.set_input_files("#file", {"name": "a.jpg", "mimeType": "", "buffer": photo})
        expect(page.locator("#preview")).to_have_attribute("alt", "Your picture a.jpg")
        if sent:
            classify(page)
        else:
            page.click("#classify")
            expect(page.locator("#message")).to_have_text(
                f"The request would have {limit} bytes; the limit is {limit - 1}."
            )
    text: FilePayload = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    page.set_input_files("#file", text)
    expect(page.locator("#message")).to_contain_text("notes.txt is not a picture.")


@needs_chromium
def test_a_long_label_that_wins_is_shown_in_full(start: START, open_page: OPEN) -> None:
    page = ready(open_page(start().url, viewport=PHONE))
    for _ in range(8):
        page.locator("#chips button").first.click()
    page.fill("#label", f"{'very ' * 12}long label,{'x' * 60}")
    classify(page)
    winner = page.locator("#defended-bars .first .name")
    expect(winner).to_contain_text("long label")
    assert winner.evaluate("(e) => e.scrollWidth <= e.clientWidth")
    assert_fits(page)


@needs_chromium
def test_the_header_tells_that_the_server_is_gone_and_back(start: START, open_page: OPEN) -> None:
    health = files("service.playground").joinpath("health.js").read_text()
    (every,) = re.findall(r"^const EVERY = (\d+);", health, re.MULTILINE)
    assert int(every) < 1000, "it asks again within a second"
    page = ready(open_page(start().url))
    page.route("**/readyz", lambda route: route.abort())
    expect(page.locator("#health")).to_have_class(re.compile("down"), timeout=PATIENCE)
    page.unroute("**/readyz")
    ready(page)
    assert page.locator("#method option").count() == page.locator("#method option").evaluate_all(
        "(all) => new Set(all.map((one) => one.value)).size"
    )


@needs_chromium
def test_the_api_reference_follows_dark_mode(start: START, open_page: OPEN) -> None:
    server = start()
    page = open_page(server.url, color_scheme="dark")
    page.goto(f"{server.url}/docs")
    expect(page.locator("html")).to_have_class("dark-mode")
    page.emulate_media(color_scheme="light")
    expect(page.locator("html")).not_to_have_class("dark-mode")
