"""The command line `df11`: compress, info, verify, restore."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from df11 import __version__, checkpoint, gpu, released_checkpoint
from df11.formats import FormatError, UnsupportedBits
from df11.runtime import GRANULARITIES, MODES
from df11.sources import SourceError, require_models_extra

EXAMPLES = """examples:
  df11 compress ~/models/Llama-3.1-8B ~/models/Llama-3.1-8B-df11
  df11 verify ~/models/Llama-3.1-8B-df11 --original ~/models/Llama-3.1-8B
  df11 info ~/models/Llama-3.1-8B-df11

then, in Python:
  import df11
  model = transformers.AutoModelForCausalLM.from_pretrained("Llama-3.1-8B-df11", device_map="cuda")
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit status. Errors of use and damaged files are told in one line."""
    options = _parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
    except (checkpoint.CheckpointError, FormatError, UnsupportedBits, SourceError, OSError) as error:
        print(f"df11 {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumes = options.command == "compress" and not options.released
        again = "goes on where it was" if resumes else "begins anew"
        print(f"df11 {options.command}: interrupted; run again, it {again}", file=sys.stderr)
        return 130
    return 0


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "df11",
        description="Lossless compression of bf16 model checkpoints (safetensors) to about 68 %.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"df11 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    compress = commands.add_parser("compress", help="compress a directory of safetensors to a new one; resumes if interrupted")
    compress.add_argument("source", type=Path)
    compress.add_argument("target", type=Path)
    compress.add_argument("--include", action="append", default=[], metavar="PATTERN", help="compress only tensors of such names")
    compress.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave tensors of such names as they are"
    )
    compress.add_argument("--threads", type=_positive, default=0, help="default: all cores")
    compress.add_argument(
        "--remote-code",
        action="store_true",
        help="also loads without `import df11`, by from_pretrained(..., trust_remote_code=True)",
    )
    compress.add_argument(
        "--mode",
        choices=MODES,
        default="exact",
        help="how transformers runs it: exact, logits bit-identical; fused, faster on a GPU, weights bit-identical",
    )
    compress.add_argument(
        "--granularity", choices=GRANULARITIES, default="layer", help="what transformers decompresses at a time in mode exact"
    )
    compress.add_argument("--released", action="store_true", help="write the layout of the released package dfloat11 instead")
    compress.set_defaults(run=_compress)
    info = commands.add_parser("info", help="sizes, and what is compressed and what is not")
    info.add_argument("directory", type=Path)
    info.add_argument("--all", action="store_true", help="a line for each tensor")
    info.add_argument("--entropy", action="store_true", help="decode everything and give the entropy of the exponents")
    info.set_defaults(run=_info)
    verify = commands.add_parser("verify", help="decode everything and compare with the checksums of the original bits")
    verify.add_argument("directory", type=Path)
    verify.add_argument("--original", type=Path, help="compare with this original, bit for bit")
    verify.set_defaults(run=_verify)
    restore = commands.add_parser(
        "restore", help="give back the original checkpoint; also of the released package's (DFloat11/...-DF11)"
    )
    restore.add_argument("directory", type=Path)
    restore.add_argument("target", type=Path)
    restore.set_defaults(run=_restore)
    return parser


@contextmanager
def _progress(what: str, total: int) -> Iterator[checkpoint.Progress]:
    """A bar on a terminal, nothing elsewhere."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda name, size: bar.advance(task, size)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) if directory.is_dir() else 0


def _compress(options: argparse.Namespace) -> None:
    if options.released:
        _compress_released(options)
        return
    auto_classes = None
    if options.remote_code:
        require_models_extra("transformers")
        from df11 import hf

        auto_classes = hf.auto_classes
    patterns, how = (tuple(options.include), tuple(options.exclude)), (options.mode, options.granularity)
    with _progress("compressing", _size(options.source)) as progress:
        checkpoint.compress(options.source, options.target, *patterns, options.threads, progress, auto_classes, *how)
    _info(argparse.Namespace(directory=options.target, all=False, entropy=False))
    if short := checkpoint.shortfall(checkpoint.summary(options.target)):
        print(f"df11 compress: warning: {short}", file=sys.stderr)


def _compress_released(options: argparse.Namespace) -> None:
    if options.include or options.exclude or options.remote_code or (options.mode, options.granularity) != ("exact", "layer"):
        raise checkpoint.CheckpointError(
            "--include, --exclude, --remote-code, --mode and --granularity do not go with --released:"
            " that layout has whole blocks and no quantizer"
        )
    require_models_extra("transformers")
    from df11 import hf

    with _progress("compressing", _size(options.source)) as progress:
        released_checkpoint.write(options.source, options.target, options.threads, progress, hf.parameter_names)
    print(f"{options.target}: {_size(options.target) / 1e9:.4g} GB of {_size(options.source) / 1e9:.4g}")
    print(
        "the released package loads it (dfloat11.DFloat11Model.from_pretrained); after `import df11`, so does transformers with"
        " quantization_config=df11.hf.DF11Config()"
    )


def _info(options: argparse.Namespace) -> None:
    rows = checkpoint.summary(options.directory)
    table = Table(box=None, pad_edge=False)
    for column in ("", "tensors", "GB", "GB stored", "%", "bits a weight"):
        table.add_column(column, justify="right" if column else "left")
    groups = [(name, [r for r in rows if r["compressed"] is state]) for name, state in (("compressed", True), ("as it was", False))]
    for name, group in [*groups, ("all", rows)]:
        original, stored = sum(r["original"] for r in group), sum(r["stored"] for r in group)
        percent = f"{100 * stored / original:.2f}" if original else "-"
        bits = f"{16 * stored / original:.3f}" if original else "-"
        table.add_row(name, str(len(group)), f"{original / 1e9:.4g}", f"{stored / 1e9:.4g}", percent, bits)
    console = Console()
    console.print(table)
    largest = sorted((r for r in rows if not r["compressed"]), key=lambda r: -r["original"])[:3]
    if largest and not options.all:
        console.print("largest as they were: " + ", ".join(f"{r['name']} {list(r['shape'])}" for r in largest), highlight=False)
    active = "GPU kernels ready" if gpu.is_available() else "no GPU with pycuda and nvcc here: decoding on the CPU"
    console.print(f"after `import df11`, transformers loads it; {active}", highlight=False)
    if options.entropy:
        exponents, coded = checkpoint.exponent_bits(options.directory)
        console.print(f"exponents: {exponents:.3f} bits of entropy a weight, {coded:.3f} bits coded", highlight=False)
    if options.all:
        each = Table(box=None, pad_edge=False)
        for column in ("tensor", "shape", "MB", "MB stored", "%"):
            each.add_column(column, justify="left" if column in ("tensor", "shape") else "right")
        for r in rows:
            percent = f"{100 * r['stored'] / r['original']:.2f}" if r["original"] else "-"
            each.add_row(r["name"], json.dumps(r["shape"]), f"{r['original'] / 1e6:.2f}", f"{r['stored'] / 1e6:.2f}", percent)
        console.print(each)


def _verify(options: argparse.Namespace) -> None:
    with _progress("verifying", sum(r["original"] for r in checkpoint.summary(options.directory))) as progress:
        count = checkpoint.verify(options.directory, options.original, progress)
    print(f"{count} tensors are bit for bit {'those of ' + str(options.original) if options.original else 'the original ones'}")


def _restore(options: argparse.Namespace) -> None:
    if released_checkpoint.is_released(options.directory):
        require_models_extra("transformers")
        from df11 import hf

        with _progress("restoring", _size(options.directory)) as progress:
            released_checkpoint.restore(options.directory, options.target, hf.parameter_shapes(options.directory), progress)
        print(f"restored to {options.target}")
        return
    with _progress("restoring", sum(r["original"] for r in checkpoint.summary(options.directory))) as progress:
        checkpoint.restore(options.directory, options.target, progress)
    print(f"restored to {options.target}")


if __name__ == "__main__":
    sys.exit(main())
