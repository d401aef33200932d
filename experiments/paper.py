"""`python -m experiments.paper`: measure every table and figure, one after another. What is done is skipped, so it resumes.

Arguments go to every command: `python -m experiments.paper promote=true`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

CPU = (
    "experiment=compression_ratio_all",
    "-m experiment=exponent_entropy model=smollm2_135m,llama3_1_8b_synthetic",
    "-m experiment=compression_time model=smollm2_135m,llama3_1_8b_synthetic",
    "experiment=losslessness",
    "experiment=capacity",
)
OFFLOAD = (
    "model=qwen3_14b_synthetic bench.memory_mib=24564",
    "model=mistral_small_24b_synthetic bench.memory_mib=40960",
    "model=qwq_32b_synthetic bench.memory_mib=49152",
    "model=llama3_1_8b_synthetic bench.memory_mib=13312",
)
PROTOCOL = "bench.warmup=100 bench.tokens=100 bench.repeats=5 bench.batch_size=[1]"  # the paper's of Fig. 4
GPU = (
    "experiment=decompression",
    "experiment=linear",
    "experiment=compression_time model=llama3_1_8b_synthetic device=cuda",
    "experiment=losslessness model=llama3_1_8b_synthetic model.sample_blocks=0 device=cuda",
    *(f"experiment=offload {which}" for which in OFFLOAD),
    *(f"experiment=offload {which} {PROTOCOL}" for which in OFFLOAD),
    "experiment=generation_length",
    "experiment=generation_length model=mistral_small_24b_synthetic bench.memory_mib=49128",
    "experiment=generation_length model=llama3_1_8b_synthetic bench.memory_mib=20480",
    "experiment=load_time model=llama3_1_8b_synthetic model.sample_blocks=0 device=cuda",
    "experiment=latency_breakdown",
    "experiment=same_gpu",
    "experiment=same_gpu bench.kernels=[] bench.modes=[fused] bench.variants=[compiled,merged_compiled] bench.launches=[graph]"
    " bench.batch_size=[1,64]",
    "experiment=capacity_check",
)


def main(extra: list[str]) -> int:
    """Run all that this machine can. The exit status is 1 if one failed."""
    on_gpu = shutil.which("nvidia-smi") is not None
    if not on_gpu:
        print(f"no GPU here: {len(GPU)} of {len(CPU) + len(GPU)} commands are left out")
    failed = []
    for command in (*CPU, *GPU) if on_gpu else CPU:
        print(f"python run.py {command}", flush=True)
        if subprocess.run([sys.executable, "run.py", *command.split(), *extra]).returncode:
            failed.append(command)
    for command in failed:
        print(f"failed: python run.py {command}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
