"""CPU against an accelerator: the same draws, recipe by recipe.

    python benchmarks/agree.py [--device cuda]

Times must be equal, and epsilon and x_t within 1e-6 of their scale: eager and compiled, odd and even sizes, a batch of
one, keys on the host and on the device (where a continuous time may be off by one float32 unit). Exits with 1 where
they are not.
"""

import argparse
import sys

import torch

from diffaug import Cosine, ForwardProcess, LinearBeta, LogitNormal, Rectified
from diffaug.noise import Offset

PROCESSES = {
    "linear": lambda compile: ForwardProcess(LinearBeta(), compile=compile),
    "cosine, logit-normal": lambda compile: ForwardProcess(Cosine(), LogitNormal(), compile=compile),
    "rectified": lambda compile: ForwardProcess(Rectified(), compile=compile),
    "offset noise": lambda compile: ForwardProcess(LinearBeta(), noise=Offset(), compile=compile),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    device, worst = parser.parse_args().device, 0.0
    for name, make in PROCESSES.items():
        for shape in ((8, 3, 32, 32), (5, 3, 33, 31), (1, 3, 32, 32)):
            x = torch.randint(0, 256, shape, dtype=torch.uint8)
            index = torch.arange(shape[0]) * 1_000_003 + 2**33
            for stage in ("train", "val"):
                options = {"seed": 2**63 + 5, "stage": stage, "epoch": 2**19, "view": 3}
                here = make(False)(x, index, **options)
                for compiled in (False, True):
                    there = make(compiled)(x.to(device), index, **options)
                    keyed = make(compiled)(x.to(device), index.to(device), **options)
                    same = torch.equal(there.t.cpu(), here.t) and torch.allclose(keyed.t.cpu(), here.t, 2e-7, 0)
                    off = max(
                        float((a.cpu() - b).abs().max() / b.abs().max())
                        for a, b in ((there.x_t, here.x_t), (there.epsilon, here.epsilon))
                    )
                    worst = max(worst, off if same else float("inf"))
                    kind = "compiled" if compiled else "eager"
                    print(f"{name} {shape} {stage} {kind}: times {'equal' if same else 'DIFFER'}, off by {off:.1e}")
    print(f"at most {worst:.1e} of their scale: {'fine' if worst <= 1e-6 else 'MORE THAN 1e-6'}")
    return int(worst > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
