"""Get the browser for test_demo.py: ``python tests/chromium.py``; `make test` calls it.

As root on Debian this installs the packages that are missing. Anybody else is told what to do, and
without a browser those tests are skipped; with CI=true they fail.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence

PACKAGES = ("chromium", "chromium-driver")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find() -> tuple[str, str] | None:
    """Paths of a browser and its driver; None if one of them is missing."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def main() -> None:
    """Install what is missing, if that is possible here; say what was done, or what to do."""
    if find():
        return
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
    cure = f"sudo {' '.join(install)}"
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(f"No Chromium with its driver: the demo page goes untested. On Debian: {cure}")
        return
    print("Installing chromium and chromium-driver for the tests of the demo page (you are root)")
    for command in (["apt-get", "update", "-q"], install):
        if not _run(command):
            print(f"{' '.join(command)} failed: the demo page goes untested")
            return


def _run(command: Sequence[str]) -> bool:
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=quiet, check=False, stdout=subprocess.DEVNULL)
    return done.returncode == 0


if __name__ == "__main__":
    main()
