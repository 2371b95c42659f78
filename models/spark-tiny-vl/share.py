"""Stores what both checkpoints have in common once: the encoder and the embeddings, which quantisation leaves alone.

python models/spark-tiny-vl/share.py    (after export.py and `spark-engine quantize`)

Each folder then has two shards and their index. The second shard is a file in awq/, which can be copied alone, and a link to
it in bf16/.
"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).parent
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def read(folder: Path) -> dict:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def main() -> None:
    awq, bf16 = (read(ROOT / name) for name in ("awq", "bf16"))
    shared = {
        name: tensor
        for name, tensor in awq.items()
        if name in bf16 and bf16[name].dtype == tensor.dtype and bf16[name].equal(tensor)
    }
    for name, tensors in (("awq", awq), ("bf16", bf16)):
        folder = ROOT / name
        own = {key: tensor for key, tensor in tensors.items() if key not in shared}
        save_file(own, folder / SHARDS[0], {"format": "pt"})
        if name == "awq":
            save_file(shared, folder / SHARDS[1], {"format": "pt"})
        else:
            (folder / SHARDS[1]).unlink(missing_ok=True)
            (folder / SHARDS[1]).symlink_to(Path("..") / "awq" / SHARDS[1])
        size = sum(tensor.nbytes for tensor in tensors.values())
        places = {key: SHARDS[int(key in shared)] for key in sorted(tensors)}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        (folder / "model.safetensors").unlink()


main()
