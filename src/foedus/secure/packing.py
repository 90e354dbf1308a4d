"""Several small integers in one slot of a ciphertext, with head-room for the sum; or a large one over several slots.

Sums never carry from one field into the next: a field has as many bits as the sum of everybody's largest value needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import GuaranteeError, SiloError


@dataclass(frozen=True)
class Packing:
    """Integers from 0 to `largest`, of which up to `parties` are added in slots of `slot_bits` bits (1 to 62).

    >>> Packing(largest=255, parties=100, slot_bits=45).per_slot
    3
    """

    largest: int
    parties: int
    slot_bits: int

    def __post_init__(self) -> None:
        if self.largest < 1 or self.parties < 1 or not 1 <= self.slot_bits <= 62:
            raise ValueError(
                f"Expected largest={self.largest} >= 1, parties={self.parties} >= 1 and slot_bits={self.slot_bits} in "
                "1…62."
            )
        if self.largest * self.parties >= 2**64:
            raise GuaranteeError(
                "sums below 2^64",
                f"{self.parties} values of up to {self.largest}",
                "Lower [secure] range or word, or sum in groups.",
            )
        if self.parties >= 2**self.slot_bits:
            raise GuaranteeError(
                f"slots in which {self.parties} silos can add a bit each",
                f"{self.slot_bits} bits",
                "Sum in smaller groups.",
            )

    @property
    def field(self) -> int:
        """Bits of the largest sum."""
        return (self.largest * self.parties).bit_length()

    @property
    def per_slot(self) -> int:
        """Values in one slot; 0 where one value takes several."""
        return self.slot_bits // self.field

    @property
    def limb(self) -> int:
        """Bits of a value in each slot, where it takes several: so few that `parties` of them add up in one."""
        most: int = (2**self.slot_bits - 1) // self.parties
        return (most + 1).bit_length() - 1

    @cached_property
    def limbs(self) -> int:
        """Slots of one value, where it takes several."""
        return -(-self.largest.bit_length() // self.limb)

    def slots(self, count: int) -> int:
        """Slots that `count` values take."""
        return -(-count // self.per_slot) if self.per_slot else count * self.limbs

    def pack(self, values: np.ndarray) -> np.ndarray:
        """(count,) uint64 values → (slots,) uint64. Raises `SiloError` for a value above `largest`: nothing wraps."""
        if values.size and int(values.max()) > self.largest:
            raise SiloError(
                f"values of at most {self.largest}, so that {self.parties} of them have room",
                f"{int(values.max())}",
                "Raise [secure] word or lower its range in a new treaty; nothing has left this silo.",
            )
        if not self.per_slot:
            parts = [(values >> _u64(self.limb * i)) & _u64((1 << self.limb) - 1) for i in range(self.limbs)]
            return np.concatenate(parts)
        width = self.slots(len(values))
        out = np.zeros(width, np.uint64)
        for i in range(self.per_slot):
            piece = values[i * width : (i + 1) * width]
            out[: len(piece)] |= piece << _u64(self.field * i)
        return out

    def unpack(self, slots: np.ndarray, count: int) -> np.ndarray:
        """(count,) uint64 sums from the (slots,) sums of what `pack` gave. What is no such sum shows: the last value of
        a slot keeps all bits that are left, and is then too large.
        """
        if not self.per_slot:
            rows = slots.reshape(self.limbs, count)
            sums: np.ndarray = np.add.reduce([row << _u64(self.limb * i) for i, row in enumerate(rows)])
            return sums
        low, last = _u64((1 << self.field) - 1), self.per_slot - 1
        fields = [(slots >> _u64(self.field * i)) & low for i in range(last)]
        return np.concatenate([*fields, slots >> _u64(self.field * last)])[:count]


def _u64(value: int) -> np.uint64:
    return np.uint64(value)
