"""Draws docs/view-light.png and docs/view-dark.png from scored samples.

    python docs/screenshots.py demo_out/rollouts.jsonl

Needs Chromium and its driver (apt-get install chromium chromium-driver) and selenium (the extra ``test``).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from vllm_kl import read_samples
from vllm_kl.view.page import write_page

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1200,1150",
)


def main(samples: Path, out: Path) -> None:
    """Write one picture per colour scheme, the pointer on the token of the largest |KL|."""
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(
            read_samples(samples), Path(folder) / "kl.html", title="Arithmetic: policy against reference"
        )
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={folder}/profile"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            for scheme in ("light", "dark"):
                feature = {"name": "prefers-color-scheme", "value": scheme}
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
                driver.get(page.path.as_uri())
                Select(driver.find_element(By.ID, "order")).select_by_value("max")
                driver.execute_script("document.activeElement.blur()")
                token = driver.find_elements(By.CSS_SELECTOR, ".t.worst")[0]
                ActionChains(driver).move_to_element(token).perform()
                driver.save_screenshot(str(out / f"view-{scheme}.png"))
        finally:
            driver.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
