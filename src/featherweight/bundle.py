"""What travels beside an artifact: the model card and programs that load it, all pure text.

They leave the user's machine, so neither holds a path, an example or a host's name:
whatever looks like a path is cut down to its last part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featherweight import figures
from featherweight.runtime import Signature
from featherweight.summary import before_after, blockers, doubts, gains, verdict

if TYPE_CHECKING:
    from featherweight.model import Entry
    from featherweight.outcome import Result
    from featherweight.runtime import Artifact, Runtime, Target

_ABSOLUTE = re.compile(r"~?[\\/]|\.{1,2}[\\/]|[A-Za-z]:[\\/]")
# The folders of a path inside a sentence, where a blank ends it.
_FOLDERS = re.compile(
    r"(?<![\w:/\\.-])(?:[A-Za-z]:[\\/]|~?[\\/]+|\.{1,2}[\\/])(?:[^\\/\s'\",;:]+[\\/])*(?=[^\\/\s])"
)


def model_card(result: Result, *, name: str = "model") -> str:
    """Markdown with YAML front matter, as Hugging Face reads it.

    Args:
        result: What was handed back.
        name: Title of the card.

    Returns:
        The text of ``model_card.md``.
    """
    result = _shareable(result)
    parts = [
        _front_matter(result),
        f"# {_inline(name)}",
        " ".join([_what(result), *(_inline(text) for text in gains(result))]),
        "## How it was made",
        _made(result),
        _fenced(_yaml(result.recipe), "yaml"),
        "## Measured figures",
        _figures(result),
        *_classes(result),
        "## Inputs",
        _inputs(result.examples.get("origin")),
        "## How to load it",
        f"`load.py` beside this card opens `{_code(result.chosen.artifact)}` and runs it once; "
        "`report.html` and `result.json` hold every figure.",
        "## Limitations",
        "\n".join(f"- {_inline(sentence)}" for sentence in _limitations(result)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def loaders(
    runtime: Runtime,
    artifact: Artifact,
    target: Target,
    entry: Entry,
    origin: Any = None,
    *,
    name: str = "forward",
) -> dict[str, str]:
    """Programs that open the artifact as it was measured and run it once on zeros: file name -> text.

    Args:
        runtime: Whose artifact it is; it writes them.
        artifact: The files that lie beside them.
        target: Threads and options that it was measured with.
        entry: Names, shapes and types of its inputs.
        origin: What was done to the examples before the network saw them.
        name: Of the entry.
    """
    prepare = _preparation(origin)
    comments = [" ".join(_public(text).split()) for text in (_shapes(entry), prepare) if text]
    texts = runtime.loaders(artifact, target, signature(entry, name))
    return {file: _commented(file, text, comments) for file, text in texts.items()}


def _commented(name: str, text: str, comments: Sequence[str]) -> str:
    """A program with what its inputs mean in front, behind its docstring."""
    if not name.endswith(".py"):
        return "".join(f"// {line}\n" for line in comments) + text
    lines = text.splitlines(keepends=True)
    at = 1 if lines and lines[0].startswith('"""') and lines[0].rstrip().endswith('"""') else 0
    return "".join([*lines[:at], *(f"# {line}\n" for line in comments), *lines[at:]])


def signature(entry: Entry, name: str = "forward") -> Signature:
    """What a loader has to know of an entry."""
    inputs = []
    for given, example in zip(entry.input_names, entry.example_inputs, strict=True):
        free = entry.dynamic_axes.get(given, {})
        shape = tuple(1 if axis == 0 and axis in free else size for axis, size in enumerate(example.shape))
        inputs.append((given, str(example.dtype).removeprefix("torch."), shape))
    return Signature(tuple(inputs), tuple(entry.output_names), name)


def _shapes(entry: Entry) -> str:
    """All inputs in words: 'x: float32 (batch, 3, 32, 32)'."""
    words = []
    for name, example in zip(entry.input_names, entry.example_inputs, strict=True):
        free = entry.dynamic_axes.get(name, {})
        named = ", ".join(free.get(axis, str(size)) for axis, size in enumerate(example.shape))
        words.append(f"{name}: {str(example.dtype).removeprefix('torch.')} ({named})")
    return "; ".join(words)


def _preparation(origin: Any) -> str:
    """What was done to an image before the network saw it, if that is known."""
    if not isinstance(origin, Mapping):
        return ""
    steps = []
    if origin.get("image_size") is not None:
        sides = " x ".join(str(side) for side in origin["image_size"])
        how = ", ".join(f"{key} {origin[key]}" for key in ("resize", "crop") if origin.get(key))
        steps.append(f"{origin.get('channels', '')} images of {sides}{f' ({how})' if how else ''}".strip())
    if origin.get("mean") is not None and origin.get("std") is not None:
        mean, std = (figures.plain(origin[key]) for key in ("mean", "std"))
        steps.append(f"value = (byte / 255 - mean) / std with mean {mean} and std {std}")
    if origin.get("layout"):
        steps.append(f"layout {origin['layout']}")
    return "; ".join(steps)


def _front_matter(result: Result) -> str:
    methods = [str(method) for step in result.recipe.get("steps") or [] for method in step]
    tags = dict.fromkeys(["featherweight", "model-compression", result.chosen.runtime, *methods])
    library = "onnx" if result.chosen.artifact.endswith(".onnx") else result.chosen.runtime
    fields = {"library_name": library, "tags": list(tags), "metrics": [result.metric]}
    return f"---\n{_yaml(fields)}---"


def _figures(result: Result) -> str:
    env = result.environment
    rows = [
        f"| {_inline(row.label)} | {_inline(row.before)} | {_inline(row.after)} | {_inline(row.change)} |"
        for row in before_after(result)
        if row.seen
    ]
    versions = ", ".join(f"{name} {version}" for name, version in env.versions.items())
    place = f"{env.cpu} ({env.isa}), {env.threads} of {env.cores} cores, {env.platform}, Python {env.python}"
    return "\n".join(
        [
            "| Figure | Original | This artifact | Change |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            "Measured on this artifact and on the original, through one runtime; in brackets 95% intervals.",
            f"Where: {_inline(place)}, {_inline(versions)}.",
            f"sha256 of the artifact: `{result.chosen.sha256}`.",
        ]
    )


def _classes(result: Result) -> list[str]:
    if not result.classes:
        return []
    rows = [
        f"| {_inline(one.label)} | {one.examples} | {figures.percent(one.before)} "
        f"| {figures.percent(one.after)} | {100 * (one.after - one.before):+.2f} |"
        for one in sorted(result.classes, key=lambda one: one.after - one.before)
    ]
    head = ["| Class | Examples | Original | This artifact | Change, points |", "|---|---:|---:|---:|---:|"]
    return ["## What it did to each class", "\n".join([*head, *rows])]


def _inputs(origin: Any) -> str:
    prepared = _preparation(origin)
    if prepared:
        return f"As in the measurement: {_inline(prepared)}. `load.py` names shapes and types."
    return "Prepared as for the original network. `load.py` names shapes and types."


def _limitations(result: Result) -> list[str]:
    scored = result.examples.get("reporting") or result.examples.get("scored")
    source = result.examples.get("calibration")
    return [
        verdict(result),
        *blockers(result),
        *doubts(result),
        *([f"Quality was measured on {scored:,} examples."] if isinstance(scored, int) else []),
        *(["It was calibrated on random inputs."] if source == "random" else []),
        "Latency and memory hold for the processor, threads and versions above; elsewhere, measure again.",
        _inherited(result),
    ]


def _what(result: Result) -> str:
    if result.student:
        return "A neural network that featherweight fitted to stand where a larger one stood."
    return "A neural network that featherweight compressed."


def _made(result: Result) -> str:
    """What the steps started from, and whom they learned from."""
    changed = "the original network"
    if result.student:
        changed = f"another network, {_inline(result.student)}, with which the original is compared"
    taught = f" `teacher` is the network {_inline(result.teacher)}." if result.teacher else ""
    return f"These steps changed {changed}, in this order; they make the same artifact again.{taught}"


def _inherited(result: Result) -> str:
    if result.student:
        return "What its teacher does badly, this one may do too; the licences of both hold."
    return "What the original network does badly, this one does too; its licence and intended use carry over."


def _yaml(value: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text


def _shareable(result: Result) -> Result:
    """The result with no path in any of its texts, and without the trials, which a card does not name."""
    return type(result).model_validate(_public(result.model_dump(by_alias=True)) | {"trials": []})


def _public(value: Any) -> Any:
    """The value with every path in it cut down to its last part."""
    if isinstance(value, str):
        if _ABSOLUTE.match(value):
            return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {_public(key): _public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    return value


def _inline(text: str) -> str:
    """Text that stays one line and one table cell, with no markup of its own."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat).replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
