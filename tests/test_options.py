"""The backend's options: what is accepted, what is refused and with which advice, and how modes become options."""

from __future__ import annotations

import json

import pytest
import torch

import moepass
from moepass import errors
from moepass.options import Options, suggestion
from moepass.spec import InitSpec, MoESpec


def test_nothing_given_is_the_default():
    assert Options.parse(None) == Options.parse({}) == Options()
    assert Options().init == InitSpec()
    assert Options().inner == "inductor"


@pytest.mark.parametrize(
    ("convert", "init"),
    [
        (True, InitSpec()),
        (False, None),
        ("auto", InitSpec()),
        ("copy", InitSpec(method="copy")),
        ("copy+noise", InitSpec(method="copy+noise")),
        (InitSpec(granularity=4), InitSpec(granularity=4)),
    ],
)
def test_convert_chooses_the_init(convert, init):
    assert Options.parse({"convert": convert}).init == init


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"stric": True}, "did you mean 'strict'"),
        ({"hardwear": "H100"}, "did you mean 'hardware'"),
        ({"max_autotune": True}, "options={'inductor': {'max_autotune': ...}}"),
        ({"max-autotune": True}, "options={'inductor': {'max-autotune': ...}}"),
        ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'"),
        ({"zzz": 1}, "the options are spec, convert"),
    ],
)
def test_an_unknown_option_names_the_nearest(given, advice):
    with pytest.raises(errors.UnknownOption) as caught:
        Options.parse(given)
    assert advice in str(caught.value)
    assert caught.value.code == "unknown_option"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"spec": {"experts": 8}}, "MoESpec"),
        ({"convert": "cpy"}, "did you mean 'copy'"),
        ({"convert": 1.5}, "an init name"),
        ({"convert": None}, "an init name"),
        ({"inner": "inducter"}, "did you mean 'inductor'"),
        ({"inner": "moepass"}, "use one of"),
        ({"measure": 1}, "True or False"),
        ({"save_limit": -1}, "number of bytes"),
        ({"save_limit": True}, "number of bytes"),
        ({"strict": "yes"}, "True or False"),
        ({"inductor": ["max_autotune"]}, "a dict"),
        ({"inner": "eager", "inductor": {"max_autotune": True}}, "takes none"),
    ],
)
def test_a_bad_value_says_what_to_give(given, complaint):
    with pytest.raises(errors.BadOption) as caught:
        Options.parse(given)
    assert complaint in str(caught.value)
    assert next(reversed(given)) in str(caught.value) or next(iter(given)) in str(caught.value)


def test_options_are_frozen_and_the_users_dict_is_left_alone():
    given = {"strict": True, "inductor": {"max_autotune": False}}
    options = Options.parse(given, mode="reduce-overhead")
    assert given == {"strict": True, "inductor": {"max_autotune": False}}
    with pytest.raises(AttributeError):
        options.strict = False  # type: ignore[misc]


def test_a_mode_becomes_inductor_options_and_the_users_own_win():
    assert Options.parse(None, mode="default") == Options.parse(None, mode=None) == Options()
    assert Options.parse(None, mode="reduce-overhead").inductor["triton.cudagraphs"] is True
    options = Options.parse({"inductor": {"max_autotune": False}}, mode="max-autotune-no-cudagraphs")
    assert options.inductor["max_autotune"] is False
    assert options.inductor["coordinate_descent_tuning"] is True


def test_every_inductor_option_spelling_that_torch_takes_is_taken():
    assert Options.parse({"inductor": {"max-autotune": True}}).inductor == {"max-autotune": True}
    assert Options.parse({"inductor": {"triton.cudagraphs": False}}).inductor == {"triton.cudagraphs": False}


def test_an_unknown_mode_is_a_bad_option():
    with pytest.raises(errors.BadOption, match="fastest"):
        Options.parse(None, mode="fastest")


def test_settings_are_json_and_tell_different_requests_apart():
    requests = [{}, {"spec": MoESpec()}, {"convert": False}, {"convert": "copy"}, {"inner": "eager"}, {"measure": True}]
    requests += [{"save_limit": 0}]
    texts = {json.dumps(Options.parse(request).settings(), sort_keys=True) for request in requests}
    assert len(texts) == len(requests)
    assert Options.parse({"plan": "plan.json"}).settings()["pinned"] is True


def test_suggestion_is_silent_when_nothing_is_near():
    assert suggestion("qqqq", ["strict", "plan"]) == ""
    assert suggestion("plna", ["strict", "plan"]) == "; did you mean 'plan'?"


def test_a_bad_option_reaches_the_user_of_torch_compile():
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="moepass", options={"stric": True})
    with pytest.raises(Exception, match="did you mean 'strict'"):
        compiled(torch.randn(1, 2))
    assert issubclass(errors.UnknownOption, ValueError)
    assert moepass.MoESpec is MoESpec
