"""report.html: what it holds, that nothing in it comes from elsewhere or from a name, and its use in a browser."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from fewshot_standin import result_line
from miniature_datasets import draw_image
from rich.console import Console

from complora_kernels.fewshot.predictions import Prediction
from complora_kernels.fewshot.report import page, report

METHODS = ("lora", "output", "both", "<b>bold</b> & co")


def results(seeds: int = 3, rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)) -> list[dict]:
    return [
        result_line(method, 4, seed, rate, 0.3 + 20 * rate + 0.001 * place, 0.9 - 30 * rate + 0.002 * seed, (0.2, 0.95))
        for seed in range(seeds)
        for rate in rates
        for place, method in enumerate(METHODS)
    ]


def write(folder: Path, lines: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "failures.jsonl").write_text(json.dumps({"run": "lora-x", "error": "<script>alert(1)</script>"}) + "\n")
    report(folder, Console())
    return (folder / page.PAGE).read_text()


def own_markup(text: str) -> str:
    """The page without the bundles of the libraries and the data of figures and tables."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def test_the_page_needs_no_network_and_runs_no_names(tmp_path):
    text = write(tmp_path / "<out>", results())
    assert "<title>&lt;out&gt;</title>" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=\"?(?!data:)", text)
    markup = own_markup(text)
    assert "<b>" not in markup
    assert "<script>alert" not in text
    assert "Plotly" in text


def test_runs_classes_and_confusions_hold_the_numbers():
    table = page.runs_table(results(seeds=1, rates=(1e-3,)))
    assert all(name in table for name in ("new task", "change kept", "lora-4shot-lr0.001-seed0"))
    predictions = [Prediction("t", str(i), "a", before, after) for i, (before, after) in enumerate(["ab", "aa", "bb"])]
    assert r"[[\"a\", 3, [\"66.7\", 66.7], [\"33.3\", 33.3]]]" in page.classes_table(
        predictions
    )  # shown, and sorted by
    assert '"z":[[1,2],[0,0]]' in page.confusions(predictions).replace(" ", "")
    many = [Prediction("t", str(i), f"class {i}", "", f"class {i // 2}") for i in range(page.MOST_CLASSES + 5)]
    assert "was called" in page.confusions(many)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "_NEEDED", ("plotly", "no_such_package"))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results(1)))
    report(tmp_path, Console())
    assert "no report.html: pip install no_such_package" in capsys.readouterr().out
    assert not (tmp_path / page.PAGE).exists()


def test_the_gallery_shows_what_each_methods_best_run_changed(tmp_path):
    for colour in ("red", "yellow"):
        for number in range(2):
            draw_image(tmp_path / "data" / colour / f"{number}.png", colour, number)
    line = results(1)[0]
    run = tmp_path / "out" / "runs" / line["run"]
    run.mkdir(parents=True)
    name = f"folder:{tmp_path / 'data'}"
    rows = ["task,image,label,before,after", "NAME,red/0.png,red,yellow,red", "NAME,yellow/1.png,yellow,yellow,red"]
    (run / "predictions.csv").write_text("\n".join(rows).replace("NAME", name) + "\n")
    (run / "config.json").write_text(json.dumps({"data": name, "protocol": "few-shot"}))
    text = write(tmp_path / "out", results())
    assert "right only after training (1 of 2)" in text
    assert text.count('<img src="data:image/png;base64,') == 2
    assert "<figcaption>yellow → red</figcaption>" in text
    (tmp_path / "data").rename(tmp_path / "moved")
    assert "No images: " in write(tmp_path / "out", results())
    (run / "predictions.csv").write_text("something else")
    assert "No images: " in write(tmp_path / "out", results())


@pytest.mark.browser
def test_two_thousand_runs_in_a_browser(tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    rates = tuple(1e-3 * (1 + place / 20) for place in range(25))
    lines = results(seeds=20, rates=rates)
    assert len(lines) == 2000
    write(tmp_path / "out", lines)
    with browser(tmp_path) as driver:
        started = time.monotonic()
        driver.get((tmp_path / "out" / page.PAGE).as_uri())
        wait = WebDriverWait(driver, 20)
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "table.dataTable tbody tr"))
        assert time.monotonic() - started < 20  # of hanging, not of speed
        info = lambda: driver.find_element(By.CSS_SELECTOR, ".dt-info").text
        assert "2,000" in info()
        first = lambda: driver.find_element(By.CSS_SELECTOR, "table.dataTable tbody td:nth-child(7)").text
        header = driver.find_element(By.XPATH, "//th[contains(., 'new task')]//*[contains(@class, 'dt-column-order')]")
        header.click()
        ascending = first()
        header.click()
        wait.until(lambda _: float(first()) > float(ascending))
        driver.find_element(By.CSS_SELECTOR, ".dt-search input").send_keys("both-4shot-lr0.001-seed7")
        wait.until(lambda _: "1 to 1 of 1 " in info())
        assert driver.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer .point")
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def browser(home: Path):
    """Chromium without a screen, a profile or a network."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    for switch in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={home / 'profile'}"),
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=Service("/usr/bin/chromedriver"))
