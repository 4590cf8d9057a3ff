"""Data sets, who gets which sample when, and batches."""

from disttrain.data.augment import crop, cutout, flip
from disttrain.data.dataset import Datasets, MemorySplit, SampleSet, SampleSets, Split, StreamSplit
from disttrain.data.digest import Digest, digest_of
from disttrain.data.load import load_datasets
from disttrain.data.loader import Batch, EvalLoader, Loader, StepBatch
from disttrain.data.normalise import normalise
from disttrain.data.repeat import unlike_when_read_again
from disttrain.data.sampler import StepSampler
from disttrain.data.sizes import batch_sizes_without_single_samples, smallest_batch, smallest_part
from disttrain.data.sources.custom import as_datasets, as_split
from disttrain.data.sources.picture import read_picture

__all__ = [
    "Batch",
    "Datasets",
    "Digest",
    "EvalLoader",
    "Loader",
    "MemorySplit",
    "SampleSet",
    "SampleSets",
    "Split",
    "StepBatch",
    "StepSampler",
    "StreamSplit",
    "as_datasets",
    "as_split",
    "batch_sizes_without_single_samples",
    "crop",
    "cutout",
    "digest_of",
    "flip",
    "load_datasets",
    "normalise",
    "read_picture",
    "smallest_batch",
    "smallest_part",
    "unlike_when_read_again",
]
