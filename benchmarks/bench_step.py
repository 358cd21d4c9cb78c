"""How fast is a whole training step of a CLIP model against other ways to do it?

`make bench` runs it: on a CPU in float32, on a GPU in bfloat16. A step is a forward pass, a backward pass and AdamW.
Every baseline starts from the same frozen weights and factors. Its loss and gradients are checked, without dropout,
before it is timed; with dropout, that its losses differ and have the right mean. One that torch.compile or a CUDA graph
cannot take is a row that says so. Rooflines are of the products of plain torch with folded factors at all positions,
with truncated prompts; that of the frozen model is of its own. The learning rate is 0, so that everyone's factors stay
what they are, for the same work.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import complora_kernels as ck
from benchmarks import baselines, transformers_clip
from benchmarks.baselines import Trainee
from benchmarks.comparison import Comparison, Missing, Work, needed
from complora_kernels.backends import plans
from complora_kernels.modules.block import set_recompute
from complora_kernels.replays import Step, free_memory, reason

OURS = "complora_kernels"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# Of a gradient through a tower: sums in another order; in bfloat16 roundings of every result in every layer.
TOLERANCE = 1e-4 if torch.float32 == DTYPE else 1e-1
FEW_CLASSES = 100
Made = TypeVar("Made")


@dataclass(frozen=True)
class Baseline:
    make: Any  # (plain model, adapters, config) -> Trainee; None: ours
    remark: str = ""  # its known defects, and results that it does not compute
    compiled: bool = False
    graphed: bool = False
    cut: bool = False  # its prompts, by hand
    recompute: str = "none"  # ours
    plan: plans.Plan | None = None  # ours
    checkout: str = ""  # the option that says where its code lies, which `make` takes first
    copy: str = ""  # our own transcription: on a CPU, which has no time for both, a checkout replaces it


def linear(kind: type[baselines.LoRALinear]) -> Any:
    return lambda plain, weights, config: baselines.by_linear(kind, plain, weights, config)


LOSES = "in half precision it rounds twice, and loses small updates"
PLAIN = f"plain LoRA: no projection; {LOSES}"
WHOLE = "encodes all 77 positions of a text"
FULL = "plain LoRA: no projection; multiplies the factors in full size"
MERGES = "without dropout it merges in place at each forward pass, and weights drift"
DENSE = f"4·M·out² operations and P_perp [out, out] more; {LOSES}"
FLOOR = "the floor: no adapter, but a gradient down to the input of the first block, which ours leaves out"
COMPILES = f"compiled anew for each shape, which is not in its time; {LOSES}"
MERGE = "ours by another plan, as RunLoRA does: weights merged in float32 and rounded, which loses small updates"
ADDMM = f"ours by another plan, as Unsloth and Axolotl do; {LOSES}"
folded, clip_lora = linear(baselines.FoldedLinear), linear(baselines.CLIPLoRALinear)
BASELINES = {
    "ours, eager": Baseline(None),
    'ours, recompute="mlp"': Baseline(None, "multiplies by fc1 once more", recompute="mlp"),
    "merge": Baseline(None, MERGE, plan=plans.Plan("merge")),
    "merge, one CUDA graph": Baseline(None, MERGE, plan=plans.Plan("merge"), graphed=True),
    "addmm": Baseline(None, ADDMM, plan=plans.Plan("addmm")),
    "addmm, one CUDA graph": Baseline(None, ADDMM, plan=plans.Plan("addmm"), graphed=True),
    "frozen model": Baseline(baselines.without_adapters, FLOOR),
    "frozen model, torch.compile": Baseline(baselines.without_adapters, f"{FLOOR}; {COMPILES}", compiled=True),
    "frozen model, one CUDA graph": Baseline(baselines.without_adapters, FLOOR, graphed=True),
    "PEFT eager": Baseline(baselines.by_peft, PLAIN),
    "PEFT, one CUDA graph": Baseline(baselines.by_peft, PLAIN, graphed=True),
    "PEFT, torch.compile": Baseline(baselines.by_peft, f"plain LoRA: no projection; {COMPILES}", compiled=True),
    "PEFT eager, prompts cut": Baseline(baselines.by_peft, PLAIN, cut=True),
    "PEFT, prompts cut, one CUDA graph": Baseline(baselines.by_peft, PLAIN, cut=True, graphed=True),
    "ours on transformers' CLIP": Baseline(transformers_clip.by_ours),
    "PEFT on transformers' CLIP": Baseline(transformers_clip.by_peft, PLAIN),
    "PEFT on transformers' CLIP, one CUDA graph": Baseline(transformers_clip.by_peft, PLAIN, graphed=True),
    "dense P_perp": Baseline(linear(baselines.DenseProjectorLinear), DENSE),
    "torch.compile of folded factors": Baseline(folded, COMPILES, compiled=True),
    "torch.compile of folded factors, one CUDA graph": Baseline(folded, COMPILES, compiled=True, graphed=True),
    "CLIP-LoRA's layer": Baseline(clip_lora, FULL),
    "CLIP-LoRA's own code": Baseline(
        baselines.by_clip_lora, f"{FULL}; {MERGES}", checkout="--clip-lora", copy="CLIP-LoRA's layer"
    ),
    "CLIP-LoRA's layer, prompts cut": Baseline(clip_lora, FULL, cut=True),
    "CLIP-LoRA's layer, prompts cut, one CUDA graph": Baseline(clip_lora, FULL, cut=True, graphed=True),
}


@dataclass(frozen=True)
class Case:
    """A model, a batch, what is adapted, and the baselines with the targets that they measure."""

    model: str
    images: int
    baselines: Mapping[str, str | None]  # a name in BASELINES -> an id in targets.toml
    extra: tuple[str, ...] = ()  # baselines of `--extra`: no target asks for them, and compiling takes minutes
    prompts: int = 0  # 0: the image tower alone is trained, against fixed features of the classes
    r: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ("q", "k", "v", "o", "fc1", "fc2")
    graphed: bool = False  # ours is one CUDA graph

    @property
    def config(self) -> ck.CompLoRAConfig:
        """Half of all directions are protected: nothing costs more."""
        return ck.CompLoRAConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            subspace_ratio=0.5,
            target_modules=self.target_modules,
            towers=("image", "text") if self.prompts else ("image",),
        )

    def __str__(self) -> str:
        words = [self.model, f"{self.images} images", f"{self.prompts} prompts" if self.prompts else "image tower"]
        words += ["six linears" if len(self.target_modules) == 6 else " ".join(self.target_modules), f"r={self.r}"]
        words += [f"p={self.lora_dropout}"] if self.lora_dropout else []
        return ", ".join([*words, str(DTYPE).removeprefix("torch.")])


RECIPE = {"r": 2, "lora_alpha": 1.0, "lora_dropout": 0.25, "use_rslora": True, "target_modules": ("q", "k", "v")}
# `benchmarks/gpu.sh` has a stage for each case, so that one that is stopped costs no other.
GPU_CASES = [
    Case(
        "ViT-B-16-quickgelu",
        256,
        {
            "PEFT eager": "step/PEFT",
            "ours on transformers' CLIP": None,
            "PEFT on transformers' CLIP": None,
            "torch.compile of folded factors": "step/compiled",
            "dense P_perp": "step/dense P_perp",
            "frozen model": "step/frozen",
        },
        extra=("PEFT, torch.compile", "merge", "addmm", "frozen model, torch.compile"),
    ),
    Case(
        "ViT-B-16-quickgelu",
        32,
        {
            "ours, eager": None,
            "PEFT eager": "step/PEFT, batch 32",
            "PEFT, one CUDA graph": None,
            "PEFT on transformers' CLIP, one CUDA graph": None,
            "torch.compile of folded factors, one CUDA graph": "step/compiled, batch 32",
            "frozen model, one CUDA graph": None,
        },
        extra=(
            "PEFT on transformers' CLIP",
            "torch.compile of folded factors",
            "merge, one CUDA graph",
            "addmm, one CUDA graph",
            "frozen model",
        ),
        graphed=True,
    ),
    Case(
        "ViT-B-16-quickgelu",
        32,
        {
            "ours, eager": None,
            "CLIP-LoRA's layer": "step/CLIP-LoRA",
            "CLIP-LoRA's own code": None,
            "CLIP-LoRA's layer, prompts cut": "step/CLIP-LoRA, cut",
            "CLIP-LoRA's layer, prompts cut, one CUDA graph": None,
        },
        prompts=100,
        graphed=True,
        **RECIPE,
    ),
    Case(
        "ViT-B-16-quickgelu",
        32,
        {
            "ours, eager": None,
            "PEFT eager": "step/PEFT, 1000 prompts",
            "PEFT eager, prompts cut": "step/PEFT, 1000 cut",
            "PEFT, prompts cut, one CUDA graph": None,
        },
        prompts=1000,
        graphed=True,
    ),
]
# Two cores have six and a half minutes for twenty rounds of each: 77 tokens of 100 prompts take three of them. So what
# costs most is not here but in GPU_CASES: torch.compile, which takes minutes for a tower, other plans and the frozen
# model, both of which `bench_layer` times on a CPU too. CLIP-LoRA's layer stands in a smaller model, with GELU.
CPU_CASES = [
    Case(
        "ViT-B-32-quickgelu",
        8,
        {
            "PEFT eager": "step/PEFT, CPU",
            "ours on transformers' CLIP": None,
            "PEFT on transformers' CLIP": None,
            "dense P_perp": "step/dense P_perp, CPU",
        },
    ),
    Case("ViT-S-32", 8, {"CLIP-LoRA's layer": None, "CLIP-LoRA's own code": None}, **RECIPE),
    Case(
        "ViT-B-32-quickgelu",
        8,
        {"PEFT eager": "step/PEFT, 100 prompts, CPU", "PEFT eager, prompts cut": None},
        prompts=FEW_CLASSES,
    ),
]


class Batch(NamedTuple):
    images: Tensor  # [N, 3, H, W]
    labels: Tensor  # [N]
    prompts: Tensor  # ids [C, context], or fixed features [C, D]


def make_plain(name: str) -> Any:
    """The model at random initial weights, equal in all blocks of a tower: so few are decomposed that nobody waits."""
    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    assert config is not None
    model: Any = CLIP(**config)
    for tower in (model.visual.transformer, model.transformer):
        for block in tower.resblocks[1:]:
            block.load_state_dict(tower.resblocks[0].state_dict())
    return model.to(DEVICE, DTYPE).requires_grad_(False)


def make_ours(plain: nn.Module, config: ck.CompLoRAConfig) -> Any:
    """Ours, with updates of about a tenth of the weights: smaller ones would hide a mistake from the check."""
    model = ck.apply_complora(copy.deepcopy(plain), config, progress=False)
    for A, B in baselines.of_ours(model).factors.values():
        nn.init.normal_(B, std=0.12 * len(A) ** -0.5 / config.scaling)
    return model


def make_batch(case: Case, plain: Any) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.images, 3, *plain.visual.image_size, generator=generator)
    classes = case.prompts or FEW_CLASSES
    labels = torch.randint(0, classes, (case.images,), generator=generator)
    if case.prompts:
        texts = [f"a photo of a {name}." for name in IMAGENET_CLASSNAMES[:classes]]
        prompts = open_clip.SimpleTokenizer(context_length=plain.context_length)(texts)
    else:
        features = torch.randn(classes, plain.visual.output_dim, generator=generator)
        prompts = F.normalize(features, dim=-1).to(DTYPE)
    return Batch(images.to(DEVICE, DTYPE), labels.to(DEVICE), prompts.to(DEVICE))


def loss_of(model: Any, images: Tensor, labels: Tensor, prompts: Tensor) -> Tensor:
    image = model.encode_image(images, normalize=True)  # [N, D]
    text = prompts if prompts.is_floating_point() else model.encode_text(prompts, normalize=True)  # [C, D]
    wide = torch.promote_types(image.dtype, torch.float32)
    logits = model.logit_scale.exp().to(wide) * image.to(wide) @ text.to(wide).mT  # [N, C]
    return F.cross_entropy(logits, labels)


def make_step(trainee: Trainee, batch: Batch, *, compiled: bool = False) -> Callable[[], Tensor]:
    """One training step of a baseline; returns the loss."""
    parameters = trainee.parameters
    optimizer = make_optimizer(parameters) if parameters else None
    loss_function = torch.compile(loss_of) if compiled else loss_of

    def step() -> Tensor:
        for leaf in (*parameters, *trainee.inputs):
            leaf.grad = None
        loss = loss_function(trainee.model, *batch)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    return step


def make_graphed_step(trainee: Trainee, batch: Batch) -> Callable[[], Tensor]:
    """Ours as one CUDA graph. The prompts are no part of the batch: they are the same in all of a training."""
    images, labels, prompts = batch

    def loss(model: Any, images: Tensor, labels: Tensor) -> Tensor:
        return loss_of(model, images, labels, prompts)

    optimizer = make_optimizer(trainee.parameters)
    step = ck.GraphedTrainStep(trainee.model, loss, optimizer, (images, labels), graph=ON_GPU)
    return lambda: step(images, labels)


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    rate = torch.zeros((), device=DEVICE)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2, fused=True, capturable=ON_GPU)


CASES = GPU_CASES if ON_GPU else CPU_CASES


@pytest.mark.parametrize("case", CASES, ids=[f"case-{n}, {case}" for n, case in enumerate(CASES, 1)])
def test_step(comparison, checkouts, extra, compiled, case):
    names = [*compared(case, checkouts), *(case.extra if extra else ())]
    compiling = [name for name in names if BASELINES[name].compiled and compiled != "without"]
    others = [] if compiled == "only" else [name for name in names if not BASELINES[name].compiled]
    if comparison.known(str(case), [OURS, *others, *compiling]):
        return
    torch.compiler.reset()
    plain = make_plain(case.model)
    ours = make_ours(plain, case.config)
    weights, batch = baselines.adapters(ours), make_batch(case, plain)
    truth, work = true_results(case, plain, weights, batch)
    given = {"case": case, "plain": plain, "ours": ours, "weights": weights, "batch": batch, "truth": truth}
    make = partial(prepare, **given, checkouts=checkouts)
    # Compiling takes minutes: what else there is has its rows before it begins.
    if compiled != "only":
        time_all(comparison, case, make, [OURS, *others], work)
    if compiling:
        time_all(comparison, case, make, [OURS, *compiling], work, again=[OURS])


def time_all(
    comparison: Comparison,
    case: Case,
    make: Callable[[str], Step],
    names: Collection[str],
    work: Mapping[str, Work],
    again: Collection[str] = (),
) -> None:
    """Prepares baselines and times them in turns; those of `again` have their rows."""
    theirs, steps = [name for name in names if name in BASELINES and BASELINES[name].checkout], {}
    for name in names:
        prepared = comparison.attempt(str(case), name, partial(make, name), foreign=name in theirs, again=name in again)
        if prepared is not None:
            steps[name] = prepared
    free_memory()
    comparison.time(
        str(case),
        steps,
        ours=OURS,
        work=work["adapted"],
        floors={name: work["frozen"] for name in names if FLOOR in remark(name, case) and "frozen" in work},
        remarks={name: remark(name, case) for name in names},
        targets=case.baselines,
        warm_up=None if ON_GPU else 0,  # on a CPU the checked step was a warm-up
        foreign=theirs,
        again=again,
    )


def remark(name: str, case: Case) -> str:
    """What is known of a baseline in a case; ours has nothing to hide."""
    baseline = BASELINES.get(name, Baseline(None))
    theirs = baseline.make is not None and not name.startswith("ours")
    whole = case.prompts and theirs and not baseline.cut and FLOOR not in baseline.remark
    return "; ".join(filter(None, [baseline.remark, WHOLE if whole else ""]))


def compared(case: Case, checkouts: Mapping[str, Path | None]) -> list[str]:
    """The baselines of a case; on a CPU not both somebody's code and our copy of it."""
    given = [BASELINES[name] for name in case.baselines if checkouts.get(BASELINES[name].checkout) is not None]
    copies = [] if ON_GPU else [baseline.copy for baseline in given]
    return [name for name in case.baselines if name not in copies]


def prepare(
    name: str,
    case: Case,
    plain: Any,
    ours: Any,
    weights: dict[str, baselines.Adapter],
    batch: Batch,
    truth: dict[str, dict[str, Tensor]],
    checkouts: Mapping[str, Path | None],
) -> Callable[[], Tensor]:
    """The step of a baseline, whose results are right."""
    baseline = BASELINES.get(name, Baseline(None, graphed=case.graphed))
    trainee = make_trainee(name, case, plain, ours, weights, checkouts)
    own_batch = cut(trainee.model, batch) if baseline.cut else batch
    step = planned(baseline.plan, make_step(trainee, own_batch, compiled=baseline.compiled))
    with without_dropout(trainee) if case.lora_dropout else contextlib.nullcontext():
        with a_row_where("compiled") if baseline.compiled else contextlib.nullcontext():
            loss = step()
        check(name, trainee, loss, weights, truth)
    if baseline.graphed and baseline.make is None:
        step = planned(baseline.plan, partial(make_graphed_step, trainee, own_batch))()
    elif baseline.graphed:
        with a_row_where("captured"):
            step = baselines.graphed(step)
    if case.lora_dropout:
        check_dropout(name, step, truth)
    elif baseline.graphed:
        check(name, trainee, step(), weights, truth)
    return step


def planned(plan: plans.Plan | None, run: Callable[[], Made]) -> Callable[[], Made]:
    """What runs ours by a plan of the baseline's, if it has one."""
    if plan is None:
        return run

    def by_plan() -> Made:
        with plans.override(plan):
            return run()

    return by_plan


@contextlib.contextmanager
def a_row_where(done: str) -> Iterator[None]:
    """A baseline that cannot be compiled, or captured, is a row that says so; one with wrong results fails the run."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Missing(f"cannot be {done}: {reason(error)}") from error


def make_trainee(
    name: str,
    case: Case,
    plain: Any,
    ours: Any,
    weights: dict[str, baselines.Adapter],
    checkouts: Mapping[str, Path | None],
) -> Trainee:
    baseline = BASELINES.get(name, Baseline(None))
    if baseline.make is None:
        trainee = baselines.of_ours(copy.deepcopy(ours))
        set_recompute(trainee.model, baseline.recompute)
    elif baseline.checkout:
        trainee = baseline.make(needed(baseline.checkout, checkouts), plain, weights, case.config)
    else:
        trainee = baseline.make(plain, weights, case.config)
    trainee.model.train()
    return trainee


@contextlib.contextmanager
def without_dropout(trainee: Trainee) -> Iterator[None]:
    """Random masks cannot be compared: a step without them is checked, with the layers that drop otherwise.

    Where there are none, a step is checked, and compiled, as it is timed: in training.
    """
    dropouts = [module for module in trainee.model.modules() if isinstance(module, nn.Dropout)]
    rates = [module.p for module in dropouts]
    trainee.model.train(trainee.merges)
    for module in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate
        trainee.model.train()


def cut(model: Any, batch: Batch) -> Batch:
    """The model and its prompts cut by hand, to the length that ours works on."""
    length = -(-int(batch.prompts.argmax(-1).max() + 1) // 8) * 8
    baselines.cut_context(model, length)
    return batch._replace(prompts=batch.prompts[:, :length].contiguous())


def true_results(
    case: Case, plain: nn.Module, weights: dict[str, baselines.Adapter], batch: Batch
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Work]]:
    """Losses and gradients in a wider dtype: of folded factors in plain torch, and of open_clip's own frozen model.

    With the operations that each took in its products, prompts cut: those of a step.
    """
    wide = torch.float64 if torch.float32 == DTYPE else torch.float32
    images, labels, prompts = batch
    prompts = prompts.to(wide) if prompts.is_floating_point() else prompts
    batch = Batch(images.to(wide), labels, prompts)
    model = copy.deepcopy(plain).to(wide)
    folded = baselines.by_linear(baselines.FoldedLinear, model, weights, case.config)
    folded.model.eval()
    step = make_step(folded, cut(folded.model, batch) if case.prompts else batch)
    with FlopCounterMode(display=False) as counter:
        truth = {"adapted": results(folded, step(), {})}
    work = {"adapted": Work(counter.get_total_flops(), 0)}
    if any("frozen model" in name for name in (*case.baselines, *case.extra)):
        untrained = Trainee(model, {}, inputs=baselines.block_inputs(model))
        with FlopCounterMode(display=False) as counter:
            truth["frozen"] = results(untrained, make_step(untrained, batch)(), {})
        work["frozen"] = Work(counter.get_total_flops(), 0)
    return truth, work


def results(trainee: Trainee, loss: Tensor, weights: dict[str, baselines.Adapter]) -> dict[str, Tensor]:
    """The loss and the gradients of a step, those of plain LoRA's B projected: they are then Comp-LoRA's."""
    found = {"loss": loss}
    for path, (A, B) in trainee.factors.items():
        assert A.grad is not None
        assert B.grad is not None
        found[f"{path}.A"] = A.grad
        found[f"{path}.B"] = weights[path].project(B.grad.double()) if trainee.plain else B.grad
    for x in trainee.inputs:
        assert x.grad is not None
        found["input of the blocks"] = x.grad
    return {name: result.double().clone() for name, result in found.items()}


def check(
    name: str,
    trainee: Trainee,
    loss: Tensor,
    weights: dict[str, baselines.Adapter],
    truth: dict[str, dict[str, Tensor]],
) -> None:
    mine, true = results(trainee, loss, weights), truth["adapted" if trainee.factors else "frozen"]
    assert mine.keys() == true.keys(), name
    if DTYPE.itemsize == 2:  # softmax makes the error of one small gradient a matter of luck
        mine, true = stacked(mine), stacked(true)
    for result, value in true.items():
        apart = (mine[result] - value).norm() / value.norm()
        assert apart <= TOLERANCE, f"{name}, {result}: {apart:.1e} apart"


def check_dropout(name: str, step: Step, truth: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Each of some steps, all of the same factors, draws its masks; in the mean their loss is that without dropout."""
    losses = [float(step()) for _ in range(4)]
    assert len(set(losses)) == 4, f"{name}: the losses {losses} have the same masks"
    true, error = float(truth["adapted"]["loss"]), statistics.stdev(losses) / 2
    # A loss is not linear in what is dropped: masks alone raise its mean a little.
    assert abs(statistics.mean(losses) - true) <= 6 * error + 0.1 * true, f"{name}: {losses}, without dropout {true}"


def stacked(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of all A as one vector, and those of all B."""
    kinds = {
        kind: [result.flatten() for name, result in results.items() if name.endswith(kind)] for kind in (".A", ".B")
    }
    others = {name: result for name, result in results.items() if not name.endswith((".A", ".B"))}
    return others | {kind: torch.cat(gradients) for kind, gradients in kinds.items() if gradients}
