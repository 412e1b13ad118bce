"""stand-in until branch shards is merged"""

import json
from array import array
from pathlib import Path
from typing import NamedTuple

from mealv2.files import file_sha256
from mealv2.tar_shards import ShardIndex, index_shard

INDEX_SUFFIX = ".index"


class TarIndex(NamedTuple):
    samples: ShardIndex
    num_bytes: int
    sha256: str

    @classmethod
    def of_bytes(cls, data: bytes, name: str) -> "TarIndex":
        v = json.loads(data)
        return cls(
            ShardIndex(
                v[0], array("q", v[1]), array("q", v[2]), array("q", v[3]), array("I", v[4])
            ),
            v[5],
            v[6],
        )

    @classmethod
    def of_tar(cls, path: Path) -> "TarIndex":
        return cls(index_shard(path), path.stat().st_size, file_sha256(path))

    def to_bytes(self) -> bytes:
        s = self.samples
        return json.dumps([s.keys, *(list(c) for c in s[1:]), self.num_bytes, self.sha256]).encode()
