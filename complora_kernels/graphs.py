"""One training step as one CUDA graph: a batch of 32 costs a GPU less than the launches of its kernels cost the host.

A graph repeats what was launched while it was captured, in the same memory: what changes between steps has to be a
tensor on the device (the batch, the learning rate, the seeds of dropout), and what Python computes stays as it was.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from complora_kernels.common.wrappers import inside, is_compiled
from complora_kernels.kernels.kept import KEPT

WARM_UPS = 3  # steps before a capture: they create what is made once (tables, workspaces, compiled kernels)

Signature = tuple[tuple[torch.Size, torch.dtype], ...]


class GraphedStep(NamedTuple):
    """A captured step for batches of one signature."""

    batch: Sequence[Tensor]  # the tensors that the graph reads
    replay: Callable[[], None]
    loss: Tensor  # [], written by the graph
    grads: list[Tensor | None]  # one for each trained parameter
    bucket: Tensor | None  # their mean share, one after the other; with a process group
    kept: list[Tensor]  # memory that the graph reads and does not own


class GraphedTrainStep:
    """`step(*batch)` is one step of training, forward, backward and optimizer, as one CUDA graph where there is one.

        optimizer = torch.optim.AdamW(parameters, lr=torch.tensor(2e-4, device="cuda"), capturable=True, fused=True)
        step = GraphedTrainStep(model, loss, optimizer, (images, labels))
        for images, labels in loader:
            value = step(images, labels)

    The gradients of a step replace those of the step before. A call never waits for the device: tensors of a batch
    that lie elsewhere are copied there without waiting, so pinned ones must not be written to at once. To make a step,
    which runs and captures some, leaves parameters, buffers, optimizer, gradients and torch's random numbers alone.

    What a graph does not see after its capture: train() and eval(), requires_grad, hyperparameters of the optimizer
    other than a learning rate that is a tensor, hooks and anything else in Python, an autocast around the call (use it
    in `loss`). It keeps the parameters and buffers that it was captured with, in the memory that they had: the weights
    as they were, after `merge_adapter`. A state that is loaded into the
    optimizer is seen: the graphs are captured anew.

    With several processes (`model` is a DistributedDataParallel, whose module is then called, or `process_group`) the
    graph holds forward and backward; then the gradients are averaged in one all-reduce, and the optimizer, which may
    be any, steps outside. Buffers are not synchronised, nor are parameters at the start, unless DDP did. The nodes
    that DDP keeps must not be of the default stream: make it within `torch.cuda.stream(...)`, as torch asks for
    graphs, or pass the bare module and its process group.

    Args:
        model: the module; `loss` gets it without the DDP around it.
        loss: `loss(model, *batch)` gives a 0-dim tensor. It is the caller's to look for NaN in what `step` returns.
        optimizer: its parameters alone are trained. In a graph an AdamW or Adam with capturable=True and a tensor
            `lr` on the device.
        example_batch: tensors with the shapes and dtypes of training, on the device of the parameters.
        schedule: the learning rate of all parameter groups, computed by torch from the number of steps done, a 0-dim
            float64 tensor: `lambda t: 1e-4 * (1 + torch.cos(torch.pi * t / steps))`. Instead, a torch LRScheduler may
            be stepped between the calls: it writes to `lr`.
        scaler: scales the loss, for float16. In a graph it needs an optimizer with fused=True.
        graph: "auto" where the parameters are on a CUDA device, and eager steps where a capture fails; True: a graph
            or an error; False: eager steps.
        process_group: the processes that average their gradients; of a DDP model its own.

    Attributes:
        counter: the number of steps done, 0-dim float64; to resume, `step.counter.fill_(steps)`.

    Raises:
        ValueError: the optimizer cannot be captured; `loss` gives no 0-dim tensor with a gradient; parameter groups of
            different rates have one schedule; with several processes, a parameter that got no gradient.
        RuntimeError: a capture failed and `graph` is True.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        example_batch: Sequence[Tensor],
        *,
        schedule: Callable[[Tensor], Tensor | float] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        graph: str | bool = "auto",
        process_group: Any = None,
    ) -> None:
        if is_compiled(model) and isinstance(inside(model), DistributedDataParallel):
            raise ValueError(
                "model is a compiled DistributedDataParallel, expected the model compiled first and wrapped then: "
                "DistributedDataParallel(torch.compile(model))"
            )
        if isinstance(model, DistributedDataParallel):
            model, process_group = model.module, process_group or model.process_group
        self.model, self.loss, self.optimizer, self.schedule = model, loss, optimizer, schedule
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.process_group = process_group
        groups = optimizer.param_groups
        self._trained = [p for group in groups for p in group["params"] if p.requires_grad]
        if graph not in ("auto", True, False):
            raise ValueError(f'graph is {graph!r}, expected "auto", True or False')
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("optimizer is an LBFGS, which evaluates its loss again in a step; expected one that steps")
        if not self._trained:
            raise ValueError("optimizer has no parameter that requires a gradient")
        if schedule is not None and len({float(group["lr"]) for group in groups}) > 1:
            rates = [float(group["lr"]) for group in groups]
            raise ValueError(
                f"schedule gives one rate and the optimizer's groups have {rates}; use a torch LRScheduler"
            )
        self._device, rate = self._trained[0].device, groups[0]["lr"]
        on_device = self._device.type == CUDAGraphs.device_type
        if graph is True and not on_device:
            raise ValueError(f"graph is True and the parameters are on {self._device}, expected a CUDA device")
        self.counter = torch.zeros((), dtype=torch.float64, device=rate.device if isinstance(rate, Tensor) else "cpu")
        self._graphs: dict[Signature, GraphedStep | None] = {}  # None: could not be captured
        self._in_grads: GraphedStep | None = None  # the graph whose gradients the parameters show
        self._stale, self._warned, self._required = False, False, graph is True
        self._recorder = CUDAGraphs(self._device) if on_device and graph is not False else None
        if self._recorder is not None:
            this = weakref.ref(self)
            optimizer.register_load_state_dict_post_hook(lambda _: _mark_stale(this()))
            self.capture(*example_batch)

    def __call__(self, *batch: Tensor) -> Tensor:  # []
        """One step; its loss, detached, on the device (with several processes: of this one's share of the batch).

        Raises:
            RuntimeError: the parameters are frozen, as `set_adapter` leaves those of the adapter before.
        """
        if not self._trained[0].requires_grad:
            raise RuntimeError(
                "the parameters of the optimizer no longer require a gradient, expected those of the active adapter: "
                "after set_adapter make a new optimizer and a new GraphedTrainStep"
            )
        if self._recorder is None:
            return self._eager(batch)
        if self._stale:
            self._capture_anew()
        signature = _signature(batch)
        graph = self._graphs.get(signature)
        if graph is None:
            if signature not in self._graphs and not self._warned:
                self._warned = True
                warnings.warn(
                    f"there is no CUDA graph for a batch of {_words(signature)}, so that it runs eagerly, as others "
                    f"without one will. Graphs are for {' or '.join(map(_words, self._graphs))}; "
                    "step.capture(*batch) adds one",
                    stacklevel=2,
                )
            return self._eager([tensor.to(self._device, non_blocking=True) for tensor in batch])
        for static, tensor in zip(graph.batch, batch, strict=True):
            static.copy_(tensor, non_blocking=True)
        with record_function("replay"):
            graph.replay()
        if self._in_grads is not graph:
            self._show_grads(graph.grads)
            self._in_grads = graph
        if self.process_group is not None:
            self._update(graph.bucket)
        self.optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue] # an LRScheduler asks for it
        return graph.loss.clone()

    def capture(self, *batch: Tensor) -> None:
        """Adds a graph for batches of these shapes and dtypes. All share their memory. No graph is added on a CPU."""
        if self._recorder is None:
            return
        signature = _signature(batch)
        elsewhere = {str(tensor.device) for tensor in (*batch, *self._trained) if tensor.device != self._device}
        if elsewhere:
            raise ValueError(
                f"batch and parameters are on {self._device} and {', '.join(elsewhere)}, expected one device"
            )
        if self.process_group is None:
            _check_capturable(self.optimizer, self._device, self.scaler)
        static = [tensor.detach().clone() for tensor in batch]
        # Their memory, which `merge_adapter` exchanges and `.to` frees.
        kept = [tensor.detach() for tensor in (*self.model.parameters(), *self.model.buffers())]
        with self._restored():
            self._recorder.warm_up(lambda: self._step(static))
            for copy, tensor in zip(static, batch, strict=True):
                copy.copy_(tensor)  # a new version too: what was read from its values (where texts end) is not frozen
            try:
                with KEPT.holding(kept):
                    replay, (loss, bucket) = self._recorder.capture(lambda: self._step(static))
                grads = [p.grad for p in self._trained]
                self._graphs[signature] = GraphedStep(static, replay, loss, grads, bucket, kept)
            except Exception as error:
                if self._required:
                    raise RuntimeError(f"the step of {_words(signature)} could not be captured: {error}") from error
                self._graphs[signature] = None
                warnings.warn(
                    f"the step of {_words(signature)} could not be captured in a CUDA graph, and runs eagerly: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=2,
                )

    def _eager(self, batch: Sequence[Tensor]) -> Tensor:
        self._in_grads = None
        loss, bucket = self._step(batch)
        if self.process_group is not None:
            self._update(bucket)
        return loss

    def _step(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Forward, backward and, in one process, the update; what a graph holds."""
        torch.clear_autocast_cache()  # casts that were made outside a graph, or within, are no use on the other side
        self._show_grads([None] * len(self._trained))
        with record_function("forward"):
            loss = self.loss(self.model, *batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
            got = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            got += " without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
            raise ValueError(f"loss gave {got}, expected a 0-dim tensor with a gradient")
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        with record_function("backward"):
            scaled.backward(inputs=self._trained)
        torch.clear_autocast_cache()
        if self.process_group is None:
            self._update(None)
            return loss.detach(), None
        missing = sum(p.grad is None for p in self._trained)
        if missing:
            raise ValueError(f"{missing} parameters of the optimizer got no gradient, expected one in every process")
        bucket = torch.cat([p.grad.reshape(-1) for p in self._trained if p.grad is not None])
        return loss.detach(), bucket.div_(distributed.get_world_size(self.process_group))

    @torch.no_grad()
    def _update(self, bucket: Tensor | None) -> None:
        """The optimizer's step at the scheduled rate, after the all-reduce of a bucket."""
        if bucket is not None:
            distributed.all_reduce(bucket, group=self.process_group)
            grads = [p.grad for p in self._trained if p.grad is not None]
            parts = bucket.split([grad.numel() for grad in grads])
            torch.ops.aten._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
        if self.schedule is not None:
            rate = self.schedule(self.counter)
            if self._recorder is not None and self.process_group is None and not isinstance(rate, Tensor):
                raise ValueError(f"schedule gave {rate!r}, expected a tensor computed from the number of steps done")
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = float(rate)
        with record_function("optimizer"):
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        self.counter += 1

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Undoes what steps do within, in place: a graph knows tensors by their memory."""
        groups, states = self.optimizer.param_groups, self.optimizer.state
        known = {p for p in self._trained if p in states}
        tensors = [self.counter, *self._trained, *self.model.buffers()]
        tensors += [value for group in groups for value in (group["lr"],) if isinstance(value, Tensor)]
        tensors += [value for p in known for value in states[p].values() if isinstance(value, Tensor)]
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=self._device))  # makes its tensors, if they are not there yet
            tensors += [self.scaler._scale, self.scaler._growth_tracker]
        copies, grads = [tensor.detach().clone() for tensor in tensors], [p.grad for p in self._trained]
        cuda = [self._device] if self._device.type == "cuda" else []

        def restore() -> None:
            with torch.no_grad():
                for tensor, copy in zip(tensors, copies, strict=True):
                    tensor.copy_(copy)
                for p in self._trained:
                    for value in states[p].values() if p in states and p not in known else ():
                        value.zero_()  # the state in which Adam begins
            self._show_grads(grads)
            self._in_grads = None
            if self.scaler is not None:  # a step that was broken off leaves its marks
                self.scaler._per_optimizer_states.clear()
                for name in ("grad_scale", "found_inf"):
                    vars(self.optimizer).pop(name, None)

        try:
            try:
                with torch.random.fork_rng(cuda):
                    yield
            finally:
                restore()
        finally:
            restore()  # again: an interrupt may have broken the first off

    def _show_grads(self, grads: Sequence[Tensor | None]) -> None:
        for p, grad in zip(self._trained, grads, strict=True):
            p.grad = grad

    def _capture_anew(self) -> None:
        batches = [graph.batch for graph in self._graphs.values() if graph is not None]
        for batch in batches:  # each takes the place of the graph before it
            self.capture(*batch)
        self._stale = False


class CUDAGraphs:
    """Warms up and captures functions of a device, all on one side stream and in one pool of memory."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    run()
        finally:
            current.wait_stream(self.stream)  # kernels of a step that failed may still be writing

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that repeats what `run` launches, and what `run` returned."""
        graph, failures = torch.cuda.CUDAGraph(), []
        # "thread_local": the threads of a data loader may allocate meanwhile. The outer stream is current again after a
        # capture that failed, where torch.cuda.graph leaves its own.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            try:
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    try:
                        result = run()
                    except Exception as error:
                        failures.append(error)
                        raise
                return graph.replay, result
            except Exception as error:
                # The generator would go on as if it were captured, and refuse to draw.
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())
                if not failures:
                    failures.append(error)
        # Out of the list, and not while another is handled: an error knows this frame and what the step has made, whose
        # memory and nodes on this stream a cycle would keep.
        raise failures.pop()


def _check_capturable(optimizer: torch.optim.Optimizer, device: torch.device, scaler: object) -> None:
    name = type(optimizer).__name__
    expected = f'lr=torch.tensor({float(optimizer.param_groups[0]["lr"])}, device="{device}"), capturable=True'
    expected += ", fused=True" if scaler is not None else ""
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        raise ValueError(
            f"optimizer is {name}, which cannot be captured: expected AdamW(..., {expected}), or graph=False"
        )
    for group in optimizer.param_groups:
        lr, got = group["lr"], ""
        if not group["capturable"]:
            got = "capturable=False"
        elif not isinstance(lr, Tensor):
            got = f"lr={lr!r}, a number that a graph would freeze"
        elif lr.device != device:
            got = f"lr on {lr.device}"
        elif scaler is not None and not group["fused"]:
            got = "fused=False and a scaler: it would wait for the device"
        if got:
            raise ValueError(f"optimizer is {name} with {got}; expected {name}(..., {expected}), or graph=False")


def _mark_stale(step: GraphedTrainStep | None) -> None:
    if step is not None and step.process_group is None:
        step._stale = True


def _signature(batch: Sequence[Tensor]) -> Signature:
    for i, tensor in enumerate(batch):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"batch[{i}] is a {type(tensor).__name__}, expected a tensor")
    return tuple((tensor.shape, tensor.dtype) for tensor in batch)


def _words(signature: Signature) -> str:
    return "(" + ", ".join(f"{str(dtype).removeprefix('torch.')} {list(shape)}" for shape, dtype in signature) + ")"
