# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The pool of training images: what is in it, and its bounds."""

import pytest
import torch

from anomalib_pedenet.data.image_pool import ImagePool


def batch(*values: float, size: int = 8) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, size, size)


def values(pool: ImagePool) -> list[float]:
    return sorted(pool.images[:, 0, 0, 0].tolist())


def test_it_grows_to_its_bound_and_then_forgets_the_oldest() -> None:
    pool = ImagePool(max_images=5, max_bytes=2**20)
    pool.add(batch(1, 2))
    assert values(pool) == [1, 2]
    pool.add(batch(3, 4))
    pool.add(batch(5, 6))
    assert values(pool) == [2, 3, 4, 5, 6]
    pool.add(batch(7))
    assert values(pool) == [3, 4, 5, 6, 7]


def test_memory_bounds_it() -> None:
    pool = ImagePool(max_images=100, max_bytes=3 * 3 * 8 * 8 * 2)
    for value in range(10):
        pool.add(batch(value))
    assert values(pool) == [7, 8, 9]


def test_a_batch_always_has_place() -> None:
    pool = ImagePool(max_images=2, max_bytes=1)
    pool.add(batch(1, 2, 3))
    assert values(pool) == [1, 2, 3]


def test_images_of_another_size_start_it_anew() -> None:
    pool = ImagePool(max_images=10, max_bytes=2**20)
    pool.add(batch(1, 2))
    pool.add(batch(3, size=16))
    assert values(pool) == [3]


def test_it_keeps_eight_bit_levels_apart() -> None:
    levels = torch.arange(256) / 255
    images = ((levels - 0.4) / 0.225).repeat(3, 1)[None, :, None, :]
    pool = ImagePool(max_images=1, max_bytes=2**20)
    pool.add(images)
    steps = pool.images.float().diff(dim=-1)
    assert steps.min() > 0.5 / 255 / 0.225


def test_an_empty_pool_says_so() -> None:
    with pytest.raises(RuntimeError, match="holds no images yet"):
        _ = ImagePool(max_images=1, max_bytes=1).images


def test_its_state_and_the_sources_make_it_anew() -> None:
    """In the same order, and full or not: crops are drawn from it by position."""
    for last in (3, 8):
        pool = ImagePool(max_images=5, max_bytes=2**20)
        for first in range(1, last, 2):
            pool.add(batch(first, first + 1), [f"{first}", f"{first + 1}"])
        copied = ImagePool(max_images=5, max_bytes=2**20)
        copied.load_state_dict(pool.state_dict(), (batch(float(name)) for name in pool.sources), pool.sources)
        assert copied.images[:, 0, 0, 0].tolist() == [float(name) for name in pool.sources]
        for one in (pool, copied):
            one.add(batch(9, 10), ["9", "10"])
        assert torch.equal(pool.images, copied.images)
        assert pool.sources == copied.sources


def test_a_pool_of_other_limits_is_not_made_anew() -> None:
    pool = ImagePool(max_images=5, max_bytes=2**20)
    pool.add(batch(1, 2), ["1", "2"])
    with pytest.raises(ValueError, match="set the same cache_gib"):
        ImagePool(max_images=5, max_bytes=2**19).load_state_dict(pool.state_dict(), [], ["1", "2"])
