"""The page of scored samples, in a real browser; and the command that writes it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from vllm_kl import Sample, read_samples, write_samples
from vllm_kl.errors import InputError, OptionError
from vllm_kl.view.page import kl_cap, render_page, write_page
from vllm_kl.view.samples import FLOAT32_MAX, replacing

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1000",
)
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<!--<script>",
    "{{ 7 * 7 }}&lt;",
    "\u202eevil\u200b\u0007\ud800",
    "\u2028'\"`${1}",
]
SAMPLES = [
    Sample(
        token_ids=[10, 11, 12, 13],
        log_probs=[-0.25, -3.0, -0.5],
        ref_log_probs=[-1.25, -1.5, -0.5],
        tokens=["Q", " yes", "\n", "  "],
        query="first question",
        reward=0.5,
        policy_version=3,
        ref_version=1,
    ),
    Sample(
        token_ids=[20, 21, 22, 23, 24],
        log_probs=[-1.0, -2.0],
        ref_log_probs=[-1.123456, -4.0],
        mask=[False, True, False, False, True],  # two turns
        reward=-1.0,
    ),
    Sample(
        token_ids=list(range(30, 31 + len(HOSTILE))),
        log_probs=[-1.0] * len(HOSTILE),
        ref_log_probs=[-0.75] * len(HOSTILE),
        tokens=["", *HOSTILE],
        query=HOSTILE[1],
        response=HOSTILE[0],
        policy_version=HOSTILE[0],
        reward=1.0,
    ),
]
# Invisible characters are named; a bell has its own sign.
SHOWN = [
    ["Q", " yes", "↵\n", "··"],
    ["20", "21", "22", "23", "24"],
    ["∅", *HOSTILE[:4], "U+202EevilU+200B␇U+D800", "U+2028'\"`${1}"],
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser, tmp_path):
    """Write a page and open it; afterwards the console must hold nothing."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def open_it(samples=SAMPLES, order="number", **kwargs):
        page = write_page(samples, tmp_path / "kl.html", **kwargs)
        browser.get(page.path.as_uri())
        if order is not None:
            Select(css(browser, "#order")[0]).select_by_value(order)
        return browser

    yield open_it
    assert browser.get_log("browser") == []


def css(driver, selector):
    return driver.find_elements(By.CSS_SELECTOR, selector)


def plain(element):
    """An element's text in one line, its minus signs as a keyboard has them."""
    return " ".join(element.text.replace("\N{MINUS SIGN}", "-").split())


def texts(driver):
    """The tokens' texts of every sample that is drawn."""
    script = (
        "return [...document.querySelectorAll('.tokens')].map(s => [...s.children].map(t => t.textContent))"
    )
    return driver.execute_script(script)


def order(driver):
    # In one go: the page draws the list anew while a filter is typed.
    script = (
        "return [...document.querySelectorAll('#list h2')].map(h => Number(h.textContent.split(' ').pop()))"
    )
    return driver.execute_script(script)


def tip(driver):
    """The tooltip as name -> value; its heading under ''."""
    assert css(driver, "#tip")[0].is_displayed()
    rows = css(driver, "#tip dl div")
    pairs = [[plain(cell) for cell in row.find_elements(By.CSS_SELECTOR, "dt, dd")] for row in rows]
    return {"": css(driver, "#tip .name")[0].text, **{name: value for name, value, _ in pairs}}


def colour(element, name):
    """A computed colour as (r, g, b, alpha)."""
    numbers = [float(n) for n in re.findall(r"[\d.]+", element.value_of_css_property(name))]
    return (*numbers[:3], numbers[3] if len(numbers) > 3 else 1.0)


def over(top, below):
    return tuple(t * top[3] + b * (1 - top[3]) for t, b in zip(top[:3], below[:3], strict=True))


def contrast(a, b):
    """WCAG 2.2's contrast ratio of two opaque colours."""

    def luminance(rgb):
        linear = [
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb[:3])
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def group_of(*responses, **fields):
    """Samples of one prompt: (response id, largest |KL|) each."""
    return [
        Sample(token_ids=[7, 8, response], log_probs=[-5.0], ref_log_probs=[-5.0 - kl], **fields)
        for response, kl in responses
    ]


FOLDED = [
    *group_of((1, 0.5), (2, -1.0), (1, 0.25), (1, 2.0), policy_version=1),
    *group_of((1, 3.0), policy_version=2),  # other weights sampled this one
    # The same tokens, but token 8 is of the response here.
    Sample(token_ids=[7, 8, 1], log_probs=[-1.0] * 2, ref_log_probs=[-1.0] * 2, policy_version=1),
]


@needs_browser
class TestPage:
    def test_every_token_of_every_sample_is_there(self, open_page):
        driver = open_page()
        assert order(driver) == [1, 2, 3]
        assert texts(driver) == SHOWN
        unscored = [
            [t.text for t in s.find_elements(By.CSS_SELECTOR, ".unscored")] for s in css(driver, ".tokens")
        ]
        assert unscored == [["Q"], ["20", "22", "23"], ["∅"]]

    def test_sums_and_figures_are_those_of_the_samples(self, open_page):
        driver = open_page()
        facts = [plain(f) for f in css(driver, "#list .facts")]
        assert facts[0] == (
            "sum KL -0.5000 mean KL -0.1667 max |KL| 1.5000 scored 3 of 4 reward 0.5 policy version 3 "
            "reference version 1"
        )
        assert facts[1] == "sum KL +2.1235 mean KL +1.0617 max |KL| 2.0000 scored 2 of 5 reward -1"
        figures = plain(css(driver, ".figures")[0])
        assert "samples 3 scored tokens 11" in figures
        assert "mean KL per token +0.0112" in figures
        assert "mean reward 0.1667" in figures

    def test_the_histogram_counts_every_token(self, open_page):
        driver = open_page()
        titles = [
            t.get_attribute("textContent").replace("\N{MINUS SIGN}", "-")
            for t in css(driver, ".histogram svg g title")
        ]
        assert sum(int(t.split()[0]) for t in titles) == 11
        assert titles[0].startswith("0 tokens, KL below -1.9")
        assert titles[-1].startswith("1 tokens, KL above +1.9")
        assert titles[20].startswith("1 tokens")

    def test_hover_shows_both_log_probs_and_what_made_them(self, open_page):
        driver = open_page()
        ActionChains(driver).move_to_element(css(driver, ".tokens .t")[1]).perform()
        assert tip(driver) == {
            "": '" yes"',
            "policy log-prob": "-0.250000",
            "reference log-prob": "-1.250000",
            "KL": "+1.000000",
            "token id": "11",
            "position": "1",
            "policy version": "3",
            "reference version": "1",
        }
        second = css(driver, ".tokens")[1].find_elements(By.CSS_SELECTOR, ".t")
        ActionChains(driver).move_to_element(second[1]).perform()
        assert tip(driver)["reference log-prob"] == "-1.123456"
        ActionChains(driver).move_to_element(second[2]).perform()
        assert tip(driver) == {"": "id 22", "KL": "not scored", "token id": "22", "position": "2"}
        ActionChains(driver).move_to_element(css(driver, "h1")[0]).perform()
        assert not css(driver, "#tip")[0].is_displayed()

    def test_the_keyboard_reaches_every_token_and_reads_the_same(self, open_page):
        driver = open_page()
        keys = lambda *k: ActionChains(driver).send_keys(*k).perform()  # noqa: E731
        focused = lambda: driver.switch_to.active_element  # noqa: E731
        css(driver, "#prompts")[0].send_keys(Keys.TAB)
        assert (plain(focused()), tip(driver)["token id"]) == ("yes", "11")  # the first that is scored
        assert focused().get_attribute("aria-describedby") == css(driver, "#tip")[0].get_attribute("id")
        assert focused().get_attribute("role") == "option"
        keys(Keys.ARROW_RIGHT)
        assert tip(driver)["KL"] == "-1.500000"
        keys(Keys.HOME)
        assert tip(driver)["token id"] == "10"
        keys(Keys.END)
        assert tip(driver)["token id"] == "13"
        keys(Keys.TAB)  # to the next sample, not through every token
        assert tip(driver)["token id"] == "21"
        keys(Keys.ARROW_DOWN)
        assert tip(driver)["token id"] == "24"  # the next underlined one
        keys(Keys.ESCAPE)
        assert not css(driver, "#tip")[0].is_displayed()

    def test_colours_tell_the_sign_and_grow_up_to_the_cap(self, open_page):
        kl = [0.0, 0.5, 1.0, 1.0, 3.0, -0.5, -1.0]
        many = [*kl, *[1.0] * 500]
        ids = list(range(len(many) + 1))
        policy = [value - 3 for value in many]
        driver = open_page([Sample(token_ids=ids, log_probs=policy, ref_log_probs=[-3.0] * len(many))])
        assert kl_cap(many) == (1.0, "99th percentile of |KL|")
        assert "from ±1, the 99th percentile of |KL|" in css(driver, ".legend .note")[0].text
        backgrounds = [colour(t, "background-color") for t in css(driver, ".t")[1:8]]
        assert backgrounds[0][3] == 0
        assert [round(b[3], 2) for b in backgrounds[1:]] == [0.5, 1, 1, 1, 0.5, 1]
        assert len({b[:3] for b in backgrounds[1:5]}) == 1
        assert backgrounds[1][:3] != backgrounds[5][:3]
        assert backgrounds[1][0] > backgrounds[1][2]  # orange
        assert backgrounds[5][0] < backgrounds[5][2]  # blue
        lines = [t.value_of_css_property("text-decoration-style") for t in css(driver, ".t.worst")]
        assert (lines[0], lines[3]) == ("solid", "dotted")  # not by colour alone

    @pytest.mark.parametrize("estimator", ["k2", "k3", "abs", "forward k1"])
    def test_colours_are_of_the_log_ratio_whatever_the_estimator(self, open_page, estimator):
        policy, ref = [-1.0, -3.0, -2.0], [-2.0, -1.0, -2.0]  # likelier, less likely, the same
        formula = {
            "k2": lambda r: r**2 / 2,
            "k3": lambda r: math.expm1(r) - r,
            "abs": abs,
            "forward k1": lambda r: math.exp(r) * r,
        }[estimator]
        kl = [formula(q - p) for p, q in zip(policy, ref, strict=True)]
        # k1: does not change the page's words.
        other = Sample(token_ids=[5, 6], log_probs=[-1.0], ref_log_probs=[-1.5])
        driver = open_page(
            [Sample(token_ids=[1, 2, 3, 4], log_probs=policy, ref_log_probs=ref, kl=kl), other]
        )
        shades = [t.get_attribute("class").split()[1:] for t in css(driver, ".t")[1:4]]
        assert shades == [["id", "pos"], ["id", "neg", "worst"], ["id"]]
        alphas = [round(colour(t, "background-color")[3], 2) for t in css(driver, ".t")[1:4]]
        assert alphas == [0.5, 1, 0]
        assert "KL(policy" not in css(driver, ".lead")[0].text
        assert "from ±2, the 99th percentile of |log-ratio|" in css(driver, ".legend .note")[0].text
        bars = [t.get_attribute("textContent") for t in css(driver, ".histogram svg g title")]
        assert bars[0].startswith("1 tokens, log-ratio below")
        assert bars[-1].startswith("0 tokens, log-ratio above")
        assert f"sum KL as stored {math.fsum(kl):+.4f}" in plain(css(driver, "#list .facts")[0])
        assert "mean log-ratio per token -0.125" in plain(css(driver, ".figures")[0])
        ActionChains(driver).move_to_element(css(driver, ".t")[2]).perform()
        assert (tip(driver)["log-ratio"], tip(driver)["KL as stored"]) == ("-2.000000", f"{kl[1]:+.6f}")
        ActionChains(driver).move_to_element(
            css(driver, ".tokens")[1].find_elements(By.CSS_SELECTOR, ".t")[1]
        ).perform()
        assert (tip(driver)["log-ratio"], tip(driver)["KL as stored"]) == ("+0.500000", "+0.500000")
        bars = {bar.value_of_css_property("background-color") for bar in css(driver, ".sum span")}
        assert len(bars) == 1  # neither orange nor blue: the sign of such a sum is not the colours'
        assert colour(css(driver, ".sum span")[0], "background-color") == colour(
            css(driver, ".facts dt")[0], "color"
        )

    def test_a_kl_that_was_subtracted_in_float32_is_still_k1(self):
        p, q = np.float32(-3.3209188), np.float32(-9.602787)
        kl = [float(p - q)]
        assert kl != [float(p) - float(q)]
        page = render_page([Sample(token_ids=[1, 2], log_probs=[float(p)], ref_log_probs=[float(q)], kl=kl)])
        assert "as stored" not in re.sub(r"<script>.*</script>", "", page, flags=re.S)

    def test_one_model_twice_has_no_colours(self, open_page):
        driver = open_page([Sample(token_ids=[5, 6], log_probs=[-1.0], ref_log_probs=[-1.0])])
        assert css(driver, ".t.pos, .t.neg, .t.worst") == []
        assert "Every KL is 0" in css(driver, ".legend .note")[0].text

    @pytest.mark.parametrize(
        ("value", "wanted"),
        [
            ("sum-down", [2, 1, 3]),
            ("sum-up", [3, 1, 2]),
            ("max", [2, 1, 3]),
            ("reward-up", [2, 1, 3]),
            ("reward-down", [3, 1, 2]),
            ("number", [1, 2, 3]),
        ],
    )
    def test_samples_can_be_ordered(self, open_page, value, wanted):
        driver = open_page()
        Select(css(driver, "#order")[0]).select_by_value(value)
        assert order(driver) == wanted

    def test_samples_of_the_largest_kl_are_first(self, open_page):
        driver = open_page(order=None)
        assert Select(css(driver, "#order")[0]).first_selected_option.text == "largest |KL|"
        assert order(driver) == [2, 1, 3]

    def test_samples_can_be_filtered_by_any_of_their_texts(self, open_page):
        driver = open_page()
        for text, wanted in (
            ("FIRST q", [1]),
            ("onerror", [3]),
            ("2122", [2]),
            ("nowhere", []),
            ("", [1, 2, 3]),
        ):
            field = css(driver, "#filter")[0]
            field.clear()
            field.send_keys(text or " " + Keys.BACKSPACE)
            WebDriverWait(driver, 5).until(lambda d, wanted=wanted: order(d) == wanted)
        assert css(driver, "#count")[0].text == "3 samples."

    def test_unscored_tokens_can_be_hidden(self, open_page):
        driver = open_page()
        css(driver, "#prompts")[0].click()
        assert [
            t.text for t in css(driver, ".tokens")[1].find_elements(By.CSS_SELECTOR, ".t") if t.is_displayed()
        ] == [
            "21",
            "24",
        ]

    def test_hostile_texts_are_only_shown(self, open_page):
        driver = open_page(title=HOSTILE[0])
        assert driver.execute_script("return window.hacked === undefined")
        assert css(driver, "h1")[0].text == HOSTILE[0]
        assert css(driver, "main img, main script") == []
        assert len(css(driver, "script")) == 2
        assert css(driver, ".query")[1].text == HOSTILE[1]
        for token in css(driver, ".tokens")[2].find_elements(By.CSS_SELECTOR, ".t"):
            ActionChains(driver).move_to_element(token).perform()
            assert tip(driver)["policy version"] == HOSTILE[0]
            assert css(driver, "#tip img, #tip script") == []

    def test_handlers_in_attributes_would_not_run(self, open_page):
        driver = open_page()
        script = "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')"
        driver.execute_script(script)
        ActionChains(driver).pause(0.2).perform()
        assert driver.execute_script("return window.hacked === undefined")
        refused = [entry["message"] for entry in driver.get_log("browser")]
        assert refused
        assert all("Content Security Policy" in message for message in refused)

    def test_nothing_is_loaded_from_anywhere(self, open_page, browser):
        browser.get("about:blank")
        browser.get_log("performance")
        driver = open_page()
        assert driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        requests = [
            e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
        ]
        assert [url for url in requests if not url.startswith("data:")] == [driver.current_url]

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_all_text_can_be_read_in_both_schemes(self, open_page, browser, scheme):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        driver = open_page()
        page = colour(css(driver, "body")[0], "background-color")
        assert (contrast(page, (255, 255, 255)) < 2) == (scheme == "light")
        card = colour(css(driver, "article")[0], "background-color")
        assert css(driver, ".t.worst.pos")
        assert css(driver, ".t.neg")
        on_card = css(driver, ".t, h2, .query, .facts dt, .facts dd, .figures dt, .figures dd, figcaption")
        on_page = css(driver, "h1, .lead, .key, .note, .note .worst, .ends, .count, .tools label")
        for elements, ground in ((on_card, card), (on_page, page)):
            for element in elements:
                behind = over(colour(element, "background-color"), ground)
                assert contrast(colour(element, "color"), behind) >= 4.5, element.get_attribute("outerHTML")
        for full in (".key.pos", ".key.neg"):  # the scale's ends, whatever is on this page
            ink = colour(css(driver, ".t.pos")[0], "color")
            assert contrast(ink, colour(css(driver, full)[0], "background-color")) >= 4.5
        labels = css(driver, ".histogram text")
        assert min(contrast(colour(label, "fill"), card) for label in labels) >= 4.5
        ActionChains(driver).move_to_element(css(driver, ".t")[1]).perform()
        ground = colour(css(driver, "#tip")[0], "background-color")
        assert (
            min(contrast(colour(e, "color"), ground) for e in css(driver, "#tip .name, #tip dt, #tip dd"))
            >= 4.5
        )

    def test_many_samples_are_drawn_as_they_are_scrolled_to(self, open_page):
        one = {"token_ids": list(range(500)), "ref_log_probs": [-1.0] * 400}
        samples = [Sample(**one, log_probs=[-1.0 + i / 1000] * 400, policy_version=i) for i in range(300)]
        driver = open_page(samples, limit=200)
        assert css(driver, "#limited")[0].text.startswith("200 of 300 samples are on this page")
        assert len(css(driver, "#list li")) <= 60
        assert order(driver)[0] == 101  # those of the largest |KL|, in the file's order
        for _ in range(20):
            driver.execute_script("document.getElementById('more').scrollIntoView()")
            ActionChains(driver).pause(0.05).perform()
        WebDriverWait(driver, 10).until(lambda d: len(css(d, "#list li")) == 200)
        assert driver.execute_script("return document.querySelectorAll('.t').length") == 200 * 500
        assert not css(driver, "#more")[0].is_displayed()


@needs_browser
class TestFold:
    def folds(self, driver):
        """Every entry of the list as its samples' numbers and the text of its button."""
        entries = driver.execute_script(
            "return [...document.querySelectorAll('#list > li')].map(entry => ["
            "[...entry.querySelectorAll('h2')].map(h => Number(h.textContent.split(' ').pop())),"
            "entry.querySelector('.fold')?.textContent ?? ''])"
        )
        return [[numbers, text.replace("\N{MULTIPLICATION SIGN}", "x")] for numbers, text in entries]

    def test_equal_samples_are_shown_once(self, open_page):
        driver = open_page(FOLDED, order=None)
        assert self.folds(driver) == [[[5], ""], [[4], "x 3"], [[2], ""], [[6], ""]]
        assert css(driver, "#count")[0].text == "6 samples. Equal ones are folded, which leaves 4."
        assert "samples 6 scored tokens 7 mean KL per token +0.6786" in plain(css(driver, ".figures")[0])

    @pytest.mark.parametrize("how", ["mouse", "keyboard"])
    def test_they_can_be_unfolded_and_folded_again(self, open_page, how):
        driver = open_page(FOLDED, order=None)
        button = css(driver, ".fold")[0]
        press = button.click if how == "mouse" else lambda: button.send_keys(Keys.ENTER)
        assert button.get_attribute("aria-expanded") == "false"
        press()
        assert button.get_attribute("aria-expanded") == "true"
        assert self.folds(driver)[1] == [[4, 1, 3], "x 3"]
        assert "max |KL| 0.2500" in plain(css(driver, "#list .facts")[3])
        assert driver.switch_to.active_element == button
        ActionChains(driver).send_keys(
            *[Keys.TAB] * 2
        ).perform()  # to the tokens of sample 4, then of sample 1
        assert tip(driver)["reference log-prob"] == "-5.500000"
        press()
        assert self.folds(driver)[1] == [[4], "x 3"]

    def test_they_stay_unfolded_in_another_order(self, open_page):
        driver = open_page(FOLDED, order=None)
        css(driver, ".fold")[0].click()
        Select(css(driver, "#order")[0]).select_by_value("number")
        assert self.folds(driver) == [[[1, 3, 4], "x 3"], [[2], ""], [[5], ""], [[6], ""]]

    def test_the_filter_finds_and_counts_every_sample(self, open_page):
        queries = ["red", "green", "red"]
        samples = [group_of((1, kl), query=query)[0] for kl, query in enumerate(queries, start=1)]
        driver = open_page([*samples, *group_of((2, 0.5))], order=None)
        assert self.folds(driver) == [[[3], "x 3"], [[4], ""]]
        for text, entries, count in (
            ("green", [[[2], ""]], "1 of 4 samples match."),
            ("red", [[[3], "x 2"]], "2 of 4 samples match. Equal ones are folded, which leaves 1."),
        ):
            css(driver, "#filter")[0].clear()
            css(driver, "#filter")[0].send_keys(text)
            WebDriverWait(driver, 5).until(lambda d, entries=entries: self.folds(d) == entries)
            assert css(driver, "#count")[0].text == count


class TestFile:
    def test_the_page_names_no_address(self):
        page = render_page(SAMPLES)
        assert re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"^\s*//.*", "", page, flags=re.M)) == []
        assert "@import" not in page
        assert "url(" not in page.replace("url(#below)", "").replace("url(#above)", "")

    def test_hostile_texts_cannot_end_the_data(self):
        page = render_page(SAMPLES, title=HOSTILE[0])
        assert page.count("</script>") == 2
        assert "<img" not in page
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
        assert data.isascii()
        assert [text for _, text in json.loads(data)["vocabulary"]][-len(HOSTILE) :] == HOSTILE

    def test_the_same_samples_give_the_same_page(self):
        assert render_page(SAMPLES) == render_page(SAMPLES)

    def test_what_cannot_be_shown_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="no samples"):
            write_page([], tmp_path / "kl.html")
        with pytest.raises(OptionError, match="limit must be at least 1, got 0"):
            write_page(SAMPLES, tmp_path / "kl.html", limit=0)
        assert not (tmp_path / "kl.html").exists()

    @pytest.mark.parametrize(
        "kl",
        [[5e-324, 0.0], [-5e-324, FLOAT32_MAX], [FLOAT32_MAX, FLOAT32_MAX], [FLOAT32_MAX, -FLOAT32_MAX]],
        ids=str,
    )
    def test_every_number_that_a_sample_may_hold_is_drawn(self, kl):
        page = render_page(
            [Sample(token_ids=[1, 2, 3], log_probs=[-1.0] * 2, ref_log_probs=[-1.0] * 2, kl=kl)]
        )
        counts = [int(n) for n in re.findall(r"<title>(\d+) tokens, ", page)]
        assert (len(counts), sum(counts)) == (41, 2)
        for end in (-FLOAT32_MAX, 0.0):
            assert render_page(
                [Sample(token_ids=[1, 2], log_probs=[end], ref_log_probs=[-FLOAT32_MAX], reward=end)]
            )


def vllm_kl(*args, code="from vllm_kl.cli import main; main()"):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False
    )


class TestCommand:
    def test_it_writes_the_page_and_says_so(self, tmp_path):
        write_samples(tmp_path / "s.jsonl", SAMPLES)
        out = tmp_path / "kl.html"
        done = vllm_kl(
            "view", tmp_path / "s.jsonl", "--html", out, "--limit", 2, "--title", "My run", "--json"
        )
        assert done.returncode == 0, done.stderr
        assert f"wrote {out}: 2 of 3 samples, 0.0 MB" in done.stderr
        figures = json.loads(done.stdout)
        assert figures == {
            "path": str(out),
            "num_samples": 3,
            "num_shown": 2,
            "num_scored_tokens": 11,
            "size_bytes": out.stat().st_size,
        }
        assert "<h1>My run</h1>" in out.read_text()

    def test_a_tokenizer_gives_texts_to_tokens_without(self, tmp_path, policy_path):
        write_samples(
            tmp_path / "s.jsonl", [Sample(token_ids=[22, 220, 79], log_probs=[-1.0], ref_log_probs=[-2.0])]
        )
        done = vllm_kl(
            "view", tmp_path / "s.jsonl", "--html", tmp_path / "kl.html", "--tokenizer", policy_path
        )
        assert done.returncode == 0, done.stderr
        assert '[[22,"7"],[220," "],[79,"p"]]' in (tmp_path / "kl.html").read_text()

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            (None, (), r"error: .*No such file or directory.*s\.jsonl"),
            ("", (), r"error: .*s\.jsonl: holds no samples, expected one JSON object per line"),
            ('{"token_ids": [1]}\n', (), r"error: .*s\.jsonl, line 1: log_probs is missing"),
            (
                json.dumps(vars(SAMPLES[0])),
                ("--tokenizer", "x"),
                r"error: tokenizer 'x' would have no effect",
            ),
            (json.dumps(vars(SAMPLES[1])), ("--tokenizer", "./none"), r"error: .*\./none"),
            (
                json.dumps({**vars(SAMPLES[1]), "reward": 10**400}),
                (),
                r"error: .*s\.jsonl, line 1: reward: got 1000",
            ),
            (
                json.dumps(vars(SAMPLES[1])),
                ("--tokenizer", "BROKEN"),
                r"error: tokenizer '.*broken' cannot be loaded: ",
            ),
        ],
    )
    def test_errors_are_one_line_without_a_traceback(self, tmp_path, content, options, message):
        if content is not None:
            (tmp_path / "s.jsonl").write_text(content)
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "tokenizer_config.json").write_text("{broken")
        options = [str(tmp_path / "broken") if option == "BROKEN" else option for option in options]
        done = vllm_kl("view", tmp_path / "s.jsonl", "--html", tmp_path / "kl.html", *options)
        assert done.returncode == 1
        assert re.fullmatch(message + r".*\n", done.stderr)
        assert not (tmp_path / "kl.html").exists()

    @pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
    def test_the_samples_are_never_replaced_by_their_page(self, tmp_path, link):
        write_samples(tmp_path / "s.jsonl", SAMPLES)
        html = tmp_path / ("s.jsonl" if link is None else "kl.html")
        if link is not None:
            getattr(html, link)(tmp_path / "s.jsonl")
        done = vllm_kl("view", tmp_path / "s.jsonl", "--html", html)
        assert done.returncode == 1
        assert re.fullmatch(r"error: --html .* is the file of the samples: .*\n", done.stderr)
        assert read_samples(tmp_path / "s.jsonl") == SAMPLES

    def test_a_page_that_fails_to_be_written_leaves_the_one_before(self, tmp_path):
        write_page(SAMPLES, tmp_path / "kl.html", title="before")
        with pytest.raises(TypeError), replacing(tmp_path / "kl.html") as file:
            file.writelines([b"half", None])
        assert "<h1>before</h1>" in (tmp_path / "kl.html").read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["kl.html"]

    def test_it_loads_neither_torch_nor_vllm(self, tmp_path):
        write_samples(tmp_path / "s.jsonl", SAMPLES)
        code = (
            "import sys; from vllm_kl.cli import app; app(standalone_mode=False); "
            "print(sorted({'torch', 'torchrl', 'vllm', 'ray', 'transformers'} & set(sys.modules)))"
        )
        done = vllm_kl("view", tmp_path / "s.jsonl", "--html", tmp_path / "kl.html", code=code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"


def test_the_page_travels_with_the_package():
    import tomllib

    root = Path(__file__).parents[2]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "vllm_kl"
    ]
    assert {f"view/{path.name}" for path in root.glob("vllm_kl/view/page.*")} - {"view/page.py"} <= set(
        packaged
    )
