"""Adapt a Vision Transformer to new classes with LBP-WHT: the whole program on one screen.

    python examples/quickstart.py

It downloads nothing and takes seconds on a CPU. A small ViT learns scikit-learn's handwritten digits 0 to 4, which
stands for pre-training, and is then adapted to the digits 5 to 9. To adapt a model of your own, replace `pretrained`
by `AutoModelForImageClassification.from_pretrained(...)` and `digits` by your images.
"""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from lbp_peft import LBPWHTConfig


def digits(first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 1, 32, 32) and labels (N,), then test images and labels, by writers not trained on."""
    data = load_digits()
    chosen = (data.target >= first) & (data.target <= last)
    images = torch.tensor(data.images[chosen], dtype=torch.float32)[:, None] / 8 - 1
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    labels = torch.tensor(data.target[chosen] - first)
    split = len(images) * 2 // 3
    return images[:split], labels[:split], images[split:], labels[split:]


def pretrained() -> ViTForImageClassification:
    """A ViT with 8 x 8 patches and [CLS] that knows the digits 0 to 4, and a new head for five other classes."""
    config = ViTConfig(
        image_size=32, patch_size=4, num_channels=1, hidden_size=96, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=384, num_labels=5, initializer_range=0.1,
    )  # fmt: skip
    vit = ViTForImageClassification(config)
    train(vit, *digits(0, 4)[:2], epochs=4, learning_rate=1e-3)
    vit.classifier = nn.Linear(config.hidden_size, config.num_labels)
    return vit


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, learning_rate: float) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=True)
    model.train()  # the low-rank backward pass is active in training mode only
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(20):
            loss = model(pixel_values=images[batch], labels=labels[batch]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"  epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(pixel_values=images).logits.argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    print("Pre-training on the digits 0 to 4")
    vit = pretrained()
    images, labels, test_images, test_labels = digits(5, 9)
    # These layers are too narrow to be faster with a low-rank backward pass, so "auto" would leave them exact.
    model = get_peft_model(vit, LBPWHTConfig(r=10, grad_input_dtype="full", modules_to_save=["classifier"]))
    model.print_trainable_parameters()
    print("Adapting to the digits 5 to 9")
    train(model, images, labels, epochs=4, learning_rate=1e-3)
    print(f"Test accuracy: {accuracy(model, test_images, test_labels):.1%}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = PeftModel.from_pretrained(model.unload(), folder)
        print(f"Test accuracy of the saved adapter: {accuracy(reloaded, test_images, test_labels):.1%}")


if __name__ == "__main__":
    main()
