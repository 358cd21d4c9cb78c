"""Trains the bundled small CLIP from random weights on rendered characters: `complora pretrain-glyphs`.

The defaults of `PretrainConfig` made the weights in `assets/`, on two cores in fifteen minutes. The same seed and
number of threads give the same weights, bit for bit, on the same machine.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save
from torch import Tensor, nn

from complora_kernels.fewshot import glyphs
from complora_kernels.fewshot.captions import build_vocabulary, sample_batch
from complora_kernels.fewshot.files import check_writable
from complora_kernels.fewshot.render import IMAGE_SIZE

LOG_FILE = "glyph_pretraining.jsonl"

_COUNTS = (
    *("steps", "batch_size", "jitter_steps", "width", "image_layers", "text_layers"),
    *("context_length", "log_every", "threads"),
)


@dataclass
class PretrainConfig:
    """Train the bundled small CLIP from random weights; the defaults made the weights of the package."""

    output: Path = Path("runs/glyph-clip")
    """Folder for the weights, the model's configuration, the vocabulary and the log."""
    steps: int = 1500
    batch_size: int = 192
    learning_rate: float = 1.5e-3
    """Peak of a one-cycle schedule."""
    weight_decay: float = 0.05
    jitter_steps: int = 500
    """Steps over which the characters' variation grows to its full strength."""
    width: int = 128
    image_layers: int = 4
    text_layers: int = 2
    context_length: int = 16
    log_every: int = 50
    """Steps between two lines of the log."""
    seed: int = 0
    threads: int = 2
    """CPU threads; another number gives other rounding and so slightly different weights."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.width % 32:
            raise ValueError(f"width={self.width}: expected a multiple of 32, the width of an attention head")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}: expected a positive number")


def model_config(config: PretrainConfig, vocab_size: int) -> dict[str, object]:
    """The keyword arguments of `open_clip.model.CLIP`."""
    return {
        "embed_dim": config.width,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "width": config.width,
            "layers": config.image_layers,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": vocab_size,
            "width": config.width,
            "heads": config.width // 32,
            "layers": config.text_layers,
        },
    }


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, is_true: Tensor
) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric loss, without the pairs of a picture and another caption that is true of it.

    Each picture should pick its own caption among those that are false of it, and each caption its own picture
    likewise: "the letter q" is true of every q in the batch, "a red drawing of the letter q" of every red one.

    Args:
        image_features: [N, D], unit length.
        text_features: [T, D], unit length, T at least N: the first N captions are the pictures' own.
        logit_scale: scalar factor on the cosines.
        is_true: bool [N, T], [i, j]: whether caption j is true of picture i.

    Returns:
        The loss, and the share of pictures that picked their own caption.
    """
    n = len(is_true)
    logits = logit_scale * image_features @ text_features.T  # [N, T]
    others_truth = is_true & ~torch.eye(*is_true.shape, dtype=torch.bool, device=is_true.device)
    logits = logits.masked_fill(others_truth, float("-inf"))
    own = torch.arange(n, device=logits.device)
    accuracy = (logits.argmax(-1) == own).float().mean()
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T[:n], own)) / 2, accuracy


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Let torch compute on `n` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_adamw(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW whose weight decay spares biases, norms and the logit scale."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


class _Log:
    """Collects the lines of the log: means since the last line, and zero-shot accuracy in held-out fonts."""

    def __init__(self, model: CLIP, tokenizer: glyphs.GlyphTokenizer) -> None:
        self.lines: list[dict[str, float]] = []
        self._model, self._tokenizer = model, tokenizer
        self._test_set = glyphs.held_out_test_set()
        self._recent: list[tuple[float, float]] = []
        self._started = time.monotonic()

    def record(self, loss: float, accuracy: float) -> None:
        self._recent.append((loss, accuracy))

    def write_line(self, step: int) -> dict[str, float]:
        self._model.eval()
        held_out = glyphs.zero_shot_accuracy(self._model, self._tokenizer, *self._test_set, glyphs.CLASS_NAMES)
        self._model.train()
        losses, accuracies = zip(*self._recent, strict=True)
        self._recent.clear()
        line = {
            "step": step,
            "loss": round(sum(losses) / len(losses), 4),
            "batch_accuracy": round(sum(accuracies) / len(accuracies), 4),
            "held_out_accuracy": round(held_out, 4),
            "seconds": round(time.monotonic() - self._started, 1),
        }
        self.lines.append(line)
        return line


def _train(model: CLIP, tokenizer: glyphs.GlyphTokenizer, config: PretrainConfig) -> list[dict[str, float]]:
    """Train the model in place and return the lines of the log."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    generator = torch.Generator().manual_seed(config.seed)
    optimizer = make_adamw(model.parameters(), config.learning_rate, config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.15)
    log = _Log(model, tokenizer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("pretraining", total=config.steps)
        for step in range(1, config.steps + 1):
            batch = sample_batch(config.batch_size, min(1.0, step / config.jitter_steps), generator)
            images, texts, scale = model(glyphs.preprocess(batch.images), tokenizer(batch.captions))
            loss, accuracy = contrastive_loss(images, texts, scale, batch.is_true)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))  # the limit of CLIP (arXiv 2103.00020, section 2.5)
            log.record(loss.item(), accuracy.item())
            progress.update(task, advance=1, description=f"pretraining, loss {loss.item():.3f}")
            if step % config.log_every == 0 or step == config.steps:
                progress.console.print(log.write_line(step))
    return log.lines


def _write(model: CLIP, vocabulary: dict[str, int], log: list[dict[str, float]], config: PretrainConfig) -> None:
    """Write all files into a temporary folder beside them, then move each into its place."""
    description = {
        "model_cfg": model_config(config, len(vocabulary)),
        "preprocess_cfg": {"size": IMAGE_SIZE, "mean": glyphs.MEAN, "std": glyphs.STD},
    }
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix=".pretrain-", dir=config.output) as folder:
        temporary = Path(folder)
        (temporary / glyphs.CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
        (temporary / glyphs.VOCABULARY_FILE).write_text(json.dumps(vocabulary, indent=0) + "\n")
        (temporary / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in [settings, *log]))
        (temporary / glyphs.WEIGHTS_FILE).write_bytes(save(weights))
        for file in temporary.iterdir():
            file.replace(config.output / file.name)


def pretrain(config: PretrainConfig) -> None:
    """Train the small CLIP and write its weights, configuration, vocabulary and log into `config.output`.

    Nothing is written before the training has ended, so that an interrupted run leaves the folder unchanged.

    Raises:
        OSError: the folder cannot be made or written to; it is raised before the training begins.
    """
    check_writable(config.output)
    vocabulary = build_vocabulary()
    tokenizer = glyphs.GlyphTokenizer(vocabulary, config.context_length)
    with torch_threads(config.threads):
        model = glyphs.build_clip(model_config(config, len(vocabulary)), config.seed)
        log = _train(model, tokenizer, config)
    _write(model, vocabulary, log, config)
