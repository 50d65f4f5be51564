"""Links to a video, in a real Chromium: `make browser-test`."""

from __future__ import annotations

import time

import pytest
from browser.chromium import Browser, Page

pytestmark = pytest.mark.browser

KEEP_FRAMES = """
  window.kept = [];
  const draw = CanvasRenderingContext2D.prototype.drawImage;
  CanvasRenderingContext2D.prototype.drawImage = function (...all) {
    draw.apply(this, all);
    if (this.canvas.id !== "video") return;
    let sum = 0;
    for (const value of this.getImageData(0, 0, 64, 64).data) sum = (31 * sum + value) | 0;
    window.kept.push(sum);
  };
"""


def watched_page(browser: Browser, link: str) -> Page:
    """A page that keeps a sum of every frame that it has shown."""
    page = browser.page()
    page.call("Page.addScriptToEvaluateOnNewDocument", source=KEEP_FRAMES)
    page.open(link)
    page.until_phase("live")
    return page


def test_a_link_shows_the_same_frames_with_all_prompts(browser: Browser, url: str):
    """Catches a link that begins with the newest prompt, or has a prompt one chunk late."""
    page = watched_page(browser, f"{url}#prompt=a+disc+moves&seed=7&student=stable")
    for prompt, mode in (
        *(("a cross moves", "recache"), ("a square moves", "flush"), ("a disc moves", "flush")),
        *(("a red cross moves, 3.keep.&then=x", "keep"), ("a disc moves", "recache")),
    ):
        page.do(f"document.getElementById('mode').value = {mode!r}")
        page.ask(prompt)
        page.until(f"document.getElementById('shown').textContent === {prompt!r}")
    time.sleep(1.5)
    link = page.do("location.href")
    shown = page.do("window.kept")
    page.close()
    assert link.count("&then=") == 5
    again = watched_page(browser, link)
    assert "later prompts in the link: " in again.text("notice")
    again.until(f"window.kept.length >= {len(shown)}", len(shown) / 16 + 30)
    assert again.do("window.kept")[: len(shown)] == shown
    assert len(set(shown)) > len(shown) // 2
    assert again.do("location.href") == link
    assert again.do("document.getElementById('prompt').value") == "a disc moves"
    again.close()


def test_a_link_that_is_pasted_begins_that_video(page: Page, url: str):
    """Catches a link that only changes the prompt of the stream that runs."""
    page.do("window.isOld = true")
    page.do("location.hash = '#prompt=a+cross+moves&seed=0&student=stable'")
    page.until("!window.isOld && document.getElementById('state')?.dataset.phase === 'live'")
    page.until("document.getElementById('shown').textContent === 'a cross moves'")
    assert page.do("location.href") == f"{url}#prompt=a+cross+moves&seed=0&student=stable"


@pytest.mark.parametrize(
    ("link", "notice", "veil"),
    [
        ("prompt=" + "disc+" * 700, "prompt is 'disc disc", "Write a prompt to begin."),
        ("prompt=a+disc+moves&then=x", "changes is [{'said': 'x'}]", "Write a prompt to begin."),
        ("prompt=a+disc+moves&seed=1e99", "the seed is", "Write a seed to begin."),
        ("prompt=a+lion&seed=3", "'a lion' names nothing", "Write a prompt to begin."),
    ],
)
def test_a_link_that_cannot_be_is_refused_in_words(
    browser: Browser, url: str, link: str, notice: str, veil: str
):
    """Catches a page that says `connecting` for ever, or quietly shows another video."""
    page = browser.page()
    page.open(f"{url}#{link}")
    page.until_phase("ready")
    assert notice in page.text("notice")
    assert page.text("veil-text") == veil
    page.write("seed", "9007199254740991")
    page.ask("a cross moves")
    page.until_phase("live")
    assert page.do("location.hash").startswith("#prompt=a+cross+moves&seed=9007199254740991")
    page.do("location.reload()")
    page.until("document.getElementById('notice')?.textContent.includes('seed 9007199254740991')")
    page.close()


def test_a_page_that_comes_back_waits_for_its_own_ghost(page: Page, browser: Browser, url: str):
    """Catches a page that gives up because its old connection still counts as a stream."""
    page.network(is_up=False)
    page.until_phase("reconnecting")
    others = []
    for _ in range(2):
        others.append(browser.page())
        others[-1].open(url)
        others[-1].until_phase("live")
    page.front()
    page.network(is_up=True)
    page.until("document.getElementById('veil-text').textContent.startsWith('2 other streams')")
    assert page.do("document.getElementById('state').dataset.phase") == "reconnecting"
    for other in others:
        other.close()
    page.until_phase("live")
    page.errors.clear()  # the browser's own lines about the network
