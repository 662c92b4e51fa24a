"""Several processes that train one run: how they find each other, and what they agree on.

All of them do the same, each with its share of the tasks. What there is to go on from is for process 0 to say, which
alone has the folder of the run. With one process every function here returns what it was given.
"""

import hashlib
import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from metagen_jax.sharding import bits, of_bits
from metagen_jax.types import ArrayTree

FOUND_WITHIN = 300  # seconds in which all processes have to have been started
HEARTBEAT = 30  # seconds without one after which a process is taken for dead
WAITED_FOR = 3600  # seconds that a process that is done waits for the others, one of which evaluates


class Disagreement(ValueError):
    """Processes that should do the same were given different things."""


def connect(coordinator: str, count: int, index: int) -> None:
    """Make this process one of several; before anything else that has to do with devices.

    Args:
        coordinator: HOST:PORT of process 0, the same for all; process 0 opens the port.
        count: of the processes.
        index: of this one, from 0.

    Raises:
        ValueError: an address, a count or an index that cannot be; or the others were not there in time.
    """
    if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}", coordinator):
        raise ValueError(f"the coordinator's address is HOST:PORT, got {coordinator!r}")
    if not 0 < int(coordinator.rsplit(":", 1)[1]) < 2**16:
        raise ValueError(f"a port is a number from 1 to 65535, got {coordinator!r}")
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"expected a count of at least 1 and an index from 0 to below it, got {count} and {index}")
    _initialise(coordinator_address=coordinator, num_processes=count, process_id=index)


def connect_cluster() -> None:
    """Make this process one of those that a cluster started (Slurm, Open MPI, Kubernetes, TPU pods), as jax finds out.

    Raises:
        ValueError: this is no cluster that jax knows; or the others were not there in time.
    """
    _initialise()


def is_first() -> bool:
    """Whether this is process 0, which keeps the run."""
    return jax.process_index() == 0


def leave_the_others(code: int) -> None:
    """End this process at once, if it is one of several: at a normal end it would wait for what they no longer get."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def agreed(text: str | None) -> str | None:
    """Return the text that process 0 gave, on every process, each of which has to call this."""
    if jax.process_count() == 1:
        return text
    content = b"" if text is None else b"\x01" + text.encode()
    received = _broadcast(content)
    return received[1:].decode() if received else None


def agreed_tree(tree: Any, like: ArrayTree) -> Any:
    """Return the tree that process 0 gave, or None if it gave None, on every process, bit for bit.

    Args:
        tree: of arrays on this process's devices; only that of process 0 is looked at.
        like: the same shapes and dtypes, known to all: `jax.eval_shape(...)`.
    """
    if jax.process_count() == 1:
        return tree
    content = b""
    if is_first() and tree is not None:
        content = b"\x01" + b"".join(np.asarray(bits(leaf)).tobytes() for leaf in jax.tree.leaves(tree))
    received = memoryview(_broadcast(content))
    if not received:
        return None
    leaves, begin = [], 1
    for leaf in jax.tree.leaves(like):
        shape = jax.eval_shape(bits, leaf)
        end = begin + shape.size * shape.dtype.itemsize
        values = np.frombuffer(received[begin:end], shape.dtype).reshape(shape.shape)
        leaves.append(of_bits(jnp.array(values), leaf))
        begin = end
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def largest(number: int) -> int:
    """Return the largest of the numbers that the processes gave."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array(number, np.int32)).max())


def check_same(what: str, text: str) -> None:
    """Raise on every process unless all of them gave the same text.

    Raises:
        Disagreement: which processes differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest)).reshape(-1, len(digest))
    others = [str(index) for index, other in enumerate(digests) if (other != digests[0]).any()]
    if others:
        which = ", ".join(others)
        raise Disagreement(f"{what} of process {which} differs from that of process 0; all have to be given the same")


def _broadcast(content: bytes) -> bytes:
    """Return the bytes of process 0 on every process."""
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(content), np.int32)))
    if not length:
        return b""
    buffer = np.frombuffer(content, np.uint8) if is_first() else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes()


def _initialise(**options: Any) -> None:
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=FOUND_WITHIN,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=WAITED_FOR,
        )
    except (RuntimeError, ValueError) as error:  # jax has one of them for each way of not finding the others
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the processes of this run did not find each other ({first}); start all of them within "
            f"{FOUND_WITHIN} seconds with the same --distributed.coordinator HOST:PORT, a port that is free on process "
            "0's host, the same --distributed.processes, and --distributed.index 0, 1, ..."
        ) from error
