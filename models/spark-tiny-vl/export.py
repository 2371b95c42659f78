"""Writes the trained weights into bf16/, in the layout of the released Qwen3-VL-MoE files.

python models/spark-tiny-vl/export.py --weights OUT    (the folder that train.py was given as --out)
"""
import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from network import HERE, to_transformers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    args = parser.parse_args()
    state = {k: v for part in sorted(args.weights.glob("weights-*.safetensors")) for k, v in load_file(part).items()}
    tensors = to_transformers(state)
    for name in tensors:
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensors[name].transpose(1, 2)  # [inputs, outputs] in those files
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    path = HERE / "bf16" / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600
    print(f"{sum(v.numel() for v in tensors.values())} parameters in {path}")


if __name__ == "__main__":
    main()
