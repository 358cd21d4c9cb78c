"""Two cheap baselines on features of the frozen model: Tip-Adapter and a linear probe.

Both know the classes of the shots alone. They leave the encoders, and with them all zero-shot answers, unchanged.
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
