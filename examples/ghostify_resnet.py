"""Ghostify a ResNet-18: look at the plan, convert, check, store, export.

    python examples/ghostify_resnet.py --size 224 --out resnet18-ghost

Random weights, so it runs anywhere; give your own where the comment says so. Needs the extras models and onnx.
"""

import argparse
from pathlib import Path

import torch

import ghostify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=2)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--out", type=Path, default=Path("resnet18-ghost"))
    options = parser.parse_args()

    torch.manual_seed(0)
    model = ghostify.load_model("torchvision:resnet18").eval()  # weights="resnet18.pth" loads trained ones
    x = torch.randn(1, 3, options.size, options.size)

    plan = ghostify.plan(model, ratio=options.ratio, example_inputs=x)
    print(plan)
    small = ghostify.apply(plan, model)  # calibration=images starts it better
    again = ghostify.load(ghostify.save(small, options.out / "model"), base=model)
    assert torch.equal(small(x), again(x))
    print(ghostify.export_onnx(again, options.out / "model.onnx", example_inputs=x))
    print(f"stored in {options.out}")


if __name__ == "__main__":
    main()
