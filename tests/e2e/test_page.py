"""The page in a real Chromium: what people see and press, before a server whose answers are written here."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from deploy.local import LocalStack
from gateway.http.page import PAGE_PATHS
from tests.e2e.scripted_page import DIGEST, Reply, ScriptedServer, receipt, scripted_server

pytestmark = pytest.mark.e2e
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "examples/nano/pictures/shapes.png"
STATIC = ROOT / "gateway/http/static"
BOXES = "A <ref>star</ref><box>[[70, 90, 280, 330]]</box> and a <ref>disc</ref><box>[[720, 90, 930, 370]]</box>."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: install it with `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(viewport={"width": 1200, "height": 860}) as context:
        yield context


class Watch:
    """Notes what a page should never do: write errors to the console, fail, ask another origin, break its policy."""

    def __init__(self, page: Page, origin: str) -> None:
        self.complaints: list[str] = []
        self._origin = origin
        page.on("console", lambda message: self._note(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("dialog", lambda dialog: self._note(f"a dialog opened: {dialog.message}"))
        page.on("request", self._check)

    def _note(self, complaint: str) -> None:
        # Chromium writes every refusal of the server to the console as well; those are what some tests are about.
        if not complaint.startswith("Failed to load resource: the server responded with a status of 4"):
            self.complaints.append(complaint)

    def _check(self, request: Request) -> None:
        if not request.url.startswith((self._origin, "blob:", "data:")):
            self.complaints.append(f"asked {request.url}")


@pytest.fixture
def page(context: BrowserContext, server: ScriptedServer) -> Iterator[Page]:
    """The page, opened; at the end it must have kept to itself."""
    page = context.new_page()
    watch = Watch(page, server.url)
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("internvl3-test")
    yield page
    assert watch.complaints == []


def drop(page: Page, picture: Path = PICTURE, kind: str = "image/png") -> None:
    """Drop a file onto the page, as a person would from their desktop."""
    page.evaluate(
        """([name, kind, content]) => {
            const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name, { type: kind }));
            for (const event of ["dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(event, { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        [picture.name, kind, base64.b64encode(picture.read_bytes()).decode()],
    )


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def answer(page: Page, index: int = -1) -> str:
    """The text of a finished answer."""
    said = page.locator(".said").nth(index)
    expect(said).not_to_have_attribute("aria-busy", "true")
    return said.inner_text()


def content_of(body: dict[str, object], message: int) -> list[dict[str, object]]:
    return body["messages"][message]["content"]  # type: ignore[index, no-any-return]


def test_two_turns_about_a_dropped_picture_are_streamed(page: Page, server: ScriptedServer) -> None:
    first = Reply(("A red ", "star."), (receipt(),), pause_after=1)
    server.replies += [first, Reply(("On the ", "left."), (receipt(cache_tier="LOCAL", transfer_tier="PREFIX"),))]
    drop(page)
    expect(page.locator("#tray img")).to_have_count(1)
    ask(page, "What is this?")
    expect(page.locator(".said")).to_have_text("A red ")
    expect(page.locator(".said")).to_have_attribute("aria-busy", "true")
    first.go_on.set()
    assert answer(page) == "A red star."
    ask(page, "Where?")
    assert answer(page) == "On the left."

    sent = base64.b64encode(PICTURE.read_bytes()).decode()
    text = {"type": "text", "text": "What is this?"}
    assert content_of(server.bodies[0], 0) == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{sent}"}},
        text,
    ]
    # The server holds the picture now: 64 digits do.
    known = {"type": "image_url", "image_url": {"url": f"ivl:sha256:{DIGEST}"}}
    assert content_of(server.bodies[1], 0) == [known, text]
    assert [message["role"] for message in server.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert server.bodies[1]["messages"][1]["content"] == "A red star."


def test_tiles_and_boxes_are_drawn_where_they_are(page: Page, server: ScriptedServer) -> None:
    server.replies.append(Reply((BOXES[:9], BOXES[9:40], BOXES[40:]), (receipt(3, 2),)))
    drop(page)
    ask(page, "Find the shapes.")
    assert answer(page) == "A star and a disc."
    image = page.locator(".canvas img").bounding_box()
    assert image

    def is_at(index: int, selector: str, left: float, top: float, width: float, height: float) -> bool:
        """Whether a thing is there on the screen, in thousandths of the picture; its line takes some around it."""
        box = page.locator(selector).nth(index).bounding_box()
        assert box
        found = [(box["x"] - image["x"]) / image["width"], (box["y"] - image["y"]) / image["height"]]
        found += [box["width"] / image["width"], box["height"] / image["height"]]
        wanted = [left, top, width, height]
        return bool(pytest.approx(wanted, abs=20) == [1000 * number for number in found])

    tile = "rect.tile:not(.thumbnail)"
    expect(page.locator(tile)).to_have_count(6)
    assert all(
        is_at(3 * row + column, tile, column * 333, row * 500, 333, 500) for row in (0, 1) for column in range(3)
    )
    assert is_at(0, "rect.thumbnail", 0, 0, 1000, 1000)
    expect(page.locator("rect.box")).to_have_count(2)
    assert is_at(0, "rect.box", 70, 90, 210, 240)
    assert is_at(1, "rect.box", 720, 90, 210, 280)
    assert page.locator(".label").all_inner_texts() == ["star", "disc"]
    expect(page.locator(".toggle")).to_have_text("3 \N{MULTIPLICATION SIGN} 2 tiles + thumbnail")


def test_a_mention_points_at_its_box_and_tiles_can_be_hidden(page: Page, server: ScriptedServer) -> None:
    server.replies.append(Reply((BOXES,), (receipt(3, 2),)))
    drop(page)
    ask(page, "Find the shapes.")
    expect(page.locator(".account")).to_be_visible()
    page.get_by_role("button", name="disc, at 720, 90, 930, 370").hover()
    expect(page.locator("rect.meant")).to_have_count(1)
    expect(page.locator("rect.meant")).to_have_attribute("x", "720")
    page.click(".toggle")
    expect(page.locator("rect.tile").first).to_be_hidden()
    expect(page.locator("rect.box").first).to_be_visible()


def test_half_written_tags_are_not_shown(page: Page, server: ScriptedServer) -> None:
    pieces = (BOXES[: BOXES.index("sc</ref>")], "sc</re", "f><bo", "x>[[720, 90", ", 930, 370]]</box>.")
    reply = Reply(pieces, (receipt(),), pause_after=4)
    server.replies.append(reply)
    drop(page)
    ask(page, "Find the shapes.")
    expect(page.locator(".said")).to_have_text("A star and a disc")
    expect(page.locator("rect.box")).to_have_count(1)
    reply.go_on.set()
    expect(page.locator("rect.box")).to_have_count(2)
    assert answer(page) == "A star and a disc."
    assert page.locator(".mention").all_inner_texts() == ["star", "disc"]


@pytest.mark.parametrize(
    "words",
    [
        "<box>[[1, 2, 3]]</box>",
        "<box>[[1, 2, 3, null]]</box>",
        "<box>nothing</box>",
        "<box>[[1, 2, 3, 4]</box>",
        "<box>{}</box>",
        "</box><ref>",
    ],
)
def test_a_malformed_box_is_text_and_breaks_nothing(page: Page, server: ScriptedServer, words: str) -> None:
    server.replies.append(Reply((words, " end"), (receipt(),)))
    drop(page)
    ask(page, "Find it.")
    assert answer(page).endswith("end")
    expect(page.locator("rect.box")).to_have_count(0)


def test_what_it_cost_is_told(page: Page, server: ScriptedServer) -> None:
    server.replies.append(Reply(("A star.",), (receipt(3, 2),)))
    drop(page)
    ask(page, "What is this?")
    expect(page.locator("summary")).to_contain_text("42 tokens · first after 530 ms · 20.0 tokens/s")
    page.click("summary")
    facts = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    assert (
        facts["shapes.png"]
        == "3 \N{MULTIPLICATION SIGN} 2 + thumbnail = 7 tiles, 1792 tokens, encoded in 212 ms + 3 ms to the model"
    )
    assert facts["Prompt"] == "1856 tokens, 1792 of them visual, 32 cached"
    assert (facts["Queue"], facts["Prefill"], facts["Total"]) == ("2 ms", "310 ms", "2.60 s")


@pytest.mark.parametrize("press", ["button", "escape"])
def test_a_stopped_answer_ends_at_the_server_and_is_gone_on_from(
    page: Page, server: ScriptedServer, press: str
) -> None:
    reply = Reply(("It is ", "never said"), pause_after=1)
    server.replies += [reply, Reply(("So be it.",))]
    ask(page, "What is it?")
    expect(page.locator(".said")).to_have_text("It is ")
    page.get_by_role("button", name="Stop").click() if press == "button" else page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert reply.client_left.wait(10)
    expect(page.get_by_role("button", name="Ask")).to_be_visible()
    ask(page, "Why?")
    assert answer(page) == "So be it."
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "It is "}


def test_an_error_in_the_middle_is_told_with_what_to_do(page: Page, server: ScriptedServer) -> None:
    problem = {"message": "The LLM service broke the answer off.", "code": "LLM_UNAVAILABLE", "param": None}
    server.replies += [Reply(("It is ",), problem=problem), Reply(("A star.",))]
    ask(page, "What is it?")
    alert = page.locator(".problem[role=alert]")
    expect(alert).to_contain_text("The LLM service broke the answer off.")
    expect(alert).to_contain_text("Try again in a moment.")
    expect(alert).to_contain_text("request-7")
    page.get_by_role("button", name="Try again").click()
    assert answer(page) == "A star."
    expect(alert).to_have_count(0)
    assert len(server.bodies[1]["messages"]) == 1  # half an answer is none


def test_a_stream_that_ends_without_its_end_is_told(page: Page, server: ScriptedServer) -> None:
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body='data: {"choices":[{"index":0,"delta":{"content":"Half"}}]}\n\n'
        ),
    )
    ask(page, "What is it?")
    expect(page.locator(".problem")).to_contain_text("The answer broke off.")


def test_a_full_server_says_when_to_come_again(page: Page, server: ScriptedServer) -> None:
    problem = {"message": "Too many requests wait.", "code": "QUEUE_FULL", "param": None}
    server.replies.append(Reply(status=429, problem=problem, headers={"retry-after": "3"}))
    ask(page, "What is it?")
    expect(page.locator(".problem")).to_contain_text("Too many requests wait.")
    expect(page.locator(".problem")).to_contain_text("Try again in 3 s.")


def test_a_missing_key_is_asked_for_and_kept_for_the_tab_only(page: Page, server: ScriptedServer) -> None:
    problem = {"message": "A valid API key is needed.", "code": "API_KEY_INVALID", "param": None}
    server.replies += [Reply(status=401, problem=problem), Reply(("A star.",))]
    ask(page, "What is it?")
    page.get_by_role("button", name="Enter a key").click()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("ivl_secret")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    assert answer(page) == "A star."
    assert server.keys == ["", "Bearer ivl_secret"]
    assert page.evaluate("sessionStorage.getItem('key')") == "ivl_secret"
    assert "ivl_secret" not in json.dumps(page.evaluate("({...localStorage, cookie: document.cookie})"))


def test_settings_travel_with_the_question(page: Page, server: ScriptedServer) -> None:
    server.replies.append(Reply())
    page.get_by_title("Settings").click()
    values = {"Temperature": "0.7", "Top p": "0.9", "Longest answer": "64", "Seed": "7", "System message": "Be brief."}
    for label, value in values.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Tiles per picture").select_option("6")
    page.get_by_label("Boxes that answers name").select_option("")
    page.keyboard.press("Escape")
    drop(page)
    ask(page, "What is it?")
    answer(page)
    body = server.bodies[0]
    wanted = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 64, "seed": 7}
    assert {name: body[name] for name in wanted} == wanted
    assert "grounding" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert content_of(body, 1)[0]["image_url"]["max_dynamic_patch"] == 6  # type: ignore[index]


def test_what_the_model_has_no_form_for_is_left_out_and_asked_again(page: Page, server: ScriptedServer) -> None:
    problem = {
        "message": "This model has no grounding markers.",
        "code": "NOT_SUPPORTED_BY_MODEL",
        "param": "grounding",
    }
    server.replies += [Reply(status=400, problem=problem), Reply(("A star.",))]
    ask(page, "What is it?")
    assert answer(page) == "A star."
    assert [body.get("grounding") for body in server.bodies] == [True, None]


def test_a_picture_that_the_server_has_forgotten_is_sent_again(page: Page, server: ScriptedServer) -> None:
    problem = {"message": "The bytes of this medium are not held.", "code": "MEDIA_NOT_FOUND", "param": DIGEST}
    server.replies += [Reply(receipts=(receipt(),)), Reply(status=404, problem=problem), Reply(receipts=(receipt(),))]
    drop(page)
    ask(page, "What is it?")
    answer(page)
    ask(page, "And where?")
    expect(page.locator(".account")).to_have_count(2)
    urls = [content_of(body, 0)[0]["image_url"]["url"][:11] for body in server.bodies]  # type: ignore[index]
    assert urls == ["data:image/", "ivl:sha256:", "data:image/"]


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script><a href='javascript:alert(3)'>x</a>"


def test_html_in_an_answer_is_text(page: Page, server: ScriptedServer) -> None:
    label = '<ref>"><svg onload=alert(4)></ref><box>[[1, 2, 3, 4]]</box>**<b>x</b>**'
    server.replies.append(Reply((HOSTILE, " ", label), (receipt(),)))
    drop(page)
    ask(page, "<img src=y onerror=alert(5)>")
    said = answer(page)
    assert HOSTILE in said
    assert "<b>x</b>" in said
    for selector in (".said img", ".said script", ".said a", ".said svg", ".said b", ".asked p img", ".labels svg"):
        expect(page.locator(selector)).to_have_count(0)
    assert page.locator(".asked p").inner_text() == "<img src=y onerror=alert(5)>"


def test_html_in_an_error_and_in_a_file_name_is_text(page: Page, server: ScriptedServer, tmp_path: Path) -> None:
    named = tmp_path / "<img src=z onerror=alert(6)>.png"
    named.write_bytes(PICTURE.read_bytes())
    problem = {"message": HOSTILE, "code": "<b>", "param": None}
    server.replies.append(Reply((), problem=problem))
    drop(page, named)
    ask(page, "What is it?")
    expect(page.locator(".problem p").first).to_have_text(HOSTILE)
    expect(page.locator("figcaption .name")).to_have_text(named.name)
    expect(page.locator(".problem img, figcaption img")).to_have_count(0)


def test_the_policy_stops_what_would_run_or_load_from_elsewhere(
    context: BrowserContext, server: ScriptedServer
) -> None:
    page = context.new_page()
    page.goto(server.url)
    page.evaluate(
        """() => {
            window.broken = [];
            const note = ({ effectiveDirective }) => window.broken.push(effectiveDirective);
            document.addEventListener("securitypolicyviolation", note);
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            const image = new Image();
            image.src = "https://elsewhere.example/pixel.png";
            const frame = document.createElement("iframe");
            frame.src = location.href;
            document.body.append(script, image, frame);
            fetch("https://elsewhere.example/").catch(() => {});
        }"""
    )
    page.wait_for_function("window.broken.length >= 4")
    assert set(page.evaluate("window.broken")) == {"script-src-elem", "img-src", "frame-src", "connect-src"}
    assert page.evaluate("window.ran") is None


def test_everything_on_the_page_has_a_name_and_can_be_reached_by_keyboard(page: Page, server: ScriptedServer) -> None:
    server.replies.append(Reply((BOXES,), (receipt(3, 2),)))
    drop(page)
    ask(page, "Find the shapes.")
    expect(page.locator(".account")).to_be_visible()
    expect(page.get_by_role("log")).to_contain_text("A star and a disc.")
    expect(page.get_by_role("status")).to_have_text("The answer is complete.")
    for control in page.locator("button:visible, input:visible, textarea:visible, select:visible").all():
        assert re.search(r'^- \w+ "[^"]+', control.aria_snapshot()), control.evaluate("node => node.outerHTML")
    page.focus("#question")
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className.split(' ')[0]"))
    assert {"add", "theme", "open-settings", "renew", "mention", "quiet"} <= reached


def test_enter_with_shift_begins_a_line_and_nothing_empty_is_asked(page: Page, server: ScriptedServer) -> None:
    server.replies.append(Reply())
    page.press("#question", "Enter")
    expect(page.locator("article")).to_have_count(0)
    page.fill("#question", "One")
    page.press("#question", "Shift+Enter")
    page.keyboard.type("Two")
    page.press("#question", "Enter")
    answer(page)
    assert content_of(server.bodies[0], 0)[-1]["text"] == "One\nTwo"


def test_pasted_chosen_and_removed_files_are_what_is_asked_about(page: Page, server: ScriptedServer) -> None:
    page.set_input_files("#files", [PICTURE, PICTURE.with_name("word.png")])
    page.evaluate(
        """(content) => {
            const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
        }""",
        base64.b64encode(PICTURE.read_bytes()).decode(),
    )
    expect(page.locator("#tray img")).to_have_count(3)
    page.get_by_role("button", name="Remove word.png").click()
    server.replies.append(Reply(receipts=(receipt(), receipt())))
    ask(page, "What are these?")
    answer(page)
    assert [part["type"] for part in content_of(server.bodies[0], 0)] == ["image_url", "image_url", "text"]
    assert page.locator("figcaption .name").all_inner_texts() == ["shapes.png", "pasted.png"]


def test_a_file_that_is_neither_picture_nor_video_is_refused_in_words(page: Page, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("no picture")
    drop(page, notes, "text/plain")
    expect(page.locator("#complaint")).to_have_text("notes.txt is neither a picture nor a video.")
    expect(page.locator("#tray li")).to_have_count(0)


def test_a_video_is_shown_as_one_and_its_frames_are_counted(page: Page, server: ScriptedServer, tmp_path: Path) -> None:
    frames = [{"index": index, "time_s": index / 2} for index in range(8)]
    server.replies.append(Reply(("It turns.",), (receipt(tile_count=8, frames=frames),)))
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"not decoded here")
    drop(page, clip, "video/mp4")
    ask(page, "What happens?")
    answer(page)
    assert content_of(server.bodies[0], 0)[0]["type"] == "video_url"
    expect(page.locator(".canvas video")).to_have_count(1)
    expect(page.locator("figcaption .name")).to_have_text("clip.mp4 · 8 frames seen")


def test_a_new_chat_forgets_the_old_one(page: Page, server: ScriptedServer) -> None:
    server.replies += [Reply(), Reply()]
    ask(page, "One?")
    answer(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "Two?")
    answer(page)
    assert len(server.bodies[1]["messages"]) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_dark_where_the_system_is_and_can_be_turned(
    browser: Browser, server: ScriptedServer, scheme: str
) -> None:
    with browser.new_context(color_scheme=scheme) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(server.url)

        def is_dark() -> bool:
            ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            return sum(map(int, re.findall(r"\d+", ground))) < 200

        assert is_dark() == (scheme == "dark")
        page.get_by_title("Dark or light").click()
        assert is_dark() == (scheme == "light")
        page.reload()
        assert is_dark() == (scheme == "light")


def test_a_phone_of_360_pixels_shows_everything_without_scrolling_sideways(
    browser: Browser, server: ScriptedServer
) -> None:
    words = BOXES + " " + "unbroken" * 30
    server.replies += [Reply((words,), (receipt(4, 3),)), Reply(status=503, problem={"message": "a" * 90, "code": "X"})]
    phone = {"width": 360, "height": 740}
    with browser.new_context(viewport=phone, is_mobile=True, has_touch=True) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(server.url)
        expect(page.get_by_title("Take a picture")).to_be_visible()
        drop(page)
        ask(page, "Find the shapes, please: " + "x" * 60)
        page.click("summary")
        ask(page, "And now?")
        expect(page.locator(".problem")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.get_by_title("Settings").click()
        expect(page.get_by_label("Seed")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_the_whole_page_is_small_and_asked_for_again_by_its_tag(browser: Browser, server: ScriptedServer) -> None:
    assert sum(file.stat().st_size for file in STATIC.iterdir()) <= 40 * 1024
    assert {("/page/" + file.name).replace("/page/index.html", "/") for file in STATIC.iterdir()} == set(PAGE_PATHS)
    with browser.new_context() as context:
        for path in PAGE_PATHS:
            fresh = context.request.get(server.url + path)
            again = context.request.get(server.url + path, headers={"if-none-match": fresh.headers["etag"]})
            assert (fresh.status, again.status, again.body()) == (200, 304, b"")
            assert "default-src 'none'" in fresh.headers["content-security-policy"]
            assert fresh.headers["x-content-type-options"] == "nosniff"


def test_the_gateway_itself_serves_the_page_and_answers_it(browser: Browser, stack: LocalStack) -> None:
    address = f"http://{stack.http_address}"
    with browser.new_context() as context:
        page = context.new_page()
        watch = Watch(page, address)
        page.goto(address)
        expect(page.locator("#model")).not_to_have_text("not reached")
        drop(page)
        page.get_by_title("Settings").click()
        page.get_by_label("Longest answer").fill("8")
        page.keyboard.press("Escape")
        ask(page, "What is this?")
        expect(page.locator(".account")).to_be_visible(timeout=60_000)
        ask(page, "And now?")
        expect(page.locator(".account")).to_have_count(2, timeout=60_000)
        expect(page.locator("rect.tile").first).to_be_attached()
        assert watch.complaints == []
