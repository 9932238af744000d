"""The browser of the tests: a Chromium, Chrome or Edge that is found here.

`python tests/chromium.py` prints its path; where there is none and apt-get can be used, it installs Debian's.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
MISSING = "the browser tests need Chromium, Chrome or Edge: install one, or give the path of one in CHROME"


def find() -> str | None:
    """`CHROME`, else a browser on the path, else one where its installer puts it; None without any."""
    if path := os.environ.get("CHROME"):
        return path
    found = (shutil.which(name) for name in NAMES)
    return next((path for path in (*found, *(p for p in PLACES if Path(p).is_file())) if path), None)


def _install() -> None:
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"]
        subprocess.run(["apt-get", "update"], stdout=sys.stderr)
        subprocess.run(install, stdout=sys.stderr, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})


if __name__ == "__main__":
    if find() is None:
        _install()
    print(find() or MISSING)
