"""Write a batch of keys into queues that hold K keys of every class.

It is one operator, which compilers do not look into. Inductor would turn the writes in place into copies of the whole
queues, and a compiled step would take several times as long.
"""

import math

import torch
from torch import Tensor

from .library import define


def _enqueue(queue_h: Tensor, queue_z: Tensor, pointer: Tensor, h: Tensor, z: Tensor, labels: Tensor) -> None:
    """The implementation of the operator ``enqueue``."""
    if not len(labels):
        return
    length = queue_h.size(2)
    h, z = h.to(queue_h.dtype), z.to(queue_z.dtype)
    finite = torch.cat([h, z], dim=1).abs().amax(1) < math.inf
    place_in_class = ((labels[:, None] == labels) & finite).tril(-1).sum(1)
    slot = torch.add((pointer.gather(0, labels) + place_in_class) % length, labels, alpha=length) * finite
    # All keys of one slot are replaced by the last finite one of them, so the order of the writes does not matter.
    # Keys that are not finite write to the very first slot: its new key, or if there is none its old one.
    writers = (slot[:, None] == slot) & finite
    count, last = writers.cumsum(1).max(1)  # max gives the first of equal counts: the place of the slot's last key
    written = count[:, None] > 0
    for queue, keys in ((queue_h, h), (queue_z, z)):
        slots = queue.flatten(1).T
        slots.index_copy_(0, slot, torch.where(written, keys.index_select(0, last), slots[:1].contiguous()))
    pointer.index_add_(0, labels, finite.to(pointer.dtype)).remainder_(length)


_enqueue_op = define(
    "enqueue(Tensor(a!) queue_h, Tensor(b!) queue_z, Tensor(c!) pointer, Tensor h, Tensor z, Tensor labels) -> ()",
    _enqueue,
    lambda queue_h, queue_z, pointer, h, z, labels: None,
)


def enqueue(queue_h: Tensor, queue_z: Tensor, pointer: Tensor, h: Tensor, z: Tensor, labels: Tensor) -> None:
    """Write keys in batch order, each to its class's next slot. With more than K keys of one class the last ones stay.

    A key with a value that is not finite in ``h`` or ``z``, in the queue's dtype, is not written. There is no
    synchronisation.

    Args:
        queue_h: ``[F, C, K]``, contiguous, overwritten in place.
        queue_z: ``[D, C, K]``, contiguous, overwritten in place.
        pointer: ``[C]``, integers, each class's next slot, updated in place.
        h: the keys of the first queue, ``[b, F]``, without gradients.
        z: the keys of the second queue, ``[b, D]``, without gradients.
        labels: ``[b]``, int64 in [0, C).
    """
    _enqueue_op(queue_h, queue_z, pointer, h, z, labels)
