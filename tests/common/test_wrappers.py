"""Models in wrappers and containers: what is saved, reported and adapted is the model inside, under its own names."""

import copy
from typing import Any

import pytest
import torch
from clip_lora import clip_lora_file
from failures import Unchanged, contents
from small_clip import adapted, assert_close, config, features, small_clip, updates
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.manage import named_adapter_parameters
from complora_kernels.common.wrappers import named_modules, unwrap


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def with_part(path: str, wrap: Any) -> Any:
    """A function that wraps one part of a model where it is."""

    def wrapped(model: Any) -> Any:
        model.set_submodule(path, wrap(model.get_submodule(path)))
        return model

    return wrapped


AROUND = {
    "compiled": compiled,
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "compiled DataParallel": lambda model: compiled(DataParallel(model)),
}
WITHIN = {
    "compiled tower": with_part("visual", compiled),
    "compiled transformer": with_part("transformer", compiled),
    "compiled block": with_part("visual.transformer.resblocks.1", compiled),
    "compiled mlp": with_part("transformer.resblocks.0.mlp", compiled),
    "checkpointed block": with_part("transformer.resblocks.0", checkpoint_wrapper),
    "tower in DataParallel": with_part("visual", DataParallel),
}
every_wrapper = pytest.mark.parametrize("wrap", (AROUND | WITHIN).values(), ids=AROUND | WITHIN)


class Container(nn.Module):
    """A container that holds a model as a LightningModule does."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.head = nn.Linear(16, 3).requires_grad_(False)


@pytest.fixture
def uncompiled():
    """Wrappers of torch.compile run what they wrap: compiling takes seconds, and is not what is tested."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def in_ddp(model: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(model)


@pytest.mark.usefixtures("uncompiled")
@every_wrapper
def test_a_wrapped_model_is_adapted_inside(wrap):
    plain = adapted(small_clip())
    model = wrap(small_clip())
    inner = unwrap(model)
    assert ck.apply_complora(model, config(), progress=False) is model
    assert adapted_layers(model).keys() == adapted_layers(plain).keys() == adapted_layers(inner).keys()
    state = dict(named_adapter_parameters(plain))
    with torch.no_grad():
        for name, factor in named_adapter_parameters(model):
            factor.copy_(state[name])
    assert_close(features(inner), features(plain), 1e-6)
    assert (features(plain) - features(small_clip())).norm() > 0.05 * features(plain).norm()
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.usefixtures("uncompiled")
@every_wrapper
def test_files_have_the_names_of_the_plain_model(tmp_path, wrap):
    plain = adapted(small_clip())
    ck.save_adapter(plain, tmp_path / "plain")
    ck.export_peft(plain, tmp_path / "peft")
    model = wrap(copy.deepcopy(plain))
    ck.save_adapter(model, tmp_path / "wrapped")
    ck.export_peft(model, tmp_path / "wrapped peft")
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "plain")
    assert contents(tmp_path / "wrapped peft") == contents(tmp_path / "peft")
    fresh, other = wrap(small_clip()), wrap(adapted(small_clip(), seed=4))
    for loaded in (fresh, other):
        assert ck.load_adapter(loaded, tmp_path / "plain", progress=False) is loaded
        for name, update in updates(plain).items():
            assert_close(updates(loaded)[name], update, 2e-6)  # rounding of a second fold


@pytest.mark.usefixtures("uncompiled")
@every_wrapper
def test_every_function_sees_the_adapter_inside(wrap):
    plain = adapted(small_clip())
    model = wrap(copy.deepcopy(plain))
    inner = unwrap(model)
    assert [name for name, _ in named_adapter_parameters(model)] == [n for n, _ in named_adapter_parameters(plain)]
    assert all(map(torch.equal, ck.adapter_parameters(model), ck.adapter_parameters(plain)))
    assert ck.subspace_report(model) == ck.subspace_report(plain)
    with pytest.raises(RuntimeError, match=r"no gradient reached visual\.transformer\.resblocks\.0\.attn\.lora_A\.q"):
        ck.check_gradients(model)
    expected = features(small_clip())
    with ck.disable_adapter(model):
        assert_close(features(inner), expected, 1e-6)
    ck.merge_adapter(model)
    assert_close(features(inner), features(plain), 5e-6)  # the update is rounded into the weight
    ck.unmerge_adapter(model)
    ck.set_recompute(model, "mlp")
    assert_close(features(inner), features(plain), 1e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("wrap", [compiled, DataParallel, WITHIN["compiled tower"]], ids=["model", "parallel", "tower"])
def test_imports_into_a_wrapped_model(tmp_path, wrap):
    clip_lora_file(tmp_path / "w.pt")
    ck.export_peft(adapted(small_clip()), tmp_path / "peft")
    for load, source in ((ck.import_clip_lora, "w.pt"), (ck.import_peft, "peft")):
        model = wrap(small_clip())
        assert load(model, tmp_path / source, progress=False) is model
        expected = load(small_clip(), tmp_path / source, progress=False)
        assert_close(features(unwrap(model)), features(expected), 1e-6)


@pytest.mark.parametrize("wrap", [compiled, with_part("visual", compiled)], ids=["model", "tower"])
def test_calibration_of_a_model_that_has_run_compiled(wrap):
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"subspace_source": "activations", "towers": ("image",)}

    def calibrate(model: Any) -> None:
        model.encode_image(images)

    model = wrap(small_clip())
    model.encode_image(images)
    for each in (model, expected := small_clip()):
        ck.apply_complora(each, config(**options), calibrate=calibrate, progress=False)
    known = {name: basis for name, basis in named_buffers(expected).items() if "_basis" in name}
    for name, basis in known.items():
        assert torch.equal(named_buffers(model)[name], basis)
    assert len(known) == 2 * 3 * 2


def named_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": buffer
        for path, module in named_modules(model)
        for name, buffer in module.named_buffers(recurse=False)
    }


def test_compiled_code_from_before_is_not_used_after():
    images, x = torch.randn(2, 3, 16, 16), torch.randn(5, 8)
    net = compiled(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)))
    clip = with_part("visual", compiled)(small_clip(layers=1))
    cases: list[tuple[Any, Any, dict[str, Any]]] = [
        (net, lambda: net(x), {"target_modules": r"\d", "subspace_k": 2}),
        (clip, lambda: clip.encode_image(images), {"towers": ("image",)}),
    ]
    for model, run, options in cases:
        before = run()
        adapted(model, **options)
        after = run()
        with torch.compiler.set_stance("force_eager"):
            assert_close(after, run(), 1e-6)
        assert (after - before).norm() > 0.05 * before.norm()


@pytest.mark.usefixtures("process_group")
def test_a_model_is_adapted_before_ddp_wraps_it(tmp_path):
    plain = adapted(small_clip())
    ck.save_adapter(plain, tmp_path / "plain")
    ck.export_peft(plain, tmp_path / "peft")
    model = in_ddp(copy.deepcopy(plain))
    ck.save_adapter(model, tmp_path / "ddp")
    assert contents(tmp_path / "ddp") == contents(tmp_path / "plain")
    other = in_ddp(adapted(small_clip(), seed=4))
    ck.load_adapter(other, tmp_path / "plain", progress=False)
    assert_close(features(other.module), features(plain), 2e-6)

    clip_lora_file(tmp_path / "w.pt")
    unadapted = [in_ddp(small_clip()), compiled(in_ddp(small_clip())), Container(in_ddp(small_clip()))]
    unadapted.append(with_part("visual", in_ddp)(small_clip()))
    message = r"is inside a DistributedDataParallel, .* expected a model that is adapted first and wrapped then"
    for model in unadapted:
        with Unchanged(model), pytest.raises(ValueError, match=message):
            ck.load_adapter(model, tmp_path / "plain", progress=False)
        if not isinstance(model, Container):
            with Unchanged(model), pytest.raises(ValueError, match=message):
                ck.apply_complora(model, config(), progress=False)
            with Unchanged(model), pytest.raises(ValueError, match=message):
                ck.import_clip_lora(model, tmp_path / "w.pt", progress=False)
            with Unchanged(model), pytest.raises(ValueError, match=message):
                ck.import_peft(model, tmp_path / "peft", progress=False)
    parameters = list(ck.adapter_parameters(other))
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(ValueError, match=r"compiled DistributedDataParallel, .*DistributedDataParallel\(torch.compile"):
        ck.GraphedTrainStep(compiled(other), lambda *_: torch.zeros(()), optimizer, ())


@pytest.mark.parametrize("part", ["attn", "mlp.c_fc"])
def test_a_compiled_target_is_refused(part):
    model = with_part(f"visual.transformer.resblocks.0.{part}", compiled)(small_clip())
    with Unchanged(model), pytest.raises(ValueError, match=rf"visual\.transformer\.resblocks\.0\.{part} is a compiled"):
        ck.apply_complora(model, config(target_modules=("q", "fc1")), progress=False)
    if part == "mlp.c_fc":
        with Unchanged(model), pytest.raises(ValueError, match="is a compiled module, whose compiled code"):
            ck.apply_complora(model, config(target_modules=r".*\.c_fc"), progress=False)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, compiled, DataParallel], ids=["container", "compiled", "parallel"]
)
@pytest.mark.parametrize("options", [{}, {"target_modules": r".*\.c_fc"}], ids=["parts", "regex"])
def test_a_container_saves_and_loads_the_model_that_it_holds(tmp_path, wrap, options):
    plain = adapted(small_clip(), **options)
    ck.save_adapter(plain, tmp_path / "plain")
    ck.export_peft(plain, tmp_path / "peft")
    container = wrap(Container(copy.deepcopy(plain)))
    ck.save_adapter(container, tmp_path / "container")
    ck.export_peft(container, tmp_path / "exported")
    assert contents(tmp_path / "container") == contents(tmp_path / "plain")
    assert contents(tmp_path / "exported") == contents(tmp_path / "peft")
    for holder in (wrap(Container(small_clip())), wrap(Container(adapted(small_clip(), seed=4, **options)))):
        assert ck.load_adapter(holder, tmp_path / "container", progress=False) is holder
        inner: Any = unwrap(holder)
        assert_close(features(inner.clip), features(plain), 2e-6)
        assert not inner.head.weight.requires_grad


def test_what_holds_no_one_model_is_refused(tmp_path):
    plain = adapted(small_clip())
    ck.save_adapter(plain, tmp_path / "plain")
    two = nn.ModuleDict({"teacher": adapted(small_clip()), "student": adapted(small_clip(), seed=4)})
    for save in (ck.save_adapter, ck.export_peft):
        with pytest.raises(ValueError, match="student, teacher have an adapter each: expected one of these parts"):
            save(two, tmp_path / "new")
        with pytest.raises(ValueError, match=r"was adapted as visual\.transformer.*: expected the whole model"):
            save(plain.visual, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    unadapted = nn.ModuleDict({"teacher": small_clip(), "student": small_clip()})
    with Unchanged(unadapted), pytest.raises(ValueError, match="the adapter fits student, teacher alike, expected one"):
        ck.load_adapter(unadapted, tmp_path / "plain", progress=False)
    container = Container(small_clip())
    with (
        Unchanged(container),
        pytest.raises(ValueError, match="the model has none, its part clip has towers: pass that"),
    ):
        ck.apply_complora(container, config(), progress=False)


# What is trained beside the adapters.


def test_what_is_trained_beside_the_adapter_is_named_when_it_is_saved(tmp_path):
    model = Container(adapted(small_clip()))
    model.head.requires_grad_(True)
    model.clip.logit_scale.requires_grad_(True)
    message = "clip.logit_scale, head.bias, head.weight require a gradient and are no part of the adapter"
    for save in (ck.save_adapter, ck.export_peft):
        with pytest.raises(UserWarning, match=message):  # a warning that is made an error leaves no files
            save(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        with pytest.warns(UserWarning, match=message) as warned:
            save(model, tmp_path / save.__name__)
        assert [warning.filename for warning in warned] == [__file__]
    assert_close(
        features(ck.load_adapter(small_clip(), tmp_path / "save_adapter", progress=False)), features(model.clip), 2e-6
    )


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize(
    ("layer", "parameter"), [("attn", "in_proj_{}"), ("attn", "out_proj.{}"), ("mlp.c_fc", "{}"), ("mlp.c_proj", "{}")]
)
def test_an_adapted_module_that_is_unfrozen_is_named(layer, parameter, kind):
    model = adapted(small_clip(), target_modules=("q", "o", "fc1", "fc2"))
    path = f"visual.transformer.resblocks.1.{layer}"
    model.get_submodule(path).get_parameter(parameter.format(kind)).requires_grad_(True)
    images = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=rf"^{path}: {kind}\.requires_grad=True, expected a frozen {kind}"):
        model.encode_image(images)
    with torch.no_grad():
        model.encode_image(images)
    ck.merge_adapter(model)
    model.encode_image(images)
