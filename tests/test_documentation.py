"""README and docs: every block of Python runs, every command can be parsed, and the README stays one page.

Nothing is downloaded: open_clip's makers of models give a small one with random weights, whatever name they are given.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import torch
import yaml
from open_clip.model import CLIP
from open_clip.transform import image_transform
from PIL import Image
from saved_run import train as train_a_run

import complora_kernels as ck
from complora_kernels.fewshot import sweep
from complora_kernels.fewshot.__main__ import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOKENIZE = open_clip.get_tokenizer("ViT-B-32-quickgelu")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks() -> list[Block]:
    fence = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])
        for page in PAGES
        for text in [page.read_text(encoding="utf-8")]
        for found in fence.finditer(text)
    ]


def of_language(language: str) -> Any:
    found = [block for block in blocks() if block.language == language]
    return pytest.mark.parametrize("block", found, ids=[block.name for block in found])


def commands(block: Block) -> list[list[str]]:
    """The commands of a block of shell, without comments, without variables before them."""
    lines = [shlex.split(line, comments=True) for line in re.split(r"\n|&&", block.text.replace("\\\n", " "))]
    lines = [[word for i, word in enumerate(line) if "=" not in word or i] for line in lines]
    return [line for line in lines if line]


def small_clip(*_: Any, **__: Any) -> Any:
    vision: Any = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
    text: Any = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return CLIP(16, vision, text, quick_gelu=True)


def small_clip_and_transforms(*_: Any, **__: Any) -> Any:
    return small_clip(), image_transform(32, is_train=True), image_transform(32, is_train=False)


def photographs(folder: Path) -> None:
    """Three images of noise for each of two classes."""
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 32, 3), np.uint8)).save(
                folder / name / f"{number}.png"
            )


def prelude(*, adapted: bool) -> dict[str, Any]:
    """The names that blocks take for granted: a CLIP, a batch of four images of two classes, and losses of them."""
    model, images, labels = small_clip(), torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    prompts = ["a photo of a cat.", "a photo of a kite."]
    texts = TOKENIZE(prompts)

    def loss_of_batch(model: Any, images: Any, labels: Any) -> Any:
        image_features, text_features, scale = model(images, texts)
        return torch.nn.functional.cross_entropy(scale * image_features @ text_features.T, labels)

    if adapted:
        ck.apply_complora(model, ck.CompLoRAConfig(r=2))
    return {
        "ck": ck,
        "open_clip": open_clip,
        "torch": torch,
        "model": model,
        "images": images,
        "labels": labels,
        "batches": [images],
        "prompts": prompts,
        "texts": texts,
        "tokenizer": TOKENIZE,
        "loss_of_batch": loss_of_batch,
        "loss_of": lambda model: loss_of_batch(model, images, labels),
        "task_loss": lambda features, labels: features.square().mean(),
    }


@of_language("python")
def test_a_block_of_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", small_clip)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", small_clip_and_transforms)
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos")
    if "load_classifier(" in block.text:
        train_a_run(tmp_path / "runs" / "mine")
    code = compile("\n" * block.line + block.text, str(block.page), "exec")
    exec(code, prelude(adapted="apply_complora(" not in block.text))


def test_the_blocks_are_found():
    found = {block.language for block in blocks()}
    assert {"python", "sh", "yaml"} <= found
    assert [block.name for block in blocks() if block.page.name == "README.md" and block.language == "python"]


@of_language("sh")
def test_a_command_can_be_parsed(block):
    for command in commands(block):
        name = "complora" if "complora" in command else command[0]
        arguments = command[command.index(name) + 1 :]
        if name == "complora":
            assert parse(arguments), command
        elif name == "make":
            assert arguments[0] in TARGETS, command
        elif name == "python":
            assert arguments[0] == "-m", command
            assert importlib.util.find_spec(arguments[1]), command
        else:
            assert (name, arguments[0]) == ("pip", "install"), command


@of_language("yaml")
def test_a_sweep_can_be_read(block, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_check", lambda *_: {})  # which looks for the data
    (tmp_path / "sweep.yaml").write_text(block.text)
    jobs = sweep.read_sweep(sweep.SweepConfig(tmp_path / "sweep.yaml")).jobs
    content = yaml.safe_load(block.text)
    cells = len(content["data"]) * len(content["shots"]) * len(content["seeds"]) * len(content["methods"])
    assert len(jobs) == cells


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_named_targets_of_make_exist(page):
    assert set(re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))) <= TARGETS


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Those of docs/ are checked by `make docs`."""
    for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text())):
        assert (ROOT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_words_of_the_field(page):
    """Baseline, trade-off curve: not our own names for them. Code, paths and links keep theirs."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(r"(?i)\b(rivals?|fronts?|house|sisters?|passed over|before anybody)\b", text)
