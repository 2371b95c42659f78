"""Images a second of the vision encoder in transformers (SDPA, bfloat16, random weights): what `spark-engine bench vision`
is compared with. Needs a GPU, torch and transformers.

    python3 benches/vision_tower.py models/configs/qwen3-vl-30b-a3b.json
"""

import json
import sys
import time

import torch
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeVisionConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

# Images of a batch and the side of each in pixels.
CASES = [(16, 256), (16, 512), (1, 1024), (16, 1024), (4, 2048)]
SECONDS = 2.0


def main() -> None:
    config = Qwen3VLMoeVisionConfig(**json.load(open(sys.argv[1]))["vision_config"])
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device("cuda"):
        tower = Qwen3VLMoeVisionModel(config).to(torch.bfloat16).eval()
    width = 3 * config.temporal_patch_size * config.patch_size**2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'images':>6} {'side':>6} {'patches':>8} {'ms':>9} {'img/s':>9}")
    for images, side in CASES:
        rows = side // config.patch_size
        pixels = torch.randn(images * rows * rows, width, device="cuda", dtype=torch.bfloat16)
        grid = torch.tensor([[1, rows, rows]] * images, device="cuda")
        with torch.inference_mode():
            for _ in range(3):
                tower(pixels, grid_thw=grid)
            torch.cuda.synchronize()
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < SECONDS:
                tower(pixels, grid_thw=grid)
                torch.cuda.synchronize()
                count += 1
        seconds = (time.perf_counter() - start) / count
        print(f"{images:>6} {side:>6} {pixels.shape[0]:>8} {1e3 * seconds:>9.2f} {images / seconds:>9.1f}", flush=True)


main()
