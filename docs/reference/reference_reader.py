import json, struct, zlib  # a reader of label sets of format version 2: see label-set-format.md
from hashlib import sha256
import numpy as np
STEPS = [0, 2, 4, 6, 8, 10, 13, 15, 18, 21, 25, 28, 32, 36, 41, 45, 51, 56, 62, 68, 75, 82, 90, 99,
 108, 117, 128, 139, 151, 163, 177, 192, 0, 1, 3, 5, 8, 11, 14, 18, 23, 29, 36, 44, 54, 66, 84, 112]

def label(data, form, k, c):  # probabilities of a view that keeps k of c classes; what comes after
    knots = [rank for rank in range(1, k + 2) if rank >= k or rank // (rank & -rank) in (1, 3)]
    widths = [6] * (k < c) + [5, *[4] * k][:len(knots) - 2] if form == "curve" else []
    widths += [(c - 1).bit_length()] * (k if widths or k < c else 0)
    bits, size = int.from_bytes(data, "little"), (sum(widths) + 7) // 8
    codes = [bits >> sum(widths[:n]) & (1 << width) - 1 for n, width in enumerate(widths)]
    if form == "curve":
        steps = [STEPS[i + 32 * (n > 0)] for n, i in enumerate(codes[k < c:][:len(knots) - 2])]
        levels = np.minimum(np.cumsum([0, *steps, 6 * codes[0]]), 1024)  # the last is the tail's
        values = np.exp(np.interp(np.log(np.arange(k + 1) + 1), np.log(knots), levels) / -16)
    else:  # the classes kept, and the mass of all others
        values = np.frombuffer(data, form, k + (k < c), size) / ([1.0] * k + [c - k] * (k < c))
    np.put(row := np.full(c, values[-1]), codes[-k:] or range(c), values[:k])
    return row / row.sum(), data[size + len(values) * int(form[5:] or 0) // 8:]

def label_set(folder, role="train"):  # yields (key, view), probabilities
    plan, of = (m := json.loads((folder / "manifest.json").read_bytes()))["plan"], m["roles"][role]
    form, k, c = plan["labels"]["form"], plan["labels"].get("topk", 0), len(plan["classes"])
    for data in ((folder / s["name"]).read_bytes() for b in of["blocks"] for s in b["shards"]):
        *about, a, n, digest = struct.unpack_from("<8sIIQQQ32s", data)
        assert sha256(data[:72]).digest() + sha256(data[a:a + n]).digest() == data[72:104] + digest
        assert about == [b"MEALV2\x1a\n", 2, 0, len(data)]
        head, x = json.loads(data[a:a + n]), {}
        for name, place in head["columns"].items():
            x[name] = np.ndarray(place["shape"], place["type"], data, place["offset"])
            assert name == "labels" or sha256(x[name]).hexdigest() == place["sha256"], name
        keys, blocks = (np.split(x[f"{s}s"], x[f"{s}_ends"])[:-1] for s in ("key", "label"))
        for key, rest, crc in zip(keys, blocks, x["crc32"], strict=True):
            assert zlib.crc32(rest, zlib.crc32(key)) == crc, key.tobytes()
            counts, rest = np.split(rest, [head["num_views"] * (form == "curve") * (1 + (k > 255))])
            counts = counts.view("<u2" if k > 255 else "u1").tolist() or [k] * head["num_views"]
            for view, count in enumerate(counts, head["first_view"]):
                row, rest = label(rest, form, count, c)
                yield (key.tobytes().decode(), view), row
