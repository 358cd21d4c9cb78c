import errno
import json
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_clip_files import TINY

from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.backbone import check_backbone, load_backbone
from complora_kernels.fewshot.files import read_json_lines


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Two small models, known to open_clip by name for the length of a test, and a file with weights of theirs."""
    known = dict(open_clip.factory._MODEL_CONFIGS)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)
    known["tiny"] = TINY
    known["tiny-quickgelu"] = {**TINY, "quick_gelu": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("tiny", require_pretrained=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return tmp_path


def tags(monkeypatch, **table):
    """open_clip's table of pretrained weights, for the small models."""
    entries = {name: {"mean": (0, 0, 0), "std": (1, 1, 1), **entry} for name, entry in table.items()}
    quick = {name: entry for name, entry in entries.items() if entry.get("quick_gelu")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", entries)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-quickgelu", quick)


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_backbone_from_a_file_computes_what_open_clip_computes(tiny, file):
    backbone = load_backbone("tiny", str(tiny / file))
    expected: Any = open_clip.create_model("tiny", str(tiny / file)).eval()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    inputs = backbone.preprocess(images)
    assert inputs.shape == (2, 3, 24, 16)
    torch.testing.assert_close(backbone.model.encode_image(inputs), expected.encode_image(inputs), rtol=0, atol=0)
    tokens = backbone.tokenize(["a photo of a digit seven."])
    assert tokens.shape == (1, 16)
    assert not backbone.model.training


def test_preprocessing_is_that_of_open_clip(tiny):
    from torchvision.transforms.functional import InterpolationMode, normalize, resize

    backbone = load_backbone("tiny", str(tiny / "weights.pt"))
    images = torch.randint(0, 2, (3, 3, 8, 8), dtype=torch.uint8) * 255  # enlarged, these edges overshoot
    resized = resize(images.float() / 255, [24, 16], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    expected = normalize(resized, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))
    torch.testing.assert_close(backbone.preprocess(images), expected, rtol=0, atol=1e-6)  # float32 rounding


def activation(model: Any) -> str:
    return type(model.visual.transformer.resblocks[0].mlp.gelu).__name__


def test_activation_follows_the_name_unless_asked_otherwise(tiny):
    weights = str(tiny / "weights.pt")
    assert activation(load_backbone("tiny", weights).model) == "GELU"
    assert activation(load_backbone("tiny-quickgelu", weights).model) == "QuickGELU"
    assert activation(load_backbone("tiny", weights, "quick-gelu").model) == "QuickGELU"
    assert activation(load_backbone("tiny-quickgelu", weights, "gelu").model) == "GELU"


def test_tag_trained_with_the_other_activation_is_refused(tiny, monkeypatch):
    tags(monkeypatch, openai={"quick_gelu": True, "file": str(tiny / "weights.pt")}, laion={"url": "x/laion-1234.pt"})
    with pytest.raises(ValueError, match=r"trained with quick-gelu .* expected --activation quick-gelu"):
        load_backbone("tiny", "openai")
    with pytest.raises(ValueError, match=r"trained with gelu .* expected --activation gelu"):
        check_backbone("tiny", "laion", "quick-gelu")
    assert activation(load_backbone("tiny-quickgelu", "openai").model) == "QuickGELU"
    assert activation(load_backbone("tiny", "openai", "quick-gelu").model) == "QuickGELU"


def test_file_with_the_name_of_a_tag_is_taken_for_that_tag(tiny, monkeypatch):
    tags(monkeypatch, openai={"quick_gelu": True, "url": "https://example.com/weights.pt"})
    with pytest.raises(ValueError, match=r"says its file name, that of open_clip's tag openai"):
        check_backbone("tiny", str(tiny / "weights.pt"))
    check_backbone("tiny-quickgelu", str(tiny / "weights.pt"))
    check_backbone("tiny", str(tiny / "weights.safetensors"))


def test_configuration_beside_the_file_tells_its_activation(tiny):
    (tiny / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**TINY, "quick_gelu": True}}))
    with pytest.raises(ValueError, match=r"trained with quick-gelu \(says .*open_clip_config.json\)"):
        check_backbone("tiny", str(tiny / "weights.pt"))
    check_backbone("tiny-quickgelu", str(tiny / "weights.pt"))


@pytest.fixture
def archive(tiny):
    """The weights in OpenAI's format: a TorchScript archive in half precision."""

    class Weights(torch.nn.Module):
        def forward(self, x):
            return x

    weights = torch.load(tiny / "weights.pt", weights_only=True)
    module = Weights()
    for name, value in weights.items():
        *path, leaf = name.split(".")
        owner = module
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, Weights())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, torch.nn.Parameter(value.half(), requires_grad=False))
    module.register_buffer("input_resolution", torch.tensor(24))
    torch.jit.save(torch.jit.trace(module, torch.zeros(1)), tiny / "ViT.pt")
    return tiny / "ViT.pt"


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # deprecated, as these archives are
def test_openais_archives_are_read_and_known_to_be_quickgelu(tiny, archive):
    with pytest.raises(ValueError, match=r"TorchScript format, in which OpenAI published"):
        check_backbone("tiny", str(archive))
    found = load_backbone("tiny-quickgelu", str(archive)).model
    assert activation(found) == "QuickGELU"
    for name, value in torch.load(tiny / "weights.pt", weights_only=True).items():
        torch.testing.assert_close(found.state_dict()[name], value.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("ViT-B-17", "x"), ValueError, r"--model ViT-B-17: expected one of glyphs, .*ViT-B-16"),
        (("ViT-B-16", None), ValueError, r"--pretrained: --model ViT-B-16 needs a file with weights or one of openai"),
        (
            ("ViT-B-16", "nowhere.pt"),
            FileNotFoundError,
            r"--pretrained nowhere.pt: neither an existing file nor one of",
        ),
        (("ViT-B-16", "openai"), ValueError, r"expected --activation quick-gelu"),
        (("glyphs", "nowhere"), FileNotFoundError, r"--pretrained nowhere: expected a folder written by"),
        (("glyphs", None, "gelu"), ValueError, r"--activation gelu: expected auto"),
        (("hf-hub:a/b", "openai"), ValueError, r"--model hf-hub:a/b brings its own weights"),
    ],
)
def test_bad_models_are_refused_without_loading(arguments, error, message, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", None)
    with pytest.raises(error, match=message):
        load_backbone(*arguments)


def test_openais_tag_fits_the_quickgelu_model():
    check_backbone("ViT-B-16-quickgelu", "openai")
    check_backbone("ViT-B-16", "openai", "quick-gelu")
    check_backbone("ViT-B-16", "laion2b_s34b_b88k")


def test_train_command_runs_on_a_model_of_open_clip(tiny, capsys):
    output = tiny / "out"
    command = ["train", "--model", "tiny", "--pretrained", str(tiny / "weights.pt"), "--output", str(output)]
    few = ["--steps", "2", "--batch-size", "4", "--shots", "1", "--methods", "output", "--seeds", "0"]
    assert main([*command, *few, "--max-test-images", "30", "--threads", "1"]) == 0
    (result,) = read_json_lines(output / "results.jsonl")
    assert (result["steps"], result["learning_rate"]) == (2, 2e-4)
    assert json.loads((output / "config.json").read_text())["template"] == "a photo of a {}."
    assert (output / "runs" / result["run"] / "adapter" / "adapter_model.safetensors").exists()
    assert "retained (letters)" in capsys.readouterr().out


def test_a_model_with_its_own_weights_accepts_no_activation():
    with pytest.raises(ValueError, match="--activation gelu: expected auto with --model local-dir:somewhere"):
        check_backbone("local-dir:somewhere", None, "gelu")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_errors_of_damaged_weights_name_the_file(tiny, name):
    content = (tiny / name).read_bytes()
    for damaged in (content[: len(content) // 2], b"\0" * 100, b""):
        (tiny / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"--pretrained .*{name}: cannot be loaded as tiny: "):
            load_backbone("tiny", str(tiny / name))


def test_errors_of_another_models_weights_name_the_file(tiny):
    save_file({"visual.conv1.weight": torch.zeros(3)}, tiny / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: cannot be loaded as tiny: .*Missing key"):
        load_backbone("tiny", str(tiny / "other.safetensors"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError("too large")])
def test_errors_that_the_weights_do_not_cause_are_not_wrapped(tiny, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        load_backbone("tiny", str(tiny / "weights.pt"))
