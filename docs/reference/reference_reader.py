import json, pathlib, struct, zlib, numpy as np  # a reader of label sets, format version 2
from hashlib import sha256
STEPS = [0, 2, 4, 6, 8, 10, 13, 15, 18, 21, 25, 28, 32, 36, 41, 45, 51, 56, 62, 68, 75, 82, 90, 99,
 108, 117, 128, 139, 151, 163, 177, 192, 0, 1, 3, 5, 8, 11, 14, 18, 23, 29, 36, 44, 54, 66, 84, 112]
LENGTHS = pathlib.Path(__file__).with_name("code_lengths.txt").read_text().split()
RESIDUAL_STEPS = [26, 34, 43, 55, 71, 91, 117, 150, *[166] * 11, 102]
POWERS = np.array([0] + [int(2**24 * np.exp(i / 16) + 0.5) for i in range(-271, 240)])

def symbol(lengths, bits):  # the symbol whose code these bits begin with, and the bits after it
    sizes = sorted((int(digit, 16), number) for number, digit in enumerate(lengths))
    ends = np.cumsum([2 ** (11 - size) for size, _ in sizes])
    size, number = sizes[np.searchsorted(ends, int(bits[:11].ljust(11, "0"), 2), "right")]
    return number, bits[size:]

def residuals(levels, others, bits):  # what the bits of a view subtract from its levels
    coarse, place, found = (levels - levels.min()) // 16, 0, np.zeros(len(levels))
    masses = POWERS[272 - np.minimum(coarse, 272)] * ([1] * (len(levels) - 1) + [others or 1])
    context = np.minimum((coarse + np.searchsorted(POWERS, sum(masses), "right") - 273) // 8, 18)
    context[-1] = 19 if others else context[-1]
    order = np.argsort((context + 1) % 20, kind="stable")
    while bits:
        run, bits = symbol(LENGTHS[context[order[place]]], bits)
        if (place := place + run + (run < 31)) and run < 31:
            value, bits = symbol(LENGTHS[20 + (of := context[order[place - 1]])], bits)
            found[order[place - 1]] = (value // 2 + 1) * (-1) ** value * RESIDUAL_STEPS[of]
    return found

def pieces(data, at, size, views):  # the lengths, nibbles and residuals of a block
    lengths = np.frombuffer(data, f"<u{size}", views, at).tolist()
    data, stream = np.split(np.frombuffer(data, "u1"), [len(data) - (sum(lengths) + 7) // 8])
    nibbles = np.stack([data & 15, data >> 4], 1)[at + size * views:].ravel().astype(int)
    return lengths, nibbles, "".join(map(str, np.unpackbits(stream, bitorder="little")))

def shared(data, form, views, k, c, model, of):  # values of views that share a model; its block
    parts, listed, size = struct.unpack_from("<BHB", model)
    own = pieces(model, 4 + 2 * parts, size, of)  # or that of the image's first views
    codes, gaps = np.split(own[1], np.cumsum([of, listed + (listed < c)]) * parts)[1:]
    lengths, nibbles, bits = own if 0 < data[0] < 9 else pieces(data, 1, (data[0] or 10) - 8, views)
    low, step = np.frombuffer(model, "b", 2 * parts, 4).reshape(-1, 2).T * [[8], [1]]
    levels = (low + np.resize(nibbles, (views, parts)) * (step & 255)) @ codes.reshape(parts, -1)
    digits = ((c // listed).bit_length() - 1) // 4
    small, gaps = np.split(gaps, [digits * listed]) if listed < c else ([], np.zeros(listed, int))
    ids = np.diff(np.cumsum(gaps)[gaps < 15], prepend=0) * 16**digits + 1
    ids += np.reshape(small, (listed, digits)).astype(int) @ 16 ** np.arange(digits)
    for row, length in zip(levels, lengths, strict=True):
        row, bits = row - residuals(row, c - listed, bits[:length]), bits[length:]
        yield np.cumsum(ids) - 1, np.exp(-np.minimum(row - row.min(), 16384) / 256)

def records(data, form, views, topk, c, *_):  # values of views by themselves, of k classes
    size = (form == "curve") * (1 + (topk > 255))
    counts, data = np.split(np.frombuffer(data, "u1")[views > 1 and size > 0:], [views * size])
    for k in counts.view(f"<u{size or 1}").tolist() or [topk] * views:
        knots = [rank for rank in range(1, k + 2) if rank >= k or rank // (rank & -rank) in (1, 3)]
        widths = [6] * (k < c) + [5, *[4] * k][:len(knots) - 2] if form == "curve" else []
        widths += [(c - 1).bit_length()] * (k if widths or k < c else 0)
        ends, bits = np.cumsum([0, *widths]).tolist(), int.from_bytes(data, "little")
        codes = [bits >> ends[n] & (1 << width) - 1 for n, width in enumerate(widths)]
        size = (ends[-1] + 7) // 8
        if form == "curve":
            steps = [STEPS[i + 32 * (n > 0)] for n, i in enumerate(codes[k < c:][:len(knots) - 2])]
            levels = np.minimum(np.cumsum([0, *steps, 6 * codes[0]]), 1024)  # the last: the tail's
            values = np.exp(np.interp(np.log(np.arange(k + 1) + 1), np.log(knots), levels) / -16)
        else:  # the classes kept, and the mass of all others
            values = np.frombuffer(data, form, k + (k < c), size) / ([1.0] * k + [c - k] * (k < c))
        data = data[size + len(values) * int(form[5:] or 0) // 8:]
        yield codes[-k:] or range(c), values

def label_set(folder, role="train"):  # yields (key, view), probabilities
    plan, of = (m := json.loads((folder / "manifest.json").read_bytes()))["plan"], m["roles"][role]
    form, k, c, seen = (how := plan["labels"])["form"], how.get("topk", 0), len(plan["classes"]), {}
    for data in ((folder / s["name"]).read_bytes() for b in of["blocks"] for s in b["shards"]):
        *about, a, n, digest = struct.unpack_from("<8sIIQQQ32s", data)
        assert sha256(data[:72]).digest() + sha256(data[a:a + n]).digest() == data[72:104] + digest
        assert about == [b"MEALV2\x1a\n", 2, 0, len(data)]
        places, views = (head := json.loads(data[a:a + n]))["columns"], head["num_views"]
        x = {s: np.ndarray(p["shape"], p["type"], data, p["offset"]) for s, p in places.items()}
        assert all(sha256(x[s]).hexdigest() == places[s]["sha256"] for s in x if s != "labels")
        keys, blocks = (np.split(x[f"{s}s"], x[f"{s}_ends"])[:-1] for s in ("key", "label"))
        for key, rest, crc in zip(keys, blocks, x["crc32"], strict=True):
            assert zlib.crc32(rest, zlib.crc32(key)) == crc, key.tobytes()
            rest = rest[:len(rest) - 5 * views * (how["logits"] and not k)].tobytes()
            by = shared if form == "curve" and k < 256 and (rest[0] > 0) == (views > 1) else records
            own = [seen.setdefault(key.tobytes(), (rest, views)), (rest, views)][0 < rest[0] < 9]
            for view, (ids, p) in enumerate(by(rest, form, views, k, c, *own), head["first_view"]):
                np.put(row := np.full(c, p[-1]), ids, p[:len(ids)])
                yield (key.tobytes().decode(), view), row / row.sum()
