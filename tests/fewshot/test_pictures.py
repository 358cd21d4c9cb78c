"""The pictures world: its sources and what damages them, captions, tokens, drawing, training, and the packaged data."""

from __future__ import annotations

import gzip
import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_icons import SHAPES, change, write_icons
from torch.nn import functional as F

from complora_kernels.fewshot.__main__ import main
from complora_kernels.fewshot.backbone import check_backbone
from complora_kernels.fewshot.datasets import load_dataset, pictures
from complora_kernels.fewshot.files import read_json_lines
from complora_kernels.fewshot.pictures import model as bundled
from complora_kernels.fewshot.pictures import pack
from complora_kernels.fewshot.pictures.augment import augmented, over
from complora_kernels.fewshot.pictures.captions import OF_TAGS, Captioner
from complora_kernels.fewshot.pictures.concepts import Concept, read_concepts
from complora_kernels.fewshot.pictures.families import SEEN, UNSEEN, check_sources, read_families
from complora_kernels.fewshot.pictures.pretrain import CHECKPOINT, PicturesConfig, Trainer, pretrain_pictures
from complora_kernels.fewshot.pictures.sources import read_sources
from complora_kernels.fewshot.pictures.tokenizer import END, PAD, train_tokenizer
from complora_kernels.fewshot.pretrain import contrastive_loss
from complora_kernels.fewshot.worlds import WORLDS


@pytest.fixture
def icons(tmp_path: Path) -> Path:
    return write_icons(tmp_path / "node_modules")


# ---- sources


def test_concepts_are_emoji_with_a_group(icons):
    assert read_concepts(icons) == [
        Concept("1f436", "dog face", ("animal", "pet"), "animals"),
        Concept("1f455", "t-shirt", ("shirt", "clothes", "tshirt"), "objects"),
        Concept("1f456", "jeans", ("clothes", "trousers"), "objects"),
        Concept("2764", "red heart", ("love",), "smileys"),
    ]


def test_icons_are_found_by_code_points_and_by_names(icons):
    concepts = read_concepts(icons)
    for family in read_families(icons, concepts, (*SEEN, UNSEEN)):
        assert family.codes == tuple(concept.code for concept in concepts)
        assert family.pictures.shape == (4, 4, 64, 64)
        assert not family.failures
        heart = family.pictures[3]
        assert heart[3, 2, 2] == 255  # opaque where the shape is
        assert heart[3, -2, 2] == 0
        assert heart[0, 2, 2] == (0 if family.name == UNSEEN else 0xDD)  # the outline, and the shape


def test_icons_that_do_not_render_are_named_and_the_rest_goes_on(icons):
    change(icons, "twemoji", "jeans", body='<path d="M0')
    change(icons, "twemoji", "t-shirt", body="")
    (family,) = read_families(icons, read_concepts(icons), ["twemoji"])
    assert family.codes == ("1f436", "2764")
    assert [(failure.family, failure.icon) for failure in family.failures] == [
        ("twemoji", "t-shirt"),
        ("twemoji", "jeans"),
    ]
    assert all(failure.reason for failure in family.failures)


def test_aliases_are_turned_and_mirrored(icons):
    path = icons / "@iconify-json" / "noto" / "icons.json"
    content = json.loads(path.read_text())
    content["aliases"] = {"jeans": {"parent": "red-heart", "vFlip": True}}
    del content["icons"]["jeans"]
    path.write_text(json.dumps(content))
    (family,) = read_families(icons, read_concepts(icons), ["noto"])
    torch.testing.assert_close(family.pictures[2], family.pictures[3].flip(1))


def test_missing_packages_are_named(icons):
    (icons / "@iconify-json" / "twemoji" / "icons.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"@iconify-json/twemoji not found"):
        check_sources(icons, SEEN)
    (icons / "emojibase-data" / "en" / "data.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected the npm package emojibase-data"):
        read_concepts(icons)


def test_a_damaged_package_is_named(icons):
    (icons / "@iconify-json" / "noto" / "icons.json").write_text("{")
    with pytest.raises(ValueError, match=r"noto.icons\.json"):
        read_sources(icons)


# ---- captions and tokens


def test_captions_are_true_of_what_they_name(icons):
    """A caption without a name is true of every concept that has all its tags, as a tag or in its name."""
    concepts = [*read_concepts(icons), Concept("1", "monkey", ("jeans", "red heart"), "animals")]
    captioned = torch.arange(5).repeat(300)
    drawn = Captioner(concepts).draw(torch.arange(5), captioned, torch.Generator().manual_seed(0))
    tags = {tag for concept in concepts for tag in concept.tags}
    by_tags = [
        re.compile(re.escape(form).replace(r"\{tag\}", "(.+)").replace(r"\{tag2\}", "(.+)")) for form in OF_TAGS[::-1]
    ]
    seen = set()
    for text, concept, true in zip(drawn.texts, captioned.tolist(), drawn.is_true.T, strict=True):
        name, own_tags = concepts[concept].name, concepts[concept].tags
        named = name in text
        matches = [match for form in by_tags if (match := form.fullmatch(text)) and set(match.groups()) <= tags]
        if named:  # with a tag beside it the name says which concept is meant
            said = set() if any(tag in text.replace(name, "") for tag in own_tags) else {name}
        else:
            said = set(matches[0].groups())
        expected = {i for i, each in enumerate(concepts) if said and said <= {*each.tags, *each.name.split()}}
        expected |= {concept} if named else set()
        assert set(true.nonzero()[:, 0].tolist()) == expected, text
        seen.add((named, len(said), len(expected)))
    assert (True, 1, 2) in seen  # "a photo of a jeans." is true of the monkey that has some
    assert (False, 1, 2) in seen  # "clothes", of two things
    assert (False, 2, 1) in seen


def test_names_that_were_never_read_are_told_apart():
    tokenizer = train_tokenizer(["a photo of a dog", "the cat"] * 5, 300, context_length=12)
    texts = ["Zürich", "zurich", "a photo of a dog", "A photo of a DOG", "犬", "猫"]
    tokens = tokenizer(texts)
    assert len({tuple(row) for row in tokens.tolist()}) == 5  # case alone is not told apart
    assert (tokens == tokenizer.end).sum(1).tolist() == [1] * 6
    assert tokens.max() == tokenizer.end
    assert tokenizer.vocab_size <= 300


def test_long_texts_are_truncated_before_their_end(tmp_path):
    tokenizer = train_tokenizer(["word"], 280, context_length=6)
    (short,), (long,) = tokenizer("ab"), tokenizer("abcdefghijk")
    assert short.tolist()[-1] == 0
    assert long.tolist()[-1] == tokenizer.end
    assert tokenizer("abcdefghijk", context_length=30)[0, :5].tolist() == long.tolist()[:5]
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = bundled.load_tokenizer(path, 6)
    torch.testing.assert_close(again(["some words", "déjà"]), tokenizer(["some words", "déjà"]))


def test_a_tokenizer_without_its_places_is_refused():
    from tokenizers import Tokenizer, models

    from complora_kernels.fewshot.pictures.tokenizer import PictureTokenizer

    with pytest.raises(ValueError, match=f"expected {PAD} as id 0 and {END} as the largest of 2"):
        PictureTokenizer(Tokenizer(models.WordLevel({END: 0, PAD: 1})), 8)


# ---- pictures


def test_a_picture_over_a_ground():
    picture = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    picture[:, 0, :, :32], picture[:, 3, :, :32] = 255, 255
    (image,) = over(1.0, picture, 32)
    assert image[:, 5, 5].tolist() == [255, 0, 0]
    assert image[:, 5, 28].tolist() == [255, 255, 255]


def test_drawn_pictures_depend_on_the_generator_alone():
    pixels = torch.randint(256, (8, 4, 64, 64), dtype=torch.uint8)
    mirrors = torch.ones(8, dtype=torch.bool)
    first, second, other = (augmented(pixels, mirrors, 48, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert (first - other).abs().mean() > 0.05
    assert first.shape == (8, 3, 48, 48)
    assert first.min() >= 0
    assert first.max() <= 1


def test_only_pictures_that_may_be_mirrored_are():
    torch.manual_seed(0)
    pixels, mirrors = torch.randint(256, (64, 4, 64, 64), dtype=torch.uint8), torch.arange(64) < 48
    plain, mirrored = (
        augmented(pixels, asked, 48, torch.Generator().manual_seed(0)) for asked in (mirrors & False, mirrors)
    )
    changed = (plain - mirrored).abs().amax((1, 2, 3)) > 0.1
    assert not changed[48:].any()
    assert 12 < changed[:48].sum() < 36


# ---- the loss and the training


def test_the_loss_of_more_captions_than_pictures():
    """Against cross-entropies written out, in float64."""
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(n, 7, dtype=torch.float64), dim=-1) for n in (3, 5))
    is_true = torch.zeros(3, 5, dtype=torch.bool)
    is_true[[0, 1, 2, 0], [0, 1, 2, 4]] = True  # the last caption is true of the first picture, too
    logits = 10.0 * images @ texts.T
    first = logits[0, :4].logsumexp(0) - logits[0, 0]
    of_images = [first, *(F.cross_entropy(logits[i], torch.tensor(i)) for i in (1, 2))]
    of_texts = [F.cross_entropy(logits[:, i], torch.tensor(i)) for i in range(3)]
    expected = (sum(of_images) / 3 + sum(of_texts) / 3) / 2
    loss, _ = contrastive_loss(images, texts, torch.tensor(10.0, dtype=torch.float64), is_true)
    torch.testing.assert_close(loss, expected)


def small(icons: Path, output: Path, steps: int = 4) -> PicturesConfig:
    sizes: dict[str, Any] = {"size": 16, "patch": 8, "width": 32, "image_layers": 1, "text_width": 32, "text_layers": 1}
    counts: dict[str, Any] = {
        "batch_size": 8,
        "negatives": 4,
        "vocab_size": 300,
        "context_length": 64,
        "log_every": 2,
        "checkpoint_every": 1,
        "threads": 1,
    }
    return PicturesConfig(sources=icons, output=output, steps=steps, **sizes, **counts)


def test_a_stopped_training_goes_on_as_if_it_had_not(icons, tmp_path, monkeypatch):
    pretrain_pictures(small(icons, tmp_path / "whole"))
    steps = []

    def step(self: Trainer) -> float:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(self)

    original = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        pretrain_pictures(small(icons, tmp_path / "parts"))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [CHECKPOINT]
    pretrain_pictures(replace(small(icons, tmp_path / "parts"), fashion=fashion_files(tmp_path / "photos")))
    assert (tmp_path / "parts" / pictures.INDEX_FILE).is_file()
    whole, parts = (bundled.load_picture_clip(folder=tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert not (tmp_path / "parts" / CHECKPOINT).exists()


def test_texts_of_similar_lengths_are_encoded_together(icons, tmp_path):
    trainer = Trainer(small(icons, tmp_path), read_sources(icons))
    texts = ["a", "a photo of a dog face, animal.", "jeans", "the red heart", "a picture of a t-shirt", "dog"]
    expected = [trainer.model.encode_text(trainer.tokenizer(text), normalize=True)[0] for text in texts]
    torch.testing.assert_close(trainer.encode_texts(texts), torch.stack(expected))


def test_a_checkpoint_of_other_settings_is_refused(icons, tmp_path, monkeypatch):
    config = small(icons, tmp_path)
    trainer = Trainer(config, read_sources(icons))
    torch.save(trainer.state(), tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: of other settings"):
        pretrain_pictures(small(icons, tmp_path, steps=5))
    change(icons, "twemoji", "jeans", body="")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: of other settings or pictures"):
        pretrain_pictures(config)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 and more"])
def test_a_damaged_checkpoint_is_named(icons, tmp_path, content):
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        pretrain_pictures(small(icons, tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [CHECKPOINT]


def test_a_small_model_learns_a_batch_that_it_sees_often(icons, tmp_path, monkeypatch):
    trainer = Trainer(small(icons, tmp_path, steps=100), read_sources(icons))
    batch = trainer.batch()
    monkeypatch.setattr(trainer, "batch", lambda: batch)
    losses = [trainer.step() for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 0), ("negatives", -1), ("size", 50), ("width", 40), ("learning_rate", 0.0), ("threads", 0)],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        PicturesConfig(**{option: value})


# ---- the packaged data


def fashion_files(folder: Path) -> Path:
    """Fashion-MNIST's files with as few photos as a package needs; one of them compressed."""
    folder.mkdir()
    for kind, n in (("train", pack.TRAIN), ("t10k", pack.TEST)):
        labels = torch.arange(10).repeat(n).to(torch.uint8)
        images = (labels[:, None, None] * 20 + torch.zeros(1, 28, 28)).to(torch.uint8)
        header = struct.pack(">iiii", 0x803, len(images), 28, 28)
        (folder / f"{kind}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.numpy().tobytes()))
        header = struct.pack(">ii", 0x801, len(labels))
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return folder


def test_pictures_that_are_trained_on_are_not_packed(icons, tmp_path, monkeypatch):
    taken = json.loads((icons / "@iconify-json" / "twemoji" / "icons.json").read_text())["icons"]["dog-face"]
    change(icons, UNSEEN, "dog-face", **taken)
    pack.write_data(tmp_path, read_sources(icons), pack.read_photos(fashion_files(tmp_path / "fashion")))
    monkeypatch.setattr(pictures, "ASSETS", tmp_path)
    assert "dog face" not in data("pictures").class_names
    assert len(data("pictures").class_names) == len(SHAPES) - 1


def test_too_few_photos_are_refused_before_the_training(icons, tmp_path):
    photos = fashion_files(tmp_path / "photos")
    packed = photos / "train-images-idx3-ubyte.gz"
    for damage in (b"", gzip.compress(b"junk"), packed.read_bytes()[:1000]):
        packed.write_bytes(damage)
        with pytest.raises(ValueError, match="photos"):
            pretrain_pictures(replace(small(icons, tmp_path / "out"), fashion=photos))
    assert not list((tmp_path / "out").iterdir())


def test_a_sheet_of_another_index_is_refused(tmp_path, monkeypatch):
    for path in pictures.ASSETS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "unseen.webp").write_bytes((tmp_path / "shots.webp").read_bytes())
    monkeypatch.setattr(pictures, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"unseen\.webp is not the sheet"):
        data("animals")


def data(name: str) -> Any:
    return pictures.load_data(name)


def test_what_is_packed_is_read_again(icons, tmp_path, monkeypatch):
    sources = read_sources(icons)
    pack.write_data(tmp_path, sources, pack.read_photos(fashion_files(tmp_path / "fashion")))
    monkeypatch.setattr(pictures, "ASSETS", tmp_path)
    photos, objects, every = (data(name) for name in ("fashion", "objects", "pictures"))
    assert photos.images[:, 0, 0, 0].tolist() == (photos.labels * 20).tolist()
    assert (len(photos.train), len(photos.test)) == (10 * pack.TRAIN, 10 * pack.TEST)
    assert objects.class_names == ("t-shirt", "jeans")
    assert objects.labels.tolist() == [1]  # a t-shirt is a class of `fashion`
    expected = over(1.0, sources.unseen.pixels[[2]], pack.SIZE)
    torch.testing.assert_close(objects.images, expected, rtol=0, atol=0)
    assert len(every.class_names) == len(SHAPES)
    assert torch.bincount(every.labels[every.train]).tolist() == [4, 4]  # of the base half alone
    assert sorted(every.labels[every.test].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", pictures.NAMES)
def test_the_packaged_data_sets(name):
    dataset: Any = load_dataset(name)
    assert dataset.class_names == pictures.class_names(name)
    assert len(set(dataset.class_names)) == len(dataset.class_names)
    assert dataset.labels.max() < len(dataset.class_names)
    assert dataset.images.dtype == torch.uint8
    assert len(dataset.test) > 0


def test_the_package_stays_small():
    assert sum(path.stat().st_size for path in pictures.ASSETS.iterdir()) <= 12 * 10**6


def test_a_model_that_was_trained_here_is_a_backbone(icons, tmp_path):
    """From the command line to the gallery, on the kept sets of the package."""
    pretrain_pictures(small(icons, tmp_path / "model"))
    options = ["--preset", "pictures", "--pretrained", str(tmp_path / "model"), "--methods", "lora", "preserve"]
    options += ["--seeds", "0", "--learning-rates", "0.01", "--steps", "4", "--shots", "2", "--workers", "1"]
    options += ["--max-test-images", "40", "--output", str(tmp_path / "out")]
    assert main(["train", *options]) == 0
    lines = read_json_lines(tmp_path / "out" / "results.jsonl")
    assert [set(line["tasks"]) for line in lines] == [{*pictures.KEPT, "letters"}] * 2
    assert (tmp_path / "out" / "figures" / "gallery.png").is_file()


def test_a_model_without_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(WORLDS, "pictures", WORLDS["pictures"]._replace(assets=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"--model pictures: .* expected --pretrained"):
        check_backbone("pictures")
    with pytest.raises(FileNotFoundError, match=r"expected a folder written by `complora pretrain-pictures`"):
        check_backbone("pictures", str(tmp_path))


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(["pretrain-pictures", "--sources", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "@iconify-json/noto" in capsys.readouterr().err
    write_icons(tmp_path)
    options = ["--sources", str(tmp_path), "--fashion", str(tmp_path)]
    assert main(["pretrain-pictures", *options, "--output", str(tmp_path / "out")]) == 2
    assert "train-images-idx3-ubyte" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
