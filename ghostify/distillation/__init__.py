"""Teaching the converted model to answer like the original one."""

from ghostify.distillation.augmentation import Augment
from ghostify.distillation.config import DistillConfig
from ghostify.distillation.datasets import DATASETS, load_data, read_parquet
from ghostify.distillation.epochs import EpochBatches
from ghostify.distillation.features import FEATURE_LOSSES, FeatureTaps, attention_transfer, feature_mse
from ghostify.distillation.history import Epoch, Run, Scores
from ghostify.distillation.images import ImageBatches
from ghostify.distillation.losses import LOSSES, cross_entropy, dist_loss, distillation_loss, logit_mse
from ghostify.distillation.mixing import Mixed, mixed
from ghostify.distillation.pictures import PictureBatches
from ghostify.distillation.shards import ShardBatches
from ghostify.distillation.splits import DataOptions, Splits
from ghostify.distillation.training import distill

__all__ = [
    "DATASETS",
    "FEATURE_LOSSES",
    "LOSSES",
    "Augment",
    "DataOptions",
    "DistillConfig",
    "Epoch",
    "EpochBatches",
    "FeatureTaps",
    "ImageBatches",
    "Mixed",
    "PictureBatches",
    "Run",
    "Scores",
    "ShardBatches",
    "Splits",
    "attention_transfer",
    "cross_entropy",
    "dist_loss",
    "distill",
    "distillation_loss",
    "feature_mse",
    "load_data",
    "logit_mse",
    "mixed",
    "read_parquet",
]
