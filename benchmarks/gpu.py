"""Everything that only a card can tell, in at most eight minutes: `make gpu` on a fresh machine, or `make gpu GPU_PYTHON=python` in yours.

    python benchmarks/gpu.py            # writes benchmarks/results/gpu.json, and prints a table
    python benchmarks/gpu.py --tiny     # the same code on a processor at tiny size, into runs/gpu-tiny; half a minute

Each part is a process of its own with a time limit of its own: one that fails, or takes too long, is reported and stops no other.
Nothing is downloaded.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from attrs import frozen
from gpu_device import Device, Found, Row, goal
from record import ROOT, describe_machine, result_file

BUDGET_S = 480


@frozen
class Part:
    """One of the parts.

    Args:
        run: what it does; modules that it needs are imported then, so that one which cannot be imported fails alone.
        limit_s: when it is ended.
    """

    run: Callable[[Device], Found]
    limit_s: float


def _of(module: str, function: str, *arguments: str) -> Callable[[Device], Found]:
    def run(device: Device) -> Found:
        found: Found = getattr(__import__(module), function)(*arguments, device)
        return found

    return run


def quickstart(device: Device) -> Found:
    """Run the quickstart on the device; return its seconds, and the reverse KL that it reports."""
    out = ROOT / "runs" / f"gpu-quickstart-{device.name}-{time.time_ns()}"
    sizes = _tiny_quickstart(out) if device.tiny else []
    sys.path.insert(0, str(ROOT / "examples"))
    sys.argv = ["quickstart.py", "--device", device.name, "--out", str(out), *sizes]
    begun = time.perf_counter()
    import quickstart as script

    script.main()
    seconds, metrics = time.perf_counter() - begun, json.loads((out / "metrics.json").read_text())
    return [{"seconds": seconds, "phases": metrics["phases"]}], [goal("the quickstart ends", "yes", "yes", True)]


def _tiny_quickstart(out: Path) -> list[str]:
    """Make tiny models and few prompts in the folder of the run; return the options that name them."""
    import tiny_models

    for name, seed in (("teacher", 1), ("student", 2)):
        tiny_models.build_model("qwen3", seed=seed).save_pretrained(out / name)
        tiny_models.build_tokenizer().save_pretrained(out / name)
    (out / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(30)))
    counts = {
        "sft-prompts": 6,
        "opd-prompts": 6,
        "held-out-prompts": 4,
        "max-new-tokens": 4,
        "sft-steps": 3,
        "opd-steps": 3,
        "opd-rollouts-per-step": 4,
        "top-k": 8,
    }
    inputs = {"teacher": out / "teacher", "student": out / "student", "prompts": out / "prompts.jsonl"}
    return [word for name, value in {**counts, **inputs}.items() for word in (f"--{name}", str(value))]


PARTS = {
    "conformance": Part(_of("gpu_losses", "conformance"), 65),
    "engines": Part(_of("gpu_engines", "engines"), 40),
    "losses": Part(_of("gpu_losses", "race"), 60),
    **{
        f"step, {model}, {layout}": Part(_of("gpu_step", "train", model, layout), limit_s)
        for model, layout, limit_s in (
            ("Qwen3-0.6B", "rows", 40),
            (
                "Qwen3-0.6B",
                "packed",
                85,
            ),  # without FlashAttention, FlexAttention is compiled; what is compiled is kept for the larger model
            ("Qwen3-1.7B", "rows", 40),
            ("Qwen3-1.7B", "packed", 50),
        )
    },
    "quickstart": Part(quickstart, 95),
}


def in_a_process(name: str, device: Device, limit_s: float) -> Row:
    """Run a part in a process of its own; return what it found, or why it failed."""
    command = [sys.executable, __file__, "--part", name, "--device", device.name, *(["--tiny"] if device.tiny else [])]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"it took more than {limit_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    found: Row = json.loads(lines[-1])
    return found


def here(name: str, device: Device, _limit_s: float = 0) -> Row:
    """Run a part in this process; return what it found."""
    rows, goals = PARTS[name].run(device)
    return {"rows": rows, "goals": goals}


def run_all(
    device: Device, launch: Callable[[str, Device, float], Row] = in_a_process, names: Sequence[str] = ()
) -> tuple[list[Row], list[Row]]:
    """Run all parts, as long as there is time; return their rows and goals."""
    begun, rows, goals = time.perf_counter(), list[Row](), list[Row]()
    for name in names or PARTS:
        left = BUDGET_S - (time.perf_counter() - begun)
        started = time.perf_counter()
        found = launch(name, device, min(PARTS[name].limit_s, left)) if left > 0 else {"failed": f"the {BUDGET_S} s were over"}
        took = time.perf_counter() - started
        failed = found.get("failed")
        rows.append({"part": name, "wall_s": took, "state": f"failed: {failed}" if failed else "ran"})
        rows += [{"part": name, **row} for row in found.get("rows", [])]
        goals += [*found.get("goals", []), goal(f"{name}: the part ran", "yes", "no" if failed else "yes", not failed)]
        print(f"{name:28s} {took:6.1f} s  {rows[-1 - len(found.get('rows', []))]['state']}", flush=True)
    return rows, goals


def describe(device: Device) -> Row:
    """Return machine and versions, the card among them."""
    report = describe_machine()
    if device.on_card:
        card = torch.cuda.get_device_properties(0)
        report["machine"] |= {"card": card.name, "card_gb": card.total_memory / 1e9, "cuda": torch.version.cuda}
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or one of them; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="(cuda, or cpu with --tiny)")
    parser.add_argument("--tiny", action="store_true", help="sizes for a processor")
    parser.add_argument("--part", choices=PARTS, help="this one alone, whose result is printed as JSON")
    options = parser.parse_args(arguments)
    device = Device(options.device or ("cpu" if options.tiny else "cuda"), options.tiny)
    if device.on_card and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no card; install a build for it, or pass --tiny")
    if options.part:
        print(json.dumps(here(options.part, device)))
        return 0
    rows, goals = run_all(device)
    for found in goals:
        print("met   " if found["met"] else "MISSED", found["name"], "| wanted", found["goal"], "| measured", found["measured"])
    folder = ROOT / "benchmarks" / "results" if device.on_card else ROOT / "runs" / "gpu-tiny"
    print("written:", result_file("gpu", describe(device), rows, goals, folder))
    return 0 if all(found["met"] for found in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
