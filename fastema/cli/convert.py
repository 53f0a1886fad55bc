"""``fastema convert``: write an average in the format of another library."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastema.cli.arguments import add_force, add_state_arguments, check_new, decay

SUMMARY = "Convert an average to the format of another library."
EXTRA = "torch"
NEEDS: dict[str, str] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastema convert``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  fastema convert ema.safetensors ema.pt --to diffusers\n"
        "  fastema convert lightning.ckpt weights.safetensors --to safetensors\n"
        "  fastema convert torch_ema.pt ema.safetensors --to fastema --names model.pt\n"
    )
    parser.add_argument(
        "src", type=Path, help="a file or folder to read; fastema inspect describes it"
    )
    parser.add_argument(
        "dst",
        type=Path,
        help="the file to write; with --to safetensors, a folder if the source is one and the name "
        "does not end in .safetensors",
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="LIBRARY",
        help="fastema, safetensors (the averaged weights alone), swa_utils, timm, torch_ema, "
        "ema_pytorch, diffusers, litema, mmengine or d2go",
    )
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="the names of the model's parameters in order, for formats without them: a .txt file "
        "with one name on each line, an average of fastema, or the model's state dict saved by "
        "torch.save",
    )
    parser.add_argument(
        "--decay", type=decay, help="decay for further updates, if the source stores none"
    )
    add_state_arguments(parser)
    add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, print what could not be carried over, and return the exit code."""
    from fastema.checkpoint import convert

    read = [path.resolve() for path in (args.src, args.names) if path is not None]
    check_new(args.dst, args.force or args.dst.resolve() in read)  # convert refuses what it reads
    options = {"names": args.names, "decay": args.decay, "key": args.key, "index": args.index}
    done = convert(args.src, args.dst, to=args.to, **options)
    number = len(done.source.checkpoint.tensors)
    print(f"{done.path}: {done.to}, {number} tensors of {args.src} ({done.source.library})")
    for one in done.lost:
        print(f"not carried: {one}")
    return 0
