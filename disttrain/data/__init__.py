"""Data sets, which rank gets which sample when, and batches."""

from disttrain.data.augment import crop, cutout, mirror, mirrored_alternately, mirrored_by_chance, reflected
from disttrain.data.batching import Batching, Fetched
from disttrain.data.dataset import Datasets, MemorySplit, SampleSet, SampleSets, Split, SplitOutline, StreamSplit
from disttrain.data.digest import Digest, digest_of
from disttrain.data.eval_loader import EvalBatch, EvalLoader
from disttrain.data.labels import labels_of
from disttrain.data.load import as_samples, load_datasets
from disttrain.data.loader import Batch, Loader, StepBatch
from disttrain.data.normalise import normalise
from disttrain.data.pytree import tensors_in, to_device
from disttrain.data.repeat import unlike_when_read_again
from disttrain.data.sampler import StepSampler
from disttrain.data.sizes import batch_sizes_without_single_samples, largest_part, smallest_batch, smallest_part
from disttrain.data.sources.custom import as_datasets, as_sample_sets, as_split
from disttrain.data.sources.picture import read_picture
from disttrain.data.sources.tabular import table_sets

__all__ = [
    "Batch",
    "Batching",
    "Datasets",
    "Digest",
    "EvalBatch",
    "EvalLoader",
    "Fetched",
    "Loader",
    "MemorySplit",
    "SampleSet",
    "SampleSets",
    "Split",
    "SplitOutline",
    "StepBatch",
    "StepSampler",
    "StreamSplit",
    "as_datasets",
    "as_sample_sets",
    "as_samples",
    "as_split",
    "batch_sizes_without_single_samples",
    "crop",
    "cutout",
    "digest_of",
    "labels_of",
    "largest_part",
    "load_datasets",
    "mirror",
    "mirrored_alternately",
    "mirrored_by_chance",
    "normalise",
    "read_picture",
    "reflected",
    "smallest_batch",
    "smallest_part",
    "table_sets",
    "tensors_in",
    "to_device",
    "unlike_when_read_again",
]
