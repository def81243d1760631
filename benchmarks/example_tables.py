"""Tables of what the examples have reached, and of random trials."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks import harness, tables
from benchmarks.tables import markdown


def accuracy(name: str) -> str:
    """The markdown table of an example's runs."""
    document = json.loads((harness.RESULTS / f"{name}.json").read_text())
    scores: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    for run in document["runs"]:
        scores.setdefault(run["recipe"], []).append(run["accuracy"])
        times.setdefault(run["recipe"], []).append(run["ms_per_step"])
    means = {recipe: sum(values) / len(values) for recipe, values in scores.items()}
    steps = {recipe: statistics.median(values) for recipe, values in times.items()}
    settings, machine = document["settings"], document["machine"]
    told = (
        f"Test accuracy on {document['data']}, {document['train_images']} training images, every recipe from scratch: "
        f"{settings['epochs']} epochs, batches of {settings['batch_size']}, {settings['seeds']} seed(s); "
        f"{machine['cpu']}, {machine['threads']} threads, torch {document['versions']['torch']}, commit "
        f"{document['commit']['hash'][:10]}, {document['date'][:10]}. Recipes: examples/recipes.py."
    )
    rows = ["| recipe | accuracy % | +- | points from float | step, median of seeds |", "|---|---|---|---|---|"]
    for recipe, mean in means.items():
        spread = f"{statistics.stdev(scores[recipe]):.2f}" if len(scores[recipe]) > 1 else "-"
        against = f"{mean - means['float']:+.2f} | {steps[recipe] / steps['float']:.2f}x float"
        rows.append(f"| {recipe} | {mean:.2f} | {spread} | {against} |")
    return told + "\n\n" + "\n".join(rows) + "\n"


def calibrated(name: str) -> str:
    """The markdown table of examples/ptq.py's runs: a row an observer, two columns a number of bits."""
    document = json.loads((harness.RESULTS / f"{name}.json").read_text())
    settings, machine, runs = document["settings"], document["machine"], document["runs"]

    def mean(key: str, observer: str, bits: int) -> float:
        return statistics.fmean(run[key] for run in runs if (run["observer"], run["bits"]) == (observer, bits))

    level = mean("accuracy", "float", 32)
    told = (
        f"Post-training quantization of a trained float model ({level:.2f} %) on {document['data']}: "
        f"{document['test_images']} test images, {settings['calibration']} training images observed, weights, inputs "
        f"and activations quantized, means of {settings['seeds']} seed(s); {machine['cpu']}, {machine['threads']} "
        f"threads, torch {document['versions']['torch']}, commit {document['commit']['hash'][:10]}, "
        f"{document['date'][:10]}. First accuracy in points from float, then the scores' mean squared error in "
        "thousandths of their variance."
    )
    rows = []
    for observer in settings["observers"]:
        row = [observer]
        for bits in settings["bits"]:
            points = round(mean("accuracy", observer, bits) - level, 2) + 0.0  # no -0.00
            row.append(f"{points:+.2f}")
            row.append(tables.figure(1000 * mean("error", observer, bits)))
        rows.append(row)
    heads = [f"{bits} bits{what}" for bits in settings["bits"] for what in ("", ", error")]
    return "\n".join([told, "", *markdown(["observer", *heads], rows)]) + "\n"


def deployed(name: str) -> str:
    """What examples/deploy.py found, in two tables."""
    document = json.loads((harness.RESULTS / f"{name}.json").read_text())
    found, machine = document["outcome"], document["machine"]
    told = (
        f"onnxruntime on the exported int8 file against the simulated model, {document['data']}, "
        f"{document['test_images']} test images; {machine['cpu']}, {machine['threads']} threads, torch "
        f"{document['versions']['torch']}, commit {document['commit']['hash'][:10]}, {document['date'][:10]}."
    )
    facts = [
        [
            "accuracy: float, simulated, onnxruntime",
            " / ".join(f"{found[f'{who}_accuracy']:.2f} %" for who in ("float", "simulated", "onnxruntime")),
        ],
        ["same class", f"{found['same_top1_percent']:.2f} %"],
        ["difference of the scores in steps: mean, largest", f"{found['mean_steps']:.4f}, {found['max_steps']:.2f}"],
        ["kB: float32, int8", f"{found['float_bytes'] / 1000:.0f}, {found['int8_bytes'] / 1000:.0f}"],
    ]
    for one in document["latency"]:
        times = f"{one['float_ms']:.3f}, {one['int8_ms']:.3f} ({one['times_faster']:.2f}x)"
        what = f"ms for a batch of {one['batch']} on {one['threads']} thread(s): float32, int8"
        facts.append([what, times])
    return "\n".join([told, "", *markdown(["", ""], facts)]) + "\n"


def trials(name: str) -> str:
    """The markdown table of a long run of tests/fuzz.py."""
    document = json.loads((harness.RESULTS / f"{name}.json").read_text())
    tallies: dict[str, dict[str, Any]] = document["tallies"]
    tried, failed = (sum(one[key] for one in tallies.values()) for key in ("tried", "failed"))
    told = (
        f"{tried:,} cases, {failed} failed: {document['machine']['cpu']}, {document['arguments']['backend']} kernels, "
        f"torch {document['versions']['torch']}, commit {document['commit']['hash'][:10]}, {document['date'][:10]}, "
        f"seed {document['arguments']['seed']}."
    )
    heads = [document["fuzz"], "cases", "refused, as they must be", "failed"]
    rows = [
        [f"`{key}`", *(f"{one[part]:,}" for part in ("tried", "refused", "failed"))] for key, one in tallies.items()
    ]
    return "\n".join([told, "", *markdown(heads, rows)]) + "\n"
