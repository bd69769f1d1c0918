"""What Xet clients have put into a folder, read from its shards."""

from pathlib import Path

RECORD = 48
END = b"\xff" * 32


def xet_hashes(folder: Path) -> dict[str, str]:
    """sha256 to Xet hash of every file in a local content store."""
    found: dict[str, str] = {}
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        found |= _hashes_of(shard.read_bytes())
    return found


def _hashes_of(data: bytes) -> dict[str, str]:
    """The same of one shard.

    A shard is a 48-byte header, then records of 48 bytes: per file a header (hash 32, flags u32, segments u32), its
    segments, as many verification records if bit 31 of the flags is set, one record that starts with the sha256 if
    bit 30 is; 32 bytes 0xff end the list. Hashes are four little-endian u64.
    """
    found = {}
    position = RECORD
    while position + RECORD <= len(data) and data[position : position + 32] != END:
        file_hash = data[position : position + 32]
        flags = int.from_bytes(data[position + 32 : position + 36], "little")
        segments = int.from_bytes(data[position + 36 : position + 40], "little")
        position += RECORD * (1 + segments * (2 if flags >> 31 & 1 else 1))
        if flags >> 30 & 1:
            found[_hex(data[position : position + 32])] = _hex(file_hash)
            position += RECORD
    return found


def _hex(raw: bytes) -> str:
    return "".join(f"{int.from_bytes(raw[start : start + 8], 'little'):016x}" for start in range(0, 32, 8))
