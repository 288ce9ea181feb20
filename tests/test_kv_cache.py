"""The books of the paged cache: each rule alone, then all together against a device that is simulated slot by slot."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from models.engine.kv_cache import _ROOT_KEY, MAX_COPY_CANDIDATES, MIN_COPY_TOKENS, KVCache, PageCopy, PageTable

PAGE = 4


def make_cache(num_pages: int = 9, *, min_copy_tokens: int = 1) -> KVCache:
    return KVCache(num_pages, PAGE, min_copy_tokens=min_copy_tokens)


def open_table(cache: KVCache, ids: Sequence[int]) -> tuple[PageTable, PageCopy | None]:
    opened = cache.open(ids, len(ids))
    assert opened is not None
    return opened


def compute(cache: KVCache, ids: Sequence[int]) -> list[int]:
    """A sequence from start to end; returns the pages that it had."""
    table, _ = open_table(cache, ids)
    pages = list(table.pages)
    cache.commit_tail(table, ids, len(ids))
    cache.close(table)
    return pages


def num_found(cache: KVCache, ids: Sequence[int]) -> int:
    """How many of `ids`, and of one more, a new table would start with. Leaves the cache as it is."""
    probe = copy.deepcopy(cache)
    opened = probe.open([*ids, -9], len(ids) + 1) or probe.open([*ids, -9], 0)
    assert opened is not None
    return opened[0].num_reused


def pages_found(cache: KVCache, ids: Sequence[int]) -> list[int]:
    """The whole pages that a table of `ids` and one more would share. Leaves the cache as it is."""
    opened = copy.deepcopy(cache).open([*ids, -9], 0)
    assert opened is not None
    return opened[0].pages


def books(cache: KVCache) -> dict[str, Any]:
    return copy.deepcopy(vars(cache))


# Sizes


def test_page_0_is_never_handed_out_and_all_others_are() -> None:
    cache = make_cache(9)
    assert (cache.num_free_pages, cache.num_used_pages, cache.capacity_tokens) == (8, 0, 32)
    table, _ = open_table(cache, range(32))
    assert sorted(table.pages) == list(range(1, 9))
    assert (cache.num_free_pages, cache.num_used_pages, cache.num_cached_pages) == (0, 8, 0)


@pytest.mark.parametrize(("num_pages", "page_tokens", "min_copy_tokens"), [(1, 4, 1), (2, 0, 1), (2, 4, 0)])
def test_a_cache_without_a_page_or_a_token_is_refused(num_pages: int, page_tokens: int, min_copy_tokens: int) -> None:
    with pytest.raises(ValueError, match="at least 2, 1 and 1"):
        KVCache(num_pages, page_tokens, min_copy_tokens=min_copy_tokens)


def test_room_is_made_page_by_page() -> None:
    cache = make_cache(4)
    table, _ = open_table(cache, [1, 2, 3, 4])
    assert len(table.pages) == 1
    assert cache.extend(table, 4) and len(table.pages) == 1
    assert cache.extend(table, 5) and len(table.pages) == 2
    assert cache.extend(table, 1) and len(table.pages) == 2
    assert cache.extend(table, 12) and len(table.pages) == 3


# Whole pages


def test_a_computed_beginning_is_shared_by_reference() -> None:
    cache = make_cache()
    first, _ = open_table(cache, range(8))
    cache.commit(first, range(8), 8)
    second, page_copy = open_table(cache, [*range(8), 50, 51])
    assert (second.num_reused, page_copy) == (8, None)
    assert second.pages[:2] == first.pages and second.pages[2] not in first.pages
    assert cache.num_used_pages == 3
    cache.close(first)
    assert (cache.num_used_pages, cache.num_cached_pages) == (3, 0)
    cache.close(second)
    assert (cache.num_used_pages, cache.num_cached_pages) == (0, 2)
    assert (cache.num_queried_tokens, cache.num_reused_tokens) == (18, 8)


def test_the_same_ids_after_another_beginning_are_not_reused() -> None:
    cache = make_cache()
    compute(cache, [1, 1, 1, 1, 2, 2, 2, 2])
    assert num_found(cache, [3, 3, 3, 3, 2, 2, 2, 2]) == 0
    assert num_found(cache, [2, 2, 2, 2]) == 0


def test_negative_and_64_bit_ids_tell_pages_apart() -> None:
    cache = make_cache()
    compute(cache, [-1, 2**62, -(2**62), 4])
    assert num_found(cache, [-1, 2**62, -(2**62), 4]) == 4
    assert num_found(cache, [-1, 2**62, 2**62, 4]) == 2
    assert num_found(cache, [2**32 - 1, 2**62, -(2**62), 4]) == 0


def test_nothing_is_found_before_it_is_committed() -> None:
    cache = make_cache()
    table, _ = open_table(cache, range(8))
    assert num_found(cache, range(8)) == 0
    cache.commit(table, range(8), 3)
    assert num_found(cache, range(8)) == 0
    cache.commit(table, range(8), 7)
    assert num_found(cache, range(8)) == 4
    cache.commit(table, range(8), 8)
    assert num_found(cache, range(8)) == 8


def test_the_last_token_is_always_left_to_compute() -> None:
    cache = make_cache()
    compute(cache, range(8))
    table, page_copy = open_table(cache, range(8))
    assert table.num_reused == 7
    assert page_copy is not None and page_copy.num_tokens == 3
    assert page_copy.target == table.pages[1]
    table, page_copy = open_table(make_cache(), [1])
    assert (table.num_reused, page_copy) == (0, None)


def test_found_pages_are_kept_even_if_room_was_asked_for_less() -> None:
    cache = make_cache()
    compute(cache, range(10))
    opened = cache.open(range(12), 3)
    assert opened is not None
    table, page_copy = opened
    assert (table.num_reused, len(table.pages), page_copy) == (8, 2, None)


class LazyIds(Sequence[int]):
    """Ids that count how many of them were read."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.num_read = ids, 0

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        found = self.ids[index]
        self.num_read += len(found) if isinstance(found, list) else 1
        return found


def test_commit_reads_ids_only_of_pages_just_filled() -> None:
    cache = make_cache()
    ids = LazyIds(list(range(12)))
    table, _ = open_table(cache, ids)
    reads = []
    for num_computed in range(1, 13):
        ids.num_read = 0
        cache.commit(table, ids, num_computed)
        reads.append(ids.num_read)
    assert reads == [0, 0, 0, PAGE] * 3


def test_more_tokens_than_ids_or_room_are_refused() -> None:
    cache = make_cache()
    table, _ = open_table(cache, range(6))
    with pytest.raises(ValueError, match="9 tokens in 2 pages of 4"):
        cache.commit(table, range(9), 9)
    with pytest.raises(ValueError, match="3 tokens computed of 2 ids"):
        cache.commit_tail(table, range(2), 3)
    assert num_found(cache, range(6)) == 0
    with pytest.raises(ValueError, match="8 tokens computed of 6 ids"):
        cache.commit(table, range(6), 8)


def test_an_id_beyond_64_bits_changes_nothing() -> None:
    cache = make_cache()
    compute(cache, range(8))
    before = books(cache)
    with pytest.raises(OverflowError):
        cache.open([*range(8), 2**63, 1], 10)
    assert books(cache) == before


# Duplicates


def open_twins(cache: KVCache, ids: Sequence[int]) -> tuple[PageTable, PageTable]:
    """Two tables that computed the same at the same time; the first one's pages are those found."""
    first, second = open_table(cache, ids)[0], open_table(cache, ids)[0]
    cache.commit(first, ids, len(ids))
    cache.commit(second, ids, len(ids))
    return first, second


def test_of_two_equal_pages_one_is_found_and_the_other_is_empty_once_closed() -> None:
    cache = make_cache()
    first, second = open_twins(cache, range(8))
    assert not set(first.pages) & set(second.pages)
    third, _ = open_table(cache, range(9))
    assert third.pages[:2] == first.pages
    cache.close(third)
    cache.close(second)
    assert (cache.num_used_pages, cache.num_cached_pages) == (2, 0)
    cache.close(first)
    assert (cache.num_used_pages, cache.num_cached_pages) == (0, 2)


def test_a_tail_that_fills_up_to_a_duplicate_is_kept_no_longer() -> None:
    cache = make_cache()
    first, second = open_table(cache, range(4))[0], open_table(cache, range(4))[0]
    cache.commit_tail(second, range(4), 3)
    cache.commit(first, range(4), 4)
    cache.commit(second, range(4), 4)
    cache.close(second)
    assert (cache.num_used_pages, cache.num_cached_pages) == (1, 0)
    assert pages_found(cache, range(4)) == first.pages


def test_a_duplicate_takes_the_place_of_a_page_evicted_meanwhile() -> None:
    cache = make_cache(5)
    first, second = open_twins(cache, range(8))
    kept = list(second.pages)
    cache.close(first)
    open_table(cache, [50] * 8)
    assert cache.num_evictions == 2
    assert pages_found(cache, range(8)) == []
    cache.close(second)
    assert pages_found(cache, range(8)) == kept


def test_closing_a_duplicate_counts_as_use_of_the_page_that_is_found() -> None:
    cache = make_cache(8)
    first, second = open_twins(cache, range(8))
    cache.close(first)
    compute(cache, [50] * 8)
    cache.close(second)
    open_table(cache, [60] * 20)
    assert (num_found(cache, range(8)), num_found(cache, [50] * 8)) == (8, 0)


# Parts of pages


def test_the_equal_part_of_a_page_is_copied() -> None:
    cache = make_cache()
    pages = compute(cache, [1, 2, 3, 4, 5, 6, 7])
    table, page_copy = open_table(cache, [1, 2, 3, 4, 5, 6, 9, 9])
    assert table.pages[0] == pages[0]
    assert page_copy == PageCopy(source=pages[1], target=table.pages[1], num_tokens=2)
    assert table.num_reused == 6


def test_a_part_is_copied_from_a_full_page_too() -> None:
    cache = make_cache()
    pages = compute(cache, [1, 2, 3, 4])
    table, page_copy = open_table(cache, [1, 2, 9, 9, 9])
    assert page_copy == PageCopy(pages[0], table.pages[0], 2)


def test_a_part_is_copied_from_a_page_still_being_written() -> None:
    cache = make_cache()
    writer, _ = open_table(cache, [1, 2, 3])
    cache.commit(writer, [1, 2, 3], 3)
    assert num_found(cache, [1, 2, 3]) == 0
    cache.commit_tail(writer, [1, 2, 3], 3)
    assert num_found(cache, [1, 2, 3, 4]) == 3
    cache.commit(writer, [1, 2, 3, 4], 4)
    assert num_found(cache, [1, 2, 3, 4]) == 4
    assert num_found(cache, [1, 2, 3, 9]) == 3


def test_a_tail_grows_and_never_shrinks() -> None:
    cache = make_cache()
    table, _ = open_table(cache, [1, 2, 3])
    cache.commit_tail(table, [1, 2, 3], 2)
    assert num_found(cache, [1, 2, 3]) == 2
    cache.commit_tail(table, [1, 2, 3], 3)
    cache.commit_tail(table, [1, 2, 3], 1)
    assert num_found(cache, [1, 2, 3]) == 3


def test_the_longest_of_several_parts_is_copied() -> None:
    cache = make_cache()
    compute(cache, [1, 2, 9])
    best = compute(cache, [1, 2, 3, 8])
    compute(cache, [1, 7, 7])
    table, page_copy = open_table(cache, [1, 2, 3, 4, 5])
    assert page_copy == PageCopy(best[0], table.pages[0], 3)


def test_a_part_below_the_least_is_neither_copied_nor_kept() -> None:
    cache = KVCache(9, 2 * MIN_COPY_TOKENS)
    shortest = list(range(MIN_COPY_TOKENS))
    compute(cache, shortest[:-1])
    assert cache.num_cached_pages == 0
    compute(cache, shortest)
    assert cache.num_cached_pages == 1
    assert num_found(cache, [*shortest, 50]) == MIN_COPY_TOKENS
    assert num_found(cache, [*shortest[:-1], 50]) == 0


def test_only_the_newest_parts_are_compared() -> None:
    cache = KVCache(MAX_COPY_CANDIDATES + 3, PAGE, min_copy_tokens=1)
    compute(cache, [1, 2, 3])
    for other in range(MAX_COPY_CANDIDATES - 1):
        compute(cache, [1, 50 + other])
    assert num_found(cache, [1, 2, 3]) == 3
    compute(cache, [1, 49])
    assert num_found(cache, [1, 2, 3]) == 1


def test_a_part_copied_whole_is_evicted_first() -> None:
    cache = make_cache(4)
    tail, other = compute(cache, [1, 2]), compute(cache, [50, 51])
    assert tail != other
    table, _ = open_table(cache, [1, 2, 3])
    cache.commit_tail(table, [1, 2, 3], 3)
    assert cache.extend(table, 5)
    assert table.pages[1:] == tail
    assert num_found(cache, [50, 51]) == 2


def test_the_source_of_a_copy_is_the_last_that_its_own_open_evicts() -> None:
    cache = make_cache(3)
    oldest, newest = compute(cache, [1, 2, 3]), compute(cache, [50] * 3)
    table, page_copy = open_table(cache, [1, 2, 3, 4])
    assert page_copy == PageCopy(oldest[0], newest[0], 3)
    cache.close(table)
    compute(cache, [1, 2, 3])
    table, page_copy = open_table(cache, [1, 2, 60, 60, 60])
    assert page_copy is not None and page_copy.target == table.pages[0] and page_copy.source == table.pages[1]


def test_the_last_page_left_is_taken_over_with_what_it_holds() -> None:
    cache = make_cache(2)
    pages = compute(cache, [1, 2, 3])
    table, page_copy = open_table(cache, [1, 2, 9])
    assert (table.pages, table.num_reused, page_copy) == (pages, 2, None)
    assert num_found(cache, [1, 2, 3]) == 0


# Eviction


def test_the_least_recently_used_is_evicted_first() -> None:
    cache = make_cache(4)
    compute(cache, [1] * 4)
    compute(cache, [2] * 4)
    compute(cache, [3] * 4)
    used_again = cache.open([1] * 5, 4)
    assert used_again is not None
    cache.close(used_again[0])
    table, _ = open_table(cache, [50])
    assert [num_found(cache, [n] * 4) for n in (1, 2, 3)] == [4, 0, 4]
    cache.extend(table, 5)
    assert [num_found(cache, [n] * 4) for n in (1, 2, 3)] == [4, 0, 0]
    assert cache.num_evictions == 2


def test_empty_pages_are_handed_out_before_cached_ones() -> None:
    cache = make_cache(4)
    compute(cache, [1] * 4)
    open_table(cache, [50] * 8)
    assert (cache.num_evictions, num_found(cache, [1] * 4)) == (0, 4)


def test_a_chain_is_evicted_from_its_end() -> None:
    cache = make_cache(4)
    compute(cache, range(12))
    table, _ = open_table(cache, [50])
    assert num_found(cache, range(12)) == 8
    cache.extend(table, 8)
    assert num_found(cache, range(12)) == 4


def test_a_page_referred_to_is_never_evicted() -> None:
    cache = make_cache(4)
    reader, _ = open_table(cache, range(8))
    cache.commit(reader, range(8), 8)
    second, _ = open_table(cache, range(9))
    cache.close(reader)
    assert cache.open([50] * 4, 4) is None
    assert second.pages[:2] == pages_found(cache, range(8))
    assert cache.num_evictions == 0


def test_an_evicted_page_is_found_neither_whole_nor_in_part() -> None:
    cache = make_cache(3)
    compute(cache, range(8))
    compute(cache, [50] * 8)
    assert num_found(cache, range(8)) == 0
    assert num_found(cache, [0, 1, 60]) == 0
    assert cache.num_evictions == 2


def test_nothing_is_kept_of_what_was_evicted() -> None:
    cache = make_cache(3)
    sizes = set()
    for n in range(50):
        compute(cache, [n] * 7)
        sizes.add(sum(len(value) for value in vars(cache).values() if isinstance(value, dict)))
    assert len(sizes) == 1


# Exhaustion


def test_too_few_pages_for_open_change_nothing() -> None:
    cache = make_cache(6)
    compute(cache, range(8))
    open_table(cache, [50] * 8)
    before = books(cache)
    assert cache.open([*range(8), *range(60, 66)], 14) is None
    assert cache.open([70] * 14, 14) is None
    assert books(cache) == before
    opened = cache.open([*range(8), *range(60, 64)], 12)
    assert opened is not None and opened[0].num_reused == 8


def test_too_few_pages_to_extend_change_nothing() -> None:
    cache = make_cache(4)
    compute(cache, range(4))
    table, _ = open_table(cache, [50] * 4)
    before, pages = books(cache), list(table.pages)
    assert not cache.extend(table, 13)
    assert (books(cache), table.pages) == (before, pages)
    assert cache.extend(table, 12)


# Discard and close


def test_discarded_pages_are_free_and_forgotten() -> None:
    cache = make_cache()
    table, _ = open_table(cache, range(10))
    pages = list(table.pages)
    cache.commit_tail(table, range(10), 10)
    assert sorted(cache.discard(table)) == sorted(pages)
    assert (cache.num_used_pages, cache.num_cached_pages, cache.num_evictions) == (0, 0, 0)
    assert num_found(cache, range(10)) == 0


def test_discard_keeps_pages_that_others_share_and_forgets_those_that_none_does() -> None:
    cache = make_cache()
    compute(cache, [7] * 4)
    sharing, _ = open_table(cache, range(5))
    cache.commit(sharing, range(4), 4)
    faulty, _ = open_table(cache, [*range(4), 50, 50])
    own = faulty.pages[1:]
    assert cache.discard(faulty) == own
    assert num_found(cache, range(4)) == 4
    reading, _ = open_table(cache, [*[7] * 4, 8])
    pages = list(reading.pages)
    assert sorted(cache.discard(reading)) == sorted(pages)
    assert num_found(cache, [7] * 4) == 0


def test_a_table_closed_twice_gives_its_pages_back_once() -> None:
    cache = make_cache(3)
    table, _ = open_table(cache, range(4))
    cache.close(table)
    before = books(cache)
    cache.close(table)
    assert cache.discard(table) == []
    assert books(cache) == before
    with pytest.raises(ValueError, match="closed"):
        cache.extend(table, 4)


# Everything together

TOKENS = st.sampled_from([-1, 0, 1])


@given(st.integers(2, 4), st.lists(st.lists(TOKENS, min_size=1, max_size=14), min_size=1, max_size=9), st.data())
def test_all_that_was_computed_is_found_while_there_is_room(
    page_tokens: int, prompts: list[list[int]], data: st.DataObject
) -> None:
    """The longest common beginning with anything computed, to the token: at most 8 prompts, so all are compared."""
    *computed, wanted = prompts
    cache = KVCache(200, page_tokens, min_copy_tokens=1)
    tables = [(open_table(cache, ids)[0], ids) for ids in computed]
    for table, ids in data.draw(st.permutations(tables)):
        cache.commit_tail(table, ids, len(ids))
    for table, _ in data.draw(st.permutations(tables)):
        cache.close(table)
    commons = [next((n for n, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), None) for ids in computed]
    lengths = [min(len(ids), len(wanted)) if n is None else n for n, ids in zip(commons, computed, strict=True)]
    assert open_table(cache, wanted)[0].num_reused == min(len(wanted) - 1, max(lengths, default=0))


@dataclass(eq=False)
class Writer:
    """A sequence as the engine would run it."""

    table: PageTable
    ids: list[int]
    num_computed: int


@dataclass
class Device:
    """Each slot holds the ids of which its keys and values were made: its own and all those before it."""

    page_tokens: int
    slots: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def write(self, table: PageTable, ids: list[int], position: int) -> None:
        page, offset = table.pages[position // self.page_tokens], position % self.page_tokens
        self.slots[page, offset] = tuple(ids[: position + 1])

    def copy(self, page_copy: PageCopy) -> None:
        for offset in range(page_copy.num_tokens):
            self.slots[page_copy.target, offset] = self.slots[page_copy.source, offset]

    def zero(self, page: int) -> None:
        for offset in range(self.page_tokens):
            self.slots[page, offset] = ()

    def holds(self, table: PageTable, ids: list[int], num_tokens: int) -> bool:
        pages = table.pages
        return all(
            self.slots[pages[n // self.page_tokens], n % self.page_tokens] == tuple(ids[: n + 1])
            for n in range(num_tokens)
        )


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, are computed in chunks, preempted, ended and thrown away in any order."""

    @initialize(num_pages=st.integers(2, 9), page_tokens=st.integers(2, 4), min_copy_tokens=st.integers(1, 2))
    def start(self, num_pages: int, page_tokens: int, min_copy_tokens: int) -> None:
        self.cache = KVCache(num_pages, page_tokens, min_copy_tokens=min_copy_tokens)
        self.min_copy_tokens = min_copy_tokens
        self.device = Device(page_tokens)
        self.queued: list[PageCopy | int] = []  # copies, and pages to be zeroed, for the device to do before a step
        self.writers: list[Writer] = []
        self.past: list[list[int]] = [[]]
        self.has_discarded = False
        self.num_queried = self.num_reused = 0

    def run_queued(self, device: Device) -> None:
        for work in self.queued:
            if isinstance(work, PageCopy):
                device.copy(work)
            else:
                device.zero(work)

    def try_open(self, ids: list[int], num_tokens: int) -> None:
        cache, before = self.cache, books(self.cache)
        num_wanted = -(-num_tokens // cache.page_tokens)
        used = {page for writer in self.writers for page in writer.table.pages}
        opened = cache.open(ids, num_tokens)
        if opened is None:
            assert num_wanted > cache.num_pages - 1 - len(used)
            assert books(cache) == before
            return
        table, page_copy = opened
        num_whole = table.num_reused // cache.page_tokens
        assert table.num_reused < len(ids)
        assert len(table.pages) == max(num_wanted, num_whole)
        assert len(set(table.pages)) == len(table.pages)
        assert 0 not in table.pages
        assert not used & set(table.pages[num_whole:]), "a page that is in use was handed out"
        if page_copy is not None:
            assert page_copy.source != page_copy.target == table.pages[num_whole]
            assert page_copy.num_tokens == table.num_reused % cache.page_tokens >= self.min_copy_tokens
            self.queued.append(page_copy)
        self.num_queried += len(ids)
        self.num_reused += table.num_reused
        self.writers.append(Writer(table, ids, table.num_reused))
        self.past = [*self.past[-7:], ids]

    @rule(data=st.data(), more=st.lists(TOKENS, min_size=1, max_size=9), num_ahead=st.integers(-4, 4))
    def open(self, data: st.DataObject, more: list[int], num_ahead: int) -> None:
        """A prompt that starts like a former one."""
        former = data.draw(st.sampled_from(self.past))
        ids = former[: data.draw(st.integers(0, len(former)))] + more
        self.try_open(ids, max(1, len(ids) + num_ahead))

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), more=st.lists(TOKENS, max_size=5), num_tokens=st.integers(1, 9), has_tail=st.booleans())
    def step(self, data: st.DataObject, more: list[int], num_tokens: int, has_tail: bool) -> None:
        """Some more tokens, perhaps generated just now, of one sequence."""
        writer = data.draw(st.sampled_from(self.writers))
        table = writer.table
        writer.ids = writer.ids + more
        target = min(len(writer.ids), writer.num_computed + num_tokens)
        before, pages = books(self.cache), list(table.pages)
        if not self.cache.extend(table, target):
            assert -(-target // self.cache.page_tokens) - len(pages) > self.cache.num_free_pages
            assert (books(self.cache), table.pages) == (before, pages)
            return
        assert table.pages[: len(pages)] == pages
        self.run_queued(self.device)
        self.queued.clear()
        others = {page for other in self.writers if other is not writer for page in other.table.pages}
        for position in range(writer.num_computed, target):
            assert table.pages[position // self.cache.page_tokens] not in others, "written while others read it"
            self.device.write(table, writer.ids, position)
        writer.num_computed = target
        self.past = [*self.past[-7:], writer.ids]
        (self.cache.commit_tail if has_tail else self.cache.commit)(table, writer.ids, target)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), has_tail=st.booleans(), is_preempted=st.booleans())
    def close(self, data: st.DataObject, has_tail: bool, is_preempted: bool) -> None:
        writer = self.writers.pop(data.draw(st.integers(0, len(self.writers) - 1)))
        if has_tail:
            self.cache.commit_tail(writer.table, writer.ids, writer.num_computed)
        self.cache.close(writer.table)
        assert writer.table.pages == []
        if is_preempted:
            self.try_open(writer.ids, len(writer.ids))

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        writer = self.writers.pop(data.draw(st.integers(0, len(self.writers) - 1)))
        others = {page for other in self.writers for page in other.table.pages}
        own = set(writer.table.pages) - others
        forgotten = self.cache.discard(writer.table)
        assert sorted(forgotten) == sorted(own)
        self.queued += forgotten
        self.has_discarded = True

    @invariant()
    def every_page_is_used_or_free(self) -> None:
        cache = self.cache
        used = {page for writer in self.writers for page in writer.table.pages}
        assert cache.num_used_pages == len(used)
        assert cache.num_free_pages + cache.num_used_pages == cache.num_pages - 1
        assert 0 <= cache.num_cached_pages <= cache.num_free_pages
        assert (cache.num_queried_tokens, cache.num_reused_tokens) == (self.num_queried, self.num_reused)

    @invariant()
    def every_free_page_can_be_handed_out_once(self) -> None:
        cache = copy.deepcopy(self.cache)
        used = {page for writer in self.writers for page in writer.table.pages}
        opened = cache.open([9], cache.num_free_pages * cache.page_tokens)
        assert opened is not None
        assert sorted([*opened[0].pages, *used]) == list(range(1, cache.num_pages))

    @invariant()
    def what_sequences_read_is_what_their_ids_stand_for(self) -> None:
        device = copy.deepcopy(self.device)
        self.run_queued(device)
        assert all(device.holds(writer.table, writer.ids, writer.num_computed) for writer in self.writers)

    @invariant()
    def whatever_is_found_is_what_its_ids_stand_for(self) -> None:
        """As a table opened now would find it, whole pages and the part to copy."""
        for ids in self.past:
            cache, device = copy.deepcopy(self.cache), copy.deepcopy(self.device)
            self.run_queued(device)
            ids = [*ids, 9]
            opened = cache.open(ids, len(ids)) or cache.open(ids, 0)
            assert opened is not None
            table, page_copy = opened
            if page_copy is not None:
                device.copy(page_copy)
            assert device.holds(table, ids, table.num_reused)

    @invariant()
    def all_full_pages_are_found_until_evicted_or_discarded(self) -> None:
        if self.cache.num_evictions or self.has_discarded:
            return
        for writer in self.writers:
            num_full = writer.num_computed // self.cache.page_tokens
            opened = copy.deepcopy(self.cache).open([*writer.ids[: writer.num_computed], 9], 0)
            assert opened is not None and len(opened[0].pages) >= num_full

    @invariant()
    def no_cached_page_has_lost_the_chain_before_it(self) -> None:
        """Else it would hold a place and nobody could find it. Only what was thrown away may leave such pages."""
        cache = self.cache
        parents = {cache._contents[page].parent for page in cache._cached}
        assert self.has_discarded or parents <= {_ROOT_KEY, *cache._page_of_key}

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for writer in self.writers:
                self.cache.close(writer.table)
            assert self.cache.num_free_pages == self.cache.num_pages - 1


CacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestNoPageIsLeakedLostOrReadForAnother = CacheMachine.TestCase
