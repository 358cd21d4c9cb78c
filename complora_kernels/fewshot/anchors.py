"""Three cheap baselines on features of the frozen model: Tip-Adapter, a linear probe and LFA.

The first two know the classes of the shots alone, and leave all other zero-shot answers unchanged. LFA maps the image
features of every task.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tip_adapter(
    features: Tensor,  # [N, D], normalised
    train_features: Tensor,  # [S, D], normalised
    train_labels: Tensor,  # int64 [S]
    class_features: Tensor,  # [C, D], normalised
    *,
    scale: float = 100.0,
    alpha: float = 1.0,
    beta: float = 5.5,
) -> Tensor:
    """Logits [N, C] of the training-free Tip-Adapter (arXiv 2111.03930, equation 3).

        scale · f W^T + alpha · exp(-beta (1 - f F^T)) L

    with the shots' features F as keys and their one-hot labels L as values. `alpha` and `beta` have the paper's
    defaults; the paper searches them on validation images.
    """
    affinity = torch.exp(-beta * (1 - features @ train_features.T))  # [N, S]
    votes = affinity @ F.one_hot(train_labels, len(class_features)).to(affinity)  # [N, C]
    return scale * features @ class_features.T + alpha * votes


def linear_probe(
    features: Tensor,  # [N, D], not normalised
    train_features: Tensor,  # [S, D], not normalised
    train_labels: Tensor,  # int64 [S]
    classes: int,
    *,
    C: float = 0.316,
) -> Tensor:
    """Logits [N, classes] of scikit-learn's logistic regression on the shots' features.

    `C`, the inverse strength of its L2 penalty, is CLIP's (arXiv 2103.00020, the example in its README), which suits
    features that are not normalised: those of unit norm would need larger weights, which the penalty would shrink.
    Classes without a shot get -inf.
    """
    from sklearn.linear_model import LogisticRegression

    logits = torch.full([len(features), classes], -torch.inf, dtype=torch.float64)
    seen = train_labels.unique()
    if len(features) == 0 or len(seen) == 1:
        logits[:, seen] = 0.0
        return logits
    probe = LogisticRegression(C=C, max_iter=1000)
    probe.fit(train_features.cpu().numpy(), train_labels.cpu().numpy())
    decision = torch.from_numpy(probe.decision_function(features.cpu().numpy())).double()  # [N, C]; for two classes [N]
    logits[:, torch.from_numpy(probe.classes_)] = (
        decision if decision.dim() == 2 else torch.stack([-decision, decision], 1)
    )
    return logits


def lfa(
    features: Tensor,  # [S, D], normalised, of the shots
    labels: Tensor,  # int64 [S]
    class_features: Tensor,  # [C, D], normalised
    *,
    beta: float | None = None,
    steps: int = 200,
    learning_rate: float = 5e-4,
    weight_decay: float = 5e-4,
    seed: int = 0,
) -> Tensor:  # [D, D]
    """The map W of Linear Feature Alignment (arXiv 2304.01752): an image f is compared by `f W`, normalised.

    W starts as `(1 - beta) U V^T + beta I`, with the orthogonal `U V^T` that brings the shots nearest to their classes'
    features, and is then refined by AdamW on `reranking_loss`, on batches of three quarters of the shots, every second
    one with noise, every second one with dropout. The options are those of the authors' code; their second map for
    classes without shots, an average over the steps, is left out.

    Args:
        features: the shots' features.
        labels: the shots' classes.
        class_features: the features of the classes' names.
        beta: between 0 and 1; None: chosen by cross-validation on the shots.
        steps: steps of AdamW, with a cosine schedule.
        learning_rate: of its first step.
        weight_decay: of AdamW.
        seed: chooses the splits of the cross-validation, the batches and the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    if beta is None:
        beta = _choose_beta(features, labels, class_features, generator)
    W = _procrustes(features, class_features[labels], beta).requires_grad_()
    optimizer = torch.optim.AdamW([W], lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-7)
    for _ in range(steps):
        batch = torch.randperm(len(features), generator=generator)[: max(1, int(0.75 * len(features)))]
        noisy, dropped = (torch.rand(2, generator=generator) > 0.5).tolist()
        x = features[batch]  # [B, D]
        if noisy:
            x = x + 0.035 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if dropped:
            x = x * (torch.rand(x.shape, generator=generator) > 0.05) / 0.95
        optimizer.zero_grad()
        reranking_loss(x @ W, class_features, labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return W.detach()


def reranking_loss(
    features: Tensor,  # [S, D]
    class_features: Tensor,  # [C, D], normalised
    labels: Tensor,  # int64 [S]
    *,
    neighbours: int = 3,
    scale: float = 4.0,
) -> Tensor:  # []
    """LFA's adaptive reranking loss (arXiv 2304.01752): the mean over images i and their nearest classes j of

        max(0, |f_i - t_y| + (1 - t_j · t_y) / scale - |f_i - t_j|)

    with normalised features: the image's own class y should be nearer than others, by the more the less alike they are.
    """
    distances = torch.cdist(F.normalize(features, dim=-1), class_features)  # [S, C]
    nearest, places = distances.topk(min(neighbours, len(class_features)), largest=False)  # [S, J]
    own = distances.gather(1, labels[:, None])  # [S, 1]
    margins = (1 - (class_features @ class_features.T)[labels].gather(1, places)) / scale  # [S, J]
    return F.relu(own + margins - nearest).mean()


def _procrustes(features: Tensor, targets: Tensor, beta: float) -> Tensor:  # [S, D], [S, D] -> [D, D]
    U, _, Vh = torch.linalg.svd(features.T @ targets)
    return (1 - beta) * (U @ Vh) + beta * torch.eye(len(U), dtype=U.dtype)


def _choose_beta(features: Tensor, labels: Tensor, class_features: Tensor, generator: torch.Generator) -> float:
    """The share of the identity that names most shots of three held-out fifths; the smallest of equally good ones."""
    betas = torch.linspace(0, 1, 25).tolist()
    correct = torch.zeros(len(betas))
    for _ in range(3):
        order = torch.randperm(len(features), generator=generator)
        fitted, held_out = order[: int(0.8 * len(order))], order[int(0.8 * len(order)) :]
        for i, beta in enumerate(betas):
            W = _procrustes(features[fitted], class_features[labels[fitted]], beta)
            answers = (F.normalize(features[held_out] @ W, dim=-1) @ class_features.T).argmax(-1)
            correct[i] += (answers == labels[held_out]).sum()
    return betas[int(correct.argmax())]
