"""Halve a trained ResNet-20 and distil it: CIFAR-10, every 3×3 convolution but the stem at ratio 2.

    python examples/cifar10_resnet20.py --epochs 3
    python examples/cifar10_resnet20.py --epochs 3 --initialiser random --lr 0.05 --warmup 0.3

Needs CIFAR-10 as parquet files and the trained weights; `--data` and `--weights` say where they are.
5,000 of the training images choose the best epoch; the test images are scored once, at the end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from safetensors.torch import load_file

import ghostify
from ghostify.nn.cifar import resnet20

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=SHARED / "cifar10", help="folder of train-*.parquet and test-*.parquet")
    parser.add_argument("--weights", default=SHARED / "weights" / "cifar10_resnet20.safetensors")
    parser.add_argument("--ratio", type=float, default=2)
    parser.add_argument("--initialiser", default="alternating", help="or any other of ghostify's")
    parser.add_argument("--images", type=int, default=1024, help="unlabelled training images to start from")
    parser.add_argument("--epochs", type=int, default=3)
    # A good start wants a low peak soon; docs/initialisation.md tells what was tried on the validation images.
    parser.add_argument("--loss", default="mse", help="kd, mse or dist")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps before the peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("cifar10-run"))
    options = parser.parse_args()

    teacher = resnet20()
    teacher.load_state_dict(load_file(options.weights))
    teacher.eval()
    data = ghostify.load_data(f"parquet:{options.data}")
    images = data.train.sample(options.images)

    began = time.perf_counter()
    student = ghostify.convert(
        teacher,
        ratio=options.ratio,
        example_inputs=images[:1],
        calibration=images,
        initialiser=options.initialiser,
        seed=options.seed,
    )
    print(student.ghostify_plan)
    print(f"\nstarted from the old weights ({options.initialiser}) in {time.perf_counter() - began:.1f} s", flush=True)

    run = ghostify.distill(
        student,
        teacher=teacher,
        data=data.train,
        val=data.val,
        epochs=options.epochs,
        out=options.out,
        config=ghostify.DistillConfig(loss=options.loss, lr=options.lr, warmup=options.warmup, seed=options.seed),
    )
    start = run.start
    print(
        f"validation accuracy {100 * start.accuracy:.2f} % at the start (teacher {100 * start.teacher_accuracy:.2f} %)"
    )
    for epoch in run.history:
        print(
            f"validation accuracy {100 * epoch.val_accuracy:.2f} % after epoch {epoch.epoch} "
            f"({epoch.seconds:.0f} s, {epoch.images_per_second:.0f} images/s)"
        )

    report = ghostify.compare(teacher, student, example_inputs=images[:1], data=data.test, history=run)
    print(f"\n{report}")
    report.save(options.out / "report.html")
    ghostify.save(student, options.out / "student")
    print(f"\npage {options.out / 'report.html'}, model {options.out / 'student'}")


if __name__ == "__main__":
    main()
