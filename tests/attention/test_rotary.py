"""Rotary positions against complex numbers."""

import torch
from torch.testing import assert_close

from ecp_scale.attention import rotate, rotation


def test_adjacent_pairs_turn_like_complex_numbers() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 100, 2047])
    turned = rotate(x, rotation(positions, 8, 10000.0, torch.float64))
    for n, position in enumerate(positions.tolist()):
        for pair in range(4):
            angle = torch.tensor(position * 10000.0 ** (-2 * pair / 8), dtype=torch.float64)
            z = torch.complex(x[:, :, n, 2 * pair], x[:, :, n, 2 * pair + 1]) * torch.polar(
                torch.ones_like(angle), angle
            )
            assert_close(turned[:, :, n, 2 * pair], z.real)
            assert_close(turned[:, :, n, 2 * pair + 1], z.imag)


def test_scores_depend_on_distances_alone_even_at_a_million() -> None:
    q, k = torch.randn(2, 1, 1, 1, 64)
    near, far = (
        (rotate(q, turns[0]) * rotate(k, turns[1])).sum()
        for turns in (
            [rotation(torch.tensor([p]), 64, 10000.0, torch.float32) for p in pair]
            for pair in ([5, 2], [1_000_005, 1_000_002])
        )
    )
    assert_close(near, far, rtol=0, atol=1e-5)


def test_the_type_of_the_input_stays() -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    assert rotate(x, rotation(torch.arange(3), 4, 10000.0, torch.float32)).dtype == torch.bfloat16
