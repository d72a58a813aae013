"""Uses the page at `/` as a person would: page.py URL SHOTS

In headless Chromium (.toolchain/chromium) against a server that serves models/modulo: moves a slider, types a question, and
looks for the word that budget forcing injected, the bar, the figures; then a question that is stopped, and a server's refusal.
Screenshots of the answer, light and dark, wide and narrow, go into the folder SHOTS. Exits 1 with what was wrong.
"""

import base64
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

CHROMIUM = pathlib.Path(__file__).parent.parent.resolve() / ".toolchain/chromium"
# A closed network: a browser that asks nobody for anything but the page.
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ARROW_RIGHT = "\ue014"


class Browser:
    """The few WebDriver calls that are needed (w3.org/TR/webdriver2)."""

    def __init__(self, profile):
        self.driver = subprocess.Popen([CHROMIUM / "chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self.driver.stdout:
            if "successfully on port" in line:
                port = line.strip().rstrip(".").split()[-1]
                self.url = f"http://127.0.0.1:{port}/session"
                break
        options = {"binary": str(CHROMIUM / "chromium"), "args": [*QUIET, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        self.url += f"/{session}"

    def call(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            sys.exit(f"the browser refuses {path}: {json.load(error)['value']['message'].splitlines()[0]}")

    def find(self, selector):
        return self.call("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def type(self, selector, keys):
        self.call(f"/element/{self.find(selector)}/value", {"text": keys})

    def click(self, selector):
        self.call(f"/element/{self.find(selector)}/click", {})

    def run(self, script):
        return self.call("/execute/sync", {"script": script, "args": []})

    def text(self, selector):
        return self.run(f"return [...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent).join('|')")

    def wait(self, what, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while not self.run(f"return {condition}"):
            if time.monotonic() > deadline:
                sys.exit(f"no {what} after {seconds} s; the page says: {self.text('body')[-2000:]}")
            time.sleep(0.1)

    def cdp(self, command, **params):
        return self.call("/goog/cdp/execute", {"cmd": command, "params": params})

    def close(self):
        urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"), timeout=30).close()
        self.driver.terminate()
        self.driver.wait()


def expect(what, truth):
    if not truth:
        sys.exit(f"wrong: {what}")


def main(url, shots):
    shots = pathlib.Path(shots)
    shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(profile)
        try:
            use(browser, url, shots)
        finally:
            browser.close()


def move(browser, slider, place):
    browser.run(f"""const slider = document.querySelector("input[name={slider}]");
                    slider.value = {place}; slider.dispatchEvent(new Event("input"))""")


def use(browser, url, shots):
    browser.cdp("Emulation.setDeviceMetricsOverride", width=1280, height=860, deviceScaleFactor=1, mobile=False)
    browser.call("/url", {"url": url})
    browser.wait("name of the model", "document.querySelectorAll('#parameters input').length > 5")
    expect("the model has a name", browser.text("#model"))

    browser.type("input[name=thinking_n_ignore]", ARROW_RIGHT * 2)
    expect("the slider says 2", "2" in browser.text("#parameters label:nth-child(3) output"))
    browser.type("#question", "Find x with 3x + 4 = 2 (mod 11).")
    browser.click("#send")
    browser.wait("end of the answer", "document.querySelector('.figures')?.textContent !== ''")
    expect("no failure", browser.text(".failed") == "")
    expect("two injected words are marked", browser.text(".thinking mark").split("|") == ["Wait", "Wait"])
    expect("the answer is there", "x = 3" in browser.text(".answer"))
    expect("the thinking is there", "try 3" in browser.text(".thinking .text"))
    expect("the bar counts", "2 ends ignored" in browser.text(".count"))
    expect("two ticks on the bar", browser.run("return document.querySelectorAll('.bar .ignored').length") == 2)
    expect("no joules without a GPU", " J" not in browser.text(".figures"))
    expect("tokens and their speed", "tokens/s" in browser.text(".figures"))

    for scheme in "light", "dark":
        browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for name, width, height in ("wide", 1280, 860), ("narrow", 390, 844):
            browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
            overflow = browser.run("return document.documentElement.scrollWidth - window.innerWidth")
            expect(f"nothing sticks out ({name}, {overflow} px)", overflow <= 0)
            picture = browser.call("/screenshot")
            (shots / f"page-{scheme}-{name}.png").write_bytes(base64.b64decode(picture))
    browser.cdp("Emulation.setDeviceMetricsOverride", width=1280, height=860, deviceScaleFactor=1, mobile=False)

    # A maximum, by the slider: two steps from no thinking are 12 tokens.
    move(browser, "thinking_token_budget", 2)
    browser.click("#clear")
    browser.type("#question", "Find x with 7x + 4 = 1 (mod 11).")
    browser.click("#send")
    browser.wait("end of the second answer", "document.querySelector('.figures')?.textContent !== ''")
    expect("the maximum holds", browser.text(".count").startswith("12 of 12 thinking tokens"))
    expect("the bar is full", browser.run("return document.querySelector('.used').style.width") == "100%")

    move(browser, "thinking_token_budget", "slider.max")
    move(browser, "thinking_n_ignore", "slider.max")
    browser.click("#clear")
    browser.type("#question", "Find x with 5x + 1 = 0 (mod 13).")
    browser.click("#send")
    browser.wait("first words", "document.querySelector('.thinking .text')?.textContent !== ''")
    browser.click("#stop")
    browser.wait("end of a stopped answer", "document.querySelector('.figures')?.textContent !== ''")
    expect("it says that it was stopped", browser.text(".figures") == "stopped")

    move(browser, "thinking_token_budget", 2)
    move(browser, "min_thinking_tokens", "slider.max")
    browser.type("#question", "What?")
    browser.click("#send")
    browser.wait("refusal", "document.querySelectorAll('.failed').length === 2")
    expect("a refusal names the field", "thinking_token_budget: 12 is less" in browser.text(".turn:last-child .failed"))

    errors = [entry["message"] for entry in browser.call("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]
    # The refusal is one: the browser reports its status.
    errors = [message for message in errors if "400" not in message and "/metrics" not in message]
    expect(f"no errors in the console: {errors}", not errors)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
