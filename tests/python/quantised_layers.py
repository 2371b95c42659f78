"""Dequantises a checkpoint with the packages whose formats it has, and compares with what spark-engine reads.

    python quantised_layers.py CHECKPOINT REFERENCE.safetensors

CHECKPOINT is a folder that `spark-engine quantize` wrote; REFERENCE has every linear layer of its decoder in float32 as
the engine dequantises it (a Rust integration test writes it; see docs/quantize.md). AWQ is read by AutoAWQ's
`dequantize_gemm`, NVFP4 by compressed-tensors' decompressor under the scheme that config.json states, FP8 by the formula
in transformers' words: blocks of the weight times their `scale_inv`. Ends with status 0 if all layers are equal.

Needs torch, safetensors, compressed-tensors and, for AWQ, the source of AutoAWQ (`pip download --no-deps autoawq`, then
unpack): AUTOAWQ_SOURCE names its folder. The package itself does not import beside a current transformers, but the file
that is used here needs torch alone.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: quantised_layers.py CHECKPOINT REFERENCE.safetensors")
    checkpoint, reference = Path(sys.argv[1]), load_file(sys.argv[2])
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    tensors = read_all(checkpoint)
    dequantise = {"awq": awq, "compressed-tensors": nvfp4, "fp8": fp8}[config["quant_method"]](config, tensors)
    quantised = 0
    for name, ours in sorted(reference.items()):
        found = dequantise(name)
        if found is None:
            assert name.endswith("mlp.gate"), f"{name} is not quantised"
            continue
        theirs, tolerance = found
        assert theirs.shape == ours.shape, f"{name}: {tuple(theirs.shape)} is not {tuple(ours.shape)}"
        worst = ((theirs.float() - ours).abs() / ours.abs().clamp(min=1e-12)).max().item()
        assert worst <= tolerance, f"{name}: differs by {worst} of the value; {tolerance} is allowed"
        quantised += 1
    assert quantised > 0, "the checkpoint has no quantised layer"
    print(f"{config['quant_method']}: {quantised} layers are equal")


def read_all(checkpoint: Path) -> dict:
    tensors = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, "pt") as shard:
            assert shard.metadata()["format"] == "pt", "transformers reads no shard without this"
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})
    return tensors


def awq(config: dict, tensors: dict):
    assert config["bits"] == 4 and config["zero_point"] and config["version"] == "gemm", config
    path = Path(os.environ["AUTOAWQ_SOURCE"]) / "awq/utils/packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)

    def dequantise(name: str):
        if f"{name}.qweight" not in tensors:
            return None
        parts = [tensors[f"{name}.{kind}"] for kind in ("qweight", "qzeros", "scales")]
        # In float32: in half precision AutoAWQ rounds the product, which has nothing to do with the layout.
        weight = packing.dequantize_gemm(parts[0], parts[1], parts[2].float(), 4, config["group_size"])
        return weight.T, 0.0

    return dequantise


def nvfp4(config: dict, tensors: dict):
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "quant_method"})
    (scheme,) = parsed.config_groups.values()
    assert parsed.format == "nvfp4-pack-quantized" and scheme.input_activations is None, parsed

    def dequantise(name: str):
        if f"{name}.weight_packed" not in tensors:
            return None
        kinds = ("weight_packed", "weight_scale", "weight_global_scale")
        state = {kind: tensors[f"{name}.{kind}"] for kind in kinds}
        # The package gives bfloat16: half a unit of its eight bits, and of those of the scale.
        return NVFP4PackedCompressor.decompress(state, scheme)["weight"], 2.0**-7

    return dequantise


def fp8(config: dict, tensors: dict):
    rows, columns = config["weight_block_size"]
    assert config["fmt"] == "e4m3", config

    def blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        n, k = weight.shape
        scale = scale.float().repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        return weight.float() * scale

    def dequantise(name: str):
        if f"{name}.weight_scale_inv" in tensors:
            return blocks(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]), 0.0
        if ".experts." not in name:
            return None
        base, expert, projection = name.rsplit(".", 2)
        stacked = "down_proj" if projection == "down_proj" else "gate_up_proj"
        weight = tensors[f"{base}.{stacked}"][int(expert)]
        whole = blocks(weight, tensors[f"{base}.{stacked}_scale_inv"][int(expert)]).T
        if projection == "down_proj":
            return whole, 0.0
        return whole.chunk(2)[0 if projection == "gate_proj" else 1], 0.0

    return dequantise


if __name__ == "__main__":
    main()
