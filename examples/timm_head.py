"""Comp-LoRA on a ViT of timm with a new head, which is trained as a whole and saved with the adapter."""

import timm
import torch

import complora_kernels as ck

NAME = "vit_small_patch16_224.augreg_in21k"


def main(images: torch.Tensor, labels: torch.Tensor, classes: int, steps: int = 50) -> float:
    """Train on images [N, 3, H, W] with labels [N], and return the last loss."""
    model = timm.create_model(NAME, pretrained=True, num_classes=classes)
    targets = ("q", "k", "v", "o", "fc1", "fc2")
    ck.apply_complora(model, ck.CompLoRAConfig(r=8, target_modules=targets, modules_to_save=("head",)))
    head = list(model.get_classifier().parameters())
    factors = [parameter for parameter in ck.adapter_parameters(model) if all(parameter is not of for of in head)]
    optimizer = torch.optim.AdamW([{"params": factors, "lr": 2e-4}, {"params": head, "lr": 1e-3}])
    loss = torch.zeros(())
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ck.save_adapter(model, "adapter")
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main(torch.randn(8, 3, 224, 224), torch.arange(8) % 4, 4):.3f}")
