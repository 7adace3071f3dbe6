"""The sub-command ``ghostify distill``, on one processor or on many."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from ghostify.cli_options import Batch, Data, Json, Model, Pretrained, Seed, Student, Weights, show, stored, trained
from ghostify.deployment import load, save
from ghostify.deployment.artefact import check_replaceable
from ghostify.distillation import DataOptions, DistillConfig, distill, load_data
from ghostify.distillation.history import Epoch
from ghostify.errors import OptionError


def distill_command(
    model: Model,
    student: Student,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for checkpoints, history and the trained student")],
    epochs: Annotated[int, typer.Option(min=1, help="how often to go through the training data")] = 10,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = DistillConfig.lr,
    warmup: Annotated[float | None, typer.Option(help="share of the steps before the peak")] = None,
    schedule: Annotated[str, typer.Option(help="one-cycle or cosine")] = DistillConfig.schedule,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw")] = DistillConfig.optimizer,
    weight_decay: Annotated[
        float, typer.Option(help="on weights, not on norms and biases")
    ] = DistillConfig.weight_decay,
    loss: Annotated[str, typer.Option(help="kd, mse or dist")] = "kd",
    hard_weight: Annotated[float, typer.Option(help="weight of the labels, 0 to 1; the teacher has the rest")] = 0.0,
    temperature: Annotated[float, typer.Option(help="softens both networks' answers")] = 4.0,
    features: Annotated[
        list[str] | None, typer.Option(help="'sites' (every Ghost unit), or a layer to match, too; repeatable")
    ] = None,
    feature_loss: Annotated[str, typer.Option(help="mse or attention")] = "mse",
    feature_weight: Annotated[float, typer.Option(help="of the feature loss")] = DistillConfig.feature_weight,
    mixup: Annotated[float, typer.Option(help="α of MixUp; 0 does without")] = 0.0,
    ema: Annotated[float | None, typer.Option(help="decay of a moving average of the weights")] = None,
    patience: Annotated[int | None, typer.Option(help="stop after so many epochs without a better one")] = None,
    batch_size: Batch = 128,
    val_size: Annotated[
        int | None, typer.Option(min=1, help="training images held out for choices, where DATA has none for it")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="side to which imagefolder:, hf: and wds: scale images")
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="parts in which a batch is computed")] = 1,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    cache_teacher: Annotated[
        bool, typer.Option("--cache-teacher", help="ask the teacher once about every image; none is augmented then")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="compile both networks")] = False,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="record and replay both networks")] = False,
    freeze_norms: Annotated[
        bool, typer.Option("--freeze-norms", help="leave batch norms' statistics as they are")
    ] = False,
    sync_norms: Annotated[bool, typer.Option("--sync-norms", help="norms see the rows of all processes")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in OUT, if there is one")] = False,
    state_every: Annotated[int, typer.Option(min=1, help="steps between two states to go on from")] = 1000,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write events for TensorBoard, too")] = False,
    weights: Weights = None,
    pretrained: Pretrained = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a converted model to answer like the original one; OUT/student is the result.

    Under `accelerate launch -m ghostify distill …` or `torchrun -m ghostify distill …` it runs in several processes.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(
        level=logging.INFO if is_main else logging.ERROR, format="%(message)s", handlers=[logging.StreamHandler()]
    )
    config = DistillConfig(
        lr=lr,
        warmup=warmup,
        schedule=schedule,
        optimizer=optimizer,
        weight_decay=weight_decay,
        loss=loss,
        hard_weight=hard_weight,
        temperature=temperature,
        features=_features(features),
        feature_loss=feature_loss,
        feature_weight=feature_weight,
        mixup=mixup,
        ema=ema,
        patience=patience,
        accumulate=accumulate,
        precision=precision,
        cache_teacher=cache_teacher,
        compile=compiled,
        cuda_graphs=cuda_graphs,
        freeze_norms=freeze_norms,
        sync_norms=sync_norms,
        state_every=state_every,
        tensorboard=tensorboard,
        seed=seed,
    )
    check_replaceable(out / "student")
    place = _device(device)
    teacher = trained(model, pretrained, weights)
    small = load(student, base=teacher).to(place)
    teacher.to(place)
    options = DataOptions(
        batch_size=batch_size,
        val_size=val_size,
        augment=not cache_teacher,
        seed=seed,
        image_size=image_size,
        device=place,
    )
    splits = load_data(data, options)
    run = distill(
        small,
        teacher=teacher,
        data=splits.train,
        val=splits.val,
        epochs=epochs,
        out=out,
        config=config,
        resume=resume,
    )
    if not is_main:
        return
    save(small, out / "student")
    if as_json:
        show(json.dumps([dataclasses.asdict(epoch) for epoch in run.history], indent=1))
        return
    show("\n".join([*map(_line, run.history), f"best: epoch {run.best_epoch}"]) + stored(out / "student"))


def _line(epoch: Epoch) -> str:
    accuracy = "unknown" if epoch.val_accuracy is None else f"{100 * epoch.val_accuracy:.2f} %"
    return f"epoch {epoch.epoch}: loss {epoch.loss:.4f}, validation accuracy {accuracy}"


def _features(given: list[str] | None) -> str | tuple[str, ...] | None:
    return None if not given else "sites" if given == ["sites"] else tuple(given)


def _device(name: str) -> torch.device:
    """Where to compute; one of several processes on a machine has the GPU of its own number."""
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(f"device={name!r} is unknown. Pass auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device='cuda': torch finds no GPU here. Pass auto or cpu.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
