"""Makes of a Hugging Face folder one whose activations have outliers; its function is the same.

    python tools/plant_outliers.py MODEL OUT [--factor 128] [--channels 3]

For trying W8A8: without smoothing such a model fails. How: `tests/planted_outliers.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from planted_outliers import CHANNELS, FACTOR, plant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--factor", type=float, default=FACTOR, help="a power of two rounds nothing"
    )
    parser.add_argument("--channels", type=int, default=CHANNELS)
    args = parser.parse_args()
    print(plant(args.model, args.out, args.factor, args.channels))


if __name__ == "__main__":
    main()
