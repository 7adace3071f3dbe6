"""Teaching the converted model to answer like the original one."""

from ghostify.distillation.augmentation import Augment
from ghostify.distillation.config import DistillConfig
from ghostify.distillation.datasets import DATASETS, load_data, read_parquet
from ghostify.distillation.epochs import EpochBatches
from ghostify.distillation.history import Epoch, Run, Scores
from ghostify.distillation.images import ImageBatches
from ghostify.distillation.losses import LOSSES, cross_entropy, distillation_loss, logit_mse
from ghostify.distillation.pictures import PictureBatches
from ghostify.distillation.shards import ShardBatches
from ghostify.distillation.splits import DataOptions, Splits
from ghostify.distillation.training import distill

__all__ = [
    "DATASETS",
    "LOSSES",
    "Augment",
    "DataOptions",
    "DistillConfig",
    "Epoch",
    "EpochBatches",
    "ImageBatches",
    "PictureBatches",
    "Run",
    "Scores",
    "ShardBatches",
    "Splits",
    "cross_entropy",
    "distill",
    "distillation_loss",
    "load_data",
    "logit_mse",
    "read_parquet",
]
