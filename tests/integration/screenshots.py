"""Pictures of Prefect's UI in headless Chromium, as a person sees it: one of a deployment's form, one of a run's page.

    python -m tests.integration.screenshots FOLDER [FLOW_RUN_ID]

takes both from the server that ``PREFECT_API_URL`` names: the form of ``pipeline``, and the page of the run, by default
the newest one of that deployment. The UI draws itself in the browser, so that Chromium is steered over its DevTools
protocol, by the websockets client that Prefect brings along.
"""

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

CHROMIUM = Path("/usr/bin/chromium")
WIDTH_PX, HEIGHT_PX = 1400, 1100
_LOAD_S = 90.0
_MAX_PAGE_PX = 16_000


class Page:
    """One tab of a browser.

    Args:
        socket: Its DevTools connection.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._num_calls = 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._num_calls += 1
        await self._socket.send(json.dumps({"id": self._num_calls, "method": method, "params": parameters}))
        while True:
            answer = json.loads(await self._socket.recv())
            if answer.get("id") == self._num_calls:
                return answer["result"]

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    async def open(self, url: str, texts: Sequence[str]) -> None:
        """Opens a page, and waits until it shows all these texts."""
        await self.call("Page.navigate", url=url)
        deadline = time.monotonic() + _LOAD_S
        missing = list(texts)
        while missing:
            shown = str(await self.evaluate("document.body ? document.body.innerText : ''"))
            missing = [text for text in texts if text not in shown]
            if missing and time.monotonic() > deadline:
                raise AssertionError(f"{url}: {missing} not shown within {_LOAD_S:g} s, but: {shown[:500]}")
            await asyncio.sleep(0.5)
        await asyncio.sleep(2)  # pictures and animations

    async def click(self, text: str) -> None:
        """Clicks on the first button, link or tab of this text."""
        found = await self.evaluate(
            "(() => { const e = [...document.querySelectorAll('button,a,[role=tab]')]"
            f".find(e => e.innerText.trim() === {json.dumps(text)}); if (!e) return false;"
            "for (const t of ['pointerdown', 'mousedown', 'pointerup', 'mouseup', 'click'])"
            " e.dispatchEvent(new MouseEvent(t, {bubbles: true, button: 0})); return true; })()"
        )
        assert found, f"no button {text!r}"
        await asyncio.sleep(2)

    async def shoot(self, file: Path) -> None:
        """Writes the whole page, however long, as a PNG."""
        script = "Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))"
        height = min(_MAX_PAGE_PX, max(HEIGHT_PX, int(await self.evaluate(script) or 0)))
        await self._resize(height)
        await asyncio.sleep(1)
        result = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(result["data"]))
        await self._resize(HEIGHT_PX)

    async def _resize(self, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=WIDTH_PX, height=height, deviceScaleFactor=1, mobile=False
        )


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A headless Chromium, and its one tab."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        argv = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--no-first-run",
            "--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={WIDTH_PX},{HEIGHT_PX}",
            "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
                tab = next(one for one in json.load(answer) if one["type"] == "page")
            async with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
                page = Page(socket)
                await page.call("Page.enable")
                yield page
        finally:
            process.kill()
            process.wait()


async def _port(file: Path) -> int:
    deadline = time.monotonic() + _LOAD_S
    while not (file.exists() and file.read_text().strip()):
        if time.monotonic() > deadline:
            raise AssertionError("Chromium did not start")
        await asyncio.sleep(0.2)
    return int(file.read_text().split()[0])


async def shoot_form(page: Page, ui_url: str, deployment_id: str, file: Path) -> None:
    """The form in which a person starts a run."""
    await page.open(f"{ui_url}/v2/deployments/deployment/{deployment_id}/run", ["Parameters", "recipe", "Submit"])
    await page.shoot(file)


async def shoot_run(page: Page, ui_url: str, flow_run_id: str, folder: Path) -> list[Path]:
    """The page of a run: its overview, and its artifacts."""
    await page.open(f"{ui_url}/v2/runs/flow-run/{flow_run_id}", ["Artifacts"])
    files = [folder / "flow-run.png", folder / "artifacts.png"]
    await page.shoot(files[0])
    await page.click("Artifacts")
    await page.shoot(files[1])
    return files


async def shoot_all(api_url: str, folder: Path, flow_run_id: str | None = None) -> list[Path]:
    """Takes all pictures; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    deployment = _post(api_url, "/deployments/filter", {"deployments": {"name": {"any_": ["pipeline"]}}})[0]["id"]
    if flow_run_id is None:
        query = {"deployments": {"id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
        flow_run_id = str(_post(api_url, "/flow_runs/filter", query)[0]["id"])
    ui_url = api_url.removesuffix("/api")
    form = folder / "form.png"
    async with browser() as page:
        await shoot_form(page, ui_url, deployment, form)
        return [form, *await shoot_run(page, ui_url, flow_run_id, folder)]


def _post(api_url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(  # noqa: S310 - what the user names
        f"{api_url}{path}", data=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return json.load(answer)


if __name__ == "__main__":
    for written in asyncio.run(shoot_all(os.environ["PREFECT_API_URL"], Path(sys.argv[1]), *sys.argv[2:3])):
        sys.stdout.write(f"{written}\n")
