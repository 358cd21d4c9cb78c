"""What a run writes down while it goes: its log, and TensorBoard's and Weights & Biases' when asked; then a figure."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from complora_kernels.common.files import open_to_append, write_atomically, writing
from complora_kernels.fewshot.config import TrainConfig

LOG = "log.jsonl"
FIGURE = "loss.png"


def check_loggers(config: TrainConfig) -> None:
    """Raise a ValueError for a logger that is asked for and not installed."""
    asked = {"tensorboard": ("--tensorboard", config.tensorboard), "wandb": ("--wandb", config.wandb is not None)}
    for package, (option, is_asked) in asked.items():
        if is_asked and importlib.util.find_spec(package) is None:
            raise ValueError(f"{option}: {package} is not installed, expected `pip install {package}` before")


class RunLog:
    """The lines of one run, in a file of its folder as they come, and a figure when it ends, well or not.

    The file starts with the lines of the part of the run that went before: what a killed one logged after its
    checkpoint, perhaps half a line, is logged again.

    Args:
        config: which other loggers are asked for.
        name: the run's.
        folder: where everything goes; None writes nothing, as in all processes of a team but the first.
        lines: those of the part of the run that went before.

    Raises:
        OSError: the file cannot be written; from `add`, and from the end of a run that ends well, too.
    """

    def __init__(self, config: TrainConfig, name: str, folder: Path | None, lines: list[dict[str, Any]]):
        self.lines, self.folder = lines, folder
        self._file: IO[bytes] | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if folder is None:
            return
        write_atomically(folder / LOG, b"".join(map(_encoded, lines)))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What was logged after the checkpoint that the run goes on from is logged again.
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=self._last_step() + 1)
        if config.wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            place = zlib.crc32(str(folder.resolve()).encode())  # grids of one project have runs of the same names
            self._wandb = wandb.init(
                project=config.wandb, name=name, id=f"{name}-{place:08x}", dir=folder, resume="allow"
            )
        self._file = open_to_append(folder / LOG)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The error that ends the run is the news: after a full disk nothing else can be written either.
        quietly = contextlib.nullcontext() if error is None else contextlib.suppress(OSError)
        with quietly, contextlib.ExitStack() as endings:  # all of them, the last one first
            endings.callback(self._draw)
            if self._wandb is not None:
                endings.callback(self._wandb.finish, exit_code=0 if error is None else 1)
            if self._tensorboard is not None:
                endings.callback(self._tensorboard.close)
            if self._file is not None:
                endings.callback(self._file.close)

    def add(self, step: int, loss: float, learning_rate: float) -> None:
        """After `step` steps."""
        line = {"step": step, "loss": loss, "learning_rate": learning_rate}
        self.lines.append(line)
        if self._file is not None and self.folder is not None:
            with writing(self.folder / LOG):
                self._file.write(_encoded(line))
                self._file.flush()  # to the system, which keeps it when the process is killed
        self._tell({"loss": loss, "learning_rate": learning_rate}, step)

    def finish(self, result: dict[str, Any]) -> None:
        """Tell what came out: the run's line in results.jsonl."""
        numbers = {name: value for name, value in result.items() if isinstance(value, (int, float))}
        self._tell({f"result/{name}": value for name, value in numbers.items()}, result["steps"])

    def _draw(self) -> None:
        if self.folder is not None and self.lines:
            write_atomically(self.folder / FIGURE, _figure(self.lines))

    def _last_step(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    def _tell(self, values: dict[str, float], step: int) -> None:
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _figure(lines: list[dict[str, Any]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    steps = [line["step"] for line in lines]
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(steps, [line["loss"] for line in lines], color="#0072B2")
    rates = axes.twinx()
    rates.plot(steps, [line["learning_rate"] for line in lines], color="grey", linestyle=":")
    rates.set_ylabel("learning rate", color="grey")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    return image.getvalue()
