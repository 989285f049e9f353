"""Integer hash functions for random numbers and seeds that are equal on every device, in every process and batch.

splitmix64 and fold_in derive the sampling noise (64-bit tensors), hash32 chooses the candidates of dead codebook
entries (32-bit tensors), and seed_from derives the seed of a training step (Python integers). Each algorithm is fixed:
another one would change samples and trained models.
"""

from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment: 2**64 divided by the golden ratio, made odd


def to_signed(value: int) -> int:
    """Return the int64 that has the lowest 64 bits of `value`: torch has no arithmetic on unsigned 64-bit integers."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def splitmix64(x: Tensor) -> Tensor:
    """Mix the bits of int64 numbers, one to one: the output function of SplitMix64.

    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators", with the constants of variant 13 of
    Stafford's mixer.
    """
    # torch's >> repeats the sign bit. The masks clear these copies: the shift has to be a logical one.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * to_signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * to_signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def fold_in(key: Tensor, value: Tensor) -> Tensor:
    """Derive a new int64 key from a key and a number, elementwise."""
    return splitmix64(key + (value + 1) * to_signed(GOLDEN_GAMMA))


def hash32(x: Tensor) -> Tensor:
    """Mix the bits of 32-bit numbers held in int64, one to one. Source: Wellons 2018, lowbias32."""
    x = ((x ^ (x >> 16)) * 0x7FEB_352D) & 0xFFFF_FFFF
    x = ((x ^ (x >> 15)) * 0x846C_A68B) & 0xFFFF_FFFF
    return x ^ (x >> 16)


def seed_from(*numbers: int) -> int:
    """Derive a 63-bit seed from numbers of 0 to 2**64 - 1: FNV-1a over their bytes.

    Source: Fowler, Noll and Vo, RFC 9923. Raises OverflowError for a number out of range.
    """
    value = 0xCBF29CE484222325  # FNV's offset basis for 64 bits
    for number in numbers:
        for byte in number.to_bytes(8, "little"):
            value = (value ^ byte) * 0x100000001B3 % 2**64  # FNV's prime for 64 bits
    return value >> 1  # torch's generators take a signed 64-bit seed
