"""torch.compile and torch.export of adapted models as the first thing that a process computes."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_models import VISION, clip, config, half_of, randomise, with_updates
from torch import Tensor, nn

import complora_kernels as ck

D = torch.float64
ROWS = (4, 6, 9, 17, 33, 65, 129, 300, 600, 1200, 3000)


def pair(plain: Any, **options: Any) -> tuple[Any, Any]:
    """An adapted model, and the plain one with its updates in the weights."""
    wanted = config(**options)
    model = randomise(ck.apply_complora(copy.deepcopy(plain), wanted, progress=False))
    return model, with_updates(plain, model, wanted, half_of)


def linear(**options: Any) -> tuple[Any, Any]:
    return pair(nn.Sequential(nn.Linear(16, 16), nn.Tanh()).double(), target_modules="0", **options)


def compiled(model: Any, **options: Any) -> tuple[Any, list[Any]]:
    graphs: list[Any] = []
    torch.compiler.reset()  # it remembers which sizes change

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, backend=backend, **options), graphs


def images(n: int) -> Tensor:
    return torch.randn(n, 3, VISION["image_size"], VISION["image_size"], dtype=D)


def one_graph_for_any_number_of_rows() -> None:
    for training, dropout_p, fullgraph in ((False, 0.0, True), (True, 0.25, True), (False, 0.0, False)):
        model, plain = linear(lora_dropout=dropout_p)
        call, graphs = compiled(model.train(training), fullgraph=fullgraph)
        for rows in ROWS:
            x = torch.randn(rows, 16, dtype=D)
            y = call(x)
            if dropout_p == 0:
                torch.testing.assert_close(y, plain(x))
            y.sum().backward()
        assert len(graphs) == 2  # as torch makes of a plain layer: of one number, and of any


def without_gradients() -> None:
    model, plain = linear()
    torch.compiler.reset()
    call = torch.compile(model.eval(), backend="aot_eager")
    with torch.no_grad():
        for rows in (4, 6, 9):
            x = torch.randn(rows, 16, dtype=D)
            torch.testing.assert_close(call(x), plain(x))


def a_tower_that_trains_and_is_evaluated() -> None:
    """Attention, with another batch and another mode."""
    model, plain = pair(clip().double(), target_modules=("q", "v", "o", "fc1"), lora_dropout=0.25)
    call, graphs = compiled(model.visual.train(), fullgraph=True)
    for n in (4, 3, 6, 40):
        call(images(n)).sum().backward()
    assert len(graphs) == 2  # as torch makes of the plain tower
    x = images(5)
    torch.testing.assert_close(torch.compile(model.visual.eval(), backend="eager")(x), plain.visual(x))


def exported_with_a_dynamic_batch() -> None:
    """Programs of torch's own operations, which run where this package is not."""
    layer, tower = linear(), pair(clip().double())
    shapes = ({0: torch.export.Dim("b", min=2, max=1024)},)
    for model, plain, make in (
        (*layer, lambda n: torch.randn(n, 16, dtype=D)),
        (tower[0].visual, tower[1].visual, images),
    ):
        for strict in (False, True) if model is layer[0] else (True,):
            program = torch.export.export(model.eval(), (make(4),), dynamic_shapes=shapes, strict=strict)
            assert "complora" not in str(program.graph_module)
            for n in (2, 7, 300):
                x = make(n)
                torch.testing.assert_close(program.module()(x), plain(x))


def per_sample_gradients() -> None:
    model, _ = linear()
    x = torch.randn(5, 16, dtype=D)
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x[None],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))
    call = torch.compile(gradients, backend="eager", fullgraph=True)
    torch.testing.assert_close(call(params, x), gradients(params, x))


CHECKS: Sequence[Callable[[], None]] = (
    one_graph_for_any_number_of_rows,
    without_gradients,
    a_tower_that_trains_and_is_evaluated,
    exported_with_a_dynamic_batch,
    per_sample_gradients,
)


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    failed = 0
    for check in CHECKS:
        try:
            check()
        except BaseException:
            failed += 1
            traceback.print_exc()
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
