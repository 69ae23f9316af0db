"""How processes share the samples of an epoch: the union of their batches is that of one process alone."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class Share(NamedTuple):
    """What of each batch a process computes, and in how many pieces.

    Attributes:
        rank: of the process.
        world: number of processes.
        pieces: of the process' part of a batch, computed one after another.
    """

    rank: int = 0
    world: int = 1
    pieces: int = 1

    @property
    def parts(self) -> int:
        """Into how many pieces all processes together divide a batch."""
        return self.world * self.pieces


class TrainingPieces(Sampler[list[int]]):
    """The pieces of one process, in an order that depends on the generator alone.

    Piece k of a batch takes its k-th run of samples from the front and the mirrored run from the back. So the mirrored
    partner of each sample, with which mixup and cutmix mix it, is in the same piece.

    Args:
        length: the number of samples; what does not fill a last batch is left out.
        batch_size: of all pieces together, at most ``length``; a multiple of the number of parts.
        share: of this process.
        generator: of the order, in the same state in every process.
    """

    def __init__(self, length: int, batch_size: int, share: Share, generator: torch.Generator) -> None:
        self.length = length
        self.batch_size = batch_size
        self.share = share
        self.generator = generator

    def __len__(self) -> int:
        return self.length // self.batch_size * self.share.pieces

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.length, generator=self.generator).tolist()
        first = self.share.rank * self.share.pieces
        for start in range(0, self.length - self.batch_size + 1, self.batch_size):
            batch = order[start : start + self.batch_size]
            for piece in range(first, first + self.share.pieces):
                yield mirrored_piece(batch, piece, self.share.parts)


def mirrored_piece(batch: list[int], piece: int, parts: int) -> list[int]:
    """Take a run from the front of a batch and the mirrored run from its back."""
    size = len(batch) // parts
    front, back = size - size // 2, size // 2
    if front != back:  # an odd piece is never mixed
        return batch[piece * size : (piece + 1) * size]
    end = len(batch) - piece * back
    return batch[piece * front : (piece + 1) * front] + batch[end - back : end]
