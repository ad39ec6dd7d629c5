"""What comes of written text: where it stops, and which prompts are read before it."""

import pytest
from support import cases

from bagel_opt.sampling.planning import THINK_TEXT
from bagel_opt.serve.streams import TextStream

named = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def tale(eager):
    """The official text, and how many tokens of it there are after each character."""
    tokens = []
    case = named["text_only"]
    [text] = eager.run(case.inputs, **case.options, on_token=tokens.append)
    assert [text] == case.outputs
    return text, tokens


@pytest.mark.parametrize("length", [1, 2, 5])
def test_writing_ends_before_a_stop_text(eager, tale, length):
    """At the earliest token that completes it, wherever in the text it is."""
    text, tokens = tale
    case = named["text_only"]
    for start in range(len(text) - length):
        stop, seen = text[start : start + length], []
        if "\ufffd" in stop:  # the last bytes of a character could still come
            continue
        [found] = eager.run(case.inputs, **case.options, stop=stop, on_token=seen.append)
        assert found == text[: text.index(stop)]
        bos = eager.config.special.bos_token_id
        told = [eager.tokenizer.decode([bos, *tokens[: n + 1]]) for n in range(len(tokens))]
        assert len(seen) == 1 + next(n for n, part in enumerate(told) if stop in part)


def test_the_first_of_several_counts_and_one_that_never_comes_does_not(eager, tale):
    text, tokens = tale
    case, seen = named["text_only"], []
    [found] = eager.run(case.inputs, **case.options, stop=["5", "never", "ona"])
    assert found == text[: text.index("ona")]
    assert eager.run(case.inputs, **case.options, stop=["never"], on_token=seen.append) == [text]
    assert seen == tokens


def test_a_thought_ends_there_too(eager):
    case = named["text_to_image_think"]
    thought = case.outputs[0]
    short, picture = eager.run(case.inputs, **case.options, stop="j")
    assert short == thought[: thought.index("j")]
    assert picture.size == case.outputs[1].size


@pytest.mark.parametrize("stops", [(), ("nl",), ("onl", "5"), ("Won",), ("never",), ("ona\ufffd", "nlx")])
def test_a_stream_holds_back_what_may_become_a_stop_text(eager, tale, stops):
    _, tokens = tale
    options = {**named["text_only"].options, "stop": stops}
    [whole] = eager.run(named["text_only"].inputs, **options)
    stream, sent = TextStream(eager.tokenizer, stops), ""
    for token in tokens:
        sent += stream.push(token)
        assert whole.startswith(sent)
        if not stops:
            assert sent  # nothing waits for no reason
    assert sent + stream.until(whole) == whole


def test_the_official_prompt_of_thinking_may_be_given_by_hand(eager):
    case = named["image_understanding_think"]
    options = {**case.options, "think": False, "system_prompt": THINK_TEXT}
    got, want = [], []
    case.check_outputs(eager.run(case.inputs, **options, on_token=got.append))
    case.check_outputs(eager.run(case.inputs, **case.options, on_token=want.append))
    assert got == want
    other = []
    eager.run(case.inputs, **{**case.options, "think_prompt": "Be brief."}, on_token=other.append)
    assert other != want
