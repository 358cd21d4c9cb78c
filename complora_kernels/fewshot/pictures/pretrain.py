"""Trains the pictures model from random weights: `complora pretrain-pictures`.

The defaults of `PicturesConfig` made the weights in `assets/pictures`, on two cores in two hours.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

from complora_kernels.adapters.install import truncate_texts
from complora_kernels.common.files import read_plain, reading, write_atomically
from complora_kernels.fewshot.files import check_writable
from complora_kernels.fewshot.glyphs import build_clip
from complora_kernels.fewshot.pictures import model as world
from complora_kernels.fewshot.pictures.augment import augmented, normalize
from complora_kernels.fewshot.pictures.captions import Captioner
from complora_kernels.fewshot.pictures.concepts import read_concepts
from complora_kernels.fewshot.pictures.families import SEEN, UNSEEN, check_sources
from complora_kernels.fewshot.pictures.pack import check_fashion, read_photos, write_data
from complora_kernels.fewshot.pictures.sources import Sources, read_sources
from complora_kernels.fewshot.pictures.tokenizer import train_tokenizer
from complora_kernels.fewshot.pretrain import contrastive_loss, make_adamw, torch_threads

LOG_FILE = "pretraining.jsonl"
CHECKPOINT = "checkpoint.pt"

_COUNTS = (
    *("steps", "batch_size", "size", "patch", "width", "image_layers", "text_width", "text_layers", "context_length"),
    *("vocab_size", "log_every", "checkpoint_every", "threads"),
)


@dataclass
class PicturesConfig:
    """Train the pictures model from random weights; the defaults made the weights of the package."""

    sources: Path = Path("node_modules")
    """Folder of the npm packages emojibase-data and @iconify-json/{noto,noto-v1,fluent-emoji,fluent-emoji-flat,
    twemoji,emojione,fxemoji}, as `npm install` makes it."""
    output: Path = Path("runs/pictures-clip")
    """Folder for the weights, the model's configuration, the tokenizer, the log and the checkpoint; the same command
    goes on from the checkpoint."""
    fashion: Path | None = None
    """Folder of Fashion-MNIST's four files, compressed or not; with it, the sheets of pictures and photos that the
    package brings are written too."""
    steps: int = 7000
    batch_size: int = 128
    negatives: int = 128
    """Captions of other concepts that each batch has beside its own."""
    learning_rate: float = 1.5e-3
    """Peak of a one-cycle schedule."""
    weight_decay: float = 0.1
    size: int = 48
    """Height and width of the model's images, in pixels."""
    patch: int = 8
    width: int = 160
    image_layers: int = 5
    text_width: int = 128
    text_layers: int = 3
    context_length: int = 24
    vocab_size: int = 3072
    log_every: int = 250
    """Steps between two lines of the log."""
    checkpoint_every: int = 250
    seed: int = 0
    threads: int = 2
    """CPU threads; another number gives other rounding and so slightly different weights."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.negatives < 0:
            raise ValueError(f"negatives={self.negatives}: expected at least 0")
        if self.size % self.patch:
            raise ValueError(f"size={self.size}: expected a multiple of patch={self.patch}")
        for name in ("width", "text_width"):
            if getattr(self, name) % world.HEAD_WIDTH:
                raise ValueError(f"{name}={getattr(self, name)}: expected a multiple of {world.HEAD_WIDTH}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate}: expected a positive number")


def check_pictures(config: PicturesConfig) -> None:
    """Find what would stop the training, before anything is computed.

    Raises:
        OSError: a package is missing, or the output cannot be written.
        ValueError: the list of emoji is damaged, or the Python package that renders icons is missing.
    """
    if importlib.util.find_spec("resvg_py") is None:
        raise ValueError("resvg-py is missing, expected it to render icons: pip install 'complora-kernels[pretrain]'")
    check_sources(config.sources, (*SEEN, UNSEEN))
    read_concepts(config.sources)
    if config.fashion is not None:
        check_fashion(config.fashion)
    check_writable(config.output)


def model_config(config: PicturesConfig, vocab_size: int) -> dict[str, Any]:
    """The keyword arguments of `open_clip.model.CLIP`."""
    return {
        "embed_dim": config.text_width,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": config.size,
            "patch_size": config.patch,
            "width": config.width,
            "layers": config.image_layers,
            "head_width": world.HEAD_WIDTH,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": vocab_size,
            "width": config.text_width,
            "heads": config.text_width // world.HEAD_WIDTH,
            "layers": config.text_layers,
        },
    }


def make_optimizers(model: CLIP, learning_rate: float, weight_decay: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks, AdamW for all else: embeddings, projections, biases, norms, the scale.

    Muon orthogonalises each step (Jordan et al., 2024); its steps are scaled to the size of AdamW's (arXiv 2502.16982,
    section 2.2), so that both have one learning rate.
    """
    of_blocks = {name for name, p in model.named_parameters() if p.ndim == 2 and "resblocks." in name}
    hidden = [p for name, p in model.named_parameters() if name in of_blocks]
    others = [p for name, p in model.named_parameters() if name not in of_blocks]
    muon = torch.optim.Muon(hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return muon, make_adamw(others, learning_rate, weight_decay)


class Trainer:
    """A training that can be stopped after any step and goes on as if it had not been."""

    def __init__(self, config: PicturesConfig, sources: Sources) -> None:
        self.config, self.sources = config, sources
        self.captioner = Captioner(sources.seen.concepts)
        corpus = self.captioner.corpus()
        self.tokenizer = train_tokenizer(corpus, config.vocab_size, config.context_length)
        self.model = build_clip(model_config(config, self.tokenizer.vocab_size), config.seed)
        truncate_texts(self.model)
        self.optimizers = make_optimizers(self.model, config.learning_rate, config.weight_decay)
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer, config.learning_rate, config.steps, pct_start=0.1, cycle_momentum=False
            )
            for optimizer in self.optimizers
        ]
        self.generator = torch.Generator().manual_seed(config.seed)
        self.by_concept = sources.seen.by_concept()
        self.done, self.seconds = 0, 0.0
        self.lines: list[dict[str, Any]] = []
        self._recent: list[tuple[float, float]] = []

    def batch(self) -> tuple[Tensor, list[str], Tensor]:
        """Images [N, 3, S, S], T captions of which the first N are theirs, and which are true, bool [N, T]."""
        config, generator, seen = self.config, self.generator, self.sources.seen
        n = config.batch_size
        concepts = torch.randint(len(seen.concepts), (n + config.negatives,), generator=generator)
        choices = torch.randint(2**31, (n,), generator=generator).tolist()
        of = [self.by_concept[concept] for concept in concepts[:n].tolist()]
        chosen = torch.stack([own[choice % len(own)] for own, choice in zip(of, choices, strict=True)])  # [N]
        images = augmented(seen.pixels[chosen], seen.mirrors[chosen], config.size, generator)
        captions = self.captioner.draw(concepts[:n], concepts, generator)
        return normalize(images), captions.texts, captions.is_true

    def step(self) -> float:
        """Take one step; returns its loss."""
        images, texts, is_true = self.batch()
        image_features, text_features = self.model.encode_image(images, normalize=True), self.encode_texts(texts)
        loss, accuracy = contrastive_loss(image_features, text_features, self.model.logit_scale.exp(), is_true)
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for part in (*self.optimizers, *self.schedules):
            part.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))  # the limit of CLIP (arXiv 2103.00020, section 2.5)
        self.done += 1
        self._recent.append((loss.item(), accuracy.item()))
        return loss.item()

    def encode_texts(self, texts: list[str]) -> Tensor:  # [T, D], normalised
        """The features of texts, of similar lengths together: each batch of them is truncated to its longest."""
        tokens = self.tokenizer(texts)  # [T, L]
        order = tokens.argmax(1).argsort(stable=True)  # where each text ends
        parts = [self.model.encode_text(part, normalize=True) for part in tokens[order].chunk(4)]
        return torch.cat(parts)[order.argsort()]

    def log_line(self) -> dict[str, Any]:
        """Append and return a line of the log: means since the last one, and zero-shot accuracies."""
        losses, accuracies = zip(*self._recent, strict=True)
        self._recent.clear()
        line = {
            "step": self.done,
            "seconds": round(self.seconds, 1),
            "loss": round(sum(losses) / len(losses), 4),
            "batch_accuracy": round(sum(accuracies) / len(accuracies), 4),
            **world.zero_shot(self.model, self.tokenizer, self.sources.unseen, self.config.size),
        }
        self.lines.append(line)
        return line

    def state(self) -> dict[str, Any]:
        return {
            "made_by": self._made_by(),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "generator": self.generator.get_state(),
            "done": self.done,
            "seconds": self.seconds,
            "lines": self.lines,
            "recent": self._recent,
        }

    def _made_by(self) -> dict[str, Any]:
        """What a training has to share with its checkpoint."""
        pictures = {"pictures": self.sources.counts, "tokenizer": str(self.tokenizer)}
        return {**_settings(self.config), **pictures}

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is damaged, or of other settings or pictures; the message names it.
        """
        with reading(path, "the checkpoint of a training"):
            state = torch.load(io.BytesIO(read_plain(path)), weights_only=True)
            made_by = state["made_by"]
        if made_by != self._made_by():
            raise ValueError(f"{path}: of other settings or pictures, expected the same command, or no checkpoint")
        self.model.load_state_dict(state["model"])
        for name in ("optimizers", "schedules"):
            for part, of in zip(getattr(self, name), state[name], strict=True):
                part.load_state_dict(of)
        self.generator.set_state(state["generator"])
        self.done, self.seconds, self.lines, self._recent = (
            state[name] for name in ("done", "seconds", "lines", "recent")
        )


def _settings(config: PicturesConfig) -> dict[str, Any]:
    """The options that decide about the weights."""
    logistics = ("sources", "output", "fashion", "checkpoint_every")
    return {name: value for name, value in asdict(config).items() if name not in logistics}


def pretrain_pictures(config: PicturesConfig) -> None:
    """Train the model and write its weights, configuration, tokenizer and log into `config.output`.

    Raises:
        OSError: a package is missing, or the output cannot be written; raised before the training begins.
        ValueError: a package is damaged, or the checkpoint is of other settings.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    check_pictures(config)
    photos = None if config.fashion is None else read_photos(config.fashion)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with torch_threads(config.threads), Progress(*columns) as progress:
        task = progress.add_task("rendering the icons", total=config.steps)
        sources = read_sources(config.sources)
        progress.console.print(f"pictures: {sources.counts}")
        for failure in sources.failures:
            progress.console.print(f"left out: {failure.family} {failure.icon} ({failure.reason})")
        trainer = Trainer(config, sources)
        for loss in _train(trainer, progress.console.print):
            progress.update(task, completed=trainer.done, description=f"pretraining, loss {loss:.3f}")
    write(trainer)
    if photos is not None:
        write_data(config.output, sources, photos)
    (config.output / CHECKPOINT).unlink(missing_ok=True)


def _train(trainer: Trainer, say: Any) -> Iterator[float]:
    """The losses of the steps that are left; a checkpoint and a line of the log every few of them."""
    config, path = trainer.config, trainer.config.output / CHECKPOINT
    if path.exists():
        trainer.restore(path)
    before, started = trainer.seconds, time.monotonic()
    while trainer.done < config.steps:
        yield trainer.step()
        trainer.seconds = before + time.monotonic() - started
        if trainer.done % config.log_every == 0 or trainer.done == config.steps:
            say(trainer.log_line())
        if trainer.done % config.checkpoint_every == 0 or trainer.done == config.steps:
            state = io.BytesIO()
            torch.save(trainer.state(), state)
            write_atomically(path, state.getvalue())


def write(trainer: Trainer) -> None:
    """Write the model, its tokenizer and the log."""
    config = trainer.config
    description = {
        "model_cfg": model_config(config, trainer.tokenizer.vocab_size),
        "preprocess_cfg": {"size": config.size, "mean": [world.MEAN] * 3, "std": [world.STD] * 3},
    }
    world.save_model(config.output, trainer.model, description, trainer.tokenizer)
    lines = [{**_settings(config), "pictures": trainer.sources.counts}, *trainer.lines]
    write_atomically(config.output / LOG_FILE, "".join(json.dumps(line) + "\n" for line in lines))
