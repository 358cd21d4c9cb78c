"""Templates against the lists that they were published in."""

from __future__ import annotations

import hashlib

import pytest

from complora_kernels.fewshot.datasets import DOMAIN_SHIFTS, ELEVEN, NAMES
from complora_kernels.fewshot.templates import prompts, templates_for, training_template

# SHA-256 of the sorted lines of each list in data/prompts.md of github.com/openai/CLIP, and how many they are.
PUBLISHED = {
    "caltech101": (34, "0a6b75d0787fb2d0"),
    "dtd": (8, "3e9362b02a3f41b9"),
    "eurosat": (3, "0953ea3fd8c1f0d5"),
    "fgvc_aircraft": (2, "91522de75ad44711"),
    "oxford_flowers": (1, "bfcd4bbb214d5015"),
    "food101": (1, "77a79bac7d9cf25b"),
    "oxford_pets": (1, "16a0790f0e45e97e"),
    "sun397": (2, "c97a3d1ad5819800"),
    "stanford_cars": (8, "816eaf5186e3ac84"),
    "ucf101": (48, "db238e0b2b8727fc"),
}
# CUSTOM_TEMPLATES in trainers/zsclip.py of github.com/KaiyangZhou/CoOp
COOPS = {
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "stanford_cars": "a photo of a {}.",
    "food101": "a photo of {}, a type of food.",
    "sun397": "a photo of a {}.",
    "caltech101": "a photo of a {}.",
    "ucf101": "a photo of a person doing {}.",
    "imagenet": "a photo of a {}.",
    "imagenet_sketch": "a photo of a {}.",
    "imagenet_v2": "a photo of a {}.",
    "imagenet_a": "a photo of a {}.",
    "imagenet_r": "a photo of a {}.",
}
# The ends of ImageNet's list, and templates that no other list has.
IMAGENETS = {"a bad photo of a {}.", "a tattoo of the {}.", "itap of my {}.", "a photo of many {}."}


@pytest.mark.parametrize("name", COOPS)
def test_clip_templates_match_coop(name):
    assert templates_for("clip", name) == (COOPS[name],)
    assert set(COOPS) == {*ELEVEN, *DOMAIN_SHIFTS}


@pytest.mark.parametrize("name", sorted(set(ELEVEN) - {"imagenet"}))
def test_ensemble_templates_match_clip(name):
    templates = templates_for("ensemble", name)
    digest = hashlib.sha256("\n".join(sorted(templates)).encode()).hexdigest()[:16]
    assert (len(templates), digest) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["imagenet", *DOMAIN_SHIFTS, "digits", "my photos"])
def test_the_ensemble_of_imagenet_matches_open_clip(name):
    templates = templates_for("ensemble", name)
    assert len(templates) == len(set(templates)) == 80
    assert set(templates) > IMAGENETS


@pytest.mark.parametrize("name", [*NAMES, "my photos"])
@pytest.mark.parametrize("choice", ["default", "clip", "ensemble"])
def test_every_template_has_one_placeholder(choice, name):
    templates = templates_for(choice, name)
    assert templates
    assert all(template.count("{}") == 1 for template in templates)
    assert len(set(templates)) == len(templates)


def test_halves_have_the_templates_of_the_whole():
    assert templates_for("clip", "dtd-base") == templates_for("clip", "dtd-new") == ("{} texture.",)


def test_templates_may_be_names_texts_or_several():
    assert templates_for("default", "dtd") == ("a photo of a {}.",)
    assert templates_for("my {}!", "dtd") == ("my {}!",)
    assert templates_for(["my {}!", "clip"], "dtd") == ("my {}!", "{} texture.")
    assert templates_for(("ensemble",), "sun397") == ("a photo of a {}.", "a photo of the {}.")


@pytest.mark.parametrize("choice", ["", "a photo", "{} or {}", "ensembel", ("default", "a photo")])
def test_a_template_without_exactly_one_placeholder_is_refused(choice):
    with pytest.raises(ValueError, match=r"template='.*': expected one \{\} for the class name, or default, clip"):
        templates_for(choice, "dtd")


def test_no_templates_are_refused():
    with pytest.raises(ValueError, match=r"templates is empty, expected at least one"):
        templates_for((), "dtd")


@pytest.mark.parametrize(
    ("choice", "name", "expected"),
    [
        ("ensemble", "imagenet", "a photo of a {}."),  # ImageNet's 80 templates begin with "a bad photo of a {}."
        ("ensemble", "dtd-base", "{} texture."),
        ("ensemble", "ucf101", "a photo of a person doing {}."),
        ("clip", "eurosat", "a centered satellite photo of {}."),
        ("default", "eurosat", "a photo of a {}."),
        ("my {}!", "dtd", "my {}!"),
        (("my {}!", "a {}"), "dtd", "my {}!"),
        (("ensemble", "a {}"), "dtd", "{} texture."),
    ],
)
def test_training_uses_one_template(choice, name, expected):
    assert training_template(choice, name) == expected


@pytest.mark.parametrize(("choice", "words"), [("a photo", "expected one {}"), ((), "is empty"), ("", "=..:")])
def test_training_without_a_template_is_refused(choice, words):
    with pytest.raises(ValueError, match=words):
        training_template(choice, "dtd")


def test_prompts_replace_the_placeholder():
    assert prompts("a photo of a {}.", ["cat", "{}"]) == ["a photo of a cat.", "a photo of a {}."]
    assert prompts("{} here_", ["bull_dog_"]) == ["bull dog  here_"]
    with pytest.raises(ValueError, match=r"expected one \{\}"):
        prompts("a photo", ["cat"])
