"""Build the stand-in: ``python build.py FOLDER`` makes ``FOLDER/libstandin.so``. Needs g++ and a CUDA build of torch.

It also makes ``libcuda.so.1`` there, because torch looks for the driver's library.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
# These functions do not return an int, and torch does not need them.
LEFT_OUT = {
    "cudaRuntimeGetVersion", "cudnnGetVersion", "cublasLtGetVersion", "cudnnGetCudartVersion", "cudnnGetProperty",
    "ncclGetVersion", "ncclGetErrorString", "cudaGetErrorString", "cudaGetErrorName", "cudnnGetErrorString",
    "cudnnGetLastErrorString", "cusparseGetErrorString",
}  # fmt: skip
BY_HAND = re.compile(r"^\s*(?:API|NAPI|VAPI|BAPI)\s+[\w\s*]*?\b(\w+)\(", re.M)


def stubs() -> str:
    """Return functions that do nothing and return 0, for the symbols that ``runtime.cpp`` does not define."""
    written = set(BY_HAND.findall((HERE / "runtime.cpp").read_text()))
    written |= {"__cudaInitModule", "__cudaPushCallConfiguration", "__cudaRegisterFatBinary"}
    names = [name for name in (HERE / "symbols.txt").read_text().split() if name not in written | LEFT_OUT]
    body = [f'__attribute__((visibility("default"))) long {n}() {{ fk_count("{n}"); return 0; }}' for n in names]
    return "\n".join(['extern "C" void fk_count(const char*);', 'extern "C" {', *body, "}"])


def build(folder: Path) -> Path:
    """Build the library in a folder and return it."""
    site = Path(torch.__file__).parent.parent
    headers = folder / "include"
    headers.mkdir(parents=True, exist_ok=True)
    # without includes of headers that the wheels lack
    text = (site / "nvidia/nccl/include/nccl.h").read_text()
    kept = [line for line in text.splitlines() if not re.search(r"include <cuda_(fp16|bf16|fp8)", line)]
    (headers / "nccl.h").write_text("\n".join(kept))
    (folder / "stubs.cpp").write_text(stubs())
    cuda = next(site.glob("nvidia/cu*/include"))
    driver = ["g++", "-shared", "-fPIC", str(HERE / "driver.cpp"), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(driver, check=True, capture_output=True, text=True)
    library = folder / "libstandin.so"
    command = ["g++", "-O1", "-fPIC", "-shared", "-std=c++17", "-w", f"-I{cuda}", f"-I{headers}"]
    command += [f"-I{site / 'triton/backends/nvidia/include'}", str(HERE / "runtime.cpp"), str(folder / "stubs.cpp")]
    subprocess.run([*command, "-o", str(library), "-ldl", "-lpthread"], check=True, capture_output=True, text=True)
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
