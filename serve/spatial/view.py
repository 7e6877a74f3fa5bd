"""What the page draws, in one compact answer: a JSON header, then the arrays as they lie in memory.

bytes 0-3     length H of the header, uint32, little endian
H bytes       JSON: {"n": N, "arrays": {NAME: {"dtype", "offset", "length"}}, "ids": {"offset", "length"}}
then          arrays, little endian, and at last the cell ids as a JSON list (UTF-8); offsets count from the end of the
              header, which is padded so that arrays begin at multiples of 4
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from tenfold.serve.spatial.analyser import RESULT_FILES, VIEW_FILE

DTYPES = {"x": "<f4", "y": "<f4", "umap": "<f4", "probability": "<f4", "domain": "<i2", "refined": "<i2"}
ALIGNMENT = 4


def pack_view(folder: Path) -> bytes:
    """Return the packed view of the results in a folder.

    Raises:
        ValueError: its arrays are not what `SpatialAnalyser.run` promises.
    """
    ids = _cell_ids(folder / RESULT_FILES["csv"])
    with np.load(folder / VIEW_FILE, allow_pickle=False) as stored:
        is_y_up = bool(stored["y_up"]) if "y_up" in stored else False
        arrays = {name: np.ascontiguousarray(stored[name], dtype) for name, dtype in DTYPES.items() if name in stored}
    wrong = [name for name, array in arrays.items() if len(array) != len(ids)]
    if wrong or not {"x", "y", "domain"} <= arrays.keys():
        raise ValueError(f"{VIEW_FILE}: {len(ids)} cells, arrays { ({name: a.shape for name, a in arrays.items()}) }")
    pieces = {name: array.tobytes() for name, array in arrays.items()}
    pieces["ids"] = json.dumps(ids, ensure_ascii=False, separators=(",", ":")).encode()
    places: dict[str, dict[str, object]] = {}
    body = bytearray()
    for name, piece in pieces.items():
        places[name] = {"dtype": DTYPES.get(name, "json"), "offset": len(body), "length": len(piece)}
        body += piece + b"\0" * (-len(piece) % ALIGNMENT)
    header = json.dumps({"n": len(ids), "y_up": is_y_up, "ids": places.pop("ids"), "arrays": places}).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return len(header).to_bytes(4, "little") + header + bytes(body)


def _cell_ids(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows, None)
        return [row[0] for row in rows if row]
