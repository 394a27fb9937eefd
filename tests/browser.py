"""A headless Chromium, driven over the W3C WebDriver protocol that chromedriver speaks."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


class Browser:
    """One browser with an empty profile; use it in a ``with`` statement."""

    def __init__(self, width: int = 1400, height: int = 1000, *, dark: bool = False) -> None:
        driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
        if driver is None or chromium is None:
            raise RuntimeError(
                "the tests marked 'browser' need a browser: apt-get install chromium chromium-driver, or leave them out"
                " with -m 'not browser'"
            )
        self._profile = tempfile.TemporaryDirectory()
        self._driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        try:
            self._url = f"http://127.0.0.1:{self._port()}/session"
            flags = [*_FLAGS, f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
            flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
            options = {"binary": chromium, "args": flags}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
            session = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
            self._url += f"/{session['sessionId']}"
        except BaseException:
            self._stop()
            raise

    def _port(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if "started successfully on port" in line:
                return int(line.split()[-1].rstrip("."))
        raise RuntimeError("chromedriver did not start")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error

    def open(self, path: Path) -> None:
        """Show a file, and wait until it is loaded."""
        self._ask("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript function body returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, key: str) -> None:
        """Press and release a key in whatever has the focus."""
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def requested(self) -> list[str]:
        """The URLs that were asked for since the last call, those of data: shortened."""
        entries = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [entry["request"]["url"][:60] for entry in sent]

    def complaints(self) -> list[str]:
        """What the browser's console says: script errors, and what the page's policy blocked."""
        return [entry["message"] for entry in self._log("browser")]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask("POST", "/se/log", {"type": kind})
        return found

    def screenshot(self, path: Path) -> None:
        """A PNG of the whole page, not only of what the window shows."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return window.innerWidth")
        self._ask("POST", "/goog/cdp/execute", {
            "cmd": "Emulation.setDeviceMetricsOverride",
            "params": {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        })  # fmt: skip
        time.sleep(0.2)  # until it is laid out anew
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._stop()

    def _stop(self) -> None:
        self._driver.terminate()
        self._driver.wait(timeout=20)
        assert self._driver.stdout is not None
        self._driver.stdout.close()
        self._profile.cleanup()
