"""The page in a real browser, from file://, without a network: charts are drawn, foreign text stays text."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_analysis_run import write_study

from dllm_sparsity.report import write_report

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
    *("--window-size=1200,9000", "--remote-debugging-pipe"),
)
HOSTILE = "</script><script>document.title='pwned'</script><b>bold</b>"
PATIENCE_SECONDS = 60

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="chromium is not installed")


class Browser:
    """Chromium spoken to over its debugging pipe: file descriptors 3 and 4, JSON that ends in a zero byte."""

    def __init__(self, profile: Path):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        theirs_in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out))

        def place():
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, preexec_fn=place, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(theirs_out)
        self.reader, self.writer = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self.number, self.events, self.session = 0, [], None

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:
            text = bytearray()
            while (byte := self.reader.read(1)) != b"\0":
                if not byte:
                    raise RuntimeError("chromium went away")
                text += byte
            answer = json.loads(bytes(text))
            if answer.get("id") == self.number:
                return answer["result"]
            self.events.append(answer)

    def open(self, address):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression):
        until = time.monotonic() + PATIENCE_SECONDS
        while not (found := self.value(expression)) and time.monotonic() < until:
            time.sleep(0.1)
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = {"items": 20, "layers": 2, "steps": 3, "sites": ("intermediate",), "strengths": (0.9, 0.6)}
    page = write_report(write_study(folder / "study", answer=HOSTILE, model=HOSTILE, **options))
    browser = Browser(folder / "profile")
    browser.open(page.as_uri())
    browser.wait("document.readyState === 'complete'")
    yield browser
    browser.process.terminate()
    browser.process.wait(10)


def test_every_chart_is_drawn(browser):
    plots = "[...document.querySelectorAll('.plot')]"
    assert browser.wait(f"{plots}.length >= 8 && {plots}.every((plot) => plot.dataset.drawn)")
    assert browser.value(f"{plots}.every((plot) => plot.querySelector('.main-svg'))")


def test_a_selector_changes_charts_and_their_tables(browser):
    panel = "document.querySelector('#findings-dots')"
    browser.wait(f"{panel}.querySelector('.plot[data-drawn]') !== null")
    before = browser.value(f"{panel}.querySelector('tbody').textContent")
    browser.value(f"{panel}.querySelector('select').value = '0'")
    browser.value(f"{panel}.querySelector('select').dispatchEvent(new Event('change'))")
    assert browser.wait(f"{panel}.querySelector('.plot[data-drawn]') !== null")
    assert "95 %" in browser.value(f"{panel}.querySelector('h3').textContent")
    assert browser.value(f"{panel}.querySelector('tbody').textContent") != before


def test_foreign_text_stays_text(browser):
    assert browser.value("document.title") == "study - dllm-sparsity"
    assert browser.value(
        "[...document.querySelectorAll('td')].some((cell) => cell.textContent.includes('<b>bold</b>'))"
    )
    assert browser.value("[...document.querySelectorAll('b')].every((node) => node.textContent !== 'bold')")


def test_nothing_was_thrown_refused_or_asked_of_a_network(browser):
    browser.value("1")
    told = {event["method"] for event in browser.events}
    assert not told & {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
    asked = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert {address.split(":")[0] for address in asked} <= {"file", "data", "blob"}
