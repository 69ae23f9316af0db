"""The processes' pieces of a batch are together the batch of one process."""

import pytest
import torch

from timm_apvit.finetuning.data import create_batches
from timm_apvit.finetuning.digits import load_embedded_digits
from timm_apvit.finetuning.sharing import Share, TrainingPieces, mirrored_piece


def pieces(share: Share, length: int = 21, batch_size: int = 8) -> list[list[int]]:
    return list(TrainingPieces(length, batch_size, share, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(('world', 'number'), [(2, 1), (1, 2), (2, 2), (4, 1), (8, 1)])
def test_union_of_pieces_is_the_batch_of_one_process(world: int, number: int) -> None:
    alone = pieces(Share())
    assert [len(batch) for batch in alone] == [8, 8]
    shared = [pieces(Share(rank, world, number)) for rank in range(world)]
    assert all(len(TrainingPieces(21, 8, Share(0, world, number), torch.Generator())) == len(own) for own in shared)
    for n, batch in enumerate(alone):
        union = [index for own in shared for piece in own[n * number : (n + 1) * number] for index in piece]
        assert sorted(union) == sorted(batch)


@pytest.mark.parametrize('parts', [1, 2, 3, 6])
def test_mirrored_partners_are_in_the_same_piece(parts: int) -> None:
    batch = list(range(12))
    for number in range(parts):
        piece = mirrored_piece(batch, number, parts)
        assert len(piece) == 12 // parts
        assert [batch[::-1][index] for index in piece] == piece[::-1]


def test_pieces_of_odd_size_cover_the_batch() -> None:
    batch = list(range(9))
    assert [mirrored_piece(batch, n, 3) for n in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_processes_load_the_same_images_as_one_alone() -> None:
    splits = load_embedded_digits(0, (1, 16, 16), 8, 7)

    def load(share: Share, shuffle: bool) -> dict[bytes, int]:
        samples = splits.train if shuffle else splits.test
        batches = create_batches(samples, 1, 4, shuffle=shuffle, share=share)
        return {image.numpy().tobytes(): int(label) for images, labels in batches
                for image, label in zip(images, labels, strict=True)}  # fmt: skip

    for shuffle, number in ((True, 8), (False, 7)):
        alone = load(Share(), shuffle)
        first, second = (load(Share(rank, 2), shuffle) for rank in range(2))
        assert len(alone) == number
        assert {**first, **second} == alone
        assert not first.keys() & second.keys()
