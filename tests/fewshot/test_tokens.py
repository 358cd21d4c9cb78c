"""Classes that a model cannot tell apart, against what its tokenizer makes of their prompts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from miniature_datasets import draw_image
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.backbone import load_backbone, load_tokenizer
from complora_kernels.fewshot.config import GLYPHS
from complora_kernels.fewshot.datasets import digits, letters
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.templates import prompts, templates_for
from complora_kernels.fewshot.tokens import check_told_apart, warn_of_truncation

PHOTO = "a photo of a {}."


@pytest.fixture(scope="module")
def clip() -> Any:
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def glyphs():
    return load_tokenizer(GLYPHS)


PAIRS = [
    ("R&amp;B", "R&B"),
    ("devil\u2019s claw", "devil's claw"),
    ("\ufb01g", "fig"),
    ("\uff21", "A"),
    ("a\nb", "a b"),
    ("cat", "dog"),
    ("cat", "cats"),
    ("Ma\u00dfe", "Masse"),
    ("letter a", "letter b"),
    ("red cat", "red dog"),
    ("red cat", "blue cat"),
    ("\u56fe", "\u4e66"),
    ("very " * 69 + "old", "very " * 69 + "new"),
    ("very " * 90 + "old", "very " * 90 + "new"),
]


@pytest.mark.parametrize("model", ["clip", "glyphs"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0][-8:])
def test_classes_with_different_tokens_are_accepted(request, model, pair):
    tokenize = request.getfixturevalue(model)
    if model == "glyphs" and len(pair[0]) > 100:
        return  # the tokenizer refuses texts that do not fit
    tokens = tokenize(prompts(PHOTO, pair))
    if torch.equal(tokens[0], tokens[1]):
        with pytest.raises(ValueError, match=r"x: the model's tokenizer does not tell the classes .* apart"):
            check_told_apart("x", ("letter c", *pair), [PHOTO], PHOTO, tokenize)
    else:
        check_told_apart("x", ("letter c", *pair), [PHOTO], PHOTO, tokenize)


def test_unknown_words_are_named_with_a_model_that_knows_them(glyphs, clip):
    names = ("letter a", "Cat", "big_dog", "big cow")
    with pytest.raises(
        ValueError,
        match=r"^x: the model's tokenizer does not tell the classes 'big_dog', 'big cow' apart: their prompts, such as "
        r"'a photo of a big dog\.', are the same tokens; it does not know 'big', 'dog', 'cow', expected a model that "
        r"does, such as --model ViT-B-16-quickgelu --pretrained openai$",
    ):
        check_told_apart("x", names, [PHOTO], PHOTO, glyphs)
    check_told_apart("x", names, [PHOTO], PHOTO, clip)


def test_the_message_tells_where_prompts_are_truncated_before_they_differ(clip):
    names = ("very " * 90 + "old", "very " * 90 + "new")
    with pytest.raises(ValueError, match=r"truncated after 77 tokens, before they differ; expected shorter names"):
        check_told_apart("x", names, [PHOTO], PHOTO, clip)
    with pytest.raises(ValueError, match=r"expected names that differ in more than it ignores"):
        check_told_apart("x", ("R&amp;B", "R&B"), [PHOTO], PHOTO, clip)


def test_prompts_must_differ_in_the_training_template_and_in_one_other(clip):
    """The training template, and at least one of the templates for classification."""
    names = ("old", "new")
    long = "very " * 80 + "{}"
    check_told_apart("x", names, [long, PHOTO], PHOTO, clip)
    check_told_apart("x", names, [PHOTO, long], PHOTO, clip)
    for templates, for_steps in (([long], PHOTO), ([PHOTO], long), ([PHOTO, long], long)):
        with pytest.raises(ValueError, match=r"the classes 'old', 'new' apart"):
            check_told_apart("x", names, templates, for_steps, clip)


def test_classes_with_the_same_name_are_accepted(clip):
    """ImageNet's published names have missile twice."""
    twins = [name for name in set(IMAGENET_CLASSNAMES) if IMAGENET_CLASSNAMES.count(name) > 1]
    assert twins
    check_told_apart("imagenet", IMAGENET_CLASSNAMES, [PHOTO], PHOTO, clip)


@pytest.mark.parametrize("words", range(68, 74))
def test_classes_with_truncated_prompts_are_named_in_one_warning(clip, caplog, words):
    """Between the start and the end 75 tokens fit."""
    names = ("cat", "very " * words + "old", "very " * words + "new")
    fits = len(clip.encode(prompts(PHOTO, names)[1])) <= 75
    assert fits == (words <= 69)
    warn_of_truncation("x", names, [PHOTO, "{}"], "{}", clip)
    named = ", ".join(map(repr, names[1:]))
    assert (
        caplog.messages == []
        if fits
        else [f"x: the prompts of {named} are longer than the 77 tokens that the model reads; they are truncated"]
    )


def test_truncation_is_found_for_any_padding_and_end_token(caplog):
    """Among Hugging Face's tokenizers, SigLIP's pads with the end token, and others have no end token."""

    def tokenizer(end: list[int], padding: int):
        def tokenize(texts: list[str], context_length: int = 5) -> torch.Tensor:
            rows = []
            for text in texts:
                ids = [ord(letter) for letter in text][: context_length - len(end)] + end
                rows.append(ids + [padding] * (context_length - len(ids)))
            return torch.tensor(rows)

        return tokenize

    for end, padding in (([], 0), ([1], 1), ([1], 0)):
        caplog.clear()
        names = ["a" * n for n in range(1, 8)]
        warn_of_truncation("x", names, ["{}"], "{}", tokenizer(end, padding))
        truncated = names[5 - len(end) :]
        (message,) = caplog.messages
        assert message.startswith(
            f"x: the prompts of {', '.join(map(repr, truncated))} are longer than the 5 tokens that"
        )


def test_a_task_whose_classes_have_the_same_tokens_is_refused():
    backbone = load_backbone(GLYPHS)
    named = dataclasses.replace(letters(), class_names=tuple(f"class {i}" for i in range(26)), asked_as="folder:x")
    with pytest.raises(ValueError, match=r"folder:x: .* 'class 0', 'class 1', .* and 21 more apart"):
        Task(named, backbone, (PHOTO,))
    for dataset in (digits(), letters()):
        for template in ("default", "clip", "ensemble"):
            Task(dataset, backbone, templates_for(template, dataset.name)[:1])


# ---- in the program: before an image is decoded or a folder written


@pytest.fixture
def data(tmp_path) -> Path:
    """Classes that the bundled model knows in the first half, and two that it does not in the second."""
    for name in ("black", "blue", "cat", "dog"):
        for number in range(4):
            draw_image(tmp_path / "data" / name / f"{number}.png", "red", number)
    return tmp_path / "data"


TELLS = (
    "does not tell the classes 'cat', 'dog' apart: their prompts, such as 'a photo of a cat.', are the same tokens; it"
)


@pytest.mark.parametrize(
    "options",
    [
        ["--data", "folder:{}"],
        ["--data", "folder:{}", "--protocol", "base-to-new"],
        ["--data", "digits", "--keep", "folder:{}"],
    ],
)
def test_training_on_classes_with_the_same_tokens_is_refused(data, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr("complora_kernels.fewshot.evaluate.load_crops", None)
    options = [option.replace("{}", str(data)) for option in options]
    arguments = ["train", "--preset", "glyphs", "--output", str(tmp_path / "out"), "--template", PHOTO]
    arguments += ["--shots", "1", *options]
    assert main(arguments) == 2
    assert TELLS in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sweeps_over_classes_with_the_same_tokens_are_refused(data, tmp_path, capsys):
    """The sweep is refused before its first run."""
    file = tmp_path / "sweep.yaml"
    file.write_text(
        json.dumps(
            {"data": ["digits", f"folder:{data}"], "shots": 1, "options": {"preset": "glyphs", "template": PHOTO}}
        )
    )
    assert main(["sweep", str(file), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(file) in said
    assert TELLS in said
    assert not (tmp_path / "out").exists()
