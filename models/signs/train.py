"""Train the embedded models from nothing: ``python models/signs/train.py``.

Needs the extra ``train`` (``pip install -e '.[train]'``). Renders the training pictures, trains
MobileNetV2 1.0 at 64, 96 and then 224 pixels and the small in-guest network beside it, and writes
``signs.onnx``, ``tiny.safetensors`` and ``training.json`` next to this file. Allow two hours on
two cores. The rendered pictures and a checkpoint after each stage stay in the work folder, so a
run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import mobilenet_v2

from edgelab.datasets import SIGNS, Signs

HERE = Path(__file__).parent
VERSION = "1.0.0"
RESIZE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# (pixels of the network's input, rendered pool, epochs over that pool, peak learning rate)
STAGES = ((64, "small", 5, 2e-3), (96, "small", 3, 1e-3), (224, "full", 2, 5e-4))
POOLS = {"small": (40_000, 128), "full": (10_240, 256)}
TEST_COUNT = 2_560


def render_chunk(split: Any, start: int, stop: int, size: int) -> np.ndarray:
    signs = Signs(split, stop, size)
    return np.stack([signs[i].image for i in range(start, stop)])


def rendered(work: Path, split: str, count: int, size: int) -> torch.Tensor:
    """Pictures 0 … count-1 of a split as one uint8 tensor (N, size, size, 3), cached on disk."""
    path = work / f"{split}-{count}-{size}.npy"
    if not path.exists():
        print(f"rendering {count} pictures of {split!r} at {size} px", flush=True)
        starts = range(0, count, 512)
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            chunks = pool.map(
                render_chunk,
                [split] * len(starts),
                starts,
                [min(s + 512, count) for s in starts],
                [size] * len(starts),
            )
            pictures = np.concatenate(list(chunks))
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.save(file, pictures)
        path.with_suffix(".tmp").rename(path)
    return torch.from_numpy(np.load(path, allow_pickle=False))


def network_input(pictures: torch.Tensor, size: int, shift: bool) -> torch.Tensor:
    """uint8 NHWC → normalised NCHW crops of `size` px, as the runtime prepares them."""
    x = pictures.permute(0, 3, 1, 2).float()
    side = round(size * RESIZE / CROP)
    if x.shape[-1] != side:
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    offset = side - size
    top, left = torch.randint(0, offset + 1, (2,)).tolist() if shift else (offset // 2, offset // 2)
    x = x[..., top : top + size, left : left + size] / 255
    if shift:  # a little more variety of light than the renderer's
        gain = 1 + 0.2 * (torch.rand(len(x), 3, 1, 1) - 0.5)
        x = (x * gain).clamp(0, 1)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


class Tiny(nn.Module):
    """Three strided convolutions and one dense layer on the 4x4-averaged input (56 x 56)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(64 * 7 * 7, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        logits: torch.Tensor = self.fc(self.drop(x.flatten(1)))
        return logits

    def tensors(self) -> dict[str, np.ndarray]:
        """Weights with the batch norms folded into the convolutions, by the guest's names."""
        out: dict[str, np.ndarray] = {}
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            fused = fuse_conv_bn_eval(conv.eval(), norm.eval())
            out[f"conv{k}.weight"] = fused.weight.detach().numpy()
            out[f"conv{k}.bias"] = fused.bias.detach().numpy()
        out["fc.weight"] = self.fc.weight.detach().numpy()
        out["fc.bias"] = self.fc.bias.detach().numpy()
        return out


def fit(
    name: str, model: nn.Module, pictures: torch.Tensor, size: int, epochs: int, rate: float
) -> None:
    """Train in place on all pictures; label = index % classes, as `Signs` defines it."""
    model.train()
    batch, count = 64, len(pictures)
    labels = torch.arange(count) % len(SIGNS)
    steps = epochs * (count // batch)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    step, start = 0, time.time()
    for epoch in range(epochs):
        correct = seen = 0
        for index in torch.randperm(count)[: count // batch * batch].split(batch):
            x = network_input(pictures[index], size, shift=True)
            if isinstance(model, Tiny):
                x = F.avg_pool2d(x, size // 56)
            with torch.autocast("cpu", torch.bfloat16, enabled=not isinstance(model, Tiny)):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            correct += int((logits.argmax(1) == labels[index]).sum())
            seen += len(index)
            if step % 50 == 0 or step == steps:
                left = (time.time() - start) / step * (steps - step)
                print(
                    f"{name} {size} px epoch {epoch + 1}/{epochs} step {step}/{steps} "
                    f"loss {loss.item():.3f} train top-1 {correct / seen:.3f} left {left:.0f} s",
                    flush=True,
                )


@torch.inference_mode()
def top1(model: nn.Module, pictures: torch.Tensor) -> float:
    """Share of pictures whose largest logit is the right class, at the deployed 224 pixels."""
    model.eval()
    correct = 0
    for start in range(0, len(pictures), 64):
        x = network_input(pictures[start : start + 64], CROP, shift=False)
        if isinstance(model, Tiny):
            x = F.avg_pool2d(x, 4)
        labels = torch.arange(start, start + len(x)) % len(SIGNS)
        correct += int((model(x).argmax(1) == labels).sum())
    return correct / len(pictures)


def fuse(module: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution before it, in place."""
    for child in module.children():
        fuse(child)
    if isinstance(module, nn.Sequential):
        for i in range(len(module) - 1):
            conv, norm = module[i], module[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[i], module[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return module


def metadata(name: str) -> dict[str, str]:
    """What a program must know to feed the model and to read its answer. All values are text."""
    return {
        "name": name,
        "version": VERSION,
        "license": "Apache-2.0",
        "labels": json.dumps(SIGNS),
        "layout": "NCHW",
        "color": "RGB",
        "resize": str(RESIZE),
        "crop": str(CROP),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "output": "logits",
    }


def export(model: nn.Module, path: Path) -> None:
    """Write the network as one ONNX file with a symbolic batch and our metadata."""
    model = fuse(model.eval()).to(memory_format=torch.contiguous_format)
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, CROP, CROP),),
        dynamo=True,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        opset_version=18,
        external_data=False,
    )
    assert program is not None
    proto = program.model_proto
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, metadata("signs"))
    for node in proto.graph.node:  # the exporter's notes on Python source lines
        del node.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del value.metadata_props[:]
    proto.graph.doc_string = ""
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the model files")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="renders and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    started = time.time()

    pools = {name: rendered(args.work, "train", *shape) for name, shape in POOLS.items()}
    test = rendered(args.work, "test", TEST_COUNT, RESIZE)

    tiny_path = args.work / "tiny.pt"
    tiny = Tiny(len(SIGNS))
    if tiny_path.exists():
        tiny.load_state_dict(torch.load(tiny_path, weights_only=True))
    else:
        fit("tiny", tiny, pools["small"], 112, 12, 3e-3)
        fit("tiny", tiny, pools["full"], 224, 1, 3e-4)
        torch.save(tiny.state_dict(), tiny_path)
    tiny_top1 = top1(tiny, test)
    print(f"tiny: top-1 {tiny_top1:.4f} on {TEST_COUNT} test renders", flush=True)
    save_file(
        tiny.tensors(), args.out / "tiny.safetensors", {**metadata("signs-tiny"), "pool": "4"}
    )

    model = mobilenet_v2(num_classes=len(SIGNS), dropout=0.1).to(memory_format=torch.channels_last)
    for stage, (size, pool, epochs, rate) in enumerate(STAGES):
        checkpoint = args.work / f"stage{stage}.pt"
        if checkpoint.exists():
            model.load_state_dict(torch.load(checkpoint, weights_only=True))
            continue
        fit("signs", model, pools[pool], size, epochs, rate)
        torch.save(model.state_dict(), checkpoint)
        print(f"signs after {size} px: top-1 {top1(model, test):.4f}", flush=True)
    signs_top1 = top1(model, test)
    print(f"signs: top-1 {signs_top1:.4f} on {TEST_COUNT} test renders", flush=True)
    export(model, args.out / "signs.onnx")

    report = {
        "seed": args.seed,
        "test_count": TEST_COUNT,
        "signs_top1": signs_top1,
        "tiny_top1": tiny_top1,
        "minutes": round((time.time() - started) / 60, 1),
        "torch": torch.__version__,
        "stages": STAGES,
        "pools": POOLS,
        "sha256": {
            name: hashlib.sha256((args.out / name).read_bytes()).hexdigest()
            for name in ("signs.onnx", "tiny.safetensors")
        },
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2), flush=True)


if __name__ == "__main__":
    main()
