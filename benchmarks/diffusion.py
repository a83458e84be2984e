"""Split denoisers: shares of the device and bytes on the wire at real shapes, without weights; and pictures of a
small trained model, unsplit and split with each cut, codec and reuse: their differences, bytes and times."""

from __future__ import annotations

from typing import Any

from benchmarks.denoisers import SHAPES, shares
from benchmarks.harness import arguments, note, report
from benchmarks.pictures import CUTS, compare
from split_common.system.process import passive_threads
from split_device.cli.demo.image import DIGITS_MODEL


def main() -> None:
    parser = arguments(__doc__, "that of examples/digits-sdxl")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of a picture")
    parser.add_argument("--pictures", type=int, default=5, help="number of pictures that are averaged")
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS), help="cuts to measure")
    options = parser.parse_args()
    passive_threads()
    results: dict[str, Any] = {}
    for name in SHAPES:
        note(f"counting: {name}")
        results |= shares(name)
    results |= compare(options.model or DIGITS_MODEL, options.cuts, options.steps, options.pictures)
    report(results, options.json, "split diffusion")


if __name__ == "__main__":
    main()
