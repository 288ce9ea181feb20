"""The books of one model's paged KV cache: which page belongs to whom, and which can be reused as a prefix.

Keys and values of a token depend on all tokens before it, so a full page is known by a hash of its ids and of the page
before it, a chain back to the first token. Whoever opens a table with the same beginning shares such pages by
reference; of the page in which two beginnings part, the equal part is copied. What nobody refers to stays findable
until its page is needed, least recently used first.

Plain Python: tensors, and the copies this file asks for, are the runner's. One thread calls it, the loop's; others may
read the numbers, each of which is right by itself.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

# A shorter beginning is computed about as fast as it is copied, and any two chat prompts share a few ids.
MIN_COPY_TOKENS = 8
# How many pages with the same first ids are compared for the longest copy, the newest first.
MAX_COPY_CANDIDATES = 8

_ID_BYTES = 8
_ROOT_KEY = bytes(32)  # stands before the first page of every chain


@dataclass(frozen=True)
class PageCopy:
    """The first `num_tokens` tokens of page `source`, of every layer, are to be copied to page `target`.

    What tables ask of the device happens there in the order of the calls that asked, copies of `open` and zeroing
    after `discard` alike, one by one and before the next step. Then a copy is right even if its source is handed out
    again before that step: who got it writes later.
    """

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True)
class _Content:
    """What a findable page holds. `ids` is packed; `key` is None while the page is not full."""

    parent: bytes
    ids: bytes
    key: bytes | None


@dataclass(eq=False)
class PageTable:
    """One sequence's pages, made by `KVCache.open` and changed by it alone.

    :param pages: page `i` holds tokens `i * page_tokens` to `(i + 1) * page_tokens - 1`.
    :param num_reused: tokens at the start whose keys and values were found: whole pages, then the part copied.
    """

    pages: list[int]
    num_reused: int
    _keys: list[bytes]  # of the full pages at the start, all of them committed
    _duplicates: dict[int, _Content] = field(default_factory=dict)  # full pages that another page stands for
    _is_closed: bool = False


class KVCache:
    """Page 0 is never handed out: the padding rows of a fixed-size step write there.

    :param num_pages: pages on the device, page 0 included; at least 2.
    :param page_tokens: tokens a page holds.
    :param min_copy_tokens: the shortest part of a page worth a copy.
    :raise ValueError: a number below its least.
    """

    def __init__(self, num_pages: int, page_tokens: int, *, min_copy_tokens: int = MIN_COPY_TOKENS) -> None:
        if num_pages < 2 or page_tokens < 1 or min_copy_tokens < 1:
            raise ValueError(
                f"no cache of {num_pages} pages of {page_tokens} tokens, copies of at least {min_copy_tokens}: "
                "at least 2, 1 and 1"
            )
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_queried_tokens = 0
        self.num_reused_tokens = 0
        self.num_evictions = 0
        self._min_copy_tokens = min_copy_tokens
        self._num_references = [0] * num_pages
        self._empty = list(range(num_pages - 1, 0, -1))  # hold nothing findable; the last is handed out first
        self._cached: OrderedDict[int, None] = OrderedDict()  # findable, without references; the first is evicted first
        # Every findable page is in the first of these, in the second if it is full, and in one group of the third:
        # the pages that follow the same chain with the same `min_copy_tokens` ids, the newest last.
        self._contents: dict[int, _Content] = {}
        self._page_of_key: dict[bytes, int] = {}
        self._copy_groups: dict[bytes, dict[int, None]] = {}

    @property
    def capacity_tokens(self) -> int:
        """The most tokens that one sequence, alone, can have room for."""
        return (self.num_pages - 1) * self.page_tokens

    @property
    def num_free_pages(self) -> int:
        """Pages that can be handed out now: the empty and the cached."""
        return len(self._empty) + len(self._cached)

    @property
    def num_used_pages(self) -> int:
        """Pages that some table refers to."""
        return self.num_pages - 1 - self.num_free_pages

    @property
    def num_cached_pages(self) -> int:
        """Pages that no table refers to, kept for reuse."""
        return len(self._cached)

    def open(
        self, ids: Sequence[int], num_tokens: int, *, num_spare_pages: int = 0
    ) -> tuple[PageTable, PageCopy | None] | None:
        """A table that starts with what is cached of `ids`, and the copy that completes its start.

        The last id is never taken from the cache: it must be computed, as its logits are wanted.

        :param ids: the prefix ids of all tokens to be computed, each within 64 bits, signed.
        :param num_tokens: tokens to have room for, those found included. If the whole pages found suffice for them, no
            page is added and nothing is copied.
        :param num_spare_pages: pages that must be free after it, for those who hold tables already.
        :return: None if there are not enough pages; then nothing has changed.
        """
        keys, found = self._find_pages(ids)
        num_fresh = max(0, self._num_pages_for(num_tokens) - len(found))
        num_left = self.num_free_pages - sum(page in self._cached for page in found) - num_fresh
        if num_left < num_spare_pages:
            return None
        num_reused = len(found) * self.page_tokens
        part = self._find_part(ids, num_reused, keys[-1] if keys else _ROOT_KEY) if num_fresh else None
        for page in found:
            self._num_references[page] += 1
            self._cached.pop(page, None)
        if part is not None and part[0] in self._cached:
            self._cached.move_to_end(part[0])  # used, and the last of those that this call may evict
        fresh = self._take_pages(num_fresh)
        copy = None
        if part is not None:
            source, num_copied = part
            num_reused += num_copied
            if source != fresh[0]:  # else it was the last page there was, and its tokens are in place
                copy = PageCopy(source, fresh[0], num_copied)
            if source in self._cached and len(self._contents[source].ids) == num_copied * _ID_BYTES:
                self._cached.move_to_end(source, last=False)  # the target will hold all that it holds
        self.num_queried_tokens += len(ids)
        self.num_reused_tokens += num_reused
        return PageTable([*found, *fresh], num_reused, keys), copy

    def extend(self, table: PageTable, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens in all. False if there are not enough pages; then nothing has changed.

        :raise ValueError: the table is closed.
        """
        if table._is_closed:
            raise ValueError("a closed table cannot be extended")
        num_fresh = self._num_pages_for(num_tokens) - len(table.pages)
        if num_fresh > self.num_free_pages:
            return False
        table.pages += self._take_pages(num_fresh)
        return True

    def commit(self, table: PageTable, ids: Sequence[int], num_computed: int) -> None:
        """Keys and values of `ids[:num_computed]` are on the device, or queued there before all that is asked later:
        pages filled since the last call become findable.

        Called for every token: it reads `ids` only when a page was filled, and only that page's slice.

        :raise ValueError: more tokens than ids, or than the table has room for.
        """
        if num_computed > len(table.pages) * self.page_tokens:
            raise ValueError(f"{num_computed} tokens in {len(table.pages)} pages of {self.page_tokens}")
        while (len(table._keys) + 1) * self.page_tokens <= num_computed:
            content = self._next_content(table, ids, self.page_tokens)
            page = table.pages[len(table._keys)]
            assert content.key is not None
            table._keys.append(content.key)
            self._forget(page)  # its part, if that was findable
            if content.key in self._page_of_key:
                table._duplicates[page] = content
            else:
                self._remember(page, content)

    def commit_tail(self, table: PageTable, ids: Sequence[int], num_computed: int) -> None:
        """`commit`, and the part of the last page becomes findable for copies; the table may go on filling that page.

        Called when a prompt has been computed, and before `close`.

        :raise ValueError: as `commit`.
        """
        self.commit(table, ids, num_computed)
        num_tail = num_computed - len(table._keys) * self.page_tokens
        if num_tail < self._min_copy_tokens:
            return
        content = self._next_content(table, ids, num_tail)
        page = table.pages[len(table._keys)]
        known = self._contents.get(page)
        if known is None or len(known.ids) < len(content.ids):
            self._forget(page)
            self._remember(page, content)

    def close(self, table: PageTable) -> None:
        """Give all pages back; what was committed stays findable until its page is needed. Twice is once."""
        # From the end, so that the end of a chain is evicted before its start, without which it cannot be found.
        for page in reversed(table.pages):
            content = table._duplicates.get(page)
            if content is not None and content.key is not None:
                twin = self._page_of_key.get(content.key)
                if twin is None:
                    self._remember(page, content)
                elif twin in self._cached:
                    self._cached.move_to_end(twin)
            self._num_references[page] -= 1
            if not self._num_references[page]:
                if page in self._contents:
                    self._cached[page] = None
                else:
                    self._empty.append(page)
        self._end(table)

    def discard(self, table: PageTable) -> list[int]:
        """Give all pages back and forget those that only this table refers to, found ones included: what they hold is
        not to be trusted. Pages shared with other tables stay.

        :return: the pages forgotten, free now. The caller overwrites them with zeros, as not even a masked product
            gets rid of a NaN.
        """
        forgotten = []
        for page in reversed(table.pages):
            self._num_references[page] -= 1
            if not self._num_references[page]:
                self._forget(page)
                forgotten.append(page)
        self._empty += forgotten
        self._end(table)
        return forgotten

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    def _end(self, table: PageTable) -> None:
        table.pages.clear()
        table._keys.clear()
        table._duplicates.clear()
        table._is_closed = True

    # Finding

    def _find_pages(self, ids: Sequence[int]) -> tuple[list[bytes], list[int]]:
        """Keys and pages of the longest chain of full pages within `ids[:-1]`."""
        keys: list[bytes] = []
        pages: list[int] = []
        key = _ROOT_KEY
        for start in range(0, len(ids) - self.page_tokens, self.page_tokens):
            key = _chain_key(key, _pack(ids[start : start + self.page_tokens]))
            page = self._page_of_key.get(key)
            if page is None:
                break
            keys.append(key)
            pages.append(page)
        return keys, pages

    def _find_part(self, ids: Sequence[int], start: int, parent: bytes) -> tuple[int, int] | None:
        """The page after `parent` that begins with most of `ids[start:-1]`, and with how many tokens of it."""
        wanted = _pack(ids[start : min(start + self.page_tokens, len(ids) - 1)])
        if len(wanted) < self._min_copy_tokens * _ID_BYTES:
            return None
        group = self._copy_groups.get(self._copy_group(parent, wanted), {})
        newest = islice(reversed(group), MAX_COPY_CANDIDATES)
        parts = [(page, _num_common(wanted, self._contents[page].ids)) for page in newest]
        return max(parts, key=lambda part: part[1], default=None)

    def _copy_group(self, parent: bytes, ids: bytes) -> bytes:
        return parent + ids[: self._min_copy_tokens * _ID_BYTES]

    def _next_content(self, table: PageTable, ids: Sequence[int], num_tokens: int) -> _Content:
        """What the page after the full ones holds, if it holds `num_tokens` tokens."""
        start = len(table._keys) * self.page_tokens
        packed = _pack(ids[start : start + num_tokens])
        if len(packed) != num_tokens * _ID_BYTES:
            raise ValueError(f"{start + num_tokens} tokens computed of {len(ids)} ids")
        parent = table._keys[-1] if table._keys else _ROOT_KEY
        return _Content(parent, packed, _chain_key(parent, packed) if num_tokens == self.page_tokens else None)

    # Keeping

    def _remember(self, page: int, content: _Content) -> None:
        self._contents[page] = content
        if content.key is not None:
            self._page_of_key[content.key] = page
        self._copy_groups.setdefault(self._copy_group(content.parent, content.ids), {})[page] = None

    def _forget(self, page: int) -> None:
        """The page cannot be found any more. One that follows it can be again once somebody computes it anew."""
        content = self._contents.pop(page, None)
        if content is None:
            return
        if content.key is not None:
            del self._page_of_key[content.key]
        name = self._copy_group(content.parent, content.ids)
        group = self._copy_groups[name]
        del group[page]
        if not group:
            del self._copy_groups[name]

    def _take_pages(self, count: int) -> list[int]:
        """Pages that nobody referred to, the empty first, now with a reference each. The caller has counted them."""
        pages = []
        for _ in range(count):
            if self._empty:
                page = self._empty.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
                self.num_evictions += 1
            self._num_references[page] = 1
            pages.append(page)
        return pages


def _pack(ids: Sequence[int]) -> bytes:
    return array("q", ids).tobytes()


def _chain_key(parent: bytes, packed_ids: bytes) -> bytes:
    # 256 bits: nobody can make two prompts that collide, and so read with another's keys and values.
    return hashlib.blake2b(parent + packed_ids, digest_size=len(_ROOT_KEY)).digest()


def _num_common(first: bytes, second: bytes) -> int:
    """How many packed ids two pages have in common from their start. Whole pages at a time, not id by id."""
    size = min(len(first), len(second))
    difference = int.from_bytes(first[:size], "little") ^ int.from_bytes(second[:size], "little")
    if not difference:
        return size // _ID_BYTES
    lowest_bit = (difference & -difference).bit_length() - 1
    return lowest_bit // (8 * _ID_BYTES)
