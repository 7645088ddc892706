"""Trials that are made and simulated, not timed, by one Ray worker and by several: trials per minute.

    python benchmarks/workers.py [--workers 2] [--trials 12] [--json workers.json]

ResNet-20 for Fashion-MNIST; each trial is folded, equalized, quantized and rounded by GPTQ with a number of
calibration examples of its own, so that nothing but the folding is shared, and simulated on 500 examples.
Every worker has one thread. They load the model and torch before the clock starts. The bar: two workers make
at least 1.5 times as many trials as one. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

BAR = 1.5
_SCORED = 500
_EXAMPLE = Path(__file__).parents[1] / "examples" / "fashion_mnist"


def throughput(workers: int, trials: int) -> float:
    """Trials per minute of so many workers, in a store of their own."""
    from featherweight.engine.hands import Hands
    from featherweight.engine.sources import Given, load_sources
    from featherweight.engine.start import start_runs
    from featherweight.engine.timing import Limits
    from featherweight.engine.workers import hired
    from featherweight.engine.workers_bench import site
    from featherweight.engine.workers_cluster import Place
    from featherweight.method import Silent
    from featherweight.recipe import Recipe, Step
    from featherweight.runtime import Target

    given: dict[str, Any] = {
        "model": f"{_EXAMPLE / 'nets.py'}:resnet20",
        "weights": str(_EXAMPLE / "resnet20.safetensors"),
        "data": str(_EXAMPLE / "data.npz"),
        **dict.fromkeys(("metric", "image_size", "mean", "std")),
        **{"inputs": (), "seed": 0, "allow_pickle": False},
    }
    training: dict[str, Any] = {"devices": 1, "precision": "32"}

    def recipe(samples: int) -> Recipe:
        few = {"samples": samples}
        names = ("fold", "equalize", "quantize", "rounding")
        return Recipe(tuple(Step(name, {} if name == "fold" else few) for name in names))

    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEATHERWEIGHT_CACHE"] = folder
        (run,) = start_runs(
            load_sources(**given), [Target("onnxruntime")], seed=0, progress=Silent(), allow_pickle=False,
            **training,
        )  # fmt: skip
        run.lower(run.original)

        def loaded() -> dict[str, Any]:
            return site(given, Given(), Given(), [run], Limits(), training)

        with hired(Place(workers), loaded, "local", run.progress) as crew:
            assert crew is not None
            run.hands = Hands(crew)
            waiting = list(range(100, 100 + trials))
            warm, began = threading.Barrier(workers), [0.0]

            def work() -> None:
                number = 99 - len(started)
                started.append(number)
                one(number)
                with crew.aside():
                    warm.wait()
                began[0] = began[0] or time.perf_counter()
                while waiting:
                    one(waiting.pop())

            def one(samples: int) -> None:
                model = run.apply(recipe(samples))
                assert run.hands is not None
                run.hands.simulated_drop(run, model.key, range(_SCORED))

            started: list[int] = []
            crew.together(work)
            return 60 * trials / (time.perf_counter() - began[0])


def main() -> int:
    """Compare, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rates = {count: throughput(count, options.trials) for count in (1, options.workers)}
    for count, rate in rates.items():
        print(f"{count} workers: {rate:.1f} trials per minute")
    ratio = rates[options.workers] / rates[1]
    kept = ratio >= BAR
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"ratio {ratio:.2f}, bar {BAR}: {'kept' if kept else 'not kept'} (load of the machine: {load})")
    if options.json:
        told = {"trials_per_minute": rates, "ratio": ratio, "bar": BAR, "load": os.getloadavg()}
        options.json.write_text(json.dumps(told, indent=2))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
