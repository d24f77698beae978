"""--set NAME=VALUE: typed by the dataclass, dotted where a field holds settings of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from nnprune_backdoor.cli.base import MisuseError
from nnprune_backdoor.cli.name_value import read_plain, read_settings
from nnprune_backdoor.criteria import RNP, MaskTraining, Response
from nnprune_backdoor.errors import UnknownNameError

pytestmark = pytest.mark.cli


@dataclass(frozen=True)
class Pace:
    lr: float = 0.1
    steps: int | None = 5
    epochs: int | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps or epochs")


@dataclass(frozen=True)
class Quick:
    pace: Pace = Pace()
    sizes: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Thorough:
    rounds: int = 3


@dataclass(frozen=True)
class Bare:
    pass


@dataclass(frozen=True)
class Method:
    ranking: Quick | Thorough | Bare = Quick()
    start: Thorough | None = field(default_factory=Thorough)
    layers: Literal["last", "all"] = "last"
    share: float = 0.5
    fast: bool = False
    count: int | None = None
    hook: Any = None


def read(*pairs: str, start: Method | None = None) -> Method:
    """A Method changed by the pairs."""
    changed = read_settings(Method, pairs, "criterion 'm'", start)
    return replace(start or Method(), **changed)


def test_plain_fields_are_read_by_type() -> None:
    assert read("share=1", "fast=yes", "layers=all", "count=none") == Method(
        share=1.0, fast=True, layers="all"
    )
    assert read_settings(Method, [], "x") == {}


def test_dotted_names_change_one_setting_and_keep_the_others() -> None:
    assert read("ranking.sizes=2,3").ranking == Quick(sizes=(2, 3))
    both = read("ranking.pace.lr=1", "ranking.sizes=4", "ranking.pace.steps=7")
    assert both.ranking == Quick(Pace(lr=1.0, steps=7), sizes=(4,))
    assert read("start.rounds=9").start == Thorough(9), "of a default_factory"
    assert read("start=none").start is None


def test_settings_that_go_together_are_applied_together() -> None:
    """One alone would be refused, whichever comes first."""
    found = read("ranking.pace.steps=none", "ranking.pace.epochs=2")
    assert found.ranking == Quick(Pace(steps=None, epochs=2))


def test_a_union_is_read_as_the_class_that_it_holds() -> None:
    published = Method(ranking=Thorough(8), share=0.1)
    assert read("ranking.rounds=2", start=published) == replace(published, ranking=Thorough(2))
    assert read(start=published) == published
    with pytest.raises(
        UnknownNameError, match=r"'ranking\.pace\.lr'.*Available: .*ranking\.rounds"
    ):
        read("ranking.pace.lr=1", start=published)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("ranking.size=1", r"criterion 'm' 'ranking\.size'; did you mean 'ranking\.sizes'"),
        ("ranking.pace.step=1", r"did you mean 'ranking\.pace\.steps'"),
        ("shares=1", r"did you mean 'share'"),
        ("share.lr=1", r"'share\.lr'"),
        ("ranking.=1", r"unknown hyper-parameter"),
        (".lr=1", r"unknown hyper-parameter"),
    ],
)
def test_unknown_names_are_answered_with_close_ones(pair: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        read(pair)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("ranking.pace.steps=many", r"a whole number or none for ranking\.pace\.steps, got 'many'"),
        ("ranking=Thorough", r"is a Quick, not 'Thorough'; .* such as ranking\.pace\.lr=VALUE"),
        ("ranking=none", r"is a Quick, not 'none'"),
        ("ranking.sizes=1,x", r"a whole number, a whole number, \.\.\. for ranking\.sizes"),
        ("layers=both", r"'last' or 'all' for layers"),
        ("fast=1", r"true or false for fast"),
        ("hook=print", r"a value that only Python can give for hook"),
        ("share", r"expected NAME=VALUE"),
        ("=1", r"expected NAME=VALUE"),
    ],
)
def test_values_that_do_not_fit(pair: str, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        read(pair)


def test_settings_without_fields_cannot_be_set() -> None:
    with pytest.raises(MisuseError, match=r"ranking is a Bare, not 'x'; leave it out"):
        read("ranking=x", start=Method(ranking=Bare()))


def test_a_required_field_is_read_like_others() -> None:
    @dataclass(frozen=True)
    class Needy:
        count: int

    assert read_settings(Needy, ["count=3"], "x") == {"count": 3}


def test_rnp_by_default_and_as_published() -> None:
    pairs = ["unlearning.lr=0.02", "ranking.stages=3"]
    found = RNP(**read_settings(RNP, pairs, "criterion 'rnp'"))
    assert found == RNP(unlearning=replace(RNP().unlearning, lr=0.02), ranking=Response(stages=3))
    published = RNP.paper()
    pairs = ["ranking.steps=100", "ranking.epochs=none"]
    changed = read_settings(RNP, pairs, "criterion 'rnp'", published)
    assert changed == {"ranking": MaskTraining(steps=100)}
    with pytest.raises(UnknownNameError, match=r"'ranking\.stages'"):
        read_settings(RNP, ["ranking.stages=3"], "criterion 'rnp'", published)


def test_read_plain_takes_literals_and_text() -> None:
    assert read_plain(["size=64", "name=a b", "pair=(1, 2)", "off=None"]) == {
        "size": 64,
        "name": "a b",
        "pair": (1, 2),
        "off": None,
    }


@pytest.mark.parametrize(
    "pairs",
    [
        ("share=0.1", "share=0.2"),
        ("share=0.1", "share=0.1"),
        ("share=0.1", " share =0.2"),
        ("ranking.pace.lr=1", "fast=yes", "ranking.pace.lr=2"),
    ],
)
def test_a_name_given_twice_is_refused(pairs: tuple[str, ...]) -> None:
    with pytest.raises(MisuseError, match=r"is given twice, as .* give it once"):
        read(*pairs)
    with pytest.raises(MisuseError, match="is given twice"):
        read_plain(pairs)
