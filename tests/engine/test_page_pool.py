"""Pages: one holder each unless their content is shared, found only while it is intact, and none lost."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specformer_jax.engine.page_pool import PagePool

SIZE = 4
PAGES, SHORT = 6, 2  # so few and so short that rows often begin alike, and pages run out


def test_a_page_is_known_by_all_tokens_before_it_and_the_one_after():
    pool = PagePool(range(9), SIZE)
    tokens = list(range(13))
    assert len(pool.chain(tokens)) == 3
    assert len(pool.chain(tokens[:12])) == 2, "the token after the third page is not known"
    assert pool.chain([9, *tokens[1:]])[1] != pool.chain(tokens)[1]
    assert pool.chain([*tokens[:8], 9])[:1] == pool.chain(tokens)[:1]
    assert pool.chain([*tokens[:8], 9])[1] != pool.chain(tokens)[1]


def test_a_chain_goes_on_where_it_stopped():
    pool, tokens = PagePool(range(9), SIZE), list(range(30))
    whole = pool.chain(tokens)
    assert whole[:2] + pool.chain(tokens, 2, whole[1]) == whole


def test_what_was_given_back_longest_ago_is_taken_first_and_of_a_row_its_last_page():
    pool = PagePool(range(6), SIZE)
    rows = {}
    for first in (0, 100):
        chain = pool.chain([first, *range(12)])
        rows[first] = pool.take(3)
        for page, digest in zip(rows[first], chain, strict=True):
            pool.keep(page, digest)
    pool.give_back(rows[0])
    pool.give_back(rows[100])
    assert [pool.take(1)[0] for _ in range(6)] == [*reversed(rows[0]), *reversed(rows[100])]


def test_what_is_forgotten_is_not_found_and_its_pages_are_there():
    pool = PagePool(range(4), 2)
    chain = pool.chain((1, 2, 3, 4, 5))
    pages = pool.take(2)
    for page, digest in zip(pages, chain, strict=True):
        pool.keep(page, digest)
    pool.give_back(pages[:1])
    assert pool.find(chain) == pages
    pool.forget()
    assert pool.find(chain) == [] and pool.free == 3
    pool.give_back(pages[1:])
    assert sorted(pool.take(4)) == [0, 1, 2, 3]


def test_pages_without_content_are_taken_before_any_with():
    pool = PagePool(range(4), SIZE)
    old, new = pool.take(1), pool.take(1)
    pool.keep(old[0], pool.chain(range(5))[0])
    pool.give_back(old)
    pool.give_back(new)
    assert [pool.take(1)[0] for _ in range(4)][-1] == old[0]


class Rows(RuleBasedStateMachine):
    """Rows of few different tokens come, grow and go; a record of our own says what each page holds."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(range(10, 10 + PAGES), SHORT)
        self.rows: list[tuple[list[int], list[int]]] = []  # tokens and pages
        self.content: dict[int, tuple[int, ...]] = {}  # of full pages: all tokens up to the one after them

    def write(self, tokens, pages):
        for i, digest in enumerate(self.pool.chain(tokens)):
            self.content[pages[i]] = tuple(tokens[: (i + 1) * SHORT + 1])
            self.pool.keep(pages[i], digest)

    def take(self, count):
        before = self.pool.free
        taken = self.pool.take(count)
        assert (taken is None) == (count > before)
        for page in taken or ():
            assert not any(page in pages for _, pages in self.rows)
            self.content.pop(page, None)
        return taken

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def enter(self, tokens):
        shared = self.pool.find(self.pool.chain(tokens))
        for i, page in enumerate(shared):
            assert self.content[page] == tuple(tokens[: (i + 1) * SHORT + 1]), "what was found is what is there"
        self.pool.hold(shared)
        own = self.take(-(-len(tokens) // SHORT) - len(shared))
        if own is None:
            self.pool.give_back(shared)
        else:
            self.rows.append((tokens, [*shared, *own]))
            self.write(tokens, [*shared, *own])

    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    @precondition(lambda self: self.rows)
    def grow(self, data, more):
        tokens, pages = data.draw(st.sampled_from(self.rows))
        own = self.take(-(-(len(tokens) + len(more)) // SHORT) - len(pages))
        if own is not None:
            tokens += more
            pages += own
            self.write(tokens, pages)

    @rule(data=st.data())
    @precondition(lambda self: self.rows)
    def leave(self, data):
        _, pages = self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))
        self.pool.give_back(pages)

    @invariant()
    def no_page_is_lost_or_held_twice_unless_its_content_is_shared(self):
        holders = [page for _, pages in self.rows for page in pages]
        assert self.pool.free == PAGES - len(set(holders))
        for page in set(holders):
            beginnings = {tuple(t[: (p.index(page) + 1) * SHORT + 1]) for t, p in self.rows if page in p}
            assert len(beginnings) == 1


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
