"""Runs that live behind a URL: worked on in a local folder, and uploaded beside the training."""

from disttrain.remote.copy import local_copy as local_copy
from disttrain.remote.copy import runs_behind as runs_behind
from disttrain.remote.copy import verify_behind as verify_behind
from disttrain.remote.lease import Lease as Lease
from disttrain.remote.mirror import Mirror as Mirror
from disttrain.remote.place import RemoteRun as RemoteRun
from disttrain.remote.store import Brought as Brought
from disttrain.remote.store import MirroredStore as MirroredStore
