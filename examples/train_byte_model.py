"""Train the byte model of `kvstore bench codec` anew: a few minutes on one core.

python examples/train_byte_model.py [STEPS] [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from kvstore.bench.codec_bytemodel import HELD_OUT, SHAPE, WEIGHTS, forward, new_weights, save, text

LENGTH, BATCH, RATE = 256, 12, 3e-3


def main(steps: int, path: Path) -> None:
    torch.manual_seed(0)
    data = torch.from_numpy(text().astype(np.int64))
    data = data[: int(len(data) * (1 - HELD_OUT))]
    weights = {name: weight.requires_grad_() for name, weight in new_weights(SHAPE, 0).items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,))
        batch = torch.stack([data[start : start + LENGTH + 1] for start in starts])
        logits, _ = forward(weights, batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {float(loss.detach()):.3f} nats a byte", flush=True)
        if step % 200 == 199 or step == steps - 1:
            save({name: weight.detach() for name, weight in weights.items()}, path)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1200, Path(sys.argv[2]) if len(sys.argv) > 2 else WEIGHTS)
