"""Numbers with unlike protocols are told apart, and a signature survives being written and read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condgen import __version__
from condgen.errors import ConfigError
from condgen.metrics.score import Score
from condgen.metrics.signature import comparable, parse, require_comparable, signature

WORD = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=8)
VALUE = st.text(st.characters(codec="utf-8", exclude_characters="|\n\r"), min_size=1, max_size=12)


@given(WORD, st.dictionaries(WORD.map(lambda w: "f" + w), VALUE, max_size=5))
def test_parse_reads_back_what_signature_wrote(metric, fields):
    read = parse(signature(metric, **fields))
    assert read.metric == metric
    assert read.fields == {**fields, "condgen": __version__}
    assert str(read) == signature(metric, **fields)


def test_the_written_form():
    text = signature("rprec@10", cand=10, n=446, data="openmoji#0a", literature=False, absent=None)
    assert text == f"rprec@10|cand=10|n=446|data=openmoji#0a|literature=no|condgen={__version__}"


def test_comparable_names_every_differing_field():
    one = signature("fid", n=5000, ext="inception#ab", seed=0)
    two = signature("fid", n=2500, ext="inception#cd", seed=0, resize="tf1")
    assert comparable(one, one) == []
    assert comparable(one, two) == ["n", "ext", "resize"]
    assert comparable(one, two, ignore=("n",)) == ["ext", "resize"]
    assert comparable(one, signature("kid", n=5000, ext="inception#ab", seed=0)) == ["metric"]


def test_unlike_numbers_are_refused_with_both_values():
    one, two = signature("fid", n=5000), signature("fid", n=2500)
    require_comparable(one, one)
    with pytest.raises(ConfigError, match="n: 5000 against 2500"):
        require_comparable(one, two)


@pytest.mark.parametrize("text", ["", "fid|n", "fid|=3", "fid|n=1|n=2", "a=b"])
def test_what_is_no_signature_is_refused(text):
    with pytest.raises(ConfigError, match="not a signature"):
        parse(text)


def test_a_value_cannot_break_the_format():
    with pytest.raises(ConfigError, match="cannot stand"):
        signature("fid", data="a|n=9")


def test_score_position_and_round_trip():
    score = Score("fid", 30.0, floor=110.0, ceiling=10.0, error=1.5, signature="fid|n=1", higher_is_better=False)
    assert score.position == pytest.approx(0.8)
    assert score.better_than(40.0) and not score.better_than(20.0)
    assert Score.from_dict(score.to_dict()) == score
    assert Score("x", 1.0).position is None and Score("x", 1.0, floor=1.0, ceiling=1.0).position is None
    assert "floor 110" in str(score)
