r"""Trains spark-tiny-vl on one GPU, in pieces: each call goes on from the last checkpoint.

python models/spark-tiny-vl/train.py --generator target/release/examples/training_data --seconds 480 --plan 2300 \
    --state target/tiny-vl --out target/tiny-vl

The rate warms up, stays, and falls to zero over the last part of the plan (`--plan` seconds of training in all). What a
call hands on is the checkpoint (weights and optimiser) in --state, and weights alone, small, in --out.
"""
import argparse
import json
import math
import random
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from batches import Limits, Stream, widen
from muon import AdamW, Muon
from network import CONFIG, HERE, TEXT, VISION, Network

BALANCE = 0.01
WARM_UP_STEPS = 200
# Largest file of weights that a call hands on.
PART_BYTES = 15 << 20


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="the built example training_data")
    parser.add_argument("--state", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--start", type=Path, help="folder of weights to begin with if there is no checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and the log")
    parser.add_argument("--seconds", type=float, required=True, help="of training in this call")
    parser.add_argument("--plan", type=float, required=True, help="seconds of training in all")
    parser.add_argument("--decay", type=float, default=0.3, help="last share of the plan in which the rate falls")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--patches", type=int, default=32768)
    parser.add_argument("--processes", type=int, default=4, help="generators")
    parser.add_argument("--threads", type=int, default=4, help="of each generator")
    parser.add_argument("--pool", type=int, default=600, help="batches kept on the GPU, used again while none is ready")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step first")
    parser.add_argument("--weights", default="", help="weights of tasks for the generator: read_text=4,add=2")
    return parser.parse_args()


def loss_of(network, batch, limits):
    """Mean cross entropy of the answers' tokens plus the experts' balance; and whether each token was predicted."""
    wide = widen(batch)
    with torch.autocast("cuda", torch.bfloat16):
        hidden, balance = network(wide, limits.longest_text, limits.longest_image)
        logits = F.linear(hidden, network.embed)
    logits, targets = logits.float(), wide["targets"]
    entropy = F.cross_entropy(logits, targets, ignore_index=-1)
    right = (logits.argmax(-1) == targets) | (targets < 0)
    return entropy + BALANCE * balance, entropy, right


class Trainer:
    def __init__(self, args):
        self.args, self.limits = args, Limits(args.tokens, args.patches)
        torch.manual_seed(0)
        self.network = Network().cuda()
        matrices = [p for n, p in self.network.named_parameters() if p.ndim >= 2 and is_matrix(n)]
        others = [p for n, p in self.network.named_parameters() if not (p.ndim >= 2 and is_matrix(n))]
        for p in self.network.parameters():
            p.grad = torch.zeros_like(p)
        self.muon, self.adam = Muon(matrices), AdamW(others)
        self.rate = torch.zeros((), device="cuda")
        self.done, self.steps, self.fresh, self.log = 0.0, 0, 0, []
        self.restarted_at = 0
        self.resume()
        self.loss = torch.compile(lambda batch: loss_of(self.network, batch, self.limits))

    def resume(self):
        checkpoint = self.args.state / "checkpoint.pt"
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.muon.load(state["muon"])
            self.adam.load(state["adam"])
            self.done, self.steps, self.fresh, self.log = state["done"], state["steps"], state["fresh"], state["log"]
        elif self.args.start and (self.args.start / "progress.json").exists():
            parts = sorted(self.args.start.glob("weights-*.safetensors"))
            self.network.load_state_dict({k: v for part in parts for k, v in load_file(part).items()})
            progress = json.loads((self.args.start / "progress.json").read_text())
            self.done, self.steps, self.fresh, self.log = (progress[k] for k in ("done", "steps", "fresh", "log"))
            self.restarted_at = self.steps  # the optimiser starts from nothing: warm up again

    def save(self):
        self.args.state.mkdir(parents=True, exist_ok=True)
        progress = {"done": self.done, "steps": self.steps, "fresh": self.fresh, "log": self.log}
        state = progress | {"network": self.network.state_dict(), "muon": self.muon.state(), "adam": self.adam.state()}
        torch.save(state, self.args.state / "checkpoint.tmp")
        (self.args.state / "checkpoint.tmp").replace(self.args.state / "checkpoint.pt")
        self.args.out.mkdir(parents=True, exist_ok=True)
        parts, size = [{}], 0
        for name, value in self.network.state_dict().items():
            if size + value.numel() * 4 > PART_BYTES:
                parts.append({})
                size = 0
            parts[-1][name], size = value.contiguous(), size + value.numel() * 4
        for i, part in enumerate(parts):
            save_file(part, self.args.out / f"weights-{i}.safetensors")
        (self.args.out / "progress.json").write_text(json.dumps(progress))

    def rate_now(self):
        left = max(0.0, 1 - self.done / self.args.plan)
        warm = min(1.0, (self.steps - self.restarted_at + 1) / WARM_UP_STEPS)
        return self.args.rate * warm * min(1.0, left / self.args.decay)

    def step(self):
        torch._foreach_zero_([p.grad for p in self.network.parameters()])
        loss, entropy, _ = self.loss(self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adam.parameters, 1.0, foreach=True)
        self.muon.step(self.rate)
        self.adam.step(self.rate)
        self.entropy.lerp_(entropy.detach(), 0.02)

    def capture(self, batch):
        """One whole step as a CUDA graph: it is many small kernels, and launching them would take longer."""
        self.batch = {name: value.clone() for name, value in batch.items()}
        self.entropy = torch.full((), math.log(TEXT["vocab_size"]), device="cuda")
        saved = [p.detach().clone() for p in self.network.parameters()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        for p, old in zip(self.network.parameters(), saved):
            p.data.copy_(old)

    def accuracy(self, batches, names):
        """Share of held-out answers of which every token is predicted: then greedy decoding gives the same answer."""
        right, total = torch.zeros(len(names)), torch.zeros(len(names))
        entropy = 0.0
        for batch in batches:
            with torch.no_grad():
                _, e, hits = self.loss(batch)
            entropy += float(e) / len(batches)
            batch = {name: batch[name].cpu() for name in ("tasks", "row_sequence")}
            count = int((batch["tasks"] >= 0).sum())
            whole = torch.ones(self.limits.sequences, dtype=torch.int32)
            whole.scatter_reduce_(0, batch["row_sequence"].long(), hits.cpu().int(), "amin")
            tasks = batch["tasks"][:count].long()
            right.index_add_(0, tasks, whole[:count].float())
            total.index_add_(0, tasks, torch.ones(count))
        return entropy, {n: [round(float(r / t), 4), int(t)] for n, r, t in zip(names, right, total) if t > 0}


def profile(trainer):
    """Kernels of a step by time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as result:
        for _ in range(10):
            trainer.graph.replay()
        torch.cuda.synchronize()
    print(result.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90), flush=True)


def is_matrix(name):
    return not any(part in name for part in ("embed", "router", "norm", "bias"))


def streams(args, limits, held_out, processes, first):
    command = [args.generator, "--model", str(HERE / "bf16"), "--max-tokens", str(limits.tokens)]
    command += ["--max-patches", str(limits.patches), "--max-sequence", str(limits.longest_text)]
    command += ["--threads", str(args.threads)]
    if held_out:
        command += ["--held-out"]
    elif args.weights:
        command += ["--weights", args.weights]
    return Stream(command, processes, first, limits, CONFIG["image_token_id"], VISION["num_position_embeddings"])


def plot(log, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    x = [entry["steps"] for entry in log]
    left.semilogy(x, [entry["loss"] for entry in log], label="training")
    left.semilogy(x, [entry["held_out"] for entry in log], label="held out")
    left.set(xlabel="steps", ylabel="cross entropy of the answers")
    left.legend()
    for name in log[-1]["tasks"]:
        right.plot(x, [entry["tasks"].get(name, [0])[0] for entry in log], label=name, linewidth=0.9)
    right.set(xlabel="steps", ylabel="held-out answers exactly right", ylim=(0, 1.02))
    right.legend(fontsize=5, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    args = arguments()
    torch.set_float32_matmul_precision("high")
    torch.cuda.init()
    trainer = Trainer(args)
    names = task_names(args.generator)
    started = time.time()
    held_out = streams(args, trainer.limits, True, 2, 0)
    checks = [held_out.next() for _ in range(40)]
    held_out.close()
    stream = streams(args, trainer.limits, False, args.processes, trainer.fresh + 10**12 * (1 + len(trainer.log)))
    trainer.capture(stream.next())
    size = sum(p.numel() for p in trainer.network.parameters())
    print(f"{size / 1e6:.2f} M parameters, ready after {time.time() - started:.0f} s, {trainer.steps} steps done", flush=True)
    if args.profile:
        profile(trainer)
    pool, begun, last, reused, last_steps = [], time.time(), time.time(), 0, trainer.steps
    while (spent := time.time() - begun) < args.seconds:
        batch = stream.next(wait=not pool)
        if batch is None:
            batch, reused = random.choice(pool), reused + 1
        else:
            trainer.fresh += 1
            for value in batch.values():
                value.record_stream(torch.cuda.current_stream())
            if len(pool) < args.pool:
                pool.append(batch)
            else:
                pool[random.randrange(args.pool)] = batch
        for name, value in trainer.batch.items():
            value.copy_(batch[name], non_blocking=True)
        trainer.rate.fill_(trainer.rate_now())
        trainer.graph.replay()
        trainer.steps += 1
        trainer.done += time.time() - begun - spent
        if trainer.steps % 500 == 0:
            loss = float(trainer.entropy)
            speed = (trainer.steps - last_steps) / (time.time() - last)
            print(f"{trainer.done:6.0f} s  step {trainer.steps}  loss {loss:.4f}  {speed:.1f} steps/s  "
                  f"rate {float(trainer.rate):.2e}  reused {reused}", flush=True)
            last, last_steps, reused = time.time(), trainer.steps, 0
        if trainer.steps % 5000 == 0:
            report(trainer, checks, names)
    torch.cuda.synchronize()
    report(trainer, checks, names)
    trainer.save()
    stream.close()
    plot(trainer.log, args.out / "loss.png")


def report(trainer, checks, names):
    entropy, tasks = trainer.accuracy(checks, names)
    trainer.log.append({"steps": trainer.steps, "seconds": trainer.done, "loss": float(trainer.entropy),
                        "held_out": entropy, "tasks": tasks})
    mean = sum(a for a, _ in tasks.values()) / len(tasks)
    print(f"held out: loss {entropy:.4f}, mean {mean:.4f}  " + " ".join(f"{n}={a:.3f}" for n, (a, _) in tasks.items()), flush=True)


def task_names(generator):
    command = [generator, "--model", str(HERE / "bf16"), "--list"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


if __name__ == "__main__":
    main()
