"""Time and temporary memory of the operator against the length of the sequence.

    python -m nha_jax.ops.benchmark --lengths 4096 16384 --windows 64 1024 --json scaling.json

Prints a table (median of several runs; ratios to the first length within this run) and writes JSON
with the hardware, the versions and the date.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

from nha_jax.ops import native_hybrid_attention


def main() -> None:
    args = _parse()
    rows = []
    for window in args.windows:
        for length in args.lengths:
            rows.append(_measure(args, window, length))
            first = next(row for row in rows if row["window"] == window)
            for key in ("milliseconds", "temporary_bytes"):
                rows[-1][f"{key}_ratio"] = rows[-1][key] / first[key]
    _print_table(rows)
    if args.json:
        report = {
            "device": jax.devices()[0].device_kind,
            "processor": platform.processor() or platform.machine(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "arguments": vars(args) | {"json": str(args.json)},
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="T")
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 1024], help="W")
    parser.add_argument("--batch", type=int, default=1, help="B")
    parser.add_argument("--num-heads", type=int, default=4, help="N")
    parser.add_argument("--num-kv-heads", type=int, default=2, help="G")
    parser.add_argument("--head-size", type=int, default=64, help="K = V")
    parser.add_argument("--num-slots", type=int, default=64, help="M")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--implementation", default="xla")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _measure(args: argparse.Namespace, window: int, length: int) -> dict:
    b, n, g, size, m = (
        args.batch,
        args.num_heads,
        args.num_kv_heads,
        args.head_size,
        args.num_slots,
    )
    keys = jax.random.split(jax.random.key(0), 5)

    def draw(key, heads):
        return jax.random.normal(key, (b, length, heads, size), jnp.float32).astype(args.dtype)

    q, k, v = draw(keys[0], n), draw(keys[1], g), draw(keys[2], g)
    gates = jax.random.normal(keys[3], (b, length, g, m), jnp.float32)
    log_decay = jax.nn.log_sigmoid(gates) / 8 if m else None
    cotangent = draw(keys[4], n)

    def forward(q, k, v, log_decay):
        return native_hybrid_attention(
            q, k, v, log_decay, window=window, implementation=args.implementation
        )

    def both(q, k, v, log_decay, cotangent):
        out, pull_back = jax.vjp(forward, q, k, v, log_decay)
        return out, pull_back(cotangent)

    inputs = (q, k, v, log_decay) if args.forward_only else (q, k, v, log_decay, cotangent)
    compiled = jax.jit(forward if args.forward_only else both).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend does not analyse memory"
    times = []
    for _ in range(args.runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(1000 * (time.perf_counter() - start))
    return {
        "window": window,
        "length": length,
        "milliseconds": statistics.median(times),
        "milliseconds_all": times,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }


def _print_table(rows: list[dict]) -> None:
    print(f"{'W':>6} {'T':>8} {'ms':>10} {'ratio':>7} {'temporary MiB':>14} {'ratio':>7}")
    for row in rows:
        print(
            f"{row['window']:>6} {row['length']:>8} {row['milliseconds']:>10.2f} "
            f"{row['milliseconds_ratio']:>7.2f} {row['temporary_bytes'] / 2**20:>14.1f} "
            f"{row['temporary_bytes_ratio']:>7.2f}"
        )


if __name__ == "__main__":
    main()
