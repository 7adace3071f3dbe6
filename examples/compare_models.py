"""Compare a network with its Ghost network: parameters, MACs, latency, accuracy, and a page to look at.

    python examples/compare_models.py --out comparison

A small ResNet on scikit-learn's handwritten digits, trained here in seconds. Needs the extra demo.
"""

import argparse
from pathlib import Path

import torch

import ghostify
from ghostify.demo import train_classifier
from ghostify.nn.cifar import CifarResNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="of the original, and of the distillation")
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    options = parser.parse_args()

    torch.manual_seed(0)
    data = ghostify.load_data("digits")
    model = CifarResNet(1, in_channels=1)
    train_classifier(model, data.train, epochs=options.epochs, seed=0)

    images = data.train.sample(256)
    small = ghostify.convert(model, ratio=2, example_inputs=images[:1], calibration=images)
    run = ghostify.distill(
        small,
        teacher=model,
        data=data.train,
        val=data.val,
        epochs=options.epochs,
        config=ghostify.DistillConfig(lr=0.03),
    )
    report = ghostify.compare(model, small, example_inputs=images[:1], data=data.test, history=run)
    print(report)
    for suffix in ("html", "md", "json", "csv"):
        report.save(options.out / f"report.{suffix}")
    print(f"the page: {options.out / 'report.html'}")


if __name__ == "__main__":
    main()
