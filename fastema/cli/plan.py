"""``fastema plan``: estimate the memory and time that an average costs."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict, dataclass

from fastema.cli.arguments import count, dtype_name, expand, number

SUMMARY = "Estimate what averaging a large model costs: bytes per rank, time per update."
EXTRA = ""
NEEDS: dict[str, str] = {}

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_positive = number(
    lambda text: float(expand(text)), lambda value: 0.0 < value < 1e30, "a number above 0"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastema plan``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  fastema plan --params 7e9 --dtype bf16\n"
        "  fastema plan --params 70e9 --dtype bf16 --world 64 --link 50 --step 2.5\n"
    )
    parser.add_argument(
        "--params", type=_positive, required=True, help="number of weights, such as 7e9 or 7B"
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name(*_BYTES),
        default="bfloat16",
        help="dtype of the weights (%(default)s)",
    )
    parser.add_argument("--world", type=count, default=1, help="ranks that shard the model")
    parser.add_argument(
        "--hbm",
        type=_positive,
        default=3350.0,
        help="memory bandwidth of a GPU in GB/s (%(default)g, an H100)",
    )
    parser.add_argument(
        "--link", type=_positive, default=50.0, help="GB/s from a GPU to its host (%(default)g)"
    )
    parser.add_argument(
        "--host",
        type=_positive,
        default=100.0,
        help="memory bandwidth of a host in GB/s (%(default)g)",
    )
    parser.add_argument(
        "--ranks-per-host",
        type=count,
        default=8,
        help="ranks that share a host's memory bandwidth (%(default)s)",
    )
    parser.add_argument(
        "--every", type=count, default=10, metavar="K", help="update_every to estimate (10)"
    )
    parser.add_argument(
        "--step", type=_positive, help="seconds per training step, to print the share of it"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


@dataclass(frozen=True)
class PlanOption:
    """One way to keep an average, and its cost."""

    name: str
    call: str
    gpu_bytes: float  # per rank, in addition to the model
    host_bytes: float
    moved: float  # bytes read and written per update, on the device that computes
    link_bytes: float
    seconds: float  # per step: the time of an update, divided by update_every


def estimate_options(args: argparse.Namespace) -> list[PlanOption]:
    """Return the ways to keep an average that apply to these arguments, with their costs."""
    weights, size, world = args.params, _BYTES[args.dtype], args.world
    part = weights / world

    def on_gpu(name: str, call: str, n: float, stored: float, every: int = 1) -> PlanOption:
        moved = n * (size + 2 * stored)
        return PlanOption(name, call, n * stored, 0.0, moved, 0.0, moved / args.hbm / 1e9 / every)

    precise = 'shadow_dtype="float32"'
    found = [on_gpu("on each GPU, float32", f"EMA(model, {precise})", weights, 4)]
    if world > 1:
        found.append(on_gpu("sharded, float32", f"EMA(fsdp_model, {precise})", part, 4))
    n, where = (part, "sharded") if world > 1 else (weights, "on the GPU")
    model = "fsdp_model" if world > 1 else "model"
    if size == 2:
        found += [
            on_gpu(f"{where}, bf16+16", f'EMA({model}, shadow_dtype="bf16+16")', n, 4),
            on_gpu(f"{where}, {args.dtype}", f"EMA({model})", n, 2),
        ]
    call = f"EMA({model}, {precise}, update_every={args.every})"
    found.append(on_gpu(f"{where}, every {args.every} steps", call, n, 4, args.every))
    moved = n * (size + size + 8)  # write the host copy, then read it to update the average
    crossing = n * size / args.link / 1e9
    computing = moved / (args.host / min(world, args.ranks_per_host)) / 1e9
    call = f"EMA(host_copy, {precise})"
    found.append(
        PlanOption(
            *("on the host, float32", call, 0.0, n * (size + 4), moved, n * size),
            max(crossing, computing),
        )
    )
    return found


def run(args: argparse.Namespace) -> int:
    """Print the table and return the exit code."""
    found = estimate_options(args)
    if args.json:
        print(json.dumps([asdict(way) for way in found], indent=2))
        return 0
    from fastema.cli.sizes import LINE, duration, size

    head = ["average", "GPU", "host", "moved", "link", "time"]
    if args.step:
        head.append("share")
    rows = []
    for way in found:
        row = [way.name, size(way.gpu_bytes), size(way.host_bytes), size(way.moved)]
        row += [size(way.link_bytes), duration(way.seconds)]
        if args.step:
            row.append(f"{way.seconds / args.step:.2%}")
        rows.append([cell if cell != "0 B" else "-" for cell in row])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    ranks = f" on {args.world} ranks" if args.world > 1 else ""
    share = " and share of a training step" if args.step else ""
    text = (
        f"{args.params:,.0f} weights in {args.dtype}{ranks}. For each rank: memory on the GPU and "
        "on the host in addition to the model, bytes that an update moves in memory and over the "
        f"link, and its time per step{share}:"
    )
    print(f"{textwrap.fill(text, LINE)}\n")
    for row in [head, *rows]:
        cells = zip(row, widths, strict=True)
        line = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(cells)]
        print("  ".join(line).rstrip())
    print()
    for way in found:
        print(f"{way.name}:\n    fastema.{way.call}")
    sharing = min(args.world, args.ranks_per_host)
    ranks = "one rank" if sharing == 1 else f"{sharing} ranks"
    text = (
        f"The times are lower bounds, from {args.hbm:g} GB/s of memory on a GPU, {args.link:g} "
        f"GB/s between a GPU and its host (link), and {args.host:g} GB/s of memory on a host, used "
        f"by {ranks}. On the host: copy the weights into host_copy, then update the average "
        "from it. bfloat16 and float16 averages are rounded stochastically; bf16+16 is a float32 "
        "average stored in two halves."
    )
    print(f"\n{textwrap.fill(text, LINE)}")
    return 0
