"""What order is drawn from a seed? Seeds of any parts, and permutations that are looked up, not stored.

A Feistel network permutes the numbers of some bits, so any place costs the same. Changing what these functions return
changes every run: tests hold known values.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Sequence

import numpy as np

_ROUNDS = 8
_STRETCH = 1024
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else, the same in every process and version."""
    digest = hashlib.blake2b(b"".join(map(_encode, parts)), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeds_of_each(key: int, numbers: Sequence[int]) -> list[int]:
    """A 63-bit seed for each number, counted from 0: that output of SplitMix64 started at `key`, without its last bit.

    Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195. A tenth of the time that `seed_of` takes.
    """
    mixed = np.uint64(key) + (np.array(numbers, dtype=np.uint64) + np.uint64(1)) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).tolist()


def _encode(part: int | str) -> bytes:
    """Parts in a row are told apart."""
    if isinstance(part, str):
        text = part.encode()
        return b"s%d:" % len(text) + text
    return b"i%d;" % operator.index(part)


def permute(index: int | np.ndarray, size: int, key: int) -> int | np.ndarray:
    """Where a permutation of range(size), chosen by a 64-bit key, sends an index or an array of them."""
    half = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))
    walked = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    assert size > 0 and (walked < size).all(), f"indices must lie in range({size})"
    outside = np.ones(walked.shape, dtype=bool)
    while outside.any():  # cycle walking: the network permutes fewer than 4 * size values, 4 turns at worst
        walked[outside] = _feistel(walked[outside], half, _round_keys(key))
        outside = walked >= size
    result = walked.astype(np.int64)
    return result if isinstance(index, np.ndarray) else int(result[0])


def permuted(first: int, last: int, size: int, key: int) -> np.ndarray:
    """permute(np.arange(first, last), size, key), of stretches that are kept for the next micro-batches: so many take
    no longer than a few."""
    begin = first // _STRETCH
    stretches = [_stretch(i, size, key) for i in range(begin, (last - 1) // _STRETCH + 1)]
    return np.concatenate(stretches)[first - begin * _STRETCH : last - begin * _STRETCH]


@functools.lru_cache(maxsize=64)
def _stretch(number: int, size: int, key: int) -> np.ndarray:
    return permute(np.arange(number * _STRETCH, min(size, (number + 1) * _STRETCH)), size, key)


@functools.lru_cache(maxsize=256)
def _round_keys(key: int) -> np.ndarray:
    digest = hashlib.blake2b(_encode(key), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: np.ndarray, half: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    """A bijection of the numbers of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_key in round_keys:
        mixed = (right ^ round_key) * _MULTIPLIER
        mixed = (mixed ^ (mixed >> np.uint64(32))) * _MULTIPLIER
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << half) | right
