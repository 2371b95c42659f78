"""Packed batches: from the generator's stdout to the fixed-size tensors that a captured step reads, on the GPU if there
is one. No model.

The stream is described at `Batch::write` in examples/training_data.rs.
"""
import subprocess
import sys
import threading
from functools import lru_cache
from queue import Queue

import numpy as np
import torch

MAGIC = 0x31425653


class Limits:
    """Sizes of a batch. Sequences and images are counted with the padding at the end."""

    def __init__(self, tokens, patches):
        self.tokens, self.patches = tokens, patches
        self.longest_text, self.longest_image = 1024, 1024
        self.sequences, self.images, self.rows = tokens // 24, patches // 64 + 2, tokens // 4


@lru_cache(maxsize=None)
def image_places(rows, columns, table):
    """Rows and columns of patches in merge order; corners and shares of the position table (bilinear, ends on ends)."""
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    order = lambda a: a.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 1, 3).reshape(-1)
    y, x = order(y), order(x)
    side = int(table**0.5)
    fine_y = np.linspace(0, side - 1, rows, dtype=np.float32)[y]
    fine_x = np.linspace(0, side - 1, columns, dtype=np.float32)[x]
    y0, x0 = fine_y.astype(np.int64), fine_x.astype(np.int64)
    y1, x1 = np.minimum(y0 + 1, side - 1), np.minimum(x0 + 1, side - 1)
    dy, dx = fine_y - y0, fine_x - x0
    corners = np.stack([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1], 1)
    shares = np.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx], 1)
    return np.stack([y, x], 1).astype(np.int16), corners.astype(np.int16), shares.astype(np.float32)


def starts_of(lengths, total, longest, count):
    """Offsets [count + 1]; what is left of `total` becomes sequences of padding, and the rest is empty. Or None."""
    left = total - int(sum(lengths))
    lengths = list(lengths) + [longest] * (left // longest) + ([left % longest] if left % longest else [])
    if len(lengths) > count:
        return None
    return np.concatenate(([0], np.cumsum(lengths), np.full(count - len(lengths), total))).astype(np.int32)


def padded(array, size, fill=0):
    out = np.full((size, *array.shape[1:]), fill, array.dtype)
    out[: len(array)] = array
    return out


def parse(stream, limits, image_token, table):
    """One batch as tensors of fixed shapes, or None if it has more sequences than fit."""

    def read(count):
        data = stream.read(count)
        if len(data) < count:
            raise EOFError
        return data

    head = np.frombuffer(read(20), "<u4")
    if head[0] != MAGIC:
        raise ValueError("the generator's stream is out of step")
    sequences, images, tokens, patch_bytes = (int(n) for n in head[1:])
    take = lambda count, kind: np.frombuffer(read(count * np.dtype(kind).itemsize), kind)
    lengths, tasks = take(sequences, "<u4"), take(sequences, "<u4")
    grids = take(2 * images, "<u2").reshape(-1, 2)
    ids, positions = take(tokens, "<u2"), take(3 * tokens, "<u2").reshape(3, -1)
    learned = take(tokens, "u1")
    # By far the largest part: read once, into the memory that the GPU copies from.
    patches = torch.empty(limits.patches, 768, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    flat = memoryview(patches.numpy()).cast("B")
    at = 0
    while at < patch_bytes:
        count = stream.readinto(flat[at:patch_bytes])
        if not count:
            raise EOFError
        at += count
    flat[at:] = bytes(len(flat) - at)
    # The state before a learned token predicts it.
    rows = np.flatnonzero(learned) - 1
    starts = starts_of(lengths, limits.tokens, limits.longest_text, limits.sequences)
    image_starts = starts_of(grids.astype(int).prod(1), limits.patches, limits.longest_image, limits.images)
    if starts is None or image_starts is None or len(rows) > limits.rows:
        return None
    places = [image_places(int(h), int(w), table) for h, w in grids]
    join = lambda i, width, kind: np.concatenate([p[i] for p in places] or [np.zeros((0, width), kind)])
    sequence = np.repeat(np.arange(sequences), lengths)
    picture = ids == image_token
    small = {
        "ids": padded(ids.astype(np.int16), limits.tokens),
        "positions": padded(positions.T.astype(np.int16), limits.tokens).T.copy(),
        "starts": starts, "image_starts": image_starts,
        "picture_rows": padded(np.flatnonzero(picture).astype(np.int32), limits.patches // 4, limits.tokens),
        "rows": padded(rows.astype(np.int32), limits.rows),
        "targets": padded(ids[rows + 1].astype(np.int16), limits.rows, -1),
        "row_sequence": padded(sequence[rows].astype(np.int32), limits.rows),
        "tasks": padded(tasks.astype(np.int16), limits.sequences, -1),
        "places": padded(join(0, 2, np.int16), limits.patches),
        "corners": padded(join(1, 4, np.int16), limits.patches),
        "shares": padded(join(2, 4, np.float32), limits.patches),
    }
    return {name: torch.from_numpy(array) for name, array in small.items()} | {"patches": patches}


def widen(batch):
    """Compact dtypes are for the wire; indices must be int64 (or int32 where the kernels want that)."""
    wide = {"ids", "picture_rows", "rows", "targets", "corners", "positions"}
    return {name: value.long() if name in wide else value for name, value in batch.items()}


class Stream:
    """Generators in the background; `next()` gives the next batch, or None when none is ready and `wait` is false."""

    def __init__(self, command, processes, first, limits, image_token, table, depth=12):
        self.queue, self.children = Queue(depth), []
        # A reader that waits long for the interpreter keeps the training waiting.
        sys.setswitchinterval(2e-4)
        for i in range(processes):
            # Each process has its own stretch of sample indices.
            child = subprocess.Popen([*command, "--first", str(first + i * 10**9)], stdout=subprocess.PIPE, bufsize=1 << 20)
            self.children.append(child)
            threading.Thread(target=self._pump, args=(child, limits, image_token, table), daemon=True).start()

    def _pump(self, child, limits, image_token, table):
        on_gpu = torch.cuda.is_available()
        side = torch.cuda.Stream() if on_gpu else None
        try:
            while True:
                batch = parse(child.stdout, limits, image_token, table)
                if batch is None:
                    continue
                if on_gpu:
                    with torch.cuda.stream(side):
                        batch = {name: value.cuda(non_blocking=True) for name, value in batch.items()}
                    side.synchronize()
                self.queue.put(batch)
        except (EOFError, ValueError):
            self.queue.put(None)

    def next(self, wait=True):
        if not wait and self.queue.empty():
            return None
        batch = self.queue.get()
        if batch is None:
            raise RuntimeError("a generator ended")
        return batch

    def close(self):
        for child in self.children:
            child.kill()
