"""Compares network.py with transformers' Qwen3VLMoe in float32 on samples of the generator: same weights, same logits.

python models/spark-tiny-vl/check_network.py --generator target/release/examples/training_data
"""
import argparse

import torch
import torch.nn.functional as F
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from batches import Limits, Stream, widen
from network import CONFIG, HERE, VISION, Network, to_transformers

# float32 over a dozen layers, logits of order 10.
TOLERANCE = 2e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generator", required=True)
    args = parser.parse_args()
    torch.manual_seed(1)
    network = Network()
    with torch.no_grad():
        # The training starts with zeros and ones that would hide mistakes.
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    config = Qwen3VLMoeConfig(**{k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type")})
    reference = Qwen3VLMoeForConditionalGeneration(config).float().eval()
    missing = reference.load_state_dict(to_transformers(network.state_dict()), strict=False)
    assert not missing.unexpected_keys and missing.missing_keys == ["lm_head.weight"], missing
    reference.tie_weights()
    limits = Limits(3072, 4096)
    command = [args.generator, "--model", str(HERE / "bf16"), "--max-tokens", "2048", "--max-patches", "4096"]
    stream = Stream(command, 1, 0, limits, CONFIG["image_token_id"], VISION["num_position_embeddings"])
    batch = stream.next()
    stream.close()
    batch = widen(batch)
    batch["rows"] = torch.arange(limits.tokens)
    with torch.no_grad():
        ours, _ = network(batch, limits.longest_text, limits.longest_image)
        ours = F.linear(ours, network.embed)
    worst, patch, count = 0.0, 0, int((batch["tasks"] >= 0).sum())
    for i in range(count):
        a, b = int(batch["starts"][i]), int(batch["starts"][i + 1])
        ids = batch["ids"][a:b][None]
        num_patches = 4 * int((ids == CONFIG["image_token_id"]).sum())
        inputs = {"input_ids": ids, "position_ids": batch["positions"][:, a:b][:, None]}
        if num_patches:
            grids, left, image = [], num_patches, int(torch.searchsorted(batch["image_starts"], patch, right=False))
            while left:
                first, last = (int(batch["image_starts"][image + k]) for k in (0, 1))
                places = batch["places"][first:last].long()
                grids.append([1, int(places[:, 0].max()) + 1, int(places[:, 1].max()) + 1])
                left, image = left - (last - first), image + 1
            pixels = batch["patches"][patch : patch + num_patches].float() / 127.5 - 1
            pixels = pixels.view(-1, 3, 1, 256).repeat(1, 1, 2, 1).flatten(1)
            inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
            patch += num_patches
        with torch.no_grad():
            theirs = reference(**inputs).logits[0]
        worst = max(worst, float((theirs - ours[a:b]).abs().max()))
    print(f"{count} sequences, {patch} patches: largest difference of a logit {worst:.2e}, logits up to {float(ours.abs().max()):.1f}")
    assert patch > 0 and worst < TOLERANCE


if __name__ == "__main__":
    main()
