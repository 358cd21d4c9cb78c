"""`complora sweep`: one grid over the data sets, shots, seeds, rates and named methods of a YAML file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml
from rich.console import Console

from complora_kernels.common.files import reading
from complora_kernels.fewshot.backbone import load_tokenizer
from complora_kernels.fewshot.checks import check_data, check_options, check_workers
from complora_kernels.fewshot.config import PRESETS, TrainConfig, preset_for, to_json
from complora_kernels.fewshot.grid import check_images, check_same, description, open_folder, run_jobs
from complora_kernels.fewshot.jobs import Job
from complora_kernels.fewshot.methods import METHODS
from complora_kernels.fewshot.outcomes import results_of
from complora_kernels.fewshot.slurm import check_submitit, run_on_slurm
from complora_kernels.fewshot.team import ALONE, Team, is_started_together
from complora_kernels.fewshot.tokens import Tokenizer

_CELLS = ("shots", "seeds", "learning_rates")
_OUTSIDE = ("methods", "output", "workers")  # options that belong to the file itself, or to the command line
_KEYS = ("data", *_CELLS, "methods", "options", "slurm")
_EXPECTED = f"a mapping with any of {', '.join(_KEYS)}"
_MOST_VALUES = 10**5


@dataclass(frozen=True)
class SweepConfig:
    """Do every run of a YAML file, and report them together. The same command continues where it was stopped.

    The file holds data, shots, seeds and learning_rates, each a value or a list; methods, a list of names or a mapping
    of the names in the tables to options of complora train, `method` among them; options, those that all runs share.
    A run that fails is kept in failures.jsonl, does not stop the others, and is tried again by the next call.
    """

    file: tyro.conf.Positional[Path]
    """The YAML file."""
    output: Path | None = None
    """Folder for the results. None: runs/NAME for NAME.yaml."""
    workers: int | None = None
    """Processes that share the runs; None: one per core for the bundled model, otherwise one."""
    slurm: bool = False
    """Hand the runs to a Slurm cluster (pip install submitit). The file has the parameters of submitit's executor under
    slurm, such as timeout_min, gpus_per_node and slurm_partition."""


@dataclass(frozen=True)
class Sweep:
    """The runs of a file.

    Attributes:
        jobs: all jobs, in the order in which they run.
        output: the folder of the results.
        slurm: parameters of submitit's executor.
        images: the fingerprint of each run's images, by the run's name.
    """

    jobs: list[Job]
    output: Path
    slurm: dict[str, Any]
    images: dict[str, str]


def read_sweep(config: SweepConfig) -> Sweep:
    """Read the file and check every option in it.

    Raises:
        FileNotFoundError: the file or a data set is missing.
        ValueError: the file is no YAML, or an option in it is unknown or cannot work.
    """
    file = config.file
    jobs: list[Job] = []
    variants: list[TrainConfig] = []
    with reading(file, _EXPECTED):
        content = _content(file)
        output = config.output or Path("runs") / file.stem
        shared = _mapping(file, content, "options")
        _refuse(file, "options", shared, (*_OUTSIDE, *(key for key in ("data", *_CELLS) if key in content)))
        names = _names(file, "data", content.get("data", shared.pop("data", "digits")))
        cells = {name: _listed(content[name]) for name in _CELLS if name in content}
        for data in names:
            for label, own in _variants(file, content).items():
                asked = {**shared, **cells, **own, "data": data, "output": output}
                variant = _train_config(file, label, asked, shared)
                variants.append(variant)
                jobs += [Job(variant, dataclasses.replace(run, data=data, label=label)) for run in variant.runs()]
        slurm = _mapping(file, content, "slurm")
    images = _check(file, variants, jobs)
    # Sorted by seed, so that a stopped sweep is balanced; then by split, so that its images are decoded once.
    jobs.sort(key=lambda job: (job.run.seed, names.index(job.run.data), job.run.shots))
    return Sweep(jobs, output, slurm, images)


def prepare_sweep(config: SweepConfig) -> Sweep:
    """Read the sweep and open its folder. A folder with results may get more variants, shots, seeds and rates.

    Raises:
        ValueError: the folder holds results of the same variant with other options or images.
        OSError: the folder cannot be written to.
    """
    check_workers(config.workers)
    sweep = read_sweep(config)
    if config.slurm:
        check_submitit()
        if is_started_together():
            raise ValueError("--slurm: expected without torchrun, which starts the processes of one run")
    asked, known = _described(sweep), description(sweep.output)
    for variant in known.keys() & asked.keys():
        check_same(known[variant], asked[variant], sweep.output)
    check_images(sweep.images, sweep.output)
    open_folder(sweep.output, {**asked, **known, **asked})  # keeps the order of the file
    return sweep


def _content(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a YAML file that describes a sweep")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    _check_plain(file, content)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected {_EXPECTED}")
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise ValueError(f"{file}: {unknown[0]}: expected any of {', '.join(_KEYS)}")
    return content


def _check_plain(file: Path, content: Any) -> None:
    """Raise a ValueError for names that are no plain values, and for too many or too deeply nested values."""
    level = [content]
    for _ in range(6):  # levels: file, methods, options of a method, an option, its list, a value
        mappings = [part for part in level if isinstance(part, dict)]
        if wrong := [key for part in mappings for key in part if not isinstance(key, (str, int, float))]:
            raise ValueError(f"{file}: {str(wrong[0])[:80]}: expected a name")
        inside = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        if sum(map(len, inside)) > _MOST_VALUES:
            raise ValueError(f"{file}: expected at most {_MOST_VALUES} values")
        level = [value for part in inside for value in part]
    if level:
        raise ValueError(f"{file}: expected values and lists of values in mappings, no deeper nesting")


def _mapping(file: Path, content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {key}: {value}: expected a mapping of names to values")
    return dict(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _names(file: Path, key: str, value: Any) -> list[str]:
    names = _listed(value)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: {key}: {value}: expected a name, or a list of at least one")
    return names


def _variants(file: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each method, by its name in tables."""
    methods = content.get("methods", ["lora", "output"])
    if not isinstance(methods, dict):
        methods = {name: {} for name in _names(file, "methods", methods)}
    if not methods:
        raise ValueError(f"{file}: methods is empty, expected at least one")
    variants = {}
    for label, own in methods.items():
        own = {"method": label, **_mapping(file, {label: own}, label)}
        method = own.pop("method")
        _refuse(file, label, own, ("data", "threads", *_OUTSIDE))
        if method not in METHODS:
            raise ValueError(f"{file}: method {method}: expected any of {', '.join(METHODS)}")
        if method == "lora-wd" and "weight_decay" in own:
            raise ValueError(f"{file}: {label}: weight_decay: expected strong_weight_decay, which lora-wd is about")
        variants[str(label)] = {**own, "methods": [method]}
    return variants


def _train_config(file: Path, label: str, asked: dict[str, Any], shared: Collection[str]) -> TrainConfig:
    """Read the options as `complora train` reads its command line."""
    types = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(asked.keys() - types.keys())
    if unknown:
        where = "options" if unknown[0] in shared else label
        raise ValueError(f"{file}: {where}: option {unknown[0]}: expected any of complora train's (see its --help)")
    preset, model = asked.get("preset"), asked.get("model")
    arguments: list[str] = []
    for name, value in asked.items():
        option = name.replace("_", "-")
        if isinstance(value, bool) and types[name] != "bool":
            value = "on" if value else "off"  # YAML reads the words on and off as truth values
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", *map(str, _listed(value))]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(TrainConfig, default=PRESETS[preset_for(preset, model)], args=arguments)
    except SystemExit:
        raise ValueError(f"{file}: {label}: {_essence(said.getvalue())}") from None


def _essence(said: str) -> str:
    """The error in tyro's output, on one line, without its frame and without the help that follows."""
    words = re.split("Argument helptext:|For full helptext", said)[0].split()
    return " ".join(word for word in words if not set(word) <= set("─│╭╮╰╯-"))


def _refuse(file: Path, where: str, asked: dict[str, Any], names: Iterable[str]) -> None:
    """Raise a ValueError for an option that would have no effect in that place."""
    for name in names:
        if name in asked:
            raise ValueError(f"{file}: {where}: {name}: expected outside of {where}, for all runs")


def _check(file: Path, variants: list[TrainConfig], jobs: list[Job]) -> dict[str, str]:
    """Check every option, and each split of each data set once; return the fingerprint of every run's images."""
    seen: dict[Any, dict[tuple[int, int], str]] = {}
    tokenizers: dict[Any, Tokenizer] = {}
    images: dict[str, str] = {}
    for variant in variants:
        try:
            check_options(variant)
            data = (variant.data, variant.data_root, variant.protocol, variant.keep, variant.draw)
            model = (variant.model, variant.pretrained)
            vocabulary = (variant.preserves, variant.vocabulary)
            key = (*data, *model, *vocabulary, variant.template, variant.shots, variant.seeds)
            if key not in seen:
                tokenizers[model] = tokenizers.get(model) or load_tokenizer(*model)
                seen[key] = check_data(variant, tokenizers[model])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{file}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        images |= {job.run.name: seen[key][job.run.shots, job.run.seed] for job in jobs if job.config is variant}
    counts = Counter(job.run.name for job in jobs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"{file}: two runs are called {twice[0]}, expected names of methods, and of data sets, that differ in "
            "their letters and digits"
        )
    return images


def _described(sweep: Sweep) -> dict[str, Any]:
    """The options that determine the results of each variant, without those that only select its runs."""
    described = {}
    for job in sweep.jobs:
        config = to_json(job.config)
        described[job.run.variant] = {name: value for name, value in config.items() if name not in _CELLS}
    return described


def run_sweep(config: SweepConfig, sweep: Sweep, console: Console, team: Team = ALONE) -> int:
    """Do the runs that have no result yet.

    Args:
        config: tells how the jobs are run.
        sweep: the sweep from `prepare_sweep`.
        console: shows the progress.
        team: processes that train each run together, each of which calls this.

    Returns:
        The number of runs without a result.
    """
    if config.slurm:
        run_on_slurm(sweep.jobs, sweep.output, sweep.slurm, console)
    else:
        run_jobs(sweep.jobs, sweep.output, console, workers=config.workers, team=team, keep_going=True)
    finished = {result["run"] for result in results_of(sweep.output)}
    return sum(job.run.name not in finished for job in sweep.jobs)
