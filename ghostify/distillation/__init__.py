"""Teaching the converted model to answer like the original one."""

from ghostify.distillation.config import DistillConfig
from ghostify.distillation.datasets import DATASETS, DataOptions, Splits, load_data, read_parquet
from ghostify.distillation.history import Epoch, Run, Scores
from ghostify.distillation.images import Augment, ImageBatches
from ghostify.distillation.losses import LOSSES, cross_entropy, dist_loss, distillation_loss, logit_mse
from ghostify.distillation.mixing import Mixed, mixed
from ghostify.distillation.training import distill

__all__ = [
    "DATASETS",
    "LOSSES",
    "Augment",
    "DataOptions",
    "DistillConfig",
    "Epoch",
    "ImageBatches",
    "Mixed",
    "Run",
    "Scores",
    "Splits",
    "cross_entropy",
    "dist_loss",
    "distill",
    "distillation_loss",
    "load_data",
    "logit_mse",
    "mixed",
    "read_parquet",
]
