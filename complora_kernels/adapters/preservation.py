"""A loss that keeps what the frozen model says: its similarities of images to a vocabulary of general names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from complora_kernels.adapters.build import all_layers, trained_tensors
from complora_kernels.adapters.manage import disable_adapter, require_unmerged
from complora_kernels.common.wrappers import unwrap
from complora_kernels.integrations import Encoders, encoders
from complora_kernels.modules.truncation import read_length, select_texts

CHUNK = 256  # texts per forward pass when the whole vocabulary is encoded

Texts = Sequence[str] | Tensor
"""Texts, or their tokens, an integer tensor [N, L]."""


class PreservationLoss:
    """KL divergence between the frozen and the adapted model's similarities of images to a vocabulary, a 0-dim tensor.

        loss = mean over images x of KL(softmax(t) || softmax(s))
        t = τ f0(x) · v0^T        s = τ f(x) · v^T        [B, n]

    f and v are the normalised features of images and of the vocabulary's texts, f0 and v0 those of the frozen model,
    and τ is its logit scale. The vocabulary's names are general ones: neither those that the model is to learn, nor
    those by which is measured what it keeps. No images beside those of training are needed. The loss is zero as long as
    the adapter's update is.

        preservation = ck.PreservationLoss(model, tokenizer(texts), sample=64)
        image_features = model.encode_image(images)
        loss = task_loss(image_features, labels) + weight * preservation(images, image_features)

    It is a case of distillation (Learning without Forgetting, arXiv 1606.09282, section 3) with names in the place of
    the old task's classes.

    v0 is computed once, when the loss is made. The adapted text tower encodes `sample` names a step, the same ones
    for t and s; where it trains nothing, v is computed once too. f0 is computed by each call with the adapter switched
    off, unless it is given. The frozen model computes in evaluation mode and without gradients. Its modes, parameters
    and buffers stay as they are. Nothing waits for the device, so that a step with this loss can be a CUDA graph
    (`GraphedTrainStep`); names are then drawn by torch's own generator (`generator=None`) or given.

    Features are compared in float32, or in float64 where they are float64.

    Args:
        model: an adapted CLIP, not merged. Of `modules_to_save` there is no frozen copy: make the loss before they are
            trained, and give each call `frozen_image_features`.
        vocabulary: V >= 2 texts ("a photo of a dog."), or their tokens as the model takes them, integers [V, L].
        tokenize: makes tokens [N, L] of a list of N texts; needed where texts are given.
        new_classes: what is learned, in the form of `vocabulary`: none of it may be in the vocabulary.
        sample: the number of names that are drawn for each step, 2 to V; None: all.
        generator: draws the names, on the model's device; None: torch's own.
        encode_image: makes features [B, D] of a batch of images, normalised or not, by the adapted model; None: the
            model's own method (`encode_image` or `get_image_features`).
        encode_text: the same for tokens, int64 [N, L] to [N, D].
        logit_scale: τ; None: the exponential of the model's `logit_scale`.

    Attributes:
        tokens: the vocabulary, int64 [V, L], on the model's device.
        frozen_text_features: v0 [V, D].
        logit_scale: τ, 0-dim.

    Raises:
        ValueError: `model` has no adapter; an argument is missing or has a wrong size; two texts of the vocabulary, or
            one of it and one of `new_classes`, are the same tokens.
        RuntimeError: an adapter is merged into its weights.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        vocabulary: Texts,
        *,
        tokenize: Callable[[list[str]], Tensor] | None = None,
        new_classes: Texts = (),
        sample: int | None = None,
        generator: torch.Generator | None = None,
        encode_image: Callable[[Any], Tensor] | None = None,
        encode_text: Callable[[Tensor], Tensor] | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> None:
        require_unmerged(all_layers(model))
        tokens = _checked_tokens(vocabulary, new_classes, tokenize)  # [V, L]
        if sample is not None and not 2 <= sample <= len(tokens):
            raise ValueError(f"sample={sample}, expected 2 to {len(tokens)}, the names of vocabulary, or None")
        found = encoders(model)
        self.encode_image = _required("encode_image", encode_image, found and found.image)
        self.encode_text = _required("encode_text", encode_text, found and found.text)
        device = next(model.parameters()).device
        if logit_scale is None:
            logit_scale = _own_scale(found)
        self.model, self.sample, self.generator = model, sample, generator
        self.logit_scale = torch.as_tensor(logit_scale, device=device).detach().clone()  # []
        self.tokens = tokens.to(device)  # [V, L]
        self._not_kept = sorted(trained_tensors(model))
        with _evaluation_mode(model):
            example = self.tokens[:1]
            with torch.enable_grad():
                self._trains_text = self.encode_text(example).requires_grad
            read_length(self.tokens, example)
            self.frozen_text_features = self._frozen(self._vocabulary_features)  # [V, D]
            with torch.no_grad():
                self._text_features = None if self._trains_text else self._vocabulary_features()  # [V, D]

    def __call__(
        self,
        images: Any,  # [B, 3, H, W]
        image_features: Tensor | None = None,  # [B, D]
        *,
        frozen_image_features: Tensor | None = None,  # [B, D]
        names: Tensor | None = None,  # int64 [n]
    ) -> Tensor:  # []
        """The loss of a batch.

        Args:
            images: what `encode_image` takes; None where both kinds of features are given.
            image_features: the adapted model's features of the images, where the step has them; None: computed.
            frozen_image_features: those of the frozen model, from `frozen_image_features`; None: computed.
            names: indices of the vocabulary, on the device, in the place of the names that would be drawn.

        Raises:
            ValueError: features of unequal shapes, or `frozen_image_features` is needed and not given.
        """
        if frozen_image_features is None:
            if self._not_kept:
                raise ValueError(
                    f"frozen_image_features is None, and the model trains {self._not_kept[0]} (modules_to_save), of "
                    "which there is no frozen copy: expected features that were computed before the training"
                )
            frozen_image_features = self.frozen_image_features(images)
        if image_features is None:
            image_features = self.encode_image(images)
        if image_features.shape != frozen_image_features.shape:
            raise ValueError(
                f"image_features is {list(image_features.shape)}, expected {list(frozen_image_features.shape)} as the "
                "frozen model's features"
            )
        names = self._drawn_names() if names is None else names
        if self._text_features is None:
            text_features = self.encode_text(self.tokens if names is None else select_texts(self.tokens, names))
        else:
            text_features = _rows(self._text_features, names)
        frozen_text_features = _rows(self.frozen_text_features, names)
        t = self._similarities(frozen_image_features, frozen_text_features, image_features.dtype)  # [B, n]
        s = self._similarities(image_features, text_features, image_features.dtype)  # [B, n]
        # The mean over x of Σ softmax(t) · (log softmax(t) - log softmax(s))
        return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)

    def _similarities(self, f: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:  # [B, D], [n, D] to [B, n]
        """`τ f · v^T` of normalised features, in float32 or wider."""
        dtype = torch.promote_types(dtype, torch.float32)
        f, v = (F.normalize(features.to(dtype), dim=-1) for features in (f, v))
        with torch.autocast(f.device.type, enabled=False):  # times τ = 100, a cosine in bfloat16 is off by 0.4
            return self.logit_scale.to(dtype) * f @ v.T

    def frozen_image_features(self, images: Any) -> Tensor:  # [B, D]
        """The frozen model's features of a batch: for images that do not change from step to step, once for all.

        Of `modules_to_save` the present values count.
        """
        with _evaluation_mode(self.model):
            return self._frozen(lambda: self.encode_image(images))

    @torch.no_grad()
    def _frozen(self, encode: Callable[[], Tensor]) -> Tensor:
        with disable_adapter(self.model):
            return encode()

    def _vocabulary_features(self) -> Tensor:  # [V, D]
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        return torch.cat([self.encode_text(select_texts(self.tokens, part)) for part in rows.split(CHUNK)])

    def _drawn_names(self) -> Tensor | None:  # int64 [n]
        """Distinct names, each with the same probability; None: all. The host does not wait for the device."""
        if self.sample is None:
            return None
        keys = torch.rand(len(self.tokens), device=self.tokens.device, generator=self.generator)  # [V]
        return keys.topk(self.sample).indices


def _rows(features: Tensor, names: Tensor | None) -> Tensor:  # [V, D] to [n, D]
    return features if names is None else features[names]


def _required(
    argument: str, given: Callable[..., Tensor] | None, own: Callable[..., Tensor] | None
) -> Callable[..., Tensor]:
    found = own if given is None else given
    if found is None:
        raise ValueError(f"{argument} is None, and the model has no such method that is known: expected a function")
    return found


def _own_scale(found: Encoders | None) -> Tensor:  # []
    if found is None or found.logit_scale is None:
        raise ValueError("logit_scale is None, and the model has none: expected the factor of its cosines, such as 100")
    return found.logit_scale.detach().exp()


def _checked_tokens(
    vocabulary: Texts, new_classes: Texts, tokenize: Callable[[list[str]], Tensor] | None
) -> Tensor:  # [V, L]
    """The tokens of the vocabulary, which the model tells apart from each other and from the new classes."""
    V = len(vocabulary)
    if V < 2:
        raise ValueError(f"vocabulary has {V} {'text' if V == 1 else 'texts'}, expected at least 2 to compare")
    if isinstance(vocabulary, Tensor):
        rows = _joined(vocabulary, new_classes)  # [V + C, L]
        labels = [f"row {i}" for i in (*range(V), *range(len(new_classes)))]
    else:
        texts: list[Any] = [*vocabulary, *new_classes]
        if tokenize is None or not all(isinstance(text, str) for text in texts):
            got = sorted({type(text).__name__ for text in texts})
            raise ValueError(
                f"tokenize={tokenize!r} with vocabulary and new_classes of {' and '.join(got)}, expected texts with "
                "the tokenizer of the model, or tokens"
            )
        rows, labels = tokenize(texts), [repr(text) for text in texts]
    first: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(map(tuple, rows.tolist())):
        j = first.setdefault(row, i)
        if j < i < V:
            raise ValueError(
                f"vocabulary: {labels[j]} and {labels[i]} are the same tokens, expected texts that the model can tell "
                "apart"
            )
        if j < V <= i:
            raise ValueError(
                f"vocabulary: {labels[j]} is the same tokens as {labels[i]} of new_classes, expected names of things "
                "that are not to be learned"
            )
    return rows[:V]


def _joined(vocabulary: Tensor, new_classes: Texts) -> Tensor:  # [V, L] and [C, L] to [V + C, L]
    parts: dict[str, Any] = {"vocabulary": vocabulary}
    if len(new_classes):
        parts["new_classes"] = new_classes
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.dim() != 2 or part.dtype not in (torch.int64, torch.int32):
            got = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{name} is {got}, expected tokens, int64 [N, L]")
        if part.shape[1] != vocabulary.shape[1]:
            raise ValueError(
                f"{name} has {part.shape[1]} tokens a text, expected {vocabulary.shape[1]} as in vocabulary"
            )
    return torch.cat([part.cpu() for part in parts.values()])


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Only the flags `training` are set, because a model's own `train()` may do more."""
    training = [module for module in unwrap(model).modules() if module.training]

    def set_flags(mode: bool) -> None:
        for module in training:
            vars(module)["training"] = mode

    try:
        try:
            set_flags(False)
            yield
        finally:
            set_flags(True)
    finally:
        set_flags(True)  # again: an interrupt may have broken the first call off
