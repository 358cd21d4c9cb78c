"""A CLIP of a few thousand weights with random values, and two small data sets, for tests of the few-shot program."""

import dataclasses
from pathlib import Path

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from complora_kernels.fewshot.backbone import Backbone
from complora_kernels.fewshot.config import PRESETS, TrainConfig
from complora_kernels.fewshot.datasets import Dataset
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.setting import Setting

VARYING = ("seconds", "images_per_second", "peak_memory_mib")  # the fields of a result that differ between equal runs
CLASSES = ("red", "green", "blue")


def config(output: Path, **options) -> TrainConfig:
    """The options of a run of a few steps."""
    few = {"shots": (2,), "seeds": (0,), "learning_rates": (1e-2,), "methods": ("both",), "steps": 6, "r": 2}
    machine = {
        "save_adapters": False,
        "checkpoint_every": 2,
        "log_every": 2,
        "workers": 1,
        "output": output,
        "batch_size": 4,
    }
    return dataclasses.replace(PRESETS["glyphs"], **{**few, **machine, **options})


def setting() -> Setting:
    """Colours to learn, and the same colours, darker, to keep."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = CLIPVisionCfg(image_size=16, patch_size=8, width=32, layers=2, head_width=16)
        model = CLIP(16, vision, CLIPTextCfg(context_length=8, vocab_size=40, width=32, heads=2, layers=1)).eval()
        noise = torch.randint(0, 60, (30, 3, 16, 16), dtype=torch.uint8)
    device, normalize = torch.device("cpu"), lambda pixels: pixels - 0.5
    backbone = Backbone(model, tokenize, lambda images: normalize(images.float() / 255), device, (16, 16), normalize)
    labels = torch.arange(30) % 3
    bright, dark = noise.clone(), noise.clone()
    bright[torch.arange(30), labels] += 150
    dark[torch.arange(30), labels] += 60
    return Setting(
        backbone,
        Task(dataset("bright", bright, labels), backbone, ("a {}",)),
        {"dark": Task(dataset("dark", dark, labels), backbone, ("a {}",))},
    )


def result_line(method, shots, seed, rate, new, kept, zero_shot, data="", **more):
    """A line of results.jsonl; `zero_shot` are the new and the kept accuracy of the pretrained model."""
    return {
        "run": f"{data}{data and '-'}{method}-{shots}shot-lr{rate}-seed{seed}",
        "method": method,
        "shots": shots,
        "seed": seed,
        "learning_rate": rate,
        "new": new,
        "kept": kept,
        "zero_shot_new": zero_shot[0],
        "zero_shot_kept": zero_shot[1],
        **({"data": data} if data else {}),
        **more,
    }


def dataset(name: str, images: torch.Tensor, labels: torch.Tensor) -> Dataset:
    """All images are training images; those that a few-shot split leaves are its test set."""
    every = torch.arange(len(labels))
    return Dataset(name, images, labels, CLASSES, every, every[:0], None, can_be_mirrored=False)


def tokenize(texts: list[str]) -> torch.Tensor:
    """Letters a to z as 1 to 26, after a 30 and before a 39, where the features are read."""
    tokens = torch.zeros(len(texts), 8, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        letters = [ord(letter) - 96 for letter in text.replace(" ", "")][:6]
        row[: len(letters) + 2] = torch.tensor([30, *letters, 39])
    return tokens
