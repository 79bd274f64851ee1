"""Headless Chromium, driven by selenium."""

import shutil
from typing import Any

import pytest

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")

HAS_CHROMIUM = bool(_CHROMIUM and _DRIVER)
NO_CHROMIUM = "no Chromium here; on Debian: apt-get install chromium chromium-driver"

needs_chromium = pytest.mark.skipif(not HAS_CHROMIUM, reason=NO_CHROMIUM)


def start_chromium(
    language: str = "en-US", width: int = 1200, *, blocks_storage: bool = False
) -> Any:
    """Return a driver that logs requests; below 600 pixels of width it acts as a phone.

    blocks_storage: sites may store nothing, as with "block all cookies" in the settings.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",  # nor its emulation in software
        "--force-prefers-reduced-motion",
        f"--lang={language}",
    ):
        options.add_argument(flag)
    preferences: dict[str, Any] = {"intl.accept_languages": language}
    if blocks_storage:
        preferences["profile.default_content_setting_values.cookies"] = 2
    options.add_experimental_option("prefs", preferences)
    if width < 600:
        metrics = {"width": width, "height": 800, "pixelRatio": 2.0}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    else:
        options.add_argument(f"--window-size={width},900")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
