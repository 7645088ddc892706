"""Recipes: the YAML round trip, holes, where, order, and what every bad recipe is answered."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from featherweight import plugins
from featherweight.errors import PluginError, RecipeError, nearest
from featherweight.method import Context, Method
from featherweight.model import Model
from featherweight.recipe import Choice, Range, Recipe, Step, Where


class _Fake(Method, frozen=True, extra="forbid"):
    kind: ClassVar[Literal["structure", "format", "values"]] = "values"

    def apply(self, model: Model, context: Context) -> Model:
        return model


class Cut(_Fake, frozen=True, extra="forbid"):
    kind: ClassVar[Literal["structure", "format", "values"]] = "structure"
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    importance: Literal["taylor", "norm"] = "norm"


class Round(_Fake, frozen=True, extra="forbid"):
    kind: ClassVar[Literal["structure", "format", "values"]] = "format"
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    per_layer: dict[str, Annotated[int, Field(ge=2, le=8)]] = Field(default_factory=dict)
    range: Literal["minmax", "mse"] = "mse"
    low: int = 0
    high: int = 10

    @model_validator(mode="after")
    def _ordered(self) -> Round:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Tune(_Fake, frozen=True, extra="forbid"):
    epochs: Annotated[int, Field(ge=1)]
    lr: float = 0.001
    anything: Any = None


FIND_METHOD = plugins.find_method
METHODS: dict[str, type[Method]] = {"cut": Cut, "round": Round, "tune": Tune}


@pytest.fixture(autouse=True)
def fake_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find_method", _find)


def _find(name: str) -> type[Method]:
    if name not in METHODS:
        raise PluginError(f"no method is called '{name}'", fix=nearest(name, METHODS))
    return METHODS[name]


def steps(text: str) -> str:
    return "version: 1\nsteps:\n" + text


# ---- reading and writing


def test_reads_steps_parameters_and_lines() -> None:
    recipe = Recipe.parse(
        steps("  - cut: {ratio: 0.25}\n\n  - round:\n      bits: 4\n  - tune: {epochs: 3}\n")
    )
    assert [(step.method, step.parameters, step.line) for step in recipe.steps] == [
        ("cut", {"ratio": 0.25}, 3),
        ("round", {"bits": 4}, 5),
        ("tune", {"epochs": 3}, 7),
    ]
    assert [type(method) for method in recipe.methods()] == [Cut, Round, Tune]
    assert recipe.methods()[1].bits == 4  # type: ignore[attr-defined]


def test_a_step_without_parameters_may_be_empty_and_steps_may_be_none() -> None:
    assert Recipe.parse(steps("  - cut:\n")) == Recipe.parse(steps("  - cut: {}\n"))
    assert Recipe.parse("version: 1\nsteps: []\n").methods() == []


def test_to_dict_has_only_what_was_given_and_is_json() -> None:
    data = Recipe.parse(steps("  - cut: {ratio: {range: [0.1, 0.9]}}\n  - round: {}\n")).to_dict()
    assert data == {"version": 1, "steps": [{"cut": {"ratio": {"range": [0.1, 0.9]}}}, {"round": {}}]}
    assert Recipe.from_dict(json.loads(json.dumps(data))).to_dict() == data


def test_yaml_is_short() -> None:
    recipe = Recipe((Step("cut"), Step("round", {"bits": 4, "where": {"exclude": ["head"]}})))
    text = "version: 1\nsteps:\n- cut: {}\n- round:\n    bits: 4\n    where:\n      exclude: [head]\n"
    assert recipe.to_yaml() == text


def test_numbers_and_words_are_read_as_in_yaml_1_2() -> None:
    text = steps(
        "  - tune: {epochs: 0x2, lr: 1e-3, anything: [no, on, 2020-01-01, 1:30, ~, True, .5, 007]}\n"
    )
    parameters = Recipe.parse(text).steps[0].parameters
    assert parameters["lr"] == 0.001 and parameters["epochs"] == 2
    assert parameters["anything"] == ["no", "on", "2020-01-01", "1:30", None, True, 0.5, 7]


def test_keys_are_text_even_when_they_look_like_numbers() -> None:
    recipe = Recipe.parse(steps("  - round: {per_layer: {0: 4, layer1.0: 8}}\n"))
    assert recipe.steps[0].parameters["per_layer"] == {"0": 4, "layer1.0": 8}
    assert Recipe.parse(recipe.to_yaml()) == recipe


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(
        [
            "no",
            "1e-3",
            "0x1f",
            "null",
            "~",
            "2020-01-01",
            "<<",
            "=",
            "- a",
            "a: b",
            "#",
            "010",
            "",
            "\x85",
            "\u2028 a",
            "a\r\nb",
        ]
    )
)
names = st.text(max_size=8).filter(lambda name: name not in ("choice", "range"))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
choices = st.lists(values, min_size=1, max_size=4, unique_by=lambda v: json.dumps(v, sort_keys=True)).map(
    lambda options: Choice(tuple(options))
)
ranges = st.tuples(
    st.floats(1e-6, 1e6) | st.integers(1, 1000), st.floats(1e-3, 1e6) | st.integers(1, 9), st.booleans()
).map(lambda t: Range(t[0], t[0] + t[1], log=t[2]))
with_holes = st.recursive(
    values | choices | ranges,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(with_holes, max_size=3))
def test_round_trip(anything: list[Any]) -> None:
    recipe = Recipe(tuple(Step("tune", {"epochs": 1, "anything": value}) for value in anything))
    again = Recipe.parse(recipe.to_yaml())
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert again.to_yaml() == recipe.to_yaml()
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.text("{}[]:-&*!|>'\"#,?\n a1", max_size=60))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    for whole in (text, steps(f"  - tune: {text}")):
        try:
            Recipe.parse(whole)
        except RecipeError as error:
            assert error.what


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\r\nsteps:\r\n  - cut: {}\r\n")
    assert Recipe.load(path).steps[0].method == "cut"
    path.write_text(steps("  - cat: {}\n"))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert caught.value.where == f"{path}, line 3"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(RecipeError, match=what):
            Recipe.load(path)
    (tmp_path / "binary").write_bytes(b"\x7fELF\xff\xfe")
    with pytest.raises(RecipeError, match="is not text"):
        Recipe.load(tmp_path / "binary")
    (tmp_path / "large").write_bytes(b"#" * 1_000_001)
    with pytest.raises(RecipeError, match="larger than 1 MB"):
        Recipe.load(tmp_path / "large")


# ---- holes


def test_holes_have_addresses_and_are_filled() -> None:
    recipe = Recipe.parse(
        steps(
            "  - cut: {ratio: {range: [0.1, 0.9]}}\n  - tune: {epochs: 1}\n"
            "  - round: {bits: {choice: [4, 8]}, per_layer: {a/b.0: {choice: [2, 3]}}}\n"
        )
    )
    assert recipe.holes() == {
        0: {"ratio": Range(0.1, 0.9)},
        2: {"bits": Choice((4, 8)), "per_layer/a~1b.0": Choice((2, 3))},
    }
    assert recipe.has_holes
    with pytest.raises(RecipeError, match="the hole 'ratio' of cut is not filled"):
        recipe.methods()
    filled = recipe.filled({0: {"ratio": 0.3}, 2: {"bits": 8, "per_layer/a~1b.0": 2}})
    assert not filled.has_holes
    assert filled.methods()[2].per_layer == {"a/b.0": 2}  # type: ignore[attr-defined]
    assert recipe.has_holes  # the recipe itself is unchanged
    assert recipe.filled({0: {"ratio": 0.3}}).holes() == {2: recipe.holes()[2]}


def test_a_hole_in_a_list_is_filled() -> None:
    step = Step("tune", {"anything": [1, {"a": {"choice": ["x", "y"]}}]})
    assert step.filled({"anything/1/a": "y"}).parameters == {"anything": [1, {"a": "y"}]}


def test_filling_checks_the_value_and_adds_new_parameters_only() -> None:
    step = Step("round", {"bits": Choice((4, 8)), "low": 1})
    assert step.filled({"high": 3}).parameters == {"bits": Choice((4, 8)), "low": 1, "high": 3}
    for values_, what in (
        ({"bits": 5}, "5 does not fit the hole 'bits'"),
        ({"bits": True}, "true does not fit"),
        ({"low": 2}, "'low' is no hole of round"),
    ):
        with pytest.raises(RecipeError, match=re.escape(what)):
            step.filled(values_)


def test_what_a_range_holds() -> None:
    whole = Range(1, 9, step=4)
    assert (
        whole.whole and whole.size == 3 and whole.first == 5 and [whole.at(i) for i in range(3)] == [1, 5, 9]
    )
    assert whole.admits(3) and not whole.admits(3.0) and not whole.admits(10)
    tenth = Range(0.1, 0.55, step=0.1)
    assert tenth.size == 5 and [tenth.at(i) for i in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert Range(0.0, 1.0).size is None and Range(0.0, 1.0).first == 0.5
    assert Range(1e-4, 1e-2, log=True).first == pytest.approx(1e-3)
    assert Range(1, 100, log=True).first == 10
    assert Range(0.3, 0.9, default=0.8).first == 0.8
    assert not Range(0.0, 1.0).admits(True) and Range(0.0, 1.0).admits(1)


def test_whole_numbers_for_a_float_parameter_mean_the_numbers_between() -> None:
    recipe = Recipe.parse(steps("  - tune: {lr: {range: [0, 1]}, epochs: {range: [1, 3]}}\n"))
    lr, epochs = recipe.holes()[0]["lr"], recipe.holes()[0]["epochs"]
    assert lr.size is None and epochs.size == 3


def test_a_parameter_may_be_called_range() -> None:
    method = Recipe.parse(steps("  - round: {range: minmax}\n")).methods()[0]
    assert method.range == "minmax"  # type: ignore[attr-defined]


def test_rules_across_parameters_wait_until_holes_are_filled() -> None:
    recipe = Recipe.parse(steps("  - round: {low: {range: [0, 20]}, high: 10}\n"))
    assert recipe.filled({0: {"low": 5}}).methods()
    with pytest.raises(RecipeError, match="low is above high"):
        recipe.filled({0: {"low": 15}}).methods()


def test_where_may_be_a_choice() -> None:
    recipe = Recipe.parse(steps("  - round: {where: {choice: [{}, {exclude: [head]}]}}\n"))
    filled = recipe.filled({0: {"where": {"exclude": ["head"]}}})
    assert not filled.methods()[0].where.selects("head", "Linear")


# ---- where


@pytest.mark.parametrize(
    ("where", "yes", "no"),
    [
        ({}, ["a", "head", ""], []),
        ({"exclude": ["head"]}, ["a", "a.head", "header"], ["head", "head.0"]),
        ({"exclude": "head"}, ["a"], ["head"]),
        ({"include": ["layer1.*"]}, ["layer1.0", "layer1.0.conv"], ["layer1", "head", "layer10.a"]),
        ({"include": ["layer?"]}, ["layer1", "layer2.0.conv"], ["head"]),
        ({"include": ["layer1"], "exclude": ["*.bn"]}, ["layer1.conv"], ["layer1.bn", "head"]),
        ([{"exclude": ["layer1"]}, {"include": ["*.conv"]}], ["layer1.conv", "head"], ["layer1.bn"]),
        ([{"include": ["*"]}, {"exclude": ["a"]}, {"include": ["a.b"]}], ["a.b", "c"], ["a", "a.c"]),
    ],
)
def test_where(where: Any, yes: list[str], no: list[str]) -> None:
    rules = Where.model_validate(where)
    assert [path for path in yes if not rules.selects(path, "Conv2d")] == []
    assert [path for path in no if rules.selects(path, "Conv2d")] == []


def test_where_knows_types() -> None:
    where = Where.model_validate({"exclude": ["Linear"]})
    assert where.selects("a", "Conv2d") and not where.selects("a", "Linear")
    assert where.selects("Linear", "Conv2d") is False  # a layer may carry a type's name


def test_where_serialises_to_its_short_form() -> None:
    for form in ({}, {"exclude": ["head"]}, [{"exclude": ["a"]}, {"include": ["b"]}]):
        where = Where.model_validate(form)
        assert where.model_dump() == form and where.model_dump(mode="json") == form
        assert Where.model_validate(where.model_dump()) == where
        assert Round(where=where).model_dump()["where"] == form
    assert Where.model_validate([{"exclude": "a"}]).model_dump() == {"exclude": ["a"]}
    assert Where.model_validate(Where()) == Where()


def test_where_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Where().rules = ()  # type: ignore[misc]


def test_where_names_patterns_that_match_nothing() -> None:
    where = Where.model_validate([{"exclude": ["haed", "Linear"]}, {"include": ["layer1.*"]}])
    assert where.unmatched({"head": "Linear", "layer1.0": "Conv2d"}) == ("haed",)


patterns = st.sampled_from(["a", "b", "a.*", "*.c", "*", "Conv", "a.b"])
rule_forms = st.fixed_dictionaries(
    {}, optional={"include": st.lists(patterns, max_size=2), "exclude": st.lists(patterns, max_size=2)}
).filter(lambda rule: any(rule.values()))


@settings(deadline=None)
@given(st.lists(rule_forms, max_size=3), st.sampled_from(["a", "b", "a.b", "a.c", "a.b.c", ""]))
def test_the_last_rule_that_matches_wins(rules: list[dict[str, list[str]]], path: str) -> None:
    where = Where.model_validate(rules)
    assert Where.model_validate(where.model_dump(mode="json")).selects(path, "Conv") == where.selects(
        path, "Conv"
    )
    for last in ("include", "exclude"):
        assert Where.model_validate([*rules, {last: ["*"]}]).selects(path, "Conv") == (last == "include")


# ---- order


def test_values_steps_stand_anywhere() -> None:
    tune = "  - tune: {epochs: 1}\n"
    Recipe.parse(steps(f"{tune}  - cut: {{}}\n{tune}  - round: {{}}\n{tune}"))
    Recipe.parse(steps("  - cut: {}\n  - cut: {}\n  - round: {}\n  - round: {}\n"))


def test_order_of_a_recipe_made_in_code() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe((Step("round"), Step("cut"))).methods()
    assert caught.value.where == "recipe, step 2"


# ---- bad recipes: what, line, fix

BAD = {
    "not YAML": ("version: 1\nsteps: [\n", "not YAML: expected the node content", 3, "check indentation"),
    "a tab": ("version: 1\nsteps:\n\t- cut: {}\n", "cannot start any token", 3, "check indentation"),
    "empty": ("", "it is empty", 1, "version: 1"),
    "only a comment": ("# nothing\n", "it is empty", 1, "version: 1"),
    "two documents": ("version: 1\n---\nversion: 1\n", "another document", 2, "check"),
    "a control character": ("version: \x00", "special characters are not allowed", None, "plain text"),
    "a list": ("- cut: {}\n", "a recipe is a mapping, not a list", 1, "version: 1"),
    "a text": ("hello", "a recipe is a mapping, not the value 'hello'", 1, "version: 1"),
    "no version": ("steps: []\n", "has no version", 1, "version: 1"),
    "version 2": ("version: 2\nsteps: []\n", "version 2 is not known", 1, "version: 1"),
    "version true": ("version: true\nsteps: []\n", "version true is not known", 1, "version: 1"),
    "version 1.0": ("version: 1.0\nsteps: []\n", "version 1.0 is not known", 1, "version: 1"),
    "no steps": ("version: 1\n", "the recipe has no steps", 1, "steps:"),
    "a top-level key": ("version: 1\nstpes: []\n", "a recipe has no key 'stpes'", 2, "did you mean 'steps'"),
    "steps a mapping": ("version: 1\nsteps:\n  cut: {}\n", "steps is a list, not a mapping", 2, "'- '"),
    "steps empty": ("version: 1\nsteps:\n", "steps is a list, not empty", 2, "'- '"),
    "a step of text": (steps("  - cut\n"), "not the text 'cut'", 3, "write '- cut: {}'"),
    "a step of two keys": (
        steps("  - cut: {}\n    round: {}\n"),
        "with one key, its method, not 2",
        3,
        "write",
    ),
    "an empty step": (steps("  -\n"), "with one key, its method, not empty", 3, "write"),
    "parameters of text": (steps("  - round: int8\n"), "parameters of round are a mapping", 3, "- round: {"),
    "a method": (steps("  - cut: {}\n  - ruond: {}\n"), "no method is called 'ruond'", 4, "mean 'round'"),
    "a parameter": (
        steps("  - round:\n      low: 1\n      bist: 8\n"),
        "round has no parameter 'bist'",
        5,
        "mean 'bits'",
    ),
    "a parameter beside holes": (
        steps("  - round:\n      low: {choice: [1]}\n      bist: {choice: [8]}\n"),
        "round has no parameter 'bist'",
        5,
        "mean 'bits'",
    ),
    "a missing parameter": (steps("  - tune: {}\n"), "tune needs the parameter 'epochs'", 3, "add epochs"),
    "an option": (
        steps("  - cut:\n      importance: talyor\n"),
        "'importance' of cut should be 'taylor' or 'norm', not 'talyor'",
        4,
        "mean 'taylor'",
    ),
    "a number too small": (
        steps("  - round: {bits: 1}\n"),
        "'bits' of round should be greater than or equal to 2, not 1",
        3,
        "the default is bits: 8",
    ),
    "text for a number": (
        steps("  - round: {bits: many}\n"),
        "'bits' of round should be a valid integer, not 'many'",
        3,
        "the default",
    ),
    "a value inside": (
        steps("  - round:\n      per_layer:\n        a: 4\n        b: 99\n"),
        "'per_layer.b' of round should be less than or equal to 8, not 99",
        6,
        None,
    ),
    "two values together": (steps("  - round: {low: 11}\n"), "low is above high", 3, None),
    "where misspelt": (steps("  - cut: {where: {exlude: [a]}}\n"), "where has no key 'exlude'", 3, "exclude"),
    "where of text": (steps("  - cut: {where: head}\n"), "where is a mapping with include or", 3, "exclude"),
    "where of numbers": (steps("  - cut: {where: {exclude: 3}}\n"), "should be a list, not 3", 3, "exclude"),
    "where with an empty rule": (steps("  - cut: {where: [{}]}\n"), "names no layer", 3, "exclude"),
    "where with an empty pattern": (steps("  - cut: {where: {include: ['']}}\n"), "at least 1", 3, "exclude"),
    "an empty choice": (
        steps("  - round:\n      bits: {choice: []}\n"),
        "a choice needs at least one option",
        4,
        "{choice: [a, b]}",
    ),
    "a choice of text": (steps("  - round: {bits: {choice: 8}}\n"), "list of options, not 8", 3, "{choice:"),
    "a choice twice": (
        steps("  - round: {bits: {choice: [8, 8]}}\n"),
        "the same option twice",
        3,
        "{choice:",
    ),
    "a hole in a hole": (
        steps("  - round: {bits: {choice: [8, {range: [1, 2]}]}}\n"),
        "cannot be a hole itself",
        3,
        "{choice:",
    ),
    "a choice with more": (
        steps("  - round: {bits: {choice: [8], step: 1}}\n"),
        "a choice has no key 'step'",
        3,
        "known: choice",
    ),
    "a range reversed": (
        steps("  - round: {bits: {range: [8, 4]}}\n"),
        "[8, 4] is reversed",
        3,
        "{range: [low",
    ),
    "a range of one": (
        steps("  - round: {bits: {range: [8, 8]}}\n"),
        "holds one value only",
        3,
        "{range: [low",
    ),
    "a range of three": (steps("  - round: {bits: {range: [2, 4, 8]}}\n"), "two numbers", 3, "{range: [low"),
    "a range of words": (
        steps("  - round: {bits: {range: [a, b]}}\n"),
        "of numbers, not 'a'",
        3,
        "{range: [low",
    ),
    "a range with a bad step": (
        steps("  - round: {bits: {range: [2, 8], step: 9}}\n"),
        "the step 9 does not fit",
        3,
        "{range: [low",
    ),
    "a range with a bad default": (
        steps("  - round: {bits: {range: [2, 8], default: 9}}\n"),
        "the default 9 is outside",
        3,
        "{range: [low",
    ),
    "a default between steps": (
        steps("  - round: {bits: {range: [2, 8], step: 2, default: 3}}\n"),
        "meets the default 3",
        3,
        "{range: [low",
    ),
    "a log range from 0": (
        steps("  - tune: {epochs: 1, lr: {range: [0, 1], log: true}}\n"),
        "begins above zero",
        3,
        "{range: [low",
    ),
    "log is a word": (
        steps("  - round: {bits: {range: [2, 8], log: yes}}\n"),
        "true or false",
        3,
        "{range: [low",
    ),
    "a range misspelt": (
        steps("  - round: {bits: {range: [2, 8], lgo: true}}\n"),
        "no key 'lgo'",
        3,
        "'log'",
    ),
    "an option of a choice": (
        steps("  - cut: {importance: {choice: [norm, talyor]}}\n"),
        "'importance' of cut should be 'taylor' or 'norm', not 'talyor'",
        3,
        "mean 'taylor'",
    ),
    "the end of a range": (
        steps("  - cut: {ratio: {range: [0.5, 1.0]}}\n"),
        "'ratio' of cut should be less than 1, not 1.0",
        3,
        "the default is ratio: 0.5",
    ),
    "a fixed value beside a hole": (
        steps("  - cut: {ratio: {range: [0.1, 0.5]}, importance: x}\n"),
        "'importance' of cut should be",
        3,
        "known: norm, taylor",
    ),
    "a hole for parameters": (
        steps("  - cut: {choice: [1, 2]}\n"),
        "a hole stands where the parameters of cut are needed",
        3,
        "put it at one parameter: importance, ratio, where",
    ),
    "a hole for a method": (
        steps("  - choice: [cut, round]\n"),
        "a hole stands where a method's name is needed",
        3,
        "one recipe for each method",
    ),
    "a hole for steps": ("version: 1\nsteps: {choice: [cut]}\n", "steps is a list, not a mapping", 2, "'- '"),
    "a hole for the version": ("version: {choice: [1]}\nsteps: []\n", "is not known", 1, "version: 1"),
    "a bad order": (
        steps("  - round: {}\n  - tune: {epochs: 1}\n  - cut: {}\n"),
        "cut is a structure step after round, a format step",
        5,
        "move cut before round",
    ),
    "a parameter twice": (
        steps("  - round:\n      bits: 8\n      bits: 4\n"),
        "the key 'bits' stands twice, first at line 4",
        5,
        "remove one",
    ),
    "a key twice": ("version: 1\nversion: 1\nsteps: []\n", "'version' stands twice", 2, "remove one"),
    "aliases": ("a: &a [x, x]\nb: [*a, *a]\n", "anchors and aliases", 1, "write the value out"),
    "an alias without an anchor": ("a: *b\n", "anchors and aliases", 1, "write the value out"),
    "a Python object": ("steps: !!python/object/apply:os.system [ls]\n", "the tag '!!python/", 1, "remove"),
    "a set": ("version: 1\nsteps: !!set {a}\n", "the tag '!!set' is not read", 2, "remove"),
    "a tag that lies": (steps("  - round: {bits: !!int eight}\n"), "'eight' is no int", 3, "plain value"),
    "a key that is a list": ("[a, b]: 1\n", "a key is a list or a mapping", 1, "write a name"),
    "deep nesting": ("[" * 5000, "deeper than 32 levels", 1, "write it flat"),
    "many values": (steps("  - cut: {}\n" * 2000), "more than 5000 values", None, "split"),
    "a large text": ("#" * 1_000_001, "larger than 1 MB", None, "own file"),
    "infinity": (steps("  - tune: {epochs: 1, lr: .inf}\n"), "not a finite number", 3, "write"),
    "a huge number": (steps("  - round: {bits: " + "9" * 400 + "}\n"), "more than 64 bits", 3, "write"),
    "a gigantic number": (steps("  - round: {bits: " + "9" * 5000 + "}\n"), "is no int", 3, "plain value"),
    "half a character": (
        steps('  - tune: {epochs: 1, anything: "\\ud800"}\n'),
        "half a character",
        3,
        "write",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes(name: str) -> None:
    text, what, line, fix = BAD[name]
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "my.yaml")
    error = caught.value
    assert what in error.what
    assert "\n" not in error.what
    if line is not None:
        assert re.search(rf"my\.yaml, line {line}\b", error.where or "")
    assert (fix or "") in (error.fix or "")
    assert error.exit_code == 2
    str(error).encode()  # it can be printed


def test_the_order_error_names_both_lines() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(steps("  - round: {}\n  - cut: {}\n"))
    assert caught.value.where == "recipe.yaml, line 4 (round is at line 3)"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"version": 1, "steps": [{1: {}}]}, "1 is no method's name"),
        ({"version": 1, "steps": [{"cut": {"ratio": object()}}]}, "is no number, text, list or mapping"),
        ({"version": 1, "steps": [{"tune": {"anything": {1: 2}}}]}, "is no number, text, list or mapping"),
        ({"version": 1, "steps": [{"cut": {1: 2}}]}, "a parameter's name is text"),
        ({"version": 1, "steps": "cut"}, "steps is a list"),
    ],
)
def test_bad_data(data: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(what)):
        Recipe.from_dict(data)


@pytest.mark.parametrize("bad", [lambda: Choice(()), lambda: Range(2, 1), lambda: Range(True, 2)])
def test_bad_holes_in_code(bad: Any) -> None:
    with pytest.raises(ValueError):
        bad()


# ---- docs/recipes.md

DOCS = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()


def test_the_documents_recipes_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find_method", FIND_METHOD)
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        recipe = Recipe.parse(block)
        assert Recipe.parse(recipe.to_yaml()) == recipe


def test_the_documents_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find_method", FIND_METHOD)
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "docs/recipes.md", "exec"), {})


ERROR_ROWS = re.findall(r"^\| `- (.*?)`(?:, then `- (.*?)`)? \| (.*?)(?: \(did .*)? \|$", DOCS, re.MULTILINE)


@pytest.mark.parametrize("row", ERROR_ROWS, ids=[row[0] for row in ERROR_ROWS])
def test_the_documents_messages_are_true(row: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find_method", FIND_METHOD)
    first, second, message = row
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(steps("".join(f"  - {step}\n" for step in (first, second) if step)))
    assert caught.value.what == message
