"""Comp-LoRA on transformers' CLIP, which `save_pretrained` saves with its adapter."""

import torch
import transformers

import complora_kernels as ck

NAME = "openai/clip-vit-base-patch32"


def main(pixel_values: torch.Tensor, labels: torch.Tensor, input_ids: torch.Tensor, steps: int = 50) -> float:
    """Train on images [N, 3, H, W] with labels [N], one prompt a class [C, L]; return the last loss."""
    model = transformers.CLIPModel.from_pretrained(NAME)
    ck.apply_complora(model, ck.CompLoRAConfig(r=4, sides="both", subspace_energy=0.9, target_modules=("q", "v", "o")))
    optimizer = torch.optim.AdamW(ck.adapter_parameters(model), lr=1e-3, weight_decay=0.1)
    loss = torch.zeros(())
    for _ in range(steps):
        logits = model(pixel_values=pixel_values, input_ids=input_ids).logits_per_image  # [N, C]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("clip-with-adapter")  # the adapter lies in the folder `complora` within, for ck.load_adapter
    return loss.item()


if __name__ == "__main__":
    texts = transformers.CLIPTokenizer.from_pretrained(NAME)(["a photo of a cat.", "a photo of a dog."], padding=True)
    print(f"loss {main(torch.randn(8, 3, 224, 224), torch.arange(8) % 2, torch.tensor(texts['input_ids'])):.3f}")
