"""What the first run on a GPU does, the most important first, with the seconds that it may take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.gpu import checks, times
from benchmarks.gpu.problems import DROPOUT, Bench, Rows
from complora_kernels.backends.plans import Plan
from complora_kernels.tune import LAYERS


class Entry(NamedTuple):
    """A check or a measurement: a generator of rows, each written as soon as it is known."""

    name: str
    seconds: int  # an estimate with compiled kernels, none of which is measured yet
    run: Callable[[Bench], Rows]


def entries(bench: Bench) -> list[Entry]:
    """In the order of importance: correctness, a replayed step, times at the large batch, times at the small one."""
    large, small = bench.sizes.batches
    tokens = bench.sizes.tokens
    found = [
        Entry("check norm", 4, checks.norm),
        Entry("check norm's h, repeated", 6, checks.norm_repeated),
        *(Entry(f"check {kind}", 3, partial(checks.activation, kind=kind)) for kind in checks.ACTIVATIONS),
        Entry("check fold", 3, checks.fold),
        Entry("check half a block, attention", 4, checks.attention_half),
        Entry("check half a block, MLP", 4, partial(checks.mlp_half, kind="quick_gelu")),
        *(Entry(f"check product {layer}", 3, partial(checks.products, layer=layer)) for layer in LAYERS),
        *(
            Entry(f"check product {layer}, dropout", 5, partial(checks.products, layer=layer, dropout_p=DROPOUT))
            for layer in ("qkv", "o", "fc2")
        ),
        *(
            Entry(f"check product qkv by {plan}", 3, partial(checks.products, layer="qkv", plan=plan))
            for plan in (Plan("fused"), Plan("fused", "inside"), Plan("concat"), Plan("merge"))
        ),
        Entry("check half a block, attention, dropout", 5, partial(checks.attention_half, dropout_p=DROPOUT)),
        Entry("check half a block, MLP, dropout", 5, partial(checks.mlp_half, kind="gelu", dropout_p=DROPOUT)),
        Entry("check norm, dropout", 4, partial(checks.norm, dropout_p=DROPOUT)),
        Entry("check quick_gelu, dropout", 4, partial(checks.activation, kind="quick_gelu", dropout_p=DROPOUT)),
        Entry("check attention", 4, partial(checks.attention, tokens=tokens, causal=False)),
        Entry("check attention, causal", 3, partial(checks.attention, tokens=min(tokens, 77), causal=True)),
        Entry("check graphed step", 12, partial(checks.graphed_step, dropout_p=0.0)),
        Entry("check graphed step, dropout", 12, checks.graphed_step),
        Entry("time ceilings", 5, times.ceilings),
    ]
    for batch in (large, small):
        found += [
            Entry(f"time product {layer}, batch {batch}", 3, partial(times.product, layer=layer, batch=batch))
            for layer in LAYERS
        ]
        found += [
            Entry(f"time dX {layer}, batch {batch}", 3, partial(times.product, layer=layer, batch=batch, backward=True))
            for layer in LAYERS
        ]
        if batch == large:
            found.append(Entry("time fold", 4, times.fold))
        found += [
            *(
                Entry(f"time {kind}, batch {batch}", 3, partial(times.activation, kind=kind, batch=batch))
                for kind in checks.ACTIVATIONS
            ),
            Entry(f"time norm, batch {batch}", 3, partial(times.norm, batch=batch)),
            *(
                Entry(
                    f"time dA and dB {layer}, batch {batch}",
                    2,
                    partial(times.factor_gradients, layer=layer, batch=batch),
                )
                for layer in LAYERS
            ),
            Entry(f"time attention, batch {batch}", 4, partial(times.attention, batch=batch)),
        ]
    return found
