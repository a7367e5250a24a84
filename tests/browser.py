"""A real, headless Chromium that views a served state."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from dtrace_exporter.state import State
from host_tools import require
from web_serving import port_of, serving

_FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    *("disable-dev-shm-usage", "force-device-scale-factor=1", "lang=en-GB", "hide-scrollbars"),
)


@contextmanager
def chromium(profile: Path) -> Iterator[Chrome]:
    """Run Debian's Chromium with an empty profile, through its driver."""
    options = ChromeOptions()
    options.binary_location = require("chromium", "chromium")
    driver = require("chromedriver", "chromium-driver")
    for flag in (*_FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, Service(driver))
    browser.set_page_load_timeout(120)
    browser.set_script_timeout(120)
    try:
        yield browser
    finally:
        browser.quit()


def use(
    browser: Chrome, *, scheme: str = "light", scripts: bool = True, size: tuple[int, int]
) -> None:
    """Set the browser's preferences, and the size of its viewport in CSS pixels."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


class Served:
    """A state that a separate thread serves.

    ``url`` is its address; ``change`` runs a function in that thread, between two requests.
    """

    def __init__(self) -> None:
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()

    @contextmanager
    def serve(self, state: State) -> Iterator[None]:
        """Serve until the block ends or stop() is called."""
        up = threading.Event()

        async def run() -> None:
            async with serving(state) as server:
                self.url = f"http://127.0.0.1:{port_of(server)}/"
                up.set()
                await self._stop.wait()

        thread = threading.Thread(target=self._loop.run_until_complete, args=[run()])
        thread.start()
        assert up.wait(60)
        try:
            yield
        finally:
            self.stop()
            thread.join(60)
            self._loop.close()

    def change(self, function: Callable[[], None]) -> None:
        """Run a function while no request is being answered."""

        async def call() -> None:
            function()

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(60)

    def stop(self) -> None:
        """Stop serving."""
        self._loop.call_soon_threadsafe(self._stop.set)


@contextmanager
def served(state: State) -> Iterator[Served]:
    """Serve a state until the block ends."""
    site = Served()
    with site.serve(state):
        yield site


def console(browser: Chrome) -> list[str]:
    """Return the messages of the browser's console since the last call."""
    entries = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in entries]
