"""Files as CLIP-LoRA writes them."""

import torch

TOWERS = {"text": ["transformer"], "vision": ["visual.transformer"], "both": ["transformer", "visual.transformer"]}

ATTRIBUTES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}


def clip_lora_file(path, *, encoder="both", params=("q", "k", "v"), position="all", layers=2, r=2, alpha=1, d=32):
    """What CLIP-LoRA's save_lora writes: the layers of the text encoder first, then those of the image encoder."""
    weights = {
        f"layer_{i}": {
            ATTRIBUTES[name]: {"w_lora_A": torch.randn(r, d) * 0.3, "w_lora_B": torch.randn(d, r) * 0.3}
            for name in params
        }
        for i in range(layers * len(TOWERS[encoder]))
    }
    metadata = {"r": r, "alpha": alpha, "encoder": encoder, "params": list(params), "position": position}
    torch.save({"weights": weights, "metadata": metadata}, path)
    return weights
