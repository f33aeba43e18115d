"""Prompts of the bundled research and the parsing of replies."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrdr_budget.agent import prompts
from ktrdr_budget.agent.phases import Backtest, Design, Training
from ktrdr_budget.agent.prompts import UnusableAnswer, parse_assessment, parse_design
from ktrdr_budget.agent.strategies import STRATEGIES
from ktrdr_budget.errors import BudgetError

MOMENTUM = {"momentum_days": 20, "volatility_days": 30, "learning_rate": 0.1, "epochs": 50, "threshold": 0.51}
ANSWER = json.dumps({"strategy": "momentum", "parameters": MOMENTUM})
JUDGEMENT = '{"verdict": "mediocre", "summary": "It earns a little."}'
TRAINING = Training(accuracy=0.54321, initial_loss=0.6931, final_loss=0.68)
BACKTEST = Backtest(win_rate=0.4, max_drawdown=0.2, sharpe_ratio=0.91234, trades=12)


def test_a_design_prompt_lists_every_strategy_and_contains_the_id_of_the_cycle():
    prompt = prompts.design_prompt("op_1")
    offered = prompts.strategies_of(prompt)
    assert offered is not None
    assert set(offered) == set(STRATEGIES)
    for name, strategy in STRATEGIES.items():
        assert offered[name]["parameters"] == {key: list(ends) for key, ends in strategy.ranges.items()}
    assert "op_1" in prompt
    assert prompt == prompts.design_prompt("op_1") != prompts.design_prompt("op_2")
    assert prompts.figures_of(prompt) is None


def test_an_assessment_prompt_contains_every_figure_of_the_training_and_the_backtest():
    prompt = prompts.assessment_prompt(Design("momentum", MOMENTUM), TRAINING, BACKTEST)
    assert prompts.figures_of(prompt) == {
        "accuracy": 0.5432,
        "initial_loss": 0.6931,
        "final_loss": 0.68,
        "win_rate": 0.4,
        "max_drawdown": 0.2,
        "sharpe_ratio": 0.912,
        "trades": 12,
    }
    assert "momentum" in prompt
    assert prompts.strategies_of(prompt) is None


def test_an_assessment_prompt_accepts_design_parameters_of_any_type():
    assert "2 h" in prompts.assessment_prompt(Design("other", {"window": "2 h", "x": {1}}), TRAINING, BACKTEST)


@pytest.mark.parametrize("line", ["Strategies: {", "Strategies: [1]", "Strategies are many"])
def test_a_prompt_without_a_valid_list_of_strategies_is_not_a_design_prompt(line: str):
    assert prompts.strategies_of(f"Hello.\n{line}\n") is None


@pytest.mark.parametrize(
    "text",
    [
        ANSWER,
        f"```json\n{ANSWER}\n```",
        f"I looked at {{everything}} and {{}} and chose:\n\n{ANSWER}\n\nGood luck {{!",
        json.dumps({"strategy": "momentum", "parameters": MOMENTUM | {"further": 1}, "rationale": "None."}),
        ANSWER.replace("20", "20.0"),
        f'{{"thoughts": "none"}} {ANSWER}',
    ],
)
def test_a_design_is_parsed_from_a_reply_with_other_text_around_the_json(text: str):
    design = parse_design(text)
    assert (design.strategy_name, design.parameters) == ("momentum", MOMENTUM)
    assert isinstance(design.parameters["momentum_days"], int)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no JSON object with 'strategy' in it"),
        ("I cannot.", "there is no JSON object with 'strategy' in it"),
        (ANSWER[:-1], "there is no JSON object with 'strategy' in it"),
        ("[1, 2]", "there is no JSON object with 'strategy' in it"),
        ("[" * 100_000 + "{" * 1000, "there is no JSON object with 'strategy' in it"),
        (ANSWER.replace("momentum", "martingale", 1), "strategy must be one of momentum, trend_following"),
        ('{"strategy": ["momentum"]}', "strategy must be one of momentum"),
        ('{"strategy": "momentum"}', "parameters must be an object"),
        ('{"strategy": "momentum", "parameters": [20]}', "parameters must be an object"),
        (ANSWER.replace('"epochs"', '"laps"'), "parameter epochs must be a number from 40 to 120"),
        (ANSWER.replace("50", "500"), "parameter epochs must be a number from 40 to 120"),
        (ANSWER.replace("50", '"50"'), "parameter epochs must be a number from 40 to 120"),
        (ANSWER.replace("50", "true"), "parameter epochs must be a number from 40 to 120"),
        (ANSWER.replace("50", "NaN"), "parameter epochs must be a number from 40 to 120"),
        (ANSWER.replace("50", "Infinity"), "parameter epochs must be a number from 40 to 120"),
        (ANSWER.replace("50", "50.5"), "parameter epochs must be a whole number from 40 to 120"),
    ],
)
def test_the_error_for_an_unusable_design_names_the_defect(text: str, words: str):
    with pytest.raises(UnusableAnswer, match=f"^{words}") as raised:
        parse_design(text)
    assert isinstance(raised.value, BudgetError)
    assert "martingale" not in str(raised.value)  # replies are not quoted


def test_an_assessment_is_parsed_from_a_reply_with_other_text_around_the_json():
    found = parse_assessment(f"Well: {JUDGEMENT} That is all.")
    assert (found.verdict, found.summary) == ("mediocre", "It earns a little.")
    assert parse_assessment(JUDGEMENT.replace("mediocre", " Mediocre ")).verdict == "mediocre"


def test_a_long_summary_of_an_assessment_is_shortened():
    assert len(parse_assessment(json.dumps({"verdict": "poor", "summary": "x" * 5000})).summary) == 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It is good.", "there is no JSON object with 'verdict' in it"),
        (JUDGEMENT.replace("mediocre", "superb"), "verdict must be one of promising, mediocre, poor"),
        ('{"verdict": null, "summary": "x"}', "verdict must be one of promising, mediocre, poor"),
        ('{"verdict": "poor"}', "summary must be a string"),
        ('{"verdict": "poor", "summary": "  "}', "summary must be a string"),
        ('{"verdict": "poor", "summary": ["x"]}', "summary must be a string"),
    ],
)
def test_the_error_for_an_unusable_assessment_names_the_defect(text: str, words: str):
    with pytest.raises(UnusableAnswer, match=f"^{words}$"):
        parse_assessment(text)


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers()))
answers = st.dictionaries(
    st.sampled_from(["strategy", "parameters", "verdict", "summary"]),
    st.one_of(values, st.sampled_from(list(STRATEGIES)), st.dictionaries(st.sampled_from(list(MOMENTUM)), values)),
)


@given(text=st.one_of(st.text(), answers.map(json.dumps)))
def test_any_reply_is_either_parsed_or_rejected_as_unusable(text: str):
    for parse in (parse_design, parse_assessment):
        with suppress(UnusableAnswer):
            assert parse(text)


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_bounds_of_every_parameter_range_are_valid_values(name: str, end: int):
    parameters = {key: ends[end] for key, ends in STRATEGIES[name].ranges.items()}
    assert parse_design(json.dumps({"strategy": name, "parameters": parameters})).parameters == parameters
