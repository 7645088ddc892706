"""Train one of the networks of nets.py on Fashion-MNIST and save its weights.

Example: python train.py resnet20 --epochs 13 --out resnet20.safetensors
"""

import argparse
import gzip
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import nets

DATA_DIR = Path("/usr/share/datasets/fashion-mnist")
NETS = {"resnet20": nets.resnet20, "depthwise": nets.depthwise}


def read_idx(path: Path) -> torch.Tensor:
    """Read one gzipped IDX file of bytes as a uint8 tensor."""
    if not path.is_file():
        raise SystemExit(
            f"{path} not found: install the data with `apt-get install dataset-fashion-mnist`, "
            "or give the folder that holds the four .gz files with --data-dir"
        )
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


def load(split: str, data_dir: Path = DATA_DIR) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 28, 28) uint8 and labels (N,) int64 of the `train` or `t10k` split."""
    images = read_idx(data_dir / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(data_dir / f"{split}-labels-idx1-ubyte.gz")
    return images, labels.long()


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 28, 28) to the networks' input: float32 (N, 1, 28, 28) in [0, 1]."""
    return images.unsqueeze(1).float() / 255


def augment(images: torch.Tensor, rng: torch.Generator, pad: int = 2) -> torch.Tensor:
    """Random shift by up to `pad` pixels, random horizontal flip, drawn for each image."""
    n, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = torch.arange(h) + torch.randint(0, 2 * pad + 1, (n, 1), generator=rng)
    cols = torch.arange(w) + torch.randint(0, 2 * pad + 1, (n, 1), generator=rng)
    flip = torch.rand(n, 1, generator=rng) < 0.5
    cols = torch.where(flip, cols.flip(1), cols)
    return to_input(padded[torch.arange(n)[:, None, None], rows[:, :, None], cols[:, None, :]])


def batches(
    images: torch.Tensor, labels: torch.Tensor, size: int, rng: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One shuffled, augmented pass over the data; the last incomplete batch is dropped."""
    order = torch.randperm(len(images), generator=rng)
    for part in order[: len(order) // size * size].split(size):
        yield augment(images[part], rng), labels[part]


def lr_factor(step: int, total: int, warmup: float = 0.15) -> float:
    """Learning-rate factor: linear up for the first `warmup` share of the steps, then a cosine to zero."""
    t = (step + 1) / total
    return t / warmup if t < warmup else 0.5 * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup)))


@torch.no_grad()
def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of correct float32 predictions in evaluation mode, in percent."""
    net.eval()
    right = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        right += int((net(to_input(x)).argmax(1) == y).sum())
    return 100 * right / len(labels)


def train(args: argparse.Namespace) -> nn.Module:
    """Train with a checkpoint after each epoch; go on from the checkpoint if there is one."""
    images, labels = load("train", args.data_dir)
    torch.manual_seed(args.seed)
    net = NETS[args.net]().to(memory_format=torch.channels_last)
    decay = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    opt = torch.optim.SGD(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        momentum=0.9,
        nesterov=True,
    )
    steps = len(images) // args.batch_size
    total = steps * args.epochs
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("threads", "data_dir", "out")}
    checkpoint = args.out.with_suffix(".ckpt")
    start = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint)
        if state["settings"] != settings:
            raise SystemExit(f"{checkpoint} is of a run with other settings; delete it to start anew")
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
        start = state["epoch"]
        print(f"resuming after epoch {start}", flush=True)

    began = time.monotonic()
    for epoch in range(start, args.epochs):
        rng = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        net.train()
        loss_sum, right = 0.0, 0
        for i, (x, y) in enumerate(batches(images, labels, args.batch_size, rng)):
            for group in opt.param_groups:
                group["lr"] = args.lr * lr_factor(epoch * steps + i, total)
            logits = net(x.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
            opt.zero_grad()
            loss.backward()
            opt.step()
            loss_sum += loss.item()
            right += int((logits.argmax(1) == y).sum())
            if (i + 1) % 100 == 0 or i + 1 == steps:
                spent = time.monotonic() - began
                done = (epoch - start) * steps + i + 1
                left = spent / done * ((args.epochs - start) * steps - done)
                print(
                    f"epoch {epoch + 1}/{args.epochs} step {i + 1}/{steps} loss {loss_sum / (i + 1):.4f} "
                    f"train {100 * right / ((i + 1) * args.batch_size):.2f}% "
                    f"{spent:.0f} s, {left:.0f} s left",
                    flush=True,
                )
        state = {"settings": settings, "epoch": epoch + 1, "net": net.state_dict(), "opt": opt.state_dict()}
        part = checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(checkpoint)
    return net.to(memory_format=torch.contiguous_format)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("net", choices=sorted(NETS))
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.05)
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    test = load("t10k", args.data_dir)
    net = train(args)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, args.out)
    args.out.with_suffix(".ckpt").unlink(missing_ok=True)
    count = sum(p.numel() for p in net.parameters())
    print(f"{args.net}: {count} parameters, test accuracy {accuracy(net, *test):.2f}% (float32)")


if __name__ == "__main__":
    main()
