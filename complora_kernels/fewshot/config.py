"""Every option of `complora train`, the presets, and the checks of the options' values."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import tyro

from complora_kernels.common.low_rank import Norm
from complora_kernels.config import TARGETS, BoundReference, CompLoRAConfig
from complora_kernels.fewshot.datasets import DOMAIN_SHIFTS, ELEVEN
from complora_kernels.fewshot.datasets.pictures import KEPT as PICTURE_GROUPS
from complora_kernels.fewshot.files import file_name
from complora_kernels.fewshot.methods import METHODS, Method
from complora_kernels.fewshot.templates import CHOICES

Preset = Literal["pictures", "glyphs", "glyphs-full", "clip-lora"]
Protocol = Literal["few-shot", "base-to-new", "transfer", "domain-shift", "retention"]

GLYPHS, PICTURES = BUNDLED = ("glyphs", "pictures")
"""The names of the bundled models among open_clip's."""

# The data sets, beside those of --keep, whose zero-shot accuracy each protocol measures before and after training.
PROTOCOLS: dict[Protocol, tuple[str, ...]] = {
    "few-shot": (),
    "base-to-new": (),  # the new classes of the data set itself
    "transfer": ELEVEN,
    "domain-shift": DOMAIN_SHIFTS,
    "retention": ELEVEN,
}


@dataclass(frozen=True)
class TrainConfig:
    """Adapt a CLIP to a few images per class, and measure what it learns and what it forgets.

    There is one run for each method, number of shots, learning rate and seed, from the same pretrained model. By
    default the new task is photos of clothes, and what is retained is the zero-shot naming of seven groups of emoji.
    The same command on the same output folder continues where it was stopped. Under torchrun all processes train each
    run together.
    """

    preset: Preset
    """The source of the defaults.
    pictures: a small demonstration, photos of clothes on a CLIP that knows 1,900 things. glyphs, glyphs-full: scanned
    digits on a CLIP that knows characters, a small demonstration and the whole trade-off over ten seeds.
    clip-lora: the recipe of CLIP-LoRA (arXiv 2405.18541), chosen when --model is not a bundled one.
    The Comp-LoRA paper's own rank, subspace size and layers are not known to us: no preset claims to be the paper's."""

    model: str = PICTURES
    """A small CLIP that comes with the package (pictures, glyphs), or any model name of open_clip, such as ViT-B-16."""
    pretrained: str | None = None
    """Weights for --model: a file, or one of open_clip's tags, which is downloaded.
    For a bundled model: a folder written by pretrain-pictures or pretrain-glyphs; None: the weights of the package."""
    activation: Literal["auto", "gelu", "quick-gelu"] = "auto"
    """The MLPs' activation; auto: that of the name in --model, -quickgelu or not.
    Weights that are known to be trained with the other one are refused."""

    data: str = "digits"
    """The data set to learn: fashion, photos of clothes; digits, which come with scikit-learn; pictures, emoji, for
    base-to-new; one of the eleven data sets of CoOp, such as dtd;
    folder:PATH, a folder of class folders; or csv:PATH, a table with the columns path, label and perhaps split."""
    data_root: Path | None = None
    """The folder that holds the named data sets, each in CoOp's or CLIP-LoRA's layout."""
    download: bool = False
    """Fetch a data set that is not there through torchvision, where it can."""
    protocol: Protocol = "few-shot"
    """few-shot: learn all classes. base-to-new: learn the first half of the classes, and measure on the second half
    too. transfer, retention: learn all classes, and measure zero-shot accuracy before and after on the rest of the
    eleven data sets. domain-shift: the same on ImageNet's four variants. transfer and domain-shift are for imagenet."""
    keep: tuple[str, ...] | None = None
    """More data sets whose zero-shot accuracy is measured before and after. None: with the
    pictures model seven groups of emoji and the letters, with the digits the letters; unless base-to-new."""
    draw: str = "own"
    """How a seed chooses the few-shot split. own: smaller splits are part of larger ones; coop: as CoOp does, from its
    files beside the data or, except for ImageNet, computed alike; clip-lora: as CLIP-LoRA does; or the path of an
    earlier run's draw.json or of one of CoOp's .pkl files, in which {data}, {shots} and {seed} are filled in."""
    validation: bool = False
    """Measure on validation images too, as many as shots and at most four per class. They are never trained on."""

    methods: tuple[Method, ...] = ("lora", "output", "both", "random")
    """LoRA, and Comp-LoRA with the output side of each weight protected, the input side, or both.
    random, random-input and random-both protect as many random directions: the controls for output, input and both.
    ends (-input, -both) protect the directions of the largest and the smallest singular values, and leave the middle.
    activations (-input, -both) protect the principal directions of the weights' outputs and inputs on the shots.
    lora-wd: LoRA with --strong-weight-decay. preserve: LoRA with the loss of --preserve.
    lora-plus: LoRA+ (arXiv 2402.12354), where B learns --loraplus-lr-ratio times as fast. eva: EVA (arXiv 2410.07170),
    with ranks and first factors from the weights' inputs on the shots. prilora: ranks that rise from block to block
    (arXiv 2401.11316), from half of --r to one and a half. image-lora: LoRA on the values of the image tower alone.
    tip-adapter, linear-probe and lfa (arXiv 2304.01752) train nothing inside the model.
    The zero-shot model is always measured."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Training images per class."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed chooses other training images, initial factors, batches and random subspaces."""
    learning_rates: tuple[float, ...] = (2e-4,)
    """Peak learning rates of AdamW."""

    r: int = 2
    """Rank of the update."""
    lora_alpha: float = 1.0
    """Strength of the update; see --use-rslora."""
    use_rslora: bool = True
    """Scale the update by lora_alpha / sqrt(r), otherwise by lora_alpha / r."""
    lora_dropout: float = 0.25
    """Dropout on the adapter's input."""
    subspace_k: int | None = None
    """Protect this many directions of every weight."""
    subspace_energy: float | None = None
    """Protect the fewest directions that hold this share of the squared singular values."""
    subspace_ratio: float | None = None
    """Protect this share of the smaller dimension. With none of the three given: 0.5.
    The paper's choice is not known to us."""
    update_bound: float | None = None
    """Keep each update within this times what --update-bound-relative-to says, plain LoRA's too; None: no bound."""
    update_bound_norm: Norm = "frobenius"
    """The norm of the update, and of the weight. spectral: the largest singular value; no CUDA graph can hold it."""
    update_bound_relative_to: BoundReference = "weight"
    """weight: the norm of the weight. next: its largest singular value that is not protected (of all, for lora).
    gap: the last protected one less that one. Below 1 it keeps the protected ones the largest, with the method both."""
    target_modules: tuple[str, ...] = ("q", "k", "v")
    """Any of q k v o fc1 fc2."""
    towers: tuple[Literal["image", "text"], ...] = ("image", "text")
    """Which encoders are adapted."""

    steps: int | None = None
    """Optimizer steps of a run, whatever its shots; None: --steps-per-shot for each shot."""
    steps_per_shot: int = 500
    """Optimizer steps for each shot, when --steps is None."""
    batch_size: int = 32
    """Images per step, at most the whole training set."""
    augmentation: Literal["none", "crop-flip"] = "crop-flip"
    """crop-flip: random resized crops (8 to 100% of an image, bicubic), every second one mirrored unless it shows
    characters; none: whole images."""
    image_memory_gib: float = 8.0
    """Each process keeps its training images decoded on the GPU up to this much memory, beyond it in pinned host
    memory. Up to as much, the images that are measured stay decoded in host memory; beyond it they are decoded each
    time."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen model; factors, logits and the loss are float32, and fp16 scales its loss.
    auto: bf16 on a GPU, fp32 on a CPU, where half precision is slow."""
    recompute: bool = False
    """Compute the first product of each MLP again in the backward pass, to save 6 activations per block, not 10."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Run each step as one CUDA graph; auto: on a GPU, unless it cannot be captured."""
    profile: bool = False
    """Write profile.txt and trace.json for each run, from eight of its steps, and print the first run's."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    strong_weight_decay: float = 0.3
    """Weight decay of the method lora-wd."""
    loraplus_lr_ratio: float = 16.0
    """How many times as fast as A the method lora-plus lets B learn."""
    preserve: float | None = None
    """Weight of a loss that every method that trains adds to its own: the KL divergence between the frozen and the
    adapted model's similarities of the training images to the names of --vocabulary.
    None: 1 in the method preserve, and no such loss in the others."""
    vocabulary: str | None = None
    """A file of general names for --preserve, one a line, none of them a class that is learned or measured as kept.
    None: a list of common nouns that comes with the package, without the names of such classes; for the bundled model
    the colours that it knows."""
    vocabulary_sample: int = 64
    """Names that a step draws from the vocabulary, at most all of it."""
    divergence_limit: float | None = None
    """Stop a run early, once the loss of --preserve, of the whole training images and all of --vocabulary, is above
    this; it is measured every ten steps, and no label of a kept task is read. None: never."""
    interpolations: Annotated[tuple[float, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Measure each trained model again with these shares of its update, between 0 and 1 (WiSE-FT)."""
    final_learning_rate: float = 1e-6
    """Learning rate at the end of the cosine schedule."""

    template: str = "a photo of a {}."
    """The prompt; {} stands for the class name, such as "digit seven" or "letter q". default: "a photo of a {}.";
    clip: CLIP's own for each data set; ensemble: trained with clip, measured with the mean feature of all of CLIP's."""
    max_test_images: int | None = None
    """Measure on at most this many images of each test set, chosen at random; None: on all."""
    test_batch_size: int = 256
    """Images per forward pass when measuring."""

    output: Path = Path("runs/clip-lora")
    """Folder for the results; created when needed."""
    device: str = "auto"
    """cpu, cuda, or auto: CUDA where there is one."""
    workers: int | None = None
    """Processes that share the runs; None: one per core for a bundled model, otherwise one."""
    threads: int | None = None
    """CPU threads of each process; None: one for a bundled model, otherwise torch's own number.
    Another number may round differently."""
    checkpoint_every: int = 100
    """Steps between the checkpoints from which a killed run continues."""
    log_every: int = 10
    """Steps between the lines of a run's log.jsonl."""
    save_adapters: bool = True
    """Keep the trained adapter of every run."""
    save_predictions: bool = True
    """Keep the names that each run gave to the images it was measured on, in predictions.csv, for the gallery."""
    tensorboard: bool = False
    """Write each run's loss and learning rate for TensorBoard too (pip install tensorboard)."""
    wandb: str | None = None
    """The project of Weights & Biases that each run is logged to (pip install wandb)."""

    def adapter(self, method: Method, seed: int) -> CompLoRAConfig:
        """The adapter of a method that adapts the model; `seed` chooses random subspaces."""
        changes = METHODS[method]
        assert changes is not None
        sizes = {name: getattr(self, name) for name in ("subspace_k", "subspace_energy", "subspace_ratio")}
        if all(size is None for size in sizes.values()):
            sizes["subspace_ratio"] = 0.5
        shared = ("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "towers")
        bound = ("update_bound", "update_bound_norm", "update_bound_relative_to")
        options = {name: getattr(self, name) for name in (*shared, *bound)}
        if changes["sides"] != "none":
            options |= {**sizes, "subspace_seed": seed}
        if method == "lora-plus":
            # AdamW's steps know no scale: a B that learns c times as fast is one whose product counts c times.
            options["lora_alpha"] *= self.loraplus_lr_ratio
        config = CompLoRAConfig(**{**options, **changes})
        if not config.selects_in_blocks:
            raise ValueError(f"target_modules={self.target_modules!r}, expected some of {', '.join(TARGETS)}")
        return config

    def preservation_weight(self, method: Method) -> float:
        """The weight of the preservation loss in a method; 0: the method has none."""
        if METHODS[method] is None:
            return 0.0
        return float(method == "preserve") if self.preserve is None else self.preserve

    @property
    def preserves(self) -> bool:
        """Whether any run reads the vocabulary."""
        if self.divergence_limit is not None:
            return any(METHODS[method] is not None for method in self.methods)
        return any(self.preservation_weight(method) > 0 for method in self.methods)

    def kept(self) -> tuple[str, ...]:
        """The data sets whose zero-shot accuracy is measured before and after."""
        more = self._kept_by_default() if self.keep is None else self.keep
        return tuple(name for name in dict.fromkeys((*PROTOCOLS[self.protocol], *more)) if name != self.data)

    def _kept_by_default(self) -> tuple[str, ...]:
        if self.protocol == "base-to-new":
            return ()
        if self.model == PICTURES:
            return (*PICTURE_GROUPS, "letters")
        return ("letters",) if self.data == "digits" else ()

    def steps_for(self, shots: int) -> int:
        """Optimizer steps of a run with `shots` images per class."""
        return self.steps_per_shot * shots if self.steps is None else self.steps

    def runs(self) -> list[Run]:
        """The runs of the grid in their order: seed by seed, so that a grid that was stopped is balanced."""
        runs = [
            Run(method, shots, None if METHODS[method] is None else learning_rate, seed)
            for seed in self.seeds
            for shots in self.shots
            for learning_rate in self.learning_rates
            for method in self.methods
        ]
        return list(dict.fromkeys(runs))  # a method that trains nothing has one run for all learning rates


@dataclass(frozen=True)
class Run:
    """One cell of a grid."""

    method: Method
    shots: int
    learning_rate: float | None  # None: nothing is trained
    seed: int
    data: str = ""  # the data set, in a sweep, which may have several
    label: str = ""  # the name of the method's variant, in a sweep

    @property
    def title(self) -> str:
        """The method's name in tables."""
        return self.label or self.method

    @property
    def name(self) -> str:
        """The run's name and folder, such as `output-4shot-lr0.003-seed0`."""
        rate = "" if self.learning_rate is None else f"lr{self.learning_rate}"
        return "-".join(filter(None, [self.variant, f"{self.shots}shot", rate, f"seed{self.seed}"]))

    @property
    def variant(self) -> str:
        """The beginning of the names of all runs of one method on one data set, such as `dtd-lora_wd_0.3`."""
        return file_name("-".join(filter(None, [self.data, self.title])))


_SMALL_RECIPE = {  # of the bundled models
    "r": 8,
    "lora_alpha": 8.0,
    "use_rslora": False,
    "lora_dropout": 0.0,
    "steps": 100,
    "augmentation": "none",  # a crop may show a part of a digit alone
    "precision": "fp32",
}
_GLYPH_RECIPE = {"model": GLYPHS, "template": "a drawing of the {}.", **_SMALL_RECIPE}

PRESETS: dict[Preset, TrainConfig] = {
    "clip-lora": TrainConfig("clip-lora"),
    "pictures": TrainConfig(
        "pictures",
        model=PICTURES,
        data="fashion",
        **_SMALL_RECIPE,
        max_test_images=1000,
        methods=("lora", "both", "random-both", "preserve"),
        shots=(16,),
        seeds=(0, 1),
        learning_rates=(1e-3, 3e-3, 1e-2),
        output=Path("runs/pictures"),
    ),
    "glyphs": TrainConfig(
        "glyphs",
        **_GLYPH_RECIPE,
        shots=(1, 4, 16),
        seeds=(0, 1),
        learning_rates=(3e-3, 1e-2, 2e-2),
        output=Path("runs/glyphs"),
    ),
    "glyphs-full": TrainConfig(
        "glyphs-full",
        **_GLYPH_RECIPE,
        methods=("lora", "output", "both", "random", "random-both"),
        seeds=tuple(range(10)),
        learning_rates=(1e-3, 3e-3, 1e-2, 2e-2),
        output=Path("runs/glyphs-full"),
        save_adapters=False,
    ),
}

# Options that do not change the results.
_LOGISTICS = (
    "output",
    "workers",
    "checkpoint_every",
    "log_every",
    "save_adapters",
    "save_predictions",
    "image_memory_gib",
    "recompute",
    "graph",
    "profile",
    "data_root",
    "download",
    "tensorboard",
    "wandb",
)


# The values of options that a folder of results was made with where its config.json lacks them.
BEFORE = {
    "augmentation": "none",
    "precision": "fp32",
    "data": "digits",
    "protocol": "few-shot",
    "keep": None,
    "draw": "own",
    "validation": False,
    "strong_weight_decay": 0.3,
    "loraplus_lr_ratio": 16.0,
    "preserve": None,
    "vocabulary": None,
    "vocabulary_sample": 64,
    "divergence_limit": None,
    "interpolations": [],
    "update_bound": None,
    "update_bound_norm": "frobenius",
    "update_bound_relative_to": "weight",
}


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The options that determine the results, as JSON values (tuples become lists)."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in _LOGISTICS}
    return json.loads(json.dumps(options))


def changed(config: TrainConfig) -> dict[str, Any]:
    """The preset, and the options whose values differ from it, without those of the grid's cells."""
    usual, cells = to_json(PRESETS[config.preset]), ("methods", "shots", "seeds", "learning_rates")
    options = {name: value for name, value in to_json(config).items() if value != usual[name] and name not in cells}
    return {"preset": config.preset, **options}


def check(config: TrainConfig) -> None:
    """Raise a ValueError that names the option, its value and the expected values, for a value that cannot work."""
    cells = ("methods", "shots", "seeds", "learning_rates")
    for name in (*cells, "keep"):
        values = getattr(config, name) or ()
        _require(len(values) > 0 or name not in cells, name, values, "at least one value")
        _require(len(set(values)) == len(values), name, values, "every value once")
    for method in config.methods:
        _require(method in METHODS, "methods", method, f"any of {', '.join(METHODS)}")
    for shots in config.shots:
        _require(shots >= 1, "shots", shots, "at least 1")
    for seed in config.seeds:
        _require(seed >= 0, "seeds", seed, "at least 0")
    for learning_rate in config.learning_rates:
        _require(learning_rate > 0, "learning_rates", learning_rate, "more than 0")
    positive = ("steps", "steps_per_shot", "batch_size", "max_test_images", "test_batch_size", "workers", "threads")
    for name in (*positive, "checkpoint_every", "log_every"):
        value = getattr(config, name)
        _require(value is None or value >= 1, name, value, "at least 1")
    _require(config.image_memory_gib >= 0, "image_memory_gib", config.image_memory_gib, "at least 0")
    _require(config.weight_decay >= 0, "weight_decay", config.weight_decay, "at least 0")
    _require(config.final_learning_rate >= 0, "final_learning_rate", config.final_learning_rate, "at least 0")
    decay = config.strong_weight_decay
    _require(decay >= 0, "strong_weight_decay", decay, "at least 0")
    ratio = config.loraplus_lr_ratio
    _require(0 < ratio < math.inf, "loraplus_lr_ratio", ratio, "more than 0")
    weight, sample = config.preserve, config.vocabulary_sample
    _require(weight is None or 0 < weight < math.inf, "preserve", weight, "more than 0")
    _require(sample >= 2, "vocabulary_sample", sample, "at least 2")
    limit = config.divergence_limit
    _require(limit is None or 0 < limit < math.inf, "divergence_limit", limit, "more than 0")
    for share in config.interpolations:
        _require(0 < share < 1, "interpolations", share, "shares between 0 and 1")
    _require(config.protocol in PROTOCOLS, "protocol", config.protocol, f"any of {', '.join(PROTOCOLS)}")
    is_template = config.template in CHOICES or config.template.count("{}") == 1
    _require(is_template, "template", config.template, f"one {{}} for the class name, or {', '.join(CHOICES)}")
    for method in config.methods:
        if METHODS[method] is not None:
            config.adapter(method, config.seeds[0])


def _require(holds: bool, option: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"--{option.replace('_', '-')} {value}: expected {expected}")


def preset_for(preset: str | None, model: str | None) -> Preset:
    """The given preset, or the preset of the model where none is given."""
    if preset is None:
        model = PICTURES if model is None else model
        return cast("Preset", model) if model in BUNDLED else "clip-lora"
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: expected one of {', '.join(get_args(Preset))}")
    return preset
