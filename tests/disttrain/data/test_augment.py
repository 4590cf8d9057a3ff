"""Augmentation of whole batches, against the same written plainly for one image."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from disttrain.data import crop, cutout, mirror, mirrored_alternately, mirrored_by_chance, normalise
from disttrain.data.augment import CROP_COLUMNS, CUTOUT_COLUMNS, FLIP_COLUMN, NUM_UNIFORM
from disttrain.rng import Draw


def images(batch: int, height: int = 7, width: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def uniform(batch: int, columns: int, seed: int) -> torch.Tensor:
    return torch.rand(batch, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 50))
def test_crop_shifts_each_image_over_a_black_border(batch: int, padding: int, seed: int) -> None:
    before, u = images(batch), uniform(batch, 2, seed)
    after = crop(before, padding, u)
    for image, cropped, (down, right) in zip(before, after, (u * (2 * padding + 1)).int().tolist(), strict=True):
        padded = functional.pad(image, (padding,) * 4)
        assert torch.equal(cropped, padded[:, down : down + 7, right : right + 9])


def test_crop_reaches_every_shift_and_no_further() -> None:
    before = images(1).expand(2, -1, -1, -1)
    extremes = crop(before, 2, torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]]))
    assert torch.equal(extremes[0, :, 2:, 2:], before[0, :, :-2, :-2])
    assert torch.equal(extremes[1, :, :-2, :-2], before[0, :, 2:, 2:])


def test_flip_mirrors_the_lower_half_of_the_numbers() -> None:
    before = images(3)
    after = mirror(before, mirrored_by_chance(torch.tensor([0.0, 0.5, 0.4999])))
    assert torch.equal(after[0], before[0].flip(-1))
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2].flip(-1))


def test_crop_can_mirror_the_edge_in_place_of_a_black_border() -> None:
    before, u = images(4), uniform(4, 2, seed=3)
    after = crop(before, 3, u, reflect=True)
    for image, cropped, (down, right) in zip(before, after, (u * 7).int().tolist(), strict=True):
        padded = functional.pad(image.double(), (3,) * 4, "reflect").byte()
        assert torch.equal(cropped, padded[:, down : down + 7, right : right + 9])


def test_alternate_flips_show_each_image_from_both_sides_in_any_two_epochs() -> None:
    before, samples = images(40), torch.arange(40)
    shown = []
    for epoch in range(4):
        draw = Draw(7, epoch, samples, torch.device("cpu"))
        shown.append(mirror(before, mirrored_alternately(draw.for_all_epochs(1)[:, 0], epoch)))
    assert torch.equal(shown[0], shown[2])
    assert torch.equal(shown[1], shown[3])
    assert torch.equal(shown[0], shown[1].flip(-1))
    mirrored = sum(torch.equal(one, other.flip(-1)) for one, other in zip(shown[0], before, strict=True))
    assert 10 < mirrored < 30, "chance decides on the first epoch"
    # By the sample alone, whatever batch it is in.
    draw = Draw(7, 1, samples[30:], torch.device("cpu"))
    which = mirrored_alternately(draw.for_all_epochs(1)[:, 0], 1)
    assert torch.equal(mirror(before[30:], which), shown[1][30:])


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 50))
def test_cutout_blanks_a_square_around_each_centre(batch: int, side: int, seed: int) -> None:
    before, u = images(batch), uniform(batch, 2, seed)
    after = cutout(before, side, u)
    for image, cut, (row, column) in zip(before, after, (u * torch.tensor([7, 9])).int().tolist(), strict=True):
        expected = image.clone()
        top, left = row - side // 2, column - side // 2
        expected[:, max(0, top) : top + side, max(0, left) : left + side] = 0
        assert torch.equal(cut, expected)


def test_no_two_of_them_share_a_random_number() -> None:
    columns = range(NUM_UNIFORM)
    assert [*columns[CROP_COLUMNS], columns[FLIP_COLUMN], *columns[CUTOUT_COLUMNS]] == list(columns)


def test_they_take_floats_too_and_leave_their_input_alone() -> None:
    before, u = images(4).float(), uniform(4, 2, 0)
    kept = before.clone()
    turned = mirror(before, mirrored_by_chance(u[:, 0]))
    assert crop(before, 2, u).dtype == turned.dtype == cutout(before, 3, u).dtype == torch.float32
    assert torch.equal(before, kept)


def test_normalise_has_the_bits_of_its_formula_and_of_torchvision() -> None:
    from torchvision.transforms.functional import normalize

    raw, mean, std = images(64, 32, 32), (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    result = normalise(raw, mean, std)
    columns = [torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    assert torch.equal(result, ((raw.float() / 255) - columns[0]) / columns[1])
    assert torch.equal(result, normalize(raw.float().div(255), list(mean), list(std)))
    assert raw.dtype == torch.uint8
