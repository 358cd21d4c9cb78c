"""Adapter files from elsewhere: whatever is in them is the saved function or a ValueError with the path of the file."""

import copy
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from clip_lora import clip_lora_file
from failures import Unchanged, refusal
from small_clip import adapted, features, small_clip
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import complora_kernels as ck
from complora_kernels.adapters import files as adapter_files
from complora_kernels.adapters.files import BASES_FILES, CONFIG_FILE, WEIGHTS_FILE, read_adapter, read_bases

X = torch.linspace(-1, 1, 60).reshape(5, 12)
WRONG = [None, [], {}, "x", -1, float("inf"), True, [[{"a": [None]}]], 10**30]


def plain() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 7))


def saved(directory: Path, source: str, **size: Any) -> nn.Module:
    model = plain()
    size = size or {"subspace_k": 3}
    config = ck.CompLoRAConfig(r=3, sides="both", target_modules=r"\d", subspace_source=source, **size)  # type: ignore[arg-type]
    inputs = torch.randn(64, 12)
    calibrate = (lambda model: model(inputs)) if source == "activations" else None
    ck.apply_complora(model, config, calibrate=calibrate, progress=False)
    for factor in ck.adapter_parameters(model):
        nn.init.normal_(factor, std=0.3)
    ck.save_adapter(model, directory)
    return model


@pytest.fixture(params=["weight", "activations"])
def adapter(request, tmp_path) -> tuple[Path, nn.Module]:
    return tmp_path / "saved", saved(tmp_path / "saved", request.param)


Change = Callable[[Any], Any]


def same(value: Any) -> Any:
    return value


@functools.cache
def contents(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The configuration, the factors and the bases of an adapter."""
    config, factors = read_adapter(directory)
    return config, factors, read_bases(directory, config) if "bases" in config["complora"] else {}


def rewritten(source: Path, target: Path, change: Change = same, tensors: Change = same, bases: Change = same) -> None:
    """The adapter with changes, and digests that are right again unless it is they that were changed."""
    original, factors, matrices = contents(source)
    config, factors, matrices = copy.deepcopy(original), tensors(dict(factors)), bases(dict(matrices))
    change(config)
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        path.unlink()
    saved = config.get("complora")
    known = saved if isinstance(saved, dict) else {}
    if matrices:
        digest = adapter_files.bases_digest(matrices)
        safetensors.torch.save_file(matrices, target / adapter_files.bases_file(digest), metadata={"format": "pt"})
        if known.get("bases_digest") == original["complora"]["bases_digest"]:
            known["bases_digest"] = digest
    factors = {name: tensor.contiguous() for name, tensor in factors.items()}
    if known.get("digest") == original["complora"]["digest"]:
        known["digest"] = adapter_files.adapter_digest(config, factors)
    adapter_files.write_files(target, config, factors, metadata={"adapter_config": json.dumps(config)})


def assert_refused_or_right(directory: Path, expected: Tensor, label: object, *, may_load: bool = True) -> None:
    model = plain()
    message = refusal(model, lambda: ck.load_adapter(model, directory, progress=False))
    if message is not None:
        assert str(directory) in message, label
        return
    assert may_load, label
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5, msg=f"{label}: another function")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a JSON value, and the first entry of each list."""
    if path:
        yield path
    keys = list(value) if isinstance(value, dict) else [0] if isinstance(value, list) and value else []
    for key in keys:
        yield from places(value[key], (*path, key))


def put(config: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


def removed(config: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        config = config[key]
    del config[path[-1]]


@torch.no_grad()
@pytest.mark.parametrize("source", ["weight", "activations"])
def test_every_value_of_the_configuration_may_be_a_lie(tmp_path, monkeypatch, source):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    directory, changed = tmp_path / "saved", tmp_path / "changed"
    expected = saved(directory, source)(X)
    config = read_adapter(directory)[0]
    every = list(places(config))
    for path in every:
        rewritten(directory, changed, lambda config: removed(config, path))  # noqa: B023
        assert_refused_or_right(changed, expected, (path, "removed"))
    own = [path for path in every if path[0] == "complora"]  # the rest is for PEFT
    assert len(own) > 25
    for path, value in itertools.product(own if source == "activations" else own[::6], WRONG):
        if (path[-1] == "use_rslora" and value is True) or (path[-1] == "lora_alpha" and value == 10**30):
            continue  # an adapter of another scaling
        rewritten(directory, changed, lambda config: put(config, path, value))  # noqa: B023
        assert_refused_or_right(changed, expected, (path, value))


LIES: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "type of the configuration": (("complora", "config"), None, "complora.config=None, expected an object"),
    "type of base weights": (("complora", "base_weights"), [], "complora.base_weights is a list, expected an object"),
    "type of a field": (("complora", "config", "use_rslora"), "x", "use_rslora='x', expected true or false"),
    "unknown field": (("complora", "config", "rank"), 3, "CompLoRAConfig fields=['rank'], expected fields that this"),
    "version": (("complora", "format_version"), "1", "complora.format_version='1', expected an integer"),
    "no version": (("complora", "format_version"), 0, "format_version=0, expected at least 1"),
    "rank for PEFT": (("r",), 77, "r=77 contradicts complora, expected 3"),
    "rank for PEFT of another type": (("r",), 3.0, "r=3.0 contradicts complora, expected 3"),
    "a flag as a number": (("use_rslora",), 0, "use_rslora=0 contradicts complora, expected False"),
    "modules for PEFT": (("target_modules",), ".*", "target_modules='.*' contradicts complora, expected '0|2'"),
    "scaling": (("complora", "config", "lora_alpha"), 1e308, "lora_alpha=8.0 contradicts complora, expected 1e+308"),
    "rank": (("complora", "config", "r"), 10**12, "r=3 contradicts complora, expected 1000000000000"),
    "subspace": (("complora", "config", "subspace_k"), 10**12, "subspace_k=1000000000000, expected at most min(out"),
    "no room": (("complora", "config", "subspace_k"), 6, "has rank 3, expected at most 1 beside k=6"),
    "norm": (("complora", "base_weights", "0", "norm"), 1e300, "other base weights: 0 is about"),
    "sketch": (("complora", "base_weights", "0", "sketch"), [0.5], "other base weights: 0 is about inf"),
    "dimensions": (("complora", "base_weights", "0", "shape"), [12], "base_weights.0.shape=[12], expected [out, in]"),
    "sizes": (("complora", "base_weights", "0", "shape"), [2, 16], "lora_A.weight has shape (3, 12), expected (3, 16)"),
}


@pytest.mark.parametrize(("path", "value", "message"), LIES.values(), ids=LIES)
def test_a_lie_is_named(tmp_path, path, value, message):
    saved(tmp_path / "saved", "weight")
    rewritten(tmp_path / "saved", tmp_path / "changed", lambda config: put(config, path, value))
    model = plain()
    with Unchanged(model), pytest.raises(ValueError) as error:  # noqa: PT011
        ck.load_adapter(model, tmp_path / "changed", progress=False)
    assert message in str(error.value)
    assert str(tmp_path / "changed") in str(error.value)


BASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "k": ({"k": 2}, {"subspace_k": 3}),
    "ratio": ({"k": 2}, {"subspace_ratio": 0.5}),
    "no share": ({"energy": 1.5}, {"subspace_k": 3}),
    "negative": ({"energy": -0.1}, {"subspace_k": 3}),
    "less energy": ({"energy": 0.49}, {"subspace_energy": 0.5}),
}


@pytest.mark.parametrize(("lie", "size"), BASES.values(), ids=BASES)
def test_a_lie_about_a_basis_is_named(tmp_path, lie, size):
    saved(tmp_path / "saved", "activations", **size)
    key, (name, value) = "0.input_basis", *lie.items()

    def change(config: dict[str, Any]) -> None:
        config["complora"]["bases"][key].update(lie)

    def shortened(bases: dict[str, Tensor]) -> dict[str, Tensor]:
        return bases | {key: bases[key][:, :2].contiguous()} if name == "k" else bases

    rewritten(tmp_path / "saved", tmp_path / "changed", change, bases=shortened)
    model = plain()
    with Unchanged(model), pytest.raises(ValueError, match=rf"complora\.bases\.{key}\.{name}={value}, expected"):
        ck.load_adapter(model, tmp_path / "changed", progress=False)


def test_further_entries_of_a_configuration_are_left_alone(tmp_path):
    expected = saved(tmp_path / "saved", "activations")(X)
    for path in [("more",), ("complora", "more"), ("complora", "bases", "0.input_basis", "more")]:
        rewritten(tmp_path / "saved", tmp_path / "changed", lambda config: put(config, path, 1))  # noqa: B023
        model = ck.load_adapter(plain(), tmp_path / "changed", progress=False)
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_a_basis_that_the_configuration_asks_for_is_missed(tmp_path):
    saved(tmp_path / "saved", "activations")

    def without(named: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in named.items() if key != "2.output_basis"}

    def change(config: dict[str, Any]) -> None:
        config["complora"]["bases"] = without(config["complora"]["bases"])

    rewritten(tmp_path / "saved", tmp_path / "changed", change, bases=without)
    model = plain()
    message = r"the file of the bases does not fit the model: missing 2\.output_basis, unexpected nothing"
    with Unchanged(model), pytest.raises(ValueError, match=message):
        ck.load_adapter(model, tmp_path / "changed", progress=False)


@pytest.mark.parametrize("pattern", ["nothing", "(", "(.+)+!"])
def test_a_regular_expression_of_a_file_is_neither_compiled_nor_matched(tmp_path, pattern):
    expected = saved(tmp_path / "saved", "weight")(X)
    change = ("complora", "config", "target_modules")
    rewritten(tmp_path / "saved", tmp_path / "changed", lambda config: put(config, change, pattern))
    model = ck.load_adapter(plain(), tmp_path / "changed", progress=False)
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    ck.save_adapter(model, tmp_path / "again")
    assert read_adapter(tmp_path / "again")[0]["complora"]["config"]["target_modules"] == pattern
    other = nn.Sequential(nn.Linear(12, 16))
    with (
        Unchanged(other),
        pytest.raises(ValueError, match="the model has no module for 2"),
    ):
        ck.load_adapter(other, tmp_path / "changed", progress=False)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made within."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def test_no_memory_is_taken_before_sizes_are_compared(tmp_path):
    r = 5000

    def change(config: Any) -> None:
        config["r"] = config["complora"]["config"]["r"] = r
        for described in config["complora"]["base_weights"].values():
            described["shape"] = [1, 1]

    def factors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros((r, 1) if "lora_A" in name else (1, r)) for name in tensors}

    saved(tmp_path / "saved", "weight")
    rewritten(tmp_path / "saved", tmp_path / "changed", change, factors)
    model = plain()
    with (
        Unchanged(model),
        Largest() as largest,
        pytest.raises(ValueError, match=r"0 has factors .*expected \(5000, 12\)"),
    ):
        ck.load_adapter(model, tmp_path / "changed", progress=False)
    assert largest.nbytes <= 4 * r
    clip = small_clip()
    weights = clip_lora_file(tmp_path / "w.pt")
    for layer in weights.values():
        for pair in layer.values():
            pair |= {"w_lora_A": torch.zeros(1).expand(r, 10**9), "w_lora_B": torch.zeros(1).expand(10**9, r)}
    metadata = {"r": r, "alpha": 1, "encoder": "both", "params": ["q", "k", "v"], "position": "all"}
    torch.save({"weights": weights, "metadata": metadata}, tmp_path / "w.pt")
    with Unchanged(clip), Largest() as largest, pytest.raises(ValueError, match=r"shapes \(5000, 1000000000\)"):
        ck.import_clip_lora(clip, tmp_path / "w.pt", progress=False)
    assert largest.nbytes <= 4 * r


TENSORS: dict[str, Change] = {
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "NaN": lambda t: t * float("nan"),
    "infinite": lambda t: t.fill_(float("inf")),
    "infinite in float32": lambda t: t.double() * 1e300,
    "transposed": lambda t: t.mT,
    "flat": lambda t: t.flatten(),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t.sum(),
    "larger": lambda t: torch.cat([t, t]),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors_of_other_dtypes_shapes_and_values(adapter, tmp_path, change):
    directory, model = adapter
    expected = model(X)
    holds_bases = "bases_digest" in (directory / CONFIG_FILE).read_text()
    for number, changes in enumerate([(change, same), (same, change)][: 1 + holds_bases]):
        on_factors, on_bases = (lambda tensors, change=each: with_first(tensors, change) for each in changes)
        rewritten(directory, tmp_path / str(number), tensors=on_factors, bases=on_bases)
        assert_refused_or_right(tmp_path / str(number), expected, number, may_load=False)


def test_an_update_that_is_not_finite_is_named(tmp_path):
    saved(tmp_path / "saved", "weight")
    broken = {"base_model.model.2.lora_B.weight": torch.full((7, 3), float("nan"))}
    rewritten(tmp_path / "saved", tmp_path / "changed", tensors=lambda tensors: tensors | broken)
    model = plain()
    with Unchanged(model), pytest.raises(ValueError, match="the update of 2 holds NaN or infinite values"):
        ck.load_adapter(model, tmp_path / "changed", progress=False)


def test_finite_factors_of_an_infinite_update(adapter, tmp_path):
    directory, model = adapter
    rewritten(directory, tmp_path / "changed", tensors=lambda t: {name: 1e25 * factor for name, factor in t.items()})
    assert_refused_or_right(tmp_path / "changed", model(X), "update", may_load=False)


def with_first(tensors: dict[str, Tensor], change: Change) -> dict[str, Tensor]:
    """The tensors, one of them changed."""
    name = min(tensors, default="")
    return tensors | {name: change(tensors[name].clone()).contiguous()} if tensors else tensors


@pytest.mark.parametrize(
    "change", [lambda b: 2 * b, lambda b: 0 * b, lambda b: b + 0.01], ids=["scaled", "zero", "moved"]
)
def test_bases_that_are_not_orthonormal(tmp_path, change):
    saved(tmp_path / "saved", "activations")
    rewritten(
        tmp_path / "saved", tmp_path / "changed", bases=lambda b: {name: change(basis) for name, basis in b.items()}
    )
    model = plain()
    with Unchanged(model), pytest.raises(ValueError, match=r"adapter_bases-\w+\.safetensors: .*orthonormal columns"):
        ck.load_adapter(model, tmp_path / "changed", progress=False)


def test_names_of_tensors(adapter, tmp_path):
    directory, model = adapter
    for number, change in enumerate(
        (lambda t: t | {"more": torch.zeros(1)}, lambda t: dict(list(t.items())[1:]), lambda _: {})
    ):
        rewritten(directory, tmp_path / str(number), tensors=change)
        assert_refused_or_right(tmp_path / str(number), model(X), number, may_load=False)


CONTENTS = {
    "empty": b"",
    "no JSON": b"hello",
    "no UTF-8": b"\xff\xfe\xfd",
    "deep": b"[" * 100_000,
    "deep, whole": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "list": b"[]",
    "null": b"null",
    "number": b"1e999",
    "long number": b'{"complora": ' + b"9" * 10_000 + b"}",
    "constant": b'{"complora": NaN}',
    "string": b'"complora"',
    "digest": b'{"complora": {"digest": null}}',
    "zeros": b"\0" * 1000,
    "header of a size": (2**62).to_bytes(8, "little") + b"{}",
    "header": (30).to_bytes(8, "little") + b'{"a": {"dtype": "X", "shape": ' + b"}",
}


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, BASES_FILES])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_any_content_of_a_file(tmp_path, content, name):
    saved(tmp_path, "activations")
    (path,) = tmp_path.glob(name)
    path.write_bytes(content)
    model = plain()
    with Unchanged(model), pytest.raises(ValueError, match=rf"{path.name}"):
        ck.load_adapter(model, tmp_path, progress=False)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, BASES_FILES])
def test_what_is_no_file_or_a_link_to_one(tmp_path, name):
    expected = saved(tmp_path / "saved", "activations")(X)
    (path,) = (tmp_path / "saved").glob(name)
    moved = path.rename(tmp_path / "moved")
    path.symlink_to(moved)  # caches of downloaded files are made of links
    torch.testing.assert_close(ck.load_adapter(plain(), path.parent, progress=False)(X), expected, rtol=1e-5, atol=1e-5)
    for make in (path.mkdir, lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path)):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        model = plain()
        with Unchanged(model), pytest.raises(ValueError, match=f"{path.name} is no regular file"):
            ck.load_adapter(model, path.parent, progress=False)


def test_a_configuration_of_a_gigabyte_is_not_read(tmp_path):
    saved(tmp_path, "weight")
    os.truncate(tmp_path / CONFIG_FILE, 2**30)  # takes no room on the disk
    model = plain()
    with Unchanged(model), pytest.raises(ValueError, match=rf"{CONFIG_FILE}: expected JSON .*more than 16777216 bytes"):
        ck.load_adapter(model, tmp_path, progress=False)


def test_the_name_of_the_file_of_bases_stays_in_the_folder(tmp_path):
    saved(tmp_path / "saved", "activations")
    path = ("complora", "bases_digest")
    rewritten(tmp_path / "saved", tmp_path / "changed", lambda config: put(config, path, "/../../x" + 56 * "0"))
    with pytest.raises(ValueError, match=r"bases_digest='/\.\./.*, expected 64 hexadecimal digits"):
        ck.load_adapter(plain(), tmp_path / "changed", progress=False)


# ---- CLIP-LoRA's file


def test_every_value_of_a_clip_lora_file_may_be_a_lie(tmp_path):
    path = tmp_path / "w.pt"
    clip_lora_file(path, layers=1)
    content = torch.load(path, weights_only=True)
    expected = features(ck.import_clip_lora(small_clip(layers=1), path, progress=False))
    places_of = [place for place in places(content) if place[:1] == ("metadata",) or len(place) == 1]
    places_of += [
        ("weights", "layer_0"),
        ("weights", "layer_0", "q_proj"),
        ("weights", "layer_0", "q_proj", "w_lora_A"),
    ]
    tensor = content["weights"]["layer_0"]["q_proj"]["w_lora_A"]
    tensors = [change(tensor.clone()) for change in TENSORS.values()]
    tensors += [tensor.to_sparse(), tensor.to(torch.complex64), tensor.to("meta"), nn.Parameter(tensor), tensor.half()]
    for place in places_of:
        for value in (*WRONG, {1: 2}, (), *(tensors if place[-1] == "w_lora_A" else ())):
            if place[-1] == "alpha" and value == 10**30:
                continue  # another scaling
            changed = copy.deepcopy(content)
            put(changed, place, value)
            torch.save(changed, path)
            model = small_clip(layers=1)
            message = refusal(model, lambda model=model: ck.import_clip_lora(model, path, progress=False))
            if message is not None:
                assert str(path) in message, (place, value)
                continue
            assert isinstance(value, Tensor), (place, value)
            assert (features(model) - expected).norm() < 1e-3 * expected.norm(), (place, value)


def test_a_clip_lora_file_that_is_no_file(tmp_path):
    for number, make in enumerate((Path.mkdir, lambda path: path.symlink_to("/dev/zero"), os.mkfifo)):
        path = tmp_path / str(number)
        make(path)
        with pytest.raises(ValueError, match=f"{path} is no regular file, expected CLIP-LoRA's"):
            ck.import_clip_lora(small_clip(), path)


def test_the_files_of_an_adapter_of_attention(tmp_path):
    """Names, towers and layers of a model whose parts are known by their names."""
    ck.save_adapter(adapted(small_clip(layers=1), layers=(0,)), tmp_path / "saved")
    lies: dict[str, list[Any]] = {
        "towers": [["image"], ["audio"], [], ["image", "image"]],
        "layers": [[1], [10**30], [[0]], [True]],
        "target_modules": [["q"], ["q", "k", "v", "o"], ".*", ["x"], [["q"]]],
    }
    for key, value in ((key, value) for key, values in lies.items() for value in values):
        path = ("complora", "config", key)
        rewritten(tmp_path / "saved", tmp_path / "changed", lambda config: put(config, path, value))  # noqa: B023
        model = small_clip(layers=1)
        with Unchanged(model), pytest.raises(ValueError, match=str(tmp_path / "changed")):
            ck.load_adapter(model, tmp_path / "changed", progress=False)
