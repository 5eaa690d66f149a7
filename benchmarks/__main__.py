"""Measure ratios of speed and memory within one run: ``python -m benchmarks [NAME ...] [-o FILE.json] [-device cpu]``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from pathlib import Path

import torch

from benchmarks.measure import Row

NAMES = ("step", "shares", "switches", "losses", "parts", "files", "ranks", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", default=NAMES, metavar="NAME", help=f"benchmarks to run: {', '.join(NAMES)}"
    )
    parser.add_argument("-o", dest="output", type=Path, default=Path("benchmarks.json"), help="JSON file to write")
    parser.add_argument("-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}, use one of {', '.join(NAMES)}")
    device = torch.device(arguments.device)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows: list[Row] = []
    for name in arguments.names:
        for row in importlib.import_module(f"benchmarks.{name}").run(device):
            rows.append(row)
            held = "   MISSED" if row.holds is False else ""
            numbers = f"{row.ours:9.4g} {row.theirs:9.4g} {row.unit:10}{row.ratio:8.3g}   {row.bar}{held}"
            print(f"{row.name:18}{row.what:75}{numbers}", flush=True)
            arguments.output.write_text(json.dumps({"machine": machine, "rows": [r._asdict() for r in rows]}, indent=4))
    print(f"Written to {arguments.output}. To measure the memory of several plans: python -m benchmarks.memory")


if __name__ == "__main__":
    main()
