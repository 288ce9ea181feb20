"""The memory ledger: weights first, floors kept, nothing given away twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.engine.memory import FLOOR_TOKENS, ModelNeeds, plan_memory
from models.errors import LoadError

GIB = 1024**3
AVIBE = ModelNeeds(16 * GIB, GIB, 144 * 1024, 256, 16384)
AVISION = ModelNeeds(17 * GIB, 2 * GIB, 56 * 1024, 256, 16384)


def test_pages_take_what_weights_and_working_room_leave() -> None:
    ledger = plan_memory(126 * GIB, {"avibe": AVIBE, "avision": AVISION}, {"avibe": 0.7, "avision": 0.3})
    assert ledger.shares["avibe"].cache_bytes == pytest.approx(0.7 * 90 * GIB, rel=0.001)
    assert ledger.shares["avision"].cache_bytes == pytest.approx(0.3 * 90 * GIB, rel=0.001)
    assert 0 <= ledger.free_bytes < AVIBE.page_bytes + AVISION.page_bytes
    # 63 GiB at 144 KiB a token, one page kept for padding
    assert ledger.shares["avibe"].capacity_tokens == pytest.approx(63 * GIB / (144 * 1024) - 256, abs=512)


def test_model_alone_gets_all() -> None:
    share = plan_memory(60 * GIB, {"avibe": AVIBE}, {"avibe": 0.7, "avision": 0.3}).shares["avibe"]
    assert share.cache_bytes > 42.9 * GIB


def test_small_share_is_raised_to_its_floor() -> None:
    shares = plan_memory(40 * GIB, {"avibe": AVIBE, "avision": AVISION}, {"avibe": 0.99, "avision": 0.01}).shares
    assert shares["avision"].capacity_tokens >= FLOOR_TOKENS
    assert shares["avision"].num_pages == AVISION.floor_pages
    assert shares["avibe"].cache_bytes + shares["avision"].cache_bytes <= 4 * GIB


def test_too_small_a_card_is_refused_with_the_numbers() -> None:
    with pytest.raises(LoadError, match=r"36\.00 GiB of memory may be taken, but .* need 36\.00 GiB .* 0\.83 GiB"):
        plan_memory(36 * GIB, {"avibe": AVIBE, "avision": AVISION}, {"avibe": 0.5, "avision": 0.5})


def test_ledger_tells_all_of_it() -> None:
    text = "\n".join(plan_memory(60 * GIB, {"avibe": AVIBE}, {"avibe": 1.0}).lines())
    assert "60.00 GiB may be taken" in text and "avibe: weights 16.00 GiB, working room 1.00 GiB" in text
    assert "pages of 256 tokens" in text and "left over" in text


NEEDS = st.builds(
    ModelNeeds,
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(1, 1000),
    st.sampled_from([1, 16, 256]),
    st.integers(1, 20_000),
)


@given(st.integers(0, 10**9), st.lists(NEEDS, min_size=1, max_size=3), st.data())
def test_nothing_is_given_away_twice(budget: int, models: list[ModelNeeds], data: st.DataObject) -> None:
    needs = {str(index): need for index, need in enumerate(models)}
    weights = {name: data.draw(st.floats(0.01, 1)) for name in needs}
    least = sum(n.weights_bytes + n.workspace_bytes + n.floor_pages * n.page_bytes for n in models)
    if budget < least:
        with pytest.raises(LoadError):
            plan_memory(budget, needs, weights)
        return
    ledger = plan_memory(budget, needs, weights)
    assert ledger.free_bytes >= 0
    for name, need in needs.items():
        assert ledger.shares[name].num_pages >= need.floor_pages
