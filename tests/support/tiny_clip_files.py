"""The configuration of a tiny CLIP."""

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": [24, 16], "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
