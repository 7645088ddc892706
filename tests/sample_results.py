"""Results for the tests of report and bundle: full, missed, bare and hostile ones."""

from __future__ import annotations

import random

from featherweight.outcome import (
    Attack,
    Budget,
    Calibration,
    Chosen,
    ClassChange,
    Confidence,
    CorruptionRow,
    Dropped,
    Effort,
    Environment,
    Flips,
    Importance,
    Importances,
    Latency,
    LayerRow,
    Measurement,
    Privacy,
    Relaxation,
    Result,
    Robustness,
    RungRow,
    Spread,
    StepRow,
    Trial,
    Violation,
    Way,
    WorstClass,
)

SPREAD = Spread(
    low=-1.5, high=1.0, seen_low=-2.0, seen_high=1.0, clipped=0.0123, counts=[1, 4, 9, 100, 25, 0, 16, 1]
)
EFFORT = Effort(
    level="standard",
    time_s=300.0,
    seconds=61.5,
    example_s=0.0024,
    ways=[
        Way(name="gptq", recipe={"version": 1, "steps": [{"fold": {}}]}, predicted_s=12.0, trials=2),
        Way(name="nearest", recipe={"version": 1, "steps": []}, predicted_s=3.0),
    ],
    longer="--time 15m or more adds the reconstruction of blocks",
)
ENVIRONMENT = Environment(
    cpu="Example CPU @ 2.80GHz",
    isa="vnni",
    flags=["avx2", "avx512bw", "avx512_vnni"],
    cores=2,
    threads=1,
    memory_bytes=8_000_000_000,
    platform="Linux-6.1-x86_64",
    python="3.11.9",
    versions={"featherweight": "0.1.0", "onnxruntime": "1.31.1"},
)
RECIPE = {
    "version": 1,
    "steps": [
        {"fold": {}},
        {"quantize": {"weights": "int8", "range": "mse", "where": [{"exclude": ["head"]}]}},
    ],
}
BASELINE = Measurement(
    quality=0.9325,
    quality_drop=0.0,
    bytes=1_093_412,
    packed_bytes=1_010_000,
    latency_s=Latency(median=5.21e-3, q1=5.18e-3, q3=5.29e-3),
    latency_ratio=1.0,
    throughput=210.0,
    peak_rss_bytes=61_000_000,
    memory_bytes=12_400_000,
    macs=40_813_000,
    params=272_474,
)


def chosen(**changes: object) -> Chosen:
    """What was handed back."""
    figures: dict[str, object] = {
        "quality": 0.93,
        "quality_drop": 0.0025,
        "quality_drop_ci95": (-0.001, 0.006),
        "agreement": 0.984,
        "sqnr_db": 27.31,
        "flips": Flips(lost=31, won=26),
        "worst_class": WorstClass(label="Shirt", drop=0.012),
        "bytes": 297_000,
        "packed_bytes": 251_000,
        "latency_s": Latency(median=2.13e-3, q1=2.10e-3, q3=2.19e-3),
        "latency_ratio": 0.409,
        "latency_ratio_ci95": (0.402, 0.416),
        "resolved": True,
        "throughput": 512.0,
        "peak_rss_bytes": 55_000_000,
        "memory_bytes": 6_900_000,
        "macs": 40_813_000,
        "params": 272_474,
        "artifact": "model.onnx",
        "runtime": "onnxruntime",
        "sha256": "ab" * 32,
    }
    return Chosen.model_validate(figures | changes)


def steps() -> list[StepRow]:
    """Of a recipe of three steps: measured, simulated, and the artifact."""
    folded = Measurement(quality_drop=0.0, bytes=1_080_000, latency_ratio=0.9)
    quantized = Measurement(quality_drop=0.004, bytes=301_000)
    last = Measurement.model_validate(chosen().model_dump(include=set(Measurement.model_fields)))
    time = "no time was left to measure it"
    return [
        StepRow(name="fold", state="measured", measurement=folded, examples=2000),
        StepRow(
            name="quantize",
            parameters={"weights": "int8", "range": "mse"},
            state="simulated",
            measurement=quantized,
            examples=256,
            reason=time,
        ),
        StepRow(name="rounding", state="measured", measurement=last, examples=2000),
    ]


DROPPED = [
    Dropped(way="gptq", reason="quality drop above the limit", trials=[1, 4], example="0.7 % (limit 0.5 %)"),
    Dropped(way="nearest", reason="failed: quantize: no examples", trials=[5]),
]
IMPORTANCES = Importances(
    evaluator="PED-ANOVA",
    trials=24,
    best=0.25,
    rows=[
        Importance(parameter="way", quality_drop=0.2, bytes=0.9, latency_ratio=0.5),
        Importance(parameter="quantize: range", quality_drop=0.8, bytes=0.001),
    ],
)
LADDER = [
    RungRow(name="cost", candidates=20, dropped=8, seconds=0.5, compared=11, bytes_error=0.02),
    RungRow(name="measured", candidates=12, seconds=55.0),
]

ROBUSTNESS = Robustness(
    examples=500,
    pictures="28 x 28, grey, 0..1 (all values are within it)",
    constants="CIFAR-10-C",
    clean_before=0.93,
    clean_after=0.928,
    mean_before=0.66,
    mean_after=0.65,
    drop_before=0.27,
    drop_after=0.278,
    extra_drop=0.008,
    extra_drop_ci95=(0.003, 0.0131),
    error_ratio=1.06,
    rows=[
        CorruptionRow(
            kind=kind, severity=severity, before=0.9 - 0.08 * severity, after=0.89 - 0.081 * severity
        )
        for kind in ("noise", "blur", "contrast", "brightness", "occlusion", "jpeg")
        for severity in (1, 2, 3, 4, 5)
    ],
)
CALIBRATION = Calibration(
    examples=2000,
    outputs="scores",
    before=Confidence(ece=0.0358, adaptive_ece=0.0351, confidence=0.905, accuracy=0.9325, loss=0.2035),
    after=Confidence(ece=0.0412, adaptive_ece=0.0409, confidence=0.901, accuracy=0.93, loss=0.2101),
)
PRIVACY = Privacy(
    members=2000,
    others=2000,
    before=Attack(auc=0.531, auc_ci95=(0.513, 0.549), member_loss=0.15, other_loss=0.2035),
    after=Attack(auc=0.527, auc_ci95=(0.509, 0.545), member_loss=0.16, other_loss=0.2101),
    change=-0.004,
    change_ci95=(-0.009, 0.001),
)


def trials() -> list[Trial]:
    """Twelve trials of every state; number 3 is the chosen one."""
    draw = random.Random(7)
    rows = []
    for number in range(12):
        state = "failed" if number == 5 else "rejected" if number in (6, 9) else "measured"
        share, ratio = 0.27 + 0.5 * draw.random(), 0.40 + 0.6 * draw.random()
        drop = 0.002 + 0.012 * draw.random() ** 2
        if number == 3:
            share, ratio, drop = 297_000 / 1_093_412, 0.409, 0.0025
        seen = Measurement(
            quality_drop=drop,
            bytes=round(share * 1_093_412),
            latency_s=Latency(median=ratio * 5.21e-3, q1=ratio * 5.1e-3, q3=ratio * 5.3e-3),
            latency_ratio=ratio,
            memory_bytes=round(1e7 * share + 4e6),
        )
        rows.append(
            Trial(
                number=number,
                recipe=RECIPE,
                state=state,
                measurement=None
                if state == "failed"
                else Measurement(quality_drop=0.02, bytes=400_000)
                if number == 9
                else seen,
                within_budget=None if state == "failed" else state == "measured" and drop <= 0.005,
                chosen=number == 3,
                reason={
                    5: "quantize: no examples",
                    6: "larger than the original",
                    9: "drops 2.00 points",
                }.get(number, ""),
                seconds=12.5 + number,
                sha256=None if number in (5, 9) else f"{number:064d}",
            )
        )
    return rows


def full_result(**changes: object) -> Result:
    """A met budget with every field filled."""
    layers = [
        LayerRow(
            name=f"layer{block}.{index}.conv1",
            type="Conv2d",
            macs=2_359_296,
            params=2304 * 4**block,
            bytes_before=9216 * 4**block,
            bytes_after=2304 * 4**block + 64,
            stored="int8 per channel",
            sqnr_db=None if (block, index) == (0, 0) else 41.0 - 6 * index - 5 * block,
            in_place_db=None if (block, index) == (0, 0) else 38.0 - 6 * index - 5 * block,
            weight=SPREAD,
            activation=None if (block, index) == (0, 0) else SPREAD.model_copy(update={"clipped": 0.0}),
        )
        for block in range(3)
        for index in range(3)
    ]
    names = (
        "T-shirt",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    classes = [
        ClassChange(label=name, examples=200, before=0.93, after=0.93 + (index - 4) / 500)
        for index, name in enumerate(names)
    ]
    values: dict[str, object] = {
        "met": True,
        "met_confident": False,
        "budget": Budget(quality_drop=0.005, bytes=350_000, latency_s=3e-3),
        "metric": "accuracy",
        "baseline": BASELINE,
        "chosen": chosen(),
        "recipe": RECIPE,
        "trials": trials(),
        "effort": EFFORT,
        "steps": steps(),
        "dropped": DROPPED,
        "importances": IMPORTANCES,
        "ladder": LADDER,
        "robustness": ROBUSTNESS,
        "calibration": CALIBRATION,
        "privacy": PRIVACY,
        "examples_needed": 7840,
        "environment": ENVIRONMENT,
        "warnings": ["calibration falls back to 512 training examples"],
        "layers": layers,
        "classes": classes,
        "examples": {
            "scored": 4000,
            "selecting": 2000,
            "reporting": 2000,
            "halved": True,
            "calibration": "training",
            "origin": {
                "kind": "folder",
                "folder": "fashion",
                "image_size": [32, 32],
                "mean": [0.286],
                "std": [0.353],
                "channels": "L",
                "resize": "shorter side, bilinear",
                "crop": "centre",
                "layout": "NCHW",
            },
        },
        "run": "f00dfeed" * 8,
    }
    return Result.model_validate(values | changes)


def missed_result() -> Result:
    """A budget that latency breaks, with a relaxation."""
    return full_result(
        met=False,
        budget=Budget(quality_drop=0.005, latency_s=1.5e-3),
        chosen=chosen(resolved=False),
        blocking=[Violation(axis="latency_s", limit=1.5e-3, value=2.13e-3, reason="above the limit")],
        relaxation=Relaxation(axis="latency_s", limit=2.2e-3, trial=3, text="--max-latency 2.2ms would do"),
        trials=[trial.model_copy(update={"within_budget": False}) for trial in trials()],
    )


def bare_result() -> Result:
    """Nothing but what a result must hold."""
    return Result(
        met=True,
        met_confident=True,
        budget=Budget(),
        metric="sqnr",
        baseline=Measurement(),
        chosen=Chosen(artifact="model.onnx", runtime="onnxruntime", sha256="0" * 64),
        recipe={"version": 1, "steps": []},
        trials=[],
        environment=ENVIRONMENT,
    )


HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(2)>"


def hostile_result() -> Result:
    """The same text, which tries to break out, wherever a user's text can stand."""
    seen = trials()[3].measurement
    return full_result(
        metric=HOSTILE,
        warnings=[HOSTILE],
        chosen=chosen(artifact=HOSTILE, worst_class=WorstClass(label=HOSTILE, drop=0.01)),
        recipe={"version": 1, "steps": [{"quantize": {"where": HOSTILE}}]},
        trials=[
            Trial(
                number=0,
                recipe={"steps": [{"quantize": {"where": HOSTILE}}]},
                state="measured",
                measurement=seen,
                chosen=True,
                reason=HOSTILE,
            )
        ],
        layers=[
            LayerRow(
                name=HOSTILE, type="Conv2d", macs=1, params=1, bytes_before=4, bytes_after=1, stored=HOSTILE
            )
        ],
        classes=[ClassChange(label=HOSTILE, examples=1, before=1.0, after=0.0)],
        steps=[
            StepRow(
                name=HOSTILE,
                parameters={HOSTILE: HOSTILE},
                state="simulated",
                measurement=seen,
                reason=HOSTILE,
            )
        ],
        dropped=[Dropped(way=HOSTILE, reason=HOSTILE, trials=[0], example=HOSTILE)],
        importances=Importances(
            evaluator=HOSTILE, trials=1, best=0.5, rows=[Importance(parameter=HOSTILE, bytes=1.0)]
        ),
        examples={HOSTILE: HOSTILE},
        robustness=ROBUSTNESS.model_copy(update={"pictures": HOSTILE, "constants": HOSTILE}),
        calibration=None,
        omitted={"calibration": HOSTILE},
    )
