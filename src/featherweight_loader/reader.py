"""Takes numbers, names and bytes from the front of a head, and says when there are no more."""

from __future__ import annotations

from featherweight_loader.errors import DamagedBundle

_VARINT = 9  # bytes, so below 2^63


class Reader:
    """Bytes and the place in them that is read next."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data = data
        self.at = at

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self._data) - self.at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.left:
            raise DamagedBundle("the head ends too early", where=f"byte {self.at} of the head")
        found = self._data[self.at : self.at + count]
        self.at += count
        return found

    def number(self, size: int) -> int:
        """An unsigned integer of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        """An unsigned integer of up to nine bytes, seven bits in each."""
        found = 0
        for place in range(_VARINT):
            if self.at >= len(self._data):
                break
            byte = self._data[self.at]
            self.at += 1
            found |= (byte & 127) << 7 * place
            if byte < 128:
                return found
        raise DamagedBundle("a number in the head does not end", where=f"byte {self.at} of the head")

    def count(self, what: str, most: int, least: int = 0) -> int:
        """A varint within limits."""
        found = self.varint()
        if not least <= found <= most:
            told = f"the head declares {found} {what}, {least} to {most} are allowed"
            raise DamagedBundle(told, where=f"byte {self.at} of the head")
        return found

    def text(self) -> str:
        """A name in UTF-8."""
        data = self.take(self.varint())
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedBundle("a name in the head is not UTF-8", where=repr(data[:80])) from error
