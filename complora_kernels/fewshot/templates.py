"""Makes the prompts that a CLIP compares an image with, from class names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CHOICES = ("default", "clip", "ensemble")
"""The names that `templates_for` accepts."""

DEFAULT = "a photo of a {}."

# The template of each data set in CoOp and its successors, chosen among those that CLIP was published with.
_CLIP = {
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "food101": "a photo of {}, a type of food.",
    "ucf101": "a photo of a person doing {}.",
}

# The templates that CLIP was published with: data/prompts.md of github.com/openai/CLIP. ImageNet's are open_clip's.
_PICTURES = ("painting", "sculpture", "sketch", "tattoo", "rendition", "drawing", "doodle")
_ENSEMBLES = {
    "caltech101": tuple(
        template
        for article in ("a", "the")
        for template in (
            f"a photo of {article} {{}}.",
            *(f"a {picture} of {article} {{}}." for picture in _PICTURES),
            *(
                f"{article} {thing} {{}}."
                for thing in ("plastic", "toy", "embroidered", "cartoon", "plushie", "origami")
            ),
            f"{article} {{}} in a video game.",
            f"art of {article} {{}}.",
            f"graffiti of {article} {{}}.",
        )
    ),
    "dtd": tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
    "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "fgvc_aircraft": tuple(f"a photo of {article} {{}}, a type of aircraft." for article in ("a", "the")),
    "oxford_flowers": (_CLIP["oxford_flowers"],),
    "food101": (_CLIP["food101"],),
    "oxford_pets": (_CLIP["oxford_pets"],),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
    "stanford_cars": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        *(f"a photo of my {adjective} {{}}." for adjective in ("dirty", "clean", "new", "old")),
    ),
    "ucf101": tuple(
        f"a {medium} of {article} person {verb}{{}}."
        for verb in ("", "using ", "doing ", "during ", "performing ", "practicing ")
        for article in ("a", "the")
        for medium in ("photo", "video", "example", "demonstration")
    ),
}


def templates_for(choice: str | Sequence[str], dataset_name: str) -> tuple[str, ...]:
    """The templates of a data set's prompts; of several, the mean of their features names a class.

    Args:
        choice: "default" for "a photo of a {}."; "clip" for the one of CLIP's templates that CoOp uses for the data
            set; "ensemble" for all templates that CLIP was published with for it; a template with one {} for the class
            name; or several of these.
        dataset_name: one of the names of `load_dataset`, or of a half of it. For any other data set "clip" is the
            default template, and "ensemble" are ImageNet's 80.

    Raises:
        ValueError: there is no template, or a template without exactly one {}.
    """
    if not isinstance(choice, str):
        templates = tuple(template for one in choice for template in templates_for(one, dataset_name))
        if not templates:
            raise ValueError("templates is empty, expected at least one")
        return templates
    name = dataset_name.removesuffix("-base").removesuffix("-new")
    if choice == "default":
        return (DEFAULT,)
    if choice == "clip":
        return (_CLIP.get(name, DEFAULT),)
    if choice == "ensemble":
        return _ENSEMBLES.get(name) or _imagenet()
    if choice.count("{}") != 1:
        raise ValueError(f"template={choice!r}: expected one {{}} for the class name, or {', '.join(CHOICES)}")
    return (choice,)


def training_template(choice: str | Sequence[str], dataset_name: str) -> str:
    """The one template whose prompts a training step puts through the text tower.

    Args:
        choice: as in `templates_for`. The result for "ensemble" is that for "clip", and for several choices that for
            the first.
        dataset_name: as in `templates_for`.

    Raises:
        ValueError: as in `templates_for`.
    """
    if choice == "ensemble":
        return training_template("clip", dataset_name)
    if isinstance(choice, str) or not choice:
        return templates_for(choice, dataset_name)[0]
    return training_template(choice[0], dataset_name)


def prompts(template: str, class_names: Iterable[str]) -> list[str]:
    """`template` with its one `{}` replaced by each class name in turn, whose underscores become spaces.

    Raises:
        ValueError: the template does not hold exactly one `{}`.
    """
    if template.count("{}") != 1:
        raise ValueError(f"template={template!r}: expected one {{}} for the class name")
    return [template.replace("{}", name.replace("_", " ")) for name in class_names]


def _imagenet() -> tuple[str, ...]:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return tuple(fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES)
