from evaluation import bare
from swapserve.keeper import criu


def test_the_bare_mechanism_uses_the_keepers_own_options() -> None:
    assert set(bare.OPTIONS) == set(criu._COMMON)
    assert bare.NETNS_KEY == criu.NETNS_KEY
