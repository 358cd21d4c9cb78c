"""A training step in one CUDA graph does what an eager one does, bit for bit, and says where it cannot.

Where there is no GPU, graphs are those of `cuda_graph_on_cpu`; where there is one, all of this runs on it too.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_parallel
import pytest
import torch
from cuda_graph_on_cpu import CUDAGraphsOnCPU, cuda_graphs_on_cpu
from failures import Unchanged
from process_group import process_group
from small_clip import adapted, small_clip
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from triton_device import DEVICE

import complora_kernels as ck
from complora_kernels import graphs

STEPS = 50


@pytest.fixture(params=["emulated", "cuda"] if torch.cuda.is_available() else ["emulated"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where graphs can be captured."""
    with cuda_graphs_on_cpu() if request.param == "emulated" else contextlib.nullcontext():
        yield "cpu" if request.param == "emulated" else "cuda"


def make(
    device: str, dropout: float = 0.0, towers: tuple[str, ...] = ("image",), **options: Any
) -> tuple[Any, torch.optim.AdamW]:
    """A small CLIP in training and its optimizer; the same at every call."""
    model = adapted(small_clip(), lora_dropout=dropout, towers=towers).train().to(device)
    return model, adamw(model, device, **options)


def adamw(model: nn.Module, device: str, **options: Any) -> torch.optim.AdamW:
    defaults: dict[str, Any] = {"lr": torch.tensor(1e-2, device=device), "capturable": True, "fused": True}
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **(defaults | options))


def batches(number: int, device: str, size: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 3, 16, 16, generator=generator, dtype=dtype).to(device) for _ in range(number)]


def loss(model: Any, images: Tensor) -> Tensor:
    return (model.encode_image(images) - 1).square().mean()


def cosine(step: Tensor) -> Tensor:
    return 5e-3 * (1 + torch.cos(torch.pi * step / STEPS))


def trained(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def train(
    step: Callable[..., Tensor], inputs: list[Tensor], after: Callable[[], object] = lambda: None
) -> list[Tensor]:
    torch.manual_seed(7)  # dropout's
    losses = []
    for images in inputs:
        losses.append(step(images))
        after()
    return losses


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# ---- what eager steps do


@pytest.mark.parametrize("schedule", [None, cosine])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_fifty_steps_have_the_losses_and_parameters_of_eager_ones_bit_for_bit(dropout, schedule, device):
    inputs, runs = batches(STEPS, device), []
    for graph in (False, True):
        model, optimizer = make(device, dropout)
        step = ck.GraphedTrainStep(model, loss, optimizer, (inputs[-1],), schedule=schedule, graph=graph)
        runs.append((train(step, inputs), trained(model), optimizer.param_groups[0]["lr"].clone()))
    assert_equal(runs[1], runs[0])
    assert runs[0][0][-1] < 0.5 * runs[0][0][0]


def test_eager_steps_are_those_of_a_plain_loop():
    inputs = batches(5, "cpu")
    model, _ = make("cpu")
    plain = copy.deepcopy(model)
    step = ck.GraphedTrainStep(model, loss, torch.optim.AdamW(ck.adapter_parameters(model), 1e-2), (inputs[0],))
    losses, optimizer = train(step, inputs), torch.optim.AdamW(ck.adapter_parameters(plain), 1e-2)
    for images, value in zip(inputs, losses, strict=True):
        optimizer.zero_grad()
        expected = loss(plain, images)
        expected.backward()
        optimizer.step()
        assert_equal(value, expected.detach())
    assert_equal(trained(model), trained(plain))


def test_without_a_gpu_any_optimizer_steps_at_a_scheduled_rate():
    model, _ = make("cpu")
    optimizer = torch.optim.SGD(ck.adapter_parameters(model), 1.0)
    step = ck.GraphedTrainStep(model, loss, optimizer, (batches(1, "cpu")[0],), schedule=lambda t: 0.5 / (t + 1))
    train(step, batches(4, "cpu"))
    assert optimizer.param_groups[0]["lr"] == 0.125
    step.capture(*batches(1, "cpu", size=5))  # nothing to do


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_scheduler_of_torch_may_be_stepped_between_the_calls(when, device):
    inputs, runs = batches(6, device), []
    for graph in (False, True):
        model, optimizer = make(device)
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)] if when == "before" else []
        step = ck.GraphedTrainStep(model, loss, optimizer, (inputs[-1],), graph=graph)
        schedulers = schedulers or [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]
        losses = train(step, inputs, schedulers[0].step)
        runs.append((losses, trained(model), optimizer.param_groups[0]["lr"].clone()))
    assert_equal(runs[1], runs[0])
    assert_equal(runs[0][2].cpu(), torch.tensor(1.25e-3))


def test_every_replay_draws_new_dropout_masks(device):
    model, optimizer = make(device, 0.25, lr=torch.tensor(0.0, device=device))
    (images,) = batches(1, device)
    step = ck.GraphedTrainStep(model, loss, optimizer, (images,), graph=True)
    assert len({float(step(images)) for _ in range(4)}) == 4
    assert_equal(train(step, [images] * 3), train(step, [images] * 3))  # each after the same manual_seed


def test_gradients_after_replays_with_changing_data_are_the_slopes_of_the_loss(device):
    model = adapted(small_clip().double(), towers=("image",)).train().to(device)
    inputs = batches(4, device, dtype=torch.float64)
    step = ck.GraphedTrainStep(model, loss, adamw(model, device), (inputs[-1],), graph=True)
    probe = copy.deepcopy(model)
    for images in inputs:
        before = trained(model)
        step(images)
        directions = [torch.randn_like(p) for p in before]
        values = []
        for distance in (1e-5, -1e-5):
            with torch.no_grad():
                moved = [p + distance * d for p, d in zip(before, directions, strict=True)]
                for p, value in zip(ck.adapter_parameters(probe), moved, strict=True):
                    p.copy_(value)
                values.append(loss(probe, images))
        grads: list[Any] = [p.grad for p in ck.adapter_parameters(model)]
        slope = sum(float((grad * d).sum()) for grad, d in zip(grads, directions, strict=True))
        # The third derivative leaves 1e-10 of the slope, and rounding of the loss, 1e-16 / 1e-5, 1e-11.
        assert slope == pytest.approx(float(values[0] - values[1]) / 2e-5, rel=1e-6)


def test_a_parameter_that_the_loss_does_not_reach_stays_as_it_is(device):
    model, optimizer = make(device, towers=("image", "text"))
    before, inputs = trained(model), batches(2, device)
    train(ck.GraphedTrainStep(model, loss, optimizer, (inputs[0],), graph=True), inputs)
    for (name, p), value in zip([n for n in model.named_parameters() if n[1].requires_grad], before, strict=True):
        assert torch.equal(p, value) is (p.grad is None) is not name.startswith("visual")


def test_the_loss_is_detached_and_stays(device):
    model, optimizer = make(device)
    inputs = batches(2, device)
    step = ck.GraphedTrainStep(model, loss, optimizer, (inputs[0],), graph=True)
    first = step(inputs[0])
    kept = first.clone()
    assert not torch.equal(step(inputs[1]), kept)
    assert_equal(first, kept)
    assert first.dim() == 0
    assert not first.requires_grad


def test_training_goes_on_where_a_counter_is_set(device):
    inputs, (model, optimizer) = batches(4, device), make(device)
    step = ck.GraphedTrainStep(model, loss, optimizer, (inputs[0],), schedule=cosine, graph=True)
    step.counter.fill_(STEPS)
    step(inputs[0])
    assert float(optimizer.param_groups[0]["lr"]) == 0


def test_a_state_loaded_into_the_optimizer_is_trained_on(device):
    inputs, runs = batches(6, device), []
    for graph in (False, True):
        model, optimizer = make(device)
        step = ck.GraphedTrainStep(model, loss, optimizer, (inputs[-1],), graph=graph)
        train(step, inputs[:3])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(step, inputs[3:5])
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        runs.append((train(step, inputs[3:]), trained(model)))
    assert_equal(runs[1], runs[0])


# ---- loss scaling


def test_a_scaled_loss_trains_as_eagerly_and_skips_steps_with_infinite_gradients(device):
    inputs, runs = batches(8, device), []
    inputs[3] = inputs[3] * 1e30  # its square is infinite
    for graph in (False, True):
        model, optimizer = make(device)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=3)
        step = ck.GraphedTrainStep(model, loss, optimizer, (inputs[0],), scaler=scaler, graph=graph)
        assert scaler.get_scale() == 2**10
        train(step, inputs[:3])
        before = trained(model)
        step(inputs[3])
        assert_equal(trained(model), before)
        runs.append((train(step, inputs[4:]), trained(model), scaler.get_scale()))
    assert_equal(runs[1], runs[0])
    assert runs[0][2] == 2**11  # grown, halved, grown


# ---- several shapes, and what has no graph


def test_a_shape_without_a_graph_runs_eagerly_and_is_named_once(device):
    small, large = batches(3, device), batches(3, device, size=5)
    runs = []
    for graph in (False, True):
        model, optimizer = make(device)
        step = ck.GraphedTrainStep(model, loss, optimizer, (small[0],), graph=graph)
        losses = [step(small[0])]
        said = r"a batch of \(float32 \[5, 3, 16, 16\]\).* Graphs are for \(float32 \[3, 3, 16, 16\]\)"
        with pytest.warns(UserWarning, match=said) if graph else contextlib.nullcontext():
            losses += [step(large[0])]
        losses += [step(large[1]), step(small[1]), step(batches(1, device, size=2)[0])]
        runs.append((losses, trained(model)))
    assert_equal(runs[1], runs[0])


def test_several_shapes_keep_several_graphs(device):
    small, large = batches(3, device), batches(3, device, size=5)
    runs = []
    for graph in (False, True):
        model, optimizer = make(device, 0.25)
        step = ck.GraphedTrainStep(model, loss, optimizer, (small[0],), schedule=cosine, graph=graph)
        step.capture(large[0])
        results = []
        torch.manual_seed(7)
        for images in (small[0], large[0], large[1], small[1], large[2], small[2]):
            results += [step(images), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
        runs.append((results, trained(model)))
    assert_equal(runs[1], runs[0])


def test_a_failed_capture_changes_nothing_and_falls_back_once(device):
    inputs, runs = batches(4, device), []

    def reading(model: Any, images: Tensor) -> Tensor:
        value = loss(model, images)
        return value * (1 if value.item() > 0 else 2)

    for graph in (False, "auto"):
        model, optimizer = make(device, 0.25)
        said = r"step of \(float32 \[3, 3, 16, 16\]\) could not be captured.*runs eagerly: .*capturing"
        with Unchanged(model), pytest.warns(UserWarning, match=said) if graph else contextlib.nullcontext():
            step = ck.GraphedTrainStep(model, reading, optimizer, (inputs[0],), graph=graph)
        runs.append((train(step, inputs), trained(model)))
    assert_equal(runs[1], runs[0])
    with pytest.raises(RuntimeError, match=r"\(float32 \[3, 3, 16, 16\]\) could not be captured: .*capturing"):
        ck.GraphedTrainStep(model, reading, optimizer, (inputs[0],), graph=True)


@pytest.mark.usefixtures("torch_backend")
def test_dropout_of_the_torch_backend_cannot_be_captured(device):
    model, optimizer = make(device, 0.25)
    with pytest.warns(UserWarning, match="could not be captured"):
        step = ck.GraphedTrainStep(model, loss, optimizer, tuple(batches(1, device)))
    assert train(step, batches(2, device))[1].isfinite()


def test_texts_that_are_longer_than_those_of_the_capture_are_read_to_their_ends(device):
    def of_texts(model: Any, texts: Tensor) -> Tensor:
        return model.encode_text(texts).square().mean()

    texts = torch.ones(2, 3, 24, dtype=torch.int64, device=device)
    texts[0, :, 4] = 19  # ids of 19 end a text
    texts[1, :, 20] = 19
    losses = []
    for graph in (False, True):
        model = adapted(small_clip(context_length=24), towers=("text",)).to(device)
        step = ck.GraphedTrainStep(model, of_texts, adamw(model, device), (texts[0],), graph=graph)
        losses.append(torch.stack([step(texts[1]), step(texts[0])]))
    # The graph computes all positions, the eager step those up to the ends: rounding of 6e-8 in other sums.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


# ---- constructing a step


@pytest.mark.parametrize("trained_before", [False, True])
def test_to_make_a_step_changes_nothing(trained_before, device):
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).to(device)
    optimizer, scaler = adamw(net, device), torch.amp.GradScaler(device, init_scale=4.0)
    (images,) = batches(1, device)

    def squares(model: Any, images: Tensor) -> Tensor:
        return model(images).square().mean()

    if trained_before:
        scaler.scale(squares(net, images)).backward()
        scaler.step(optimizer)
        scaler.update()
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()]
    state, scale, images_before = copy.deepcopy(optimizer.state_dict()), scaler.state_dict(), images.clone()
    random = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    with Unchanged(net):
        step = ck.GraphedTrainStep(net, squares, optimizer, (images,), schedule=cosine, scaler=scaler, graph=True)
    assert_equal((torch.get_rng_state(), torch.cuda.get_rng_state_all()), random)
    assert_equal(images, images_before)
    assert float(step.counter) == 0
    assert scaler.state_dict() == scale
    for p, (grad, values) in zip(net.parameters(), grads, strict=True):
        assert p.grad is grad
        assert_equal(p.grad, values)
    after = optimizer.state_dict()
    assert_equal(after["param_groups"], state["param_groups"])
    if trained_before:
        assert_equal(after["state"], state["state"])
    else:
        assert all(not value.any() for values in after["state"].values() for value in values.values())


def test_memory_of_a_cache_is_kept_by_the_graph_that_reads_it(monkeypatch):
    from complora_kernels.kernels import factors

    monkeypatch.setenv("COMPLORA_BACKEND", "triton")
    factors.LAYOUTS.clear()
    made, make = [], factors.fold_programs

    def remember(*arguments):
        programs = make(*arguments)
        made.extend(weakref.ref(table) for table in (programs.coordinates, programs.projections))
        return programs

    monkeypatch.setattr(factors, "fold_programs", remember)
    config = ck.CompLoRAConfig(r=2, subspace_k=3)
    model = ck.CompLoRALinear.from_linear(nn.Linear(16, 16).requires_grad_(False), config).to(DEVICE)
    x = torch.ones(4, 16, device=DEVICE)
    with cuda_graphs_on_cpu() if DEVICE.type == "cpu" else contextlib.nullcontext():
        step = ck.GraphedTrainStep(model, lambda model, x: model(x).sum(), adamw(model, DEVICE.type), (x,), graph=True)
    factors.LAYOUTS.clear()
    assert made
    assert all(reference() is not None for reference in made)
    assert step(x).isfinite()


def test_a_table_that_is_made_during_a_capture_is_an_error(monkeypatch):
    from complora_kernels.kernels import factors

    monkeypatch.setenv("COMPLORA_BACKEND", "triton")
    config = ck.CompLoRAConfig(r=2, subspace_k=3)
    model = ck.CompLoRALinear.from_linear(nn.Linear(16, 16).requires_grad_(False), config).to(DEVICE)
    x, calls = torch.ones(4, 16, device=DEVICE), []

    def loss(model, x):
        calls.append(x)
        if len(calls) > graphs.WARM_UPS:
            factors.LAYOUTS.clear()
        return model(x).sum()

    message = r"could not be captured: the fold of 2 factors .* run the step once"
    with (
        cuda_graphs_on_cpu() if DEVICE.type == "cpu" else contextlib.nullcontext(),
        pytest.raises(RuntimeError, match=message),
    ):
        ck.GraphedTrainStep(model, loss, adamw(model, DEVICE.type), (x,), graph=True)


def test_a_graph_keeps_the_memory_of_parameters_that_get_other_memory():
    config = ck.CompLoRAConfig(r=2, subspace_k=3)
    model = ck.CompLoRALinear.from_linear(nn.Linear(16, 16).requires_grad_(False), config).to(DEVICE)
    x = torch.ones(4, 16, device=DEVICE)
    with cuda_graphs_on_cpu() if DEVICE.type == "cpu" else contextlib.nullcontext():
        step = ck.GraphedTrainStep(model, lambda model, x: model(x).sum(), adamw(model, DEVICE.type), (x,), graph=True)
    address = model.weight.data_ptr()
    model.weight.data = model.weight.data.clone()
    (graph,) = step._graphs.values()
    assert graph is not None
    assert address in {tensor.data_ptr() for tensor in graph.kept}


# ---- bad input


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (torch.optim.SGD, {"lr": 0.1}, r"SGD, which cannot be captured: expected AdamW\(.*graph=False"),
        (torch.optim.LBFGS, {}, "optimizer is an LBFGS"),
        (torch.optim.AdamW, {"lr": 2e-4}, r"capturable=False; expected AdamW\(\.\.\., lr=torch.tensor\(0.0002, "),
        (torch.optim.AdamW, {"lr": 2e-4, "capturable": True}, r"AdamW with lr=0.0002, a number .* would freeze"),
        (torch.optim.Adam, {"lr": 2e-4, "capturable": True}, r"Adam with lr=0.0002"),
    ],
)
def test_an_optimizer_that_cannot_be_captured_is_refused_by_name(optimizer, options, message, device):
    model, _ = make(device)
    parameters = list(ck.adapter_parameters(model))
    for graph in ("auto", True):
        with pytest.raises(ValueError, match=message):
            ck.GraphedTrainStep(model, loss, optimizer(parameters, **options), tuple(batches(1, device)), graph=graph)


def test_a_scaler_that_would_wait_for_the_device_is_refused(device):
    model, optimizer = make(device, fused=False)
    with pytest.raises(ValueError, match="fused=False and a scaler"):
        ck.GraphedTrainStep(model, loss, optimizer, tuple(batches(1, device)), scaler=torch.amp.GradScaler(device))


def test_a_schedule_of_numbers_is_refused_in_a_graph(device):
    model, optimizer = make(device)
    with pytest.raises(ValueError, match=r"schedule gave 0\.001, expected a tensor"):
        ck.GraphedTrainStep(model, loss, optimizer, tuple(batches(1, device)), schedule=lambda _t: 1e-3)


def test_groups_of_different_rates_have_no_common_schedule():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": first.parameters(), "lr": 1.0}, {"params": second.parameters(), "lr": 2.0}])
    with pytest.raises(ValueError, match=r"schedule gives one rate and the optimizer's groups have \[1.0, 2.0\]"):
        ck.GraphedTrainStep(first, loss, optimizer, (), schedule=cosine)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda model, images: model.encode_image(images), r"torch.float32 \[3, 16\]"),
        (lambda model, images: images.sum(), r"torch.float32 \[\] without a gradient"),
        (lambda model, images: 1.0, "float"),
    ],
)
@pytest.mark.parametrize("graph", [False, True])
def test_a_loss_without_a_gradient_or_with_dimensions_is_refused(wrong, got, graph, device):
    model, optimizer = make(device)
    (images,) = batches(1, device)
    with Unchanged(model), pytest.raises(ValueError, match=f"loss gave {got}, expected a 0-dim tensor with a gradient"):
        ck.GraphedTrainStep(model, wrong, optimizer, (images,), graph=graph)(images)


def test_a_graph_is_refused_where_there_is_no_gpu():
    model, optimizer = make("cpu")
    with pytest.raises(ValueError, match="graph is True and the parameters are on cpu, expected a CUDA device"):
        ck.GraphedTrainStep(model, loss, optimizer, tuple(batches(1, "cpu")), graph=True)
    with pytest.raises(ValueError, match="graph is 'yes'"):
        ck.GraphedTrainStep(model, loss, optimizer, tuple(batches(1, "cpu")), graph="yes")


# ---- several processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes have trained together."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(data_parallel.train_half, (str(folder),), nprocs=2)
    return folder


def test_two_processes_are_one_with_their_batches_together(two_processes):
    expected = data_parallel.train(data_parallel.network(), data_parallel.BATCHES, torch.optim.SGD)
    runs = ([data_parallel.Result(*result) for result in torch.load(two_processes / f"{rank}.pt")] for rank in range(2))
    for (wrapped, _), first, second in zip(data_parallel.WAYS, *runs, strict=True):
        assert_equal(first.factors, second.factors)
        torch.testing.assert_close(first.factors, expected.factors)  # in float64: sums in another order
        means = [(a + b) / 2 for a, b in zip(first.losses, second.losses, strict=True)]
        torch.testing.assert_close(means, expected.losses)
        assert (first.frozen, second.frozen) == (0, 0 if wrapped else 1)
    assert expected.losses[-1] < 0.8 * expected.losses[0]


def test_gradients_accumulated_without_synchronisation_are_those_of_the_whole_batch(two_processes):
    """`no_sync` of DDP, in both towers of a CLIP."""
    model = data_parallel.towers()
    factors = list(ck.adapter_parameters(model))
    before = [factor.detach().clone() for factor in factors]
    optimizer = torch.optim.SGD(factors, lr=0.1, momentum=0.9)
    halves = [data_parallel.clip_batch(rank) for rank in range(2)]
    for step in (slice(0, 2), slice(2, 4)):
        parts = [part for half in halves for part in half[step]]
        images, texts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        optimizer.zero_grad()
        data_parallel.similarity(model, images, texts).backward()
        optimizer.step()
    (first, own), (second, other) = (torch.load(two_processes / f"{rank}-accumulated.pt") for rank in range(2))
    expected = [factor.detach() for factor in factors]
    torch.testing.assert_close((first, second), (expected, expected))  # in float64: sums in another order
    assert not any(map(torch.equal, own, other))  # before they are averaged
    assert all((factor - old).norm() > 1e-4 * old.norm() for factor, old in zip(factors, before, strict=True))


def test_a_parameter_without_a_gradient_is_refused_where_processes_share_them(device, tmp_path):
    model, optimizer = make(device, towers=("image", "text"))
    inputs = tuple(batches(1, device))
    with (
        process_group(tmp_path),
        Unchanged(model),
        pytest.raises(ValueError, match="12 parameters of the optimizer got no gradient"),
    ):
        ck.GraphedTrainStep(model, loss, optimizer, inputs, process_group=distributed.group.WORLD, graph=True)


# ---- a capture that fails


@pytest.mark.parametrize("ends", [True, False])
def test_a_failed_capture_keeps_nothing_of_its_step(monkeypatch, ends):
    """With stand-ins for torch's graphs; what is left would hold nodes of a stream that is not used again.

    A capture that was broken off often cannot be ended either, which is a second error.
    """

    @contextlib.contextmanager
    def stand_in(*_: Any, **__: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        finally:
            if not ends:
                raise RuntimeError("the capture was invalidated")

    class Generator:
        graphsafe_set_state = clone_state = lambda *_: None

    stand_ins = {"current_device": lambda: 0, "default_generators": [Generator()], "current_stream": lambda _: None}
    stand_ins |= {"CUDAGraph": object, "device": stand_in, "stream": stand_in, "graph": graph}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = object.__new__(graphs.CUDAGraphs)
    recorder.device, recorder.stream, recorder.pool = torch.device("cuda"), None, None  # pyright: ignore
    kept: list[weakref.ref[Tensor]] = []

    def step() -> None:
        y = torch.ones(3, requires_grad=True) * 2
        kept.append(weakref.ref(y))
        raise RuntimeError("not permitted when stream is capturing")

    gc.disable()
    try:
        with contextlib.suppress(RuntimeError):
            recorder.capture(step)
            pytest.fail("captured")
        assert kept[0]() is None
    finally:
        gc.enable()


# ---- the emulation


def test_the_emulation_freezes_numbers_and_repeats_operations_in_their_memory():
    x, factor, target = torch.ones(3), 2.0, torch.zeros(3)
    replay, (y, noise) = CUDAGraphsOnCPU(x.device).capture(
        lambda: (target.copy_(x * factor).add(x), torch.rand(3).mul_(2))
    )
    assert y.isnan().all()
    factor = 3.0
    x.fill_(5)
    replay()
    assert_equal(target, torch.full((3,), 10.0))
    assert_equal(y, torch.full((3,), 15.0))
    before = noise.clone()
    replay()
    assert not torch.equal(noise, before)


@pytest.mark.parametrize("read", [Tensor.item, float, bool, lambda x: x.nonzero()])
def test_the_emulation_refuses_to_read_a_value_on_the_host(read):
    x = torch.ones(())
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        CUDAGraphsOnCPU(x.device).capture(lambda: read(x))
