"""The bundled small CLIP: tokenizer, renderer, the accuracy of the shipped weights, and the training that made them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import matplotlib
import open_clip
import pytest
import torch
from numerics import share_named_right
from safetensors.torch import load_file

from complora_kernels.fewshot import captions, glyphs, pretrain, render


@pytest.fixture(scope="module")
def glyph_clip():
    return glyphs.load_glyph_clip()


@pytest.fixture
def tokenizer():
    return glyphs.GlyphTokenizer(captions.build_vocabulary(), context_length=16)


def tiny_config(output: Path, **changes: int) -> pretrain.PretrainConfig:
    settings = {
        "steps": 3,
        "batch_size": 8,
        "jitter_steps": 2,
        "width": 32,
        "image_layers": 1,
        "text_layers": 1,
        "log_every": 2,
    }
    return pretrain.PretrainConfig(output=output, **(settings | changes))


def test_class_names_are_ten_digits_and_26_letters():
    assert (len(glyphs.DIGITS), len(glyphs.LETTERS)) == (10, 26)
    for name, character in zip(glyphs.CLASS_NAMES, render.CHARACTERS, strict=True):
        expected = f"digit {glyphs.DIGITS[int(character)]}" if character.isdigit() else f"letter {character.lower()}"
        assert name == f"the {expected}"


def test_tokenizer_marks_the_end_with_the_largest_id(tokenizer):
    tokens = tokenizer(["the digit seven", "a red drawing of the letter q on black"])
    assert tokens.shape == (2, 16)
    assert tokens.dtype == torch.int64
    end = max(tokenizer.vocabulary.values())
    assert tokens.argmax(-1).tolist() == [4, 10]
    assert (tokens == end).sum(-1).tolist() == [1, 1]
    assert tokens[0, 0] == tokenizer.vocabulary["<start>"]
    assert not tokens[0, 5:].any()


def test_tokenizer_ignores_case_and_punctuation(tokenizer):
    assert torch.equal(tokenizer("A photo of the digit seven."), tokenizer("a photo of, the DIGIT seven"))


def test_tokenizer_knows_every_caption_word_but_one(tokenizer):
    unknown = tokenizer.vocabulary["<unk>"]
    batch = captions.sample_batch(200, 1.0, torch.Generator().manual_seed(0))
    for caption, tokens in zip(batch.captions, tokenizer(batch.captions), strict=True):
        assert (tokens == unknown).sum() == ("something" in caption)


def test_tokenizer_maps_unknown_words(tokenizer):
    unknown = tokenizer.vocabulary["<unk>"]
    assert tokenizer.encode("a zebra")[1:-1] == [tokenizer.vocabulary["a"], unknown]
    # The marks cannot be written in a text: "end" is a word like any other, and not in the vocabulary.
    assert tokenizer.encode("<end>")[1:-1] == [unknown]


def test_tokenizer_refuses_texts_with_too_many_words(tokenizer):
    assert tokenizer("a " * 14)[0, -1] == tokenizer.vocabulary["<end>"]
    with pytest.raises(ValueError, match="has 15 words, expected at most 14"):
        tokenizer(["the letter a", "a " * 15])


@pytest.mark.parametrize(
    "vocabulary",
    [{"<pad>": 0, "<unk>": 1, "<end>": 2, "<start>": 3}, {"<pad>": 0, "<unk>": 2, "<start>": 3, "<end>": 4}],
)
def test_tokenizer_refuses_a_bad_vocabulary(vocabulary):
    with pytest.raises(ValueError, match="vocabulary: expected"):
        glyphs.GlyphTokenizer(vocabulary)


def test_held_out_fonts_are_not_trained_on():
    assert len(render.HELD_OUT_FONTS) >= 4
    assert not set(render.HELD_OUT_FONTS) & set(render.TRAINING_FONTS)
    trained = torch.stack([render.distance_fields(font) for font in render.TRAINING_FONTS])
    for font in render.HELD_OUT_FONTS:
        # Different names could still hide equal outlines: each font differs by a twentieth of a character somewhere.
        assert ((render.distance_fields(font) - trained).abs().amax((1, 2, 3)) > 0.05).all()


def test_render_glyphs_depends_on_its_generator_alone():
    classes = torch.arange(36)

    def draw(seed: int) -> torch.Tensor:
        return render.render_glyphs(classes, generator=torch.Generator().manual_seed(seed))

    first = draw(0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(first, draw(0))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, draw(1))
    assert first.shape == (36, 3, 32, 32)
    assert first.dtype == torch.uint8


def test_render_glyphs_uses_the_given_classes_and_colours():
    """Without jitter, the brightest and the darkest pixel have the colours asked for."""
    front, back = list(render.FOREGROUNDS), list(render.GROUNDS)
    images = render.render_glyphs(
        torch.tensor([0, 21]),
        ("DejaVuSans-Bold",),
        generator=torch.Generator().manual_seed(0),
        foregrounds=torch.tensor([front.index("red"), front.index("white")]),
        grounds=torch.tensor([back.index("black"), back.index("navy")]),
        jitter=0.0,
    )
    for image, colour, ground in zip(images, ("red", "white"), ("black", "navy"), strict=True):
        pixels = image.flatten(1).T.int()
        for target in (render.FOREGROUNDS[colour], render.GROUNDS[ground]):
            assert (pixels - torch.tensor(target)).abs().amax(-1).min() <= 3


def test_render_glyphs_refuses_an_unknown_font():
    with pytest.raises(ValueError, match="font='Comic'"):
        render.render_glyphs(torch.arange(2), ("Comic",), generator=torch.Generator())


def test_preprocess_resizes_and_normalises():
    images = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)
    pixels = glyphs.preprocess(images)
    assert pixels.dtype == torch.float32
    config = json.loads((glyphs.ASSETS / glyphs.CONFIG_FILE).read_text())["preprocess_cfg"]
    expected = (51 / 255 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    # Float32 rounding of a weighted mean of equal pixels.
    torch.testing.assert_close(pixels, expected[:, None, None].expand(2, 3, 32, 32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_preprocess_refuses_other_pictures(images):
    with pytest.raises(ValueError, match="expected uint8"):
        glyphs.preprocess(images)


def test_letter_test_set_is_fixed():
    images, labels = glyphs.letter_test_set()
    again, _ = glyphs.letter_test_set()
    assert torch.equal(images, again)
    assert torch.equal(labels.bincount(), torch.full((26,), 20))


def test_bundled_model_is_a_plain_open_clip(glyph_clip):
    model, tokenizer, _ = glyph_clip
    assert type(model) is open_clip.model.CLIP
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.visual.image_size == (32, 32)
    assert model.context_length == tokenizer.context_length


def test_loading_leaves_the_random_state():
    before = torch.get_rng_state()
    glyphs.load_glyph_clip()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("template", ["a drawing of {}.", "a photo of {}.", "{}", "a sketch of {}"])
def test_bundled_model_classifies_characters_in_held_out_fonts(glyph_clip, template):
    model, tokenizer, preprocess = glyph_clip
    images, labels = glyphs.held_out_test_set()
    texts = tokenizer([template.format(name) for name in glyphs.CLASS_NAMES])
    with torch.no_grad():
        logits_per_image, _ = model.get_logits(preprocess(images), texts)
    accuracy = glyphs.zero_shot_accuracy(model, tokenizer, images, labels, glyphs.CLASS_NAMES, template)
    assert accuracy >= 0.93
    assert accuracy == share_named_right(logits_per_image / model.logit_scale.detach().exp(), labels)


def test_bundled_model_classifies_letters_in_held_out_fonts(glyph_clip):
    model, tokenizer, _ = glyph_clip
    assert glyphs.zero_shot_accuracy(model, tokenizer, *glyphs.letter_test_set(), glyphs.LETTERS) >= 0.95


def test_bundled_log_belongs_to_the_default_settings():
    settings, *lines = [json.loads(line) for line in (glyphs.ASSETS / pretrain.LOG_FILE).read_text().splitlines()]
    default = pretrain.PretrainConfig()
    assert settings == {field.name: getattr(default, field.name) for field in fields(default) if field.name != "output"}
    assert [line["step"] for line in lines] == list(range(default.log_every, default.steps + 1, default.log_every))
    assert lines[-1]["held_out_accuracy"] >= 0.93
    assert json.loads((glyphs.ASSETS / glyphs.VOCABULARY_FILE).read_text()) == captions.build_vocabulary()


def test_assets_fit_in_five_megabytes():
    sizes = [path.stat().st_size for path in glyphs.ASSETS.iterdir()]
    assert 0 < sum(sizes) <= 5e6


def stated(caption: str) -> dict[str, str]:
    """The facts that a caption states, read from its words."""
    words = caption.split()
    subject = words.index("digit" if "digit" in words else "letter")
    said = {"class": " ".join(words[subject : subject + 2])}
    for name, palette in (("foreground", render.FOREGROUNDS), ("ground", render.GROUNDS)):
        said.update((name, word) for word in words if word in palette)
    return said


def test_sample_batch_knows_which_captions_are_true(monkeypatch):
    """`is_true` against the colours that the renderer was asked for and the words of the captions."""
    asked = {}
    draw = captions.render_glyphs

    def watch(classes, **options):
        asked.update(classes=classes, **options)
        return draw(classes, **options)

    monkeypatch.setattr(captions, "render_glyphs", watch)
    batch = captions.sample_batch(300, 0.5, torch.Generator().manual_seed(3))
    colours, grounds = list(render.FOREGROUNDS), list(render.GROUNDS)
    for i, is_true in enumerate(batch.is_true.tolist()):
        picture = {
            "class": glyphs.CLASS_NAMES[asked["classes"][i]].removeprefix("the "),
            "foreground": colours[asked["foregrounds"][i]],
            "ground": grounds[asked["grounds"][i]],
        }
        assert is_true[i]
        assert is_true == [stated(caption).items() <= picture.items() for caption in batch.captions]


def test_contrastive_loss_matches_a_loop():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    images, texts = features / features.norm(dim=-1, keepdim=True)
    is_true = torch.rand(6, 6, generator=generator) < 0.3
    is_true.fill_diagonal_(True)
    loss, _ = pretrain.contrastive_loss(images, texts, torch.tensor(7.0, dtype=torch.float64), is_true)
    expected = 0.0
    for i in range(6):
        for truth, cosines in ((is_true[i], texts @ images[i]), (is_true[:, i], images @ texts[i])):
            rivals = [j for j in range(6) if j == i or not truth[j]]
            expected -= torch.log_softmax(7 * cosines[rivals], 0)[rivals.index(i)].item() / 12
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_pretrain_is_deterministic(tmp_path):
    for run, noise in (("one", 1), ("two", 2)):
        torch.manual_seed(noise)
        pretrain.pretrain(tiny_config(tmp_path / run))
    one, two = (load_file(tmp_path / run / glyphs.WEIGHTS_FILE) for run in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    pretrain.pretrain(tiny_config(tmp_path / "three", seed=1))
    three = load_file(tmp_path / "three" / glyphs.WEIGHTS_FILE)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    log = [json.loads(line) for line in (tmp_path / "one" / pretrain.LOG_FILE).read_text().splitlines()]
    assert log[0]["steps"] == 3
    assert [line["step"] for line in log[1:]] == [2, 3]


def test_pretrained_files_load(tmp_path):
    pretrain.pretrain(tiny_config(tmp_path))
    model, tokenizer, preprocess = glyphs.load_glyph_clip(folder=tmp_path)
    images, _ = glyphs.letter_test_set()
    assert model.encode_image(preprocess(images[:4])).shape == (4, 32)
    assert model.encode_text(tokenizer("the letter a")).shape == (1, 32)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_pretrain_leaves_the_folder_unchanged(tmp_path, monkeypatch, error):
    pretrain.pretrain(tiny_config(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*_: object) -> bytes:
        raise error

    threads = torch.get_num_threads()
    changed = tiny_config(tmp_path, seed=1, threads=threads + 1)
    monkeypatch.setattr(pretrain, "save" if error is OSError else "sample_batch", interrupt)
    with pytest.raises(error):
        pretrain.pretrain(changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "setting", [{"steps": 0}, {"batch_size": 0}, {"width": 48}, {"learning_rate": 0.0}, {"threads": -1}]
)
def test_pretrain_config_names_the_wrong_value(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        pretrain.PretrainConfig(**setting)


def test_a_matplotlib_without_the_late_font_draws_the_same_pictures(tmp_path, monkeypatch):
    fields = render.distance_fields(render.LATE_FONT)
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    render.distance_fields.cache_clear()
    assert torch.equal(render.distance_fields(render.LATE_FONT), fields)
    with pytest.raises(ValueError, match="expected a font that matplotlib ships"):
        render.distance_fields("cmr10")
    render.distance_fields.cache_clear()
