"""Checkpoints that exist or do not: written under a temporary name, verified on load, retired by newer ones."""

from disttrain.checkpoint.check import check_complete as check_complete
from disttrain.checkpoint.check import check_describes_model as check_describes_model
from disttrain.checkpoint.folder import AVERAGE as AVERAGE
from disttrain.checkpoint.folder import Checkpoint as Checkpoint
from disttrain.checkpoint.folder import open_checkpoint as open_checkpoint
from disttrain.checkpoint.folder import read_checkpoint as read_checkpoint
from disttrain.checkpoint.folder import verify_checkpoint as verify_checkpoint
from disttrain.checkpoint.folder import weights_sha256 as weights_sha256
from disttrain.checkpoint.folder import write_checkpoint as write_checkpoint
from disttrain.checkpoint.shards import ShardStore as ShardStore
from disttrain.checkpoint.state import optimizer_from_tensors as optimizer_from_tensors
from disttrain.checkpoint.state import optimizer_to_tensors as optimizer_to_tensors
from disttrain.checkpoint.store import CheckpointStore as CheckpointStore
from disttrain.checkpoint.tensors import shared_names as shared_names
from disttrain.checkpoint.tensors import why_not_held as why_not_held
from disttrain.checkpoint.writer import CheckpointWriter as CheckpointWriter
from disttrain.checkpoint.writer import Outcome as Outcome
