import copy
import math

import fewshot_standin as standin
import pytest
import torch
from safetensors.torch import load_file

from complora_kernels.fewshot.config import Method, Run
from complora_kernels.fewshot.evaluate import is_correct
from complora_kernels.fewshot.files import read_json_lines
from complora_kernels.fewshot.recipe import CHECKPOINT, at_most, cosine, train
from complora_kernels.fewshot.sampler import batch_indices, draw_shots

RUN = Run("both", 2, 1e-2, 0)


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads would wait for each other longer than these small products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(Exception):
    pass


def test_measured_accuracy_is_that_of_a_plain_recomputation():
    setting = standin.setting()
    model, data = setting.backbone.model, setting.new.dataset
    texts = torch.stack([model.encode_text(standin.tokenize([f"a {name}"]))[0] for name in data.class_names])
    expected = []
    for image, label in zip(data.images, data.labels, strict=True):
        feature = model.encode_image(image[None].float() / 255 - 0.5)[0]
        cosines = torch.nn.functional.cosine_similarity(feature[None], texts)
        expected.append(bool(cosines.argmax() == label))
    tokens = standin.tokenize([f"a {name}" for name in data.class_names])
    assert is_correct(model, setting.backbone, data.images, data.labels, tokens, batch_size=7).tolist() == expected
    some = torch.tensor([3, 4, 11, 12, 29])
    share = sum(expected[i] for i in some) / 5
    assert setting.new.accuracy(model, some) == pytest.approx(share)
    assert setting.new.zero_shot_accuracy(some) == pytest.approx(share)
    assert setting.new.zero_shot_accuracy(torch.arange(30)) == pytest.approx(sum(expected) / 30)


def test_zero_shot_answers_are_asked_once(monkeypatch):
    setting = standin.setting()
    asked = []
    encode = setting.backbone.model.encode_image
    monkeypatch.setattr(
        setting.backbone.model, "encode_image", lambda x, normalize: asked.append(len(x)) or encode(x, normalize)
    )
    for _ in range(2):
        setting.new.zero_shot_accuracy(torch.arange(10))
    setting.new.zero_shot_accuracy(torch.arange(14))
    assert asked == [10, 4]


@pytest.mark.parametrize("method", ["lora", "output", "input", "both", "random", "random-both"])
def test_a_run_learns_and_leaves_the_pretrained_model_alone(tmp_path, method):
    setting = standin.setting()
    before = copy.deepcopy(setting.backbone.model.state_dict())
    config = standin.config(tmp_path, steps=40, log_every=1)
    result = train(config, Run(method, 2, 3e-2, 0), setting, tmp_path / "run")
    losses = [line["loss"] for line in read_json_lines(tmp_path / "run" / "log.jsonl")]
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    assert result["new"] > result["zero_shot_new"]
    assert result["relative_update"] > 0
    assert result["share"] < 1e-9  # the projection is exact up to float32 rounding, here squared
    assert result["k"] == (0 if method == "lora" else 16)
    after = setting.backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_result_measures_what_was_not_trained_on(tmp_path):
    setting = standin.setting()
    result = train(standin.config(tmp_path, max_test_images=9), RUN, setting, tmp_path / "run")
    _, rest = draw_shots(setting.new.dataset.labels, 2, 0)
    assert result["zero_shot_new"] == standin.setting().new.zero_shot_accuracy(at_most(9, rest))
    assert result["zero_shot_kept"] == standin.setting().kept.zero_shot_accuracy(at_most(9, torch.arange(30)))
    assert {"method": "both", "shots": 2, "learning_rate": 1e-2, "seed": 0}.items() <= result.items()
    assert result["versions"]["torch"] == torch.__version__


def factors(folder):
    return load_file(folder / CHECKPOINT)


@pytest.mark.parametrize("towers", [("image",), ("text",), ("image", "text")])
@pytest.mark.parametrize("killed_at", [3, 4])
def test_killed_and_resumed_is_the_same_as_uninterrupted(tmp_path, killed_at, towers):
    config = standin.config(tmp_path, lora_dropout=0.3, steps=7, checkpoint_every=2, towers=towers)
    whole = train(config, RUN, standin.setting(), tmp_path / "whole")

    def kill(done: int, loss: float) -> None:
        if done == killed_at:
            raise Killed

    with pytest.raises(Killed):
        train(config, RUN, standin.setting(), tmp_path / "resumed", kill)
    torch.rand(17)  # whatever else happened to the random state in between
    steps = []
    resumed = train(config, RUN, standin.setting(), tmp_path / "resumed", lambda done, loss: steps.append(done))
    assert steps == list(range(1 + killed_at // 2 * 2, 8))

    expected, found = factors(tmp_path / "whole"), factors(tmp_path / "resumed")
    assert any(name.startswith("adapter.") for name in expected)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "resumed")]
    assert logs[0] == logs[1]
    for result in (whole, resumed):
        del result["seconds"]
    assert whole == resumed


def test_runs_of_one_seed_start_from_the_same_factors_and_see_the_same_batches(tmp_path):
    # At this learning rate nothing moves: the same losses are the same batches.
    def start(method: Method) -> tuple[dict[str, torch.Tensor], list[float]]:
        losses = []
        config = standin.config(tmp_path, steps=3, checkpoint_every=1)
        train(
            config, Run(method, 2, 1e-9, 4), standin.setting(), tmp_path / method, lambda _, loss: losses.append(loss)
        )
        return {name: value for name, value in factors(tmp_path / method).items() if ".lora_A." in name}, losses

    expected_factors, expected_losses = start("lora")
    for method in ("output", "random"):
        found_factors, found_losses = start(method)
        for name, value in expected_factors.items():
            torch.testing.assert_close(found_factors[name], value, rtol=0, atol=1e-7)  # two steps of 1e-9, rounded
        assert found_losses == pytest.approx(expected_losses, rel=1e-5)


def test_run_that_diverges_says_where(tmp_path):
    setting = standin.setting()
    setting.backbone.model.logit_scale.data.fill_(1e9)  # exp overflows
    with pytest.raises(
        FloatingPointError, match=r"both-2shot-lr0.01-seed0: the loss is nan in step 0 at learning rate 0.01"
    ):
        train(standin.config(tmp_path), RUN, setting, tmp_path / "run")


def test_learning_rate_follows_torchs_cosine():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17, eta_min=1e-6)
    for step in range(17):
        assert cosine(step, 17, 3e-3, 1e-6) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert cosine(17, 17, 3e-3, 1e-6) == pytest.approx(1e-6)


def test_at_most_takes_a_fixed_part():
    indices = torch.arange(50) * 2
    assert at_most(None, indices) is indices
    assert at_most(50, indices) is indices
    part = at_most(7, indices)
    assert len(set(part.tolist())) == 7
    assert set(part.tolist()) <= set(indices.tolist())
    assert torch.equal(part, at_most(7, indices))


def test_logit_scale_multiplies_the_cosines(tmp_path):
    setting = standin.setting()
    losses = []
    config = standin.config(tmp_path, steps=1)
    train(config, RUN, setting, tmp_path / "run", lambda done, loss: losses.append(loss))
    drawn, _ = draw_shots(setting.new.dataset.labels, 2, 0)
    model = setting.backbone.model
    assert math.exp(model.logit_scale.item()) == pytest.approx(1 / 0.07)
    # B is zero, so that the first loss is the pretrained model's
    batch = drawn[batch_indices(6, 4, 0, 0)]
    image = model.encode_image(setting.new.dataset.images[batch].float() / 255 - 0.5)
    text = model.encode_text(setting.new.tokens)
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    expected = torch.nn.functional.cross_entropy(cosines / 0.07, setting.new.dataset.labels[batch])
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
