"""Comp-LoRA on open_clip in a loop of one's own: `python examples/own_loop.py FOLDER`, a folder of images a class."""

import sys

import open_clip
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import complora_kernels as ck

NAME, WEIGHTS = "ViT-B-32-quickgelu", "openai"


def main(folder: str, epochs: int = 10) -> float:
    """Train on all images of the folder, save the adapter in ./adapter, and return the last loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, augment, _ = open_clip.create_model_and_transforms(NAME, pretrained=WEIGHTS, device=device)
    data = ImageFolder(folder, augment)
    prompts = open_clip.get_tokenizer(NAME)([f"a photo of a {name}." for name in data.classes]).to(device)
    ck.apply_complora(model, ck.CompLoRAConfig(r=2, lora_alpha=1.0, use_rslora=True, lora_dropout=0.25))
    optimizer = torch.optim.AdamW(ck.adapter_parameters(model), lr=2e-4, weight_decay=1e-2)
    loss = torch.zeros(())
    for _ in range(epochs):
        for images, labels in DataLoader(data, batch_size=32, shuffle=True):
            image_features, text_features, scale = model(images.to(device), prompts)
            loss = cross_entropy(scale * image_features @ text_features.T, labels.to(device))
            loss.backward()
            ck.check_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    ck.save_adapter(model, "adapter")
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main(sys.argv[1]):.3f}")
