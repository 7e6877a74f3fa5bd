"""A training on 8, 64 and 512 GPUs on paper: memory, speed, checkpoints and price by ZeRO stage.

The formulas and their sources are in scaling.py. `--measure FILE` runs small real trainings on 1 and 2 CPU workers of
the platform (scaling_jobs.py) and writes what they gave: bytes exchanged a step and bytes of a checkpoint by ZeRO
stage, which hold on any hardware, and tokens/s, start-up and speed of 2 workers over 1, which are this machine's. The
plan takes from that file (`--measured`) the bytes of a checkpoint, and the factor by which a stage exchanges more than
the formula says. Everything about GPUs is an assumption until it is measured on them: give your own by the options.

In the table: memory of a GPU for weights, gradients and optimizer; for the activations of one row, as chosen and with
all of them kept (`whole`); `used` with as many rows as fit; `micro` forward passes a step, tokens of a step (Mtok),
bytes that a GPU exchanges in a step; size, seconds and minutes between checkpoints, and what failures and saving lose.

    python benchmarks/scaling_plan.py --measure measured.json
    python benchmarks/scaling_plan.py --measured measured.json --config FOLDER
    python benchmarks/scaling_plan.py --measured measured.json --layers 28 --hidden 3072 --intermediate 8192 \
        --vocabulary 128256 --heads 24 --kv-heads 8 --head-dim 128 --tied
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from reporting import Report, Target, argument_parser
from scaling import BF16, FP32, STAGES, Hardware, Plan, Shape, exchanged_elements, plan

GPUS = (8, 64, 512)
JOBS = ((1, 2), (2, 0), (2, 1), (2, 2), (2, 3))  # workers, ZeRO stage
GB, GIB = 1e9, 2**30
# option: (default, help, source); none of them was measured here
ASSUMED = {
    "peak-tflops": (989.0, "10^12 operations/s of a GPU", "H100 SXM data sheet, bfloat16, dense"),
    "memory-gib": (80.0, "memory of a GPU", "H100 SXM data sheet"),
    "node-gpus": (8.0, "GPUs of a node", "usual server"),
    "intra-gb-s": (450.0, "GB/s that a GPU exchanges within its node", "NVLink 4, one direction"),
    "inter-gb-s": (50.0, "GB/s that a GPU exchanges with other nodes", "400 Gbit/s a GPU"),
    "storage-gb-s": (5.0, "GB/s that all nodes together write", "a guess"),
    "efficiency": (0.4, "share of the peak that computing alone reaches", "about the 38-43 % of arXiv 2407.21783"),
    "overlap": (0.5, "share of the computing behind which exchanging can hide", "a guess"),
    "reserved-gib": (4.0, "memory for context, buffers and fragments", "a guess"),
    "mtbf-hours": (
        50_000.0,
        "hours between failures that one GPU causes",
        "419 in 54 days of 16,384, arXiv 2407.21783",
    ),
    "restart-s": (300.0, "seconds from a failure to the next step", "a guess"),
    "price": (3.0, "price of a GPU for an hour", "a guess, in dollars"),
}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser("A training on many GPUs on paper: memory, speed, checkpoints and price by ZeRO stage.")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="run the small trainings and write this file")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="what --measure wrote")
    parser.add_argument("--config", help="folder or config.json of a model (transformers), or a hub name")
    for name in ("layers", "hidden", "intermediate", "vocabulary", "heads", "kv-heads", "head-dim"):
        parser.add_argument(f"--{name}", type=int, help="of a Llama-like model, instead of --config")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--qkv-bias", action="store_true", help="queries, keys and values have biases")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="numbers of GPUs")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--batch-tokens", type=int, default=4 * 2**20, help="wanted tokens of a step")
    parser.add_argument("--no-recompute", action="store_true", help="without gradient checkpointing")
    for name, (default, meaning, source) in ASSUMED.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{meaning}; assumed: {source}")
    return parser.parse_args()


def shape_of(options: argparse.Namespace) -> Shape:
    """Return the model's shape from its configuration or from the options."""
    if options.config is None:
        names = ("layers", "hidden", "intermediate", "vocabulary", "heads")
        missing = [f"--{name}" for name in names if getattr(options, name) is None]
        if missing:
            raise SystemExit(f"the model: give --config, or {', '.join(missing)} as well")
        heads = options.heads
        return Shape(
            *(getattr(options, name) for name in names),
            options.kv_heads or heads,
            options.head_dim or options.hidden // heads,
            options.tied,
            options.qkv_bias,
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.config).get_text_config()
    shape = Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        config.tie_word_embeddings,
        config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False)),
    )
    return checked(shape, config)


def checked(shape: Shape, config: Any) -> Shape:
    """Compare the counted parameters with those of transformers' own model, which is made without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    there = sum(parameter.numel() for parameter in model.parameters())
    if there != shape.parameters:
        raise SystemExit(
            f"{config.model_type}: transformers' model has {there:,} parameters, a Llama-like one of this shape "
            f"{shape.parameters:,}. The formulas are for decoders with gated MLPs; give the nearest shape by "
            "--layers, --hidden, ..."
        )
    return shape


def hardware_of(options: argparse.Namespace) -> Hardware:
    """Return the assumed hardware in bytes and seconds."""
    return Hardware(
        options.peak_tflops * 1e12,
        options.memory_gib * GIB,
        int(options.node_gpus),
        options.intra_gb_s * GB,
        options.inter_gb_s * GB,
        options.storage_gb_s * GB,
        options.efficiency,
        options.overlap,
        options.reserved_gib * GIB,
        options.mtbf_hours * 3600,
        options.restart_s,
        options.price,
    )


def measure(options: argparse.Namespace) -> int:
    """Run the small trainings, compare them with the formulas, and write what they gave."""
    from scaling_jobs import BATCH, STEPS, measured_job
    from tenfold.platform import cluster
    from tenfold.platform.hardware import supports_bf16

    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu", "RAY_ADDRESS": "local"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import psutil

    busy, bf16 = psutil.cpu_percent(interval=2), supports_bf16()
    report = Report(
        "scaling, measured",
        {"batch": BATCH, "steps": STEPS, "bf16": bf16, "share of the cores busy before": f"{busy:.0f} %"},
    )
    cluster.connect()
    try:
        report.rows += [measured_job(workers, stage, bf16) for workers, stage in JOBS]
    finally:
        cluster.shutdown()
    student = Shape(4, 192, 512, 49152, 6, 3, 32, tied=True)
    one = report.rows[0]
    precision = BF16 if bf16 else FP32
    for row in report.rows:
        elements = exchanged_elements(row["parameters"], row["stage"])
        formula = elements * precision.weight if row["workers"] > 1 else 0
        row["formula_bytes"] = formula
        row["exchange_ratio"] = row["exchanged_bytes"] / formula if formula else None
        row["over_one"] = row["tokens_per_s"] / one["tokens_per_s"]
        row["exchanged_mb"] = row["exchanged_bytes"] / 1e6
        row["formula_mb"] = formula / 1e6
    if one["parameters"] != student.parameters:
        raise SystemExit(f"the student has {one['parameters']} parameters, its shape says {student.parameters}")
    report.targets += [
        Target(f"zero{row['stage']}_exchanged_over_formula", row["exchange_ratio"], 1.6)
        for row in report.rows
        if row["workers"] > 1
    ]
    report.show(
        {
            "workers": "workers",
            "stage": "ZeRO",
            "tokens_per_s": "tokens/s",
            "over_one": "/ 1 worker",
            "start_s": "start s",
            "exchanged_mb": "exchanged MB a step",
            "formula_mb": "formula MB",
            "exchange_ratio": "/ formula",
            "checkpoint_bytes_per_parameter": "checkpoint B a parameter",
        }
    )
    return report.finish(options.measure)


def show_plan(options: argparse.Namespace) -> int:
    """Print the plan."""
    if options.measured is None:
        raise SystemExit("--measured FILE: bytes of a checkpoint come from there; make it with --measure FILE")
    measured = {
        row["stage"]: row
        for row in json.loads(options.measured.read_text(encoding="utf-8"))["rows"]
        if row["workers"] > 1
    }
    shape, hardware = shape_of(options), hardware_of(options)
    assumed = ", ".join(f"{name} {getattr(options, name.replace('-', '_')):g}" for name in ASSUMED)
    settings = {
        "parameters": f"{shape.parameters:,}",
        "row": options.length,
        "wanted tokens a step": options.batch_tokens,
        "recomputation": not options.no_recompute,
        "measured": "bytes of checkpoints, exchange over formula",
        "ASSUMED, not measured": assumed,
    }
    report = Report("scaling plan", settings)
    for gpus in options.gpus:
        for stage in STAGES:
            found = plan(
                shape,
                hardware,
                gpus,
                stage,
                length=options.length,
                batch_tokens=options.batch_tokens,
                checkpoint_bytes=measured[stage]["checkpoint_bytes_per_parameter"],
                recompute=not options.no_recompute,
                # a small model gathers less in stage 3 than a large one will
                exchange_factor=max(1.0, measured[stage].get("exchange_ratio") or 1.0),
            )
            report.rows.append(plan_row(found))
    shown = [{key: _short(value) for key, value in row.items()} for row in report.rows]
    Report(report.benchmark, settings, shown).show(COLUMNS)
    return report.finish(options.json)


COLUMNS = {
    "gpus": "GPUs",
    "stage": "ZeRO",
    "weights_gib": "w GiB",
    "gradients_gib": "g GiB",
    "optimizer_gib": "opt GiB",
    "row_gib": "row GiB",
    "whole_row_gib": "whole",
    "rows": "rows",
    "micro_steps": "micro",
    "memory_gib": "used",
    "batch_mtokens": "Mtok",
    "exchanged_gb": "exch GB",
    "ktokens_per_s": "ktok/s",
    "checkpoint_gb": "ckpt GB",
    "save_s": "save s",
    "interval_min": "min",
    "lost_percent": "lost %",
    "price": "$ / Gtok",
}


def plan_row(found: Plan) -> dict[str, Any]:
    """Return a plan in the table's units; what does not fit has no numbers."""
    weights, gradients, optimizer = (part / GIB for part in found.states)
    row: dict[str, Any] = {
        "gpus": found.gpus,
        "stage": found.stage,
        "weights_gib": weights,
        "gradients_gib": gradients,
        "optimizer_gib": optimizer,
        "row_gib": found.activations / GIB,
        "whole_row_gib": found.whole_activations / GIB,
        "rows": found.rows,
        "memory_gib": found.memory / GIB,
    }
    if not found.rows:
        return row
    return row | {
        "micro_steps": found.micro_steps,
        "batch_mtokens": found.batch_tokens / 1e6,
        "exchanged_gb": found.exchanged / GB,
        "ktokens_per_s": found.tokens_per_s / 1e3,
        "checkpoint_gb": found.checkpoint / GB,
        "save_s": found.save_s,
        "interval_min": found.interval_s / 60,
        "lost_percent": 100 * found.lost,
        "price": found.price,
    }


def _short(value: Any) -> Any:
    return round(value) if isinstance(value, float) and value >= 100 else value


def main() -> int:
    """Run the benchmark and return its exit code."""
    options = parse_options()
    return measure(options) if options.measure else show_plan(options)


if __name__ == "__main__":
    raise SystemExit(main())
