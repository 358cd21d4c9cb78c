"""Calls that fail or are interrupted at any of their lines leave the model, or the files, as before or as after."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft_adapters import peft_model
from small_clip import adapted, config, small_clip
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import complora_kernels as ck
from complora_kernels.adapters.manage import load_raw_adapter_state, raw_adapter_state
from complora_kernels.common.changes import Changes
from complora_kernels.modules.layer import CompLoRALayer

PACKAGE = str(Path(ck.__file__).parent)
ALL = ("q", "k", "v", "o", "fc1", "fc2")
ERRORS = (KeyboardInterrupt, MemoryError)
MOST = 20  # places tried in a call, beside those in `changes.py`: any number may be tried, at 0.05 seconds each


# ---- faults


class Line(NamedTuple):
    """A line of the package, at the n-th time that it is reached."""

    file: str
    number: int
    n: int


@contextlib.contextmanager
def traced(reached: Callable[[str, int], None]) -> Iterator[None]:
    """Tells of every line of the package before it runs."""

    def in_package(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            reached(frame.f_code.co_filename, frame.f_lineno)
        return in_package

    outer = sys.gettrace()
    sys.settrace(lambda frame, *_: in_package if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        yield
    finally:
        sys.settrace(outer)


def lines_of(call: Callable[[], object]) -> list[Line]:
    """Every line that `call` reaches, at the first and at the last time."""
    times: defaultdict[tuple[str, int], int] = defaultdict(int)

    def reached(file: str, number: int) -> None:
        times[file, number] += 1

    with traced(reached):
        call()
    return [Line(*place, n) for place, last in times.items() for n in sorted({1, last})]


@contextlib.contextmanager
def fault_at_line(line: Line, error: type[BaseException]) -> Iterator[None]:
    times = itertools.count(1)

    def reached(file: str, number: int) -> None:
        if (file, number) == line[:2] and next(times) == line.n:
            raise error(str(line))

    with traced(reached):
        yield


class TorchCall(NamedTuple):
    """A function of torch, at the n-th time that it is called."""

    name: str
    n: int


class CountedCalls(TorchFunctionMode):
    """Counts the calls of torch's functions, and fails after one of them: what it wrote has been written."""

    def __init__(self, call: TorchCall | None = None, error: type[BaseException] = MemoryError) -> None:
        super().__init__()
        self.times: defaultdict[str, int] = defaultdict(int)
        self.call, self.error = call, error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        # Reading an attribute is no call, and what torch's contexts do to gradients they alone can undo.
        if "__get__" not in name and "set_grad_enabled" not in name:
            self.times[name] += 1
            if self.call == (name, self.times[name]):
                raise self.error(name)
        return result


def torch_calls_of(call: Callable[[], object]) -> list[TorchCall]:
    """Every function of torch that `call` uses, at the first and at the last time."""
    with CountedCalls() as counted:
        call()
    return [TorchCall(name, n) for name, last in counted.times.items() for n in sorted({1, last})]


def sample(places: list[Any], most: int = MOST) -> list[Any]:
    """All places in the code that makes changes, and `most` of the others, from the first to the last."""
    own = [place for place in places if isinstance(place, Line) and Path(place.file).name == "changes.py"]
    others = [place for place in places if place not in own]
    return own + others[:: -(-len(others) // most) or 1]


# ---- what is compared


def references(model: nn.Module) -> list[Any]:
    """All that makes up a model, by identity, and every bit of its tensors."""
    state: list[Any] = []
    for module in model.modules():
        state += [module, type(module), vars(module)]
        for name, value in vars(module).items():
            state += [name, value]
            if isinstance(value, dict):
                state += [part for item in value.items() for part in item]
            elif isinstance(value, (set, frozenset)):
                state += sorted(value, key=str)
    for tensor in (*model.parameters(), *model.buffers()):
        state += [tensor.data_ptr(), tensor.stride(), tensor.requires_grad, tensor.grad, bits(tensor)]
    return state


def same(one: list[Any], other: list[Any]) -> bool:
    plain = (str, bytes, int, float, bool, tuple, type(None))
    return len(one) == len(other) and all(
        a is b or (type(a) is type(b) and isinstance(a, plain) and a == b) for a, b in zip(one, other, strict=True)
    )


def contents(model: nn.Module) -> list[Any]:
    """The same without identities: equal for two models that were made in the same way."""
    state: list[Any] = []
    for path, module in model.named_modules():
        state += [path, type(module).__name__, sorted(vars(module))]
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                state += [getattr(hook, "__name__", hook) for hook in value.values()]
            elif isinstance(value, (bool, int, str, float)):
                state.append((name, value))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state.append((name, tensor.requires_grad, bits(tensor)))
    return state


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# ---- calls that change a model


def clip() -> Any:
    return small_clip(layers=1, width=8)


def adapted_clip() -> Any:
    return adapted(clip(), target_modules=ALL, subspace_k=3)


def merged_clip() -> Any:
    ck.merge_adapter(model := adapted_clip())
    return model


def linears() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 4)).train()


def apply(model: Any, _: Path) -> None:
    ck.apply_complora(model, config(target_modules=ALL, subspace_k=3), progress=False)


def calibrate(model: Any, _: Path) -> None:
    x = torch.linspace(-1, 1, 48).view(8, 6)
    settings = config(target_modules=r"\d", subspace_k=2, subspace_source="activations")
    ck.apply_complora(model, settings, calibrate=lambda model: model(x), progress=False)


def import_clip_lora(model: Any, folder: Path) -> None:
    path = folder / "lora_weights.pt"
    if not path.exists():
        pair = {"w_lora_A": torch.ones(2, 8), "w_lora_B": torch.ones(8, 2)}
        metadata = {"r": 2, "alpha": 1, "encoder": "both", "params": ["q", "v"], "position": "all"}
        weights = {f"layer_{i}": {"q_proj": pair, "v_proj": pair} for i in range(2)}
        torch.save({"metadata": metadata, "weights": weights}, path)
    ck.import_clip_lora(model, path, progress=False)


def import_peft(model: Any, folder: Path) -> None:
    if not (folder / "peft").exists():
        exported = adapted(clip(), seed=7, target_modules=("q", "k", "v", "fc1"), subspace_k=3)
        ck.export_peft(exported, folder / "peft")
    ck.import_peft(model, folder / "peft", projected=config(subspace_k=3), progress=False)


def peft_linears() -> Any:
    return peft_model(linears(), r=2, target_modules=["0", "2"])


def load(model: Any, folder: Path) -> None:
    if not (folder / "adapter").exists():
        ck.save_adapter(adapted(clip(), seed=7, target_modules=ALL, subspace_k=3), folder / "adapter")
    ck.load_adapter(model, folder / "adapter", progress=False)


def load_with_head(model: Any, folder: Path) -> None:
    if not (folder / "head").exists():
        settings = config(target_modules="0", subspace_k=2, modules_to_save="2")
        trained = ck.apply_complora(linears(), settings, progress=False)
        nn.init.ones_(trained[2].weight)
        ck.save_adapter(trained, folder / "head")
    ck.load_adapter(model, folder / "head", progress=False)


def two_adapters() -> Any:
    torch.manual_seed(3)
    ck.add_adapter(model := adapted_clip(), "b", config(r=3, target_modules=("v", "fc2"), subspace_k=2), progress=False)
    return model


def add(model: Any, _: Path) -> None:
    ck.add_adapter(model, "b", config(r=3, target_modules=ALL, subspace_k=2), progress=False)


def load_further(model: Any, folder: Path) -> None:
    if not (folder / "adapter").exists():
        ck.save_adapter(adapted(clip(), seed=7, target_modules=ALL, subspace_k=3), folder / "adapter")
    ck.load_adapter(model, folder / "adapter", adapter_name="b", progress=False)


def load_raw(model: Any, _: Path) -> None:
    load_raw_adapter_state(model, {name: tensor + 1 for name, tensor in raw_adapter_state(model).items()})


CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], None]]] = {
    "apply_complora": (clip, apply),
    "apply_complora, calibrated": (linears, calibrate),
    "import_clip_lora": (clip, import_clip_lora),
    "import_peft": (clip, import_peft),
    "accelerate_peft": (peft_linears, lambda model, _: ck.accelerate_peft(model)),
    "decelerate_peft": (lambda: ck.accelerate_peft(peft_linears()), lambda model, _: ck.decelerate_peft(model)),
    "load_adapter, plain": (clip, load),
    "load_adapter, adapted": (adapted_clip, load),
    "load_adapter, modules_to_save": (linears, load_with_head),
    "load_adapter, a further one": (lambda: adapted(clip(), target_modules=("q",), subspace_k=3), load_further),
    "add_adapter": (lambda: adapted(clip(), target_modules=("q", "fc1"), subspace_k=3), add),
    "set_adapter": (two_adapters, lambda model, _: ck.set_adapter(model, "b")),
    "set_adapter, a sum": (two_adapters, lambda model, _: ck.set_adapter(model, {"b": 0.5, "default": 0.5})),
    "delete_adapter": (two_adapters, lambda model, _: ck.delete_adapter(model, "b")),
    "load_raw_adapter_state": (adapted_clip, load_raw),
    "merge_adapter": (adapted_clip, lambda model, _: ck.merge_adapter(model)),
    "unmerge_adapter": (merged_clip, lambda model, _: ck.unmerge_adapter(model)),
    "unload": (adapted_clip, lambda model, _: ck.unload(model)),
    "unload, merged": (merged_clip, lambda model, _: ck.unload(model)),
    "merge_and_unload": (adapted_clip, lambda model, _: ck.merge_and_unload(model)),
    "set_recompute": (adapted_clip, lambda model, _: ck.set_recompute(model, "mlp")),
}


@pytest.mark.parametrize(("places_of", "fault_at"), [(lines_of, fault_at_line), (torch_calls_of, CountedCalls)])
@pytest.mark.parametrize("name", CALLS)
def test_a_fault_anywhere_leaves_the_model_as_before_or_as_after(tmp_path, name, places_of, fault_at):
    make, call = CALLS[name]

    def run(model: Any) -> None:
        torch.manual_seed(5)
        call(model, tmp_path)

    model = make()
    run(model)  # makes files, and fills caches
    after = contents(model)
    model = make()
    places = sample(places_of(lambda: run(model)))
    without_torch = ("set_recompute", "unload", "accelerate_peft", "decelerate_peft", "set_adapter", "delete_adapter")
    assert places or name in without_torch
    model, changed = make(), []
    before = references(model)
    for place, error in zip(places, itertools.cycle(ERRORS)):
        with contextlib.suppress(error, ValueError), fault_at(place, error):  # ValueError: the file cannot be read
            run(model)
        assert torch.is_grad_enabled(), place
        if same(references(model), before):
            continue
        if contents(model) != after:
            changed.append(place)
        model = make()
        before = references(model)
    assert changed == []


# ---- calls that change files, and contexts


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a fault leaves a file open
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("source", ["weight", "activations"])
def test_a_fault_while_saving_leaves_the_files_as_before_or_as_after(tmp_path, existing, source):
    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        x = torch.randn(8, 6)
        settings = config(target_modules=r"\d", subspace_k=2, subspace_source=source)
        runs: dict[str, Any] = {"calibrate": lambda model: model(x)} if source == "activations" else {}
        model = ck.apply_complora(linears(), settings, **runs, progress=False)
        for factor in ck.adapter_parameters(model):
            nn.init.constant_(factor, seed)
        return model

    def start(folder: Path) -> None:
        if existing:
            ck.save_adapter(old, folder / "a" / "b")

    old, new = model(1), model(2)
    (reference := tmp_path / "reference").mkdir()
    start(reference)
    before = files(reference)
    places = lines_of(lambda: ck.save_adapter(new, reference / "a" / "b"))
    after = files(reference)
    assert before != after
    last = [place for place in places if Path(place.file).name in ("files.py", "replacement.py")]
    assert len(last) > 60
    wrong = []
    for i, (place, error) in enumerate(zip(sample(last, 60), itertools.cycle(ERRORS))):
        (folder := tmp_path / str(i)).mkdir()
        start(folder)
        with contextlib.suppress(error), fault_at_line(place, error):
            ck.save_adapter(new, folder / "a" / "b")
        if files(folder) not in (before, after):
            wrong.append((place, files(folder).keys()))
    assert wrong == []


def files(folder: Path) -> dict[str, bytes | None]:
    """The contents of all files, and None for folders."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def test_a_fault_at_either_end_of_a_disabled_adapter_leaves_it_enabled():
    model = adapted_clip()
    layer = next(module for module in model.modules() if isinstance(module, CompLoRALayer))

    def run() -> None:
        with ck.disable_adapter(model):
            assert not layer.active

    for place, error in zip(lines_of(run), itertools.cycle(ERRORS)):
        with contextlib.suppress(error), fault_at_line(place, error):
            run()
        assert layer.active, place


# ---- one step


def test_changes_that_were_made_are_undone_when_another_is_refused():
    model = linears()
    before = references(model)
    changes = Changes()
    changes.exchange(model[0].weight, torch.zeros(5, 6))
    changes.copy([model[2].bias], [torch.zeros(4)])
    changes.set_attribute(model[2].weight, "requires_grad", False)
    changes.draft(model._modules).pop("1")
    changes.draft(vars(model))["note"] = "new"
    changes.set_buffer(model[0], "basis", torch.ones(1))
    changes.set_attribute(model[2].bias, "data", "no tensor")
    with pytest.raises(TypeError):
        changes.make()
    assert same(references(model), before)
