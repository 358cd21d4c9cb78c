import dataclasses
import math
from typing import Any

import fewshot_standin as standin
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from complora_kernels.fewshot.anchors import lfa, linear_probe, reranking_loss, tip_adapter
from complora_kernels.fewshot.datasets import FewShotSplit
from complora_kernels.fewshot.measure import Measurement
from complora_kernels.fewshot.team import ALONE


def features(n, seed, classes=None):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 6, generator=generator)
    return F.normalize(noise if classes is None else noise + 3 * F.one_hot(classes, 6), dim=-1)


def test_tip_adapter_computes_equation_3_of_the_paper():
    images, shots, texts = features(4, 0), features(5, 1), features(3, 2)
    labels = torch.tensor([2, 0, 1, 1, 2])
    found = tip_adapter(images, shots, labels, texts, scale=50.0, alpha=2.0, beta=3.0)
    for n in range(4):
        for c in range(3):
            cosines = [float(images[n] @ shot) for shot in shots]
            votes = sum(
                math.exp(-3.0 * (1 - cosine)) for cosine, label in zip(cosines, labels, strict=True) if label == c
            )
            assert float(found[n, c]) == pytest.approx(50 * float(images[n] @ texts[c]) + 2 * votes, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 4])
def test_linear_probe_minimises_the_penalised_loss(classes):
    labels = torch.arange(40) % classes
    shots = features(40, 3, labels).double()
    logits = linear_probe(
        torch.cat([torch.zeros(1, 6, dtype=torch.double), torch.eye(6, dtype=torch.double)]), shots, labels, classes
    )
    bias, weight = logits[0], logits[1:] - logits[0]  # read off at the origin and the unit vectors
    if classes == 2:  # scikit-learn fits one weight vector there: its logits are -z and z with z = 2 · ours
        bias, weight = bias / 2, weight / 2
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    penalty = weight.square().sum() / 2 * (2 if classes == 2 else 1)
    loss = 0.316 * F.cross_entropy(shots @ weight + bias, labels, reduction="sum") + penalty
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-3
    assert logits.shape == (7, classes)


def test_a_run_fits_scikit_learns_probe_to_features_that_are_not_normalised(tmp_path):
    """The strength of the penalty depends on the norm of the features; CLIP's README does not normalise them either."""
    setting = standin.setting()
    labels = torch.randperm(30, generator=torch.Generator().manual_seed(2)) % 3  # nothing is easy
    for task in (setting.new, setting.kept["dark"]):
        task.dataset = dataclasses.replace(task.dataset, labels=labels)
    images: dict[str, Any] = {"new": setting.new.dataset.images, "dark": setting.kept["dark"].dataset.images}
    tests = {"new": torch.arange(9, 30), "dark": torch.arange(30)}
    with torch.no_grad():
        features = {name: setting.backbone.model.encode_image(pixels / 255 - 0.5) for name, pixels in images.items()}

    def accuracies(features: dict[str, torch.Tensor]) -> dict[str, float]:
        probe = LogisticRegression(C=0.316, max_iter=1000).fit(features["new"][:9].numpy(), labels[:9].numpy())
        correct = {name: torch.from_numpy(probe.predict(features[name].numpy())) == labels for name in tests}
        return {name: correct[name][test].double().mean().item() for name, test in tests.items()}

    split = FewShotSplit(torch.arange(9), torch.arange(0), tests["new"])
    found = Measurement(standin.config(tmp_path), setting, split, torch.float32, ALONE).anchor("linear-probe")
    expected = accuracies(features)
    assert {"new": found["new"], "dark": found["tasks"]["dark"][1]} == pytest.approx(expected)
    normalised = accuracies({name: F.normalize(value, dim=-1) for name, value in features.items()})
    assert all(normalised[name] != expected[name] for name in tests)


def test_both_anchors_classify_separated_features():
    labels = torch.arange(18) % 3
    train, test = features(18, 4, labels), features(18, 5, labels)
    texts = F.normalize(torch.eye(3, 6), dim=-1)
    for logits in (tip_adapter(test, train, labels, texts), linear_probe(test, train, labels, 3)):
        assert (logits.argmax(1) == labels).double().mean() > 0.8


def test_linear_probe_never_predicts_a_class_without_a_shot():
    labels = torch.tensor([2, 0, 2, 0])
    logits = linear_probe(features(5, 6), features(4, 7), labels, 4)
    assert logits[:, [1, 3]].isneginf().all()
    assert logits[:, [0, 2]].isfinite().all()
    assert linear_probe(features(5, 6), features(4, 7), labels * 0 + 3, 4).argmax(1).tolist() == [3] * 5
    assert linear_probe(features(0, 6), features(4, 7), labels, 4).shape == (0, 4)


def test_reranking_loss_computes_the_formula_of_the_paper():
    images, texts, labels = features(5, 8), features(4, 9), torch.tensor([3, 0, 1, 2, 0])
    terms = []
    for image, label in zip(images, labels, strict=True):
        distances = [math.dist(image.tolist(), text.tolist()) for text in texts]
        for near in sorted(range(4), key=distances.__getitem__)[:3]:
            margin = (1 - float(texts[near] @ texts[label])) / 4
            terms.append(max(0.0, distances[label] + margin - distances[near]))
    assert float(reranking_loss(3 * images, texts, labels)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert reranking_loss(texts[:2], texts[:2], torch.tensor([0, 1])).isfinite()  # fewer classes than neighbours


def test_lfa_starts_from_the_nearest_orthogonal_map():
    texts = F.normalize(torch.eye(6).double() + 0.1, dim=-1)
    turned, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1)))
    labels = torch.arange(24) % 6
    shots = texts[labels] @ turned.T
    torch.testing.assert_close(lfa(shots, labels, texts, beta=0.0, steps=0), turned)
    torch.testing.assert_close(lfa(shots, labels, texts, beta=1.0, steps=0), torch.eye(6).double())
    refined = lfa(shots, labels, texts)  # cross-validation sees that the turn is what helps
    assert (refined - turned).norm() < 0.5
    assert torch.equal(refined, lfa(shots, labels, texts))
    assert not torch.equal(refined, lfa(shots, labels, texts, seed=1))


def test_refining_lowers_the_reranking_loss():
    labels = torch.arange(32) % 4
    shots, texts = features(32, 10, labels), features(4, 11)
    first, last = (lfa(shots, labels, texts, beta=0.5, steps=steps) for steps in (0, 200))
    assert reranking_loss(shots @ last, texts, labels) < 0.7 * reranking_loss(shots @ first, texts, labels)


def test_lfa_maps_the_images_of_all_tasks(tmp_path):
    setting = standin.setting()
    split = FewShotSplit(torch.arange(9), torch.arange(0), torch.arange(9, 30))
    found = Measurement(standin.config(tmp_path), setting, split, torch.float32, ALONE).anchor("lfa", seed=3)
    model = setting.backbone.model
    with torch.no_grad():
        texts = setting.new.class_features(model)
        images: dict[str, Any] = {"new": setting.new.dataset.images, "dark": setting.kept["dark"].dataset.images}
        seen: dict[str, Any] = {
            name: F.normalize(model.encode_image(pixels / 255 - 0.5), dim=-1) for name, pixels in images.items()
        }
    labels = setting.new.dataset.labels
    W = lfa(seen["new"][:9], labels[:9], texts, seed=3)
    correct = {name: ((F.normalize(x @ W, dim=-1) @ texts.T).argmax(-1) == labels).double() for name, x in seen.items()}
    assert found["new"] == pytest.approx(correct["new"][9:].mean().item())
    assert found["tasks"]["dark"][1] == pytest.approx(correct["dark"].mean().item())
    assert found["new"] > setting.new.zero_shot_accuracy(split.test)
