"""The live page in a real Chromium: `make browser-test`."""

from __future__ import annotations

import io
import time
from pathlib import Path

import av
import pytest
from browser.chromium import Browser, Page, free_port, serving, wait_until
from PIL import Image

pytestmark = pytest.mark.browser

CHUNK = 12  # video frames of the tiny world's chunks
FPS = 16


def link_of(page: Page) -> str:
    return page.do("location.href")


def shown(page: Page) -> str:
    """The prompt of the frames on the screen."""
    return page.text("shown")


def test_a_prompt_is_on_the_screen_within_one_chunk(page: Page):
    """Catches a prompt that waits behind buffered chunks: the time that a viewer feels."""
    counts = []
    for prompt in ("a cross moves", "a square moves", "a disc moves", "a red cross moves") * 2:
        page.do("document.getElementById('prompted-note').textContent = ''")
        page.ask(prompt)
        note = page.until("document.getElementById('prompted-note').textContent")
        counts.append(int(note.split()[0]))
        assert shown(page) == prompt
        seconds = float(page.text("prompted").removesuffix("s"))
        assert seconds < 2 * CHUNK / FPS  # of a busy machine; the frames are what is counted
        time.sleep(0.3)
    assert max(counts) <= CHUNK, counts


def test_a_refused_prompt_leaves_the_picture_moving(page: Page):
    """Catches a player that waits for ever for a prompt that was not taken."""
    page.ask("a lion")
    page.until("document.getElementById('notice').textContent.includes('names nothing')")
    chunk = page.text("clock")
    page.until(f"document.getElementById('clock').textContent !== {chunk!r}")
    assert page.do("document.getElementById('state').dataset.phase") == "live"


def test_words_that_are_not_known_are_named(page: Page):
    """Catches a prompt that is taken without a word, of which the student knows a half."""
    page.ask("a purple disc moves backwards")
    page.until("!document.getElementById('unknown').hidden")
    assert "Not known to stable: “purple”, “backwards”." in page.text("unknown")
    page.ask("a large red disc moves left slowly")
    page.until("document.getElementById('unknown').hidden")
    page.do("document.querySelector('input[value=DMD]').click()")
    page.until("!document.getElementById('unknown').hidden")
    assert "Not known to DMD: “large”, “red”, “left”, “slowly”." in page.text("unknown")


def test_a_link_brings_the_same_stream(page: Page, browser: Browser, url: str):
    """Catches an address without prompt and seed, and a link that another tab reads otherwise."""
    page.write("seed", "7")
    page.ask("a cross moves")
    page.until("location.hash.includes('cross')")
    page.click("reset")
    page.until("location.hash.includes('seed=7')")
    link = link_of(page)
    assert link == f"{url}#prompt=a+cross+moves&seed=7&student=stable"
    other = browser.page()
    other.open(link)
    other.until_phase("live")
    assert other.do("document.getElementById('prompt').value") == "a cross moves"
    assert other.do("document.getElementById('seed').value") == "7"
    assert first_frames(page) == first_frames(other)
    other.close()


def first_frames(page: Page) -> list[list[int]]:
    """The pixels of a stream's first three frames, after a pause and a reset."""
    page.front()
    page.until_phase("live")
    page.click("pause")
    page.until_phase("paused")
    page.do(
        """new Promise((done) => {
          const draw = CanvasRenderingContext2D.prototype.drawImage;
          let count = 0;
          CanvasRenderingContext2D.prototype.drawImage = function (...all) {
            draw.apply(this, all);
            if (this.canvas.id === "video" && ++count <= 3)
              window.kept.push([...this.getImageData(0, 0, 64, 64).data]);
            if (count === 3) {
              CanvasRenderingContext2D.prototype.drawImage = draw;
              done();
            }
          };
          window.kept = [];
          document.getElementById("reset").click();
        })"""
    )
    return page.do("window.kept")


def test_back_and_forward_take_steps_back(page: Page):
    """Catches a back button that leaves the page, or changes the address alone."""
    first = shown(page)
    page.ask("a cross moves")
    page.until("document.getElementById('shown').textContent === 'a cross moves'")
    page.write("seed", "5")
    page.click("reset")
    page.until("location.hash.includes('seed=5')")
    page.do("history.back()")
    page.until("location.hash.includes('seed=0')")
    page.until("document.getElementById('seed').value === '0'")
    page.until("document.getElementById('notice').textContent.includes('seed 0')")
    page.do("history.back()")
    page.until(f"document.getElementById('shown').textContent === {first!r}")
    page.do("history.forward()")
    page.until("document.getElementById('shown').textContent === 'a cross moves'")
    page.do("history.forward()")
    page.until("document.getElementById('notice').textContent.includes('seed 5')")
    assert page.do("history.length") <= 5


def test_a_recording_plays(page: Page, browser: Browser, tmp_path: Path):
    """Catches a file that no player opens, and one with other pictures than were shown."""
    browser.save_to(tmp_path)
    page.click("record")
    page.until("document.getElementById('record').textContent.startsWith('Stop and save 0:0')")
    time.sleep(2.5)
    page.click("record")
    page.until("document.getElementById('notice').textContent.startsWith('saved as')")
    name = page.text("notice").removeprefix("saved as ")
    data = wait_until(lambda: file_bytes(tmp_path / name))
    with av.open(io.BytesIO(data)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert 2 * CHUNK <= frames <= 5 * CHUNK
    time.sleep(1.1)  # a file is called after the second in which it was saved
    page.click("save-last")
    wait_until(lambda: len(list(tmp_path.glob("*.mp4"))) == 2)
    assert page.do("document.getElementById('state').dataset.phase") == "live"


def file_bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def test_a_picture_begins_the_stream(page: Page, tmp_path: Path):
    """Catches an upload that is not shown, is lost by a reset, or cannot be taken back."""
    Image.new("RGB", (320, 200), (200, 40, 40)).save(tmp_path / "red.png")
    page.choose_file("picture", tmp_path / "red.png")
    page.until("!document.getElementById('thumb').hidden")
    assert "goes on after it" in page.text("picture-note")
    red, green = first_frames(page)[0][:2]
    assert red > 120 > green
    page.click("no-picture")
    page.until("document.getElementById('thumb').hidden")
    (tmp_path / "text.png").write_text("no picture")
    page.choose_file("picture", tmp_path / "text.png")
    page.until("document.getElementById('notice').textContent.includes('no picture that is known')")
    (tmp_path / "huge.png").write_bytes(b"\0" * (17 * 2**20))
    page.choose_file("picture", tmp_path / "huge.png")
    page.until("document.getElementById('notice').textContent.includes('17.0 MiB; at most 16')")
    page.errors.clear()  # the browser's own line about the answer 415


def test_the_page_comes_back_by_itself(browser: Browser):
    """Catches a page that needs a click after a restart, or forgets what was shown.

    And a recording that is lost without a word.
    """
    port = free_port()
    page = browser.page()
    with serving(port=port) as url:
        page.open(url)
        page.until_phase("live")
        page.write("seed", "3")
        page.click("reset")
        page.ask("a square moves")
        page.until("document.getElementById('shown').textContent === 'a square moves'")
        page.click("record")
    page.until_phase("reconnecting")
    assert "trying again in" in page.text("veil-text")
    with serving(port=port):
        page.until_phase("live", 30)
        assert shown(page) == "a square moves"
        time.sleep(2)  # what is said must stay, and not only flash up
        assert "this stream is not known" in page.text("notice")
        assert page.do("document.getElementById('seed').value") == "3"
        page.network(is_up=False)
        page.until_phase("reconnecting")
        page.network(is_up=True)
        page.until_phase("live")
        assert shown(page) == "a square moves"
    page.close()


def test_the_link_with_the_token_opens_the_page(browser: Browser, tmp_path: Path):
    """Catches a page that its own guard keeps from its scripts, its stream or its files."""
    file = tmp_path / "token"
    page = browser.page()
    port = free_port()
    with serving("--host", "0.0.0.0", "--token-file", str(file), port=port) as link:
        token = file.read_text().strip()
        assert link.endswith(f":{port}/?token={token}")
        base = f"http://127.0.0.1:{port}/"
        page.open(base)
        assert "this page needs a token" in page.do("document.body.textContent")
        page.errors.clear()
        page.open(f"{base}?token={token}#prompt=a+cross+moves&seed=4&student=DMD")
        page.until_phase("live")
        assert link_of(page) == f"{base}#prompt=a+cross+moves&seed=4&student=DMD"
        assert token not in page.do("document.cookie")
        page.until("!document.getElementById('save-last').disabled")
        assert page.do("fetch(`/video.mp4?stream=x`).then((answer) => answer.status)") == 404
        assert [text for text in page.errors if "status of 40" not in text] == []
    with serving("--host", "0.0.0.0", port=port):  # another token
        page.until_phase("refused", 30)
        assert "This page needs a token" in page.text("veil-text")
    page.close()


def test_others_watch_the_same_stream(page: Page, browser: Browser, url: str):
    """Catches a watcher who steers, sees another stream, or is left before a frozen picture."""
    page.do("navigator.clipboard.writeText = (text) => (window.copied = text, null)")
    page.click("copy-watch")
    link = page.until("window.copied")
    assert link.startswith(f"{url}#watch=")
    watcher = browser.page()
    watcher.open(link)
    watcher.until_phase("live")
    assert watcher.do("getComputedStyle(document.querySelector('.controls')).display") == "none"
    assert watcher.do("document.querySelector('.guest').checkVisibility()")
    assert not page.do("document.querySelector('.guest').checkVisibility()")
    assert page.until("document.getElementById('viewers').textContent === '2'")
    page.ask("a cross moves")
    watcher.until("document.getElementById('shown').textContent === 'a cross moves'")
    page.call("Page.navigate", url="about:blank")
    watcher.until_phase("ended")
    assert "has ended" in watcher.text("veil-text")
    watcher.click("again")
    watcher.until("document.body && !document.body.classList.contains('watching')")
    watcher.until_phase("live")
    watcher.close()


def test_pixels_can_be_sharp_or_smooth(page: Page):
    """Catches a choice that changes nothing or that the next visit has forgotten."""
    look = "getComputedStyle(document.getElementById('video')).imageRendering"
    assert page.do(look) == "auto"
    page.do("document.querySelector('input[value=pixels]').click()")
    assert page.do(look) == "pixelated"
    width = page.do("document.getElementById('video').clientWidth")
    assert width % 64 == 0
    page.reload()
    assert page.do(look) == "pixelated"
    page.do("document.querySelector('input[value=smooth]').click()")
    assert page.do(look) == "auto"


def test_the_keyboard_reaches_everything(page: Page):
    """Catches a control that only a mouse can use, or that a screen reader cannot name."""
    page.do("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.press("Tab")
        reached.append(page.do("document.activeElement.id || document.activeElement.name"))
    wanted = page.do(
        """[...document.querySelectorAll("button, input, select, summary")]
          .filter((one) => one.checkVisibility() && !one.disabled && one.type !== "radio")
          .map((one) => one.id)"""
    )
    assert {"prompt", "record", "picture", "full", "copy-link", "seed"} <= set(wanted)
    assert set(wanted) <= set(reached), set(wanted) - set(reached)
    assert {"student", "look"} <= set(reached)
    nameless = page.do(
        """[...document.querySelectorAll("button, input, select")].filter((one) =>
          !one.textContent.trim() && !one.labels?.length && !one.getAttribute("aria-labelledby"))
          .map((one) => one.id)"""
    )
    assert nameless == []
    page.do("document.activeElement.blur()")
    page.press(" ", "Space", " ")
    page.until_phase("paused")
    page.press(" ", "Space", " ")
    page.until_phase("live")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 800, 1440, 1920])
def test_nothing_sticks_out(page: Page, width: int, scheme: str):
    """Catches a page that scrolls sideways, on any screen."""
    page.size(width, 900, is_phone=width < 600)
    page.scheme(scheme)
    page.ask("a purple disc moves " + "backwards" * 5)
    page.until("!document.getElementById('unknown').hidden")
    assert page.do("document.documentElement.scrollWidth") <= width


def test_a_very_long_prompt_is_refused_in_words(page: Page):
    """Catches a connection that ends, or a page that hangs, for 100,000 letters."""
    page.do("document.getElementById('prompt').maxLength = 1e9")
    page.do("document.getElementById('prompt').value = 'disc '.repeat(20000)")
    page.do("document.getElementById('prompt-form').requestSubmit()")
    page.until("document.getElementById('notice').classList.contains('bad')")
    assert "100,0" in page.text("notice") and "want at most" in page.text("notice")
    assert page.do("document.getElementById('state').dataset.phase") in ("live", "waiting")
    page.ask("a cross moves")
    page.until("document.getElementById('shown').textContent === 'a cross moves'")
