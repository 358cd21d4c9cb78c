"""The log of a run: a file, TensorBoard and Weights & Biases where asked for, and a figure at the end."""

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
    """Raise a ValueError for a logger that is asked for but not installed."""
    asked = {"tensorboard": ("--tensorboard", config.tensorboard), "wandb": ("--wandb", config.wandb is not None)}
    for package, (option, is_asked) in asked.items():
        if is_asked and importlib.util.find_spec(package) is None:
            raise ValueError(f"{option}: {package} is not installed, expected `pip install {package}` before")


class RunLog:
    """Writes the log lines of a run to a file as they come, and a figure when the run ends or fails.

    The file starts with the lines that the checkpoint holds. Lines that a killed run logged after its checkpoint are
    removed, because they are logged again.

    Args:
        config: tells which other loggers are asked for.
        name: the run's name.
        folder: the folder of the files; None writes nothing, as in all processes of a team but the first.
        lines: the lines from the checkpoint.

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

            # Steps after the checkpoint are logged again, and replace the earlier ones.
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
        # Errors of the log are suppressed where another error ends the run: after a full disk, writing fails again.
        quietly = contextlib.nullcontext() if error is None else contextlib.suppress(OSError)
        with quietly, contextlib.ExitStack() as endings:  # calls all endings, the last one first
            endings.callback(self._draw)
            if self._wandb is not None:
                endings.callback(self._wandb.finish, exit_code=0 if error is None else 1)
            if self._tensorboard is not None:
                endings.callback(self._tensorboard.close)
            if self._file is not None:
                endings.callback(self._file.close)

    def add(self, step: int, loss: float, learning_rate: float) -> None:
        """Log a line after `step` steps."""
        line = {"step": step, "loss": loss, "learning_rate": learning_rate}
        self.lines.append(line)
        if self._file is not None and self.folder is not None:
            with writing(self.folder / LOG):
                self._file.write(_encoded(line))
                self._file.flush()  # hands the line to the operating system, which keeps it when the process is killed
        self._tell({"loss": loss, "learning_rate": learning_rate}, step)

    def finish(self, result: dict[str, Any]) -> None:
        """Log the numbers of the run's line in results.jsonl."""
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
